"""CopyScope: what each part of a workflow has to do with a picture's likeness to an original, as a Shapley value."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.fields import Count, Natural, within
from sfumato.finite import require_unit_range
from sfumato.metrics.extractors import Extractor
from sfumato.pipeline import Text2Image
from sfumato.text import counted

from .base import Attribution
from .parts.game import as_dividends, orders, sampled_shapley, shapley, visited
from .parts.similarity import SIMILARITIES
from .parts.study import Shares, Value, pictured, pictures_of
from .parts.utility import VIEWS, Utility, check_distance, views
from .parts.workflow import Workflow, tidy

LARGEST = 20
"""Players: the table of all alliances of more has over a million rows."""


@dataclass(frozen=True, kw_only=True)
class CopyScope(Attribution):
    """Shapley and leave-one-out shares of a workflow's parts in its likeness to an original (arXiv:2311.12847).

    The players are parts that can be switched: another checkpoint, LoRAs, a ControlNet, key phrases. Every alliance L
    of them draws the same seeds with all else equal. With a distance d to the original (the paper's is FID),

        U(L) = d(none) - d(L),
        v_i = sum over L without i of |L|! (n - |L| - 1)! / n! [U(L + i) - U(L)],

    and the share of i is v_i / sum_j |v_j|: positive where the part brings pictures nearer to the original. Leaving one
    out is v_i = U(all) - U(all without i). The values sum to U(all) - U(none), which is checked. Where there are too
    many parts for all alliances, ``orders`` pairs of an order and its reverse are sampled, with the error that this
    leaves. A share says how like pictures are, and nothing of law.

    `run` is for one pipeline: its parts are the adapters attached to it and ``phrases``, and each picture is held
    against what all of them draw (the same seed): how much of the way from the bare picture did each part go?
    `attribute` is for a `Workflow` and originals.

    Cost: 2^n alliances with one picture a seed each; or at most pairs (2 n - 2) + n + 2 of them.

    Differs from the paper: distances other than FID may be named, since FID of few pictures is degenerate; one original
    is replaced by views of it (cut and mirrored). Differs from the published code, which takes sums over sub-alliances
    for worths (``mode="dividend"`` does) and counts missing ones as 0 (`sfumato.attribute.parts.game.dividends`): a
    table with gaps is refused.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {"phrases": ("red", "star"), "sampling_steps": 2}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"kid": {"distance": "kid"}}

    distance: str = "fid"
    """How near pictures are to the original: fid, kid, cmmd, precision, ... as `sfumato score` has them, or of pairs
    mse, cosine, histogram, dhash, ssim, rgb-ssim. Where single pictures are judged, mse stands for a set's."""
    exact_up_to: Annotated[int, within(1, LARGEST)] = 10
    """Parts up to which all alliances are drawn."""
    orders: Natural = 0
    """Pairs of orders to sample instead; 0: all alliances, or none where there are too many."""
    mode: Literal["shapley", "dividend"] = "shapley"
    """The paper's value, or that of the published code, v_i = sum over L with i of U(L) / |L|, which overcounts and
    does not sum to U(all) - U(none)."""
    phrases: tuple[str, ...] = ()
    """Of `run`: phrases in the prompts that are parts, beside the adapters."""
    sampling_steps: Count | None = None
    """Of `run`: denoising steps; by default the pipeline's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_distance(self.distance)
        if self.orders == 1:
            raise BadInput("one pair of orders has no error: sample at least 2, or leave orders at 0 for all alliances")
        if self.orders and self.mode == "dividend":
            raise BadInput("dividends are sums over all alliances: leave orders at 0, or take the mode shapley")

    @property
    def value(self) -> Value:
        return as_dividends if self.mode == "dividend" else shapley

    def chosen(self, n: int, seeds: int = 1) -> tuple[list[tuple[int, ...]], list[int]]:
        """The orders to sample (none: all alliances), and the alliances to draw.

        Raises:
            BadInput: too many parts for all alliances; says what sampling costs.
        """
        if self.orders:
            some = orders(n, self.orders, torch.Generator().manual_seed(self.seed))
            everyone = (1 << n) - 1
            return some, sorted({*visited(some), *(everyone ^ (1 << i) for i in range(n))})
        if n > self.exact_up_to:
            pairs = 20
            most = min(pairs * (2 * n - 2) + n + 2, 1 << n)
            raise BadInput(
                f"{n} parts make {1 << n:,} alliances, {(1 << n) * seeds:,} pictures: sample orders, as --orders "
                f"{pairs} does with at most {most:,} alliances ({most * seeds:,} pictures), or raise --exact-up-to"
            )
        return [], list(range(1 << n))

    def attribute(
        self,
        workflow: Workflow,
        originals: Float[Tensor, "m 3 height width"],
        *,
        extractor: Extractor | None = None,
        folder: Path | None = None,
        jobs: int = 1,
        device: str | None = None,
        progress: Callable[[str], None] = lambda line: None,
    ) -> tuple[Shares, dict[int, Float[Tensor, "seeds 3 height width"]]]:
        """The shares of a workflow's parts in its likeness to ``originals``, and the pictures of every alliance.

        Args:
            originals: in [0, 1]; one stands for itself by views of it, where the distance is one of sets.
            extractor: features for distances of sets (`sfumato.metrics.extractors.make_extractor`).
            folder: where pictures are kept; killed, the same call goes on.
            jobs: processes at a time, each an alliance.
            progress: called with a line for every alliance.

        Raises:
            BadInput: as `chosen`; no originals, or not in [0, 1]; pictures of too few seeds for the distance; a folder
                of another workflow.
        """
        some, alliances = self.chosen(len(workflow.parts), len(workflow.seeds))
        if originals.ndim != 4 or originals.shape[1] != 3 or not len(originals):
            raise BadInput(f"originals come as a tensor (m, 3, height, width) in [0, 1], not {tuple(originals.shape)}")
        require_unit_range(originals, "originals", 1e-3)
        paired = self.distance in SIMILARITIES
        few = not paired and len(originals) < 2
        held_against = views(originals, VIEWS, self.seed) if few else originals
        if not paired and len(workflow.seeds) < 2:
            raise BadInput(f"{self.distance} compares sets: give the workflow at least 2 seeds")
        utility = Utility(self.distance, held_against, extractor, self.seed)
        pictures = pictures_of(
            workflow, alliances, folder, jobs=jobs, batch=self.batch, device=device, progress=progress
        )
        about = {"orders": len(some), "mode": self.mode, "views": len(held_against) if few else 0}
        return pictured(workflow, pictures, utility, some, self.seed, about, self.value), pictures

    def shares(self, p: Text2Image, prompts: list[str], seeds: list[int]) -> dict[str, Float[Tensor, "n"]]:
        parts = [*p.adapters, *self.phrases]
        if not parts:
            raise BadInput("this pipeline has no parts to judge: attach adapters, or name phrases of the prompts")
        if len({" ".join(_pieces(part)) for part in parts}) < len(parts):
            raise BadInput("two parts have one name: give each phrase once, and none an adapter's name")
        for phrase in self.phrases:
            if not any(_said(phrase).search(prompt) for prompt in prompts):
                raise BadInput(f"no prompt says {phrase!r}: name phrases of the prompts, word by word")
        some, alliances = self.chosen(len(parts), len(seeds))
        drawn = {}
        for a in alliances:
            off = [part for i, part in enumerate(parts) if not a >> i & 1]
            with switched_off(p, [name for name in off if name in p.adapters]):
                said = [without(prompt, [w for w in off if w in self.phrases]) for prompt in prompts]
                drawn[a] = p.draw(said, seeds, sampling_steps=self.sampling_steps, batch=self.batch).double().cpu()
        measure = SIMILARITIES[self.distance if self.distance in SIMILARITIES else "mse"]
        whole = drawn[(1 << len(parts)) - 1]
        near = {a: measure(x, whole) for a, x in drawn.items()}
        worth = {a: x - near[0] for a, x in near.items()}
        if some:
            values = sampled_shapley(worth, some)[0]
        else:
            values = self.value(torch.stack([worth[a] for a in range(1 << len(parts))]))
        return dict(zip(parts, values.unbind(0), strict=True))


@contextmanager
def switched_off(p: Text2Image, names: Sequence[str]) -> Iterator[None]:
    """The pipeline without some of its adapters, for a block."""
    before = [(p.adapters[name], p.adapters[name].scale, p.adapters[name].gate) for name in names]
    try:
        for adapter, _, _ in before:
            adapter.scale, adapter.gate = 0.0, None
        yield
    finally:
        for adapter, scale, gate in before:
            adapter.scale, adapter.gate = scale, gate


def without(prompt: str, phrases: Sequence[str]) -> str:
    """A prompt that does not say these phrases (as whole words, in capitals or not)."""
    for phrase in sorted(phrases, key=len, reverse=True):
        prompt = _said(phrase).sub(" ", prompt)
    return tidy(re.sub(r"\s+(?=[.;:!?])", "", prompt))


def _pieces(phrase: str) -> list[str]:
    """Its words and marks, one by one."""
    return re.findall(r"\w+|[^\w\s]", phrase.lower())


def _said(phrase: str) -> re.Pattern[str]:
    """What finds a phrase in prompts: blanks beside marks do not count, and a mark ends a word unless it is inside one
    (red-hot, <red>)."""
    made, last = "", ""
    for piece in _pieces(phrase):
        made += (r"\s+" if _worded(last) and _worded(piece) else r"\s*" if last else "") + re.escape(piece)
        last = piece
    start = r"(?<![\w<])(?<!\w[-'])" if _worded(phrase.strip()[:1]) else ""
    end = r"(?![\w>]|[-']\w)" if _worded(last) else ""
    return re.compile(start + made + end if made else r"(?!)", re.IGNORECASE)


def _worded(piece: str) -> bool:
    return bool(re.match(r"\w", piece))


def plan_title(method: CopyScope, workflow: Workflow) -> str:
    """How much there is to draw, in words."""
    some, alliances = method.chosen(len(workflow.parts), len(workflow.seeds))
    how = f"{counted(len(some), 'order')} sampled" if some else "all alliances"
    pictures = counted(len(alliances) * len(workflow.seeds), "picture")
    return f"{counted(len(workflow.parts), 'part')}, {how}: {counted(len(alliances), 'alliance')}, {pictures}"
