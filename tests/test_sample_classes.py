"""``sfumato sample`` with models of classes, and ``sfumato train`` of the pixel recipes on the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato import cli
from sfumato.files import GENERATED, read_png_metadata
from sfumato.nets import ResidualUViT
from sfumato.noise import Cosine, GaussianProcess
from sfumato.pipeline import ImageModel

TINY = ["--size", "8", "--channels", "8", "16", "--kinds", "res", "transformer", "--blocks", "1", "--middle", "1",
        "--head-dim", "8", "--embedding", "16"]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    net = ResidualUViT(8, 3, 2, channels=(8, 16), kinds=("res", "transformer"), blocks=(1,), middle=1, head_dim=8)
    torch.nn.init.normal_(net.exit.weight)
    defaults = {"sampling_steps": 3, "cfg_scale": 2.0, "cfg_interval": (-3.0, 3.0)}
    made = ImageModel(net.eval(), GaussianProcess(Cosine()), "v", (3, 8, 8), ("cat", "dog"), defaults)
    return made, str(made.save(tmp_path_factory.mktemp("models") / "classes"))


def run(folder, model, *args: str) -> int:
    return cli.main(["sample", *args, "--model", model, "--out", str(folder), "--device", "cpu"])


def test_classes_by_name(model, tmp_path):
    made, path = model
    out = tmp_path / "pictures"
    assert run(out, path, "dog", "cat", "--seeds", "3-4") == 0
    assert sorted(p.name for p in out.glob("0*.png")) == [
        "000-dog-seed3.png", "001-dog-seed4.png", "002-cat-seed3.png", "003-cat-seed4.png",
    ]  # fmt: skip
    expected = made.draw("dog", 4)[0].permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(Image.open(out / "001-dog-seed4.png")) / 255 - expected).max() <= 2 / 255
    about = read_png_metadata(out / "001-dog-seed4.png")
    assert (about["prompt"], about["seed"], about["sampling_steps"], about["scheduler"]) == ("dog", "4", "3", "ddpm")
    assert about["Source"] == GENERATED and about["model-sha256"] == made.describe()["sha256"]
    record = json.loads((out / "sample.json").read_text())
    assert record["cfg_scale"] == 2.0 and record["cfg_interval"] == [-3.0, 3.0] and record["prompts"] == ["dog", "cat"]


def test_no_class_is_unconditional(model, tmp_path):
    made, path = model
    assert run(tmp_path / "p", path, "--seeds", "0-11", "--steps", "2", "--scheduler", "heun") == 0
    assert len(list((tmp_path / "p").glob("0*.png"))) == 12
    expected = made.draw(None, 7, sampling_steps=2, scheduler="heun")[0].permute(1, 2, 0).numpy()
    found = np.asarray(Image.open(tmp_path / "p" / "007-picture-seed7.png")) / 255
    assert np.abs(found - expected).max() <= 2 / 255
    assert "cfg_scale" not in read_png_metadata(tmp_path / "p" / "007-picture-seed7.png")
    assert Image.open(tmp_path / "p" / "sheet.png").size == (8 * 132 + 4, 2 * 132 + 4)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["dgo"], "did you mean dog"),
        (["dog", "--negative-prompt", "cta"], "did you mean cat"),
        (["dog", "--size", "16"], "one size"),
        (["dog", "--steps", "0"], "--sampling-steps must be at least 1"),
        (["dog", "--scheduler", "euler"], "euler"),
    ],
)
def test_bad_requests(model, tmp_path, capsys, args, told):
    assert run(tmp_path / "p", model[1], *args) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_samplers_of_pixel_models_are_refused_for_text(tiny_sd, tmp_path, capsys):
    path = str(tiny_sd.save(tmp_path / "text"))
    assert run(tmp_path / "p", path, "star", "--scheduler", "heun") == 2
    assert "unknown scheduler 'heun'" in capsys.readouterr().err
    assert run(tmp_path / "p", path) == 2
    assert "at least one prompt" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["erase uce --concept star"])
def test_other_verbs_refuse_models_without_text(model, tmp_path, capsys, verb):
    assert cli.main([*verb.split(), "--model", model[1], "--out", str(tmp_path / "x")]) == 2
    told = "UCE does not fit this ImageModel, which draws pictures without text: erasers that fit it are sfd"
    assert told in capsys.readouterr().err


def test_train_and_sample_from_the_command_line(tmp_path, capsys):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    import io

    images = []
    for i in range(6):
        stream = io.BytesIO()
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(stream, "PNG")
        images.append({"bytes": stream.getvalue(), "path": None})
    table = pa.table({"image": images, "label": [0, 1] * 3, "name": ["dark", "light"] * 3})
    pq.write_table(table, tmp_path / "data.parquet")
    out = tmp_path / "run"
    args = ["train", "sid2", "--data", str(tmp_path / "data.parquet"), "--out", str(out)]
    args += ["--updates", "2", "--batch", "2"]
    assert cli.main([*args, *TINY, "--sampling-steps", "2", "--cfg-scale", "2", "--cfg-interval", "-1", "3"]) == 0
    assert run(tmp_path / "p", str(out / "model"), "light", "--seeds", "0-1") == 0
    record = json.loads((tmp_path / "p" / "sample.json").read_text())
    assert record["cfg_interval"] == [-1.0, 3.0] and record["sampling_steps"] == 2


def test_presets_on_the_command_line(capsys):
    assert cli.main(["train", "sid2", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "imagenet-512" in shown and "small-cifar10" in shown and "--cfg-interval" in shown
    assert cli.main(["train", "simple-diffusion", "--preset", "imagenet", "--out", "x"]) == 2
    assert "did you mean imagenet-512-uvit" in capsys.readouterr().err
