"""What every protection promises; a toy keeps the promise from being one of a single method.

``run(pipe, pictures) -> pictures``: [n, 3, h, w] in [0, 1], in whole levels of 255, none of which moves by more than
``budget`` of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import pytest
import torch
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.fields import check, within

from .conftest import unchanged

VERB = "protect"


@dataclass(frozen=True, kw_only=True)
class Push:
    """One step uphill for the size of the latent."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {"budget": 12}
    NEUTRAL: ClassVar[Mapping[str, Any]] = {"updates": 0}
    budget: Annotated[int, within(1, 255)] = 16
    updates: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check(self)

    def run(self, pipe, pictures: Tensor) -> Tensor:
        x = pictures.clone().requires_grad_()
        (slope,) = torch.autograd.grad(pipe.encode_image(x * 2 - 1).square().sum(), x)
        if not self.updates:
            return pictures.clone()
        moved = ((pictures + self.budget / 255 * slope.sign()).clamp(0, 1) * 255).round()
        low, high = (255 * pictures - self.budget).ceil(), (255 * pictures + self.budget).floor()
        return torch.minimum(torch.maximum(moved, low), high) / 255


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
    assert 0 < (safe - given).abs().max() <= settings.budget / 255 + 1e-6
    torch.testing.assert_close((255 * safe).round(), 255 * safe, rtol=0, atol=1e-4)
    torch.manual_seed(999)
    assert torch.equal(method(**method.EXAMPLE).run(pipe, given), safe)


def test_without_a_step_nothing_changes(method, pipe, given):
    assert torch.equal(method(**{**method.EXAMPLE, **method.NEUTRAL}).run(pipe, given), given)


def test_a_budget_that_cannot_be_is_refused(method):
    for budget in (0, 256, -1, 1.5, float("nan")):
        with pytest.raises(BadInput, match="budget"):
            method(**{**method.EXAMPLE, "budget": budget})
