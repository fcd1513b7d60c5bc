"""An autoencoder by itself: wherever it comes from, and its latents at one scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.foreign import read_json, reading
from sfumato.settings import EMBEDDED

from .codec import Codec
from .latent import AUTOENCODERS
from .load import inspected, load
from .saving import quiet

_KINDS = {kind.__name__: kind for kind in AUTOENCODERS}


def open_autoencoder(name: str) -> Any:
    """The autoencoder ``name``, frozen, in float32 on the CPU.

    Args:
        name: an embedded model, the folder or hub id of a pipeline, a model of latents, or a folder that
            ``AutoencoderKL.save_pretrained`` (or that of ``AutoencoderDC``) wrote.

    Raises:
        BadInput: nothing is there, or it has no autoencoder of these kinds.
    """
    folder = Path(name).expanduser()
    alone = (folder / "config.json").is_file() and not (folder / "model_index.json").is_file()
    if not alone and name in EMBEDDED:
        folder, alone = inspected(name)[0] / "vae", True  # nothing else of it is read
    if not alone:
        found: Any = load(name, "cpu").autoencoder
    else:
        kind = _KINDS.get(read_json(folder / "config.json", {"_class_name": str})["_class_name"])
        if kind is None:
            raise BadInput(f"{folder} is no autoencoder that can be used: give an {' or '.join(_KINDS)}")
        with quiet(), reading(folder, f"an {kind.__name__}"):
            found = kind.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    if not isinstance(found, AUTOENCODERS):
        raise BadInput(f"{name} has no autoencoder that can be used: give a model with an {' or '.join(_KINDS)}")
    return found.float().requires_grad_(False).eval()


def standardised(vae: Any, latents: Float[Tensor, "n channel h w"], std: float = 0.5) -> Float[Tensor, "n channel h w"]:
    """The unscaled ``latents`` with mean 0 and this deviation in every channel; ``vae`` keeps the statistics.

    Its configuration is changed, so that a `Codec`, and whoever loads it, scales in the same way.
    """
    mean, deviation = latents.double().mean((0, 2, 3)), latents.double().std((0, 2, 3)).clamp(min=1e-6)
    vae.register_to_config(
        latents_mean=mean.tolist(), latents_std=deviation.tolist(), scaling_factor=std, shift_factor=None
    )
    return Codec(vae).scale(latents)
