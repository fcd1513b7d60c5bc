"""KID, CMMD, neighbours and the Inception score: brute force, closed forms and what they are for."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import BadInput
from sfumato.metrics import kernels, neighbours
from sfumato.metrics.bootstrap import influence_interval
from sfumato.metrics.inception_score import inception_score
from sfumato.metrics.kernels import cmmd, kid


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=seeded(seed), dtype=torch.float64)


def unit(x):
    return x / x.norm(dim=1, keepdim=True)


def test_kid_is_the_double_sum():
    x, y = normal(9, 4), normal(9, 4, 1) + 0.5
    k = lambda a, b: (float(a @ b) / 4 + 1) ** 3
    n = range(9)
    within = sum(k(s[i], s[j]) for s in (x, y) for i in n for j in n if i != j) / (9 * 8)
    across = sum(k(x[i], y[j]) for i in n for j in n) / 81
    found = kid(x, y, seeded())
    assert found.value == pytest.approx(within - 2 * across, rel=1e-12) and found.spread == 0
    assert kid(y, x, seeded()).value == pytest.approx(found.value, rel=1e-12)


def test_kid_of_halves_of_one_set_is_zero_on_average():
    x = normal(4000, 8)
    values = []
    for seed in range(60):
        order = torch.randperm(len(x), generator=seeded(seed))
        values.append(kid(x[order[:50]], x[order[50:100]], seeded()).value)
    values = torch.tensor(values)
    assert abs(float(values.mean())) < 3 * float(values.std()) / math.sqrt(60)
    assert float(values.min()) < 0 < float(values.max())


def test_kid_of_subsets_aims_at_the_closed_form():
    """In one dimension k(x, y) = 1 + 3 x y + 3 x^2 y^2 + x^3 y^3, so MMD^2 is a sum of squared moment differences."""
    shift, trials = 0.6, 60
    truth = 3 * shift**2 + 3 * (shift**2) ** 2 + (shift**3 + 3 * shift) ** 2
    x = [normal(300, 1, 1000 + seed) for seed in range(trials)]
    values = [kid(x[s], normal(100, 1, s) + shift, seeded(s), subsets=4, size=50).value for s in range(trials)]
    values = torch.tensor(values)
    assert abs(float(values.mean()) - truth) < 3 * float(values.std()) / math.sqrt(trials)


def test_the_interval_of_kid_covers_its_expectation():
    x = normal(300, 8, 999)
    draw = lambda seed: kid(x, normal(100, 8, seed) + 0.3, seeded(seed), subsets=10, size=60)
    target = sum(draw(seed).value for seed in range(1000, 1100)) / 100
    hit = 0
    for seed in range(60):
        found = draw(seed)
        e = influence_interval(found.value, found.influence, seeded(seed), noise=found.noise, resamples=300)
        hit += e.low <= target <= e.high
    assert hit / 60 > 0.95 - 3 * 0.028  # 60 trials: the standard error is 2.8 %


def test_cmmd_closed_forms(monkeypatch):
    x, y = unit(normal(40, 6)), unit(normal(30, 6, 1) + 0.5)
    assert cmmd(x, x).value == 0
    k = lambda a, b, sigma: torch.exp(-torch.cdist(a, b).square() / (2 * sigma**2))
    for sigma in (0.3, 10.0):
        expected = 1000 * float(k(x, x, sigma).mean() + k(y, y, sigma).mean() - 2 * k(x, y, sigma).mean())
        assert cmmd(x, y, sigma=sigma).value == pytest.approx(expected, rel=1e-9) and expected > 0
    wide = 1000 * float((x.mean(0) - y.mean(0)).square().sum()) / 1e8
    assert cmmd(x, y, sigma=1e4).value == pytest.approx(wide, rel=1e-7)
    shuffled = x[torch.randperm(40, generator=seeded())]
    assert abs(cmmd(x, shuffled, sigma=0.3).value) < 1e-10
    whole = cmmd(x, y)
    monkeypatch.setattr(kernels, "_AT_ONCE", 49)
    assert cmmd(x, y).value == pytest.approx(whole.value, rel=1e-10)


def test_the_influence_on_cmmd_is_its_derivative():
    x, y = normal(12, 3), normal(10, 3, 1) + 1
    k = lambda a, b: torch.exp(-torch.cdist(a, b).square() / 8)

    def value(w):
        return 1000 * float(k(x, x).mean() + w @ k(y, y) @ w / 100 - 2 * (k(x, y).mean(0) @ w) / 10)

    influence, ones = cmmd(x, y, sigma=2.0).influence, torch.ones(10, dtype=torch.float64)
    for j in (0, 7):
        shift = 1e-4 * ((torch.arange(10) == j).double() - 0.1)
        slope = (value(ones + shift) - value(ones - shift)) / 2e-4
        assert 10 * slope == pytest.approx(float(influence[j]), rel=1e-6)


def brute(x, y, k=3, k_density=5):
    own = lambda s: torch.cdist(s, s).fill_diagonal_(torch.inf).sort(dim=1).values
    rx, ry, d = own(x), own(y), torch.cdist(x, y)
    return (
        (d <= rx[:, k - 1, None]).any(0),
        (d <= ry[:, k - 1]).any(1),
        (d < rx[:, k_density - 1, None]).double().sum(0) / k_density,
        (d < rx[:, k_density - 1, None]).any(1),
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(6, 40), st.integers(6, 40), st.integers(1, 5), st.integers(0, 99), st.sampled_from([7, 2048]))
def test_neighbours_are_those_of_the_whole_matrix(n, m, d, seed, block):
    x, y = normal(n, d, seed), normal(m, d, seed + 1) * 1.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "_BLOCK", block)
        found = neighbours.neighbours(x, y)
    for name, expected in zip(("precise", "recalled", "density", "covered"), brute(x, y), strict=True):
        assert torch.equal(getattr(found, name), expected), name


def means(found):
    return [float(v.double().mean()) for v in (found.precise, found.recalled, found.density, found.covered)]


def test_the_same_set_is_near_itself():
    for dtype in (torch.float64, torch.float32):
        x = normal(300, 8).to(dtype)
        assert means(neighbours.neighbours(x, x)) == [1, 1, pytest.approx(1, abs=1e-12), 1]


def test_far_away_and_inside():
    x = normal(200, 4)
    assert means(neighbours.neighbours(x, normal(200, 4, 1) + 100)) == [0, 0, 0, 0]
    # a tight cluster in the middle: all precise, hardly anything recalled, dense, not covered
    precision, recall, density, coverage = means(neighbours.neighbours(x, 0.01 * normal(200, 4, 1)))
    assert precision > 0.99 and recall < 0.02 and density > 1 and coverage < 0.2
    # and the other way round the two change places
    precision, recall, *_ = means(neighbours.neighbours(0.01 * normal(200, 4, 1), x))
    assert precision < 0.02 and recall > 0.99


def test_equal_distributions_have_the_expected_density_and_coverage():
    sets = [(normal(120, 3, seed), normal(200, 3, seed + 50)) for seed in range(40)]
    found = torch.tensor([means(neighbours.neighbours(x, y))[2:] for x, y in sets])
    error = found.std(0) / math.sqrt(40)
    expected = neighbours.expected_coverage(120, 200, 5)
    assert abs(float(found[:, 0].mean()) - 1) < 3 * float(error[0])
    assert abs(float(found[:, 1].mean()) - expected) < 3 * float(error[1])
    assert neighbours.expected_coverage(10**6, 10**6, 5) == pytest.approx(1 - 2**-5, abs=1e-5)


def test_inception_score_closed_forms():
    same = normal(1, 7).expand(40, 7)
    assert inception_score(same).value == pytest.approx(1, abs=1e-12)
    sure = 1000.0 * torch.eye(6, dtype=torch.float64).repeat(5, 1)
    assert inception_score(sure, splits=5).value == pytest.approx(6, rel=1e-12)
    logits = normal(30, 5)
    p = logits.softmax(1)
    scores = [(s * (s / s.mean(0)).log()).sum(1).mean().exp() for s in p.split(10)]
    found = inception_score(logits, splits=3)
    assert found.value == pytest.approx(float(sum(scores) / 3), rel=1e-12)
    assert found.spread == pytest.approx(float(torch.stack(scores).std(correction=0)), rel=1e-10)
    assert 1 <= inception_score(logits, seeded()).value <= 5
    assert inception_score(logits, seeded(1)) != inception_score(logits, seeded(2))


def test_the_influence_on_the_inception_score_is_its_derivative():
    p = normal(20, 4).softmax(1)
    influence, ones = inception_score(p.log(), splits=1).influence, torch.ones(20, dtype=torch.float64)

    def value(w):
        q = (w[:, None] * p).sum(0) / 20
        return float(((w[:, None] * p * (p / q).log()).sum() / 20).exp())

    for j in (3, 11):
        shift = 1e-4 * ((torch.arange(20) == j).double() - 0.05)
        assert 20 * (value(ones + shift) - value(ones - shift)) / 2e-4 == pytest.approx(float(influence[j]), rel=1e-5)


def test_bad_input():
    x = normal(20, 3)
    with pytest.raises(BadInput, match="2 pictures in each set, not 20 and 1"):
        kid(x, x[:1], seeded())
    with pytest.raises(BadInput, match="features of 4 numbers"):
        cmmd(x, normal(20, 4))
    for subsets, size in ((0, 10), (5, 1), (5, 0)):
        with pytest.raises(BadInput, match=f"not of {subsets} of {size}"):
            kid(x, x, seeded(), subsets=subsets, size=size)
    for sigma in (0, -1, math.inf, math.nan):
        with pytest.raises(BadInput, match="width of a kernel"):
            cmmd(x, x, sigma=sigma)
    with pytest.raises(BadInput, match="at least 6 real pictures, not 5"):
        neighbours.neighbours(x[:5], x)
    with pytest.raises(BadInput, match="at least 4 generated pictures, not 3"):
        neighbours.neighbours(x, x[:3])
    with pytest.raises(BadInput, match="at least 10 pictures, not 4"):
        inception_score(x[:4])
