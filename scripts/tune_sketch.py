"""Settings of RECE, ESD, SPM and concept inversion for the embedded model, by a small grid on the tuning concept.

    python scripts/tune_sketch.py --out runs/tune                  # everything; killed? the same command goes on
    python scripts/tune_sketch.py --out runs/tune --only esd-x     # one method
    python scripts/tune_sketch.py --out runs/tune --only table     # what was measured so far

The concept is "star" and the seed 0: the ledger's entries draw other concepts with other seeds, so what is chosen here
is not measured there. Each point of a grid is one file under ``--out``. What wins goes by hand into the preset "sketch"
of the method's class; the table marks what is there now.
An eraser's score is the mean of the share of stars gone and of the share of all else kept; an attack's is the share of
stars recovered from UCE's edit less the share that the same attack finds without knowing stars.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from sfumato.attack import ConceptInversion
from sfumato.audit import audit
from sfumato.data.sketch import BACKGROUNDS, COLOURS, OBJECTS, STYLES
from sfumato.erase import RECE, SPM, UCE, ESDu, ESDx
from sfumato.files import write_json
from sfumato.ledger.erasure import sketch, survey

CONCEPT, SEED = "star", 0
OTHERS = tuple(w for w in (*OBJECTS, *COLOURS, *BACKGROUNDS, *STYLES) if w != CONCEPT)
BASE: dict[str, Mapping[str, Any]] = {
    "rece": RECE.presets["sketch"],
    "esd-x": ESDx.presets["sketch"],
    "esd-u": ESDu.presets["sketch"],
    "spm": SPM.presets["sketch"],
    "concept-inversion": ConceptInversion.presets["sketch"],
}
GRIDS: dict[str, dict[str, Sequence[Any]]] = {
    "rece": {"ridge": (1e-1, 1e-2, 1e-3, 1e-4), "epochs": (1, 2, 3)},
    "esd-x": {"lr": (1e-4, 3e-4, 1e-3), "updates": (75, 150, 300)},
    "esd-u": {"lr": (3e-5, 1e-4, 3e-4), "updates": (75, 150, 300)},
    "spm": {"anchor_weight": (10.0, 100.0, 1000.0), "lr": (3e-3, 1e-2), "updates": (100, 200)},
    "concept-inversion": {"lr": (5e-3, 2e-2, 6e-2), "updates": (60, 120, 240)},
}
ERASERS = {
    "rece": partial(RECE, preserve=OTHERS),
    "esd-x": partial(ESDx, seed=SEED),
    "esd-u": partial(ESDu, seed=SEED),
    "spm": partial(SPM, seed=SEED),
}


def points(name: str) -> list[dict[str, Any]]:
    """The settings of a method's grid, each with what its preset says besides."""
    grid = GRIDS[name]
    return [{**BASE[name], **dict(zip(grid, values, strict=True))} for values in product(*grid.values())]


def file_of(out: Path, name: str, settings: Mapping[str, Any], n: int) -> Path:
    told = json.dumps({**settings, "n": n, "model": sketch().describe()["sha256"]}, sort_keys=True)
    return out / f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:12]}.json"


def measure(name: str, settings: Mapping[str, Any], n: int) -> dict[str, Any]:
    """One point: what is gone and kept, or recovered; the time of the method itself counts as ``seconds``."""
    pipe = sketch()
    if name in ERASERS:
        began = time.perf_counter()
        erased = ERASERS[name](concepts=(CONCEPT,), **settings).apply(pipe)
        seconds = time.perf_counter() - began
        seen = survey({"it": erased}, [CONCEPT], seed=SEED, n=n, n_retain=max(1, n // 6))["it"]
        gone, kept = float(seen["gone"].mean()), float(seen["kept"].mean())
        return {"gone": gone, "kept": kept, "score": (gone + kept) / 2, "seconds": seconds}
    erased = UCE(concepts=(CONCEPT,), preserve=OTHERS).apply(pipe)
    attack = ConceptInversion(seed=SEED, **settings)
    began = time.perf_counter()
    report = audit(
        pipe, erased, (CONCEPT,), retain=("circle",), attacks=(attack,), n=n, n_retain=1, n_attack=n, seed=SEED,
        sampling_steps=15, progress=False,
    )  # fmt: skip
    found = report.attacks["concept-inversion"]
    parts = {part: getattr(found, part).value for part in ("recovered", "control", "original")}
    seconds = time.perf_counter() - began
    return {**parts, "score": parts["recovered"] - parts["control"], "seconds": seconds}


def table(out: Path, n: int) -> None:
    """Every method's points by score, the best first; an asterisk marks its preset."""
    for name in GRIDS:
        rows = []
        for settings in points(name):
            path = file_of(out, name, settings, n)
            if path.exists():
                rows.append((json.loads(path.read_text())["measured"], settings))
        print(f"\n{name}: {len(rows)} of {len(points(name))} measured" + (f", n = {n}" if rows else ""))
        for measured, settings in sorted(rows, key=lambda row: -row[0]["score"]):
            mark = "*" if all(BASE[name].get(k) == v for k, v in settings.items()) else " "
            told = "  ".join(f"{k} {settings[k]:<8g}" for k in GRIDS[name])
            figures = "  ".join(f"{k} {v:7.1%}" for k, v in measured.items() if k != "seconds")
            print(f" {mark} {told}  {figures}  {measured['seconds']:6.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tune"))
    parser.add_argument("--only", choices=(*GRIDS, "table"))
    parser.add_argument("--n", type=int, default=48, help="pictures of the concept at each point")
    parser.add_argument("--first", type=int, default=None, help="at most so many points of each grid")
    args = parser.parse_args()
    for name in GRIDS if args.only is None else [args.only] if args.only in GRIDS else []:
        for settings in points(name)[: args.first]:
            path = file_of(args.out, name, settings, args.n)
            if not path.exists():
                measured = measure(name, settings, args.n)
                write_json(path, {"method": name, "settings": settings, "measured": measured})
                print(f"{name} {settings}: {measured}", flush=True)
    table(args.out, args.n)


if __name__ == "__main__":
    main()
