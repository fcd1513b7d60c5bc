"""Layers whose weights get the gradient that would train their pre-activations (TrAct, arXiv:2410.23970).

With input rows a [b, n], weights W [m, n], pre-activations z = a W^T + bias and G = dL/dz, the change of W that comes
nearest, in ridge regression, to the step z - eta b G is -eta times

    G^T a (a^T a / b + lambda I)^-1,

which is given to the optimiser in place of G^T a. What a convolution's rows are: all patches of all pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sfumato.errors import BadInput

AT_ONCE = 2**24
"""Numbers of an unfolded input that are held at a time."""


def primal(
    plain: Float[Tensor, "*groups m n"], gram: Float[Tensor, "*groups n n"], damping: float
) -> Float[Tensor, "*groups m n"]:
    """``plain`` (gram + lambda I)^-1, solved in float64: ``plain`` is G^T a, ``gram`` a^T a / b. Cost: n^3 / 3."""
    eye = torch.eye(gram.shape[-1], dtype=torch.float64, device=gram.device)
    solved = torch.linalg.solve(gram.double() + damping * eye, plain.double(), left=False)
    return solved.to(plain.dtype)


def dual(
    plain: Float[Tensor, "*groups m n"], a: Float[Tensor, "*groups rows n"], damping: float
) -> Float[Tensor, "*groups m n"]:
    """The same through a system of as many unknowns as ``a`` has rows, for fewer rows than columns.

    With D = ``plain``, it is (D - D a^T (a a^T + lambda b I)^-1 a) / lambda.
    """
    wide, rows = a.double(), a.shape[-2]
    eye = torch.eye(rows, dtype=torch.float64, device=a.device)
    inside = torch.linalg.solve(wide @ wide.mT + damping * rows * eye, wide)
    solved = (plain.double() - plain.double() @ wide.mT @ inside) / damping
    return solved.to(plain.dtype)


def tract_gradient(
    a: Float[Tensor, "rows n"],
    g: Float[Tensor, "rows m"],
    damping: float = 0.1,
    form: Literal["auto", "primal", "dual"] = "auto",
) -> Float[Tensor, "m n"]:
    """G^T a (a^T a / b + lambda I)^-1, the gradient of the weights.

    Args:
        a: input rows; a layer of tokens or patches has each of them as a row.
        g: the loss's gradient by the pre-activations, 1/batch of a mean loss included.
        damping: lambda, in units of the input's variance; above 0.
        form: which system is solved, n x n or rows x rows; "auto": the smaller.
    """
    if not damping > 0:
        raise BadInput(f"damping must be above 0, got {damping}")
    if form == "dual" or (form == "auto" and len(a) < a.shape[1]):
        return dual(g.mT @ a, a, damping)
    return primal(g.mT @ a, a.mT @ a / len(a), damping)


class _Damped(torch.autograd.Function):
    """The weights as they are; on the way back their gradient becomes TrAct's, without a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, layer: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, plain: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            return ctx.layer.damped(plain, x), None, None


class _Tract:
    """What a wrapped layer has beyond a plain one."""

    damping: float
    together: bool
    rows: Callable[[Tensor], Float[Tensor, "groups rows n"]]
    """The layer's input as rows, in float32 at least; each kind of layer says how."""

    def gram(self, x: Tensor) -> Float[Tensor, "groups n n"]:
        """a^T a / b over the rows of ``x``, or with ``together`` over those of all processes; float64."""
        portion = max(1, AT_ONCE // max(1, self.rows(x[:1]).numel()))
        products, count = torch.zeros((), dtype=torch.float64, device=x.device), 0
        for part in x.split(portion):
            a = self.rows(part)
            products = products + (a.mT @ a).double()
            count += a.shape[1]
        if self.together and torch.distributed.is_available() and torch.distributed.is_initialized():
            sums = torch.cat([products.flatten(), products.new_tensor([count])])
            torch.distributed.all_reduce(sums)
            products, count = sums[:-1].view_as(products), int(sums[-1])
        return products / count

    def damped(self, plain: Tensor, x: Tensor) -> Tensor:
        """TrAct's gradient of the weights from the plain one, for the input ``x``."""
        first = self.rows(x[:1])
        groups, per, n = first.shape
        many = per * len(x) >= n or self.together
        by_group = plain.reshape(groups, -1, n)
        solved = primal(by_group, self.gram(x), self.damping) if many else dual(by_group, self.rows(x), self.damping)
        return solved.reshape(plain.shape)


class TractLinear(_Tract, nn.Linear):
    """A linear layer that `wrap` made."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, _Damped.apply(self.weight, input, self), self.bias)

    def rows(self, x: Tensor) -> Float[Tensor, "1 rows n"]:
        return _wide(x).reshape(1, -1, self.in_features)

    def damped(self, plain: Tensor, x: Tensor) -> Tensor:
        return super().damped(plain, x.reshape(-1, self.in_features))


class TractConv2d(_Tract, nn.Conv2d):
    """A convolution that `wrap` made, of whatever stride, padding, dilation and groups."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, _Damped.apply(self.weight, input, self), self.bias)

    def rows(self, x: Tensor) -> Float[Tensor, "groups rows n"]:
        """Patches, a group's channels apart; columns in the order of the kernel's weights."""
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        x = F.pad(_wide(x), self._reversed_padding_repeated_twice, mode=mode)
        size, stride, apart = self.kernel_size, self.stride, self.dilation
        columns = F.unfold(x, size, apart, 0, stride).unflatten(1, (self.groups, -1))  # batch groups n places
        return columns.permute(1, 0, 3, 2).flatten(1, 2)

    def damped(self, plain: Tensor, x: Tensor) -> Tensor:
        return super().damped(plain, x if x.ndim == 4 else x[None])


_KINDS: dict[type[nn.Module], type[Any]] = {nn.Linear: TractLinear, nn.Conv2d: TractConv2d}
_PLAIN: dict[type[Any], type[nn.Module]] = {made: plain for plain, made in _KINDS.items()}


def wrap(layer: nn.Module, damping: float = 0.1, together: bool = False) -> nn.Module:
    """``layer`` itself, whose weights get TrAct's gradient from now on; what it computes and its state dict stay.

    Args:
        layer: an `nn.Linear` or `nn.Conv2d` that sees standardised input.
        damping: lambda; above 0.
        together: average a^T a over all processes of the default group, not over this one's rows alone.

    Raises:
        BadInput: another layer, or ``damping`` is not above 0.
    """
    kind = type(layer)
    if kind in _PLAIN:
        kind = unwrap(layer).__class__
    if kind not in _KINDS:
        raise BadInput(f"TrAct cannot take a layer of type {kind.__name__}: give it an nn.Linear or nn.Conv2d")
    if not damping > 0:
        raise BadInput(f"damping must be more than 0, got {damping}")
    layer.__class__ = _KINDS[kind]
    layer.damping, layer.together = damping, together
    return layer


def unwrap(net: nn.Module) -> nn.Module:
    """``net`` itself, with every layer in it plain again, or that layer."""
    for layer in net.modules():
        if type(layer) in _PLAIN:
            layer.__class__ = _PLAIN[type(layer)]
            del layer.damping, layer.together
    return net


def first_layer(net: nn.Module, x: Tensor) -> tuple[str, nn.Module]:
    """The layer with weights that is called first when ``net`` is given ``x``, and its name; ``net`` stays as it is.

    Raises:
        BadInput: no layer in it has weights.
    """
    called: list[tuple[str, nn.Module]] = []

    class _Found(Exception):
        pass

    def note(name: str, layer: nn.Module) -> Any:
        def hook(*_: Any) -> None:
            called.append((name, layer))
            raise _Found

        return layer.register_forward_pre_hook(hook)

    leaves = [(name, m) for name, m in net.named_modules() if next(m.children(), None) is None]
    hooks = [note(name, m) for name, m in leaves if next(m.parameters(), None) is not None]
    try:
        with torch.no_grad():
            net(x)
    except _Found:
        return called[0]
    finally:
        for hook in hooks:
            hook.remove()
    raise BadInput("no layer of the network has weights: give one that has")


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
