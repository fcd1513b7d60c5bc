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
from sfumato.steer.base import Patch, fitting

from .conftest import call

PROMPTS, SEEDS, STEPS = ["a red star", "a blue circle", "art"], [3, 11, 5], 6
VERB = "steer"


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


TOYS = (Damped,)
CLASSES = [*(m.load() for m in catalog.methods(VERB)), *TOYS]


def neutral(method: type[Patch]) -> Patch:
    return method(**method.NEUTRAL)


def example(method: type[Patch]) -> Patch:
    return method(**method.EXAMPLE)


def drawn(p: Text2Image, **options) -> torch.Tensor:
    return p.draw(PROMPTS, SEEDS, sampling_steps=STEPS, cfg_scale=3.0, **options)


def called(p: Text2Image, **options) -> torch.Tensor:
    """The same through diffusers' own pipeline."""
    return call(p, PROMPTS, SEEDS, STEPS, guidance_scale=3.0, **options)


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


def test_it_is_a_patch_that_says_what_it_changes(method):
    assert issubclass(method, Patch)
    assert method.place in PLACES
    assert method.NEUTRAL, "every patch has settings under which it changes nothing"
    assert method.fits(None) is False


@pytest.fixture
def on_family(method, pipe):
    if not method.fits(pipe.network):
        pytest.skip("does not fit this family")
    return pipe


def test_switched_off_it_is_the_plain_pipeline(method, family, on_family):
    pipe = on_family
    plain, before = (drawn(pipe), called(pipe)), fingerprint(pipe.pipe)
    with example(method).patch(pipe):
        assert not torch.equal(drawn(pipe), plain[0]), "the example must show that it does something"
        assert not torch.equal(called(pipe), plain[1])
    assert fingerprint(pipe.pipe) == before
    assert torch.equal(drawn(pipe), plain[0])
    assert torch.equal(called(pipe), plain[1])
    assert pipe.patches == () and of(pipe.network) is None


def test_neutral_it_is_the_plain_pipeline(method, family, on_family):
    pipe = on_family
    plain = drawn(pipe), called(pipe)
    with neutral(method).patch(pipe):
        assert torch.equal(drawn(pipe), plain[0])
        assert torch.equal(called(pipe), plain[1])


def test_it_acts_alike_on_sample_and_on_the_diffusers_call(method, pipe):
    with example(method).patch(pipe):
        torch.testing.assert_close(drawn(pipe), called(pipe), rtol=0, atol=1e-5)


def test_a_plain_diffusers_pipeline_will_do_and_gets_its_flags_back(method, pipe):
    with example(method).patch(pipe):
        expected = called(pipe)
    bare = pipe.pipe
    pipe.network.requires_grad_(True)
    bare.vae.train()
    before = fingerprint(bare)
    with example(method).patch(bare):
        assert torch.equal(called(wrap(bare)), expected)
    assert fingerprint(bare) == before


class Stop(Exception):
    pass


def test_an_exception_restores_it_too(method, pipe):
    plain, before = drawn(pipe), fingerprint(pipe.pipe)
    with pytest.raises(Stop), example(method).patch(pipe):
        raise Stop
    assert fingerprint(pipe.pipe) == before
    assert torch.equal(drawn(pipe), plain)


def test_a_run_that_was_broken_off_leaves_nothing_to_the_next(method, pipe):
    def stop(at):
        def callback(pipeline, i, t, kwargs):
            if i == at:
                raise Stop
            return kwargs

        return callback

    with example(method).patch(pipe):
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


def test_a_seeds_picture_is_the_same_again_and_in_every_batch(method, pipe):
    with example(method).patch(pipe):
        together = drawn(pipe)
        assert torch.equal(drawn(pipe), together)
        torch.testing.assert_close(drawn(pipe, batch=1), together, rtol=0, atol=1e-5)
    with example(method).patch(pipe):
        assert torch.equal(drawn(pipe), together)


def test_runs_may_take_turns(method, pipe):
    with example(method).patch(pipe):
        alone = [[z for z, _ in pipe.states(PROMPTS, s, sampling_steps=STEPS)] for s in (1, 2)]
        both = zip(*(pipe.states(PROMPTS, s, sampling_steps=STEPS) for s in (1, 2)), strict=True)
        for i, states in enumerate(both):
            for k, (z, _) in enumerate(states):
                assert torch.equal(z, alone[k][i])


def test_a_copy_made_inside_the_block_is_not_patched(method, pipe):
    plain = drawn(pipe), called(pipe)
    with example(method).patch(pipe):
        copied = pipe.copy()
        copied.pipe.set_progress_bar_config(disable=True)
        assert torch.equal(drawn(copied), plain[0])
        assert torch.equal(called(copied), plain[1])
        assert copied.patches == ()
    assert torch.equal(drawn(copied), plain[0])


def test_patching_twice_is_refused(method, pipe):
    with example(method).patch(pipe):
        patched = drawn(pipe)
        for again in (pipe, pipe.pipe, wrap(pipe.pipe)):
            told = f"{method.__name__} acts on this pipeline already"
            with pytest.raises(BadInput, match=told), example(method).patch(again):
                pass
        assert torch.equal(drawn(pipe), patched), "the first one goes on"
    with example(method).patch(pipe):
        pass


def test_saving_while_patched_is_refused(method, pipe, tmp_path):
    with example(method).patch(pipe):
        assert [type(x) for x in pipe.patches] == [method]
        for p in (pipe, wrap(pipe.pipe)):
            with pytest.raises(BadInput, match=f"{method.__name__} acts on this pipeline"):
                p.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    pipe.save(tmp_path / "out")


def test_a_network_that_it_does_not_fit_is_refused(method):
    told = "is not supported" if method.fits(make_tiny_dit().transformer) else f"{method.__name__} does not fit"
    with pytest.raises(BadInput, match=told), example(method).patch(make_tiny_dit()):
        pass


def test_a_family_that_it_does_not_fit_is_refused_with_those_that_do(method, family, pipe):
    if method.fits(pipe.network):
        pytest.skip("fits")
    told = f"{method.__name__} does not fit .*{fitting(pipe.network)}"
    for p in (pipe, pipe.pipe):
        with pytest.raises(BadInput, match=told), example(method).patch(p):
            pass


@pytest.mark.parametrize("pair", permutations(CLASSES, 2), ids=lambda p: "-".join(c.__name__ for c in p))
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
    except BadInput as error:
        assert first.place == second.place == "features" and "cannot act together" in str(error)
    assert fingerprint(pipe.pipe) == before
    assert torch.equal(drawn(pipe), plain)
