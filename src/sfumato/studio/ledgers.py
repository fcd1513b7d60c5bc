"""What audits wrote on this machine, and what the ledger has measured."""

from __future__ import annotations

from pathlib import Path

from sfumato import catalog
from sfumato.errors import BadInput
from sfumato.foreign import read_json

from .views import text

RECORDS = ("report.json", "composition.json", "cost.json", "bench.json")


def report_in(folder: str | Path | None) -> Path:
    """A folder that a command wrote a page into.

    Raises:
        BadInput: there is none, or its record cannot be read.
    """
    said = str(folder or "").strip()
    try:
        path = Path(said).expanduser().resolve() if said else None
        there = path is not None and (path / "index.html").is_file()
    except (OSError, ValueError, RuntimeError):
        there = False
    if not there:
        raise BadInput(f"there is no report in {said!r}: give a folder that an audit wrote, with index.html in it")
    record = next((path / name for name in RECORDS if (path / name).is_file()), None)
    if record is None and path.name != "comparison":
        raise BadInput(f"{path} has a page, but no record of an audit ({', '.join(RECORDS[:1])}): it is not shown")
    if record is not None:
        read_json(record)
    return path


def reports(root: Path, kinds: tuple[str, ...] = ("report", "comparison")) -> list[Path]:
    """What the studio's own audits and comparisons wrote, the newest first."""
    found = [p for kind in kinds for p in root.glob(f"[0-9]*-*/{kind}") if (p / "index.html").is_file()]
    return sorted(found, reverse=True)


def models(root: Path) -> list[Path]:
    """Models that the studio has made, the newest first, and those sent to it."""
    made = sorted((p for p in root.glob("[0-9]*-*/model") if (p / "model_index.json").is_file()), reverse=True)
    return made + sorted((root / "uploads").glob("*.safetensors"))


def ledger(folder: Path | None = None) -> str:
    """The ledger's results as a table, by default those that come with the package; with what is not measured yet."""
    from sfumato.ledger.core import DAGGER, FEW, RECORDS

    folder = folder or RECORDS
    rows, measured = [], set()
    for path in sorted(folder.glob("*.json")):
        try:
            record = read_json(path, {"name": str, "claims": dict}, "measure it again")
            found = [_row(record["name"], claim) for claim in record["claims"].values()]
        except (BadInput, KeyError, TypeError, ValueError) as error:
            rows.append(f'<tr><th>{text(path.stem)}</th><td colspan="3">{text(error)}</td></tr>')
            continue
        measured.add(record["name"])
        rows += found
    others = [name for name in dict.fromkeys(m.ledger for m in catalog.METHODS if m.ledger) if name not in measured]
    rest = f"Not measured here: {text(', '.join(others))}. Measure one: sfumato ledger NAME. {DAGGER}: {FEW}."
    rest = f"<p class='note'>{rest}</p>"
    if not rows:
        return f"<p class='note'>There are no results in {text(folder)}.</p>{rest}"
    head = "<tr><th>method</th><th>claim</th><th>effect, 95 % interval</th><th>verdict</th></tr>"
    return f'<div class="scroll"><table class="ledger"><thead>{head}</thead>{"".join(rows)}</table></div>{rest}'


def _row(name: str, claim: dict) -> str:
    from sfumato.ledger.core import said

    effect = "{value:+.3g} [{low:+.3g}, {high:+.3g}]".format(**claim["effect"])
    cells = (claim["sentence"], effect, said(claim))
    return f"<tr><th>{text(name)}</th>{''.join(f'<td>{text(c)}</td>' for c in cells)}</tr>"
