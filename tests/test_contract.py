"""What every model promises (`Model`) and what it is told (`Condition`), over all kinds of either."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers
from diffusers import DDIMScheduler
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.nets import ResidualUViT, UNet, VideoUNet
from sfumato.noise import Cosine, GaussianProcess, Karras
from sfumato.noise.analytic import GaussianMixture, MixtureDenoiser
from sfumato.pipeline import (
    Condition,
    Conditioning,
    Frames,
    ImageModel,
    Labels,
    Model,
    Noised,
    Seen,
    VideoModel,
    as_flow,
)

KINDS = ["tiny_sd", "tiny_sdxl", "tiny_sd3", "tiny_flux", "tiny_pixart", "classes", "pixels"]


@pytest.fixture(scope="module")
def classes():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = ResidualUViT(8, 3, 2, channels=(8, 16), kinds=("res", "transformer"), blocks=(1,), middle=1, head_dim=8)
        for weight in net.parameters():  # what starts at zero hears nothing of classes
            if weight.abs().max() == 0:
                torch.nn.init.normal_(weight, std=0.2)
        defaults = {"sampling_steps": 3, "cfg_scale": 2.0, "scheduler": "ddim"}
        return ImageModel(net.eval(), GaussianProcess(Cosine()), "v", (3, 8, 8), ("star", "circle"), defaults)


@pytest.fixture(scope="module")
def pixels():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UNet(8, 3, channels=(8, 8), layers=1, attention=())
        return ImageModel(network.eval(), GaussianProcess(Cosine()), "v", (3, 8, 8), (), {"scheduler": "ddim"})


@pytest.fixture(params=KINDS)
def model(request) -> Model:
    return request.getfixturevalue(request.param)


def asked(model: Model, n: int = 3) -> list[str] | None:
    """What this model can be asked for."""
    return None if model.unconditional() is None else ["star", "circle", "star"][:n]


# Conditions


@dataclass(frozen=True)
class Prototype(Condition):
    """A class's text and a picture of it that is never dropped; one field is not said, one holds items of any kind."""

    text: Labels
    picture: Tensor
    graph: tuple[tuple[int, ...], ...] = ()
    camera: Tensor | None = None

    def drop(self, mask, empty):
        return replace(super().drop(mask, empty), picture=self.picture)


def conditions() -> list[Condition]:
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=rng)
    ids = torch.arange(12).view(3, 4)
    return [
        Conditioning(draw(3, 4, 5), ids, ids > 3, pooled=draw(3, 6), prompts=("a", "b", "c")),
        Labels(torch.tensor([2, 0, 1])),
        Frames(draw(3, 2, 1, 4, 4)),
        Seen(draw(3, 5), torch.tensor([True, False, True]), draw(3, 2, 4)),
        Prototype(Labels(torch.tensor([2, 0, 1])), draw(3, 3, 2, 2), ((0, 1), (), (2,))),
    ]


def same(one: Condition, other: Condition) -> bool:
    """Whether two conditions say the same."""
    found = [(value, getattr(other, name)) for name, value in vars(one).items()]
    compare = lambda a, b: torch.equal(a, b) if torch.is_tensor(a) else a == b
    return type(one) is type(other) and all(
        same(a, b) if isinstance(a, Condition) else compare(a, b) for a, b in found
    )


@pytest.mark.parametrize("cond", conditions(), ids=lambda c: type(c).__name__)
def test_rows_are_picked_repeated_joined_and_dropped(cond):
    kind = type(cond)
    assert len(cond) == 3 and len(cond[1]) == 1 and len(cond[1:]) == 2
    assert same(kind.cat([cond[i] for i in range(3)]), cond)
    assert same(cond[[2, 0, 0]], kind.cat([cond[2], cond[0], cond[0]])) and same(cond[-1], cond[2])
    assert same(cond.repeat(2), cond[[0, 0, 1, 1, 2, 2]])
    assert same(cond[torch.tensor([True, False, True])], cond[[0, 2]])
    assert same(cond.map(lambda x: x * 1), cond) and not same(cond.map(lambda x: x + 1), cond)
    empty = cond.map(lambda x: x * 0)[[1]]
    dropped = cond.drop(torch.tensor([False, True, False]), empty)
    kept = lambda c: replace(c, picture=cond.picture[1:2]) if isinstance(c, Prototype) else c
    assert same(dropped, kind.cat([cond[0], kept(empty), cond[2]]))
    assert same(cond.drop(torch.zeros(3, dtype=torch.bool), empty), cond)
    nothing = cond.drop(torch.ones(3, dtype=torch.bool), empty)
    assert same(nothing[1], kept(empty)) and len(nothing) == 3


# Models


def test_what_a_model_is_told(model):
    words = asked(model)
    other = Frames(torch.zeros(1, 1, 1, 2, 2))
    with pytest.raises(BadInput, match="not Frames"):
        model.told(other)
    if words is None:
        assert model.told(None) is None
        with pytest.raises(BadInput, match="without classes"):
            model.told("star")
        return
    told = model.told(words)
    assert isinstance(told, Condition) and len(told) == 3 and model.told(told) is told
    assert len(model.told("star")) == 1 and len(model.unconditional(4)) == 4 == len(model.told(None).repeat(4))
    z = torch.randn(3, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        row = model.denoiser(z[1:2], 0.5, told[1])
        torch.testing.assert_close(model.denoiser(z, 0.5, told)[1:2], row, rtol=0, atol=1e-4)
        assert not torch.allclose(row, model.denoiser(z[1:2], 0.5, model.unconditional()), atol=1e-5)


def test_pictures_and_latents(model):
    x = torch.rand(2, 3, model.size, model.size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        z = model.encode_image(x)
        assert z.shape[1:] == model.latent_shape() and model.decode_latents(z).shape == x.shape
    assert (model.autoencoder is None) == torch.equal(x, z) and 0 <= model.cleanest < 0.01
    copy = model.frozen_copy()
    assert type(copy) is type(model) and copy.describe()["sha256"] == model.describe()["sha256"]
    assert set(copy.parts()) == set(model.parts()) and model.sampling_steps >= 1 and model.scheduler_name


class Captions:
    """Pictures that are called by words the models know."""

    label_names = ("star", "circle")

    def caption(self, i):
        return "a star" if i else "a circle"

    def label(self, i):
        return i


def test_what_one_asks_for_to_have_such_pictures(model):
    found = model.asked_for(Captions(), [0, 1])
    if asked(model) is None:
        assert found is None
        return
    assert len(model.told(found)) == 2
    if model.autoencoder is None:
        other = type("Other", (Captions,), {"label_names": ("dog", "circle")})()
        with pytest.raises(BadInput, match="knows the classes star, circle; these pictures have dog, circle"):
            model.asked_for(other, [0])


def picture(model: Model, n: int = 1) -> Tensor:
    return torch.rand(n, 3, model.size, model.size, generator=torch.Generator().manual_seed(5))


STARTS = {
    "seeds": lambda model: None,
    "noise": lambda model: torch.randn(3, *model.latent_shape(), generator=torch.Generator().manual_seed(9)),
    "pictures": lambda model: Noised(picture(model, 3), 0.7),
    "one picture": lambda model: Noised(picture(model), 1.0),
}


@pytest.mark.parametrize("start", STARTS)
def test_a_draw_does_not_depend_on_its_batch(model, start):
    """And a function of time that always gives the same condition draws the same bits as that condition."""
    options = {"sampling_steps": 2, "start": STARTS[start](model)}
    words = asked(model)
    together = model.draw(words, [1, 2, 3], **options)
    assert together.shape == (3, 3, model.size, model.size) and together.dtype == torch.float32
    assert together.min() >= 0 and together.max() <= 1 and not together.requires_grad
    torch.testing.assert_close(model.draw(words, [1, 2, 3], batch=2, **options), together, rtol=0, atol=1e-5)
    if words is not None:
        told = model.told(words)[[0, 1, 2]]
        constant = model.draw(None, [1, 2, 3], cond=told, **options)
        assert torch.equal(model.draw(None, [1, 2, 3], cond=lambda t: told, **options), constant)
        assert torch.equal(model.draw(told, [1, 2, 3], **options), constant)


def test_the_noise_of_a_seed_is_what_the_seed_draws(model):
    noise = torch.stack(
        [torch.randn(model.latent_shape(), generator=torch.Generator().manual_seed(s)) for s in (4, 5)]
    )
    plain = model.draw(asked(model, 2), [4, 5], sampling_steps=2, scheduler="ddim")
    assert torch.equal(model.draw(asked(model, 2), [0, 0], sampling_steps=2, scheduler="ddim", start=noise), plain)


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sd3", "classes"])
def test_per_stage_prompts_are_walks_one_after_the_other(request, name):
    """One draw with a condition that changes, or a second one from where the first has come to."""
    model, options = request.getfixturevalue(name), {"sampling_steps": 4, "scheduler": "ddim"}
    first, second = model.told("star"), model.told("circle")
    passed = []
    model.draw(first, 1, guide=lambda pred, z, t, cond: passed.append((z, t)) or pred, **options)
    times = [float(t) for _, t in passed]
    assert times == sorted(times, reverse=True) and len(times) == 4 and 0 < times[2] < 1
    staged = model.draw(None, 1, cond=lambda t: first if t > times[2] else second, **options)
    rest = model.draw(second, 7, start=(passed[2][0], times[2]), **options)
    torch.testing.assert_close(rest, staged, rtol=0, atol=1e-5)
    for cond in (first, second):
        assert not torch.allclose(staged, model.draw(cond, 1, **options), atol=1e-4)


def test_a_trajectory_is_a_start(tiny_sd):
    whole = tiny_sd.draw("star", [1, 2], sampling_steps=5, scheduler="ddim")
    start = tiny_sd.trajectory("star", [1, 2], sampling_steps=5, stop_after=3)
    assert torch.equal(tiny_sd.draw("star", [8, 9], sampling_steps=5, scheduler="ddim", start=start), whole)
    z, t = tiny_sd.trajectory("star", [0, 0], sampling_steps=5, stop_after=5, start=start)
    assert t == 0 and torch.equal(((tiny_sd.decode_latents(z) + 1) / 2).clamp(0, 1), whole)


KARRAS, EXPONENTIAL = {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}


@pytest.mark.parametrize(
    ("scheduler", "spaced", "steps", "strength"),
    [
        *((kind, {}, 5, 0.65) for kind in (None, "dpm++", "EulerDiscreteScheduler", "HeunDiscreteScheduler")),
        # Sigmas between timesteps, which all but Heun round.
        *((f"{kind}Scheduler", KARRAS, 10, 0.3) for kind in ("DPMSolverMultistep", "UniPCMultistep", "HeunDiscrete")),
        ("DEISMultistepScheduler", EXPONENTIAL, 10, 0.3),
    ],
)
def test_pictures_to_start_from_are_noised_as_diffusers_does(tiny_sd, scheduler, spaced, steps, strength):
    import diffusers

    config = tiny_sd.pipe.scheduler.config
    named = scheduler and "Sch" in scheduler
    chosen = getattr(diffusers, scheduler).from_config(config, **spaced) if named else scheduler
    x, text = picture(tiny_sd), tiny_sd.told("a red star")
    ours = tiny_sd.draw(text, 3, sampling_steps=steps, cfg_scale=1.0, scheduler=chosen, start=Noised(x, strength))
    parts = {**tiny_sd.pipe.components, "scheduler": make(tiny_sd, chosen)}
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        latents = tiny_sd.encode_image(x * 2 - 1)
    theirs = pipe(
        prompt_embeds=text.tokens, image=latents, strength=strength, guidance_scale=1.0, num_inference_steps=steps,
        generator=torch.Generator().manual_seed(3), output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=1e-4)


def make(p, scheduler):
    from sfumato.pipeline.sampling import make_scheduler

    return make_scheduler(p, scheduler)


@pytest.mark.parametrize("name", ["tiny_sd", "classes"])
def test_a_guide_changes_the_prediction_after_guidance(request, name):
    model = request.getfixturevalue(name)
    options = {"sampling_steps": 3, "cfg_scale": 1.0}
    empty, plain = model.unconditional(), model.draw("star", 1, **options)

    def guide(pred: Tensor, z: Tensor, t: float, cond: Condition) -> Tensor:
        assert len(cond) == 1 and pred.shape == z.shape
        without = model.denoiser(z, t, empty)
        return without + 2.5 * (pred - without)

    guided = model.draw("star", 1, **{**options, "cfg_scale": 2.5})
    torch.testing.assert_close(model.draw("star", 1, guide=guide, **options), guided, rtol=0, atol=1e-5)
    assert not torch.allclose(guided, plain, atol=1e-4)
    assert torch.equal(model.draw("star", 1, guide=lambda pred, z, t, cond: pred, **options), plain)


def double(model: Model) -> Model:
    copy = model.copy(own="full")
    for part in copy.parts().values():
        part.double().requires_grad_(False)
    return copy


@pytest.mark.parametrize(
    ("name", "small"), [("tiny_sd", 1e-5), ("tiny_sd3", 1e-3), ("classes", 1e-5), ("pixels", 1e-5)]
)
def test_a_draw_with_gradients_has_the_slope_of_finite_differences(request, name, small):
    """In the start and in the condition, with guidance, and the same again when steps are computed twice.

    diffusers' scheduler of flows rounds to float32, which takes wider differences.
    """
    if name in ("tiny_sd", "tiny_sd3") and transformers.__version__.startswith("4"):
        pytest.skip("the text encoders of transformers 4 do not run in float64")
    model = double(request.getfixturevalue(name))
    rng = torch.Generator().manual_seed(1)
    start = torch.randn(2, *model.latent_shape(), generator=rng, dtype=torch.float64)
    along = torch.randn(start.shape, generator=rng).double()
    weights = torch.randn(2, 3, model.size, model.size, generator=rng).double()
    cond = None if asked(model) is None else model.told(["star", "circle"])
    text = isinstance(cond, Conditioning)
    moved = torch.randn(cond.tokens.shape, generator=rng).double() if text else None

    def value(h: Tensor, grad) -> Tensor:
        told = cond.replace(tokens=cond.tokens.double() + h * moved) if text else cond
        x = model.draw(told, [0, 0], sampling_steps=2, scheduler="ddim", start=start + h * along, batch=1, grad=grad)
        return (x * weights).sum()

    zero, h = torch.zeros((), dtype=torch.float64, requires_grad=True), torch.tensor(small, dtype=torch.float64)
    (slope,) = torch.autograd.grad(value(zero, True), zero)
    (again,) = torch.autograd.grad(value(zero, "checkpoint"), zero)
    assert slope.abs() > 1e-2 and torch.allclose(again, slope, rtol=1e-10)
    finite = (value(h, True) - value(-h, True)) / (2 * h)
    assert abs(slope - finite) < max(small, 1e-4) * abs(slope)


def test_a_checkpointed_draw_refuses_patches(tiny_sd):
    from sfumato.steer import FasterDiffusion

    with FasterDiffusion().patch(tiny_sd), pytest.raises(BadInput, match="use grad=True"):
        tiny_sd.draw("star", 0, sampling_steps=2, grad="checkpoint")


# Inversion


class Blind:
    """The exact denoiser of Gaussian data, whatever it is told."""

    def __init__(self, process: GaussianProcess, shape: tuple[int, ...], kind: str):
        size = torch.Size(shape).numel()
        scales = 0.02 + 0.08 * torch.rand(size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        self.data = GaussianMixture.gaussian(torch.full(shape, 0.1).double(), torch.diag(scales))
        self.inner, self.process, self.prediction = MixtureDenoiser(process, self.data, kind), process, kind

    def __call__(self, z: Tensor, t, cond=None) -> Tensor:
        return self.inner(z, t)


def roundtrip(model: Model, kind: str, steps: int) -> float:
    model.denoiser = Blind(model.denoiser.process, model.latent_shape(), kind)
    x = model.denoiser.data.sample(2, torch.Generator().manual_seed(3))
    cond = None if asked(model) is None else model.told("star")
    noise = model.invert(x, cond, steps)
    assert 0.6 < noise.std() < 1.2 and noise.dtype == torch.float64
    options = {"sampling_steps": steps, "start": noise, "cfg_scale": 1.0, "scheduler": "ddim"}
    if hasattr(model, "trajectory"):
        again, _ = model.trajectory(cond, [0, 0], stop_after=steps, **options)
    else:
        again = model.draw(cond, [0, 0], **options).double() * 2 - 1
    return float((again - x).square().mean().sqrt())


@pytest.mark.parametrize(
    ("name", "kind"),
    [("tiny_sd", "v"), ("tiny_sd_eps", "eps"), ("tiny_sd3", "flow"), ("classes", "v"), ("classes", "x0"),
     ("pixels", "eps"), pytest.param("tiny_flux", "flow", marks=pytest.mark.slow)],
)  # fmt: skip
def test_an_inversion_comes_back_to_first_order(request, name, kind):
    model = request.getfixturevalue(name).frozen_copy()
    errors = [roundtrip(model, kind, n) for n in (20, 40, 80)]
    assert errors[2] < 0.02 and all(1.6 < a / b < 2.6 for a, b in pairwise(errors)), errors


def test_an_inversion_of_a_reflowed_pipeline_comes_back(tiny_sd):
    model = tiny_sd.copy(own="full")
    as_flow(model)
    errors = [roundtrip(model, "flow", n) for n in (20, 40, 80)]
    assert errors[2] < 0.02 and all(1.6 < a / b < 2.6 for a, b in pairwise(errors)), errors


@pytest.mark.parametrize("settings", [{"timestep_spacing": "linspace"}, {"steps_offset": 0}])
def test_an_inversion_begins_where_a_draw_ends(tiny_sd, settings):
    """At the least noise of the table, which these schedulers visit and keep.

    With "linspace" diffusers' steps end beside the next timestep, so that the error falls unevenly.
    """
    model = tiny_sd.copy()
    model.pipe.scheduler = DDIMScheduler.from_config(model.pipe.scheduler.config, set_alpha_to_one=False, **settings)
    errors = [roundtrip(model, "v", n) for n in (20, 40, 80)]
    assert errors[2] < 0.02 and all(a / b > 1.6 for a, b in pairwise(errors)), errors
    with pytest.raises(BadInput, match="a draw in 1 step ends where it begins"):
        model.invert(torch.zeros(1, *model.latent_shape()), model.told("star"), 1)


def test_an_inversion_under_another_process(pixels):
    """Where the noise is larger than one, what is found is standard normal all the same."""
    model = replace(pixels, process=GaussianProcess(Karras()), defaults={"clip": False, "scheduler": "ddim"})
    errors = [roundtrip(model, "x0", n) for n in (80, 160, 320)]
    assert all(1.6 < a / b < 2.6 for a, b in pairwise(errors)), errors


# Frames, and what is refused


def test_frames_are_told_of_frames():
    torch.manual_seed(0)
    network = VideoUNet(8, 4, 1, channels=(8, 16), layers=1, head_dim=8, embedding=16)
    for weight in network.parameters():  # a new network is 0, and its frames do not meet
        weight.data.add_(0.1 * torch.randn_like(weight))
    model = VideoModel(network.eval(), GaussianProcess(Cosine()), "v", (4, 1, 8, 8), (), {"context": 2, "clip": False})
    given = torch.randn(1, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    told = model.told(given)
    assert isinstance(told, Frames) and model.told(told) is told and model.told(None) is None
    both = model.draw(given, [1, 2], n_frames=2, sampling_steps=1)
    assert torch.equal(both, model.draw(None, [1, 2], cond=told.repeat(2), n_frames=2, sampling_steps=1))
    shifted = model.draw(given, [1, 2], n_frames=2, sampling_steps=1, guide=lambda pred, z, t, cond: pred + 1)
    assert not torch.allclose(both, shifted)
    given = given.requires_grad_()
    (slope,) = torch.autograd.grad(model.draw(given, 1, n_frames=2, sampling_steps=1, grad=True).sum(), given)
    assert slope.abs().max() > 0
    for start in (Noised(torch.zeros(1, 3, 8, 8), 0.5), torch.zeros(1, 4, 1, 8, 8)):
        with pytest.raises(BadInput, match="begin as noise"):
            model.draw(given, 1, start=start)
    with pytest.raises(BadInput, match="begin as noise"):
        model.draw(None, 1, cond=lambda t: told)
    with pytest.raises(BadInput, match="only models of pictures"):
        model.invert(torch.zeros(1, 4, 1, 8, 8), None, 2)
    with pytest.raises(BadInput, match="follow one another"):
        model.asked_for(Captions(), [0])


@pytest.mark.parametrize("name", ["tiny_sd", "classes"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"asked": "star", "cond": True}, "not both"),
        ({"asked": ["star", "circle"], "seeds": [1, 2, 3]}, "2 things asked for and 3 seeds"),
        ({"asked": "star", "start": torch.zeros(1, 2, 3, 3)}, "latents of shape"),
        ({"asked": "star", "start": (torch.zeros(1, 2, 3, 3), 0.5)}, "latents of shape"),
        ({"asked": "star", "start": Noised(torch.zeros(1, 3, 4, 4), 0.5)}, "pictures"),
        ({"asked": "star", "start": Noised(torch.zeros(1, 3, 4, 4), 0.01), "size": 4}, "size|one"),
        ({"asked": "star", "batch": 0}, "batch must be at least 1"),
        ({"asked": "star", "cfg_scale": float("nan")}, "finite"),
        ({"cond": lambda t: Labels(torch.zeros(3, dtype=torch.long)), "seeds": [1, 2]}, "3 conditions for 2 pictures"),
        ({"asked": "star", "start": 2.0}, "none at time|lies at a time"),
        ({"asked": "star", "seeds": 2**64}, "between 0 and 2"),
        ({"asked": "star", "seeds": [1.5]}, "seed must be a whole number, got 1.5"),
        ({"asked": "star", "size": 0}, "size 0 is|one size"),
        ({"asked": "star", "cfg_interval": (1, 0)}, "lower end to its higher"),
        ({"asked": "star", "sampling_steps": 2.5}, "sampling_steps must be a whole number, got 2.5"),
        ({"asked": "star", "batch": 0.5}, "batch must be a whole number"),
    ],
)
def test_what_cannot_be_drawn_is_refused(request, name, options, message):
    model = request.getfixturevalue(name)
    given = {"asked": None, "seeds": 0, "sampling_steps": 3, **options}
    if given.get("cond") is True:
        given["cond"] = model.told("star")
    if isinstance(given.get("start"), float):
        given["start"] = (torch.zeros(1, *model.latent_shape()), given["start"])
    with pytest.raises(BadInput, match=message):
        model.draw(given.pop("asked"), given.pop("seeds"), **given)


@pytest.mark.parametrize("name", ["tiny_sd", "classes"])
def test_numbers_of_numpy_and_torch_are_numbers(request, name):
    model = request.getfixturevalue(name)
    expected = model.draw("star", [3, 4], sampling_steps=2)
    for seeds in (np.array([3, 4]), torch.tensor([3, 4]), [np.int64(3), torch.tensor(4)]):
        assert torch.equal(model.draw("star", seeds, sampling_steps=np.int64(2)), expected)
    for seed in (np.int64(3), torch.tensor(3), 3):
        assert torch.equal(model.draw("star", seed, sampling_steps=2), model.draw("star", [3], sampling_steps=2))


def test_eta_is_no_less_than_deterministic(tiny_sd):
    for eta in (-1.0, float("nan"), float("inf")):
        with pytest.raises(BadInput, match="eta must be"):
            tiny_sd.draw("star", 0, sampling_steps=1, eta=eta)


def test_less_than_a_step_of_strength_and_defaults_of_another_name_are_refused(classes):
    with pytest.raises(BadInput, match="less than one step"):
        classes.draw("star", 0, sampling_steps=3, start=Noised(picture(classes), 0.2))
    with pytest.raises(BadInput, match="strength must lie"):
        Noised(picture(classes), 0.0)
    with pytest.raises(BadInput, match="unknown default of a model 'steps'"):
        replace(classes, defaults={"steps": 3})
