"""Image models of `transformers` without their image processors: loading, preparing pictures, identity.

Pictures are prepared here, by tensor operations that follow the model's ``preprocessor_config.json``, so that
the rule is the same whatever else is installed, and can be stated with every figure.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate

from sfumato.errors import BadInput
from sfumato.files import tensors_sha256
from sfumato.finite import require_finite
from sfumato.foreign import reading, refuse_pointers, shortened
from sfumato.hub import require_hub

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# PIL's numbers for filters; torch has no antialiased Lanczos, and bicubic is the nearest to it.
_LARGEST = 8192
"""Pixels a side: what asks for more is a slip."""
_FILTERS = {0: "nearest", 1: "bicubic", 2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Preparation:
    """How pictures become a model's input.

    ``size`` is (height, width), or (shorter side,) with the aspect kept; ``crop`` a centred (height, width)
    or None.
    """

    size: tuple[int, ...]
    crop: tuple[int, int] | None
    filter: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Preparation:
        """From the contents of a ``preprocessor_config.json``."""
        size = _sides(config.get("size", 224), shorter=True)
        for name in ("image_mean", "image_std"):
            if len(config.get(name, _CLIP_MEAN)) != 3 or not all(map(math.isfinite, config.get(name, _CLIP_MEAN))):
                raise ValueError(f"its {name} is not three numbers")
        if 0 in config.get("image_std", _CLIP_STD):
            raise ValueError("its image_std is zero")
        crop = _sides(config.get("crop_size", size), shorter=False) if config.get("do_center_crop") else None
        if not all(isinstance(side, int) and 1 <= side <= _LARGEST for side in (*size, *(crop or ()))):
            raise ValueError(f"its size is not one or two whole numbers from 1 to {_LARGEST}")
        normalised = config.get("do_normalize", True)
        return cls(
            size,
            crop,
            _FILTERS.get(int(config.get("resample", 3)), "bicubic"),
            tuple(config.get("image_mean", _CLIP_MEAN)) if normalised else (0.0,) * 3,
            tuple(config.get("image_std", _CLIP_STD)) if normalised else (1.0,) * 3,
        )

    def __call__(self, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n 3 h w"]:
        """Model input of pictures in [0, 1]; differentiable."""
        height, width = images.shape[-2:]
        size = self.size
        if len(size) == 1:
            scale = size[0] / min(height, width)
            size = (round(height * scale), round(width * scale))
        if (height, width) != size:
            smooth = {} if self.filter == "nearest" else {"antialias": True, "align_corners": False}
            images = interpolate(images, size, mode=self.filter, **smooth).clamp(0, 1)
        if self.crop is not None:
            top, left = ((images.shape[d] - c) // 2 for d, c in ((-2, self.crop[0]), (-1, self.crop[1])))
            images = images[..., top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (images.new_tensor(x).view(1, 3, 1, 1) for x in (self.mean, self.std))
        return (images - mean) / std

    @property
    def rule(self) -> str:
        """The resize rule in words."""
        sides = "x".join(map(str, self.size)) if len(self.size) == 2 else f"shorter side {self.size[0]}"
        crop = f", centre crop {self.crop[0]}x{self.crop[1]}" if self.crop else ""
        return f"{self.filter}, antialiased, to {sides}{crop}"


def _sides(size: Any, shorter: bool) -> Any:
    if isinstance(size, dict):
        if "height" in size:
            return size["height"], size["width"]
        size = size["shortest_edge"]
    if isinstance(size, (tuple, list)):
        size = size[0]
    return (size,) if shorter else (size, size)


@dataclass(frozen=True)
class VisionModel:
    """A network with what it needs around it; ``tokenizer`` only for models that read text."""

    name: str
    network: nn.Module
    prepare: Preparation
    tokenizer: Any = None

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device


def load_vision(model: str | os.PathLike, auto: Any, text: bool = False) -> VisionModel:
    """Load a `transformers` model, its preparation of pictures and (``text``) its tokenizer; safetensors
    only.

    Args:
        model: a folder written by ``save_pretrained``, or a hub id (which may use the network).
        auto: the auto class, for example ``AutoModelForImageClassification``.
        text: also load the tokenizer.

    Raises:
        BadInput: nothing of that name, another kind of model, or one that is quantised, incomplete, damaged or not
            finite.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.image_processing_base import ImageProcessingMixin

    source = os.fspath(model)
    local = os.path.isdir(source)
    if not local:
        require_hub(source)
    given: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    refuse_pointers(source)
    with reading(source, f"a model of pictures ({auto.__name__})"):
        quantised = getattr(AutoConfig.from_pretrained(source, **given), "quantization_config", None)
        if quantised:
            raise BadInput(f"{source} holds quantised weights, which are not read: take the full weights")
        network, found = auto.from_pretrained(source, use_safetensors=True, output_loading_info=True, **given)
        # what pools is made up where a model was saved without it, and is not looked at where it may be absent
        missing = sorted(key for key in found["missing_keys"] if text or "pooler" not in key)
        if missing:
            raise BadInput(f"the weight {missing[0]} of {source} is missing: fetch or write the model again")
        require_finite(network.state_dict().items(), source)
        config, _ = ImageProcessingMixin.get_image_processor_dict(source, local_files_only=local)
        prepare = Preparation.from_config(config)
        tokenizer = AutoTokenizer.from_pretrained(source, **given) if text else None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return VisionModel(source, network.eval().requires_grad_(False).to(device), prepare, tokenizer)


def reads_text(model: str | os.PathLike) -> bool:
    """Whether a `transformers` folder or hub id is a CLIP-style model, by its configuration.

    Raises:
        BadInput: there is no such model.
    """
    from transformers import AutoConfig

    source = os.fspath(model)
    local = os.path.isdir(source)
    if not local:
        require_hub(source)
    with reading(source, "a model of transformers", "give a folder written by save_pretrained, or a hub id"):
        config = AutoConfig.from_pretrained(source, local_files_only=local, trust_remote_code=False)
    return hasattr(config, "text_config") and hasattr(config, "vision_config")


@dataclass(frozen=True)
class ClipModel:
    """A CLIP-style model as two maps onto one unit sphere."""

    vision: VisionModel

    @classmethod
    def load(cls, model: str | os.PathLike) -> ClipModel:
        """Load a `transformers` CLIP (or SigLIP) from a folder or hub id."""
        from transformers import AutoModel

        if not reads_text(model):
            raise BadInput(f"{os.fspath(model)} is not a CLIP-style model of pictures and texts")
        return cls(load_vision(model, AutoModel, text=True))

    @torch.no_grad()
    def images(self, images: Float[Tensor, "n 3 height width"], unit: bool = True) -> Float[Tensor, "n dim"]:
        """Embeddings of pictures in [0, 1], of unit length unless ``unit`` is off."""
        pixels = self.vision.prepare(images.to(self.vision.device, torch.float32))
        embedded = _pooled(self.vision.network.get_image_features(pixel_values=pixels))
        return _unit(embedded) if unit else embedded

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Float[Tensor, "n dim"]:
        """Unit-length embeddings of texts.

        Warns:
            UserWarning: a text is longer than the context, and is cut.
        """
        tokenizer, config = self.vision.tokenizer, self.vision.network.config
        length = min(tokenizer.model_max_length, getattr(config.text_config, "max_position_embeddings", 77))
        for text, ids in zip(texts, tokenizer(list(texts), verbose=False).input_ids, strict=True):
            if len(ids) > length:
                told = f"{shortened(text, 60)!r} has {len(ids)} tokens, and {self.vision.name} reads {length}"
                warnings.warn(f"{told}: the rest is cut, and tells nothing in the score", stacklevel=2)
                break
        cut = {"padding": "max_length", "truncation": True, "max_length": length}
        inputs = tokenizer(list(texts), return_tensors="pt", **cut)
        return _unit(_pooled(self.vision.network.get_text_features(**inputs.to(self.vision.device))))


def _pooled(output: Any) -> Float[Tensor, "n dim"]:
    # transformers 5 returns the encoder's whole output, whose pooled part is the projected embedding.
    return output if isinstance(output, Tensor) else output.pooler_output


def _unit(features: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
    return features / features.norm(dim=-1, keepdim=True)


def module_sha256(module: nn.Module) -> str:
    """`sfumato.files.tensors_sha256` over every parameter and buffer."""
    return tensors_sha256(module.state_dict())
