"""Score forgetting distillation as the training loop sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.pipeline import Condition
from sfumato.sample import Guided
from sfumato.train.draw import integers, normal, uniform
from sfumato.train.recipe import Gradients, Recipe, Turn

from .score_identity import (
    fake_score_loss,
    generated,
    pseudo_labels,
    score_identity_loss,
    sound,
    time_of,
    times_between,
)


class Forgetting(Recipe):
    """`sfumato.erase.sfd.SFD` as the loop sees it: a turn of the fake score, then one of the generator.

    Attributes:
        start, low, high: the times of the generator's noise, and between which the scores are compared.
        keep, forget: what remains is asked for by, and a concept by, with what overrides it.
    """

    name = "sfd"

    def __init__(self, method: Any, teacher: Any, fake: Any, generator: Any):
        self.method, self.teacher, self.fake, self.generator = method, teacher, fake, generator
        self.title = "erasing " + ", ".join(method.concepts)
        process = teacher.process
        self.start, self.low, self.high = (
            time_of(process, s) for s in (method.sigma_init, method.sigma_min, method.sigma_max)
        )
        self.keep, self.forget = method.remaining(teacher), method.forgotten(teacher)
        self.every = [*self.keep, *(asked for asked, _ in self.forget)]
        self.scales = method.guidance(teacher)
        self.classes = list(getattr(teacher, "labels", ()))
        self.judge = method.judge(self.classes)
        for model in (fake, generator) if method.dropout is not None else ():
            for layer in model.network.modules():
                if isinstance(layer, nn.Dropout):
                    layer.p = method.dropout

    @property
    def device(self) -> torch.device:
        return self.teacher.device

    def modules(self) -> dict[str, nn.Module]:
        return {"fake": self.fake.network, "generator": self.generator.network}

    def turns(self) -> Sequence[Turn]:
        m = self.method
        adam = partial(torch.optim.Adam, betas=m.betas, eps=m.eps, weight_decay=m.weight_decay)
        turn = partial(Turn, optimizer=adam, clip_value=m.clip_value)
        return [
            turn(name="fake", loss=self.fake_loss, trains=["fake"], lr=m.fake_lr, ema=0.0),
            turn(name="generator", loss=self.generator_loss, trains=["generator"]),
        ]

    def batch(self, step: int, rng: torch.Generator, size: int) -> dict[str, Any]:
        first = step < self.method.distill_updates
        return {"step": step, "remain": integers(len(self.every if first else self.keep), size, rng)}

    def gradients(self, turn: Turn, gradients: Gradients) -> Gradients:
        """Numbers that half precision has lost are put in bounds: NaN is 0, infinity 1e5."""
        return {name: g.nan_to_num(0.0, 1e5, -1e5) for name, g in gradients.items()}

    def learns(self, model: Any) -> None:
        """The one network that drops out in this turn: the other draws, or scores, as it is, like the teacher.

        Else equal scores that are told the same would differ, and their difference is what the generator follows.
        """
        if self.method.dropout is not None:
            for each in (self.fake, self.generator):
                each.network.train(each is model)

    def fake_loss(self, batch: dict[str, Any], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """r L_psi(c_r) + f L_psi(c_f)."""
        method = self.method
        self.learns(self.fake)

        def loss(asked: list[str], lost: bool) -> Tensor:
            with torch.no_grad():
                dropped = uniform(len(asked), rng) < method.unconditional
                cond = self.told(asked, dropped)
                x = generated(self.generator.denoiser, self.noise(asked, rng), self.start, cond)
            told = self.guided(self.fake, self.scales[0], cond, dropped, "fake training", lost, rng)
            rows = fake_score_loss(told, x, self.times(asked, rng), self.noise(asked, rng), cond)
            return sound(rows).sum() / len(asked)

        return self.total(batch, rng, loss, method.fake_remain_weight, method.fake_forget_weight)

    def generator_loss(self, batch: dict[str, Any], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """r L_sid(c_r, c_r) + f L_sid(c_o, c_f)."""
        method = self.method
        self.learns(self.generator)

        def loss(asked: list[str], lost: bool) -> Tensor:
            dropped = uniform(len(asked), rng) < method.unconditional
            cond = self.told(asked, dropped)
            x = generated(self.generator.denoiser, self.noise(asked, rng), self.start, cond)
            rows = score_identity_loss(
                self.guided(self.teacher, self.scales[2], cond, dropped, "teacher", lost, rng),
                self.guided(self.fake, self.scales[1], cond, dropped, "fake", lost, rng),
                x, self.times(asked, rng), self.noise(asked, rng),
                self.override(asked, dropped, rng) if lost else cond, cond,
                method.alpha, method.through_scores,
            )  # fmt: skip
            return sound(rows).sum() / len(asked)

        return self.total(batch, rng, loss, method.remain_weight, method.forget_weight)

    def total(
        self, batch: dict[str, Any], rng: torch.Generator, loss: Callable[..., Tensor], remain: float, forget: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of both losses; without the second in the first stage, which is plain distillation."""
        first = batch["step"] < self.method.distill_updates
        pool = self.every if first else self.keep
        parts = {"remain": loss([pool[i] for i in batch["remain"].tolist()], False)}
        sum_of = remain * parts["remain"]
        if forget and not first:
            rows = integers(len(self.forget), len(batch["remain"]), rng)
            self.lost = [self.forget[i] for i in rows.tolist()]
            parts["forget"] = loss(self.decorated([asked for asked, _ in self.lost], rng), True)
            sum_of = sum_of + forget * parts["forget"]
        return sum_of, {name: x.detach() for name, x in parts.items()}

    # What the networks are told

    @torch.no_grad()
    def told(self, asked: list[str], dropped: Tensor) -> Condition:
        """The condition, nothing where it is dropped."""
        cond, empty = self.teacher.told(asked), self.teacher.unconditional(len(asked))
        return cond.drop(dropped, empty) if dropped.any() else cond

    def decorated(self, asked: list[str], rng: torch.Generator) -> list[str]:
        """The prompts with a keyword before them, or after."""
        words = self.method.keywords
        if not words:
            return asked
        drawn, before = integers(len(words), len(asked), rng).tolist(), (uniform(len(asked), rng) < 0.5).tolist()
        return [
            f"{words[i]} {p}" if front else f"{p}, {words[i]}" for p, i, front in zip(asked, drawn, before, strict=True)
        ]

    def override(self, asked: list[str], dropped: Tensor, rng: torch.Generator) -> Any:
        """What the teacher is told of the pictures of concepts; a function of the fake score's x0 with a detector."""
        some = integers(len(self.keep), len(asked), rng).tolist()
        if (judge := self.judge) is None:
            named = [self.keep[i] if o is None else o for (_, o), i in zip(self.lost, some, strict=True)]
            return self.told(named, dropped)
        lost = [self.classes.index(concept) for concept in self.method.concepts]
        drawn = uniform(len(asked), rng) if self.method.override == "sampled" else None

        def chosen(x0: Tensor) -> Condition:
            pictures = ((self.teacher.decode_latents(x0) + 1) / 2).clamp(0, 1)
            logits = torch.stack([judge(pictures, label).score for label in self.classes], dim=1).log()
            return self.told([self.classes[i] for i in pseudo_labels(logits, lost, drawn).tolist()], dropped)

        return chosen

    def guided(
        self, model: Any, scale: float, cond: Condition, dropped: Tensor, place: str, lost: bool, rng: torch.Generator
    ) -> Any:
        """The model's denoiser with guidance, away from a negative prompt where it is to have one; what is asked for
        nothing has none."""
        if scale == 1:
            return model.denoiser
        empty = self.teacher.unconditional(len(cond))
        if lost and self.method.negative and place in self.method.negative_for:
            rows = integers(len(self.method.negative), len(cond), rng)
            empty = self.told([self.method.negative[i] for i in rows.tolist()], dropped)
        return Guided(model.denoiser, cond, empty, scale)

    # What is drawn

    def noise(self, asked: list[str], rng: torch.Generator) -> Tensor:
        return normal((len(asked), *self.teacher.latent_shape()), rng).to(self.teacher.device)

    def times(self, asked: list[str], rng: torch.Generator) -> Tensor:
        drawn = times_between(self.teacher.process, self.low, self.high, uniform(len(asked), rng))
        return drawn.to(self.teacher.device)
