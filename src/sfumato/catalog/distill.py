"""Distil: from many sampling steps to few."""

from __future__ import annotations

from .method import Method

METHODS: tuple[Method, ...] = (
    Method(
        "distill", "instaflow", "sfumato.distill.instaflow:InstaFlow", ("liu2024instaflow", "liu2023flow"),
        "One step: the teacher's flow is straightened by its own pairs of noise and picture, then distilled.",
        cost="training, and drawing hundreds of thousands of pairs first",
        when="One step without an adversary; from captions alone, without pictures.",
        beware="Never sees a real picture: errors of the teacher and of its guidance are inherited.",
        ledger="instaflow",
    ),
    Method(
        "distill", "moment-matching", "sfumato.distill.moment_matching:MomentMatching", ("salimans2024multistep",),
        "A student whose few ancestral steps have the teacher's mean, given every noisy state on the way.",
        cost="training; an update costs about four of diffusion training, and a third network",
        when="4 or 8 steps that draw as a many-step teacher does.",
        beware="Takes exactly the steps it was made for, and is less good with one or two; needs pictures as well.",
        ledger="moment-matching",
    ),
    Method(
        "distill", "multistep-cm", "sfumato.distill.multistep_cm:MultistepCM", ("heek2024multistep",),
        "A few-step student: a consistency model inside each of S segments of time.",
        cost="training; an update costs about twice one of diffusion training",
        when="The same model in 1 to 16 steps, quality against speed by choice of S.",
        beware="Needs pictures as well as the teacher; takes exactly the steps it was made for.",
        ledger="multistep-cm",
    ),
)  # fmt: skip
