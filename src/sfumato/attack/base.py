"""What an attack is: a dataclass of hyper-parameters whose verb is `run`; and what it hands back."""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.pipeline import Text2Image
from sfumato.settings import Tuned


class Found(ABC):
    """What an attack found on one pipeline: a way to ask for the concept."""

    concept: str

    @abstractmethod
    def draw(
        self, pipe: Text2Image, prompts: Sequence[str], seeds: Sequence[int], **settings: Any
    ) -> Float[Tensor, "n 3 height width"]:
        """Pictures in [0, 1] of ``prompts``, which name the concept plainly, asked for in the attack's way.

        Same prompts, seeds and settings (those of `Text2Image.draw`) as without the attack: only the way in
        which the concept is asked for differs.
        """

    @abstractmethod
    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write the attack's pictures, what it found, and ``attack.json``: how it was made."""


@dataclass(frozen=True, kw_only=True)
class Attack(Tuned, ABC):
    """Fields that every attack has."""

    seed: int = 0
    """Seed of all randomness in the attack."""

    def budget(self) -> dict[str, Any]:
        """What the attacker is given: everything that decides the attack's strength."""
        return {"name": type(self).__name__, **dataclasses.asdict(self)}

    def check(self, pipe: Text2Image, concept: str, prompts: Sequence[str] = ()) -> None:
        """Raise `BadInput` if the attack cannot run on ``pipe``, or not ask for these ``prompts``, which name
        ``concept``.

        Cheap: whoever has much to compute asks this first. By default every attack can.
        """

    def passes(self, sampling_steps: int) -> float:
        """Rows that one run takes through the network, a backward pass counted as two, for plans; the pictures that it
        learns from, or that an audit draws with what it found, are not counted."""
        return 0.0

    @abstractmethod
    def run(
        self,
        pipe: Text2Image,
        concept: str,
        *,
        images: Float[Tensor, "n 3 height width"] | str | Path | None = None,
        prompts: Sequence[str] | None = None,
        original: Text2Image | None = None,
        progress: bool = True,
        folder: str | Path | None = None,
    ) -> Found:
        """Search for a way to make ``pipe`` draw ``concept`` again. ``pipe`` is left exactly as it was.

        Args:
            pipe: the pipeline under attack.
            concept: what was erased, as a prompt would say it.
            images: pictures in [0, 1] of the concept, or a folder of them, for attacks that learn from some.
            prompts: the prompt of each picture, where known; they name the concept.
            original: the pipeline before erasure, for attacks that need it (or its pictures).
            progress: show a bar.
            folder: where an attack that learns keeps its state; killed, the same call goes on. None: in memory only.

        Raises:
            BadInput: what the attack needs was not given.
        """


def checked_concept(concept: str) -> str:
    """The concept without spaces around it; `BadInput` when nothing is left."""
    if not concept.strip():
        raise BadInput('name the concept to attack, for example "star"')
    return concept.strip()


def say(prompt: str, old: str, new: str) -> str:
    """``prompt`` with the phrase ``old`` (whole words) replaced by ``new``."""
    return re.sub(rf"(?<!\w){re.escape(old)}(?!\w)", lambda _: new, prompt)
