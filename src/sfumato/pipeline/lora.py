"""Adapters as LoRA files in safetensors, in the two spellings that other tools read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.files import atomic_file

from .anatomy.base import takes_adapter

if TYPE_CHECKING:
    from .adapter import Adapter
    from .anatomy import Anatomy

STYLES = ("diffusers", "webui")


def save(
    adapter: Adapter, path: str | Path, style: str, scale: float, metadata: Mapping[str, str], overwrite: bool
) -> None:
    """Write an adapter as a LoRA of fixed strength, which ``pipe.load_lora_weights`` and web UIs load.

    A LoRA file knows no per-prompt strength: an adapter made for facilitated transport acts on every prompt
    alike.

    Args:
        style: "diffusers" (``unet.<layer>.lora_A.weight`` / ``lora_B.weight``; such files carry no alpha, so
            scale alpha / rank is multiplied into B) or "webui" (``lora_unet_<layer>`` with alpha; ``scale``
            into up). For transformers "transformer" stands in the place of "unet".
        scale: strength at which a loader's weight 1 acts.
        metadata: further entries of the file's header.

    Raises:
        BadInput: unknown style, or the file exists.
    """
    if style not in STYLES:
        raise BadInput(f"unknown LoRA style {style!r}: use one of {', '.join(STYLES)}")
    tensors: dict[str, Tensor] = {}
    component = adapter.anatomy.component
    for name in adapter.layers:
        down, up = adapter.down[name].detach().cpu(), adapter.up[name].detach().cpu()
        up = up.view(*up.shape, *[1] * (down.ndim - 2))
        if style == "diffusers":
            up = up * (scale * adapter.alpha / adapter.rank)
            tensors |= {f"{component}.{name}.lora_{ab}.weight": x for ab, x in (("A", down), ("B", up))}
        else:
            key = f"lora_{component}_" + name.replace(".", "_")
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up * scale}
            tensors[f"{key}.alpha"] = torch.tensor(adapter.alpha)
    header = {"format": "pt", **metadata}
    tensors = {k: x.contiguous() for k, x in tensors.items()}
    with atomic_file(path, overwrite) as temporary:
        save_file(tensors, temporary, metadata=header)


def read(path: str | Path, anatomy: Anatomy) -> tuple[dict[str, Tensor], int, float]:
    """A LoRA file of either style as (state dict of an `Adapter`, rank, alpha).

    Raises:
        BadInput: not a readable safetensors file, keys that belong to no layer of the network, or mixed
            ranks.
    """
    component, layers = anatomy.component, {n for n, m in anatomy.network.named_modules() if takes_adapter(m)}
    spelled = {name.replace(".", "_"): name for name in layers}
    state: dict[str, Tensor] = {}
    alphas: set[float] = set()
    for key, x in _tensors(Path(path)).items():
        if match := re.fullmatch(rf"{component}\.(.+)\.lora_([AB])\.weight", key):
            name, factor = match[1], {"A": "down", "B": "up"}[match[2]]
        elif match := re.fullmatch(rf"lora_{component}_(.+)\.(?:lora_(down|up)\.weight|alpha)", key):
            name, factor = spelled.get(match[1], ""), match[2]
        else:
            name, factor = "", None
        if name not in layers:
            raise BadInput(f"{path} does not fit this network, which has no layer for {key}")
        if factor is None:
            alphas.add(float(x))
        else:
            state[f"{name}.{factor}"] = x.flatten(1) if factor == "up" else x
    ranks = {x.shape[0] for key, x in state.items() if key.endswith(".down")}
    if len(ranks) != 1 or len(alphas) > 1:
        raise BadInput(
            f"{path} must have one rank and one alpha; it has ranks {sorted(ranks)}, alphas {sorted(alphas)}"
        )
    rank = ranks.pop()
    return state, rank, alphas.pop() if alphas else float(rank)


def _tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        raise BadInput(f"{path} is not a .safetensors file: other formats are not read")
    try:
        with safe_open(path, "pt") as opened:
            return {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError as error:
        raise BadInput(f"there is no adapter file {path}") from error
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} is truncated or corrupt ({error}): fetch or write it again") from error
