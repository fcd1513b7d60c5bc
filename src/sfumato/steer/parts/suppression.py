"""Cross-token non-maximum suppression: every pixel attends to one concept (algorithm 2 of arXiv:2310.07419)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from sfumato.pipeline import Conditioning
from sfumato.pipeline.anatomy import Call, Site
from sfumato.pipeline.attention import pixels_of
from sfumato.pipeline.steering import Forward, Interceptor, Run

from .retelling import heard


def smooth(maps: Float[Tensor, "*batch height width"], kernel: int, sigma: float) -> Tensor:
    """A Gaussian blur over the last two axes, reflected at the border; a side too short to reflect is left alone."""
    away = torch.arange(kernel, dtype=maps.dtype, device=maps.device) - kernel // 2
    weights = torch.exp(-0.5 * (away / sigma) ** 2)
    weights, half = weights / weights.sum(), kernel // 2
    x = maps.reshape(-1, 1, *maps.shape[-2:])
    if half and x.shape[-2] > half:
        x = F.conv2d(F.pad(x, (0, 0, half, half), mode="reflect"), weights.view(1, 1, -1, 1))
    if half and x.shape[-1] > half:
        x = F.conv2d(F.pad(x, (half, half, 0, 0), mode="reflect"), weights.view(1, 1, 1, -1))
    return x.view(maps.shape)


def ctnms(
    maps: Float[Tensor, "*batch height width token"],
    concepts: Sequence[int | Sequence[int]] | Bool[Tensor, "*#batch concept token"],
    *,
    kernel: int = 3,
    sigma: float = 1.0,
    scope: Literal["concepts", "all"] = "concepts",
    span: Literal["mean", "max"] = "mean",
    strength: float = 1.0,
    renorm: bool = False,
) -> Float[Tensor, "*batch height width token"]:
    """Attention maps in which, at every pixel, only the concept with the largest smoothed map is left.

    With A the maps: M = argmax over the concepts of G(A), G a Gaussian blur over the pixels; the tokens of the winner
    keep their original values, those of the other concepts become 0 (a tie goes to the first). Maps with fewer than
    two concepts are returned as they are.

    Args:
        maps: probabilities; heads are a batch dimension.
        concepts: for each its token, or its tokens; or which tokens they are, where some may be empty.
        kernel, sigma: of the blur, in pixels; 1 is none.
        scope: "all" zeroes every token but the winner's, those that belong to no concept too.
        span: the map of a concept of several tokens.
        strength: b in (1 - b) A + b A', where A' are the suppressed maps.
        renorm: bring the tokens of every pixel back to the sum 1.
    """
    member = _members(concepts, maps)
    there = member.any(dim=-1)  # [*#batch, concept]
    if member.shape[-2] < 2 or strength == 0:
        return maps
    if span == "mean":
        weights = member.to(maps.dtype) / member.sum(dim=-1, keepdim=True).clamp(min=1)
        claims = (maps @ weights.mT.unsqueeze(-3)).movedim(-1, -3)
    else:
        each = member.unbind(dim=-2)
        claims = torch.stack([maps.masked_fill(~m[..., None, None, :], 0).amax(dim=-1) for m in each], dim=-3)
    claims = smooth(claims, kernel, sigma).masked_fill(~there[..., None, None], -torch.inf)
    winner = claims.argmax(dim=-3)[..., None]  # [*batch, height, width, 1]
    kept = torch.zeros_like(maps, dtype=torch.bool)
    for k, m in enumerate(member.unbind(dim=-2)):
        kept |= (winner == k) & m[..., None, None, :]
    if scope == "concepts":
        kept |= ~member.any(dim=-2)[..., None, None, :]
    suppressed = torch.where(kept, maps, 0)
    if strength != 1:
        suppressed = (1 - strength) * maps + strength * suppressed
    if renorm:
        suppressed = suppressed / suppressed.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
    several = (there.sum(dim=-1) > 1)[..., None, None, None]
    return torch.where(several, suppressed, maps)


def _members(concepts: Any, maps: Tensor) -> Bool[Tensor, "*#batch concept token"]:
    if torch.is_tensor(concepts):
        return concepts
    member = torch.zeros(len(concepts), maps.shape[-1], dtype=torch.bool, device=maps.device)
    for row, tokens in zip(member, concepts, strict=True):
        row[torch.as_tensor(tokens, device=maps.device)] = True
    return member


class Suppression(Interceptor):
    """`ctnms` at attention sites, in the conditional rows of the calls of a run.

    Args:
        rows: which tokens of each prompt belong to which concept.
        side: of the latent at the default picture size.
        steps: shares of the run, from which to which to act.
        options: of `ctnms`.
    """

    def __init__(
        self,
        rows: Callable[[Conditioning], Bool[Tensor, "batch concept length"]],
        side: int,
        steps: tuple[float, float],
        options: Mapping[str, Any],
    ):
        self.rows, self.side, self.steps, self.options = rows, side, steps, {**options, "renorm": False}
        self.renorm = options["renorm"]
        self._current: tuple[Bool[Tensor, "picture concept length"], tuple[int, int]] | None = None

    def start(self, run: Run) -> None:
        _ = run.said  # see `Retelling.start`

    def predict(self, forward: Forward, call: Call, run: Run | None) -> Tensor:
        if run is None or (call.rows is not None and not bool(call.rows.any())):
            return forward(call)
        acts = [self.steps[0] <= i / len(run.timesteps) < self.steps[1] for i in range(len(run.timesteps))]
        # Who decodes later steps together with this one is to go no further.
        until = next((i for i in range(run.index, len(acts)) if acts[i] != acts[run.index]), None)
        call = replace(call, until=until)
        if not acts[run.index]:
            return forward(call)
        height, width = call.z.shape[-2:]
        self._current = self.rows(heard(call)), (height, width)
        try:
            return forward(call)
        finally:
            self._current = None

    def edit(self, site: Site, probs: Float[Tensor, "batch head query key"]) -> Tensor:
        """The probabilities of a site with the maps of the concepts suppressed: in joint attention, of the pixels."""
        if self._current is None:
            return probs
        member, sides = self._current
        which = torch.arange(len(probs), device=probs.device)
        which = which if site.rows is None else which[site.rows.to(probs.device)]
        text = site.text if site.kind == "joint" else 0  # queries and keys are the text's, then the pixels'
        length = text or member.shape[-1]
        # Rows of several steps may be one batch, picture by picture inside each half.
        picture = torch.arange(len(which), device=member.device) % len(member)
        member = F.pad(member, (0, length - member.shape[-1]))[picture].to(probs.device)
        pixels, sides = pixels_of(site, probs.shape[2], sides, self.side)
        before = probs[which, :, pixels]
        maps = before[..., :length].unflatten(2, sides)
        maps = ctnms(maps, member[:, None], **self.options).flatten(2, 3)
        after = torch.cat([maps, before[..., length:]], dim=-1)
        if self.renorm:
            after = after / after.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(after.dtype).tiny)
        changed = probs.clone()
        changed[which, :, pixels] = after
        return changed
