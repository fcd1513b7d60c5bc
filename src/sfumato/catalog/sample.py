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
    Method(
        "sample", "jys", "sfumato.sample.jys:JYS", ("park2025jys", "campbell2022continuous"),
        "Where the few steps of a sampler of tokens should be, for any model of tokens.",
        cost="a search of about 17 network calls a split, once for a model; nothing when sampling",
        when="Discrete diffusion (codes, text, levels) in 4 to 64 steps, where equal steps waste them.",
        beware="For models of tokens only; each model, sampler and noise needs a search of its own.",
        ledger="jys",
    ),
)  # fmt: skip
