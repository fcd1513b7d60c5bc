"""What the loss is multiplied by so that gradients do not vanish in float16."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from . import state


class LossScale:
    """Halved whenever gradients overflow, whose update is then left out; doubled after `PATIENCE` sound ones.

    The same rule as torch's ``GradScaler``, for gradients that pass through a recipe's hooks. Where it is not needed it
    stays at 1 and looks at nothing.
    """

    FIRST = 2.0**16
    PATIENCE = 2000

    def __init__(self, needed: bool):
        self.needed, self.value, self.streak = needed, self.FIRST if needed else 1.0, 0

    def sound(self, norm: Tensor) -> bool:
        """Whether gradients of this norm are to be used; the next ones may be scaled otherwise."""
        if not self.needed:
            return True
        if not math.isfinite(float(state.whole(norm))):
            # Once nothing is scaled any more, what is not finite is the loss's own fault, and is to be seen.
            if self.value <= 1:
                return True
            self.value, self.streak = self.value / 2, 0
            return False
        self.streak += 1
        if self.streak == self.PATIENCE:
            self.value, self.streak = self.value * 2, 0
        return True

    def state(self) -> dict[str, Any]:
        return {"value": self.value, "streak": self.streak}

    def restore(self, kept: dict[str, Any] | None) -> None:
        if kept:
            self.value, self.streak = kept["value"], kept["streak"]
