"""DUO: a LoRA that prefers pictures without the concept to the same pictures with it (arXiv:2407.21035)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, mse_loss

from sfumato.errors import BadInput
from sfumato.fields import Count, NotNegative, Positive, Share, more_than
from sfumato.files import contact_sheet
from sfumato.metrics.detectors import Detector, make_detector
from sfumato.noise.process import Prediction, compose
from sfumato.pipeline import Model, Text2Image
from sfumato.pipeline.adapter import Adapter
from sfumato.pipeline.backward import Learning
from sfumato.text import counted
from sfumato.train.recipe import Loose

from .parts.finetune import ALL, ByGradient, Finetuning, StepLoss, make_plan
from .parts.lora_files import Lora, write_loras
from .parts.pairs import Pairs, draw_pairs, read_pairs

if TYPE_CHECKING:
    from sfumato.plan import Plan

def improvement(
    pred: Float[Tensor, "batch *dims"], reference: Float[Tensor, "batch *dims"], target: Float[Tensor, "batch *dims"]
) -> Float[Tensor, "batch"]:
    """d(x0, t) = mean (pred - target)^2 - mean (reference - target)^2: how much worse than the reference (< 0: better).

    The means are over all elements of a picture; a sum over them would ask for a beta divided by their number.
    """
    errors = [(x - target).square().flatten(1).mean(dim=1) for x in (pred, reference)]
    return errors[0] - errors[1]


def preference_loss(
    preferred: Float[Tensor, "batch"], rejected: Float[Tensor, "batch"], beta: float
) -> Float[Tensor, ""]:
    """-mean log sigmoid(-beta (d+ - d-)): Diffusion-DPO's loss (arXiv:2311.12908, eq. 14) of two `improvement`s."""
    return -logsigmoid(-beta * (preferred - rejected)).mean()


def duo_loss(
    pred: Float[Tensor, "rows *dims"],
    reference: Float[Tensor, "rows *dims"],
    target: Float[Tensor, "two_batch *dims"],
    beta: float,
    preserve_weight: float,
) -> Float[Tensor, ""]:
    """L_DPO + lambda L_OP (arXiv:2407.21035): preference, and output preservation on pure noise.

    Args:
        pred: with the adapter: first of the noised pictures with the concept, then of those without, then of noise.
        reference: the same without the adapter.
        target: what would be right for the pictures.
        preserve_weight: lambda, of the mean squared difference on noise.
    """
    n = len(target)
    rejected, preferred = improvement(pred[:n], reference[:n], target).chunk(2)
    return preference_loss(preferred, rejected, beta) + preserve_weight * mse_loss(pred[n:], reference[n:])


def scaled(lr: float, preserve_weight: float, beta: float) -> tuple[float, float]:
    """The learning rate and lambda that belong to ``beta``, from those of beta = 100: lr 100 / beta, lambda beta / 100.

    The gradient of the preference grows with beta, and so both keep their proportion to it.
    """
    return lr * 100 / beta, preserve_weight * beta / 100


@dataclass(frozen=True, kw_only=True)
class DUO(ByGradient):
    """Direct unlearning optimisation (arXiv:2407.21035): preference for a picture without the concept to its twin with.

    For each concept, pairs are made first: the model draws the concept, and SDEdit redraws the picture towards
    ``anchors`` and away from the concept, so that the two share all else; or they are the user's (``data``). Then a
    low-rank adapter on the attention among the picture's own tokens learns `duo_loss`, always told the empty prompt:
    what is unlearned is how the concept looks, not a reaction to its name, so that no wording brings it back. The two
    members of a pair share their noise, and each has a time of its own, as in the paper's code (``shared_timestep``:
    one for both, as in Diffusion-DPO). Concepts have adapters of their own, which act together at strength 1.

    Beta is the price of drifting: small forgets more and changes more. Learning rate and lambda follow it (`scaled`).

    Cost per update and pair: three rows through the base network and three through the adapted one, forward and
    backward. Before that, some 1.75 guided samplings a pair, and as many again for each that the detector rejects.

    Differs from the published code: pairs are drawn with replacement; edits start from the autoencoder's mean; pictures
    are cut to their central square, where its random cut is another one for each member; the times of flows go by
    sigma, uniform up to ``t_max``, with sigma = 1 for output preservation (its script reads a falling table by rising
    indices, so that it trains at the noisy end and preserves at the clean one); ``preserve`` adds such prompts to the
    empty one in output preservation; ``tries`` is limited. Published defaults are the code's for Stable Diffusion 1.4.
    """

    GRID: ClassVar[Mapping[str, Sequence[Any]]] = {
        "lr": (1e-4, 2e-4, 4e-4), "beta": (10.0, 20.0, 50.0), "updates": (200, 400),
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "stronger": {"beta": 250.0},
        "composite": {"beta": 1000.0, "updates": 500, "pairs": 32, "strength": 0.8},
        "sd3": {"lr": 3e-5},
        "sketch": {
            "beta": 10.0, "updates": 400, "lr": 2e-4, "preserve_weight": 100.0, "t_min": 0.4, "pairs": 48,
            "sampling_steps": 20, "detector": "world",
        },
    }  # fmt: skip
    """Settings by name: the published ones for one concept (which are the defaults), with stronger forgetting, for each
    of several concepts that make up a diffuse one, and for SD3; and some for models as small as the embedded one."""

    removable: ClassVar[bool] = True
    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        "updates": 2, "pairs": 1, "sampling_steps": 2, "batch": 1, "beta": 100.0, "lr": 1e-2, "rank": 2,
        "preserve_weight": 1.0,
    }  # fmt: skip

    beta: Positive = 500.0
    """Strength of the tie to the reference in the preference."""
    lr: Positive = 3e-4
    """Learning rate of AdamW at beta = 100; see `scaled`."""
    preserve_weight: NotNegative = 1e6
    """lambda at beta = 100, weight of output preservation; it multiplies a very small mean square. See `scaled`."""
    rank: Count = 32
    """Rank of each adapter."""
    alpha: Positive = 32.0
    """An adapter adds alpha / rank times the product of its factors."""
    updates: Count = 1000
    """Updates for each concept."""
    batch: Count = 4
    """Pairs in an update."""
    weight_decay: NotNegative = 1e-2
    clip_norm: NotNegative = 1.0
    t_min: Share = 0.0
    """Least time at which pictures are compared. Above 0 for the embedded model, whose erasing hung on the seed."""
    t_max: Share = 0.75
    """Greatest such time. Beyond the strength of the edit a pair cannot be told apart."""
    shared_timestep: bool = False
    """Give both members of a pair the same time."""
    space: Literal["auto", "native", "x0"] = "auto"
    """What predictions are compared as: in the network's own kind, or as clean pictures. "auto": x0 for flows, as the
    published script for SD3 does, and the native kind for all others."""

    data: tuple[str, ...] = ()
    """Folders of pairs to use instead of drawing them, one for each concept, with subfolders with/ and without/."""
    pairs: Count = 64
    """Pairs to draw for each concept."""
    templates: tuple[str, ...] = ("{}",)
    """Prompts of the pairs in turn, with {} where the concept stands, and then its anchor (default: nothing)."""
    strength: Annotated[Share, more_than(0)] = 0.75
    """How much of the picture the edit draws anew; the published code takes 0.8 for diffuse concepts."""
    sampling_steps: Count = 50
    """Steps of a drawing; an edit takes the share ``strength`` of them."""
    cfg_scale: float | None = None
    """Guidance of drawing and editing (7.5 in the paper); by default the model's own."""
    detector: str = ""
    """Who says whether the concept is in a picture, as for `sfumato audit`: pictures without it, and edits with it, are
    drawn again. Empty: nobody."""
    tries: Count = 10
    """How often one is drawn at most; a pair that fails to the last is left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.t_min >= self.t_max:
            raise BadInput(f"t_min must be less than t_max, got {self.t_min} and {self.t_max}")
        if len(self.data) not in (0, len(self.concepts)):
            raise BadInput(f"give one folder of pairs per concept: got {len(self.data)} for {len(self.concepts)}")
        if not self.templates or any("{}" not in t for t in self.templates):
            raise BadInput("a template needs {} where the concept stands, as in templates=['a photo of {}']")

    def check(self, pipe: Model) -> None:
        super().check(pipe)
        if not self.data and (judge := self.judge()) is not None:
            for concept in self.concepts:
                judge.check(concept)

    def judge(self) -> Detector | None:
        """Who looks at the pairs."""
        named = [*self.concepts, *self.anchors]
        return make_detector(self.detector, list(dict.fromkeys(named))) if self.detector else None

    def erased(self, pipe: Text2Image, folder: Path | None = None) -> tuple[Text2Image, dict[str, Any]]:
        """The pipeline with the adapters attached; its own weights are those of ``pipe``.

        Saved, it becomes a plain diffusers folder with the adapters merged, and beside that ``lora/``: a file for each
        concept, for ``pipe.load_lora_weights`` and `Text2Image.load_adapter`, and pictures of its pairs.
        """
        made = pipe.copy()
        beside: list[Lora] = []
        log: dict[str, Any] = {"losses": {}, "pairs": {}, "drawn": {}, "edited": {}}
        for index, concept in enumerate(self.concepts):
            place = None if folder is None else folder / str(index)
            pairs = self.pairs_of(pipe, index, place)
            trained, log["losses"][concept] = self.train_one(pipe, index, pairs, place)
            adapter = made.add_adapter(f"duo.{index}", self.rank, self.alpha, sorted(trained.layers))
            adapter.load_state_dict(trained.state_dict())
            log["pairs"][concept], (log["drawn"][concept], log["edited"][concept]) = len(pairs), pairs.drawn
            beside.append(Lora(concept, adapter, contact_sheet(pairs.sheet(), columns=8)))
        made.companions.append(lambda saved: write_loras(saved, beside))
        return made, log

    def pairs_of(self, pipe: Text2Image, index: int, folder: Path | None = None) -> Pairs:
        """The pairs for concept number ``index``; drawn ones are kept in ``folder``.

        Raises:
            BadInput: as `read_pairs` and `draw_pairs`; the folder holds pairs of other settings, or of another model.
        """
        if self.data:
            return read_pairs(Path(self.data[index]), pipe.size)
        file = None if folder is None else folder / "pairs.safetensors"
        made = {} if file is None else self.making(pipe, index)
        if file is not None and file.exists():
            return Pairs.load(file, made)
        concept, anchor, judge = self.concepts[index], self.anchor_for(index, ""), self.judge()
        pairs = draw_pairs(
            pipe,
            [t.replace("{}", concept) for t in self.templates],
            [" ".join(t.replace("{}", anchor).split()) for t in self.templates],
            self.pairs,
            torch.Generator().manual_seed(self.seed),
            strength=self.strength,
            sampling_steps=self.sampling_steps,
            cfg_scale=self.cfg_scale,
            seen=None if judge is None else lambda x: judge(x, concept).present.cpu(),
            tries=self.tries,
        )
        if file is not None:
            pairs.save(file, made)
        return pairs

    def making(self, pipe: Text2Image, index: int) -> dict[str, Any]:
        """All that drawn pairs of concept number ``index`` depend on."""
        named = ("templates", "pairs", "strength", "sampling_steps", "cfg_scale", "detector", "tries", "seed")
        own = {"concept": self.concepts[index], "anchor": self.anchor_for(index, "")}
        return {**own, **{name: getattr(self, name) for name in named}, "model": pipe.describe()["sha256"]}

    def train_one(
        self, pipe: Text2Image, index: int, pairs: Pairs, folder: Path | None = None
    ) -> tuple[Adapter, list[float]]:
        """The trained adapter of concept number ``index``, on a copy of ``pipe``, and the loss of each update."""
        student = pipe.copy()
        adapter = fresh_adapter(student, self.rank, self.alpha, torch.Generator().manual_seed(self.seed))
        rate, _ = scaled(self.lr, self.preserve_weight, self.beta)
        recipe = Finetuning(
            "duo",
            self.concepts[index : index + 1],
            pipe,
            Loose({f"{name}.{w}": getattr(adapter, w)[name] for w in ("down", "up") for name in adapter.layers}),
            self.loss(pipe, student, pairs),
            self.seed,
            partial(torch.optim.AdamW, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay),
            rate,
        )
        return adapter, self.fit(recipe, None if folder is None else folder / "training")

    def loss(self, base: Text2Image, student: Text2Image, pairs: Pairs) -> StepLoss:
        """The loss of one step as a function of the step's generator. Pictures and prompts are encoded here, once."""
        with torch.no_grad():
            parts = [base.codec.posterior(x.to(base.device)) for x in pairs.both().split(16)]
        mean, std = (torch.cat(x) for x in zip(*parts, strict=True))
        told = base.encode(["", *(self.preserve or ())])
        process, kind, T = base.process, base.prediction, base.clock.timesteps
        low = min(round(self.t_min * T), T - 1)  # a t_min next to 1 is the last timestep, not one beyond it
        high = max(round(self.t_max * T), low + 1)
        space: Prediction = "x0" if self.space == "x0" or (self.space == "auto" and kind == "flow") else kind
        _, weight = scaled(self.lr, self.preserve_weight, self.beta)
        kept = len(told) - 1

        def loss_of(generator: torch.Generator, share: slice = ALL) -> Tensor:
            rows = torch.randint(len(pairs), (self.batch,), generator=generator)
            steps = torch.randint(low, high, (2, self.batch), generator=generator)
            if self.shared_timestep:
                steps = steps[:1].expand(2, -1)
            noise, first, second = torch.randn(3, self.batch, *mean.shape[1:], generator=generator)
            some = torch.randint(1, kept + 1, (self.batch,), generator=generator) if kept else rows[:0]
            rows, noise, some = rows[share], noise[share].to(mean), some[share]
            times = ((steps[:, share].flatten().double() + 1) / T).to(mean.device)
            both = torch.cat([rows, rows + len(pairs)])
            x = mean[both] + std[both] * torch.cat([first[share], second[share]]).to(mean)
            eps = noise.repeat(2, 1, 1, 1)
            pure = noise.repeat(2 if kept else 1, 1, 1, 1)
            z = torch.cat([process.diffuse(x, times, eps), pure])
            t = torch.cat([times, times.new_ones(len(pure))])
            cond = told[torch.cat([torch.zeros(len(both) + len(noise), dtype=torch.long), some])]
            with torch.no_grad():
                reference = base.denoiser(z, t, cond)
            pred = student.denoiser(z, t, cond)
            alpha, sigma = process.alpha_sigma(times, x)
            target = compose(x, eps, alpha, sigma, space)
            pred, reference = (process.convert(p, z, t, kind, space) for p in (pred, reference))
            return duo_loss(pred, reference, target, self.beta, weight)

        return loss_of

    def learning(self, pipe: Text2Image) -> Learning:
        """See `Eraser.learning`."""
        return Learning(self.held(self.batch) * (4 if self.preserve else 3), "lora", self.rank)

    def plan(self, pipe: Text2Image) -> Plan:
        """Memory and time, from one timed pass of the network; without what a detector rejects."""
        scratch = fresh_adapter(pipe.copy(), self.rank, self.alpha, torch.Generator())
        trained = sum(p.numel() for p in scratch.parameters())
        guided = 0.0 if self.data else 2 * self.pairs * self.sampling_steps * (1 + self.strength)
        passes = len(self.concepts) * (guided + self.updates * self.batch * 4 * (4 if self.preserve else 3))
        title = f"DUO: {', '.join(self.concepts)}, {counted(self.updates, 'update')} each"
        return make_plan(pipe, title, trained, passes)


def fresh_adapter(pipe: Text2Image, rank: int, alpha: float, generator: torch.Generator) -> Adapter:
    """An adapter on the picture's own attention that changes nothing yet: down normal with deviation 1 / rank, up zero.

    That is all of self-attention, and where attention is joint the layers that only the picture's rows pass. Where
    text and picture pass the same ones (Flux's single blocks, Z-Image) it acts on both.
    """
    kinds = [kind for kind in pipe.anatomy.kinds if kind.startswith(("self.", "joint."))]
    adapter = pipe.add_adapter("duo", rank, alpha, kinds, generator)
    with torch.no_grad():
        for x in adapter.down.values():
            x.copy_(torch.randn(x.shape, generator=generator) / rank)
    return adapter
