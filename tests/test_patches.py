"""What every patch promises, on every patch of the catalogue: off, neutral, restored, refused, reproducible."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from conftest import make_tiny_dit
from sfumato import catalog
from sfumato.errors import BadInput
from sfumato.pipeline import Text2Image, wrap
from sfumato.pipeline.steering import PLACES, Interceptor, of
from sfumato.steer.base import Patch

PROMPTS, SEEDS, STEPS = ["a red star", "a blue circle", "art"], [3, 11, 5], 6
CLASSES = [m.load() for m in catalog.methods("steer")]

every_patch = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
on_both = pytest.mark.parametrize("pipe", ["tiny_sd", "tiny_sdxl"], indirect=True)


@pytest.fixture
def pipe(request) -> Text2Image:
    made = request.getfixturevalue(getattr(request, "param", "tiny_sd")).copy()
    made.pipe.set_progress_bar_config(disable=True)
    return made


@dataclass(frozen=True, kw_only=True)
class Damped(Patch):
    """The smallest patch there can be: every prediction times a number."""

    NEUTRAL: ClassVar = {"factor": 1.0}
    place: ClassVar = "prediction"
    factor: float = 0.5

    @contextmanager
    def acting(self, p: Text2Image) -> Iterator[dict[str, Any]]:
        told = {"calls": 0}
        factor = self.factor

        class Damping(Interceptor):
            def predict(self, forward, call, run):
                told["calls"] += run is not None
                return factor * forward(call)

        with p.intercept(Damping(), self.place):
            yield told


def neutral(cls: type[Patch]) -> Patch:
    return cls(**cls.NEUTRAL)


def example(cls: type[Patch]) -> Patch:
    return cls(**cls.EXAMPLE)


def drawn(p: Text2Image, **options) -> torch.Tensor:
    return p.draw(PROMPTS, SEEDS, sampling_steps=STEPS, cfg_scale=3.0, **options)


def called(p: Text2Image, **options) -> torch.Tensor:
    """The same through diffusers' own pipeline."""
    generators = [torch.Generator().manual_seed(s) for s in SEEDS]
    options = {"generator": generators, "num_inference_steps": STEPS, "guidance_scale": 3.0, **options}
    return p(PROMPTS, output_type="pt", **options).images


def fingerprint(pipe) -> dict:
    """All that a patch could leave behind: attributes, hooks, processors, flags and weights of every part."""
    seen: dict = {"pipe": sorted(vars(pipe)), "scheduler": (id(pipe.scheduler), sorted(vars(pipe.scheduler)))}
    for part, module in pipe.components.items():
        if not isinstance(module, nn.Module):
            continue
        for name, layer in module.named_modules():
            hooks = {k: list(v.values()) for k, v in vars(layer).items() if k.endswith("_hooks") and v}
            own = [(k, v) for k, v in vars(layer).items() if callable(v)]
            methods = (layer.forward, getattr(layer, "processor", None))
            seen[part, name] = (sorted(vars(layer)), hooks, own, methods, layer.training)
        for name, x in module.named_parameters():
            seen[part, name, "weight"] = (id(x), x._version, x.requires_grad)
    return seen


@every_patch
def test_it_is_a_patch_that_says_what_it_changes(cls):
    assert issubclass(cls, Patch)
    assert cls.place in PLACES
    assert cls.NEUTRAL, "every patch has settings under which it changes nothing"
    assert cls.fits(None) is False


@every_patch
@on_both
def test_switched_off_it_is_the_plain_pipeline(cls, pipe):
    plain, before = (drawn(pipe), called(pipe)), fingerprint(pipe.pipe)
    with example(cls).patch(pipe):
        assert not torch.equal(drawn(pipe), plain[0]), "the example must show that it does something"
        assert not torch.equal(called(pipe), plain[1])
    assert fingerprint(pipe.pipe) == before
    assert torch.equal(drawn(pipe), plain[0])
    assert torch.equal(called(pipe), plain[1])
    assert pipe.patches == () and of(pipe.network) is None


@every_patch
@on_both
def test_neutral_it_is_the_plain_pipeline(cls, pipe):
    plain = drawn(pipe), called(pipe)
    with neutral(cls).patch(pipe):
        assert torch.equal(drawn(pipe), plain[0])
        assert torch.equal(called(pipe), plain[1])


@every_patch
def test_it_acts_alike_on_sample_and_on_the_diffusers_call(cls, pipe):
    with example(cls).patch(pipe):
        torch.testing.assert_close(drawn(pipe), called(pipe), rtol=0, atol=1e-5)


@every_patch
def test_a_plain_diffusers_pipeline_will_do_and_gets_its_flags_back(cls, pipe):
    with example(cls).patch(pipe):
        expected = called(pipe)
    bare = pipe.pipe
    bare.unet.requires_grad_(True)
    bare.vae.train()
    before = fingerprint(bare)
    with example(cls).patch(bare):
        assert torch.equal(called(wrap(bare)), expected)
    assert fingerprint(bare) == before


class Stop(Exception):
    pass


@every_patch
def test_an_exception_restores_it_too(cls, pipe):
    plain, before = drawn(pipe), fingerprint(pipe.pipe)
    with pytest.raises(Stop), example(cls).patch(pipe):
        raise Stop
    assert fingerprint(pipe.pipe) == before
    assert torch.equal(drawn(pipe), plain)


@every_patch
def test_a_run_that_was_broken_off_leaves_nothing_to_the_next(cls, pipe):
    def stop(at):
        def callback(pipeline, i, t, kwargs):
            if i == at:
                raise Stop
            return kwargs

        return callback

    with example(cls).patch(pipe):
        expected = called(pipe), drawn(pipe)
        for at in (0, 4):
            with pytest.raises(Stop):
                called(pipe, callback_on_step_end=stop(at))
            states = pipe.states(PROMPTS, SEEDS, sampling_steps=STEPS)
            for _ in range(at + 2):
                next(states)
            del states
            assert torch.equal(called(pipe), expected[0])
            assert torch.equal(drawn(pipe), expected[1])


@every_patch
def test_a_seeds_picture_is_the_same_again_and_in_every_batch(cls, pipe):
    with example(cls).patch(pipe):
        together = drawn(pipe)
        assert torch.equal(drawn(pipe), together)
        torch.testing.assert_close(drawn(pipe, batch=1), together, rtol=0, atol=1e-5)
    with example(cls).patch(pipe):
        assert torch.equal(drawn(pipe), together)


@every_patch
def test_runs_may_take_turns(cls, pipe):
    with example(cls).patch(pipe):
        alone = [[z for z, _ in pipe.states(PROMPTS, s, sampling_steps=STEPS)] for s in (1, 2)]
        both = zip(*(pipe.states(PROMPTS, s, sampling_steps=STEPS) for s in (1, 2)), strict=True)
        for i, states in enumerate(both):
            for k, (z, _) in enumerate(states):
                assert torch.equal(z, alone[k][i])


@every_patch
def test_a_copy_made_inside_the_block_is_not_patched(cls, pipe):
    plain = drawn(pipe), called(pipe)
    with example(cls).patch(pipe):
        copied = pipe.copy()
        copied.pipe.set_progress_bar_config(disable=True)
        assert torch.equal(drawn(copied), plain[0])
        assert torch.equal(called(copied), plain[1])
        assert copied.patches == ()
    assert torch.equal(drawn(copied), plain[0])


@every_patch
def test_patching_twice_is_refused(cls, pipe):
    with example(cls).patch(pipe):
        patched = drawn(pipe)
        for again in (pipe, pipe.pipe, wrap(pipe.pipe)):
            told = f"{cls.__name__} acts on this pipeline already"
            with pytest.raises(BadInput, match=told), example(cls).patch(again):
                pass
        assert torch.equal(drawn(pipe), patched), "the first one goes on"
    with example(cls).patch(pipe):
        pass


@every_patch
def test_saving_while_patched_is_refused(cls, pipe, tmp_path):
    with example(cls).patch(pipe):
        assert [type(x) for x in pipe.patches] == [cls]
        for p in (pipe, wrap(pipe.pipe)):
            with pytest.raises(BadInput, match=f"{cls.__name__} acts on this pipeline"):
                p.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    pipe.save(tmp_path / "out")


@every_patch
def test_a_network_that_it_does_not_fit_is_refused(cls):
    with pytest.raises(BadInput), example(cls).patch(make_tiny_dit()):
        pass


@pytest.mark.parametrize("pair", permutations([*CLASSES, Damped], 2), ids=lambda p: "-".join(c.__name__ for c in p))
def test_patches_nest_in_either_order_or_refuse(pair, pipe):
    plain, before = drawn(pipe), fingerprint(pipe.pipe)
    first, second = pair
    try:
        with neutral(first).patch(pipe), neutral(second).patch(pipe.pipe):
            assert torch.equal(drawn(pipe), plain)
        with example(first).patch(pipe), example(second).patch(pipe.pipe):
            nested = drawn(pipe)
        with example(second).patch(pipe), example(first).patch(pipe.pipe):
            other = drawn(pipe)
        assert first.place == second.place or torch.equal(nested, other), "the order of places decides"
    except BadInput:
        pass
    assert fingerprint(pipe.pipe) == before
    assert torch.equal(drawn(pipe), plain)
