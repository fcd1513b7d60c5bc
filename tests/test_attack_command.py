"""`sfumato attack` with a tiny pipeline: what the attack is given, and what is written of it."""

import json

import pytest
import torch

from sfumato import catalog, cli
from sfumato.attack.parts.denoising import target_pictures
from sfumato.data.cases import AttackCases
from sfumato.files import read_png_metadata, save_png
from test_detectors import clip  # noqa: F401, a fixture

QUICK = ["--updates", "1", "--batch", "2", "--n-images", "2", "--init-word", "art", "--templates", "a {}"]


@pytest.fixture(scope="module")
def model(tiny_sd, tmp_path_factory):
    return str(tiny_sd.save(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    from transformers import ViTConfig, ViTForImageClassification

    labels = {0: "star", 1: "circle"}
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8,
        id2label=labels, label2id={label: i for i, label in labels.items()},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("classifier")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ViTForImageClassification(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 16, "width": 16}}))
    return str(folder)


def attack(model, *args):
    common = ["--model", model, "--concept", "star", "--device", "cpu", *QUICK]
    return cli.main(["attack", "concept-inversion", *common, *args])


def test_pictures_of_the_cases_are_drawn_judged_and_kept(model, classifier, tmp_path, capsys):
    out, asked = tmp_path / "attack", ["--prompts", "a {concept}", "a red {concept}", "--n", "3"]
    assert attack(model, "--original", model, "--detector", classifier, *asked, "--out", str(out)) == 0
    record = json.loads((out / "attack.json").read_text())
    assert [p["prompt"] for p in record["pictures"]] == ["a star", "a red star", "a star"]
    seen = sum(p["shows it"] for p in record["pictures"])
    assert f"'star' is seen in {seen} of 3 pictures" in capsys.readouterr().out
    assert record["budget"]["updates"] == 1 and record["seconds"] > 0 and record["word"] == "<v0>"
    assert sorted(f.name for f in out.glob("*.png")) == ["000.png", "001.png", "002.png"]
    assert read_png_metadata(out / "000.png")["concept"] == "star"


def test_pictures_to_learn_from_may_come_from_a_folder_and_nobody_need_judge(model, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    asked = ["--prompts", "a {concept}", "--n", "2"]
    assert attack(model, "--original", model, *asked, "--out", str(first)) == 0
    (first / "attack.json").rename(tmp_path / "attack.json")
    assert attack(model, "--images", str(first), *asked, "--out", str(second)) == 0
    assert [p["shows it"] for p in json.loads((second / "attack.json").read_text())["pictures"]] == [None, None]
    assert "is seen in" not in capsys.readouterr().out
    assert attack(model, *asked, "--out", str(tmp_path / "third")) == 2
    assert "give --original MODEL, or --images FOLDER" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


def test_a_clip_is_told_what_else_pictures_may_show(model, clip, tmp_path, capsys):  # noqa: F811
    asked = ["--original", model, "--detector", str(clip), "--prompts", "a {concept}", "--n", "1"]
    assert attack(model, *asked, "--out", str(tmp_path / "none")) == 2
    assert "name some to retain" in capsys.readouterr().err
    assert attack(model, *asked, "--retain", "star", "--out", str(tmp_path / "none")) == 2
    assert attack(model, *asked, "--retain", "circle", "square", "--out", str(tmp_path / "out")) == 0
    assert "is seen in" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["p4d", "ring-a-bell"])
def test_an_original_that_is_named_is_given_beside_pictures(name, model, classifier, tmp_path, monkeypatch):
    """P4D compares with its predictions, and Ring-A-Bell reads its text encoder, wherever the pictures come from."""
    given, pictures, out = [], tmp_path / "images", tmp_path / "out"
    pictures.mkdir()
    save_png(pictures / "0.png", torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(0)).numpy(), {})
    cls, settings = catalog.get(name, "attack").load(), {"p4d": ["--tokens", "2", "--updates", "1"]}
    quick = settings.get(name, ["--tokens", "2", "--population", "4", "--generations", "2"])
    search = cls.search

    def watched(attack, pipe, cases, means):
        given.append((means.original, cases.pictures))
        return search(attack, pipe, cases, means)

    monkeypatch.setattr(cls, "search", watched)
    asked = ["--model", model, "--concept", "star", "--device", "cpu", "--prompts", "a {concept}", "--n", "1"]
    asked += ["--detector", classifier, "--images", str(pictures), "--out", str(out)]
    assert cli.main(["attack", name, *asked, *quick, "--original", model]) == 0
    ((original, learned),) = given
    assert original is not None and learned.shape == (1, 3, 16, 16)
    assert torch.equal(target_pictures(AttackCases("star", [], learned), original, [0, 1]), learned[[0, 0]])
