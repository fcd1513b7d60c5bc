"""``sfumato demo``: the whole line on the embedded model, in minutes."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sfumato import catalog
from sfumato.commands.audit import summary
from sfumato.commands.erase import check_words, erase, record_of
from sfumato.commands.options import parse
from sfumato.commands.verb import Where, load
from sfumato.files import atomic_folder, refuse_existing
from sfumato.plan import Plan, human_time

STEPS, N_RETAIN, UPDATES = 8, 5, 80
"""Steps of every picture, with which the model loses nothing that the oracle sees; pictures of each word that is to be
kept, at least; updates of the attack, which brings a star back in every picture: all that a first look has time for."""
EXAMPLE = "sfumato demo --concept star --out sfumato-demo"


@dataclass(frozen=True, kw_only=True)
class Demo(Where):
    """Options of the command."""

    out: Path = Path("sfumato-demo")
    """Folder for erased/ (a diffusers folder) and report/ (index.html, report.json)."""
    concept: str = "star"
    """What to erase: an object, colour, background or style of the sketch world."""
    overwrite: bool = False
    """Replace the output if it exists."""


def main(args: list[str]) -> None:
    about = f"Example: {EXAMPLE}\n\nErase a concept from the embedded model with RECE and audit the result."
    options = Demo(**parse("sfumato demo", args, Demo, about=about)[0])
    refuse_existing(options.out, options.overwrite)
    check_words("sketch", (options.concept,))
    writes = [f"{options.out}/erased/ (a diffusers folder)", f"{options.out}/report/ (index.html, report.json)"]
    title = f"erase {options.concept!r} from the embedded model with RECE, then audit and attack it"
    Plan(title, time="one to two minutes on two CPU cores", writes=writes).show()

    from sfumato.audit import audit
    from sfumato.audit.under_attack import make_attack

    start = time.perf_counter()
    entry = catalog.get("rece", "erase")
    pipe, cls = load("sketch", options), entry.load()
    method = cls(concepts=(options.concept,), **cls.settings_for(pipe))
    erased, outcome = erase(method, pipe)
    record = record_of(entry, method, pipe, "sketch", outcome)
    attack: Any = make_attack("concept-inversion", pipe)
    with atomic_folder(options.out, options.overwrite) as folder:
        erased.save(folder / "erased", provenance=record)
        after = str(folder / "erased")
        asked: dict[str, Any] = {"concepts": (options.concept,), "attacks": [replace(attack, updates=UPDATES)]}
        report = audit(before="sketch", after=after, sampling_steps=STEPS, n_retain=N_RETAIN, **asked)
        # the report is read where the folder will be
        told = lambda text: text.replace(str(folder), str(options.out))
        edited = {**report.protocol["after"], "model": told(report.protocol["after"]["model"])}
        # not by the audit's command, which would give the attack its own number of updates
        again = f"sfumato demo --concept {shlex.quote(options.concept)}"
        report = replace(report, protocol={**report.protocol, "after": edited}, reproduce=again)
        report.save(folder / "report")
    summary(report)
    print(f"erased in {human_time(outcome['cost']['seconds'])}, all in {human_time(time.perf_counter() - start)}")
    print(f"open {options.out / 'report' / 'index.html'}")
