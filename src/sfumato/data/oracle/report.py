"""The oracle's page in the docs: accuracy and confusion matrices over fresh renders."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from . import WORDS, Oracle
from .recipe import EVALUATION_SEED, accuracy, confusion

PAGE = "oracle.md"
PICTURE = "oracle.png"


def _table(name: str, counts: np.ndarray) -> str:
    words = WORDS[name]
    lines = [f"| truth \\ reading | {' | '.join(words)} |", "| --- |" + " ---: |" * len(words)]
    for word, row in zip(words, counts, strict=True):
        if row.sum():
            cells = [f"**{n}**" if n and w == word else str(n or "") for w, n in zip(words, row, strict=True)]
            lines.append(f"| {word} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _draw(counts: dict[str, np.ndarray], scores: dict[str, float], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 11), layout="constrained")
    for axis, (name, matrix) in zip(axes.flat, counts.items(), strict=True):
        rows = np.flatnonzero(matrix.sum(axis=1))
        share = matrix[rows] / matrix[rows].sum(axis=1, keepdims=True)
        # The square root lifts single confusions out of the white without hiding how rare they are.
        axis.imshow(np.sqrt(share), cmap="Blues", vmin=0, vmax=1)
        for i, row in enumerate(rows):
            for j, n in enumerate(matrix[row]):
                if n:
                    ink = "white" if share[i, j] > 0.4 else "black"
                    axis.text(j, i, str(n), ha="center", va="center", fontsize=7, color=ink)
        words = WORDS[name]
        axis.set_xticks(range(len(words)), words, rotation=60, ha="right", fontsize=8)
        axis.set_yticks(range(len(rows)), [words[r] for r in rows], fontsize=8)
        axis.set_xlabel("reading")
        axis.set_ylabel("truth")
        axis.set_title(f"{name}: {scores[name]:.2%} right", fontsize=11)
        axis.spines[:].set_visible(False)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)


def report(oracle: Oracle, folder: str | Path, n: int = 10_000) -> dict[str, float]:
    """Measure the oracle over n fresh single-object renders and write its page and picture into `folder`.

    Returns the accuracy per attribute.
    """
    counts = confusion(oracle, n)
    scores = accuracy(counts)
    rows = "\n".join(f"| {name} | {len(WORDS[name])} | {score:.2%} |" for name, score in scores.items())
    card = oracle.card
    text = f"""# The oracle

A network of {card["parameters"] / 1e6:.2f} M parameters that reads object, colour, background and style off a
picture with one object. It ships with the package (`sfumato.data.oracle.load()`); this page is written by
`python -m sfumato.data.oracle --report docs`.

| attribute | words | right |
| --- | ---: | ---: |
{rows}

Measured over n = {n:,} fresh renders at 64x64 (generator seed {EVALUATION_SEED}, never used in training)
with the shipped float16 weights (sha256 `{card["sha256"][:16]}...`, training seed {card["seed"]},
{card["config"]["steps"]} steps of {card["config"]["batch"]}).
A picture that shows none of the objects reads "nothing":
{card["empty_backgrounds_read_nothing"]:.0%} of the bare backgrounds do.

![confusion matrices]({PICTURE})
"""
    for name, matrix in counts.items():
        text += f"\n## {name}\n\n{_table(name, matrix)}\n"
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    _draw(counts, scores, out / PICTURE)
    (out / PAGE).write_text(text)
    return scores
