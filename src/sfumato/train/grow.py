"""A trained text encoder made larger without loss: more layers, and words that its tokenizer did not have."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from sfumato.errors import BadInput

from .tokenizer import learn_pieces, learn_tokenizer

STEM = 3
"""Letters that a new word must share with the beginning of an old one to start from its embedding."""


LAST = ("out_proj", "fc2", "SelfAttention.o", "DenseReluDense.wo")
"""The layers by which a block of CLIP's or T5's text encoder adds to its residual stream."""

TABLES = ("token_embedding.weight", "shared.weight", "embed_tokens.weight")
"""Their tables of words; T5 keeps one under two names."""


@torch.no_grad()
def grown(
    text: CLIPTextModel | T5EncoderModel, tokenizer: CLIPTokenizer | T5TokenizerFast, layers: int, captions: list[str],
    vocabulary: int = 4096,
) -> tuple[CLIPTextModel | T5EncoderModel, CLIPTokenizer | T5TokenizerFast]:  # fmt: skip
    """A text encoder of ``layers`` layers for the words of ``captions``, that starts as ``text``.

    New layers come last and start as the identity: what they add to the residual stream is zero. Tokens that both
    tokenizers have keep their embeddings; a new word starts from the longest old one that it begins with ("stars" from
    "star"), or from small normal numbers.

    Raises:
        BadInput: ``layers`` is less than it has.
    """
    config, pieces = copy.deepcopy(text.config), isinstance(text, T5EncoderModel)
    if layers < config.num_hidden_layers:
        raise BadInput(f"the text encoder has {config.num_hidden_layers} layers already: give at least as many")
    learnt = (learn_pieces if pieces else learn_tokenizer)(captions, tokenizer.model_max_length, vocabulary)
    config.update({"num_hidden_layers": layers, "vocab_size": len(learnt)})
    ends = ("eos_token_id", "pad_token_id") if pieces else ("bos_token_id", "eos_token_id", "pad_token_id")
    config.update({k: getattr(learnt, k) for k in ends})
    larger, state = type(text)(config), text.state_dict()
    new = _embeddings(text.get_input_embeddings().weight, tokenizer.get_vocab(), learnt.get_vocab())
    tables = [name for name in state if name.endswith(TABLES)]
    missing, _ = larger.load_state_dict({**state, **dict.fromkeys(tables, new)}, strict=False)
    for module, part in larger.named_modules():
        if f"{module}.weight" in missing and module.endswith(LAST) and isinstance(part, nn.Linear):
            part.weight.zero_()
            if part.bias is not None:
                part.bias.zero_()
    return larger.train(), learnt


def _word(token: str) -> str:
    """The whole word that a token is; empty where it is a piece of one."""
    return token.removesuffix("</w>") if token.endswith("</w>") else token[1:] if token.startswith("▁") else ""


def _embeddings(old: torch.Tensor, was: dict[str, int], now: dict[str, int]) -> torch.Tensor:
    """Rows of ``old``, a row a token of ``was``, for the tokens of ``now``."""
    new = 0.02 * torch.randn(len(now), old.shape[1], dtype=old.dtype)
    rows = {_word(token): row for token, row in was.items()}
    words = sorted((word for word in rows if len(word) >= STEM), key=len, reverse=True)
    for token, row in now.items():
        source = was.get(token)
        if source is None and (word := _word(token)):
            source = next((rows[stem] for stem in words if word.startswith(stem)), None)
        if source is not None:
            new[row] = old[source]
    return new
