"""Steer: a live pipeline under a patch that can be taken off again."""

from __future__ import annotations

from .method import Method

METHODS: tuple[Method, ...] = (
    Method(
        "steer", "faster-diffusion", "sfumato.steer.faster_diffusion:FasterDiffusion", ("li2024faster",),
        "Runs the UNet's encoder at a few key steps only, and the decoders between them in one batch.",
        cost="none; saves about a quarter of the operations of 50 steps",
        when="Faster sampling of any UNet pipeline, without training.",
        beware="Fewer steps need relatively more key steps; parallel decoding takes memory.",
        ledger="faster-diffusion",
    ),
    Method(
        "steer", "upsample-guidance", "sfumato.steer.upsample_guidance:UpsampleGuidance", ("hwang2024upsample",),
        "Draws larger than the model was trained for: a small picture denoised alongside says what is where.",
        cost="one call more at 1 / m^2 of the size in each guided step: a quarter at most",
        when="Pictures two or three times as large from a U-Net as it is, without the doubled objects.",
        beware="Transformers were not seen to gain; in latents guidance to the end leaves artefacts.",
        ledger="upsample-guidance",
    ),
    Method(
        "steer", "resolution-chromatography", "sfumato.steer.resolution_chromatography:ResolutionChromatography",
        ("hwang2024chromatography", "hwang2024upsample"),
        "Says from the noise schedule which resolution is made when, and gives each its own prompt.",
        cost="none; mixing predictions takes a call a step for each prompt",
        when="One prompt for the layout and another for the details; a look at what a schedule does.",
        beware="Stable Diffusion's schedule never makes the coarsest levels; latents keep to the law only roughly.",
        ledger="resolution-chromatography",
    ),
    Method(
        "steer", "t2i-zero", "sfumato.steer.t2i_zero:T2IZero", ("tunanyan2023multi",),
        "Corrects each concept's embedding by its neighbours; every pixel attends to one concept only.",
        cost="attention with explicit probabilities: 10 to 20 % of a step on Stable Diffusion",
        when="Prompts with several objects, one of which goes missing or lends the other its looks.",
        beware="Concepts are found by a list of English words: name them where that fails.",
        ledger="t2i-zero",
    ),
    Method(
        "steer", "decor", "sfumato.steer.decor:DECOR", ("jang2024decor",),
        "Projects the prompt's embeddings away from those of undesired words; shows what its axes carry.",
        cost="none: one small decomposition, no further call of the network",
        when="A LoRA made from few pictures ignores prompts, or draws what else was in its pictures.",
        beware="What the undesired words share with the prompt goes too: the analysis says how much.",
        ledger="decor",
    ),
)  # fmt: skip
