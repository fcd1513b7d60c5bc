"""The mean of what is kept: its value is of the concepts' rates, its interval over pictures; old reports are read."""

import json
from dataclasses import replace

import pytest
import torch

from report_fixtures import make_report
from sfumato.audit.kept import Kept
from sfumato.bench.tune import score_parts
from sfumato.data.cases import sketch_cases
from sfumato.metrics.bootstrap import rate_interval, wilson
from sfumato.report import compare, verdict, words
from sfumato.report.schema import AuditRecord, Interval

CASES = sketch_cases({"star": {"object": "star"}}, None, 4, 8, 0)
NEAR, FAR = CASES.groups.values()


def table(broken: torch.Tensor, seed: int = 0) -> Kept:
    """Every retained picture shows all that it was asked for, and afterwards nothing where it is broken."""
    counted = torch.tensor([[w in case.names for w in CASES.concepts] for case in CASES.retained])
    return Kept(CASES.concepts, counted, counted & ~broken[:, None], seed)


def of(counted: list[list[int]], there: list[list[int]]) -> Kept:
    names = [str(k) for k in range(len(counted[0]))]
    return Kept(names, torch.tensor(counted).bool(), torch.tensor(there).bool(), 0)


def test_its_value_is_the_mean_of_the_concepts_rates_and_n_is_pictures():
    counted = [[1, 1, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 1, 0]]
    kept = of(counted, [[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]])
    found = kept.mean(["0", "1", "2"])  # nobody asked for the last, or nobody saw it before
    assert found.value == pytest.approx((2 / 3 + 1 / 3) / 2) and found.n == 4
    assert 0 <= found.low < found.value < found.high <= 1
    assert kept.mean(["2"]) is None and kept.mean() is None
    both = kept.mean(["0"], ["1", "2"])
    assert both.value == pytest.approx((2 / 3 + 1 / 3) / 2) and both.n == 4
    assert kept.mean(["0"], ["2"]) == kept.mean(["0"])


def test_of_one_concept_it_is_the_bootstrap_of_its_pictures():
    hits = torch.arange(50) % 4 > 0
    found = Kept(["a"], torch.ones(50, 1, dtype=torch.bool), hits[:, None], 0).mean(["a"])
    plain = rate_interval(hits, torch.Generator().manual_seed(0))
    assert found.value == plain.value and found.n == 50
    assert [found.low, found.high] == pytest.approx([plain.low, plain.high], abs=0.03)


def test_where_all_is_kept_or_lost_it_is_wilsons_over_pictures():
    whole = table(torch.zeros(88, dtype=torch.bool)).mean(CASES.concepts)
    assert whole == Interval(1.0, *wilson(88, 88), 88)
    assert table(torch.ones(88, dtype=torch.bool)).mean(NEAR, FAR) == Interval(0.0, *wilson(0, 88), 88)
    apart = of([[1, 0]] * 8 + [[0, 1]] * 8, [[1, 0]] * 8 + [[0, 0]] * 8).mean(["0", "1"])
    low, high = wilson(8, 8)[0] / 2, (1 + wilson(0, 8)[1]) / 2
    assert (apart.value, apart.n) == (0.5, 16), "not certain, though no picture moves it"
    assert (apart.low, apart.high) == pytest.approx((low, high))


@pytest.mark.parametrize("sides", [(CASES.concepts,), (NEAR, FAR)])
def test_it_covers_the_truth_where_an_edit_breaks_whole_pictures(sides):
    """As independent figures of 352 pictures the 88 covered it in two thirds of cases."""
    rng, covered, independent, rounds = torch.Generator().manual_seed(1), 0, 0, 150
    for seed in range(rounds):
        kept = table(torch.rand(88, generator=rng) < 0.1, seed)
        found = kept.mean(*sides)
        assert found.n == int(kept.counted[:, [kept.concepts.index(w) for s in sides for w in s]].any(1).sum())
        covered += found.low <= 0.9 <= found.high
        if sides == (CASES.concepts,):
            rows = [(kept.there[c, k], rng) for k, c in enumerate(kept.counted.T)]
            each = [rate_interval(hits, g, resamples=200) for hits, g in rows]
            old = words.average([Interval(x.value, x.low, x.high, x.n) for x in each])
            assert old.n == 352 and found.value == pytest.approx(old.value)
            independent += old.low <= 0.9 <= old.high
    assert covered >= 0.9 * rounds
    assert independent < 0.8 * rounds


def test_reports_hold_it_and_those_of_earlier_versions_are_read_and_say_so():
    old = make_report()
    mean = Interval(0.9, 0.8, 0.95, 40)
    new = replace(old, kept={"all": mean, "Near: objects": None})
    data = json.loads(json.dumps(new.to_json()))
    again = AuditRecord.from_json(data)
    assert again.kept == new.kept and words.kept(again) == mean
    assert words.full(mean).split(",")[0].split(" ")[0] in " ".join(verdict.findings(new))
    del data["kept"]
    before = AuditRecord.from_json(data)
    assert "kept" not in before.to_json() and words.kept(before) == words.average(list(old.retention.values()))
    said = lambda report: any("combines theirs as independent" in line for line in verdict.limitations(report))
    assert said(before) and not said(new)
    label = lambda *both: next(row.label for row in compare.rows(*both) if row.label.startswith("mean"))
    assert label(new, new) == "mean over concepts" and "independent" in label(new, before)


def test_trials_take_it_where_it_is_there():
    rate = lambda x: {"value": x, "low": x - 0.1, "high": x + 0.1, "n": 4}
    seen = {"erasure": rate(0.8), "near": rate(0.5), "far": rate(0.9)}
    assert score_parts(seen)["kept"].n == 8
    wide = {"value": 0.7, "low": 0.5, "high": 0.9, "n": 5}
    assert score_parts({**seen, "kept": wide})["kept"] == Interval.from_json(wide, "value")
