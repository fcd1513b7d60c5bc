"""The folder of a classifier: weights, how pictures are prepared, its making and how good it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sfumato.files import atomic_folder, write_json
from sfumato.metrics.trained import RECORD


def inner(net: nn.Module) -> nn.Module:
    """The network that another library knows, or the project's own."""
    return getattr(net, "wrapped", net)


def write(
    folder: Path, net: nn.Module, about: Mapping[str, Any], made: Mapping[str, Any], card: Mapping[str, Any],
    overwrite: bool = False,
) -> None:  # fmt: skip
    """Write the classifier, whole or not at all.

    Args:
        about: the method's name (``classifier``), ``labels`` and ``size``.
        made: how it was made.
        card: how good it is.

    Where the network takes pictures in [-1, 1] and makes another range of them for the one inside, ``net.standard``
    has mean and standard deviation by which it does, of pixels in [0, 1].
    """
    from safetensors.torch import save_file

    known = inner(net)
    side = {"height": about["size"], "width": about["size"]}
    mean, std = getattr(net, "standard", ([0.5] * 3, [0.5] * 3))
    prepare = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": side, "resample": 2,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(mean),
        "image_std": list(std),
    }  # fmt: skip
    with atomic_folder(folder, overwrite) as temporary:
        if hasattr(known, "save_pretrained"):
            known.save_pretrained(temporary)
        else:
            weights = {k: x.contiguous().clone() for k, x in known.state_dict().items()}
            save_file(weights, temporary / "model.safetensors", {"format": "pt"})
        write_json(temporary / "preprocessor_config.json", prepare)
        write_json(temporary / RECORD, {"description": dict(about), "provenance": dict(made)})
        write_json(temporary / "card.json", dict(card))
