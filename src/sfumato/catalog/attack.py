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
    Method(
        "attack", "unlearn-diff-atk", "sfumato.attack.unlearn_diff_atk:UnlearnDiffAtk",
        ("zhang2024unlearndiffatk",),
        "Searches a few tokens before the prompt by gradient through the erased model, its own classifier.",
        cost="up to 2,000 gradient steps and 50 pictures a prompt",
        when="White box, without any other model: the standard measure of how robust an eraser is.",
        beware="Belongs to one prompt, seed and checkpoint; needs a detector that says when to stop.",
        ledger="unlearn-diff-atk",
    ),
)  # fmt: skip
