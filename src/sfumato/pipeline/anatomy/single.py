"""Diffusion transformers with one stream for text and picture: Z-Image."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sfumato.errors import BadInput

from ..conditioning import Conditioning
from .base import foreign
from .dit import Transformer
from .explicit import Listener, SingleStreamAttention
from .parts import Projection, Site

_TEXT_SIDE = re.compile(r"context_refiner\.\d+\.attention\.")
_TEXT_KEYS = re.compile(r"context_refiner\.\d+\.attention\.to_[kv]\.")
_TIME_AND_OUTPUT = ("t_embedder.", "all_final_layer.")
_KINDS = {"noise_refiner": "self", "context_refiner": "text", "layers": "joint"}
_MULTIPLE = 32
"""The network pads text and picture to multiples of so many tokens."""


class ZImageAnatomy(Transformer):
    """``ZImageTransformer2DModel``: layers that text and picture share ("joint"), before them some for each.

    "self" are those of the picture alone (``noise_refiner``); "text" the projections of those of the text alone
    (``context_refiner``), the only ones that act on nothing else, so that they are the "xattn" set of parameters too.
    Their attention, of the text to itself, is no `Site`. "text.in" reads the embeddings after a norm.

    Args:
        side: of the latent at the default picture size, which the network's configuration does not say.
    """

    first = "x"
    told = "t"
    trunks = ("noise_refiner", "context_refiner", "layers")
    subsets: ClassVar = {
        "xattn": lambda name: bool(_TEXT_SIDE.search(name)),
        "xattn-strict": lambda name: bool(_TEXT_KEYS.search(name)),
        "noxattn": lambda name: not _TEXT_SIDE.search(name) and not name.startswith(_TIME_AND_OUTPUT),
        "selfattn": lambda name: name.startswith("noise_refiner.") and ".attention." in name,
    }

    def __init__(self, network: nn.Module, side: int = 128):
        super().__init__(network)
        self._side = side

    @property
    def side(self) -> int:
        return self._side

    @property
    def resolution(self) -> int:
        return self.side // 2

    @property
    def last(self) -> nn.Module:
        return self.network.all_final_layer["2-1"].linear

    def _places(self) -> list[Site]:
        return [
            Site(f"{trunk}.{i}.attention", _KINDS[trunk], self.resolution, layer.attention, self.context)
            for trunk in self.trunks
            for i, layer in enumerate(getattr(self.network, trunk))
        ]

    def sites(self) -> list[Site]:
        return [site for site in self._places() if site.kind != "text"]

    def every_projection(self) -> list[Projection]:
        found = [Projection("cap_embedder.1", "text.in", self.network.cap_embedder[1], 0)]
        for site in self._places():
            for what, name in {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}.items():
                module = site.module.get_submodule(name)
                found.append(Projection(f"{site.name}.{name}", f"{site.kind}.{what}", module, site.resolution))
        return found

    def explicit(self, site: Site, listeners: list[Listener], original: Any) -> SingleStreamAttention:
        return SingleStreamAttention(site, listeners, original)

    def inputs(self, z: Tensor, cond: Conditioning, guidance: float | None = None) -> dict[str, Any]:
        tokens = cond.tokens.to(self.dtype)
        whole = cond.mask.is_meta
        return {"cap_feats": [x if whole else x[m] for x, m in zip(tokens, cond.mask, strict=True)]}

    def conditioning(self, inputs: dict[str, Any]) -> Conditioning:
        rows = inputs["cap_feats"]
        mask = pad_sequence([torch.ones(len(x), dtype=torch.bool, device=x.device) for x in rows], batch_first=True)
        return foreign(pad_sequence(list(rows), batch_first=True), mask)

    def retold(self, inputs: dict[str, Any], cond: Conditioning) -> dict[str, Any]:
        rows = zip(cond.tokens, inputs["cap_feats"], strict=True)
        return {**inputs, "cap_feats": [new[: len(old)].to(old) for new, old in rows]}

    def text_length(self, inputs: dict[str, Any]) -> int:
        return -(-max(len(x) for x in inputs["cap_feats"]) // _MULTIPLE) * _MULTIPLE

    def arguments(
        self, z: Tensor, timestep: Tensor | float, inputs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if z.shape[-1] % 2 or z.shape[-2] % 2:
            raise BadInput(f"a latent of {z.shape[-2]}x{z.shape[-1]} cannot be cut in patches: both sides must be even")
        return (list(z[:, :, None].unbind()),), {"t": timestep, **inputs}

    def unpacked(self, z: Any, inputs: dict[str, Any]) -> Float[Tensor, "batch channel height width"]:
        return z if torch.is_tensor(z) else torch.stack(list(z))[:, :, 0]

    def prediction(self, out: Any, z: Tensor) -> Float[Tensor, "batch channel height width"]:
        return torch.stack(list(out))[:, :, 0]

    def result(self, prediction: Tensor, out: Any) -> Any:
        return list(prediction[:, :, None].unbind())
