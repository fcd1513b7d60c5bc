"""What the ledger entries of pixel models measure with: distances and features with known values."""

from __future__ import annotations

import pytest
import torch

from sfumato.ledger.pixels import InMemory, brightness, distances, texture


def test_distances_of_chunks():
    x = torch.randn(80, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = distances(torch.cat([x, x + 2, x[:7]]), x, 80)
    assert found == pytest.approx([0, 20], abs=1e-6)


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
