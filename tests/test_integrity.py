"""Unlearning with integrity: its terms, the balance of its gradients, and when it changes nothing or stops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.data.base import Rows
from sfumato.erase.integrity import Integrity, bounded_ascent, projected, saliency_mask
from sfumato.erase.parts.trained import student_of
from sfumato.erase.parts.unlearning import Unlearning, drawn, out_of
from sfumato.errors import BadInput
from sfumato.metrics.detectors import Detection, Detector

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64, a handful of operations
SHORT = {"updates": 2, "batch": 2, "lr": 1e-3, "pool": 3, "sampling_steps": 2, "templates": "{concept}"}
few = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31)


def step(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(seed: int) -> tuple[dict, dict]:
    rng = step(seed)
    shapes = {"a": (3, 2), "b": (4,)}
    return tuple({n: torch.randn(s, generator=rng, dtype=torch.float64) for n, s in shapes.items()} for _ in range(2))


def inner(f: dict, g: dict) -> float:
    return float(sum((f[n] * g[n]).sum() for n in f))


def at_start(pipe, seed: int = 0, **changes):
    """(L_F, L_R) of one step, and the student that they were computed on."""
    it = Integrity(**{"concepts": "star", "preserve": ("red square", "art"), **SHORT, **changes})
    student = pipe.copy(own="xattn")
    return [loss(step(seed)) for loss in it.losses(pipe, student)], student


@few
@given(seeds)
def test_the_projected_gradient_no_longer_opposes_and_is_left_alone_where_it_did_not(seed):
    f, r = gradients(seed)
    p = projected(f, r)
    if inner(f, r) >= 0:
        assert p is f
    else:
        assert abs(inner(p, r)) < 1e-12
        for name in f:
            torch.testing.assert_close(p[name], f[name] - inner(f, r) / inner(r, r) * r[name], **EXACT)


def test_a_gradient_that_one_of_them_lacks_counts_as_zero():
    f, r = gradients(1)
    opposed = {"a": -r["a"]}
    p = projected(opposed, r)
    full = projected({**opposed, "b": torch.zeros(4, dtype=torch.float64)}, r)
    assert all(torch.equal(p[n], full[n]) for n in ("a", "b")) and abs(inner(p, r)) < 1e-12
    assert projected(f, {}) is f and projected(f, {n: 0 * g for n, g in r.items()}) is f


@few
@given(seeds, st.floats(0.05, 1.0))
def test_the_mask_has_the_largest_gradients(seed, share):
    f, _ = gradients(seed)
    mask = saliency_mask(f, share)
    kept = torch.cat([f[n][mask[n]].abs() for n in f])
    left = torch.cat([f[n][~mask[n]].abs() for n in f])
    assert len(kept) == math.ceil(share * 10)
    assert not len(left) or kept.min() > left.max()


@few
@given(seeds, st.floats(0.1, 3.0))
def test_ascent_is_bounded_picture_by_picture(seed, margin):
    rng = step(seed)
    eps, noise = (torch.randn(4, 2, 3, 3, generator=rng, dtype=torch.float64) for _ in range(2))
    eps[0] = noise[0] + 10
    eps.requires_grad_()
    loss = bounded_ascent(eps, noise, margin)
    errors = ((eps - noise) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(loss, -torch.stack([min(e, e.new_tensor(margin)) for e in errors]).mean(), **EXACT)
    (slope,) = torch.autograd.grad(loss, eps)
    assert slope[0].abs().max() == 0
    for i in range(4):
        assert (slope[i].abs().max() > 0) == bool(errors[i] < margin)


def test_at_the_start_nothing_is_to_be_retained(tiny_sd):
    (_, retain), student = at_start(tiny_sd)
    retain.backward()
    assert retain.item() <= 1e-12
    assert all(p.grad is None or p.grad.abs().max() <= 1e-6 for p in student.parameters("xattn").values())
    (_, denoising), _ = at_start(tiny_sd, retain="denoise")
    assert denoising.item() > 0.1, "the usual loss is never at its minimum"


def test_a_concept_in_its_own_place_is_nothing_to_forget(tiny_sd):
    it = Integrity(concepts="star", anchors="circle", preserve="art", **SHORT)
    object.__setattr__(it, "anchors", ("star",))
    student = tiny_sd.copy(own="full")
    forget, _ = (loss(step()) for loss in it.losses(tiny_sd, student))
    forget.backward()
    assert forget.item() <= 1e-12
    assert all(p.grad is None or p.grad.abs().max() <= 1e-6 for p in student.parameters("full").values())


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sdxl", "tiny_sana"])
def test_no_push_is_the_empty_prompt(family, request):
    """As guidance takes it: on SDXL and Sana that is not the encoded ""."""
    pipe = request.getfixturevalue(family)
    (negative, _), _ = at_start(pipe, forget="negative", eta=0.0)
    (overwrite, _), _ = at_start(pipe)
    (pushed, _), _ = at_start(pipe, forget="negative", eta=1.0)
    torch.testing.assert_close(negative, overwrite, rtol=1e-4, atol=1e-9)  # float32 network
    torch.testing.assert_close(pushed, 4 * overwrite, rtol=1e-3, atol=1e-9)


def test_random_labels_are_retained_prompts(tiny_sd):
    (labels, _), _ = at_start(tiny_sd, surrogate="random", preserve="circle")
    (anchored, _), _ = at_start(tiny_sd, anchors="circle", preserve="circle")
    torch.testing.assert_close(labels, anchored, rtol=1e-4, atol=1e-9)


def test_the_surrogate_of_a_prompt():
    it = Integrity(concepts=("star", "blue circle"), anchors=("square", ""))
    assert it.instead_of("a star above a red circle") == "a square above a red circle"
    assert it.instead_of("a star above a blue circle") == ""
    assert it.instead_of("Two Stars") == "Two squares" and it.instead_of("Blue Circles") == ""
    assert Integrity(concepts="star").instead_of("a star") == ""
    swapped = Integrity(concepts=("star", "circle"), anchors=("red circle", "square"))
    assert swapped.instead_of("a star and two circles") == "a red circle and two squares"


def test_pictures_with_captions_are_told_apart_by_them(tiny_sd, tmp_path):
    from sfumato.files import save_png

    for i, caption in enumerate(["a star", "a red circle", "two stars", "art"]):
        save_png(tmp_path / f"{i}.png", torch.rand(16, 16, 3, generator=step(i)).numpy(), {})
        (tmp_path / f"{i}.txt").write_text(caption)
    forget, retain = out_of(tiny_sd, str(tmp_path), ("star",), 8, 0)
    assert sorted(forget.prompts) == ["a star", "two stars"] and sorted(retain.prompts) == ["a red circle", "art"]
    it = Integrity(concepts="circle", data=str(tmp_path), **SHORT)
    forget, retain = it.shown(tiny_sd)
    assert forget.prompts == ("a red circle",) and len(retain.prompts) == 3
    both, also = Integrity(concepts=("circle", "square"), data=str(tmp_path), preserve="blue", **SHORT).shown(tiny_sd)
    assert also.prompts == (*retain.prompts, "blue", "blue", "blue")
    assert both.prompts == ("a red circle", "square", "square", "square"), "what the data lack is drawn"


def test_captions_name_a_concept_in_any_case(tiny_sd, tmp_path):
    from sfumato.files import save_png

    for i, caption in enumerate(["A Star on grass", "a cat", "Star", "a dog"]):
        save_png(tmp_path / f"{i}.png", torch.rand(16, 16, 3, generator=step(i)).numpy(), {})
        (tmp_path / f"{i}.txt").write_text(caption)
    forget, retain = out_of(tiny_sd, str(tmp_path), ("star",), 8, 0)
    assert sorted(forget.prompts) == ["A Star on grass", "Star"] and sorted(retain.prompts) == ["a cat", "a dog"]


def test_pictures_that_say_nothing_are_refused(tiny_sd, monkeypatch):
    monkeypatch.setattr("sfumato.erase.parts.unlearning.open_pictures", lambda *given, **more: Rows(None, [0, 1]))
    with pytest.raises(BadInput, match="add captions"):
        Integrity(concepts="star", data="mute", **SHORT).shown(tiny_sd)


def test_pictures_do_not_depend_on_how_many_are_drawn_at_once(tiny_sd, monkeypatch):
    options = {"sampling_steps": 2, "cfg_scale": 3.0}
    shown = drawn(tiny_sd, ["star", "art"], 5, 0, **options)
    monkeypatch.setattr("sfumato.erase.parts.unlearning.BATCH", 2)
    again = drawn(tiny_sd, ["star", "art"], 5, 0, **options)
    assert shown.prompts == again.prompts == ("star", "art", "star", "art", "star")
    torch.testing.assert_close(shown.latents, again.latents, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"balance": "project", "forget": "negative"},
        {"balance": "alternate", "forget": "ascent", "retain": "denoise"},
        {"trained": "lora", "rank": 2, "surrogate": "random"},
    ],
)
def test_every_variant_trains(tiny_sd, changes):
    erased, log = Integrity(concepts="star", preserve="art", **SHORT, **changes).run(tiny_sd)
    assert log["ended_after"] == 2
    same = [torch.equal(p, tiny_sd.parameters("full")[n]) for n, p in erased.parameters("full").items()]
    assert all(same) == bool(erased.adapters) == (changes.get("trained") == "lora")


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_only_the_salient_weights_change(tiny_sd, weight_decay):
    method = Integrity(concepts="star", preserve="art", saliency=0.1, weight_decay=weight_decay, **SHORT)
    erased = method.apply(tiny_sd)
    before = tiny_sd.parameters("full")
    changed = sum(int((p != before[n]).sum()) for n, p in erased.parameters("full").items())
    total = sum(p.numel() for p in before.values())
    assert 0.05 < changed / total <= 0.11


def salient(pipe, factor: float = 1.0) -> torch.Tensor:
    """Which numbers may change where the forgetting's loss is multiplied by ``factor``."""
    it = Integrity(concepts="star", preserve="art", **SHORT)
    student, module = student_of(pipe, "full", "integrity", 8, 0)
    forget, retain = it.losses(pipe, student)
    small = lambda generator, share=slice(None): factor * forget(generator, share)
    recipe = Unlearning(it.concepts, pipe, module, small, retain, 0, torch.optim.AdamW, 1.0, "sum")
    recipe.keep_to(0.1, 2)
    assert all(p.grad is None for p in module.parameters())
    return torch.cat([recipe.mask[name].flatten() for name in sorted(recipe.mask)])


def test_half_precision_finds_the_same_salient_weights(tiny_sd):
    """However small the gradients are: here a thousandth, as where a loss is a mean over more numbers."""
    half = tiny_sd.copy(own="all")
    for part in half.parts().values():
        part.to(torch.float16)
    exact, found = salient(tiny_sd), salient(half, 1e-3)
    assert float(found.double().mean()) == pytest.approx(0.1, abs=0.005)
    assert float((found & exact).sum() / exact.sum()) > 0.95


class Third(Detector):
    """Sees the concept twice, and then no more."""

    name, hash, threshold, resize = "third", "", 0.5, ""

    def __init__(self):
        self.looks = 0

    def check(self, concept):
        pass

    def __call__(self, images, concept):
        self.looks += 1
        seen = torch.full((len(images),), self.looks < 3)
        return Detection(seen, seen.double())


def test_it_stops_as_soon_as_the_concept_is_gone(tiny_sd, monkeypatch):
    judge = Third()
    monkeypatch.setattr("sfumato.erase.integrity.detector_for", lambda *given: judge)
    options = {**SHORT, "concepts": "star", "preserve": "art", "updates": 9, "trained": "xattn-strict"}
    erased, log = Integrity(**options, stop_at=0.1, check_pictures=1, check_every=1).run(tiny_sd)
    assert log["ended_after"] == 3 and judge.looks == 3
    short = Integrity(**{**options, "updates": 3}).apply(tiny_sd)
    assert all(torch.equal(p, short.parameters("full")[n]) for n, p in erased.parameters("full").items())


def test_a_model_of_the_world_at_large_needs_a_judge_to_stop(tiny_sd):
    with pytest.raises(BadInput, match="say how to see the concept"):
        Integrity(concepts="star", stop_at=0.1, **SHORT).apply(tiny_sd)


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"forget": "erase"}, "unknown forget 'erase'"),
        ({"templates": "a photo"}, "needs {concept}"),
        ({"anchors": "star"}, "its own anchor"),
        ({"anchors": "circle", "forget": "ascent"}, "anchors go with"),
        ({"saliency": 1.5}, "saliency must be more than 0 and at most 1"),
        ({"stop_at": 1.0}, "stop_at must be at least 0 and less than 1"),
        ({"preserve": "star"}, "both erased and preserved"),
    ],
)
def test_bad_settings_get_one_sentence(wrong, words):
    with pytest.raises(BadInput, match=words):
        Integrity(**{"concepts": "star", **wrong})
