"""The ledger's page: all results as Markdown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sfumato.foreign import read_json, reading

from .core import DAGGER, FEW, RECORDS, said


def table(folder: Path | str = RECORDS) -> str:
    """The Markdown page of all results under ``folder``."""
    lines = [
        "# The ledger",
        "",
        "Each method's central claim, measured again by `sfumato ledger NAME`. The effect is the paired difference",
        "between method and baseline, positive where the claim says so; the verdict is computed from its interval,",
        f"a bootstrap over seeds and items together. {DAGGER}: {FEW}.",
        "The time is the run's, mostly with one process; some of it is waiting, where other work ran beside it.",
        "",
        "| entry | claim | method | baseline | effect [95 %] | verdict | time |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    details: list[str] = []
    for path in sorted(Path(folder).glob("*.json")):
        with reading(path, "a result of the ledger", "measure it again"):
            _add(read_json(path), lines, details)
    return "\n".join([*lines, "", *details])


def _add(record: dict[str, Any], lines: list[str], details: list[str]) -> None:
    """A result's rows of the table, and what is said of it below."""
    details += [f"## {record['name']} ({record['paper']})", ""]
    for claim in record["claims"].values():
        e = claim["effect"]
        lines.append(
            f"| {record['name']} | {claim['sentence']} | {claim['method']}: {claim['method_mean']:.3g} "
            f"| {claim['baseline']}: {claim['baseline_mean']:.3g} "
            f"| {e['value']:+.3g} [{e['low']:+.3g}, {e['high']:+.3g}] | {said(claim)} "
            f"| {record['seconds']:.0f} s |"
        )
        seeds = ", ".join(f"{s['seed']}: {s['method']:.3g} / {s['baseline']:.3g}" for s in claim["per_seed"])
        n = claim["per_seed"][0]["n"]
        details += [
            f"- **{claim['sentence']}** {claim['quantity'].rstrip('.')}; n = {n} for each seed. "
            f"Seed: method / baseline: {seeds}. Interval: {claim['interval']}.",
        ]
    details += [f"- Settings: {record['tuning']}"]
    details += [f"- {record['notes']}"] if record["notes"] else []
    for name, rows in record.get("tables", {}).items():
        columns = sorted({column for row in rows.values() for column in row}, key=_by_number)
        details += ["", f"| {name} | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
        for row, cells in rows.items():
            shown = ["{mean:.3g} ± {error:.1g}".format(**cells[c]) if c in cells else "" for c in columns]
            details.append(f"| {row} | {' | '.join(shown)} |")
    details += [""]


def _by_number(text: str) -> list[tuple[int, str]]:
    """Sorts "25" before "100": files keep their keys in alphabetical order."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]
