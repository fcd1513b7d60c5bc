"""Multistep consistency: its loss against exact teachers, its schedules, and the student as others see it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import nn
from torch.testing import assert_close

import sfumato as sf
from noise_cases import normal
from sfumato.distill.base import guided, sampled
from sfumato.distill.multistep_cm import MultistepCM, MultistepTraining, same_dropout
from sfumato.errors import BadInput
from sfumato.nets import SimpleUNet
from sfumato.noise import Cosine, GaussianProcess, Karras
from sfumato.noise.addim import addim_step
from sfumato.noise.analytic import GaussianMixture, MixtureDenoiser
from sfumato.pipeline import ImageModel, few_steps
from sfumato.sample import ddim
from sfumato.sample.schedulers import FewStepScheduler
from sfumato.sample.times import uniform

PROCESS = GaussianProcess(Cosine())
DATA = GaussianMixture.isotropic(torch.tensor([[-1.0, 0.2], [0.7, 0.5]]), 0.3)
TEACHER = MixtureDenoiser(PROCESS, DATA)


class Learned(nn.Module):
    """A student: the exact denoiser plus what ``drift`` adds; as teacher and student need to look."""

    process, prediction = PROCESS, "x0"

    def __init__(self, drift: float = 0.0, dropout: float = 0.0):
        super().__init__()
        self.drift = nn.Parameter(torch.tensor(drift, dtype=torch.float64))
        self.dropout = nn.Dropout(dropout)

    def forward(self, z, t, cond=None):
        return TEACHER(z, t) + self.drift * self.dropout(torch.ones_like(z))


class Points:
    """Draws of the mixture as `CleanData`."""

    def batch(self, rng, size):
        return {"x": DATA.sample(size, rng), "rows": torch.arange(size), "bare": torch.zeros(size, dtype=torch.bool)}

    def conditioning(self, rows, bare):
        return None


def training(teacher=TEACHER, drift=0.0, dropout=0.0, **settings):
    student = Learned(drift, dropout)
    side = lambda denoiser, **rest: SimpleNamespace(
        denoiser=denoiser, defaults={"cfg_scale": 1.0}, unconditional=lambda n: None, **rest
    )
    settings = {"cfg_scale": 1.0, "huber": 1e-9, **settings}
    return MultistepTraining(MultistepCM(**settings), side(teacher), side(student, network=student), Points())


def loss(run, step=0, size=16, seed=0):
    batch = run.batch(step, torch.Generator().manual_seed(seed), size)
    return run.loss(batch, torch.Generator().manual_seed(seed + 1))


def test_diffusion_training_is_the_limit_of_one_teacher_step():
    """CT with T = S: the loss is (SNR + 1) ||x - f(z, t)||, written out again."""
    run = training(mode="ct", sampling_steps=8, first_teacher_steps=8, last_teacher_steps=8)
    got, logs = loss(run)
    x, rng = DATA.sample(16, _rows(0)), torch.Generator().manual_seed(1)
    t = (torch.randint(8, (16,), generator=rng) + torch.randint(1, 2, (16,), generator=rng)) / 8
    z = PROCESS.diffuse(x, t, torch.randn(x.shape, generator=rng).double())
    expected = (PROCESS.logsnr(t).exp() + 1) * (x - TEACHER(z, t)).norm(dim=1)
    assert_close(got.double(), expected.mean(), rtol=1e-6, atol=1e-6)
    assert logs["teacher_steps"] == 8


def _rows(seed):
    return torch.Generator().manual_seed(seed)


def test_a_student_that_is_its_teacher_is_perfect_with_one_teacher_step_only():
    """Many segments recover DDIM: the distillation loss of the teacher itself vanishes, and no earlier."""
    assert loss(training(sampling_steps=16, first_teacher_steps=16, last_teacher_steps=16, eta=0.0))[0] < 1e-6
    assert loss(training(sampling_steps=2, first_teacher_steps=16, last_teacher_steps=16, eta=0.0))[0] > 1e-2


def test_only_the_prediction_at_t_has_a_gradient():
    """d loss / d drift is that of a target held fixed: here +-(SNR + 1) sqrt(d), summed."""
    run = training(drift=0.3, sampling_steps=16, first_teacher_steps=16, last_teacher_steps=16, eta=0.0)
    value, _ = loss(run)
    value.backward()
    # with one teacher step the target is the teacher's prediction, so the difference is the drift in both dimensions
    rng = torch.Generator().manual_seed(1)
    t = (torch.randint(16, (16,), generator=rng) + 1) / 16
    slope = (2**0.5 * (PROCESS.logsnr(t).exp() + 1)).mean()
    assert_close(run.student.network.drift.grad, slope, rtol=1e-6, atol=0)
    assert_close(value.detach().double(), 0.3 * slope, rtol=1e-6, atol=1e-6)


def test_the_variance_is_taken_around_the_prediction_without_guidance(monkeypatch):
    """A guided teacher steps with its guided prediction, and x_var = eta ||unguided - x||^2 / d."""

    class Guidable:
        process, prediction = PROCESS, "x0"

        def __call__(self, z, t, cond=None):
            return TEACHER(z, t) + cond[:, None]

    class Told(Points):
        def conditioning(self, rows, bare):
            return torch.full((len(rows),), 0.7, dtype=torch.float64)

    seen = {}

    def step(process, z, x0, t, s, x0_var):
        seen.update(z=z, x0=x0, t=t, var=x0_var)
        return addim_step(process, z, x0, t, s, x0_var)

    monkeypatch.setattr("sfumato.distill.multistep_cm.addim_step", step)
    run = training(Guidable(), eta=0.75)
    run.scale = 3.0
    run.teacher.unconditional = lambda n: torch.full((n,), 0.6, dtype=torch.float64)
    run.data = Told()
    loss(run, size=16)
    x = DATA.sample(16, torch.Generator().manual_seed(0))
    plain = TEACHER(seen["z"], seen["t"]) + 0.7
    assert_close(seen["x0"], plain + 2 * 0.1, rtol=1e-9, atol=1e-9)
    assert_close(seen["var"], 0.75 * (plain - x).square().mean(1), rtol=1e-9, atol=1e-12)


def test_guidance_comes_from_the_teacher_unless_asked_for():
    side = SimpleNamespace(denoiser=TEACHER, defaults={"cfg_scale": 4.0}, unconditional=lambda n: torch.zeros(n))
    student = SimpleNamespace(denoiser=TEACHER, network=Learned())
    assert MultistepTraining(MultistepCM(), side, student, Points()).scale == 4.0
    assert MultistepTraining(MultistepCM(cfg_scale=1.5), side, student, Points()).scale == 1.5
    side.unconditional = lambda n: None
    with pytest.raises(BadInput, match="has no guidance"):
        MultistepTraining(MultistepCM(cfg_scale=1.5), side, student, Points())
    with pytest.raises(BadInput, match="from the data alone"):
        MultistepCM(mode="ct", cfg_scale=1.5)


def test_the_teacher_is_guided_as_it_draws():
    """By its scale, in its interval of noise levels: outside of it the student learns from the plain prediction."""
    torch.manual_seed(0)
    net = SimpleUNet(8, 1, classes=2, channels=(8,), blocks=(1,), attention=(), embedding=16)
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    defaults = {"cfg_scale": 3.0, "cfg_interval": (-0.95, 3.32), "clip": False}
    model = ImageModel(net.eval(), PROCESS, "v", (1, 8, 8), ("a", "b"), defaults)
    z, cond = torch.randn(3, 1, 8, 8), model.told(["a", "b", "a"])
    t = torch.tensor([0.02, 0.4, 0.95], dtype=torch.float64)
    inside = (model.process.logsnr(t) >= -0.95) & (model.process.logsnr(t) <= 3.32)
    assert inside.tolist() == [False, True, False]
    ours = guided(model, model.denoiser, cond, 3.0, 3)
    expected = model.guided(cond, n=3)(z, t)
    assert_close(ours(z, t, cond), expected, rtol=1e-5, atol=1e-6)
    run = MultistepTraining(MultistepCM(), model, SimpleNamespace(network=nn.Linear(1, 1)), Points())
    x0, plain = run.guess(z, t, cond)
    assert_close(x0, model.process.convert(expected, z, t, "v", "x0"), rtol=1e-5, atol=1e-6)
    assert torch.equal(x0[~inside], plain[~inside]) and not torch.allclose(x0[inside], plain[inside], atol=1e-3)


def test_pictures_on_the_way_begin_with_noise_in_the_processs_own_scale():
    seen = []

    class Seen:
        process, prediction = GaussianProcess(Karras()), "x0"

        def __call__(self, z, t, cond=None):
            seen.append(float(z.std()))
            return torch.zeros_like(z)

    sampled(SimpleNamespace(denoiser=Seen(), decode_latents=lambda z: z), torch.randn(2, 1, 16, 16), 2, None)
    assert 70 < seen[0] < 90


def test_both_passes_see_the_same_dropout():
    layer, x = nn.Dropout(0.5), torch.ones(1000)
    state = torch.get_rng_state()
    masks = []
    for seed in (7, 7, 8):
        with same_dropout(seed, torch.device("cpu")):
            masks.append(layer(x))
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_cancels_where_the_student_only_differs_by_it():
    """S = 1 and a drift that dropout hides at random: the same mask in both passes leaves only the teacher's error."""
    settings = {"sampling_steps": 1, "first_teacher_steps": 400, "last_teacher_steps": 400, "eta": 0.0}
    with_it, without = (loss(training(drift=1.0, dropout=p, **settings), size=64)[1] for p in (0.5, 0.0))
    # pictures whose s is the start are held to z_s, where the drift shows; there is none among these
    assert with_it["difference"] < 2 * without["difference"]
    assert training(dropout=0.5).student.network.dropout.p == 0.5
    run = training(dropout=0.5)
    MultistepTraining(MultistepCM(dropout=0.25), run.teacher, run.student, Points())
    assert run.student.network.dropout.p == 0.25
    student = SimpleNamespace(denoiser=TEACHER, network=nn.Linear(1, 1))
    with pytest.raises(BadInput, match="no layers for it"):
        MultistepTraining(MultistepCM(dropout=0.25), run.teacher, student, Points())


def test_a_student_has_dropout_where_its_network_was_meant_to_have_it():
    """Also where its teacher learned with none: at sides of at most ``dropout_from``."""
    layers = lambda net: sum(isinstance(m, nn.Dropout) for m in net.modules())
    shape = {"size": 16, "channels": (8, 8), "blocks": (1, 1), "attention": (8,), "head_dim": 8, "embedding": 16}
    some, more, none = (SimpleUNet(**shape, dropout_from=side) for side in (8, 16, 4))
    assert 0 < layers(some) < layers(more) and layers(none) == 0
    x, t = torch.randn(1, 3, 16, 16), torch.zeros(1)
    assert torch.equal(more.train()(x, t), more.eval()(x, t))



def test_annealing():
    method = MultistepCM(sampling_steps=4)
    assert method.substeps(0) == 16 and method.substeps(100_000) == method.substeps(10**9) == 320
    assert method.substeps(50_000) == round((64 * 1280) ** 0.5 / 4)
    assert MultistepCM(sampling_steps=500).substeps(0) == 1, "a segment has at least one teacher step"
    assert method.eta_at(0) == method.eta_at(7) == 0.75
    growing = MultistepCM(first_eta=0.0, eta=0.5, anneal=10)
    assert [growing.eta_at(i) for i in (0, 5, 10, 20)] == [0.0, 0.25, 0.5, 0.5]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"first_teacher_steps": 0}, "first_teacher_steps"),
        ({"last_teacher_steps": 4}, "not from 64 to 4"),
        ({"eta": -1}, "eta"),
        ({"huber": 0}, "huber"),
    ],
)
def test_bad_settings(wrong, told):
    with pytest.raises(BadInput, match=told):
        MultistepCM(**wrong)


# The student as others see it


@pytest.mark.parametrize("steps", [1, 3, 4, 8])
def test_the_scheduler_visits_exactly_the_ends_of_the_segments(steps):
    """Also where the steps do not divide 1000; the whole chain is DDIM on the exact grid."""
    base = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    scheduler = FewStepScheduler.from_config(base.config, distilled_steps=steps)
    scheduler.set_timesteps(50)
    expected = torch.arange(steps, 0, -1).double() * 1000 / steps - 1
    assert_close(scheduler.timesteps.double(), expected, rtol=0, atol=1e-4)
    z = normal(4, 2)
    denoiser = MixtureDenoiser(scheduler.process, DATA, "eps")
    end = z
    for i, timestep in enumerate(scheduler.timesteps):
        end = scheduler.step(denoiser(end, (steps - i) / steps), timestep, end, return_dict=False)[0]
    assert_close(end, ddim(denoiser, z, uniform(steps)), rtol=1e-9, atol=1e-9)


def test_scheduler_refuses_other_numbers():
    scheduler = FewStepScheduler(distilled_steps=4)
    for good in (None, 4, 50):
        scheduler.set_timesteps(good)
        assert len(scheduler.timesteps) == 4
    with pytest.raises(BadInput, match="distilled for 4 steps and cannot take 8"):
        scheduler.set_timesteps(8)
    with pytest.raises(BadInput, match="at least one"):
        FewStepScheduler(distilled_steps=0)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_diffusers_own_pipeline_needs_no_flags(family, tiny_sd, tiny_sdxl, tmp_path):
    """``pipe(prompt)``: 50 steps and guidance 7.5 are what it asks for, S steps without guidance what it does."""
    student = (tiny_sd if family == "sd" else tiny_sdxl).copy(own="full")
    with torch.no_grad():
        student.network.conv_out.weight.add_(0.01)
    plain = student.draw("a red star", 5, sampling_steps=4, cfg_scale=1.0, scheduler=_trailing(student))
    few_steps(student, 4)
    ours = student.draw("a red star", 5)
    assert_close(ours, plain, rtol=1e-3, atol=1e-4)
    student.save(tmp_path / "student")
    kind = StableDiffusionPipeline if family == "sd" else StableDiffusionXLPipeline
    pipe = kind.from_pretrained(tmp_path / "student")
    pipe.set_progress_bar_config(disable=True)
    calls = []
    pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[0]))
    theirs = pipe("a red star", generator=torch.Generator().manual_seed(5), output_type="pt").images
    assert calls == [1, 1, 1, 1]
    assert_close(theirs.float(), ours, rtol=1e-3, atol=1e-3)
    assert "sfumato" in (tmp_path / "student" / "README.md").read_text()
    assert json.loads((tmp_path / "student" / "sfumato.json").read_text())["defaults"]["sampling_steps"] == 4


def _trailing(model):
    return DDIMScheduler.from_config(
        model.pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )


def test_a_network_that_listens_to_guidance_is_still_refused(tiny_sd):
    student = tiny_sd.copy(own="full")
    few_steps(student, 4)
    assert sf.wrap(student.pipe).pipe is student.pipe
    with torch.no_grad():
        student.network.time_embedding.cond_proj.weight.add_(1)
    with pytest.raises(BadInput, match="guidance-distilled"):
        sf.wrap(student.pipe)


def test_a_student_can_be_copied_and_distilled_again(tiny_sd):
    student = tiny_sd.copy(own="full")
    few_steps(student, 4)
    again = student.copy(own="full")
    assert again.defaults["sampling_steps"] == 4
    assert torch.equal(again.draw("a star", 1), student.draw("a star", 1))
    few_steps(again, 2)
    assert again.draw("a star", 1).shape == (1, 3, 16, 16)
