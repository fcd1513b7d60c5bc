"""The oracle of the sketch world: reads object, colour, background and style off a picture.

Because the world is known, this one small network stands in for a human rater: erasure, retention and
alignment on the embedded model are counted with it.  Its weights and card ship with the package:
`python -m sfumato.data.oracle --train` makes them anew (about seven minutes on one CPU core), and with
`--report docs` it writes the confusion matrices.

A picture that shows none of the objects reads "nothing": an erased picture is not forced into a class.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import BadInput, SfumatoError
from sfumato.files import sha256_of

from ..sketch import BACKGROUNDS, COLOURS, OBJECTS, STYLES

NOTHING = "nothing"
WORDS: dict[str, tuple[str, ...]] = {
    "object": (*OBJECTS, NOTHING),
    "colour": (*COLOURS, NOTHING),
    "background": BACKGROUNDS,
    "style": (*STYLES, NOTHING),
}
"""What each head can read, in the order of its logits; "nothing" where there is no object to speak of."""
SIDE = 64
"""Pictures are read at this many pixels a side."""
FEATURES = 128
ASSETS = Path(__file__).resolve().parents[2] / "assets" / "oracle"
WEIGHTS = "oracle.safetensors"
CARD = "card.json"


def conv(inputs: int, outputs: int, stride: int, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Oracle(nn.Module):
    """A convolutional trunk with one linear head per attribute (0.6 M parameters)."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            conv(3, 24, 2, kernel=5),
            conv(24, 48, 2),
            conv(48, 48, 1),
            conv(48, 96, 2),
            conv(96, 96, 1),
            conv(96, 160, 2),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(160 * 16, FEATURES, bias=False),
            nn.BatchNorm1d(FEATURES),
            nn.ReLU(),
        )
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, len(words)) for name, words in WORDS.items()})
        self.card: dict[str, Any] = {}

    def features(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch features"]:
        """Penultimate features (128, non-negative) of RGB pictures in [0, 1] of any size; differentiable."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            given = f"{images.dtype} {tuple(images.shape)}"
            raise BadInput(f"the oracle reads float pictures (batch, 3, height, width), not {given}")
        weight = self.heads["object"].weight
        images = images.to(weight)
        if images.shape[-2:] != (SIDE, SIDE):
            images = nn.functional.interpolate(
                images, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False
            )
        return self.trunk(images * 2 - 1)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> dict[str, Float[Tensor, "batch words"]]:
        """Logits per attribute, in the order of `words(attribute)`, of pictures in [0, 1] of any size."""
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}

    @staticmethod
    def words(attribute: str) -> tuple[str, ...]:
        """The words an attribute can take, in the order of its logits; "nothing" is last where it exists."""
        if attribute not in WORDS:
            raise BadInput(f"the oracle reads {', '.join(WORDS)}, not {attribute!r}")
        return WORDS[attribute]


@cache
def _shipped(folder: Path) -> Oracle:
    from safetensors.torch import load_file

    if not (folder / WEIGHTS).is_file() or not (folder / CARD).is_file():
        raise SfumatoError(f"no oracle at {folder}; make it with: python -m sfumato.data.oracle --train")
    card = json.loads((folder / CARD).read_text())
    if sha256_of(folder / WEIGHTS) != card["sha256"]:
        raise SfumatoError(f"the oracle's weights at {folder} are not those of its card; install it again")
    oracle = Oracle()
    weights = load_file(folder / WEIGHTS)
    oracle.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
    oracle.card = card
    return oracle.eval().requires_grad_(False)


def load(folder: str | Path | None = None) -> Oracle:
    """The shipped oracle (or one in `folder`): float32, on the CPU, frozen, in eval mode.

    `oracle.card` says how it was made, how well it reads, and the sha256 of its weights.  One network is
    shared by all callers; `copy.deepcopy` it before changing or moving it.
    """
    return _shipped(Path(folder) if folder is not None else ASSETS)
