"""What the ledger entries of pixel models measure with: distances and features with known values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from sfumato.ledger.pixels import InMemory, brightness, distances, frechet, texture


def normal(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_frechet_distance_by_its_formula():
    x, y = normal(60, 5, 0) @ normal(5, 5, 1) + 1, normal(80, 5, 2)
    a, b = np.cov(x.numpy().T), np.cov(y.numpy().T)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert frechet(x, y) == pytest.approx(float(expected), rel=1e-8)
    assert abs(frechet(x, x)) < 1e-10
    assert frechet(x + 2, x) == pytest.approx(20, rel=1e-10)
    assert len(distances(x, y, 25)) == 2


def test_features_of_pictures_that_are_known():
    flat = torch.full((2, 3, 32, 32), 0.25)
    assert torch.allclose(brightness(flat, 4), torch.full((2, 16), 0.25).double())
    stripes = torch.tensor([1.0, -1.0]).repeat(16).expand(2, 3, 32, 32)
    fine = texture(stripes)
    # Columns alternate: all energy is in one detail band, with coefficients of size 2.
    assert fine[0].exp().sort().values[-2:].tolist() == pytest.approx([1e-6, 4.0], rel=1e-5)
    assert (texture(flat) < -13).all()


def test_pictures_of_training_and_judging_differ():
    train, judge = InMemory(16, 3, 4), InMemory(16, 3, 2, start=4)
    assert (len(train), len(judge)) == (4, 2)
    assert not any((a == b).all() for a in train.pictures for b in judge.pictures)
    assert judge.tensor().shape == (2, 3, 16, 16) and judge.tensor().abs().max() <= 1
