"""What every eraser promises, on every eraser of the catalogue and every family of pipelines."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch

from sfumato import catalog
from sfumato.erase.base import Eraser
from sfumato.errors import BadInput, SfumatoError
from sfumato.files import held
from sfumato.pipeline import Text2Image, load
from sfumato.plan import Plan
from sfumato.train.loop import Run

from .conftest import bits_of, draw, frozen, in_half, state, with_number
from .families import FAMILIES

VERB = "erase"
CONCEPTS = ("star", "blue circle")
_DONE: dict[Any, tuple] = {}


def eraser(method: type[Eraser], **changes: Any) -> Eraser:
    return method(**{"concepts": CONCEPTS, **method.EXAMPLE, **changes})


def run_once(method: type[Eraser], family: str, request) -> tuple:
    """One run of the method on the family: (teacher, its state before and after, erased pipeline, log)."""
    teacher = request.getfixturevalue(family)
    if (method, family) not in _DONE:
        teacher.encode("star")  # transformers puts hooks of its own on its models when they are first called
        before = state(teacher)
        erased, log = eraser(method).run(teacher)
        _DONE[method, family] = teacher, before, state(teacher), erased, log
    return _DONE[method, family]


@pytest.fixture
def done(request, method, family):
    """`run_once` on every family that the method claims."""
    if not method.fits(request.getfixturevalue(family)):
        pytest.skip("does not claim this family")
    return run_once(method, family, request)


@pytest.fixture
def first(request, method):
    """`run_once` on the first family that the method claims, for what does not depend on the family."""
    family = next(name for name in FAMILIES if method.fits(request.getfixturevalue(name)))
    return run_once(method, family, request)


def whole(pipe: Text2Image) -> Text2Image:
    """What `Text2Image.save` writes: adapters merged into the weights."""
    return pipe.merged() if pipe.adapters else pipe


def test_it_is_an_eraser_and_fits_something(method, request):
    assert issubclass(method, Eraser)
    assert any(method.fits(request.getfixturevalue(family)) for family in FAMILIES)


def test_the_teacher_is_left_as_it_was_bit_for_bit(done):
    teacher, before, after, _, _ = done
    changed = [key for key in before if before[key] != after.get(key)]
    assert changed == [] and before.keys() == after.keys()
    assert frozen(teacher)


def test_the_result_is_another_model_frozen_and_complete(done):
    teacher, _, _, erased, _ = done
    assert type(erased) is type(teacher) and erased is not teacher
    assert bits_of(erased) != bits_of(teacher), "the example must do something"
    assert frozen(erased) and not any(m.training for part in erased.parts().values() for m in part.modules())
    assert not torch.equal(draw(erased), draw(teacher))
    assert draw(erased).isfinite().all()


def test_the_log_is_json(done):
    *_, log = done
    assert isinstance(log, dict) and json.loads(json.dumps(log, allow_nan=False)) == log


def test_a_plain_diffusers_pipeline_will_do_and_the_seed_decides_every_bit(done, method, pipe):
    """The same result, whatever state the global generator is in; and the plain pipeline gets its flags back."""
    *_, erased, log = done
    bare, network = pipe.pipe, pipe.network
    if "size" in pipe.defaults:  # which a plain pipeline of Flux keeps in an attribute
        bare.default_sample_size = pipe.size // bare.vae_scale_factor
    flags = [network.requires_grad_(True).train().training, *(x.requires_grad for x in network.parameters())]
    torch.manual_seed(12345)
    again, told = eraser(method).run(bare)
    assert [network.training, *(x.requires_grad for x in network.parameters())] == flags
    assert all(x.grad is None for x in network.parameters())
    assert bits_of(again) == bits_of(erased) and told == log


def test_another_seed_gives_another_result_where_anything_is_drawn(first, method):
    teacher, _, _, erased, _ = first
    other = eraser(method, seed=1).apply(teacher)
    assert (bits_of(other) != bits_of(erased)) is method.draws


def test_saved_and_loaded_it_draws_the_same_pictures(done, tmp_path):
    *_, erased, _ = done
    erased.save(tmp_path / "erased")
    loaded = load(tmp_path / "erased", "cpu")
    assert torch.equal(draw(loaded), draw(whole(erased)))


def test_half_precision_stays_half_and_finite(first, method):
    teacher = in_half(first[0])
    before = bits_of(teacher)
    erased, log = eraser(method).run(teacher)
    assert erased.dtype == torch.bfloat16 and bits_of(teacher) == before
    assert all(x.isfinite().all() for part in erased.parts().values() for x in part.parameters())
    assert bits_of(erased) != before
    assert draw(erased).isfinite().all()
    json.dumps(log, allow_nan=False)


def test_in_a_folder_it_is_the_same_and_a_killed_run_goes_on_to_the_same_bits(first, method, tmp_path, monkeypatch):
    """Methods that train are killed before their second update; others keep nothing there."""
    teacher, _, _, erased, log = first
    original, made = Run.one_step, []

    class Killed(BaseException):
        pass

    def one_step(run):
        if len(made) == 1:
            raise Killed
        made.append(run.step)
        return original(run)

    with monkeypatch.context() as patch, suppress(Killed):
        patch.setattr(Run, "one_step", one_step)
        eraser(method).run(teacher, tmp_path / "run")
    with held(tmp_path / "run"):  # as the command holds it
        again, told = eraser(method).run(teacher, tmp_path / "run")
    assert bits_of(again) == bits_of(erased) and told == log


def test_the_plan_is_told_first(first, method):
    plan = eraser(method).plan(first[0])
    assert isinstance(plan, Plan) and CONCEPTS[0] in plan.title
    assert plan.memory and min(plan.memory.values()) > 0
    assert plan.seconds is None or plan.seconds > 0


def test_several_concepts_are_all_erased(first, method):
    """Each concept counts: without the second one the result is another."""
    teacher, _, _, erased, _ = first
    alone = eraser(method, concepts=CONCEPTS[:1]).apply(teacher)
    assert bits_of(alone) != bits_of(erased)
    asked = ([CONCEPTS[1]], [1])
    assert not torch.equal(draw(erased, *asked), draw(alone, *asked))


@pytest.mark.parametrize("gated", [False, True], ids=["fixed", "gated"])
def test_adapters_go_on_acting_or_are_refused(done, method, gated):
    """One rule for all: never dropped silently, so that what an adapter erased does not come back."""
    teacher = done[0].copy()
    adapter = teacher.add_adapter("own", rank=2, generator=torch.Generator().manual_seed(0))
    for up in adapter.up.values():
        torch.nn.init.normal_(up, std=0.3, generator=torch.Generator().manual_seed(1))
    if gated:
        adapter.gate = lambda cond: torch.linspace(0.5, 1.0, len(cond))
    before = state(teacher), draw(teacher)
    if not method.keeps_adapters:
        with pytest.raises(BadInput, match=r"adapters are attached.*own.*erase with"):
            eraser(method).apply(teacher)
        return
    erased, log = eraser(method).run(teacher)
    assert state(teacher) == before[0] and torch.equal(draw(teacher), before[1])
    assert log["adapters_kept"] == ["own"] == list(erased.adapters)
    kept = erased.adapters["own"]
    assert all(torch.equal(x, kept.state_dict()[name]) for name, x in adapter.state_dict().items())
    assert (kept.scale, kept.gate, kept.alpha) == (adapter.scale, adapter.gate, adapter.alpha) and frozen(erased)
    silent = erased.copy()
    assert not silent.adapters and not torch.equal(draw(erased), draw(silent)), "it acts"
    if not gated:  # the weights with it inside are those that the method makes of the teacher's with it inside
        expected = eraser(method).apply(teacher.merged()).parameters("full")
        for name, x in erased.merged().parameters("full").items():
            torch.testing.assert_close(x, expected[name], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def with_lora(tiny_sd, tmp_path_factory):
    """A plain pipeline into which diffusers has loaded a LoRA."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("lora")
    tiny_sd.copy().add_adapter("own").save_lora(folder / "pytorch_lora_weights.safetensors")
    bare = tiny_sd.copy().pipe
    bare.load_lora_weights(folder)
    return bare


def test_a_lora_that_diffusers_loaded_is_refused(with_lora, method):
    with pytest.raises(BadInput, match="fuse it"):
        eraser(method).apply(with_lora)


def test_a_weight_that_is_not_finite_is_refused_by_name(first, method):
    for part, number in zip(first[0].parts(), (float("nan"), float("-inf")) * 3, strict=False):
        broken, name = with_number(first[0], part, number)
        with pytest.raises(BadInput, match=rf"{name} of {part} .* not finite"):
            eraser(method).apply(broken)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concepts": ()}, "at least one concept"),
        ({"concepts": ("star", " ")}, "at least one concept"),
        ({"concepts": ("star", "Star ")}, "named twice"),
        ({"concepts": ("star",), "preserve": ("circle", "STAR")}, "both erased and preserved"),
        ({"concepts": ("star",), "anchors": ("art", "a")}, "one anchor for all"),
        ({"concepts": (3,)}, "concepts must be text, got 3"),
        ({"anchors": 3}, "anchors must be text, got 3"),
        ({"preserve": (3,)}, "preserve must be text, got 3"),
    ],
)
def test_concepts_that_contradict_each_other(method, changes, message):
    with pytest.raises(BadInput, match=message):
        eraser(method, **changes)


@pytest.mark.parametrize("field", ["concepts", "anchors", "preserve"])
def test_a_word_that_the_tokenizer_cannot_read_is_refused(first, method, field):
    with pytest.raises(BadInput, match="tokenizer"):
        eraser(method, **{field: ("<|endoftext|>",)}).check(first[0])


def test_an_anchor_that_is_nothing_is_read(first, method):
    eraser(method, anchors=("",)).check(first[0])


def test_a_word_alone_is_one_concept(method):
    one = method(concepts="star", preserve="circle", anchors="art")
    assert (one.concepts, one.preserve, one.anchors) == (("star",), ("circle",), ("art",))
    assert replace(one, seed=3).seed == 3


def test_a_family_that_it_does_not_fit_is_refused_with_those_that_do(method, family, pipe):
    if method.fits(pipe):
        pytest.skip("fits")
    names = [m.name for m in catalog.methods(VERB) if m.load().fits(pipe)]
    with pytest.raises(BadInput, match=rf"{method.__name__} does not fit .*{', '.join(names)}"):
        eraser(method).apply(pipe)


def test_a_network_without_its_parts_is_refused_with_the_erasers_that_fit(tiny_sd, monkeypatch):
    """As on a family whose attention has other projections."""
    monkeypatch.setattr(Text2Image, "projections", lambda self, *kinds: [])
    for entry in catalog.methods(VERB):
        method = entry.load()
        if method.needs:
            with pytest.raises(BadInput, match=f"{method.__name__} does not fit .* has no .*: erasers that fit it are"):
                eraser(method).apply(tiny_sd)


def test_a_result_that_is_not_finite_is_none(tiny_sd):
    """Whatever a method does: the last look is everybody's."""

    class Blown(Eraser):
        def erased(self, pipe):
            return with_number(pipe, "unet", float("inf"))[0], {}

    with pytest.raises(SfumatoError, match="Blown ended with numbers that are not finite"):
        Blown(concepts="star").apply(tiny_sd)


def test_the_matrix_has_methods():
    assert len(catalog.methods(VERB)) >= 5
