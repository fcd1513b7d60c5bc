"""Forgetting and retaining in turn or together: what is shown, how two gradients are balanced, when it is enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sfumato.data.cases import names
from sfumato.data.pictures import open_pictures, to_tensor
from sfumato.errors import BadInput
from sfumato.pipeline import Conditioning, Text2Image
from sfumato.train.recipe import Gradients, Loss, Turn
from sfumato.train.scale import LossScale

from .finetune import ALL, Finetuning, StepLoss, seeds, step_generator

Balance = Literal["sum", "alternate", "project"]
BATCH = 32
"""Pictures that are drawn or encoded together."""


@dataclass(frozen=True)
class Shown:
    """Clean latents, each with the prompt that it goes with."""

    latents: Float[Tensor, "n channel h w"]
    prompts: tuple[str, ...]

    def and_also(self, other: Shown) -> Shown:
        """These and the other's."""
        return Shown(torch.cat([self.latents, other.latents]), self.prompts + other.prompts)

    def noised(
        self, pipe: Text2Image, batch: int, generator: torch.Generator, share: slice = ALL
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Rows, and their latents, noise, training times and noisy latents, of the share of a batch."""
        T = pipe.clock.timesteps
        rows = torch.randint(len(self.latents), (batch,), generator=generator)[share]
        t = ((torch.randint(T, (batch,), generator=generator) + 1) / T)[share]
        eps = torch.randn(batch, *self.latents.shape[1:], generator=generator)[share].to(self.latents)
        x = self.latents[rows.to(self.latents.device)]
        return rows, x, eps, t, pipe.denoiser.process.diffuse(x, t.to(x.device), eps)


@torch.no_grad()
def drawn(pipe: Text2Image, prompts: Sequence[str], n: int, seed: int, **settings: Any) -> Shown:
    """``n`` latents that ``pipe`` draws for the prompts in turn; settings as for `Text2Image.trajectory`."""
    said = [prompts[i % len(prompts)] for i in range(n)]
    starts = seeds(n, torch.Generator().manual_seed(seed))
    draw = lambda i: pipe.trajectory(
        said[i : i + BATCH], starts[i : i + BATCH], stop_after=settings["sampling_steps"], **settings
    )[0]
    return Shown(torch.cat([draw(i) for i in range(0, n, BATCH)]), tuple(said))


@torch.no_grad()
def out_of(
    pipe: Text2Image, source: str, concepts: Sequence[str], n: int, seed: int
) -> tuple[Shown | None, Shown | None]:
    """Up to ``n`` pictures of ``source`` whose captions name a concept, and as many whose captions name none.

    Raises:
        BadInput: nothing is found there, or none of it has a caption.
    """
    found = open_pictures(source, pipe.size, seed=seed)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    sides: tuple[list[int], list[int]] = ([], [])
    for i in order:
        if caption := found.caption(i):
            side = sides[not any(names(caption, c) for c in concepts)]
            if len(side) < n:
                side.append(i)
        if min(map(len, sides)) == n:
            break
    if not any(sides):
        raise BadInput(f"no picture of {source} has a caption that says whether it shows {concepts[0]!r}: add captions")

    def shown(rows: list[int]) -> Shown:
        pictures = [to_tensor([found.picture(i) for i in rows[j : j + BATCH]]) for j in range(0, len(rows), BATCH)]
        latents = torch.cat([pipe.encode_image(x.to(pipe.device, pipe.dtype)) for x in pictures])
        return Shown(latents, tuple(found.caption(i) for i in rows))

    forget, retain = (shown(rows) if rows else None for rows in sides)
    return forget, retain


def encode_each(pipe: Text2Image, prompts: Sequence[str]) -> Conditioning:
    """One row a prompt; equal prompts are encoded once."""
    distinct = list(dict.fromkeys(prompts))
    cond = Conditioning.cat([pipe.encode(distinct[i : i + BATCH]) for i in range(0, len(distinct), BATCH)])
    return cond[[distinct.index(p) for p in prompts]]


def projected(forget: Gradients, retain: Gradients) -> Gradients:
    """g_F - min(0, <g_F, g_R>) / |g_R|^2 g_R, over all parameters together: it no longer opposes g_R."""
    both = [(g.double(), retain[name].double()) for name, g in forget.items() if name in retain]
    inner = sum((f * r).sum() for f, r in both)
    length = sum(r.double().square().sum() for r in retain.values())
    if not length or inner >= 0:
        return forget
    share = inner / length
    return {
        name: forget.get(name, 0) - (share * retain[name] if name in retain else 0)
        for name in dict.fromkeys([*forget, *retain])
    }


def saliency_mask(gradients: Mapping[str, Tensor], share: float) -> dict[str, Bool[Tensor, "..."]]:
    """True for the ``share`` of all numbers whose gradient is largest in size, and ties (arXiv:2310.12508)."""
    flat = torch.cat([g.detach().abs().flatten() for g in gradients.values()])
    n = max(1, math.ceil(share * len(flat)))
    threshold = flat.kthvalue(len(flat) - n + 1).values
    return {name: g.detach().abs() >= threshold for name, g in gradients.items()}


class Unlearning(Finetuning):
    """Two losses, one to forget and one to retain, as the loop sees them.

    Args:
        forget, retain: losses of a step, each with a generator of its own.
        weight: of the second.
        balance: "sum": one update by both; "project": the same, but with what opposes the second taken out of the
            first's gradient; "alternate": even updates by the first, odd ones by the second, each with an optimiser
            of its own.
        enough: asked every ``check_every`` updates whether to stop.
    """

    mask: Mapping[str, Tensor] | None = None
    """Which numbers may change, by the names of the parameters; None: all."""
    before: Mapping[str, Tensor] = {}
    """What the numbers that may not change go back to after each update, where a decay of the weights moves them."""

    def __init__(
        self,
        concepts: Sequence[str],
        pipe: Text2Image,
        module: nn.Module,
        forget: StepLoss,
        retain: StepLoss,
        seed: int,
        optimizer: Callable[..., torch.optim.Optimizer],
        weight: float,
        balance: Balance,
        enough: Callable[[], bool] | None = None,
        check_every: int = 1,
    ):
        super().__init__("integrity", concepts, pipe, module, forget, seed, optimizer)
        self.retained, self.weight, self.balance = retain, weight, balance
        self.goal, self.check_every = enough, check_every

    def turns(self) -> Sequence[Turn]:
        losses = {"forget": self._loss(self.step_loss, 0), "retain": self._loss(self.retained, 1, self.weight)}
        if self.balance != "alternate":
            return [Turn(name="all", loss=losses, optimizer=self.turn.optimizer)]
        return [
            Turn(name=name, loss=loss, optimizer=self.turn.optimizer, every=2, first=first)
            for first, (name, loss) in enumerate(losses.items())
        ]

    def combine(self, turn: Turn, gradients: dict[str, Gradients]) -> Gradients:
        if self.balance == "project":
            gradients = {**gradients, "forget": projected(gradients["forget"], gradients["retain"])}
        return super().combine(turn, gradients)

    def gradients(self, turn: Turn, gradients: Gradients) -> Gradients:
        mask = self.mask
        return gradients if mask is None else {name: g * mask[name] for name, g in gradients.items() if name in mask}

    def after_update(self, turn: Turn, step: int) -> None:
        for name, p in self._parameters().items() if self.before else ():
            if name in self.before:  # AdamW decays whatever has a gradient, be it zero
                p.copy_(torch.where(self.mask[name], p, self.before[name]))

    def enough(self, step: int) -> bool:
        return self.goal is not None and step > 0 and step % self.check_every == 0 and self.goal()

    def keep_to(self, share: float, steps: int, decays: bool = False) -> None:
        """From now on change only the ``share`` of the numbers that the forgetting moves most, by ``steps`` of it.

        Args:
            decays: the optimiser shrinks numbers without a gradient too; they are put back.
        """
        parameters, scale = self._parameters(), LossScale(self.dtype == torch.float16)
        total: dict[str, Tensor] = {}
        for step in range(steps):
            found = self._forgetting(parameters, step, scale)
            total = {name: total.get(name, 0) + found.get(name, 0) for name in dict.fromkeys([*total, *found])}
        self.mask = saliency_mask(total, share)
        if decays:
            self.before = {name: parameters[name].detach().clone() for name in self.mask}

    def _forgetting(self, parameters: dict[str, nn.Parameter], step: int, scale: LossScale) -> Gradients:
        """The gradient of the first loss, at least in float32: in half precision most of it would vanish unscaled."""
        while True:
            factor = scale.value
            (factor * self.step_loss(step_generator(self.seed, -2 - 2 * step))).backward()
            found = {}
            for name, p in parameters.items():
                if p.grad is not None:
                    found[name] = p.grad.to(torch.promote_types(p.grad.dtype, torch.float32)) / factor
                    p.grad = None
            if scale.value <= 1 or scale.sound(torch.stack([g.norm() for g in found.values()]).norm()):
                return found

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {f"trained.{name}": p for name, p in self.module.named_parameters() if p.requires_grad}

    def _loss(self, step_loss: StepLoss, which: int, weight: float = 1.0) -> Loss:
        def loss(batch: dict[str, int], rng: Any) -> tuple[Tensor, dict[str, Tensor]]:
            generator = step_generator(self.seed, 2 * batch["step"] + which)
            return weight * step_loss(generator, slice(rng.rows.start, rng.rows.stop)), {}

        return loss
