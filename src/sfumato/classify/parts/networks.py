"""Networks by name: small ResNets, timm's, `transformers`'."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import BadInput, unknown
from sfumato.foreign import reading
from sfumato.nets.cifar_resnet import CifarResNet

RESNET = "resnet"


class Wrapped(nn.Module):
    """An image classifier of `transformers` from pictures in [-1, 1] to logits."""

    def __init__(self, wrapped: nn.Module):
        super().__init__()
        self.wrapped = wrapped

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n classes"]:
        return self.wrapped(pixel_values=x).logits

    def features(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """The average of the last feature maps, or the first token."""
        state = self.wrapped.base_model(pixel_values=x).last_hidden_state
        return state.mean((2, 3)) if state.ndim == 4 else state[:, 0]


class Timm(nn.Module):
    """A network of timm; its weights keep timm's keys."""

    def __init__(self, wrapped: Any):
        super().__init__()
        self.wrapped = wrapped

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n classes"]:
        return self.wrapped(x)

    def features(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """What the last layer sees."""
        return self.wrapped.forward_head(self.wrapped.forward_features(x), pre_logits=True)

    def from_features(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n classes"]:
        """Logits of these features."""
        return self.wrapped.get_classifier()(features)


def by_name(name: str, labels: tuple[str, ...], size: int, widths: Sequence[int]) -> nn.Module:
    """A network for these classes; ``widths`` are those of "resnet".

    Raises:
        BadInput: no such network; timm is asked for and not installed.
    """
    kind, _, which = name.partition(":")
    if name == RESNET:
        return _resnet(labels, widths)
    if name.startswith(RESNET) and (depth := name.removeprefix(RESNET)).isdecimal():
        return CifarResNet(int(depth), len(labels))
    if kind == "timm" and which:
        if find_spec("timm") is None:
            raise BadInput(f"{name} needs timm, which is not installed: pip install timm, or leave --backbone out")
        timm = import_module("timm")
        if not timm.is_model(which):
            raise unknown("network of timm", which, timm.list_models())
        return Timm(timm.create_model(which, pretrained=False, num_classes=len(labels)))
    if kind == "transformers" and which:
        return _of_transformers(which, labels, size)
    raise BadInput(
        f'unknown backbone {name!r}: give "resnet", resnet32, timm:NAME, transformers:TYPE or transformers:FOLDER'
    )


def _named(labels: tuple[str, ...]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


def _resnet(labels: tuple[str, ...], widths: Sequence[int]) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=min(32, widths[0]), hidden_sizes=list(widths), depths=[1] * len(widths), layer_type="basic",
        downsample_in_first_stage=False, num_labels=len(labels), **_named(labels),
    )  # fmt: skip
    return Wrapped(ResNetForImageClassification(config))


def _of_transformers(which: str, labels: tuple[str, ...], size: int) -> nn.Module:
    from transformers import AutoConfig, AutoModelForImageClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as KNOWN

    if Path(which).is_dir():
        with reading(which, "an image classifier"):
            return Wrapped(
                AutoModelForImageClassification.from_pretrained(
                    which, use_safetensors=True, local_files_only=True, trust_remote_code=False,
                    ignore_mismatched_sizes=True, num_labels=len(labels), **_named(labels),
                )
            )  # fmt: skip
    if which not in KNOWN:
        raise unknown("image classifier of transformers", which, KNOWN)
    config = AutoConfig.for_model(which, num_labels=len(labels), **_named(labels))
    if hasattr(config, "image_size"):
        config.image_size = size
    with reading(which, "an image classifier", "give a --size that its patches divide"):
        return Wrapped(AutoModelForImageClassification.from_config(config))
