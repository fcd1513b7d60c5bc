"""OmniGen: one transformer reads instructions with pictures in them and draws the next picture."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from accelerate import PartialState
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from sfumato.data.instructions import TASKS, Instructions, open_instructions
from sfumato.errors import BadInput
from sfumato.fields import Count, Decay, Natural, NotNegative, Positive, at_least
from sfumato.memory import require_memory
from sfumato.pipeline import load_text2image, open_autoencoder, read_record, wrap
from sfumato.pipeline.adapter import Adapter
from sfumato.pipeline.interleaved import AFTER, BEFORE, DROPPED, SIGNS, places
from sfumato.pipeline.omnigen import OmniGen, pipeline_class
from sfumato.plan import Plan
from sfumato.settings import Tuned

from . import draw
from .loop import Loose, Run
from .outputs import InFolder
from .posteriors import Posteriors
from .recipe import Recipe
from .schedule import Schedule
from .speaker import fresh_network, from_language_model
from .state import configuration, goes_on, rows_of
from .tokenizer import learn_spoken
from .velocity import between, emphasis, velocity_loss

PUBLISHED = "Shitao/OmniGen-v1-diffusers"
"""The published model, as a folder of diffusers."""


@dataclass(frozen=True, kw_only=True)
class TrainOmniGen(Tuned, Schedule, InFolder):
    """One transformer for text to picture, editing, subjects, control to picture and picture to control.

    arXiv:2409.11340. Every row is an instruction, in which the input pictures stand, and the picture that it asks for:
    lines of JSON with ``instruction``, ``input_images`` (files, or null) and ``output_image``; input picture 1 stands
    where the instruction says ``<img><|image_1|></img>``. Text is causal, an input picture sees all of itself, and the
    output sees everything; it is denoised at the end of the same sequence by rectified flow: with noise x0, the data's
    latent x1, u ~ N(0, 1) and t = sigmoid(u), the loss is ||v(t x1 + (1 - t) x0, t) - (x1 - x0)||^2. With the
    probability ``condition_dropout`` the instruction becomes ``<cfg>`` and its pictures are left out.

    From scratch a network is trained on the frozen latents of ``autoencoder``: a small one with a vocabulary learnt
    from the instructions, or one that begins as a ``language_model``. With ``start_from`` an OmniGen is tuned, whole or
    by low-rank products on the projections of attention. The result is an ``OmniGenPipeline`` folder, with
    products in its weights and by themselves in ``lora.safetensors``. Draw with `sfumato sample "..." --image FILE`.

    Unconfirmed: the paper's share of dropped instructions, its distribution of times, its settings by stage (those of
    the official code are the defaults here). The weights of ``emphasis`` are the official code's, which has them as a
    comment; the paper's 1 / ||x - x'||^2 where the latents differ is given in other words.
    Differs from the paper: all pictures that are asked for have one size, square, and input pictures none larger;
    products are one for each of query, key and value, which the official code has in one layer. From random weights the
    table of places has a cell for every patch of 16 pixels, in place of three for each, and rotary places are not
    stretched.
    Cost: one network call with gradients on the whole sequence an update; every picture is encoded once (with
    ``keep_latents``).
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        "pictures": 8, "size": 16, "updates": 4, "batch": 2, "warmup": 1, "checkpoint_every": 1, "width": 16,
        "heads": 2, "mlp": 16, "blocks": 1, "vocabulary": 300, "track": "none",
    }  # fmt: skip
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "lora": {
            "start_from": PUBLISHED, "trains": "lora", "lr": 3e-4, "condition_dropout": 0.01, "batch": 1, "size": 1024,
            "ema": 0.0, "save_memory": True,
        },
        "full": {"start_from": PUBLISHED, "lr": 2e-5, "batch": 1, "size": 1024, "ema": 0.0, "save_memory": True},
        "small-sketch": {
            "size": 64, "width": 192, "heads": 6, "mlp": 512, "blocks": 6, "batch": 32, "lr": 1e-3, "warmup": 200,
            "decay": "cosine", "ema": 0.999, "updates": 10_000,
        },
        "tiny-sketch": {
            "size": 32, "tasks": ("layout-to-picture", "picture-to-layout"), "pictures": 6000, "width": 128, "heads": 4,
            "mlp": 352, "blocks": 4, "vocabulary": 700, "batch": 32, "lr": 2e-3, "warmup": 100, "decay": "cosine",
            "ema": 0.995, "updates": 3000, "sampling_steps": 20,
        },
    }  # fmt: skip
    """``lora`` and ``full``: the official code's ways to tune the published model, on a GPU; ``small-sketch``, and
    ``tiny-sketch`` with two tasks: for a CPU, untuned."""

    data: str = "sketch"
    """"sketch", tasks of the sketch world, or a file of JSON lines with an instruction, input_images and an
    output_image each."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Tasks of the sketch world, in turn: "draw", "edges-to-picture", "picture-to-edges", "layout-to-picture",
    "picture-to-layout", "edit", "subject"."""
    pictures: Count = 20_000
    """How many rows of the sketch world."""
    size: Annotated[int, at_least(16)] = 64
    """Side of the pictures that are asked for, in pixels, a multiple of 16; the longest side of input pictures."""
    start_from: str = ""
    """An OmniGen (folder or hub id) to tune; empty: from scratch."""
    trains: Literal["full", "lora"] = "full"
    """All of the network, or low-rank products beside the projections of its attention."""
    rank: Count = 8
    """Rank of the products, which act with their full strength (alpha = rank)."""
    autoencoder: str = "sketch"
    """Whose latents are modelled from scratch: a model or an autoencoder's folder, of a factor of 8."""
    language_model: str = ""
    """From scratch: a Phi-3 of transformers (folder or hub id) whose weights, sizes and words it begins with, as the
    published model did; empty: random weights."""
    condition_dropout: Decay = 0.1
    """Share of instructions that are replaced by ``<cfg>``, with their pictures."""
    emphasis: bool = False
    """Weigh the loss of edits where their latents differ from the input's."""
    bidirectional: bool = True
    """An input picture sees all of itself; else it is causal, as text is."""
    keep_latents: bool = True
    """Encode every picture once and keep its latents in memory; else anew for every update."""
    width: Count = 256
    """From scratch: width of the network, a multiple of 4 and of twice the heads."""
    heads: Count = 8
    """From scratch: heads of attention."""
    mlp: Count = 704
    """From scratch: width inside the feed-forward layers."""
    blocks: Count = 8
    """From scratch: layers."""
    vocabulary: Annotated[int, at_least(300)] = 4096
    """From scratch: largest number of tokens."""
    context: Annotated[int, at_least(32)] = 1024
    """From scratch: longest instruction in tokens."""
    time_shift: Positive = 1.0
    """c of the steps of a draw, t / (t + c - c t) for t evenly from 0 to 1; 1 leaves them even."""
    sampling_steps: Count = 50
    """Steps that the finished model draws in unless told otherwise."""
    cfg_scale: float = 2.5
    """Guidance on the instruction that it draws with."""
    image_cfg_scale: float = 1.6
    """Guidance on input pictures that it draws with."""
    save_memory: bool = False
    """Compute activations twice instead of keeping them."""
    updates: Count = 20_000
    batch: Count = 32
    """Rows in an update."""
    lr: Positive = 1e-4
    warmup: Natural = 1000
    decay: Literal["cosine", "linear", "constant"] = "constant"
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: NotNegative = 0.0
    ema: Decay = 0.9999
    grid_every: Natural = field(default=0, init=False)
    """No pictures are drawn on the way."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size % 16:
            raise BadInput(f"size must be a multiple of 16: got {self.size}")
        if self.trains == "lora" and not self.start_from:
            raise BadInput("low-rank products tune a trained network: name one with start_from, or train in full")
        if self.width % 4 or self.width % (2 * self.heads):
            raise BadInput(f"width must be a multiple of 4 and of twice the {self.heads} heads: got {self.width}")
        if not self.tasks:
            raise BadInput(f"tasks: give at least one of {', '.join(TASKS)}")

    def open(self) -> Instructions:
        """The data; every row's places and pictures match.

        Raises:
            BadInput: a row in which they do not.
        """
        data = open_instructions(self.data, self.size, self.seed, self.pictures, self.tasks)
        for i in range(len(data) if self.data != "sketch" else 0):
            row = data.row(i)
            try:
                places(row.text, len(row.inputs))
            except BadInput as error:
                raise BadInput(f"{data.said(i)}: {error}") from error
        return data

    def model(self, data: Instructions) -> OmniGen:
        """The model to train: ``start_from``, or a fresh one."""
        if not self.start_from:
            return self.fresh(data)
        model = load_text2image(self.start_from, "cpu")
        if not isinstance(model, OmniGen):
            raise BadInput(f"{self.start_from} is {model.title}, not an OmniGen: leave start_from out to train one")
        return OmniGen(model.pipe, {**model.defaults, "size": self.size, "bidirectional": self.bidirectional})

    def fresh(self, data: Instructions) -> OmniGen:
        """A model from scratch, its weights from torch's generator."""
        vae = open_autoencoder(self.autoencoder)
        channels = vae.config.latent_channels
        if self.language_model:
            network, tokenizer = from_language_model(self.language_model, channels)
        else:
            texts = {data.row(i).text for i in range(min(len(data), 20_000))}
            tokenizer = learn_spoken([BEFORE, AFTER, DROPPED, *texts], SIGNS, self.context, self.vocabulary)
            sizes = (self.width, self.heads, self.mlp, self.blocks, max(64, self.size // 16))
            network = fresh_network(channels, len(tokenizer), *sizes)
        flow = FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1, shift=self.time_shift)
        defaults = {
            "size": self.size, "sampling_steps": self.sampling_steps, "cfg_scale": self.cfg_scale,
            "image_cfg_scale": self.image_cfg_scale, "negative": DROPPED,
            "bidirectional": self.bidirectional,
        }  # fmt: skip
        made: Any = wrap(pipeline_class()(network, flow, vae, tokenizer), defaults)
        if made.scale_factor != 8:
            raise BadInput(f"{self.autoencoder} has an autoencoder of factor {made.scale_factor}: one of 8 is due")
        return made

    def products(self, model: OmniGen) -> Adapter:
        """Fresh products on queries, keys, values and outputs; down N(0, 1 / rank^2), up zero."""
        rng = torch.Generator().manual_seed(self.seed)
        kinds = ("joint.q", "joint.k", "joint.v", "joint.out")
        adapter = model.add_adapter("lora", self.rank, self.rank, kinds, rng)
        with torch.no_grad():
            for down in adapter.down.values():
                down.copy_(torch.randn(down.shape, generator=rng) / self.rank)
        return adapter

    @torch.no_grad()
    def plan(self) -> Plan:
        """Memory, and time from one forward pass (an update costs about three)."""
        require_memory(12 * self.size**2 * (4 + 2 * self.batch), f"batches of {self.batch:,} pictures of this size")
        data = self.open()
        with torch.random.fork_rng():
            model = self.model(data)
        row, rows = data.row(0), min(self.batch, 4)
        z = torch.zeros(rows, *model.latent_shape(self.size))
        began = time.perf_counter()
        cond = model.interleaved([row.text] * rows, [[z[0]] * len(row.inputs)] * rows)
        model.denoiser(z, 0.5, cond).sum().item()
        seconds = 3 * (time.perf_counter() - began) * self.batch / rows * self.updates
        weights = 4 * sum(p.numel() for p in model.network.parameters())
        trained = weights if self.trains == "full" else weights // 100
        memory = {"weights": weights, "averages": trained, "gradients": trained, "optimiser": 2 * trained}
        return Plan(f"train omnigen on {self.data}", memory=memory, seconds=seconds)

    def made(self) -> dict[str, Any]:
        """How the model is made, for its record; of what it starts from the hash that its own record tells."""
        made = {"title": "A model of sfumato train omnigen", "recipe": "train omnigen", "config": asdict(self)}
        if not self.start_from:
            return made
        told = read_record(self.start_from).get("description") or {}
        return {**made, "parent": {"model": self.start_from, "sha256": told.get("sha256")}}

    def _run(self, out: Path, progress: bool, overwrite: bool) -> None:
        data = self.open()
        own = {**self.beyond(), **rows_of(self.data, data)}
        goes_on(out / "training", configuration("omnigen", self, own))
        training = OmniGenTraining(self, data)
        run = Run(training, self, out / "training", own)
        run.fit(progress)
        model = training.finished()
        run.finish(lambda: model.save(out / "model", overwrite=overwrite, provenance=self.made()))


class OmniGenTraining(Recipe):
    """`TrainOmniGen` as the loop sees it; with a ``model`` it tunes that one."""

    name = "omnigen"

    def __init__(self, recipe: TrainOmniGen, data: Instructions, model: OmniGen | None = None):
        torch.manual_seed(recipe.seed)
        self.recipe, self.data = recipe, data
        self.model = model = recipe.model(data) if model is None else model
        model.latent_shape(recipe.size)  # refuses what it cannot draw
        for i in range(len(data) if recipe.data != "sketch" else 0):
            try:
                model.require_short(data.row(i).text)
            except BadInput as error:
                raise BadInput(f"{data.said(i)}: {error}") from error
        model.pipe.to(PartialState(cpu=not torch.cuda.is_available()).device)  # what is not trained as well
        self.posteriors = Posteriors(model, data.picture, recipe.size, recipe.keep_latents)
        self.adapter = recipe.products(model) if recipe.trains == "lora" else None
        if self.adapter is None:
            model.network.train().requires_grad_(True)
        if recipe.save_memory:
            model.network.train().enable_gradient_checkpointing()

    def modules(self) -> dict[str, nn.Module]:
        if self.adapter is None:
            return {"transformer": self.model.network}
        named = (("down", self.adapter.down), ("up", self.adapter.up))
        return {"lora": Loose({f"{layer}.{what}": p for what, some in named for layer, p in some.items()})}

    def finished(self) -> OmniGen:
        """The model, trained and at rest."""
        self.model.network.eval().requires_grad_(False)
        if self.adapter is not None:
            adapter = self.adapter
            for p in adapter.parameters():
                p.requires_grad_(False)
            self.model.companions.append(lambda folder: adapter.save_lora(folder / "lora.safetensors"))
        return self.model

    def batch(self, step: int, rng: torch.Generator, size: int) -> dict[str, Any]:
        rows = [self.data.row(i) for i in draw.integers(len(self.data), size, rng).tolist()]
        given = (draw.uniform(size, rng) >= self.recipe.condition_dropout).tolist()
        return {
            "texts": [row.text if told else DROPPED for row, told in zip(rows, given, strict=True)],
            "outputs": [self.posteriors.square(row.output) for row in rows],
            "inputs": [
                [self.posteriors.fitted(name) for name in row.inputs] if told else []
                for row, told in zip(rows, given, strict=True)
            ],
            "edits": [row.edit for row in rows],
        }

    def loss(self, batch: dict[str, Any], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        n, device = len(batch["texts"]), self.model.network.device
        mean, std = (torch.stack(some).to(device) for some in zip(*batch["outputs"], strict=True))
        x1 = mean + std * draw.normal(mean.shape, rng).to(device)
        seeds = draw.integers(2**31, n, rng).tolist()
        latents = [_drawn(some, seed, device) for some, seed in zip(batch["inputs"], seeds, strict=True)]
        t = draw.normal((n,), rng).sigmoid().to(device)
        x0 = draw.normal(mean.shape, rng).to(device)
        x, _ = between(x1, x0, t)
        cond = self.model.sequence(batch["texts"], latents, grad=True)
        guess = -self.model.denoiser(x, 1 - t, cond)
        losses = velocity_loss(guess, x1, x0, self._weights(batch["edits"], x1, latents))
        return losses.mean(), {}

    def _weights(self, edits: Sequence[bool], x1: Tensor, latents: Sequence[Sequence[Tensor]]) -> Tensor | None:
        if not self.recipe.emphasis:
            return None
        weights = torch.ones_like(x1)
        for i, (edit, some) in enumerate(zip(edits, latents, strict=True)):
            if edit and some and some[0].shape == x1[i].shape:
                weights[i] = emphasis(x1[i], some[0])
        return weights


def _drawn(posteriors: Sequence[tuple[Tensor, Tensor]], seed: int, device: torch.device) -> list[Tensor]:
    """A draw from every one of a row's posteriors."""
    rng = torch.Generator().manual_seed(seed)
    return [(m + s * torch.randn(m.shape, generator=rng).to(s)).to(device) for m, s in posteriors]
