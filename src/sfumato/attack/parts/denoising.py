"""What attacks through the denoiser compare: its predictions on noised pictures."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from sfumato.data.cases import AttackCases
from sfumato.errors import BadInput
from sfumato.noise.process import compose
from sfumato.pipeline import Conditioning, Text2Image
from sfumato.pipeline.sampling import gated


def predicted(
    pipe: Text2Image, z: Float[Tensor, "batch channel h w"], t: Float[Tensor, "batch"], cond: Conditioning
) -> Float[Tensor, "batch channel h w"]:
    """The network's native prediction, with adapters that have a gate as strong as ``cond`` makes them."""
    with gated(pipe, cond):
        return pipe.denoiser(z, t, cond)


def errors(
    pipe: Text2Image,
    z0: Float[Tensor, "batch channel h w"],
    t: Float[Tensor, "batch"],
    eps: Float[Tensor, "batch channel h w"],
    cond: Conditioning,
) -> Float[Tensor, "batch"]:
    """For each row the mean squared error of the prediction at alpha z0 + sigma eps: how badly ``cond`` explains z0."""
    denoiser = pipe.denoiser
    alpha, sigma = denoiser.process.alpha_sigma(t, z0)
    target = compose(z0, eps, alpha, sigma, denoiser.prediction)
    return (predicted(pipe, alpha * z0 + sigma * eps, t, cond) - target).square().flatten(1).mean(dim=1)


def target_pictures(
    cases: AttackCases, original: Text2Image | None, which: Sequence[int]
) -> Float[Tensor, "n 3 height width"]:
    """For some cases the picture to bring back, in [0, 1]: one of those that are given, in turn, or the original's.

    Raises:
        BadInput: neither an original nor pictures.
    """
    if cases.pictures is not None:
        return cases.pictures[[i % len(cases.pictures) for i in which]]
    if original is None:
        raise BadInput("this attack aims at pictures of the concept: give the original model, or a folder of them")
    some = [cases.cases[i] for i in which]
    return original.draw([case.prompt for case in some], [case.seed for case in some], **cases.drawing)
