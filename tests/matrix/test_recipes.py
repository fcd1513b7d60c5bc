"""What every recipe promises: resumed to the same bits, recorded, planned, refused in words, loaded like any model."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import sfumato as sf
from sfumato import catalog
from sfumato.errors import BadInput
from sfumato.plan import Plan
from sfumato.train.loop import Run

from .conftest import bits_of, draw, frozen

VERB = "train"
_DONE: dict[type, tuple[Path, int]] = {}


def recipe(method: type, **changes: Any) -> Any:
    return method(**{**method.EXAMPLE, **changes})


class Killed(BaseException):
    pass


def killed_at(monkeypatch, update: int) -> list[int]:
    """From now on a run dies before its update number ``update`` (all stages counted together); the updates made."""
    made: list[int] = []
    original = Run.one_step

    def one_step(run):
        if len(made) == update:
            raise Killed
        made.append(run.step)
        return original(run)

    monkeypatch.setattr(Run, "one_step", one_step)
    return made


@pytest.fixture
def whole(method, tmp_path_factory) -> tuple[Path, int]:
    """The folder of one run from beginning to end, and its number of updates."""
    if method not in _DONE:
        folder = tmp_path_factory.mktemp("whole") / "run"
        with pytest.MonkeyPatch.context() as patch:
            made = killed_at(patch, -1)
            written = recipe(method).run(folder, progress=False)
        assert written.is_relative_to(folder)
        _DONE[method] = folder, len(made)
    return _DONE[method]


def test_the_run_is_a_model_like_any_other(whole):
    folder, _ = whole
    model = sf.load(folder, "cpu")
    assert frozen(model) and not any(m.training for part in model.parts().values() for m in part.modules())
    pictures = draw(model)
    assert pictures.isfinite().all() and pictures.min() >= 0 and pictures.max() <= 1
    assert (draw(sf.load(folder, "cpu")) == pictures).all()


def test_the_record_says_how_it_was_made(whole, method):
    record = sf.pipeline.read_record(whole[0])["provenance"]
    entry = next((m for m in catalog.methods(VERB) if m.load() is method), None)
    assert entry is None or record["recipe"] == f"{VERB} {entry.name}"
    assert record["config"] == json.loads(json.dumps(asdict(recipe(method))))


def test_killed_again_and_again_it_goes_on_to_the_same_bits(whole, method, tmp_path, monkeypatch):
    folder, updates = whole
    run, kills = tmp_path / "run", []
    for update in (1, 1, updates - 3):  # from where the one before died
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kills.append(killed_at(patch, update))
            recipe(method).run(run, progress=False)
        with pytest.raises(BadInput):
            sf.load(run, "cpu")
    with monkeypatch.context() as patch:
        kills.append(killed_at(patch, -1))
        recipe(method).run(run, progress=False)
    assert sum(map(len, kills)) == updates, "no update is made twice"
    assert bits_of(sf.load(run, "cpu")) == bits_of(sf.load(folder, "cpu"))


def test_another_seed_is_another_model_and_other_settings_do_not_go_on(whole, method, tmp_path):
    other = recipe(method, seed=1)
    other.run(tmp_path / "run", progress=False)
    assert bits_of(sf.load(tmp_path / "run", "cpu")) != bits_of(sf.load(whole[0], "cpu"))
    before = bits_of(sf.load(tmp_path / "run", "cpu"))
    for change in ({"lr": 2 * other.lr}, {"seed": 2}, {"batch": 3}):
        with pytest.raises(BadInput, match=next(iter(change))):
            replace(other, **change).run(tmp_path / "run", progress=False)
    assert bits_of(sf.load(tmp_path / "run", "cpu")) == before


def test_the_plan_is_told_first(method):
    plan = recipe(method).plan()
    assert isinstance(plan, Plan) and plan.title
    assert plan.seconds > 0 and plan.memory and min(plan.memory.values()) > 0


@pytest.mark.parametrize(
    "change",
    [
        {"updates": 0}, {"batch": 0}, {"lr": -1.0}, {"checkpoint_every": 0}, {"precision": "half"}, {"seed": -1},
        {"ema": 1.0}, {"accumulate": 9}, {"size": 0},
    ],
    ids=lambda change: "-".join(map(str, *change.items())),
)  # fmt: skip
def test_values_that_cannot_be_are_refused_by_name(method, change):
    with pytest.raises(BadInput, match="micro-batches" if "accumulate" in change else next(iter(change))):
        recipe(method, **change)


def test_a_file_in_the_way_is_refused_first(method, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BadInput, match="is a file"):
        recipe(method).run(tmp_path / "file", progress=False)
    assert (tmp_path / "file").read_text() == "mine"


def test_data_that_are_not_there_are_refused_before_anything_is_written(method, tmp_path):
    with pytest.raises(BadInput, match="nowhere"):
        recipe(method, data=str(tmp_path / "nowhere")).run(tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
