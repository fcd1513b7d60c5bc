"""The script that measures models that are shown pictures, on a tiny one that knows nothing."""

from __future__ import annotations

import json

import pytest
import torch

import semantica
from sfumato.data.pictures import open_pictures
from sfumato.errors import BadInput
from sfumato.train.semantica import Semantica


def test_what_is_shown_is_of_every_class_and_never_compared_with():
    pictures = open_pictures("sketch", 8, seed=1, count=200)
    shown, rest = semantica.chosen(pictures, 2, 50, seed=0)
    labels = [pictures.label(i) for i in shown.tolist()]
    assert sorted(labels) == sorted([*range(12)] * 2)
    assert sorted(torch.cat([shown, rest]).tolist()) == list(range(200))
    assert not torch.equal(shown, semantica.chosen(pictures, 2, 50, seed=1)[0])
    with pytest.raises(BadInput, match="too few"):
        semantica.chosen(open_pictures("sketch", 8, count=20), 1, 50, seed=0)


def test_the_page_says_what_was_measured_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    recipe = Semantica(**Semantica.EXAMPLE)
    recipe.model(()).save(tmp_path / "model", provenance={"config": {"data": "sketch"}})
    few = ["--n", "24", "--n-real", "40", "--steps", "1", "--extractor", "pixels"]
    asked = [f"one={tmp_path / 'model'}", *few, "--out", str(tmp_path / "out"), "--docs", str(tmp_path / "docs")]
    semantica.main(asked)
    record = json.loads((tmp_path / "out" / "figures.json").read_text())
    copied = {name: figures["copied"] for name, figures in record["figures"].items()}
    assert copied[semantica.COPIES] == 1 and copied[semantica.REAL] < 0.3 and record["shown"] == 12
    assert record["figures"][semantica.COPIES]["consistency"] == pytest.approx(1)
    text = (tmp_path / "docs" / "semantica.md").read_text()
    assert "| one |" in text and "no FID" in text and f"{record['figures']['one']['frechet']:.4g}" in text
    assert (tmp_path / "docs" / "semantica-one.png").exists()
    monkeypatch.setattr("sfumato.pipeline.VariationModel.draw", None)
    semantica.main(asked)
    assert (tmp_path / "docs" / "semantica.md").read_text() == text


def test_models_of_another_kind_are_refused(tmp_path):
    for given in ("runs/model", "a b=runs/model"):
        with pytest.raises(BadInput, match="like pairs="):
            semantica.named([given])
