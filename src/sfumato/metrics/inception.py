"""The network of the FID: TensorFlow's Inception-v3 of December 2015, written in torch.

It is not torchvision's Inception-v3. Its weights are others, it has 1008 outputs, its averages do not count the
padding, and its last block takes a maximum where the paper and torchvision take an average. The names of the weights
are those of the files in circulation (``pt_inception-2015-12-05``, ``weights-inception-2015-12-05``).
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, max_pool2d

from sfumato.errors import BadInput
from sfumato.foreign import read_tensors

SIDE, FEATURES, CLASSES = 299, 2048, 1008

CONVERT = (
    "import sys, torch; from safetensors.torch import save_file; "
    "save_file({k: v.contiguous() for k, v in torch.load(sys.argv[1], 'cpu', weights_only=True).items()}, sys.argv[2])"
)
"""What turns a pickled state dict into safetensors: ``python -c CONVERT IN.pth OUT.safetensors``."""

Step = tuple[str, int, int | tuple[int, int]]
"""Name, output channels and kernel of one convolution."""
Path_ = list[Step | list[Step]]
"""Convolutions one after the other; a list within is a fork, whose outputs are concatenated."""


class Conv(nn.Module):
    """Convolution, batch normalisation (eps 0.001) and ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu_()


class Mixed(nn.Module):
    """Paths side by side and a pooled one, concatenated over channels.

    Args:
        inputs: channels.
        paths: the convolutions of each path.
        pool: "average" or "maximum" before the 1x1 convolution ``branch_pool`` of ``pooled`` channels; with
            "halve" the last convolution of every path has stride 2 and the maximum of stride 2 is not projected.
    """

    def __init__(self, inputs: int, paths: list[Path_], pool: str, pooled: int = 0):
        super().__init__()
        self.pool, self.paths = pool, []
        for path in paths:
            width, names = inputs, []
            for i, step in enumerate(path):
                fork = step if isinstance(step, list) else [step]
                halve = pool == "halve" and i == len(path) - 1
                for name, outputs, kernel in fork:
                    self.add_module(name, Conv(width, outputs, kernel, 2, 0) if halve else Conv(width, outputs, kernel))
                width = fork[0][1]
                names.append([name for name, *_ in fork])
            self.paths.append(names)
        if pool != "halve":
            self.branch_pool = Conv(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for path in self.paths:
            y = x
            for names in path:
                y = torch.cat([self.get_submodule(name)(y) for name in names], dim=1)
            outputs.append(y)
        if self.pool == "halve":
            outputs.append(max_pool2d(x, 3, 2))
        elif self.pool == "maximum":
            outputs.append(self.branch_pool(max_pool2d(x, 3, 1, 1)))
        else:
            outputs.append(self.branch_pool(avg_pool2d(x, 3, 1, 1, count_include_pad=False)))
        return torch.cat(outputs, dim=1)


def _early(inputs: int, pooled: int) -> Mixed:
    """35 x 35: 1x1, 5x5 and a doubled 3x3."""
    double: Path_ = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
    paths: list[Path_] = [[("branch1x1", 64, 1)], [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)], double]
    return Mixed(inputs, paths, "average", pooled)


def _middle(c: int) -> Mixed:
    """17 x 17: 1x1 and 7x7 in factors, with ``c`` channels within."""
    single: Path_ = [("branch7x7_1", c, 1), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1))]
    double: Path_ = [
        ("branch7x7dbl_1", c, 1), ("branch7x7dbl_2", c, (7, 1)), ("branch7x7dbl_3", c, (1, 7)),
        ("branch7x7dbl_4", c, (7, 1)), ("branch7x7dbl_5", 192, (1, 7)),
    ]  # fmt: skip
    return Mixed(768, [[("branch1x1", 192, 1)], single, double], "average", 192)


def _late(inputs: int, pool: str) -> Mixed:
    """8 x 8: 1x1 and 3x3, whose last layer is forked into 1x3 and 3x1."""
    single: Path_ = [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]]
    double: Path_ = [
        ("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3),
        [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))],
    ]  # fmt: skip
    return Mixed(inputs, [[("branch1x1", 320, 1)], single, double], pool, 192)


class Inception(nn.Module):
    """Pictures (n, 3, 299, 299) in [0, 255] to the 2048 features after the last pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2, 0)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, 1, 0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, 1, 0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _early(192, 32), _early(256, 64), _early(288, 64)
        halved: Path_ = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
        self.Mixed_6a = Mixed(288, [[("branch3x3", 384, 3)], halved], "halve")
        self.Mixed_6b, self.Mixed_6c = _middle(128), _middle(160)
        self.Mixed_6d, self.Mixed_6e = _middle(160), _middle(192)
        halved = [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)),
                  ("branch7x7x3_4", 192, 3)]  # fmt: skip
        self.Mixed_7a = Mixed(768, [[("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)], halved], "halve")
        self.Mixed_7b, self.Mixed_7c = _late(1280, "average"), _late(2048, "maximum")
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Float[Tensor, "n 3 299 299"]) -> Float[Tensor, "n 2048"]:
        x = (x - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(max_pool2d(x, 3, 2)))
        x = max_pool2d(x, 3, 2)
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x = self.get_submodule(f"Mixed_{name}")(x)
        return adaptive_avg_pool2d(x, 1).flatten(1)

    def logits(self, features: Float[Tensor, "n 2048"]) -> Float[Tensor, "n 1008"]:
        """The outputs without their bias, of which the Inception score is made."""
        return features @ self.fc.weight.mT.to(features)


def load_inception(file: str | os.PathLike) -> Inception:
    """The network with the weights of a safetensors file, frozen and in eval mode.

    Raises:
        BadInput: no such file, a pickle (with the way to convert it), or weights of another network.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise BadInput(f"there are no Inception weights at {file}: name the file with --weights")
    if file.suffix in (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle"):
        raise BadInput(
            f"{file.name} is a pickle, which can run code when it is read; convert it once:\n"
            f'  python -c "{CONVERT}" {file} {file.with_suffix(".safetensors")}'
        )
    given, _ = read_tensors(file, "safetensors")
    network = Inception()
    own = network.state_dict()
    for name, parameter in own.items():
        if name.endswith("num_batches_tracked"):
            continue
        if name not in given:
            raise BadInput(f"{file} holds other weights than the FID's Inception of 2015: {name} is missing")
        if given[name].shape != parameter.shape:
            raise BadInput(
                f"{file} holds other weights than the FID's Inception of 2015: {name} is {tuple(given[name].shape)} "
                f"and not {tuple(parameter.shape)}"
            )
        own[name] = given[name].float()
    network.load_state_dict(own)
    return network.eval().requires_grad_(False)
