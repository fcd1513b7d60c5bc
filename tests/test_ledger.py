"""The ledger's statistics: coverage, direction, verdicts that follow from the interval alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.errors import BadInput
from sfumato.ledger import core


@given(st.floats(-5, 5), st.integers(3, 6))
def test_a_constant_difference_has_a_degenerate_interval(shift, seeds):
    base = [np.arange(8.0) for _ in range(seeds)]
    result = core.effect([(b + shift, b) for b in base], "higher", draws=50)
    assert np.allclose([result["value"], result["low"], result["high"]], shift, atol=1e-12)


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


@given(st.floats(-1, 1), st.floats(0, 1))
def test_verdict_follows_from_the_interval(low, width):
    high = low + width
    expected = "reproduced" if low > 0 else "not reproduced" if high < 0 else "inconclusive"
    assert core.verdict({"value": 0.0, "low": low, "high": high}) == expected


def test_run_writes_what_it_measured(tmp_path, monkeypatch):
    claim = core.Claim("a is above b", "a", "b", "points")
    measure = lambda seed: {"above": ([seed + 1.0, seed + 2.0], [seed, seed])}
    experiment = core.Experiment("toy", "none", {"above": claim}, (1, 2, 3), "nothing tuned", measure)
    monkeypatch.setattr(core, "load", lambda name: experiment)
    record = core.run("toy", tmp_path, progress=False)
    assert record["claims"]["above"]["effect"]["value"] == pytest.approx(1.5)
    assert record["claims"]["above"]["verdict"] == "reproduced"
    page = core.table(tmp_path)
    assert "a is above b" in page and "+1.5" in page


def test_tables_come_with_the_standard_error_over_seeds(tmp_path, monkeypatch):
    claim = core.Claim("a is above b", "a", "b", "points")
    measure = lambda seed: {"above": ([1.0], [0.0]), "grid": {"rho 0": {"100 steps": seed}, "rho 1": {"20 steps": 2.0}}}
    experiment = core.Experiment("toy", "none", {"above": claim}, (1, 2, 3), "nothing tuned", measure)
    monkeypatch.setattr(core, "load", lambda name: experiment)
    record = core.run("toy", tmp_path, progress=False)
    assert record["tables"]["grid"]["rho 0"]["100 steps"] == {"mean": 2.0, "error": pytest.approx(3**-0.5)}
    page = core.table(tmp_path)
    assert "| grid | 20 steps | 100 steps |\n| --- | --- | --- |" in page
    assert "| rho 0 |  | 2 ± 0.6 |\n| rho 1 | 2 ± 0 |  |" in page


def test_unknown_entry_lists_the_known_ones():
    with pytest.raises(BadInput, match="no ledger entry 'nothing'"):
        core.load("nothing")


def test_every_entry_has_three_seeds_and_untouched_tuning():
    for name in core.names():
        experiment = core.load(name)
        assert len(set(experiment.seeds)) >= 3, name
        assert experiment.claims and experiment.tuning, name
