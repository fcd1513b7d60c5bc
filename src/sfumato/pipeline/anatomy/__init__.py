"""What denoising networks are made of and how they are called: one `Anatomy` for each kind of network."""

from .base import KINDS, SUBSETS, Anatomy, Call, Context, Projection, Site
from .unet import UNetAnatomy

__all__ = ["KINDS", "SUBSETS", "Anatomy", "Call", "Context", "Projection", "Site", "UNetAnatomy"]
