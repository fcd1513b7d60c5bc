"""Optimisers with a small state: bitsandbytes' Adam, an extra."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from sfumato.errors import BadInput

Make = Callable[..., torch.optim.Optimizer]
_KIN: dict[Any, str] = {torch.optim.Adam: "Adam8bit", torch.optim.AdamW: "AdamW8bit"}


def require_eight_bits() -> None:
    """Raise `BadInput` where bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise BadInput("adam8bit is bitsandbytes' Adam, which is not installed: pip install 'sfumato[8bit]'")


def in_eight_bits(make: Make) -> Make:
    """The counterpart, in bitsandbytes, of torch's Adam or AdamW with its settings; any other optimiser as it is.

    Its two averages take a byte a number, with a scale to each 256; those of tensors below 4,096 numbers stay float32.
    """
    kind, settings = (make.func, dict(make.keywords)) if isinstance(make, partial) else (make, {})
    if kind not in _KIN:
        return make
    require_eight_bits()
    settings.pop("fused", None)  # how torch computes, not what
    return partial(getattr(import_module("bitsandbytes.optim"), _KIN[kind]), **settings)
