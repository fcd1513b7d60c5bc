"""What every attribution promises; a toy keeps the promise from being one of a single method.

``run(pipe, prompts, seeds) -> shares``: by name of a judged part of the pipeline, one number a picture [n].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from sfumato.errors import BadInput

from .conftest import unchanged

VERB = "attribute"
ASKED = (["a red star", "a red star on art"], [3, 4])


@dataclass(frozen=True, kw_only=True)
class Bottleneck:
    """How large the features of the middle are in the last call of the network."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {"sampling_steps": 2}
    sampling_steps: int = 10

    def run(self, pipe, prompts: Sequence[str], seeds: Sequence[int]) -> dict[str, Tensor]:
        if len(prompts) != len(seeds):
            raise BadInput(f"give one seed for each prompt: got {len(seeds)} for {len(prompts)}")
        shares = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            with pipe.tap("bottleneck") as tap:
                pipe.draw([prompt], [seed], sampling_steps=self.sampling_steps, cfg_scale=1.0)
            value = tap.value if torch.is_tensor(tap.value) else tap.value[0]
            shares.append(value.double().square().mean())
        return {"bottleneck": torch.stack(shares)}


TOYS = (Bottleneck,)


def test_a_number_for_each_part_and_picture_from_a_pipeline_left_as_it_was(method, family, pipe):
    with unchanged(pipe):
        shares = method(**method.EXAMPLE).run(pipe, *ASKED)
    assert shares and all(x.shape == (2,) and x.isfinite().all() and not x.requires_grad for x in shares.values())
    torch.manual_seed(999)
    again = method(**method.EXAMPLE).run(pipe, *ASKED)
    assert again.keys() == shares.keys() and all(torch.equal(again[part], x) for part, x in shares.items())


def test_no_picture_depends_on_the_others(method, pipe):
    shares, last = (method(**method.EXAMPLE).run(pipe, *(x[i:] for x in ASKED)) for i in (0, 1))
    for part, x in shares.items():
        torch.testing.assert_close(last[part], x[1:], rtol=1e-4, atol=1e-6)


def test_prompts_without_seeds_are_refused(method, pipe):
    with pytest.raises(BadInput, match="seed"):
        method(**method.EXAMPLE).run(pipe, ["art", "a star"], [0])
