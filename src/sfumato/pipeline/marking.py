"""Diffusers' own call of a pipeline whose pictures are to be marked: each that it gives is, and nothing else comes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from sfumato.errors import BadInput

from .watermark import embed, marked_pictures, payloads

KINDS = ("pil", "np", "pt")
"""Values of a pipeline's ``output_type`` that are pictures."""


def called(marked: Mapping[str, Any], call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a pipeline's own ``call`` gives, with a mark in every picture, as `Text2Image.draw` marks.

    The number in a picture follows from its prompt and its generator's seed, as in a draw; where one generator draws
    several, the second has that of the next seed, and so on.

    Raises:
        BadInput: an ``output_type`` that is no picture; pictures too small to be marked.
        MarkFailed: a mark was not read back; no picture is returned.
    """
    given = inspect.signature(call).bind(*args, **kwargs)
    given.apply_defaults()
    kind = given.arguments.get("output_type")
    if kind not in KINDS:
        raise BadInput(f"this pipeline gives marked pictures only, not {kind!r}: use output_type pil, np or pt")
    out = call(*args, **kwargs)
    made = _marked(out[0], marked, given.arguments.get("prompt"), given.arguments.get("generator"))
    if isinstance(out, tuple):
        return (made, *out[1:])
    out.images = made
    return out


def marking(pipe: DiffusionPipeline, marked: Mapping[str, Any]) -> DiffusionPipeline:
    """The same pipeline, of a class of the same name whose own call is `called`; `of` says what is marked."""
    kind = type(pipe)

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return called(marked, kind.__call__.__get__(self), *args, **kwargs)

    own = {"__call__": call, "__module__": kind.__module__, "__doc__": kind.__doc__, "_marked_by_sfumato": dict(marked)}
    pipe.__class__ = type(kind.__name__, (kind,), own)
    return pipe


def of(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The settings of an adapter for a pipeline that `marking` made: so that it marks too."""
    marked = getattr(type(pipe), "_marked_by_sfumato", None)
    return {} if marked is None else {"marked": marked}


def _marked(pictures: Any, marked: Mapping[str, Any], prompt: Any, generator: Any) -> Any:
    """Pictures, in whichever of `KINDS`, with their marks."""
    many = list(pictures)
    size = many[0].size if isinstance(many[0], Image.Image) else _planes(many[0]).shape[-2:]
    said = [prompt] if isinstance(prompt, str) or prompt is None else list(prompt)
    asked = [said[i * len(said) // len(many)] for i in range(len(many))]
    numbers = payloads(marked, asked, _seeds(generator, len(many)), min(size))
    if isinstance(many[0], Image.Image):
        levels = [embed(np.asarray(x.convert("RGB")), number) for x, number in zip(many, numbers, strict=True)]
        return [Image.fromarray(x) for x in levels]
    made = marked_pictures(torch.stack([_planes(x) for x in many]), numbers)
    # In float32 whatever came: in fewer bits levels would run together.
    return made.to(pictures.device) if isinstance(pictures, Tensor) else made.permute(0, 2, 3, 1).numpy()


def _planes(picture: Tensor | np.ndarray) -> Tensor:
    return picture if isinstance(picture, Tensor) else torch.from_numpy(picture).permute(2, 0, 1)


def _seeds(generator: Any, n: int) -> list[int]:
    if isinstance(generator, Sequence) and len(generator) == n:
        return [g.initial_seed() for g in generator]
    one = generator[0] if isinstance(generator, Sequence) else generator
    first = torch.initial_seed() if one is None else one.initial_seed()
    return [first + i for i in range(n)]
