"""What an attribution is: a dataclass of settings whose verb is `run`, pictures asked for in and shares out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.fields import Count, Seed
from sfumato.pipeline import Text2Image
from sfumato.pipeline.lent import lent, require_finite
from sfumato.settings import Tuned


@dataclass(frozen=True, kw_only=True)
class Attribution(Tuned, ABC):
    """Fields that every attribution has.

    A new one is one file: a subclass that says in `shares` how a picture is shared out. What is the same for all is
    here.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {}
    """Settings with which it takes about a second on a tiny pipeline, for the tests that all attributions share."""

    batch: Count = 32
    """Pictures computed together; changes memory and speed, and the last bits of a picture."""
    seed: Seed = 0
    """Seed of what the attribution itself draws by chance."""

    def run(
        self, pipe: Text2Image | DiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int]
    ) -> dict[str, Float[Tensor, "n"]]:
        """For each judged part of ``pipe`` its share in each of the pictures that it draws of these prompts and seeds.

        ``pipe`` is left as it was. No picture's share depends on the others.

        Raises:
            BadInput: prompts and seeds of different numbers, or none; no parts to judge.
        """
        if len(prompts) != len(seeds) or not prompts:
            raise BadInput(f"give one seed for each prompt: got {len(seeds)} for {len(prompts)}")
        with lent(pipe) as p, torch.no_grad():
            require_finite(p)
            return self.shares(p, list(prompts), [int(s) for s in seeds])

    @abstractmethod
    def shares(self, p: Text2Image, prompts: list[str], seeds: list[int]) -> dict[str, Float[Tensor, "n"]]:
        """`run`, of what has been checked."""
