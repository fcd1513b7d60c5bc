"""Text-to-image pipelines behind one adapter, `Text2Image`."""

from .base import Text2Image
from .conditioning import Conditioning
from .layers import KINDS, SUBSETS, Projection
from .load import EMBEDDED, load, read_record, wrap

__all__ = [
    "EMBEDDED", "KINDS", "SUBSETS", "Conditioning", "Projection", "Text2Image", "load", "read_record", "wrap",
]  # fmt: skip
