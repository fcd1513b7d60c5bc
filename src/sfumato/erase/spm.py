"""SPM: one rank-1 adapter per concept, silent on everything else (arXiv:2312.16145)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, mse_loss

from sfumato.errors import SfumatoError
from sfumato.fields import Count, Natural, NotNegative, Positive, at_least
from sfumato.pipeline import Conditioning, Text2Image
from sfumato.pipeline.adapter import Adapter
from sfumato.pipeline.backward import Learning
from sfumato.pipeline.membrane import Composition, Membrane, Transport, attach
from sfumato.text import counted
from sfumato.train.recipe import Loose

from .esd import negative_guidance_target, predict_each
from .parts.finetune import ALL, ByGradient, Finetuning, StepLoss, make_plan, seeds, uniform

if TYPE_CHECKING:
    from sfumato.plan import Plan


def draw_anchors(
    concept: Float[Tensor, "*shape"],
    n: int,
    generator: torch.Generator,
    scale: tuple[float, float] = (0.8, 1.2),
) -> Float[Tensor, "n *shape"]:
    """Random embeddings about as long as the concept's, and the likelier the less they resemble it.

    A standard normal tensor, divided by its Frobenius norm over the whole tensor, is accepted with probability
    1 - cos(it, concept), and multiplied by |concept| U(scale). In the width of real text encoders cosines are about
    0.003 and nearly all are accepted; in small ones the rule acts.

    Args:
        concept: an embedding of any shape (all tokens of one prompt, or a pooled vector).
        generator: on the CPU.

    Raises:
        SfumatoError: the concept's embedding is not finite, so that no draw is ever accepted.
    """
    low, high = scale
    norm = concept.norm()
    drawn: list[Tensor] = []
    if not torch.isfinite(norm):
        raise SfumatoError("the embedding of the concept is not finite: the text encoder is broken, fetch it again")
    while len(drawn) < n:  # a direction or its opposite is always accepted: two draws for each on average at most
        noise = torch.randn(concept.shape, generator=generator, dtype=torch.float64).to(concept)
        direction = noise / noise.norm()
        cosine = float(cosine_similarity(direction.flatten(), concept.flatten(), dim=0))
        accept, length = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        if accept < 1 - cosine:
            drawn.append((low + (high - low) * length) * norm * direction)
    return torch.stack(drawn) if drawn else concept.new_empty(0, *concept.shape)


def spm_loss(
    erased: Float[Tensor, "batch *dims"],
    target: Float[Tensor, "batch *dims"],
    anchored: Float[Tensor, "anchors *dims"],
    original: Float[Tensor, "anchors *dims"],
    anchor_weight: float,
) -> Float[Tensor, ""]:
    """mse(erased, target) + anchor_weight mse(anchored, original) (arXiv:2312.16145).

    Args:
        erased: prediction for the concept with the adapter on.
        target: `negative_guidance_target` of the base model's.
        anchored: predictions for the anchors with the adapter on; the mean is over all of them.
        original: the base model's for the same anchors.
    """
    return mse_loss(erased, target) + anchor_weight * mse_loss(anchored, original)


def restarting_cosine(i: int, warmup: int, updates: int, cycles: int) -> float:
    """The share of the highest learning rate at update i: linear warm-up, then a cosine that starts anew ``cycles``
    times; diffusers' "cosine_with_restarts"."""
    if i < warmup:
        return i / max(1, warmup)
    progress = (i - warmup) / max(1, updates - warmup)
    return 0.0 if progress >= 1 else max(0.0, 0.5 * (1 + math.cos(math.pi * (cycles * progress % 1.0))))


@dataclass(frozen=True, kw_only=True)
class SPM(ByGradient):
    """Concept semi-permeable membranes (arXiv:2312.16145): one rank-1 adapter per concept on a frozen model.

    Each adapter learns, on latents that the model reaches with it towards its concept, to turn the concept into
    ``anchors`` (default: the empty prompt) minus ``eta`` times its guidance, and to change nothing for random
    embeddings (latent anchoring). Adapters are trained independently, so each is the one that it would be alone; they
    combine, switch off, and fit any fine-tune of the model. With facilitated transport each acts, in every
    picture, as strongly as the prompt resembles its concept.

    Cost per update: M / 2 guided sampling steps on average, then 2 + n rows through the base network and 1 + n
    through the adapted one, the latter forward and backward (n anchors).

    Differs from the published code: the mean is over all n anchors (the script's own is over two of four, and
    twice the empty prompt; ``anchor_empty`` adds that one); the unconditional half of unguided predictions is
    not computed; resolution is fixed; AdamW in full precision; latents are sampled with the model's own spacing of
    steps (the script's is fixed) and, on SDXL, without its rescaling of guidance. As published, the network is told
    the time 1 - m / M of latents after m of M steps, whatever the spacing; of a flow, whose shift moves the times of
    all steps and may depend on their number, the one that the latents have. ``preserve`` adds real prompts to the
    anchors, which the paper does not.
    """

    GRID: ClassVar[Mapping[str, Sequence[Any]]] = {
        "anchor_weight": (10.0, 100.0, 1000.0), "lr": (3e-3, 1e-2), "updates": (100, 200),
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "sketch": {"updates": 200, "warmup": 20, "lr": 1e-2, "anchor_weight": 100.0, "sampling_steps": 20},
    }
    """Settings by name: the published ones (which are the defaults), and some for models as small as the embedded
    one."""

    removable: ClassVar[bool] = True
    EXAMPLE: ClassVar[Mapping[str, Any]] = {"updates": 2, "warmup": 1, "sampling_steps": 3, "n_anchors": 2, "lr": 1e-2}

    eta: float = 1.0
    """Strength of the negative guidance."""
    anchor_weight: NotNegative = 1000.0
    """lambda: weight of latent anchoring; 0 leaves it out. It multiplies a very small mean square."""
    n_anchors: Natural = 4
    """Random anchors per update; 0: only the empty prompt and ``preserve``, where these are asked for."""
    anchor_empty: bool = False
    """Take the empty prompt as one more anchor."""
    rank: Count = 1
    """Rank of each adapter."""
    alpha: Positive = 1.0
    """An adapter adds alpha / rank times the product of its factors."""
    updates: Count = 3000
    """Updates for each concept."""
    lr: Positive = 1e-4
    """Highest learning rate: linear warm-up, then a cosine with hard restarts."""
    warmup: Natural = 500
    """Updates of linear warm-up, but no more than half of them all."""
    decay: Literal["constant"] = field(default="constant", init=False)
    """See ``restarts``."""
    final_lr: float = field(default=0.0, init=False)
    """See ``restarts``."""
    weight_decay: NotNegative = 0.01
    restarts: Count = 3
    """Cycles of the cosine."""
    start_guidance: float = 3.0
    """Guidance under which the latents are sampled."""
    sampling_steps: Annotated[int, at_least(2)] = 30
    """M: DDIM steps of a whole trajectory."""
    batch: Count = 1
    """Latents in an update; they share the time."""
    transport: Transport = "facilitated"
    """Strength of an adapter for a prompt: the larger of embedding and token match, one of them, or always 1."""
    composition: Composition = "paper"
    """Several adapters: the sum of their products (the paper), or the product of their sums (the official code)."""

    def erased(self, pipe: Text2Image, folder: Path | None = None) -> tuple[Text2Image, dict[str, Any]]:
        """The pipeline with the adapters attached; its own weights are those of ``pipe``.

        Saved, it becomes a plain diffusers folder with the adapters merged at strength 1, and beside that
        ``adapter.safetensors`` (see `load_membranes`) and ``lora/`` (for ``load_lora_weights``; no transport).
        Loading the folder gives the merged weights. The adapters act with transport where they are attached to the
        original: ``sfumato sample``, ``audit`` and ``attack`` do that with ``--adapter FOLDER``.
        """
        membranes, losses = self.train(pipe, folder)
        return attach(pipe, membranes, self.transport, self.composition), {"losses": losses}

    def train(self, pipe: Text2Image, folder: Path | None = None) -> tuple[list[Membrane], dict[str, list[float]]]:
        """One membrane per concept, and the loss of each step by concept."""
        base, membranes, losses = pipe.describe()["sha256"], [], {}
        for index, concept in enumerate(self.concepts):
            adapter, losses[concept] = self.train_one(pipe, index, folder)
            membranes.append(Membrane.of(adapter, (concept,), base))
        return membranes, losses

    def train_one(self, pipe: Text2Image, index: int, folder: Path | None = None) -> tuple[Adapter, list[float]]:
        """The trained adapter of concept number ``index``, on a copy of ``pipe``, and the loss of each step."""
        student = pipe.copy()
        generator = torch.Generator().manual_seed(self.seed)
        adapter = student.add_adapter("spm", rank=self.rank, alpha=self.alpha, generator=generator)
        adamw = partial(torch.optim.AdamW, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)
        warmup = min(self.warmup, self.updates // 2)
        recipe = Finetuning(
            "spm",
            self.concepts[index : index + 1],
            pipe,
            Loose({f"{name}.{w}": getattr(adapter, w)[name] for w in ("down", "up") for name in adapter.layers}),
            self.loss(pipe, student, index),
            self.seed,
            adamw,
            lambda i: self.lr * restarting_cosine(i, warmup, self.updates, self.restarts),
        )
        return adapter, self.fit(recipe, None if folder is None else folder / str(index))

    def loss(self, base: Text2Image, student: Text2Image, index: int) -> StepLoss:
        """The loss of one step as a function of the step's generator, for concept number ``index``."""
        M, T = self.sampling_steps, base.clock.timesteps
        concept = base.encode(self.concepts[index])
        neutral = base.encode(self.anchor_for(index, ""))
        kept = base.encode(self.preserve) if self.preserve else None
        fixed = [base.encode("")] if self.anchor_empty else []
        options = {"sampling_steps": M, "cfg_scale": self.start_guidance, "negative": base.encode("")}

        def anchors(generator: torch.Generator) -> list[Conditioning]:
            if not self.anchor_weight:
                return []
            real = [] if kept is None else [kept[uniform(len(kept), generator)]]
            return [*random_conditionings(base, concept, self.n_anchors, generator), *fixed, *real]

        def loss_of(generator: torch.Generator, share: slice = ALL) -> Tensor:
            m = 1 + uniform(M - 1, generator)
            starts = seeds(self.batch, generator)[share]
            n = len(starts)
            z, t = student.trajectory(concept, starts, stop_after=m, **options)
            if base.clock.prediction != "flow":
                t = 1 - (m * T // M) / T
            others = [a.repeat(n) for a in anchors(generator)]
            with torch.no_grad():
                e0, ec, *original = predict_each(base, z, t, [neutral.repeat(n), concept.repeat(n), *others])
            target = negative_guidance_target(e0, ec, self.eta)
            erased, *anchored = predict_each(student, z, t, [concept.repeat(n), *others])
            if not others:
                return mse_loss(erased, target)
            return spm_loss(erased, target, torch.cat(anchored), torch.cat(original), self.anchor_weight)

        return loss_of

    def learning(self, pipe: Text2Image) -> Learning:
        """See `Eraser.learning`."""
        anchors = (self.n_anchors + self.anchor_empty + bool(self.preserve)) * bool(self.anchor_weight)
        return Learning(self.held(self.batch) * (1 + anchors), "lora", self.rank)

    def plan(self, pipe: Text2Image) -> Plan:
        """Memory and time, from one timed pass of the network."""
        scratch = pipe.copy()
        trained = sum(p.numel() for p in scratch.add_adapter("spm", rank=self.rank, alpha=self.alpha).parameters())
        anchors = (self.n_anchors + self.anchor_empty + bool(self.preserve)) * bool(self.anchor_weight)
        per_step = self.sampling_steps + 5 + 4 * anchors
        passes = len(self.concepts) * self.updates * self.batch * per_step
        title = f"SPM: {', '.join(self.concepts)}, {counted(self.updates, 'update')} each"
        return make_plan(pipe, title, trained, passes)


def random_conditionings(
    pipe: Text2Image, cond: Conditioning, n: int, generator: torch.Generator
) -> list[Conditioning]:
    """``n`` conditionings like the single row of ``cond``, with `draw_anchors` for its embeddings.

    Token and pooled embeddings (SDXL) are drawn separately, as in the published code. Where the network does not look
    at padding, which may be many times a text, the norm is of the rows that it looks at, and goes to these.
    """
    seen = cond.mask[0] if pipe.masked else torch.ones_like(cond.mask[0])
    tokens = cond.tokens.repeat(n, 1, 1)
    tokens[:, seen] = draw_anchors(cond.tokens[0, seen], n, generator)
    pooled = [None] * n if cond.pooled is None else draw_anchors(cond.pooled[0], n, generator)[:, None]
    return [cond.replace(tokens=tokens[i][None], pooled=pooled[i], prompts=("",)) for i in range(n)]
