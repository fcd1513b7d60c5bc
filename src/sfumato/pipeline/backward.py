"""What one backward pass through a network holds in memory, traced on the meta device: no weights, no arithmetic.

The network's own forward and backward pass run there on tensors that have shapes and no numbers; what is alive is added
up, storage by storage. Attention is taken to be fused, as on any recent card and on the CPU (it keeps queries, keys,
values, its output and one number a row, and no softmax). What an allocator rounds up or keeps in reserve, the workspace
of convolutions, and the context of the driver (some hundred megabytes) come on top.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from .base import Text2Image


@dataclass(frozen=True)
class Learning:
    """What one step of a method differentiates.

    Attributes:
        rows: rows of the denoising network whose activations are held at once.
        trained: a subset as in `Text2Image.parameters`; "lora": an adapter on all layers inside the transformer blocks;
            names of the network's parameters; or "none": the gradient goes to what the network reads.
        rank: of that adapter.
        copies: of the trained weights, all with gradients and an optimiser's state.
        gradients: how many gradients of what is trained are there at once.
    """

    rows: int
    trained: str | frozenset[str] = "none"
    rank: int = 1
    copies: int = 1
    gradients: int = 1

    def numbers(self, pipe: Text2Image) -> int:
        """How many are trained in a copy."""
        if self.trained == "none":
            return 0
        if self.trained == "lora":
            return sum(p.numel() for p in pipe.copy().add_adapter("scratch", rank=self.rank).parameters())
        if isinstance(self.trained, frozenset):
            return sum(p.numel() for name, p in pipe.parameters("full").items() if name in self.trained)
        return sum(p.numel() for p in pipe.parameters(self.trained).values())


def activations(pipe: Text2Image, learning: Learning, checkpointing: bool = False) -> int:
    """The most bytes that are alive in a forward and backward pass beside weights, gradients and optimiser.

    In the precision of the network's weights, at the model's own size of pictures.

    Args:
        checkpointing: activations are computed again in the backward pass.

    Cost: some seconds, whatever the size of the numbers; a copy of what is trained, where weights are there.
    """
    adapted = learning.trained == "lora"
    own = None if learning.trained in ("none", "lora") else learning.trained
    student = pipe.copy(own=sorted(own) if isinstance(own, frozenset) else own)
    network, dtype = student.network.to("meta"), student.dtype
    if checkpointing:
        network.enable_gradient_checkpointing()
    trained = list(student.add_adapter("scratch", rank=learning.rank).parameters() if adapted else network.parameters())
    for p in (p for p in trained if p.requires_grad):
        p.register_post_accumulate_grad_hook(_drop)  # gradients are counted apart
    told = pipe.unconditional(1).map(lambda x: x.to("meta").expand(learning.rows, *x.shape[1:]))
    told = told.replace(tokens=told.tokens.to(dtype).clone().requires_grad_(learning.trained == "none"))
    z = torch.empty(learning.rows, *student.latent_shape(), device="meta", dtype=dtype)
    number = torch.zeros(learning.rows, device="meta")
    # On meta tensors torch would write the softmax out; a mode for functions would not reach what is recomputed.
    with patch.object(torch.nn.functional, "scaled_dot_product_attention", _fused), Alive() as alive:
        student.anatomy.call(z, number, told).float().square().mean().backward()
    return alive.peak


def _drop(p: Tensor) -> None:
    p.grad = None


class Alive(TorchDispatchMode):
    """Counts the bytes of the storages that are made in the block, while they are there.

    Attributes:
        live: now.
        peak: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given: list[int] = []
        tree_map_only(Tensor, lambda x: given.append(x.untyped_storage()._cdata), (args, kwargs or {}))
        tree_map_only(Tensor, lambda x: self._see(x, given), out)
        return out

    def _see(self, x: Tensor, given: list[int]) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._known or key in given:  # a view, or changed in place
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _Attention(torch.autograd.Function):
    """Shapes of fused attention: what it keeps for its backward pass, and what that makes."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _fused(query: Tensor, key: Tensor, value: Tensor, *others: Any, **settings: Any) -> Any:
    if key.shape[1] != query.shape[1]:  # grouped queries
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return _Attention.apply(query, key, value)
