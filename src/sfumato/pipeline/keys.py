"""Keys: learned rows that cross-attention reads behind those of the text, and that bring a hidden concept back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.errors import BadInput, unknown
from sfumato.files import atomic_file, tensors_sha256
from sfumato.finite import NONE, finite
from sfumato.foreign import read_tensors, reading, shaped

from .adapter import Adapter, refuse_adapters
from .anatomy import Anatomy, Site
from .anatomy.explicit import ExplicitAttention, Listener, heads
from .attention import listen
from .base import Text2Image
from .conditioning import Conditioning
from .membrane import token_match

Insertion = Literal["mid", "midout", "inmidout"]
Halves = Literal["conditional", "both"]

FILE = "key.safetensors"
"""The file of keys in a folder that KPOP wrote."""
HEADER = "sfumato.keys"
_ENTRY = {"concept": str, "insertion": str, "base": str}


@dataclass(frozen=True, eq=False)
class ConceptKey:
    """The rows that bring one concept back, in the space that cross-attention's projections read.

    Attributes:
        concept: what comes back.
        insertion: where the rows are read; see `inserted`.
        key_rows, value_rows: behind the text's, before the key and before the value projection; on the CPU.
        base: SHA-256 over the weights of the pipeline that hides the concept; the rows fit that one alone.
    """

    concept: str
    insertion: Insertion
    key_rows: Float[Tensor, "rows width"]
    value_rows: Float[Tensor, "rows width"]
    base: str = ""


def inserted(anatomy: Anatomy, insertion: Insertion) -> list[Site]:
    """The sites of cross-attention in the middle block, from there to the end, or everywhere.

    Raises:
        BadInput: there is none.
    """
    if insertion not in get_args(Insertion):
        raise unknown("insertion", insertion, get_args(Insertion))
    blocks = list(anatomy.blocks())
    middle = blocks.index(anatomy.bottleneck)
    of = {"mid": blocks[middle : middle + 1], "midout": blocks[middle:], "inmidout": blocks}[insertion]
    found = [s for s in anatomy.sites() if s.kind == "cross" and s.name.startswith(tuple(f"{b}." for b in of))]
    if not found:
        raise BadInput(
            f"insertion {insertion!r} finds no cross-attention in this {anatomy.name}: use 'midout' or 'inmidout'"
        )
    return found


def extended(
    attn: Any,
    key: Float[Tensor, "batch head length width"],
    value: Float[Tensor, "batch head length width"],
    key_rows: Float[Tensor, "#batch rows dim"],
    value_rows: Float[Tensor, "#batch rows dim"],
) -> tuple[Float[Tensor, "batch head longer width"], Float[Tensor, "batch head longer width"]]:
    """K = W_k [E; p_k] and V = W_v [E; p_v], given W_k E and W_v E with their heads apart: the extra rows come last.

    Args:
        attn: diffusers' attention layer, whose own projections (with adapters on them) and norms are applied.
        key_rows, value_rows: p_k and p_v, for each row of the batch, or one for all.
    """
    if attn.norm_cross:
        key_rows, value_rows = (attn.norm_encoder_hidden_states(x) for x in (key_rows, value_rows))
    more = attn.to_k(key_rows)
    norm = attn.norm_k
    across = norm is not None and norm.weight.shape[-1] == more.shape[-1]  # over all heads together, as Sana does
    more = heads(norm(more) if across else more, attn.heads)
    more = norm(more) if norm is not None and not across else more
    pairs = ((key, more), (value, heads(attn.to_v(value_rows), attn.heads)))
    key, value = (torch.cat([x, y.to(x.dtype).expand(len(x), *y.shape[1:])], dim=2) for x, y in pairs)
    return key, value


def keyed_attention(
    attn: Any,
    x: Float[Tensor, "batch query width"],
    context: Float[Tensor, "batch length dim"],
    key_rows: Float[Tensor, "#batch rows dim"] | None = None,
    value_rows: Float[Tensor, "#batch rows dim"] | None = None,
) -> Float[Tensor, "batch query width"]:
    """What one layer of cross-attention makes of ``x`` with a key, or without one (None), computed in the open."""
    site: Any = None
    act = lambda _, k, v: extended(attn, k, v, key_rows, value_rows)
    listeners = [] if key_rows is None else [Listener("kv", lambda site: True, act)]
    return ExplicitAttention(site, listeners, None)(attn, x, context)


class KeyAdapter(Adapter):
    """A key that acts on a pipeline; one of its `Text2Image.adapters`, which no weights can stand for.

    Attributes:
        scale: what the weights of its rows in the softmax are multiplied by, one number or one per row of the batch: 1
            as learned, 0 absent. See `Adapter`.
        halves: where the halves of guidance are known (in `Text2Image.draw`), act on the conditional one only, or as
            in the published code on both, as happens everywhere else.
    """

    def __init__(self, pipe: Text2Image, key: ConceptKey, halves: Halves = "conditional"):
        if halves not in get_args(Halves):
            raise unknown("halves", halves, get_args(Halves))
        self.anatomy, self.key, self.halves, self._owner = pipe.anatomy, key, halves, pipe
        self.layers, self.down, self.up = {}, {}, {}
        self.rank, self.alpha, self.targets = len(key.key_rows), float(len(key.key_rows)), "cross"
        self.gate, self.scale = None, 1.0
        sites = inserted(pipe.anatomy, key.insertion)
        names = {site.name for site in sites}
        width = sites[0].module.to_k.in_features
        shapes = tuple(key.key_rows.shape), tuple(key.value_rows.shape)
        if shapes[0] != shapes[1] or len(shapes[0]) != 2 or not shapes[0][0]:
            raise BadInput(
                f"the key of {key.concept!r} needs as many rows for keys as for values, each (rows, width): got "
                f"{shapes[0]} and {shapes[1]}"
            )
        if not (finite(key.key_rows) and finite(key.value_rows)):
            raise BadInput(f"the key of {key.concept!r} has rows that are {NONE}: make it anew")
        if key.key_rows.shape[-1] != width:
            raise BadInput(
                f"the key of {key.concept!r} has rows of {key.key_rows.shape[-1]} numbers, and this network's "
                f"cross-attention reads {width}: attach it to the model that it was made with"
            )
        self.rows = {n: nn.Parameter(getattr(key, f"{n}_rows").to(pipe.device), False) for n in ("key", "value")}
        self._start, self._handles = 0, []
        inside = lambda site: site.name in names
        self._quiet = listen(pipe, Listener("kv", inside, self._extend), Listener("logits", inside, self._weigh))

    def parameters(self) -> list[nn.Parameter]:
        return list(self.rows.values())

    def state_dict(self) -> dict[str, Tensor]:
        return {name: x.detach() for name, x in self.rows.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, x in self.state_dict().items():
            x.copy_(state[name])

    def describe(self) -> dict[str, Any]:
        told = {"key": self.key.concept, "insertion": self.key.insertion, "rows": self.rank}
        return {**told, "sha256": tensors_sha256(self.state_dict())}

    def remove(self) -> None:
        self._quiet()
        self._quiet = lambda: None
        super().remove()

    def strength(self, key: str) -> float:
        raise self._no_weights()

    def add_to(self, network: nn.Module, scale: float) -> None:
        raise self._no_weights()

    def save_lora(self, *args: Any, **kwargs: Any) -> None:
        raise self._no_weights()

    def _no_weights(self) -> BadInput:
        return BadInput(
            f"the key of {self.key.concept!r} is no part of any weights: remove it first, and attach it again to what "
            "was made"
        )

    def _extend(self, site: Site, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if not self._active:
            return key, value
        self._start = key.shape[2]
        dtype = site.module.to_k.weight.dtype
        return extended(site.module, key, value, *(x[None].to(dtype) for x in self.rows.values()))

    def _weigh(self, site: Site, logits: Float[Tensor, "batch head query key"]) -> Tensor:
        rows: Bool[Tensor, "batch"] | None = site.rows if self.halves == "conditional" else None
        if not self._active or (rows is None and not torch.is_tensor(self.scale) and self.scale == 1):
            return logits
        weight = torch.as_tensor(self._rows(logits), dtype=torch.float32, device=logits.device).reshape(-1, 1, 1, 1)
        if rows is not None:
            weight = weight * rows.to(weight)[:, None, None, None]
        bias = weight.new_zeros(len(weight), 1, 1, logits.shape[-1])
        bias[..., self._start : self._start + self.rank] = weight.log()
        return logits + bias.to(logits.dtype)


def attach(pipe: Text2Image, keys: Sequence[ConceptKey], halves: Halves = "conditional") -> Text2Image:
    """A pipeline that shares ``pipe``'s weights, with the keys attached as ``key.CONCEPT``.

    One alone acts on every prompt, as in the published code. Of several each acts, in `Text2Image.draw`, where the
    prompt has all words of its concept, because each was learned without the others.

    Raises:
        BadInput: adapters are attached to ``pipe`` already, no key, one that does not fit this network, or two of one
            concept.
    """
    refuse_adapters(pipe)
    if not keys:
        raise BadInput("there is no key to attach: give at least one")
    made = pipe.copy()
    add(made, keys, halves)
    return made


def add(pipe: Text2Image, keys: Sequence[ConceptKey], halves: Halves = "conditional") -> None:
    """Attach keys as `attach` does, to ``pipe`` itself, beside the adapters that are there.

    A key's rows are read by the projections of cross-attention as they are, with what adapters add to them.
    """
    names = [*pipe.adapters, *(f"key.{key.concept}" for key in keys)]
    if twice := [key.concept for key in keys if names.count(f"key.{key.concept}") > 1]:
        raise BadInput(f"there are two keys of {twice[0]!r}, which would go by one name: attach one of them")
    for key in keys:
        acting = KeyAdapter(pipe, key, halves)
        pipe.adapters[f"key.{key.concept}"] = acting
        if len(keys) > 1:
            acting.gate = _named(pipe, key.concept)


def save_keys(path: str | os.PathLike, keys: Sequence[ConceptKey], overwrite: bool = False) -> None:
    """Write keys to one safetensors file, with their concepts in its header.

    Raises:
        BadInput: the file exists (without ``overwrite``), or the disk is full.
    """
    tensors = {f"{i}.{n}": getattr(k, f"{n}_rows").contiguous() for i, k in enumerate(keys) for n in ("key", "value")}
    header = [{name: getattr(k, name) for name in _ENTRY} for k in keys]
    with atomic_file(Path(path), overwrite) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", HEADER: json.dumps(header)})


def load_keys(path: str | os.PathLike) -> list[ConceptKey]:
    """The keys in a file; a folder stands for its ``key.safetensors``.

    Raises:
        BadInput: no such file, not a readable safetensors file, or no keys.
    """
    path = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not path.is_file() and not path.is_symlink():
        raise BadInput(f"there is no key file {path}")
    tensors, header = read_tensors(path)
    if HEADER not in header:
        raise BadInput(f"{path} holds no keys: it is no key file of KPOP")
    with reading(path, "a key file"):
        entries = shaped(json.loads(header[HEADER]), list, f"the header of {path}")
        keys = []
        for i, entry in enumerate(entries):
            shaped(entry, _ENTRY, f"the header of {path}")
            rows = {f"{n}_rows": tensors[f"{i}.{n}"] for n in ("key", "value")}
            if not all(x.ndim == 2 and x.is_floating_point() and x.isfinite().all() for x in rows.values()):
                raise BadInput(f"{path} holds rows that are no finite numbers: fetch or write it again")
            keys.append(ConceptKey(**{name: entry[name] for name in _ENTRY}, **rows))
    return keys


def _named(pipe: Text2Image, concept: str) -> Any:
    """1 for each prompt that has all words of the concept, else 0."""
    words = pipe.word_pieces(pipe.encode(concept))

    def gate(cond: Conditioning) -> Float[Tensor, "rows"]:
        return (token_match(pipe.word_pieces(cond), words)[:, 0] == 1).to(cond.tokens)

    return gate
