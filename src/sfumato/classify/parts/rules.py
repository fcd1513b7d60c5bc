"""How classifiers are updated: optimisers, and batch normalisation under averaged weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sfumato.train.schedule import Schedule

Rule = Literal["adamw", "sgd", "rmsprop"]


class TensorFlowRMSprop(torch.optim.Optimizer):
    """RMSProp as TensorFlow has it: s <- a s + (1 - a) g^2 from s = 1; m <- b m + lr g / sqrt(s + eps); w <- w - m.

    torch's adds eps outside the root and starts at 0, which with eps = 1 is another method. The learning rate is
    inside the momentum, so that its changes reach what has gathered slowly. Weight decay is added to the gradient.
    """

    def __init__(
        self, params: Any, lr: float, alpha: float = 0.9, eps: float = 1.0, momentum: float = 0.0,
        weight_decay: float = 0.0,
    ):  # fmt: skip
        settings = {"lr": lr, "alpha": alpha, "eps": eps, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad + group["weight_decay"] * p if group["weight_decay"] else p.grad
                state = self.state[p]
                if not state:
                    state["square"], state["momentum"] = torch.ones_like(p), torch.zeros_like(p)
                state["square"].lerp_(g.square(), 1 - group["alpha"])
                step = group["lr"] * g / (state["square"] + group["eps"]).sqrt()
                p.sub_(state["momentum"].mul_(group["momentum"]).add_(step))


def updating(rule: Rule, schedule: Schedule, momentum: float) -> Callable[..., torch.optim.Optimizer]:
    """The optimiser ``rule`` with the settings of ``schedule``, and weight decay on matrices and kernels only."""
    makes: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adamw": partial(torch.optim.AdamW, betas=schedule.betas, eps=schedule.eps),
        "sgd": partial(torch.optim.SGD, momentum=momentum, nesterov=momentum > 0),
        "rmsprop": partial(TensorFlowRMSprop, alpha=schedule.betas[1], eps=schedule.eps, momentum=momentum),
    }

    def make(params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
        # neighbours only, for a checkpoint knows moments by the parameters' order
        runs = groupby(params, key=lambda p: p.ndim > 1)
        groups = [{"params": list(g), "weight_decay": schedule.weight_decay if wide else 0.0} for wide, g in runs]
        return makes[rule](groups, lr=lr)

    return make


@torch.no_grad()
def averaged_statistics(net: nn.Module, batches: Iterable[Tensor]) -> None:
    """Measure the statistics of batch normalisation anew: the plain mean of those of ``batches``; all else at rest."""
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    device, before = next(net.parameters()).device, [m.momentum for m in norms]
    net.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for x in batches:
        net(x.to(device))
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
        norm.eval()
