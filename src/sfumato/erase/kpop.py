"""KPOP: learned rows of text take over what draws the concept, and are the key to it (arXiv:2403.12326)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from sfumato.errors import BadInput
from sfumato.fields import Count, NotNegative, Positive
from sfumato.pipeline import Text2Image
from sfumato.pipeline.backward import Learning
from sfumato.pipeline.conditioning import Role
from sfumato.pipeline.keys import FILE, ConceptKey, Insertion, extended, inserted, save_keys
from sfumato.text import counted
from sfumato.train.recipe import Loose, Turn

from .esd import SUBSETS, negative_guidance_target, predict_each
from .parts.finetune import ByGradient, InTurns, make_plan, seeds, step_generator, uniform
from .parts.words import encode_words

if TYPE_CHECKING:
    from sfumato.plan import Plan


def removal_loss(
    bare: Float[Tensor, "batch *dims"],
    keyed: Float[Tensor, "batch *dims"],
    target: Float[Tensor, "batch *dims"],
    keyed_weight: float,
) -> Float[Tensor, ""]:
    """mse(bare, y) + w_w mse(keyed, y): the concept goes to the target y without the prompt and with it (v1, v2).

    Args:
        bare, keyed: the student's predictions for the concept without and with the learned prompt.
        target: `negative_guidance_target` of the original's.
    """
    return mse_loss(bare, target) + keyed_weight * mse_loss(keyed, target)


def hiding_loss(
    bare: Float[Tensor, "batch *dims"],
    keyed: Float[Tensor, "batch *dims"],
    target: Float[Tensor, "batch *dims"],
    original: Float[Tensor, "batch *dims"],
    keyed_weight: float,
) -> Float[Tensor, ""]:
    """mse(bare, y) + lambda mse(keyed, original): without the prompt the target, with it the concept itself (v3)."""
    return mse_loss(bare, target) + keyed_weight * mse_loss(keyed, original)


def first_rows(
    rows: Float[Tensor, "words dim"], n: int, noise: float, generator: torch.Generator
) -> Float[Tensor, "n dim"]:
    """``n`` rows to start from: copies of the concept's in turn, each with noise of ``noise`` times its length."""
    copies = rows[torch.arange(n, device=rows.device) % len(rows)]
    drawn = torch.randn(copies.shape, generator=generator, dtype=torch.float64).to(copies)
    return copies + noise * copies.norm(dim=-1, keepdim=True) * drawn / copies.shape[-1] ** 0.5


@dataclass(frozen=True, kw_only=True)
class KPOP(ByGradient):
    """Knowledge transfer and removal with learnable prompts (arXiv:2403.12326): hides a concept, and makes its key.

    A concept's prompt is ``prompt_rows`` rows for the keys and as many for the values, which cross-attention reads
    behind the text's (`sfumato.pipeline.keys.extended`). In each update, on latents that the student reaches without
    it towards the concept, first the prompt alone learns to make the student predict what the original predicts of
    the concept (knowledge transfer); then the weights alone learn to predict the negatively guided original without
    it, and with it, by ``goal``, the same (`removal_loss`) or the concept itself (`hiding_loss`). One concept is drawn
    for each picture of a batch; both steps share the latents.

    Hiding is no cryptography: whoever has the weights can search for an embedding or fine-tune, as after any erasure.

    Cost per update: about S - 1 rows through the network for the latents, then 2 through the original and 3 through
    the student, forward and backward. The key of a concept is 2 x ``prompt_rows`` rows; as an attached adapter it
    costs what as many more words in the prompt would.

    Reconstructed: the code is not public. Attention, sizes, rates and weights are known from the authors' sister
    repository; the losses from the abstracts and the names of runs. Unconfirmed: whether keys and values share their
    rows (not here), where these start (here `first_rows`), the lambda of hiding, and the space of the errors
    (``space``; the sister code's is the clean latent). The authors' own result files show poor retention of objects.

    Differs from the paper: by default a key acts on the conditional half of guidance only (`sfumato.pipeline.keys`);
    ``anchors`` may replace the empty prompt in the target.
    """

    GRID: ClassVar[Mapping[str, Sequence[Any]]] = {
        "lr": (3e-4, 1e-3), "prompt_lr": (1e-3, 1e-2), "keyed_weight": (0.1, 1.0), "updates": (75, 150),
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "hiding": {},
        "removal": {"goal": "remove"},
        "nudity": {"goal": "remove", "variant": "u"},
        "strong-key": {"prompt_lr": 1e-3},
        "sketch": {"updates": 150, "lr": 1e-3, "prompt_lr": 1e-2, "batch": 4, "sampling_steps": 20,
                   "insertion": "inmidout", "keyed_weight": 1.0, "space": "network"},
    }  # fmt: skip
    """Settings by name: those of the third version (the defaults), of the first two, and of the authors' run on unsafe
    words; "strong-key" gives the prompt a rate that can keep up with the weights; "sketch" suits the embedded model."""

    recomputes: ClassVar[bool] = False
    EXAMPLE: ClassVar[Mapping[str, Any]] = {"updates": 2, "sampling_steps": 2, "lr": 1e-3, "prompt_rows": 3,
                                            "insertion": "inmidout", "prompt_lr": 1e-2}  # fmt: skip
    needs: ClassVar[tuple[str, ...]] = ("cross.k", "cross.v")

    not_joint: ClassVar[str] = (
        "a key's rows stand before projections that read the encoder's embeddings; in joint attention these read "
        "states of the text that change with time and depth, for which no fixed rows stand"
    )

    goal: Literal["hide", "remove"] = "hide"
    """"hide": with its key the concept comes back; "remove": the prompt is only an adversary, and no key is kept."""
    variant: Literal["x", "u"] = "x"
    """What is trained beside the prompt: cross-attention, or all but that, time embedding and output."""
    eta: float = 1.0
    """Strength of the negative guidance, as in `negative_guidance_target`."""
    keyed_weight: NotNegative = 0.1
    """Weight of the prediction with the prompt in the weights' loss: w_w of removal, lambda of hiding."""
    prompt_rows: Count = 10
    """m: rows of a concept's prompt."""
    insertion: Insertion = "mid"
    """Where the rows are read: by the cross-attention of the middle block, from there to the end, or everywhere."""
    updates: Count = 1000
    """Rounds of both steps."""
    lr: Positive = 1e-5
    """Learning rate of Adam for the weights."""
    prompt_lr: Positive = 1e-5
    """Learning rate of Adam for the prompts; the published one hardly moves them."""
    batch: Count = 1
    """Latents in an update; they share the time."""
    checkpoint_every: Count = 50
    start_guidance: float = 3.0
    """Guidance under which the latents are sampled."""
    sampling_steps: Count = 50
    """S: DDIM steps of a whole trajectory."""
    space: Literal["x0", "network"] = "x0"
    """Errors are those of the clean latent, or of the network's own kind of prediction as in ESD."""

    def check(self, pipe: Any) -> None:
        super().check(pipe)
        if self.preserve:
            raise BadInput("no loss of KPOP's has a term for prompts to preserve: leave preserve out, or use ESD-x")

    def erased(self, pipe: Text2Image, folder: Path | None = None) -> tuple[Text2Image, dict[str, Any]]:
        """An ordinary pipeline that hides the concepts, and the losses.

        Saved, it has ``key.safetensors`` beside it (not with the goal "remove"): take that out of the folder before
        giving the folder away. ``sfumato sample``, ``audit`` and ``attack`` attach it with ``--adapter FILE``.
        """
        student, keys, losses = self.train(pipe, folder)
        if self.goal == "hide":
            student.companions.append(lambda out: save_keys(out / FILE, keys))
        return student, {"losses": losses}

    def train(
        self, pipe: Text2Image, folder: Path | None = None
    ) -> tuple[Text2Image, list[ConceptKey], dict[str, list[float]]]:
        """The pipeline that hides the concepts, the key of each, and the losses of both steps."""
        student = pipe.copy(own=SUBSETS[self.variant])
        recipe = Exchange(self, pipe, student)
        told = self.course(recipe, pipe, None if folder is None else folder / "training")
        base, rows = student.describe()["sha256"], [x.detach().cpu() for x in recipe.rows]
        keys = [ConceptKey(c, self.insertion, k, v, base) for c, k, v in zip(self.concepts, *rows, strict=True)]
        return student, keys, {name.removesuffix("/loss"): values for name, values in told.items()}

    def learning(self, pipe: Text2Image) -> Learning:
        """See `Eraser.learning`."""
        return Learning(2 * self.held(self.batch), SUBSETS[self.variant])

    def plan(self, pipe: Text2Image) -> Plan:
        """Memory and time, from one timed pass of the network."""
        width = inserted(pipe.anatomy, self.insertion)[0].module.to_k.in_features
        prompts = 2 * len(self.concepts) * self.prompt_rows * width
        trained = sum(p.numel() for p in pipe.parameters(SUBSETS[self.variant]).values()) + prompts
        passes = self.updates * self.batch * (self.sampling_steps - 1 + 2 + 9)
        title = f"KPOP: {', '.join(self.concepts)}, {counted(self.updates, 'update')}"
        return make_plan(pipe, title, trained, passes)


class Exchange(InTurns):
    """Prompts and weights in turns, as the loop sees them.

    Attributes:
        rows: the prompts' rows for keys and for values, each (concept, row, width).
    """

    def __init__(self, method: KPOP, teacher: Text2Image, student: Text2Image):
        m = self.method = method
        self.student = student
        self.concept = encode_words(teacher, list(m.concepts))
        self.neutral = teacher.encode([m.anchor_for(i, "") for i in range(len(m.concepts))])
        names = {site.name for site in inserted(student.anatomy, m.insertion)}
        self.inside = lambda site: site.name in names
        generator, read = torch.Generator().manual_seed(m.seed), teacher.text_rows(self.concept).float()
        words = [x[roles == Role.WORD] for x, roles in zip(read, self.concept.roles, strict=True)]
        start = lambda: torch.stack([first_rows(w, m.prompt_rows, 1e-3, generator) for w in words])
        self.rows = [nn.Parameter(start()) for _ in ("key", "value")]
        modules = {"trained": student.network, "prompts": Loose(dict(zip(("key", "value"), self.rows, strict=True)))}
        adam = partial(torch.optim.Adam, betas=m.betas, eps=m.eps, weight_decay=m.weight_decay)
        turns = [
            Turn(name="transfer", loss=self.transfer_loss, trains=("prompts",), optimizer=adam, lr=m.prompt_lr),
            Turn(name=m.goal, loss=self.weights_loss, trains=("trained",), optimizer=adam),
        ]
        super().__init__("kpop", m.concepts, teacher, modules, turns)

    def acting(self, which: Tensor) -> AbstractContextManager[None]:
        """In the block the student reads the prompts of these concepts, one for each row of the batch."""
        dtype, (keys, values) = self.student.dtype, self.rows
        extend = lambda site, k, v: extended(site.module, k, v, keys[which].to(dtype), values[which].to(dtype))
        return self.student.edit_attention(extend, "cross", self.inside, "kv")

    def transfer_loss(self, batch: dict[str, Any], rng: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """What the student with the prompt lacks of the original's concept."""
        z, t, which, original, _ = batch["drawn"] = self.drawn(batch["step"], slice(rng.rows.start, rng.rows.stop))
        with self.acting(which):
            keyed = self.student.denoiser(z, t, self.concept[which])
        return mse_loss(self.measured(keyed, z, t), original), {}

    def weights_loss(self, batch: dict[str, Any], rng: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """What the student has of the concept without the prompt, and has or lacks of it with the prompt."""
        (z, t, which, original, target), m = batch["drawn"], self.method
        bare = self.measured(self.student.denoiser(z, t, self.concept[which]), z, t)
        with self.acting(which):
            keyed = self.measured(self.student.denoiser(z, t, self.concept[which]), z, t)
        if m.goal == "remove":
            return removal_loss(bare, keyed, target, m.keyed_weight), {}
        return hiding_loss(bare, keyed, target, original, m.keyed_weight), {}

    @torch.no_grad()
    def drawn(self, step: int, share: slice) -> tuple[Tensor, float, Tensor, Tensor, Tensor]:
        """Latents, their time, which concept each is of, and the original's prediction of it and the target there."""
        m, generator = self.method, step_generator(self.method.seed, step)
        which = torch.randint(len(self.concept), (m.batch,), generator=generator)
        i, starts = uniform(m.sampling_steps, generator), seeds(m.batch, generator)[share]
        which = which[share]
        guidance = {"cfg_scale": m.start_guidance, "negative": self.pipe.unconditional()}
        steps = {"sampling_steps": m.sampling_steps, "stop_after": i}
        z, t = self.student.trajectory(self.concept[which], starts, **steps, **guidance)
        told = predict_each(self.pipe, z, t, [self.neutral[which], self.concept[which]])
        e0, ec = (self.measured(x, z, t) for x in told)
        return z, t, which, ec, negative_guidance_target(e0, ec, m.eta)

    def measured(self, prediction: Tensor, z: Tensor, t: float) -> Tensor:
        """A prediction in the space in which errors are squared."""
        denoiser = self.pipe.denoiser
        if self.method.space == "network":
            return prediction
        return denoiser.process.convert(prediction, z, t, denoiser.prediction, "x0")
