"""Anchored composition: who may be learned, where a walk begins, and that no picture leaves without its mark."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image

from sfumato import cli
from sfumato.attribute.parts.workflow import Part, Workflow, drawn
from sfumato.customize.anchored_composition import AnchoredComposition, even_weights, joint_loss
from sfumato.customize.parts import anchor as anchoring
from sfumato.customize.parts.anchor import _png, begin, compose, verify
from sfumato.edit import GradSAM
from sfumato.edit.base import Given
from sfumato.errors import BadInput
from sfumato.pipeline import customization, load, wrap
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
        ({"words": ("s1", "s10")}, "s1 stands inside of s10"),
    ],
)  # fmt: skip
def test_a_subject_without_a_declared_origin_is_refused(tiny_sd, settings, wrong):
    with pytest.raises(BadInput, match=wrong):
        AnchoredComposition(**{**TWO, **settings}).learn(tiny_sd, PICTURES, ["a star", "a circle"])


def test_prompts_name_subjects_before_their_nouns(tiny_sd):
    method = AnchoredComposition(**TWO)
    said = method.texts(tiny_sd, ["a <m1>", "a red circle", "a star on a circle", "<m2> circle on a star"])
    assert said == [["a <m1> star"], ["a red <m2> circle"], ["a <m1> star on a <m2> circle"], ["<m2> circle on a star"]]
    assert method.told("a <m1> star on a <m1>") == ("a <m1> star on a <m1> star", [0])
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


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_pictures_of_the_pipelines_own_call_are_marked_as_draws_are(made, kind):
    prompts, many = ["a <m1> star", "art"], [torch.Generator().manual_seed(s) for s in (3, 4)]
    out = made(prompts, num_inference_steps=2, output_type=kind, generator=many)
    assert type(out.images) is {"pil": list, "np": np.ndarray, "pt": torch.Tensor}[kind]
    for x, number in zip(out.images, marks.payloads(TOLD, prompts, [3, 4], 16), strict=True):
        x = x.permute(1, 2, 0).numpy() if kind == "pt" else np.asarray(x)
        found = marks.read(x if x.dtype == np.uint8 else (255 * x).round().astype(np.uint8))
        assert found.payload == number and found.marked
    (one, two), *_ = made("art", num_images_per_prompt=2, num_inference_steps=1, return_dict=False)
    first, second = (verify(np.asarray(x)).watermark for x in (one, two))
    assert first.marked and second.marked and first.payload != second.payload


def test_the_pipelines_own_call_gives_no_latents_and_nothing_that_could_not_be_marked(made, monkeypatch):
    for given in ({"output_type": "latent"}, {"output_type": None}):
        with pytest.raises(BadInput, match="marked pictures only"):
            made("art", num_inference_steps=1, **given)
    monkeypatch.setattr(marks, "_picture", lambda c, shape: np.zeros(tuple(shape)))  # embeds nothing
    with pytest.raises(marks.MarkFailed):
        made("art", num_inference_steps=1)


def test_with_a_controlnet_pictures_are_marked_too(made):
    network = ControlNetModel.from_unet(made.network, conditioning_embedding_out_channels=(8, 8)).eval()
    given = {"image": PICTURES[:1], "num_inference_steps": 1, "height": 16, "width": 16}
    grey, controlled = Image.new("RGB", (16, 16)), made.with_control(network)
    with torch.no_grad():
        assert verify(np.asarray(controlled("art", **given).images[0])).watermark.marked
        with pytest.raises(BadInput, match="marked pictures only"):
            controlled("art", output_type="latent", **given)
    assert wrap(controlled, controlled=True).defaults["marked"] == TOLD
    dark = Part(name="dark", kind="python", apply=lambda s: replace(s, after=(lambda x: x / 2,)))
    depth = Part(name="depth", kind="python", apply=lambda s: replace(s, control=(network, grey, 1.0)))
    flow = Workflow(model=made, prompt="art", parts=(dark, depth), seeds=(3,), sampling_steps=2, size=16)
    for alliance in range(4):
        found = marks.read(marks.as_levels(drawn(flow, alliance, [3])[0]))
        assert found.marked and [found.payload] == marks.payloads(TOLD, ["art"], [3], 16)


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
    for wrong, told in ((anchor * 255, "by 255"), (anchor - 0.5, "by 255"), (anchor * float("nan"), "anchor.*finite")):
        with pytest.raises(BadInput, match=told):
            compose(made, wrong, "a <m1> star", 0, **QUICK)


def test_an_inverted_anchor_comes_back(tiny_sd):
    z, off, empty = tiny_sd.encode_image(PICTURES[:1] * 2 - 1), [], tiny_sd.unconditional(1)
    for n in (8, 32):
        start, _ = begin(tiny_sd, PICTURES[0], 0.5, "inverted", n)
        back, _ = tiny_sd.trajectory(None, 0, cond=empty, sampling_steps=n, stop_after=n, start=start, cfg_scale=1.0)
        off.append(float((back - z).norm() / z.norm()))
    assert off[1] < off[0] / 2  # first order: the fourth part, once steps are small


def test_an_adapter_whose_gate_is_shut_takes_no_part_in_the_inversion(tiny_sd):
    pipe, rng = tiny_sd.copy(), torch.Generator().manual_seed(0)
    bare = begin(pipe, PICTURES[0], 0.5, "inverted", 4)[0][0]
    adapter = pipe.add_adapter("other", rank=2, alpha=20.0, generator=rng)
    for up in adapter.up.values():
        torch.nn.init.normal_(up, std=0.3, generator=rng)
    assert not torch.allclose(begin(pipe, PICTURES[0], 0.5, "inverted", 4)[0][0], bare, rtol=1e-2)
    adapter.gate = lambda cond: torch.zeros(len(cond))
    torch.testing.assert_close(begin(pipe, PICTURES[0], 0.5, "inverted", 4)[0][0], bare, rtol=1e-5, atol=1e-6)


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


def test_what_is_verified_is_a_picture():
    for pixels in (np.zeros((16, 16, 3)), np.zeros((16, 16), np.uint8), np.zeros((16, 16, 4), np.uint8)):
        with pytest.raises(BadInput, match="in uint8"):
            verify(pixels)


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


@pytest.fixture
def subject(made, tmp_path):
    """Folders of a model that knows a subject and of pictures, and the words that compose with them."""
    made.save(tmp_path / "made")
    Image.fromarray((PICTURES[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)).save(tmp_path / "anchor.png")
    given = ["--model", str(tmp_path / "made"), "--anchor", str(tmp_path / "anchor.png"), "--steps", "4"]
    return ["compose", "a <m1> star", *given, "--device", "cpu", "--out", str(tmp_path / "out")]


def test_the_command_writes_marked_pictures_only(made, subject, tmp_path, capsys):
    assert cli.main([*subject, "--seeds", "0,3", "--cfg-scale", "1", "--captured"]) == 0
    out = tmp_path / "out"
    names = ["000-a-m1-star-seed0", "001-a-m1-star-seed3"]
    assert sorted(f.name for f in out.iterdir()) == sorted([f"{n}{s}" for n in names for s in (".png", ".json")]
                                                           + ["compose.json"])  # fmt: skip
    anchor = torch.from_numpy(np.array(Image.open(tmp_path / "anchor.png"))).permute(2, 0, 1) / 255
    direct = compose(made, anchor, "a <m1> star", [0, 3], captured=True, **QUICK)
    for name, one in zip(names, direct, strict=True):
        found = verify(out / f"{name}.png")
        assert found.watermark.marked and found.agree and found.watermark.payload == one.payload
        assert found.manifest["digital_source_type"].endswith("compositeWithTrainedAlgorithmicMedia")
        assert np.abs(np.asarray(Image.open(out / f"{name}.png")).astype(int) - one.pixels).max() <= 1
    record = json.loads((out / "compose.json").read_text())
    assert record["subjects"] == TOLD and record["pictures"][f"{names[1]}.png"] == direct[1].payload
    capsys.readouterr()
    pictures = [str(out / f"{name}.png") for name in names]
    assert cli.main(["verify", *pictures]) == 0
    told = capsys.readouterr().out
    assert f"mark {direct[1].payload} " in told and told.count("of <m1> name the same number") == 2
    assert "2 pictures marked" in told


def test_pictures_without_a_mark_or_with_two_are_told(made, tmp_path, capsys):
    (one,) = compose(made, PICTURES[0], "a <m1> star", 0, **QUICK)
    one.save(tmp_path / "one.png")
    Image.fromarray(one.pixels).save(tmp_path / "bare.png")
    Image.fromarray(np.full((16, 16, 3), 128, np.uint8)).save(tmp_path / "grey.png")
    ramp = np.linspace(40, 200, 64).astype(np.uint8)
    pixels = marks.embed(np.stack([ramp[None] + ramp[:, None] // 4] * 3, axis=-1), 77)
    Image.fromarray(pixels).resize((128, 128), Image.Resampling.BICUBIC).save(tmp_path / "large.png")
    (tmp_path / "other.png").write_bytes(_png(marks.embed(one.pixels, one.payload ^ 1), one.manifest))
    assert cli.main(["verify", str(tmp_path / "bare.png")]) == 0
    assert "no metadata" in capsys.readouterr().out
    for name, told in (("grey", "no mark"), ("other", "name another number")):
        assert cli.main(["verify", str(tmp_path / "one.png"), str(tmp_path / f"{name}.png")]) == 1
        found = capsys.readouterr()
        assert told in found.out and f"{name}.png" in found.err and "one.png" not in found.err
    assert cli.main(["verify", str(tmp_path / "large.png"), "--size", "64", "64"]) == 0
    assert "mark 77 " in capsys.readouterr().out
    assert cli.main(["verify", str(tmp_path / "gone.png")]) == 2
    assert cli.main(["verify", str(tmp_path / "one.png"), "--size", "0", "16"]) == 2


@pytest.mark.parametrize("verb", [["sample"], ["steer", "faster-diffusion"]])
def test_no_command_that_draws_leaves_a_picture_without_its_mark(made, tmp_path, verb):
    made.save(tmp_path / "made")
    asked = ["--model", str(tmp_path / "made"), "--seeds", "0-1", "--steps", "4", "--device", "cpu"]
    assert cli.main([*verb, "a <m1> star", *asked, "--out", str(tmp_path / "out")]) == 0
    pictures = list((tmp_path / "out").rglob("*.png"))
    assert len(pictures) == 2 and not list((tmp_path / "out").rglob("*.html"))
    assert all(verify(picture).watermark.marked for picture in pictures)


def test_the_command_writes_nothing_where_a_mark_is_not_read_back(subject, tmp_path, monkeypatch, capsys):
    true = anchoring.verify

    def blind(picture, size=None):
        """Reads back what is in memory, and nothing from the folder."""
        found = true(picture, size)
        return found if isinstance(picture, bytes) else type(found)(found.watermark, None, None)

    monkeypatch.setattr(anchoring, "verify", blind)
    assert cli.main(subject) == 1
    assert "nothing was written" in capsys.readouterr().err
    assert sorted(f.name for f in tmp_path.iterdir()) == ["anchor.png", "made"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--strength", "0"], "strength"), (["--anchor", "gone.png"], "no file"), (["--mode", "mixed"], "mode"),
        (["--model", "sketch"], "knows no declared subject"), ([], "names no subject"),
    ],
)  # fmt: skip
def test_what_the_command_cannot_compose(subject, tmp_path, capsys, given, told):
    prompt = subject[1] if given else "a star"
    assert cli.main([subject[0], prompt, *subject[2:], *given]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()
