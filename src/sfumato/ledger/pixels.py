"""What ledger entries about pixel models share: training, samples, and what samples are compared by."""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d

from sfumato.data.pictures import open_pictures, to_tensor
from sfumato.metrics.frechet import frechet_distance
from sfumato.nets.wavelet import analyse
from sfumato.pipeline import ImageModel, load
from sfumato.train.pixels import PixelRecipe


def trained(recipe: PixelRecipe) -> ImageModel:
    """The model that ``recipe`` makes; nothing is left on disk."""
    with TemporaryDirectory() as folder:
        model: Any = load(recipe.run(folder, progress=False), "cpu")
        return model


def fresh(size: int, seed: int, count: int) -> Float[Tensor, "count 3 size size"]:
    """Pictures of the sketch world in [-1, 1], other ones than a recipe with this ``seed`` trains on."""
    world = open_pictures("sketch", size, seed=1000 + seed, count=count)
    return to_tensor([world.picture(i) for i in range(count)])


def drawn(model: ImageModel, n: int, seed: int, steps: int) -> Float[Tensor, "n 3 height width"]:
    """``n`` samples in [-1, 1], the same seeds for every model."""
    return 2 * model.draw(None, range(1000 * seed, 1000 * seed + n), sampling_steps=steps, batch=64) - 1


def brightness(x: Float[Tensor, "n 3 height width"], side: int) -> Float[Tensor, "n d"]:
    """Mean over the colours, averaged to ``side``: where it is bright."""
    return avg_pool2d(x.mean(1, keepdim=True), x.shape[-1] // side).flatten(1).double()


def texture(x: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n 6"]:
    """Logarithm of the energy in the three detail bands of two Haar levels: how rough it is, at one and two pixels."""
    bands, x = [], x.mean(1, keepdim=True).double()
    for _ in range(2):
        x, *details = analyse(x, 1, "haar").chunk(4, dim=1)
        bands += [d.square().flatten(1).mean(1) for d in details]
    return torch.log(torch.stack(bands, dim=1) + 1e-6)


def distances(samples: Float[Tensor, "n d"], truth: Float[Tensor, "m d"], chunk: int) -> list[float]:
    """Fréchet distance between each ``chunk`` of the samples and all of the truth."""
    return [frechet_distance(truth, part) for part in samples.split(chunk) if len(part) == chunk]
