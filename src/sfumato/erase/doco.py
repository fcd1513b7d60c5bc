"""DoCo: a discriminator cannot tell what x0 the concept's prompts make from the anchor's (arXiv:2405.15304)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from sfumato.data.pictures import open_pictures, to_tensor
from sfumato.errors import BadInput
from sfumato.fields import Count, Natural, NotNegative, Positive
from sfumato.noise.process import compose
from sfumato.pipeline import Conditioning, Text2Image
from sfumato.pipeline.backward import Learning
from sfumato.pipeline.conditioning import Role
from sfumato.pipeline.hooks import attach
from sfumato.text import counted
from sfumato.train import draw
from sfumato.train.recipe import Gradients, Turn

from .esd import SUBSETS, Variant
from .parts.anchored import VARIANTS, Anchored, Kind, asking, captions, default_anchor, encoded, resized, resizes
from .parts.finetune import ByGradient, InTurns, make_plan, seeds
from .parts.patches import PatchDiscriminator, stages_for
from .parts.surgery import Surgery, clipped, surgery

if TYPE_CHECKING:
    from sfumato.plan import Plan

ANCHOR, SENSITIVE = 0.0, 1.0
"""What the discriminator is taught to call the two domains."""


def domain_loss(logits: Float[Tensor, "*patches"], label: float) -> Float[Tensor, ""]:
    """Binary cross-entropy of all patches against one label: the anchors' domain is 0, the sensitive prompts' 1."""
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


def discriminator_loss(sensitive: Float[Tensor, "*patches"], anchor: Float[Tensor, "*patches"]) -> Float[Tensor, ""]:
    """BCE(sensitive, 1) + BCE(anchor, 0): 2 ln 2 where the domains cannot be told apart."""
    return domain_loss(sensitive, SENSITIVE) + domain_loss(anchor, ANCHOR)


@contextmanager
def start_detached(pipe: Text2Image, cond: Conditioning) -> Iterator[None]:
    """In the block the keys and values of the start token are constants: its projections have no gradient from it.

    Which tokens start a text is read off ``cond``; text encoders without such a token (T5) have nothing to detach, nor
    have networks whose text has no projections of its own (OmniGen).
    """
    kinds = [kind for kind in ("cross.k", "cross.v", "text.k", "text.v") if kind in pipe.anatomy.kinds]
    first = torch.zeros(cond.tokens.shape[1], dtype=torch.bool)
    if cond.roles is not None:
        first = (cond.roles == Role.START).all(dim=0).cpu()

    def hook(module: Any, args: tuple, out: Tensor) -> Tensor:
        starts = first[: out.shape[1]].to(out.device)  # some networks cut off padding
        return torch.where(starts[:, None], out.detach(), out)

    with ExitStack() as stack:
        for projection in pipe.projections(*kinds) if kinds and first.any() else ():
            stack.callback(attach(pipe.network.get_submodule(projection.name), hook).remove)
        yield


@dataclass(frozen=True, kw_only=True)
class DoCo(ByGradient):
    """Domain correction (arXiv:2405.15304): for the concept's prompts the model predicts x0 of the anchor's domain.

    Pictures of the anchor are noised. A patch discriminator learns to tell what the student predicts of x0 when it is
    asked for the concept there from what the original predicts when asked for the anchor, at the same latent and time;
    in turns with it the student learns to pass for the anchor. So distributions match, not predictions one by one, and
    the erasure is to hold for prompts that it never saw. What of the student's gradient would undo what it knows of
    the anchors' pictures (the gradient of the usual loss, on as many others of these) is taken out, tensor by tensor.

    Cost: ``pictures`` guided draws beforehand (a killed run draws them again); per update a pass of the original and
    two of the student, forward and backward, on ``batch`` rows each.

    Differs from the published code: the discriminator's gradient is its own, without what the student's step leaves
    behind in it there, which cancels much of it (``leak``); the gradient's surgery is a projection (there its length is
    right only for gradients of length 1: ``surgery="official"``). Latents are the autoencoder's means, encoded once;
    with ``augment`` every picture has one size for good. Small latents have fewer stages, and batches of two or less
    are normalised picture by picture. The retaining loss is in the network's own kind of prediction. Captions are
    templates around the anchor where none are given (there retrieved, or written by a language model), and the kind
    "memorisation" is left out. ``preserve`` adds pictures of these prompts to those retained.
    """

    GRID: ClassVar[Mapping[str, Sequence[Any]]] = {
        "lr": (1e-4, 3e-4, 1e-3), "updates": (70, 140), "head_start": (20, 40),
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "style": {"kind": "style"},
        "object": {"discriminator_lr": 1e-4, "augment": True},
        "published-code": {"surgery": "official", "leak": True},
        "sketch": {
            "updates": 140, "head_start": 40, "pictures": 64, "captions": 64, "sampling_steps": 15, "cfg_scale": 3.0,
            "lr": 3e-4,
        },
    }  # fmt: skip
    """Settings by name: the published commands for styles (which are the defaults otherwise) and for objects and unsafe
    words; what the published code does differently; and some for models as small as the embedded one (the first
    that were tried)."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        "updates": 2, "head_start": 0, "batch": 2, "pictures": 2, "sampling_steps": 2, "lr": 1e-3, "anchors": ("art",),
        "prompts": ("art", "a photo of art"),
    }  # fmt: skip

    kind: Kind = "object"
    """How prompts ask for the concept: its name in place of the anchor's; as a style; or "content", before the prompt
    or as a style."""
    prompts: tuple[str, ...] = ()
    """Captions of the anchor (for "object" they name it); none: made up, see ``captions``."""
    captions: Count = 200
    """Different captions for each anchor, at most, where none are given."""
    images: str | None = None
    """A folder of pictures of the anchor with captions, or another source of pictures, instead of drawing some."""
    pictures: Count = 1000
    """Pictures of each anchor."""
    sampling_steps: Count = 25
    """DPM-Solver's steps for a picture."""
    cfg_scale: float = 6.0
    """Guidance under which pictures are drawn."""
    flip: bool = True
    """Mirror half of the pictures."""
    augment: bool = False
    """Draw pictures smaller or larger, and say so in the prompts that ask for the concept; those to retain stay."""
    variant: Variant = "x-strict"
    """What is trained: the cross-attention's keys and values (the paper), or another of ESD's sets."""
    updates: Count = 2000
    head_start: Natural = 1000
    """The student is not trained in this update, counted from 0, or any before it: only the discriminator is."""
    lr: Positive = 4.8e-5
    """Learning rate of the student (AdamW): the published 6e-6 times the batch."""
    discriminator_lr: Positive = 5e-4
    """Learning rate of the discriminator (Adam, decays 0.5 and 0.999). It must not win: its accuracy is logged."""
    batch: Count = 8
    """Pictures of anchors in an update, and as many to retain."""
    weight_decay: NotNegative = 0.01
    clip_norm: NotNegative = 1.0
    """Largest norm of each of the student's two gradients before surgery, of all tensors together; 0: any."""
    surgery: Surgery = "tensor"
    """How the retaining gradient corrects the other: see `surgery`; "none": it is added, see ``retain_weight``."""
    surgery_weight: NotNegative = 1.0
    """lambda: share of the opposing part that is taken out."""
    retain_weight: NotNegative = 1.0
    """Without surgery: ten times the weight of the retaining loss beside the other."""
    leak: bool = False
    """Keep the gradient that the student's step leaves in the discriminator."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = (self.prompts,) if isinstance(self.prompts, str) else tuple(self.prompts)
        object.__setattr__(self, "prompts", given)
        if self.updates <= self.head_start + 1:
            raise BadInput(
                f"{counted(self.updates, 'update')} with a head start of {self.head_start} never train the student: "
                "give more updates, or a smaller head_start"
            )

    def erased(self, pipe: Text2Image, folder: Path | None = None) -> tuple[Text2Image, dict[str, Any]]:
        """A pipeline that shares all but the trained weights with ``pipe``, and both sides' losses."""
        student, data = pipe.copy(own=SUBSETS[self.variant]), self.data(pipe)
        channels, side, _ = pipe.latent_shape()
        norm: Literal["batch", "group"] = "batch" if self.batch > 2 else "group"
        judge = PatchDiscriminator(channels, stages_for(side), norm, self.seed % 2**32).to(pipe.device)
        recipe = Correction(self, pipe, student, judge, data)
        with start_detached(student, data.prompts):
            history = self.course(recipe, pipe, None if folder is None else folder / "training")
        judged = history.pop("discriminator/loss")
        return student, {"losses": history["student/loss"], "discriminator_losses": judged}

    def data(self, pipe: Text2Image) -> Anchored:
        """The pictures of all anchors and of ``preserve``, drawn or read, and what goes with each.

        Raises:
            BadInput: a prompt of an object that does not name its anchor; words that the tokenizer cannot read.
        """
        generator = torch.Generator().manual_seed(self.seed)
        pictures: list[Tensor] = []
        told: list[str] = []
        asked: list[Sequence[str]] = []
        plain: list[tuple[Tensor, list[str]]] = []
        for i, concept in enumerate(self.concepts):
            anchor = self.anchor_for(i, default_anchor(pipe, concept, self.kind))
            ask = partial(asking, concept=concept, anchor=anchor, kind=self.kind)
            if self.images is None:
                texts = list(self.prompts) or captions(pipe, concept, anchor, self.captions, generator)
                list(map(ask, texts))  # or refused, before anything is drawn
                made, texts = self._drawn(pipe, texts, generator)
            else:
                made, texts = self._read(pipe)
            ways: list[Sequence[str]] = [*map(ask, texts)]
            plain.append((made.clone(), texts))
            for k, share in enumerate(resizes(len(texts), generator) if self.augment else ()):
                made[k], words = resized(made[k], share, generator)
                if words:  # the anchor's own caption says nothing of the size
                    said = words[int(torch.randint(2, (), generator=generator))]
                    ways[k] = [said + way for way in ways[k]]
            pictures, told, asked = [*pictures, made], [*told, *texts], [*asked, *ways]
        kept = len(told) if self.augment else 0
        retained = plain if self.augment else []
        if self.preserve:
            retained = [*retained, self._drawn(pipe, self.preserve, generator)]
        for made, texts in retained:
            pictures, told = [*pictures, made], [*told, *texts]
        return encoded(pipe, torch.cat(pictures), told, asked, self.flip, kept)

    def _read(self, pipe: Text2Image) -> tuple[Tensor, list[str]]:
        """The pictures of ``images``, in [0, 1], and their captions."""
        found = open_pictures(self.images or "", pipe.size, count=self.pictures)
        rows = range(min(self.pictures, len(found)))
        return to_tensor([found.picture(i) for i in rows]) / 2 + 0.5, [found.caption(i) for i in rows]

    def _drawn(self, pipe: Text2Image, texts: Sequence[str], generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """Pictures of these captions, each as often as every other, in [0, 1]."""
        said = [texts[i % len(texts)] for i in range(self.pictures)]
        options: dict[str, Any] = {"sampling_steps": self.sampling_steps, "cfg_scale": self.cfg_scale}
        drawn = pipe.draw(said, seeds(len(said), generator), scheduler="dpm++", progress=self.progress, **options)
        return drawn, said

    def learning(self, pipe: Text2Image) -> Learning:
        """See `Eraser.learning`."""
        apart = self.surgery != "none"
        return Learning(self.held(self.batch) * (1 if apart else 2), SUBSETS[self.variant], gradients=1 + apart)

    def plan(self, pipe: Text2Image) -> Plan:
        """Memory and time, from one timed pass of the network."""
        trained = sum(p.numel() for p in pipe.parameters(SUBSETS[self.variant]).values())
        drawn = 0 if self.images else 2 * self.sampling_steps * self.pictures * len(self.concepts)
        learning = self.batch * ((self.head_start + 1) * 2 + (self.updates - self.head_start - 1) * 7)
        title = f"DoCo: {', '.join(self.concepts)}, {counted(self.updates, 'update')}"
        return make_plan(pipe, title, trained, drawn + learning)


class Correction(InTurns):
    """The student and the discriminator, in turns, on the same noisy pictures."""

    def __init__(self, doco: DoCo, teacher: Text2Image, student: Text2Image, judge: PatchDiscriminator, data: Anchored):
        self.doco, self.teacher, self.student, self.judge, self.data = doco, teacher, student, judge, data
        apart = doco.surgery != "none"
        adamw = partial(torch.optim.AdamW, betas=doco.betas, eps=doco.eps, weight_decay=doco.weight_decay)
        adam = partial(torch.optim.Adam, betas=(0.5, 0.999))
        turns = [
            Turn(
                name="student", trains=["network"], optimizer=adamw, first=doco.head_start + 1,
                loss={"adversarial": self.adversarial, "retain": self.retain} if apart else self.together,
                clip_norm=0.0 if apart else doco.clip_norm,
            ),
            Turn(
                name="discriminator", trains=["judge"], optimizer=adam, lr=doco.discriminator_lr, clip_norm=0.0,
                loss=self.judged,
            ),
        ]  # fmt: skip
        super().__init__("doco", doco.concepts, teacher, {"network": student.network, "judge": judge}, turns)

    def batch(self, step: int, rng: torch.Generator, size: int) -> dict[str, Any]:
        """Pictures of anchors, and others to retain, each with its time, noise and prompts."""
        d = self.data
        rows, kept = draw.integers(d.anchors, size, rng), d.kept + draw.integers(len(d.told) - d.kept, size, rng)
        ways = draw.integers(VARIANTS, size, rng)
        noised = {"rows": self._noised(rows, rng), "kept": self._noised(kept, rng)}
        return {"step": step, **noised, "told": d.told[rows], "asked": d.asked[rows, ways], "retained": d.told[kept]}

    def _noised(self, rows: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        mirrored = draw.integers(self.data.latents.shape[1], len(rows), rng)
        t = self.teacher.clock.timesteps
        times = (draw.integers(t, len(rows), rng) + 1).double() / t
        x = self.data.latents[rows.to(self.data.latents.device), mirrored.to(self.data.latents.device)]
        eps = draw.normal(tuple(x.shape), rng).to(x)
        return {"z": self.teacher.process.diffuse(x, times, eps), "t": times, "x": x, "eps": eps}

    def adversarial(self, batch: dict[str, Any], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """BCE(D(x0 of the student), anchor)."""
        x0 = self._x0(self.student, batch, "asked")
        batch["sensitive"] = x0.detach()  # the discriminator sees it as it was before the student's update
        return domain_loss(self.judge(x0), ANCHOR), {}

    def retain(self, batch: dict[str, Any], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss that the model was trained with, on pictures to retain."""
        kept, student = batch["kept"], self.student
        made = student.denoiser(kept["z"], kept["t"], self._prompts(batch["retained"]))
        alpha, sigma = student.process.alpha_sigma(kept["t"], kept["x"])
        return mse_loss(made, compose(kept["x"], kept["eps"], alpha, sigma, student.prediction)), {}

    def together(self, batch: dict[str, Any], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Both losses at once, without surgery."""
        lost, kept = self.adversarial(batch, rng)[0], self.retain(batch, rng)[0]
        return lost + 0.1 * self.doco.retain_weight * kept, {"adversarial": lost, "retain": kept}

    def judged(self, batch: dict[str, Any], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss, and how often it is right (0.5: it is fooled)."""
        trained = "sensitive" in batch
        with torch.no_grad():
            sensitive = batch["sensitive"] if trained else self._x0(self.student, batch, "asked")
            anchor = self._x0(self.teacher, batch, "told")
        left, right = self.judge(sensitive), self.judge(anchor)
        loss = discriminator_loss(left, right)
        if self.doco.leak and trained:
            loss = loss + domain_loss(left, ANCHOR)
        accuracy = torch.cat([(left > 0).flatten(), (right <= 0).flatten()]).float().mean()
        return loss, {"accuracy": accuracy}

    def combine(self, turn: Turn, gradients: dict[str, Gradients]) -> Gradients:
        a, b = (clipped(gradients[name], self.doco.clip_norm) for name in ("adversarial", "retain"))
        return surgery(a, b, self.doco.surgery, self.doco.surgery_weight)

    def _x0(self, pipe: Text2Image, batch: dict[str, Any], prompts: str) -> Tensor:
        z, t = batch["rows"]["z"], batch["rows"]["t"]
        with torch.set_grad_enabled(torch.is_grad_enabled() and pipe is self.student):
            made = pipe.denoiser(z, t, self._prompts(batch[prompts]))
        return pipe.process.convert(made, z, t, pipe.prediction, "x0")

    def _prompts(self, numbers: Tensor) -> Conditioning:
        return self.data.prompts[numbers.tolist()]
