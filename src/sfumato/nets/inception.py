"""Inception-v4, Inception-ResNet-v1 and -v2 (arXiv:1602.07261), as drawn there and as released.

A block is written as the paper draws it: "1x1 64 - 3x3 96" is a tower of two units, a kernel is height x width, "/2" a
stride of 2, which goes without padding as "V" does, "max" and "avg" pools of 3x3. A unit is a convolution without bias,
batch normalisation (eps 1e-3) and ReLU. Branches are joined in the order of the released weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import BadInput

Join = Literal["residual", "control", "concat"]
"""ReLU(x + s lin(inception(x))); the same parameters without the sum, ReLU(lin(inception(x))); or the branches alone,
side by side, as in the nets without residuals."""
PART = re.compile(r"(?:(\d)x(\d)|(max|avg))(/2)?(?: (\d+))?( V)?")


class Unit(nn.Module):
    """A convolution without bias, batch normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int], stride: int, padding: tuple[int, int]):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        return self.bn(self.conv(x)).relu()


class Cat(nn.Module):
    """Branches of one input, side by side; ``outputs`` channels."""

    def __init__(self, inputs: int, towers: Sequence[str], width: float = 1.0):
        super().__init__()
        made = [tower(inputs, text, width) for text in towers]
        self.branches = nn.ModuleList(branch for branch, _ in made)
        self.outputs = sum(outputs for _, outputs in made)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class Residual(nn.Module):
    """y = ReLU(x + s lin(inception(x))), lin a convolution of 1x1 with bias; nothing is normalised after the sum."""

    def __init__(self, inception: Cat, inputs: int, scale: float, skip: bool = True, activate: bool = True):
        super().__init__()
        self.inception, self.scale, self.skip, self.activate = inception, scale, skip, activate
        self.lin = nn.Conv2d(inception.outputs, inputs, 1)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        y = self.lin(self.inception(x))
        y = x + self.scale * y if self.skip else y
        return y.relu() if self.activate else y


def tower(inputs: int, text: str, width: float = 1.0) -> tuple[nn.Sequential, int]:
    """Layers after one another, and their outputs; "{A ; B}" at the end is a fork of towers."""
    text, _, fork = text.partition(" - {")
    layers: list[nn.Module] = []
    for part in text.split(" - "):
        found = PART.fullmatch(part)
        if found is None:
            raise ValueError(f"not a layer: {part!r}")
        high, wide, pool, halved, outputs, valid = found.groups()
        stride = 2 if halved else 1
        if pool == "max":
            layers.append(nn.MaxPool2d(3, stride))
        elif pool == "avg":
            layers.append(nn.AvgPool2d(3, 1, 1, count_include_pad=False))
        else:
            kernel, channels = (int(high), int(wide)), max(1, round(width * int(outputs)))
            padding = (0, 0) if valid or halved else (kernel[0] // 2, kernel[1] // 2)
            layers.append(Unit(inputs, channels, kernel, stride, padding))
            inputs = channels
    if fork:
        layers.append(last := Cat(inputs, fork.removesuffix("}").split(" ; "), width))
        inputs = last.outputs
    return nn.Sequential(*layers), inputs


@dataclass(frozen=True)
class Plan:
    """One of the nets: stem, blocks A, B and C, reductions, and how often each block comes."""

    stem: tuple[tuple[str, ...], ...]
    """Steps; of several towers, side by side. "/s" is a stride of 2 that small pictures do without."""
    a: tuple[str, ...]
    reduce_a: tuple[str, ...]
    b: tuple[str, ...]
    reduce_b: tuple[str, ...]
    c: tuple[str, ...]
    blocks: tuple[int, int, int]
    join: Join = "residual"
    scales: tuple[float, float, float] = (0.17, 0.10, 0.20)
    slim: bool = False
    """The last block has the scale 1 and no ReLU, and a unit of 1x1 1536 follows."""


def _reduce_a(k: int, l: int, m: int, n: int) -> tuple[str, ...]:  # noqa: E741 (the paper's letters)
    return f"3x3/2 {n}", f"1x1 {k} - 3x3 {l} - 3x3/2 {m}", "max/2"


_STEM_A = (
    ("3x3/s 32 V",), ("3x3 32 V",), ("3x3 64",), ("max/s", "3x3/s 96 V"),
    ("1x1 64 - 3x3 96 V", "1x1 64 - 1x7 64 - 7x1 64 - 3x3 96 V"), ("3x3/2 192", "max/2"),
)  # fmt: skip
_STEM_B = (("3x3/s 32 V",), ("3x3 32 V",), ("3x3 64",), ("max/s",), ("1x1 80",), ("3x3 192 V",))
_REDUCE_B = ("1x1 256 - 3x3/2 384", "1x1 256 - 3x3/2 288", "1x1 256 - 3x3 288 - 3x3/2 320", "max/2")
_B = ("1x1 192", "1x1 128 - 1x7 160 - 7x1 192")
_C = ("1x1 192", "1x1 192 - 1x3 224 - 3x1 256")
_A = ("1x1 32", "1x1 32 - 3x3 32", "1x1 32 - 3x3 48 - 3x3 64")

PLANS = {
    "inception-v4": Plan(
        _STEM_A,
        ("1x1 96", "1x1 64 - 3x3 96", "1x1 64 - 3x3 96 - 3x3 96", "avg - 1x1 96"),
        _reduce_a(192, 224, 256, 384),
        ("1x1 384", "1x1 192 - 1x7 224 - 7x1 256", "1x1 192 - 7x1 192 - 1x7 224 - 7x1 224 - 1x7 256", "avg - 1x1 128"),
        ("1x1 192 - 3x3/2 192", "1x1 256 - 1x7 256 - 7x1 320 - 3x3/2 320", "max/2"),
        (
            "1x1 256", "1x1 384 - {1x3 256 ; 3x1 256}", "1x1 384 - 3x1 448 - 1x3 512 - {1x3 256 ; 3x1 256}",
            "avg - 1x1 256",
        ),
        (4, 7, 3), "concat",
    ),
    "inception-resnet-v1": Plan(
        (*_STEM_B, ("3x3/2 256",)),
        ("1x1 32", "1x1 32 - 3x3 32", "1x1 32 - 3x3 32 - 3x3 32"),
        _reduce_a(192, 192, 256, 384),
        ("1x1 128", "1x1 128 - 1x7 128 - 7x1 128"),
        ("1x1 256 - 3x3/2 384", "1x1 256 - 3x3/2 256", "1x1 256 - 3x3 256 - 3x3/2 256", "max/2"),
        ("1x1 192", "1x1 192 - 1x3 192 - 3x1 192"),
        (5, 10, 5),
    ),
    "inception-resnet-v2": Plan(
        (*_STEM_B, ("max/2",), ("1x1 96", "1x1 48 - 5x5 64", "1x1 64 - 3x3 96 - 3x3 96", "avg - 1x1 64")),
        _A, _reduce_a(256, 256, 384, 384), _B, _REDUCE_B, _C, (10, 20, 10), slim=True,
    ),
    "inception-resnet-v2-paper": Plan(
        _STEM_A, _A, _reduce_a(256, 256, 384, 384), _B, _REDUCE_B, _C, (5, 10, 5),
    ),
}  # fmt: skip
SMALLEST = {False: 75, True: 27}
"""Pixels a side that are left something at the end, by whether the first two strides are left out."""


class Inception(nn.Module):
    """One of `PLANS`, from pictures in [-1, 1] to logits.

    Args:
        net: its name.
        classes: logits.
        join: how a block's branches end; None: as published.
        scale: of the residuals, for all blocks but the slim net's last, whose is 1; None: 0.17, 0.10 and 0.20, which
            are the released code's.
        width: factor of all channels.
        blocks: how many of A, B and C; None: as published.
        dropout: share of the pooled features that is dropped.
        small: leave out the first two strides, for pictures of 27 pixels and more; else 75 and more.
    """

    def __init__(
        self, net: str = "inception-v4", classes: int = 1000, join: Join | None = None, scale: float | None = None,
        width: float = 1.0, blocks: Sequence[int] | None = None, dropout: float = 0.2, small: bool = False,
    ):  # fmt: skip
        super().__init__()
        plan = PLANS[net]
        join, blocks = join or plan.join, tuple(blocks or plan.blocks)
        steps: list[nn.Module] = []
        inputs = 3
        for towers in plan.stem:
            texts = [text.replace("/s", "" if small else "/2") for text in towers]
            if len(texts) == 1:
                step, inputs = tower(inputs, texts[0], width)
                steps.append(step[0])
            else:
                steps.append(both := Cat(inputs, texts, width))
                inputs = both.outputs
        self.smallest = SMALLEST[small]
        self.stem = nn.Sequential(*steps)
        scales = plan.scales if scale is None else (scale,) * 3

        def repeated(inputs: int, towers: tuple[str, ...], which: int) -> tuple[nn.Sequential, int]:
            made: list[nn.Module] = []
            for i in range(blocks[which]):
                block = Cat(inputs, towers, width)
                last = plan.slim and which == 2 and i == blocks[2] - 1
                if join == "concat":
                    inputs = block.outputs
                    made.append(block)
                else:
                    made.append(Residual(block, inputs, 1.0 if last else scales[which], join == "residual", not last))
            return nn.Sequential(*made), inputs

        self.a, inputs = repeated(inputs, plan.a, 0)
        self.reduce_a = Cat(inputs, plan.reduce_a, width)
        self.b, inputs = repeated(self.reduce_a.outputs, plan.b, 1)
        self.reduce_b = Cat(inputs, plan.reduce_b, width)
        self.c, inputs = repeated(self.reduce_b.outputs, plan.c, 2)
        self.final, inputs = tower(inputs, "1x1 1536", width) if plan.slim else (nn.Sequential(), inputs)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(inputs, classes)

    def maps(self, x: Float[Tensor, "n 3 h w"]) -> list[Float[Tensor, "n c h2 w2"]]:
        """Feature maps after the stem, A, B and all of it: at 299 pixels of side 35, 35, 17 and 8."""
        if min(x.shape[-2:]) < self.smallest:
            raise BadInput(f"pictures of {min(x.shape[-2:])} pixels are too small: give {self.smallest} or more")
        stem = self.stem(x)
        a = self.a(stem)
        b = self.b(self.reduce_a(a))
        return [stem, a, b, self.final(self.c(self.reduce_b(b)))]

    def features(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """The average of the last feature maps."""
        return self.maps(x)[-1].mean((2, 3))

    def from_features(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n classes"]:
        """Logits of these features, some of which are dropped in training."""
        return self.head(self.dropout(features))

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n classes"]:
        return self.from_features(self.features(x))


def published_keys(net: Inception, name: str) -> dict[str, str]:
    """Our key -> timm's key of the same tensor, for "inception-v4" and "inception-resnet-v2" as published.

    Raises:
        BadInput: there are no released weights of that net.
    """
    if name not in RELEASED:
        raise BadInput(f"no weights of {name} were released: take {' or '.join(RELEASED)}")
    # timm numbers the units of a tower, and does not where there is one
    single = [
        f"{where}.branches.{j}.0." for where, cat in net.named_modules() if isinstance(cat, Cat)
        for j, branch in enumerate(cat.branches) if len(branch) == 1
    ]  # fmt: skip
    keys = {}
    for ours in net.state_dict():
        key = ours
        for start in single:
            short = re.sub(r"branches\.(\d)\.0\.$", r"branch\1.", start)
            key = short + key.removeprefix(start) if key.startswith(start) else key
        keys[ours] = re.sub(r"branches\.(\d)\.", r"branch\1.", RELEASED[name](key, net))
    return keys


def _v4(key: str, net: Inception) -> str:
    first = len(net.stem)
    starts = {"a": first, "b": first + len(net.a) + 1, "c": first + len(net.a) + len(net.b) + 2}
    key = key.replace("stem.3.branch1.", "stem.3.conv.").replace("stem.5.branch0.", "stem.5.conv.")
    key = re.sub(r"^stem\.", "features.", key)
    key = re.sub(r"^reduce_a\.", f"features.{starts['b'] - 1}.", key)
    key = re.sub(r"^reduce_b\.", f"features.{starts['c'] - 1}.", key)
    # where a tower forks, timm gives its units an underscore and the fork's a letter
    fork = lambda m: f"c.{m[1]}.branch{m[2]}_{m[3]}{'ab'[int(m[4])]}."
    key = re.sub(r"^c\.(\d+)\.branches\.([12])\.(\d)\.branch(\d)\.", fork, key)
    key = re.sub(r"^c\.(\d+)\.branches\.([12])\.(\d)\.", r"c.\1.branch\2_\3.", key)
    key = re.sub(r"^([abc])\.(\d+)\.", lambda m: f"features.{starts[m[1]] + int(m[2])}.", key)
    return key.replace("head.", "last_linear.")


def _resnet_v2(key: str, net: Inception) -> str:
    stem = {0: "conv2d_1a", 1: "conv2d_2a", 2: "conv2d_2b", 4: "conv2d_3b", 5: "conv2d_4a", 7: "mixed_5b"}
    key = re.sub(r"^stem\.(\d)\.", lambda m: f"{stem[int(m[1])]}.", key)
    key = re.sub(rf"^c\.{len(net.c) - 1}\.", "block8.", key)
    for ours, theirs in (("a", "repeat"), ("b", "repeat_1"), ("c", "repeat_2")):
        key = re.sub(rf"^{ours}\.", f"{theirs}.", key)
    key = key.replace("reduce_a.", "mixed_6a.").replace("reduce_b.", "mixed_7a.").replace("final.0.", "conv2d_7b.")
    return key.replace("inception.", "").replace("lin.", "conv2d.").replace("head.", "classif.")


RELEASED: dict[str, Callable[[str, Inception], str]] = {"inception-v4": _v4, "inception-resnet-v2": _resnet_v2}


def load_published(net: Inception, name: str, state: Mapping[str, Tensor]) -> None:
    """Put weights with timm's keys into a net as published.

    Raises:
        BadInput: there are none of that net; a key or a shape is another.
    """
    keys = published_keys(net, name)
    needed = {ours: theirs for ours, theirs in keys.items() if not theirs.endswith("num_batches_tracked")}
    if missing := sorted(set(needed.values()) - state.keys()):
        raise BadInput(f"the weight {missing[0]} is missing: give the released weights of {name}, with timm's keys")
    if beyond := sorted(state.keys() - set(keys.values())):
        raise BadInput(f"{name} has no weight {beyond[0]}: give its released weights, with timm's keys")
    there = net.state_dict()
    for ours, theirs in needed.items():
        if state[theirs].shape != there[ours].shape:
            told = f"{list(state[theirs].shape)}, not {list(there[ours].shape)}"
            raise BadInput(f"the weight {theirs} is of shape {told}: give the released weights of {name}")
    net.load_state_dict({ours: state[theirs] for ours, theirs in needed.items()}, strict=False)
