"""What every protection promises. The verb has no method yet: a toy keeps the promise, and these tests, from rotting.

``run(pipe, pictures) -> pictures``: [n, 3, h, w] in [0, 1], none of whose numbers moves by more than ``budget``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from sfumato.errors import BadInput

from .conftest import unchanged

VERB = "protect"


@dataclass(frozen=True, kw_only=True)
class Push:
    """One step uphill for the size of the latent."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {"budget": 0.05}
    NEUTRAL: ClassVar[Mapping[str, Any]] = {"budget": 0.0}
    budget: float = 16 / 255
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.budget <= 1:
            raise BadInput(f"budget is a change of pixels in [0, 1], got {self.budget}")

    def run(self, pipe, pictures: Tensor) -> Tensor:
        x = pictures.clone().requires_grad_()
        (slope,) = torch.autograd.grad(pipe.encode_image(x * 2 - 1).square().sum(), x)
        return (pictures + self.budget * slope.sign()).clamp(0, 1)


TOYS = (Push,)


@pytest.fixture
def given(pipe) -> Tensor:
    return torch.rand(2, 3, pipe.size, pipe.size, generator=torch.Generator().manual_seed(0))


def test_pictures_change_within_the_budget_and_nothing_else_does(method, family, pipe, given):
    before, settings = given.clone(), method(**method.EXAMPLE)
    with unchanged(pipe):
        safe = settings.run(pipe, given)
    assert torch.equal(given, before) and safe.shape == given.shape and not safe.requires_grad
    assert safe.min() >= 0 and safe.max() <= 1 and safe.isfinite().all()
    assert 0 < (safe - given).abs().max() <= settings.budget + 1e-6
    torch.manual_seed(999)
    assert torch.equal(method(**method.EXAMPLE).run(pipe, given), safe)


def test_without_a_budget_nothing_changes(method, pipe, given):
    assert torch.equal(method(**{**method.EXAMPLE, **method.NEUTRAL}).run(pipe, given), given)


def test_a_budget_that_cannot_be_is_refused(method):
    for budget in (-0.1, 1.5, float("nan")):
        with pytest.raises(BadInput, match="budget"):
            method(**{**method.EXAMPLE, "budget": budget})
