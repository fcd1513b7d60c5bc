"""Text-to-image pipelines behind one adapter, `Text2Image`, and this project's pixel models, `ImageModel`."""

from .anatomy import KINDS, SUBSETS, Projection
from .autoencoders import open_autoencoder, standardised
from .base import Text2Image
from .compression import CompressionModel, Degraded
from .conditioning import Conditioning, Frames, Labels, Seen
from .contract import Condition, Model, Noised
from .distilled import as_flow, few_steps
from .graphs import GraphModel, Graphs
from .image import ImageModel
from .interleaved import Instruction, Interleaved, build_sequence
from .latent import LatentModel
from .load import EMBEDDED, load, load_text2image, origin_of, read_record, wrap
from .prototypes import Prototyped, PrototypeModel
from .slots import Scene, Slots
from .token_model import TokenModel
from .variations import VariationModel
from .video import VideoModel
from .views import ViewModel

__all__ = [
    "EMBEDDED", "KINDS", "SUBSETS", "CompressionModel", "Condition", "Conditioning", "Degraded", "Frames",
    "GraphModel", "Graphs", "ImageModel", "Instruction", "Interleaved", "Labels", "LatentModel", "Model", "Noised",
    "Projection", "PrototypeModel", "Prototyped", "Scene", "Seen", "Slots", "Text2Image", "TokenModel",
    "VariationModel", "VideoModel", "ViewModel", "as_flow", "build_sequence", "few_steps", "load", "load_text2image",
    "open_autoencoder", "origin_of", "read_record", "standardised", "wrap",
]  # fmt: skip
