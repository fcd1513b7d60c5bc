"""The script that draws bits against distortion and realism."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import compression_curves as script
from real_pictures import PHOTOGRAPHS
from sfumato.train.hfd import HFD


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine").mkdir()
    for i in range(2):
        small = np.random.default_rng(i).integers(0, 256, (12, 14, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((140, 96), Image.Resampling.BICUBIC)
        picture.save(tmp_path / "mine" / f"{i}.png")
    return tmp_path / "mine"


def test_patches_are_squares_of_the_picture():
    x = torch.arange(3 * 70 * 100.0).reshape(1, 3, 70, 100)
    found = script.patches(x)
    assert found.shape == (6, 3, 32, 32)
    assert torch.equal(found[4], x[0, :, 32:64, 32:64])


def test_more_bits_are_less_distortion(folder):
    pictures = script.gathered(folder)
    for kind in script.QUALITIES:
        low, high = (script.measured(script.classic(kind, q), pictures)[0] for q in (5, 90))
        assert low["bpp"] < high["bpp"] and low["PSNR"] < high["PSNR"] and low["distance"] > high["distance"]


def test_curves_and_page(folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("constriction", reason="pip install 'sfumato[compress]'")
    pytest.importorskip("matplotlib", reason="pip install 'sfumato[plots]'")
    torch.manual_seed(0)
    model = HFD(**HFD.EXAMPLE).model(())
    model.codec.freeze()
    model.save(tmp_path / "model")
    monkeypatch.setattr(script, "QUALITIES", {"JPEG": (20, 60)})
    arguments = ["--models", str(tmp_path / "model"), "--pictures", str(folder), "--sampling-steps", "1"]
    places = ["--out", str(tmp_path / "out"), "--docs", str(tmp_path / "docs"), "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["compression_curves.py", *arguments, *places])
    script.main()
    found = json.loads((tmp_path / "out" / "curves.json").read_text())["curves"]
    assert found.keys() == {"JPEG", "squared error", "HFD"}
    assert found["HFD"][0]["bpp"] == found["squared error"][0]["bpp"] > 0
    assert "| JPEG |" in (tmp_path / "docs" / "compression.md").read_text()
    assert (tmp_path / "docs" / "compression.png").stat().st_size > 1000
    page = (tmp_path / "docs" / "compression.md").read_text()
    assert "model, which does not say how it was made" in page and str(tmp_path) not in page
    assert [[p.get("shown", False) for p in found[name]].count(True) for name in found] == [1, 1, 1]
    sheet = np.asarray(Image.open(tmp_path / "docs" / "compression-pictures.png"))
    due = script.contact_sheet(np.zeros((8, script.SIDE, script.SIDE, 3), np.uint8), 4)
    assert sheet.shape == due.shape
    first = script.middle(script.tensor(script.gathered(folder)[0]))
    assert (sheet[4 : 4 + script.SIDE, 4 : 4 + script.SIDE] == first).all()


def test_squares_of_other_photographs(tmp_path, monkeypatch):
    """Each large picture is brought down to four squares a side and cut; what is measured on is none of them."""
    (tmp_path / "nature").mkdir()
    wide = np.random.default_rng(0).integers(0, 256, (600, 2048, 3), dtype=np.uint8)
    Image.fromarray(wide).save(tmp_path / "nature" / "wide.png")
    Image.fromarray(wide[:300, :520]).save(tmp_path / "nature" / "small.png")
    monkeypatch.setattr(script, "packaged", lambda package, name: None)
    monkeypatch.setattr(script, "NATURE", tmp_path / "nature")
    assert script.others(tmp_path / "cut") == 6
    names = {file.stem for file in (tmp_path / "cut").iterdir()}
    assert names == {"small-0-0", "small-0-256", "wide-0-0", "wide-0-256", "wide-0-512", "wide-0-768"}
    assert (np.asarray(Image.open(tmp_path / "cut" / "small-0-256.png")) == wide[:256, 256:512]).all()
    learned = {Path(name).stem for name in script.OTHERS}
    assert not learned & {Path(name).stem for _, name in PHOTOGRAPHS}


def test_without_photographs_nothing_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "photographs", list)
    monkeypatch.setattr("sys.argv", ["compression_curves.py", "--models", "none", "--out", str(tmp_path / "out")])
    script.main()
    assert "no photographs here" in capsys.readouterr().out and not (tmp_path / "out").exists()
