"""Intervals: closed forms, and the coverage that they promise."""

import math

import pytest
import torch
from scipy import stats

from sfumato.errors import BadInput
from sfumato.metrics.bootstrap import (
    T95,
    bca_tails,
    few_interval,
    influence_interval,
    mean_interval,
    paired_difference,
    rate_interval,
    resampled_means,
    share_interval,
    wilson,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(n, seed, mean=0.0):
    return torch.randn(n, generator=seeded(seed), dtype=torch.float64) + mean


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_contains_the_mean_and_shrinks_with_the_root_of_n(method):
    widths = []
    for n in (100, 900):
        ratios = []
        for seed in range(4):
            x = normal(n, seed, mean=3.0)
            e = mean_interval(x, seeded(seed), method=method, resamples=3000)
            assert e.low < float(x.mean()) < e.high and e.value == pytest.approx(float(x.mean()), abs=1e-12)
            # Against the normal theory for this very sample: 2 z s / sqrt(n); a tail of 3,000 resamples is
            # known to about 2 % of the width, the mean of four to 1 %.
            ratios.append((e.high - e.low) / (2 * 1.959964 * float(x.std(correction=0)) / math.sqrt(n)))
        widths.append(sum(ratios) / len(ratios))
    assert widths == pytest.approx([1.0, 1.0], abs=0.03)


def test_the_points_of_students_t():
    assert pytest.approx([stats.t.ppf(0.975, degrees) for degrees in range(1, 20)], rel=1e-5) == list(T95)


@pytest.mark.parametrize("n", [2, 3, 6])
def test_few_values_cover_the_mean_as_often_as_they_say(n):
    trials = 600
    made = [few_interval(normal(n, 5_000 + seed), seeded(seed)) for seed in range(trials)]
    assert {e.method for e in made} == {"student"}
    covers = lambda made: sum(e.low <= 0 <= e.high for e in made) / trials
    assert covers(made) == pytest.approx(0.95, abs=0.027)  # 3 standard errors
    resampled = [mean_interval(normal(n, 5_000 + seed), seeded(seed), resamples=200) for seed in range(trials)]
    assert covers(resampled) < 0.92, "what this is for"


def test_of_many_values_the_interval_is_the_bootstraps_and_bounds_are_kept():
    x = normal(21, 0)
    assert few_interval(x, seeded()) == mean_interval(x, seeded())
    bounded = few_interval(torch.tensor([0.0, 1.0, 1.0]), seeded(), least=0.0, most=1.0)
    assert (bounded.low, bounded.high) == (0.0, 1.0)
    assert few_interval(torch.tensor([0.5]), seeded()).method == "none"


@pytest.mark.parametrize("draw", ["bernoulli", "normal", "exponential"])
def test_coverage_is_what_it_says(draw):
    trials, n, hit = 400, 80, 0
    for seed in range(trials):
        g = seeded(10_000 + seed)
        if draw == "bernoulli":
            x, truth = torch.rand(n, generator=g) < 0.7, 0.7
            e = rate_interval(x, g, resamples=500)
        else:
            z = torch.rand(n, generator=g, dtype=torch.float64)
            x, truth = (-z.log(), 1.0) if draw == "exponential" else (torch.special.ndtri(z), 0.0)
            e = mean_interval(x, g, resamples=500)
        hit += e.low <= truth <= e.high
    # 400 trials: the standard error is 1.1 %; three of them, and 1.5 % for what n = 80 and discreteness cost.
    assert 0.95 - 0.048 < hit / trials < 0.95 + 0.033


def test_bca_agrees_with_scipy_on_skewed_data():
    x = normal(60, 3).exp()
    ours = mean_interval(x, seeded(), resamples=20_000)
    theirs = stats.bootstrap((x.numpy(),), lambda v, axis: v.mean(axis), method="BCa", n_resamples=20_000,
                             rng=0).confidence_interval  # fmt: skip
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.03 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.03 * width)


def test_bca_of_symmetric_data_is_the_percentile_interval():
    half = normal(50, 1)
    x = torch.cat([half, -half])
    means = torch.cat([m := resampled_means(x, seeded(), 500), -m])  # exactly symmetric: no bias, no skewness
    tails = torch.tensor([0.025, 0.975], dtype=torch.float64)
    assert torch.allclose(bca_tails(x - x.mean(), means - means.mean(), tails), tails, atol=2e-3)


def test_wilson_inverts_the_score_test():
    for k, n in ((0, 10), (3, 10), (50, 64), (64, 64)):
        low, high = wilson(k, n)
        expected = stats.binomtest(k, n).proportion_ci(method="wilson")
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_rates_of_zero_and_one_are_not_certain():
    for share, n in ((0.0, 64), (1.0, 12)):
        e = rate_interval(torch.full((n,), bool(share)), seeded())
        assert e.method == "wilson" and e.value == share and 0 < e.high - e.low < 0.5
        assert share in (e.low, e.high)
    e = rate_interval(torch.tensor([True, False, True, True]), seeded())
    assert e.method == "percentile" and e.value == 0.75


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_shares_that_are_all_nothing_or_all_are_no_certainty(share):
    e = share_interval(torch.full((9,), share), seeded(), method="bca")
    assert (e.value, e.method) == (share, "wilson") and (e.low, e.high) == wilson(9 * int(share), 9)
    assert share_interval(torch.full((9,), 0.5), seeded()).method == "constant"
    some = torch.tensor([0.5, 1.0, 1.0])
    assert share_interval(some, seeded()) == mean_interval(some, seeded(), method="percentile")


def test_a_pairing_removes_what_is_common():
    common = 100 * normal(200, 0)
    a, b = common, common + 0.5 + 0.1 * normal(200, 1)
    paired = paired_difference(a, b, seeded())
    alone = mean_interval(b, seeded())
    assert paired.low < 0.5 < paired.high
    assert paired.high - paired.low < (alone.high - alone.low) / 100
    assert paired_difference(a, a, seeded()).method == "constant"
    with pytest.raises(BadInput, match="one length"):
        paired_difference(a, b[:-1], seeded())


def test_edges():
    none = rate_interval(torch.zeros(0, dtype=torch.bool), seeded())
    assert none.n == 0 and math.isnan(none.value)
    one = mean_interval(torch.tensor([2.0]), seeded())
    assert one.value == 2.0 and math.isnan(one.low)
    same = mean_interval(torch.zeros(9), seeded())
    assert (same.value, same.low, same.high, same.method) == (0, 0, 0, "constant")
    noisy = influence_interval(1.0, torch.zeros(9), seeded(), noise=0.5)
    assert noisy.high - 1 == pytest.approx(0.5 * 1.96, rel=1e-3) and 1 - noisy.low == pytest.approx(noisy.high - 1)
    with pytest.raises(BadInput, match="finite"):
        mean_interval(torch.tensor([1.0, float("nan")]), seeded())
    with pytest.raises(BadInput, match="True and False"):
        rate_interval(torch.tensor([0.2]), seeded())
    with pytest.raises(BadInput, match="level"):
        mean_interval(torch.ones(3), seeded(), level=95)


def test_the_seed_decides_and_chunks_do_not_matter(monkeypatch):
    x = normal(40, 5)
    assert mean_interval(x, seeded(1)) == mean_interval(x, seeded(1))
    assert mean_interval(x, seeded(1)) != mean_interval(x, seeded(2))
    whole = resampled_means(x, seeded(), 301)
    monkeypatch.setattr("sfumato.metrics.bootstrap._AT_ONCE", 400)
    assert torch.equal(whole, resampled_means(x, seeded(), 301))
