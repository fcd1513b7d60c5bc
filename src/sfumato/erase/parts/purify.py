"""Purifying: a concept is taken out of a picture by inverting it and drawing it again with the erased model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.pipeline import Text2Image


@dataclass(frozen=True)
class Purified:
    """Pictures without the concept, and the same done by the model that still has it.

    Attributes:
        pictures: in [0, 1].
        control: what the original makes of the same noise, which should be the pictures given; None without it.
        moved: root of the mean squared distance of each picture to the one given.
        control_moved: the same of the control, the error of the reconstruction itself.
    """

    pictures: Float[Tensor, "n 3 height width"]
    control: Float[Tensor, "n 3 height width"] | None
    moved: list[float]
    control_moved: list[float] | None


def purify(
    erased: Text2Image,
    pictures: Float[Tensor, "n 3 height width"],
    prompts: str | Sequence[str],
    *,
    original: Text2Image | None = None,
    inversion_prompts: str | Sequence[str] | None = None,
    sampling_steps: int = 50,
    cfg_scale: float | None = None,
    progress: bool = False,
) -> Purified:
    """Take what ``erased`` no longer draws out of pictures (arXiv:2312.12807): regions of the concept change, the rest
    stays.

    DDIM inversion without guidance leads each picture to its noise; from there the erased model draws with the same
    prompt and guidance. That this is a use of the method is confirmed from the paper's first figure; the steps, the
    guidance and which model inverts are reconstructed: the ``original`` does where it is given, else the erased one.

    Args:
        erased: from any eraser. One that holds the unconditional score purifies by guidance, so ``cfg_scale`` must not
            be 1.
        pictures: in [0, 1], of the model's size.
        prompts: what the pictures show, with the concept named; one for all, or one each.
        original: the model before erasure, which also gives the control.
        inversion_prompts: what the inversion is told, if not ``prompts``; "" is nothing.
        sampling_steps: N, of the inversion and of the drawing; the error of the reconstruction falls with it.
        cfg_scale: guidance of the drawing; None: the model's own (7.5 for Stable Diffusion).

    Raises:
        BadInput: an empty prompt, or as many prompts as there are no pictures; no pictures, or of another size.
    """
    shape = tuple(pictures.shape)
    if len(shape) != 4 or not shape[0] or shape[1:] != (3, erased.size, erased.size):
        raise BadInput(
            f"give one picture or more as a tensor of shape (n, 3, {erased.size}, {erased.size}), the size that this "
            f"model draws: got {shape}"
        )
    n = len(pictures)
    said = [prompts] * n if isinstance(prompts, str) else list(prompts)
    told = said if inversion_prompts is None else inversion_prompts
    told = [told] * n if isinstance(told, str) else list(told)
    if len(said) != n or len(told) != n:
        raise BadInput(f"give one prompt for all, or one for each of the {n} pictures")
    if any(not prompt.strip() for prompt in said):
        raise BadInput("say what the pictures show, the concept included, as in 'a red star': guidance needs a prompt")
    inverter = erased if original is None else original
    with torch.no_grad():
        x = pictures.to(inverter.device, inverter.dtype) * 2 - 1
        noise = inverter.invert(inverter.encode_image(x), inverter.encode(told), sampling_steps)
    options = {"sampling_steps": sampling_steps, "cfg_scale": cfg_scale, "scheduler": "ddim", "progress": progress}
    draw = lambda pipe: pipe.draw(said, [0] * n, start=noise.to(pipe.device, pipe.dtype), **options)
    apart = lambda made: (made - pictures.float().cpu()).square().mean((1, 2, 3)).sqrt().tolist()
    made, control = draw(erased), None if original is None else draw(original)
    return Purified(made, control, apart(made), None if control is None else apart(control))
