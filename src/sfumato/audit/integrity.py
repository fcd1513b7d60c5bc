"""The integrity metric: how far pictures that should not change have moved (arXiv:2411.02068).

The paper defines it in words; what follows is our reading of them: the mean perceptual distance between the
two models' pictures of the same prompt and the same noise, with the distances of pictures that have nothing
in common beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.metrics.bootstrap import RESAMPLES, Estimate, mean_interval
from sfumato.metrics.perceptual import Distance
from sfumato.metrics.resize import to_float

BATCH = 64
Floats = Float[Tensor, "n 3 height width"]
Bytes = UInt8[Tensor, "n 3 height width"]


def distances(distance: Distance, a: Bytes | Floats, b: Bytes | Floats) -> Float[Tensor, "n"]:
    """The distance of every pair, in batches, in float64; of bytes only a batch at a time is brought to [0, 1].

    Raises:
        BadInput: pictures of different size, or a distance that is not finite.
    """
    if a.shape != b.shape:
        raise BadInput(f"the two models draw pictures of different size: {tuple(a.shape)} and {tuple(b.shape)}")
    pairs = zip(a.split(BATCH), b.split(BATCH), strict=True)
    with torch.no_grad():
        parts = [distance(to_float(x), to_float(y)).double().cpu() for x, y in pairs]
    moved = torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)
    if not moved.isfinite().all():
        raise BadInput(f"the distance {distance.name} is not finite (NaN or infinity) for some pictures")
    return moved


def per_prompt(prompts: Sequence[str], moved: Float[Tensor, "n"]) -> dict[str, float]:
    """Prompt -> mean over its seeds, in order of first appearance."""
    groups: dict[str, list[float]] = {}
    for prompt, x in zip(prompts, moved.tolist(), strict=True):
        groups.setdefault(prompt, []).append(x)
    return {prompt: sum(xs) / len(xs) for prompt, xs in groups.items()}


def integrity(
    prompts: Sequence[str],
    moved: Float[Tensor, "n"],
    generator: torch.Generator,
    resamples: int = RESAMPLES,
) -> tuple[Estimate, dict[str, float]]:
    """I: the mean over prompts of the mean distance over seeds, with its BCa interval over prompts.

    Args:
        prompts: the prompt of every pair.
        moved: its distance, from `distances`.
        generator: of the bootstrap.

    Returns:
        The estimate (n counts prompts), and the distance of every prompt. Sorted by prompt before
        resampling, so that the order in which pictures were drawn changes nothing.
    """
    means = per_prompt(prompts, moved)
    values = torch.tensor([means[p] for p in sorted(means)], dtype=torch.float64)
    return mean_interval(values, generator, resamples=resamples), means


def different_prompts(distance: Distance, prompts: Sequence[str], images: Bytes | Floats) -> float | None:
    """Mean distance of pictures of different prompts: each with the one half the set further on."""
    n = len(prompts)
    other = [(i + n // 2) % n for i in range(n)]
    kept = [i for i in range(n) if prompts[i] != prompts[other[i]]]
    if not kept:
        return None
    return float(distances(distance, images[kept], images[[other[i] for i in kept]]).mean())
