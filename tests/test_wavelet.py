"""Wavelets by lifting: exact inverses, what each kind keeps, and the layers around a network."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sfumato.errors import BadInput
from sfumato.nets.wavelet import Entry, Exit, analyse, synthesise


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.sampled_from(["5/3", "haar"]), st.integers(0, 2),
    st.integers(0, 2**31),
)  # fmt: skip
def test_the_inverse_is_exact(channels, height, width, wavelet, levels, seed):
    x = normal(2, channels, height << levels, width << levels, seed=seed)
    bands = analyse(x, levels, wavelet)
    assert bands.shape == (2, channels << (2 * levels), height, width)
    assert_close(synthesise(bands, levels, wavelet), x, rtol=1e-12, atol=1e-12)


def test_single_precision_is_good_to_a_millionth():
    x = normal(2, 3, 64, 64).float().clamp(-1, 1)
    for wavelet in ("5/3", "haar"):
        assert (synthesise(analyse(x, 2, wavelet), 2, wavelet) - x).abs().max() < 1e-6


def test_lifting_is_the_published_formula():
    """d_i = x_{2i+1} - (x_{2i} + x_{2i+2}) / 2, s_i = x_{2i} + (d_{i-1} + d_i) / 4, mirrored, on a row by hand."""
    x = torch.tensor([1.0, 5.0, 2.0, 4.0, 8.0, 3.0], dtype=torch.float64)
    d = [5 - (1 + 2) / 2, 4 - (2 + 8) / 2, 3 - (8 + 8) / 2]
    s = [1 + (d[0] + d[0]) / 4, 2 + (d[0] + d[1]) / 4, 8 + (d[1] + d[2]) / 4]
    # Two equal rows: the row direction leaves them as they are, and no detail.
    bands = analyse(x.expand(1, 1, 2, 6), 1, "5/3")[0, :, 0]
    assert_close(bands, torch.tensor([s, d, [0.0] * 3, [0.0] * 3], dtype=torch.float64))


def test_five_three_is_blind_to_planes_and_haar_keeps_the_norm():
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    detail = analyse((0.3 * rows - 0.7 * columns + 2).double()[None, None], 1, "5/3")[:, 1:]
    assert detail[..., :-1, :-1].abs().max() < 1e-6  # the last ones see the mirror
    x = normal(2, 3, 8, 8)
    assert_close(analyse(x, 2, "haar").square().sum(), x.square().sum())


def test_odd_sides_are_refused():
    with pytest.raises(ValueError, match="cannot be halved"):
        analyse(normal(1, 1, 6, 5))
    with pytest.raises(BadInput, match="not 3 times"):
        Entry(3, 8, 3)


@pytest.mark.parametrize("front", ["5/3", "haar", "conv"])
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_entry_and_exit_change_the_side_by_the_factor(front, factor):
    x = normal(2, 3, 16, 16).float()
    features = Entry(3, 8, factor, front)(x)
    assert features.shape == (2, 8, 16 // factor, 16 // factor)
    out = Exit(8, 3, factor, front)(features)
    assert out.shape == x.shape and not out.any()


def test_all_of_the_picture_passes_a_wavelet_entry():
    """The Jacobian of the entry behind four wavelet bands has full rank: no direction of pixel space is lost."""
    torch.manual_seed(0)
    entry = Entry(1, 4, 2, "5/3").double()
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(entry, x).reshape(16, 16)
    assert torch.linalg.matrix_rank(jacobian) == 16
