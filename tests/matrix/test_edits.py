"""What every edit promises, on every edit of the catalogue, and on a toy that shows the least that one must be.

``run(pipe, pictures, prompts) -> strips``: pictures [n, 3, h, w] in [0, 1] to a strip of k >= 1 for each,
[n, k, 3, h, w].
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from sfumato.edit.base import Edit, Given
from sfumato.errors import BadInput

from .conftest import unchanged

VERB, PROMPT = "edit", "a red star"


@dataclass(frozen=True, kw_only=True)
class Nudge:
    """The latent moved along a random direction, further from picture to picture."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {"pictures": 2}
    NEUTRAL: ClassVar[Mapping[str, Any]] = {"strength": 0.0}
    strength: float = 1.0
    pictures: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pictures < 1:
            raise BadInput(f"pictures must be at least 1, got {self.pictures}")

    @torch.no_grad()
    def run(self, pipe, pictures: Tensor, prompts: str = "") -> Tensor:
        z = pipe.encode_image(pictures * 2 - 1)
        way = torch.randn(z.shape[1:], generator=torch.Generator().manual_seed(self.seed))
        strip = [pipe.decode_latents(z + i * self.strength * way) for i in range(self.pictures)]
        return ((torch.stack(strip, 1) + 1) / 2).clamp(0, 1)


TOYS = (Nudge,)


@pytest.fixture
def given() -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_a_strip_for_each_picture_from_a_pipeline_left_as_it_was(method, pipe, given):
    assert is_dataclass(method)
    before = given.clone()
    with unchanged(pipe):
        strips = method(**method.EXAMPLE).run(pipe, given, PROMPT)
    assert torch.equal(given, before)
    assert strips.ndim == 5 and strips.shape[0] == 2 and strips.shape[2:] == given.shape[1:]
    assert strips.isfinite().all() and strips.min() >= 0 and strips.max() <= 1 and not strips.requires_grad


def test_it_runs_on_every_family_that_it_fits(method, family, pipe):
    side = pipe.size
    picture = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    edit = method(**method.EXAMPLE)
    if hasattr(method, "fits") and not method.fits(pipe):
        with pytest.raises(BadInput, match=method.__name__):
            edit.run(pipe, picture, PROMPT)
        return
    with unchanged(pipe):
        strips = edit.run(pipe, picture, PROMPT)
    assert strips.shape[0] == 1 and strips.shape[2:] == picture.shape[1:] and strips.isfinite().all()
    assert any(not torch.equal(strip, strips[0, 0]) for strip in strips[0]), "something is edited"


@pytest.mark.parametrize("shape", [(1, 3, 16, 24), (3, 16, 16), (1, 1, 16, 16)])
def test_pictures_that_are_no_squares_in_colour_are_refused(method, pipe, shape):
    if issubclass(method, Edit):
        with pytest.raises(BadInput, match="cannot be edited"):
            method(**method.EXAMPLE).run(pipe, torch.zeros(shape))


def test_its_plan_and_its_record_can_be_told(method, pipe, given):
    if issubclass(method, Edit):
        asked = Given(pictures=given, prompts=(PROMPT,))
        edit = method(**method.EXAMPLE)
        assert edit.plan(pipe, asked).seconds > 0
        edited = edit.edit(pipe, asked)
        n, tracks, stops = edited.strips.shape[:3]
        assert (n, tracks, stops) == (2, len(edited.tracks), len(edited.stops)) and 0 <= edited.plain < stops
        assert json.dumps(edited.told)
        for x in edited.maps.values():
            assert x.shape[0] == 2 and x.min() >= 0 and x.max() <= 1


def test_the_seed_decides_and_no_picture_depends_on_the_others(method, pipe, given):
    strips = method(**method.EXAMPLE).run(pipe, given, PROMPT)
    torch.manual_seed(999)
    assert torch.equal(method(**method.EXAMPLE).run(pipe, given, PROMPT), strips)
    assert not torch.equal(method(**method.EXAMPLE, seed=1).run(pipe, given, PROMPT), strips)
    torch.testing.assert_close(method(**method.EXAMPLE).run(pipe, given[1:], PROMPT), strips[1:], rtol=0, atol=1e-4)


def test_neutral_nothing_changes_along_the_strip(method, pipe, given):
    if getattr(method, "NEUTRAL", None):
        strips = method(**{**method.EXAMPLE, **method.NEUTRAL}).run(pipe, given, PROMPT)
        assert torch.equal(strips, strips[:, :1].expand_as(strips))
