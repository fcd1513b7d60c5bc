"""The audit page: one HTML file that opens from disk and asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2

from sfumato.report import verdict, words
from sfumato.report.images import RAMP, SMALL, Embedded, Gallery, Pair, changed_most, difference, distinct, embed, heat
from sfumato.report.schema import AuditRecord, Integrity, Interval
from sfumato.text import isolated, shown

LARGEST = 2_800_000
"""Bytes; pictures are shrunk until the page is below it."""
SIDE = 384
"""Pixels; the longest side a picture has on the page."""
PAIRS = 64  # before/after pairs of erased concepts on one page, shared among the concepts
PAIRS_EACH = 8
THUMBNAILS = 60  # retained concepts that get a picture in the table
CHANGED = 6  # worst cases shown with a heat map
PANEL = 8  # pictures in each row of an attack's panel
FILTERS = (
    words.percent, words.number, words.seconds, words.size, words.value, words.bounds, words.count,
    words.full, words.compact, words.quoted, words.moment, words.signed,
)  # fmt: skip


@cache
def environment() -> jinja2.Environment:
    """The page templates; everything put into them is escaped."""
    env = jinja2.Environment(
        loader=jinja2.PackageLoader("sfumato.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {f.__name__: f for f in (*FILTERS, isolated)}
    script = files("sfumato.report").joinpath("templates/page.js").read_text(encoding="utf-8")
    env.globals |= {"script": script, "policy": _policy(script), "ramp": RAMP, "place": place}
    env.globals["MISSING"] = words.MISSING
    return env


def place(x: float, low: float, high: float) -> str:
    """Where a value lies on a plot's axis, as a percentage of its width."""
    return f"{100 * min(max((x - low) / (high - low), 0.0), 1.0):.2f}%"


def _policy(script: str) -> str:
    """A content policy that lets the browser run this script only, and load nothing from anywhere."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


@dataclass(frozen=True)
class Shown:
    """A pair ready for the page."""

    before: Embedded
    after: Embedded
    change: Embedded | None
    pair: Pair
    label: str


@dataclass(frozen=True)
class Bar:
    """One bar of the histogram, in shares of the plot's width and height."""

    left: float
    width: float
    height: float
    text: str


def histogram(integrity: Integrity, bins: int = 24) -> dict[str, Any]:
    """Bars and calibration lines of the distances of all prompts; the axis runs from 0 past both ceilings."""
    values = [p.distance for p in integrity.per_prompt if p.distance is not None]
    lines = [
        ("floor", integrity.floor, "same model twice"),
        ("mean", integrity.mean.value, "mean"),
        ("ceiling", integrity.ceiling_seeds, "another seed"),
        ("ceiling", integrity.ceiling_prompts, "another prompt"),
    ]
    largest = max([*values, *(x for _, x, _ in lines if x is not None), 1e-12])
    step = _round_step(largest / 5)
    top = step * (int(largest / step * 1.02) + 1)
    counts = [0] * bins
    for x in values:
        counts[min(int(x / top * bins), bins - 1)] += 1
    peak = max(counts) or 1
    edges = [words.number(k * top / bins) for k in range(bins + 1)]
    bars = [
        Bar(k / bins, 1 / bins, c / peak, f"{edges[k]} to {edges[k + 1]}: {c} of {len(values)} prompts")
        for k, c in enumerate(counts)
        if c
    ]
    ticks = [(k * step / top, f"{k * step:.6g}") for k in range(round(top / step) + 1)]
    marks = [(kind, x / top, f"{text} {words.number(x)}") for kind, x, text in lines if x is not None]
    missing = [text for _, x, text in lines if x is None]
    return {"bars": bars, "ticks": ticks, "lines": marks, "missing": missing, "peak": peak, "n": len(values)}


def _round_step(x: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least ``x``."""
    power = 10.0 ** int(f"{x:e}".split("e")[1])
    return next(m * power for m in (1, 2, 5, 10) if m * power >= x * (1 - 1e-9))


def retention_groups(report: AuditRecord) -> list[tuple[str, list[tuple[str, Interval | None]]]]:
    """Rows by group of the protocol (in its order), each worst first and what was not measured last."""
    rows = dict(report.retention)
    groups = []
    for name, members in (report.protocol.get("groups") or {}).items():
        groups.append((name, [(c, rows.pop(c)) for c in members if c in rows]))
    groups.append(("other" if groups else "", list(rows.items())))

    def key(row: tuple[str, Interval | None]) -> tuple[bool, float, str]:
        measured = row[1] is not None and row[1].measured
        return (not measured, row[1].value if measured else 0.0, row[0])

    return [(name, sorted(members, key=key)) for name, members in groups if members]


def axis(intervals: Sequence[Interval | None]) -> tuple[float, float]:
    """Limits of one axis for all these rates: whole tenths, from 0 unless all lie in the upper half."""
    have = [i for i in intervals if i is not None and i.measured]
    low = min([1.0, *(i.value if i.low is None else i.low for i in have)])
    high = max([1.0, *(i.value if i.high is None else i.high for i in have)])
    bottom = min(math.floor(10 * low + 1e-9) / 10, 0.9)
    return (bottom if bottom >= 0.5 else 0.0), math.ceil(10 * high - 1e-9) / 10


def _show(pair: Pair, max_side: int, change: bool = False) -> Shown:
    seed = "" if pair.seed is None else f"seed {pair.seed}"
    label = ", ".join(filter(None, (pair.prompt, seed))) or "no prompt recorded"
    picture = embed(heat(difference(pair.before, pair.after)), max_side) if change else None
    return Shown(embed(pair.before, max_side), embed(pair.after, max_side), picture, pair, label)


def _pictures(report: AuditRecord, gallery: Gallery, max_side: int) -> dict[str, Any]:
    each = max(2, min(PAIRS_EACH, PAIRS // max(1, len(gallery.targets))))
    targets = {c: list(p) for c, p in list(gallery.targets.items())[: PAIRS // 2]}
    retained = distinct([p for pairs in gallery.retained.values() for p in pairs])
    changed = changed_most(retained, CHANGED)
    listed = [c for _, rows in retention_groups(report) for c, _ in rows if gallery.retained.get(c)]
    panels = {}
    for name, panel in gallery.attacks.items():
        rows = (
            ("original model, plain prompt", panel.original),
            ("edited model, plain prompt", panel.erased),
            ("edited model, under attack", panel.attacked),
            ("edited model, control", panel.control),
        )
        panels[name] = [(label, [embed(p, max_side) for p in row[:PANEL]]) for label, row in rows if len(row)]
    return {
        "targets": {c: [_show(p, max_side) for p in pairs[:each]] for c, pairs in targets.items()},
        "targets_total": {c: len(pairs) for c, pairs in targets.items()},
        "changed": [_show(p, max_side, change=True) for p in changed],
        "retained_total": len(retained),
        "thumbnails": {c: _show(gallery.retained[c][0], min(max_side, SMALL)) for c in listed[:THUMBNAILS]},
        "panels": panels,
    }


def _title(report: AuditRecord) -> str:
    return f"Audit: {verdict.names(report.concepts)}"


def render(report: AuditRecord, gallery: Gallery | None = None) -> str:
    """The page as text, below `LARGEST` bytes wherever shrinking pictures to thumbnails can achieve it."""
    report, gallery = shown(report), shown(gallery or Gallery())
    template = environment().get_template("audit.html.j2")
    method = dict(report.method) if isinstance(report.method, Mapping) else None
    context = {
        "report": report,
        "method_name": (method or {}).get("name"),
        "method_configuration": {k: v for k, v in (method or {}).items() if k != "name"},
        "title": _title(report),
        "headline": verdict.headline(report),
        "findings": verdict.findings(report),
        "verdict": verdict.verdict(report),
        "kept": words.kept(report),
        "erased": words.average([report.erasure.get(c) for c in report.concepts]),
        "least": words.worst(report.retention),
        "least_erased": words.worst(report.erasure),
        "groups": retention_groups(report),
        "axis": axis([i for _, rows in retention_groups(report) for _, i in rows]),
        "histogram": None if report.integrity is None else histogram(report.integrity),
        "definitions": verdict.DEFINITIONS,
        "limitations": verdict.limitations(report),
    }
    max_side, html, size = float(SIDE), "", 0
    while not html or (size > LARGEST and max_side > 16):
        html = template.render(context, **_pictures(report, gallery, int(max_side)))
        size = len(html.encode())
        max_side *= min(0.9, 0.95 * math.sqrt(LARGEST / size))
    return html
