"""What ledger entries about pixel models share: training on pictures in memory, samples, and distances of samples."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d

from sfumato.data.pictures import open_pictures, to_tensor
from sfumato.metrics.frechet import frechet_distance
from sfumato.nets.wavelet import analyse
from sfumato.pipeline import ImageModel
from sfumato.train.loop import Run
from sfumato.train.pixels import PixelRecipe, PixelTraining


class InMemory:
    """``count`` pictures of the sketch world, drawn once; ``start`` keeps those of training and of judging apart."""

    label_names = ()

    def __init__(self, size: int, seed: int, count: int, start: int = 0):
        drawn = open_pictures("sketch", size, seed=seed, count=start + count)
        self.pictures = [drawn.picture(start + i) for i in range(count)]

    def __len__(self) -> int:
        return len(self.pictures)

    def picture(self, index: int) -> np.ndarray:
        return self.pictures[index]

    def tensor(self) -> Float[Tensor, "n 3 height width"]:
        """All of them, in [-1, 1]."""
        return to_tensor(self.pictures)


def trained(recipe: PixelRecipe, pictures: InMemory) -> ImageModel:
    """The model that ``recipe`` makes of ``pictures``, with averaged weights; nothing is left on disk."""
    torch.manual_seed(recipe.seed)
    model = recipe.model(())
    with TemporaryDirectory() as folder:
        Run(PixelTraining(recipe, model, pictures), recipe.schedule(), Path(folder)).fit(progress=False)
    model.network.eval().requires_grad_(False)
    return model


def drawn(model: ImageModel, n: int, seed: int, steps: int) -> Float[Tensor, "n 3 height width"]:
    """``n`` samples in [-1, 1], the same seeds for every model."""
    return 2 * model.sample(range(1000 * seed, 1000 * seed + n), steps=steps, batch_size=64) - 1


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
