"""Upsample guidance: pictures larger than a model was trained on, held together by a small one (arXiv:2404.01709)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.fields import Count, NotNegative, Share
from sfumato.pipeline import ImageModel, Text2Image, VideoModel
from sfumato.pipeline.anatomy import Call, UNetAnatomy
from sfumato.pipeline.hooks import Override
from sfumato.pipeline.steering import Forward, Interceptor, Place, Run

from .base import Patch
from .parts.calls import resized
from .parts.upsampling import Part, Tau, Upsampled, guidance_weight, upsample_guidance

__all__ = ["UpsampleGuidance", "Upsampled", "guidance_weight", "upsample_guidance"]


@dataclass(frozen=True, kw_only=True)
class UpsampleGuidance(Patch):
    """Upsample guidance (arXiv:2404.01709): one more prediction a step, of the picture averaged down by m, corrects
    the predicted noise of the large one: eps~ = eps + w U[eps(D[x] / sqrt(P), tau) / m - D[eps]].

    D averages blocks and U repeats them; averaging divides the noise by m, so D[x], rescaled to the power that the
    model knows, is as clean as at tau, with SNR(tau) = m^2 SNR(t). The small picture decides what is where, the direct
    prediction adds the texture. It fits every sampler, for all networks are called with alpha x0 + sigma eps of their
    own process, whatever the scheduler keeps. Guidance with a prompt is linear in the predictions, so both halves are
    corrected alike.

    Draw at the larger size inside the block: ``with UpsampleGuidance().patch(pipe): pipe.draw(..., size=1024)``. The
    scale follows from that size. Pixel models (`ImageModel`) and models of frames (`VideoModel`) have one size only;
    inside the block it is ``scale`` times theirs, and saving is refused. A scale of frames needs a network that takes
    longer windows, and frames drawn block by block (``schedule="standard"``). SDXL's small picture is told its own
    size. Residuals of a ControlNet are averaged for the small picture.

    The paper's method leans on the texture that convolutions give at any size: transformers were not seen to gain
    from it.

    Cost: one call at 1 / m^2 of the elements in each guided step, at most a quarter of the plain step for m = 2.

    Differs from the paper: its text on ``eta`` and ``theta`` was not seen; their defaults are those of two independent
    codes and of the paper as recalled. Where no training step is clean enough to be tau, latents are not guided.
    """

    NEUTRAL: ClassVar[Mapping[str, Any]] = {"theta": 0.0}
    """No guidance."""
    EXAMPLE: ClassVar[Mapping[str, Any]] = {"scale": (2,)}
    """As if the model had been trained at half the size."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "strong": {"theta": 1.2},
        "early": {"eta": 0.3},
    }
    """Settings by name: the defaults; the weight of an independent code for Stable Diffusion; guidance as early as
    another has it for a transformer."""

    place: ClassVar[Place] = "prediction"

    scale: tuple[Count, ...] = ()
    """How many times larger than in training: one number, or height and width, or frames, height and width; none is as
    the size that is drawn says, and twice for models that have one size."""
    theta: NotNegative = 1.0
    """Weight of the guidance; a little above 1 can be better, 0 is none."""
    eta: Share | None = None
    """The share of the times, from the noise on, that is guided; by default 0.6 in latents, which late guidance leaves
    artefacts in, and all of them in pixels."""
    tau: Tau = "grid"
    """The matched time of models trained on a table: its nearest timestep, or exactly, between two."""
    told_size: Literal["target", "trained"] = "target"
    """Which size SDXL's large picture is told: its own, or that of the small one, which is always told its own."""
    without: Part = "nothing"
    """A part to leave out, for comparison: the matched time, the unit power, or the factor 1 / m."""

    def __post_init__(self) -> None:
        scale = (self.scale,) if isinstance(self.scale, (int, float)) else tuple(self.scale)
        object.__setattr__(self, "scale", scale)
        super().__post_init__()
        if len(scale) > 3:
            raise BadInput(f"a scale is one number, or height and width, or frames too: got {len(scale)} numbers")

    @contextmanager
    def patch(self, pipe: Text2Image | ImageModel | DiffusionPipeline) -> Iterator[dict[str, Any]]:
        """As `Patch.patch`; takes models of pixels and of frames too.

        Raises:
            BadInput: on entering: the patch does not fit this model, or one of its class acts on it already.
        """
        with self._enlarged(pipe) if isinstance(pipe, ImageModel) else super().patch(pipe) as told:
            yield told

    @contextmanager
    def acting(self, p: Text2Image) -> Iterator[dict[str, Any]]:
        if len(self.scale) > 2:
            raise BadInput("this model draws pictures: a scale of three numbers is for frames")
        upsampling = Upsampling(self, p)
        with p.intercept(upsampling, self.place):
            yield upsampling.told

    def factors(self, target: tuple[int, ...], trained: tuple[int, ...]) -> tuple[int, ...]:
        """The scale for a height and a width, as asked for or as these say.

        Raises:
            BadInput: the target is no whole multiple.
        """
        if self.scale:
            return self.scale * 2 if len(self.scale) == 1 else self.scale
        if any(big % small or big < small for big, small in zip(target, trained, strict=True)):
            big, small = ("x".join(map(str, side)) for side in (target, trained))
            raise BadInput(f"{big} is no whole multiple of the {small} that this model was trained on: say --scale")
        return tuple(big // small for big, small in zip(target, trained, strict=True))

    def rule(self, denoiser: Any, factors: tuple[int, ...], latents: bool) -> Upsampled:
        """The guidance of a denoiser for such blocks."""
        eta = (0.6 if latents else 1.0) if self.eta is None else self.eta
        return Upsampled(denoiser, factors, self.theta, eta, self.tau, self.without, late=not latents)

    @contextmanager
    def _enlarged(self, model: ImageModel) -> Iterator[dict[str, Any]]:
        plain, shape, defaults = model.denoiser, model.shape, model.defaults
        if isinstance(plain, Upsampled):
            raise BadInput(f"{type(self).__name__} acts on this model already: leave its block first")
        factors = self.scale or (2,)
        factors = factors * 2 if len(factors) == 1 else factors
        frames = isinstance(model, VideoModel)
        if len(factors) > 2 and not frames:
            raise BadInput("this model draws pictures: a scale of three numbers is for frames")
        more = (factors[0] if len(factors) == 3 else 1, 1, *factors[-2:])[-len(shape) :]
        larger = tuple(side * factor for side, factor in zip(shape, more, strict=True))
        rule = self.rule(plain, factors, latents=False)
        try:
            with torch.no_grad():
                plain(torch.zeros(1, *larger, device=model.device), 0.5, model.unconditional())
        except (RuntimeError, BadInput) as error:
            told = str(error).splitlines()[0]
            raise BadInput(
                f"UpsampleGuidance does not fit this {type(model.network).__name__}, which cannot be given samples of "
                f"shape {larger}: {told}"
            ) from error

        def refused(original: Any, *args: Any, **kwargs: Any) -> None:
            raise BadInput(f"{type(self).__name__} acts on this model: save it after the block")

        def copied(original: Any, *args: Any, **kwargs: Any) -> ImageModel:
            made = original(*args, **kwargs)
            made.shape, made.defaults = shape, dict(defaults)
            return made

        with ExitStack() as stack:
            for name, function in (("save", refused), ("copy", copied)):
                stack.callback(Override(model, name, function).remove)
            model.denoiser, model.shape = rule, larger
            if frames:
                model.defaults = {**defaults, "context": defaults["context"] * more[0]}
            try:
                yield {"scale": list(factors)}
            finally:
                model.denoiser, model.shape, model.defaults = plain, shape, defaults


class Upsampling(Interceptor):
    """Adds the guidance to every prediction of a pipeline's network.

    Attributes:
        told: the scale, how often a small picture was denoised, and what is to be said of the network.
    """

    def __init__(self, settings: UpsampleGuidance, p: Text2Image):
        self.settings, self.p = settings, p
        self.told: dict[str, Any] = {"scale": list(settings.scale), "small_runs": 0}
        if not isinstance(p.anatomy, UNetAnatomy):
            self.told["beware"] = f"a {p.anatomy.name} lacks the convolutions whose texture the method leans on"

    def predict(self, forward: Forward, call: Call, run: Run | None) -> Tensor:
        p, settings = self.p, self.settings
        factors = settings.factors(tuple(call.z.shape[-2:]), p.latent_shape()[-2:])
        self.told["scale"] = list(factors)
        sides = [side // factor for side, factor in zip(call.z.shape[-2:], factors, strict=True)]
        if any(side < 1 or side % p.codec.multiple for side in sides):
            least = " and ".join(str(factor * p.codec.multiple * p.scale_factor) for factor in factors)
            raise BadInput(f"this scale needs a height and width that are multiples of {least} pixels")
        if settings.told_size == "trained":
            call = resized(call, call.z, self._size(sides))

        def ask(low: Tensor, tau: Tensor) -> Tensor:
            self.told["small_runs"] += 1
            small = resized(call, low, self._size(sides), factors)
            number = p.clock.number(tau).to(call.z.device)
            return p.clock.native(forward(replace(small, timestep=number)))

        rule = settings.rule(p.denoiser, factors, latents=True)
        time = p.clock.time_of(torch.as_tensor(call.timestep).cpu())
        return p.clock.native(rule.guided(p.clock.native(forward(call)), call.z, time, ask))

    def _size(self, sides: list[int]) -> tuple[int, int]:
        height, width = (side * self.p.scale_factor for side in sides)
        return height, width
