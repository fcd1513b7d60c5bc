"""Two reports side by side; refused where they were not measured in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from sfumato.errors import BadInput
from sfumato.report.page import environment
from sfumato.report.schema import AuditRecord, Interval
from sfumato.report.words import average, difference, kept
from sfumato.text import shown


@dataclass(frozen=True)
class Row:
    """One figure of both reports; ``difference`` is second minus first."""

    group: str
    label: str
    first: Interval | None
    second: Interval | None
    rate: bool = True

    @property
    def difference(self) -> Interval | None:
        return difference(self.first, self.second)


def differing_fields(first: AuditRecord, second: AuditRecord) -> list[str]:
    """Dotted names of what was not the same in the two measurements, the model under test left out."""
    return sorted(_differ(_measured_how(first), _measured_how(second), ""))


def _measured_how(report: AuditRecord) -> dict[str, Any]:
    data = report.to_json()
    return {
        "concepts": sorted(data["concepts"]),
        "protocol": {k: v for k, v in data["protocol"].items() if k != "after"},
        "integrity": {"distance": report.integrity.distance} if report.integrity else None,
        "alignment": {"measure": report.alignment.measure} if report.alignment else None,
        "attacks": {name: {"budget": a["budget"]} for name, a in data["attacks"].items()},
    }


def _differ(a: Any, b: Any, name: str) -> Iterator[str]:
    # What only one report measured is shown as not measured in the other; only the protocol must be whole.
    optional = not name.startswith("protocol")
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in (a.keys() & b.keys()) if name == "attacks" else (a.keys() | b.keys()):
            yield from _differ(a.get(key), b.get(key), f"{name}.{key}" if name else key)
    elif not (optional and None in (a, b)) and _plain(a) != _plain(b):
        yield name


def _plain(x: Any) -> Any:
    """Tuples as lists, as they come back from JSON."""
    return [_plain(y) for y in x] if isinstance(x, (list, tuple)) else x


def rows(first: AuditRecord, second: AuditRecord) -> list[Row]:
    """Every figure of either report; raises `BadInput` naming the fields in which the protocols differ."""
    if fields := differing_fields(first, second):
        raise BadInput(
            f"these reports cannot be compared, they differ in {', '.join(fields)}: audit both models alike"
        )
    out = [Row("Erased", c, first.erasure.get(c), second.erasure.get(c)) for c in first.concepts]
    if first.retention.keys() == second.retention.keys():
        both = all("all" in r.kept for r in (first, second))  # reports of earlier versions lack the mean over pictures
        label = "mean over concepts" if both else "mean over concepts, taken as independent"
        out.append(Row("Kept", label, *_both(first, second, kept if both else _independent)))
    for c in dict.fromkeys([*first.retention, *second.retention]):
        out.append(Row("Kept", c, first.retention.get(c), second.retention.get(c)))
    sides = (first.integrity, second.integrity)
    distance = next((s.distance for s in sides if s), "")
    out.append(Row("Picture change", distance, *_both(*sides, lambda s: s.mean), rate=False))
    matches = (first.alignment, second.alignment)
    measure = next((m.measure for m in matches if m), "")
    out.append(Row("Alignment, after", measure, *_both(*matches, lambda m: m.after), rate=False))
    for name in dict.fromkeys([*first.attacks, *second.attacks]):
        attacks = (first.attacks.get(name), second.attacks.get(name))
        for part in ("recovered", "control", "further"):
            out.append(Row("Under attack", f"{name}, {part}", *_both(*attacks, attrgetter(part))))
    return out


def _independent(report: AuditRecord) -> Interval | None:
    return average(list(report.retention.values()))


def _both(first: Any, second: Any, of: Callable[[Any], Interval | None]) -> tuple[Interval | None, Interval | None]:
    """What ``of`` reads off each; None for what is not there."""
    return first and of(first), second and of(second)


def render(first: AuditRecord, second: AuditRecord) -> str:
    """The page that sets two reports side by side; raises `BadInput` as `rows` does."""
    first, second = shown(first), shown(second)
    groups: dict[str, list[Row]] = {}
    for row in rows(first, second):
        groups.setdefault(row.group, []).append(row)
    template = environment().get_template("compare.html.j2")
    return template.render(first=first, second=second, groups=groups)


def save(first: AuditRecord, second: AuditRecord, folder: str | Path, overwrite: bool = False) -> Path:
    """Write the comparison as ``index.html`` in a new folder."""
    from sfumato.files import atomic_folder

    html = render(first, second)
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        (temporary / "index.html").write_text(html, encoding="utf-8")
    return Path(folder)
