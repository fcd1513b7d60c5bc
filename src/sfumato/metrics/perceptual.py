"""Distances between two pictures, each with a name and a hash, so that figures say what they were measured
in."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate

from sfumato.errors import BadInput, unknown

from .resize import require_unit
from .vision import module_sha256

LPIPS_SIDE = 64
"""LPIPS is ill-defined below this side; pictures whose shorter side is smaller are enlarged to it."""
SSIM_WINDOW = 11


class Distance(Protocol):
    """A map from two batches of pictures in [0, 1] to one number per pair; 0 for equal pictures, symmetric.

    ``name`` is what a report calls it, ``hash`` identifies its weights ("" where it has none), ``resize``
    says what is done to pictures first.
    """

    name: str
    hash: str
    resize: str

    def __call__(
        self, a: Float[Tensor, "n 3 height width"], b: Float[Tensor, "n 3 height width"]
    ) -> Float[Tensor, "n"]: ...


class FeatureDistance:
    """Distance of unit-normalised feature maps, summed over layers: LPIPS (1801.03924, eq. 1) with all
    weights 1.

    For every layer l the feature vector at each place is divided by its length; the squared distance of the
    two vectors, at most 4 (at most 2 for non-negative features), is averaged over places. The sum is divided
    by the number of layers.
    """

    def __init__(self, layers: Sequence[nn.Module], name: str, side: int, range_: tuple[float, float] = (-1, 1)):
        """``layers`` act one after the other on pictures of ``side`` pixels with values in ``range_``."""
        self.layers = list(layers)
        self.name = name
        self.side = side
        self.range = range_
        self.resize = f"bilinear, antialiased, to {side}x{side}"
        self.hash = module_sha256(nn.ModuleList(self.layers))

    def features(self, x: Float[Tensor, "n 3 height width"]) -> list[Float[Tensor, "n channel h w"]]:
        """The normalised feature maps of pictures in [0, 1], one per layer."""
        weight = next(self.layers[0].parameters())
        x = _resized(x.to(weight), self.side, self.side) * (self.range[1] - self.range[0]) + self.range[0]
        maps = []
        for layer in self.layers:
            x = layer(x)
            maps.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
        return maps

    def __call__(
        self, a: Float[Tensor, "n 3 height width"], b: Float[Tensor, "n 3 height width"]
    ) -> Float[Tensor, "n"]:
        pairs = zip(self.features(a), self.features(b), strict=True)
        return torch.stack([(f - g).square().sum(1).mean((1, 2)) for f, g in pairs]).mean(0)


def oracle_distance(oracle: nn.Module) -> FeatureDistance:
    """`FeatureDistance` of the convolutional layers of the sketch world's oracle."""
    layers = [m for m in oracle.trunk if isinstance(m, nn.Sequential)]
    return FeatureDistance(layers, "oracle features", side=64)


class LPIPS:
    """LPIPS (arXiv:1801.03924) by torchmetrics, with weights that are on this machine already.

    Raises:
        BadInput: torchmetrics, torchvision or the backbone's weights are missing; nothing is ever downloaded.
    """

    def __init__(self, net: str = "alex"):
        if reason := lpips_missing(net):
            raise BadInput(f"LPIPS cannot be measured here: {reason}")
        from torchmetrics.functional.image.lpips import _LPIPS

        self.network = _LPIPS(pretrained=True, net=net, eval_mode=True).eval().requires_grad_(False)
        self.name = f"LPIPS ({net})"
        self.hash = module_sha256(self.network)
        self.resize = f"none, or bilinear to a shorter side of {LPIPS_SIDE} pixels where it is smaller"

    def __call__(
        self, a: Float[Tensor, "n 3 height width"], b: Float[Tensor, "n 3 height width"]
    ) -> Float[Tensor, "n"]:
        weight = next(self.network.parameters())
        a, b = (_enlarged(x.to(weight), LPIPS_SIDE) for x in (a, b))
        return self.network(a * 2 - 1, b * 2 - 1).reshape(len(a))


_BACKBONES = {"alex": "alexnet-owt-", "vgg": "vgg16-"}


def lpips_missing(net: str = "alex") -> str:
    """What keeps LPIPS from running without a download; empty when nothing does."""
    if net not in _BACKBONES:
        raise unknown("LPIPS backbone", net, _BACKBONES)
    for package in ("torchmetrics", "torchvision"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed"
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if not any(folder.glob(f"{_BACKBONES[net]}*.pth")):
        return f"the weights {_BACKBONES[net]}*.pth of its backbone are not in torch's hub folder"
    return ""


class MSE:
    """Mean squared error over pixels and channels, pictures in [0, 1]."""

    name, hash, resize = "mse", "", "none"

    def __call__(
        self, a: Float[Tensor, "n 3 height width"], b: Float[Tensor, "n 3 height width"]
    ) -> Float[Tensor, "n"]:
        return (a - b).square().mean((1, 2, 3))


class PSNR:
    """10 log10(1 / MSE) of pictures in [0, 1], in decibels; infinite for equal pictures.

    One number a picture, to be averaged as such: the PSNR of a whole batch's MSE is another number.

    Raises:
        BadInput: pictures of another range (`resize.require_unit`).
    """

    name, hash, resize = "psnr, mean over pictures, peak 1", "", "none"

    def __call__(
        self, a: Float[Tensor, "n 3 height width"], b: Float[Tensor, "n 3 height width"]
    ) -> Float[Tensor, "n"]:
        for x in (a, b):
            require_unit(x)
        return -10 * MSE()(a, b).log10()


class SSIM:
    """`ssim` as a measure of likeness; 1 for equal pictures.

    Raises:
        BadInput: pictures of another range (`resize.require_unit`).
    """

    name, hash = "ssim, 11x11 Gaussian of sigma 1.5, RGB channels, no padding, peak 1", ""
    resize = "none"

    def __call__(
        self, a: Float[Tensor, "n 3 height width"], b: Float[Tensor, "n 3 height width"]
    ) -> Float[Tensor, "n"]:
        for x in (a, b):
            require_unit(x)
        return ssim(a, b)


class OneMinusSSIM:
    """1 - SSIM (Wang et al. 2004): 11x11 Gaussian window of sigma 1.5, per channel, places without padding
    only.

    Raises:
        BadInput: pictures of another range (`resize.require_unit`).
    """

    name, hash, resize = "1-ssim", "", "none"

    def __call__(
        self, a: Float[Tensor, "n 3 height width"], b: Float[Tensor, "n 3 height width"]
    ) -> Float[Tensor, "n"]:
        return 1 - SSIM()(a, b)


def ssim(a: Float[Tensor, "n channel height width"], b: Float[Tensor, "n channel height width"]) -> Float[Tensor, "n"]:
    """Structural similarity of pictures in [0, 1], averaged over channels and places; at least 11 pixels a side.

    Wang et al. 2004: K1 = 0.01, K2 = 0.03, variances with divisor n, and only places whose window lies within the
    picture, as scikit-image with a crop of 5 pixels. torchmetrics pads by reflection and averages all places: another
    convention, which differs in the third digit.
    """
    if min(a.shape[-2:]) < SSIM_WINDOW:
        raise BadInput(f"SSIM needs pictures of at least {SSIM_WINDOW} pixels a side, not {tuple(a.shape[-2:])}")
    at = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    row = torch.exp(-at.square() / (2 * 1.5**2))
    window = (row[:, None] * row / row.sum() ** 2).to(a)[None, None]

    def blur(x: Tensor) -> Tensor:
        return conv2d(x.flatten(0, 1)[:, None], window).reshape(*x.shape[:2], -1)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    cov = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    return (similarity / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean((1, 2))


def _resized(x: Tensor, height: int, width: int) -> Tensor:
    if x.shape[-2:] == (height, width):
        return x
    return interpolate(x, (height, width), mode="bilinear", antialias=True, align_corners=False)


def _enlarged(x: Tensor, least: int) -> Tensor:
    """Pictures of a shorter side of at least ``least``, their aspect kept."""
    height, width = x.shape[-2:]
    factor = max(1, least / min(height, width))
    return _resized(x, round(factor * height), round(factor * width))
