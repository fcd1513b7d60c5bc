"""Customisations: what was learned from a few pictures (words, low-rank products), in one file and on a pipeline."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.files import atomic_file
from sfumato.foreign import read_header, read_tensors, reading, shaped

from . import lora
from .adapter import refuse_adapters
from .base import Text2Image
from .lora import Product
from .tokens import num_words, refuse_known, refuse_wordless, with_words

P = TypeVar("P", bound=Text2Image)
Rows = tuple[Float[Tensor, "vectors width"], ...]
"""The embeddings of a word, a tensor for each text encoder."""

HEADER = "sfumato.customization"
_HEADER = {"words": dict, "stages": dict, "about": dict}


@dataclass(frozen=True, eq=False)
class Customization:
    """What was learned from a few pictures.

    Attributes:
        words: new words, by their names, with their embeddings, on the CPU.
        products: low-rank products by layer (see `sfumato.pipeline.lora.Product`).
        stages: words that stand for others by stage of time; see `sfumato.pipeline.stages`.
        about: how it was made (JSON types).
        marked: subjects, by their words, of which pictures are to be marked as made (see `sfumato.pipeline.watermark`),
            with what is declared of each; whatever pipeline knows one of them marks all that it draws.
    """

    words: Mapping[str, Rows] = field(default_factory=dict)
    products: Mapping[str, Product] = field(default_factory=dict)
    stages: Mapping[str, Sequence[str]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    marked: Mapping[str, Any] = field(default_factory=dict)


def save(path: str | os.PathLike, made: Customization, pipe: Text2Image, overwrite: bool = False) -> None:
    """Write one safetensors file whose tensors diffusers loads, given the two kinds of keys apart.

    Words are textual inversions: ``WORD`` with its rows, where there is one text encoder; with several ``clip_l``,
    ``clip_g``, ... (`Text2Image.text_keys`), each with the rows of all words one after the other. Products have
    diffusers' LoRA keys (``unet.<layer>.lora_A.weight``). A file of words of one encoder, or of products alone, is what
    ``load_textual_inversion`` or ``load_lora_weights`` reads from the path; of a file with both they take the part
    that is theirs (`HOW` says it in code). The header says which words there are, the stages, and how it was made.

    Args:
        pipe: what it was learned on, for the names of its parts.

    Raises:
        BadInput: the file exists (without ``overwrite``), or the disk is full.
    """
    tensors: dict[str, Tensor] = {}
    if len(pipe.text_parts()) == 1:
        tensors |= {word: rows[0] for word, rows in made.words.items()}
    elif made.words:
        columns = zip(*made.words.values(), strict=True)
        tensors |= {key: torch.cat(list(rows)) for key, rows in zip(pipe.text_keys, columns, strict=True)}
    tensors = {key: x.detach().cpu().float().contiguous() for key, x in tensors.items()}
    tensors |= lora.keyed(made.products, pipe.anatomy.component, "diffusers")
    header = {
        "words": {word: len(rows[0]) for word, rows in made.words.items()},
        "stages": {word: list(of) for word, of in made.stages.items()},
        "about": dict(made.about),
        **({"marked": dict(made.marked)} if made.marked else {}),
    }
    with atomic_file(Path(path), overwrite) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", HEADER: json.dumps(header, default=str)})


HOW = """tensors = safetensors.torch.load_file("{path}")
pipe.load_textual_inversion([{{word: tensors[word]}} for word in {words}])
pipe.load_lora_weights({{key: x for key, x in tensors.items() if "lora" in key}})"""
"""How diffusers alone loads a file with one text encoder's words and products."""


def holds_one(path: str | os.PathLike) -> bool:
    """Whether a file says that it is a customisation."""
    return Path(path).is_file() and Path(path).suffix == ".safetensors" and HEADER in read_header(Path(path))


def load(path: str | os.PathLike, pipe: Text2Image) -> Customization:
    """The customisation in a file that `save` wrote.

    Raises:
        BadInput: no such file, not a readable safetensors file, no customisation, or one of another model's shapes.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"there is no adapter file {path}")
    tensors, header = read_tensors(path)
    if HEADER not in header:
        raise BadInput(f"{path} is no file of sfumato customize: load it as a LoRA instead")
    with reading(path, "a file of sfumato customize"):
        raw = json.loads(header[HEADER])
        kinds = {**_HEADER, "marked": dict} if "marked" in raw else _HEADER
        told = shaped(raw, kinds, f"the header of {path}")
        sizes = {str(word): int(n) for word, n in told["words"].items()}
        stages = {str(word): [str(x) for x in of] for word, of in told["stages"].items()}
        if min([1, *sizes.values()]) < 1 or not all(stages.values()):
            raise BadInput(f"the header of {path} names words without rows: fetch or write it again")
    encoders = pipe.text_encoders
    several = len(encoders) > 1
    keys = (list(pipe.text_keys) if several else list(sizes)) if sizes else []
    _check(path, keys, tensors, encoders, sizes if not several else {key: sum(sizes.values()) for key in keys})
    if several and sizes:
        cut = [tensors[key].split(list(sizes.values())) for key in keys]
        words = {word: tuple(column[i] for column in cut) for i, word in enumerate(sizes)}
    else:
        words = {word: (tensors[word],) for word in sizes}
    products = {}
    if set(tensors) - set(keys):
        products = lora.products(path, pipe.anatomy.component, {pipe.anatomy.component: pipe.network}, keys)
    return Customization(words, products, stages, told["about"], told.get("marked", {}))


def _check(
    path: Path, keys: Sequence[str], tensors: Mapping[str, Tensor], encoders: Sequence[Any], rows: Mapping[str, int]
) -> None:
    """Refuse words that do not fit the text encoders."""
    for i, key in enumerate(keys):
        if key not in tensors:
            raise BadInput(f"{path} does not fit: it has no {key}, and this model reads one; take the model it is for")
        x, width = tensors[key], encoders[i if len(encoders) > 1 else 0].get_input_embeddings().weight.shape[1]
        if x.shape != (rows[key], width) or not x.is_floating_point() or not x.isfinite().all():
            raise BadInput(
                f"{path} does not fit: {key} is {tuple(x.shape)}, not {rows[key]} finite rows of {width} numbers: "
                "attach it to the model that it was made for"
            )


def add_words(pipe: P, learned: Sequence[Customization]) -> P:
    """A pipeline that shares ``pipe``'s weights and knows the words, in tokenizers and tables of its own.

    As diffusers' ``load_textual_inversion`` does, the tables grow by the new rows.

    Raises:
        BadInput: a word that the model, or another customisation, has already; adapters are attached to ``pipe``.
    """
    refuse_adapters(pipe)
    made = pipe.copy()
    words = [(word, rows) for one in learned for word, rows in one.words.items()]
    if words:
        refuse_wordless(made)
    for i, (name, encoder) in enumerate(made.text_parts() if words else ()):
        tokenizer = getattr(made.pipe, name)
        for word, rows in words:
            refuse_known(tokenizer, word)
            tokenizer = with_words(tokenizer, [word, *(f"{word}_{k}" for k in range(1, len(rows[i])))])
        new = torch.cat([rows[i] for _, rows in words])
        _grow(getattr(made.pipe, encoder), tokenizer.convert_tokens_to_ids(words[0][0]), new)
        setattr(made.pipe, name, tokenizer)
    stages = {word: list(of) for one in learned for word, of in one.stages.items()}
    if stages:
        made.defaults = {**made.defaults, "stages": {**made.defaults.get("stages", {}), **stages}}
    marked = {word: told for one in learned for word, told in one.marked.items()}
    if marked:
        made.defaults = {**made.defaults, "marked": {**made.defaults.get("marked", {}), **marked}}
    return made


@torch.no_grad()
def _grow(encoder: Any, first: int, rows: Float[Tensor, "new width"]) -> None:
    """Put rows into an encoder's table from the token ``first`` on; T5's has spare ones there."""
    table = encoder.get_input_embeddings()
    with torch.random.fork_rng(devices=[]):  # rows are drawn, and then overwritten
        encoder.resize_token_embeddings(max(num_words(table), first + len(rows)), mean_resizing=False)
    weight = encoder.get_input_embeddings().weight
    own = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)  # a table that did not grow is shared
    own[first : first + len(rows)] = rows.to(own)
    for module in list(encoder.modules()):
        if getattr(module, "weight", None) is weight:
            module.weight = own
    encoder.requires_grad_(False).eval()


def add_products(pipe: Text2Image, name: str, products: Mapping[str, Product], strength: float = 1.0) -> None:
    """Attach products to ``pipe``, frozen."""
    if not products:
        return
    state, rank, alpha = lora.uniform(products)
    layers = sorted({key.rsplit(".", 1)[0] for key in state})
    adapter = pipe.add_adapter(name, rank, alpha, layers)
    adapter.load_state_dict(state)
    adapter.scale = strength
    for x in adapter.parameters():
        x.requires_grad_(False)


def attach(pipe: P, learned: Sequence[Customization]) -> P:
    """A pipeline that shares ``pipe``'s weights, with words and products attached as ``custom.N``.

    Saved, it is a whole diffusers folder: with the words in its tokenizers and tables and the products merged.

    Raises:
        BadInput: as `add_words`; products that do not fit.
    """
    made = add_words(pipe, learned)
    for i, one in enumerate(learned):
        add_products(made, f"custom.{i}", one.products)
    return made
