"""What stands between a pipeline and its network sees the same, whoever calls it: we, or diffusers' guided call."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PixArtSigmaPipeline,
    SanaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)

from anatomy_cases import latent, make, told
from conftest import tiny_scheduler, tiny_vae
from sfumato.pipeline import attention
from sfumato.pipeline.adapter import Adapter
from sfumato.pipeline.clock import FlowClock, TableClock
from sfumato.pipeline.steering import Interceptor, following, intercept, of
from sfumato.sample.guidance import Guided

NAMES = ("unet", "pixart", "sana", "sd3", "flux")
STEPS, PICTURES, SCALE = 3, 2, 2.5
every = pytest.mark.parametrize("name", NAMES)


def pipeline(name: str):
    """A genuine diffusers pipeline around a tiny network, without text encoders."""
    anatomy = make("flux" if name == "flux" else name)
    vae = tiny_vae()
    if name == "unet":
        none = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
        pipe = StableDiffusionPipeline(
            vae=vae, unet=anatomy.network, scheduler=tiny_scheduler("epsilon"), requires_safety_checker=False, **none
        )
    elif name == "pixart":
        pipe = PixArtSigmaPipeline(None, None, vae, anatomy.network, DPMSolverMultistepScheduler())
    elif name == "sana":
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        pipe = SanaPipeline(None, None, None, anatomy.network, DPMSolverMultistepScheduler(**flow))
    else:
        none = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        cls = FluxPipeline
        if name == "sd3":
            cls, none = StableDiffusion3Pipeline, {**none, "text_encoder_3": None, "tokenizer_3": None}
        pipe = cls(transformer=anatomy.network, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **none)
    pipe.set_progress_bar_config(disable=True)
    clock = TableClock.of(pipe.scheduler) if name in ("unet", "pixart") else FlowClock.of(
        pipe.scheduler, scale={"sd3": 1000.0, "flux": 1.0, "sana": 1.0}[name], even=name == "flux"
    )
    return SimpleNamespace(
        halves="together", conditional_first=False, told_by="encode_prompt", guides=None,
        pipe=pipe, anatomy=anatomy, network=anatomy.network, listeners=[], control=None, clock=clock
    )


def conditionings():
    return told(PICTURES, seed=3), told(PICTURES, seed=4)


@torch.no_grad()
def called(p, scale: float = SCALE) -> torch.Tensor:
    """The final latents of diffusers' own call."""
    (cond, negative), z = conditionings(), latent(p.anatomy, PICTURES)
    given = {"prompt_embeds": cond.tokens, "num_inference_steps": STEPS, "output_type": "latent"}
    against = {"negative_prompt_embeds": negative.tokens}
    size = {"height": 16, "width": 16}
    name = type(p.pipe).__name__
    if "PixArt" in name or "Sana" in name:
        masks = {"prompt_attention_mask": cond.mask, "negative_prompt_attention_mask": negative.mask}
        given |= {"negative_prompt": None, "use_resolution_binning": False, **masks, **against}
        if "Sana" in name:
            size = {"height": 256, "width": 256}
    elif name == "StableDiffusionPipeline":
        given |= against
    else:
        given |= {"pooled_prompt_embeds": cond.pooled}
        against |= {"negative_pooled_prompt_embeds": negative.pooled}
    if name == "FluxPipeline":
        given |= {"latents": p.anatomy.packed(z), "guidance_scale": 3.5, "height": 16, "width": 16}
        out = p.pipe(**given, **({**against, "true_cfg_scale": scale} if scale != 1 else {})).images
        return p.anatomy.unpacked(out, p.anatomy.inputs(z, cond))
    return p.pipe(**{**given, **against}, latents=z, guidance_scale=scale, **size).images


@torch.no_grad()
def drawn(p, scale: float = SCALE) -> torch.Tensor:
    """The same by our own means: a scheduler of ours, `Guided`, conditional first."""
    (cond, negative), z = conditionings(), latent(p.anatomy, PICTURES)

    def denoise(z, t, cond):
        return p.anatomy.call(z, p.clock.number(t).expand(len(z)), cond)

    guided = Guided(denoise, cond, negative, scale)
    solver = type(p.pipe.scheduler).from_config(p.pipe.scheduler.config)
    with following(p, solver) as attend:
        p.clock.begin(solver, STEPS, z.shape)
        for t in solver.timesteps:
            x = p.clock.scaled(solver, z, t)
            with attend():
                pred = guided(x, p.clock.time(t))
            z = solver.step(pred, t, z, return_dict=False)[0]
    return z


both_ways = pytest.mark.parametrize("draw", [drawn, called])


@every
@pytest.mark.parametrize("scale", [1.0, SCALE])
def test_our_own_way_is_diffusers_own(name, scale):
    p = pipeline(name)
    torch.testing.assert_close(drawn(p, scale), called(p, scale), rtol=1e-4, atol=1e-5)


@every
def test_attention_tells_the_conditional_rows_and_the_step_whoever_calls(name):
    p = pipeline(name)
    seen = {}
    for draw in (drawn, called):
        with attention.record(p, None, lambda site: True, None) as record:
            draw(p)
        assert of(p.network) is None
        conditional = []
        for maps, rows, step in zip(record.calls, record.rows, record.steps, strict=True):
            assert rows is not None and rows.sum() in (0, PICTURES)
            if rows.any():
                assert step == len(conditional)
                conditional.append({site: probs[rows] for site, probs in maps.items()})
        assert len(conditional) == STEPS
        seen[draw] = conditional
    for ours, theirs in zip(*seen.values(), strict=True):
        assert ours.keys() == theirs.keys()
        for site, probs in ours.items():
            torch.testing.assert_close(probs, theirs[site], rtol=1e-3, atol=1e-5)


@every
def test_an_edit_of_the_conditional_rows_only_acts_alike(name):
    """Here the rows matter: the same edit of all rows, or of the other half, gives other pictures."""
    p = pipeline(name)

    def first_key(which):
        def edit(site, probs):
            rows = torch.ones(len(probs), dtype=torch.bool) if which is None else site.rows == which
            changed = torch.zeros_like(probs)
            changed[..., 0] = 1
            return torch.where(rows[:, None, None, None], changed, probs)

        return edit

    pictures = []
    for which in (True, False, None):
        with attention.edit(p, first_key(which), None, lambda site: True, "probs"):
            ours, theirs = drawn(p), called(p)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        pictures.append(ours)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(pictures[i], pictures[j], atol=1e-3)


@every
@both_ways
def test_without_guidance_no_rows_are_told_apart(name, draw):
    p = pipeline(name)
    with attention.record(p, None, lambda site: True, None) as record:
        draw(p, scale=1.0)
    assert record.rows == [None] * STEPS and record.steps == list(range(STEPS))
    assert record.conditional is record.maps


class Spy(Interceptor):
    """Notes every event, and may change latents and predictions by constants."""

    def __init__(self, early=0.0, late=0.0, factor=1.0):
        self.early, self.late, self.factor = early, late, factor
        self.events, self.starts, self.conds = [], [], []

    def start(self, run):
        self.events.append(("start", len(run.timesteps)))

    def before_network(self, run, z):
        self.starts.append(run.noise(z)[:PICTURES])
        return z + self.early

    def predict(self, forward, call, run):
        assert call.z.ndim == 4 and run.at(call.timestep)
        self.events.append(("predict", call.step, run.index, run.pictures))
        self.conds.append(call.cond)
        out = forward(call)
        assert out.shape == call.z.shape
        return self.factor * out

    def before_update(self, run, z):
        assert z.ndim == 4
        self.events.append(("update", run.index))
        return z + self.late


@every
@both_ways
@pytest.mark.parametrize("scale", [1.0, SCALE])
def test_an_interceptor_sees_every_step(name, draw, scale):
    p, spy = pipeline(name), Spy()
    plain = draw(p, scale)
    with intercept(p, spy, "prediction"):
        assert torch.equal(draw(p, scale), plain)
        assert torch.equal(draw(p, scale), plain)
    times = 2 if name == "flux" and draw is called and scale != 1 else 1
    each = [[("predict", i, i, PICTURES)] * times + [("update", i)] for i in range(STEPS)]
    assert spy.events == [("start", STEPS), *(event for events in each for event in events)] * 2
    for start in spy.starts:
        torch.testing.assert_close(start, spy.starts[0])
    told = torch.cat([cond.tokens for cond in spy.conds])
    assert all(any(torch.equal(row, cond) for row in told) for cond in conditionings()[0].tokens)
    assert "forward" not in vars(p.network) and "step" not in vars(p.pipe.scheduler)
    assert "encode_prompt" not in vars(p.pipe) and torch.equal(draw(p, scale), plain)


@every
def test_latents_and_predictions_are_changed_alike(name):
    p = pipeline(name)
    plain = drawn(p)
    for change in ({"early": 0.1, "late": 0.1}, {"late": 0.1}, {"factor": 0.8}):
        with intercept(p, Spy(**change), "prediction"):
            ours, theirs = drawn(p), called(p)
        assert not torch.allclose(ours, plain, atol=1e-3)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@every
def test_adapters_scale_each_picture_alike(name):
    p = pipeline(name)
    adapter = Adapter(p.anatomy, 2, generator=torch.Generator().manual_seed(0))
    for up in adapter.up.values():
        up.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    adapter.scale = torch.tensor([1.0, 0.0])
    ours, theirs = drawn(p), called(p)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    adapter.scale = 0.0
    plain = drawn(p)
    torch.testing.assert_close(ours[1], plain[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours[0], plain[0], atol=1e-3)


@torch.no_grad()
def test_a_learned_sigma_comes_back_to_whoever_asked_for_it():
    """PixArt's network gives two halves of channels; an interceptor sees the prediction, its caller both."""
    p = pipeline("pixart")
    z, cond = latent(p.anatomy), told()
    given, named = p.anatomy.arguments(z, torch.full((2,), 500.0), p.anatomy.inputs(z, cond))
    plain = p.network(*given, **named).sample
    with intercept(p, Double(), "prediction"):
        out = p.network(*given, **named).sample
        bare = p.network(*given, **named, return_dict=False)
    assert plain.shape[1] == 2 * z.shape[1] and isinstance(bare, tuple) and torch.equal(bare[0], out)
    assert torch.equal(out, torch.cat([2 * plain[:, :4], plain[:, 4:]], dim=1))


class Double(Interceptor):
    def predict(self, forward, call, run):
        assert run is None and call.step is None
        return 2 * forward(replace(call))


# The families


@torch.no_grad()
@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sdxl", "tiny_pixart", "tiny_sd3", "tiny_flux"])
def test_draw_and_the_diffusers_pipeline_are_edited_alike(request, family):
    """What guidance steers away from keeps its attention; the prompt's half loses it, whoever draws."""
    p = request.getfixturevalue(family).copy()
    p.pipe.set_progress_bar_config(disable=True)
    prompts, seeds, against = ["a red star", "art"], [3, 11], "a blue square"
    options = {"guidance_scale": SCALE, "negative_prompt": [against] * 2}
    if p.family == "flux":
        options |= {"guidance_scale": 3.5, "true_cfg_scale": SCALE}
    if p.family == "pixart":
        options |= {"use_resolution_binning": False}

    def draw():
        return p.draw(prompts, seeds, sampling_steps=STEPS, cfg_scale=SCALE, negative=against)

    def call():
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        size = {"height": 16, "width": 16, "num_inference_steps": STEPS, "output_type": "pt"}
        return p(prompts, generator=generators, **size, **options).images

    def first_key(site, probs):
        seen.append(site.step)
        changed = torch.zeros_like(probs)
        changed[..., 0] = 1
        return torch.where(site.rows[:, None, None, None], changed, probs)

    plain, pictures = draw(), []
    for way in (draw, call):
        seen: list[int] = []
        with p.edit_attention(first_key, kind=None):
            pictures.append(way())
        assert set(seen) == set(range(STEPS))
    torch.testing.assert_close(*pictures, rtol=0, atol=1e-4)
    assert (pictures[0] - plain).abs().max() > 1e-3
    assert torch.equal(draw(), plain)
