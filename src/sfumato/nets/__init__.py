"""Networks: diffusers ``ModelMixin`` classes, so that they save, load and report their size like everybody else's.

All have one signature, ``network(z, logsnr, labels)``:

- ``z``: noisy pictures [batch, channel, height, width], or frames [batch, frame, channel, height, width];
- ``logsnr``: finite log signal-to-noise ratios, [batch], or [batch, frame] for frames;
- ``labels``: class numbers [batch] (the last class is "none", for guidance), or None for networks without classes;

and return a tensor shaped like ``z``. `TokenTransformer` takes tokens and times instead, and returns logits;
`VariationUViT` takes what an encoder sees of a picture in place of class numbers. A network
knows neither the noise process nor what its output means.
"""

from .consistency import ConsistencyUNet
from .gan import GenotypeGenerator
from .residual_uvit import ResidualUViT
from .simple_uvit import SimpleUNet, SimpleUViT
from .tokens import TokenTransformer
from .unet import UNet
from .variation_uvit import VariationUViT
from .video import VideoUNet

__all__ = [
    "ConsistencyUNet", "GenotypeGenerator", "ResidualUViT", "SimpleUNet", "SimpleUViT", "TokenTransformer", "UNet",
    "VariationUViT", "VideoUNet",
]  # fmt: skip
