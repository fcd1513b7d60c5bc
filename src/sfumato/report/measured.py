"""What a bench measured of erasers, as the package carries it: one small table, written by `sfumato bench table`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sfumato.errors import BadInput
from sfumato.files import write_json
from sfumato.foreign import read_json
from sfumato.report.schema import Interval

FILE = Path(__file__).parents[1] / "catalog" / "measured" / "erasure.json"
"""Where the package's own table is; absent as long as no bench was run for it."""
FIGURES = {"erased": "erasure", "withstands": "withstood", "near": "near", "far": "far", "seconds": "seconds"}
"""Columns of the table, and what ``bench.json`` calls them."""
_CONDITIONS = ("model", "concepts", "seeds", "n", "n_attack", "sampling_steps", "attacks")


@dataclass(frozen=True)
class Row:
    """Means of a method over its cells; None where a figure was not measured.

    Attributes:
        erased: share of pictures asked for the concept that do not show it.
        withstands: the same under the attack that does best, of those that leave the weights as they are.
        near, far: share of retained words near the concept, and of others, that are still drawn.
        seconds: of the edit.
        cells: how many were measured.
        intervals: column -> the 95 % interval over sets of concepts, where there is one.
    """

    erased: float | None
    withstands: float | None
    near: float | None
    far: float | None
    seconds: float | None
    cells: int
    intervals: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def interval(self, column: str) -> Interval | None:
        """A share with its interval over sets of concepts."""
        share, (low, high) = getattr(self, column), self.intervals.get(column, (None, None))
        return None if share is None else Interval(share, low, high, self.cells)


def table_of(bench: Mapping[str, Any]) -> dict[str, Any]:
    """The table of what ``bench.json`` holds: rows by method, and how they were measured (JSON types).

    Methods of which no cell was measured have no row.

    Raises:
        BadInput: nothing was measured, or a figure is no number.
    """
    rows = {}
    for one in bench["methods"]:
        if not one.get("cells"):
            continue
        told = {column: _value(one, name) for column, name in FIGURES.items()}
        ends = {column: found for column, name in FIGURES.items() if (found := _ends(one.get(name))) is not None}
        rows[str(one["method"])] = asdict(Row(**told, cells=int(one["cells"]), intervals=ends))
    if not rows:
        raise BadInput("no cell of this bench was measured: run sfumato bench erase to its end")
    conditions = {name: bench["configuration"].get(name) for name in _CONDITIONS}
    # Which attacks were run on the weights as they are: "all" may leave some out, and those that train do not count.
    train = {name for cell in bench.get("cells", ()) for name in cell.get("retraining", ())}
    run = dict.fromkeys(name for one in bench["methods"] for name in one.get("recovered") or ())
    if run or conditions["attacks"] is None:
        conditions["attacks"] = [name for name in run if name not in train]
    return {"rows": rows, "conditions": conditions, "weights": bench.get("model"), "versions": bench.get("versions")}


def make(bench: Path, out: Path, overwrite: bool = False) -> dict[str, Any]:
    """Write the table of a bench's folder (or of its ``bench.json``).

    Raises:
        BadInput: no bench, nothing measured, or the output exists.
    """
    file = bench / "bench.json" if bench.is_dir() else bench
    if not file.is_file():
        raise BadInput(f"{bench} holds no bench: give the folder that sfumato bench erase --out wrote")
    found = table_of(read_json(file, {"methods": list, "configuration": dict}))
    write_json(out, found, overwrite=overwrite)
    return found


def rows(file: Path | None = None) -> dict[str, Row]:
    """The rows of a table by method; none where there is no table.

    Raises:
        BadInput: it cannot be read.
    """
    file = file or FILE
    if not file.is_file():
        return {}
    return {name: Row(**one) for name, one in read_json(file, {"rows": dict})["rows"].items()}


def conditions(file: Path | None = None) -> str:
    """How the table was measured, in words; empty where there is none."""
    file = file or FILE
    if not file.is_file():
        return ""
    told = read_json(file, {"conditions": dict})["conditions"]
    concepts = "; ".join(told.get("concepts") or ("the bench's own concepts",))
    attacks = ", ".join(told["attacks"]) if told.get("attacks") else "no attack" if told.get("attacks") == [] else "all"
    seeds = ", ".join(map(str, told.get("seeds") or ()))
    n = f"; {told['n']} pictures of each concept" if told.get("n") else ""
    n += f", {told['n_attack']} under attack" if n and told.get("n_attack") and attacks != "no attack" else ""
    return f"on {told.get('model')}; erased: {concepts}; seeds {seeds}{n}; under attack by: {attacks}"


def _ends(figure: Any) -> tuple[float, float] | None:
    """Both ends of a figure's interval, where it has one."""
    ends = (figure.get("low"), figure.get("high")) if isinstance(figure, Mapping) else (None, None)
    return None if None in ends else ends


def _value(one: Mapping[str, Any], name: str) -> float | None:
    found = one.get(name)
    found = found.get("value") if isinstance(found, Mapping) else found
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise BadInput(f"{name} of {one['method']} is {found!r}, which is no number: run the bench again")
    return float(found)
