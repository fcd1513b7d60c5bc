"""The sheets of probabilistic prototypes: draws, decisions, doubts, and what answering fewer questions would do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfumato.data.pictures import Pictures, to_tensor

from .probabilistic import Net
from .prototypes import LOOKED_AT, some
from .sheet import Figure, Row, Sheet
from .uncertainty import densities, risk_coverage, selective

SHOWN = 4
"""Pictures of each kind on a page, and draws of each prototype."""
DEVIATIONS = 2.0
"""How far a prototype is moved along its principal axes."""


@torch.no_grad()
def pages(net: Net, unseen: Pictures, batch: int, seed: int) -> tuple[Sheet, ...]:
    """What there is to see of ``net``; its doubts are about ``unseen`` pictures."""
    labels, rows = list(unseen.label_names), some(unseen, LOOKED_AT, seed)
    probabilities, unsure = [], []
    for first in range(0, len(rows), batch):
        x = to_tensor([unseen.picture(row) for row in rows[first : first + batch]])
        probabilities.append(net.predict_proba(x))
        unsure.append(net.uncertainty(x))
    said = torch.cat(probabilities).argmax(1)
    doubts = {kind: torch.cat([u[kind] for u in unsure]) for kind in unsure[0]}
    right = said == torch.tensor([unseen.label(row) for row in rows])
    return (
        _prototypes(net, labels), _decisions(net, unseen, rows[:SHOWN], labels),
        _doubts(unseen, rows, labels, said, doubts), _selection(doubts, right),
    )  # fmt: skip


def _prototypes(net: Net, labels: list[str]) -> Sheet:
    q, drawn, found = net.prototypes, net.draw(SHOWN), []
    largest = torch.zeros(len(q.mean), dtype=torch.long) if q.logits is None else q.logits.argmax(1)
    tril = q.tril[torch.arange(len(q.mean)), largest]
    for j, mode in enumerate(q.mode()):
        values, axes = torch.linalg.eigh(tril[j] @ tril[j].T)
        deviations, principal = values.clamp(min=0).sqrt(), range(1, 1 + min(2, net.dim))
        moved = [s * DEVIATIONS * deviations[-i] * axes[:, -i] for i in principal for s in (-1, 1)]
        ways = [f"{s} axis {i}" for i in principal for s in ("-", "+")]
        pictures = net.images(torch.stack([mode, *drawn[:, j], *[mode + step for step in moved]]))
        captions = ["mode", *[f"draw {i + 1}" for i in range(SHOWN)], *ways]
        told = {
            "log-determinant of the covariance": float(2 * tril[j].diagonal().log().sum()),
            "largest deviation": float(deviations[-1]),
        }
        found.append(Row(f"{labels[j % net.classes]}", list(zip(captions, pictures, strict=True)), told))
    about = f"Decoded: the mode, draws, and {DEVIATIONS:g} deviations each way along the two principal axes."
    return Sheet("Prototypes", about, found)


def _decisions(net: Net, unseen: Pictures, rows: list[int], labels: list[str]) -> Sheet:
    x = to_tensor([unseen.picture(row) for row in rows])
    decoded = net.images(net.features(x))
    unsure = {kind: u.tolist() for kind, u in net.uncertainty(x).items()}
    found, figures = [], []
    for i, (row, classes) in enumerate(zip(rows, net.explain(x), strict=True)):
        pictures = [("picture", x[i]), ("decoded", decoded[i])]
        for e in classes[:2]:
            pictures += [(f"{labels[e.label]}, {e.share:.0%}", e.mode), *[("draw", draw) for draw in e.draws[:2]]]
        name = f"{labels[unseen.label(row)]}, taken for {labels[classes[0].label]}"
        found.append(Row(name, pictures, {kind: u[i] for kind, u in unsure.items()}))
        figures.append(Figure(name, "squared distance", {labels[e.label]: _density(e.distances) for e in classes[:3]}))
    about = (
        "Each picture, then prototype and nearest draws of the predicted class, and of its nearest rival. Plots are of "
    )
    about += "the densities of the distances: where they overlap, either class would do."
    return Sheet("Decisions", about, found, figures)


def _density(distances: Tensor, points: int = 40) -> list[tuple[float, float]]:
    if len(distances) < 2 or distances.amax() == distances.amin():
        return [(float(distances[0]), 0.0)]
    spread = float(distances.std())
    at = torch.linspace(float(distances.min()) - spread, float(distances.max()) + spread, points).to(distances)
    return list(zip(at.tolist(), densities(distances, at).tolist(), strict=True))


def _doubts(
    unseen: Pictures, rows: list[int], labels: list[str], said: Tensor, doubts: dict[str, Tensor]
) -> Sheet:  # fmt: skip
    found = []
    for kind, u in doubts.items():
        first = u.argsort(descending=True, stable=True)[:SHOWN].tolist()
        pictures = [
            (f"{labels[unseen.label(rows[i])]}, taken for {labels[int(said[i])]}: {float(u[i]):.3g}",
             to_tensor([unseen.picture(rows[i])])[0])
            for i in first
        ]  # fmt: skip
        found.append(Row(kind.replace("_", " "), pictures))
    return Sheet("Doubts", "The unseen pictures with the largest uncertainty of each kind.", found)


def _selection(doubts: dict[str, Tensor], right: Tensor) -> Sheet:
    lines: dict[str, list[tuple[float, float]]] = {}
    for kind, u in doubts.items():
        coverage, risk = risk_coverage(u, right)
        kept = torch.linspace(0, len(risk) - 1, min(60, len(risk))).round().long()
        lines[kind.replace("_", " ")] = list(zip(coverage[kept].tolist(), risk[kept].tolist(), strict=True))
    told: dict[str, Any] = {"area under the curve": selective(doubts, right), "errors where all are answered":
                            float((~right).double().mean())}  # fmt: skip
    about = "Errors among the pictures that are answered, if only so large a share is, the surest first."
    return Sheet("Answering only where sure", about, figures=[Figure("errors", "share answered", lines)], told=told)
