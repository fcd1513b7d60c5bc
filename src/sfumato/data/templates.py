"""The phrases of textual inversion's published script (arXiv:2208.01618) by what is learned; {} is the new word."""

from collections.abc import Mapping
from typing import Literal

Kind = Literal["object", "style", "person"]

_OBJECT = (
    "a photo of a {}", "a rendering of a {}", "a cropped photo of the {}", "the photo of a {}", "a photo of a clean {}",
    "a photo of a dirty {}", "a dark photo of the {}", "a photo of my {}", "a photo of the cool {}",
    "a close-up photo of a {}", "a bright photo of the {}", "a cropped photo of a {}", "a photo of the {}",
    "a good photo of the {}", "a photo of one {}", "a close-up photo of the {}", "a rendition of the {}",
    "a photo of the clean {}", "a rendition of a {}", "a photo of a nice {}", "a good photo of a {}",
    "a photo of the nice {}", "a photo of the small {}", "a photo of the weird {}", "a photo of the large {}",
    "a photo of a cool {}", "a photo of a small {}",
)  # fmt: skip
_STYLE = ("painting", "rendering", "cropped painting", "the painting", "clean painting", "dirty painting",
          "dark painting", "picture", "cool painting", "close-up painting", "bright painting", "cropped painting",
          "good painting", "close-up painting", "rendition", "nice painting", "small painting", "weird painting",
          "large painting")  # fmt: skip
PUBLISHED: Mapping[Kind, tuple[str, ...]] = {
    "object": _OBJECT,
    "style": tuple(f"{'' if word.startswith('the ') else 'a '}{word} in the style of {{}}" for word in _STYLE),
    "person": ("a photo portrait of {}", "a DSLR portrait of {}"),
}
"""A phrase that stands twice is drawn twice as often, as published."""

PLAIN = (
    "a photo of {}",
    "a picture of {}",
    "a rendering of {}",
    "a close-up of {}",
    "an image of {}",
    "{}",
)
"""Phrases of ours, without words that the embedded model does not know."""
