"""Attack: try to bring an erased concept back."""

from __future__ import annotations

from .method import Method

METHODS: tuple[Method, ...] = (
    Method(
        "attack", "concept-inversion", "sfumato.attack.concept_inversion:ConceptInversion",
        ("pham2024circumventing", "gal2023textual"),
        "Learns a new word on the erased pipeline from pictures of the concept: does it come back?",
        cost="gradient steps on one embedding",
        when="The white-box test that every erased pipeline should face.",
        beware="Needs pictures of the concept, from the original pipeline.",
        no_ledger="it is the yardstick of the RECE and UCE entries",
    ),
)  # fmt: skip
