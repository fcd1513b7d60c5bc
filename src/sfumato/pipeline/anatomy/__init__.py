"""What denoising networks are made of and how they are called: one `Anatomy` for each kind of network."""

from .base import Anatomy
from .dit import PixArtAnatomy, SanaAnatomy
from .interleaved import OmniGenAnatomy
from .mmdit import Flux2Anatomy, FluxAnatomy, QwenAnatomy, SD3Anatomy
from .parts import KINDS, SUBSETS, Call, Context, Projection, Site
from .single import ZImageAnatomy
from .unet import UNetAnatomy

__all__ = [
    "KINDS", "SUBSETS", "Anatomy", "Call", "Context", "Flux2Anatomy", "FluxAnatomy", "OmniGenAnatomy",
    "PixArtAnatomy", "Projection", "QwenAnatomy", "SD3Anatomy", "SanaAnatomy", "Site", "UNetAnatomy", "ZImageAnatomy",
]  # fmt: skip
