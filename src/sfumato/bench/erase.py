"""The bench of erasers: methods x concepts x seeds on one model, judged and attacked in the same way."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from sfumato import catalog
from sfumato.audit import Audit
from sfumato.audit.plan import plan as plan_of
from sfumato.cells import Failed, finished
from sfumato.data.cases import AttackCases, Case
from sfumato.errors import BadInput
from sfumato.fields import Count, Seed, check
from sfumato.files import atomic_folder, held, write_json
from sfumato.foreign import read_json, shaped
from sfumato.pipeline import Text2Image, load_text2image
from sfumato.plan import Plan, human_time, makespan
from sfumato.report.bench import BenchReport, Entry
from sfumato.text import counted
from sfumato.versions import versions

from .cell import Cell, keep_original, measure

WORLD = ("fish", "red", "chalk", "blue heart", "fish,tree,house", "fish,tree,house,moon,arrow,mushroom")
"""An object, a colour, a style, an object of a colour; three at once, and six. Settings are tuned on "star"."""
CONFIGURATION, CELL = "configuration.json", "cell.json"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Erases with every method, audits every result under every attack, and puts them side by side.

    A cell is one method that takes one set of concepts out at one seed, in a process of its own. What is finished is
    kept, under a name made of everything that decides it: methods, concepts and seeds may be added later, and a run
    that was killed goes on. What the unedited model draws, and what attacks make of it, is the same for all methods and
    drawn once, where cells see the folder. A method that does not fit the model says so in its cell, and the rest goes
    on.

    Each method and attack runs with the settings that suit the model (``settings_for``).

    Cost: what an audit costs, times methods, concepts and seeds; hours on two cores with the defaults.
    """

    model: str = "sketch"
    """An embedded model, a folder written by save_pretrained, a .safetensors file of SD 1.x, 2.x or XL, or a hub id."""
    concepts: tuple[str, ...] = ()
    """What to erase, each a concept, or several at once with commas between them ("star,fish"); by default, in the
    sketch world, an object, a colour, a style, an object of a colour, and three and six objects at once."""
    methods: tuple[str, ...] = ()
    """Of the verb erase; by default all."""
    attacks: tuple[str, ...] | None = None
    """Of the verb attack; by default all that fit the model, and none where the option is given empty."""
    seeds: tuple[Seed, ...] = (1, 2, 3)
    """Of the edit, and of prompts and noise."""
    n: Count = 48
    """Pictures for each erased concept."""
    n_retain: Count = 6
    """Pictures for each retained concept, at least."""
    n_attack: Count = 24
    """Pictures drawn under attack for each erased concept."""
    sampling_steps: Count = 15
    """Denoising steps."""
    cfg_scale: float | None = None
    """Guidance; by default the pipeline's."""
    retain: tuple[str, ...] | None = None
    """What must be kept; by default, in the sketch world, all its other words."""
    prompts: tuple[str, ...] | None = None
    """Prompts with {concept} in them; by default four plain ones, or the sketch world's own."""
    detector: str | None = None
    """Who sees concepts in pictures, as for `sfumato audit`."""
    distance: str | None = None
    """Of pictures, as for `sfumato audit`."""
    clip: str | None = None
    """Folder or hub id of a CLIP for alignment, as for `sfumato audit`."""
    device: str | None = None
    """Where the models run: cpu, cuda, cuda:1, mps ...; by default the fastest there is."""
    prediction: Literal["eps", "v"] | None = None
    """What the network in a single file predicts, where the file does not say it; folders say it."""
    jobs: Count = 2
    """Cells at a time on this machine, in processes of one thread each; figures do not depend on it."""
    ray: str | None = None
    """Address of a Ray cluster that runs the cells instead, "auto" for the one that this machine belongs to, or "local"
    for a new one of ``jobs`` workers."""

    def __post_init__(self) -> None:
        check(self)
        for name, verb in (("methods", "erase"), ("attacks", "attack")):
            if (given := getattr(self, name)) is not None:  # as the catalogue calls them, which takes any case
                object.__setattr__(self, name, tuple(catalog.get(word, verb).name for word in given))
        for name in ("concepts", "methods", "seeds"):
            values = getattr(self, name)
            if twice := [v for i, v in enumerate(values) if v in values[:i]]:
                raise BadInput(f"{twice[0]!r} is named twice among {name}: name each once")
        if not self.seeds:
            raise BadInput("name at least one seed, for example seeds=(1, 2, 3)")

    @cached_property
    def pipe(self) -> Text2Image:
        return load_text2image(self.model, self.device, prediction=self.prediction)

    @cached_property
    def sets(self) -> tuple[tuple[str, ...], ...]:
        """The concepts of each cell."""
        named = self.concepts or (WORLD if self.pipe.vocabulary else ())
        if not named:
            raise BadInput('name what to erase: concepts=["van gogh"]; only the sketch world has concepts of its own')
        found = tuple(tuple(word.strip() for word in one.split(",")) for one in named)
        if twice := [x for i, x in enumerate(found) if x in found[:i]]:
            raise BadInput(f"{', '.join(twice[0])!r} is named twice among concepts: name each set once")
        return found

    @cached_property
    def unfit(self) -> dict[str, str]:
        """The attacks that are left out of all, since they do not fit the model, and why; one that was named is not."""
        found: dict[str, str] = {}
        for entry in catalog.methods("attack") if self.attacks is None else ():
            cls, concept = entry.load(), self.sets[0][0]
            asked = AttackCases(concept, [Case(concept, 0, (concept,))])
            try:
                cls(**cls.settings_for(self.pipe)).check(self.pipe, asked)
            except BadInput as error:
                found[entry.name] = str(error)
        return found

    def settings(self) -> dict[str, Any]:
        """What decides the figures of every cell alike."""
        drawing = ("n", "n_retain", "n_attack", "sampling_steps", "cfg_scale", "retain", "prompts", "device")
        chosen = {name: getattr(self, name) for name in (*drawing, "detector", "distance", "clip")}
        if self.prediction is not None:  # cells of models that say it themselves keep their names
            chosen["prediction"] = self.prediction
        entries = catalog.methods("attack")
        asked = [m.name for m in entries if m.name not in self.unfit] if self.attacks is None else self.attacks
        attacks = [m for m in entries if m.name in asked]
        told = [(m.name, m.load().settings_for(self.pipe)) for m in attacks]
        return {"before": self.model, **chosen, "attacks": told}

    def cells(self) -> list[Cell]:
        """All methods of a seed and a set of concepts before the next: what is measured first can be compared."""
        audit, sha = self.settings(), self.pipe.describe()["sha256"]
        entries = [m for m in catalog.methods("erase") if not self.methods or m.name in self.methods]
        chosen = {m.name: dict(m.load().settings_for(self.pipe)) for m in entries}
        return [
            Cell(name, concepts, seed, settings, audit, sha)
            for seed in self.seeds for concepts in self.sets for name, settings in chosen.items()
        ]  # fmt: skip

    def run(
        self, out: str | os.PathLike, *, reproduce: str = "", announce: Callable[[Plan], None] | None = None,
        progress: Callable[[str], None] = lambda line: None,
    ) -> Any:  # fmt: skip
        """Measure what is not there yet, and write ``bench.json``, ``table.md`` and ``index.html`` into ``out``.

        Returns:
            The `BenchReport`.

        Args:
            out: a folder; one that a bench of the same settings has written is gone on with.
            reproduce: the command line, for the page.
            announce: called with the plan before the first cell.
            progress: called with a line for each cell as it is finished.

        Raises:
            BadInput: a setting that cannot be; ``out`` holds a bench of other settings (the message names them), or
                something else.
        """
        cells = self.cells()
        with held(out) as folder:
            self._check(folder)
            self._report(folder, cells, {}, reproduce)  # what is damaged is told before hours of work, not after
            left = [cell for cell in cells if not (folder / "cells" / cell.key).exists()]
            if announce:
                announce(self._plan(out, cells, left))
            for name, why in self.unfit.items():
                progress(f"{name}: left out, {why}")
            self._claim(folder)
            lost: dict[str, Failed] = {}
            done = len(cells) - len(left)
            measuring = partial(self.measuring, folder=folder)
            for cell, result in finished(left, measuring, jobs=self.jobs, apart=True, ray=self.ray):
                done += 1
                if isinstance(result, Failed):
                    lost[cell.key] = result
                    how = "refused" if result.refused else "failed"
                    progress(f"{cell}: {how}, {result.reason} ({done} of {len(cells)})")
                    continue
                keep_original(cell, folder, result)
                keep(folder / "cells" / cell.key, cell, result)
                progress(f"{cell}: {self._spent(result)} ({done} of {len(cells)})")
            report = self._report(folder, cells, lost, reproduce)
            report.write(folder)
        return report

    measuring = staticmethod(measure)
    """What is done in a cell."""

    def _spent(self, result: Mapping[str, Any]) -> str:
        return f"erased in {human_time(result['figures']['seconds'])}, audited"

    def _report(self, folder: Path, cells: Sequence[Cell], lost: Mapping[str, Failed], reproduce: str) -> Any:
        """All that is known of the cells, with a ``write``."""
        return BenchReport(
            entries=list(entries(folder, cells, lost)),
            configuration=asdict(self),
            model_hash=cells[0].model_hash,
            versions=versions(),
            reproduce=reproduce,
            unfit=self.unfit,
        )

    def _claimed(self) -> dict[str, Any]:
        """What a folder keeps of the settings."""
        told = {k: v for k, v in _json(self.settings()).items() if k not in ("before", "device")}
        return {**told, "model": self.pipe.describe()["sha256"]}

    def _claim(self, folder: Path) -> None:
        """From now on the folder is one of a bench of these settings."""
        write_json(folder / CONFIGURATION, self._claimed(), overwrite=True)
        (folder / "cells").mkdir(exist_ok=True)

    def _check(self, folder: Path) -> None:
        """The folder is new, one of a bench of the same settings, or of one that has not measured anything."""
        told, file = self._claimed(), folder / CONFIGURATION
        if not file.exists():
            if there := [p.name for p in folder.iterdir()]:
                raise BadInput(f"{folder} is not a bench's: it holds {there[0]}; choose another folder")
            return
        if not any(path.is_dir() and any(path.iterdir()) for path in (folder / "cells", folder / "originals")):
            return
        before = read_json(file, advice="choose another folder")
        # What only one of them has, such as the links of another kind of bench, differs unless it is None there.
        differs = lambda name: before.get(name) != told.get(name)
        if changed := [name for name in dict.fromkeys((*told, *before)) if differs(name)]:
            words = "; ".join(f"{name}: {before.get(name)!r} there, {told.get(name)!r} here" for name in changed)
            raise BadInput(f"{folder} holds a bench of other settings ({words[:300]}): choose another folder")

    def _plan(self, out: str | os.PathLike, cells: Sequence[Cell], left: Sequence[Cell]) -> Plan:
        """What audits of the unedited model would cost; the methods' own time is not known."""
        title = f"{counted(len(cells), 'cell')}: " + ", ".join((
            counted(len({c.method for c in cells}), "method"), counted(len(self.sets), "set") + " of concepts",
            counted(len(self.seeds), "seed"), f"{self.jobs} at a time",
        ))  # fmt: skip
        if len(left) < len(cells):
            title += f"; {len(cells) - len(left)} were finished before"
        told, seconds = self.settings(), list[float]()
        attacks = [catalog.get(name, "attack").load()(**chosen) for name, chosen in told["attacks"]]
        audit = {k: v for k, v in told.items() if k not in ("before", "device")}
        audit |= {"before": self.pipe, "after": self.pipe, "attacks": attacks, "progress": False}
        for concepts in dict.fromkeys(cell.concepts for cell in left):
            setup = Audit(concepts=concepts, **audit).prepare()
            here = [cell for cell in left if cell.concepts == concepts]
            new = len({file for cell in here if not (file := cell.original(Path(out))).exists()})
            plans = plan_of(setup), plan_of(setup, original=False)
            first, other = (plan.seconds or 0.0 for plan in plans)
            seconds += [first] * new + [other] * (len(here) - new)
        expected = makespan(seconds, self.jobs)
        return Plan(
            title, time=f"about {human_time(expected)} of audits, and what the methods take",
            writes=[f"{out}/ (index.html, table.md, bench.json, and an audit for each cell)"],
        )  # fmt: skip


def keep(target: Path, cell: Cell, result: Mapping[str, Any]) -> None:
    """Write a cell's folder: its figures, and its audit as `sfumato audit` writes it."""
    with atomic_folder(target) as folder:
        rest = {name: value for name, value in result.items() if name not in ("report", "page")}
        told = {"method": cell.method, "concepts": cell.concepts, "seed": cell.seed, "versions": versions()}
        write_json(folder / CELL, {**told, **rest})
        write_json(folder / "report.json", result["report"])
        (folder / "index.html").write_text(result["page"], encoding="utf-8")


def entries(folder: Path, cells: Sequence[Cell], lost: Mapping[str, Failed]) -> Iterator[Entry]:
    """What is known of each cell; one whose page was taken away leads nowhere."""
    retraining = tuple(m.name for m in catalog.methods("attack") if m.load().retrains)
    for cell in cells:
        where = folder / "cells" / cell.key
        about: dict[str, Any] = {"method": cell.method, "concepts": cell.concepts, "seed": cell.seed}
        about["retraining"] = retraining
        if where.exists():
            advice = f"remove {where}, and it is measured again"
            read = read_json(where / CELL, {"figures": dict}, advice)
            shaped(read["figures"], {"attacks": dict, "erasure": dict | None}, where / CELL, advice)
            audit = f"cells/{cell.key}/index.html" if (where / "index.html").exists() else ""
            yield Entry(**about, figures=read["figures"], audit=audit)
        elif cell.key in lost:
            yield Entry(**about, why=lost[cell.key].reason, refused=lost[cell.key].refused)


def _json(value: Any) -> Any:
    """As it is after JSON, so that it can be compared with what was read."""
    import json

    return json.loads(json.dumps(value, default=str))
