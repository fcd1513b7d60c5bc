"""Train a small text-to-image model, of Stable Diffusion's shape or PixArt's, from captioned pictures."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from sfumato.data.pictures import Pictures, open_pictures
from sfumato.errors import BadInput
from sfumato.fields import Count, Natural, NotNegative, Positive, Share, at_least, within
from sfumato.memory import require_memory
from sfumato.pipeline import wrap
from sfumato.pipeline.saving import weights_sha256
from sfumato.plan import Plan
from sfumato.progress import alone, say
from sfumato.settings import Tuned

from .autoencoder import AutoencoderRecipe, encode_all
from .diffusion import DiffusionRecipe, scheduler
from .loop import Run
from .outputs import is_there, ours
from .parent import Parent, open_parent
from .schedule import Schedule, resolved_precision
from .shapes import HEAD, SHAPES, Shape, Sizes
from .state import configuration, goes_on


@dataclass(frozen=True, kw_only=True)
class TrainT2I(Tuned, Schedule):
    """Latent diffusion from captions: an autoencoder first, then text encoder and denoising network together.

    Stage 1 trains an ``AutoencoderKL`` of factor 8 (squared and a little absolute error, small KL). Stage 2
    encodes every picture once and trains text encoder and network jointly with v-prediction
    (arXiv 2202.00512, eq. in section 4), min-SNR weighting (arXiv 2303.09556, eq. 8: min(SNR, gamma) / (SNR + 1) for v)
    and caption dropout for classifier-free guidance. With the architecture "unet" these are ``CLIPTextModel`` and
    ``UNet2DConditionModel``, and the result is a ``StableDiffusionPipeline`` folder; with "pixart" they are
    ``T5EncoderModel`` and ``PixArtTransformer2DModel``, and it is a ``PixArtSigmaPipeline`` folder.

    Killed at any moment, the same command goes on where it stopped, to the same bits.
    Cost: the plan that is printed first tells the time; ``docs/model.md`` says how the embedded model was made.

    With ``start_from`` a trained pipeline is trained on: new settings, the same shapes; the new record keeps its
    record. Give another ``seed`` than it had: the same one repeats the same pictures and noise.

    Differs from arXiv 2112.10752: no adversarial or perceptual loss for the autoencoder (they need a pretrained
    network), and the text encoder is trained from scratch.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        "pictures": 6, "size": 16, "autoencoder_channels": (8, 8, 8, 8), "autoencoder_updates": 2,
        "autoencoder_batch": 2, "updates": 3, "batch": 2, "warmup": 1, "channels": (16, 16), "text_width": 16,
        "vocabulary": 560, "checkpoint_every": 1, "track": "none",
    }  # fmt: skip
    data: str = "sketch"
    """"sketch", a folder of pictures with captions, Parquet files, WebDataset shards, or hub:OWNER/NAME."""
    caption: str = "{caption}"
    """How a Parquet row becomes a caption, e.g. "{caption}, {style} style"."""
    pictures: Count = 40_000
    """How many pictures of the sketch world to draw."""
    size: Annotated[int, at_least(16)] = 64
    """Side of the pictures in pixels, a multiple of 8."""
    start_from: str = ""
    """A pipeline (name or folder) whose weights training starts from; empty: from scratch."""
    start_with: Literal["all", "autoencoder"] = "all"
    """What is taken over from ``start_from``: every part, its tokenizer too, or the autoencoder alone."""
    autoencoder_updates: Natural = 4500
    """Updates of the first stage; 0 keeps the autoencoder of ``start_from`` as it is."""
    autoencoder_batch: Count = 8
    """Pictures in an update of the first stage."""
    autoencoder_lr: Positive = 1e-3
    """Learning rate of the first stage."""
    autoencoder_channels: tuple[Count, ...] = (32, 32, 64, 128)
    """Channels of the autoencoder's four levels; each but the last halves the side."""
    latent_channels: Count = 8
    """Channels of the latents; 4 as in Stable Diffusion blur textures of a few pixels at this size."""
    updates: Count = 3000
    """Updates of the second stage."""
    batch: Count = 64
    """Latents in an update of the second stage."""
    lr: Positive = 7e-4
    """Highest learning rate of the second stage."""
    architecture: Literal["unet", "pixart"] = "unet"
    """What is trained: Stable Diffusion's U-Net with CLIP's text encoder, or PixArt's transformer with T5's."""
    channels: tuple[Count, ...] = (96, 128)
    """Channels of the U-Net's levels."""
    width: Count = 160
    """Channels of the transformer, a multiple of 32."""
    blocks: Count = 6
    """Blocks of the transformer."""
    text_width: Annotated[int, at_least(4)] = 128
    """Width of the text embedding."""
    layers: Count = 1
    """Residual blocks a level of the U-Net."""
    text_layers: Count = 2
    """Layers of the text encoder."""
    context: Annotated[int, within(3, 4096)] = 32
    """Longest prompt in tokens."""
    vocabulary: Annotated[int, within(1, 1_000_000)] = 4096
    """Largest number of tokens that the tokenizer may learn."""
    caption_dropout: Share = 0.1
    """Share of captions replaced by the empty prompt, for guidance."""
    grid_every: Natural = field(default=0, init=False)
    """No pictures are drawn on the way."""
    cfg_scale: float = 3.0
    """Guidance that the finished pipeline samples with unless told otherwise."""
    min_snr_gamma: NotNegative = 5.0
    """Signal-to-noise ratio from which on the loss weight no longer grows; 0: every time weighs the same, so that
    the noisiest, where it is decided what stands where, weigh more."""
    min_snr_power: NotNegative = 1.0
    """Exponent of the loss weights: 1 as published; 0.5 lets all times count about equally."""
    tilt: NotNegative = 0.0
    """How much more often noisy times are drawn: their density grows with this power of time; 0: all are alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size % 8 or self.size < 16:
            raise BadInput(f"size must be a multiple of 8, at least 16: got {self.size}")
        if self.autoencoder_updates == 0 and not self.start_from:
            raise BadInput("autoencoder_updates can only be 0 with start_from: there is no trained autoencoder to keep")
        # What the networks' normalisation and attention heads divide by; four levels make the factor 8.
        if len(self.autoencoder_channels) != 4 or not all(c > 0 and c % 8 == 0 for c in self.autoencoder_channels):
            raise BadInput(f"autoencoder_channels must be four multiples of 8: got {self.autoencoder_channels}")
        if not self.channels or not all(c > 0 and c % 16 == 0 for c in self.channels):
            raise BadInput(f"channels must be multiples of 16: got {self.channels}")
        if self.width % HEAD:
            raise BadInput(f"width must be a multiple of {HEAD}: got {self.width}")
        if self.text_width < 4 or self.text_width % 4:
            raise BadInput(f"text_width must be a multiple of 4: got {self.text_width}")
        if min(self.latent_channels, self.layers, self.text_layers, self.pictures) < 1 or self.context < 3:
            raise BadInput("latent_channels, layers, text_layers and pictures must be at least 1, context at least 3")
        if not 0 <= self.caption_dropout <= 1 or min(self.autoencoder_lr, self.min_snr_gamma, self.tilt) < 0:
            raise BadInput("caption_dropout lies between 0 and 1; rates, min_snr_gamma and tilt are not negative")
        if self.precision == "fp16" and not torch.cuda.is_available():
            raise BadInput("precision fp16 needs a GPU: use bf16 or no")

    @torch.no_grad()
    def plan(self) -> Plan:
        """Memory of the larger stage, and time from one forward pass of each network (a step costs about three)."""
        self._fits()
        vae, network = self.autoencoder(), self.shape.network(self.sizes)
        tokens = self.shape.learn([""], self.context, self.vocabulary)
        text = self.shape.text_encoder(self.sizes, tokens)
        began = time.perf_counter()
        vae(torch.zeros(self.autoencoder_batch, 3, self.size, self.size))
        between = time.perf_counter()
        z = torch.zeros(self.batch, self.latent_channels, self.size // 8, self.size // 8)
        ids = self.shape.ids(tokens, [""] * self.batch)
        self.shape.predict(network, text, z, torch.full((self.batch,), 500), ids)
        first, second = between - began, time.perf_counter() - between
        trained = 4 * max(sum(p.numel() for p in net.parameters()) for net in (vae, network))
        memory = {"weights, averaged too": 2 * trained, "gradients": trained, "optimiser": 2 * trained}
        seconds = 3 * (first * self.autoencoder_updates + second * self.updates)
        return Plan(f"train a text-to-image pipeline on {self.data}", memory=memory, seconds=seconds)

    def made(self, parent: Parent | None) -> dict[str, Any]:
        """How the pipeline is made, for its record."""
        made = {"title": "A pipeline of sfumato train t2i", "recipe": "train t2i", "config": asdict(self)}
        return {**made, "parent": parent.record} if parent else made

    def finished(self, out: str | Path, overwrite: bool = False) -> bool:
        """Whether ``out/pipeline`` is the pipeline of this run already, so that `run` has nothing left to do.

        Raises:
            BadInput: something else is there.
        """
        if overwrite or not (Path(out) / "pipeline").exists():
            return False
        parent = open_parent(self.start_from) if self.start_from else None
        return is_there(Path(out) / "pipeline", self.made(parent))

    def run(self, out: str | Path, progress: bool = True, overwrite: bool = False) -> Path:
        """Train, or go on training, and write the pipeline to ``out/pipeline``; a `finished` run is left as it is.

        Raises:
            BadInput: ``out`` is a file or holds a run with other settings, or another process is at work in it;
                something else is in the pipeline's place (without ``overwrite``); the data or ``start_from`` cannot be
                used.
        """
        with ours(Path(out)) as folder:
            if not self.finished(folder, overwrite):
                self._run(folder, progress, overwrite)
        return Path(out) / "pipeline"

    def _run(self, out: Path, progress: bool, overwrite: bool) -> None:
        self._fits()
        parent = open_parent(self.start_from) if self.start_from else None
        autoencoder, given = self._given(parent) if parent else (None, None)
        second = replace(self.schedule(), seed=self.seed + 1)
        pictures = open_pictures(self.data, self.size, self.caption, self.seed, self.pictures)
        rows = {"rows": pictures.identity()}
        keys = {**self._second_keys(parent, bool(given)), **rows}
        if self.autoencoder_updates:
            first = {**self._first_keys(), **rows}
            goes_on(out / "autoencoder", configuration(AutoencoderRecipe.name, self._first(), first))
        elif (out / "autoencoder").exists():
            raise BadInput(
                f"{out} holds a run that trained its autoencoder: give its --autoencoder-updates to go on, or another "
                "folder to start anew"
            )
        goes_on(out / "diffusion", configuration(DiffusionRecipe.name, second, keys))
        torch.manual_seed(self.seed)
        autoencoder = autoencoder or self.autoencoder()
        if progress and alone() and pictures.origin:
            say(f"captions of {self.data}: {pictures.origin}")
        captions = [pictures.caption(i) for i in range(len(pictures))]
        latents = self._first_stage(autoencoder, pictures, rows, out, progress)

        # Whether the first stage was done just now or before a kill must not matter.
        torch.manual_seed(self.seed + 1)
        network, text, tokenizer = given or self._fresh(captions)
        network = network.to(memory_format=torch.channels_last)
        recipe = DiffusionRecipe(
            network,
            text,
            tokenizer,
            scheduler(),
            latents * autoencoder.config.scaling_factor,
            captions,
            self.caption_dropout,
            self.min_snr_gamma,
            pictures.group,
            self.tilt,
            self.min_snr_power,
            self.shape,
        )
        run = Run(recipe, second, out / "diffusion", keys)
        run.fit(progress)
        pipe = self.shape.pipeline(autoencoder, text.eval(), tokenizer, network.eval(), scheduler())
        trained = wrap(pipe, {"cfg_scale": self.cfg_scale})
        run.finish(lambda: trained.save(out / "pipeline", overwrite=overwrite, provenance=self.made(parent)))

    def _fits(self) -> None:
        """Refuse what there is no memory for: networks, batches, and the latents and captions of all pictures."""
        with torch.device("meta"):
            networks = self.autoencoder(), self.shape.network(self.sizes)
            trained = sum(p.numel() for network in networks for p in network.parameters())
        require_memory(16 * trained, "networks of these channels")  # weights, gradients, two moments
        most = max(self.autoencoder_batch, self.batch // 64)
        require_memory(12 * self.size**2 * (16 + most), f"batches of pictures of {self.size} pixels a side")
        if self.data in ("sketch", "sketch-scenes"):
            each = 4 * self.latent_channels * (self.size // 8) ** 2 + 100
            require_memory(each * self.pictures, f"{self.pictures:,} pictures, encoded,")

    def _second_keys(self, parent: Parent | None, given: bool) -> dict[str, Any]:
        """What shapes the second stage, apart from its schedule; ``given`` says whether it starts from ``parent``."""
        names = (*self.shape.settings, "text_layers", "text_width", "context", "vocabulary")
        return {
            **self._shared(),
            **{name: getattr(self, name) for name in names},
            "dropout": self.caption_dropout,
            "gamma": self.min_snr_gamma,
            "tilt": self.tilt,
            "power": self.min_snr_power,
            # None, as in a run from scratch, where they do not matter to this stage.
            "start_with": "all" if given else None,
            "autoencoder_updates": None if self.autoencoder_updates else 0,
            "parent": parent.record["sha256"] if parent and (given or not self.autoencoder_updates) else None,
        }

    def _shared(self) -> dict[str, Any]:
        """The settings that neither stage may change on the way."""
        return {name: getattr(self, name) for name in ("data", "caption", "pictures", "size")}

    def _given(self, parent: Parent) -> tuple[AutoencoderKL, tuple[nn.Module, nn.Module, Any] | None]:
        """The autoencoder of ``parent``, and if more is wanted its network, text encoder and tokenizer.

        Raises:
            BadInput: they do not fit these settings.
        """
        autoencoder = parent.part("vae", self.autoencoder(), "autoencoder_channels and latent_channels")
        if self.start_with == "autoencoder":
            return autoencoder, None
        if parent.pipeline.denoiser.prediction != "v":
            raise BadInput(
                f"{self.start_from} does not predict v, which this recipe trains: take its autoencoder alone, with "
                "--start-with autoencoder"
            )
        component = self.shape.component
        if component not in parent.pipeline.parts():
            raise BadInput(f"{self.start_from} has no {component}: give the architecture that it was trained with")
        settings = ", ".join(self.shape.settings)
        network = parent.part(component, self.shape.network(self.sizes), f"{settings}, latent_channels and text_width")
        network.register_to_config(sample_size=self.size // 8)
        tokenizer = parent.pipeline.tokenizers[0]
        like = self.shape.text_encoder(self.sizes, tokenizer)
        text = parent.part("text_encoder", like, "text_width, text_layers and context")
        return autoencoder, (network, text, tokenizer)

    @property
    def sizes(self) -> Sizes:
        """What shapes the networks."""
        return Sizes(**{field.name: getattr(self, field.name) for field in fields(Sizes)})

    @property
    def shape(self) -> Shape:
        """The kind of pipeline that is made."""
        return SHAPES[self.architecture]

    def _fresh(self, captions: list[str]) -> tuple[nn.Module, nn.Module, Any]:
        """A network and a text encoder from scratch, and a tokenizer learnt from the captions."""
        tokenizer = self.shape.learn(captions, self.context, self.vocabulary)
        return self.shape.network(self.sizes), self.shape.text_encoder(self.sizes, tokenizer), tokenizer

    def _first(self) -> Schedule:
        """The first stage's schedule."""
        names = ("precision", "seed", "checkpoint_every", "compile", "track", "workers")
        return Schedule(
            updates=self.autoencoder_updates,
            batch=self.autoencoder_batch,
            lr=self.autoencoder_lr,
            ema=0.995,
            accumulate=min(self.accumulate, self.autoencoder_batch),
            **{name: getattr(self, name) for name in names},
        )

    def _first_keys(self) -> dict[str, Any]:
        """What shapes the first stage, apart from its schedule."""
        names = ("autoencoder_channels", "latent_channels", "start_from")
        return {**self._shared(), **{name: getattr(self, name) for name in names}}

    def _first_stage(
        self, autoencoder: AutoencoderKL, pictures: Pictures, rows: dict[str, str], out: Path, progress: bool
    ) -> Tensor:
        """Train the autoencoder, or leave it as it is; the latents of all pictures, unscaled."""
        if self.autoencoder_updates:
            recipe = AutoencoderRecipe(autoencoder, pictures)
            Run(recipe, self._first(), out / "autoencoder", {**self._first_keys(), **rows}).fit(progress)
        autoencoder.eval().requires_grad_(False)
        of = {**self._shared(), **rows, "seed": self.seed, "autoencoder": weights_sha256({"vae": autoencoder})}
        cache = out / "latents.safetensors"
        latents = encode_all(autoencoder, pictures, cache, json.dumps(of), resolved_precision(self.precision), progress)
        if self.autoencoder_updates:
            autoencoder.register_to_config(scaling_factor=float(1 / latents.std()))
        return latents

    def autoencoder(self) -> AutoencoderKL:
        """A KL autoencoder with one level per entry of ``autoencoder_channels`` (four levels: factor 8)."""
        levels = len(self.autoencoder_channels)
        autoencoder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=self.autoencoder_channels,
            layers_per_block=1,
            latent_channels=self.latent_channels,
            norm_num_groups=8,
            sample_size=self.size,
        )
        with torch.no_grad():
            # The posterior starts narrow (deviation e^-3): at its usual width of 1 it drowns what it should carry.
            autoencoder.quant_conv.bias[self.latent_channels :] = -6.0
        return autoencoder
