"""Numbers about fields on a torus, such as the vorticity of a fluid: spectra, and the distance of two sets."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput

from .frechet import frechet_distance

FLOOR = 1e-8
"""Share of a field's power under which a shell counts as empty; it keeps the logarithm finite."""


def spectrum(fields: Float[Tensor, "*batch size size"]) -> Float[Tensor, "*batch shells"]:
    """Power in the shells |k| = 1, 2, ..., size / 2 (to the nearest whole number): shares of the mean of the square.

    With the mean (k = 0) and the corners beyond size / 2 + 1/2 these add up to the mean of the square (Parseval).
    """
    size = fields.shape[-1]
    if fields.ndim < 2 or fields.shape[-2] != size or size < 2:
        raise BadInput(f"spectra are of square fields, not of shape {tuple(fields.shape)}")
    power = torch.fft.fft2(fields.double()).abs().square() / size**4
    k = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64, device=fields.device)
    shell = (k[:, None] ** 2 + k**2).sqrt().round().long()
    sums = power.new_zeros(*power.shape[:-2], int(shell.max()) + 1)
    sums.index_add_(-1, shell.flatten(), power.flatten(-2))
    return sums[..., 1 : size // 2 + 1]


def spectral_distance(real: Float[Tensor, "n size size"], generated: Float[Tensor, "m size size"]) -> float:
    """Frechet distance of two sets of fields in the logarithm of their spectra (`spectrum`).

    Normal distributions are fitted to the log-spectra of both sets: |m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)).
    It sees the power at every scale and how it varies, and no place: fields that blur, or grow a tail of small waves,
    are far away, however plausible each value is. arXiv:2402.09470 judges roll-outs of a fluid by a Frechet distance of
    spectra; its exact features are not known to us, and these are ours.

    Raises:
        BadInput: fields that are not square, or fewer than two in a set.
    """
    features = [torch.log(spectrum(x) + FLOOR * x.double().square().mean((-2, -1))[:, None]) for x in (real, generated)]
    if min(map(len, features)) < 2:
        raise BadInput("a distance of sets needs at least two fields in each")
    return frechet_distance(*features)
