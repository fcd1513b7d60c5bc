"""Explain: judge explanations of a classifier."""

from __future__ import annotations

from .method import Method

METHODS: tuple[Method, ...] = (
    Method(
        "explain", "goar", "sfumato.explain.goar:GOAR",
        ("park2024goar", "hooker2019roar", "rong2022road", "meng2022sdedit", "sundararajan2017axiomatic",
         "smilkov2017smoothgrad"),
        summary="Judges attributions: pictures moved along them (or robbed of pixels), retraining, errors counted.",
        cost="a training for each attribution, strength and seed; with a projector a few network calls a picture",
        when="which of several attributions finds what a classifier goes by",
        beware="retrained classifiers may read the class in the damage itself: look at the leakage probe",
        ledger="goar",
    ),
)  # fmt: skip
