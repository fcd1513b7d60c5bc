"""What suits a model is found by one rule, from Python and on the command line: settings, and words to preserve."""

import json

import pytest
import torch

from sfumato import catalog, cli
from sfumato.commands import erase as erase_command
from sfumato.commands.verb import read
from sfumato.data.world import WORDS
from sfumato.erase import RECE, UCE, ESDu, ESDx
from sfumato.errors import BadInput
from sfumato.pipeline import load_text2image, origin_of
from sfumato.settings import Tuned


@pytest.fixture(scope="module")
def sketch():
    return load_text2image("sketch", "cpu")


@pytest.fixture(scope="module")
def erased(tmp_path_factory):
    """Written by the command, with all its own choices."""
    out = tmp_path_factory.mktemp("erased") / "erased"
    assert cli.main(["erase", "rece", "--concept", "star", "--out", str(out), "--device", "cpu"]) == 0
    return out


@pytest.mark.parametrize("method", catalog.METHODS, ids=lambda m: m.name)
def test_every_method_can_be_asked(method, tiny_sd):
    cls = method.load()
    assert issubclass(cls, Tuned)
    assert cls.settings_for(tiny_sd) == cls.settings_for(None) == {}
    assert cls.settings_for("sketch") == dict(cls.presets.get("sketch", {}))
    assert cls.settings_for("sketch-dit") == dict(cls.presets.get("sketch-dit", cls.presets.get("sketch", {})))


def test_the_embedded_model_knows_its_name_and_what_is_made_from_it_too(sketch, erased, tiny_sd, tmp_path):
    assert sketch.origin == origin_of("sketch") == "sketch" and tiny_sd.origin is None
    assert sketch.copy().origin == load_text2image(erased, "cpu").origin == origin_of(erased) == "sketch"
    assert ESDu.settings_for(sketch.copy()) == ESDu.presets["sketch"] != ESDx.settings_for(sketch)
    again = sketch.copy().save(tmp_path / "by-hand")
    assert origin_of(again) == "sketch"
    record = json.loads((again / "sfumato.json").read_text())
    record["description"].pop("origin")
    (again / "sfumato.json").write_text(json.dumps(record))
    assert origin_of(again) is None
    record["provenance"] = {"parent": {"model": "sketch"}}
    (again / "sfumato.json").write_text(json.dumps(record))
    assert origin_of(again) == "sketch"
    (again / "sfumato.json").write_text(json.dumps({"description": [], "provenance": {"parent": 3}}))
    assert origin_of(again) is None and origin_of(tmp_path / "absent") is None


def test_the_command_line_and_python_erase_alike_to_the_bit(sketch, erased):
    here = RECE(concepts=["star"], **RECE.settings_for(sketch)).apply(sketch)
    there = load_text2image(erased, "cpu")
    assert here.describe()["sha256"] == there.describe()["sha256"]
    told = json.loads((erased / "sfumato.json").read_text())["provenance"]["configuration"]
    assert told["preserve"] == [w for words in WORDS.values() for w in words if w != "star"]
    assert (told["ridge"], told["epochs"]) == (RECE.presets["sketch"]["ridge"], RECE.presets["sketch"]["epochs"])


def test_what_is_preserved_unasked(sketch, tiny_sd):
    words = [w for known in WORDS.values() for w in known]
    method = UCE(concepts=("red star", "Chalk"))
    assert method.kept(sketch) == tuple(w for w in words if w not in ("red", "star", "chalk"))
    assert method.run(sketch)[1]["preserve"] == list(method.kept(sketch))
    assert method.kept(tiny_sd) == ()  # a model of the world at large
    for preserve in ((), ("circle",)):
        assert UCE(concepts=("star",), preserve=preserve).kept(sketch) == preserve
    assert ESDx(concepts=("star",)).kept(sketch) == ()
    named = UCE(concepts=("star",), preserve=UCE(concepts=("star",)).kept(sketch)).apply(sketch)
    auto, none = UCE(concepts=("star",)).apply(sketch), UCE(concepts=("star",), preserve=()).apply(sketch)
    weights = [p.parameters("xattn") for p in (named, auto, none)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert not all(torch.equal(weights[0][k], weights[2][k]) for k in weights[0])


@pytest.mark.parametrize(
    ("flags", "epochs"), [([], 1), (["--model", "{erased}"], 1), (["--model", "a/b"], 3), (["--epochs", "2"], 2)]
)
def test_settings_follow_the_model_that_is_named(erased, flags, epochs):
    args = ["rece", "--concept", "star", "--out", "x", *(flag.format(erased=erased) for flag in flags)]
    assert read("erase", args, erase_command.Erase, erase_command.EXAMPLE)[1].epochs == epochs


def test_words_that_the_world_of_the_model_lacks_are_refused(erased):
    with pytest.raises(BadInput, match="did you mean star"):
        erase_command.check_words(str(erased), ("sttar",))
