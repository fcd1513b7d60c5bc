"""What every attack promises: the pipeline as it was, the same find again, a budget in figures, refusals in words."""

from __future__ import annotations

import inspect
import json
from typing import Any, get_args

import pytest
import torch

from sfumato import catalog
from sfumato.attack.base import Attack, Box, Found
from sfumato.audit import audit
from sfumato.audit.under_attack import make_attack
from sfumato.data.cases import AttackCases, Case
from sfumato.errors import BadInput
from sfumato.metrics.detectors.base import Detection, Detector
from sfumato.pipeline import Text2Image
from sfumato.plan import Plan
from sfumato.train.loop import Run

from .conftest import files_of, state
from .families import FAMILIES, OF_A_KIND

VERB = "attack"
PROMPTS, SEEDS = ["a red star", "a photo of a star"], [3, 4]
DRAWING = {"sampling_steps": 2}
_DONE: dict[Any, tuple] = {}


class Bright(Detector):
    """Surer of whatever it is asked for the brighter a picture is; none is bright enough, so that all is searched."""

    name, hash, threshold, resize = "bright", "none", 0.999, "none"

    def check(self, concept: str) -> None:
        pass

    def __call__(self, images, concept):
        score = images.flatten(1).mean(1)
        return Detection(score > self.threshold, score)


def attack(method: type[Attack], **changes: Any) -> Attack:
    return method(**{**method.EXAMPLE, **changes})


def cases(concept: str = "star", n: int = 2, **changes: Any) -> AttackCases:
    pictures = torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    prompts = [p.replace("star", concept) for p in PROMPTS]
    asked = [Case(p, s, (concept,)) for p, s in zip(prompts, SEEDS, strict=True)]
    given = {"pictures": pictures, "captions": [prompts[i % 2] for i in range(n)], "drawing": DRAWING, **changes}
    return AttackCases(concept, asked, **given)


def search(method: type[Attack], pipe: Text2Image, told: AttackCases | None = None, **changes: Any) -> Found:
    return attack(method, **changes).run(pipe, told or cases(), judge=Bright(), original=pipe, progress=False)


def search_once(method: type[Attack], family: str, request) -> tuple:
    """One search on the family: (pipeline, its state before and after, what was found, or why it was refused)."""
    erased = request.getfixturevalue(family)
    if (method, family) not in _DONE:
        erased.encode("star")  # transformers puts hooks of its own on its models when they are first called
        before = everything(erased)
        try:
            found = search(method, erased)
        except BadInput as refused:
            found = refused
        _DONE[method, family] = erased, before, everything(erased), found
    return _DONE[method, family]


@pytest.fixture
def done(request, method, family):
    """`search_once` on every family that is not refused."""
    if isinstance(search_once(method, family, request)[-1], BadInput):
        pytest.skip(f"refuses this family: {_DONE[method, family][-1]}")
    return _DONE[method, family]


@pytest.fixture
def erased(tiny_sd, method) -> Text2Image:
    """A pipeline with adapters, as an eraser leaves it."""
    made = tiny_sd.copy()
    adapter = made.add_adapter("spm.0", generator=torch.Generator().manual_seed(0))
    for up in adapter.up.values():
        torch.nn.init.normal_(up, std=0.3, generator=torch.Generator().manual_seed(1))
    adapter.gate = lambda cond: torch.linspace(0.5, 1.0, len(cond))
    return made


def everything(pipe: Text2Image) -> dict[str, Any]:
    """`state`, and the words that the pipeline knows."""
    words = [(len(t), sorted(t.get_added_vocab())) for t in pipe.tokenizers]
    return {**state(pipe), "words": words, "learned": list(pipe.learned), "listeners": list(pipe.listeners)}


def test_it_is_an_attack_that_says_what_it_sees(method):
    assert issubclass(method, Attack) and method.box in get_args(Box)
    assert list(inspect.signature(method.run).parameters)[1:3] == ["pipe", "cases"]


def test_some_family_is_attacked_and_the_others_are_left_alone(method, request):
    tried = [search_once(method, family, request) for family in FAMILIES if family not in OF_A_KIND]
    assert any(isinstance(found, Found) for *_, found in tried)
    assert all(before == after for _, before, after, _ in tried)


def test_the_pipeline_is_left_exactly_as_it_was(done):
    _, before, after, _ = done
    assert [key for key in before if before[key] != after.get(key)] == [] and before.keys() == after.keys()


def test_adapters_and_their_flags_are_left_as_they_were(method, erased):
    erased.encode("star")
    before = everything(erased)
    found = search(method, erased)
    found.draw(erased, PROMPTS, SEEDS, **DRAWING)
    after = everything(erased)
    assert [key for key in before if before[key] != after.get(key)] == []


def test_the_same_seed_finds_the_same_and_another_does_not(done, method):
    pipe, _, _, found = done
    torch.manual_seed(999)
    again, other = search(method, pipe), search(method, pipe, seed=1)
    assert again.record() == found.record()
    pictures = found.draw(pipe, PROMPTS, SEEDS, **DRAWING)
    assert torch.equal(again.draw(pipe, PROMPTS, SEEDS, **DRAWING), pictures)
    assert not torch.equal(other.draw(pipe, PROMPTS, SEEDS, **DRAWING), pictures)


def test_what_it_found_draws_in_place_of_the_concepts_name(done):
    pipe, before, _, found = done
    pictures = found.draw(pipe, PROMPTS, SEEDS, **DRAWING)
    assert len(pictures) == len(PROMPTS) and pictures.min() >= 0 and pictures.max() <= 1
    assert not torch.equal(pictures, pipe.draw(PROMPTS, SEEDS, **DRAWING)), "the example must do something"
    torch.testing.assert_close(found.draw(pipe, PROMPTS[1:], SEEDS[1:], **DRAWING), pictures[1:], rtol=0, atol=1e-4)
    assert everything(pipe) == before
    with pytest.raises(BadInput, match="star"):
        found.draw(pipe, ["a blue circle"], [0], **DRAWING)


def test_budget_and_record_are_json(done, method):
    *_, found = done
    assert found.budget == attack(method).budget()
    for told in (found.budget, found.record()):
        assert json.loads(json.dumps(told, allow_nan=False)) == json.loads(json.dumps(told))
    assert found.budget["name"] == method.__name__ and found.budget["box"] == method.box and "seed" in found.budget


def test_what_it_spends_is_counted_and_limited(done, method):
    if not attack(method).looks_first:
        pytest.skip("runs by itself, uncounted")
    pipe, *_, found = done
    assert found.before == Bright()(pipe.draw(PROMPTS, SEEDS, **DRAWING), "star").present.tolist()
    assert found.spent["rows"] > 0 and found.spent["seconds"] > 0 and not found.spent["exhausted"]
    limit = found.spent["rows"] - 1
    try:
        less = search(method, pipe, max_rows=limit)
        assert less.spent["rows"] <= limit and less.spent["exhausted"]
        less.draw(pipe, PROMPTS, SEEDS, **DRAWING)
    except BadInput as refused:
        assert "max_rows" in str(refused)


def test_it_is_saved_whole_or_not_at_all(done, tmp_path):
    pipe, *_, found = done
    folder = found.save(tmp_path / "found", found.draw(pipe, PROMPTS, SEEDS, **DRAWING), {"model": "tiny"})
    told = json.loads((folder / "attack.json").read_text())
    assert told["concept"] == "star" and told["budget"]["name"] == found.budget["name"] and told["model"] == "tiny"
    assert {"000.png", "001.png"} <= files_of(folder)
    with pytest.raises(BadInput, match="exists"):
        found.save(folder)


def test_the_plan_is_told_first(done, method):
    plan = attack(method).plan(done[0], cases())
    assert isinstance(plan, Plan) and plan.seconds > 0 and min(plan.memory.values()) > 0
    assert attack(method).rows(2, 10) >= 0


def test_what_it_needs_and_was_not_given_is_named(done, method):
    with pytest.raises(BadInput, match="concept"):
        AttackCases(" ")
    if attack(method).learns_from:
        with pytest.raises(BadInput, match="pictures"):
            attack(method).run(done[0], cases(pictures=None, captions=None), judge=Bright(), progress=False)


def test_an_audit_runs_it_and_tells_what_was_so_before(method, tiny_sd):
    names = [m.name for m in catalog.methods("attack") if m.load() is method]
    assert all(isinstance(make_attack(name, tiny_sd), method) for name in names)
    asked = {"prompts": ["a {concept}"], "retain": ("circle",), "n": 2, "n_retain": 1, "n_attack": 2}
    how = {"sampling_steps": 1, "distance": "mse", "progress": False, "detector": Bright()}
    (told,) = audit(tiny_sd, tiny_sd.copy(), ["star"], attacks=(attack(method),), **asked, **how).attacks.values()
    assert told.before.value == told.recovered.value == told.total.value == 0 and told.further.n == 2
    assert told.recovered.n == told.control.n == told.original.n == 2 and told.rows > 0 and told.seconds > 0


def test_the_control_asks_for_another_concept_in_the_same_way(done, method):
    pipe, *_ = done
    floor = attack(method).control(pipe, cases(), cases("circle"), judge=Bright(), original=pipe, progress=False)
    assert floor.concept == "star"
    assert len(floor.draw(pipe, PROMPTS, SEEDS, **DRAWING)) == len(PROMPTS)


class Killed(BaseException):
    pass


def test_killed_it_goes_on_to_the_same_bits(method, tiny_sd, tmp_path, monkeypatch):
    """Attacks that learn, in a folder of theirs."""
    found, original, made = search(method, tiny_sd), Run.one_step, []

    def one_step(run):
        if len(made) == 1:
            raise Killed
        made.append(run.step)
        return original(run)

    asked = {"judge": Bright(), "original": tiny_sd, "progress": False, "folder": tmp_path / "run"}
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Run, "one_step", one_step)
            attack(method).run(tiny_sd, cases(), **asked)
        assert not made, "a run in the loop is killed here"
        return
    except Killed:
        pass
    assert attack(method).run(tiny_sd, cases(), **asked).record() == found.record()
