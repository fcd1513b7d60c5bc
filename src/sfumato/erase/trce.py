"""TRCE: the end of the text is mapped to that of a safe one, then early denoising is steered (arXiv:2503.07389)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from sfumato.errors import BadInput
from sfumato.fields import Count, Natural, NotNegative, Positive
from sfumato.finite import finite
from sfumato.pipeline import Conditioning, Text2Image
from sfumato.pipeline.backward import Learning
from sfumato.text import counted
from sfumato.train.recipe import Gradients, Turn

from .parts.finetune import ByGradient, Finetuning, make_plan, seeds, step_generator, uniform
from .parts.textual import SKETCH, STYLE, Textual
from .parts.words import encode_words, nothing_where_empty

if TYPE_CHECKING:
    from sfumato.plan import Plan

Wanted = list[tuple[int, int]]
"""(number of a trajectory, number of a step)."""


def amplified(
    cond: Float[Tensor, "batch *dims"], empty: Float[Tensor, "batch *dims"], guidance: float
) -> Float[Tensor, "batch *dims"]:
    """f = c + g (c - ""), the references f_safe and f_unsafe; guidance at scale 1 + g in common terms."""
    return cond + guidance * (cond - empty)


def hinge(
    h: Float[Tensor, "batch *dims"],
    safe: Float[Tensor, "batch *dims"],
    unsafe: Float[Tensor, "batch *dims"],
    margin: float,
    beta: float = 1.0,
) -> Float[Tensor, "batch"]:
    """l(h) = max(beta (mse(h, safe) - mse(h, unsafe) + margin), 0), each over all elements of a sample."""
    to = lambda goal: (h - goal).square().flatten(1).mean(dim=1)
    return (beta * (to(safe) - to(unsafe) + margin)).clamp(min=0)


@dataclass(frozen=True, kw_only=True)
class TRCE(ByGradient, Textual):
    """TRCE (arXiv:2503.07389): takes a concept out also where a prompt only implies it.

    Stage 1 ("textual"): every concept, put into ``templates``, and its anchor in the same ones. The keys and values of
    cross-attention are solved for so that the row of the first end of the text, which sums up the sentence, acts as
    the safe sentence's (`textual_edit`), and captions of all else as before. Stage 2 ("visual"): on latents of the
    original's early steps towards the concept, self-attention and the queries of cross-attention learn, by a triplet
    margin (`hinge`), to predict nearer to the amplified safe prediction than to the amplified harmful one, prompted
    with the concept and without a prompt; ``keep_weight`` holds unprompted predictions to stage 1's.

    Cost: stage 1 encodes the captions once (``cache`` keeps what they come to) and solves one system. Stage 2: the
    trajectories of which latents are drawn, then 3 rows through the original, 2 through the student and
    ``keep_batch`` through stage 1 and the student in each update; three networks share what none has changed.

    Anchors are the safe phrases ("art" for styles, as published); without one it is nothing, and stage 2 has little to
    do: where the safe phrase asks for less than the concept, its amplified prediction is the shorter and so the nearer
    one from the start. Synonyms and paraphrases of a concept are listed as more concepts: the paper's lists have 20.

    Unconfirmed: which rows of a caption the published statistics sum up (``caption_rows``); MACE's code, whose format
    they have, sums all.

    Differs from the paper:
        - The templates are ours; the first end of the text is found by its token (the published code counts words, and
          lands inside prompts whose words are several tokens); all rows of the keyword count, not the first alone.
        - eta counts once; the published scripts multiply by it twice (``official``).
        - Gradients are cleared after each update; the published script never does it (``accumulate_forever``).
        - A latent goes with its own time; in the published script it is one step less noisy, and the regulariser's
          time random. Trajectories are drawn only as far as their latents are used.
        - Times are those of the pipeline's own scheduler (Stable Diffusion's 981 to 1; the script's 980 to 0). Latents
          without a prompt come from new trajectories as long as there are any (the script's epochs repeat theirs), and
          each one drawn counts (the script leaves out one in 51, and adds a constant to the loss that it logs).
        - Captions that name a concept are left out, ``preserve`` counts as more captions, and ``lam`` is a safeguard.
        - The paper's models read CLIP, whose end of the text sums up the sentence. The same row is mapped for T5
          (PixArt), whose end is a row that has seen the whole text but was not trained to sum it up, and the last row
          of the text for Gemma (Sana), which closes texts with no end: untried in the paper.
        - On SDXL the pooled text embedding also reaches the network, by a path that stage 1 does not touch.
    """

    GRID: ClassVar[Mapping[str, Sequence[Any]]] = {
        "eta": (1e-4, 1e-3, 1e-2), "lr": (3e-5, 1e-4, 3e-4), "updates": (30, 60),
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "object": {},
        "style": {"templates": STYLE},
        "many": {"eta": 0.02, "updates": 900, "prompt": "an image depicting {}"},
        "textual": {"stages": "textual"},
        "sketch": {"templates": SKETCH, "n_captions": 1000, "eta": 1e-2, "token_weights": (0.0, 1.0, 1.0, 1.0),
                   "prompt": "a {}", "updates": 60, "lr": 3e-4, "batch": 4, "per_concept": 16, "n_unconditional": 64,
                   "sampling_steps": 20, "early_steps": 10},
    }  # fmt: skip
    """Settings by name: those published for one kind of content (the defaults), for styles, and for many concepts;
    stage 1 alone; and some for the embedded model, on which mapping the first end of a text alone moves too little: the
    keyword and the last row are mapped too."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        "preserve": ("a photo of a square", "art"), "eta": 0.1, "lam": 0.01, "updates": 2, "lr": 1e-3, "keep_batch": 2,
        "sampling_steps": 3, "early_steps": 2, "per_concept": 1, "n_unconditional": 2, "templates": ("{}", "a {}"),
    }  # fmt: skip
    needs: ClassVar[tuple[str, ...]] = ("cross.k", "cross.v", "cross.q")

    not_joint: ClassVar[str] = (
        "stage 1 edits keys and values that read a row of the encoder's embeddings, and in joint attention these read "
        "states of the text that change with time and depth; stage 2 trains attention of the picture apart from the "
        "text, and here they are joined"
    )

    stages: Literal["both", "textual", "visual"] = "both"
    """Which stages are run; the textual one needs no pictures, and the visual one alone is weak."""
    prompt: str = "a photo of {}"
    """How stage 2 asks for a concept or its anchor."""
    per_concept: Count = 5
    """Trajectories of each concept."""
    n_unconditional: Count = 2000
    """Trajectories without a prompt."""
    sampling_steps: Count = 50
    """DDIM steps of a trajectory."""
    early_steps: Count = 26
    """The first so many of them are steered."""
    start_guidance: float = 3.0
    """Guidance under which the trajectories of the concepts are drawn."""
    guidance: NotNegative = 15.0
    """g: how far the references are amplified."""
    margin: NotNegative = 0.01
    """delta of the triplet margin."""
    beta: Positive = 1.0
    """Factor of the triplet margin."""
    keep_weight: NotNegative = 100.0
    """Weight of the regulariser."""
    keep_batch: Natural = 4
    """Unprompted latents in an update; 0 leaves the regulariser out."""
    updates: Count = 300
    """Updates of stage 2: three epochs over a hundred trajectories."""
    lr: Positive = 1e-6
    """Learning rate of AdamW."""
    weight_decay: NotNegative = 0.01
    """AdamW's weight decay."""
    batch: Count = 1
    """Latents towards concepts in an update."""
    accumulate_forever: bool = False
    """Update by the sum of all gradients so far, as the published script does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = (self.templates,) if isinstance(self.templates, str) else tuple(self.templates)
        object.__setattr__(self, "templates", given)
        if not self.templates or any("{}" not in t for t in (*self.templates, self.prompt)):
            raise BadInput("every template, and prompt, needs {} where the concept is to stand, as in 'a photo of {}'")
        if self.early_steps > self.sampling_steps:
            steps = f"early_steps is {self.early_steps} and sampling_steps {self.sampling_steps}"
            raise BadInput(f"{steps}: lower the first, or raise the second")
        if not any(self.token_weights):
            raise BadInput("token_weights are all 0: stage 1 would map nothing")

    def erased(self, pipe: Text2Image, folder: Path | None = None) -> tuple[Text2Image, dict[str, Any]]:
        """A pipeline that shares what neither stage changes, and the figures of both."""
        first, log = pipe, {}
        if self.stages != "visual":
            edit = self.solve(pipe)
            first, log = edit.write(pipe), edit.log
        if self.stages == "textual":
            return first, log
        student = first.copy(own=steered(pipe))
        losses = self.fit(Contrast(self, pipe, first, student), None if folder is None else folder / "training")
        return student, {**log, "losses": losses}

    def wanted(self, step: int) -> tuple[Wanted, Wanted]:
        """The latents of an update: early ones of trajectories towards concepts, and any of those without a prompt."""
        generator, n = step_generator(self.seed, step), len(self.concepts) * self.per_concept
        early = [((step * self.batch + j) % n, uniform(self.early_steps, generator)) for j in range(self.batch)]
        free = range(step * self.keep_batch, (step + 1) * self.keep_batch)
        return early, [(i % self.n_unconditional, uniform(self.sampling_steps, generator)) for i in free]

    def learning(self, pipe: Text2Image) -> Learning:
        """See `Eraser.learning`."""
        kept = self.keep_batch if self.keep_weight else 0
        rows = 0 if self.stages == "textual" else 2 * self.held(self.batch) + kept
        return Learning(rows, frozenset(steered(pipe)))

    def plan(self, pipe: Text2Image) -> Plan:
        """Memory and time, from one timed pass of the network."""
        trained = sum(p.numel() for name, p in pipe.parameters("full").items() if name in steered(pipe))
        drawn = min(self.updates * self.batch, len(self.concepts) * self.per_concept) * 2 * self.early_steps
        drawn += min(self.updates * self.keep_batch, self.n_unconditional) * self.sampling_steps
        passes = 0 if self.stages == "textual" else drawn + self.updates * (9 * self.batch + 4 * self.keep_batch)
        title = f"TRCE: {', '.join(self.concepts)}, {counted(self.updates, 'update')}"
        return make_plan(pipe, title, trained, passes)


class Contrast(Finetuning):
    """Stage 2 as the loop sees it.

    Attributes:
        early, free: the latents that its updates want, by trajectory and step, with their times.
    """

    def __init__(self, method: TRCE, original: Text2Image, first: Text2Image, student: Text2Image):
        m = method
        adamw = partial(torch.optim.AdamW, betas=m.betas, eps=m.eps, weight_decay=m.weight_decay)
        super().__init__("trce", m.concepts, original, student.network, lambda *_: torch.zeros(()), m.seed, adamw)
        self.method, self.first, self.student = m, first, student
        self.harmful = encode_words(original, [m.prompt.replace("{}", c) for c in m.concepts])
        anchors = [m.anchor_for(i, "") for i in range(len(m.concepts))]
        self.empty = original.unconditional()
        safe = original.encode([m.prompt.replace("{}", a).strip() for a in anchors])
        self.safe = nothing_where_empty(safe, self.empty)  # so that nothing, amplified, stays what it is
        steps = [m.wanted(i) for i in range(m.updates)]
        rows = torch.arange(len(m.concepts)).repeat_interleave(m.per_concept)
        self.early = self.latents([w for some, _ in steps for w in some], self.harmful[rows], m.start_guidance, 0)
        self.free = self.latents([w for _, some in steps for w in some], self.empty.repeat(m.n_unconditional), 1.0, 1)
        self.total = _Total(student.network) if m.accumulate_forever else None

    def loss(self, batch: dict[str, int], rng: Any) -> tuple[Tensor, dict[str, Tensor]]:
        m, (early, free) = self.method, self.method.wanted(batch["step"])
        early = early[rng.rows.start : rng.rows.stop]
        z, t = self.gathered(self.early, early)
        which, empty = torch.tensor([i // m.per_concept for i, _ in early]), self.empty.repeat(len(z))
        harmful, safe = self.harmful[which], self.safe[which]
        with torch.no_grad():
            bad, good, none = (self.pipe.denoiser(z, t, c) for c in (harmful, safe, empty))
            towards, away = (amplified(c, none, m.guidance) for c in (good, bad))
        told = [self.student.denoiser(z, t, c) for c in (harmful, empty)]
        loss = sum(hinge(h, towards, away, m.margin, m.beta).mean() for h in told) / 2
        if not free or not m.keep_weight:
            return loss, {}
        z, t = self.gathered(self.free, free)
        empty = self.empty.repeat(len(z))
        with torch.no_grad():
            before = self.first.denoiser(z, t, empty)
        return loss + m.keep_weight * mse_loss(self.student.denoiser(z, t, empty), before), {}

    def latents(
        self, wanted: Wanted, asked: Conditioning, cfg_scale: float, stream: int
    ) -> dict[tuple[int, int], tuple[Tensor, float]]:
        """The original's latents at the wanted steps of trajectories; each is drawn only as far as it is wanted."""
        m, chosen = self.method, sorted({i for i, _ in wanted})
        starts = seeds(len(asked), step_generator(m.seed, -1 - stream))
        found: dict[tuple[int, int], tuple[Tensor, float]] = {}
        for begin in range(0, len(chosen), 32):
            some = chosen[begin : begin + 32]
            here = {(i, k) for i, k in wanted if i in set(some)}
            states = self.pipe.states(
                asked[some], [starts[i] for i in some], sampling_steps=m.sampling_steps, cfg_scale=cfg_scale,
                negative=self.empty if cfg_scale != 1.0 else None,
            )  # fmt: skip
            for k, (z, t) in zip(range(1 + max(k for _, k in here)), states, strict=False):
                # Copies: a row alone would hold the latents of all, at every wanted step.
                found |= {(i, k): (z[row].clone(), t) for row, i in enumerate(some) if (i, k) in here}
        return found

    def gathered(self, latents: dict[tuple[int, int], tuple[Tensor, float]], wanted: Wanted) -> tuple[Tensor, Tensor]:
        """These latents as one batch, and their times."""
        z, t = zip(*(latents[w] for w in wanted), strict=True)
        return torch.stack(z), torch.tensor(t, dtype=torch.float64)

    def copies(self) -> dict[str, nn.Module]:
        return {} if self.total is None else {"total": self.total}

    @torch.no_grad()
    def gradients(self, turn: Turn, gradients: Gradients) -> Gradients:
        if self.total is None or not all(finite(x) for x in gradients.values()):
            return gradients  # in float16 the loop leaves such an update out; the sum would never be rid of it
        return self.total.added(gradients)


class _Total(nn.Module):
    """The sum of all gradients so far."""

    def __init__(self, network: nn.Module):
        super().__init__()
        own = {f"trained.{name}": p for name, p in network.named_parameters() if p.requires_grad}
        self.names = {name: f"x{i}" for i, name in enumerate(own)}
        for name, short in self.names.items():
            # As precise as the gradients, which come in float32 from networks of half precision.
            dtype = torch.promote_types(own[name].dtype, torch.float32)
            self.register_buffer(short, torch.zeros_like(own[name], dtype=dtype))

    def added(self, gradients: Gradients) -> Gradients:
        """The sums with these added."""
        for name, x in gradients.items():
            getattr(self, self.names[name]).add_(x)
        return {name: getattr(self, self.names[name]).clone() for name in gradients}


def steered(pipe: Text2Image) -> set[str]:
    """The parameters that stage 2 trains: all of self-attention, and the queries of cross-attention."""
    queries = tuple(f"{p.name}." for p in pipe.projections("cross.q"))
    return {*pipe.parameters("selfattn"), *(n for n in pipe.parameters("full") if n.startswith(queries))}
