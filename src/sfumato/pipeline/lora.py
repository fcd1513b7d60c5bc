"""Adapters as LoRA files in safetensors, in the two spellings that other tools read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.files import atomic_file
from sfumato.foreign import read_json, read_tensors, reading, shaped, shortened

from .anatomy.base import takes_adapter

if TYPE_CHECKING:
    from .anatomy import Anatomy

STYLES = ("diffusers", "webui")


def save(
    factors: Mapping[str, tuple[Tensor, Tensor]],
    component: str,
    rank: int,
    alpha: float,
    path: str | Path,
    style: str,
    scale: float,
    metadata: Mapping[str, str],
    overwrite: bool,
) -> None:
    """Write an adapter's factors as a LoRA of fixed strength, which ``pipe.load_lora_weights`` and web UIs load.

    A LoRA file knows no per-prompt strength: an adapter made for facilitated transport acts on every prompt
    alike.

    Args:
        factors: (down, up) by layer.
        component: the pipeline's that has these layers, "unet" or "transformer".
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
    for name, factor in factors.items():
        down, up = (x.detach().cpu() for x in factor)
        up = up.view(*up.shape, *[1] * (down.ndim - 2))
        if style == "diffusers":
            up = up * (scale * alpha / rank)
            tensors |= {f"{component}.{name}.lora_{ab}.weight": x for ab, x in (("A", down), ("B", up))}
        else:
            key = f"lora_{component}_" + name.replace(".", "_")
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up * scale}
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    header = {"format": "pt", **metadata}
    tensors = {k: x.contiguous() for k, x in tensors.items()}
    with atomic_file(path, overwrite) as temporary:
        save_file(tensors, temporary, metadata=header)


def read(path: str | Path, anatomy: Anatomy) -> tuple[dict[str, Tensor], int, float]:
    """A LoRA file as (state dict of an `Adapter`, rank, alpha), in any spelling of diffusers, peft and the web UIs.

    How strong it is may be said beside each layer, in the file's header or in peft's ``adapter_config.json``; alpha is
    the rank where nothing is said.

    Raises:
        BadInput: not a readable safetensors file, keys that belong to no layer of the network or ask for more than a
            plain LoRA of one network, mixed ranks, or strengths that differ from layer to layer or place to place.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise BadInput(f"{path} is not a .safetensors file: other formats are not read")
    if not path.exists() and not path.is_symlink():
        raise BadInput(f"there is no adapter file {path}")
    tensors, header = read_tensors(path)
    layers = {name for name, module in anatomy.network.named_modules() if takes_adapter(module)}
    spelled = {name.replace(".", "_"): name for name in layers}
    state: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for key, x in tensors.items():
        for more, words in _MORE.items():
            if re.search(more, key):
                raise BadInput(f"{path} holds {words} ({shortened(key, 100)}), which cannot be attached: take another")
        found, factor = _place(key, anatomy.component)
        name = found if found in layers else spelled.get(found, "")
        if not name:
            raise BadInput(f"{path} does not fit this network, which has no layer for {shortened(key, 100)}")
        if not x.is_floating_point() or not x.isfinite().all():
            raise BadInput(f"{key} in {path} holds what is no finite number: fetch or write it again")
        if factor == "alpha":
            if x.numel() != 1:
                raise BadInput(f"{key} in {path} is no single number: fetch or write it again")
            alphas[name] = float(x)
        elif x.ndim < 2:
            raise BadInput(f"{key} in {path} is no matrix: fetch or write it again")
        else:
            state[f"{name}.{factor}"] = x.flatten(1) if factor == "up" else x
    ranks = {x.shape[0] for key, x in state.items() if key.endswith(".down")}
    if alphas and ranks and len({*(key.rsplit(".", 1)[0] for key in state)} - alphas.keys()):
        alphas[""] = float(max(ranks))  # where a layer says nothing, its rank
    if len(ranks) != 1 or len(set(alphas.values())) > 1:
        told = f"ranks {sorted(ranks)}, alphas {sorted(set(alphas.values()))}"
        raise BadInput(f"{path} must have one rank and one alpha; it has {told}")
    rank = ranks.pop()
    beside = {"the tensors": next(iter(alphas.values()))} if alphas else {}
    said = beside | _said(path, header, anatomy.component, rank)
    if len(set(said.values())) > 1:
        told = ", ".join(f"{value:g} in {where}" for where, value in said.items())
        raise BadInput(f"{path} says several alphas, {told}: which is meant cannot be known")
    return state, rank, next(iter(said.values()), float(rank))


_MORE = {
    r"^(text_encoder|te\d?\.|lora_te|lora_prior_te|text_model|encoder\.)": "a part for the text encoder",
    r"dora_scale|magnitude_vector": "magnitudes of DoRA",
    r"hada_|lokr_|lora_mid|\.oft_|\.boft_|\.glora_|\.on_input$": "factors of LyCORIS that are no plain product",
    r"\.(diff|diff_b)$|\.lora_B(\.\w+)?\.bias$|\.lora\.up\.bias$|\.lora_up\.bias$": "biases or whole weights",
}
"""What a file can hold besides the two factors, by how its keys are spelled."""
_FACTORS = {"A": "down", "B": "up", "down": "down", "up": "up"}


def _place(key: str, component: str) -> tuple[str, str]:
    """Layer (dots may be underscores) and factor ("down", "up" or "alpha") of a key; ("", "") where it is none."""
    rest = re.sub(rf"^(?:base_model\.model\.|{component}\.|diffusion_model\.)*", "", key)
    rest = re.sub(rf"^lora_{component}_", "", rest)
    if match := re.fullmatch(r"(.+)\.processor\.(\w+)_lora\.(down|up)\.weight", rest):  # of diffusers before peft
        return f"{match[1]}.{match[2]}" + (".0" if match[2] == "to_out" else ""), match[3]
    if match := re.fullmatch(r"(.+?)\.(?:lora|lora_linear_layer)\.(down|up)\.weight", rest):
        return match[1], match[2]
    if match := re.fullmatch(r"(.+?)\.lora_(A|B|down|up)(?:\.(?!weight$)\w+)?\.weight", rest):
        return match[1], _FACTORS[match[2]]
    match = re.fullmatch(r"(.+?)(?:\.lora|\.lora_linear_layer)?\.alpha", rest)
    return (match[1], "alpha") if match else ("", "")


def _said(path: Path, header: Mapping[str, str], component: str, rank: int) -> dict[str, float]:
    """Place -> alpha, wherever a file's header or peft's file beside it tells one.

    Raises:
        BadInput: what is told cannot be read, or differs between layers.
    """
    told: dict[str, float] = {}
    for name in ("ss_network_alpha", "network_alpha", "lora_alpha", "alpha"):
        if header.get(name, "None") not in ("None", ""):
            told[f"its header's {name}"] = _number(header[name], name, path)
    for name in ("network_alphas", "lora_adapter_metadata"):
        if name in header:
            with reading(path):
                told |= _configured(json.loads(header[name]), f"its header's {name}", path, component, rank)
    beside = path.parent / "adapter_config.json"
    if path.name == "adapter_model.safetensors" and beside.is_file():
        told |= _configured(read_json(beside), beside.name, path, component, rank)
    return told


def _configured(config: Any, where: str, path: Path, component: str, rank: int) -> dict[str, float]:
    """What peft's configuration, or a table of alphas by layer, says of alpha."""
    config = shaped(config, dict, f"{path}: {where}")
    if "alphas" in where:
        values = {_number(value, where, path) for value in config.values()}
        if len(values) > 1:
            raise BadInput(f"{path} must have one rank and one alpha; it has alphas {sorted(values)}")
        return {where: values.pop()} if values else {}
    prefix = f"{component}."
    own = {key.removeprefix(prefix): x for key, x in config.items() if key.startswith(prefix) or "." not in key}
    for name, what in (("rank_pattern", "ranks"), ("alpha_pattern", "alphas")):
        if own.get(name):
            raise BadInput(f"{path} must have one rank and one alpha; {where} tells several {what}")
    if own.get("use_dora"):
        raise BadInput(f"{path} is a DoRA by {where}, which cannot be attached: take a plain LoRA")
    if own.get("r") not in (None, rank):
        raise BadInput(f"{path} has rank {rank}, and {where} says {shortened(str(own['r']), 40)}: write it again")
    if own.get("lora_alpha") is None:
        return {}
    alpha = _number(own["lora_alpha"], where, path)
    return {where: alpha * rank**0.5 if own.get("use_rslora") else alpha}


def _number(value: Any, where: str, path: Path) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise BadInput(f"{path} says {shortened(str(value), 40)!r} as its alpha ({where}), which is no number")
    return found
