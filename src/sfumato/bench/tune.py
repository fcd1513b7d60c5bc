"""Settings for a model: as many trials for every method, on concepts and a seed that no bench and no ledger counts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from sfumato import catalog
from sfumato.audit import Audit
from sfumato.cells import Failed, finished
from sfumato.data.cases import check_concepts
from sfumato.errors import BadInput
from sfumato.fields import Count, Seed, check
from sfumato.files import held, write_json
from sfumato.foreign import read_json, shaped
from sfumato.pipeline import Text2Image, load_text2image
from sfumato.plan import Plan
from sfumato.report.schema import Interval
from sfumato.report.words import MISSING, average, bounds, difference, full, value
from sfumato.text import counted

from .cell import Cell, keep_original, measure


@dataclass(frozen=True)
class Trial:
    """One setting of a method, and what came of it: ``figures`` of a cell by concept, or ``why`` there are none."""

    method: str
    settings: Mapping[str, Any]
    first: bool
    """These are the settings that the model has now."""
    figures: Mapping[str, Mapping[str, Any]] | None = None
    why: str = ""

    @property
    def intervals(self) -> dict[str, Interval | None]:
        """What the score is made of, the mean over the concepts: what an eraser takes and keeps, what an attack and its
        control recover."""
        each = [score_parts(seen) for seen in (self.figures or {}).values()]
        if not all(each):  # a concept of which nothing was read would be left out of the mean
            return {}
        return {name: average([parts[name] for parts in each]) for name in (each[0] if each else ())}

    @property
    def parts(self) -> dict[str, float]:
        """The same as numbers; a control that was not run recovers nothing."""
        return {name: 0.0 if i is None else i.value or 0.0 for name, i in self.intervals.items()}

    @property
    def result(self) -> Interval | None:
        """Of an eraser the mean of what is gone and what is kept; of an attack what it recovers beyond its control."""
        made = self.intervals
        if "recovered" in made:  # a control that was not run recovers nothing
            return difference(made["control"], made["recovered"]) or made["recovered"]
        return average(list(made.values())) if all(i and i.measured for i in made.values()) else None

    @property
    def score(self) -> float:
        """The same as a number; -1 where something of it was not measured."""
        result = self.result
        return -1.0 if result is None or result.value is None else result.value

    def beyond(self, other: Trial) -> Interval | None:
        """By how much its score exceeds another's. The two are taken as independent, and so are several concepts of
        one; what is kept of several concepts in one picture is not."""
        return difference(other.result, self.result)


def score_parts(seen: Mapping[str, Any]) -> dict[str, Interval | None]:
    """Of one cell's figures; empty where an eraser was not judged by both what is gone and what is kept."""
    if seen.get("attacks"):
        (found,) = seen["attacks"].values()
        return {name: Interval.from_json(found[name]) for name in ("recovered", "control")}
    kept = Interval.from_json(seen.get("kept"), "value")  # of near and far together; trials of earlier versions lack it
    kept = kept or average([Interval.from_json(seen[name], "value") for name in ("near", "far") if seen.get(name)])
    return {"gone": Interval.from_json(seen["erasure"], "value"), "kept": kept} if kept and seen["erasure"] else {}


@dataclass(frozen=True, kw_only=True)
class Tune:
    """Tries settings of methods on one model: those that it has now, and others of each method's `Tuned.GRID`.

    Every method has the same number of trials, chosen at random from its grid, and every trial the same concepts. An
    eraser's score is the mean of the share of a concept's pictures without it and of the share of all else kept; an
    attack's is the share that it recovers from what ``against`` erased, less its control's; means over the concepts.
    What scores more than the present settings, beyond the 95 % interval, is tried again on other concepts
    (``again``), and goes by hand into the class's preset where it does so there, too.
    """

    model: str = "sketch"
    """An embedded model, a folder written by save_pretrained, or a hub id."""
    methods: tuple[str, ...] = ()
    """Erasers and attacks; by default all that have something to try."""
    concepts: tuple[str, ...] = ("star",)
    """What is erased, each by itself: several kinds (an object, a colour) where the settings shall serve them all."""
    against: str = "uce"
    """The eraser whose result attacks are tried on."""
    trials: Count = 6
    """Settings tried of each method; fewer where its grid has fewer."""
    seed: Seed = 0
    """Of the choice of settings, of edits, prompts and noise."""
    n: Count = 48
    """Pictures of the concept."""
    n_retain: Count = 8
    """Pictures for each retained concept, at least."""
    sampling_steps: Count = 15
    """Denoising steps."""
    retain: tuple[str, ...] | None = None
    """What must be kept; by default, in the sketch world, all its other words. Elsewhere erasers need some to be
    scored, and attacks to have a control."""
    prompts: tuple[str, ...] | None = None
    """Prompts with {concept} in them; by default four plain ones, or the sketch world's own."""
    detector: str | None = None
    """Who sees concepts in pictures, as for `sfumato audit`."""
    again: str | None = None
    """Folder of finished trials of which only some are tried again, on other concepts: of each method whose settings
    then were surely beaten, these and the best others. The winner of many trials owes part of its score to luck."""
    jobs: Count = 2
    """Trials at a time on this machine."""
    ray: str | None = None
    """Address of a Ray cluster that runs the trials instead; see `sfumato bench erase`."""

    def __post_init__(self) -> None:
        check(self)
        object.__setattr__(self, "concepts", check_concepts(self.concepts, self.retain))
        for name in (*self.methods, self.against):
            if catalog.get(name).verb not in ("erase", "attack"):
                raise BadInput(f"{name} is not an eraser or an attack: only these are tuned")
        object.__setattr__(self, "methods", tuple(catalog.get(name).name for name in self.methods))

    @cached_property
    def pipe(self) -> Text2Image:
        return load_text2image(self.model)

    def tried(self) -> list[tuple[Trial, dict[str, Cell]]]:
        """All trials, each with its cells by concept."""
        again = None if self.again is None else finals(load(self.again))
        entries = [m for m in (*catalog.methods("erase"), *catalog.methods("attack")) if m.load().GRID]
        chosen = [m for m in entries if not self.methods or m.name in self.methods]
        if lost := set(self.methods) - {m.name for m in chosen}:
            raise BadInput(f"{min(lost)} has nothing to tune: its class has no GRID")
        audit = {"before": self.model, "n": self.n, "n_retain": self.n_retain, "n_attack": self.n}
        audit |= {"sampling_steps": self.sampling_steps, "detector": self.detector, "attacks": []}
        given = {"retain": self.retain, "prompts": self.prompts}  # trials without them keep their names
        audit |= {name: value for name, value in given.items() if value is not None}
        found = []
        for entry in chosen:
            cls = entry.load()
            now = dict(cls.settings_for(self.pipe))
            if again is None:
                drawn = settings_of(now, cls.GRID, self.trials, self.seed)
                trials = [Trial(entry.name, settings, settings == now) for settings in drawn]
            else:
                trials = [replace(t, figures=None) for t in again if t.method == entry.name]
            for trial in trials:
                settings, sha = trial.settings, self.pipe.describe()["sha256"]
                cell = Cell(entry.name, (), self.seed, settings, audit, sha)
                if entry.verb == "attack":
                    base = dict(catalog.get(self.against, "erase").load().settings_for(self.pipe))
                    attacked = {**audit, "attacks": [(entry.name, settings)], "n_retain": 1}
                    cell = replace(cell, method=self.against, settings=base, audit=attacked)
                found.append((trial, {concept: replace(cell, concepts=(concept,)) for concept in self.concepts}))
        if not found and again is not None:
            raise BadInput(f"in {self.again} nothing surely beat the present settings: there is nothing to try again")
        return found

    def run(
        self, out: str | os.PathLike, announce: Callable[[Plan], None] | None = None,
        progress: Callable[[str], None] = lambda line: None,
    ) -> list[Trial]:  # fmt: skip
        """Measure the trials that are not in ``out`` yet; all of them, by method, the best first."""
        if self.again is not None and Path(self.again).resolve() == Path(out).resolve():
            raise BadInput(f"{out} holds what is tried again: choose another folder for these trials")
        tried = self.tried()
        cells = [cell for _, each in tried for cell in each.values()]
        self._check(cells)
        with held(out) as folder:
            where = lambda cell: folder / f"{cell.key}.json"
            left = [cell for cell in cells if not where(cell).exists()]
            read = lambda cell: read_json(where(cell), {"figures": dict}, "remove it, and the trial is measured again")
            known = {cell.key: read(cell)["figures"] for cell in cells if where(cell).exists()}
            if announce:
                title = f"{counted(len(tried), 'trial')} on {', '.join(map(repr, self.concepts))}"
                title += f", {len(cells) - len(left)} of {counted(len(cells), 'edit')} measured"
                announce(Plan(title, time="minutes a trial", writes=[f"{out}/"]))
            lost: dict[str, str] = {}
            measuring = partial(measure, folder=folder)
            found = finished(left, measuring, jobs=self.jobs, apart=True, ray=self.ray)
            for done, (cell, result) in enumerate(found, 1):
                if isinstance(result, Failed):
                    lost[cell.key] = result.reason
                else:
                    keep_original(cell, folder, result)
                    write_json(where(cell), {"cell": asdict(cell), "figures": result["figures"]})
                    known[cell.key] = result["figures"]
                progress(f"{cell}: {lost.get(cell.key, 'done')} ({done} of {len(left)})")
        made = [
            replace(trial, figures={c: known[cell.key] for c, cell in each.items()})
            if all(cell.key in known for cell in each.values())
            else replace(trial, why=next(lost[cell.key] for cell in each.values() if cell.key in lost))
            for trial, each in tried
        ]
        order = list(dict.fromkeys(trial.method for trial in made))
        return sorted(made, key=lambda trial: (order.index(trial.method), -trial.score))

    def _check(self, cells: Sequence[Cell]) -> None:
        """Refuse what no trial could be judged by, before any is made: a detector that does not know a concept, nothing
        to keep."""
        if not cells:
            return
        told = {**cells[0].audit, "before": self.pipe, "attacks": (), "seed": self.seed, "progress": False}
        alone = [Audit(after=self.pipe, concepts=(concept,), **told).prepare() for concept in self.concepts]
        if not all(setup.cases.concepts for setup in alone):
            raise BadInput("erasers are scored by what they keep too, and attacks by their control: name some concepts "
                           "with retain, as in --retain church dog")  # fmt: skip


def settings_of(
    now: Mapping[str, Any], grid: Mapping[str, Sequence[Any]], trials: int, seed: int
) -> list[dict[str, Any]]:
    """The present settings, and others of the grid at random, ``trials`` in all where there are as many."""
    points = [{**now, **dict(zip(grid, values, strict=True))} for values in product(*grid.values())]
    others = [point for point in points if point != dict(now)]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed)).tolist()
    return [dict(now), *(others[i] for i in order[: trials - 1])]


def rows(trials: Sequence[Trial], grids: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """The trials as a table: method, settings tried, score, by how much it exceeds that of the present settings (which
    an asterisk marks), and what it is made of."""
    present, told = {t.method: t for t in trials if t.first}, []
    for t in trials:
        tried = ", ".join(f"{name} {t.settings.get(name, 'default')}" for name in grids[t.method])
        parts = "; ".join(f"{name} {full(i)}" for name, i in t.intervals.items()) or t.why or MISSING
        more = None if t.first else t.beyond(present[t.method])
        gained = f"{value(more)} {bounds(more)}" if more else ""
        told.append([t.method + (" *" if t.first else ""), tried, f"{t.score:.3f}" if t.result else "", gained, parts])
    return told


def winners(trials: Sequence[Trial]) -> list[Trial]:
    """Of each method the settings that surely beat the present ones, if any do: the best of them."""
    present = {t.method: t for t in trials if t.first}
    best: dict[str, Trial] = {}
    for t in sorted(trials, key=lambda t: -t.score):
        more = t.beyond(present[t.method])
        if more is not None and more.low is not None and more.low > 0:
            best.setdefault(t.method, t)
    return list(best.values())


def finals(trials: Sequence[Trial]) -> list[Trial]:
    """The `winners`, each after the settings that it beat."""
    present = {t.method: t for t in trials if t.first}
    return [t for won in winners(trials) for t in (present[won.method], won)]


def load(folder: str | os.PathLike) -> list[Trial]:
    """The trials that were `save`d in a folder."""
    file, advice = Path(folder) / "trials.json", "name a folder that sfumato bench tune has written"
    shape = {"method": str, "settings": dict, "first": bool, "figures": dict | None, "why": str}
    each = [shaped(told, shape, file, advice) for told in read_json(file, list, advice)]
    found = [Trial(**{name: told[name] for name in shape}) for told in each]
    if missing := {t.method for t in found} - {t.method for t in found if t.first}:
        raise BadInput(f"{file} lacks the settings that {min(missing)} had: {advice}")
    return [replace(t, settings={k: _tuples(v) for k, v in t.settings.items()}) for t in found]


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def save(out: str | os.PathLike, trials: Sequence[Trial]) -> None:
    """``trials.json`` beside the trials."""
    told = [{**asdict(t), "score": t.score, "parts": t.parts} for t in trials]
    write_json(Path(out) / "trials.json", told, overwrite=True)
