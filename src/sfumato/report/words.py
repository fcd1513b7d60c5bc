"""Figures as words: rounding that never flatters, and "not measured" for what was not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sfumato.report.schema import AuditRecord, Interval
from sfumato.text import isolated

MISSING = "not measured"
THIN = "\u202f"
LONG = 80


def percent(share: float | None) -> str:
    """A share as a percentage with one decimal; only an exact 0 or 1 reads "0 %" or "100 %"."""
    if share is None:
        return MISSING
    if 0 < share < 0.0005:
        return f"<{THIN}0.1{THIN}%"
    if 0.9995 <= share < 1:
        return f">{THIN}99.9{THIN}%"
    return f"{100 * share:.{0 if share in (0, 1) else 1}f}{THIN}%"


def number(x: float | None) -> str:
    """Three significant digits, thousands grouped."""
    if x is None:
        return MISSING
    if x == 0 or abs(x) >= 1000:
        return f"{x:,.0f}".replace(",", THIN)
    return f"{x:.{max(0, 2 - math.floor(math.log10(abs(x))))}f}" if abs(x) >= 1e-4 else f"{x:.1e}"


def seconds(x: float | None) -> str:
    if x is None:
        return MISSING
    if 0 < x < 0.001:
        return f"<{THIN}0.001{THIN}s"
    if x < 120:
        return f"{number(x)}{THIN}s"
    return f"{x / 60:.1f}{THIN}min" if x < 7200 else f"{x / 3600:.1f}{THIN}h"


def size(count: int | None) -> str:
    """Bytes, in decimal units."""
    if count is None:
        return MISSING
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f}{THIN}{unit}"
    return f"{count}{THIN}B"


def value(i: Interval | None, rate: bool = True) -> str:
    return MISSING if i is None or not i.measured else (percent if rate else number)(i.value)


def bounds(i: Interval | None, rate: bool = True) -> str:
    """The interval alone, "[96.1, 99.4]" (in per cent for a rate); empty when not measured."""
    if i is None or not i.measured or i.low is None or i.high is None:
        return ""
    low, high = (percent(x).removesuffix(f"{THIN}%") if rate else number(x) for x in (i.low, i.high))
    return f"[{low}, {high}]"


def count(i: Interval | None) -> str:
    return "" if i is None or not i.measured else f"n{THIN}={THIN}{number(i.n) if i.n >= 1000 else i.n}"


def full(i: Interval | None, rate: bool = True) -> str:
    """Value, interval and n in one run of text."""
    return " ".join(filter(None, (value(i, rate), bounds(i, rate)))) + (f", {count(i)}" if count(i) else "")


def average(intervals: Sequence[Interval | None]) -> Interval | None:
    """The unweighted mean of independent figures, its interval combined by MOVER (Zou and Donner 2008).

    Deviations of the lower and of the upper limits add in quadrature.  ``n`` is the total.  Figures not
    measured are left out; ``None`` when nothing is left.
    """
    have = [i for i in intervals if i is not None and i.measured]
    if not have:
        return None
    mean = sum(i.value for i in have) / len(have)
    down = math.sqrt(sum((i.value - (i.value if i.low is None else i.low)) ** 2 for i in have)) / len(have)
    up = math.sqrt(sum(((i.value if i.high is None else i.high) - i.value) ** 2 for i in have)) / len(have)
    return Interval(mean, mean - down, mean + up, sum(i.n for i in have))


def kept(report: AuditRecord) -> Interval | None:
    """The mean retention of all concepts, over pictures; of a report of an earlier version as of independent figures,
    which is too narrow where a picture counts for several."""
    return report.kept["all"] if "all" in report.kept else average(list(report.retention.values()))


def difference(first: Interval | None, second: Interval | None) -> Interval | None:
    """``second`` minus ``first``, its interval by MOVER (Zou and Donner 2008), the two taken as independent."""
    a, b = first, second
    if a is None or b is None or not (a.measured and b.measured):
        return None
    gap = b.value - a.value
    if None in (a.low, a.high, b.low, b.high):
        return Interval(gap, None, None, min(a.n, b.n))
    down = math.hypot(b.value - b.low, a.high - a.value)
    up = math.hypot(b.high - b.value, a.value - a.low)
    return Interval(gap, gap - down, gap + up, min(a.n, b.n))


def worst(rows: Mapping[str, Interval | None]) -> str | None:
    """The measured concept with the lowest rate; None where no other has a higher one."""
    measured = {k: i.value for k, i in rows.items() if i is not None and i.measured}
    return min(measured, key=measured.get) if len(set(measured.values())) > 1 else None


def quoted(word: str) -> str:
    """A name within a sentence, cut off where it would be longer than the sentence."""
    return f"‘{isolated(word if len(word) <= LONG else word[:LONG] + '…')}’"


def moment(iso: str) -> str:
    """An ISO 8601 time as a person writes it; returned as it is when it is not one."""
    try:
        at = datetime.fromisoformat(iso)
    except ValueError:
        return iso or "date not recorded"
    zone = f" {at.tzname()}" if at.tzinfo else ""
    return f"{at.day} {at:%B %Y, %H:%M}{zone}"


def compact(data: Any) -> str | None:
    """One line for a scalar or a list of integers (runs as ranges) or words; ``None`` for anything else."""
    if data is None:
        return "not recorded"
    if isinstance(data, bool):
        return "yes" if data else "no"
    if isinstance(data, (str, int, float)):
        return str(data)
    if isinstance(data, Sequence) and data and all(type(x) is int for x in data):
        return _ranges(data)
    if isinstance(data, Sequence) and data and all(isinstance(x, str) and len(x) < 20 for x in data):
        return ", ".join(data)
    return None


def _ranges(integers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for x in integers:
        if runs and x == runs[-1][-1] + 1:
            runs[-1].append(x)
        else:
            runs.append([x])
    text = ", ".join(f"{r[0]}–{r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs)
    return f"{text} ({len(integers)})" if len(integers) > 8 else text


def signed(x: float, rate: bool = True) -> str:
    """A difference with its sign; percentage points for rates."""
    size = f"{abs(100 * x):.1f}" if rate else number(abs(x))
    return ("+" if x > 0 else "\N{MINUS SIGN}" if x < 0 else "") + size
