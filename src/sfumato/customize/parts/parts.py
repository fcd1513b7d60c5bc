"""Parts of what pictures show, found without supervision: clusters of clusters of patch features (arXiv:2311.15477)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from sfumato.errors import BadInput
from sfumato.files import atomic_file
from sfumato.foreign import read_tensors, reading, shaped

HEADER = "sfumato.parts"
_HEADER = {"foreground": int, "background": int, "variants": int}


def nearest(x: Float[Tensor, "n width"], centroids: Float[Tensor, "k width"]) -> Int[Tensor, "n"]:
    """The centroid of the largest cosine."""
    return (F.normalize(x, dim=-1) @ F.normalize(centroids, dim=-1).T).argmax(dim=-1)


def cosine_kmeans(
    x: Float[Tensor, "n width"], k: int, generator: torch.Generator, restarts: int = 5, iterations: int = 1000
) -> Float[Tensor, "k width"]:
    """k-means by cosine distance: unit centroids, the best of several starts by the sum of cosines.

    It does not see how long features are. A cluster that empties is put on the feature that is farthest from its own
    centroid.
    """
    x = F.normalize(x, dim=-1)
    found, best = x[:k], -float("inf")
    for _ in range(restarts):
        centroids = x[torch.randperm(len(x), generator=generator)[:k].to(x.device)]
        for _ in range(iterations):
            cosine = x @ centroids.T
            label = cosine.argmax(dim=1)
            total = torch.zeros_like(centroids).index_add_(0, label, x)
            empty = torch.bincount(label, minlength=len(centroids)) == 0
            moved = F.normalize(total, dim=-1)
            if empty.any():
                far = cosine.amax(dim=1).argsort()[: int(empty.sum())]
                moved[empty] = x[far]
            if torch.equal(moved, centroids):
                break
            centroids = moved
        score = float((x @ centroids.T).amax(dim=1).sum())
        if score > best:
            found, best = centroids, score
    return found


@dataclass(frozen=True, eq=False)
class PartDictionary:
    """Codebooks that say of each patch which part it is, and of each picture which variant of it.

    Attributes:
        split: foreground and background.
        foreground: which of ``split`` is the foreground.
        coarse: the M parts.
        background: the part that is the background.
        fine: for each part its variants.
        variants: K; the code K stands for a part that is absent.
    """

    split: Float[Tensor, "two width"]
    foreground: int
    coarse: Float[Tensor, "part width"]
    background: int
    fine: Sequence[Float[Tensor, "variant width"]]
    variants: int

    def in_front(self, features: Float[Tensor, "n h w width"]) -> Tensor:
        """Which patches are foreground."""
        return nearest(features.flatten(0, 2), self.split).view(features.shape[:3]) == self.foreground

    def parts(self, features: Float[Tensor, "n h w width"]) -> Int[Tensor, "n h w"]:
        """The part of every patch; those of the background are seen as the constant vector -1."""
        seen = torch.where(self.in_front(features)[..., None], features, -torch.ones_like(features))
        return nearest(seen.flatten(0, 2), self.coarse).view(features.shape[:3])

    def masks(self, features: Float[Tensor, "n h w width"]) -> Float[Tensor, "n part h w"]:
        """The parts as maps of 0 and 1, which partition the patches."""
        return F.one_hot(self.parts(features), len(self.coarse)).movedim(-1, 1).to(features)

    def means(self, features: Float[Tensor, "n h w width"]) -> Float[Tensor, "n part width"]:
        """The mean feature of every part in each picture, of the background's patches for that part; 0: absent."""
        masks = self.masks(features)
        masks[:, self.background] = (~self.in_front(features)).to(masks)
        total = torch.einsum("nmhw,nhwd->nmd", masks, features)
        return total / masks.sum(dim=(2, 3)).clamp(min=1)[..., None]

    def codes(self, features: Float[Tensor, "n h w width"]) -> Int[Tensor, "n part"]:
        """The variant of every part in each picture, K where the part is absent."""
        means = self.means(features)
        codes = torch.stack([nearest(means[:, m], fine) for m, fine in enumerate(self.fine)], dim=1)
        return codes.masked_fill((means == 0).all(dim=-1), self.variants)

    def save(self, path: str | os.PathLike, overwrite: bool = False) -> None:
        """Write the codebooks as safetensors."""
        tensors = {"split": self.split, "coarse": self.coarse, **{f"fine.{m}": x for m, x in enumerate(self.fine)}}
        header = {name: getattr(self, name) for name in _HEADER}
        with atomic_file(Path(path), overwrite) as temporary:
            metadata = {"format": "pt", HEADER: json.dumps(header)}
            save_file({k: x.cpu().contiguous() for k, x in tensors.items()}, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> PartDictionary:
        """The codebooks in a file that `save` wrote.

        Raises:
            BadInput: no such file, or something else.
        """
        if not Path(path).is_file():
            raise BadInput(f"there is no file of parts {path}")
        tensors, header = read_tensors(path)
        if HEADER not in header:
            raise BadInput(f"{path} holds no parts: leave it out, and they are found anew")
        with reading(path, "a file of parts"):
            told = shaped(json.loads(header[HEADER]), _HEADER, f"the header of {path}")
            fine = [tensors[f"fine.{m}"] for m in range(len(tensors["coarse"]))]
            return cls(split=tensors["split"], coarse=tensors["coarse"], fine=fine, **told)


def discover(
    features: Float[Tensor, "n h w width"], parts: int = 8, variants: int = 256, seed: int = 0, sample: int = 100
) -> PartDictionary:
    """Find parts and their variants in patch features of pictures: foreground, parts, then variants of each.

    Which of the two first clusters is the foreground, which the published notebook decides by eye, is decided by which
    touches the border of the pictures less. Variants are at most a quarter of the pictures, and parts at most the
    patches.

    Args:
        sample: pictures, drawn at random, out of which foreground and parts are told; variants are of all.

    Raises:
        BadInput: features that are all alike, or not finite.
    """
    if not features.isfinite().all() or float(features.flatten(0, 2).std(dim=0).max()) == 0:
        raise BadInput("the features of these pictures are all alike or not finite: give other pictures or an encoder")
    rng = torch.Generator().manual_seed(seed)
    n, h, w, _ = features.shape
    chosen = features[torch.randperm(n, generator=rng)[:sample].to(features.device)]
    split = cosine_kmeans(chosen.flatten(0, 2), 2, rng)
    label = nearest(chosen.flatten(0, 2), split).view(chosen.shape[:3])
    edge = torch.ones(h, w, dtype=torch.bool, device=label.device)
    edge[1:-1, 1:-1] = False
    share = [float((label[:, edge] == i).sum() / (label == i).sum().clamp(min=1)) for i in range(2)]
    foreground = int(share[1] < share[0])
    front = label == foreground
    if not front.any():
        raise BadInput("no patch of these pictures is foreground: give pictures in which something stands out")
    seen = torch.where(front[..., None], chosen, -torch.ones_like(chosen)).flatten(0, 2)
    coarse = cosine_kmeans(seen, min(parts, len(seen)), rng)
    background = int(nearest(-torch.ones_like(seen[:1]), coarse))
    variants = max(1, min(variants, n // 4))
    some = PartDictionary(split, foreground, coarse, background, [coarse[:1]] * len(coarse), variants)
    means, fine = some.means(features), []
    for m in range(len(coarse)):
        there = means[:, m][(means[:, m] != 0).any(dim=-1)]
        fine.append(cosine_kmeans(there, min(variants, len(there)), rng) if len(there) else coarse[m : m + 1])
    return PartDictionary(split, foreground, coarse, background, fine, variants)


def exact_matches(found: Int[Tensor, "n part"], asked: Int[Tensor, "n part"], absent: int) -> Float[Tensor, "n"]:
    """EMR: the share of the parts asked for whose variant is found, for each picture."""
    wanted = asked != absent
    return ((found == asked) & wanted).sum(dim=1) / wanted.sum(dim=1).clamp(min=1)


def code_similarity(
    dictionary: PartDictionary, found: Int[Tensor, "n part"], asked: Int[Tensor, "n part"]
) -> Float[Tensor, "n"]:
    """CoSim: the mean cosine between the centroids of the variants found and asked for; 0 where a part is absent."""
    absent, cosines = dictionary.variants, torch.zeros(found.shape)
    for m, fine in enumerate(dictionary.fine):
        unit = F.normalize(fine.float().cpu(), dim=-1)
        pick = lambda code, unit=unit: unit[code.clamp(max=len(unit) - 1)]
        both = (found[:, m] != absent) & (asked[:, m] != absent)
        cosines[:, m] = torch.where(both, (pick(found[:, m]) * pick(asked[:, m])).sum(dim=-1), 0.0)
    return cosines.sum(dim=1) / (asked != absent).sum(dim=1).clamp(min=1)


def across_parts(maps: Float[Tensor, "*batch part h w"]) -> Float[Tensor, "*batch part h w"]:
    """A_m / max(sum_j A_j, 1e-6): attention normalised across parts, cell by cell."""
    return maps / maps.sum(dim=-3, keepdim=True).clamp(min=1e-6)


def part_loss(
    maps: Float[Tensor, "batch part h w"],
    masks: Float[Tensor, "batch part h w"],
    said: Tensor | None = None,
) -> Float[Tensor, ""]:
    """Mean binary cross-entropy of `across_parts` with the parts' masks, logarithms not below -100.

    Args:
        said: which (picture, part) pairs have a word in the prompt, and count; None: all, as in the published code,
            where a part that is there and not said adds a constant of up to 100 without a gradient.
    """
    each = F.binary_cross_entropy(across_parts(maps).clamp(0, 1), masks.clamp(0, 1), reduction="none")
    if said is None:
        return each.mean()
    return (each * said[..., None, None].to(each)).sum() / (said.sum().clamp(min=1) * each[0, 0].numel())


class TokenMapper(torch.nn.Module):
    """Embeddings of parts' variants: y_{m,k} = MLP(E[m (K + 1) + k] + PE[m]), all learned, named as published.

    Args:
        layers: of the MLP, with ReLU between them; 0: none.
    """

    def __init__(self, parts: int, variants: int, width: int, layers: int = 3):
        super().__init__()
        self.parts, self.variants = parts, variants
        self.embedding = torch.nn.Embedding(parts * (variants + 1), width)
        self.pe = torch.nn.Parameter(torch.randn(parts, width))
        linear = [torch.nn.Linear(width, width) for _ in range(layers)]
        between = [x for layer in linear for x in (layer, torch.nn.ReLU())][:-1]
        self.projection = torch.nn.Sequential(*between) if layers else torch.nn.Identity()

    def forward(self, part: Int[Tensor, "n"], variant: Int[Tensor, "n"]) -> Float[Tensor, "n width"]:
        return self.projection(self.embedding(part * (self.variants + 1) + variant) + self.pe[part])
