"""What the ledger entries of pixel models measure with: distances and features with known values."""

from __future__ import annotations

import math

import pytest
import torch

from sfumato.ledger import core
from sfumato.ledger.pixels import brightness, distances, fresh, texture
from sfumato.train.simple_diffusion import SimpleDiffusion


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


def test_fresh_pictures_are_not_those_of_training():
    recipe = SimpleDiffusion(size=16, seed=3, pictures=4)
    seen, other = recipe.read(recipe.open(), [0, 1, 2, 3]), fresh(16, 3, 4)
    assert other.shape == (4, 3, 16, 16) and other.abs().max() <= 1
    assert not any(torch.equal(a, b) for a in seen for b in other)


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["simple_diffusion", "sid2"])
def test_entries_run_in_miniature(entry):
    experiment = core.load(entry)
    pairs = experiment.found({arm: experiment.measure(9, arm, updates=2, n=12) for arm in experiment.arms})
    assert pairs.keys() == experiment.claims.keys()
    for method, baseline in pairs.values():
        assert len(method) == len(baseline) > 2 and all(map(math.isfinite, [*method, *baseline]))
