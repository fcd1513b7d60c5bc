"""Membranes, SPM's adapters with the concepts they erase: attached, transported, combined and kept in files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sfumato.errors import BadInput, unknown
from sfumato.files import atomic_file
from sfumato.foreign import read_header, read_tensors, reading, shaped
from sfumato.text import plain

from . import lora
from .adapter import Adapter, refuse_adapters
from .base import Text2Image
from .conditioning import Conditioning
from .lora_strength import PEFT

Transport = Literal["facilitated", "embedding", "tokens", "none"]
Composition = Literal["paper", "official"]

ADAPTER = "adapter.safetensors"
"""The file of membranes in a folder that SPM wrote."""
_KEY = "sfumato.membranes"
_ENTRY = {"concepts": list, "rank": int, "alpha": int | float, "base": str}
_LORA_CARD = """# LoRA of fixed strength

Erases {concepts}: `pipe.load_lora_weights(folder)`.

A LoRA cannot know the prompt, so facilitated transport is off: the erasure acts at full strength on every prompt and
harms neighbouring concepts more than `adapter.safetensors` does with it.
"""


@dataclass(frozen=True, eq=False)
class Membrane:
    """One adapter and what it erases.

    Attributes:
        concepts: the erased prompts; the one that a prompt resembles most decides the adapter's strength.
        rank, alpha: it adds alpha / rank times the product of its factors.
        weights: ``<layer>.down`` and ``<layer>.up`` (see `sfumato.pipeline.adapter.Adapter`), on the CPU.
        base: SHA-256 over the weights of the pipeline that it was trained on; it also fits fine-tunes of that.
    """

    concepts: tuple[str, ...]
    rank: int
    alpha: float
    weights: Mapping[str, Tensor]
    base: str = ""

    @classmethod
    def of(cls, adapter: Adapter, concepts: tuple[str, ...], base: str) -> Membrane:
        """A copy of an attached adapter's factors."""
        weights = {name: x.detach().cpu().clone() for name, x in adapter.state_dict().items()}
        return cls(concepts, adapter.rank, adapter.alpha, weights, base)

    @property
    def layers(self) -> list[str]:
        """The layers on which it acts."""
        return sorted({name.rsplit(".", 1)[0] for name in self.weights})


def embedding_match(
    prompts: Float[Tensor, "prompt length dim"], concepts: Float[Tensor, "concept length dim"]
) -> Float[Tensor, "prompt concept"]:
    """Cosine of the whole embeddings, all tokens flattened, padding included. Not a probability: padding agrees (but
    for networks that do not look at it, see `Text2Image.as_seen`)."""
    return cosine_similarity(prompts.flatten(1)[:, None], concepts.flatten(1)[None], dim=-1)


def token_match(
    prompts: Sequence[Sequence[Set[str]]], concepts: Sequence[Sequence[Set[str]]]
) -> Float[Tensor, "prompt concept"]:
    """Share of a concept's distinct tokens, without special ones, that occur in the prompt; 0 if it has none.

    Args:
        prompts, concepts: the tokens by tokenizer and row (`Text2Image.word_pieces`). Of several tokenizers the one
            with the largest share counts: what one of them cuts off, another may still read.
    """
    shares = [
        torch.tensor([[len(p & c) / max(len(c), 1) for c in erased] for p in asked], dtype=torch.float64)
        for asked, erased in zip(prompts, concepts, strict=True)
    ]
    return torch.stack(shares).amax(dim=0)


def transport_strength(
    pipe: Text2Image, prompts: Conditioning, concepts: Conditioning, kind: Transport = "facilitated"
) -> Float[Tensor, "prompt"]:
    """gamma: how strongly a membrane acts for each prompt (facilitated transport, arXiv:2312.16145).

    The larger of `embedding_match` and `token_match`, or one of them by ``kind``, of the concept that matches best.
    Differentiable in the prompts' embeddings.
    """
    scores = []
    if kind != "tokens":
        scores.append(embedding_match(prompts.tokens, concepts.tokens.to(prompts.tokens)))
    if kind != "embedding":
        scores.append(token_match(pipe.word_pieces(prompts), pipe.word_pieces(concepts)).to(prompts.tokens))
    return torch.stack(scores).amax(dim=(0, 2))


def attach(
    pipe: Text2Image,
    membranes: Sequence[Membrane],
    transport: Transport = "facilitated",
    composition: Composition = "paper",
) -> Text2Image:
    """A pipeline that shares ``pipe``'s weights, with the membranes attached.

    With transport, ``sample`` and ``trajectory`` let each act on every picture as strongly as its prompt resembles
    the concept, alike in both halves of guidance. Everywhere else (``denoiser``, calls of the diffusers pipeline)
    they act at strength 1, the strength they were trained at. ``save`` writes them merged at strength 1, and beside
    that ``adapter.safetensors`` and ``lora/``.

    Args:
        composition: "paper": sum_k gamma_k U_k V_k. "official": the released inference code's
            (sum_i gamma_i U_i)(sum_j gamma_j V_j), i.e. gamma^2 alone and cross terms together: K^2 adapters.

    Raises:
        BadInput: adapters are attached to ``pipe`` already, no membrane, one that does not fit this network, or
            different ranks with "official".
    """
    refuse_adapters(pipe)
    if not membranes:
        raise BadInput("there is no membrane to attach: give at least one")
    for what, value, kind in (("transport", transport, Transport), ("composition", composition, Composition)):
        if value not in get_args(kind):
            raise unknown(what, value, get_args(kind))
    if composition == "official" and len({(m.rank, m.alpha) for m in membranes}) > 1:
        raise BadInput("membranes of different rank or alpha cannot be composed factor by factor: use the paper's form")
    made = pipe.copy()
    gammas = [_gamma(made, m.concepts, transport) for m in membranes]
    numbers = range(len(membranes))
    pairs = [(i, i) for i in numbers] if composition == "paper" else list(product(numbers, numbers))
    for i, j in pairs:
        layers = sorted(set(membranes[i].layers) & set(membranes[j].layers))
        if not layers:  # a cross term of two that share no layer
            continue
        name = f"spm.{i}" if i == j else f"spm.{i}.{j}"
        adapter = _add(made, name, membranes[i], membranes[j], layers)
        if transport != "none":
            factors = (gammas[i],) if composition == "paper" else (gammas[i], gammas[j])
            adapter.gate = _product(factors)
    made.companions.append(lambda folder: _write_beside(folder, made, membranes))
    return made


def save_membranes(path: str | Path, membranes: Sequence[Membrane], overwrite: bool = False) -> None:
    """Write membranes to one safetensors file, with what they erase, rank, alpha and base in its header.

    Raises:
        BadInput: the file exists (without ``overwrite``), or the disk is full.
    """
    tensors = {f"{k}.{name}": x.contiguous() for k, m in enumerate(membranes) for name, x in m.weights.items()}
    header = [{"concepts": m.concepts, "rank": m.rank, "alpha": m.alpha, "base": m.base} for m in membranes]
    with atomic_file(path, overwrite) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", _KEY: json.dumps(header)})


def load_membranes(path: str | os.PathLike, pipe: Text2Image) -> list[Membrane]:
    """The membranes in a file of ours, or the one in a file of the published code (``lora_unet_*`` keys).

    A folder stands for its ``adapter.safetensors``. To combine several files, join the lists:
    ``attach(pipe, [*load_membranes(a, pipe), *load_membranes(b, pipe)])``.

    Raises:
        BadInput: no such file, not a readable safetensors file, not membranes, or keys that fit no layer of ``pipe``.
    """
    if Path(path).is_dir() and not (Path(path) / ADAPTER).exists():
        known = f"{ADAPTER}, pytorch_lora_weights.safetensors or {PEFT}"
        raise BadInput(f"there is no adapter file in {path} ({known}): give the file itself, or another folder")
    path = Path(path) / ADAPTER if Path(path).is_dir() else Path(path)
    if not path.is_file() and not path.is_symlink():
        raise BadInput(f"there is no adapter file {path}")
    tensors, header = read_tensors(path)
    if _KEY in header:
        with reading(path, "an adapter file of SPM"):
            entries = shaped(json.loads(header[_KEY]), list, f"the header of {path}")
            for entry in entries:
                shaped(entry, _ENTRY, f"the header of {path}")
            if not all(isinstance(c, str) for entry in entries for c in entry["concepts"]):
                raise BadInput(f"the header of {path} names concepts that are no text: fetch or write it again")
        return [
            Membrane(
                tuple(entry["concepts"]), entry["rank"], entry["alpha"],
                {name.partition(".")[2]: x for name, x in tensors.items() if name.startswith(f"{k}.")}, entry["base"],
            )
            for k, entry in enumerate(entries)
        ]  # fmt: skip
    if "prompts" not in header:
        raise BadInput(f"{path} does not say what it erases: it is no adapter file of SPM, load it as a LoRA instead")
    weights, rank, alpha = lora.read(path, pipe.anatomy)
    concepts = tuple(prompt.strip() for prompt in header["prompts"].split(","))
    return [Membrane(concepts, rank, alpha, weights)]


def is_membrane(path: str | os.PathLike) -> bool:
    """Whether a file, or the one that a folder stands for, says what it erases; else it is a LoRA like any other."""
    path = Path(path)
    if path.is_dir():
        return (path / ADAPTER).is_file() or not loras_in(path)
    if not path.is_file():
        return True  # which `load_membranes` refuses
    if path.suffix != ".safetensors":
        return False  # which `lora.products` refuses
    header = read_header(path)
    return _KEY in header or "prompts" in header


def loras_in(folder: Path) -> list[Path]:
    """The LoRA in a folder as diffusers and peft write it; or peft's in its folders, one for each network."""
    names = ("pytorch_lora_weights.safetensors", PEFT)
    found = [folder / name for name in names if (folder / name).is_file()]
    return found[:1] or sorted(folder.glob(f"*/{PEFT}"))


def holds_membranes(model: object) -> bool:
    """Whether ``model`` is a folder whose weights have membranes merged into them, as SPM's output has."""
    return isinstance(model, (str, os.PathLike)) and (Path(model) / ADAPTER).is_file()


def save_lora(path: str | Path, pipe: Text2Image, style: str = "diffusers", overwrite: bool = False) -> None:
    """Write all adapters attached to ``pipe`` as one LoRA file of fixed strength, without transport.

    The products stand side by side: rank and strengths add up to exactly what is attached, each at its ``scale``, and
    one with a gate at strength 1.

    Args:
        style: "diffusers" or "webui"; see `sfumato.pipeline.lora.save`.

    Raises:
        BadInput: a scale differs from row to row; a key is attached; as `Adapter.save_lora`.
    """
    adapters = list(pipe.adapters.values())
    strengths = [a.strength(key) for key, a in pipe.adapters.items()]
    rank = sum(a.rank for a in adapters)
    layers = sorted({name for a in adapters for name in a.layers})
    joined = pipe.copy().add_adapter("lora", rank=rank, alpha=rank, targets=layers)
    state = {}
    for name in layers:
        here = [(a, strength) for a, strength in zip(adapters, strengths, strict=True) if name in a.layers]
        down = torch.cat([a.down[name].detach() for a, _ in here])
        up = torch.cat([a.up[name].detach() * (strength * a.alpha / a.rank) for a, strength in here], dim=1)
        spare = rank - len(down)  # a file has one rank: where an adapter is not, its rows are zero
        state[f"{name}.down"] = torch.cat([down, down.new_zeros(spare, *down.shape[1:])])
        state[f"{name}.up"] = torch.cat([up, up.new_zeros(len(up), spare)], dim=1)
    joined.load_state_dict(state)
    note = "fixed strength: facilitated transport is off"
    joined.save_lora(path, style=style, metadata={"sfumato": note}, overwrite=overwrite)


def _add(pipe: Text2Image, name: str, up: Membrane, down: Membrane, layers: Sequence[str]) -> Adapter:
    adapter = pipe.add_adapter(name, rank=up.rank, alpha=up.alpha, targets=layers)
    for parameter in adapter.parameters():
        parameter.requires_grad_(False)
    keys = [(f"{layer}.{which}", m) for layer in layers for which, m in (("down", down), ("up", up))]
    adapter.load_state_dict({key: m.weights[key] for key, m in keys if key in m.weights})
    return adapter


def _gamma(pipe: Text2Image, concepts: tuple[str, ...], transport: Transport) -> Callable[[Conditioning], Tensor]:
    encoded = pipe.as_seen(pipe.encode(concepts))
    return lambda cond: transport_strength(pipe, pipe.as_seen(cond), encoded, transport)


def _product(factors: tuple[Callable[[Conditioning], Tensor], ...]) -> Callable[[Conditioning], Tensor]:
    return lambda cond: torch.stack([gamma(cond) for gamma in factors]).prod(dim=0)


def _write_beside(folder: Path, pipe: Text2Image, membranes: Sequence[Membrane]) -> None:
    """What `Text2Image.save` puts beside the merged pipeline."""
    save_membranes(folder / ADAPTER, membranes)
    save_lora(folder / "lora" / "pytorch_lora_weights.safetensors", pipe)
    concepts = ", ".join(plain(c) for m in membranes for c in m.concepts)
    (folder / "lora" / "README.md").write_text(_LORA_CARD.format(concepts=concepts), encoding="utf-8")
