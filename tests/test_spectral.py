"""Spectra of fields and the distance of sets of them, against closed forms and scipy; in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch.testing import assert_close

from noise_cases import normal
from sfumato.errors import BadInput
from sfumato.metrics.spectral import spectral_distance, spectrum


def waves(size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.arange(size, dtype=torch.float64) * (2 * math.pi / size)
    return x[:, None], x[None]


def test_a_wave_is_in_its_shell():
    y, x = waves()
    field = 3 * torch.cos(2 * x) + torch.sin(3 * x + 4 * y) + 7
    expected = torch.zeros(8, dtype=torch.float64)
    expected[1], expected[4] = 9 / 2, 1 / 2
    assert_close(spectrum(field), expected, rtol=0, atol=1e-13)


def test_parseval():
    """Low-pass fields, so that nothing lies in the corners: the shells add up to the variance."""
    fields = torch.fft.irfft2(torch.fft.rfft2(normal(3, 16, 16))[..., :6] * 1.0, s=(16, 16))
    fields = torch.fft.irfft2(torch.fft.rfft2(fields.mT)[..., :6], s=(16, 16)).mT
    assert_close(spectrum(fields).sum(-1), fields.var((-2, -1), correction=0), rtol=1e-12, atol=0)


def test_spectra_do_not_see_shifts_and_turns():
    field = normal(16, 16)
    for other in (field.roll((3, 5), (0, 1)), field.flip(0), field.T, -field):
        assert_close(spectrum(other), spectrum(field), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("n", "m"), [(40, 30), (4, 30), (3, 3)])
def test_distance_is_scipys_frechet_distance_of_log_spectra(n, m):
    """Also where a set has fewer fields than there are shells (8)."""
    real, generated = normal(n, 16, 16), 1.5 * normal(m, 16, 16, seed=1).cumsum(-1)
    x, y = (spectrum(z).log().numpy() for z in (real, generated))
    a, b = (np.cov(z, rowvar=False) for z in (x, y))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert spectral_distance(real, generated) == pytest.approx(float(expected), rel=1e-5)


def test_distances_that_are_known():
    x = normal(50, 16, 16)
    assert spectral_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert spectral_distance(x, 10 * x) == pytest.approx(8 * math.log(100) ** 2, rel=1e-6)  # eight shells


def test_distance_grows_with_blur_and_with_a_false_tail():
    real, more = normal(40, 16, 16), normal(40, 16, 16, seed=1)
    k = torch.fft.fftfreq(16, 1 / 16, dtype=torch.float64)
    far = (k[:, None] ** 2 + k**2).sqrt()
    filtered = lambda x, gain: torch.fft.ifft2(torch.fft.fft2(x) * gain).real
    distances = [spectral_distance(real, filtered(more, torch.exp(-far * b))) for b in (0.0, 0.1, 0.3)]
    assert distances[0] < distances[1] < distances[2]
    tails = [spectral_distance(real, filtered(more, 1 + b * (far > 5))) for b in (0.0, 1.0, 3.0)]
    assert tails[0] < tails[1] < tails[2]


def test_empty_shells_are_finite():
    y, x = waves()
    assert math.isfinite(spectral_distance(torch.cos(x + y).expand(3, 16, 16) * normal(3, 1, 1), normal(3, 16, 16)))


@pytest.mark.parametrize("shape", [(3, 8, 9), (8,), (3, 1, 1)])
def test_what_is_no_square_field_is_named(shape):
    with pytest.raises(BadInput, match="square fields"):
        spectrum(torch.zeros(shape))


def test_one_field_is_no_set():
    with pytest.raises(BadInput, match="at least two"):
        spectral_distance(normal(1, 8, 8), normal(4, 8, 8))
