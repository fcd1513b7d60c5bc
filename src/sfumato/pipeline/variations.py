"""`VariationModel`: an `ImageModel` that is shown a picture, by a frozen encoder, and draws others that go with it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from sfumato.data.base import to_square
from sfumato.errors import BadInput

from .conditioning import Seen
from .contract import Condition
from .drawing import right_kind
from .image import ImageModel
from .seeing import Eye, as_bytes

if TYPE_CHECKING:
    from sfumato.data.base import Pictures


@dataclass(frozen=True, eq=False)
class Reference:
    """A picture to be shown: its 8-bit pixels."""

    pixels: UInt8[np.ndarray, "height width 3"]


@dataclass(eq=False)
class VariationModel(ImageModel):
    """An `ImageModel` whose network is told what a frozen encoder sees in a picture.

    Beside those of `ImageModel`, its ``defaults`` say ``encoder`` (as for `Eye`) and ``encoder_sha256``: the encoder is
    not saved with the model but read again when a picture is first shown, and has to be the same to the bit.
    """

    own_defaults: ClassVar[tuple[str, ...]] = ("encoder", "encoder_sha256")

    @cached_property
    def eye(self) -> Eye:
        """The encoder.

        Raises:
            BadInput: it is not there, or not the one that the model was trained with.
        """
        name, due = self.defaults["encoder"], self.defaults["encoder_sha256"]
        eye = Eye(name)
        if eye.sha256 != due:
            raise BadInput(
                f"this model was trained with another encoder {name} (sha256 {due[:12]}...) than the one that is there "
                f"({eye.sha256[:12]}...): put that one in its place"
            )
        return eye

    def told(self, asked: Any) -> Seen | None:
        """Pictures: files, a tensor [n, 3, height, width] in [0, 1] or of 8 bits, or `Reference`s.

        Files are cut to a square of the model's size first, as the pictures were that it was trained on.

        Raises:
            BadInput: something else, or a file that is no picture.
        """
        if asked is None:
            return self.unconditional()
        if isinstance(asked, Condition):
            return right_kind(asked, Seen, "pictures")
        if torch.is_tensor(asked):
            return self.seen(as_bytes(asked))
        several = list(asked) if isinstance(asked, list | tuple) else [asked]
        if not several:
            raise BadInput("this model is shown pictures: give at least one")
        arrays = [x.pixels if isinstance(x, Reference) else self._read(x) for x in several]
        if len({array.shape for array in arrays}) > 1:
            raise BadInput("pictures that are shown together are of one size: show them one after the other")
        return self.seen(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2))

    def seen(self, pictures: UInt8[Tensor, "n 3 height width"]) -> Seen:
        """What the encoder sees in these pictures."""
        tokens = self.eye.tokens(pictures).to(self.device) if self.network.config["tokens"] else None
        whole = self.eye.whole(pictures).to(self.device)
        return Seen(whole, torch.ones(len(whole), dtype=torch.bool, device=self.device), tokens)

    def asked_for(self, pictures: Pictures, rows: Sequence[int]) -> list[Any]:
        """These pictures themselves: what is drawn goes with them."""
        return [Reference(pictures.picture(i)) for i in rows]

    def unconditional(self, n: int = 1) -> Seen:
        """No picture, ``n`` times."""
        config: Any = self.network.config
        nothing = torch.zeros(n, config["whole"], device=self.device)
        tokens = nothing.new_zeros(n, config["tokens"], config["token_width"]) if config["tokens"] else None
        return Seen(nothing, torch.zeros(n, dtype=torch.bool, device=self.device), tokens)

    def heard(self, cond: Any, z: Float[Tensor, "batch *dims"]) -> tuple[Tensor, Tensor, Tensor | None]:
        cond = cond.repeat(len(z)) if len(cond) == 1 else cond
        dtype = self.network.dtype
        tokens = None if cond.tokens is None else cond.tokens.to(z.device, dtype)
        return cond.whole.to(z.device, dtype), cond.given.to(z.device), tokens

    def describe(self) -> dict[str, Any]:
        about = {name: self.defaults[name] for name in self.own_defaults}
        return {**super().describe(), **about}

    def _read(self, file: Any) -> UInt8[np.ndarray, "side side 3"]:
        if not isinstance(file, str | Path) or not os.path.isfile(file):
            raise BadInput(f"this model is shown pictures: {str(file)[:100]!r} is no file; name one, as --image does")
        return to_square(Path(file), self.size)
