"""What a file holds, by its header alone, and which of the original layouts that is; all else is refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from sfumato.errors import BadInput
from sfumato.foreign import reading, refuse_pointers, shortened

from .names import LAYOUTS, SD1, SDXL, Layout

PICKLE = (
    "convert it in an isolated environment: load it there with diffusers (from_pretrained or "
    "from_single_file) and write it with save_pretrained(folder, safe_serialization=True)"
)
FOLDER = "give its diffusers folder"
KNOWN = ", ".join(layout.title for layout in LAYOUTS)
_UNET = SD1.prefixes["unet"]
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Facts:
    """The header of a safetensors file: shapes and precisions ("F16") by key, and its metadata."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    kinds: Mapping[str, str]
    header: Mapping[str, str]

    def __contains__(self, key: str) -> bool:
        return key in self.shapes

    def under(self, prefix: str) -> Facts:
        """Of the keys with this prefix, without it."""
        cut = lambda named: {k.removeprefix(prefix): x for k, x in named.items() if k.startswith(prefix)}
        return Facts(self.path, cut(self.shapes), cut(self.kinds), self.header)

    def shape(self, key: str) -> tuple[int, ...]:
        """Of one tensor.

        Raises:
            BadInput: there is none of that name.
        """
        if key not in self.shapes:
            raise BadInput(f"{self.path} is of no layout that is read ({KNOWN}): it lacks {key}; {FOLDER}")
        return self.shapes[key]

    def count(self, pattern: str) -> int:
        """How many numbers stand in the place of the group in ``pattern``: one more than the largest."""
        found = [int(match[1]) for key in self.shapes if (match := re.match(pattern, key))]
        return max(found, default=-1) + 1


def facts_of(path: Path) -> Facts:
    """The header of a file, whatever its name.

    Raises:
        BadInput: a pickle, a quantised model in another format, or a damaged file.
    """
    refuse_pointers(path)
    with reading(path), open(path, "rb") as stream:
        start = stream.read(9)
    safe = start[8:] == b"{"  # behind the header's length, whose bytes may be any
    if not safe and (start[:1] == b"\x80" or start[:2] == b"PK"):
        raise BadInput(f"{path} is a pickle, which can run code when it is read: {PICKLE}")
    if not safe and start[:4] == b"GGUF":
        raise BadInput(f"{path} holds quantised weights (GGUF), which are not read: take the full weights")
    with reading(path, "a model"), safe_open(path, "pt") as opened:
        pieces = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
        shapes = {key: tuple(piece.get_shape()) for key, piece in pieces.items()}
        return Facts(
            path, shapes, {key: str(piece.get_dtype()) for key, piece in pieces.items()}, opened.metadata() or {}
        )


def layout_of(facts: Facts) -> Layout:
    """The layout of a whole text-to-image model.

    Raises:
        BadInput: it is something else, or a part of one; the sentence says what, and by which key it is known.
    """
    _refuse_what_is_no_model(facts)
    _refuse_variants(facts)
    for layout in LAYOUTS:
        if all(facts.under(prefix).shapes for prefix in layout.prefixes.values()):
            return layout
    wanted = {"autoencoder": ("first_stage_model.",), "text encoder": ("cond_stage_model.", "conditioner.")}
    lacks = [f"no {what}" for what, prefix in wanted.items() if not any(k.startswith(prefix) for k in facts.shapes)]
    raise BadInput(
        f"{facts.path} is a part of a model: it holds a denoising network, but "
        f"{' and '.join(lacks) or 'not the text encoders of one layout'}: give a whole one"
    )


_OTHERS = [
    (r"lora_|\.lora\.|hada_w|lokr_w|\.oft_|\.alpha$", "a LoRA or a relative of it: attach it to its model (--adapter)"),
    (r"^(emb_params|string_to_param|clip_[lg]$)", "a learned word (textual inversion), not a model: give a model"),
    (r"control_model\.|^controlnet|input_hint_block", "a ControlNet, not a model: give a text-to-image model"),
    (
        r"joint_blocks\.|double_blocks\.|double_stream|noise_refiner|context_refiner|cap_embedder|txt_in\.|blocks\.\d+\.cross_attn\.|"
        r"^(model\.diffusion_model\.)?(transformer_blocks|single_transformer_blocks|layers)\.\d+\.|clip_txt_mapper|distilled_guidance",
        f"of a family whose single files are not read (those of {KNOWN} are): {FOLDER}",
    ),
    (r"motion_modules\.", "a motion module or a model of moving pictures, which is not read: give a model of pictures"),
    (
        r"^(down_blocks|up_blocks|mid_block|conv_in|text_model|embeddings)\.|^encoder\.(down_blocks|layers)\.",
        "one network out of a diffusers folder, not a model: give the folder",
    ),
]
"""What files are, by keys that only they have."""


def _refuse_what_is_no_model(facts: Facts) -> None:
    if not facts.shapes:
        raise BadInput(f"{facts.path} holds no tensors: fetch or write it again")
    own = any(key.startswith(_UNET + "input_blocks.") for key in facts.shapes)
    for pattern, what in _OTHERS:
        odd = next((key for key in facts.shapes if re.search(pattern, key)), None)
        if odd is not None and not (own and pattern.startswith("^(down_blocks")):
            raise BadInput(f"{facts.path} is {what} ({shortened(odd, 80)})")
    if own:
        return
    vae = ("first_stage_model.", "encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "loss.")
    if all(key.startswith(vae) for key in facts.shapes):
        raise BadInput(f"{facts.path} is an autoencoder alone: give a whole text-to-image model")
    if any(key.startswith(("first_stage_model.", "cond_stage_model.", "conditioner.")) for key in facts.shapes):
        raise BadInput(f"{facts.path} is a part of a model: it has no denoising network ({_UNET}...): give a whole one")
    some = ", ".join(shortened(key, 60) for key in sorted(facts.shapes)[:3])
    raise BadInput(
        f"{facts.path} is a single file of a layout that is not known; it begins with {some}: {KNOWN} are read in "
        f"their original layout, else {FOLDER}"
    )


_INPUTS = {9: "an inpainting", 8: "a picture-editing", 5: "a depth-to-image", 7: "an upscaling"}


def _refuse_variants(facts: Facts) -> None:
    shape = facts.shape(_UNET + "input_blocks.0.0.weight")
    channels, out = shape[1] if len(shape) == 4 else 0, facts.shapes.get(_UNET + "out.2.weight", (0,))[0]
    if out and channels > out:
        what = _INPUTS.get(channels, "a conditioned")
        raise BadInput(
            f"{facts.path} is {what} checkpoint (its network takes {channels} channels), which is not supported: give "
            "a text-to-image one"
        )
    first = SDXL.prefixes["text_encoder"]
    if any(k.startswith("conditioner.embedders.0.model.") for k in facts.shapes) and not facts.under(first).shapes:
        raise BadInput(f"{facts.path} is a refiner, which only finishes pictures of a base model: give SDXL base")
    if edm := [key for key in facts.shapes if key in ("edm_mean", "edm_std", "edm_vpred.sigma_max")]:
        raise BadInput(
            f"{facts.path} was trained in EDM's parametrisation ({edm[0]}), which is not supported: {FOLDER}"
        )


def check_precision(facts: Facts, part: str, keys: set[str], asked: bool) -> None:
    """Refuse a part whose weights are of several precisions, unless it was ``asked`` in which to have them; and those
    that are no plain floating point.

    Raises:
        BadInput: which, and an example of each.
    """
    kinds: dict[str, str] = {}
    for key in sorted(keys):
        kinds.setdefault(facts.kinds[key], key)
    if odd := [kind for kind in kinds if kind not in _FLOATS]:
        raise BadInput(
            f"{facts.path} holds weights in {odd[0]} ({shortened(kinds[odd[0]], 80)}), which are not read: take the "
            "full weights"
        )
    if len(kinds) > 1 and not asked:
        (a, x), (b, y) = list(kinds.items())[:2]
        raise BadInput(
            f"{facts.path} mixes precisions in its {part}: {shortened(x, 70)} is {_FLOATS[a]}, {shortened(y, 70)} is "
            f"{_FLOATS[b]}: say which to take it in (--dtype)"
        )
