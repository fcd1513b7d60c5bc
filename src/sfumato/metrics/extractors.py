"""Feature extractors: what maps pictures to the vectors that distances between sets are computed from.

Every figure names its extractor, the hash of its weights and its resize rule. None of them downloads anything of
itself; "pixels", "random-cnn" and the sketch world's oracle need no weights from elsewhere.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any, Protocol

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.functional import conv2d

from sfumato.errors import BadInput, unknown

from .inception import SIDE, load_inception
from .perceptual import LPIPS
from .resize import RULES, resize
from .trained import is_trained, load_trained
from .vision import ClipModel, Preparation, load_vision, module_sha256, reads_text

ORACLE, INCEPTION, PIXELS, RANDOM = "oracle", "inception", "pixels", "random-cnn"
NAMED = (INCEPTION, ORACLE, PIXELS, RANDOM)


class Extractor(Protocol):
    """A map from 8-bit pictures of one size to one float32 vector each.

    ``name`` and ``hash`` say which features these are, ``resize`` what is done to pictures first. One that classifies
    has ``logits``, from features to the outputs that the Inception score reads; where these are not the classifier's
    own, ``without`` says what is left out.
    """

    name: str
    hash: str
    resize: str

    def __call__(self, images: UInt8[Tensor, "n 3 height width"]) -> Float[Tensor, "n d"]: ...


def make_extractor(
    extractor: str | os.PathLike, weights: str | os.PathLike | None = None, resize: str = "clean", seed: int = 0
) -> Extractor:
    """An extractor by name.

    Args:
        extractor: "inception" (needs ``weights``), "oracle", "pixels", "random-cnn", or any vision encoder of
            `transformers`: a folder or hub id (DINOv2: the class token; CLIP: the image embedding; ResNet: the average
            of the last feature maps); or a folder of `sfumato classify`.
        weights: safetensors file of the FID's Inception.
        resize: how pictures come to the size of the Inception network, by name.
        seed: of the random network.

    Raises:
        BadInput: no such extractor, or its weights are missing or do not fit.
    """
    name = os.fspath(extractor)
    if weights is not None and name != INCEPTION:
        raise BadInput(f"--weights are those of the Inception network; {name} does not take any")
    if name == INCEPTION:
        if weights is None:
            raise BadInput(
                "the FID's Inception needs its weights: name a safetensors file with --weights, or choose another "
                f"extractor ({', '.join(NAMED[1:])}, or a vision encoder of transformers)"
            )
        return InceptionFeatures(weights, resize)
    if name == ORACLE:
        return OracleFeatures()
    if name == PIXELS:
        return PixelFeatures()
    if name == RANDOM:
        return RandomFeatures(seed)
    if not os.path.isdir(name) and "/" not in name:
        raise unknown("extractor", name, NAMED)
    return TrainedFeatures(name) if is_trained(name) else EncoderFeatures(name)


class InceptionFeatures:
    """The 2048 pooled features of the FID's Inception network; `resize.RULES` lists the resize rules."""

    without = "bias"

    def __init__(self, weights: str | os.PathLike, resize: str = "clean"):
        if resize not in RULES:
            raise unknown("resize rule", resize, RULES)
        self.network = load_inception(weights).to(fastest())
        self.rule = resize
        self.name = f"{INCEPTION}-v3-2015, 2048 pooled features"
        self.hash = module_sha256(self.network)
        self.resize = f"{resize} to {SIDE}x{SIDE}"

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "n 3 height width"]) -> Float[Tensor, "n 2048"]:
        with full_float32():
            return self.network(resize(images.to(_place(self.network)), SIDE, self.rule))

    @torch.no_grad()
    def logits(self, features: Float[Tensor, "n 2048"]) -> Float[Tensor, "n 1008"]:
        """The 1008 outputs without their bias, as published Inception scores use them."""
        with full_float32():
            return self.network.logits(features.to(_place(self.network)))


class OracleFeatures:
    """The 128 penultimate features of the sketch world's oracle, and its outputs for the object."""

    name = "the sketch world's oracle, 128 features"
    resize = "bilinear, antialiased, to 64x64"

    def __init__(self) -> None:
        from sfumato.data import oracle

        self.network = oracle.load()
        self.hash = module_sha256(self.network)

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "n 3 height width"]) -> Float[Tensor, "n 128"]:
        return self.network.features(images.float() / 255)

    @torch.no_grad()
    def logits(self, features: Float[Tensor, "n 128"]) -> Float[Tensor, "n objects"]:
        """What the oracle reads as the object of each picture."""
        return self.network.heads["object"](features.float())


class PixelFeatures:
    """The picture itself at ``side`` pixels, values in [0, 1]: a baseline that sees colours and layout only."""

    hash = ""

    def __init__(self, side: int = 16):
        self.side = side
        self.name = f"pixels, {3 * side * side} numbers"
        self.resize = f"torch-antialias to {side}x{side}"

    def __call__(self, images: UInt8[Tensor, "n 3 height width"]) -> Float[Tensor, "n d"]:
        return resize(images, self.side, "torch-antialias").flatten(1) / 255


class RandomFeatures:
    """Mean and spread of each channel of a convolutional network with random weights (256 features).

    Sees edges and textures without having learned anything: good for tests and relative figures, not for comparison
    with published ones. Four layers of 3x3, 16 to 128 channels, ReLU; the orthogonal weights are drawn from ``seed``.
    """

    def __init__(self, seed: int = 0, side: int = 32):
        rng = torch.Generator().manual_seed(seed)
        widths = (3, 16, 32, 64, 128)
        self.side, self.kernels = side, []
        for inputs, outputs in pairwise(widths):
            # QR in float64: the same bits on every machine but for its last ones
            square = torch.randn(max(outputs, 9 * inputs), min(outputs, 9 * inputs), generator=rng, dtype=torch.float64)
            base = torch.linalg.qr(square).Q
            kernel = base.mT if outputs <= 9 * inputs else base
            self.kernels.append((kernel.reshape(outputs, inputs, 3, 3) * 2**0.5).float())
        self.name = f"random convolutional network, seed {seed}, 256 features"
        self.hash = hashlib.sha256(b"".join(k.numpy().tobytes() for k in self.kernels)).hexdigest()
        self.resize = f"torch-antialias to {side}x{side}"

    def __call__(self, images: UInt8[Tensor, "n 3 height width"]) -> Float[Tensor, "n 256"]:
        x = resize(images, self.side, "torch-antialias") / 127.5 - 1
        for i, kernel in enumerate(self.kernels):
            x = conv2d(x, kernel, stride=1 if i == 0 else 2, padding=1).relu()
        return torch.cat([x.mean((2, 3)), x.std((2, 3), correction=0)], dim=1)


class EncoderFeatures:
    """A vision encoder of `transformers`.

    A CLIP-style model gives its projected image embedding (as it is, not of unit length); any other the first token
    after the final normalisation, which is the class token of ViT, DINO and DINOv2; a convolutional network (ResNet,
    ConvNeXt) the average of its last feature maps. Pictures are resized whole to the side that the model sees, without
    the crop of its processor: a distance between sets is about all of the picture.
    """

    def __init__(self, model: str):
        from transformers import AutoModel

        self.clip = ClipModel.load(model) if reads_text(model) else None
        vision = self.clip.vision if self.clip else load_vision(model, AutoModel)
        prepare = whole(vision.prepare)
        self.vision = replace(vision, prepare=prepare)
        if self.clip:
            self.clip = ClipModel(self.vision)
        self.maps = hasattr(vision.network.config, "hidden_sizes")  # as convolutional networks call their widths
        kind = "image embedding" if self.clip else "average of the last feature maps" if self.maps else "class token"
        self.name = f"{type(vision.network).__name__} ({model}), {kind}"
        self.hash = module_sha256(vision.network)
        self.resize = prepare.rule

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "n 3 height width"]) -> Float[Tensor, "n d"]:
        pixels = images.to(self.vision.device).float() / 255
        with full_float32():
            if self.clip:
                return self.clip.images(pixels, unit=False)
            state = self.vision.network(pixel_values=self.vision.prepare(pixels)).last_hidden_state
        if state.ndim != (4 if self.maps else 3):
            raise BadInput(f"{self.name}: its last hidden state, of shape {list(state.shape)}, holds no such features")
        return state.mean((2, 3)) if self.maps else state[:, 0]


class TrainedFeatures:
    """What the last layer of a classifier sees that ``sfumato classify`` trained; its outputs are the ``logits``,
    those of the picture alone where it asks transformed copies, too."""

    def __init__(self, model: str):
        self.vision = load_trained(model)
        self.name = f"classifier ({model}), what its last layer sees"
        self.hash = module_sha256(self.vision.network)
        self.resize = self.vision.prepare.rule

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "n 3 height width"]) -> Float[Tensor, "n d"]:
        network: Any = self.vision.network
        with full_float32():
            return network.features(self.vision.prepare(images.to(self.vision.device).float() / 255))

    @torch.no_grad()
    def logits(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n classes"]:
        """What the classifier says of each picture."""
        network: Any = self.vision.network
        with full_float32():
            return network.from_features(features.to(self.vision.device))


class CallableFeatures:
    """A function of yours as an extractor: 8-bit pictures (n, 3, height, width) to float vectors (n, d).

    ``name`` and ``hash`` stand for it in every record, so give it another one when the function changes.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], name: str, hash: str = "", resize: str = "as the function does"
    ):
        if isinstance(function, nn.Module) and not hash:
            hash = module_sha256(function)
        self.function, self.name, self.hash, self.resize = function, name, hash, resize

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "n 3 height width"]) -> Float[Tensor, "n d"]:
        return self.function(images)


def whole(prepare: Preparation) -> Preparation:
    """The same preparation with the whole picture resized to what the crop would be."""
    size = prepare.crop or (prepare.size if len(prepare.size) == 2 else prepare.size * 2)
    return replace(prepare, size=size, crop=None)


def network_bytes(extractor: Extractor) -> int:
    """Memory of an extractor's weights, where it has any that can be seen."""
    vision = getattr(extractor, "vision", None)
    network = vision.network if vision else getattr(extractor, "network", None)
    return sum(p.numel() * p.element_size() for p in network.parameters()) if network else 0


@contextmanager
def full_float32() -> Iterator[None]:
    """Float32 as it says, not TF32, so that features do not depend on the kind of GPU."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def fastest() -> torch.device:
    """Where networks of metrics run unless they are moved."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _place(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def move(judge: Any, device: str | torch.device) -> None:
    """Bring the network of an extractor or of a measure of pairs to a device; those that follow no device stay.

    Raises:
        BadInput: there is no such device.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise BadInput(f"there is no device '{device}' here: leave --device out for the fastest there is") from error
    judge = getattr(judge, "clip", None) or judge
    found = getattr(judge, "vision", judge)
    if isinstance(judge, (InceptionFeatures, LPIPS)) or hasattr(found, "prepare"):
        found.network.to(device)
