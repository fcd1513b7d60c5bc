"""`TokenModel`: a network of tokens under a discrete process: levels of pixels, codes of pictures, characters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from diffusers import ModelMixin, VQModel
from jaxtyping import Float, Int
from torch import Tensor, nn

from sfumato.errors import BadInput
from sfumato.noise.discrete import TokenProcess
from sfumato.progress import track
from sfumato.sample.jumps import JumpSchedule
from sfumato.sample.jys import JYS, SAMPLERS
from sfumato.sample.klub import Kind
from sfumato.sample.schedulers import check_steps
from sfumato.sample.times import uniform
from sfumato.sample.tokens import CLEANEST
from sfumato.sample.tokens import uniform as uniforms

from .conditioning import Labels
from .drawing import Rows, finished, seeds_of, whole
from .image import ImageModel


@dataclass(eq=False)
class TokenModel(ImageModel):
    """An `ImageModel` whose samples are tokens of shape ``shape``, and which predicts what each of them was.

    With ``symbols`` among its ``defaults`` tokens are characters, with a ``vae`` codes of its codebook, else levels of
    grey. ``scheduler`` names the sampler: "euler", "tau_leaping" or "k_gillespie".
    """

    vae: Any = None

    process: Any  # a TokenProcess
    drawn_by: ClassVar[tuple[str, str]] = ("tokens", "jumps")
    own_defaults: ClassVar[tuple[str, ...]] = ("symbols",)
    further: ClassVar[Mapping[str, tuple[type[ModelMixin], ...]]] = MappingProxyType({"vae": (VQModel,)})

    def __post_init__(self) -> None:
        self.defaults = {"scheduler": "euler", "sampling_steps": 32, "symbols": "", "clip": False, **self.defaults}
        super().__post_init__()
        if not isinstance(self.process, TokenProcess):
            raise BadInput(f"a model of tokens needs a process of tokens, not {type(self.process).__name__}")

    @property
    def size(self) -> int:
        if self.vae is None:
            return self.shape[-1]
        return self.shape[-1] * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def values(self) -> int:
        """How many values a clean token may have."""
        return self.process.states - (self.process.mask is not None)

    @property
    def autoencoder(self) -> nn.Module | None:
        return self.vae

    def parts(self) -> dict[str, nn.Module]:
        return {"network": self.network} | ({} if self.vae is None else {"vae": self.vae})

    def latent_shape(self, size: int | None = None) -> tuple[int, ...]:
        if size not in (None, self.size):
            raise BadInput(f"this model has one size: {self.size}, not {size}")
        return self.shape

    def call(
        self, z: Int[Tensor, "batch *dims"], t: Float[Tensor, "..."] | float, cond: Labels | None
    ) -> Float[Tensor, "batch *dims states"]:
        """The posterior of every token; the mask has none."""
        time = torch.as_tensor(t, dtype=self.network.dtype, device=z.device).reshape(-1).expand(len(z))
        cond = self.unconditional() if cond is None else cond
        numbers = None if cond is None else cond.numbers.to(z.device).expand(len(z))
        law = self.network(z.long(), time, numbers).float().softmax(-1)
        return nn.functional.pad(law, (0, self.process.states - self.values))

    def encode_image(
        self, x: Float[Tensor, "n 3 height width"], generator: torch.Generator | None = None
    ) -> Int[Tensor, "n height width"]:
        """The tokens of pictures in [-1, 1]: codes, or levels of grey."""
        if self.defaults["symbols"]:
            raise BadInput("this model is of characters: see `TokenModel.read`")
        if self.vae is None:
            return ((x.mean(1) + 1) / 2 * (self.values - 1)).round().clamp(0, self.values - 1).long()
        return codes_of(self.vae, x)

    def decode_latents(self, z: Int[Tensor, "n height width"]) -> Float[Tensor, "n 3 height width"]:
        """Pictures in [-1, 1] of tokens."""
        if self.defaults["symbols"]:
            raise BadInput("this model draws no pictures but writes text: see `TokenModel.write`")
        if self.vae is None:
            return (2 * z.float() / (self.values - 1) - 1)[:, None].expand(-1, 3, -1, -1)
        shape = (len(z), *z.shape[1:], self.vae.config.vq_embed_dim or self.vae.config.latent_channels)
        quantised = self.vae.quantize.get_codebook_entry(z.flatten(), shape)
        return self.vae.decode(quantised, force_not_quantize=True).sample

    def read(self, texts: Sequence[str]) -> Int[Tensor, "n length"]:
        """The tokens of texts of one length, of a model of characters.

        Raises:
            BadInput: symbols that the model has not, or texts of several lengths.
        """
        return read(texts, self.defaults["symbols"])

    def write(self, seeds: int | Sequence[int], **options: Any) -> list[str]:
        """Texts, one for each seed; ``options`` are those of `tokens`."""
        if not self.defaults["symbols"]:
            raise BadInput("this model draws pictures: see `TokenModel.draw`")
        symbols = self.defaults["symbols"]
        return ["".join(symbols[i] for i in row) for row in self.tokens(None, seeds, **options).tolist()]

    def draw(self, asked: Any, seeds: int | Sequence[int], **options: Any) -> Float[Tensor, "n 3 height width"]:
        """Pictures in [0, 1] of the tokens that `tokens` draws with these ``options``."""
        drawn = self.tokens(asked, seeds, **options)
        with torch.no_grad():
            parts = [self.decode_latents(some.to(self.device)) for some in drawn.split(64)]
        given = seeds_of(seeds)
        return finished(torch.cat(parts), False, given * len(drawn) if len(given) == 1 else given)

    @torch.no_grad()
    def tokens(
        self,
        asked: Any,
        seeds: int | Sequence[int],
        *,
        sampling_steps: int | None = None,
        schedule: JumpSchedule | None = None,
        scheduler: Kind | None = None,
        cond: Labels | None = None,
        batch: int = 64,
        size: int | None = None,
        cfg_scale: float | None = None,
        progress: bool = False,
    ) -> Int[Tensor, "n *shape"]:
        """Clean tokens, one sample for each class asked and seed, on the CPU.

        Args:
            sampling_steps: jumps, beside the call that ends them; default: the model's.
            schedule: where they are, as `search` finds it; it names the sampler. By default they are equal.
            scheduler: "euler", "tau_leaping" or "k_gillespie"; default: the model's.
            cfg_scale: 1 or None; there is no guidance of tokens.

        Raises:
            BadInput: the schedule of another model or without so many steps, an unknown sampler, guidance.
        """
        if cfg_scale not in (None, 1.0):
            raise BadInput("models of tokens draw without guidance: leave cfg_scale at 1")
        rows = Rows.make(self, asked, seeds, cond, None, None, size)
        steps = self.sampling_steps if sampling_steps is None else whole(sampling_steps, "sampling_steps")
        check_steps(steps, None)
        kind = scheduler or (schedule.kind if schedule else self.defaults["scheduler"])
        if kind not in SAMPLERS or (schedule and schedule.kind != kind):
            raise BadInput(f"tokens are sampled by {', '.join(SAMPLERS)}, as their schedule says, not by {kind}")
        if schedule and schedule.model and schedule.model != self.describe()["sha256"]:
            raise BadInput("this schedule is that of another model: search one with `TokenModel.search`")
        parts = []
        times = schedule.times(steps) if schedule else self.equal(steps, kind)
        for some in track(rows.chunks(batch), "drawing", progress):
            generators = some.generators()
            told = some.told(self.told)
            noise = self.process.prior(uniforms(torch.empty(len(some), *self.shape), generators)).to(self.device)
            parts.append(SAMPLERS[kind](cast(Any, self.denoiser), noise, times, told, generators).cpu())
        return torch.cat(parts)

    def equal(self, steps: int, kind: Kind) -> Tensor:
        """Equal steps of time, or as nearly equal numbers of tokens.

        Raises:
            BadInput: more steps than tokens.
        """
        if kind != "k_gillespie":
            return uniform(steps, 1.0, CLEANEST)
        length = torch.Size(self.shape).numel()
        if steps > length:
            raise BadInput(f"{steps} steps are more than the {length} tokens: give at most as many")
        return torch.tensor([i * length // steps for i in range(steps + 1)])

    def search(self, data: Int[Tensor, "n *shape"], method: JYS | None = None) -> JumpSchedule:
        """The schedules that ``method`` finds for this model on clean tokens; they are for this model only.

        Raises:
            BadInput: as `JYS.search`.
        """
        method = method or JYS(kind=self.defaults["scheduler"])
        return method.search(cast(Any, self.denoiser), data.to(self.device), model=self.describe()["sha256"])


def read(texts: Sequence[str], symbols: str) -> Int[Tensor, "n length"]:
    """The places of the texts' characters in ``symbols``.

    Raises:
        BadInput: symbols that are not there, texts of several lengths.
    """
    if strange := sorted(set("".join(texts)) - set(symbols)):
        told = ", ".join(map(repr, strange[:5]))
        raise BadInput(f"the model has no {told} among its {len(symbols)} symbols: leave them out or replace them")
    if len({len(text) for text in texts}) != 1:
        raise BadInput("give texts of one length, the model's")
    number = {symbol: i for i, symbol in enumerate(symbols)}
    return torch.tensor([[number[symbol] for symbol in text] for text in texts])


@torch.no_grad()
def codes_of(vae: VQModel, x: Float[Tensor, "n 3 height width"]) -> Int[Tensor, "n h w"]:
    """The numbers of the codebook's entries for pictures in [-1, 1]."""
    latents = vae.encode(x).latents
    return vae.quantize(latents)[2][2].view(len(x), *latents.shape[2:])
