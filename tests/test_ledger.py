"""The ledger's statistics: coverage, direction, verdicts that follow from the interval alone."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.errors import BadInput, SfumatoError
from sfumato.files import held
from sfumato.ledger import core, runner, table
from sfumato.plan import makespan


@given(st.floats(-5, 5), st.integers(3, 6))
def test_a_constant_difference_has_a_degenerate_interval(shift, seeds):
    base = [np.arange(8.0) for _ in range(seeds)]
    result = core.effect([(b + shift, b) for b in base], "higher", draws=50)
    assert np.allclose([result["value"], result["low"], result["high"]], shift, atol=1e-12)


@pytest.mark.parametrize("pair", [([1.0, 2.0], [1.0]), ([], [])])
def test_pairs_that_are_none_are_refused(pair):
    with pytest.raises(ValueError, match="equally many items"):
        core.effect([([1.0], [0.0]), pair, ([1.0], [0.0])], "higher", draws=5)


def test_lower_is_better_flips_the_sign():
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(size=9), rng.normal(size=9)) for _ in range(4)]
    up, down = core.effect(pairs, "higher"), core.effect(pairs, "lower")
    assert up["value"] == pytest.approx(-down["value"])
    assert up["low"] == pytest.approx(-down["high"], abs=0.05)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    """Two-level data with seed effects: a bootstrap over 8 seeds covers 95 % less its known small-sample loss."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(120):
        pairs = []
        for _ in range(8):
            difference = 0.3 + 0.2 * rng.normal() + rng.normal(size=20)
            pairs.append((difference, np.zeros(20)))
        result = core.effect(pairs, "higher", draws=300)
        hits += result["low"] <= 0.3 <= result["high"]
    # 3 standard errors below 0.95 at 120 trials is 0.89; eight seeds cost a few percent more.
    assert 0.84 <= hits / 120 <= 1


@pytest.mark.parametrize(
    ("verdict", "means", "marked"),
    [
        ("reproduced", [0.1, 0.11, 0.12], False),
        ("reproduced", [0.1, 0.2, 0.9], True),
        ("not reproduced", [-0.1, -0.2, -0.9], True),
        ("inconclusive", [-0.1, 0.2, 0.9], False),
    ],
)
def test_a_verdict_that_other_seeds_could_turn_round_has_a_dagger(verdict, means, marked):
    seeds = [{"seed": i, "method": m + 1, "baseline": 1.0, "n": 9} for i, m in enumerate(means)]
    assert core.said({"verdict": verdict, "per_seed": seeds}) == verdict + f" {core.DAGGER}" * marked


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.1, 0.3, "reproduced"), (-0.3, -0.1, "not reproduced"), (-0.1, 0.3, "inconclusive"), (0.0, 0.3, "inconclusive")],
)
def test_the_verdict_is_the_intervals(low, high, said):
    assert core.verdict({"value": 0.2, "low": low, "high": high}) == said


ABOVE = core.Claim("a is above b", "a", "b", "points")


def once(seed: int) -> dict:
    """A toy that is measured at once."""
    grid = {"rho 0": {"100 steps": seed}, "rho 1": {"20 steps": 2.0}}
    return {"above": ([seed + 1.0, seed + 2.0], [seed, seed]), "grid": grid}


WRONG: dict = {}


def wrong(seed: int) -> dict:
    """The toy that is measured at once, with some of it changed, or (None) left out."""
    return {k: v for k, v in {**once(seed), **WRONG}.items() if v is not None}


def arm_by_arm(seed: int, arm: str) -> dict:
    """A toy in two arms, with figures that no decimal fraction is equal to; what is measured is noted in a file."""
    with open(os.environ["MEASURED"], "a") as file:
        file.write(f"{arm} {seed}\n")
    if os.environ.get("FAILS_AT") == f"{arm} {seed}":
        raise RuntimeError("the power went")
    values = np.random.default_rng([seed, len(arm)]).normal(size=5) + (arm == "method")
    return {"values": values.astype(np.float32), "all": {"0": values.sum() / 3}}


def compare(arms: dict) -> dict:
    grid = {name: {"sum": arm["all"]["0"]} for name, arm in arms.items()}
    return {"above": (arms["method"]["values"], arms["baseline"]["values"]), "sums": grid}


ONCE = core.Experiment("toy", "none", {"above": ABOVE}, (1, 2, 3), "nothing tuned", once, cost=1)
ARMS = core.Experiment(
    "toy", "none", {"above": ABOVE}, (1, 2, 3), "nothing tuned", arm_by_arm, arms=("method", "baseline"),
    compare=compare, cost={"method": 20, "baseline": 12},
)  # fmt: skip


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """Sets the experiment that is measured; returns what has been measured so far."""
    monkeypatch.setenv("MEASURED", str(tmp_path / "measured"))
    set_to = lambda experiment: monkeypatch.setattr(runner, "load", lambda name: experiment)
    set_to(ARMS)
    done = lambda: (tmp_path / "measured").read_text().splitlines()
    return SimpleNamespace(set=set_to, done=done, folder=tmp_path / "results")


def figures(record: dict) -> dict:
    return {k: v for k, v in record.items() if k not in ("seconds", "processes")}


def test_run_writes_what_it_measured(toy):
    toy.set(ONCE)
    record = runner.run("toy", toy.folder, jobs=1, progress=False)
    assert record["claims"]["above"]["effect"]["value"] == pytest.approx(1.5)
    assert record["claims"]["above"]["verdict"] == "reproduced"
    assert record["tables"]["grid"]["rho 0"]["100 steps"] == {"mean": 2.0, "error": pytest.approx(3**-0.5)}
    page = table(toy.folder)
    assert "a is above b" in page and "+1.5" in page
    assert "| grid | 20 steps | 100 steps |\n| --- | --- | --- |" in page
    assert "| rho 0 |  | 2 ± 0.6 |\n| rho 1 | 2 ± 0 |  |" in page
    assert [file.name for file in toy.folder.iterdir()] == ["toy.json"]


def test_measured_at_once_or_arm_by_arm(toy):
    found = ARMS.at(2)
    assert toy.done() == ["method 2", "baseline 2"]
    assert found["above"][0].tolist() == arm_by_arm(2, "method")["values"].tolist()


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"above": None}, "nothing was measured for above"), ({"grid": 0.5}, "'grid' is no table"),
     ({"grid": {"rho 0": 0.5}}, "'grid' is no table")],
)  # fmt: skip
def test_what_no_record_can_be_made_of_is_said_at_the_first_seed(toy, monkeypatch, changes, told):
    """In a table that is none, and a claim that was forgotten; not when hours have been measured."""
    monkeypatch.setattr(sys.modules[__name__], "WRONG", changes)
    toy.set(replace(ONCE, measure=wrong))
    with pytest.raises(SfumatoError, match=told):
        runner.run("toy", toy.folder, jobs=1, progress=False)
    assert len([file for file in (toy.folder / ".toy").glob("*.json") if file.name != runner.KEY]) == 1


def test_a_run_that_stopped_goes_on_to_the_same_figures(toy, monkeypatch, capfd):
    """In two processes at first, of which one fails; then in this one."""
    whole = runner.run("toy", toy.folder / "whole", jobs=1, progress=False)
    assert toy.done() == [f"{arm} {seed}" for arm in ARMS.arms for seed in ARMS.seeds]
    monkeypatch.setenv("FAILS_AT", "method 3")
    with pytest.raises(SfumatoError, match="method, seed 3 failed"):
        runner.run("toy", toy.folder, jobs=2, progress=False)
    assert not (toy.folder / "toy.json").exists()
    kept = [cell for cell in runner.cells_of(ARMS) if (toy.folder / ".toy" / cell.file).exists()]
    assert {"method, seed 1", "method, seed 2"} <= set(map(str, kept)) and "method, seed 3" not in map(str, kept)
    Path(os.environ["MEASURED"]).unlink()
    monkeypatch.delenv("FAILS_AT")
    record = runner.run("toy", toy.folder, jobs=1)
    assert figures(record) == figures(whole)
    assert toy.done() == [f"{cell.arm} {cell.seed}" for cell in runner.cells_of(ARMS) if cell not in kept]
    assert f"{len(kept)} of 6 were finished before" in " ".join(capfd.readouterr().err.split())


def test_a_change_is_named_and_starts_anew(toy, monkeypatch, capfd):
    monkeypatch.setenv("FAILS_AT", "baseline 1")
    with pytest.raises(SfumatoError, match="the power went"):
        runner.run("toy", toy.folder, jobs=1, progress=False)
    monkeypatch.delenv("FAILS_AT")
    Path(os.environ["MEASURED"]).unlink()
    versions = runner._versions()
    monkeypatch.setattr(runner, "_versions", lambda: {**versions, "torch": "0.1"})
    runner.run("toy", toy.folder, jobs=1)
    assert len(toy.done()) == 6
    assert "other than then: torch" in " ".join(capfd.readouterr().err.split())


def test_seeds_that_are_added_are_measured_beside_those_that_are_there(toy, monkeypatch):
    monkeypatch.setenv("FAILS_AT", "baseline 1")
    with pytest.raises(SfumatoError, match="the power went"):
        runner.run("toy", toy.folder, jobs=1, progress=False)
    monkeypatch.delenv("FAILS_AT")
    Path(os.environ["MEASURED"]).unlink()
    toy.set(replace(ARMS, seeds=(1, 2, 3, 4)))
    record = runner.run("toy", toy.folder, jobs=1, progress=False)
    assert toy.done() == ["method 4", "baseline 1", "baseline 2", "baseline 3", "baseline 4"]
    assert [s["seed"] for s in record["claims"]["above"]["per_seed"]] == [1, 2, 3, 4]


def test_the_budget_is_said_first(toy, capfd):
    runner.run("toy", toy.folder, jobs=1)
    said = " ".join(capfd.readouterr().err.split())
    assert "3 seeds of 2 arms, 1 at a time" in said and "about 96 s" in said and "writes" in said
    assert runner.expected(ARMS, runner.cells_of(ARMS), jobs=2) == 52


def test_what_measures_seconds_runs_alone(toy):
    toy.set(replace(ARMS, timed=True))
    assert runner.run("toy", toy.folder, jobs=2, progress=False)["processes"] == 1


def test_makespan():
    assert makespan([], 2) == 0
    assert makespan([3, 1, 1, 1], 2) == 3
    assert makespan([1, 1, 4], 2) == 5
    assert makespan([2, 2, 2], 1) == 6


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(toy):
    toy.folder.write_text("a file")
    with pytest.raises(BadInput, match="is no folder"):
        runner.run("toy", toy.folder, progress=False)
    (toy.folder.parent / "other" / "toy.json").mkdir(parents=True)
    with pytest.raises(BadInput, match="is a folder where the result"):
        runner.run("toy", toy.folder.parent / "other", progress=False)
    if os.geteuid():
        (toy.folder.parent / "locked").mkdir(mode=0o500)
        with pytest.raises(BadInput, match="may not be written to"):
            runner.run("toy", toy.folder.parent / "locked", progress=False)
    assert not Path(os.environ["MEASURED"]).exists()


def test_two_runs_of_an_entry_are_refused(toy):
    with held(toy.folder / ".toy"), pytest.raises(BadInput, match="another run is at work"):
        runner.run("toy", toy.folder, progress=False)


def test_unknown_entry_lists_the_known_ones():
    with pytest.raises(BadInput, match="no ledger entry 'nothing'"):
        core.load("nothing")


@pytest.mark.parametrize("name", core.names())
def test_an_entry_has_three_seeds_and_fits_ten_minutes_on_two_cores(name):
    experiment = core.load(name)
    assert len(set(experiment.seeds)) >= 3 and experiment.claims and experiment.tuning
    jobs = 1 if experiment.timed else 2
    assert 0 < runner.expected(experiment, runner.cells_of(experiment), jobs) <= 600
    assert bool(experiment.arms) == bool(experiment.compare)
