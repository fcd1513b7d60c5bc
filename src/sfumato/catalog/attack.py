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
    Method(
        "attack", "ring-a-bell", "sfumato.attack.ring_a_bell:RingABell", ("tsai2024ringabell",),
        "Breeds words whose encoding is the prompt's with more of the concept; the denoiser is never asked.",
        cost="population x generations rows through the text encoder a prompt",
        when="The attacker has a public text encoder and no more: one search serves every erased model.",
        beware="Finds words, not pictures: against erasers that change the text encoder it aims past them.",
        ledger="ring-a-bell",
    ),
    Method(
        "attack", "p4d", "sfumato.attack.p4d:P4D", ("chin2024prompting",),
        "Searches a prompt under which the erased model predicts what the original does under the plain one.",
        cost="3,000 gradient steps with two networks and 60 pictures a prompt",
        when="White box and the original model at hand: the attack that knows most.",
        beware="Needs the original and a detector; for pipelines with one text encoder.",
        ledger="p4d",
    ),
    Method(
        "attack", "paraphrase", "sfumato.attack.paraphrase:Paraphrase", ("moon2025hub",),
        "Asks for the concept by synonyms, in five other languages and in other forms of its name.",
        cost="at most 16 pictures a prompt",
        when="Black box, and what users do without meaning to attack: the first test of all.",
        beware="The table of names is small: give names of your concept with --names.",
        ledger="paraphrase",
    ),
    Method(
        "attack", "recovery", "sfumato.attack.recovery:Recovery", ("suriyakumar2024unstable",),
        "Fine-tunes on a few pictures of the concept: how many updates bring it back?",
        cost="200 updates of the network on 8 pictures",
        when="The weights are given away: whoever has them may train on.",
        beware="Shows how cheap relearning is, not what a prompt can do; most erasers fall in the end.",
        ledger="recovery",
    ),
    Method(
        "attack", "mma", "sfumato.attack.mma:MMA", ("yang2024mma",),
        "Searches a text without the concept's words that the text encoder pools as the prompt that names it.",
        cost="1,000 steps of 512 rows through the text encoder a prompt",
        when="Grey box: the text encoder's gradients, and a filter of words to pass.",
        beware="Matches one pooled vector, not what cross-attention reads; takes the whole prompt's place.",
        ledger="mma",
    ),
)  # fmt: skip
