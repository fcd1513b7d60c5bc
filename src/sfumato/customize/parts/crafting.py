"""A run of AttenCraft: the masks of every picture, who is asked for, and the loss of an update."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sfumato.errors import BadInput
from sfumato.memory import require_memory
from sfumato.noise.process import compose
from sfumato.pipeline import Conditioning, Text2Image
from sfumato.train.draw import integers, normal, uniform
from sfumato.train.words import Latents, denoising_loss, encode_once, latents_of

from .learning import Drawn, Given, of_posterior
from .maps import (
    affinity,
    assigned,
    attention_loss,
    averaged,
    masked_loss,
    nearest_resolution,
    refined,
    resized,
    sampling_ratios,
    separated,
    square_side,
    start_detached,
    structural_similarity,
)

TRIES = 16
"""Times, and noises, at which masks are looked for before a picture is refused."""


class NoPlace(BadInput):
    """A picture in which some word has no place of its own."""


class Masks(nn.Module):
    """The masks of every picture's words and background, which change while learning and belong to the checkpoint; and
    how often they were found anew."""

    def __init__(self, masks: Float[Tensor, "picture word side side"]):
        super().__init__()
        self.register_buffer("masks", masks)
        self.register_buffer("renewed", torch.zeros((), dtype=torch.long))


@dataclass(frozen=True)
class Found:
    """What one pass over a picture finds: masks and refined maps of its words and, last, the background; and scores.

    Attributes:
        scores: for each word the mean of its attention over its mask.
    """

    masks: Bool[Tensor, "word side side"]
    maps: Float[Tensor, "word side side"]
    scores: Float[Tensor, "word"]

    @property
    def distinct(self) -> bool:
        """Whether every mask is somewhere, and stands for a word of its own."""
        there = bool(self.masks.flatten(1).any(dim=1).all())
        return there and assigned(self.maps, self.masks).tolist() == list(range(len(self.masks)))


class Course:
    """One run: the masks, and the loss of an update.

    Args:
        method: the `AttenCraft` whose settings these are.
        student: what is trained, with the new words active in it.
    """

    def __init__(self, method: Any, pipe: Text2Image, student: Text2Image, given: Given):
        self.method, self.student, self.given = method, student, given
        self.cross, self.own = (nearest_resolution(student, *x) for x in (("cross", 1 / 4), ("self", 1 / 2)))
        side = self.own * given.latents.mean.shape[-1] // student.latent_shape()[-1]
        require_memory(24 * side**4, f"self-attention between {side**2:,} cells")
        self.full = [text for (text,) in given.texts]
        self.held = [[k for k, word in enumerate(method.words) if word in text] for text in self.full]
        found, self.times = zip(*(self.first(i) for i in range(len(self.full))), strict=True)
        self.ratios = [sampling_ratios(each.scores, method.version == "second") for each in found]
        masks = torch.zeros(len(found), len(method.words) + 1, *found[0].masks.shape[1:], device=student.device)
        for i, each in enumerate(found):
            masks[i, [*self.held[i], len(method.words)]] = each.masks.to(masks)
        self.kept = Masks(masks)
        self.prior = self.of_prior(pipe) if method.n_prior and method.prior_weight else None
        self.prior_cond = pipe.encode(method.prior_prompt)

    def of_prior(self, pipe: Text2Image) -> Latents:
        m = self.method
        require_memory(12 * pipe.size**2 * m.n_prior, f"{m.n_prior:,} pictures to keep the model")
        seeds = [2**20 + m.seed * m.n_prior + i for i in range(m.n_prior)]
        steps = m.prior_steps or None
        drawn = pipe.draw([m.prior_prompt] * m.n_prior, seeds, sampling_steps=steps, progress=m.progress)
        return latents_of(pipe, drawn, mirrored=False)

    @torch.no_grad()
    def first(self, i: int) -> tuple[Found, float]:
        """A picture's first masks, and the time at which they were found.

        Raises:
            NoPlace: at none of `TRIES` times are all words somewhere, each for itself.
        """
        pipe, T = self.student, self.student.clock.timesteps
        rng = torch.Generator().manual_seed(self.method.seed * 1_000_003 + i)
        z0, cond = self.given.latents.mean[0, i : i + 1], pipe.encode(self.full[i])
        missing: list[str] = []
        for _ in range(TRIES):
            t = (int(torch.randint(max(1, int(T * self.method.latest)), (), generator=rng)) + 1) / T
            eps = torch.randn(z0.shape, generator=rng).to(z0)
            z = pipe.denoiser.process.diffuse(z0, t, eps)
            with averaged(pipe, "cross", self.cross) as cross, averaged(pipe, "self", self.own) as own:
                pipe.denoiser(z, t, cond)
            found = self.found(self.words_of(cross.mean[0], cond, 0, self.held[i], spans=True), own.mean[0])
            if found.distinct:
                return found, t
            empty = (~found.masks.flatten(1).any(dim=1)).tolist()
            names = [*(self.method.words[k] for k in self.held[i]), "the background"]
            missing = [name for name, gone in zip(names, empty, strict=True) if gone]
        raise NoPlace(
            f"picture {i} shows no place of its own for {' and '.join(missing) or 'each word'}: start from words that "
            "name what it shows (--init-words), lower --threshold, or leave the picture out"
        )

    def found(self, maps: Float[Tensor, "word h w"], own: Float[Tensor, "cells cells"]) -> Found:
        """Masks by a picture's cross- and self-attention, at the side of the latter's maps."""
        maps = resized(maps, square_side(len(own)))
        spread = refined(maps, affinity(own))
        masks = separated(spread, self.method.threshold)
        area = masks.flatten(1).sum(dim=1).clamp(min=1)
        scores = (maps * masks).flatten(1).sum(dim=1) / area
        return Found(masks, spread, scores[:-1])

    def words_of(
        self, cross: Float[Tensor, "cells length"], cond: Conditioning, row: int, which: Sequence[int], spans: bool
    ) -> Float[Tensor, "word h w"]:
        """The maps of some words and, last, of the start token.

        Args:
            spans: of a described word the strongest of its tokens; else always the word's own.
        """
        pipe, m = self.student, self.method
        columns = []
        for k in which:
            phrase = m.described[k].replace("{}", m.words[k]) if spans and m.described else m.words[k]
            where = pipe.find(cond[row], phrase)[0]
            columns.append(cross[:, where.to(cross.device)].amax(dim=1))
        columns.append(cross[:, 0])
        side = square_side(len(cross))
        return torch.stack(columns).view(len(columns), side, side)

    def chosen(self, drawn: Drawn, rng: torch.Generator) -> list[list[int]]:
        """For each row the words that are asked for, in the order in which they are said."""
        n = len(drawn.z0)
        which, order = uniform(n, rng).tolist(), uniform(n, rng).tolist()
        due = self.due(drawn.step)
        chosen = []
        for i, x, o in zip(drawn.at.tolist(), which, order, strict=True):
            held, bounds = self.held[i], self.ratios[i].cumsum(0).tolist()
            option = len(held) if due else min(sum(x >= b for b in bounds), len(held))
            if option < len(held):
                chosen.append([held[option]])
            elif due:
                chosen.append(list(held))
            else:
                shuffled = torch.randperm(len(held), generator=torch.Generator().manual_seed(int(o * 2**31)))
                chosen.append([held[j] for j in shuffled])
        return chosen

    def due(self, step: int) -> bool:
        return bool(self.method.refresh and step and step % self.method.refresh == 0)

    def loss(self, drawn: Drawn, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The masked denoising loss, the attention loss and the prior's, of the rows of one update."""
        m, pipe, last = self.method, self.student, len(self.method.words)
        chosen, due = self.chosen(drawn, rng), self.due(drawn.step) and m.version == "released"
        cond = encode_once(pipe, [m.says(some) for some in chosen])
        alpha, sigma = pipe.denoiser.process.alpha_sigma(drawn.t, drawn.z0)
        noisy = alpha * drawn.z0 + sigma * drawn.eps
        target = compose(drawn.z0, drawn.eps, alpha, sigma, pipe.denoiser.prediction)
        with ExitStack() as looking:
            looking.enter_context(pipe.edit_attention(start_detached, "cross", stage="kv"))
            cross = looking.enter_context(averaged(pipe, "cross", self.cross))
            own = looking.enter_context(averaged(pipe, "self", self.own)) if due else None
            pred = pipe.denoiser(noisy, drawn.t, cond)
        masks = [self.masks_of(drawn, row) for row in range(len(chosen))]
        inside = torch.stack([x[some].amax(dim=0) for x, some in zip(masks, chosen, strict=True)])[:, None]
        mask = resized(inside, pred.shape[-1], m.upsampling) if m.masked else torch.ones_like(inside[:, :, :1, :1])
        denoising = masked_loss(pred, target, mask, m.per)
        seen, side = cross.mean, inside.shape[-1]
        pulled = torch.stack([
            attention_loss(
                resized(self.words_of(seen[row], cond, row, some, spans=False), side), masks[row][[*some, last]]
            )
            for row, some in enumerate(chosen)
        ]).mean()  # fmt: skip
        if own is not None:
            self.renew(drawn, cond, seen.detach(), own.mean.detach(), chosen)
        total, figures = denoising + m.attention_weight * pulled, {"denoising": denoising, "attention": pulled}
        if self.prior is not None:
            figures["prior"] = self.prior_loss(len(chosen), rng)
            total = total + m.prior_weight * figures["prior"]
        return total, figures

    def masks_of(self, drawn: Drawn, row: int) -> Float[Tensor, "word side side"]:
        """The masks of a row's picture, mirrored where it is."""
        masks = self.kept.masks[int(drawn.at[row])].clone()
        return masks.flip(-1) if int(drawn.mirrored[row]) else masks

    def prior_loss(self, n: int, rng: torch.Generator) -> Float[Tensor, ""]:
        pipe, T = self.student, self.student.clock.timesteps
        row = integers(self.method.n_prior, n, rng).to(pipe.device)
        z0 = of_posterior(self.prior, (0, row), rng if self.method.sample_posterior else None)
        t = ((integers(T, n, rng) + 1) / T).to(z0)
        with pipe.edit_attention(start_detached, "cross", stage="kv"):
            return denoising_loss(pipe, z0, t, normal(z0.shape, rng).to(z0), self.prior_cond.repeat(n))

    @torch.no_grad()
    def renew(
        self, drawn: Drawn, cond: Conditioning, cross: Tensor, own: Tensor, chosen: Sequence[Sequence[int]]
    ) -> None:
        """Take a row's new masks where they are like the last ones, for every word."""
        for row, some in enumerate(chosen):
            found = self.found(self.words_of(cross[row], cond, row, some, spans=True), own[row])
            where, old = [*some, len(self.method.words)], self.masks_of(drawn, row)
            new = found.masks.to(old)
            alike = [float(structural_similarity(a, b)) for a, b in zip(new[:-1], old[some], strict=True)]
            if found.distinct and min(alike) >= self.method.ssim:
                mirrored = int(drawn.mirrored[row])
                self.kept.masks[int(drawn.at[row]), where] = new.flip(-1) if mirrored else new
                self.kept.renewed += 1
