"""`CompressionModel`: a codec that makes bytes of pictures, and an `ImageModel` that makes its blurred ones real."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from diffusers import ModelMixin
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from sfumato.data.base import to_square
from sfumato.errors import BadInput
from sfumato.files import tensors_sha256
from sfumato.finite import require_finite_pictures
from sfumato.memory import require_memory
from sfumato.nets import Elic
from sfumato.progress import bar
from sfumato.sample import Clipped
from sfumato.sample.schedulers import check_steps
from sfumato.sample.tiles import BATCH, Tiling, grown, tiled
from sfumato.sample.times import uniform

from .bitstream import RangeWriter, Tally, pack, read_with, unpack
from .contract import Condition
from .drawing import ToldDenoiser, noise, right_kind
from .image import ImageModel
from .seeing import as_bytes
from .variations import Reference

if TYPE_CHECKING:
    from sfumato.data.base import Pictures

FAINT = -6.0
"""Log-SNR at time 1 above which a picture does not begin from noise alone."""


@dataclass(frozen=True)
class Degraded(Condition):
    """A batch of pictures that something was taken from, and that are to be made whole.

    Attributes:
        pictures: in [-1, 1].
    """

    pictures: Float[Tensor, "batch channel height width"]


@dataclass(eq=False)
class CompressionModel(ImageModel):
    """A codec trained for rate and squared error, and a network that draws pictures given what the codec decodes.

    `compress` makes bytes of a picture of any size, `decompress` a picture of these; `draw` draws at the model's own
    size, given pictures, what would come back of them.

    Attributes:
        codec: from pictures to latents, bits and back (`sfumato.nets.Elic`); saved beside the network.
    """

    codec: Any = None

    further: ClassVar[Mapping[str, tuple[type[ModelMixin], ...]]] = MappingProxyType({"codec": (Elic,)})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.codec, Elic):
            raise BadInput(f"a model of compression needs a codec, not a {type(self.codec).__name__}")

    def parts(self) -> dict[str, nn.Module]:
        return {"network": self.network, "codec": self.codec}

    @property
    def factor(self) -> int:
        """What the sides of pictures are padded to multiples of: the codec's and the network's."""
        return max(self.codec.factor, int(self.network.factor))

    def hash4(self) -> bytes:
        """Four bytes by which streams know their codec: they are read by the very same weights only."""
        return bytes.fromhex(tensors_sha256(self.codec.state_dict())[:8])

    # What it is told

    def told(self, asked: Any) -> Degraded | None:
        """Pictures as they come back of the codec: files, a tensor [n, 3, side, side] in [0, 1] or of 8 bits.

        Raises:
            BadInput: something else, a file that is no picture, or pictures of another size than the model's.
        """
        if asked is None:
            return self.unconditional()
        if isinstance(asked, Condition):
            return right_kind(asked, Degraded, "pictures")
        if not torch.is_tensor(asked):
            several = list(asked) if isinstance(asked, list | tuple) else [asked]
            arrays = [x.pixels if isinstance(x, Reference) else self._read(x) for x in several]
            if not arrays:
                raise BadInput("this model is shown pictures: give at least one")
            asked = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
        if tuple(asked.shape[1:]) != self.shape:
            size = " x ".join(map(str, asked.shape[-2:]))
            raise BadInput(f"draw() gives pictures of {self.size} pixels a side, not {size}: compress others to bytes")
        return Degraded(self.reconstruct(as_bytes(asked).float().to(self.device) / 127.5 - 1))

    def unconditional(self, n: int = 1) -> Degraded:
        """Even grey, ``n`` times; the network has not been trained on it."""
        return Degraded(torch.zeros(n, *self.shape, device=self.device))

    def asked_for(self, pictures: Pictures, rows: Sequence[int]) -> list[Any]:
        """These pictures themselves: what is drawn is what would come back of them."""
        return [Reference(pictures.picture(i)) for i in rows]

    def heard(self, cond: Any, z: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch channel h w"]:
        return cond.pictures.to(z.device, self.network.dtype).expand(len(z), *z.shape[1:])

    def copy(self, own: str | None = None) -> CompressionModel:
        made = super().copy(own)
        made.codec = copy.deepcopy(self.codec, {id(x): x for x in self.codec.parameters()})
        return made

    # Pictures and bytes

    @torch.no_grad()
    def reconstruct(self, x: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n 3 height width"]:
        """x_mse: what the codec makes of pictures in [-1, 1] of any size, without bytes in between."""
        height, width = x.shape[-2:]
        found = self.codec.reconstruct(grown(x.to(self.device), *self._padded(height, width)).to(self.codec.dtype))
        return found[..., :height, :width].to(x.dtype)

    def compress(self, picture: UInt8[np.ndarray, "height width 3"]) -> bytes:
        """The bytes of one picture of any size; `decompress` reads them, in any process and on any machine.

        The latents come back to the bit, for they and all that is told of them are in fixed point; the picture that
        networks make of them comes back but for rounding.

        Raises:
            BadInput: no picture of 8 bits; the range coder is not installed.
        """
        writer = RangeWriter()
        self._through(writer, picture)
        height, width = picture.shape[:2]
        if self.codec.config["hyper"] and self.size == self.codec.factor < max(height, width):
            warnings.warn(
                f"this model learned from {self.size} x {self.size} pixels, one hyper-latent: larger pictures take "
                "more bits than they need; train with --crop 128 or more", stacklevel=2,
            )  # fmt: skip
        return pack(writer.payload(), height, width, self.hash4())

    def bits(self, picture: UInt8[np.ndarray, "height width 3"]) -> float:
        """What its bytes would take, without header and without the range coder, by the coder's own tables."""
        tally = Tally()
        self._through(tally, picture)
        return tally.bits

    @torch.no_grad()
    def _through(self, coder: Any, picture: UInt8[np.ndarray, "height width 3"]) -> None:
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or not picture.size:
            raise BadInput(f"a picture to compress is 8-bit (height, width, 3), not {picture.dtype} {picture.shape}")
        padded = self._padded(*picture.shape[:2])
        x = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        codec = self._coding()
        codec.coded(coder, *padded, codec.g_a(grown(x, *padded).to(codec.device, codec.dtype)))

    def _coding(self) -> Elic:
        """The codec where there is float64, which fixed point is computed in; Apple's GPUs have none."""
        return copy.deepcopy(self.codec).cpu() if self.codec.device.type == "mps" else self.codec

    def _padded(self, height: int, width: int) -> tuple[int, int]:
        """The size of what the codec sees of a picture, if there is memory for a feature map of it at half the side."""
        require_memory(self.codec.config["width"] * height * width, f"pictures of {width} x {height} pixels")
        up = lambda n: -(-n // self.factor) * self.factor
        return up(height), up(width)

    @torch.no_grad()
    def decode_mse(self, data: bytes, name: str = "the stream") -> Float[Tensor, "1 3 height width"]:
        """x_mse in [-1, 1], from bytes.

        Raises:
            BadInput: they are not what this model wrote, or not all of it; see `sfumato.pipeline.bitstream.unpack`.
        """
        height, width, payload = unpack(data, self.hash4(), name)
        padded = self._padded(height, width)
        codec = self._coding()
        y = read_with(lambda reader: codec.coded(reader, *padded), payload, name)
        found = codec.g_s(y.to(codec.dtype)).clamp(-1, 1)
        return found[..., :height, :width].float()

    def decompress(
        self, data: bytes, *, seed: int = 0, realism: float = 1.0, name: str = "the stream", **settings: Any
    ) -> Float[Tensor, "3 height width"]:
        """The picture in [0, 1] of bytes that `compress` wrote; the same seed gives the same picture.

        Args:
            data: the bytes.
            seed: of the noise that the picture is drawn from.
            realism: 1 for the drawn picture, 0 for x_mse (at once), between them a blend, see `blended`.
            settings: as for `restore`.

        Raises:
            BadInput: as `decode_mse`, and as `restore`.
        """
        if not 0 <= realism <= 1:
            raise BadInput(f"realism must lie between 0 and 1, got {realism}")
        x = x_mse = self.decode_mse(data, name)
        if realism:
            x = blended(x_mse, self.restore(x_mse, [seed], **settings).to(x_mse), realism)
        return (x[0].float().cpu() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def restore(
        self,
        x_mse: Float[Tensor, "n 3 height width"],
        seeds: Sequence[int],
        *,
        sampling_steps: int | None = None,
        scheduler: str | Callable[..., Tensor] | None = None,
        tile: int | None = None,
        overlap: int | None = None,
        progress: bool = False,
    ) -> Float[Tensor, "n 3 height width"]:
        """Real pictures that go with ``x_mse``, of any size, in [-1, 1].

        Args:
            x_mse: what the codec decoded, in [-1, 1].
            seeds: one for each.
            sampling_steps, scheduler: as for `draw`.
            tile: side of tiles in pixels, for what would not fit into memory at once (`sfumato.sample.tiles`); None:
                the whole picture.
            overlap: pixels that tiles share; by default a quarter of the tile, as far as the network allows.
            progress: show a bar.

        Raises:
            BadInput: numbers of pictures and seeds that differ, steps, a sampler or tiles that cannot be.
        """
        if len(seeds) != len(x_mse):
            raise BadInput(f"{len(seeds)} seeds for {len(x_mse)} pictures: give one each")
        steps = self.sampling_steps if sampling_steps is None else sampling_steps
        check_steps(steps, self.distilled_steps)
        solver, times = self.solver(scheduler), uniform(steps, self.defaults["start_time"])
        height, width = x_mse.shape[-2:]
        tiling = None
        if tile is not None and tile < max(height, width):
            due = int(self.network.factor)
            if tile % due or tile < 2 * due:
                raise BadInput(f"tile must be a multiple of {due}, at least {2 * due}, not {tile}")
            tiling = Tiling(tile, max(due, tile // 4 // due * due) if overlap is None else overlap)
            if tiling.overlap % due:
                raise BadInput(f"overlap must be a multiple of {due}, not {overlap}")
        down, across = map(tiling.padded, (height, width)) if tiling else self._padded(height, width)
        walks = len(tiling.batches(down, across, BATCH)) if tiling else 1
        found = []
        with bar("drawing", len(seeds) * walks * steps, progress) as advance:
            walk = partial(_counting, solver, advance)
            for picture, seed in zip(grown(x_mse.to(self.device), down, across), seeds, strict=True):
                generators = [torch.Generator().manual_seed(int(seed))]
                degraded, eps = picture[None], noise(generators, tuple(picture.shape)).to(picture)
                z = start(self.process, degraded, eps, times[0])
                if tiling is None:
                    drawn = walk(self._clipped(degraded), z, times, generator=generators)
                else:
                    drawn = tiled(walk, self._clipped, degraded, z, eps, times, tiling, generators)
                found.append(drawn[..., :height, :width].clamp(-1, 1))
                require_finite_pictures(found[-1], [seed])
        return torch.cat(found)

    def _clipped(self, degraded: Tensor) -> Any:
        denoiser = ToldDenoiser(self.denoiser, Degraded(degraded), None, 1.0, None, "logsnr", None)
        return Clipped(denoiser) if self.defaults["clip"] else denoiser

    def describe(self) -> dict[str, Any]:
        parameters = sum(p.numel() for p in self.codec.parameters())
        return {**super().describe(), "codec": type(self.codec).__name__, "codec_parameters": parameters}

    def _read(self, file: Any) -> UInt8[np.ndarray, "side side 3"]:
        if not isinstance(file, str | Path) or not os.path.isfile(file):
            raise BadInput(f"this model is shown pictures: {str(file)[:100]!r} is no file; name one")
        return to_square(Path(file), self.size)


def _counting(
    solver: Callable[..., Tensor], advance: Callable[[], None], *walk: Any, callback: Any = None, **options: Any
) -> Tensor:
    """What the sampler gives, every step counted."""

    def step(*state: Any) -> None:
        advance()
        if callback is not None:
            callback(*state)

    return solver(*walk, callback=step, **options)


def start(
    process: Any, x_mse: Float[Tensor, "n *dims"], eps: Float[Tensor, "n *dims"], t: Tensor
) -> Float[Tensor, "n *dims"]:
    """Where sampling begins: sigma eps, or where the process ends with signal left, alpha x_mse + sigma eps.

    The latter, for a log-SNR of more than -6 at ``t``, is approximately right: the blur is what is left of a picture
    under that much noise.
    """
    left = bool((process.schedule.logsnr(t) > FAINT).all())
    return process.diffuse(x_mse if left else torch.zeros_like(x_mse), t, eps)


def blended(
    x_mse: Float[Tensor, "*dims"], x: Float[Tensor, "*dims"], realism: float
) -> Float[Tensor, "*dims"]:
    """(1 - beta) x_mse + beta x': where x_mse is the mean given the bits, with 1 + beta^2 times its squared error."""
    return x_mse + realism * (x - x_mse)
