"""``sfumato steer``: what it draws is what Python draws under the patch, and it says how."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from sfumato import cli
from sfumato.files import read_png_metadata
from sfumato.steer import FasterDiffusion


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


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--keys", "1"], "must include it"),
        (["--keys", "0", "9"], "key step 9 is out of range"),
        (["--every", "2", "--keys", "0"], "not both"),
        (["--preset", "unifrm"], "did you mean uniform"),
    ],
)
def test_bad_input_writes_nothing(model, tmp_path, capsys, given, told):
    args = ["steer", "faster-diffusion", "art", "--model", model, "--steps", "6", "--out", str(tmp_path / "out")]
    assert cli.main([*args, *given]) == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
