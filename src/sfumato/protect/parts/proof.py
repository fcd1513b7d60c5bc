"""The proof sheet: what a mimic gets of the clean and of the protected pictures, with figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.pipeline import Text2Image

from .folder import Pair
from .mimicry import WordSettings, edited, half, imitated, inpainted
from .survival import interval, judge_of, square


@dataclass
class Proof:
    """Pictures of one kind of mimicry, and how far they are from the clean pictures.

    Attributes:
        title: which mimicry.
        clean, safe: what came of the clean and of the protected pictures, each [3, side, side] in [0, 1].
        from_clean, from_safe: their distances from the clean pictures (`survival.judge_of`), one a picture; protection
            works where the second is larger.
    """

    title: str
    clean: list[Float[Tensor, "3 side side"]] = field(default_factory=list)
    safe: list[Float[Tensor, "3 side side"]] = field(default_factory=list)
    from_clean: list[float] = field(default_factory=list)
    from_safe: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"title": self.title, "from_clean": interval(self.from_clean), "from_safe": interval(self.from_safe)}


def prove(
    p: Text2Image,
    pairs: Sequence[Pair],
    *,
    prompt: str = "a photo",
    strengths: Sequence[float] = (0.05, 0.1, 0.3),
    sampling_steps: int = 100,
    word: WordSettings | None = None,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> list[Proof]:
    """img2img at every strength, inpainting of the right half and, with ``word``, textual inversion of both sets.

    The seeds, steps and words of both sides are the same. ``advance`` is called once a picture.
    """
    cut = [square(p, pair) for pair in pairs]
    proofs = [Proof(f"img2img, strength {s:g}") for s in strengths] + [Proof("inpainting, right half")]
    for i, (clean, safe) in enumerate(cut):
        both, side = torch.cat([clean, safe]), clean.shape[-1]
        seeds, judge = [seed + i] * 2, judge_of(side)
        told: dict[str, Any] = {"prompt": prompt, "sampling_steps": sampling_steps}
        made = [edited(p, both, seeds, strength=s, **told) for s in strengths]
        made.append(inpainted(p, both, seeds, half(side), **told))
        for proof, drawn in zip(proofs, made, strict=True):
            _note(proof, drawn, [float(judge(drawn[k : k + 1], clean)) for k in (0, 1)])
        advance()
    sides = {clean.shape[-1] for clean, _ in cut}
    if word is not None and len(sides) == 1:
        proofs.append(_words(p, cut, word, min(sampling_steps, 25), seed))
    return proofs


def _words(
    p: Text2Image, cut: Sequence[tuple[Tensor, Tensor]], word: WordSettings, sampling_steps: int, seed: int
) -> Proof:
    """A word learned from each set, drawn as often as it has pictures; distances are to the nearest clean one."""
    proof = Proof("textual inversion")
    seeds = [seed + i for i in range(len(cut))]
    clean = torch.cat([x for x, _ in cut])
    drawn = [
        imitated(p, torch.cat([pair[k] for pair in cut]), seeds, settings=word, sampling_steps=sampling_steps)
        for k in (0, 1)
    ]
    judge = judge_of(clean.shape[-1])
    for pair in zip(*drawn, strict=True):
        nearest = [float(judge(x[None].expand_as(clean), clean).min()) for x in pair]
        _note(proof, torch.stack(pair), nearest)
    return proof


def _note(proof: Proof, drawn: Tensor, distances: Sequence[float]) -> None:
    proof.clean.append(drawn[0])
    proof.safe.append(drawn[1])
    proof.from_clean.append(distances[0])
    proof.from_safe.append(distances[1])
