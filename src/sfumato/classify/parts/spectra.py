"""What frequencies the ways through iFormer's mixers keep."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.nets.iformer import Block, IFormer, Stage


def log_amplitude(maps: Float[Tensor, "*maps h w"]) -> Float[Tensor, "h w"]:
    """Mean over maps of the logarithm of the amplitude at each frequency, the mean's in the middle; float64."""
    amplitude = torch.fft.fft2(maps.double().flatten(0, -3), norm="ortho").abs()
    floor = torch.finfo(torch.float32).eps * amplitude.amax().clamp(min=1e-30)
    return torch.fft.fftshift((amplitude + floor).log().mean(0))


def high_share(maps: Float[Tensor, "*maps h w"]) -> float:
    """Share of the power of more than a quarter of a wave a pixel, down or across, in that of all but the mean; NaN
    where there is none."""
    power = torch.fft.fft2(maps.double().flatten(0, -3)).abs().square().sum(0)
    power[0, 0] = 0
    down, across = (torch.fft.fftfreq(side, device=power.device).abs() for side in power.shape)
    high = (down[:, None] > 0.25) | (across > 0.25)
    return float(power[high].sum() / power.sum())


def profile(maps: Float[Tensor, "*maps h w"], rings: int = 8) -> list[float]:
    """`log_amplitude` along rings of equal width from no wave to half a wave a pixel, less that of the first; rings
    that a small map does not reach are left out."""
    spectrum = torch.fft.ifftshift(log_amplitude(maps))
    down, across = (torch.fft.fftfreq(side, device=spectrum.device) for side in spectrum.shape)
    ring = ((down[:, None] ** 2 + across**2).sqrt() * 2 * rings).long()
    means = [spectrum[ring == i].mean() for i in range(rings) if (ring == i).any()]
    return [float(mean - means[0]) for mean in means]


@torch.no_grad()
def spectra(net: IFormer, x: Float[Tensor, "n 3 h w"]) -> list[dict[str, Any]]:
    """For every block what comes of each way ("conv", "pool", "attention") for standardised pictures ``x``: its
    `high_share`, None where there is none, and its `profile`."""
    found: list[dict[str, Any]] = []
    for i, stage in enumerate(net.stages):
        assert isinstance(stage, Stage)
        h = stage.enter(x)
        for j, block in enumerate(stage.blocks):
            assert isinstance(block, Block)
            ways = block.mixer.ways(block.norm1(h).permute(0, 3, 1, 2))
            shares = {way: high_share(maps) for way, maps in ways.items()}
            told = {
                way: {"high": shares[way] if shares[way] == shares[way] else None, "profile": profile(maps)}
                for way, maps in ways.items()
            }
            found.append({"stage": i + 1, "block": j + 1, **told})
            h = block(h)
        x = h.permute(0, 3, 1, 2)
    return found
