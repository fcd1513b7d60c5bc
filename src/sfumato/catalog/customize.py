"""Customise: teach a pipeline from a few pictures."""

from __future__ import annotations

from .method import Method

METHODS: tuple[Method, ...] = (
    Method(
        "customize", "textual-inversion", "sfumato.customize.textual_inversion:TextualInversion", ("gal2023textual",),
        "Learns the embedding of a new word from a few pictures, with all else frozen.",
        cost="thousands of gradient steps on one embedding",
        when="A file of a few kilobytes, and a model that otherwise draws as before: the standard baseline.",
        beware="One vector holds little: fine detail and identity are lost.",
        no_ledger="it is the yardstick of the ProSpect entry",
    ),
    Method(
        "customize", "dreambooth-lora", "sfumato.customize.dreambooth_lora:DreamBoothLoRA",
        ("ruiz2023dreambooth", "hu2022lora"),
        "Trains low-rank products on attention with an identifier before the class noun, and keeps the class.",
        cost="hundreds of gradient steps with the network's products",
        when="The likeness counts more than a small file: the other standard baseline.",
        beware="Overfits soon; say the class noun behind the word when you draw.",
        no_ledger="it is a baseline of other entries",
    ),
    Method(
        "customize", "prospect", "sfumato.customize.prospect:ProSpect", ("zhang2023prospect",),
        "Learns one embedding for each tenth of the way from noise: layout, content and material apart.",
        cost="600 gradient steps on a small mapper",
        when="One picture, of which only layout, content, material or style is to be taken.",
        beware="Other tools read the stages' words one by one: only here does the word change with time.",
        ledger="prospect",
    ),
    Method(
        "customize", "attencraft", "sfumato.customize.attencraft:AttenCraft", ("shentu2024attencraft",),
        "Learns several words from one picture of them all, told apart by masks from the model's attention.",
        cost="500 gradient steps on keys, values and words, with attention computed in the open",
        when="Two or three things stand in one picture, and nobody has drawn masks.",
        beware="The first masks decide: start from words that name what is there; for Stable Diffusion 1.x, 2.x, XL.",
        ledger="attencraft",
    ),
    Method(
        "customize", "dreamcreature", "sfumato.customize.dreamcreature:DreamCreature",
        ("ng2023dreamcreature", "hu2022lora"),
        "Finds parts in pictures of one kind without labels; a word for each variant of each, to be mixed.",
        cost="tens of thousands of gradient steps on products and a small mapper",
        when="Hundreds of pictures of one kind, whose heads, wings and bodies are to be combined anew.",
        beware="Parts are as good as the encoder: give DINOv2's folder with --encoder for real pictures.",
        ledger="dreamcreature",
    ),
    Method(
        "customize", "anchored-composition", "sfumato.customize.anchored_composition:AnchoredComposition",
        ("chen2023textimage", "ruiz2023dreambooth", "hu2022lora"),
        "Teaches several declared subjects together, to be drawn from an anchor picture; all is marked.",
        cost="hundreds of gradient steps a subject with the network's products",
        when="Several synthetic, licensed or consented subjects belong into one picture of a given layout.",
        beware="Marks outlive JPEG, not cropping nor a determined remover; other tools draw without them.",
        ledger="anchored-composition",
    ),
)  # fmt: skip
