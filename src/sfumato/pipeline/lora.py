"""Adapters as LoRA files in safetensors, in the spellings that other tools write and read."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.errors import BadInput
from sfumato.files import atomic_file
from sfumato.foreign import read_tensors, shortened

from . import lora_original
from .anatomy.base import takes_adapter
from .lora_strength import PEFT, Strengths
from .single.names import unet_keys

if TYPE_CHECKING:
    from .anatomy import Anatomy

STYLES = ("diffusers", "webui")
_ENCODERS = {"text_encoder": ("te", "te1"), "text_encoder_2": ("te2",), "text_encoder_3": ("te3",)}
"""What web UIs call the text encoders; the first one "te" where it is alone, Flux's T5 "te3"."""
_T5 = "encoder.block."


@dataclass(frozen=True)
class Product:
    """What is added to a layer: alpha / rank times the product of its factors."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)


def save(
    products: Mapping[str, Product],
    component: str,
    path: str | Path,
    style: str,
    scale: float,
    metadata: Mapping[str, str],
    overwrite: bool,
    network: nn.Module | None = None,
) -> None:
    """Write products as a LoRA of fixed strength, which ``pipe.load_lora_weights`` and web UIs load.

    A LoRA file knows no per-prompt strength: an adapter made for facilitated transport acts on every prompt
    alike.

    Args:
        products: by layer; those of text encoders are called "text_encoder. ...".
        component: the pipeline's that has the other layers, "unet" or "transformer".
        style: "diffusers" (``unet.<layer>.lora_A.weight`` / ``lora_B.weight``; such files carry no alpha, so
            scale alpha / rank is multiplied into B) or "webui", which is kohya's too (``lora_unet_<layer>`` with alpha;
            ``scale`` into up). For transformers "transformer" stands in the place of "unet".
        scale: strength at which a loader's weight 1 acts.
        metadata: further entries of the file's header.
        network: an XL network, of which "webui" then uses the original names of layers, which kohya's scripts want.

    Raises:
        BadInput: unknown style, or the file exists.
    """
    tensors = keyed(products, component, style, scale, network)
    with atomic_file(path, overwrite) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", **metadata})


def keyed(
    products: Mapping[str, Product], component: str, style: str, scale: float = 1.0, network: nn.Module | None = None
) -> dict[str, Tensor]:
    """The tensors of a LoRA file by their keys; arguments as for `save`.

    Raises:
        BadInput: unknown style.
    """
    if style not in STYLES:
        raise BadInput(f"unknown LoRA style {style!r}: use one of {', '.join(STYLES)}")
    tensors: dict[str, Tensor] = {}
    two = any(name.startswith("text_encoder_2.") for name in products) or network is not None
    original = _original(network) if network is not None else {}
    for name, product in products.items():
        part, layer = split(name, component)
        clip = part != component and not layer.startswith((_T5, "text_projection"))
        down, up = (x.detach().cpu() for x in (product.down, product.up))
        up = up.view(*up.shape, *[1] * (down.ndim - 2))
        if clip:
            layer = f"text_model.{layer.removeprefix('text_model.')}"
        if style == "diffusers":
            up = up * (scale * product.alpha / product.rank)
            tensors |= {f"{part}.{layer}.lora_{ab}.weight": x for ab, x in (("A", down), ("B", up))}
        else:
            encoder = "text_encoder_3" if part == "text_encoder_2" and layer.startswith(_T5) else part
            word = component if part == component else _ENCODERS[encoder][-1 if two else 0]
            key = f"lora_{word}_" + original.get(layer, layer).replace(".", "_")
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up * scale}
            tensors[f"{key}.alpha"] = torch.tensor(float(product.alpha))
    return {key: x.contiguous() for key, x in tensors.items()}


def split(name: str, component: str) -> tuple[str, str]:
    """The part of a pipeline and the layer in it that an adapter's name of a layer means."""
    part, _, layer = name.partition(".")
    return (part, layer) if part in _ENCODERS else (component, name)


def read(path: str | Path, anatomy: Anatomy) -> tuple[dict[str, Tensor], int, float]:
    """`products` of a network alone, as (state dict of an `Adapter`, rank, alpha); see `uniform`."""
    return uniform(products(path, anatomy.component, {anatomy.component: anatomy.network}))


def uniform(products: Mapping[str, Product]) -> tuple[dict[str, Tensor], int, float]:
    """Products as the state dict of an adapter with one rank and one alpha.

    Where they have several, those of lower rank get rows of zeros, and what each is scaled by goes into its up factor,
    in float32 at least: in the half precision of most files that would be rounded.
    """
    ranks, alphas = ({f(x) for x in products.values()} for f in (lambda x: x.rank, lambda x: x.alpha))
    rank, state = max(ranks), {}
    one = len(ranks) == len(alphas) == 1
    for name, x in products.items():
        spare = rank - x.rank
        down, up = (y if one else y.to(torch.promote_types(y.dtype, torch.float32)) for y in (x.down, x.up))
        up = up if one else up * (x.alpha / x.rank)
        state[f"{name}.down"] = torch.cat([down, down.new_zeros(spare, *down.shape[1:])]) if spare else down
        state[f"{name}.up"] = torch.cat([up, up.new_zeros(len(up), spare)], dim=1) if spare else up
    return state, rank, alphas.pop() if one else float(rank)


def products(
    path: str | Path, component: str, parts: Mapping[str, nn.Module], besides: Collection[str] = ()
) -> dict[str, Product]:
    """A LoRA file in any spelling of diffusers, peft, kohya and the web UIs, convolutions and mixed ranks included.

    How strong a layer's is may be said beside it, in the file's header or in peft's ``adapter_config.json``; alpha is
    the rank where nothing is said. A file of peft in a folder called as a text encoder is of that one.

    Args:
        component: what the pipeline calls its network.
        parts: the network and, to be read too, text encoders, by component name.
        besides: keys of what else the file holds.

    Returns:
        Products by layer, as `save` takes them.

    Raises:
        BadInput: not a readable safetensors file; keys that belong to no layer, or of another model's shapes; what is
            no plain product (DoRA, LoHa, LoKr, ...), by name; half of a product; strengths that contradict each other.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise BadInput(f"{path} is not a .safetensors file: other formats are not read, take one of these")
    if not path.exists() and not path.is_symlink():
        raise BadInput(f"there is no adapter file {path}")
    tensors, header = read_tensors(path)
    tensors = {key: x for key, x in tensors.items() if key not in besides}
    if path.name == PEFT and re.fullmatch(r"text_encoder(_\d)?", path.parent.name):
        tensors = {re.sub(r"^(?=base_model\.)", f"{path.parent.name}.", key): x for key, x in tensors.items()}
    said = Strengths(path, header)
    if not any(_place(key)[1] or _any_of(_MORE, key) for key in tensors):
        _refuse_no_lora(path, tensors)
    layers, names = _spellings(component, parts)
    found: dict[str, dict[str, Tensor]] = {}
    for key, x in tensors.items():
        if words := _any_of(_MORE, key):
            raise BadInput(f"{path} holds {words} ({shortened(key, 100)}), which cannot be attached: take another")
        name, factor = _layer(key, component, parts, layers, names)
        fused = {} if name else _fused(path, key, x, component, parts, layers)
        if not name and not fused:
            _refuse_key(path, key, component, parts, tensors)
        if not x.is_floating_point() or not x.isfinite().all():
            raise BadInput(f"{key} in {path} holds what is no finite number: fetch or write it again")
        if factor == "alpha" and x.numel() != 1:
            raise BadInput(f"{key} in {path} is no single number: fetch or write it again")
        if factor != "alpha" and x.ndim < 2:
            raise BadInput(f"{key} in {path} is no matrix: fetch or write it again")
        for each, part in (fused or {name: x}).items():
            found.setdefault(each, {})[factor] = part
    made: dict[str, Product] = {}
    mixed = len({float(x["alpha"]) for x in found.values() if "alpha" in x}) > 1
    for name, factors in found.items():
        if missing := {"down", "up"} - factors.keys():
            raise BadInput(f"{path} is incomplete: it lacks the {missing.pop()} factor of {name}: fetch it again")
        down, up = _fitted(path, name, layers[name].weight, factors["down"], factors["up"], tensors)
        beside = float(factors["alpha"]) if "alpha" in factors else None
        made[name] = Product(down, up, said.alpha(*split(name, component), len(down), beside, mixed))
    if not made:
        raise BadInput(f"{path} holds no LoRA: fetch it again")
    return made


_MORE = {
    r"dora_scale|magnitude_vector": "magnitudes of DoRA",
    r"hada_": "factors of LoHa (LyCORIS)",
    r"lokr_": "factors of LoKr (LyCORIS)",
    r"lora_mid|\.b?oft_|\.[ab][12]\.weight$|\.on_input$|\.ia3_": "factors of LyCORIS that are no plain product",
    r"\.scalar$": "factors of LyCORIS with one more number for each",
    r"\.[wb]_norm$": "weights of normalisations (LyCORIS)",
    r"^bundle_emb\.": "learned words beside its factors",
    r"\.(diff|diff_b)$|\.lora_B(\.\w+)?\.bias$|\.lora\.up\.bias$|\.lora_up\.bias$": "biases or whole weights",
}
"""What a file can hold besides the two factors, by how its keys are spelled."""
_NO_LORA = {
    r"^(emb_params|string_to_param|clip_[lg]|<.*>)$": "a learned word (textual inversion): take a LoRA",
    r"^(model\.diffusion_model|cond_stage_model|conditioner|first_stage_model)\.": "a whole model: take a LoRA",
    r"\.(weight|bias)$": "weights of a network: take a LoRA",
}
"""What else is given as an adapter, by a key of it."""
_TEXT = re.compile(r"^(text_encoder|te\d?\.|lora_te|lora_prior_te|text_model|encoder\.)")
_FACTORS = {"A": "down", "B": "up", "down": "down", "up": "up"}


def _spellings(component: str, parts: Mapping[str, nn.Module]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers that take a product by an adapter's name for them, and those names by how files spell them."""
    layers: dict[str, nn.Module] = {}
    spelled: dict[str, str] = {}
    for part, module in parts.items():
        own = {name: m for name, m in module.named_modules() if takes_adapter(m)}
        for name, m in own.items():
            full = name if part == component else f"{part}.{name}"
            layers[full] = m
            plain = name if part == component else name.removeprefix("text_model.")
            spelled[f"{part}:{plain.replace('.', '_')}"] = full
        if part == component == "unet":
            spelled |= {f"{part}:{key.replace('.', '_')}": name for name, key in _original(module).items()}
    return layers, spelled


def _original(network: nn.Module) -> dict[str, str]:
    """The names of a U-Net's layers in the original layout, which kohya's scripts use of XL; none of other networks."""
    names = [f"{name}.weight" for name, m in network.named_modules() if takes_adapter(m)]
    try:
        return {name.removesuffix(".weight"): key.removesuffix(".weight") for name, key in unet_keys(names).items()}
    except (KeyError, ValueError):
        return {}


def _layer(
    key: str, component: str, parts: Mapping[str, nn.Module], layers: Mapping[str, Any], spelled: Mapping[str, str]
) -> tuple[str, str]:
    """An adapter's name of a key's layer, and the factor ("down", "up" or "alpha"); ("", "") where it is none."""
    part, rest = _part(key, component, parts)
    place, factor = _place(rest)
    if part == component and place in layers:
        return place, factor
    flat = place.replace(".", "_")
    plain = flat if part == component else flat.removeprefix("text_model_")
    return spelled.get(f"{part}:{plain}", ""), factor


def _fused(
    path: Path, key: str, x: Tensor, component: str, parts: Mapping[str, nn.Module], layers: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """What a key in the names of a network's original code says of diffusers' layers."""
    part, rest = _part(key, component, parts)
    place, factor = _place(rest)
    network = parts[component]
    return lora_original.factors(path, key, place, factor, x, layers, network) if part == component else {}


def _part(key: str, component: str, parts: Mapping[str, nn.Module]) -> tuple[str, str]:
    """The component that a key is for, and the key without what says so."""
    rest = re.sub(r"^base_model\.model\.", "", key)
    if match := re.match(r"(text_encoder(?:_\d)?)\.(?:base_model\.model\.)?(.+)", rest):
        return match[1], match[2]
    if match := re.match(r"(?:lora_)?te(\d?)[_.](.+)", rest):
        # kohya calls T5 the third, also in Flux, where it is the second.
        number = "2" if match[1] == "3" and type(parts[component]).__name__ == "FluxTransformer2DModel" else match[1]
        return f"text_encoder_{number}" if number in ("2", "3") else "text_encoder", match[2]
    if re.match(r"text_model\.|encoder\.layers\.", rest):
        return "text_encoder", rest
    rest = re.sub(rf"^(?:{component}\.|base_model\.model\.|diffusion_model\.)*", "", rest)
    return component, re.sub(rf"^lora_(?:{component}|unet)_", "", rest)


def _place(rest: str) -> tuple[str, str]:
    """Layer (dots may be underscores) and factor of a key; ("", "") where it is none."""
    if match := re.fullmatch(r"(.+)\.processor\.(\w+)_lora\.(down|up)\.weight", rest):  # of diffusers before peft
        return f"{match[1]}.{match[2]}" + (".0" if match[2] == "to_out" else ""), match[3]
    if match := re.fullmatch(r"(.+?)\.(?:lora|lora_linear_layer)\.(down|up)\.weight", rest):
        return match[1], match[2]
    if match := re.fullmatch(r"(.+?)\.lora_(A|B|down|up)(?:\.(?!weight$)\w+)?\.weight", rest):
        return match[1], _FACTORS[match[2]]
    match = re.fullmatch(r"(.+?)(?:\.lora|\.lora_linear_layer)?\.alpha", rest)
    return (match[1], "alpha") if match else ("", "")


_FAMILIES = {
    r"double_blocks|single_blocks|single_transformer_blocks": "Flux",
    r"joint_blocks|[._]add_[qkv]_proj": "SD3 or Flux",
    r"(noise|context)_refiner|layers[._]\d+[._]attention[._]": "Z-Image",
    r"text_encoder_2\.|lora_te2_|input_blocks_[78]_1|_transformer_blocks_9_": "SDXL",
    r"lora_te_|(down|up)_blocks[._]\d[._]attentions": "Stable Diffusion",
}
"""Families that some keys of theirs tell."""


def _family(tensors: Mapping[str, Tensor]) -> str:
    """For whom a file seems to be made, in words that follow "network"."""
    if wide := {x.shape[1] for k, x in tensors.items() if re.search(r"attn2[._]to_k\.lora[._](A|down)", k)}:
        known = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
        if len(wide) == 1 and (width := wide.pop()) in known:
            return f"; it seems to be made for {known[width]}"
    told = (who for pattern, who in _FAMILIES.items() if any(re.search(pattern, key) for key in tensors))
    who = next(told, "")
    return f"; it seems to be made for {who}" if who else ""


def _any_of(words: Mapping[str, str], key: str) -> str:
    """The words of the first pattern that is in a key; empty where none is."""
    return next((told for pattern, told in words.items() if re.search(pattern, key)), "")


def _refuse_no_lora(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for key in sorted(tensors):
        if what := _any_of(_NO_LORA, key):
            raise BadInput(f"{path} holds no LoRA but {what} ({shortened(key, 80)})")
    raise BadInput(f"{path} holds no LoRA: fetch it again")


def _refuse_key(
    path: Path, key: str, component: str, parts: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]
) -> None:
    if _TEXT.search(key):
        part, _ = _part(key, component, parts)
        if not any(name.startswith("text_encoder") for name in parts):
            told = "a part for the text encoder"
            raise BadInput(f"{path} holds {told} ({shortened(key, 100)}), which cannot be attached: take another")
        if part not in parts:
            raise BadInput(
                f"{path} is for a model of another family, with a {part} ({shortened(key, 80)}), which this one lacks:"
                " attach it to the model that it was made for"
            )
    part, rest = _part(key, component, parts)
    if part in parts and rest in dict(parts[part].named_parameters()):  # as peft's modules_to_save
        raise BadInput(f"{path} holds a whole weight ({shortened(key, 100)}), which cannot be attached: take another")
    whose = _family(tensors)
    raise BadInput(f"{path} does not fit this network, which has no layer for {shortened(key, 100)}{whose}")


def _fitted(
    path: Path, name: str, weight: Tensor, down: Tensor, up: Tensor, tensors: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The factors in the shapes that a layer's weight asks for: (rank, in[, k, k]) and (out, rank)."""
    rank, out = len(down), len(weight)
    if up.numel() == len(up) * rank:
        up = up.reshape(len(up), rank)
    if down.numel() == rank * weight[0].numel():
        down = down.reshape(rank, *weight.shape[1:])
    if down.shape[1:] != weight.shape[1:] or up.shape != (out, rank):
        told = f"{tuple(down.shape)} and {tuple(up.shape)}, for a weight of {tuple(weight.shape)}"
        raise BadInput(f"{path} does not fit: its factors of {name} are {told}{_family(tensors)}")
    return down, up
