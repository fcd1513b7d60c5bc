"""``sfumato edit``: pictures, sheets, a record, directions and a page that opens by itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from sfumato import cli
from sfumato.commands.edit import _file
from sfumato.files import read_png_metadata

SMALL = ["--steps", "4", "--moves", "2", "--stops", "1", "--iterations", "1", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tiny_sd, tmp_path_factory):
    return str(tiny_sd.save(tmp_path_factory.mktemp("models") / "tiny"))


def test_a_picture_is_edited_and_its_error_told(model, tmp_path, capsys):
    picture, out = tmp_path / "me.png", tmp_path / "out"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(picture)
    args = ["edit", "pullback", "a red star <b>", "--model", model, "--image", str(picture), *SMALL]
    assert cli.main([*args, "--analyse", "0.8", "0.3", "--direction", "0", "1", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "error of the inversion" in told and "index.html" in told
    assert sorted(f.name for f in out.glob("*.png")) == [
        "000-me-direction-0-0.png", "000-me-direction-0-minus1.png", "000-me-direction-0-plus1.png",
        "000-me-direction-1-0.png", "000-me-direction-1-minus1.png", "000-me-direction-1-plus1.png",
        "000-sheet.png",
    ]  # fmt: skip
    record = json.loads((out / "edit.json").read_text())
    assert record["method"]["name"] == "pullback" and record["told"]["errors"]["inversion"][0] > 0
    assert read_png_metadata(out / "000-me-direction-0-0.png")["stop"] == "0"
    page = (out / "index.html").read_text()
    assert "a red star &lt;b&gt;" in page and "Error of the inversion" in page and page.count('type="range"') == 2
    assert "http" not in page.replace("http-equiv", "") and "Mean frequency" in page
    again = ["edit", "pullback", "art", "--model", model, *SMALL, "--use", str(out)]
    assert cli.main([*again, "--out", str(tmp_path / "again")]) == 0
    assert cli.main([*again, "--time", "0.2", "--out", str(tmp_path / "third")]) == 2
    assert "belong to time" in capsys.readouterr().err and not (tmp_path / "third").exists()


def test_masks_lie_over_the_picture(model, tmp_path, capsys):
    picture, out = tmp_path / "place.png", tmp_path / "out"
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(picture)
    args = ["edit", "grad-sam", "a red star", "--model", model, "--subject", "star", "--steps", "4"]
    assert cli.main([*args, "--mask-step", "2", "--image", str(picture), "--out", str(out)]) == 0
    names = sorted(f.name for f in out.glob("*.png"))
    assert sum("mask-at" in name for name in names) == 1 and "000-place-same-seed-edited.png" in names
    page = (out / "index.html").read_text()
    assert page.count("data-laid") >= 1 and 'class="laid"' in page and "star at" in page
    assert cli.main([*args, "--out", str(tmp_path / "none")]) == 2
    assert "give one with --image FILE" in capsys.readouterr().err


def test_files_of_long_names_are_told_apart():
    taken = set()
    tracks, stops = ("a long direction 0", "\u72ac", "\u732b"), ("0", "+1", "\N{MINUS SIGN}1")
    parts = [(name, track, stop) for name in ("x" * 150, "\u732b") for track in tracks for stop in stops]
    names = [_file(taken, 0, *words) for words in parts] + [_file(taken, 0, "y" * 300) for _ in range(2)]
    assert len(set(names)) == len(parts) + 2 and max(map(len, names)) < 190
    assert names[0].startswith("000-xxxx") and names[0].endswith("x-a-long-direction-0-0.png")
    assert _file(taken, 1, "me", "direction 0", "+1") == "001-me-direction-0-plus1.png"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "give a picture with --image FILE, a prompt, or both"),
        (["--image", "nowhere.png"], "is no picture file"),
        (["art", "--time", "2"], "at most 1"),
        (["art", "--size", "3"], ""),
    ],
)
def test_bad_input_writes_nothing(model, tmp_path, capsys, given, told):
    args = ["edit", "pullback", "--model", model, *SMALL, "--out", str(tmp_path / "out"), *given]
    if "--size" in given:
        picture = tmp_path / "me.png"
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(picture)
        args += ["--image", str(picture)]
    assert cli.main(args) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
