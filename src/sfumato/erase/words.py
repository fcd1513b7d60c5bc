"""Concepts as the model's tokenizer reads them."""

from __future__ import annotations

from sfumato.errors import BadInput
from sfumato.pipeline import Conditioning, Text2Image


def encode_words(pipe: Text2Image, prompts: list[str]) -> Conditioning:
    """Encode prompts, each of which must hold something the tokenizer knows.

    Raises:
        BadInput: a prompt has no content tokens, or one that the tokenizer only knows as "unknown".
    """
    cond = pipe.encode(prompts)
    last = pipe.last_word_token(cond)
    for i, prompt in enumerate(prompts):
        content = cond.ids[i, 1 : int(last[i]) + 1]
        if not len(content):
            raise BadInput(f"the tokenizer reads no word in {prompt!r}: name the concept in words")
        # CLIP's tokenizers read what they cannot spell as the end token.
        if (content == cond.ids[i, last[i] + 1]).any():
            raise BadInput(f"the tokenizer cannot read all of {prompt!r}: use the letters it was trained on")
    return cond
