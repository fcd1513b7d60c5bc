"""Paraphrase: which words it tries, for whom, and what random words do instead."""

from dataclasses import replace

import pytest
import torch

from sfumato.attack.paraphrase import Paraphrase, combined, forms
from sfumato.attack.parts.names import LANGUAGES, NAMES, SYNONYMS
from sfumato.data.cases import AttackCases, Case
from sfumato.data.sketch import COLOURS, OBJECTS
from sfumato.errors import BadInput
from sfumato.metrics.detectors.base import Detection, Detector

CASES = AttackCases("star", [Case("a red star", 0, ("star",)), Case("stars", 1, ("star",))])
CASES = replace(CASES, drawing={"sampling_steps": 1, "cfg_scale": 1.0})


class Late(Detector):
    """Sees the concept in the third round, in the first of its pictures."""

    name, hash, threshold, resize = "late", "none", 0.5, "none"

    def __init__(self, after=0):
        self.calls = after

    def check(self, concept):
        pass

    def __call__(self, images, concept):
        self.calls += 1
        seen = torch.arange(len(images)) == (0 if self.calls == 3 else -1)
        return Detection(seen, seen.float())


def test_all_words_of_the_sketch_world_have_names_and_synonyms():
    for word in (*OBJECTS, *COLOURS):
        assert len(NAMES[word]) == len(LANGUAGES) and word not in SYNONYMS[word] and len(SYNONYMS[word]) == 3


def test_other_names_other_languages_other_forms():
    assert combined("star", SYNONYMS) == list(SYNONYMS["star"])
    assert combined("red star", {"red": ("rojo",), "star": ("estrella",)}) == [
        "rojo star", "red estrella", "rojo estrella",
    ]  # fmt: skip
    assert combined("teapot", SYNONYMS) == []
    assert forms("star") == [
        "stars", "starr", "satr", "st-ar", "s t a r", "two stars", "star shape", "shape of a star",
        "drawing of a star",
    ]  # fmt: skip
    assert forms("red fish")[0] == "red fishes"
    every = Paraphrase(names=("Stella",)).paraphrases("star")
    assert every[0] == "Stella" and {"estrella", "étoile", "Stern", "asterisk", "stars"} <= set(every)
    assert len(every) == len(set(every)) and "star" not in every
    assert Paraphrase(kinds=("languages",), languages=("de",)).paraphrases("star") == ["Stern"]
    assert Paraphrase(kinds=("languages",)).paraphrases("orange")[:1] == ["naranja"]
    assert "teapots" in Paraphrase().paraphrases("teapot")


def test_it_asks_until_the_judge_sees_the_concept(tiny_sd):
    judge = Late()
    attack = Paraphrase(most=4)
    found = attack.run(tiny_sd, CASES, judge=judge, progress=False)
    first, second = found.said
    assert first["seen"] and first["tried"] == 2 and second["tried"] == 4 and not second["seen"]
    known = attack.paraphrases("star")
    assert first["text"] in {f"a red {name}" for name in known}
    assert second["text"] in {f"{name}s" for name in known}, "the plural of the prompt stays"
    drawn = found.draw(tiny_sd, ["a red star"], [0], sampling_steps=1)
    assert torch.equal(drawn, tiny_sd.draw([first["text"]], [0], sampling_steps=1))
    cost = (2 + 2 + 2 + 1 + 1) * 1
    assert found.spent["rows"] == cost


def test_random_words_are_tried_as_often(tiny_sd):
    attack = Paraphrase(kinds=("languages",), languages=("de", "fr"), most=9)
    floor = attack.control(tiny_sd, CASES, None, judge=Late(after=9), progress=False)
    assert [row["tried"] for row in floor.said] == [2, 2]
    assert floor.said[0]["text"].startswith("a red ") and "star" not in floor.said[0]["text"]


def test_a_concept_without_another_name_is_refused(tiny_sd):
    with pytest.raises(BadInput, match="no other name of 'teapot'"):
        Paraphrase(kinds=("synonyms",)).run(tiny_sd, AttackCases("teapot"), judge=Late(), progress=False)
    with pytest.raises(BadInput, match="language"):
        Paraphrase(languages=("xx",))
