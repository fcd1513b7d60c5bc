"""Text-to-image pipelines behind one adapter, `Text2Image`, and this project's pixel models, `ImageModel`."""

from .anatomy import KINDS, SUBSETS, Projection
from .base import Text2Image
from .conditioning import Conditioning
from .distilled import few_steps
from .image import ImageModel
from .load import EMBEDDED, load, load_text2image, origin_of, read_record, wrap
from .video import VideoModel

__all__ = [
    "EMBEDDED", "KINDS", "SUBSETS", "Conditioning", "ImageModel", "Projection", "Text2Image", "VideoModel", "few_steps",
    "load", "load_text2image", "origin_of", "read_record", "wrap",
]  # fmt: skip
