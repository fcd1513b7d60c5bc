"""Distil: from many sampling steps to few."""

from __future__ import annotations

from .method import Method

METHODS: tuple[Method, ...] = (
    Method(
        "distill", "multistep-cm", "sfumato.distill.multistep_cm:MultistepCM", ("heek2024multistep",),
        "A few-step student: a consistency model inside each of S segments of time.",
        cost="training; an update costs about twice one of diffusion training",
        when="The same model in 1 to 16 steps, quality against speed by choice of S.",
        beware="Needs pictures as well as the teacher; takes exactly the steps it was made for.",
        ledger="multistep-cm",
    ),
)  # fmt: skip
