"""Abs-Grad-SAM: a subject formed in a reference picture, whose background is kept by masks (arXiv:2408.16232)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.fields import Count, Natural, Positive, Share
from sfumato.pipeline import Conditioning, Noised, Text2Image
from sfumato.pipeline.conditioning import Role
from sfumato.pipeline.drawing import first_step, noise
from sfumato.pipeline.sampling import make_scheduler
from sfumato.pipeline.steering import Interceptor
from sfumato.progress import bar

from .base import Edit, Edited, Given, shown_in, through_autoencoder
from .parts.attending import Mode, attention_importance, sites_of
from .parts.importance import (
    Rectifier,
    blurred,
    by_attention,
    by_column,
    by_element,
    by_scaling,
    dilated,
    kept,
    laid_out,
    rectified,
    subject_mask,
)  # fmt: skip

__all__ = [
    "GradSAM", "attention_importance", "blurred", "by_attention", "by_column", "by_element", "by_scaling", "dilated",
    "kept", "laid_out", "rectified", "sites_of", "subject_mask",
]  # fmt: skip

PAPER_STEPS = (5, 18, 28)
"""The paper's mask steps, of 45."""


@dataclass(frozen=True, kw_only=True)
class GradSAM(Edit):
    """Forms a subject in a reference picture and keeps the background, by masks from attention's gradients
    (arXiv:2408.16232).

    The picture is drawn from noise with the prompt, and at a few steps it is asked which elements of the latent belong
    to the subject: the conditional noise prediction of an element is differentiated by the attention that the picture
    pays to the subject's tokens (`attention_importance`), the score is smoothed and cut off (`subject_mask`), and what
    lies outside becomes the reference at the noise that the sampler has just come to, with one noise throughout. In
    between the sampler heals the seam. Masks and scores are shown over the picture.

    Cost: with "scaling" two calls of the network, without guidance, for each mask step and subject; "element" (the
    code's) takes one backward pass for each element of the latent, 16,384 for Stable Diffusion. Twice the steps: the
    plain draw of the same seed is made for comparison.

    Differs from the paper: "scaling", the default, is ours, a product forward that has the rectifier outside of its
    sum. The rectifier is the paper's |.|, which its code's final state has replaced by ReLU. ``smooth`` "card" is what
    the code sets out to do; "official" what it comes to. Its code takes random mixtures of elements for elements, and
    the column before the subject's: elements and columns are exact here. It names subjects by a tagger of nouns;
    here they are named, or all words are meant. Flows are drawn without fresh noise. ``warmup``, ``per_channel`` False
    and joint attention are ours.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {"sampling_steps": 4, "subjects": ("star",), "mask_steps": (1, 2)}
    NEUTRAL: ClassVar[Mapping[str, Any]] = {"mask_steps": ()}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"mode": "element"},
        "official": {"mode": "element", "smooth": "official", "rectifier": "relu"},
        "sketch": {"sampling_steps": 50, "cfg_scale": 3.0, "per_channel": False},
    }
    """The paper's, which takes long; what its code comes to; and one for the embedded model."""
    subject: ClassVar[bool] = True

    subjects: tuple[str, ...] = ()
    """Words of the prompt that are to be formed; none: all its words."""
    strength: Positive = 0.9
    """The share of the steps that is taken."""
    mask_steps: tuple[Natural, ...] | None = None
    """Steps whose latent is masked, counted from the first that is taken; by default the paper's 5, 18 and 28 of 45, in
    proportion."""
    mode: Mode = "scaling"
    """What is differentiated; "attention" does without."""
    rectifier: Rectifier = "abs"
    """What is made of a derivative: its absolute value, or what is positive."""
    smooth: Literal["card", "official"] = "card"
    """Blur and dilate the scores, or sum them over squares, as the code does in the end."""
    per_channel: bool = True
    """A mask for each channel of the latent, or one for all."""
    resolutions: tuple[Count, ...] = ()
    """Sides of the feature maps whose layers are asked, of which all must agree; none: the last layer."""
    start: Literal["noise", "reference"] = "noise"
    """What the first step starts from: fresh noise, or the reference with noise on it."""
    warmup: bool = False
    """Before the first mask step, everything is the reference's."""
    cfg_scale: float = 8.0
    """Guidance."""
    eta: Share = 1.0
    """Fresh noise of the sampler, from 0 (DDIM) to 1 (ancestral)."""
    chunk: Count = 8
    """Elements differentiated together ("element")."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strength > 1:
            raise BadInput(f"strength must lie in (0, 1], got {self.strength}")
        if self.mask_steps is not None and (0 in self.mask_steps or len(set(self.mask_steps)) < len(self.mask_steps)):
            raise BadInput("mask steps count from 1, each once: before the first step there is nothing to mask")

    @classmethod
    def fits(cls, pipe: Text2Image) -> bool:
        """Whether its network reads the text by attention."""
        return any(site.kind in ("cross", "joint") for site in pipe.anatomy.sites())

    @property
    def taken(self) -> int:
        """How many steps are taken; of a flow one more, where that is no whole number."""
        return self.sampling_steps - first_step(self.strength, self.sampling_steps)

    @property
    def masked(self) -> tuple[int, ...]:
        """The mask steps."""
        if self.mask_steps is not None:
            return tuple(sorted(self.mask_steps))
        return tuple(sorted({max(1, round(i * self.taken / 45)) for i in PAPER_STEPS}))

    def check(self, pipe: Text2Image, given: Given) -> None:
        super().check(pipe, given)
        sites_of(pipe, self.resolutions)
        if given.pictures is None:
            raise BadInput("GradSAM puts a subject into a picture: give one")
        if any(i > self.taken for i in self.masked):
            raise BadInput(f"mask step {max(self.masked)} is beyond the {self.taken} steps that are taken")
        for prompt in dict.fromkeys(given.prompts):
            self.columns(pipe, pipe.told(prompt))

    def columns(self, pipe: Text2Image, cond: Conditioning) -> dict[str, Bool[Tensor, "length"]]:
        """Which tokens each subject is, in one row of a conditioning.

        Raises:
            BadInput: a word that the prompt does not have (or that was cut off).
        """
        if not self.subjects:
            words = cond.mask[0] if cond.roles is None else cond.roles[0] == int(Role.WORD)
            if not words.any():
                raise BadInput("say what is to come into the picture, with --prompt")
            return {"all words": words}
        found = {word: pipe.find(cond, word)[0] for word in self.subjects}
        for word, tokens in found.items():
            if not tokens.any():
                raise BadInput(f"the prompt has no {word!r} (within what the model reads): name words as it has them")
        return found

    def rows(self, given: Given) -> float:
        asked = len(self.masked) * max(1, len(self.subjects)) * max(1, len(self.resolutions))
        each = {"scaling": 4.0, "element": 30_000.0, "column": 4.0, "attention": 1.0}[self.mode]
        return len(given) * (4.0 * self.taken + asked * each)

    @torch.no_grad()
    def edit(self, pipe: Text2Image, given: Given, progress: bool = False) -> Edited:
        self.check(pipe, given)
        assert given.pictures is not None
        reference, lost = through_autoencoder(pipe, given.pictures)
        size = None if given.pictures is None else given.pictures.shape[-1]
        told, seeds = pipe.told(given.each(given.prompts), size), given.each(given.seeds)
        walk = _Walk(self, pipe, reference, told, seeds, given.pictures)
        with bar("drawing", 2 * (len(walk.times) - 1), progress) as advance:
            plain, edited = walk.drawn((), advance), walk.drawn(self.masked, advance)
        strips = torch.stack([shown_in(pipe.decode_latents(z)) for z in (plain, edited)], 1)[:, None]
        shares = {f"{t:.3f}": mask.float().flatten(1).mean(1).tolist() for t, mask in walk.masks.items()}
        for time, share in shares.items():
            if max(share) > 0.8 or min(share) < 0.01:
                warnings.warn(f"at time {time} a mask covers {max(share):.0%} of a picture, or almost nothing of one: "
                              "look at the masks", stacklevel=2)  # fmt: skip
        maps = {f"mask at {t:.2f}": mask.float().mean(1).cpu() for t, mask in walk.masks.items()}
        for (t, name), score in walk.scores.items():
            top = score.amax(1)
            maps[f"{name} at {t:.2f}"] = (top / top.amax((1, 2), keepdim=True).clamp_min(1e-12)).float().cpu()
        facts = {"mask_share": shares, "errors": {"autoencoder": lost}}
        return Edited(strips, ("same seed",), ("plain", "edited"), 0, facts, given.pictures, maps)


@dataclass(eq=False)
class _Walk(Interceptor):
    """The way from noise to picture, past the masks."""

    edit: GradSAM
    pipe: Text2Image
    reference: Float[Tensor, "n *latent"]
    cond: Conditioning
    seeds: list[int]
    pictures: Float[Tensor, "n 3 side side"]
    masks: dict[float, Bool[Tensor, "n *latent"]] = field(default_factory=dict)
    scores: dict[tuple[float, str], Float[Tensor, "n *latent"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        edit, pipe, z = self.edit, self.pipe, self.reference
        solver = make_scheduler(pipe, "ddim")
        pipe.clock.begin(solver, edit.sampling_steps, tuple(z.shape), pipe.device)
        first = pipe.clock.first_step(edit.strength, edit.sampling_steps)
        self.times = [*(pipe.clock.time(t) for t in solver.timesteps[first:]), 0.0]
        # Streams of their own: a draw's starts again with the first number of each seed.
        streams = [[torch.Generator().manual_seed((s + k) % 2**63) for s in self.seeds] for k in (2**32, 2**33)]
        fresh, self.eps = (noise(some, z.shape[1:]).to(z) for some in streams)
        start: Any = (fresh, self.times[0])
        self.begin = start if edit.start == "noise" else Noised(self.pictures, edit.strength)
        self.at: dict[float, Tensor] = {}

    def drawn(self, masked: tuple[int, ...], advance: Any) -> Float[Tensor, "n *latent"]:
        """The clean latents, with masks at these steps."""
        edit, pipe = self.edit, self.pipe
        self.at = {}
        if edit.warmup and masked:
            nothing = torch.zeros_like(self.reference, dtype=torch.bool)
            self.at = {self.times[i]: nothing for i in range(1, min(masked))}
        before = {self.times[i - 1]: self.times[i] for i in masked}

        def look(pred: Tensor, z: Tensor, t: float, cond: Any) -> Tensor:
            advance()
            if (found := _near(before, t)) is not None:
                self.at[found] = self.masks[found] = self._mask(self._masked(z, t), t, found)
            return pred

        eta = 0.0 if pipe.prediction == "flow" else edit.eta
        steps = {"sampling_steps": edit.sampling_steps, "cfg_scale": edit.cfg_scale, "eta": eta, "guide": look}
        with pipe.intercept(self):
            size = self.pictures.shape[-1]
            for z, _ in pipe.states(None, self.seeds, cond=self.cond, start=self.begin, size=size, **steps):
                last = z
        return self._masked(last, 0.0)

    def before_network(self, run: Any, z: Tensor) -> Tensor:
        return self._masked(z, self.pipe.clock.time(run.timesteps[run.index]))

    before_update = before_network

    def _masked(self, z: Tensor, t: float) -> Tensor:
        """The latent with the reference, noised as far, outside of this time's mask; itself where there is none."""
        mask = _near(self.at, t)
        if mask is None:
            return z
        known = self.reference if t == 0 else self.pipe.process.diffuse(self.reference, t, self.eps)
        halves = len(z) // len(known)  # some families show both halves of guidance
        return kept(z, torch.cat([known] * halves), torch.cat([mask] * halves))

    def _mask(self, z: Tensor, t: float, level: float) -> Bool[Tensor, "n *latent"]:
        """The masks of all pictures, from what the latent before the step says."""
        edit, made = self.edit, []
        scores: dict[str, list[Tensor]] = {}
        for i in range(len(z)):
            row, layers = self.cond[i], []
            columns = edit.columns(self.pipe, row)
            for site in sites_of(self.pipe, edit.resolutions):
                masks = []
                for word, tokens in columns.items():
                    asked = (tokens, site, edit.mode, edit.rectifier, edit.chunk)
                    score = attention_importance(self.pipe, z[i : i + 1], t, row, *asked)
                    scores.setdefault(word, []).append(score)
                    masks.append(subject_mask(score, edit.smooth, edit.per_channel))
                layers.append(torch.stack(masks).any(0))
            made.append(torch.stack(layers).all(0))
        layers_of = len(sites_of(self.pipe, edit.resolutions))
        for word, rows in scores.items():
            self.scores[level, word] = torch.stack(rows).unflatten(0, (len(z), layers_of)).mean(1)
        return torch.stack(made)


def _near(values: Mapping[float, Any], t: float) -> Any:
    """What belongs to a time, which may have been rounded on the way; None where nothing does."""
    return next((x for time, x in values.items() if abs(time - t) < 1e-5), None)
