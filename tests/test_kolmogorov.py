"""Kolmogorov flow against exact solutions, budgets and its own symmetries; in float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from sfumato.data import kolmogorov
from sfumato.data.kolmogorov import SCALE, KolmogorovFlow, KolmogorovFrames, coarsen
from sfumato.errors import BadInput

FLOW = KolmogorovFlow(size=24, viscosity=0.01, drag=0.1, wavenumber=3, dt=0.04)
STILL = replace(FLOW, amplitude=0.0)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def axes(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.arange(size, dtype=torch.float64) * (2 * torch.pi / size)
    return x[:, None], x[None]  # y, x


@pytest.mark.parametrize("wave", [(1, 1), (2, 0), (0, 3), (3, 2)])
def test_a_single_wave_decays_exactly(wave):
    """Taylor-Green vortices: products of cosines of one |k| advect nothing, so any time step is exact."""
    y, x = axes(24)
    a, b = wave
    start = torch.cos(a * x) * torch.cos(b * y)
    flow = replace(STILL, dt=0.5)
    end = flow.field(flow.step(flow.transform(start), 20))
    assert_close(end, start * np.exp(-(0.01 * (a**2 + b**2) + 0.1) * 10), rtol=1e-12, atol=1e-14)


def test_the_laminar_flow_stays():
    """-amplitude wavenumber cos(wavenumber y) / (viscosity wavenumber^2 + drag) is steady, for any time step."""
    y, _ = axes(24)
    expected = (-3 * torch.cos(3 * y) / (0.01 * 9 + 0.1)).expand(24, 24)
    assert_close(FLOW.field(FLOW.laminar), expected, rtol=1e-12, atol=1e-12)
    assert_close(FLOW.field(FLOW.step(FLOW.laminar, 5)), expected, rtol=1e-12, atol=1e-12)


def test_advection_by_hand():
    """w = cos x + cos 2y: u = -sin(2y) / 2, v = sin x, and -u . grad w = 3/2 sin x sin 2y."""
    y, x = axes(24)
    spectrum = STILL.transform(torch.cos(x) + torch.cos(2 * y))
    u, v = STILL.velocity(spectrum)
    assert_close(u, (-torch.sin(2 * y) / 2).expand(24, 24), rtol=0, atol=1e-14)
    assert_close(v, torch.sin(x).expand(24, 24), rtol=0, atol=1e-14)
    found = STILL.field(STILL.advection(spectrum))
    assert_close(found, 1.5 * torch.sin(x) * torch.sin(2 * y), rtol=0, atol=1e-14)


def test_velocity_is_free_of_divergence_and_its_curl_is_the_vorticity():
    spectrum = FLOW.random(3, rng())
    (ky, kx), (u, v) = FLOW.waves, FLOW.velocity(spectrum)
    u, v = FLOW.transform(u), FLOW.transform(v)
    size = spectrum.abs().max().item()
    assert (kx * u + ky * v).abs().max() < 1e-12 * size
    assert_close(1j * (kx * v - ky * u), spectrum, rtol=0, atol=1e-12 * size)


def test_energy_and_enstrophy_are_those_of_the_fields():
    spectrum = FLOW.random(3, rng(), energy=0.7)
    u, v = FLOW.velocity(spectrum)
    assert_close(FLOW.energy(spectrum), torch.full((3,), 0.7, dtype=torch.float64))
    assert_close(FLOW.energy(spectrum), (u**2 + v**2).mean((-2, -1)) / 2)
    assert_close(FLOW.enstrophy(spectrum), (FLOW.field(spectrum) ** 2).mean((-2, -1)) / 2)


def test_dealiased_advection_conserves_energy_and_enstrophy():
    spectrum = FLOW.transform(torch.randn(4, 24, 24, generator=rng(), dtype=torch.float64))  # all waves alike
    change = FLOW.advection(spectrum)
    scale = FLOW.mean_product(change, change).sqrt() * FLOW.mean_product(spectrum, spectrum).sqrt()
    stream = spectrum / (FLOW.waves[0] ** 2 + FLOW.waves[1] ** 2).clamp(min=1)
    assert (FLOW.mean_product(stream, change) / scale).abs().max() < 1e-14
    assert (FLOW.mean_product(spectrum, change) / scale).abs().max() < 1e-14


def test_budgets_close_along_the_flow():
    """dE/dt = <u f> - 2 viscosity Z - 2 drag E and dZ/dt = <w curl f> - 2 viscosity P - 2 drag Z, P = <|grad w|^2> / 2.

    The derivatives by fourth-order differences of a computed flow, the other side from its fields.
    """
    flow = replace(FLOW, dt=0.004)
    spectra = [flow.step(flow.random(2, rng()), 100)]
    for _ in range(4):
        spectra.append(flow.step(spectra[-1]))
    rate = lambda q: (q[0] - 8 * q[1] + 8 * q[3] - q[4]) / (12 * flow.dt)
    middle, (y, _) = spectra[2], axes(24)
    energy, enstrophy = flow.energy(middle), flow.enstrophy(middle)
    u, _ = flow.velocity(middle)
    fed = (u * torch.sin(3 * y)).mean((-2, -1))
    assert_close(
        rate([flow.energy(s) for s in spectra]), fed - 2 * 0.01 * enstrophy - 2 * 0.1 * energy, rtol=0, atol=1e-8
    )
    w, (ky, kx) = flow.field(middle), flow.waves
    w_x, w_y = flow.field(1j * kx * middle), flow.field(1j * ky * middle)
    fed, lost = (-3 * w * torch.cos(3 * y)).mean((-2, -1)), 0.01 * (w_x**2 + w_y**2).mean((-2, -1))
    assert_close(
        rate([flow.enstrophy(s) for s in spectra]), fed - lost - 2 * 0.1 * enstrophy, rtol=0, atol=1e-7
    )


def test_fourth_order_in_time():
    start = FLOW.step(FLOW.random(1, rng()), 100)
    ends = [replace(FLOW, dt=0.4 / n).step(start, n) for n in (10, 20, 40, 160)]
    errors = [(end - ends[-1]).abs().max().item() for end in ends[:-1]]
    for coarse, fine in pairwise(errors):
        assert 12 < coarse / fine < 20


def test_spectral_accuracy_in_space():
    """A smooth flow on 12, 24 and 36 points against 72: the error falls much faster than any power of 2 or 3/2."""
    start = lambda y, x: torch.cos(x) + torch.cos(2 * y) + torch.sin(x + y)
    ends = []
    for size in (12, 24, 36, 72):
        flow = KolmogorovFlow(size=size, viscosity=0.05, drag=0.0, wavenumber=2, dt=0.05)
        ends.append(coarsen(flow.field(flow.step(flow.transform(start(*axes(size))), 20)), 12))
    errors = [(end - ends[-1]).abs().max().item() for end in ends[:-1]]
    assert errors[0] / errors[1] > 2**5
    assert errors[1] / errors[2] > 1.5**8
    assert errors[2] < 1e-4


def test_the_flow_commutes_with_the_shifts_of_the_forcing():
    """Along x any shift, along y a period of the forcing (24 / 3 = 8 points)."""
    start = FLOW.random(1, rng())
    moved = FLOW.transform(FLOW.field(start).roll((8, 5), (-2, -1)))
    end, other = FLOW.step(start, 20), FLOW.step(moved, 20)
    assert_close(FLOW.field(other), FLOW.field(end).roll((8, 5), (-2, -1)), rtol=0, atol=1e-11)


def test_it_is_chaotic():
    """A perturbation of 1e-6 grows more than fivefold in 6 units of time, long after both have forgotten the start."""
    flow = KolmogorovFlow(size=24)
    start = flow.step(flow.random(4, rng()), 400)
    other = start + 1e-6 * flow.random(4, rng(1))
    distance = []
    for _ in range(2):
        start, other = flow.step(start, 150), flow.step(other, 150)
        distance.append(flow.enstrophy(other - start).sqrt())
    assert (distance[1] / distance[0]).log().mean() > np.log(5)
    assert 0.1 < flow.energy(start).mean() < 3
    assert flow.field(start).abs().max() < 30


def test_trajectories_are_reproducible_frames_of_one_flow():
    one, two = (FLOW.trajectories(2, 4, 5, rng(3), spin_up=10) for _ in range(2))
    assert one.shape == (2, 4, 24, 24)
    assert torch.equal(one, two)
    assert not torch.equal(one, FLOW.trajectories(2, 4, 5, rng(4), spin_up=10))
    assert_close(FLOW.field(FLOW.step(FLOW.transform(one[:, 1]), 5)), one[:, 2], rtol=0, atol=1e-12)


def test_coarsening_keeps_the_waves_that_fit():
    y, x = axes(24)
    kept, gone = torch.cos(2 * x + y) + torch.sin(3 * y), torch.cos(7 * x)
    assert_close(coarsen(kept + gone, 12), kept[::2, ::2], rtol=0, atol=1e-13)
    assert_close(coarsen(coarsen(kept, 12), 24), kept, rtol=0, atol=1e-13)
    assert torch.equal(coarsen(kept, 24), kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 25}, "even number of points"),
        ({"wavenumber": 8}, "resolves wavenumbers 1 to 7"),
        ({"wavenumber": 0}, "resolves wavenumbers"),
        ({"viscosity": 0.0}, "must be positive"),
        ({"drag": -0.1}, "not negative"),
        ({"dt": 0.0}, "must be positive"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(BadInput, match=message):
        replace(FLOW, **change)


def test_a_blow_up_is_said():
    flow = replace(STILL, dt=50.0, viscosity=1e-6, drag=0.0)
    with pytest.raises(BadInput, match="blew up with dt = 50"):
        flow.step(flow.random(1, rng(), energy=100.0), 30)


def test_odd_grids_are_refused():
    with pytest.raises(BadInput, match="got 7"):
        coarsen(torch.zeros(24, 24), 7)


def frames(cache, **changes) -> KolmogorovFrames:
    settings = {"size": 8, "frames": 3, "seed": 5, "flows": 2, "length": 5, "every": 2, "cache": cache}
    return KolmogorovFrames(**{**settings, **changes})


@pytest.fixture
def short_spin_up(monkeypatch):
    whole = KolmogorovFlow.trajectories
    monkeypatch.setattr(
        KolmogorovFlow, "trajectories", lambda self, *args, **options: whole(self, *args, **{**options, "spin_up": 3})
    )


def test_clips_are_all_runs_of_frames_of_the_flows(tmp_path, short_spin_up):
    clips = frames(tmp_path)
    assert len(clips) == 2 * 3
    flows = coarsen(KolmogorovFlow(32).trajectories(2, 5, 2, rng(5)), 8).float() / SCALE
    for i in range(len(clips)):
        clip = clips.clip(i)
        assert clip.shape == (3, 1, 8, 8) and clip.dtype == torch.float32
        assert torch.equal(clip[:, 0], flows[i % 2, i // 2 : i // 2 + 3])
    with pytest.raises(IndexError):
        clips.clip(6)


def test_flows_are_solved_once(tmp_path, short_spin_up, monkeypatch):
    first = frames(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    other = frames(tmp_path, seed=6)
    assert not torch.equal(first.vorticity, other.vorticity)
    monkeypatch.delattr(kolmogorov.KolmogorovFlow, "trajectories")
    assert torch.equal(frames(tmp_path, frames=2).vorticity, first.vorticity)


def test_a_damaged_cache_is_made_anew(tmp_path, short_spin_up):
    first = frames(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(b"half a file")
    assert torch.equal(frames(tmp_path).vorticity, first.vorticity)
    assert torch.equal(frames(tmp_path).vorticity, first.vorticity)


def test_without_a_place_for_the_cache_all_goes_on(tmp_path, short_spin_up):
    (tmp_path / "file").touch()
    assert len(frames(tmp_path / "file")) == 6


def test_clips_longer_than_the_flows_are_refused(tmp_path):
    with pytest.raises(BadInput, match="do not fit into flows of 5"):
        frames(tmp_path, frames=6)


@pytest.mark.parametrize(("size", "finer"), [(8, 1), (32, 1), (48, 2), (64, 2), (130, 5)])
def test_finer_grids_take_shorter_steps_over_the_same_time(size, finer, tmp_path, monkeypatch):
    told = []

    def solved(flow, n, frames, every, generator, spin_up=500, progress=False):
        told.append((flow.dt * finer, every, spin_up, flow.size))
        return torch.zeros(n, frames, flow.size, flow.size)

    monkeypatch.setattr(KolmogorovFlow, "trajectories", solved)
    frames(tmp_path, size=size)
    assert told == [(0.04, 2 * finer, 500 * finer, max(size, 32))]


def test_frames_of_an_odd_size_are_refused_before_the_flow_is_solved(tmp_path, monkeypatch):
    monkeypatch.setattr(KolmogorovFlow, "trajectories", lambda *a, **k: pytest.fail("solved"))
    with pytest.raises(BadInput, match="even number of points a side, got 9"):
        frames(tmp_path, size=9)
