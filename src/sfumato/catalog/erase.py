"""Erase: take a concept out of a pipeline."""

from __future__ import annotations

from .method import Method

METHODS: tuple[Method, ...] = (
    Method(
        "erase", "uce", "sfumato.erase.uce:UCE", ("gandikota2024uce",),
        "Closed form: rewrites the cross-attention keys and values so that the concept reads as its anchor.",
        cost="seconds, no gradients, no pictures",
        when="Many concepts at once, now; the baseline of all others.",
        beware="An optimised embedding brings the concept back.",
        ledger="uce",
    ),
    Method(
        "erase", "rece", "sfumato.erase.rece:RECE", ("gong2024rece", "gandikota2024uce"),
        "Closed form, iterated: finds the embedding that revives the concept after UCE and erases it too.",
        cost="seconds, no gradients, no pictures",
        when="The first choice: as quick as UCE and, by its paper, harder to undo.",
        beware="Closes the text route only; a small lambda harms neighbours.",
        ledger="rece",
    ),
    Method(
        "erase", "esd-x", "sfumato.erase.esd:ESDx", ("gandikota2023esd",),
        "Fine-tunes the cross-attention to negative guidance: erases where the prompt names the concept.",
        cost="fine-tuning; about 25 guided sampling steps per update",
        when="Styles and named things, to compare with the literature.",
        beware="Weak under attack, and harms neighbours.",
        ledger="esd",
    ),
    Method(
        "erase", "esd-u", "sfumato.erase.esd:ESDu", ("gandikota2023esd",),
        "Fine-tunes all but the cross-attention: erases a concept that shows whatever the prompt says.",
        cost="fine-tuning; about 25 guided sampling steps per update",
        when="A concept that shows up unasked.",
        beware="Changes every picture a little; weak under attack.",
        ledger="esd",
    ),
    Method(
        "erase", "spm", "sfumato.erase.spm:SPM", ("lyu2024spm",),
        "A rank-1 adapter per concept; they combine, switch off and move to fine-tunes of the same model.",
        cost="fine-tuning of a rank-1 adapter; the base weights never change",
        when="Concepts to combine, switch off, or carry over to fine-tunes.",
        beware="As a plain LoRA it acts at full strength on every prompt.",
        ledger="spm",
    ),
    Method(
        "erase", "duo", "sfumato.erase.duo:DUO", ("park2024duo", "wallace2024diffusiondpo"),
        "A LoRA that prefers pictures without the concept to the same pictures with it, told no prompt.",
        cost="fine-tuning of a LoRA; before it, pairs of pictures are drawn and edited",
        when="The look of a thing must go, however it is asked for.",
        beware="Better pairs erase better: name an anchor that looks different, and a detector.",
        ledger="duo",
    ),
    Method(
        "erase", "sfd", "sfumato.erase.sfd:SFD", ("chen2025sfd", "zhou2024sid"),
        "Forgets while it distills the model into a one-step generator; also classes of an image model.",
        cost="a distillation: three networks and two optimisers in memory, no pictures",
        when="A model of one step is wanted anyway, or classes are to be forgotten.",
        beware="What it is not shown it need not keep: give it many captions.",
        ledger="sfd",
    ),
)  # fmt: skip
