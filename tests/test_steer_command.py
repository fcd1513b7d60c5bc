"""``sfumato steer``: what it draws is what Python draws under the patch, and it says how."""

from __future__ import annotations

import json
from contextlib import ExitStack

import numpy as np
import pytest
from PIL import Image

from sfumato import cli
from sfumato.commands.patches import named
from sfumato.files import read_png_metadata
from sfumato.report.steer import SteerReport, changes, render
from sfumato.steer import DECOR, FasterDiffusion, T2IZero

STEPS = ["--steps", "6", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tiny_sd, tmp_path_factory):
    return str(tiny_sd.save(tmp_path_factory.mktemp("models") / "tiny"))


def test_it_draws_under_the_patch_and_records_it(model, tiny_sd, tmp_path, capsys):
    out = tmp_path / "pictures"
    given = [
        "--model",
        model,
        "--seeds",
        "0,3",
        "--steps",
        "6",
        "--device",
        "cpu",
        "--keys",
        "0",
        "4",
        "--alpha",
        "0.1",
    ]
    assert cli.main(["steer", "faster-diffusion", "a red star", "art", *given, "--out", str(out)]) == 0
    pictures = sorted(out.glob("0*.png"))
    assert len(pictures) == 4
    with FasterDiffusion(keys=(0, 4), alpha=0.1).patch(tiny_sd):
        direct = tiny_sd.draw("a red star", 3, sampling_steps=6)[0].permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(Image.open(pictures[1])) / 255.0 - direct).max() <= 1 / 255
    record = json.loads((out / "sample.json").read_text())
    assert record["method"]["name"] == "faster-diffusion" and record["method"]["configuration"]["keys"] == [0, 4]
    assert record["log"]["encoder_runs"] == 2 and record["log"]["calls"] == 6
    assert json.loads(read_png_metadata(pictures[0])["method"])["configuration"]["alpha"] == 0.1
    assert "drawn with faster-diffusion" in capsys.readouterr().out


def test_the_page_shows_plain_and_steered_on_the_same_seeds(model, tiny_sd, tmp_path, capsys):
    out, bare = tmp_path / "out", tmp_path / "bare"
    args = ["steer", "faster-diffusion", "a red <b>", "--model", model, "--seeds", "0,3", *STEPS, "--keys", "0"]
    assert cli.main([*args, "--out", str(out)]) == 0
    assert "as many without" in " ".join(capsys.readouterr().err.split())
    plain = sorted((out / "plain").glob("*.png"))
    assert [f.name for f in plain] == [f.name for f in sorted(out.glob("0*.png"))]
    direct = tiny_sd.draw("a red <b>", 3, sampling_steps=6)[0].permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(Image.open(plain[1])) / 255.0 - direct).max() <= 1 / 255
    assert "method" not in read_png_metadata(plain[0]) and read_png_metadata(plain[0])["seed"] == "0"
    page = (out / "index.html").read_text()
    assert page.count('alt="plain: ') == page.count('alt="difference: ') == page.count('alt="steered: ') == 2
    assert "a red &lt;b&gt;" in page and "<b>a" not in page and "http" not in page.replace("http-equiv", "")
    assert "<pre>" in page and "encoder_runs" in page
    assert cli.main([*args, "--no-plain", "--out", str(bare)]) == 0
    page = (bare / "index.html").read_text()
    assert 'alt="plain: ' not in page and page.count('alt="steered: ') == 2 and "were not drawn" in page
    assert not (bare / "plain").exists() and "as many without" not in " ".join(capsys.readouterr().err.split())


def test_a_neutral_patch_is_said_to_change_nothing():
    pictures = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3), dtype=np.uint8)
    other = pictures.copy()
    other[2] = 255 - other[2]
    assert changes(pictures, pictures) == [0, 0, 0] and changes(other, pictures)[2] > 0
    seconds = {"steered": 1.0, "plain": 2.0}
    page = render(SteerReport(["decor"], other, pictures, ["a", "b", "c"], {"model": "tiny"}, seconds))
    assert "2 of 3 are the same to the last level" in page


WITH = ["--with", "decor --undesired red --alpha 0.7", "--with", "t2i-zero --cbs-strength 0"]


def test_several_methods_act_in_the_order_in_which_they_are_named(model, tiny_sd, tmp_path):
    steered, sampled = tmp_path / "steered", tmp_path / "sampled"
    same = ["a red star", "--model", model, "--seeds", "3", *STEPS]
    first = ["--keys", "0", "--no-plain"]
    assert cli.main(["steer", "faster-diffusion", *same, *first, *WITH, "--out", str(steered)]) == 0
    assert cli.main(["sample", *same, "--with", "faster-diffusion --keys 0", *WITH, "--out", str(sampled)]) == 0
    asked = (FasterDiffusion(keys=(0,)), DECOR(undesired=("red",), alpha=0.7), T2IZero(cbs_strength=0.0))
    with ExitStack() as stack:
        for patch in asked:
            stack.enter_context(patch.patch(tiny_sd))
        direct = tiny_sd.draw("a red star", 3, sampling_steps=6)[0].permute(1, 2, 0).numpy()
    for out in (steered, sampled):
        assert np.abs(np.asarray(Image.open(next(out.glob("0*.png")))) / 255.0 - direct).max() <= 1 / 255
    records = [json.loads((out / "sample.json").read_text()) for out in (steered, sampled)]
    assert records[0]["method"]["name"] == "faster-diffusion"
    assert [x["name"] for x in records[0]["with"]] == ["decor", "t2i-zero"]
    assert [x["name"] for x in records[1]["with"]] == ["faster-diffusion", "decor", "t2i-zero"]
    for record in records:
        decor = next(x for x in record["with"] if x["name"] == "decor")
        assert decor["configuration"]["alpha"] == 0.7 and decor["configuration"]["undesired"] == ["red"]
        assert decor["log"] and not (steered / "plain").exists()


def test_presets_of_methods_named_with_others():
    (entry, patch), (_, other) = named(["faster-diffusion --preset uniform --alpha 0.25", "faster-diffusion"], "tiny")
    assert entry.name == "faster-diffusion" and patch.alpha == 0.25
    assert {k: getattr(patch, k) for k in FasterDiffusion.presets["uniform"] if k != "alpha"} == {
        k: v for k, v in FasterDiffusion.presets["uniform"].items() if k != "alpha"
    }
    assert other == FasterDiffusion()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--keys", "1"], "must include it"),
        (["--keys", "0", "9"], "key step 9 is out of range"),
        (["--every", "2", "--keys", "0"], "not both"),
        (["--preset", "unifrm"], "did you mean uniform"),
        (["--with", "faster-diffusion --every 2"], "asked for twice"),
        (["--with", "decr --alpha 1"], "did you mean decor"),
        (["--with", "a red star"], "prompts stand before it"),
        (["--with", "decor --alpha"], "--alpha takes"),
        (["--with", "decor --alphas 1"], "did you mean --alpha"),
        (["--with", "t2i-zero --preset papr"], "preset of --with t2i-zero"),
        (["--with", 'decor "'], "cannot be read"),
        (["--with", "decor", "--analyse"], "leave --with out"),
    ],
)
def test_bad_input_writes_nothing(model, tmp_path, capsys, given, told):
    args = ["steer", "faster-diffusion", "art", "--model", model, "--steps", "6", "--out", str(tmp_path / "out")]
    assert cli.main([*args, *given]) == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
