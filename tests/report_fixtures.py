"""A made-up audit with drawn pictures, for the tests of the report and for looking at the page.

`python tests/report_fixtures.py FOLDER` writes the page.
"""

from __future__ import annotations

import sys

import numpy as np
from PIL import Image, ImageDraw

from sfumato.report.audit import AuditReport
from sfumato.report.images import AttackPictures, Gallery, Pair
from sfumato.report.schema import Alignment, Attack, Cost, Integrity, Interval, PromptDistance

SHAPES = ("star", "circle", "square", "triangle", "heart", "moon", "diamond", "cross", "ring", "arrow")
INKS = ("#b5402a", "#d8972f", "#3c6e62", "#3f5f8a", "#7c4a76", "#2e2a27")
PAPERS = ("#f3e9d6", "#dfe6dc", "#e7dcec", "#d5dfe8", "#332e2b")


def draw(shape: str, seed: int, size: int = 64, ink: str | None = None) -> np.ndarray:
    """One shape on a plain ground, uint8 RGB; ``shape`` that is not known is an empty ground."""
    rng = np.random.default_rng(seed)
    paper, colour = PAPERS[rng.integers(len(PAPERS))], ink or INKS[rng.integers(len(INKS))]
    scale = 3
    image = Image.new("RGB", (size * scale, size * scale), paper)
    pen = ImageDraw.Draw(image)
    cx, cy = (rng.uniform(0.4, 0.6, 2) * size * scale).tolist()
    r = float(rng.uniform(0.22, 0.34)) * size * scale

    def polygon(radii: list[float], turn: float = -np.pi / 2) -> None:
        a = turn + np.arange(len(radii)) * 2 * np.pi / len(radii)
        xy = np.stack([cx + r * np.array(radii) * np.cos(a), cy + r * np.array(radii) * np.sin(a)], 1)
        pen.polygon([tuple(p) for p in xy.tolist()], fill=colour)

    box = (cx - r, cy - r, cx + r, cy + r)
    if shape == "star":
        polygon([1, 0.42] * 5)
    elif shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "ring":
        pen.ellipse(box, outline=colour, width=int(r * 0.4))
    elif shape == "square":
        polygon([1] * 4, np.pi / 4)
    elif shape == "diamond":
        polygon([1, 0.7, 1, 0.7])
    elif shape == "triangle":
        polygon([1] * 3)
    elif shape == "cross":
        pen.rectangle((cx - r, cy - r / 3, cx + r, cy + r / 3), fill=colour)
        pen.rectangle((cx - r / 3, cy - r, cx + r / 3, cy + r), fill=colour)
    elif shape == "moon":
        pen.ellipse(box, fill=colour)
        pen.ellipse((cx - r * 0.4, cy - r * 1.1, cx + r * 1.5, cy + r * 0.8), fill=paper)
    elif shape == "heart":
        t = np.linspace(0, 2 * np.pi, 120)
        x = cx + r * np.sin(t) ** 3
        y = cy - r * (13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
        pen.polygon(list(zip(x.tolist(), y.tolist(), strict=True)), fill=colour)
    elif shape == "arrow":
        polygon([1, 0.9, 0.3, 0.8, 0.3, 0.9])
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))


def interval(rate: float, n: int) -> Interval:
    """A normal-approximation interval, clipped; good enough for a picture of one."""
    half = 1.96 * np.sqrt(max(rate * (1 - rate), 0.25 / n) / n)
    return Interval(rate, max(0.0, rate - half), min(1.0, rate + half), n)


def make_report(concepts: tuple[str, ...] = ("star",), others: int = 15, **changes: object) -> AuditReport:
    rng = np.random.default_rng(7)
    near = [s for s in SHAPES if s not in concepts]
    far = ["red", "orange", "green", "blue", "paper", "chalk", "outline", "stripes", "pixel", "night"]
    names = (near + far + [f"concept {k}" for k in range(others)])[:others]
    kept = {c: interval(float(1 - rng.beta(1.2, 30 if c in far else 12)), 128) for c in names}
    prompts = [f"a {c} {s}" for c in ("red", "orange", "green", "blue") for s in near]
    moved = rng.gamma(1.6, 0.035, len(prompts))
    fields = {
        "concepts": list(concepts),
        "erasure": {c: interval(0.984 - 0.03 * k, 256) for k, c in enumerate(concepts)},
        "retention": kept,
        "integrity": Integrity(
            Interval(*(float(moved.mean() * k) for k in (1, 0.84, 1.18)), len(prompts)),
            "1 - cosine of oracle features",
            floor=0.0,
            ceiling_seeds=0.312,
            ceiling_prompts=0.471,
            per_prompt=[PromptDistance(p, float(d)) for p, d in zip(prompts, moved, strict=True)],
        ),
        "alignment": Alignment(
            Interval(0.991, 0.985, 0.996, 512),
            Interval(0.978, 0.969, 0.986, 512),
            "oracle agreement with the prompt",
        ),
        "attacks": {
            "concept-inversion": Attack(
                interval(0.414, 128),
                interval(0.031, 128),
                interval(0.992, 128),
                {"tokens": 1, "steps": 500, "learning_rate": 0.005, "pictures": 25, "control": {"star": "circle"}},
                812.0,
                45_000,
                interval(0.023, 128),
                interval(0.4, 125),
                interval(0.414, 128),
            )
        },
        "cost": Cost(0.43, 812_400_000, 131_072, 5_012_345),
        "protocol": {
            "before": {"model": "sketch", "hash": "8c1f0de94b7a66215f3e6b0d1c9a4e7f" * 2},
            "after": {"model": "sfumato-demo/erased", "hash": "51b0a7c3e2f98d04a6b7c5d3e1f20918" * 2},
            "detector": {"name": "sketch oracle", "hash": "0f" * 32, "threshold": 0.5},
            "prompts": prompts,
            "seeds": list(range(64)),
            "scheduler": "ddim",
            "sampling_steps": 25,
            "guidance": 3.0,
            "size": 64,
            "resize": "none",
            "detected_before": dict.fromkeys(concepts, 0.996),
            "detected_unasked": dict.fromkeys(concepts, 0.002),
            "versions": {"sfumato": "0.1.0", "torch": "2.13.0", "diffusers": "0.42.0"},
            "groups": {
                "Near: other objects": [c for c in names if c in near],
                "Far: colours, styles, grounds": [c for c in names if c in far],
            },
        },
        "method": {"name": "rece", "concepts": list(concepts), "anchors": [], "erase_scale": 1.0, "seed": 0},
        "created": "2026-11-20T13:35:00+00:00",
        "sfumato": "0.1.0",
        "reproduce": "sfumato audit --before sketch --after sfumato-demo/erased --concept star --out report/",
    }
    return AuditReport(**(fields | changes))


def make_gallery(report: AuditReport, size: int = 64) -> Gallery:
    targets = {}
    for c in report.concepts:
        targets[c] = [Pair(draw(c, s, size), draw("circle", s, size), f"a {c}", s) for s in range(9)]
    retained = {}
    for k, c in enumerate(c for c in report.retention if c in SHAPES):
        pairs = []
        for s in range(3):
            seed = 100 + 10 * k + s
            ink = INKS[(k + s) % len(INKS)] if (k + s) % 5 == 0 else None
            after = draw("cross" if seed % 17 == 0 else c, seed, size, ink)
            pairs.append(Pair(draw(c, seed, size), np.roll(after, seed % 3, axis=1), f"a {c}", seed))
        retained[c] = pairs
    c = report.concepts[0]
    panel = AttackPictures(
        original=[draw(c, s, size) for s in range(8)],
        erased=[draw("circle", s, size) for s in range(8)],
        attacked=[draw(c if s % 3 else "circle", s + 40, size) for s in range(8)],
        control=[draw("ring", s + 60, size) for s in range(8)],
    )
    return Gallery(targets, retained, dict.fromkeys(report.attacks, panel))


if __name__ == "__main__":
    report = make_report()
    report.save(sys.argv[1], make_gallery(report), overwrite=True)
