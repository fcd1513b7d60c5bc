"""Draws of a step: the same rows however the batch is cut, and the right distributions."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.train import draw


def take(rows: range, total: int, key=(0, 1, 2)) -> list[torch.Tensor]:
    rng, n = draw.Share(key, rows, total), len(rows)
    return [
        draw.integers(1000, n, rng), draw.uniform(n, rng), draw.strata(n, rng), draw.normal((n, 3), rng),
        draw.normal((n, 700, 31), rng), draw.uniform(n, rng),
    ]  # fmt: skip


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 2**40))
def test_shares_put_together_are_the_whole_batch(total, parts, seed):
    whole = take(range(total), total, (seed, 3))
    shares = [take(rows, total, (seed, 3)) for rows in draw.cut(total, min(parts, total))]
    for i, expected in enumerate(whole):
        assert torch.equal(torch.cat([share[i] for share in shares]), expected)


@given(st.integers(0, 10**6), st.integers(1, 1000))
def test_cuts_cover_all_rows_evenly(total, parts):
    runs = draw.cut(total, parts)
    assert runs[0].start == 0 and runs[-1].stop == total
    assert all(a.stop == b.start for a, b in pairwise(runs))
    assert max(map(len, runs)) - min(map(len, runs)) <= 1


@pytest.mark.parametrize("rng", [draw.Share((5, 0), range(4096), 4096), torch.Generator().manual_seed(1)])
def test_distributions(rng):
    n = 4096
    assert draw.integers(4, n, rng).bincount(minlength=4).sub(n / 4).abs().max() < 150
    u = draw.uniform(n, rng)
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.02
    t = draw.strata(n, rng)
    assert t.dtype == torch.float64 and (t.sort().values * n).floor().tolist() == list(range(n))
    x = draw.normal((n, 40), rng)
    assert abs(x.mean()) < 0.01 and abs(x.var() - 1) < 0.02
    products = (x @ x.T).square().fill_diagonal_(0)
    assert abs(products.sum() / (n * (n - 1) * 40) - 1) < 0.03, "rows are independent"


def test_draws_of_different_steps_streams_and_seeds_differ():
    keys = [(s, i, stream) for s in (0, 1, 2**33) for i in (0, 1, 2**20) for stream in (0, 1)]
    drawn = [draw.normal((2, 8), draw.Share(key, range(2), 2)) for key in keys]
    drawn += [torch.randn(2, 8, generator=draw.Share(key, range(2), 2)) for key in keys]
    assert len({tuple(x.flatten().tolist()) for x in drawn}) == 2 * len(keys)


def test_seeds_differ_in_the_bits_that_generators_read():
    seeds = {draw.step_seed(a, b, c) for a in range(3) for b in range(50) for c in range(3)}
    assert len({seed % 2**32 for seed in seeds}) == 450 and max(seeds) < 2**63


def test_a_draw_for_other_rows_is_an_error():
    with pytest.raises(ValueError, match="a share of 2"):
        draw.uniform(3, draw.Share((0,), range(2), 4))
