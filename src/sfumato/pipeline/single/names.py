"""Where each weight of diffusers' networks stands in a file of the original layout; one table for both ways."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Form = Literal["same", "conv", "transposed", "third"]


@dataclass(frozen=True)
class Slot:
    """Where a weight stands.

    Attributes:
        key: in the file.
        form: "same"; "conv": a matrix, kept as a convolution of 1x1; "transposed"; "third": the rows of query, key or
            value in one matrix of all three.
        third: which of the three.
    """

    key: str
    form: Form = "same"
    third: int = 0

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """In the file, of a weight of this ``shape``."""
        if self.form == "conv":
            return (*shape, 1, 1)
        if self.form == "transposed":
            return tuple(shape[::-1])
        return (3 * shape[0], *shape[1:]) if self.form == "third" else tuple(shape)

    def put(self, x: Tensor) -> Tensor:
        """The weight as the file has it; of a "third" its own rows."""
        if self.form == "conv":
            return x[:, :, None, None]
        return x.T if self.form == "transposed" else x


@dataclass(frozen=True)
class Layout:
    """One of the original layouts.

    Attributes:
        title: in sentences.
        pipeline: diffusers' class.
        prefixes: of the keys of each part.
        open_clip: the text encoders that are OpenCLIP's, which has other names.
    """

    title: str
    pipeline: str
    prefixes: Mapping[str, str]
    open_clip: tuple[str, ...] = ()

    def slots(self, part: str, names: Iterable[str], levels: int = 0) -> dict[str, Slot]:
        """The slot of each weight of a part, by diffusers' names of them.

        Args:
            names: of the part's parameters.
            levels: of resolution, in the autoencoder, which counts its up blocks from the other end.

        Raises:
            KeyError, ValueError: a weight that the layout has no name for.
        """
        names = [name.removeprefix("text_model.") for name in names]
        if part == "unet":
            made = {name: Slot(key) for name, key in unet_keys(names).items()}
        elif part == "vae":
            made = {name: _vae(name, levels) for name in names}
        elif part in self.open_clip:
            made = {name: _open_clip(name) for name in names}
        else:
            made = {n: Slot(n if n.startswith("text_projection.") else f"text_model.{n}") for n in names}
        prefix = self.prefixes[part]
        return {name: Slot(prefix + slot.key, slot.form, slot.third) for name, slot in made.items()}


_SD = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
SD1 = Layout(
    "Stable Diffusion 1.x", "StableDiffusionPipeline", {**_SD, "text_encoder": "cond_stage_model.transformer."}
)
SD2 = Layout(
    "Stable Diffusion 2.x",
    "StableDiffusionPipeline",
    {**_SD, "text_encoder": "cond_stage_model.model."},
    ("text_encoder",),
)
SDXL = Layout(
    "SDXL",
    "StableDiffusionXLPipeline",
    {**_SD, "text_encoder": "conditioner.embedders.0.transformer.", "text_encoder_2": "conditioner.embedders.1.model."},
    ("text_encoder_2",),
)
LAYOUTS = (SD1, SD2, SDXL)

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE = [
    (r"\bdown_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
    (r"\bup_blocks\.(\d+)\.resnets\.(\d+)", r"up.\1.block.\2"),
    (r"\bdown_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"\bup_blocks\.(\d+)\.upsamplers\.0", r"up.\1.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
]
_OPEN_CLIP = [
    (r"^encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"^final_layer_norm\.", "ln_final."),
    (r"^embeddings\.token_embedding\.", "token_embedding."),
    (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
]


def unet_keys(names: Sequence[str]) -> dict[str, str]:
    """The original names of a U-Net's parameters, without the prefix.

    The original counts all blocks in one row: the first convolution, and of each level its resnets and the change of
    size.

    Raises:
        KeyError, ValueError: a weight that the layout has no name for.
    """
    found = [re.match(r"down_blocks\.0\.resnets\.(\d+)\.", name) for name in names]
    row = 2 + max(int(match[1]) for match in found if match)  # the resnets of a level, and the change of size
    attended = {match[0] for name in names if (match := re.match(r"up_blocks\.\d+\.attentions", name))}
    return {name: _unet_key(name, row, attended) for name in names}


def _unet_key(name: str, row: int, attended: set[str]) -> str:
    module, _, last = name.rpartition(".")
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.{last}"
    side, _, rest = name.partition(".")
    if side == "mid_block":
        kind, index, inner = rest.split(".", 2)
        _known(kind, "attentions", "resnets")
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}.{_inner(kind, inner)}"
    block, kind, index, inner = rest.split(".", 3)
    _known(side, "down_blocks", "up_blocks")
    _known(kind, "attentions", "resnets", "downsamplers", "upsamplers")
    if kind == "downsamplers":
        return f"input_blocks.{(int(block) + 1) * row}.0.op.{last}"
    if kind == "upsamplers":
        place = 2 if f"up_blocks.{block}.attentions" in attended else 1
        return f"output_blocks.{(int(block) + 1) * row - 1}.{place}.conv.{last}"
    first = 1 if side == "down_blocks" else 0
    blocks = "input_blocks" if first else "output_blocks"
    return f"{blocks}.{first + int(block) * row + int(index)}.{int(kind == 'attentions')}.{_inner(kind, inner)}"


def _known(word: str, *words: str) -> None:
    if word not in words:
        raise KeyError(word)


def _inner(kind: str, name: str) -> str:
    module, _, last = name.rpartition(".")
    return name if kind == "attentions" else f"{_RESNET[module]}.{last}"


def _vae(name: str, levels: int) -> Slot:
    name = re.sub(r"^(decoder\.up_blocks\.)(\d+)", lambda m: f"{m[1]}{levels - 1 - int(m[2])}", name)
    key = name
    for pattern, other in _VAE:
        key = re.sub(pattern, other, key)
    if re.search(r"(down|mid|up)_block", key):
        raise KeyError(name)
    return Slot(key, "conv" if re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", key) else "same")


def _open_clip(name: str) -> Slot:
    if name == "text_projection.weight":
        return Slot("text_projection", "transposed")
    key = name
    for pattern, other in _OPEN_CLIP:
        key = re.sub(pattern, other, key)
    if match := re.match(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)$", key):
        return Slot(f"{match[1]}.attn.in_proj_{match[3]}", "third", "qkv".index(match[2]))
    return Slot(key)
