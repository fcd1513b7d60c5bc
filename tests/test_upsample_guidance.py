"""Upsample guidance against the paper's identities, on models that are exactly right and on tiny pipelines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, EulerDiscreteScheduler, StableDiffusionControlNetPipeline
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from sfumato import cli
from sfumato.errors import BadInput
from sfumato.nets import ResidualUViT, UNet, VideoUNet
from sfumato.noise import (
    BlurringProcess,
    Cosine,
    GaussianProcess,
    Karras,
    RectifiedFlow,
    ScaledLinearBeta,
)
from sfumato.noise.analytic import GaussianMixture, MixtureDenoiser
from sfumato.pipeline import ImageModel, VideoModel, wrap
from sfumato.pipeline.anatomy import Call
from sfumato.pipeline.steering import Interceptor
from sfumato.sample import ddim
from sfumato.steer.parts.calls import resized
from sfumato.steer.parts.resolutions import (
    matched_alpha_bar,
    matched_logsnr,
    nearest_step,
    pooled,
    power,
    repeated,
    rescaling,
    spread,
)
from sfumato.steer.upsample_guidance import Upsampled, UpsampleGuidance, guidance_weight, upsample_guidance

PROCESSES = [GaussianProcess(s) for s in (Cosine(), ScaledLinearBeta(), RectifiedFlow(), Karras())]
FACTORS = [(2, 2), (3, 3), (1, 2), (2, 3), (2, 1, 2)]
TABLE = ScaledLinearBeta().discrete()


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


@dataclass(frozen=True)
class TwoSizes:
    """The exact denoisers of blocky data at both sizes, chosen by the size of the input."""

    process: GaussianProcess
    small: GaussianMixture
    factors: tuple[int, ...]
    prediction: Any = "eps"

    def __call__(self, z: Tensor, t: Any, cond: Any = None) -> Tensor:
        data = self.small
        if z.shape[1:] != data.means.shape[1:]:
            size = data.means[0].numel()
            rows = repeated(torch.eye(size).double().reshape(size, *data.means.shape[1:]), self.factors).flatten(1)
            means = repeated(data.means, self.factors)
            data = GaussianMixture(means, rows.T @ data.covariances @ rows, data.weights)
        return MixtureDenoiser(self.process, data, self.prediction)(z, t, cond)


def blocky(factors: tuple[int, ...], process: GaussianProcess, prediction: str = "eps") -> tuple[TwoSizes, Tensor]:
    shape = (2, 1, 2, 2) if len(factors) == 3 else (1, 2, 2)
    means = noise(3, *shape, seed=1)
    data = GaussianMixture.isotropic(means, 0.4)
    large = repeated(means, factors)
    return TwoSizes(process, data, factors, prediction), noise(4, *large.shape[1:], seed=2)


def noisy(process: GaussianProcess, z: Tensor, t: float, factors: tuple[int, ...]) -> Tensor:
    return process.diffuse(repeated(pooled(noise(*z.shape, seed=5), factors), factors), t, z)


# D, U, tau and P


@pytest.mark.parametrize("factors", FACTORS)
def test_means_of_blocks(factors):
    x = noise(2, 4, 3, 6, 12)
    small = pooled(x, factors)
    assert torch.allclose(pooled(repeated(small, factors), factors), small, rtol=0, atol=1e-15)
    assert repeated(small, factors).shape == x.shape
    if len(factors) == 2:
        expected = avg_pool2d(x.flatten(0, 1), factors).unflatten(0, (2, 4))
        torch.testing.assert_close(small, expected, rtol=0, atol=1e-14)
        up = interpolate(small.flatten(0, 1), scale_factor=factors, mode="nearest").unflatten(0, (2, 4))
        assert torch.equal(repeated(small, factors), up)


def test_means_of_white_noise_are_white():
    means = spread((3, 2)) * pooled(noise(2000, 1, 6, 6), (3, 2)).flatten(1)
    covariance = means.T @ means / len(means)
    assert (covariance - torch.eye(6)).abs().max() < 5 / math.sqrt(2000)


@pytest.mark.parametrize("s", [1.0, 2.0, math.sqrt(6)])
def test_the_matched_time_and_the_power(s):
    a = torch.linspace(0.001, 0.999, 50).double()
    P = power(a, s)
    torch.testing.assert_close(matched_alpha_bar(a, s), a / P, rtol=0, atol=1e-12)
    torch.testing.assert_close(1 - matched_alpha_bar(a, s), (1 - a) / (s**2 * P), rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.sigmoid(matched_logsnr(a.logit(), s)), a / P, rtol=0, atol=1e-12)
    torch.testing.assert_close(rescaling(a.sqrt(), (1 - a).sqrt(), s, "vp"), P**-0.5, rtol=1e-12, atol=0)


def test_the_matched_time_of_a_flow():
    """tau = (t / m) / ((1 - t) + t / m), and D[x] over (1 - t) + t / m."""
    t = torch.linspace(0.05, 1, 20).double()
    model = TwoSizes(GaussianProcess(RectifiedFlow()), blocky((2, 2), PROCESSES[0])[0].small, (2, 2))
    torch.testing.assert_close(Upsampled(model, (2, 2)).matched(t), (t / 2) / (1 - t + t / 2), rtol=0, atol=1e-12)
    torch.testing.assert_close(rescaling(1 - t, t, 2.0, "flow"), 1 / (1 - t + t / 2))


def test_the_nearest_training_step_and_the_first_of_two():
    table = torch.tensor([4.0, 2.0, 1.0, -1.0]).double()
    found = nearest_step(table, torch.tensor([9.0, 3.0, 1.4, -0.4, -torch.inf]).double())
    assert found.tolist() == [0, 0, 2, 3, 0]
    ends = torch.tensor([4.0, 2.0, -torch.inf]).double()
    assert nearest_step(ends, torch.tensor([-torch.inf, 2.5]).double()).tolist() == [2, 1]


def test_tau_is_searched_on_the_training_grid():
    model = TwoSizes(GaussianProcess(TABLE), blocky((2, 2), PROCESSES[0])[0].small, (2, 2))
    table = torch.tensor(TABLE.table).double()
    for i in (0, 3, 400, 999):
        expected = int((table - table[i] - 2 * math.log(2)).abs().argmin())
        assert round(float(Upsampled(model, (2, 2)).matched((i + 1) / 1000)) * 1000) - 1 == expected < max(i, 1)
        exact = Upsampled(model, (2, 2), tau="exact").matched((i + 1) / 1000)
        assert abs(float(exact) * 1000 - 1 - expected) < 0.6


def test_weights():
    """Timestep 400 of 1000 is unguided already at eta 0.6, and eta 1 is constant."""
    steps = torch.tensor([0, 399, 400, 401, 999])
    assert guidance_weight((steps + 1) / 1000, 1.2, 0.6, 1000).tolist() == [0, 0, 0, 1.2, 1.2]
    assert guidance_weight(torch.tensor([0.0, 0.4, 0.41]), 1.0, 0.6).tolist() == [0, 0, 1]
    assert guidance_weight((steps + 1) / 1000, 0.5, 1.0, 1000).tolist() == [0.5] * 5


# The guidance


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p.schedule).__name__)
def test_exact_models_of_blocky_data_need_no_guidance(factors, process):
    """D[x_t] says all that x_t says of x0: a strong test of tau, P and 1 / m at once."""
    model, z = blocky(factors, process)
    for t in (0.2, 0.5, 0.9):
        x = noisy(process, z, t, factors)
        plain, guided = model(x, t), Upsampled(model, factors)(x, t)
        torch.testing.assert_close(guided, plain, rtol=0, atol=1e-6)
        for part in ("time", "power", "factor"):
            if part != "power" or process.schedule.path != "ve":
                assert (Upsampled(model, factors, without=part)(x, t) - plain).abs().max() > 1e-3


@pytest.mark.parametrize("factors", [(2, 2), (1, 3)])
def test_with_weight_one_the_block_means_are_replaced(factors):
    process = GaussianProcess(TABLE)
    model, z = blocky(factors, process)
    other = TwoSizes(process, GaussianMixture.isotropic(noise(2, 1, 2, 2, seed=8), 0.2), factors)
    t, s = 0.7, spread(factors)

    def ask(low: Tensor, tau: Tensor) -> Tensor:
        return other(low, tau)

    eps = model(z, t)
    guided = Upsampled(model, factors).guided(eps, z, t, ask)
    a = process.alpha_sigma(t)[0] ** 2
    tau = (nearest_step(torch.tensor(TABLE.table).double(), matched_logsnr(process.logsnr(t), s)) + 1) / 1000
    low = other(pooled(z, factors) / power(a, s).sqrt(), tau)
    torch.testing.assert_close(pooled(guided, factors), low / s, rtol=0, atol=1e-6)
    within = lambda x: x - repeated(pooled(x, factors), factors)
    torch.testing.assert_close(within(guided), within(eps), rtol=0, atol=1e-6)
    torch.testing.assert_close(guided - eps, upsample_guidance(eps, low, factors), rtol=0, atol=1e-9)


@pytest.mark.parametrize("process", PROCESSES[:3], ids=lambda p: type(p.schedule).__name__)
def test_every_prediction_gives_the_same_guided_model(process):
    unlike = GaussianMixture.isotropic(noise(3, 1, 4, 4, seed=3), 0.5)  # not blocky, so that there is guidance
    small = GaussianMixture.isotropic(pooled(unlike.means, (2, 2)), 0.3)

    class Both(TwoSizes):
        def __call__(self, z, t, cond=None):
            data = unlike if z.shape[-1] == 4 else small
            return MixtureDenoiser(self.process, data, self.prediction)(z, t, cond)

    z, t = noise(3, 1, 4, 4), torch.tensor([0.3, 0.6, 0.95])
    found = {}
    for kind in ("eps", "v", "x0", "score", "flow"):
        model = Upsampled(Both(process, small, (2, 2), kind), (2, 2), theta=1.3)
        found[kind] = process.convert(model(z, t), z, t, kind, "x0")
    plain = MixtureDenoiser(process, unlike, "x0")(z, t)
    assert (found["x0"] - plain).abs().max() > 1e-2
    for kind, x0 in found.items():
        torch.testing.assert_close(x0, found["x0"], rtol=1e-6, atol=1e-6, msg=kind)


def test_where_nothing_is_left_of_the_signal_the_limit_is_taken():
    """A flow's first step, at t = 1: the block means of x0 are the small picture's."""
    process = GaussianProcess(RectifiedFlow())
    unlike, small = (GaussianMixture.isotropic(noise(3, 1, n, n, seed=n), 0.5) for n in (4, 2))

    class Both(TwoSizes):
        def __call__(self, z, t, cond=None):
            data = unlike if z.shape[-1] == 4 else small
            return MixtureDenoiser(self.process, data, self.prediction)(z, t, cond)

    z, model = noise(2, 1, 4, 4), Both(process, small, (2, 2), "flow")
    at, near = (Upsampled(model, (2, 2))(z, t) for t in (1.0, 1 - 1e-7))
    assert at.isfinite().all() and (at - model(z, 1.0)).abs().max() > 1e-2
    torch.testing.assert_close(at, near, rtol=0, atol=1e-5)


def test_it_is_linear_in_the_predictions_and_so_in_guidance():
    process = GaussianProcess(Cosine())
    model, z = blocky((2, 2), process)
    cond, uncond = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.1, 0.8])
    guided = Upsampled(model, (2, 2), theta=0.8)

    class Mixed(TwoSizes):
        def __call__(self, z, t, told=None):
            whole = lambda c: TwoSizes.__call__(self, z, t, c)
            return whole(uncond) + 5 * (whole(cond) - whole(uncond))

    z = noise(*z.shape, seed=9)
    apart = guided(z, 0.6, uncond) + 5 * (guided(z, 0.6, cond) - guided(z, 0.6, uncond))
    together = Upsampled(Mixed(process, model.small, (2, 2)), (2, 2), theta=0.8)(z, 0.6)
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-6)


def test_any_sampler_draws_blocky_pictures_as_the_small_model_would():
    """The matched small run starts from m D[x_T]; both end in the same picture."""
    process = GaussianProcess(Karras())
    model, z = blocky((2, 2), process)
    times = torch.linspace(1, 0, 60).double()
    large = ddim(Upsampled(model, (2, 2)), 80 * z, times)
    assert (large - repeated(pooled(large, (2, 2)), (2, 2))).abs().max() < 0.01


def test_no_weight_or_no_scale_is_the_model_bit_for_bit():
    model, z = blocky((2, 2), GaussianProcess(Cosine()))
    for neutral in (Upsampled(model, (2, 2), theta=0.0), Upsampled(model, (1, 1)), Upsampled(model, (2, 2), eta=0.2)):
        assert torch.equal(neutral(z, 0.7), model(z, 0.7))


def test_frames_of_a_block_must_be_equally_noisy():
    process = GaussianProcess(Cosine())
    model, z = blocky((2, 1, 1), process)
    t = torch.tensor([[0.4, 0.4, 0.8, 0.8]])
    z = process.diffuse(repeated(pooled(z, (2, 1, 1)), (2, 1, 1)), t, noise(*z.shape, seed=3))
    torch.testing.assert_close(Upsampled(model, (2, 1, 1))(z, t), model(z, t), rtol=0, atol=1e-6)
    with pytest.raises(BadInput, match="equally noisy"):
        Upsampled(model, (2, 1, 1))(z, torch.tensor([[0.4, 0.5, 0.8, 0.8]]))


# Pipelines


def test_a_pipeline_draws_what_the_guided_denoiser_draws(tiny_sd):
    p, side = tiny_sd, tiny_sd.latent_shape()[-1]
    cond = p.encode(["a red star", "art"])
    z = torch.randn(2, 4, 2 * side, 3 * side, generator=rng())
    with UpsampleGuidance().patch(p) as told:
        patched = [p.denoiser(z, t, cond) for t in (0.9, 0.5, 0.3)]
    assert told == {"scale": [2, 3], "small_runs": 2}
    rule = Upsampled(p.denoiser, (2, 3), eta=0.6)
    for t, found in zip((0.9, 0.5, 0.3), patched, strict=True):
        assert torch.equal(found, rule(z, t, cond))
    assert torch.equal(patched[2], p.denoiser(z, 0.3, cond)) and not torch.equal(patched[0], p.denoiser(z, 0.9, cond))


def test_at_the_size_of_training_nothing_changes(tiny_sd):
    plain = tiny_sd.draw("art", 0, sampling_steps=3)
    with UpsampleGuidance().patch(tiny_sd) as told:
        assert torch.equal(tiny_sd.draw("art", 0, sampling_steps=3), plain)
        larger = tiny_sd.draw("art", 0, sampling_steps=3, size=2 * tiny_sd.size)
    assert larger.shape[-1] == 2 * tiny_sd.size and told["small_runs"] == 1  # of timesteps 667, 334 and 1


def test_both_halves_of_guidance_and_every_scheduler(tiny_sd):
    p = tiny_sd
    euler = EulerDiscreteScheduler.from_config(p.pipe.scheduler.config)
    for scheduler in ("dpm++", euler):
        with UpsampleGuidance(scale=(2,)).patch(p) as told:
            p.draw("art", 0, sampling_steps=5, cfg_scale=3.0, scheduler=scheduler)
        assert told["small_runs"] == 3


def test_sdxl_is_told_the_size_of_each_picture(tiny_sdxl):
    p, seen = tiny_sdxl, []

    class Watch(Interceptor):
        def predict(self, forward, call, run):
            seen.append((call.z.shape[-1], call.cond.size_ids[0].tolist()))
            return forward(call)

    side, size = p.latent_shape()[-1], p.size
    for told in ("target", "trained"):
        with UpsampleGuidance(told_size=told).patch(p), p.intercept(Watch(), "features"):
            p.draw("art", 0, sampling_steps=2, cfg_scale=1.0, size=2 * size)
    ids = lambda n: [n, n, 0, 0, n, n]
    large, small, trained = (2 * side, ids(2 * size)), (side, ids(size)), (2 * side, ids(size))
    assert seen == [large, small, large, trained, small, trained], "the second step is not guided"


def test_what_others_put_beside_the_size_stays(tiny_sdxl):
    """Such as the embeddings of an IP-Adapter's picture."""
    p, picture = tiny_sdxl, torch.zeros(1, 3)
    z = torch.zeros(1, 4, 8, 8)
    inputs = p.anatomy.inputs(z, p.encode("art"))
    inputs["added_cond_kwargs"]["image_embeds"] = picture
    call = resized(Call(p.anatomy, z, 1, inputs), z[..., :4, :4], (16, 24))
    added = call.inputs["added_cond_kwargs"]
    assert added["image_embeds"] is picture and added["time_ids"].tolist() == [[16, 24, 0, 0, 16, 24]]
    assert call.inputs["encoder_hidden_states"] is inputs["encoder_hidden_states"]


def test_residuals_of_a_controlnet_are_averaged_for_the_small_picture(tiny_sd):
    p = tiny_sd.copy()
    torch.manual_seed(0)
    widths = (8,) * p.pipe.vae_scale_factor.bit_length()
    control = ControlNetModel.from_unet(p.network, conditioning_embedding_out_channels=widths).eval()
    pipe = StableDiffusionControlNetPipeline(
        **{k: v for k, v in p.pipe.components.items() if k != "image_encoder"}, controlnet=control,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    size = 2 * p.size
    options = {"num_inference_steps": 3, "height": size, "width": size, "output_type": "latent"}
    edges = torch.rand(1, 3, size, size, generator=rng())
    with UpsampleGuidance().patch(pipe) as told:
        assert pipe("art", image=edges, generator=rng(), **options).images.isfinite().all()
    assert told["small_runs"] == 1


def test_settings_and_sizes_that_cannot_be(tiny_sd):
    with pytest.raises(BadInput, match="must be at least 1"):
        UpsampleGuidance(scale=(0,))
    for scale, told in (((1.5,), "1.5"), (1.5, "1.5"), (("x",), "'x'")):
        with pytest.raises(BadInput, match=f"scale must be a whole number, got {told}"):
            UpsampleGuidance(scale=scale)
    with pytest.raises(BadInput, match="got 4 numbers"):
        UpsampleGuidance(scale=(1, 2, 2, 2))
    with pytest.raises(BadInput, match="is for frames"), UpsampleGuidance(scale=(1, 2, 2)).patch(tiny_sd):
        pass
    unit = tiny_sd.scale_factor
    with UpsampleGuidance().patch(tiny_sd), pytest.raises(BadInput, match="no whole multiple of the"):
        tiny_sd.draw("art", 0, sampling_steps=2, size=tiny_sd.size + unit)
    with UpsampleGuidance(scale=(3,)).patch(tiny_sd), pytest.raises(BadInput, match="no multiple of 3"):
        tiny_sd.draw("art", 0, sampling_steps=2)
    blurring = TwoSizes(BlurringProcess(Cosine(-10, 10)), blocky((2, 2), PROCESSES[0])[0].small, (2, 2))
    with pytest.raises(BadInput, match="one noise level for all frequencies"):
        Upsampled(blurring, (2, 2))


# Models of pixels and of frames


def pixels() -> ImageModel:
    torch.manual_seed(0)
    network = UNet(8, 3, channels=(8, 8), layers=1, attention=())
    defaults = {"scheduler": "ddim", "sampling_steps": 3}
    return ImageModel(network.eval(), GaussianProcess(Cosine()), "v", (3, 8, 8), (), defaults)


def test_models_of_pixels_draw_larger(tmp_path):
    model = pixels()
    plain = model.draw(None, [0, 1])
    with UpsampleGuidance(scale=(2, 3)).patch(model) as told:
        assert told == {"scale": [2, 3]} and model.latent_shape() == (3, 16, 24)
        drawn = model.draw(None, [0, 1], scheduler="heun")
        assert torch.equal(model.copy().draw(None, [0, 1]), plain), "a copy is as the model was"
        with pytest.raises(BadInput, match="acts on this model already"), UpsampleGuidance().patch(model):
            pass
        with pytest.raises(BadInput, match="save it after the block"):
            model.save(tmp_path / "model")
    assert drawn.shape == (2, 3, 16, 24) and torch.equal(model.draw(None, [0, 1]), plain)
    assert not {"save", "copy"} & vars(model).keys() and not list(tmp_path.iterdir())


def test_frames_are_enlarged_but_not_more_of_them_than_the_network_takes():
    torch.manual_seed(0)
    network = VideoUNet(8, 4, 1, channels=(8, 8), layers=1, head_dim=8, embedding=16)
    model = VideoModel(network.eval(), GaussianProcess(Cosine()), "v", (4, 1, 8, 8), (), {"context": 2, "clip": False})
    context = torch.rand(1, 2, 1, 16, 16)
    with UpsampleGuidance(scale=(2,)).patch(model):
        assert model.draw(context, 0, sampling_steps=1).shape == (1, 2, 1, 16, 16)
    with pytest.raises(BadInput, match="windows of 4 frames, not 8"), UpsampleGuidance(scale=(2, 1, 1)).patch(model):
        pass
    assert model.shape == (4, 1, 8, 8) and model.window.clean == 2


def test_a_network_of_one_size_is_refused():
    net = ResidualUViT(
        8, 3, channels=(8, 16), kinds=("res", "transformer"), blocks=(1,), middle=1, head_dim=8, positions="learned"
    )
    model = ImageModel(net.eval(), GaussianProcess(Cosine()), "v", (3, 8, 8))
    with pytest.raises(BadInput, match="does not fit this ResidualUViT"), UpsampleGuidance().patch(model):
        pass
    with pytest.raises(BadInput, match="is for frames"), UpsampleGuidance(scale=(1, 2, 2)).patch(pixels()):
        pass


# The command line


def test_the_command_line_draws_larger_and_sample_offers_it(tiny_sd, tmp_path, capsys):
    model, size = str(tiny_sd.save(tmp_path / "tiny")), 2 * tiny_sd.size
    given = ["star", "--model", model, "--steps", "2", "--size", str(size), "--device", "cpu", "--out"]
    assert cli.main(["steer", "upsample-guidance", *given, str(tmp_path / "steered")]) == 0
    told = capsys.readouterr()
    assert "sfumato steer upsample-guidance" not in told.err and "small_runs: 1" in told.out
    assert Image.open(next((tmp_path / "steered").glob("0*.png"))).size == (size, size)
    assert cli.main(["sample", *given, str(tmp_path / "plain")]) == 0
    assert "sfumato steer upsample-guidance" in capsys.readouterr().err


def test_the_command_line_takes_models_without_text(tmp_path):
    model = str(pixels().save(tmp_path / "pixels"))
    args = ["steer", "upsample-guidance", "--model", model, "--scale", "2", "3", "--out", str(tmp_path / "out")]
    assert cli.main([*args, "--device", "cpu"]) == 0
    assert np.asarray(Image.open(next((tmp_path / "out").glob("0*.png")))).shape == (16, 24, 3)
    assert np.asarray(Image.open(next((tmp_path / "out" / "plain").glob("0*.png")))).shape == (8, 8, 3)
    assert "each at its own size" in (tmp_path / "out" / "index.html").read_text()


def test_wrapped_twice_it_is_one_patch(tiny_sd):
    with UpsampleGuidance().patch(tiny_sd.pipe):
        assert [type(x).__name__ for x in wrap(tiny_sd.pipe).patches] == ["UpsampleGuidance"]
