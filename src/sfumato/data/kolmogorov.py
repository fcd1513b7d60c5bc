"""Kolmogorov flow: a two-dimensional fluid stirred by a sine wave, chaotic, solved pseudo-spectrally.

On the torus [0, 2 pi)^2 with axes (y, x), in terms of the vorticity w = dv/dx - du/dy:

    dw/dt + u . grad w = viscosity * laplace w - drag * w - amplitude * wavenumber * cos(wavenumber * y)

which is the curl of the Navier-Stokes equations forced by amplitude * sin(wavenumber * y) in the x direction. Fields
are float64 and batched; the same seed gives the same flow.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Complex, Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.files import atomic_file, cache_folder
from sfumato.progress import track

Field = Float[Tensor, "*batch size size"]
Spectrum = Complex[Tensor, "*batch size half"]
SPIN_UP = 500
"""Time steps after which a flow has forgotten how it began."""


@dataclass(frozen=True)
class KolmogorovFlow:
    """The equation on a grid of ``size`` x ``size`` points; products are dealiased by the 2/3 rule.

    Between steps of fourth-order Runge-Kutta viscosity, drag and forcing act exactly (an integrating factor around the
    laminar flow), so a flow without advection is exact for any time step and the laminar flow stays where it is.
    Energy and enstrophy are conserved by the truncated advection. Explicit: velocity * dt * size / 3 must stay below
    about 2.8.
    """

    size: int = 32
    """Grid points a side; waves up to size / 3 are kept."""
    viscosity: float = 0.01
    drag: float = 0.1
    """Linear friction, which bounds the largest scales."""
    wavenumber: int = 3
    """Of the forcing."""
    amplitude: float = 1.0
    """Of the forcing."""
    dt: float = 0.04

    def __post_init__(self) -> None:
        if self.size < 4 or self.size % 2:
            raise BadInput(f"the grid of the flow has an even number of points a side, at least 4; got {self.size}")
        if not 1 <= self.wavenumber <= (self.size - 1) // 3:
            raise BadInput(f"a grid of {self.size} points resolves wavenumbers 1 to {(self.size - 1) // 3}")
        if self.viscosity <= 0 or self.drag < 0 or self.dt <= 0:
            raise BadInput("viscosity and dt must be positive, and drag not negative")

    # Spectra: vorticity as the real Fourier transform over (y, x).

    @cached_property
    def waves(self) -> tuple[Float[Tensor, "size 1"], Float[Tensor, "1 half"]]:
        """(k_y, k_x) of a spectrum."""
        ky = torch.fft.fftfreq(self.size, 1 / self.size, dtype=torch.float64)[:, None]
        kx = torch.fft.rfftfreq(self.size, 1 / self.size, dtype=torch.float64)[None]
        return ky, kx

    @cached_property
    def kept(self) -> Float[Tensor, "size half"]:
        """1 for the waves that are kept, 0 for those that products would alias onto them, and for the mean."""
        ky, kx = self.waves
        return ((ky.abs() < self.size / 3) & (kx < self.size / 3) & (ky**2 + kx**2 > 0)).double()

    @cached_property
    def decay(self) -> Float[Tensor, "size half"]:
        """Rate at which viscosity and drag damp each wave."""
        ky, kx = self.waves
        return self.viscosity * (ky**2 + kx**2) + self.drag

    @property
    def forcing(self) -> Spectrum:
        """The curl of the forcing."""
        y = torch.arange(self.size, dtype=torch.float64) * (2 * torch.pi / self.size)
        curl = -self.amplitude * self.wavenumber * torch.cos(self.wavenumber * y)
        return self.transform(curl[:, None].expand(self.size, self.size))

    @property
    def laminar(self) -> Spectrum:
        """The steady flow without advection, forcing / decay: a solution, unstable when viscosity is small."""
        return self.forcing / self.decay.clamp(min=self.viscosity)

    def transform(self, vorticity: Field) -> Spectrum:
        """The spectrum of a field, without what is not kept."""
        return torch.fft.rfft2(vorticity.double()) * self.kept

    def field(self, spectrum: Spectrum) -> Field:
        """The inverse of `transform`."""
        return torch.fft.irfft2(spectrum, s=(self.size, self.size))

    def velocity(self, spectrum: Spectrum) -> tuple[Field, Field]:
        """(u, v), the velocity along x and y: u = dpsi/dy, v = -dpsi/dx, with laplace psi = -w."""
        (ky, kx), stream = self.waves, self._stream(spectrum)
        return self.field(1j * ky * stream), self.field(-1j * kx * stream)

    def advection(self, spectrum: Spectrum) -> Spectrum:
        """-u . grad w, dealiased."""
        (ky, kx), stream = self.waves, self._stream(spectrum)
        u, v, w_x, w_y = self.field(
            torch.stack([1j * ky * stream, -1j * kx * stream, 1j * kx * spectrum, 1j * ky * spectrum])
        )
        return -self.transform(u * w_x + v * w_y)

    def _stream(self, spectrum: Spectrum) -> Spectrum:
        ky, kx = self.waves
        return spectrum / (ky**2 + kx**2).clamp(min=1)

    def step(self, spectrum: Spectrum, steps: int = 1) -> Spectrum:
        """The spectrum ``steps`` time steps later.

        Raises:
            BadInput: the flow blew up: the time step is too long.
        """
        half = torch.exp(-self.decay * self.dt / 2)
        laminar, h = self.laminar, self.dt
        x = spectrum - laminar
        rate = lambda deviation: self.advection(deviation + laminar)
        for _ in range(steps):
            # The classical rule for exp(decay t) (w - laminar), which only advection changes.
            moved = half * x
            a = rate(x)
            b = rate(moved + h / 2 * half * a)
            c = rate(moved + h / 2 * b)
            d = rate(half * (moved + h * c))
            x = half * (moved + h / 6 * (half * a + 2 * (b + c))) + h / 6 * d
        if not torch.isfinite(torch.view_as_real(x)).all():
            raise BadInput(f"the flow blew up with dt = {self.dt}: choose a smaller one, or more viscosity")
        return x + laminar

    def random(self, n: int, generator: torch.Generator, energy: float = 0.5) -> Spectrum:
        """``n`` random flows of large eddies (wavenumbers around 3), with that kinetic energy per area."""
        noise = torch.randn(n, self.size, self.size, generator=generator, dtype=torch.float64)
        ky, kx = self.waves
        k = (ky**2 + kx**2).sqrt()
        spectrum = self.transform(noise) * k * torch.exp(-((k - 3) ** 2) / 2)
        return spectrum * (energy / self.energy(spectrum)).sqrt()[:, None, None]

    # What the budgets are about; per area.

    def mean_product(self, a: Spectrum, b: Spectrum) -> Float[Tensor, "*batch"]:
        """The mean of the product of two fields over the torus."""
        twice = torch.full((self.size // 2 + 1,), 2.0, dtype=torch.float64)
        twice[0] = twice[-1] = 1.0  # of these waves the spectrum holds both halves
        return ((a * b.conj()).real * twice).sum((-2, -1)) / self.size**4

    def energy(self, spectrum: Spectrum) -> Float[Tensor, "*batch"]:
        """Kinetic energy, mean of (u^2 + v^2) / 2."""
        return self.mean_product(spectrum, self._stream(spectrum)) / 2

    def enstrophy(self, spectrum: Spectrum) -> Float[Tensor, "*batch"]:
        """Mean of w^2 / 2."""
        return self.mean_product(spectrum, spectrum) / 2

    def trajectories(
        self, n: int, frames: int, every: int, generator: torch.Generator, spin_up: int = SPIN_UP,
        progress: bool = False,
    ) -> Float[Tensor, "n frames size size"]:
        """Vorticity of ``n`` independent flows, ``every`` time steps a frame, after ``spin_up`` steps from `random`."""
        shots = [self.step(self.random(n, generator), spin_up)]
        for _ in track(range(frames - 1), "solving the flow", progress):
            shots.append(self.step(shots[-1], every))
        return self.field(torch.stack(shots, dim=1))


def coarsen(vorticity: Field, size: int) -> Field:
    """The field on fewer (or more) points: its waves below size / 2, which a grid of ``size`` can carry.

    Raises:
        BadInput: ``size`` is odd.
    """
    old = vorticity.shape[-1]
    if size == old:
        return vorticity
    if size < 2 or size % 2:
        raise BadInput(f"a grid has an even number of points a side, got {size}")
    half = min(size, old) // 2
    spectrum = torch.fft.rfft2(vorticity)
    new = spectrum.new_zeros(*spectrum.shape[:-2], size, size // 2 + 1)
    new[..., :half, :half] = spectrum[..., :half, :half]
    new[..., size - half + 1 :, :half] = spectrum[..., old - half + 1 :, :half]
    return torch.fft.irfft2(new, s=(size, size)) * (size / old) ** 2


GRID = 32
"""Points a side on which flows are solved at least, and for which the default time step is made."""
SCALE = 6.0
"""Vorticity that frames have as 1: about twice the standard deviation of the default flow."""
LENGTH = 160
"""Frames of a flow."""


class KolmogorovFrames:
    """Clips of the default flow's vorticity over `SCALE`, on ``size`` points: every run of frames of ``flows`` flows.

    Frames are ``every`` time steps of 0.04 apart. The flows are solved once, on at least 32 points, and kept as
    safetensors in ``cache``: by default the folder named by SFUMATO_CACHE, or .cache/sfumato in the user's home. On
    more than 32 points each of these steps is made in ceil(size / 32) shorter ones, or the flow would blow up.
    Cost: ``flows`` times (``length * every`` + 500) time steps, once; a minute or two for the defaults.

    Raises:
        BadInput: clips longer than the flows, an odd size.
    """

    channels, bounded = 1, False

    def __init__(
        self,
        size: int,
        frames: int,
        seed: int = 0,
        *,
        flows: int = 64,
        length: int = LENGTH,
        every: int = 10,
        cache: Path | str | None = None,
        progress: bool = False,
    ):
        if frames > length:
            raise BadInput(f"clips of {frames} frames do not fit into flows of {length}")
        if size < 2 or size % 2:  # before the flow is solved, not when it is brought to this size
            raise BadInput(f"frames of the flow have an even number of points a side, got {size}")
        self.frames = frames
        finer = -(-max(size, GRID) // GRID)
        self.flow = KolmogorovFlow(size=max(size, GRID), dt=KolmogorovFlow.dt / finer)
        what = repr((1, self.flow, size, seed, flows, length, every))  # 1: the version of what follows
        name = f"kolmogorov-{hashlib.sha256(what.encode()).hexdigest()[:16]}.safetensors"
        file = (Path(cache) if cache else cache_folder()) / name
        try:
            self.vorticity = load_file(file)["vorticity"]
        except (OSError, LookupError, SafetensorError):  # not there yet, or damaged
            generator = torch.Generator().manual_seed(seed)
            fine = self.flow.trajectories(
                flows, length, every * finer, generator, spin_up=SPIN_UP * finer, progress=progress
            )
            self.vorticity = coarsen(fine, size).float()
            # Kept to save time; where that cannot be, or another process is at it, nothing is lost.
            with contextlib.suppress(BadInput, OSError), atomic_file(file, overwrite=True) as temporary:
                save_file({"vorticity": self.vorticity.contiguous()}, temporary)

    def __len__(self) -> int:
        return self.vorticity.shape[0] * (self.vorticity.shape[1] - self.frames + 1)

    def clip(self, index: int) -> Float[Tensor, "frames 1 size size"]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, flow = divmod(index, self.vorticity.shape[0])
        return self.vorticity[flow, start : start + self.frames, None] / SCALE
