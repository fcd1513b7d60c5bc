"""Sample: samplers for models that are already trained."""

from __future__ import annotations

from .method import Method

METHODS: tuple[Method, ...] = (
    Method(
        "sample", "s2n", "sfumato.sample.s2n:S2N", ("doan2024connective",),
        "A sampler with adjustable noise: DDIM, DDPM and what lies between and beyond, on any model.",
        cost="that of DDIM: one network call a step",
        when="50 steps and more, where some fresh noise repairs what the model gets wrong.",
        beware="Below about 20 steps noise only harms; rho is to be tuned for each model.",
        ledger="s2n",
    ),
)  # fmt: skip
