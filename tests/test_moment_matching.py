"""Moment matching: its losses against closed forms, its fixed points on Gaussian data, both variants, the student."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn
from torch.testing import assert_close

from noise_cases import normal
from sfumato.distill.moment_matching import MomentMatching, MomentTraining
from sfumato.distill.parts.instant import Gradient, change_along, preconditioned
from sfumato.distill.parts.moments import (
    auxiliary_loss,
    draw_pair_of_times,
    instant_loss,
    loss_weight,
    next_state,
    student_loss,
    teacher_loss,
)
from sfumato.errors import BadInput
from sfumato.nets import UNet
from sfumato.noise import Cosine, GaussianProcess
from sfumato.noise.analytic import GaussianMixture, MixtureDenoiser
from sfumato.pipeline import ImageModel, few_steps
from sfumato.sample import Guided, ddpm, predict
from sfumato.sample.schedulers import FewStepScheduler
from sfumato.sample.times import uniform
from sfumato.train.loop import Run, Schedule

PROCESS = GaussianProcess(Cosine())
IDEAL = GaussianProcess(Cosine(-math.inf, math.inf))
VE = GaussianProcess(Cosine(), "ve")
MEAN, STD = 0.4, 0.5
DATA = GaussianMixture.isotropic(torch.tensor([[MEAN]]), STD)
TEACHER = MixtureDenoiser(IDEAL, DATA)
WEIGHTS = ("v", "snr", "edm", "flat")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def times(n=6, steps=4):
    return draw_pair_of_times(n, steps, rng(3))


# The draws


def test_times_are_a_step_apart_at_most():
    t, s = draw_pair_of_times(4000, 8, rng())
    assert s.min() >= 1e-3 and t.max() <= 1 and ((t - s) >= 0).all() and ((t - s) <= 1 / 8 + 1e-12).all()
    assert abs(s.mean() - 0.5) < 0.02 and abs((t - s)[s < 0.8].mean() - 1 / 16) < 0.002
    assert (t == 1).any(), "a step that would start above 1 starts at 1"


def test_posterior_is_the_papers():
    """var = (1 / s_s^2 + a_ts^2 / s_ts^2)^-1, mu = var (a_ts / s_ts^2 z_t + a_s / s_s^2 x); and its VE form."""
    t, s = times()
    z, x, noise = normal(6, 3), normal(6, 3) + 1, normal(6, 3) * 2
    (a_t, s_t), (a_s, s_s) = PROCESS.alpha_sigma(t, z), PROCESS.alpha_sigma(s, z)
    a_ts, s2_ts = a_t / a_s, s_t**2 - (a_t / a_s) ** 2 * s_s**2
    var = 1 / (1 / s_s**2 + a_ts**2 / s2_ts)
    expected = var * (a_ts / s2_ts * z + a_s / s_s**2 * x) + var.sqrt() * noise
    assert_close(next_state(PROCESS, z, x, t, s, noise), expected, rtol=1e-9, atol=1e-9)
    r_t, r_s = s_t / a_t, s_s / a_s  # divided by alpha it is the variance exploding one
    share = r_s**2 / r_t**2
    ve = (1 - share) * x + share * z / a_t + r_s * (1 - share).sqrt() * noise
    assert_close(next_state(VE, z / a_t, x, t, s, noise), ve, rtol=1e-9, atol=1e-9)
    assert_close(expected / a_s, ve, rtol=1e-9, atol=1e-9)


def test_ends_of_the_step():
    t = torch.full((5,), 0.6, dtype=torch.float64)
    z, x, noise = normal(5, 2), normal(5, 2), normal(5, 2)
    assert_close(next_state(PROCESS, z, x, t, t, noise), z)
    assert_close(next_state(IDEAL, z, x, t, torch.zeros_like(t), noise), x)


def test_true_posterior_samples_keep_the_marginal():
    """With x~ drawn from p(x | z_t), z_s has the law of q(z_s)."""
    n, t, s = 50_000, torch.tensor(0.7).double(), torch.tensor(0.5).double()
    x = DATA.sample(n, rng())
    z = IDEAL.diffuse(x, t, normal(n, 1))  # then x is such a draw
    a, sigma = IDEAL.alpha_sigma(s)
    z_s = next_state(IDEAL, z, x, t.expand(n), s.expand(n), torch.randn(n, 1, generator=rng(9), dtype=torch.float64))
    assert_close(z_s.mean(), a * MEAN, rtol=0, atol=0.01)
    assert_close(z_s.var(), a**2 * STD**2 + sigma**2, rtol=0.02, atol=0)
    # and goes on from where it was: the noise in z_t is in z_s
    left = (z - IDEAL.alpha_sigma(t)[0] * x) * (z_s - a * x)
    assert left.mean() > 0.1


def test_one_step_renoises_independently_as_diff_instruct_does():
    """k = 1 from pure noise: q(z_s | z_1, x) is q(z_s | x), and the gradient is that of the difference of scores."""
    s, one = torch.full((6,), 0.3, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    z, noise = normal(6, 1), normal(6, 1)
    x = (normal(6, 1) * 0.3 - 1).requires_grad_()
    z_s = next_state(IDEAL, z, x, one, s, noise)
    assert_close(z_s, IDEAL.diffuse(x, s, noise).detach())
    assert not z_s.requires_grad
    fake = MixtureDenoiser(IDEAL, GaussianMixture.isotropic(torch.tensor([[-1.0]]), 0.3))
    weight = loss_weight(IDEAL, s, "v")
    student_loss(x, fake(z_s, s), TEACHER(z_s, s), weight).sum().backward()
    to_score = lambda x0: IDEAL.convert(x0, z_s, s, "x0", "score")
    a, sigma = IDEAL.alpha_sigma(s, z_s)
    expected = weight[:, None] * sigma**2 / a * (to_score(fake(z_s, s)) - to_score(TEACHER(z_s, s)))
    assert_close(x.grad, expected, rtol=1e-9, atol=1e-9)


# The losses


def test_gradients_of_both_losses():
    x, aux, teacher = (normal(4, 2, 3).requires_grad_() for _ in range(3))
    aux.data += 0.3
    teacher.data -= 0.7
    weight = torch.rand(4, generator=rng(), dtype=torch.float64)
    wide = weight[:, None, None]
    student_loss(x, aux, teacher, weight).sum().backward()
    assert_close(x.grad, wide * (aux - teacher).detach())
    assert aux.grad is None and teacher.grad is None
    saddle = lambda: wide * ((x - teacher.detach()).square() - (x - aux).square() - (teacher.detach() - aux).square())
    (twice,) = torch.autograd.grad(saddle().sum(), x)
    assert_close(twice, 2 * x.grad)
    x.grad = None
    auxiliary_loss(x, aux, teacher, weight).sum().backward()
    assert_close(aux.grad, 2 * wide * (2 * aux - x - teacher).detach())
    assert x.grad is None and teacher.grad is None
    (other,) = torch.autograd.grad(saddle().sum(), aux)
    assert_close(other, -aux.grad)  # the saddle form's auxiliary climbs where this one goes down
    assert_close(teacher_loss(x, teacher, weight), (wide * (x - teacher) ** 2).sum((1, 2)))
    assert_close(instant_loss(x, aux, weight), -student_loss(x, aux, torch.zeros_like(aux), weight))


def test_the_best_auxiliary_is_half_way():
    """Linear auxiliary on Gaussian data: at (E[x~ | z_s] + g_theta) / 2, and nowhere else, its loss is stationary."""
    n = 500
    z_s = normal(n, 1)
    x = 0.2 + 0.9 * z_s + 0.3 * torch.randn(n, 1, generator=rng(5), dtype=torch.float64)
    teacher = 0.5 * z_s - 0.1
    rows = torch.cat([torch.ones_like(z_s), z_s], 1)
    mean = torch.linalg.lstsq(rows, x).solution[:, 0]
    best = ((mean + torch.tensor([-0.1, 0.5], dtype=torch.float64)) / 2).requires_grad_()
    auxiliary_loss(x, (rows @ best)[:, None], teacher, torch.ones(n).double()).mean().backward()
    assert best.grad.abs().max() < 1e-12
    off = (best.detach() + 0.1).requires_grad_()
    auxiliary_loss(x, (rows @ off)[:, None], teacher, torch.ones(n).double()).mean().backward()
    assert best.grad.abs().max() < 1e-12 < 0.1 < off.grad.abs().max()


@pytest.mark.parametrize("time", [0.2, 0.5, 0.8])
def test_fixed_point_on_gaussian_data(time):
    """From pure noise x~ = m + sqrt(v) z_1 has the teacher's mean for every z_s; the posterior mean x~ = m has not."""
    n = 40_000
    z, noise = torch.randn(2, n, 1, generator=rng(1), dtype=torch.float64)
    one, s = torch.ones(n).double(), torch.full((n,), time).double()
    a = IDEAL.alpha_sigma(s[0])[0]
    slope = (TEACHER(torch.ones(1, 1).double(), time) - TEACHER(torch.zeros(1, 1).double(), time)).squeeze()
    for x, gap in ((MEAN + STD * z, 0.0), (torch.full_like(z, MEAN), -slope)):
        z_s = next_state(IDEAL, z, x, one, s, noise)
        rows = torch.cat([torch.ones_like(z_s), z_s - a * MEAN], 1)
        mean = torch.linalg.lstsq(rows, x - TEACHER(z_s, s)).solution[:, 0]
        assert_close(mean, torch.tensor([0.0, float(gap)]).double(), rtol=0, atol=0.015)


def test_weights():
    s = torch.tensor([0.1, 0.5, 0.9]).double()
    sigma = (-IDEAL.logsnr(s) / 2).exp()
    expected = {"v": 1 + sigma**-2, "snr": sigma**-2, "edm": (sigma**2 + 0.25) / (0.5 * sigma) ** 2,
                "flat": torch.ones(3).double()}  # fmt: skip
    for kind in WEIGHTS:
        assert_close(loss_weight(IDEAL, s, kind), expected[kind])


# The instant variant


def test_change_along_is_the_finite_difference():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 2)).double()
    weights, x = dict(network.named_parameters()), normal(5, 3)
    nu = {name: torch.randn_like(w) for name, w in weights.items()}
    call = lambda given: torch.func.functional_call(network, given, (x,))
    got, h = change_along(call, weights, nu), 1e-6
    moved = call({name: w + h * nu[name] for name, w in weights.items()})
    back = call({name: w - h * nu[name] for name, w in weights.items()})
    assert_close(got, ((moved - back) / (2 * h)).detach(), rtol=1e-7, atol=1e-8)
    assert not got.requires_grad


def test_scaling_is_adams():
    """With Adam's own first moment switched off, one step of rate 1 is the scaled gradient."""
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    adam, square = torch.optim.Adam([p], lr=1.0, betas=(0.0, 0.9), eps=1e-8), torch.zeros(4, dtype=torch.float64)
    for i in range(3):
        p.grad = normal(4) * (i + 1)
        before = p.detach().clone()
        adam.step()
        square.lerp_(p.grad.square(), 0.1)
        assert_close(before - p.detach(), preconditioned(p.grad, square, i + 1, 0.9, 1e-8))


# The training


class Learned(nn.Module):
    """The exact denoiser of the data with a slope and a drift that can be learned."""

    process, prediction = IDEAL, "x0"

    def __init__(self, slope=1.0, drift=0.0):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope, dtype=torch.float64))
        self.drift = nn.Parameter(torch.tensor(drift, dtype=torch.float64))

    def forward(self, z, t, cond=None):
        return self.slope * TEACHER(z, t) + self.drift


class Points:
    """Draws of the data as `CleanData`."""

    def batch(self, rng, size):
        return {"x": DATA.sample(size, rng), "rows": torch.arange(size), "bare": torch.zeros(size, dtype=torch.bool)}

    def conditioning(self, rows, bare):
        return None


def side(network):
    return SimpleNamespace(
        denoiser=network, network=network, defaults={"cfg_scale": 1.0}, unconditional=lambda n: None
    )


def training(student=None, auxiliary=None, **settings):
    method = MomentMatching(**{"sampling_steps": 2, **settings})
    teacher = Learned().requires_grad_(False)
    shared = auxiliary or Learned()
    return MomentTraining(method, side(teacher), side(student or Learned()), side(shared), Points())


def test_an_untouched_auxiliary_gives_the_student_no_gradient():
    run = training(student=Learned(1.0, 0.3))
    value, logs = run.loss(run.batch(0, rng(), 32), rng(1))
    value.backward()
    assert logs["gap"] == 0 and run.student.network.drift.grad == 0
    assert run.auxiliary.network.drift.grad is None and run.teacher.network.drift.grad is None


def test_the_auxiliary_comes_first_and_each_turn_trains_its_own():
    run = training(student=Learned(1.0, 0.3))
    first, second = run.turns()
    assert (first.name, second.name) == ("auxiliary", "student") and first.fresh and second.fresh
    value, _ = run.first_loss(run.batch(0, rng(), 32), rng(1))
    value.backward()
    assert run.student.network.drift.grad is None and run.auxiliary.network.drift.grad < 0


def quick(updates):
    return Schedule(
        updates=updates, batch=64, lr=0.04, warmup=0, betas=(0.0, 0.99), eps=1e-12, weight_decay=0.0, ema=0.0,
        decay="linear", final_lr=0.0, track="none",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "rollout"), [("alternating", False), ("alternating", True), ("instant", False)]
)
def test_the_gap_closes(variant, rollout):
    """A student that draws 0.5 too much comes back to the teacher's moments; the teacher stays as it was."""
    run = training(student=Learned(1.0, 0.5), variant=variant, weight="flat", rollout=rollout)
    Run(run, quick(updates=40)).fit(progress=False)
    left = (run.student.network(normal(64, 1), 0.5) - TEACHER(normal(64, 1), 0.5)).mean()
    assert abs(left) < 0.15
    if variant == "instant":
        assert run.auxiliary.network.drift == 0 and run.auxiliary.network.slope == 1
        assert int(run.gradient.squares.state_dict()["count"]) == 40
    else:
        assert run.auxiliary.network.drift != 0


def test_instant_direction_is_that_of_half_a_squared_gradient():
    """The gradient of -w <x~, J nu> is that of N Lam N / 2 up to a factor: it takes the student's drift away."""
    run = training(student=Learned(1.0, 0.5), variant="instant", weight="flat")
    value, _ = run.first_loss(run.batch(0, rng(), 4000), rng(1))
    value.backward()
    gradients = {f"auxiliary.{n}": p.grad for n, p in run.auxiliary.network.named_parameters()}
    x, z, s, _ = run.joint(run.batch(0, rng(), 4000), rng(1))
    assert_close(gradients["auxiliary.drift"], -2 * (x - TEACHER(z, s)).mean().detach())
    run.gradients(run.turns()[0], gradients)
    nu = run.gradient.direction  # after one batch the scaled gradient is its sign
    assert_close(nu["drift"], torch.tensor(-1.0).double())
    value, _ = run.loss(run.batch(0, rng(7), 4000), rng(8))
    value.backward()
    x, z, s, _ = run.joint(run.batch(0, rng(7), 4000), rng(8))
    change = nu["drift"] + nu["slope"] * TEACHER(z, s)
    assert_close(run.student.network.drift.grad, -change.mean())
    assert run.student.network.drift.grad > 0
    assert run.auxiliary.network.drift.grad == gradients["auxiliary.drift"], "nothing flows into the teacher"


def test_overflowing_gradients_say_nothing():
    gradient = Gradient(side(Learned()))
    gradient.take({"auxiliary.slope": torch.tensor(math.inf), "auxiliary.drift": torch.tensor(2.0)}, 0.9, 1e-8)
    assert gradient.direction["slope"] == 0 and gradient.direction["drift"] == pytest.approx(1)


def test_rollout_starts_where_the_sampler_comes_by():
    """With the exact denoiser of the data its states at t have nearly the law of z_t, at the sampler's times only."""
    run = training(sampling_steps=4, rollout=True)
    z, t = run.rolled(torch.randn(4000, 1, generator=rng(), dtype=torch.float64), None, rng(1))
    assert set(t.tolist()) == {0.25, 0.5, 0.75, 1.0}
    for time in (0.25, 1.0):
        a, _ = IDEAL.alpha_sigma(time)
        assert abs(z[t == time].mean() - a * MEAN) < 0.12
    assert_close(z[t == 1.0].std(), torch.tensor(1.0).double(), rtol=0.1, atol=0)


def test_the_teachers_guidance_goes_into_the_target_and_not_into_the_auxiliary():
    class Told(Points):
        def conditioning(self, rows, bare):
            return torch.full((len(rows),), 0.7, dtype=torch.float64)

    class Guidable:
        process, prediction = IDEAL, "x0"

        def __init__(self):
            self.network = nn.Linear(1, 1)

        def __call__(self, z, t, cond=None):
            return TEACHER(z, t) + cond[:, None]

    empty = lambda n: torch.full((n,), 0.6, dtype=torch.float64)
    model = lambda d: SimpleNamespace(
        denoiser=d, network=d.network, defaults={"cfg_scale": 3.0}, unconditional=empty
    )
    models = [model(Guidable()) for _ in range(3)]
    run = MomentTraining(MomentMatching(), *models, Told())
    _, logs = run.loss(run.batch(0, rng(), 8), rng(1))
    assert_close(logs["gap"], torch.tensor(0.2).double())  # 0.7 against 0.6 + 3 (0.7 - 0.6)
    assert MomentTraining(MomentMatching(cfg_scale=1.0), *models, Told()).scale == 1


@pytest.mark.parametrize(
    ("wrong", "told"),
    [({"variant": "both"}, "variant"), ({"smallest_time": -0.1}, "smallest_time"), ({"weight": "snr+1"}, "weight")],
)
def test_bad_settings(wrong, told):
    with pytest.raises(BadInput, match=told):
        MomentMatching(**wrong)


# The student as others see it


def test_the_scheduler_takes_ancestral_steps():
    scheduler = FewStepScheduler(distilled_steps=3, ancestral=True, clip_sample=False)
    scheduler.set_timesteps()
    denoiser = MixtureDenoiser(scheduler.process, DATA, "eps")
    end = z = normal(4, 1)
    generators = [rng(i) for i in range(4)]
    for i, timestep in enumerate(scheduler.timesteps):
        end = scheduler.step(denoiser(end, (3 - i) / 3), timestep, end, generator=generators, return_dict=False)[0]
    same = ddpm(denoiser, z, uniform(3), generator=[rng(i) for i in range(4)], final_noise=False)
    assert_close(end, same, rtol=1e-9, atol=1e-9)


def test_diffusers_own_pipeline_needs_no_flags(tiny_sd, tmp_path):
    student = tiny_sd.copy(own="full")
    few_steps(student, 2, ancestral=True)
    ours = student.draw("a red star", 5)
    assert not torch.equal(ours, _deterministic(tiny_sd))
    student.save(tmp_path / "student")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "student")
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe("a red star", generator=torch.Generator().manual_seed(5), output_type="pt").images
    assert_close(theirs.float(), ours, rtol=1e-3, atol=1e-3)
    assert json.loads((tmp_path / "student" / "sfumato.json").read_text())["defaults"]["sampling_steps"] == 2


def _deterministic(teacher):
    student = teacher.copy(own="full")
    few_steps(student, 2)
    return student.draw("a red star", 5)


def test_an_image_model_forgets_its_old_samplers_options():
    model = ImageModel(nn.Linear(1, 1), PROCESS, "v", (1, 2, 2), (), {"scheduler": "s2n", "options": {"rho": 0.3}})
    few_steps(model, 2, ancestral=True)
    assert model.defaults["scheduler"] == "ddpm" and model.defaults["options"] == {}


@pytest.mark.parametrize("kind", ["text", "pixels"])
def test_forward_mode_runs_through_real_networks(kind, tiny_sd):
    """A U-Net with attention, guided: the change along a direction is the finite difference; all weights stay."""
    torch.manual_seed(0)
    if kind == "pixels":
        unet = UNet(8, 3, classes=2, channels=(8, 8), layers=1, attention=(4,))
        nn.init.normal_(unet.unet.conv_out.weight, std=0.1)
        teacher = ImageModel(unet.eval().double(), PROCESS, "v", (3, 8, 8), ("cat", "dog"))
        told, rtol = teacher.told(["cat", "dog"]), 1e-5
    else:
        teacher, rtol = tiny_sd.copy(), 0.05
        told = teacher.told(["a red star", "a blue square"])
    denoiser = Guided(teacher.denoiser, told, teacher.unconditional(2), 3.0)
    z = normal(2, *teacher.latent_shape())
    ask = lambda: predict(denoiser, z, 0.5, told)
    gradient, before = Gradient(teacher), ask().detach()
    weights = dict(teacher.network.named_parameters())
    gradient.direction = {name: torch.randn_like(p) * p.detach().abs().mean() for name, p in weights.items()}
    got = gradient.change(ask)
    assert torch.equal(ask(), before)
    h = 1e-3 if kind == "text" else 1e-6
    own = teacher.copy(own="full")
    denoiser = Guided(own.denoiser, told, own.unconditional(2), 3.0)
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, p in own.network.named_parameters():
                p.copy_(weights[name] + sign * h * gradient.direction[name])
            ends.append(ask())
    expected = (ends[0] - ends[1]) / (2 * h)
    assert (got - expected).norm() < rtol * expected.norm() and expected.norm() > 0


def test_an_instant_run_goes_on_to_the_same_bits(tmp_path):
    """The running squares are in the checkpoint."""
    make = lambda: training(student=Learned(1.0, 0.5), variant="instant", weight="flat")
    whole, first, second = make(), make(), make()
    Run(whole, quick(updates=3)).fit(progress=False)
    half = Run(first, quick(updates=3), tmp_path)
    half.one_step()
    half.one_step()
    half.save()
    Run(second, quick(updates=3), tmp_path).fit(progress=False)
    assert torch.equal(second.student.network.drift, whole.student.network.drift)
