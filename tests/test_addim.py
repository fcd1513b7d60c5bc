"""aDDIM: its identities in float64, the variance it keeps, and its scheduler against diffusers' DDIM."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, StableDiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from noise_cases import IDEAL, PROCESSES, Blur, inner_times, normal, ordered_times, processes
from sfumato.errors import BadInput
from sfumato.noise import Cosine, GaussianProcess
from sfumato.noise.addim import addim_step, posterior_variance
from sfumato.noise.analytic import GaussianMixture, MixtureDenoiser
from sfumato.sample import addim, ddim, from_scheduler, prediction_error
from sfumato.sample.schedulers import ADDIMScheduler, FewStepScheduler
from sfumato.sample.times import uniform

TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
variances = st.floats(0.001, 2.0)


@given(process=processes, times=ordered_times(), var=variances)
def test_the_step_has_the_norm_that_it_should(process, times, var):
    """||z_s - alpha_s x||^2 = sigma_s^2 ||eps||^2 + d (alpha_s - alpha_t sigma_s / sigma_t)^2 var, for each picture."""
    s, t = times
    z, x0 = normal(3, 2, 4, 4, seed=1), normal(3, 2, 4, 4, seed=2)
    (alpha, sigma), (alpha_s, sigma_s) = process.alpha_sigma(t), process.alpha_sigma(s)
    moved = (addim_step(process, z, x0, t, s, var) - alpha_s * x0).flatten(1).square().sum(1)
    eps = ((z - alpha * x0) / sigma).flatten(1).square().sum(1)
    b = alpha_s - alpha * sigma_s / sigma
    assert_close(moved, sigma_s**2 * eps + 32 * b**2 * var, rtol=1e-10, atol=1e-10)


@given(process=st.one_of(processes, st.just(Blur(Cosine()))), times=ordered_times())
def test_without_variance_it_is_ddim_bit_for_bit(process, times):
    s, t = times
    z, x0 = normal(3, 2, 4, 4, seed=1), normal(3, 2, 4, 4, seed=2)
    assert torch.equal(addim_step(process, z, x0, t, s, 0.0), process.posterior(z, x0, t, s, eta=0.0)[0])


@given(process=processes, t=inner_times, var=variances)
def test_it_tends_to_ddim_as_the_step_shrinks(process, t, var):
    """What is added is of second order in the step, and nothing where the time stands still."""
    z, x0 = normal(3, 2, 4, 4, seed=1), normal(3, 2, 4, 4, seed=2)
    added = [
        (addim_step(process, z, x0, t, t - h, var) - process.posterior(z, x0, t, t - h, eta=0.0)[0]).norm()
        for h in (1e-2, 1e-3)
    ]
    assert added[1] < 0.02 * added[0]
    assert torch.equal(addim_step(process, z, x0, t, t, var), z)


def test_a_variance_for_each_picture():
    process, z, x0 = PROCESSES["cosine"], normal(3, 2, seed=1), normal(3, 2, seed=2)
    together = addim_step(process, z, x0, 0.8, 0.4, torch.tensor([0.1, 0.0, 0.7]))
    for i, var in enumerate((0.1, 0.0, 0.7)):
        assert_close(together[i : i + 1], addim_step(process, z[i : i + 1], x0[i : i + 1], 0.8, 0.4, var))


def test_degenerate_inputs_stay_finite():
    """No noise predicted (z = alpha x0), the clean end (sigma_s = 0), and float32."""
    process = PROCESSES["scaled-linear-table"]
    x0 = normal(2, 3)
    z = process.alpha_sigma(0.5, x0)[0] * x0
    assert torch.isfinite(addim_step(process, z, x0, 0.5, 0.25, 0.3)).all()
    for dtype in (torch.float32, torch.float64):
        end = addim_step(process, normal(2, 3, dtype=dtype), x0.to(dtype), 0.25, 0.0, 0.3)
        assert end.dtype == dtype and torch.isfinite(end).all()


def typical(process, var, t, d=64):
    """Noisy data from N(0, var) in d dimensions whose norm is exactly the expected one; the mean and variance of x0."""
    alpha, sigma = process.alpha_sigma(t)
    z = normal(5, d)
    z = z * (d * (alpha**2 * var + sigma**2)).sqrt() / z.norm(dim=1, keepdim=True)
    return z, alpha * var / (alpha**2 * var + sigma**2) * z, var * sigma**2 / (alpha**2 * var + sigma**2)


@given(process=processes, times=ordered_times(), var=st.floats(0.05, 3.0))
def test_the_true_variance_gives_back_the_spread_around_the_prediction(process, times, var):
    """E ||z_s - alpha_s x0||^2 is that of the exact z_s given z_t, which DDIM misses by d b^2 Var[x0 | z]."""
    s, t = times
    z, x0, posterior = typical(process, var, t)
    (alpha, sigma), (alpha_s, sigma_s) = process.alpha_sigma(t), process.alpha_sigma(s)
    b = alpha_s - alpha * sigma_s / sigma
    # the exact z_s is sigma_s / sigma z + b x with x ~ N(x0, posterior)
    exact = ((sigma_s / sigma * z + (b - alpha_s) * x0).square() + b**2 * posterior).sum(1)
    got = (addim_step(process, z, x0, t, s, posterior) - alpha_s * x0).square().sum(1)
    assert_close(got, exact, rtol=1e-9, atol=1e-9)
    plain = (process.posterior(z, x0, t, s, eta=0.0)[0] - alpha_s * x0).square().sum(1)
    assert_close(exact - plain, (64 * b**2 * posterior).expand(5), rtol=1e-6, atol=1e-9)


@given(times=ordered_times(), var=st.floats(0.05, 3.0))
def test_the_true_variance_keeps_the_marginal_variance_from_pure_noise(times, var):
    """Where the prediction is still the data's mean: E ||z_s||^2 / d = alpha_s^2 var + sigma_s^2."""
    process, (s, _) = GaussianProcess(IDEAL), times
    z, x0, posterior = typical(process, var, 1.0)
    assert x0.abs().max() < 1e-12 and abs(posterior - var) < 1e-12
    alpha_s, sigma_s = process.alpha_sigma(s)
    got = addim_step(process, z, x0, 1.0, s, var).square().mean(1)
    assert_close(got, (alpha_s**2 * var + sigma_s**2).expand(5), rtol=1e-9, atol=0)


@given(process=processes, times=ordered_times(), var=st.floats(0.05, 3.0))
def test_ddim_loses_norm_and_addim_less(process, times, var):
    s, t = times
    z, x0, posterior = typical(process, var, t)
    alpha_s, sigma_s = process.alpha_sigma(s)
    marginal = alpha_s**2 * var + sigma_s**2
    plain = process.posterior(z, x0, t, s, eta=0.0)[0].square().mean(1)
    longer = addim_step(process, z, x0, t, s, posterior).square().mean(1)
    assert (plain < marginal).all() and (plain < longer).all()


def test_a_whole_chain_is_less_smooth_than_ddim_and_both_tend_to_the_data():
    """Data in 2 of 64 dimensions, as pictures fill few of theirs: the share of the variance that samples keep."""
    process, spread = GaussianProcess(Cosine()), torch.full((64,), 1e-6)
    spread[:2] = 1.0
    denoiser = MixtureDenoiser(process, GaussianMixture.gaussian(torch.zeros(64), torch.diag(spread)), "x0")
    exact = lambda t: (spread / (1 + spread * process.logsnr(t).exp())).mean()
    z, kept = normal(500, 64), {}
    for steps in (8, 64):
        for name, eta in (("ddim", 0.0), ("addim", 0.75)):
            end = addim(denoiser, z, uniform(steps), eta=eta, variance=exact)
            # the flow takes each of the two dimensions of pure noise to a picture of the same size
            kept[name, steps] = float(end.square().sum(1).mean() / z[:, :2].square().sum(1).mean())
    assert kept["ddim", 8] < kept["addim", 8] < 1 and kept["ddim", 64] < kept["addim", 64]
    assert torch.equal(addim(denoiser, z, uniform(8), eta=0.0), ddim(denoiser, z, uniform(8)))
    assert abs(1 - kept["addim", 64]) < 0.3 * (1 - kept["addim", 8])


def test_analytic_rule_is_the_papers():
    process = PROCESSES["cosine"]
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    assert_close(0.1 * posterior_variance(process, t), 0.1 / (2 + process.logsnr(t).exp()))


def test_prediction_error_of_the_true_denoiser_is_the_posterior_variance():
    process, var = PROCESSES["cosine"], 0.5
    data = GaussianMixture.isotropic(torch.zeros(1, 4), var**0.5)
    x0 = data.sample(20_000, torch.Generator().manual_seed(0))
    times = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    got = prediction_error(MixtureDenoiser(process, data), x0, times, torch.Generator().manual_seed(1))
    assert_close(got, posterior_variance(process, times, var), rtol=0.02, atol=0)


def test_sampler_refuses_what_it_cannot_do():
    denoiser = MixtureDenoiser(PROCESSES["cosine"], GaussianMixture.isotropic(torch.zeros(1, 2), 1.0))
    with pytest.raises(BadInput, match="negative"):
        addim(denoiser, normal(2, 2), uniform(4), eta=-1.0)
    with pytest.raises(BadInput, match="decrease"):
        addim(denoiser, normal(2, 2), uniform(4, 0.0, 1.0))


# The scheduler


def run(scheduler, network, z, steps):
    scheduler.set_timesteps(steps)
    for i in scheduler.timesteps:
        z = scheduler.step(network(z, i), i, z, return_dict=False)[0]
    return z


def network(z, i):
    return torch.tanh(z * (0.3 + i / 1000))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_scheduler_without_eta_is_diffusers_ddim_bit_for_bit(kind, spacing, zero_snr, clip):
    if kind == "epsilon" and zero_snr and spacing != "leading":
        pytest.skip("noise does not determine the picture where there is no signal, for DDIM either")
    settings = {**TABLE, "prediction_type": kind, "timestep_spacing": spacing, "rescale_betas_zero_snr": zero_snr}
    theirs = DDIMScheduler(**{**settings, "clip_sample": clip}, steps_offset=1)
    ours = ADDIMScheduler.from_config(theirs.config, eta=0.0)
    z = normal(2, 4, 8, 8, dtype=torch.float32)
    for steps in (3, 10):
        assert torch.equal(run(ours, network, z, steps), run(theirs, network, z, steps))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_scheduler_agrees_with_the_sampler(kind, zero_snr):
    """diffusers keeps its tables in float32, so to a few parts in 10^5."""
    if kind == "epsilon" and zero_snr:
        pytest.skip("noise does not determine the picture where there is no signal")
    scheduler = ADDIMScheduler(
        **TABLE, prediction_type=kind, timestep_spacing="trailing", rescale_betas_zero_snr=zero_snr, eta=0.3
    )
    process = FewStepScheduler.from_config(scheduler.config).process
    data = GaussianMixture.isotropic(torch.tensor([[-1.0, 0.0], [1.0, 1.0]]), 0.5)
    denoiser, z = MixtureDenoiser(process, data, "v"), normal(16, 2, dtype=torch.float32)
    ours = addim(denoiser, z, torch.arange(1000, -1, -50).double() / 1000, eta=0.3)
    assert_close(from_scheduler(scheduler)(denoiser, z, 20), ours, rtol=5e-5, atol=5e-5)


def test_scheduler_with_measured_errors():
    errors = [0.2] * 1000
    scheduler = ADDIMScheduler(**TABLE, timestep_spacing="trailing", eta=0.75, errors=errors)
    assert scheduler.variance(500) == pytest.approx(0.15)
    denoiser = MixtureDenoiser(
        FewStepScheduler.from_config(scheduler.config).process, GaussianMixture.isotropic(torch.zeros(1, 2), 0.5)
    )
    z = normal(16, 2, dtype=torch.float32)
    grid = torch.arange(1000, -1, -50).double() / 1000
    ours = addim(denoiser, z, grid, eta=0.75, variance=lambda t: torch.full_like(t, 0.2))
    assert_close(from_scheduler(scheduler)(denoiser, z, 20), ours, rtol=5e-5, atol=5e-5)


def test_half_precision_is_not_summed_in_half_precision():
    scheduler = ADDIMScheduler(**TABLE, timestep_spacing="trailing")
    z = 20 * normal(1, 4, 64, 64, dtype=torch.float32)  # the sum of squares is far beyond what float16 holds
    scheduler.set_timesteps(4)
    wide = scheduler.step(z, 999, z, return_dict=False)[0]
    half = scheduler.step(z.half(), 999, z.half(), return_dict=False)[0]
    assert half.dtype == torch.float16
    assert_close(half.float(), wide, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("other", [PNDMScheduler, DPMSolverMultistepScheduler, DDIMScheduler])
def test_takes_the_place_of_any_scheduler(tiny_sd, other, tmp_path):
    """``pipe.scheduler = ADDIMScheduler.from_config(...)``, saved and loaded by diffusers."""
    pipe = tiny_sd.copy().pipe
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = other.from_config(pipe.scheduler.config)
    pipe.scheduler = ADDIMScheduler.from_config(pipe.scheduler.config, eta=0.2)
    assert pipe.scheduler.config.beta_schedule == "scaled_linear" and not pipe.scheduler.config.clip_sample
    draw = lambda p: p("a star", num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np")
    before = draw(pipe).images
    pipe.save_pretrained(tmp_path / "p")
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "p")
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is ADDIMScheduler and loaded.scheduler.config.eta == 0.2
    assert_close(torch.from_numpy(draw(loaded).images), torch.from_numpy(before), rtol=1e-4, atol=1e-5)


def test_text_to_image_knows_it_by_name(tiny_sd):
    plain, other = (tiny_sd.draw("a star", 1, sampling_steps=4, scheduler=s) for s in ("ddim", "addim"))
    assert not torch.equal(plain, other)
    quiet = ADDIMScheduler.from_config(tiny_sd.pipe.scheduler.config, eta=0.0)
    assert torch.equal(plain, tiny_sd.draw("a star", 1, sampling_steps=4, scheduler=quiet))


@pytest.mark.parametrize("wrong", [{"eta": -1.0}, {"prior_variance": 0.0}, {"errors": [0.1]}])
def test_scheduler_refuses(wrong):
    with pytest.raises(BadInput, match=next(iter(wrong))):
        ADDIMScheduler(**wrong)
