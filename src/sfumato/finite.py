"""Numbers that are none: NaN and infinity are refused where weights, pictures and figures come in or go out.

Whatever is computed with them would look like a result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput

NONE = "not finite (NaN or infinity)"


class NotFinite(BadInput):
    """Numbers that are NaN or infinite; the message says which and where."""


def finite(x: Tensor) -> bool:
    """Whether all numbers in ``x`` are finite."""
    if x.is_meta or not x.is_floating_point():
        return True
    # A sum makes no copy; one that overflows although every number is finite leaves the matter to the second look.
    x = x.detach()
    return bool(torch.isfinite(x.sum(dtype=torch.promote_types(x.dtype, torch.float32))) or torch.isfinite(x).all())


def require_finite(named: Iterable[tuple[str, Tensor]], of: str) -> None:
    """Refuse weights that are not finite. Cost: each is read once.

    Args:
        named: (name, weight).
        of: what they belong to, in words.

    Raises:
        NotFinite: names the first.
    """
    for name, x in named:
        if not finite(x):
            raise NotFinite(f"the weight {name} of {of} holds numbers that are {NONE}: fetch or train it again")


def require_finite_pictures(x: Float[Tensor, "n *dims"], seeds: Sequence[int] | None = None) -> None:
    """Refuse pictures that are not finite, drawn with these ``seeds`` or given.

    Raises:
        NotFinite: says how many, and which is the first.
    """
    if finite(x):
        return
    broken = (~x.detach().isfinite().flatten(1).all(1)).nonzero()[:, 0].tolist()
    which = f"picture {broken[0]}" if seeds is None else f"the picture of seed {seeds[broken[0]]}"
    advice = "give others" if seeds is None else (
        "nothing can be seen in them; load the model in float32 or bfloat16, with guidance that is milder, or train it "
        "again"
    )  # fmt: skip
    raise NotFinite(f"{len(broken)} of {len(x)} pictures are {NONE}, the first of them {which}: {advice}")


def require_unit_range(x: Float[Tensor, "*dims"], what: str, beyond: float) -> None:
    """Refuse pictures of floats with values outside of [0, 1] by more than ``beyond``.

    Args:
        what: they are, in words.

    Raises:
        NotFinite: some are NaN or infinite.
        BadInput: values of another range.
    """
    low, high = (float(v) for v in x.aminmax()) if x.numel() else (0.0, 1.0)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise NotFinite(f"{what}: some numbers are {NONE}: give others")
    if low < -beyond or high > 1 + beyond:
        told = f"{what}: values in [0, 1] are wanted, not from {low:.4g} to {high:.4g}"
        raise BadInput(f"{told}: bring them there, those of 8 bits by 255")
