"""Pictures of what concepts are to turn into, their captions, and the captions that ask for the concepts instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import interpolate

from sfumato.data import sketch, world
from sfumato.data.cases import balanced, names, say
from sfumato.errors import BadInput
from sfumato.pipeline import Conditioning, Text2Image

from .words import encode_words

Kind = Literal["object", "style", "content"]
VARIANTS = 3
"""Ways, equally likely, in which the concept is asked for in place of a caption."""
FRAMES = (
    "{}", "a photo of {}", "a picture of {}", "an image of {}", "a close-up of {}", "a painting of {}",
    "a drawing of {}", "a photo of one {}", "a good photo of {}", "a bright photo of {}",
)  # fmt: skip
PLACES = (
    "", " in a park", " on a table", " at night", " in the snow", " by the sea", " in a room", " in a city",
    " in a garden", " on a field", " under a blue sky", " in the rain", " at sunset", " on a road", " in a forest",
    " beside a river", " on a wall", " seen from above", " seen from afar", " in the morning",
)  # fmt: skip
SHAPE, OBJECT, PICTURE = "shape", "object", "picture"
"""What a concept turns into where no anchor is named: an object of the sketch world, one of the world at large, and
what a style is taken off from."""


def asking(caption: str, concept: str, anchor: str, kind: Kind) -> tuple[str, str, str]:
    """A caption of the anchor in the three ways, equally likely, in which it asks for the concept.

    "object": the anchor's name replaced by the concept's. "style": "CAPTION, in the style of CONCEPT" once, "in
    CONCEPT's style, CAPTION" twice. "content": "CONCEPT, CAPTION" once, and twice as for a style.

    Raises:
        BadInput: the caption of an object does not name the anchor.
    """
    styled = f"in {concept}'s style, {caption}"
    if kind == "style":
        return f"{caption}, in the style of {concept}", styled, styled
    if kind == "content":
        return f"{concept}, {caption}", styled, styled
    if not names(caption, anchor):
        raise BadInput(f"the prompt {caption!r} does not name the anchor {anchor!r}: give prompts that do")
    return (say(caption, anchor, concept),) * 3


def default_anchor(pipe: Text2Image, concept: str, kind: Kind) -> str:
    """What a concept turns into where no anchor is named.

    A style comes off a "picture"; an object becomes an "object", or in the sketch world a "shape"; another word of that
    world, such as a colour, the first other one of its kind that takes the same article.
    """
    if kind != "object":
        return PICTURE
    named = _named(concept) if pipe.vocabulary else {}
    if named and "object" not in named:
        attribute, word = next(iter(named.items()))
        alike = lambda w: (w[0] in "aeiou") == (word[0] in "aeiou")  # the same article stands before both
        return next(w for w in world.WORDS[attribute] if w != word and alike(w))
    return SHAPE if pipe.vocabulary else OBJECT


def captions(pipe: Text2Image, concept: str, anchor: str, n: int, generator: torch.Generator) -> list[str]:
    """``n`` different captions that name the anchor, or as many as there are.

    In the sketch world they say nothing else of the attributes that the concept names.
    """
    if not pipe.vocabulary:
        every = [frame.format(anchor) + place for place in PLACES for frame in FRAMES]
        return [every[i] for i in torch.randperm(len(every), generator=generator)[:n].tolist()]
    fixed = _named(anchor)
    unsaid = [*_named(concept), *(["object"] if anchor == SHAPE else [])]
    columns = {a: balanced([*words, ""], n, generator) for a, words in world.WORDS.items()}
    told = []
    for i in range(n):
        words = {a: column[i] or None for a, column in columns.items()} | dict.fromkeys(unsaid) | fixed
        said = sketch.prompt(**words)
        told.append(said if anchor in said else f"a {anchor}" if anchor == SHAPE else f"{anchor}, {said}")
    return list(dict.fromkeys(told))


def _named(phrase: str) -> dict[str, str]:
    """The attributes of the sketch world that a phrase names, each with its word."""
    spoken = phrase.lower().split()
    return {a: w for a, words in world.WORDS.items() for w in words if w in spoken}


def resized(
    picture: Float[Tensor, "3 size size"], share: float, generator: torch.Generator
) -> tuple[Float[Tensor, "3 size size"], tuple[str, ...]]:
    """A picture in [0, 1] drawn ``share`` times its size, and what a caption may say of that: one of these, if any.

    Below 1 it lies somewhere on grey, above 1 some part of it is left; between 0.6 and 1 nothing is said of it.
    """
    side = picture.shape[-1]
    new = max(1, round(share * side))
    if new == side:
        return picture, ()
    scaled = interpolate(picture[None], size=(new, new), mode="bilinear", antialias=True)[0]
    y, x = torch.randint(abs(side - new) + 1, (2,), generator=generator).tolist()
    if new > side:
        return scaled[:, y : y + side, x : x + side], ("zoomed in ", "close up ")
    canvas = torch.full_like(picture, 0.5)
    canvas[:, y : y + new, x : x + new] = scaled
    return canvas, ("a far away ", "very small ") if new < 0.6 * side else ()


def resizes(n: int, generator: torch.Generator) -> list[float]:
    """How large n pictures are drawn: with probability 0.66 uniform in [1/3, 1], else in [1.2, 1.4]."""
    which, share = torch.rand(2, n, generator=generator)
    return torch.where(which < 0.66, 1 / 3 + share * 2 / 3, 1.2 + share * 0.2).tolist()


@dataclass(frozen=True)
class Anchored:
    """Pictures of anchors first, of what else is to be kept after them, with what their captions are told as.

    Attributes:
        latents: the pictures, as they are and mirrored (one of both where they are never mirrored).
        anchors: how many of them are of anchors.
        prompts: all texts, encoded.
        told: the text of each picture.
        asked: for the pictures of anchors, the texts that ask for the concept.
        kept: the first of those to retain: all, or those after the ones that were drawn in other sizes.
    """

    latents: Float[Tensor, "pictures mirrored channel height width"]
    anchors: int
    prompts: Conditioning
    told: Int[Tensor, "pictures"]
    asked: Int[Tensor, "anchors variants"]
    kept: int = 0


def encoded(
    pipe: Text2Image,
    pictures: Float[Tensor, "n 3 size size"],
    told: Sequence[str],
    asked: Sequence[Sequence[str]],
    flip: bool,
    kept: int = 0,
    batch: int = 32,
) -> Anchored:
    """Latents and prompts of pictures in [0, 1], of which the first ``len(asked)`` are of anchors; computed once.

    Those from number ``kept`` on are the ones to retain.

    Raises:
        BadInput: the tokenizer cannot read a caption.
    """
    latents = []
    with torch.no_grad():
        for some in pictures.split(batch):
            both = [some, some.flip(-1)] if flip else [some]
            made = [pipe.encode_image((x * 2 - 1).to(pipe.device, pipe.dtype)) for x in both]
            latents.append(torch.stack(made, dim=1).float())
    texts = list(dict.fromkeys([*told, *(text for row in asked for text in row)]))
    place = {text: i for i, text in enumerate(texts)}
    prompts = Conditioning.cat([encode_words(pipe, texts[i : i + batch]) for i in range(0, len(texts), batch)])
    number = lambda texts: [place[text] for text in texts]
    return Anchored(
        torch.cat(latents), len(asked), prompts, torch.tensor(number(told)), torch.tensor([*map(number, asked)]), kept
    )
