"""Text-to-image pipelines behind one adapter, `Text2Image`, and this project's pixel models, `ImageModel`."""

from .anatomy import KINDS, SUBSETS, Projection
from .autoencoders import open_autoencoder, standardised
from .base import Text2Image
from .conditioning import Conditioning, Frames, Labels, Seen
from .contract import Condition, Model, Noised
from .distilled import as_flow, few_steps
from .image import ImageModel
from .interleaved import Instruction, Interleaved, build_sequence
from .latent import LatentModel
from .load import EMBEDDED, load, load_text2image, origin_of, read_record, wrap
from .token_model import TokenModel
from .variations import VariationModel
from .video import VideoModel

__all__ = [
    "EMBEDDED", "KINDS", "SUBSETS", "Condition", "Conditioning", "Frames", "ImageModel", "Instruction", "Interleaved",
    "Labels", "LatentModel", "Model", "Noised", "Projection", "Seen", "Text2Image", "TokenModel", "VariationModel",
    "VideoModel", "as_flow", "build_sequence", "few_steps", "load", "load_text2image", "open_autoencoder", "origin_of",
    "read_record", "standardised", "wrap",
]  # fmt: skip
