"""Clean data as teachers see them: latents, captions, classes, and what goes without."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato as sf
from sfumato.data.pictures import to_tensor
from sfumato.distill.multistep_cm import MultistepCM
from sfumato.distill.parts.data import FromPictures
from sfumato.errors import BadInput
from sfumato.nets import UNet
from sfumato.noise import Cosine, GaussianProcess
from sfumato.pipeline import ImageModel

WORLDS = ("sketch", "sketch-scenes")


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i, (label, text) in enumerate([("cat", "a red star"), ("dog", "a blue circle"), ("dog", "a square")]):
        file = tmp_path / "data" / label / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(file)
        file.with_suffix(".txt").write_text(text)
    return tmp_path / "data"


def model(labels=("cat", "dog")):
    network = UNet(8, 3, classes=len(labels), channels=(8, 8), layers=1, attention=())
    return ImageModel(network, GaussianProcess(Cosine()), "v", (3, 8, 8), labels)


def test_latents_are_those_of_the_teacher_and_captions_their_own(tiny_sd, folder, tmp_path):
    data = FromPictures(data=str(folder)).open_data(tiny_sd, tmp_path / "run", seed=0)
    batch = data.batch(torch.Generator().manual_seed(0), 5)
    rows = batch["rows"].tolist()
    pictures = to_tensor([data.pictures.picture(i) for i in rows])
    with torch.no_grad():
        torch.testing.assert_close(batch["x"], tiny_sd.encode_image(pictures), rtol=1e-4, atol=1e-5)
    bare = torch.tensor([True, False, False, True, False])
    cond = data.conditioning(batch["rows"], bare)
    for i, row in enumerate(rows):
        text = "" if bare[i] else data.pictures.caption(row)
        torch.testing.assert_close(cond[i].tokens, tiny_sd.encode(text).tokens)


def test_it_says_where_the_captions_come_from(tiny_sd, folder, tmp_path, capsys):
    FromPictures(data=str(folder)).open_data(tiny_sd, tmp_path / "run", seed=0, progress=True)
    assert f"captions of {folder}: " in capsys.readouterr().err


def test_latents_are_kept_for_the_same_pictures_and_autoencoder_only(tiny_sd, folder, tmp_path, monkeypatch):
    calls = []
    encode = type(tiny_sd.pipe.vae).encode
    monkeypatch.setattr(type(tiny_sd.pipe.vae), "encode", lambda self, x: calls.append(len(x)) or encode(self, x))
    fields = FromPictures(data=str(folder))
    first = fields.open_data(tiny_sd, tmp_path / "run", seed=0).latents
    again = fields.open_data(tiny_sd, tmp_path / "run", seed=0).latents
    assert torch.equal(first, again) and calls == [3]
    other = tiny_sd.copy(own="all")
    with torch.no_grad():
        other.pipe.vae.quant_conv.weight.mul_(1.5)
    assert not torch.equal(fields.open_data(other, tmp_path / "run", seed=0).latents, first)
    assert calls == [3, 3]


def test_other_rows_have_latents_of_their_own(tiny_sd, folder, tmp_path):
    fields = FromPictures(data=str(folder))
    first, rows = fields.open_data(tiny_sd, tmp_path / "run", seed=0).latents, fields.rows(tiny_sd)
    assert fields.rows(tiny_sd) == rows
    (folder / "dog" / "1.txt").write_text("a green circle")
    assert fields.rows(tiny_sd) != rows
    for suffix in ("png", "txt"):
        (folder / "dog" / f"1.{suffix}").rename(folder / "dog" / f"3.{suffix}")
    again = fields.open_data(tiny_sd, tmp_path / "run", seed=0).latents
    torch.testing.assert_close(again, first[[0, 2, 1]])


def test_a_distillation_goes_on_with_the_same_rows_only(tiny_sd, folder, tmp_path):
    method = MultistepCM(**{**MultistepCM.EXAMPLE, "teacher": tiny_sd, "data": str(folder), "grid_every": 0})
    method.run(tmp_path / "run", progress=False)
    shutil.rmtree(tmp_path / "run" / "model")
    (folder / "dog" / "1.txt").write_text("a green circle")
    with pytest.raises(BadInput, match="training holds a run with rows='3 with SHA-256"):
        method.run(tmp_path / "run", progress=False)


def test_the_sketch_world_is_told_by_what_it_is_drawn_from():
    told = {FromPictures(data=data, pictures=n).rows(model(()))["rows"] for data in WORLDS for n in (5, 10**9)}
    assert len(told) == 4


def test_only_models_of_the_sketch_world_learn_from_it_unasked(tiny_sd, tmp_path):
    for other in (model(), model(()), tiny_sd):
        with pytest.raises(BadInput, match="data=FOLDER"):
            FromPictures(pictures=5).rows(other)
        with pytest.raises(BadInput, match="data=FOLDER"):
            FromPictures(pictures=5).open_data(other, tmp_path, seed=0)
    named = FromPictures(data="sketch", pictures=5)
    assert FromPictures(pictures=5).rows(sf.load("sketch")) == named.rows(sf.load("sketch"))
    assert named.rows(tiny_sd)["rows"]


def test_classes(folder, tmp_path):
    data = FromPictures(data=str(folder), unconditional=0.5).open_data(model(), tmp_path, seed=0)
    batch = data.batch(torch.Generator().manual_seed(0), 400)
    assert 0.4 < batch["bare"].float().mean() < 0.6
    assert batch["x"].shape == (400, 3, 8, 8) and batch["x"].min() >= -1
    labels = data.conditioning(batch["rows"], batch["bare"])
    expected = [2 if bare else min(row, 1) for row, bare in zip(batch["rows"].tolist(), batch["bare"], strict=True)]
    assert labels.numbers.tolist() == expected
    plain = FromPictures(data=str(folder)).open_data(model(()), tmp_path, seed=0)
    assert plain.conditioning(batch["rows"], batch["bare"]) is None


def test_bad_input(folder, tmp_path):
    with pytest.raises(BadInput, match="knows the classes bird, cat; these pictures have cat, dog"):
        FromPictures(data=str(folder)).open_data(model(("bird", "cat")), tmp_path, seed=0)
    with pytest.raises(BadInput, match="unconditional must be at least 0 and at most 1"):
        FromPictures(data=str(folder), unconditional=2).open_data(model(), tmp_path, seed=0)
    with pytest.raises(BadInput, match="no pictures"):
        FromPictures(data=str(tmp_path / "nothing")).open_data(model(), tmp_path, seed=0)
