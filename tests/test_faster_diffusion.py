"""Faster Diffusion against a plain loop that caches by other means; counts, injection, and what it refuses."""

from __future__ import annotations

import inspect
from dataclasses import replace
from itertools import cycle

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from conftest import make_tiny_dit
from sfumato.errors import BadInput
from sfumato.pipeline import wrap
from sfumato.pipeline.anatomy import Call
from sfumato.pipeline.runs import Run
from sfumato.pipeline.split import decode, encode, operations
from sfumato.steer.faster_diffusion import FasterDiffusion, key_steps
from sfumato.steer.parts.propagation import Propagation, _decode_ahead, same, tile, tile_inputs, untile

PROMPTS, SEEDS = ["a red star", "a blue circle", "art"], [3, 11, 5]
KINDS = [
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
]


def double(pipe):
    """The pipeline with a network in float64."""
    made = pipe.copy("all")
    made.network.double()
    made.pipe.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def sd(tiny_sd):
    return double(tiny_sd)


@pytest.fixture(scope="module", params=["tiny_sd", "tiny_sdxl"])
def p(request):
    return double(request.getfixturevalue(request.param))


def latent(p, seeds=SEEDS[:2], prompts=PROMPTS[:2], **options) -> torch.Tensor:
    """The clean latent of a run."""
    options = {"sampling_steps": 8, "cfg_scale": 3.0, "scheduler": "ddim", **options}
    return p.trajectory(prompts, seeds, stop_after=options["sampling_steps"], **options)[0]


class Cache:
    """Encoder propagation by hooks on the whole network: at other steps than key steps, the recorded outputs of the
    first convolution, the down blocks and the middle block take the place of what was just computed."""

    def __init__(self, network):
        self.network, self.stored, self.reuse = network, {}, False
        self.blocks = {"in": network.conv_in, "mid": network.mid_block}
        self.blocks |= {f"down{i}": block for i, block in enumerate(network.down_blocks)}

    def __enter__(self):
        self.handles = [m.register_forward_hook(self._hook(name)) for name, m in self.blocks.items()]
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def _hook(self, name):
        def hook(module, args, output):
            if not self.reuse:
                self.stored[name] = output
            return self.stored[name]

        return hook


@torch.no_grad()
def reference(p, keys, steps=8, cfg_scale=3.0, alpha=0.0, threshold=500, early=False, control=None) -> torch.Tensor:
    """Algorithm of the paper written down step by step, with DDIM."""
    cond, neg = p.encode(PROMPTS[:2]), p.unconditional(2)
    both = type(cond).cat([cond, neg]) if cfg_scale != 1 else cond
    solver = DDIMScheduler.from_config(p.pipe.scheduler.config)
    solver.set_timesteps(steps)
    noise = [torch.randn(p.latent_shape(), generator=torch.Generator().manual_seed(s)) for s in SEEDS[:2]]
    z = start = torch.stack(noise)
    controls = {k: control(k) if control else {} for k in keys}
    given = p.anatomy.inputs(z, both)
    with Cache(p.network) as cache:
        for i, tau in enumerate(solver.timesteps):
            inject = alpha * start if tau < threshold else 0.0
            if early:
                z = z + inject
            cache.reuse = i not in keys
            x = torch.cat([z, z]) if cfg_scale != 1 else z
            extra = {**given, **controls[max(k for k in keys if k <= i)]}
            eps = p.network(x.double(), tau, **extra).sample
            if cfg_scale != 1:
                eps, without = eps.chunk(2)
                eps = without + cfg_scale * (eps - without)
            z = solver.step(eps.float(), tau, z if early else z + inject).prev_sample
    return z


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
@pytest.mark.parametrize(
    "given",
    [{"keys": (0, 1, 3)}, {"every": 3}, {"every": 8}, {"keys": (0, 2), "mode": "serial"}, {"keys": (0,), "chunk": 3}],
)
def test_it_is_the_papers_algorithm(p, given, cfg_scale):
    patch = FasterDiffusion(**given, alpha=0.1)
    expected = reference(p, key_steps(8, patch.keys, patch.every), cfg_scale=cfg_scale, alpha=0.1)
    with patch.patch(p):
        torch.testing.assert_close(latent(p, cfg_scale=cfg_scale), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["serial", "parallel"])
def test_noise_may_be_injected_before_the_network(p, mode):
    expected = reference(p, [0, 5], alpha=0.2, early=True)
    with FasterDiffusion(keys=(0, 5), alpha=0.2, inject="network", mode=mode).patch(p):
        torch.testing.assert_close(latent(p), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, reference(p, [0, 5], alpha=0.2), atol=1e-3)


@pytest.mark.parametrize("mode", ["serial", "parallel"])
@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_with_every_step_a_key_step_it_is_the_plain_pipeline_bit_for_bit(p, mode, cfg_scale):
    plain = latent(p, cfg_scale=cfg_scale)
    with FasterDiffusion(keys=tuple(range(8)), alpha=0.0, mode=mode).patch(p):
        assert torch.equal(latent(p, cfg_scale=cfg_scale), plain)
    with FasterDiffusion(**FasterDiffusion.NEUTRAL, mode=mode).patch(p):
        assert torch.equal(latent(p, cfg_scale=cfg_scale), plain)


@pytest.mark.parametrize(("kind", "pictures"), zip(KINDS, cycle((1, 2, 3)), strict=False))
def test_serial_and_parallel_agree_for_every_scheduler_and_batch(sd, kind, pictures):
    scheduler = kind.from_config(sd.pipe.scheduler.config)
    for cfg_scale in (1.0, 3.0):
        options = {"scheduler": scheduler, "cfg_scale": cfg_scale, "sampling_steps": 6}
        drawn = []
        for how in ({"mode": "serial"}, {"mode": "parallel"}, {"chunk": 2}):
            with FasterDiffusion(keys=(0, 1, 3), alpha=0.05, **how).patch(sd):
                drawn.append(latent(sd, SEEDS[:pictures], PROMPTS[:pictures], **options))
        for other in drawn[1:]:
            torch.testing.assert_close(other, drawn[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_encoders_run_at_key_steps_only_and_decoders_once_for_each(p, cfg_scale):
    rows = {"mid": [], "up": []}
    handles = [
        p.network.mid_block.register_forward_hook(lambda m, a, out: rows["mid"].append(len(out))),
        p.network.up_blocks[0].register_forward_hook(lambda m, a, out: rows["up"].append(len(out))),
    ]
    factor = 2 if cfg_scale != 1 else 1
    with FasterDiffusion().patch(p) as told:
        latent(p, sampling_steps=20, cfg_scale=cfg_scale)
    for handle in handles:
        handle.remove()
    keys = [0, 1, 2, 3, 5, 10, 15]
    assert rows["mid"] == [2 * factor] * len(keys)
    gaps = [b - a for a, b in zip(keys, [*keys[1:], 20], strict=True)]
    assert rows["up"] == [2 * factor * n for n in gaps]
    assert told == {
        "calls": 20,
        "encoder_runs": 7,
        "encoder_rows": 7 * 2 * factor,
        "decoder_runs": 7,
        "decoder_rows": 20 * 2 * factor,
    }


@pytest.mark.parametrize("given", [{"mode": "serial", "every": 4}, {"chunk": 3, "every": 4}])
def test_chunks_bound_the_batch(sd, given):
    with FasterDiffusion(**given).patch(sd) as told:
        latent(sd, cfg_scale=1.0)
    assert told["encoder_runs"] == 2 and told["decoder_rows"] == 16
    assert told["decoder_runs"] == (8 if "mode" in given else 4)


@pytest.mark.parametrize("keys", [(0,), (0, 3), (0, 1, 6)])
def test_an_encoder_that_ignores_latent_and_time_loses_nothing(sd, keys):
    """Its outputs are made constant (different in every row of a picture's batch); then caching is lossless."""
    cache = Cache(sd.network)
    with cache:
        latent(sd, sampling_steps=1)
        cache.reuse = True
        plain = latent(sd)
        with FasterDiffusion(keys=keys, alpha=0.0).patch(sd):
            torch.testing.assert_close(latent(sd), plain, rtol=1e-6, atol=1e-6)


# Injection


def test_a_step_starts_from_the_latent_with_the_noise_added(sd):
    """step(z + alpha z_0) at every step below the threshold, which itself is not below it."""
    with FasterDiffusion(every=1, alpha=0.3, threshold=0.626).patch(sd):
        states = [z for z, _ in sd.states("star", 0, sampling_steps=8, cfg_scale=1.0)]
    solver = DDIMScheduler.from_config(sd.pipe.scheduler.config)
    solver.set_timesteps(8)
    assert solver.timesteps.tolist() == [876, 751, 626, 501, 376, 251, 126, 1]
    for i, tau in enumerate(solver.timesteps):
        with torch.no_grad():
            eps = sd.denoiser(states[i], (float(tau) + 1) / 1000, sd.encode("star"))
        z = states[i] + (0.3 * states[0] if i > 2 else 0.0)
        torch.testing.assert_close(states[i + 1], solver.step(eps, tau, z).prev_sample)


def test_without_strength_nothing_is_injected(sd):
    with FasterDiffusion(every=1, alpha=0.0, threshold=1.0).patch(sd):
        states = [z for z, _ in sd.states("star", 0, sampling_steps=4)]
    assert all(map(torch.equal, states, [z for z, _ in sd.states("star", 0, sampling_steps=4)]))


def test_the_noise_has_the_same_weight_for_schedulers_that_keep_another_scale(sd):
    """In the scale that the network sees, Euler's step with injection starts where DDIM's (the same step) does."""
    options = {"sampling_steps": 4, "cfg_scale": 1.0}
    euler = EulerDiscreteScheduler.from_config(sd.pipe.scheduler.config, timestep_spacing="leading", steps_offset=1)
    with FasterDiffusion(every=2, alpha=0.3, threshold=1.0).patch(sd):
        ours = [z for z, _ in sd.states("star", 0, scheduler="ddim", **options)][:4]
        theirs = [z for z, _ in sd.states("star", 0, scheduler=euler, **options)][:4]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


# Decoding ahead

shapes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))


@settings(max_examples=40, deadline=None)
@given(shapes)
def test_tiling_is_step_major_inside_each_guidance_half(shape):
    halves, n, pictures = shape
    x = torch.arange(halves * pictures).double()[:, None].expand(-1, 2)
    tiled = tile(x, n, halves)
    for half, part in zip(x.chunk(halves), tiled.chunk(halves), strict=True):
        assert torch.equal(part, half.repeat(n, 1))
    assert torch.equal(tiled[:, 0] % pictures, torch.arange(len(tiled)) % pictures)
    assert torch.equal(untile(tiled, n, halves), x.expand(n, *x.shape))
    assert torch.equal(untile(tile(x, n, halves), n, halves)[n - 1], x)


def test_inputs_with_other_lengths_are_not_tiled():
    given = {"a": torch.ones(4, 2), "b": [torch.ones(4), torch.ones(3)], "c": (0.5, None), "d": torch.tensor(1.0)}
    made = tile_inputs(given, 4, 3, 2)
    assert made["a"].shape == (12, 2) and made["b"][0].shape == (12,)
    assert made["b"][1].shape == (3,) and made["c"] == (0.5, None) and made["d"].ndim == 0


def test_sameness_of_inputs():
    x = torch.arange(3.0)
    assert same({"a": [x, None, 1]}, {"a": [x.clone(), None, 1]})
    for other in ({"a": [x + 1, None, 1]}, {"a": [x, None]}, {"b": [x, None, 1]}, {"a": [x, None, x]}, x, None):
        assert not same({"a": [x, None, 1]}, other)


@torch.no_grad()
def test_each_prediction_uses_its_own_time(p):
    cond = p.encode(PROMPTS[:2])
    z = torch.randn(2, *p.latent_shape(), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = p.anatomy.inputs(z, cond)
    call = Call(p.anatomy, z, 901.0, inputs)
    features = encode(p.network, z, 901.0, **inputs)

    def ahead(timesteps, pictures):
        scheduler = type("S", (), {"timesteps": torch.tensor(timesteps), "config": p.pipe.scheduler.config})
        run = Run(scheduler)
        run.pictures = pictures
        return _decode_ahead(call, features, run, inputs, len(timesteps))

    before, after = ahead([901.0, 801.0, 701.0], 1), ahead([901.0, 777.0, 701.0], 1)
    assert (before - after).flatten(1).abs().amax(1).gt(1e-6).tolist() == [False, True, False]
    for i, tau in enumerate([901.0, 801.0, 701.0]):
        torch.testing.assert_close(before[i], decode(p.network, features, tau, **inputs), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ahead([901.0, 801.0, 701.0], 2), before, rtol=1e-9, atol=1e-9)


# In company


@torch.no_grad()
def control_of(p, step: int) -> dict:
    """What a ControlNet would add at a step, for four rows."""
    cond = p.encode([*PROMPTS, ""])
    zeros = torch.zeros(4, *p.latent_shape(), dtype=torch.float64)
    features = encode(p.network, zeros, 1, encoder_hidden_states=cond.tokens.double())
    noise = lambda x: torch.randn(x.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return {
        "down_block_additional_residuals": tuple(map(noise, features.skips)),
        "mid_block_additional_residual": noise(features.bottleneck),
    }


@pytest.mark.parametrize("mode", ["serial", "parallel"])
def test_control_residuals_count_at_key_steps(sd, mode):
    """As in ControlNet pipelines, which add new residuals at every step; those of other steps are not used."""
    expected = reference(sd, [0, 3], control=lambda i: control_of(sd, i))
    tokens = torch.cat([sd.encode(PROMPTS[:2]).tokens, sd.unconditional(2).tokens]).double()
    solver = sd.pipe.scheduler
    with FasterDiffusion(keys=(0, 3), alpha=0.0, mode=mode).patch(sd), torch.no_grad():
        solver.set_timesteps(8)
        noise = [torch.randn(sd.latent_shape(), generator=torch.Generator().manual_seed(s)) for s in SEEDS[:2]]
        z = torch.stack(noise)
        for i, tau in enumerate(solver.timesteps):
            x = solver.scale_model_input(torch.cat([z, z]), tau)
            control = control_of(sd.copy(), i)
            eps = sd.network(x.double(), tau, encoder_hidden_states=tokens, **control, return_dict=False)[0]
            eps, without = eps.float().chunk(2)
            z = solver.step(without + 3.0 * (eps - without), tau, z, return_dict=False)[0]
    torch.testing.assert_close(z, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module", params=["tiny_sd", "tiny_sdxl"])
def controlled(request):
    """A diffusers pipeline with a ControlNet whose residuals are not zero, in float64; every test leaves it as it
    was."""
    p = double(request.getfixturevalue(request.param))
    for part in p.parts().values():
        part.double()
    torch.manual_seed(0)
    widths = (8,) * p.pipe.vae_scale_factor.bit_length()  # each after the first halves the side
    control = ControlNetModel.from_unet(p.network, conditioning_embedding_out_channels=widths).double().eval()
    for name, weight in control.named_parameters():
        if weight.abs().max() == 0 and name.endswith("weight"):
            nn.init.normal_(weight, std=0.3)
    kind = StableDiffusionXLControlNetPipeline if "xl" in request.param else StableDiffusionControlNetPipeline
    parts = {k: v for k, v in p.pipe.components.items() if k in inspect.signature(kind).parameters}
    pipe = kind(**parts, **({} if "xl" in request.param else {"requires_safety_checker": False}), controlnet=control)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def controlled_latent(pipe, steps=6, **options) -> torch.Tensor:
    """The clean latent of a controlled run of two prompts."""
    shape, side = (2, pipe.unet.config.in_channels, 8, 8), 8 * pipe.vae_scale_factor
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    edges = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)).double()
    options = {"guidance_scale": 3.0, "num_inference_steps": steps, "height": side, "width": side, **options}
    return pipe(PROMPTS[:2], image=edges, latents=noise, output_type="latent", **options).images


@pytest.mark.parametrize("mode", ["serial", "parallel"])
@pytest.mark.parametrize("options", [{}, {"guidance_scale": 1.0}, {"guess_mode": True}])
def test_a_controlnet_runs_at_key_steps_only(controlled, mode, options, monkeypatch):
    """And that changes no picture: the residuals of other steps would not be read."""
    pipe, control = controlled, controlled.controlnet
    plain, forward = controlled_latent(pipe, **options), control.forward
    with FasterDiffusion(keys=(0, 1, 4), alpha=0.0, mode=mode).patch(pipe) as told:
        drawn = controlled_latent(pipe, **options)
        assert told["control_runs"] == told["encoder_runs"] == 3
        again = controlled_latent(pipe, **options)
        assert told["control_runs"] == 6 and torch.equal(drawn, again), "another run starts anew"
    assert control.forward == forward and "forward" not in vars(control)
    assert torch.equal(controlled_latent(pipe, **options), plain) and not torch.allclose(drawn, plain)
    monkeypatch.setattr(Propagation, "spares", lambda self, run: False)
    with FasterDiffusion(keys=(0, 1, 4), alpha=0.0, mode=mode).patch(pipe) as told:
        assert torch.equal(controlled_latent(pipe, **options), drawn) and told["control_runs"] == 6


def test_neutral_settings_leave_a_controlled_pipeline_as_it_is(controlled):
    plain = controlled_latent(controlled)
    with FasterDiffusion(**FasterDiffusion.NEUTRAL).patch(controlled) as told:
        assert torch.equal(controlled_latent(controlled), plain) and told["control_runs"] == 6
    assert not torch.allclose(controlled_latent(controlled, controlnet_conditioning_scale=0.0), plain)
    with pytest.raises(BadInput, match="not supported"):
        wrap(controlled)


@pytest.mark.parametrize("given", [{"keys": (0, 2)}, {"keys": (0, 2), "mode": "serial"}])
def test_where_guidance_ends_the_step_is_computed_in_full(sd, given):
    """Guidance for times of at least 0.5: 4 of 8 steps have 4 rows, the others 2."""
    with FasterDiffusion(**given, alpha=0.0).patch(sd) as told:
        z = latent(sd, cfg_interval=(0.5, 1.0))
    assert told["encoder_runs"] == 3 and told["encoder_rows"] == 4 + 4 + 2
    assert told["decoder_rows"] == (4 * 4 + 4 * 2 if "mode" in given else 4 * 2 + 4 * 6 + 2 * 4)
    with FasterDiffusion(keys=(0, 2, 4), alpha=0.0).patch(sd):
        torch.testing.assert_close(latent(sd, cfg_interval=(0.5, 1.0)), z, rtol=1e-5, atol=1e-5)


def test_a_prompt_that_changes_during_the_run_counts_at_once(tiny_sd):
    """Its decoder's part, as in serial mode; what was decoded ahead for the old prompt is not used."""
    pipe = tiny_sd.copy()
    pipe.pipe.set_progress_bar_config(disable=True)
    other = pipe.encode("a blue circle").tokens

    def change(pipeline, i, t, kwargs):
        return {"prompt_embeds": torch.cat([kwargs["prompt_embeds"][:1], other])} if i == 3 else {}

    drawn = {}
    for mode, callback in (("serial", change), ("parallel", change), ("parallel", None)):
        with FasterDiffusion(keys=(0, 2), mode=mode).patch(pipe) as told:
            generator = torch.Generator().manual_seed(0)
            options = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
            drawn[mode, bool(callback)] = pipe(
                "a red star", num_inference_steps=8, generator=generator, output_type="pt", guidance_scale=3.0,
                **(options if callback else {}),
            ).images  # fmt: skip
        assert told["encoder_runs"] == 2
    torch.testing.assert_close(drawn["parallel", True], drawn["serial", True], rtol=0, atol=1e-5)
    assert not torch.allclose(drawn["parallel", True], drawn["parallel", False], atol=1e-4)


def test_adapters_with_a_strength_for_each_picture_keep_it(tiny_sd):
    pipe = double(tiny_sd)
    adapter = pipe.add_adapter("a", rank=2, generator=torch.Generator().manual_seed(0))
    for x in adapter.parameters():
        x.data.normal_(generator=torch.Generator().manual_seed(1))
    strengths = {"a red star": 0.0, "a blue circle": 0.7, "art": -0.4}
    adapter.gate = lambda cond: torch.tensor([strengths[prompt] for prompt in cond.prompts])
    for cfg_scale in (1.0, 3.0):
        with FasterDiffusion(keys=(0, 1)).patch(pipe):
            options = {"sampling_steps": 6, "cfg_scale": cfg_scale}
            together = pipe.draw(PROMPTS, SEEDS, **options)
            for i in range(3):
                alone = pipe.draw(PROMPTS[i], SEEDS[i], **options)
                torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)


def test_attention_edits_find_the_two_halves_of_guidance(sd):
    """An edit of the conditional half alone, the first one, is the same in serial and in parallel mode."""

    def edit(layer, probs):
        first, second = probs.chunk(2)
        return torch.cat([first.flip(-1), second])

    drawn = []
    for mode in ("serial", "parallel"):
        with FasterDiffusion(keys=(0, 1), mode=mode).patch(sd), sd.edit_attention(edit):
            drawn.append(latent(sd))
    torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_calls_at_another_time_than_the_steps_are_plain(sd):
    """A patch of the prediction may ask the network for other sizes and times as well (upsample guidance does)."""
    from sfumato.pipeline.steering import Interceptor

    seen = []

    class Extra(Interceptor):
        def predict(self, forward, call, run):
            if run is not None:
                small = replace(call, z=call.z[..., ::2, ::2], timestep=float(call.timestep.flatten()[0]) / 2)
                seen.append((small, forward(small)))
            return forward(call)

    with FasterDiffusion(keys=(0,), alpha=0.0).patch(sd) as told:
        alone = latent(sd)
    with sd.intercept(Extra()), FasterDiffusion(keys=(0,), alpha=0.0).patch(sd) as again:
        torch.testing.assert_close(latent(sd), alone, rtol=0, atol=0)
    assert told == again and len(seen) == 8
    for call, out in seen:
        assert torch.equal(sd.network(call.z, call.timestep, **call.inputs).sample, out)


@torch.no_grad()
def test_several_calls_a_step_are_told_apart_by_their_order(sd):
    """Conditional and unconditional predictions asked for one after the other."""
    from sfumato.pipeline.steering import Interceptor

    class Apart(Interceptor):
        def predict(self, forward, call, run):
            halves = [{k: v.chunk(2)[i] for k, v in call.inputs.items()} for i in range(2)]
            zs, times = call.z.chunk(2), torch.as_tensor(call.timestep).expand(len(call.z)).chunk(2)
            apart = (replace(call, z=zs[i], timestep=times[i], inputs=halves[i], rows=None) for i in range(2))
            return torch.cat(list(map(forward, apart)))

    with FasterDiffusion(keys=(0, 3)).patch(sd):
        expected = latent(sd)
        with sd.intercept(Apart()):
            torch.testing.assert_close(latent(sd), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("way", ["draw", "call"])
def test_steps_decoded_ahead_know_which_rows_are_conditional(tiny_sd, way):
    """An edit of the conditional rows is the same in a batch of many steps, tiled half by half."""

    def first_key(site, probs):
        assert len(site.rows) == len(probs) and site.rows.sum() == len(probs) // 2
        changed = torch.zeros_like(probs)
        changed[..., 0] = 1
        return torch.where(site.rows[:, None, None, None], changed, probs)

    def draw():
        if way == "draw":
            return latent(sd)
        options = {"guidance_scale": 3.0, "num_inference_steps": 8, "output_type": "latent"}
        generators = [torch.Generator().manual_seed(s) for s in SEEDS[:2]]
        return sd(PROMPTS[:2], generator=generators, **options).images

    sd = tiny_sd.copy()
    sd.pipe.set_progress_bar_config(disable=True)
    pictures = []
    for mode in ("serial", "parallel"):
        with FasterDiffusion(keys=(0, 3), mode=mode).patch(sd), sd.edit_attention(first_key):
            pictures.append(draw())
    torch.testing.assert_close(*pictures, rtol=1e-4, atol=1e-4)


# Key steps and bad input


def test_key_steps():
    assert key_steps(50) == [0, 1, 2, 3, 5, 10, 15, 25, 35]
    assert key_steps(20) == [0, 1, 2, 3, 5, 10, 15]
    assert key_steps(50, every=4) == list(range(0, 50, 4))
    assert key_steps(5, keys=(3, 0)) == [0, 3]
    assert [len(FasterDiffusion.presets[k]["keys"]) for k in ("if-1", "if-2", "if-3", "ldm-250")] == [40, 40, 11, 19]


def test_the_operations_saved_are_the_encoders_share_of_the_steps_that_are_no_key_steps(tiny_sd):
    """(1 - |K| / T) E / (E + D), and in the paper's figures (230 and 504 GFLOPs a guided step) 27 %."""

    def count(draw) -> int:
        with FlopCounterMode(display=False) as counter:
            draw()
        return counter.get_total_flops()

    z, tokens = torch.zeros(1, *tiny_sd.latent_shape()), tiny_sd.encode("").tokens
    encoder, decoder = operations(tiny_sd.network, z, encoder_hidden_states=tokens)
    embedding = count(lambda: tiny_sd.network.time_embedding(torch.zeros(1, 16)))  # which both halves compute
    whole = count(lambda: tiny_sd.network(z, 0, encoder_hidden_states=tokens))
    assert encoder + decoder == whole + embedding
    draw = lambda: latent(tiny_sd, sampling_steps=20)
    text = count(lambda: tiny_sd.encode(PROMPTS[:2])) + count(lambda: tiny_sd.encode(""))
    plain = count(draw) - text
    with FasterDiffusion().patch(tiny_sd):
        patched = count(draw) - text
    assert 1 - patched / plain == pytest.approx((1 - 7 / 20) * encoder / (encoder + decoder), rel=0.01)
    assert 50 * 504 + len(key_steps(50)) * 230 == pytest.approx(0.73 * 37_050, rel=0.02)


def test_a_full_size_unet_is_split_where_the_paper_splits_it():
    """Encoder and middle block 230, decoder 504 of 734; our count includes the products inside attention."""
    with torch.device("meta"):
        network = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        z, tokens = torch.zeros(2, 4, 64, 64), torch.zeros(2, 77, 768)
    encoder, decoder = operations(network, z, encoder_hidden_states=tokens)
    assert encoder / (encoder + decoder) == pytest.approx(230 / 734, rel=0.05)
    keys = len(key_steps(50))
    assert 50 * (encoder + decoder) / (keys * encoder + 50 * decoder) == pytest.approx(1.35, abs=0.02)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"keys": (1, 2)}, "must include it"),
        ({"keys": (0, -1)}, "count from 0"),
        ({"keys": (0, 3, 3)}, "twice"),
        ({"keys": (0, 1.7)}, "keys must be a whole number, got 1.7"),
        ({"keys": 0.5}, "keys must be a whole number"),
        ({"keys": ("x",)}, "keys must be a whole number, got 'x'"),
        ({"keys": (0,), "every": 2}, "not both"),
        ({"every": -1}, "every must be at least 0"),
        ({"chunk": -1}, "chunk must be at least 0"),
        ({"mode": "both"}, "serial"),
        ({"inject": "never"}, "network"),
    ],
)
def test_bad_settings(given, told):
    with pytest.raises(BadInput, match=told):
        FasterDiffusion(**given)


def test_key_steps_beyond_the_run_are_refused_before_anything_is_computed(sd):
    with FasterDiffusion(keys=(0, 8)).patch(sd) as told:
        for draw in (lambda: latent(sd), lambda: sd("star", num_inference_steps=8)):
            with pytest.raises(BadInput, match="key step 8 is out of range: this run has 8 steps, 0 to 7"):
                draw()
        assert told["calls"] == 0
        latent(sd, sampling_steps=9)
        assert told["calls"] == 9


def test_a_pipeline_without_a_unet_is_refused_by_name():
    told = r"FasterDiffusion does not fit the DiTPipeline.*DiTTransformer2DModel: .*patch"
    with pytest.raises(BadInput, match=told), FasterDiffusion().patch(make_tiny_dit()):
        pass
