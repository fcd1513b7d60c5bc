"""What preserving takes of many captions: the sum of the outer products of their rows, computed once and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from sfumato.data.captions import clean, decode, lines_of
from sfumato.errors import BadInput
from sfumato.files import atomic_file, tensors_sha256
from sfumato.foreign import read_tensors
from sfumato.pipeline import Text2Image

from .closed_form import gram

Rows = Literal["all", "text"]
BATCH = 64
_KEY = "sfumato.statistics"


def read_captions(path: str | Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        BadInput: no such file, no text, or nothing in it.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"there is no file of captions {path}: name a text file with one caption a line")
    found = [text for line in lines_of(decode(path.read_bytes(), str(path))) if (text := clean(line))]
    if not found:
        raise BadInput(f"{path} holds no captions: give one a line")
    return found


def caption_gram(
    pipe: Text2Image, captions: Sequence[str], rows: Rows = "all", cache: Path | None = None
) -> Float[Tensor, "dim dim"]:
    """B_k / N: the sum of e e^T over the rows of N captions as cross-attention reads them, over N; in float64.

    Args:
        rows: the whole context, padding included where the network looks at it, or up to the first end of the text.
        cache: a file to read it from, or to write it to where there is none yet.

    Raises:
        BadInput: the file holds the statistics of other captions, rows or text encoders, or none.
    """
    asked = _identity(pipe, captions, rows) if cache is not None else ""
    if cache is not None and cache.exists():
        tensors, header = read_tensors(cache, "caption statistics")
        if header.get(_KEY) != asked or "gram" not in tensors:
            raise BadInput(
                f"{cache} holds no statistics of these captions with this text encoder: name another file, or remove it"
            )
        return tensors["gram"].to(pipe.device)
    total = None
    for start in range(0, len(captions), BATCH):
        cond = pipe.encode(list(captions[start : start + BATCH]))
        read = pipe.text_rows(cond)
        some = gram(read if rows == "all" else read[cond.mask])
        total = some if total is None else total + some
    assert total is not None, "no captions"
    if cache is not None:
        with atomic_file(cache) as temporary:
            save_file({"gram": total.cpu() / len(captions)}, temporary, metadata={_KEY: asked})
    return total / len(captions)


def _identity(pipe: Text2Image, captions: Sequence[str], rows: Rows) -> str:
    """What the statistics depend on, hashed."""
    readers = {name: encoder for (_, name), encoder in zip(pipe.text_parts(), pipe.text_encoders, strict=True)}
    weights = {f"{part}.{name}": x for part, m in readers.items() for name, x in m.named_parameters()}
    read = torch.nn.ModuleList([p.module for p in pipe.projections() if p.kind == "text.in"])
    weights |= {f"text.in.{name}": x for name, x in read.named_parameters()}
    which = f"{rows} that are looked at" if pipe.masked and rows == "all" else rows
    told = "\n".join([which, tensors_sha256(weights), *captions])
    return hashlib.sha256(told.encode()).hexdigest()
