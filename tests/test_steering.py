"""The UNet's halves, and what interceptors see of sampling."""

from __future__ import annotations

import pytest
import torch
from diffusers import EulerDiscreteScheduler, PNDMScheduler

from sfumato.errors import BadInput
from sfumato.pipeline.hooks import Override
from sfumato.pipeline.runs import Run
from sfumato.pipeline.split import decode, encode
from sfumato.pipeline.steering import Interceptor


@pytest.fixture(params=["tiny_sd", "tiny_sdxl"])
def p(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def pipe(tiny_sd):
    made = tiny_sd.copy()
    made.pipe.set_progress_bar_config(disable=True)
    return made


def inputs(p, rows: int, side: int = 8) -> tuple[torch.Tensor, dict]:
    z = torch.randn(rows, 4, side, side, generator=torch.Generator().manual_seed(0))
    cond = p.encode(["a red star", "art", ""][:rows])
    return z, p.anatomy.inputs(z, cond)


def residuals(p, rows: int, seed: int = 1) -> dict:
    """What a ControlNet adds: one tensor per skip connection, and one for the bottleneck."""
    z, given = inputs(p, rows)
    features = encode(p.network, z, 500, **given)
    noise = lambda x: torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return {
        "down_block_additional_residuals": tuple(map(noise, features.skips)),
        "mid_block_additional_residual": noise(features.bottleneck),
    }


# Halves


@torch.no_grad()
@pytest.mark.parametrize(("rows", "side"), [(1, 8), (3, 8), (2, 7), (2, 5)])
def test_the_halves_make_the_whole_bit_for_bit(p, rows, side):
    z, given = inputs(p, rows, side)
    for timestep in (500, torch.tensor(37), torch.full((rows,), 981.25)):
        whole = p.network(z, timestep, **given).sample
        features = encode(p.network, z, timestep, **given)
        assert len(features) == rows
        assert torch.equal(decode(p.network, features, timestep, **given), whole)
        assert torch.equal(decode(p.network, features, timestep, **given), whole), "features are not used up"


@torch.no_grad()
def test_the_halves_with_control_residuals(p):
    z, given = inputs(p, 2)
    control = residuals(p, 2)
    whole = p.network(z, 500, **given, **control).sample
    features = encode(p.network, z, 500, **given, **control)
    assert not torch.allclose(whole, p.network(z, 500, **given).sample, atol=1e-3)
    assert torch.equal(decode(p.network, features, 500, **given), whole)
    assert torch.equal(decode(p.network, features, 500, **given, **control), whole), "residuals are not added twice"
    adapter = [torch.randn_like(features.skips[1 if p.family == "sd" else 2])]  # as T2I-Adapters add, inside blocks
    z, given = inputs(p, 2)
    whole = p.network(z, 500, **given, down_intrablock_additional_residuals=[x.clone() for x in adapter])
    features = encode(p.network, z, 500, **given, down_intrablock_additional_residuals=[x.clone() for x in adapter])
    assert torch.equal(decode(p.network, features, 500, **given), whole.sample)


@torch.no_grad()
def test_the_halves_run_only_their_own_blocks_and_leave_the_network_alone(pipe):
    ran: list[str] = []
    blocks = {"down": pipe.network.down_blocks[0], "mid": pipe.network.mid_block, "up": pipe.network.up_blocks[0]}
    handles = [m.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, m in blocks.items()]
    before = dict(vars(pipe.network))
    z, given = inputs(pipe, 2)
    features = encode(pipe.network, z, 500, **given)
    assert ran == ["down", "mid"]
    decode(pipe.network, features, 500, **given)
    assert ran == ["down", "mid", "up"]
    assert dict(vars(pipe.network)) == before
    for handle in handles:
        handle.remove()


@torch.no_grad()
def test_blocks_that_scale_in_place_do_not_touch_the_features(pipe):
    z, given = inputs(pipe, 1)
    features = encode(pipe.network, z, 500, **given)
    kept = features.map(torch.clone)

    def double(module, args, kwargs):  # as FreeU does, which knows the widths of released models only
        kwargs["hidden_states"].mul_(2)

    hook = pipe.network.up_blocks[0].register_forward_pre_hook(double, with_kwargs=True)
    doubled = decode(pipe.network, features, 500, **given)
    hook.remove()
    assert not torch.equal(doubled, decode(pipe.network, features, 500, **given))
    assert all(map(torch.equal, features.skips, kept.skips))
    assert torch.equal(features.bottleneck, kept.bottleneck)


# What interceptors see


class Spy(Interceptor):
    """Notes every event, and may change latents by constants."""

    def __init__(self, early: float = 0.0, late: float = 0.0):
        self.events: list[tuple] = []
        self.early, self.late = early, late
        self.noises: list[torch.Tensor] = []

    def start(self, run):
        self.events.append(("start", len(run.timesteps)))

    def before_network(self, run, z):
        self.noises.append(run.noise(z))
        return z + self.early

    def predict(self, forward, call, run):
        self.events.append(("predict", run and run.index, run and run.at(call.timestep), run and run.pictures))
        return forward(call)

    def before_update(self, run, z):
        self.events.append(("update", run.index))
        return z + self.late


def events(steps: int, pictures: int, timesteps: int | None = None) -> list[tuple]:
    timesteps = timesteps or steps
    each = [(("predict", i, True, pictures), ("update", i)) for i in range(timesteps)]
    return [("start", timesteps), *(event for pair in each for event in pair)]


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_it_sees_every_step_of_sample_and_of_the_pipelines_own_call(p, cfg_scale):
    for draw in (
        lambda: p.draw(["art", "star"], [1, 2], sampling_steps=4, cfg_scale=cfg_scale),
        lambda: p(["art", "star"], num_inference_steps=4, guidance_scale=cfg_scale, output_type="latent"),
    ):
        spy = Spy()
        with p.intercept(spy):
            draw()
            draw()
        assert spy.events == events(4, 2) * 2


def test_schedulers_with_repeated_timesteps_are_followed_by_position(pipe):
    scheduler = PNDMScheduler.from_config(pipe.pipe.scheduler.config, skip_prk_steps=True)
    spy = Spy()
    with pipe.intercept(spy):
        pipe.draw("star", 0, sampling_steps=4, scheduler=scheduler)
    assert spy.events == events(4, 1, timesteps=5)


def test_a_scheduler_exchanged_inside_the_block_is_followed(pipe):
    spy = Spy()
    with pipe.intercept(spy):
        pipe.pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.pipe.scheduler.config)
        pipe("star", num_inference_steps=3, output_type="latent")
        first = spy.events
        spy.events = []
        pipe("star", num_inference_steps=3, output_type="latent")
    assert [e for e in first if e[0] == "update"] == [("update", i) for i in range(3)]
    assert spy.events == events(3, 1)
    assert "step" not in vars(pipe.pipe.scheduler)


@torch.no_grad()
def test_calls_outside_of_sampling_belong_to_no_run(pipe):
    spy = Spy()
    with pipe.intercept(spy):
        pipe.denoiser(torch.zeros(1, 4, 8, 8), 0.5, pipe.encode("art"))
        for z, t in pipe.states("star", 0, sampling_steps=3, cfg_scale=1.0):
            if t:
                pipe.denoiser(z, t, pipe.encode("art"))
    assert [e for e in spy.events if e[0] == "predict" and e[1] is None] == [("predict", None, None, None)] * 4
    assert [e[1] for e in spy.events if e[0] == "predict" and e[1] is not None] == [0, 1, 2]


def test_the_network_keeps_its_signature_and_both_kinds_of_output(pipe):
    """And the scheduler its own, in which pipelines look for what they may pass on."""
    import inspect

    z, given = inputs(pipe, 1)
    plain = pipe.network(z, 500, **given).sample
    with pipe.intercept(Interceptor()):
        assert "encoder_hidden_states" in inspect.signature(pipe.network.forward).parameters
        assert "eta" in inspect.signature(pipe.pipe.scheduler.step).parameters
        assert "device" in inspect.signature(pipe.pipe.scheduler.set_timesteps).parameters
        assert torch.equal(pipe.network(z, 500, given["encoder_hidden_states"]).sample, plain)
        assert torch.equal(pipe.network(z, 500, **given, return_dict=False)[0], plain)
    assert "forward" not in vars(pipe.network)


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_noise_is_the_start_of_the_run_in_the_latents_scale(pipe, scheduler):
    """In the variance-preserving scale, in which the network sees its input, it is the same at every step."""
    made = EulerDiscreteScheduler.from_config(pipe.pipe.scheduler.config) if scheduler == "euler" else "ddim"
    spy = Spy()
    with pipe.intercept(spy):
        states = [z for z, _ in pipe.states("star", [4, 5], sampling_steps=4, scheduler=made, cfg_scale=3.0)]
    made = EulerDiscreteScheduler.from_config(pipe.pipe.scheduler.config)
    made.set_timesteps(4)
    for i, noise in enumerate(spy.noises):
        factor = made.scale_model_input(torch.ones(()), made.timesteps[i]) if scheduler == "euler" else 1.0
        made._step_index = i + 1
        torch.testing.assert_close(noise * factor, states[0])


def test_a_latent_is_changed_before_the_network_and_before_the_update(pipe):
    """Adding a to what DDIM's update starts from adds a times its linear coefficient to the result."""
    seen = {}
    for name, spy in {"plain": Spy(), "late": Spy(late=0.1), "early": Spy(early=0.1, late=0.1)}.items():
        with pipe.intercept(spy):
            seen[name] = [z for z, _ in pipe.states("star", 0, sampling_steps=4, cfg_scale=1.0)]
    assert torch.equal(seen["late"][0], seen["plain"][0])
    torch.testing.assert_close(seen["early"][0], seen["plain"][0] + 0.1)
    assert not torch.equal(seen["late"][1], seen["plain"][1])


def test_features_act_inside_predictions_and_only_one_at_a_time(pipe):
    order = []

    class Named(Interceptor):
        def __init__(self, name):
            self.name = name

        def predict(self, forward, call, run):
            order.append(self.name)
            return forward(call)

    with pipe.intercept(Named("prediction"), "prediction"), pipe.intercept(Named("features"), "features"):
        pipe.draw("star", 0, sampling_steps=1, cfg_scale=1.0)
        with pytest.raises(BadInput, match="halves"), pipe.intercept(Named("other"), "features"):
            pass
    assert order == ["prediction", "features"]


def test_hooks_that_move_weights_between_devices_stay_in_force(pipe):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    moved = []

    class Offload(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            moved.append(type(module).__name__)
            return args, kwargs

    add_hook_to_module(pipe.network, Offload())
    before = dict(vars(pipe.network))
    spy = Spy()
    with pipe.intercept(spy):
        pipe.draw("star", 0, sampling_steps=2)
    assert len(moved) == 2 and len(spy.events) == 5
    assert dict(vars(pipe.network)) == before
    with pipe.intercept(spy):  # taken off and put on again inside the block, as pipelines do after every call
        remove_hook_from_module(pipe.network)
        add_hook_to_module(pipe.network, Offload())
        pipe.draw("star", 0, sampling_steps=2)
    assert len(moved) == 4
    remove_hook_from_module(pipe.network)
    plain = pipe.copy()
    assert torch.equal(pipe.draw("star", 0, sampling_steps=2), plain.draw("star", 0, sampling_steps=2))
    assert len(moved) == 4


# Overrides


class Thing:
    def speak(self, word: str) -> str:
        return f"{id(self)} {word}"


def test_an_override_is_restored_exactly_and_stays_behind_in_copies():
    from copy import deepcopy

    thing = Thing()
    outer = Override(thing, "speak", lambda original, word: original(word) + "!")
    assert thing.speak("a") == f"{id(thing)} a!"
    other = deepcopy(thing)
    assert other.speak("a") == f"{id(other)} a"
    inner = Override(thing, "speak", lambda original, word: original(word) + "?")
    assert thing.speak("a") == f"{id(thing)} a!?"
    inner.remove()
    assert vars(thing)["speak"] is outer
    outer.remove()
    assert vars(thing) == {}
    outer.remove()


def test_a_run_finds_its_steps_by_time_and_position():
    class Scheduler:
        timesteps = torch.tensor([981, 961, 961, 941])
        config = type("Config", (), {"num_train_timesteps": 1000})

    run = Run(Scheduler())
    assert run.find(981) and run.index == 0
    assert run.find(961) and run.index == 1
    run.index += 1
    assert run.find(torch.tensor(961)) and run.index == 2
    assert run.at(torch.tensor([961.0, 961.0])) and not run.at(941)
    assert not run.find(981) and run.index == 2
