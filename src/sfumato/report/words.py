"""Figures as words: formatting that never flatters, the verdict, the definitions and the limitations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sfumato.report.schema import AuditReport, Interval

MISSING = "not measured"
THIN = "\u202f"


def percent(share: float | None) -> str:
    """A share as a percentage with at most one decimal; only an exact 0 or 1 reads "0 %" or "100 %"."""
    if share is None:
        return MISSING
    if 0 < share < 0.0005:
        return f"<{THIN}0.1{THIN}%"
    if 0.9995 <= share < 1:
        return f">{THIN}99.9{THIN}%"
    return f"{100 * share:.1f}".removesuffix(".0") + f"{THIN}%"


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
    """The unweighted mean of independent figures, its interval combined by MOVER (Zou and Donner 2008, eq. 3).

    Deviations of the lower and upper limits add in quadrature.  ``n`` is the total.  Figures not measured are left
    out; ``None`` when nothing is left.
    """
    have = [i for i in intervals if i is not None and i.measured]
    if not have:
        return None
    mean = sum(i.value for i in have) / len(have)
    down = math.sqrt(sum((i.value - (i.value if i.low is None else i.low)) ** 2 for i in have)) / len(have)
    up = math.sqrt(sum(((i.value if i.high is None else i.high) - i.value) ** 2 for i in have)) / len(have)
    return Interval(mean, mean - down, mean + up, sum(i.n for i in have))


def worst(rows: Mapping[str, Interval | None]) -> str | None:
    """The measured concept with the lowest rate."""
    measured = {k: i.value for k, i in rows.items() if i is not None and i.measured}
    return min(measured, key=measured.get) if measured else None


def quoted(word: str) -> str:
    return f"‘{word}’"


def headline(report: AuditReport) -> list[tuple[str, bool]]:
    """The verdict's first line as (text, is it a figure) runs."""
    have = {c: i for c in report.concepts if (i := report.erasure.get(c)) is not None and i.measured}
    if not have:
        return [(f"Whether {_names(report.concepts)} is gone was not measured", False)]
    if len(have) > 3:
        low, high = min(have, key=lambda c: have[c].value), max(have, key=lambda c: have[c].value)
        ends = [(percent(have[c].value), c) for c in (low, high)]
        runs: list[tuple[str, bool]] = [(f"{len(have)} concepts are gone in ", False)]
        runs += [(ends[0][0], True), (f" ({quoted(low)}) to ", False), (ends[1][0], True)]
        return [*runs, (f" ({quoted(high)}) of pictures", False)]
    runs = []
    for k, (concept, i) in enumerate(have.items()):
        lead = "" if k == 0 else (" and " if k == len(have) - 1 else ", ")
        runs += [(f"{lead}{quoted(concept)} {'is gone ' if k == 0 else ''}in ", False), (percent(i.value), True)]
        runs += [(" of pictures", False)] if k == 0 else []
    return runs


def _names(concepts: Sequence[str]) -> str:
    return ", ".join(map(quoted, concepts[:3])) + (f" and {len(concepts) - 3} more" if len(concepts) > 3 else "")


def findings(report: AuditReport) -> list[str]:
    """The rest of the verdict, a sentence each, with the figures and no judgement on them."""
    out = []
    kept, low = average(list(report.retention.values())), worst(report.retention)
    if kept is None:
        out.append("Whether other concepts were kept was not measured.")
    else:
        measured = sum(i is not None and i.measured for i in report.retention.values())
        others = "The one other concept is" if measured == 1 else f"The {measured} other concepts are"
        text = f"{others} kept in {percent(kept.value)} of pictures {bounds(kept)}"
        if measured > 1:
            text += f" on average; least of all {quoted(low)}, in {value(report.retention[low])} "
            text += bounds(report.retention[low])
        out.append(text + ".")
    if report.integrity is not None and report.integrity.mean.measured:
        i = report.integrity
        text = f"Pictures that should not change moved by {full(i.mean, rate=False)} ({i.distance})"
        if i.ceiling_seeds is not None:
            text += f"; another seed moves them by {number(i.ceiling_seeds)}"
        out.append(text + ".")
    if not report.attacks:
        out.append("No attack was run, so nothing is known about deliberate attempts to bring it back.")
    for name, attack in report.attacks.items():
        if attack.recovered is None or not attack.recovered.measured:
            out.append(f"Whether the attack {quoted(name)} brings it back was not measured.")
            continue
        text = f"The attack {quoted(name)} brings it back in {value(attack.recovered)} of pictures "
        out.append(text + f"{bounds(attack.recovered)}; its control in {_after(attack.control)}.")
    return out


def _after(i: Interval | None) -> str:
    return " ".join(filter(None, (value(i), bounds(i))))


def verdict(report: AuditReport) -> str:
    """The whole verdict as one paragraph of plain text."""
    return "".join(text for text, _ in headline(report)) + ". " + " ".join(findings(report))


DEFINITIONS = {
    "Erased": "The share of pictures asked to show the concept in which the detector no longer finds it.",
    "Kept": "The share of pictures asked to show another concept in which the detector still finds it as often "
    "as in the original model's pictures of the same prompts and seeds.",
    "Picture change (integrity)": "The mean perceptual distance between the original and the edited model's "
    "pictures of the same retained prompt and the same starting noise; 0 means the same picture.",
    "Floor": "The same distance between two runs of the original model: what the machinery alone contributes.",
    "Ceiling": "The same distance between the original model's pictures with different seeds, and with "
    "different prompts: where a picture has nothing left of the one it replaces.",
    "Alignment": "How well pictures match their prompts by the named measure, before and after the edit.",
    "Recovered": "The share of pictures in which the detector finds the erased concept again under the attack.",
    "Control": "The same share with an attack that knows nothing of the concept but spends the same budget.",
    "Interval": "Square brackets hold the 95 % interval of the figure before them; n is the number of "
    "pictures (or prompts) it rests on. The interval of an average over concepts combines theirs as "
    "independent figures.",
}


def limitations(report: AuditReport) -> list[str]:
    """What the figures do not show, in plain words."""
    detector = report.protocol.get("detector")
    name = detector.get("name") if isinstance(detector, Mapping) else detector
    out = [
        f"“Gone” and “kept” mean what the detector{f' ({name})' if name else ''} can see; it makes mistakes, "
        "and they are part of every rate here.",
        "Only the prompts, seeds and settings listed above were tried. Other wordings, languages, samplers or "
        "guidance can bring other results.",
        "The intervals cover the chance in which pictures were drawn, not the choice of prompts or detector.",
        "Distances saturate: once a picture is entirely different, they cannot tell how different. Read "
        "the histogram, not only the mean.",
        "The report states figures. What is good enough for a given use is for its reader to decide.",
    ]
    if report.attacks:
        out.insert(2, "A recovered rate is a lower bound on what an attacker can do: a larger budget, or another "
                      "attack, may recover more, and an attack tuned to another checkpoint may recover less.")  # fmt: skip
    else:
        out.insert(2, "No attack was run. Concepts that no longer appear under plain prompts often come back "
                      "under attack.")  # fmt: skip
    unproven = [n for n, a in report.attacks.items() if a.original is None or not a.original.measured]
    if unproven:
        out.insert(3, f"{_names(unproven)} was not tried on the original model, where it should succeed; a low "
                      "recovered rate may mean a weak attack rather than a good edit.")  # fmt: skip
    return out


def compact(data: Any) -> str | None:
    """One line for a scalar or a list of scalars (runs of integers as ranges); ``None`` for anything nested."""
    if data is None:
        return "not recorded"
    if isinstance(data, bool):
        return "yes" if data else "no"
    if isinstance(data, (str, int, float)):
        return str(data)
    if isinstance(data, Sequence) and all(isinstance(x, int) and not isinstance(x, bool) for x in data) and data:
        return _ranges(data)
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
