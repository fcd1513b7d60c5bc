"""Networks: diffusers ``ModelMixin`` classes, so that they save, load and report their size like everybody else's.

All have one signature, ``network(z, logsnr, labels)``:

- ``z``: noisy pictures [batch, channel, height, width], or frames [batch, frame, channel, height, width];
- ``logsnr``: finite log signal-to-noise ratios, [batch], or [batch, frame] for frames;
- ``labels``: class numbers [batch] (the last class is "none", for guidance), or None for networks without classes;

and return a tensor shaped like ``z``. `TokenTransformer` takes tokens and times instead, and returns logits;
`VariationUViT` takes what an encoder sees of a picture in place of class numbers, `PrototypeUNet` text vectors and a
picture of a class, `RestoringUNet` a degraded picture, `ViewUNet` slots and cameras. `Elic` is the codec that degrades,
`OSRT` an encoder, `SceneGraphTransformer` takes graphs and `ImageTransformer` what came before: these denoise nothing.
A network knows neither the noise process nor what its output means.
"""

from .consistency import ConsistencyUNet
from .elic import Elic
from .gan import GenotypeGenerator
from .image_transformer import ImageTransformer
from .osrt import OSRT
from .prototype_unet import PrototypeUNet
from .residual_uvit import ResidualUViT
from .restoring_unet import RestoringUNet
from .scene_graph import SceneGraphTransformer
from .simple_uvit import SimpleUNet, SimpleUViT
from .tokens import TokenTransformer
from .unet import UNet
from .variation_uvit import VariationUViT
from .video import VideoUNet
from .views import ViewUNet

__all__ = [
    "OSRT", "ConsistencyUNet", "Elic", "GenotypeGenerator", "ImageTransformer", "PrototypeUNet", "ResidualUViT",
    "RestoringUNet", "SceneGraphTransformer", "SimpleUNet", "SimpleUViT", "TokenTransformer", "UNet", "VariationUViT",
    "VideoUNet", "ViewUNet",
]  # fmt: skip
