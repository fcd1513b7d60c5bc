"""InstaFlow: flows against closed forms, pairs that outlast a kill, the schedule, the student as others see it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

import sfumato as sf
from noise_cases import normal
from sfumato.distill.instaflow import InstaFlow
from sfumato.distill.moment_matching import MomentMatching
from sfumato.distill.parts.flow import between, euler, one_step, reflow_loss, straightness, velocity
from sfumato.distill.parts.pairs import PairStore
from sfumato.distill.parts.reflow import OneStep, Reflow, distance
from sfumato.errors import BadInput
from sfumato.nets import UNet
from sfumato.noise import Cosine, GaussianProcess, RectifiedFlow
from sfumato.noise.analytic import GaussianMixture, MixtureDenoiser
from sfumato.pipeline import ImageModel, as_flow, few_steps
from sfumato.sample import Guided, ddim, ddpm
from sfumato.sample.schedulers import RectifiedFlowScheduler
from sfumato.sample.times import uniform

FLOW = GaussianProcess(RectifiedFlow())
MEAN, STD = 0.7, 0.4
DATA = GaussianMixture.isotropic(torch.full((1, 2), MEAN), STD)
FIRST = MixtureDenoiser(FLOW, DATA, "flow")
"""The 1-rectified flow of a Gaussian and independent noise."""


def affine(x, t):
    """The velocity of straight paths from x to MEAN + STD x."""
    t = t if torch.is_tensor(t) else torch.tensor(float(t), dtype=torch.float64)
    t = t.reshape(-1, *[1] * (x.ndim - 1))
    return MEAN + (STD - 1) * (x - t * MEAN) / (1 + t * (STD - 1))


# Flows


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_constant_velocity_is_exact_in_any_number_of_steps(steps):
    x, c = normal(3, 2), torch.tensor([0.3, -2.0], dtype=torch.float64)
    v = lambda z, t: c.expand(z.shape)
    assert_close(euler(v, x, steps), x + c)
    assert_close(one_step(v, x), x + c)
    assert straightness(v, x, steps).max() < 1e-24


def test_an_affine_coupling_is_straight_and_one_step_is_exact():
    x = normal(6, 2)
    for steps in (1, 3, 8):
        assert_close(euler(affine, x, steps), MEAN + STD * x)
        assert straightness(affine, x, steps).max() < 1e-24
    t = torch.rand(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    end = MEAN + STD * x
    assert reflow_loss(affine(between(x, end, t), t), x, end).max() < 1e-24, "the loss's minimum is the velocity"


def test_straightness_is_its_integral():
    """v = 2 t in each of d = 3 dimensions, at any place: d times the variance of 2 t, 1 / 3 in the limit."""
    v = lambda z, t: torch.full_like(z, 2 * t)
    found = straightness(v, normal(2, 3), 500)
    assert_close(found, torch.ones(2).double(), rtol=1e-5, atol=0)


def test_reflow_keeps_the_ends_and_straightens():
    """The 1-rectified flow of a Gaussian carries x to m + s x along bent paths; its pairs' own velocity is straight."""
    x = normal(8, 2)
    v = velocity(FIRST)
    ends = euler(v, x, 400)
    assert_close(ends, MEAN + STD * x, rtol=0, atol=5e-3)
    bent, straight = straightness(v, x, 100).mean(), straightness(affine, x, 100).mean()
    assert bent > 0.05 and straight < 1e-24
    assert (one_step(v, x) - ends).abs().max() > 0.1 > 1e-9 > (one_step(affine, x) - (MEAN + STD * x)).abs().max()


def test_independent_pairs_are_drawn_to_the_mean_in_one_step():
    """Without reflow the best velocity at the noise is E[X1] - x: one step returns the data's mean for every x."""
    x = normal(5, 2)
    assert_close(one_step(velocity(FIRST), x), torch.full_like(x, MEAN))


def test_time_runs_backwards_for_denoisers():
    """v(Z, t) is minus the flow at 1 - t, and Euler's rule is DDIM's."""
    x = normal(4, 2)
    assert_close(velocity(FIRST)(x, 0.25), -FIRST(x, 0.75))
    assert_close(euler(velocity(FIRST), x, 7), ddim(FIRST, x, uniform(7)), rtol=1e-9, atol=1e-9)
    as_x0 = MixtureDenoiser(FLOW, DATA, "x0")
    assert_close(velocity(as_x0)(x, 0.25), velocity(FIRST)(x, 0.25))


def test_guidance_is_a_velocity_field():
    """a v(T) + (1 - a) v(NULL); a = 1 is the conditional one."""
    two = MixtureDenoiser(FLOW, GaussianMixture.isotropic(torch.tensor([[1.0], [-1.0]]), 0.2), "flow")
    one, both, x = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]), normal(3, 1)
    at = lambda cond: velocity(two, cond)(x, 0.3)
    for a in (1.0, 1.5):
        assert_close(velocity(Guided(two, one, both, a), one)(x, 0.3), a * at(one) + (1 - a) * at(both))


def test_the_losses():
    x0, x1 = normal(4, 2, 3), normal(4, 2, 3) + 1
    v = (normal(4, 2, 3) * 2).requires_grad_()
    reflow_loss(v, x0, x1).mean().backward()
    assert_close(v.grad, (2 * (v - (x1 - x0)) / v.numel()).detach())
    assert_close(reflow_loss(v, x0, x1, "halfsum"), reflow_loss(v, x0, x1) * 6 / 2)
    t = torch.tensor([0.0, 1.0, 0.5, 0.25], dtype=torch.float64)
    at = between(x0, x1, t)
    assert torch.equal(at[0], x0[0]) and torch.equal(at[1], x1[1])
    assert_close(at[3], 0.25 * x1[3] + 0.75 * x0[3])


# Pairs


OF = {"teacher": "abc", "cfg_scale": 5.0, "seed": 3}


def ends(noise, rows):
    return noise * 2 + rows.reshape(-1, 1, 1, 1)


def filled(folder, count=7, of=OF, draw=ends, shard=3):
    store = PairStore(folder, count, of, shard)
    store.fill(draw, (1, 2, 2), prompts=4, batch=2)
    return store


def test_pairs_are_what_they_say(tmp_path):
    store = filled(tmp_path)
    rows = torch.tensor([6, 0, 5, 5])
    noise, clean = store.pairs(rows)
    assert_close(clean, ends(noise, rows % 4))
    assert torch.equal(noise[0], store.noise(6, (1, 2, 2))) and torch.equal(noise[2], noise[3])
    assert sorted(f.name for f in tmp_path.iterdir()) == [f"{i:08d}.safetensors" for i in (0, 3, 6)]
    every = store.pairs(torch.arange(7))[0].flatten()
    assert len(every.unique()) == every.numel()


def test_a_killed_store_goes_on_to_the_same_bits(tmp_path):
    """Killed in the middle of the second shard: the first is kept, nothing is half written."""
    filled(tmp_path / "whole")
    calls = []

    def killed(noise, rows):
        calls.append(rows.tolist())
        if len(calls) == 4:
            raise KeyboardInterrupt
        return ends(noise, rows)

    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path / "cut", draw=killed)
    assert calls == [[0, 1], [2], [3, 0], [1]]
    assert [f.name for f in (tmp_path / "cut").iterdir()] == ["00000000.safetensors"]
    calls.clear()
    filled(tmp_path / "cut", draw=lambda n, rows: calls.append(rows.tolist()) or ends(n, rows))
    assert calls == [[3, 0], [1], [2]]
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "cut" / file.name).read_bytes()


def test_a_shard_cut_short_is_drawn_anew(tmp_path):
    whole = filled(tmp_path)
    file = tmp_path / "00000003.safetensors"
    bits = file.read_bytes()
    file.write_bytes(bits[:-9])
    with pytest.raises(BadInput, match="remove it"):
        PairStore(tmp_path, 7, OF, 3).pairs(torch.tensor([4]))
    filled(tmp_path)
    assert file.read_bytes() == bits and whole.count == 7


@pytest.mark.parametrize("at", [-1, -40, -90])
def test_a_shard_of_which_a_bit_has_flipped_is_drawn_anew(tmp_path, at):
    filled(tmp_path)
    file = tmp_path / "00000003.safetensors"
    bits = file.read_bytes()
    flipped = bytearray(bits)
    flipped[at] ^= 4
    file.write_bytes(flipped)
    calls = []
    filled(tmp_path, draw=lambda n, rows: calls.append(rows.tolist()) or ends(n, rows))
    assert calls == [[3, 0], [1]] and file.read_bytes() == bits


@pytest.mark.parametrize(
    ("changed", "named"), [({"teacher": "other"}, "teacher"), ({"cfg_scale": 6.0}, "cfg_scale"), ({"seed": 4}, "seed")]
)
def test_pairs_of_another_teacher_are_refused(tmp_path, changed, named):
    filled(tmp_path)
    with pytest.raises(BadInput, match=f"pairs of another {named}"):
        PairStore(tmp_path, 7, {**OF, **changed}, 3)
    with pytest.raises(BadInput, match="another count"):
        PairStore(tmp_path, 8, OF, 3)


@pytest.mark.parametrize("header", [None, {"of": "a model"}, {"of": "[1]"}])
def test_files_of_something_else_are_not_written_over(tmp_path, header):
    save_file({"weight": torch.ones(2)}, tmp_path / "00000000.safetensors", header)
    with pytest.raises(BadInput, match="another teacher"):
        filled(tmp_path)
    assert list(load_file(tmp_path / "00000000.safetensors")) == ["weight"]


# Training


class Learned(nn.Module):
    process, prediction = FLOW, "flow"

    def __init__(self):
        super().__init__()
        self.drift = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, z, t, cond=None):
        self.t = t
        return self.drift.expand(z.shape)


def recipe(kind, network, **settings):
    method = SimpleNamespace(
        **{"first_time": 0.0, "reduction": "mean", "updates": 4, "perceptual_updates": 1, **settings}
    )
    data = SimpleNamespace(pictures=[None], unconditional=0.0, conditioning=lambda rows, bare: None)
    noise = normal(10, 3, 8, 8)
    store = SimpleNamespace(count=10, pairs=lambda rows: (noise[rows], noise[rows] + 0.5))
    student = SimpleNamespace(network=network, denoiser=network, decode_latents=lambda z: z.float())
    rest = [distance("oracle")] if kind is OneStep else []
    return kind(method, student, data, store, *rest)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_reflow_learns_the_velocity():
    network = Learned()
    run = recipe(Reflow, network, first_time=0.9)
    value, _ = run.loss(run.batch(0, rng(), 6), rng(1))
    value.backward()
    assert_close(value.item(), 0.25)
    assert_close(network.drift.grad.item(), 1.0)  # the flow is minus the velocity, which is 0.5
    assert ((network.t <= 0.1) & (network.t >= 0)).all(), "t from 0.9 on is at most 0.1 of this package's time"


def test_distillation_is_first_of_latents_then_of_pictures():
    network = Learned()
    run = recipe(OneStep, network)
    latents, _ = run.loss(run.batch(2, rng(), 6), rng(1))
    assert_close(latents.item(), 0.25)
    assert network.t == 1.0, "the noise itself"
    pictures, told = run.loss(run.batch(3, rng(), 6), rng(1))
    pictures.backward()
    assert pictures != latents and network.drift.grad != 0
    assert_close(told["error"].item(), 0.5)


# The student as others see it


def test_the_scheduler_tells_the_network_1000_at_the_noise():
    scheduler = RectifiedFlowScheduler()
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [1000.0, 750.0, 500.0, 250.0]
    z, x = normal(3, 2), normal(3, 2)
    for timestep in scheduler.timesteps:
        x = scheduler.step(FIRST(x, float(timestep) / 1000), timestep, x, return_dict=False)[0]
    start = normal(3, 2)
    assert_close(x, euler(velocity(FIRST), start, 4))
    noised = scheduler.add_noise(start, z, torch.tensor([250.0, 250.0, 1000.0]))
    assert_close(noised[0], 0.75 * start[0] + 0.25 * z[0])
    assert_close(noised[2], z[2])
    only = RectifiedFlowScheduler(distilled_steps=1)
    only.set_timesteps(50)
    assert only.timesteps.tolist() == [1000.0]
    with pytest.raises(BadInput, match="distilled for 1 steps"):
        only.set_timesteps(4)
    with pytest.raises(BadInput, match="at least one"):
        RectifiedFlowScheduler(distilled_steps=0)


@pytest.mark.parametrize("start", [1.0, 0.7])
@pytest.mark.parametrize("ancestral", [False, True])
def test_the_scheduler_takes_few_steps_as_the_samplers_do(start, ancestral):
    scheduler = RectifiedFlowScheduler(distilled_steps=3, start_time=start, ancestral=ancestral)
    scheduler.set_timesteps()
    z = normal(3, 2)
    ours, noises = z * scheduler.init_noise_sigma, [rng(i) for i in range(3)]
    for i, timestep in enumerate(scheduler.timesteps):
        flow = FIRST(ours, (3 - i) / 3 * start)
        ours = scheduler.step(flow, timestep, ours, return_dict=False, generator=noises)[0]
    times, begun = uniform(3, start), z * start
    theirs = ddim(FIRST, begun, times)
    if ancestral:
        theirs = ddpm(FIRST, begun, times, generator=[rng(i) for i in range(3)], final_noise=False)
    assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("settings", [{"start": 0.7}, {"ancestral": True}])
def test_a_flow_pipeline_takes_few_steps_of_every_kind(tiny_sd, tmp_path, settings):
    flow = tiny_sd.copy(own="full")
    as_flow(flow)
    few_steps(flow, 2, **settings)
    ours = flow.draw("a red star", 5)
    flow.save(tmp_path / "student")
    assert_close(sf.load(tmp_path / "student", "cpu").draw("a red star", 5), ours)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "student")
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe("a red star", generator=rng(5), output_type="pt").images
    assert_close(drawn.float(), ours, rtol=1e-3, atol=1e-3)
    few_steps(flow, 2)
    assert (flow.draw("a red star", 5) - ours).abs().max() > 1e-3


def published(pipe, prompt, z, steps, scale):
    """The released pipeline's loop, written out, for a network whose output has the other sign."""
    given, empty = pipe.encode_prompt(prompt, "cpu", 1, True)
    for i in range(steps):
        told = torch.full((2,), (1 - i / steps) * 1000.0)
        v = -pipe.unet(torch.cat([z] * 2), told, encoder_hidden_states=torch.cat([empty, given])).sample
        v_none, v_text = v.chunk(2)
        z = z + (v_none + scale * (v_text - v_none)) / steps
    return z


@torch.no_grad()
def test_diffusers_own_pipeline_needs_no_flags(tiny_sd, tmp_path):
    flow = tiny_sd.copy(own="full")
    as_flow(flow)
    z = torch.randn(1, *flow.latent_shape(), generator=rng(5))
    theirs = (flow.decode_latents(published(flow.pipe, "a red star", z, 3, 1.5)) + 1).clamp(0, 2) / 2
    assert_close(flow.draw("a red star", 5, sampling_steps=3, cfg_scale=1.5), theirs, rtol=1e-4, atol=1e-4)
    few_steps(flow, 1)
    ours = flow.draw("a red star", 5)
    flow.save(tmp_path / "student")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "student")
    pipe.set_progress_bar_config(disable=True)
    calls = []
    pipe.unet.register_forward_pre_hook(lambda module, args: calls.append((len(args[0]), float(args[1]))))
    drawn = pipe("a red star", generator=rng(5), output_type="pt").images
    assert calls == [(1, 1000.0)]
    assert_close(drawn.float(), ours, rtol=1e-3, atol=1e-3)
    again = sf.load(tmp_path / "student", "cpu")
    assert again.prediction == "flow" and again.distilled_steps == 1
    assert_close(again.draw("a red star", 5), ours)


@pytest.fixture(scope="module")
def untold(tmp_path_factory):
    """A model that is told nothing, and pictures for it."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(2):
        picture = np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{i}.png")
    torch.manual_seed(0)
    network = UNet(8, 3, channels=(8, 8), layers=1, attention=(4,))
    nn.init.normal_(network.unet.conv_out.weight, std=0.1)
    return ImageModel(network.eval(), GaussianProcess(Cosine()), "v", (3, 8, 8)), str(folder)


def small(untold, **settings):
    teacher, data = untold
    return InstaFlow(teacher=teacher, data=data, **{**InstaFlow.EXAMPLE, "updates": 1, **settings})


def test_two_reflows_and_none(untold, tmp_path):
    small(untold, reflows=2).run(tmp_path / "two", progress=False)
    report = json.loads((tmp_path / "two" / "straightness.json").read_text())
    assert list(report) == ["reflow-1", "reflow-2"] and report["reflow-1"]["straightness"] >= 0
    assert {"pairs-1", "pairs-2", "pairs-3", "flow-1", "flow-2"} <= {f.name for f in (tmp_path / "two").iterdir()}
    flow = sf.load(tmp_path / "two" / "flow-1", "cpu")
    assert flow.prediction == "flow" and flow.draw(None, 1, sampling_steps=3).shape == (1, 3, 8, 8)
    store = str(tmp_path / "shared")
    small(untold, reflows=0, store=store).run(tmp_path / "none", progress=False)
    assert not (tmp_path / "none" / "pairs-1").exists() and not (tmp_path / "none" / "flow-1").exists()
    other = untold[0].copy(own="full")
    with torch.no_grad():
        next(iter(other.network.parameters())).add_(1)
    with pytest.raises(BadInput, match="pairs of another teacher"):
        small((other, untold[1]), reflows=0, store=store).run(tmp_path / "other", progress=False)


def test_guidance_of_a_teacher_that_has_none(untold, tmp_path):
    with pytest.raises(BadInput, match="has no guidance"):
        small(untold, cfg_scale=5.0).run(tmp_path / "run", progress=False)
    settings = {**MomentMatching.EXAMPLE, "cfg_scale": 2.0}
    with pytest.raises(BadInput, match="has no guidance"):
        MomentMatching(teacher=untold[0], data=untold[1], **settings).run(tmp_path / "mm", progress=False)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"sampling_steps": 2}, "sampling_steps must be 1"),
        ({"updates": 3, "perceptual_updates": 4}, "perceptual_updates"),
        ({"pairs": 0}, "pairs"),
        ({"reduction": "sum"}, "reduction"),
    ],
)
def test_bad_settings(wrong, told):
    with pytest.raises(BadInput, match=told):
        InstaFlow(**wrong)


def test_lpips_is_refused_where_it_is_not_before_any_pairs(untold, tmp_path, monkeypatch):
    for module in ("distill.parts.reflow", "metrics.perceptual"):
        monkeypatch.setattr(f"sfumato.{module}.lpips_missing", lambda net="alex": "no weights")
    with pytest.raises(BadInput, match="LPIPS"):
        distance("lpips")
    with pytest.raises(BadInput, match="no weights; install it"):
        small(untold, perceptual="lpips").run(tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "pairs-1").exists()
    small(untold, perceptual="lpips", perceptual_updates=0).run(tmp_path / "run", progress=False)
