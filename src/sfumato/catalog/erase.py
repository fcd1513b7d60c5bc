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
        "erase", "eap", "sfumato.erase.eap:EAP", ("bui2024eap", "gandikota2023esd"),
        "Fine-tunes as ESD does, and preserves the words that a search finds to suffer most from it.",
        cost="fine-tuning; about 3 times ESD's, most of it sampling",
        when="When neighbours must survive, and to learn which words an edit harms.",
        beware="The search takes hundreds of updates; name the concept's synonyms, or they are preserved.",
        ledger="eap",
    ),
    Method(
        "erase", "doco", "sfumato.erase.doco:DoCo", ("wu2025doco",),
        "A discriminator cannot tell what the concept's prompts become from their anchor's pictures.",
        cost="fine-tuning of keys and values; a thousand pictures drawn first",
        when="A concept with a good anchor, asked for in ways that cannot all be listed.",
        beware="The concept turns into the anchor, so name one; not robust to attacks.",
        ledger="doco",
    ),
    Method(
        "erase", "kpop", "sfumato.erase.kpop:KPOP", ("bui2024kpop", "gandikota2023esd"),
        "Hides the concept, and makes a key of a few learned rows of text that brings it back.",
        cost="fine-tuning; about 25 guided sampling steps per update, and twice the losses of ESD",
        when="Some users are to have the concept and all others not.",
        beware="The key is no cryptography: attacks bring the concept back without it; objects nearby suffer.",
        ledger="kpop",
    ),
    Method(
        "erase", "trce", "sfumato.erase.trce:TRCE", ("chen2025trce",),
        "Maps ends of texts to safe ones in closed form, then steers early denoising to the safe side.",
        cost="seconds for the first stage (with cached captions), minutes for the second",
        when="Concepts that prompts imply without naming them; the first stage alone needs no training.",
        beware="Needs captions of all else; listed synonyms decide how far it reaches.",
        ledger="trce",
    ),
    Method(
        "erase", "surgical", "sfumato.erase.surgical:Surgical", ("hong2024surgical",),
        "Fine-tunes what guidance adds for the concept to an alternative's; the unconditional score is held.",
        cost="fine-tuning; about 25 guided sampling steps per update and concept, fewer with a pool",
        when="The layout of what is drawn must stay, or something named take the concept's place; purifies pictures.",
        beware="Acts through guidance: without it, and where the prompt says it otherwise, the concept may show.",
        ledger="surgical",
    ),
    Method(
        "erase", "integrity", "sfumato.erase.integrity:Integrity", ("schioppa2024integrity",),
        "Fine-tunes towards a surrogate, and by self-distillation keeps all other pictures the same.",
        cost="fine-tuning; pictures are drawn once beforehand, none while it trains",
        when="All other prompts must give the pictures that they gave; a set of pictures to retain is at hand.",
        beware="Keeps what it is shown: name or show what is near the concept.",
        ledger="integrity",
    ),
)  # fmt: skip
