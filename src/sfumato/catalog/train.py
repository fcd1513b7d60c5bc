"""Train: a model from data."""

from __future__ import annotations

from .method import Method

METHODS: tuple[Method, ...] = (
    Method(
        "train", "t2i", "sfumato.train.t2i:TrainT2I", ("rombach2022ldm", "ho2022classifierfree"),
        "Trains a text-to-image latent diffusion pipeline: autoencoder first, then text encoder and UNet.",
        cost="hours on two CPU cores for the embedded model",
        when="A pipeline of your own, from pictures with captions.",
        beware="Small pictures and small vocabularies on CPU.",
        no_ledger="measured by the oracle when it ends",
    ),
    Method(
        "train", "simple-diffusion", "sfumato.train.simple_diffusion:SimpleDiffusion",
        ("hoogeboom2023simple", "ho2022classifierfree"),
        "Pixel diffusion at any resolution: a schedule that follows the size, and the capacity at 16x16.",
        cost="one network call with gradients an update; the paper's models are for many GPUs",
        when="Pictures of 64 pixels and more without an autoencoder.",
        beware="The published models have billions of parameters; `sid2` needs fewer.",
        ledger="simple-diffusion",
    ),
    Method(
        "train", "sid2", "sfumato.train.sid2:SiD2",
        (
            "hoogeboom2025simpler", "hoogeboom2023simple", "kingma2023understanding", "kynkaanniemi2024applying",
            "ho2022classifierfree",
        ),
        "Pixel diffusion with the sigmoid loss, the Residual U-ViT and guidance in an interval.",
        cost="one network call with gradients an update; half the patch is four times the work",
        when="The first choice for pixel models: classes or none, one loss bias per resolution.",
        beware="The bias, the guidance and its interval are to be chosen for each resolution and model.",
        ledger="sid2",
    ),
    Method(
        "train", "blurring", "sfumato.train.blurring:Blurring", ("hoogeboom2023blurring", "rissanen2023generative"),
        "Pixel diffusion that blurs and adds noise at once, so that pictures appear from coarse to fine.",
        cost="a plain pixel diffusion's, and two cosine transforms a step",
        when="Long training on little data, where blurring acts as a regulariser.",
        beware="Not ahead of plain diffusion in short runs; by its paper it overtakes late.",
        ledger="blurring",
    ),
    Method(
        "train", "rolling", "sfumato.train.rolling:Rolling", ("ruhe2024rolling",),
        "Sequences of any length from a window of frames in which later frames carry more noise.",
        cost="one network call with gradients on a whole window per update",
        when="Long roll-outs of frames whose future is uncertain: video, fluids, weather.",
        beware="Short clips of simple motion gain nothing over ordinary video diffusion.",
        ledger="rolling",
    ),
    Method(
        "train", "semantica", "sfumato.train.semantica:Semantica",
        ("kumar2024semantica", "hoogeboom2023simple", "ho2022classifierfree"),
        "Pixel diffusion that is shown a picture and draws others that belong with it, learned from pairs.",
        cost="one network call with gradients an update, and one of the frozen encoder",
        when="Variations of a picture, also of data the model was not trained on, without fine-tuning.",
        beware="Near duplicates in the episodes teach it to copy: look at the bounds of `similar` first.",
        ledger="semantica",
    ),
    Method(
        "train", "slct", "sfumato.train.slct:SLCT", ("dao2025slct", "song2024improved", "song2023consistency"),
        "Latent consistency models from scratch: one or two steps, no teacher, robust against outliers.",
        cost="two forward passes and one backward an update; the paper's models took days on one to two GPUs",
        when="Pictures in one or two steps from latents of any autoencoder, where there is no teacher to distil.",
        beware="Short runs draw blurred pictures; the scale c and the decay of the averaged weights matter much.",
        ledger="slct",
    ),
    Method(
        "train", "discrete", "sfumato.train.discrete:Discrete",
        ("campbell2022continuous", "sahoo2024simple", "park2025jys"),
        "Diffusion of tokens, masked or changed at random: codes of pictures, characters, levels of pixels.",
        cost="one network call with gradients an update, quadratic in the number of tokens",
        when="Codes, text or levels, in parallel instead of one after the other; what `jys` chooses steps for.",
        beware="Small transformers for small data: for long texts and large pictures see the published models.",
        no_ledger="it is what the steps of jys are measured with, not a claim of its own",
    ),
    Method(
        "train", "eagan", "sfumato.train.eagan:EAGAN", ("ying2022eagan", "yang2020cars"),
        "Searches a GAN's generator, then its discriminator, by evolution over supernets, and trains both.",
        cost="the paper's search took 1.2 GPU-days; a small one minutes on a CPU",
        when="Pictures in one step from a small net, or a Pareto front of quality against size.",
        beware="Scores of shared weights rank roughly; with few samples they rank chance.",
        ledger="eagan",
    ),
)  # fmt: skip
