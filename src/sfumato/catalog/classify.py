"""Classify: train a classifier."""

from __future__ import annotations

from .method import Method

METHODS: tuple[Method, ...] = (
    Method(
        "classify", "plain", "sfumato.classify.plain:Plain", ("he2016deep",),
        summary="A network by name, a small ResNet unless told otherwise, by the cross-entropy of labels.",
        cost="one forward and one backward pass of the network per update; minutes on a CPU at 64 pixels",
        when="a judge of your own pictures: a detector for audits, features for distances",
        beware="it answers with one of its classes whatever it is shown",
        no_ledger="It is the baseline that other classifiers are measured against.",
    ),
)
