"""Jump Your Steps and what it stands on: chains of tokens against matrix exponentials, samplers, KLUB, the search."""

from __future__ import annotations

import itertools
import json
import math
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from sfumato.errors import BadInput
from sfumato.noise import (
    Absorbing,
    ChainDenoiser,
    Cosine,
    DiscreteDenoiser,
    GaussianProcess,
    GaussianTokens,
    UniformTokens,
)
from sfumato.noise.analytic import GaussianMixture, MixtureDenoiser
from sfumato.noise.config import from_config, to_config
from sfumato.noise.discrete import base_rate, gaussian_law, pick
from sfumato.sample import JYS, JumpSchedule, euler, k_gillespie, tau_leaping
from sfumato.sample.jumps import golden_section, grid_of, hierarchy, increasing, widened
from sfumato.sample.klub import Gain, klub, masked_at
from sfumato.sample.tokens import euler_law, rates

PROCESSES = {
    "absorbing": Absorbing(5),
    "uniform": UniformTokens(4),
    "uniform-slow": UniformTokens(4, 0.3),
    "gaussian": GaussianTokens(8, rate_sigma=2.0, noise_sigma=3.0, time_base=0.5, time_exponential=10.0),
    "gaussian-odd": GaussianTokens(7, rate_sigma=2.0, noise_sigma=3.0, time_base=0.5, time_exponential=10.0),
}
every = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def law(*shape: int, seed: int = 0) -> torch.Tensor:
    x = torch.rand(*shape, generator=rng(seed), dtype=torch.float64) + 0.1
    return x / x.sum(-1, keepdim=True)


def chain(process, values: int, prediction: str = "posterior") -> ChainDenoiser:
    step = law(values, values, seed=1) ** 3
    return ChainDenoiser(process, law(values), step / step.sum(-1, keepdim=True), prediction)


def of_values(process) -> int:
    return process.states - (process.mask is not None)


# The chains


@every
def test_marginals_are_the_exponentials_of_the_rates(process):
    """dq/dt = q I'(t) Q, integrated in 300 exponentials of the rates in the middle of short steps."""
    assert_close(process.marginal(0.0), torch.eye(process.states).double(), rtol=0, atol=1e-7)
    n, end = 300, 0.7
    q = torch.eye(process.states).double()
    for i in range(n):
        q = q @ torch.linalg.matrix_exp(process.rate((i + 0.5) * end / n) * end / n)
    assert_close(process.marginal(end), q, rtol=1e-4, atol=1e-6)
    assert_close(process.marginal(0.3) @ process.marginal(end, 0.3), q, rtol=1e-4, atol=1e-6)
    assert_close(process.rate(0.4).sum(-1), torch.zeros(process.states).double(), rtol=0, atol=1e-9)
    noise = process.stationary()
    assert_close(noise @ process.rate(0.4), torch.zeros(process.states).double(), rtol=0, atol=1e-9)
    assert process.marginal(torch.tensor([0.1, 0.2])).shape == (2, process.states, process.states)


@pytest.mark.parametrize("states", [9, 32])
def test_the_narrowest_bell_that_is_taken_has_the_exponentials_of_its_rates(states):
    process = GaussianTokens(states, 3.0, states / 2 / math.sqrt(72) * 1.001, 1.0, 10.0)
    generator = base_rate(states, 3.0, process.noise_sigma)
    assert_close(process.marginal(0.1), torch.matrix_exp(process.integral(0.1) * generator), rtol=0, atol=2e-8)


@every
def test_posteriors_are_bayes_rule(process):
    t, s, n = 0.8, 0.3, process.states
    x0, x = (g.flatten() for g in torch.meshgrid(torch.arange(of_values(process)), torch.arange(n), indexing="ij"))
    there = process.marginal(t)[x0, x] > 0
    x0, x = x0[there], x[there]
    found = process.posterior(x, x0, t, s)
    q_s, q_ts = process.marginal(s), process.marginal(t, s)
    for i in range(len(x)):
        joint = torch.stack([q_s[x0[i], y] * q_ts[y, x[i]] for y in range(n)])
        assert_close(found[i], joint / process.marginal(t)[x0[i], x[i]], rtol=1e-6, atol=1e-8)


@every
def test_rates_of_the_true_posterior_undo_the_noise(process):
    """The law at an earlier time is p_t + dt p_t R for the reverse rates of a single token, to first order."""
    data, t, dt = law(of_values(process)), 0.5, 1e-5
    p = data @ process.marginal(t)[: len(data)]
    x = torch.arange(process.states)
    joint = data[:, None] * process.marginal(t)[: len(data)]
    posterior = torch.nn.functional.pad((joint / joint.sum(0)).mT, (0, process.states - len(data)))
    rate = process.convert(posterior, x, t, "posterior", "rates")
    assert (rate.diagonal() == 0).all() and (rate >= 0).all()
    flow = p @ rate - p * rate.sum(1)
    before = data @ process.marginal(t - dt)[: len(data)]
    assert_close((before - p) / dt, flow, rtol=2e-3, atol=2e-4)


@every
def test_kinds_of_prediction_say_the_same(process):
    denoiser, x = chain(process, of_values(process)), torch.tensor([[0, 2, process.states - 1, 1]])
    posterior, t = denoiser(x, 0.4), 0.4
    score = process.convert(posterior, x, t, "posterior", "score")
    own = score.gather(-1, x[..., None])
    assert_close(own, torch.ones_like(own))
    rate = process.convert(posterior, x, t, "posterior", "rates")
    assert_close(process.convert(score, x, t, "score", "rates"), rate)
    assert_close(process.convert(score, x, t, "score", "posterior"), posterior, rtol=1e-3, atol=1e-4)
    if not isinstance(process, GaussianTokens):
        assert_close(process.convert(rate, x, t, "rates", "score"), score, rtol=1e-6, atol=1e-9)
    several = process.convert(posterior.repeat(2, 1, 1), x.repeat(2, 1), torch.tensor([0.4, 0.6]), "posterior", "rates")
    assert_close(several[:1], rate, rtol=1e-6, atol=1e-12)
    assert not torch.allclose(several[1:], rate)


@every
def test_tokens_at_two_times_are_of_one_path_and_have_the_right_law(process):
    n = 20_000
    uniform = (torch.arange(n).double() + 0.5) / n
    x = torch.ones(n, dtype=torch.long)
    for t in (0.2, 0.9):
        share = torch.bincount(process.diffuse(x, t, uniform), minlength=process.states).double() / n
        assert_close(share, process.marginal(t)[1], rtol=0, atol=1e-4)
    if process.mask is not None:
        early, late = (process.diffuse(x, t, uniform) == process.mask for t in (0.3, 0.7))
        assert (late | ~early).all()
    start = torch.bincount(process.prior(uniform), minlength=process.states).double() / n
    assert_close(start, process.stationary(), rtol=0, atol=1e-4)
    assert from_config(json.loads(json.dumps(to_config(process)))) == process


def test_the_published_gaussian_rates():
    q, s = base_rate(8, 2.0, 3.0), 8
    assert q[0, 3] == math.exp(-((3 - 1) ** 2) / 4) and q[6, 5] == 1 and q[6, 2] == math.exp(-9 / 4)
    pi = gaussian_law(8, 3.0)
    assert_close(pi[:, None] * q, (pi[:, None] * q).mT, rtol=1e-12, atol=1e-14)
    i = torch.arange(s).double()
    assert_close(pi / pi[3], torch.exp(-((i + 1 - 4) ** 2) / 18), rtol=1e-12, atol=0)
    assert UniformTokens(129, 0.03).rate(0.5)[0, 1] == pytest.approx(0.03)


def test_a_masked_token_leaves_at_one_over_t():
    denoiser = chain(Absorbing(4), 3, "rates")
    rate = denoiser(torch.tensor([[3, 0, 3]]), 0.25)
    assert_close(rate.sum(-1), torch.tensor([[4.0, 0.0, 4.0]]).double())


@every
def test_the_exact_denoiser_is_a_sum_over_all_sequences(process):
    values, t = of_values(process), 0.6
    denoiser = chain(process, values)
    x = torch.tensor([[0, process.states - 1, 1]])
    total = torch.zeros(3, process.states).double()
    for x0 in itertools.product(range(values), repeat=3):
        p = denoiser.log_likelihood(torch.tensor([x0])).exp()[0] * math.prod(
            float(process.marginal(t)[a, b]) for a, b in zip(x0, x[0], strict=True)
        )
        for d, a in enumerate(x0):
            total[d, a] += p
    assert_close(denoiser(x, t)[0], total / total.sum(-1, keepdim=True), rtol=1e-6, atol=1e-9)
    assert isinstance(denoiser, DiscreteDenoiser)


# The samplers


def test_euler_is_exact_for_a_masked_token_by_itself():
    process = Absorbing(4)
    data = law(3)
    denoiser = ChainDenoiser(process, data, data.expand(3, 3))
    rate, x = rates(denoiser, torch.tensor([[3]]), 0.8), torch.tensor([[3]])
    moved = euler_law(rate, x, 0.8 - 0.2)[0, 0]
    assert_close(moved, torch.cat([0.75 * data, torch.tensor([0.25]).double()]))


@pytest.mark.parametrize("name", ["absorbing", "uniform", "gaussian"])
def test_many_small_steps_draw_the_chain(name):
    process = PROCESSES[name]
    values = of_values(process)
    denoiser, n = chain(process, values), 1500
    noise = process.prior(torch.rand(n, 2, generator=rng(1), dtype=torch.float64))
    times = torch.linspace(1, 0.01, 40, dtype=torch.float64)
    clean = name != "gaussian"  # the value with the largest posterior is no draw
    steps = [euler] if process.mask is not None else [euler, tau_leaping]
    end = times[-1]
    truth = (denoiser.first[:, None] * denoiser.step).flatten()
    for sampler in steps[: 1 if clean else 2]:
        x = sampler(denoiser, noise, times, generator=rng(2), clean=clean)
        if not clean:  # at the end a little noise is left
            q = process.marginal(end)
            truth = torch.einsum("ab,ax,by->xy", denoiser.first[:, None] * denoiser.step, q, q).flatten()
        share = torch.bincount(x[:, 0] * values + x[:, 1], minlength=values**2).double() / n
        assert float((share - truth).abs().sum()) < 0.25


def test_gillespie_one_by_one_is_exact():
    denoiser, n = chain(Absorbing(4), 3), 2000
    x = k_gillespie(denoiser, torch.full((n, 3), 3), torch.arange(4), generator=rng(1))
    truth = torch.einsum("a,ab,bc->abc", denoiser.first, denoiser.step, denoiser.step).flatten()
    share = torch.bincount(x[:, 0] * 9 + x[:, 1] * 3 + x[:, 2], minlength=27).double() / n
    assert float((share - truth).abs().sum()) < 0.2
    half = k_gillespie(denoiser, torch.full((5, 4), 3), torch.tensor([0, 1, 3]), generator=rng(1), clean=False)
    assert ((half == 3).sum(1) == 1).all()


@pytest.mark.parametrize("sampler", [euler, tau_leaping, k_gillespie])
def test_what_is_drawn_does_not_depend_on_the_batch(sampler):
    process = UniformTokens(4) if sampler is tau_leaping else Absorbing(4)
    denoiser, z = chain(process, of_values(process)), process.prior(torch.rand(3, 5, generator=rng()))
    grid = torch.tensor([0, 2, 5]) if sampler is k_gillespie else torch.tensor([1, 0.4, 1e-5]).double()
    heard = []
    together = sampler(denoiser, z, grid, None, [rng(s) for s in (1, 2, 3)], lambda *a: heard.append(a[0]))
    for i in range(3):
        assert torch.equal(sampler(denoiser, z[i : i + 1], grid, generator=[rng(i + 1)]), together[i : i + 1])
    assert heard == [0, 1] and (together < 4).all() and (process.mask is None or (together != process.mask).all())


def test_pick_never_reaches_what_cannot_be():
    assert pick(torch.tensor([0.0, 1.0, 0.0]), torch.tensor(1 - 1e-9)) == 1
    assert pick(torch.tensor([0.0, 2.0, 2.0, 0.0]), torch.tensor([0.0, 0.49, 0.51]).float()[0]) == 1
    assert pick(torch.tensor([[0.5, 0.5], [0.0, 1.0]]), torch.tensor([0.4, 0.4])).tolist() == [0, 1]


# KLUB


def test_the_bound_is_nothing_where_nothing_changes_and_never_negative():
    r1, r2 = (torch.rand(3, 4, 5, generator=rng(s), dtype=torch.float64) for s in (1, 2))
    assert_close(klub(r1, r1, 0.3), torch.zeros(3).double())
    assert (klub(r1, r2, 0.3) > 0).all()
    assert not klub(r1, r2, 0.0).any()
    exact = 0.3 * (r2 * (r2 / r1).log() - r2 + r1)
    assert_close(klub(r1, r2, 0.3), exact.sum((1, 2)), rtol=1e-5, atol=1e-6)
    official = 0.3 * (r2 * (r2 / r1).log()).sum(2).mean(1)
    assert_close(klub(r1, r2, 0.3, "official"), official, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", ["data", "path"])
@pytest.mark.parametrize("terms", ["full", "official"])
def test_independent_masked_tokens_have_the_gain_in_closed_form(estimator, terms):
    """D (1 - e) (t2 - t3) log(t1 / t2), largest where log(t1 / t2) = 1 - t3 / t2: from 1 to 1e-5 at 0.3679."""
    process, data = Absorbing(4), law(3)
    denoiser = ChainDenoiser(process, data, data.expand(3, 3))
    x0 = denoiser.sample(500, 64, rng())
    gain = Gain(denoiser, x0, "euler", terms, estimator, batch=500)
    for t1, t2, t3 in ((1.0, 0.3679, 1e-5), (0.8, 0.6, 0.3)):
        exact = (1 - 1e-3) * (t2 - t3) * math.log(t1 / t2) * (64 if terms == "full" else 1)
        assert abs(gain(t1, t2, t3) / exact - 1) < 0.03
    assert gain(0.8, 0.6, 0.3) == gain(0.8, 0.6, 0.3)
    assert gain.calls == 2 + 2 + 1 + 1, "the rates at t1 are kept"
    assert gain(0.5, 0.3, 0.3) == 0
    if estimator == "data":
        assert abs(gain(0.5, 0.5, 0.2)) < 1e-6


def test_the_masks_of_k_gillespie():
    x0 = torch.zeros(3, 8, dtype=torch.long)
    uniform = torch.rand(3, 8, generator=rng(), dtype=torch.float64)
    x, t = masked_at(x0, uniform, 5, 9)
    assert ((x == 9).sum(1) == 3).all()
    assert_close(t, uniform.sort(1).values[:, 2] / (1 - 1e-3))
    all_clean, end = masked_at(x0, uniform, 8, 9)
    assert torch.equal(all_clean, x0) and (end == 1e-5).all()
    gain = Gain(chain(Absorbing(4), 3), torch.randint(3, (20, 8), generator=rng()), "k_gillespie")
    assert gain(0, 3.2, 8) == gain(0, 2.9, 8) > 0 and gain(0, 8, 8) == 0


# The search


@pytest.mark.parametrize(("bracket", "probes"), [("official", 17), ("textbook", 15)])
def test_golden_section_finds_the_minimum(bracket, probes):
    tolerance = 0.25 / 1024
    best, seen = golden_section(lambda x: (x - 0.37) ** 2, 0.001, 0.999, tolerance, bracket)
    assert abs(best - 0.37) < tolerance and seen[best] == min(seen.values())
    assert len(seen) <= 3 + 32 and best in seen
    asked: list[float] = []
    told = golden_section(lambda x: asked.append(x) or (x - 0.37) ** 2, 0.001, 0.999, tolerance, bracket)[1]
    assert sorted(asked) == sorted(told), "no point is evaluated twice"
    flat, told = golden_section(lambda x: 1.0, 0.0, 1.0, 0.1, bracket)
    assert flat == 0.0 and len(told) > 3, "the first wins a tie"
    assert golden_section(lambda x: x, 0.6, 0.5, 0.1, bracket)[0] == 0.5
    assert len(golden_section(lambda x: (x - 0.37) ** 2, 0.0, 1.0, 1e-3, "textbook")[1]) <= len(
        golden_section(lambda x: (x - 0.37) ** 2, 0.0, 1.0, 1e-3, "official")[1]
    )


def test_times_of_what_is_masked_lie_with_the_data():
    """On any device, the end where nothing is masked included."""
    x0 = torch.zeros(2, 4, dtype=torch.long, device="meta")
    for decoded in (0, 4):
        _, when = masked_at(x0, torch.rand(2, 4, device="meta"), decoded, 3)
        assert when.device == x0.device


def test_indices_are_moved_apart():
    assert widened([0, 1, 5, 6, 8], 8) == [0, 2, 4, 6, 8]
    assert widened([0, 4, 7, 8], 8) == [0, 4, 6, 8]
    assert increasing([0, 3, 3, 4, 9]) == [0, 3, 4, 5, 9]


def test_schedules_are_nested_and_run_from_end_to_end():
    levels, gains = hierarchy(lambda a, b: ((a + 2 * b) // 3 if b - a > 2 else a + 1, float(b - a)), 16, 128)
    assert list(levels) == [1, 2, 4, 8, 16] and [len(g) for g in gains.values()] == [1, 1, 2, 4, 8]
    for n, indices in levels.items():
        assert len(indices) == n + 1 and indices[0] == 0 and indices[-1] == 128
        assert all(a < b for a, b in pairwise(indices))
    assert set(levels[2]) <= set(levels[4]) <= set(levels[8])
    for steps, last, match in ((3, 8, "power of two"), (16, 8, "give fewer")):
        with pytest.raises(BadInput, match=match):
            hierarchy(lambda a, b: (a + 1, 0.0), steps, last)


def test_two_tokens_have_the_gain_in_closed_form_and_their_step_is_where_trying_all_finds_it():
    """2 (1 - e) (t2 - t3) [log(t1 / t2) + (1 - e) (t1 - t2) I], I the information that either has of the other."""
    denoiser = chain(Absorbing(4), 3)
    joint = denoiser.first[:, None] * denoiser.step
    information = float((joint * (joint / joint.sum(1, keepdim=True) / joint.sum(0)).log()).sum())
    kept, end = 1 - 1e-3, 1e-5
    exact = lambda t: 2 * kept * (t - end) * (math.log(1 / t) + kept * (1 - t) * information)
    data = denoiser.sample(8000, 2, rng())
    gain = Gain(denoiser, data, batch=8000)
    assert abs(gain(1.0, 0.4, end) / exact(0.4) - 1) < 0.03
    method = JYS(sampling_steps=2, points=32, samples=8000, batch=8000)
    schedule = method.search(denoiser, data)
    best = max(range(1, 32), key=lambda i: exact(grid_of(32)[i]))
    assert abs(schedule.indices[2][1] - best) <= 1
    assert max(range(best - 3, best + 4), key=lambda i: gain(1.0, grid_of(32)[i], end)) in (best - 1, best, best + 1)
    assert schedule.gains[2][0] == pytest.approx(exact(grid_of(32)[best]), rel=0.03)


def test_few_well_placed_jumps_err_less_than_equal_ones():
    """The exact error of two-token sequences drawn in two steps: the larger the later they are placed apart."""
    values, process = 3, Absorbing(4)
    step = torch.full((3, 3), 0.02).double() + 0.94 * torch.eye(3).double()
    denoiser = ChainDenoiser(process, law(3) * 0 + 1 / 3, step)
    data = denoiser.sample(64, 16, rng())
    schedule = JYS(sampling_steps=4, points=256).search(denoiser, data)
    equal = torch.linspace(1, 1e-5, 5, dtype=torch.float64)

    def broken(times: torch.Tensor) -> float:
        start = torch.full((400, 16), values)
        x = JYS()(denoiser, start, times, generator=rng(5))
        return float(-denoiser.log_likelihood(x).mean())

    assert broken(schedule.times(4)) < broken(equal)


def test_k_gillespie_is_searched_in_tokens():
    denoiser = chain(Absorbing(4), 3)
    schedule = JYS(sampling_steps=4, kind="k_gillespie").search(denoiser, denoiser.sample(32, 8, rng()))
    counts = schedule.times(4)
    assert counts.dtype == torch.int64 and counts[0] == 0 and counts[-1] == 8 and (counts.diff() > 0).all()
    x = JYS(kind="k_gillespie")(denoiser, torch.full((2, 8), 3), counts, generator=rng())
    assert (x < 3).all()
    with pytest.raises(BadInput, match="8 tokens"):
        JYS(sampling_steps=16, kind="k_gillespie").search(denoiser, denoiser.sample(4, 8, rng()))


def test_schedules_are_kept_and_belong_to_their_model(tmp_path):
    schedule = JumpSchedule({1: [0, 4], 2: [0, 3, 4]}, grid_of(4), "euler", {1: [0.0], 2: [0.5]}, "abc", {"seed": 1})
    file = schedule.save(tmp_path / "jumps.json")
    again = JumpSchedule.load(file, "abc")
    assert torch.equal(again.times(2), schedule.times(2)) and again == schedule
    with pytest.raises(BadInput, match="another model"):
        JumpSchedule.load(file, "def")
    with pytest.raises(BadInput, match="none for 8"):
        again.times(8)
    told = json.loads(file.read_text())
    counts = {"kind": "k_gillespie", "grid": [0, 1, 2, 4, 3]}
    for change in (
        {"indices": {"2": [0, 3, 3]}}, {"indices": {"2": [0, 3]}}, {"grid": [1.0]}, {"kind": "heun"}, counts,
        {"indices": {"2": [0, 2.5, 4]}}, {"indices": {}}, {"grid": [1.0, 0.9, math.nan, 0.2, 0.0]},
        {"grid": [1.0, 0.7, 0.8, 0.2, 0.0]}, {"grid": [3.0, 0.7, 0.6, 0.2, 0.0]},
    ):  # fmt: skip
        (tmp_path / "bad.json").write_text(json.dumps({**told, **change}))
        with pytest.raises(BadInput, match="search it again"):
            JumpSchedule.load(tmp_path / "bad.json")


def test_misuse_is_explained():
    masked, others = chain(Absorbing(4), 3), chain(UniformTokens(3), 3)
    narrow = GaussianTokens(8, rate_sigma=0.05)  # whose rates of far jumps are 0 in float64
    z, times = torch.zeros(2, 4, dtype=torch.long), torch.tensor([1, 0.5, 1e-5]).double()
    for call, match in (
        (lambda: tau_leaping(masked, z, times, generator=rng()), "in no order"),
        (lambda: k_gillespie(others, z, torch.tensor([0, 4]), generator=rng()), "with a mask"),
        (lambda: k_gillespie(masked, z, torch.tensor([0, 5]), generator=rng()), "at most 4"),
        (lambda: euler(masked, z + 3, times), "generator"),
        (lambda: euler(masked, z, times.flip(0), generator=rng()), "decrease"),
        (lambda: euler(masked, z, times * torch.tensor([1, math.nan, 1]), generator=rng()), "decrease"),
        (lambda: k_gillespie(masked, z, torch.tensor([0]), generator=rng()), "must increase"),
        (lambda: JYS(kind="tau_leaping").search(masked, z), "does not allow"),
        (lambda: Absorbing(4, eps=1.0), "eps"),
        (lambda: JYS(sampling_steps=12), "power of two"),
        (lambda: JYS(kind="k_gillespie").search(others, z), "with a mask"),
        (lambda: JYS().scheduler({}), "models of tokens"),
        (lambda: UniformTokens(4, -1.0), "positive"),
        (lambda: Absorbing(1), "two states"),
        (lambda: Absorbing(4).posterior(z, z + 1, 0.5, 0.2), "pairs that can"),
        (lambda: GaussianTokens(32, noise_sigma=1.1), "at least 1.89"),
        (lambda: narrow.convert(torch.rand(1, 1, 8), z[:1, :1], 0.5, "rates", "score"), "how likely"),
    ):
        with pytest.raises(BadInput, match=match):
            call()
    process = GaussianProcess(Cosine())
    pixels = MixtureDenoiser(process, GaussianMixture.isotropic(torch.zeros(1, 1), 0.5))
    with pytest.raises(BadInput, match="draws none"):
        JYS()(pixels, torch.zeros(2, 1), times, generator=rng())
