"""Concepts as the model's tokenizer reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sfumato.errors import BadInput
from sfumato.pipeline import Conditioning, Text2Image
from sfumato.pipeline.conditioning import Role

BATCH = 64
"""Prompts that are encoded together."""


def encode_words(pipe: Text2Image, prompts: list[str]) -> Conditioning:
    """Encode prompts, each of which must hold something the tokenizer knows.

    Raises:
        BadInput: a prompt has no content tokens, or one that the tokenizer only knows as "unknown".
    """
    cond, start = pipe.encode(prompts), 0
    words = cond.roles == Role.WORD
    for tokenizer, length in pipe._sections():
        section = slice(start, start + length)
        # CLIP's tokenizers read what they cannot spell as the end token.
        unread = (words & (cond.ids == tokenizer.unk_token_id))[:, section].any(dim=1)
        for prompt, some, unknown in zip(prompts, words[:, section].any(dim=1), unread, strict=True):
            if not some:
                raise BadInput(f"the tokenizer reads no word in {prompt!r}: say it in words")
            if unknown:
                raise BadInput(f"the tokenizer cannot read all of {prompt!r}: use the letters it was trained on")
        start += length
    return cond


def nothing_where_empty(cond: Conditioning, null: Conditioning) -> Conditioning:
    """``cond`` with ``null``, what the pipeline takes for no prompt, for empty ones: on SDXL it is not the encoded "".

    Not where that says something (OmniGen's names flaws), which no empty prompt means.
    """
    empty = torch.tensor([not prompt.strip() for prompt in cond.prompts])
    return cond if null.prompts[0].strip() or not empty.any() else cond.drop(empty, null)


def check_readable(pipe: Text2Image, prompts: Sequence[str]) -> None:
    """Raise `BadInput` as `encode_words` does; a prompt of nothing but spaces stands for nothing, and may."""
    said = list(dict.fromkeys(p for p in prompts if p.strip()))
    for start in range(0, len(said), BATCH):
        encode_words(pipe, said[start : start + BATCH])


def check_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """The templates of prompts that name a concept; raises `BadInput` for none, and for one without {concept}."""
    templates = (templates,) if isinstance(templates, str) else tuple(templates)
    if not templates or any("{concept}" not in t for t in templates):
        raise BadInput('every template needs {concept} where the concept\'s name goes: "a photo of {concept}"')
    return templates


def wrong_anchors(concepts: Sequence[str], anchors: Sequence[str]) -> list[str]:
    """Complaints of concepts that are to turn into themselves, or into others that are erased; one anchor for each."""
    plain = lambda text: text.strip().casefold()
    pairs, erased = list(zip(concepts, anchors, strict=True)), {plain(concept) for concept in concepts}
    own = [f"{c!r} is its own anchor" for c, a in pairs if plain(c) == plain(a)]
    return own + [
        f"{c!r} would turn into {a!r}, which is erased too" for c, a in pairs if plain(a) in erased - {plain(c)}
    ]
