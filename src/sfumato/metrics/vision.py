"""Image models of `transformers` without their image processors: loading, preparing pictures, identity.

Pictures are prepared here, by tensor operations that follow the model's ``preprocessor_config.json``, so that
the rule is the same whatever else is installed, and can be stated with every figure.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate

from sfumato.errors import BadInput
from sfumato.files import tensors_sha256
from sfumato.hub import require_hub

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# PIL's numbers for filters; torch has no antialiased Lanczos, and bicubic is the nearest to it.
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
        crop = _sides(config.get("crop_size", size), shorter=False) if config.get("do_center_crop") else None
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
        BadInput: nothing of that name, or another kind of model.
    """
    from transformers import AutoTokenizer
    from transformers.image_processing_base import ImageProcessingMixin

    source = os.fspath(model)
    local = os.path.isdir(source)
    if not local:
        require_hub(source)
    try:
        network = auto.from_pretrained(source, use_safetensors=True, local_files_only=local)
        config, _ = ImageProcessingMixin.get_image_processor_dict(source, local_files_only=local)
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local) if text else None
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise BadInput(f"{source} could not be loaded as {auto.__name__}: {reason}") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return VisionModel(
        source, network.eval().requires_grad_(False).to(device), Preparation.from_config(config), tokenizer
    )


def reads_text(model: str | os.PathLike) -> bool:
    """Whether a `transformers` folder or hub id is a CLIP-style model, by its configuration.

    Raises:
        BadInput: there is no such model.
    """
    from transformers import AutoConfig

    source = os.fspath(model)
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=os.path.isdir(source))
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{source} is not a model of transformers: give a folder written by save_pretrained, or a hub id"
        ) from error
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
        """Unit-length embeddings of texts; longer ones than the context are cut."""
        inputs = self.vision.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
        return _unit(_pooled(self.vision.network.get_text_features(**inputs.to(self.vision.device))))


def _pooled(output: Any) -> Float[Tensor, "n dim"]:
    # transformers 5 returns the encoder's whole output, whose pooled part is the projected embedding.
    return output if isinstance(output, Tensor) else output.pooler_output


def _unit(features: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
    return features / features.norm(dim=-1, keepdim=True)


def module_sha256(module: nn.Module) -> str:
    """`sfumato.files.tensors_sha256` over every parameter and buffer."""
    return tensors_sha256(module.state_dict())
