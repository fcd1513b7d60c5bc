"""The ledger: each method's central claim, measured again, with a baseline and an interval.

An entry is a module ``sfumato.ledger.NAME`` with one `Experiment` called ``EXPERIMENT``. `sfumato.ledger.runner`
measures it cell by cell and writes ``NAME.json``, with effect, interval and verdict computed here; the project's own
results are in `RECORDS`, and `sfumato.ledger.page` turns them into ``docs/ledger.md``. No verdict is written by hand.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sfumato.errors import BadInput

RECORDS = Path(__file__).parent / "records"
"""What was measured for this version, a file an entry."""
Pair = tuple[Sequence[float], Sequence[float]]
Table = dict[str, dict[str, float]]
"""Row -> column -> figure."""
Found = Mapping[str, Any]
"""A `Pair` for each claim; under other names, `Table`s."""
Figures = Mapping[str, Any]
"""What one arm found at one seed: numbers, and lists and mappings of numbers, by name."""


@dataclass(frozen=True)
class Claim:
    """One sentence that can turn out false, and how it is measured.

    Attributes:
        sentence: the claim.
        method, baseline: what is compared with what.
        quantity: what is measured, for each item, with its unit.
        better: which direction the claim says the method moves the quantity.
    """

    sentence: str
    method: str
    baseline: str
    quantity: str
    better: Literal["higher", "lower"] = "higher"


@dataclass(frozen=True)
class Experiment:
    """A method's claims and the function that measures them at one seed, whole or arm by arm.

    ``measure(seed)`` returns, for every claim, the paired per-item values (method, baseline): the same prompts and
    seeds in both. What else it returns, under names that are no claims, are `Table`s of figures: they are written with
    their standard error over the seeds, and decide nothing.

    An experiment whose parts are long has ``arms``: ``measure(seed, arm)`` returns the arm's `Figures`, and
    ``compare`` makes of all arms' figures what the other kind measures at once. A seed of an arm, a cell, is what runs
    in one process on one thread, and what is kept when a run is killed.

    Attributes:
        seeds: at least three.
        tuning: how settings were chosen, and on which seeds, none of which is in ``seeds``.
        cost: seconds that a cell takes one core, by arm where they differ.
        timed: it measures seconds, so that no two cells may run at once.
    """

    name: str
    paper: str
    claims: dict[str, Claim]
    seeds: tuple[int, ...]
    tuning: str
    measure: Callable[..., Any]
    cost: float | Mapping[str, float]
    notes: str = ""
    arms: tuple[str, ...] = ()
    compare: Callable[[dict[str, Figures]], Found] | None = None
    timed: bool = False

    def found(self, figures: dict[str, Figures]) -> Found:
        """What the figures of each arm at one seed say of the claims."""
        return self.compare(figures) if self.compare else figures[""]

    def at(self, seed: int) -> Found:
        """All arms measured at one seed, here and now."""
        return self.found({arm: self.measure(seed, arm) for arm in self.arms} or {"": self.measure(seed)})


def effect(pairs: Sequence[Pair], better: str, draws: int = 4000) -> dict[str, float]:
    """Mean paired difference (positive = as claimed) and its 95 % interval over seeds and items together.

    A two-level bootstrap: seeds are drawn with replacement, then items within each drawn seed; percentiles 2.5 and
    97.5 of the means. ``pairs`` has one (method, baseline) pair of equally long lists for each seed.
    """
    sign = 1.0 if better == "higher" else -1.0
    for m, b in pairs:
        if len(m) != len(b) or not len(m):
            raise ValueError(f"pairs are of equally many items, at least one: got {len(m)} and {len(b)}")
    per_seed = [sign * (np.asarray(m, float) - np.asarray(b, float)) for m, b in pairs]
    rng = np.random.default_rng(0)
    means = np.empty(draws)
    for i in range(draws):
        chosen = rng.integers(len(per_seed), size=len(per_seed))
        items = [per_seed[j][rng.integers(per_seed[j].size, size=per_seed[j].size)] for j in chosen]
        means[i] = np.mean([x.mean() for x in items])
    low, high = np.percentile(means, [2.5, 97.5])
    value = float(np.mean([d.mean() for d in per_seed]))
    return {"value": value, "low": float(low), "high": float(high)}


def verdict(interval: dict[str, float]) -> str:
    """Reproduced if the whole interval is on the claimed side of zero, not reproduced if on the other."""
    if interval["low"] > 0:
        return "reproduced"
    return "not reproduced" if interval["high"] < 0 else "inconclusive"


DAGGER = "†"
FEW = "of so few seeds Student's t over their means leaves it open"
"""What the dagger of `said` means."""


def said(claim: Mapping[str, Any]) -> str:
    """The verdict of a record's claim, with a dagger where it stands by the pictures at these seeds, and other seeds
    could turn it round: a bootstrap of three seeds has none beyond the smallest and the largest of them.
    """
    import torch

    from sfumato.metrics.bootstrap import few_interval

    means = [one["method"] - one["baseline"] for one in claim["per_seed"]]
    made = few_interval(torch.tensor(means, dtype=torch.float64), torch.Generator().manual_seed(0))
    open_ = claim["verdict"] != "inconclusive" and not (made.low > 0 or made.high < 0)
    return f"{claim['verdict']} {DAGGER}" if open_ else claim["verdict"]


def load(name: str) -> Experiment:
    """The experiment of ledger entry ``name``.

    Raises:
        BadInput: there is no such entry.
    """
    try:
        return importlib.import_module(f"sfumato.ledger.{name.replace('-', '_')}").EXPERIMENT
    except (ModuleNotFoundError, AttributeError) as error:
        raise BadInput(f"no ledger entry {name!r}; there are: {', '.join(names())}") from error


def names() -> list[str]:
    """Ledger entries, in the order of their files."""
    here = Path(__file__).parent
    return sorted(p.stem.replace("_", "-") for p in here.glob("*.py") if "\nEXPERIMENT = " in p.read_text())
