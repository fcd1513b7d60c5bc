"""The edit of a model as a LoRA: what two pipelines differ by, in products of low rank."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.errors import BadInput
from sfumato.files import atomic_folder
from sfumato.text import counted

from .anatomy.base import takes_adapter
from .lora import Product, save
from .lora_strength import PEFT
from .organs import Organs

KOHYA = ("sd", "sdxl", "flux")
"""Families whose LoRA other tools read in kohya's spelling."""

_SHOWN = 5

Factors = dict[str, dict[str, tuple[Tensor, Tensor]]]
"""(down, up) by component ("unet", "text_encoder") and layer; scale 1."""


@dataclass(frozen=True)
class LowRank:
    """An edit in low rank.

    Attributes:
        factors: the products that are added to the base model's weights.
        errors: by ``component.layer``: how far the product is from the edit, relative to the edit (Frobenius norms).
        left: parameters that differ and that no LoRA holds (biases, normalisations, embeddings).
    """

    factors: Factors
    errors: dict[str, float]
    left: tuple[str, ...]

    @property
    def lost(self) -> str:
        """What is left out, in words; empty where nothing is."""
        some = ", ".join([*self.left[:_SHOWN], *(["..."] if self.left[_SHOWN:] else [])])
        return f"{counted(len(self.left), 'parameter')} that no LoRA holds ({some})" if self.left else ""

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each product, by ``component.layer``."""
        return {
            f"{part}.{name}": len(down) for part, named in self.factors.items() for name, (down, _) in named.items()
        }


def truncated(
    delta: Float[Tensor, "out in ..."], rank: int | None = None, energy: float | None = None
) -> tuple[Float[Tensor, "rank in ..."], Float[Tensor, "out rank"], float]:
    """The product of this rank that is nearest to a matrix (Eckart and Young), as ``up @ down``.

    Args:
        delta: a linear layer's or, with kernel, a convolution's.
        rank: at most this; None for as many as ``energy`` asks for.
        energy: the least rank with this share of the squared Frobenius norm; None for the whole of it.

    Returns:
        down, up, each with the square roots of the singular values, and the relative error: the root of the share of
        the squared norm that is left out. Singular values below rounding are left out in any case.
    """
    flat = delta.flatten(1)
    u, s, v = torch.linalg.svd(flat, full_matrices=False)
    shares = s.square().cumsum(0) / s.square().sum()
    real = int((s > s[0] * max(flat.shape) * torch.finfo(s.dtype).eps).sum())
    kept = real if energy is None else min(real, int((shares < energy).sum()) + 1)
    kept = max(1, kept if rank is None else min(kept, rank))
    root = s[:kept].sqrt()
    error = float((1 - shares[kept - 1]).clamp_min(0).sqrt()) if kept < len(s) else 0.0
    return (root[:, None] * v[:kept]).view(kept, *delta.shape[1:]), u[:, :kept] * root, error


def as_low_rank(base: Organs, edited: Organs, rank: int | None = None, energy: float | None = 0.99) -> LowRank:
    """The difference of two pipelines with the same networks, layer by layer, in float64.

    Where the edit is on parameters that no LoRA holds, ``left`` names them. The autoencoder is compared too, and is
    held by none.

    Args:
        rank, energy: as in `truncated`, for every layer.

    Raises:
        BadInput: other networks; numbers that are not finite; nothing differs; no layer that a LoRA holds differs.
    """
    factors: Factors = {}
    errors: dict[str, float] = {}
    left: list[str] = []
    for part, name, layer, before, after in _changed(base, edited):
        delta = after.detach().double().cpu() - before.detach().double().cpu()
        if not delta.isfinite().all():
            raise BadInput(f"the edit of {part}.{name} holds numbers that are not finite: no LoRA is made of it")
        if layer is None:
            left.append(f"{part}.{name}")
            continue
        down, up, errors[f"{part}.{layer}"] = truncated(delta, rank, energy)
        factors.setdefault(part, {})[layer] = (down.float(), up.float())
    if not factors and not left:
        raise BadInput("the two models do not differ: there is nothing to make a LoRA of")
    if not factors:
        more = f" and {len(left) - 1} more" if left[1:] else ""
        raise BadInput(f"the models differ only where no LoRA acts ({left[0]}{more}): export a whole model")
    return LowRank(factors, errors, tuple(left))


def _changed(base: Organs, edited: Organs) -> Iterator[tuple[str, str, str | None, Tensor, Tensor]]:
    """(part, parameter, layer that takes a product or None, before, after) of each parameter that differs."""
    ours, theirs = base.parts(), edited.parts()
    for part in sorted(ours.keys() | theirs.keys()):
        if part == "safety_checker":
            continue
        if part not in ours or part not in theirs:
            raise BadInput(f"one of the models has no {part}: give the model that the edit was made from")
        before, after = (dict(m.named_parameters()) for m in (ours[part], theirs[part]))
        if odd := sorted(before.keys() ^ after.keys()):
            raise BadInput(f"the models have different networks ({odd[0]} of the {part}): give the edit's own base")
        layers = _layers(ours[part]) if part == base.anatomy.component or part.startswith("text_encoder") else {}
        for name, x in before.items():
            if x.shape != after[name].shape:
                raise BadInput(f"{name} of the {part} has another shape in the other model: give the edit's own base")
            if x.data_ptr() != after[name].data_ptr() and not torch.equal(x, after[name].to(x)):
                yield part, name, layers.get(name), x, after[name]


def _layers(module: nn.Module) -> dict[str, str]:
    """Layer by the name of its weight."""
    return {f"{name}.weight": name for name, m in module.named_modules() if takes_adapter(m)}


def picture_error(one: Organs, other: Organs, prompts: Sequence[str], seed: int = 0, sampling_steps: int = 20) -> float:
    """Mean absolute difference (pixels in [0, 1]) of the pictures that two pipelines draw of the same prompts."""
    drawn = [
        p.draw(list(prompts), [seed + i for i in range(len(prompts))], sampling_steps=sampling_steps)
        for p in (one, other)
    ]
    return float((drawn[0] - drawn[1]).abs().mean())


def with_low_rank(base: Organs, factors: Factors) -> Organs:
    """A pipeline that owns the weights of ``base`` with the products added."""
    names = {f"{part}.{name}.weight" for part, named in factors.items() for name in named}
    made = base.copy(own=names)
    with torch.no_grad():
        for part, named in factors.items():
            for name, (down, up) in named.items():
                weight = made.parts()[part].get_submodule(name).weight
                product = up.double() @ down.double().flatten(1)
                weight.copy_(weight.double() + product.view(weight.shape).to(weight.device))
                weight.requires_grad_(False)
    return made


def check_style(base: Organs, style: str) -> None:
    """Raise `BadInput` for kohya's spelling of a family in which no other tool would read it."""
    if style == "kohya" and base.family not in KOHYA:
        raise BadInput(
            f"no other tool reads kohya's spelling of {base.family}, of which diffusers would attach nothing and say "
            "so nowhere: choose --format lora or peft, in Python style='diffusers'"
        )


def write_low_rank(
    low: LowRank, base: Organs, path: str | Path, style: str, overwrite: bool, metadata: Mapping[str, str]
) -> None:
    """Write the products: "lora" as diffusers spells them, "kohya" as kohya and the web UIs, "peft" as folders.

    peft loads one network at a time: its folders are called as the pipeline's parts.

    Args:
        metadata: for the header of the files.

    Raises:
        BadInput: as `check_style`; the output exists, or the disk is full; nothing is left behind.
    """
    check_style(base, style)
    component = base.anatomy.component
    if style == "peft":
        with atomic_folder(path, overwrite) as folder:
            for part, named in low.factors.items():
                _write_peft(folder / part, named, metadata)
        return
    # one alpha for all layers, though their ranks differ: diffusers mistakes several where attention and text encoders
    # are concerned
    products = {
        name if part == component else f"{part}.{name}": Product(down, up * len(down), 1.0)
        for part, named in low.factors.items()
        for name, (down, up) in named.items()
    }
    xl = base.network if style == "kohya" and base.family == "sdxl" else None
    save(products, component, path, {"lora": "diffusers", "kohya": "webui"}[style], 1.0, metadata, overwrite, xl)


def _write_peft(folder: Path, named: Mapping[str, tuple[Tensor, Tensor]], metadata: Mapping[str, str]) -> None:
    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in named.items():
        up = up.view(*up.shape, *[1] * (down.ndim - 2))
        tensors |= {f"base_model.model.{name}.lora_{ab}.weight": x for ab, x in (("A", down), ("B", up))}
    ranks = {name: len(down) for name, (down, _) in named.items()}
    config = {
        "peft_type": "LORA",
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": sorted(named),
        "bias": "none",
        "inference_mode": True,
    }
    kept = {k: x.contiguous() for k, x in tensors.items()}
    save_file(kept, folder / PEFT, metadata={"format": "pt", **metadata})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
