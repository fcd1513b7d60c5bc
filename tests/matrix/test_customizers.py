"""What every customisation promises; a toy is the simplest.

``run(pipe, pictures, prompts) -> pipeline``: pictures [n, 3, h, w] in [0, 1] and the prompt of each to a new pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.pipeline import Text2Image, load

from .conftest import bits_of, draw, frozen, unchanged

VERB = "customize"


@dataclass(frozen=True, kw_only=True)
class Tint:
    """An adapter whose products are noise, as strong as the pictures are bright."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {"rank": 2}
    rank: int = 4
    seed: int = 0

    def run(self, pipe: Text2Image, pictures: Tensor, prompts: Sequence[str]) -> Text2Image:
        if len(pictures) != len(prompts):
            raise BadInput(f"give one prompt for each picture: got {len(prompts)} for {len(pictures)}")
        rng = torch.Generator().manual_seed(self.seed)
        made = pipe.copy()
        adapter = made.add_adapter("tint", rank=self.rank, generator=rng)
        for x in adapter.up.values():
            torch.nn.init.normal_(x, std=0.2 * float(pictures.mean()), generator=rng)
        for x in adapter.parameters():
            x.requires_grad_(False)
        return made


TOYS = (Tint,)


def asked(method) -> list[str]:
    """Prompts, one of which names what was learned."""
    made = method(**method.EXAMPLE)
    return [f"a {getattr(made, 'names', ('red star',))[0]}", "art"]


@pytest.fixture
def given(pipe) -> tuple[Tensor, list[str]]:
    rng = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, pipe.size, pipe.size, generator=rng), ["a red star", "a blue star"]


def test_a_new_pipeline_from_one_left_as_it_was(method, family, pipe, given):
    with unchanged(pipe):
        try:
            made = method(**method.EXAMPLE).run(pipe, *given)
        except BadInput as refused:
            pytest.skip(f"refuses this family: {refused}")
    assert type(made) is type(pipe) and made is not pipe and frozen(made)
    drawn = draw(made, asked(method))
    assert not torch.equal(drawn, draw(pipe, asked(method))) and drawn.isfinite().all()


def test_the_seed_decides_every_bit(method, pipe, given):
    made = method(**method.EXAMPLE).run(pipe, *given)
    torch.manual_seed(999)
    assert bits_of(method(**method.EXAMPLE).run(pipe, *given)) == bits_of(made)
    assert bits_of(method(**method.EXAMPLE, seed=1).run(pipe, *given)) != bits_of(made)


def test_saved_and_loaded_it_draws_the_same_pictures(method, pipe, given, tmp_path):
    made = method(**method.EXAMPLE).run(pipe, *given)
    made.save(tmp_path / "made")
    whole = made.merged() if made.adapters else made
    assert torch.equal(draw(load(tmp_path / "made", "cpu"), asked(method)), draw(whole, asked(method)))


def test_pictures_without_prompts_are_refused(method, pipe, given):
    with pytest.raises(BadInput, match="prompt"):
        method(**method.EXAMPLE).run(pipe, given[0], given[1][:1])
