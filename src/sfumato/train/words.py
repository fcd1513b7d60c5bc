"""What learning from a few pictures is made of: their latents, the texts that go with them, the denoising loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.noise.process import compose
from sfumato.pipeline import Conditioning, Text2Image
from sfumato.pipeline.sampling import gated

INIT_WORDS = ("object", "shape", "art", "photo", "a")


@dataclass(frozen=True)
class Latents:
    """The autoencoder's posterior of every picture, as the network sees latents; view 1 is of the mirrored ones."""

    mean: Float[Tensor, "view n channel h w"]
    std: Float[Tensor, "view n channel h w"]


def latents_of(pipe: Text2Image, pictures: Float[Tensor, "n 3 height width"], mirrored: bool) -> Latents:
    """The posterior of every picture in [0, 1], and of its mirror image where any is mirrored."""
    views = [pictures, pictures.flip(-1)] if mirrored else [pictures]
    with torch.no_grad():
        parts = [pipe.posterior(x.to(pipe.device) * 2 - 1) for view in views for x in view.split(32)]
    mean, std = (torch.cat(some).unflatten(0, (len(views), -1)) for some in zip(*parts, strict=True))
    return Latents(mean, std)


def denoising_loss(
    pipe: Text2Image,
    z0: Float[Tensor, "batch channel h w"],
    t: Float[Tensor, "batch"],
    eps: Float[Tensor, "batch channel h w"],
    cond: Conditioning,
) -> Float[Tensor, ""]:
    """Mean squared error of the network's native prediction at (alpha z0 + sigma eps, t).

    Adapters with a gate act as strongly as they would on a picture of that conditioning.
    """
    denoiser = pipe.denoiser
    alpha, sigma = denoiser.process.alpha_sigma(t, z0)
    target = compose(z0, eps, alpha, sigma, denoiser.prediction)
    with gated(pipe, cond):
        return (denoiser(alpha * z0 + sigma * eps, t, cond) - target).square().mean()


def encode_once(pipe: Text2Image, texts: Sequence[str]) -> Conditioning:
    """The conditioning of ``texts`` with gradients; equal texts are encoded once."""
    distinct = list(dict.fromkeys(texts))
    return pipe.encode(distinct, grad=True)[[distinct.index(s) for s in texts]]


def check_length(pipe: Text2Image, templates: Sequence[str], tokens: int) -> None:
    """Raise `BadInput` if ``tokens`` new tokens at {} do not fit into the context with the rest of a
    template."""
    room = pipe.context_length - 2
    if tokens > room:
        raise BadInput(f"{tokens} new tokens do not fit: this model's context holds {room}")
    for tokenizer in pipe.tokenizers:
        for template in templates:
            need = tokens_of(tokenizer, template.replace("{}", " ")) + tokens
            if need > room:
                raise BadInput(
                    f"{tokens} new tokens do not fit into {template!r}: that makes {need} tokens, and this "
                    f"model's context holds {room}"
                )


def tokens_of(tokenizer: Any, text: str) -> int:
    """How many tokens a text is, start and end tokens left out, as it stands inside a prompt."""
    return min(len(tokenizer(said, add_special_tokens=False).input_ids) for said in (text, f" {text}"))


def neutral_word(pipe: Text2Image) -> str:
    """The first of `INIT_WORDS` that is one token in every text encoder."""
    for word in INIT_WORDS:
        if all(tokens_of(tokenizer, word) == 1 for tokenizer in pipe.tokenizers):
            return word
    raise BadInput(f"none of {', '.join(INIT_WORDS)} is one token of this model: name an init word")
