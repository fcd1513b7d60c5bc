"""Attribute: which parts made an output."""

from __future__ import annotations

from .method import Method

METHODS: tuple[Method, ...] = (
    Method(
        "attribute", "copyscope", "sfumato.attribute.copyscope:CopyScope", ("zhou2023copyscope",),
        "Shapley shares of a workflow's parts (checkpoint, LoRAs, ControlNet, phrases) in a likeness.",
        cost="2^n alliances of n parts, a picture for each seed; or sampled orders of them",
        when="A picture looks like somebody's, and several parts made it: which of them has to do with it?",
        beware="Likeness, not law; FID of few pictures is degenerate: use many seeds, or kid.",
        ledger="copyscope",
    ),
)  # fmt: skip
