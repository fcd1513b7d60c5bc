"""A trained text encoder made larger without loss: more layers, and words that its tokenizer did not have."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from sfumato.errors import BadInput

from .tokenizer import learn_tokenizer

STEM = 3
"""Letters that a new word must share with the beginning of an old one to start from its embedding."""


@torch.no_grad()
def grown(
    text: CLIPTextModel, tokenizer: CLIPTokenizer, layers: int, captions: list[str], vocabulary: int = 4096
) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """A text encoder of ``layers`` layers for the words of ``captions``, that starts as ``text``.

    New layers come last and start as the identity: what they add to the residual stream is zero. Tokens that both
    tokenizers have keep their embeddings; a new word starts from the longest old one that it begins with ("stars" from
    "star"), or from small normal numbers.

    Raises:
        BadInput: ``layers`` is less than it has.
    """
    config = copy.deepcopy(text.config)
    if layers < config.num_hidden_layers:
        raise BadInput(f"the text encoder has {config.num_hidden_layers} layers already: give at least as many")
    learnt = learn_tokenizer(captions, tokenizer.model_max_length, vocabulary)
    config.update({"num_hidden_layers": layers, "vocab_size": len(learnt)})
    config.update({k: getattr(learnt, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")})
    larger, state = CLIPTextModel(config), text.state_dict()
    (name,) = (n for n, p in larger.named_parameters() if n.endswith("token_embedding.weight"))
    state[name] = _embeddings(state[name], tokenizer.get_vocab(), learnt.get_vocab())
    missing, _ = larger.load_state_dict(state, strict=False)
    for module, part in larger.named_modules():
        if f"{module}.weight" in missing and module.endswith(("out_proj", "fc2")) and isinstance(part, nn.Linear):
            part.weight.zero_()
            part.bias.zero_()
    return larger.train(), learnt


def _embeddings(old: torch.Tensor, was: dict[str, int], now: dict[str, int]) -> torch.Tensor:
    """Rows of ``old``, a row a token of ``was``, for the tokens of ``now``."""
    new = 0.02 * torch.randn(len(now), old.shape[1], dtype=old.dtype)
    words = sorted((w.removesuffix("</w>") for w in was if w.endswith("</w>")), key=len, reverse=True)
    for token, row in now.items():
        source = was.get(token)
        if source is None and token.endswith("</w>"):
            stem = next((w for w in words if len(w) >= STEM and token.startswith(w)), None)
            source = was[f"{stem}</w>"] if stem else None
        if source is not None:
            new[row] = old[source]
    return new
