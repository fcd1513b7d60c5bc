"""Closed form on the row that ends a text: fields and edit of TRCE's first stage, and its solution as a function."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sfumato.data.cases import names
from sfumato.data.pictures import open_pictures
from sfumato.errors import BadInput
from sfumato.fields import Count, NotNegative
from sfumato.pipeline import Conditioning, Text2Image
from sfumato.pipeline.conditioning import Role

from ..base import Eraser
from .closed_form import ridge_edit
from .edit import Edit
from .statistics import Rows, caption_gram, read_captions

OBJECT = (
    "{}", "{} in a photo", "a snapshot of {}", "a photo of {}", "a picture of {}", "a drawing of {}", "an image of {}",
    "a painting of {}", "a close-up of {}", "a poster with {}", "a sketch showing {}", "{} seen from afar",
    "{} on a postcard", "{} in the evening", "a film still with {}",
)  # fmt: skip
STYLE = (
    "{}", "a painting by {}", "art by {}", "a drawing by {}", "a work of {}", "a portrait by {}", "a print by {}",
    "a landscape by {}", "a picture in the style of {}", "a study after {}", "a poster in the manner of {}",
    "a mural inspired by {}", "a late work by {}", "an etching by {}", "the style of {}",
)  # fmt: skip
SKETCH = (
    "{}", "a {}", "a picture of a {}", "a red {}", "a green {}", "a blue {}", "a yellow {}",
    "a {} on a white background", "a {} on a sky background", "a {} on a night background",
    "a purple {} on a grass background", "a {}, flat style", "a {}, chalk style", "a pixel style picture of a {}",
    "a pink {} in outline style, dotted background",
)  # fmt: skip


def textual_edit(
    weights: Sequence[Float[Tensor, "out dim"]],
    harmful: Float[Tensor, "n dim"],
    safe: Float[Tensor, "n dim"],
    captions: Float[Tensor, "dim dim"] | None = None,
    *,
    eta: float = 0.01,
    lam: float = 0.0,
    row_weights: Float[Tensor, "n"] | None = None,
    prompts: int | None = None,
) -> tuple[list[Float[Tensor, "out dim"]], float]:
    """W' = A B^-1 for every W, with the sums over rows (stage 1 of arXiv:2503.07389)

        A = (1 / n) sum_j w_j (W s_j) h_j^T + eta W B_k / N + lam W,
        B = (1 / n) sum_j w_j h_j h_j^T     + eta B_k / N   + lam I,

    the minimum of (1/n) sum_j w_j |W' h_j - W s_j|^2 + (eta/N) sum_k |W' e_k - W e_k|^2 + lam |W' - W|^2.

    Args:
        harmful, safe: h_j, and the row s_j whose response it is to have.
        captions: B_k / N of `caption_gram`.
        row_weights: w_j; None: all 1.
        prompts: n, if it is not the number of rows.

    Returns:
        The edited weights in the dtypes given, and the condition number of B.

    Raises:
        BadInput: B is singular: too few captions, and no ``lam``.
    """
    root = torch.ones(len(harmful)) if row_weights is None else row_weights.double().sqrt()
    root = root.to(harmful.device, torch.float64)[:, None]
    return ridge_edit(
        weights, root * harmful.double(), root * safe.double(), captions,
        erase_scale=1 / (prompts or len(harmful)), preserve_scale=eta, lam=lam,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Textual(Eraser):
    """Fields of an eraser that maps ends of texts to those of safe ones, and that edit; not a method itself."""

    templates: tuple[str, ...] = OBJECT
    """Sentences with {} for a concept or its anchor, by which stage 1 expands them."""
    eta: NotNegative = 0.01
    """Weight of the captions in stage 1."""
    official: bool = False
    """Let eta count twice, as in the published scripts."""
    lam: NotNegative = 0.0
    """Weight of staying at the weights as they are, in stage 1: a safeguard where captions are few."""
    token_weights: tuple[NotNegative, NotNegative, NotNegative, NotNegative] = (0.0, 1.0, 0.0, 0.0)
    """Weights of a prompt's rows in stage 1: its start, the first end of the text (its last row where it has no
    end), the last row of the context (times the rows after that end), the concept's own words (which go where the safe
    prompt's last row does)."""
    captions: Path | None = None
    """A text file of captions of pictures that are not to change, one a line, such as COCO's. By default those of the
    sketch world for a model trained on it, and none (then only ``preserve``) for others."""
    n_captions: Count = 30_000
    """At most so many of them count."""
    caption_rows: Rows = "all"
    """Which of a caption's rows are preserved: the whole context, or up to the first end of the text."""
    cache: Path | None = None
    """A file that keeps the statistics of the captions, written if it is not there."""

    def solve(self, pipe: Text2Image) -> Edit:
        """The edit of stage 1."""
        projections, captions = pipe.projections("cross.v", "cross.k"), self.captions_for(pipe)
        if not captions and not self.lam:
            raise BadInput("nothing would be preserved: give a file of captions, or prompts to preserve, or raise lam")
        kept = caption_gram(pipe, captions, self.caption_rows, self.cache) if captions else None
        harmful, safe, weights = self.rows(pipe)
        edited, condition = textual_edit(
            [p.weight for p in projections], harmful, safe, kept, eta=self.eta**2 if self.official else self.eta,
            lam=self.lam, row_weights=weights, prompts=len(self.concepts) * len(self.templates),
        )  # fmt: skip
        log = {"condition_number": condition, "edited_rows": len(harmful), "captions_read": len(captions)}
        return Edit({f"{p.name}.weight": w for p, w in zip(projections, edited, strict=True)}, log)

    def rows(self, pipe: Text2Image) -> tuple[Float[Tensor, "n dim"], Float[Tensor, "n dim"], Float[Tensor, "n"]]:
        """The rows of all harmful prompts that have a weight, those that they are mapped to, and the weights."""
        pairs = [(c, self.anchor_for(i, "")) for i, c in enumerate(self.concepts)]
        told = [(t.replace("{}", c), t.replace("{}", a).strip(), c) for c, a in pairs for t in self.templates]
        harmful, safe = (pipe.encode([row[i] for row in told]) for i in (0, 1))
        read, ends = [pipe.text_rows(c) for c in (harmful, safe)], [first_end(c) for c in (harmful, safe)]
        last, (start, end, rest, word) = harmful.tokens.shape[1] - 1, self.token_weights
        entries = []
        for j, (_, _, concept) in enumerate(told):
            i, k = int(ends[0][j]), int(ends[1][j])
            words = pipe.find(harmful[j], concept)[0].nonzero().flatten().tolist() if word else []
            # Behind the end is padding, the last of which stands for all; some networks do not look at it.
            over, on = (i, k) if pipe.masked else (last, last)
            of = [(0, 0, start), (i, k, end), (over, on, rest * (over - i)), *((w, on, word) for w in words)]
            entries += [(j, a, b, weight) for a, b, weight in of if weight]
        j, a, b = (torch.tensor([entry[n] for entry in entries], device=pipe.device) for n in range(3))
        weights = torch.tensor([entry[3] for entry in entries], dtype=torch.float64, device=pipe.device)
        return read[0][j, a], read[1][j, b], weights

    def captions_for(self, pipe: Text2Image) -> list[str]:
        """Captions of all but the concepts, then what is preserved by name."""
        if self.captions is not None:
            found = read_captions(self.captions)
        elif pipe.vocabulary:
            world = open_pictures("sketch", pipe.size, seed=self.seed, count=self.n_captions)
            found = [world.caption(i) for i in range(self.n_captions)]
        else:
            found = []
        # The words of a concept in any order; one that has none, such as an emoji, as it stands.
        erased = [re.findall(r"\w+", c) or [c] for c in self.concepts]
        free = [c for c in found if not any(all(names(c, word) for word in words) for words in erased)]
        return [*free[: self.n_captions], *self.kept(pipe)]


def first_end(cond: Conditioning) -> Int[Tensor, "batch"]:
    """Where the first end of the text stands in each row; its last row where it has no end, as for Sana's encoder."""
    last = cond.mask.sum(dim=1) - 1
    if cond.roles is None:
        return last
    ends = cond.roles == Role.END
    return torch.where(ends.any(dim=1), ends.long().argmax(dim=1), last)
