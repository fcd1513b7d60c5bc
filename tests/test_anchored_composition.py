"""Anchored composition: who may be learned, where a walk begins, and that no picture leaves without its mark."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.customize.anchored_composition import AnchoredComposition, even_weights, joint_loss
from sfumato.customize.parts.anchor import begin, compose, verify
from sfumato.edit import GradSAM
from sfumato.edit.base import Given
from sfumato.errors import BadInput
from sfumato.pipeline import customization, load
from sfumato.pipeline import watermark as marks
from sfumato.pipeline.customization import Customization, attach

PICTURES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TWO = {
    **AnchoredComposition.EXAMPLE, "words": ("<m1>", "<m2>"), "classes": ("star", "circle"),
    "origins": ("synthetic", "licensed"), "statements": ("rendered", "CC0, of its author"),
}  # fmt: skip
TOLD = {"<m1>": {"class": "star", "origin": "synthetic", "statement": "rendered"}}
QUICK = {"sampling_steps": 4, "cfg_scale": 1.0}


@pytest.fixture
def made(tiny_sd):
    """A pipeline that knows a declared subject, without any learning."""
    width = tiny_sd.pipe.text_encoder.get_input_embeddings().weight.shape[1]
    return attach(tiny_sd, [Customization({"<m1>": (torch.ones(1, width),)}, marked=TOLD)])


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"origins": ()}, "declare"), ({"statements": ()}, "declare"), ({"origins": ("found", "synthetic")}, "origin"),
        ({"origins": ("synthetic",)}, "one for each"), ({"statements": ("rendered", " ")}, "empty"),
        ({"classes": ("star", "star")}, "mixes"), ({"classes": ()}, "class"),
    ],
)  # fmt: skip
def test_a_subject_without_a_declared_origin_is_refused(tiny_sd, settings, wrong):
    with pytest.raises(BadInput, match=wrong):
        AnchoredComposition(**{**TWO, **settings}).learn(tiny_sd, PICTURES, ["a star", "a circle"])


def test_prompts_name_subjects_before_their_nouns(tiny_sd):
    method = AnchoredComposition(**TWO)
    said = method.texts(tiny_sd, ["a <m1>", "a red circle", "a star on a circle", "<m2> circle on a star"])
    assert said == [["a <m1> star"], ["a red <m2> circle"], ["a <m1> star on a <m2> circle"], ["<m2> circle on a star"]]
    with pytest.raises(BadInput, match="names <m2>"):
        method.texts(tiny_sd, ["a <m1>", "a star"])
    with pytest.raises(BadInput, match="none of the subjects"):
        method.texts(tiny_sd, ["", "a star"])


def test_every_subject_counts_alike():
    weights = even_weights([[0], [0], [0], [1]]).double()
    torch.testing.assert_close(weights, torch.tensor([2 / 3, 2 / 3, 2 / 3, 2.0]).double())
    assert torch.equal(even_weights([[0]] * 3), torch.ones(3))
    pred, target = torch.rand(2, 4, 3, 3, 3).double().unbind()
    rows = (pred - target).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(joint_loss(pred, target, weights), (rows[:3].mean() + rows[3]) / 2)
    torch.testing.assert_close(joint_loss(pred, target, torch.ones(4)), (pred - target).square().mean())


def test_declarations_travel_with_what_was_learned(tiny_sd, tmp_path):
    learned = AnchoredComposition(**TWO).learn(tiny_sd, PICTURES, ["a star", "a circle"])
    assert set(learned.words) == {"<m1>", "<m2>"} and learned.marked["<m2>"]["origin"] == "licensed"
    customization.save(tmp_path / "two.safetensors", learned, tiny_sd)
    back = customization.load(tmp_path / "two.safetensors", tiny_sd)
    assert back.marked == learned.marked and "marked" not in tiny_sd.defaults
    knows = attach(tiny_sd, [back])
    for one in (knows, knows.copy(), knows.merged()):
        assert one.defaults["marked"] == learned.marked


def test_all_that_it_draws_is_marked_whatever_is_asked(made, tmp_path):
    made.save(tmp_path / "made")
    record = json.loads((tmp_path / "made" / "sfumato.json").read_text())
    assert "<m1>" in json.dumps(record)
    for pipe in (made, load(tmp_path / "made", "cpu")):
        drawn = pipe.draw(["a <m1> star", "art"], [3, 4], sampling_steps=2)
        numbers = marks.payloads(TOLD, ["a <m1> star", "art"], [3, 4], 16)
        for x, number in zip(drawn, numbers, strict=True):
            found = marks.read(marks.as_levels(x))
            assert found.payload == number and found.marked
    with pytest.raises(BadInput, match="no gradient"):
        made.draw("art", 0, grad=True)
    with pytest.raises(BadInput, match="no latents"):
        made.trajectory("art", 0, sampling_steps=2, stop_after=1)
    with pytest.raises(BadInput, match="do not mark"):
        GradSAM().check(made, Given(("art",), (0,), PICTURES))


def test_where_a_walk_begins(made):
    anchor, n = PICTURES[0], 4
    z = made.encode_image(anchor[None] * 2 - 1)
    (raw, t), scheduler = begin(made, anchor, 0.5, "raw", n)
    assert torch.equal(raw, z) and scheduler == "ddim"
    (back, t_back), _ = begin(made, anchor, 0.5, "inverted", n)
    assert t == t_back and 0 < t < 1 and not torch.equal(back, z)
    start, scheduler = begin(made, anchor, 0.5, "noised", n)
    assert torch.equal(start.pictures[0], anchor) and start.strength == 0.5 and scheduler is None
    for strength in (0.0, 0.1, 1.5):
        with pytest.raises(BadInput, match="strength"):
            begin(made, anchor, strength, "noised", n)
    with pytest.raises(BadInput, match="square"):
        begin(made, anchor[:, :8], 0.5, "noised", n)


def test_an_inverted_anchor_comes_back(tiny_sd):
    z, off, empty = tiny_sd.encode_image(PICTURES[:1] * 2 - 1), [], tiny_sd.unconditional(1)
    for n in (8, 32):
        start, _ = begin(tiny_sd, PICTURES[0], 0.5, "inverted", n)
        back, _ = tiny_sd.trajectory(None, 0, cond=empty, sampling_steps=n, stop_after=n, start=start, cfg_scale=1.0)
        off.append(float((back - z).norm() / z.norm()))
    assert off[1] < off[0] / 2  # first order: the fourth part, once steps are small


@pytest.mark.parametrize("mode", ["noised", "raw", "inverted"])
def test_composed_pictures_say_where_they_are_from(made, tmp_path, mode):
    first, second = compose(made, PICTURES[0], "a <m1> star", [0, 1], mode=mode, **QUICK)
    assert first.payload != second.payload and first.manifest["subjects"] == TOLD
    first.save(tmp_path / "one.png")
    report = verify(tmp_path / "one.png")
    assert report.watermark.payload == first.payload and report.agree and report.watermark.marked
    assert report.manifest == first.manifest == json.loads((tmp_path / "one.json").read_text())
    Image.open(tmp_path / "one.png").convert("RGB").save(tmp_path / "bare.bmp")
    bare = verify(tmp_path / "bare.bmp")
    assert bare.manifest is None and bare.agree is None and bare.watermark.payload == first.payload


def test_no_picture_leaves_without_its_mark(made, tmp_path, monkeypatch):
    (one,) = compose(made, PICTURES[0], "a <m1> star", 0, **QUICK)
    broken = type(one)(one.pixels, one.payload ^ 1, one.manifest, one.png)
    with pytest.raises(marks.MarkFailed):
        broken.save(tmp_path / "one.png")
    other = type(one)(one.pixels, one.payload, {**one.manifest, "seed": 9}, one.png)
    with pytest.raises(marks.MarkFailed, match="metadata"):
        other.save(tmp_path / "one.png")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(marks, "_picture", lambda c, shape: np.zeros(tuple(shape)))  # embeds nothing
    with pytest.raises(marks.MarkFailed):
        made.draw("a <m1> star", 0, sampling_steps=2)
    with pytest.raises(marks.MarkFailed):
        compose(made, PICTURES[0], "a <m1> star", 0, **QUICK)


def test_what_cannot_be_composed(tiny_sd, made):
    with pytest.raises(BadInput, match="no declared subject"):
        compose(tiny_sd, PICTURES[0], "a star", 0, **QUICK)
    with pytest.raises(BadInput, match="names no subject"):
        compose(made, PICTURES[0], "a star", 0, **QUICK)
