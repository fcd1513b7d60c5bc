"""The pictures of every alliance, one after the other or several at once; and what the parts' shares in them are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from sfumato.cells import Failed, finished
from sfumato.errors import BadInput, SfumatoError
from sfumato.files import atomic_folder, held, save_png, write_json
from sfumato.foreign import read_json, reading
from sfumato.metrics.bootstrap import Estimate, influence_interval

from .game import leave_one_out, members, sampled_shapley, shapley
from .utility import Measured, Utility
from .workflow import Workflow, drawn, to_levels

WORKFLOW = "workflow.json"
Value = Callable[[Tensor], Tensor]
"""A linear function of a table of all alliances, [alliances, ...], to a value for each player."""


@dataclass(frozen=True)
class Cell:
    """The pictures of one alliance."""

    workflow: Workflow
    alliance: int
    batch: int = 32
    device: str | None = None

    def __str__(self) -> str:
        return " + ".join(members(self.alliance, self.workflow.players)) or "none of the parts"


def measure(cell: Cell) -> np.ndarray:
    """What the alliance draws: uint8 [seeds, height, width, 3]."""
    return to_levels(drawn(cell.workflow, cell.alliance, cell.workflow.seeds, cell.batch, cell.device))


def pictures_of(
    workflow: Workflow,
    alliances: Sequence[int],
    folder: Path | None = None,
    *,
    jobs: int = 1,
    batch: int = 32,
    device: str | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[int, Float[Tensor, "seeds 3 height width"]]:
    """The pictures of these alliances, in [0, 1]; what ``folder`` has already is not drawn again.

    Each alliance is kept whole as soon as it is drawn, as PNGs in ``alliances/``; killed, the same call goes on.

    Raises:
        BadInput: the folder holds another workflow or something else; parts of kind python with jobs > 1.
        SfumatoError: an alliance could not be drawn.
    """
    if jobs > 1 and not workflow.portable:
        raise BadInput("a workflow with pipelines or functions in it stays in this process: leave jobs at 1")
    found: dict[int, Tensor] = {}
    with held(folder) if folder is not None else nullcontext() as place:
        if place is not None:
            _claim(place, workflow)
            found = {a: _read(place / _name(a), workflow) for a in alliances if (place / _name(a)).is_dir()}
        cells = [Cell(workflow, a, batch, device) for a in alliances if a not in found]
        for cell, result in finished(cells, measure, jobs=jobs):
            if isinstance(result, Failed):
                kind = BadInput if result.refused else SfumatoError
                raise kind(f"{cell}: {result.reason}")
            found[cell.alliance] = torch.from_numpy(result).permute(0, 3, 1, 2).float() / 255
            if place is not None:
                _keep(place / _name(cell.alliance), cell, result)
            progress(f"{cell}: drawn ({len(found)} of {len(alliances)})")
    return {a: found[a] for a in alliances}


def _name(alliance: int) -> str:
    return f"alliances/{alliance:04d}"


def _claim(folder: Path, workflow: Workflow) -> None:
    told, file = workflow.to_json(), folder / WORKFLOW
    if not file.exists():
        if there := sorted(p.name for p in folder.iterdir()):
            raise BadInput(f"{folder} is not an attribution's: it holds {there[0]}; choose another folder")
        (folder / "alliances").mkdir()
        write_json(file, told)
        return
    before = read_json(file, advice="choose another folder")
    if changed := sorted(k for k in {*before, *told} if before.get(k) != told.get(k)):
        raise BadInput(f"{folder} holds another workflow ({', '.join(changed)} differ): choose another folder")


def _keep(target: Path, cell: Cell, pictures: np.ndarray) -> None:
    with atomic_folder(target) as folder:
        for seed, picture in zip(cell.workflow.seeds, pictures, strict=True):
            save_png(folder / f"{seed}.png", picture, {"alliance": str(cell), "seed": seed})


def _read(folder: Path, workflow: Workflow) -> Tensor:
    arrays = []
    for seed in workflow.seeds:
        file = folder / f"{seed}.png"
        with reading(file, "a picture", advice=f"remove {folder}, and it is drawn again"), Image.open(file) as opened:
            arrays.append(np.asarray(opened.convert("RGB")).copy())
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


@dataclass(frozen=True)
class Shares:
    """How similarity to the original is shared out among the parts.

    Attributes:
        players: the parts.
        worth: of each alliance that was measured, U(L), with the distance or similarity itself in ``measured``.
        shapley, loo: values in the unit of the worth, with 95 % intervals over seeds (Monte-Carlo error included); with
            ``mode`` "dividend" in ``about`` the former are sums of dividends.
        shares, loo_shares: signed, of absolute sum 1, with intervals to first order (the sum held fixed).
        error: standard error of sampling orders, by part; empty where all alliances were measured.
        gap: sum of the Shapley values less U(all) - U(none): 0 but for rounding, unless they are dividends.
        seeds: pictures an alliance.
    """

    players: list[str]
    worth: dict[int, float]
    measured: dict[int, float]
    shapley: list[Estimate]
    loo: list[Estimate]
    shares: list[Estimate]
    loo_shares: list[Estimate]
    error: list[float]
    gap: float
    seeds: int
    about: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON types: parts and alliances by name."""
        told = {
            name: {"shapley": _json(self.shapley[i]), "leave_one_out": _json(self.loo[i]),
                   "share": _json(self.shares[i]), "leave_one_out_share": _json(self.loo_shares[i]),
                   "sampling_error": self.error[i] if self.error and self.error[i] == self.error[i] else None}
            for i, name in enumerate(self.players)
        }  # fmt: skip
        alliances = [
            {"parts": members(a, self.players), "worth": x, "measured": self.measured[a]} for a, x in self.worth.items()
        ]
        return {
            "parts": told, "alliances": alliances, "efficiency_gap": self.gap, "seeds": self.seeds,
            "whole": self.worth[max(self.worth)], **json.loads(json.dumps(self.about)),
        }  # fmt: skip


def shares_of(
    players: Sequence[str],
    measured: Mapping[int, Measured],
    some: Sequence[Sequence[int]] = (),
    *,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
    value: Value = shapley,
) -> Shares:
    """Shapley and leave-one-out shares of measured alliances.

    Both are linear in the worths, so that the influence of a seed on a share is the same combination of its influences
    on the worths; intervals are the bootstrap of their mean (common seeds cancel what they share).

    Args:
        some: orders that were sampled; empty where all alliances were measured.
        value: what the parts' values are, of a whole table.
    """
    n, none, everyone = len(players), measured[0], measured[(1 << len(players)) - 1]
    # first column the worth, the others each seed's influence on it
    rows = {
        a: torch.cat([torch.tensor([m.value - none.value], dtype=torch.float64), m.influence - none.influence])
        for a, m in sorted(measured.items())
    }
    if some:
        values, errors = sampled_shapley(rows, some)
        error = errors[:, 0].tolist()
        left = torch.stack([rows[(1 << n) - 1] - rows[((1 << n) - 1) ^ (1 << i)] for i in range(n)])
    else:
        whole = torch.stack([rows[a] for a in range(1 << n)])
        values, left, error = value(whole), leave_one_out(whole), []

    def estimates(found: Tensor, noises: Sequence[float], scale: float = 1.0) -> list[Estimate]:
        made = []
        for row, noise in zip(found, noises, strict=True):
            rng = torch.Generator().manual_seed(seed)
            own = scale * row[1:]
            made.append(influence_interval(scale * float(row[0]), own - own.mean(), rng, noise=scale * noise))
        return made

    still = [0.0] * n
    noises = [x if x == x else 0.0 for x in error] or still
    inverse = lambda found: 1 / total if (total := float(found[:, 0].abs().sum())) > 0 else 0.0
    whole_worth = everyone.value - none.value
    return Shares(
        players=list(players),
        worth={a: float(row[0]) for a, row in rows.items()},
        measured={a: m.value for a, m in sorted(measured.items())},
        shapley=estimates(values, noises),
        loo=estimates(left, still),
        shares=estimates(values, noises, inverse(values)),
        loo_shares=estimates(left, still, inverse(left)),
        error=error,
        gap=float(values[:, 0].sum()) - whole_worth,
        seeds=len(none.influence),
        about=dict(about or {}),
    )


def pictured(
    workflow: Workflow,
    pictures: Mapping[int, Tensor],
    utility: Utility,
    some: Sequence[Sequence[int]],
    seed: int,
    about: Mapping[str, Any],
    value: Value = shapley,
) -> Shares:
    """The shares that drawn pictures say."""
    measured = {a: utility(x) for a, x in pictures.items()}
    return shares_of(workflow.players, measured, some, seed=seed, about={**utility.about(), **about}, value=value)


def _json(x: Estimate) -> dict[str, Any]:
    return {"value": x.value, "n": x.n, **{k: None if v != v else v for k, v in (("low", x.low), ("high", x.high))}}
