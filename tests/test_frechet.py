"""The Fréchet distance: closed forms, every way to take its trace, and what its interval and extrapolation promise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg

from sfumato.errors import BadInput
from sfumato.metrics.bootstrap import influence_interval
from sfumato.metrics.frechet import (
    Gaussian,
    frechet_distance,
    frechet_infinity,
    frechet_influence,
    intercept_weights,
)
from sfumato.metrics.moments import Moments, RunningMoments, moments, scatter


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=seeded(seed), dtype=torch.float64)


def rotation(d, seed=0):
    return torch.linalg.qr(normal(d, d, seed)).Q


def axes(variances, offset=0.0):
    """Pictures whose covariance is exactly diagonal with these variances: two of them on each axis of positive one."""
    variances = torch.as_tensor(variances, dtype=torch.float64)
    used = variances > 0
    n = 2 * int(used.sum())
    steps = torch.diag((variances * (n - 1) / 2).sqrt())[used]
    return torch.cat([steps, -steps]) + offset


def on_axes(a, b, shift=0.0):
    """FD of commuting covariances: |dm|^2 + sum (sqrt a_i - sqrt b_i)^2."""
    a, b = (torch.as_tensor(v, dtype=torch.float64).sqrt() for v in (a, b))
    return float((a - b).square().sum()) + len(a) * shift**2


@pytest.mark.parametrize("n, d", [(400, 150), (40, 90), (2, 5)])
def test_invariances(n, d):
    x, y = normal(n, d, 1), normal(n + 7, d, 2) * 1.3 + 0.2
    at = frechet_distance(x, y)
    size = float(moments(x).cov.trace())
    assert abs(frechet_distance(x, x)) < 1e-12 * size
    assert frechet_distance(y, x) == pytest.approx(at, rel=1e-10)
    q = rotation(d)
    assert frechet_distance(x @ q - 5, y @ q - 5) == pytest.approx(at, rel=1e-9)
    assert frechet_distance(3 * x, 3 * y) == pytest.approx(9 * at, rel=1e-10)


@pytest.mark.parametrize("form", ["features", "moments", "float32"])
@pytest.mark.parametrize(
    "a, b",
    [
        ([4.0, 1.0, 0.25], [1.0, 2.0, 0.25]),
        ([3.0], [0.5]),
        ([1.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0], [2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]),  # singular, n < d
        ([1.0, 0.0, 2.0, 1.0], [2.0, 3.0, 1.0, 0.0]),  # singular, n > d: a dead feature in each
    ],
)
def test_commuting_covariances_have_a_closed_form(a, b, form):
    q = rotation(len(a))
    x, y = axes(a) @ q, axes(b, 0.5) @ q
    if form == "moments":
        x, y = moments(x), moments(y)
    elif form == "float32":
        x, y = x.float(), y.float()
    # the eigenvalues of a singular covariance come with an error of 1e-16, their roots with 1e-8
    tolerance = {"features": 1e-12, "moments": 1e-7, "float32": 1e-5}[form]
    assert frechet_distance(x, y) == pytest.approx(on_axes(a, b, 0.5), rel=tolerance)


def test_one_dimension():
    x, y = normal(50, 1) * 2 + 1, normal(70, 1, 1) * 0.5 - 3
    expected = float((x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-12)


def trace_forms(x, y):
    """tr (S_x S_y)^(1/2) by the eigenvalues of the product, by a symmetric root, by singular values, and by scipy."""
    sx, sy = moments(x).cov, moments(y).cov
    product = torch.linalg.eigvals(sx @ sy).sqrt().real.sum()
    values, vectors = torch.linalg.eigh(sx)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.mT
    symmetric = torch.linalg.eigvalsh(root @ sy @ root).clamp(min=0).sqrt().sum()
    xc, yc = ((s - s.mean(0)) / math.sqrt(len(s) - 1) for s in (x, y))
    nuclear = torch.linalg.svdvals(xc @ yc.mT).sum()
    scipy_root = linalg.sqrtm((sx @ sy).numpy()).real.trace()
    return [float(v) for v in (product, symmetric, nuclear, scipy_root)]


def trace_of(x, y):
    """The trace as the distance has it."""
    mx, my = moments(x), moments(y)
    outside = (mx.mean - my.mean).square().sum() + mx.cov.trace() + my.cov.trace()
    return (float(outside) - frechet_distance(x, y)) / 2


def test_every_form_of_the_trace_agrees_where_it_is_well_conditioned():
    x = normal(600, 150) @ (torch.eye(150, dtype=torch.float64) + 0.05 * normal(150, 150, 3))
    y = normal(500, 150, 1) * torch.linspace(0.3, 2, 150, dtype=torch.float64)
    product, symmetric, nuclear, scipy_root = trace_forms(x, y)
    assert trace_of(x, y) == pytest.approx(nuclear, rel=1e-10)
    assert symmetric == pytest.approx(nuclear, rel=1e-10) and product == pytest.approx(nuclear, rel=1e-10)
    assert trace_of(x, y) == pytest.approx(scipy_root, rel=1e-6)
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(frechet_distance(x, y), rel=1e-12)


@pytest.mark.parametrize("n, m", [(30, 40), (30, 300), (300, 30)])
def test_fewer_pictures_than_features(n, m):
    x, y = normal(n, 100), normal(m, 100, 1) * 1.5 + 0.1
    nuclear, product = trace_forms(x, y)[2], trace_forms(x, y)[0]
    assert trace_of(x, y) == pytest.approx(nuclear, rel=1e-12)
    assert trace_of(x, y) == pytest.approx(product, rel=1e-6)
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(frechet_distance(x, y), rel=1e-6)


def test_a_bad_condition_goes_by_the_singular_values():
    spread = torch.logspace(0, -9, 40, dtype=torch.float64)
    x, y = normal(300, 40) * spread, normal(300, 40, 1) * spread
    assert Gaussian(x).triangle is None  # a condition number of 1e18
    assert trace_of(x, y) == pytest.approx(trace_forms(x, y)[2], rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(0, 5), st.floats(-1e6, 1e6))
def test_streamed_and_merged_moments_are_those_of_all(sizes, seed, offset):
    n = sum(sizes) + 1
    x = normal(n, 4, seed) + offset
    running, other = RunningMoments(), RunningMoments()
    for i, part in enumerate(x[1:].split(sizes)):
        (running if i % 2 else other).update(part)
    running.update(x[:1])
    running.merge(other)
    found = running.moments()
    assert found.n == n and torch.allclose(found.mean, x.mean(0), rtol=1e-12, atol=1e-12)
    expected = torch.from_numpy(np.cov((x - offset).numpy(), rowvar=False))
    # x itself was rounded to 1e-16 of the offset, and its squared distances to that times their size
    assert torch.allclose(found.cov, expected, rtol=1e-9, atol=1e-12 + 1e-14 * abs(offset))


def test_moments_of_float32_with_a_large_mean():
    x = (normal(5000, 70) + 1000).float()
    exact = torch.from_numpy(np.cov(x.double().numpy(), rowvar=False))
    assert torch.allclose(moments(x).cov, exact, rtol=1e-10, atol=1e-12)


def test_scatter_is_the_product():
    x = normal(20, 200)
    assert torch.allclose(scatter(x), x.mT @ x, rtol=1e-13, atol=1e-12)


def weighted(x, y, w):
    """FD with weights on the generated pictures, n in all."""
    n = len(y)
    mean = (w[:, None] * y).sum(0) / n
    rows = (y - mean) * w.sqrt()[:, None] / math.sqrt(n - 1)
    s = rows.mT @ rows
    return frechet_distance(moments(x), Moments(n, mean, s)) if n > y.shape[1] else weighted_wide(x, mean, rows)


def weighted_wide(x, mean, rows):
    m = moments(x)
    root = Gaussian(x).root
    outside = (m.mean - mean).square().sum() + m.cov.trace() + rows.square().sum()
    return float(outside - 2 * torch.linalg.svdvals(root @ rows.mT).sum())


@pytest.mark.parametrize("n, d", [(60, 8), (12, 20)])
def test_the_influence_is_the_derivative_by_the_weight_of_a_picture(n, d):
    x, y = normal(80, d), normal(n, d, 1) * 1.4 + 0.3
    value, influence = frechet_influence(x, y)
    assert value == pytest.approx(frechet_distance(x, y), rel=1e-10)
    assert float(influence.mean()) == pytest.approx(0, abs=1e-10)
    step = 1e-5
    for j in (0, n // 2):
        w = torch.ones(n, dtype=torch.float64)
        shift = (torch.arange(n) == j).double() - 1 / n  # the weights keep their sum
        slope = (weighted(x, y, w + step * shift) - weighted(x, y, w - step * shift)) / (2 * step)
        assert n * slope == pytest.approx(float(influence[j]), rel=1e-4)


@pytest.mark.parametrize("n, d", [(100, 4), (20, 40)])
def test_the_interval_covers_the_expected_distance(n, d):
    """The target is the mean of FD over sets of n pictures, real set fixed; naive resampling would miss it by far."""
    x = Gaussian(normal(4 * d + 40, d))
    draw = lambda seed: normal(n, d, 100 + seed) * 1.3 + 0.2
    target = sum(frechet_distance(x, draw(seed)) for seed in range(400, 600)) / 200
    hit = 0
    for seed in range(100):
        e = influence_interval(*frechet_influence(x, draw(seed)), seeded(seed), resamples=300)
        hit += e.low <= target <= e.high
    # 100 trials: the standard error is 2.2 %; it may cover more than it says, as its docstring tells
    assert hit / 100 > 0.95 - 3 * 0.022


def test_the_distance_at_infinity_is_the_true_one():
    d, n, seeds = 12, 1500, 12
    variances = torch.linspace(0.5, 1.5, d, dtype=torch.float64)
    real = Moments(10**9, torch.zeros(d, dtype=torch.float64), torch.eye(d, dtype=torch.float64))
    truth = float((variances.sqrt() - 1).square().sum())
    finite, infinite = [], []
    for seed in range(seeds):
        y = normal(n, d, seed) * variances.sqrt()
        finite.append(frechet_distance(real, y))
        infinite.append(frechet_infinity(real, y, seeded(seed)).value)
    error = lambda values: np.std(values, ddof=1) / math.sqrt(seeds)
    assert abs(np.mean(infinite) - truth) < 2 * error(infinite)
    assert np.mean(finite) - truth > 2 * error(finite)


def test_the_extrapolation_is_the_least_squares_line():
    found = frechet_infinity(normal(400, 6), normal(300, 6, 1) + 0.5, seeded())
    assert len(found.sizes) == 15 and found.sizes[0] == 30 and found.sizes[-1] == 300
    slope, value = np.polyfit(1 / np.array(found.sizes), found.distances, 1)
    assert found.value == pytest.approx(value, rel=1e-8) and found.slope == pytest.approx(slope, rel=1e-8)
    weights = intercept_weights(found.sizes)
    assert float(weights.sum()) == pytest.approx(1)
    assert float((weights / torch.tensor(found.sizes)).sum()) == pytest.approx(0, abs=1e-12)
    assert frechet_infinity(normal(400, 6), normal(300, 6, 1), seeded(), draws=2).sizes[:4] == (30, 30, 49, 49)


def test_bad_input():
    x = normal(20, 3)
    with pytest.raises(BadInput, match="features of 3 numbers and of 4"):
        frechet_distance(x, normal(20, 4))
    with pytest.raises(BadInput, match="at least 1 set of each size, not 0"):
        frechet_infinity(x, x, seeded(), draws=0)
    with pytest.raises(BadInput, match="at least 2 pictures, not 1"):
        frechet_distance(x, x[:1])
    broken = x.clone()
    broken[5, 1] = math.nan
    with pytest.raises(BadInput, match="picture 5 are not finite"):
        frechet_distance(x, broken)
    with pytest.raises(BadInput, match="float"):
        frechet_distance(x, torch.ones(3, 3, dtype=torch.long))
    with pytest.raises(BadInput, match="15 sizes from 2 pictures on, and 12"):
        frechet_infinity(x, x[:12], seeded())
    with pytest.raises(BadInput, match="only mean and covariance"):
        frechet_influence(x, moments(x))
