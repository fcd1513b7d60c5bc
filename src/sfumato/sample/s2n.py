"""The generalised backward equation of signal-to-noise diffusion as a sampler (arXiv:2408.04221); `s2n_rule` has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from ..errors import BadInput
from ..noise.denoiser import Denoiser
from ..settings import Tuned
from .s2n_rule import Rule
from .samplers import Callback, Generators, Times, _report, _steps, draw, extrapolated, predict, require_noise

if TYPE_CHECKING:
    from .s2n_scheduler import Grid, S2NScheduler


@dataclass(frozen=True, kw_only=True)
class S2N(Tuned, Rule):
    """A sampler with an adjustable amount of noise (``rho``) and an adjustable integrator, for any trained model.

    arXiv:2408.04221, generalised backward equation. Call it like any sampler of `sfumato.sample`, or take `scheduler`
    into a diffusers pipeline. Members: rho = 0 is DDIM, rho = 1 DDPM's ancestral sampler, ``order`` 2 with rho = 0
    DPM-Solver++(2M), ``delta`` = 1 the fixed-noise sampler of inverse heat dissipation. Acts elementwise in the basis
    of the process, so blurring processes and a time per frame work too.

    Cost: that of DDIM, one network call a step.

    Differs from the paper: the formulas are derived from the equation above and verified numerically; its own
    parametric formulas (gamma, delta) could not be compared. Its gamma changes deterministic sampling, which ``freeze``
    never does, so ``gamma_w`` is a knob of ours that does (its useful values are as small as the paper's). A widely
    copied summary prints 1 / (1 + rho^2) for the weight of the score, where (1 + rho^2) / 2 keeps the marginals.
    """

    EXAMPLES: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {}, {"rho": 0.0}, {"rho": 0.0, "order": 2}, {"rho": 1.0, "freeze": 0.5}, {"delta": 0.3},
    )  # fmt: skip
    """Settings that the tests which all samplers share are run with."""
    NEUTRAL: ClassVar[Mapping[str, Any]] = {"rho": 0.0}
    """With these it is DDIM."""

    def __call__(
        self,
        denoiser: Denoiser,
        z: Float[Tensor, "batch *dims"],
        times: Times,
        cond: Any = None,
        generator: Generators | None = None,
        callback: Callback | None = None,
        final_noise: bool = True,
    ) -> Float[Tensor, "batch *dims"]:
        """z at ``times[-1]``; the signature of all samplers of `sfumato.sample`.

        Deterministic settings may also run backwards, from picture to noise. ``final_noise=False`` returns the mean of
        the last step instead of a draw.

        Raises:
            BadInput: times that increase where noise is drawn, or that begin at a picture without any noise and
                increase.
        """
        process = denoiser.process
        if self.noisy and (times.diff(dim=0) > 0).any():
            raise BadInput("with fresh noise the times must decrease from noise (1) to clean (0)")
        require_noise(process, times)
        before = before_t = None
        for step, t, s in _steps(times):
            x0 = ahead = predict(denoiser, z, t, cond)
            if self.order == 2 and before is not None and step < len(times) - 2:
                ahead = extrapolated(process, x0, before, t, before_t, s)
            a, b, std = (c.to(z) for c in self.coefficients(process, t, s, z))
            u = a * process.to_basis(z) + b * process.to_basis(ahead)
            if self.noisy and (final_noise or step < len(times) - 2):
                u = u + std * process.to_basis(draw(z, generator))
            z, before, before_t = process.from_basis(u), x0, t
            _report(callback, step, s, z)
        return z

    def scheduler(self, config: Any = None, grid: Grid = "spacing") -> S2NScheduler:
        """The same as a diffusers scheduler, with the noise table of ``config`` (another scheduler, or its config).

        ``pipe.scheduler = S2N(rho=0.5).scheduler(pipe.scheduler)`` is all that a diffusers pipeline needs.

        Raises:
            BadInput: the other scheduler has no table of betas (flow matching, EDM).
        """
        from .s2n_scheduler import S2NScheduler

        table = dict(getattr(config, "config", config) or {})
        if table and (not {"beta_schedule", "trained_betas"} & table.keys() or table.get("use_flow_sigmas")):
            raise BadInput(f"{table.get('_class_name', 'this scheduler')} has no table of betas, which S2N steps need")
        # Latents are not bounded by 1: clipping, diffusers' default for pixels, must not sneak in.
        return S2NScheduler.from_config({"clip_sample": False, **table}, **asdict(self), grid=grid)
