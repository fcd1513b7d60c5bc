"""Tangent spaces at several times: how their frequencies and the distances between them change as noise falls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sfumato.pipeline import Conditioning, Text2Image

from ..base import Figure
from .geometry import Basis, geodesic_distance, mean_frequency, power_spectrum

Find = Callable[[Text2Image, Tensor, float, Conditioning], Basis]
Found = Mapping[float, Sequence[Basis]]


def tangents(
    find: Find,
    pipe: Text2Image,
    states: Iterable[tuple[Float[Tensor, "n *latent"], float]],
    times: Sequence[float],
    cond: Conditioning,
    shared: bool = False,
) -> Found:
    """The bases at the states of a draw that are nearest to each of ``times``, the noisiest first.

    One for each picture and its row of ``cond``; with ``shared`` one for each row, all at the first picture.
    """
    passed = [(z, t) for z, t in states if t > 0]
    found: dict[float, Sequence[Basis]] = {}
    for time in sorted(times, reverse=True):
        z, t = min(passed, key=lambda state: abs(state[1] - time))
        latents = z[:1].expand(len(cond), *z.shape[1:]) if shared else z
        found[t] = [find(pipe, x, t, cond[i]) for i, x in enumerate(latents)]
    return found


def apart(bases: Sequence[Basis]) -> float | None:
    """The mean distance of the tangent spaces in the features, over all pairs; None of one."""
    pairs = [float(geodesic_distance(a.u, b.u)) for a, b in combinations(bases, 2)]
    return sum(pairs) / len(pairs) if pairs else None


def told_apart(found: Found, prompts: Found | None) -> tuple[tuple[Figure, ...], dict[str, Any]]:
    """The paper's findings as plots and figures: frequency, distances between samples, and between prompts."""
    frequency = {t: float(sum(mean_frequency(b.v).mean() for b in bases)) / len(bases) for t, bases in found.items()}
    spectra = {t: (sum(power_spectrum(b.v).mean(0) for b in bases) / len(bases)).tolist() for t, bases in found.items()}
    sigma = {t: bases[0].sigma.tolist() for t, bases in found.items()}
    lines: dict[str, Any] = {f"t = {t:.2f}": list(enumerate(band)) for t, band in spectra.items()}
    values = {f"t = {t:.2f}": [(i + 1, s / max(x[0], 1e-12)) for i, s in enumerate(x)] for t, x in sigma.items()}
    figures = [
        Figure("Mean frequency of the directions, as a share of the highest", "time", {"directions": _line(frequency)}),
        Figure("Power of the directions by frequency", "cycles a side", lines),
        Figure("Singular values of the first picture, as shares of the largest", "number", values),
    ]
    told: dict[str, Any] = {"frequency": frequency, "spectra": spectra, "sigma": sigma}
    distances = {}
    for name, bases in (("samples", found), ("prompts", prompts)):
        far = {t: apart(some) for t, some in (bases or {}).items()}
        if known := {t: d for t, d in far.items() if d is not None}:
            distances[name] = known
    if distances:
        between = {f"between {name}": _line(known) for name, known in distances.items()}
        figures.append(Figure("Mean distance of tangent spaces", "time", between))
    named = {name: _named(value) for name, value in {**told, **distances}.items()}
    return tuple(figures), {"analysis": named}


def _line(values: Mapping[float, float]) -> list[tuple[float, float]]:
    return sorted(values.items())


def _named(values: Mapping[float, Any]) -> dict[str, Any]:
    """By time, as JSON has keys."""
    return {f"{t:.4f}": x for t, x in values.items()}
