"""Blurring diffusion: the exact laws of the process in float64, its limits, every sampler on it, and the recipe."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.fft import dctn, idctn
from scipy.ndimage import gaussian_filter
from torch.testing import assert_close

import sfumato as sf
from noise_cases import Blur, normal, ordered_times
from sfumato.errors import BadInput
from sfumato.noise import BlurringProcess, Constant, Cosine, GaussianProcess, RectifiedFlow
from sfumato.noise.analytic import GaussianMixture, MixtureDenoiser
from sfumato.noise.blurring import dct, idct
from sfumato.noise.config import from_config, to_config
from sfumato.pipeline import ImageModel
from sfumato.sample import S2N, Clipped, ddim, ddpm, dpmpp_2m, heun, times
from sfumato.train.blurring import Blurring

SCHEDULE = Cosine(-10, 10)
PAPER = BlurringProcess(SCHEDULE)
FAMILY = {
    "paper": PAPER,
    "strong": BlurringProcess(SCHEDULE, None, 200.0, 1e-6),
    "no-floor": BlurringProcess(SCHEDULE, None, 3.0, 0.0),
    "heat": BlurringProcess.heat(),
    "flow": BlurringProcess(RectifiedFlow(), None, 5.0),
}
members = st.sampled_from(sorted(FAMILY)).map(FAMILY.get)
sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))
SHAPE = (2, 3, 6, 5)


def tables(process, *ts, shape=SHAPE):
    """alpha and sigma at each time, [height, width] or scalar."""
    return [process.alpha_sigma(t, torch.zeros(shape, dtype=torch.float64)) for t in ts]


# The transform


@given(sizes)
def test_the_transform_is_the_orthonormal_dct(size):
    x = normal(2, 3, *size)
    expected = dctn(x.numpy(), axes=(-2, -1), norm="ortho")
    assert_close(dct(x).numpy(), expected, rtol=1e-12, atol=1e-12)
    assert_close(idct(x).numpy(), idctn(x.numpy(), axes=(-2, -1), norm="ortho"), rtol=1e-12, atol=1e-12)
    assert_close(idct(dct(x)), x, rtol=1e-12, atol=1e-12)
    assert_close(dct(x).square().sum(), x.square().sum(), rtol=1e-12, atol=0)  # Parseval


def test_half_precision_and_autocast_do_not_reach_the_transform():
    x = normal(1, 3, 32, 32, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dct(x), dct(x.clone())) and dct(x).dtype == torch.float32
        assert_close(idct(dct(x)), x, rtol=1e-5, atol=1e-5)
    assert dct(x.bfloat16()).dtype == torch.bfloat16
    assert_close(dct(x.bfloat16()).float(), dct(x.bfloat16().float()), rtol=8e-3, atol=1e-5)


def test_gradients_flow_through_a_transform_first_used_in_inference_mode():
    with torch.inference_mode():
        dct(torch.ones(1, 11, 7))
    x = torch.ones(1, 11, 7, requires_grad=True)
    dct(x)[0, 0, 0].backward()
    assert_close(x.grad, torch.full_like(x, 1 / math.sqrt(77)))


# The process


def test_it_is_the_process_of_the_seam_s_example():
    """An independent, shorter implementation in the tests' own tools, for square pictures of one size."""
    toy, process = Blur(SCHEDULE, strength=3.0), BlurringProcess(SCHEDULE, None, 3.0)
    x, eps = normal(2, 1, 4, 4), normal(2, 1, 4, 4, seed=1)
    t, s = torch.tensor([0.4, 0.9]).double(), torch.tensor([0.2, 0.85]).double()
    z = process.diffuse(x, t, eps)
    assert_close(z, toy.diffuse(x, t, eps), rtol=1e-12, atol=1e-12)
    assert_close(process.posterior(z, x, t, s)[0], toy.posterior(z, x, t, s)[0], rtol=1e-11, atol=1e-11)


def test_scaling_by_its_formula():
    like = torch.zeros(1, 6, 5, dtype=torch.float64)
    y, x = np.pi * np.arange(6) / 6, np.pi * np.arange(5) / 5
    for t in (0.0, 0.1, 0.5, 0.9, 1.0):
        tau = (20 * np.sin(np.pi * t / 2) ** 2) ** 2 / 2
        expected = 0.999 * np.exp(-(y[:, None] ** 2 + x**2) * tau) + 0.001
        assert_close(PAPER.log_scaling(t, like).exp().numpy(), expected, rtol=1e-13, atol=0)


@given(members, st.floats(0, 1))
def test_the_mean_intensity_follows_the_schedule_and_nothing_follows_it_at_the_start(process, t):
    alpha, sigma = GaussianProcess(process.schedule, process.path).alpha_sigma(t)
    blurred, same = tables(process, t)[0]
    assert torch.equal(blurred[0, 0], alpha) and torch.equal(same, sigma)
    start = tables(process, 0.0)[0][0]
    assert torch.equal(start, start[0, 0].expand_as(start))  # d_0 = 1


@given(members, ordered_times())
def test_low_frequencies_last_longest_and_log_snr_falls(process, pair):
    s, t = pair
    like = torch.zeros(SHAPE, dtype=torch.float64)
    for axis in (-1, -2):
        assert (process.log_scaling(t, like).diff(dim=axis) <= 0).all()
    assert (process.logsnr(t, like) <= process.logsnr(s, like)).all()


@given(members, ordered_times())
def test_the_posterior_keeps_the_marginals(process, pair):
    """a alpha_t + b = alpha_s and a^2 sigma_t^2 + var = sigma_s^2 at every frequency (the card's c1 and V)."""
    s, t = pair
    like = torch.zeros(SHAPE, dtype=torch.float64)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = tables(process, t, s)
    a, b, var = process.coefficients(t, s, like)
    assert_close(a * alpha_t + b, alpha_s, rtol=1e-12, atol=1e-15)
    assert_close(a**2 * sigma_t**2 + var, (sigma_s**2).expand_as(var), rtol=1e-12, atol=1e-18)
    assert (var >= 0).all()


@given(members, ordered_times())
def test_the_posterior_by_the_paper_s_formulas(process, pair):
    """V = 1 / (1 / sigma_s^2 + alpha_ts^2 / sigma_ts^2), mu = V (alpha_ts / sigma_ts^2 u_t + alpha_s / sigma_s^2 u_x),
    wherever alpha_ts is large enough for a quotient to be taken."""
    s, t = pair
    (alpha_t, sigma_t), (alpha_s, sigma_s) = tables(process, t, s)
    ratio = alpha_t / alpha_s
    noise = sigma_t**2 - ratio**2 * sigma_s**2
    kept = (alpha_t > 1e-100) & (noise > 1e-9 * sigma_t**2)
    V = 1 / (1 / sigma_s**2 + ratio**2 / noise)
    a, b, var = process.coefficients(t, s, torch.zeros(SHAPE, dtype=torch.float64))
    expected = (V * ratio / noise, V * alpha_s / sigma_s**2, V)
    for got, formula in zip((a, b, var), expected, strict=True):
        assert_close(got[kept], formula[kept], rtol=1e-5, atol=0)


@pytest.mark.parametrize("steps", [10, 1000])
def test_transitions_destroy_on_every_grid(steps):
    grid = times.uniform(steps).flip(0)
    like = torch.zeros(steps, 1, 16, 16, dtype=torch.float64)
    for process in (PAPER, BlurringProcess(SCHEDULE, None, 1.0), FAMILY["no-floor"]):
        _, var = process.transition(grid[:-1], grid[1:], like)
        assert (var > 0).all()


@given(ordered_times(3), members)
def test_transitions_compose(triple, process):
    r, s, t = triple
    like = torch.zeros(SHAPE, dtype=torch.float64)
    (a_rs, v_rs), (a_st, v_st), (a_rt, v_rt) = (process.transition(*p, like) for p in ((r, s), (s, t), (r, t)))
    assert_close(a_rs * a_st, a_rt, rtol=1e-11, atol=0)
    assert_close(a_st**2 * v_rs + v_st, v_rt, rtol=1e-9, atol=1e-15)


@given(ordered_times())
def test_without_blur_it_is_the_gaussian_process(pair):
    s, t = pair
    still, plain = BlurringProcess(SCHEDULE, None, 0.0), GaussianProcess(SCHEDULE)
    like = torch.zeros(SHAPE, dtype=torch.float64)
    for eta in (0.0, 0.5, 1.0):
        pairs = zip(still.coefficients(t, s, like, eta), plain.coefficients(t, s, like, eta), strict=True)
        for blurred, gaussian in pairs:
            # Not to the last bit: exp of a vector and of a number round differently.
            assert_close(blurred, gaussian.expand_as(blurred), rtol=1e-14, atol=0)


@given(ordered_times())
def test_heat_dissipation_is_the_member_without_a_schedule(pair):
    """alpha_ts = d_t / d_s and sigma_ts^2 = (1 - alpha_ts^2) sigma^2; the mean intensity keeps even its noise."""
    s, t = pair
    process, like = BlurringProcess.heat(0.1, 4.0), torch.zeros(SHAPE, dtype=torch.float64)
    (d_t, sigma), (d_s, _) = tables(process, t, s)
    assert_close(sigma, torch.tensor(0.1, dtype=torch.float64), rtol=1e-12, atol=0)
    ratio, var = process.transition(s, t, like)
    assert_close(ratio, d_t / d_s, rtol=1e-12, atol=0)
    assert_close(var, (1 - ratio**2) * 0.01, rtol=1e-9, atol=1e-16)
    a, b, posterior = process.coefficients(t, s, like)
    assert_close(posterior, var, rtol=1e-9, atol=1e-16)  # sigma_t = sigma_s
    assert (a[0, 0], b[0, 0], posterior[0, 0]) == (1, 0, 0)


def test_the_blur_is_a_convolution_with_reflecting_boundary():
    """sigma_B pixels of Gaussian blur, against scipy's sampled kernel; d_min adds back that share of the picture."""
    process = BlurringProcess(Constant(60.0), None, 4.0)
    x = normal(1, 3, 32, 24)
    t = 0.6
    sigma = process.sigma_blur(t).item()
    got = process.diffuse(x, t, torch.zeros_like(x))
    filtered = gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode="reflect", truncate=8.0)
    assert_close(got.numpy(), 0.999 * filtered + 0.001 * x.numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("move", [lambda x: x.flip(-1), lambda x: x.flip(-2), lambda x: x.transpose(-1, -2)])
def test_a_step_commutes_with_mirrors_and_transposition(move):
    z, x0 = normal(2, 3, 6, 6), normal(2, 3, 6, 6, seed=1)
    mean, var = PAPER.posterior(z, x0, 0.7, 0.6)
    assert_close(PAPER.posterior(move(z), move(x0), 0.7, 0.6)[0], move(mean), rtol=1e-10, atol=1e-10)
    assert_close(var, var.T, rtol=1e-12, atol=0)


def test_noise_is_isotropic_in_both_spaces():
    noise = dct(normal(4000, 4, 5))
    covariance = noise.flatten(1).T @ noise.flatten(1) / 4000
    assert (covariance - torch.eye(20)).abs().max() < 5 / math.sqrt(4000)


@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
def test_with_the_true_noise_the_reverse_chain_returns_the_picture(size):
    """PSNR above 45 dB after 200 steps from z_1, as the card asks, and in the end the schedule's own noise is left."""

    class Oracle:
        process, prediction = PAPER, "eps"

        def __call__(self, z, t, cond=None):
            alpha, sigma = PAPER.alpha_sigma(t, z)
            return PAPER.from_basis((PAPER.to_basis(z) - alpha * PAPER.to_basis(x)) / sigma)

    x = normal(2, 3, *size).clamp(-1, 1)
    rng = torch.Generator().manual_seed(0)
    found = ddpm(Oracle(), normal(2, 3, *size, seed=5), times.uniform(200), generator=rng, final_noise=False)
    assert 10 * math.log10(4 / (found - x).square().mean()) > 45


def test_it_acts_on_frames_with_a_time_each():
    frames, eps = normal(2, 3, 1, 4, 5), normal(2, 3, 1, 4, 5, seed=1)
    t = torch.tensor([[0.1, 0.5, 0.9]]).double()
    together = PAPER.diffuse(frames, t, eps)
    for i in range(3):
        assert_close(together[:, i], PAPER.diffuse(frames[:, i], t[0, i], eps[:, i]), rtol=1e-12, atol=1e-12)


def test_misuse_is_explained():
    with pytest.raises(BadInput, match="one time"):
        PAPER.diffuse(normal(2, 1, 4, 4), torch.rand(2, 1, 4, 4), normal(2, 1, 4, 4))
    for act in (lambda: PAPER.diffuse(normal(2, 4), 0.5, normal(2, 4)), lambda: dct(normal(4, 4))):
        with pytest.raises(BadInput, match="pictures"):
            act()
    for settings in ({"sigma_blur_max": -1.0}, {"d_min": 1.5}):
        with pytest.raises(BadInput, match="sigma_blur_max"):
            BlurringProcess(SCHEDULE, None, **settings)
    with pytest.raises(BadInput, match="positive"):
        BlurringProcess.heat(0.0)
    with pytest.raises(BadInput, match="uniform in t"):
        times.karras(Constant(3.0), 5)


# Samplers and models


SAMPLERS = {"ddim": ddim, "ddpm": ddpm, "heun": heun, "dpm++": dpmpp_2m, "s2n": S2N(rho=0.7)}


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_gaussian_data(name):
    """From noise to data whose power differs from frequency to frequency, within five standard errors and 5 % bias."""
    process, n, size = BlurringProcess(SCHEDULE, None, 2.0), 800, (3, 4)
    count = math.prod(size)
    power = torch.linspace(0.2, 2, count, dtype=torch.float64)
    basis = dct(torch.eye(count, dtype=torch.float64).reshape(count, *size)).reshape(count, count).T
    data = GaussianMixture.gaussian(torch.zeros(1, *size), basis.T @ torch.diag(power) @ basis)
    denoiser = MixtureDenoiser(process, data, "eps")
    rng = torch.Generator().manual_seed(3)
    found = SAMPLERS[name](denoiser, normal(n, 1, *size), times.uniform(60), generator=rng)
    measured = dct(found).flatten(1).square().mean(0)
    assert ((measured / power - 1).abs() < 5 * math.sqrt(2 / n) + 0.05).all()


@pytest.mark.parametrize("low,high", [(-1.0, 1.0), (0.0, 255.0)])
def test_clamping_leaves_pictures_alone_and_reaches_their_extremes(low, high):
    process, basis = BlurringProcess(SCHEDULE, None, 2.0), idct(torch.eye(15, dtype=torch.float64).reshape(15, 3, 5))
    extreme = torch.where(basis > 0, high, low).double()
    random = low + (high - low) * torch.rand(7, 3, 5, dtype=torch.float64)
    for x in (extreme, random):
        torch.testing.assert_close(process.clamp(x, low, high), x, rtol=0, atol=1e-12 * high)
    # What goes further than the extreme of its frequency comes back to it.
    middle = (low + high) / 2
    found = dct(process.clamp(middle + 3 * (extreme - middle), low, high) - middle)
    torch.testing.assert_close(found.reshape(15, 15).diag(), dct(extreme - middle).reshape(15, 15).diag())
    once = process.clamp(5 * x, low, high)
    torch.testing.assert_close(process.clamp(once, low, high), once)


def test_without_blur_clamping_is_that_of_pixels():
    x = 3 * normal(2, 1, 4, 4)
    assert torch.equal(BlurringProcess(SCHEDULE, None, 0.0).clamp(x, -1, 1), x.clamp(-1, 1))


def test_clamping_saves_low_frequencies_from_errors_at_high_ones():
    """A network that is off by 0.3 at the finest frequency; its pictures are right at the coarse ones all the same."""
    process, size = BlurringProcess(Cosine(-10, 10), None, 4.0), (8, 8)
    truth = torch.sign(idct(8 * torch.nn.functional.one_hot(torch.tensor(1), 64).double().reshape(1, *size)))
    fine = idct(torch.nn.functional.one_hot(torch.tensor(63), 64).double().reshape(1, *size))

    class Wrong:
        prediction = "eps"

        def __init__(self):
            self.process = process

        def __call__(self, z, t, cond=None):
            return process.convert(truth.expand_as(z), z, t, "x0", "eps") + 0.3 * fine

    found = dct(ddim(Clipped(Wrong()), normal(4, 1, *size), times.uniform(50)))
    coarse = torch.ones(size, dtype=torch.bool)
    coarse[-1, -1] = False
    torch.testing.assert_close(found[..., coarse], dct(truth).expand_as(found)[..., coarse], rtol=0, atol=0.1)


@pytest.mark.parametrize("process", FAMILY.values(), ids=FAMILY)
def test_processes_survive_json(process):
    assert from_config(json.loads(json.dumps(to_config(process)))) == process


def test_a_network_is_told_the_time_even_where_noise_does_not_tell_it():
    seen = []

    class Network(torch.nn.Module):
        device, dtype = torch.device("cpu"), torch.float64

        def forward(self, z, logsnr, labels):
            seen.append(logsnr)
            return z

    model = ImageModel(Network(), BlurringProcess.heat(), "eps", (1, 4, 4))
    for t in (0.1, 0.5, 0.9):
        model.denoiser(normal(2, 1, 4, 4), t)
    assert seen[0][0] > seen[1][0] > seen[2][0]
    assert torch.equal(SCHEDULE.level(0.4), SCHEDULE.logsnr(0.4))


# The recipe


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "data" / f"{i}.png")
    return str(tmp_path / "data")


def small(folder, **changes):
    settings = {"data": folder, "size": 8, "updates": 2, "batch": 3, "channels": (8, 8), "layers": 1, "attention": ()}
    return Blurring(**{**settings, "warmup": 1, **changes})


@pytest.mark.parametrize("prediction", ["eps", "x0"])
def test_it_trains_saves_loads_and_samples(folder, tmp_path, prediction):
    recipe = small(folder, prediction=prediction, sigma_blur_max=2.0)
    recipe.run(tmp_path / "run", progress=False)
    model = sf.load(tmp_path / "run" / "model", "cpu")
    assert model.process == recipe.process() == BlurringProcess(Cosine(-10, 10), None, 2.0)
    assert model.prediction == prediction
    for sampler in (*SAMPLERS, S2N(rho=0.2)):
        assert model.draw(None, [0, 1], sampling_steps=2, scheduler=sampler).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("prediction", ["eps", "x0"])
def test_the_loss_is_the_plain_error_of_what_is_predicted(folder, prediction):
    recipe = small(folder, prediction=prediction)
    x, eps = normal(4, 3, 8, 8), normal(4, 3, 8, 8, seed=1)
    t = torch.tensor([0.1, 0.3, 0.6, 0.9]).double()
    target = {"eps": eps, "x0": x}[prediction]

    class Off:
        process = recipe.process()

        def __call__(self, z, t, cond=None):
            assert_close(z, self.process.diffuse(x, t, eps))
            return target + 0.5

    Off.prediction = prediction
    assert_close(recipe.loss(Off(), x, t, eps, None), torch.full((4,), 0.25, dtype=torch.float64))


def test_unknown_predictions_are_refused_by_the_command(capsys, tmp_path):
    from sfumato import cli

    assert cli.main(["train", "blurring", "--prediction", "v", "--out", str(tmp_path / "x")]) == 2
    assert "--prediction" in capsys.readouterr().err
