"""The first fronts of a search, generation by generation, as a page of its own: size against distance."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sfumato.files import atomic_file
from sfumato.foreign import read_json

WIDTH, HEIGHT, MARGIN = 560, 320, 30


def write_page(folder: Path) -> None:
    """``folder/index.html`` of the generations that are told in ``folder``; nothing where there are none."""
    stages: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(folder.glob("*-[0-9]*.json")):
        told = read_json(file, {"members": list, "stage": str, "round": int})
        stages.setdefault(told["stage"], []).append(told)
    if not stages:
        return
    body = "".join(_stage(kind, rounds) for kind, rounds in sorted(stages.items(), reverse=True))
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Fronts of the search</title></head>'
        '<body style="font-family:sans-serif;max-width:44em;margin:auto"><h1>Fronts of the search</h1>'
        f"{body}</body></html>"
    )
    with atomic_file(folder / "index.html", overwrite=True) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _stage(kind: str, rounds: Sequence[Mapping[str, Any]]) -> str:
    everyone = [m for told in rounds for m in told["members"]]
    ends = [(min(m[name] for m in everyone), max(m[name] for m in everyone)) for name in ("parameters", "frechet")]

    def place(member: Mapping[str, Any]) -> tuple[float, float]:
        x, y = (
            (member[name] - low) / (high - low) if high > low else 0.5
            for name, (low, high) in zip(("parameters", "frechet"), ends, strict=True)
        )
        return MARGIN + x * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - y * (HEIGHT - 2 * MARGIN)

    shapes = []
    for i, told in enumerate(rounds):
        opacity = 0.15 + 0.85 * (i + 1) / len(rounds)
        front = sorted(place(m) for m in told["members"] if m["front"])
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in front)
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in map(place, told["members"]))
        drawn = f'<polyline points="{line}" fill="none" stroke="black"/>{dots}'
        shapes.append(f'<g opacity="{opacity:.2f}"><title>round {told["round"]}</title>{drawn}</g>')
    (least, most), (near, far) = ends
    return (
        f"<h2>{html.escape(kind)}</h2><p>Lines join the first front of each round, later rounds darker; dots are all "
        f"that were scored. To the right: {least:,.0f} to {most:,.0f} parameters. Upwards: a Fréchet distance of "
        f'{near:.4g} to {far:.4g}.</p><svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="Fronts by round">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="grey"/>{"".join(shapes)}</svg>'
    )
