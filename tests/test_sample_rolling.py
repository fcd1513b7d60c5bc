"""Roll-outs against oracles, ordinary next-frame diffusion and the linear-Gaussian truth; in float64."""

from __future__ import annotations

from itertools import islice, pairwise

import pytest
import torch
from torch.testing import assert_close

from noise_cases import IDEAL, normal
from sfumato.errors import BadInput
from sfumato.noise import Cosine, GaussianProcess, Window
from sfumato.noise.analytic import GaussianMixture, MixtureDenoiser
from sfumato.sample import ddim, ddpm, rollout
from sfumato.sample.rolling import blocks, grid, roll

PROCESS = GaussianProcess(Cosine())


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Recorder:
    """A denoiser that keeps what it was asked, and answers with a fixed function of it."""

    process, prediction = PROCESS, "x0"

    def __init__(self, answer=lambda z, t: 0.5 * z.mean(1, keepdim=True).expand_as(z) + 0.1 * z):
        self.answer, self.calls = answer, []

    def __call__(self, z, t, cond=None):
        self.calls.append((z.clone(), t.clone()))
        return self.answer(z, t)


def autoregressive(phi: float, frames: int) -> MixtureDenoiser:
    """The exact denoiser of x_{k+1} = phi x_k + sqrt(1 - phi^2) xi, of variance 1, in a window of frames 1 x 1 x 1."""
    place = torch.arange(frames, dtype=torch.float64)
    covariance = phi ** (place[:, None] - place).abs()
    return MixtureDenoiser(PROCESS, GaussianMixture.gaussian(torch.zeros(frames, 1, 1, 1), covariance))


@pytest.mark.parametrize("clean", [0, 1, 3])
@pytest.mark.parametrize("way", [roll, blocks])
def test_one_frame_under_way_is_next_frame_diffusion_to_the_bit(clean, way):
    """W - n = 1: one frame at a time from noise at one time, the context clean, with the same noise."""
    window, steps = Window(clean + 1, clean), 4
    context = normal(2, clean, 1, 2, 2, seed=5)
    denoiser = Recorder()
    got = list(islice(way(denoiser, context, window, steps, generator=rng()), 3))
    draws, given = rng(), context
    for frame in got:
        z = torch.randn(2, 1, 1, 2, 2, generator=draws, dtype=torch.float64)
        for t, s in pairwise(torch.linspace(1, 0, steps + 1, dtype=torch.float64)):
            x0 = denoiser.answer(torch.cat([given, z], dim=1), t)[:, -1:]
            mean, var = PROCESS.posterior(z, x0, t, s)
            noise = torch.randn(2, clean + 1, 1, 2, 2, generator=draws, dtype=torch.float64)[:, -1:]
            z = PROCESS.sample(mean, var, noise)
        assert torch.equal(frame, z[:, 0])
        given = torch.cat([given, z], dim=1)[:, 1:]


@pytest.mark.parametrize("window", [Window(5, 2), Window(4), Window(3, 2)])
def test_times_go_through_init_then_roll(window):
    denoiser, steps = Recorder(), 3
    context = normal(1, window.clean, 1, 1, 1)
    list(islice(roll(denoiser, context, window, steps, generator=rng()), 4))
    times = [t for _, t in denoiser.calls]
    first = steps * window.noisy
    assert len(times) == first + 3 * steps
    assert torch.equal(torch.stack(times[:first]), grid(window, "init", first)[:-1])
    for start in range(first, len(times), steps):
        assert torch.equal(torch.stack(times[start : start + steps]), grid(window, "rolling", steps)[:-1])


@pytest.mark.parametrize("window", [Window(5, 2), Window(4), Window(3, 2)])
def test_context_is_what_was_emitted_last(window):
    denoiser, steps = Recorder(), 2
    context = normal(2, window.clean, 1, 1, 1)
    frames = list(islice(roll(denoiser, context, window, steps, generator=rng()), 6))
    history = torch.cat([context, torch.stack(frames, dim=1)], dim=1)
    first = steps * window.noisy
    for call, (z, _) in enumerate(denoiser.calls):
        passed = 0 if call < first else 1 + (call - first) // steps
        assert torch.equal(z[:, : window.clean], history[:, passed : passed + window.clean])


@pytest.mark.parametrize("way", [roll, blocks])
@pytest.mark.parametrize("schedule", [Cosine(), IDEAL], ids=["bounded", "ideal"])
@pytest.mark.parametrize("window", [Window(6, 2), Window(5)])
def test_an_oracle_gets_its_frames_back(window, way, schedule):
    """x0_hat = x: what comes out is x to within the noise of time 0 (none, for an unbounded schedule)."""
    truth, steps, emitted = normal(1, 20, 1, 2, 2, seed=3), 5, 9
    process = GaussianProcess(schedule)
    calls = 0

    def oracle(z, t):
        nonlocal calls
        if way is blocks:
            start = calls // (steps * window.noisy) * window.noisy
        else:
            start = max(0, 1 + (calls - steps * window.noisy) // steps)
        calls += 1
        return truth[:, start : start + window.frames]

    denoiser = Recorder(oracle)
    denoiser.process = process
    frames = islice(way(denoiser, truth[:, : window.clean], window, steps, generator=rng()), emitted)
    got = torch.stack(list(frames), dim=1)
    alpha, sigma = process.alpha_sigma(0.0)
    noise = (got - alpha * truth[:, window.clean : window.clean + emitted]) / max(sigma, 1e-12)
    assert noise.abs().max() < 5
    if sigma:
        assert 0.5 < noise.std() < 1.5


@pytest.mark.parametrize("way", [roll, blocks])
def test_network_calls_per_frame_are_equal(way):
    window, steps, denoiser = Window(6, 2), 3, Recorder()
    frames = way(denoiser, normal(1, 2, 1, 1, 1), window, steps, generator=rng())
    list(islice(frames, 4))
    after_one_window = len(denoiser.calls)
    list(islice(frames, 40))
    assert len(denoiser.calls) - after_one_window == 40 * steps


@pytest.mark.parametrize("way", [roll, blocks])
def test_a_list_of_generators_makes_sequences_independent_of_their_batch(way):
    window, context = Window(4, 1), normal(3, 1, 1, 2, 2)
    together = list(islice(way(Recorder(), context, window, 2, generator=[rng(i) for i in range(3)]), 5))
    alone = list(islice(way(Recorder(), context[1:2], window, 2, generator=[rng(1)]), 5))
    for some, one in zip(together, alone, strict=True):
        assert torch.equal(some[1:2], one)


@pytest.mark.parametrize("n_frames", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("window", [Window(4, 1), Window(3, 2), Window(3)])
def test_finishing_lets_the_window_run_out(window, n_frames):
    denoiser, steps, context = Recorder(), 2, normal(1, window.clean, 1, 1, 1)
    got = rollout(denoiser, context, n_frames, window, steps, generator=rng(), finish=True)
    assert got.shape == (1, n_frames, 1, 1, 1)
    usual = rollout(Recorder(), context, n_frames, window, steps, generator=rng())
    common = max(n_frames - window.noisy, 0) + 1
    assert torch.equal(got[:, :common], usual[:, :common])
    whole = max(n_frames, window.noisy)
    assert len(denoiser.calls) == steps * (window.noisy + whole - 1)  # one pass a frame, as without finishing
    last = denoiser.calls[-1][1]
    assert_close(last, window.times("rolling", 1 / steps - (window.noisy - 1))[None], rtol=0, atol=1e-12)


def test_finishing_is_exact_with_an_oracle():
    truth, window, steps = normal(1, 9, 1, 1, 1, seed=3), Window(4, 1), 3
    calls = 0

    def oracle(z, t):
        nonlocal calls
        start = min(max(0, 1 + (calls - steps * window.noisy) // steps), 5)
        calls += 1
        return truth[:, start : start + window.frames]

    got = rollout(Recorder(oracle), truth[:, :1], 8, window, steps, generator=rng(), finish=True)
    assert (got - truth[:, 1:]).abs().max() < 5 * PROCESS.alpha_sigma(0.0)[1]


PHI = 0.8


def covariance_of_rollout(window: Window, steps: int, n_frames: int, schedule: str) -> torch.Tensor:
    """Of one frame of context and the frames after it, for the AR(1) process: no chance in it, since all is linear.

    Every step is z -> (a + b G) z + noise for the gain G of the exact denoiser in the window, and the covariance of the
    whole sequence follows.
    """
    denoiser = autoregressive(PHI, window.frames)
    length, eye = n_frames + 2 * window.frames, torch.eye(window.frames, dtype=torch.float64)
    total = torch.eye(length, dtype=torch.float64)

    def run(start: int, times: torch.Tensor) -> None:
        place = slice(start, start + window.frames)
        for t, s in pairwise(times):
            a, b, var = (x.flatten() for x in PROCESS.coefficients(t[0], s[0]))
            gain = denoiser(eye.reshape(*eye.shape, 1, 1, 1), t).reshape(eye.shape).T
            step = torch.eye(length, dtype=torch.float64)
            step[place, place] = torch.diag(a) + b[:, None] * gain
            total.copy_(step @ total @ step.T)
            total[place, place] += torch.diag(var)

    block = grid(window, "init" if schedule == "rolling" else "standard", steps * window.noisy)
    run(0, block)
    if schedule == "rolling":
        for start in range(1, n_frames):
            run(start, grid(window, "rolling", steps))
    else:
        for start in range(window.noisy, n_frames, window.noisy):
            run(start, block)
    return total[: n_frames + 1, : n_frames + 1]


def true_covariance(n_frames: int) -> torch.Tensor:
    place = torch.arange(n_frames + 1, dtype=torch.float64)
    return PHI ** (place[:, None] - place).abs()


@pytest.mark.parametrize("schedule", ["rolling", "standard"])
def test_autoregressive_process_is_reached_as_steps_become_many(schedule):
    """All variances and correlations of 6 frames of AR(1): the error of both ways falls as 1 / steps, to nothing."""
    window, truth = Window(3, 1), true_covariance(6)
    found = [covariance_of_rollout(window, steps, 6, schedule) for steps in (10, 20, 40)]
    errors = [(covariance - truth).abs().max().item() for covariance in found]
    for coarse, fine in pairwise(errors):
        assert 1.7 < coarse / fine < 2.3
    # what falls as 1 / steps taken away, what is left falls as its square
    assert (2 * found[2] - found[1] - truth).abs().max() < 4 * errors[2] ** 2


@pytest.mark.parametrize("schedule", ["rolling", "standard"])
def test_autoregressive_rollouts_have_that_covariance(schedule):
    """2,000 sequences against the covariance without chance, to 4.5 standard errors of each of its entries."""
    window, steps, n = Window(4, 1), 10, 2000
    context = normal(n, 1, 1, 1, 1, seed=1)
    denoiser = autoregressive(PHI, window.frames)
    got = rollout(denoiser, context, 9, window, steps, generator=rng(2), schedule=schedule)
    x = torch.cat([context, got], dim=1).flatten(1)
    exact = covariance_of_rollout(window, steps, 9, schedule)
    chance = ((exact.diagonal()[:, None] * exact.diagonal() + exact**2) / n).sqrt()
    assert ((x.T @ x / n - exact) / chance).abs().max() < 4.5
    # lag 1 of the frames pooled, as one long sequence: standard error sqrt((1 - phi^2) / length)
    pooled = (x[:, :-1] * x[:, 1:]).sum() / (x[:, :-1] ** 2).sum()
    bias = (exact - true_covariance(9)).abs().max()
    assert abs(pooled - PHI) < bias + 4 * ((1 - PHI**2) / (9 * n)) ** 0.5


def test_deterministic_sampler_is_a_choice():
    window, context = Window(4, 1), normal(1, 1, 1, 1, 1)
    first = rollout(autoregressive(0.8, 4), context, 3, window, 4, generator=rng(), sampler=ddim)
    other = rollout(autoregressive(0.8, 4), context, 3, window, 4, generator=rng(), sampler=ddpm)
    assert not torch.allclose(first, other)


def test_conditioning_reaches_the_denoiser_and_no_graph_is_kept():
    seen = set()

    class Conditional(Recorder):
        def __call__(self, z, t, cond=None):
            seen.add(cond)
            return super().__call__(z, t) * torch.ones((), dtype=z.dtype, requires_grad=True)

    frames = roll(Conditional(), normal(1, 1, 1, 1, 1), Window(3, 1), 1, "label", generator=rng())
    assert not next(frames).requires_grad
    assert torch.is_grad_enabled()
    assert seen == {"label"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": torch.zeros(1, 1, 1, 2, 2)}, "2 frames of context"),
        ({"context": torch.zeros(1, 2, 2, 2)}, "got a tensor of shape"),
        ({"n_frames": 0}, "at least one frame"),
        ({"schedule": "rollin"}, "did you mean rolling"),
        ({"schedule": "standard", "finish": True}, "only with the rolling schedule"),
        ({"generator": None}, "pass generator"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"context": torch.zeros(1, 2, 1, 2, 2), "n_frames": 2, "window": Window(4, 2), "steps": 1}
    with pytest.raises(BadInput, match=message):
        rollout(Recorder(), **{**good, "generator": rng(), **change})
