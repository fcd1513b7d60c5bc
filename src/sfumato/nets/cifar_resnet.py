"""Residual networks for small pictures (arXiv:1512.03385, section 4.2): 6 n + 2 layers of 16, 32 and 64 channels."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import BadInput


class Block(nn.Module):
    """Two 3x3 convolutions; where the side is halved, every other pixel and zeros for new channels go past them."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.stride, self.more = outputs // inputs, outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        past = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more)) if self.more else x
        return (past + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


class CifarResNet(nn.Module):
    """ResNet-20, -32, -44, -56 or -110, from pictures to logits; initialised as He et al. say.

    Args:
        depth: layers, 2 more than a multiple of 6.
        classes: logits.

    Raises:
        BadInput: another depth.
    """

    def __init__(self, depth: int = 32, classes: int = 10):
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise BadInput(f"a ResNet of {depth} layers cannot be made: give 2 more than a multiple of 6, such as 32")
        self.conv, self.bn = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = [16] + [width for width in (16, 32, 64) for _ in range(depth // 6)]
        self.blocks = nn.Sequential(*map(Block, widths[:-1], widths[1:]))
        self.head = nn.Linear(64, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        nn.init.kaiming_normal_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 64"]:
        """The average of the last feature maps."""
        return self.blocks(self.bn(self.conv(x)).relu()).mean((2, 3))

    def from_features(self, features: Float[Tensor, "n 64"]) -> Float[Tensor, "n classes"]:
        """Logits of these features."""
        return self.head(features)

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n classes"]:
        return self.from_features(self.features(x))
