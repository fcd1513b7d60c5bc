"""Information from a denoiser's errors: I-MMSE against closed forms, bounds, grids, and the command."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from noise_cases import normal
from sfumato import cli
from sfumato.errors import BadInput
from sfumato.metrics.information import gaussian_information, gaussian_mmse, measure
from sfumato.nets import UNet
from sfumato.noise import BlurringProcess, Cosine, GaussianProcess, Karras, RectifiedFlow
from sfumato.noise.analytic import GaussianMixture, MixtureDenoiser
from sfumato.pipeline import ImageModel
from sfumato.sample import times

PROCESS = GaussianProcess(Cosine())
GRID = times.logsnr(PROCESS.schedule, 60)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.floats(0.1, 3), st.floats(0.01, 100))
def test_the_derivative_of_information_is_half_the_mmse(variance, snr):
    snr = torch.tensor(snr, dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(gaussian_information(snr, variance), snr)[0]
    assert_close(slope, gaussian_mmse(snr.detach(), variance) / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_gaussian_data_have_their_closed_forms(prediction):
    """Both curves within their own intervals' reach (four standard errors, and the trapezoid's 1e-3)."""
    c2, n = 0.4, 200
    data = GaussianMixture.isotropic(torch.zeros(1, 3), math.sqrt(c2))
    curve = measure(MixtureDenoiser(PROCESS, data, prediction), data.sample(n, seeded(1)), GRID, seeded(2))
    snr = torch.exp(curve.logsnr)
    for values, exact in (
        (curve.picture_error / 3, gaussian_mmse(snr, c2)),
        (curve.information / 3, gaussian_information(snr, c2) - gaussian_information(snr[0], c2)),
        (curve.noise_error / 3, snr * gaussian_mmse(snr, c2)),
    ):
        error = (values.mean(1) - exact).abs()
        assert (error <= 4 * values.std(1) / math.sqrt(n) + 1e-3 * exact + 1e-12).all()
    bits = curve.bits()
    assert bits[-1].low < bits[-1].value < bits[-1].high
    assert abs(bits[-1].value - curve.information[-1].mean() / (3 * math.log(2))) < 1e-12


def test_a_handful_of_points_is_worth_the_logarithm_of_their_number():
    points = 3 * normal(8, 2)
    data = GaussianMixture.isotropic(points, 1e-4)
    grid = times.logsnr(Cosine(), 60, 1, 0.1)
    curve = measure(MixtureDenoiser(PROCESS, data), data.sample(400, seeded()), grid, seeded(1))
    final = curve.information[-1]
    assert abs(final.mean() - math.log(8)) < 4 * final.std() / math.sqrt(400) + 0.01
    assert (curve.information.diff(dim=0) >= 0).all()


@pytest.mark.parametrize("schedule", [Karras(), RectifiedFlow()])
def test_information_does_not_depend_on_the_schedule(schedule):
    data = GaussianMixture.isotropic(torch.zeros(1, 2), 0.5)
    curves = []
    for one in (Cosine(), schedule):
        grid = one.time(torch.linspace(-5, 8, 30, dtype=torch.float64))
        curves.append(measure(MixtureDenoiser(GaussianProcess(one), data), data.sample(50, seeded()), grid, seeded(1)))
    assert_close(curves[0].information, curves[1].information, rtol=1e-6, atol=1e-8)
    assert_close(curves[0].picture_error, curves[1].picture_error, rtol=1e-6, atol=1e-8)


def test_a_wrong_denoiser_is_charged_more():
    data = GaussianMixture.isotropic(torch.zeros(1, 2), 0.5)
    exact, x = MixtureDenoiser(PROCESS, data, "eps"), data.sample(200, seeded())

    class Wrong:
        process, prediction = PROCESS, "eps"

        def __call__(self, z, t, cond=None):
            return 0.8 * exact(z, t)

    right, wrong = (measure(d, x, GRID, seeded(1)).information[-1].mean() for d in (exact, Wrong()))
    assert wrong > right


def test_every_frequency_is_a_channel_of_its_own():
    """White Gaussian data: each frequency f gains log(1 + c2 SNR_f) / 2 between the ends, whatever the blur."""
    process, c2 = BlurringProcess(Cosine(-10, 10), None, 2.0), 0.5
    data = GaussianMixture.isotropic(torch.zeros(1, 1, 3, 4), math.sqrt(c2))
    x, grid = data.sample(120, seeded()), times.logsnr(process.schedule, 60)
    curve = measure(MixtureDenoiser(process, data, "eps"), x, grid, seeded(1))
    first, last = (torch.exp(process.logsnr(t, x)) for t in (grid[0], grid[-1]))
    exact = (gaussian_information(last, c2) - gaussian_information(first, c2)).sum()
    total = curve.information[-1]
    assert abs(total.mean() - exact) < 4 * total.std() / math.sqrt(120) + 0.01 * exact


def test_batches_and_conditions_go_along():
    data = GaussianMixture.isotropic(torch.tensor([[2.0], [-2.0]]), 0.1)
    x = torch.cat([data.means[:1] + normal(5, 1) / 10, data.means[1:] + normal(5, 1) / 10])
    cond = torch.eye(2, dtype=torch.float64).repeat_interleave(5, dim=0)
    denoiser = MixtureDenoiser(PROCESS, data)
    told = measure(denoiser, x, GRID, seeded(), cond, batch=3)
    untold = measure(denoiser, x, GRID, seeded(), batch=3)
    assert told.information.shape == (61, 10)
    gained = untold.information[-1].mean() - told.information[-1].mean()
    assert abs(gained - math.log(2)) < 0.4  # the class is one bit


@pytest.mark.parametrize("grid", [torch.tensor([0.5]), torch.tensor([0.2, 0.5]), torch.tensor([[0.5, 0.2]])])
def test_bad_times(grid):
    data = GaussianMixture.isotropic(torch.zeros(1, 2), 0.5)
    with pytest.raises(BadInput, match="decreasing"):
        measure(MixtureDenoiser(PROCESS, data), normal(2, 2), grid, seeded())
    with pytest.raises(BadInput, match="finite"):
        flow = GaussianProcess(RectifiedFlow())
        measure(MixtureDenoiser(flow, data), normal(2, 2), torch.tensor([1.0, 0.5]), seeded())


# The grid


@given(st.floats(0.05, 5), st.integers(1, 40))
def test_grid_of_equal_information(variance, steps):
    levels = torch.linspace(-15, 15, 4001, dtype=torch.float64)
    gained = gaussian_information(torch.exp(levels), variance)
    grid = times.information(Cosine(), levels, gained, steps)
    assert (grid[0], grid[-1]) == (1, 0) and (grid.diff() < 0).all()
    found = gaussian_information(torch.exp(Cosine().logsnr(grid)), variance)
    assert_close(found.diff(), found.diff().mean().expand(steps), rtol=1e-3, atol=1e-6)


def test_flat_stretches_are_stepped_over():
    levels = torch.tensor([-15.0, -5, 0, 5, 15])
    grid = times.information(Cosine(), levels, torch.tensor([0.0, 0, 1, 1, 2]), 8)
    found = Cosine().logsnr(grid)
    assert_close(found[[1, 2, 3, 5, 7]], torch.tensor([-3.75, -2.5, -1.25, 7.5, 12.5]).double(), rtol=1e-6, atol=1e-6)
    assert 0 <= found[4] <= 5
    for wrong in ([0.0, 1, 0.5, 1, 2], [0.0, 0, 0, 0, 0]):
        with pytest.raises(BadInput, match="information"):
            times.information(Cosine(), levels, torch.tensor(wrong), 4)


# The command


def test_the_command_on_a_text_to_image_pipeline(tiny_sd, tmp_path, capsys):
    tiny_sd.save(tmp_path / "model")
    out = tmp_path / "out"
    args = ["information", "--model", str(tmp_path / "model"), "--n", "4", "--points", "5", "--out", str(out)]
    assert cli.main(args) == 0
    record = json.loads((out / "information.json").read_text())
    assert record["dimensions"] == 4 * 8 * 8
    assert len(record["logsnr"]) == len(record["bits_per_dimension"]) == len(record["mmse_per_dimension"]) == 5
    bits = [e["value"] for e in record["bits_per_dimension"]]
    assert bits[0] == 0 and (np.diff(bits) > 0).all()
    assert all(e["low"] <= e["value"] <= e["high"] for e in record["mmse_per_dimension"])
    assert len(record["times_of_equal_information"]) == 51
    assert (out / "information.png").exists()
    assert "bits per dimension" in capsys.readouterr().out
    assert cli.main(args) == 2  # exists
    first = (out / "information.json").read_text()
    assert cli.main([*args, "--overwrite"]) == 0
    assert (out / "information.json").read_text() == first.replace('"overwrite": false', '"overwrite": true')


def test_the_command_on_a_model_of_pixels(tmp_path, monkeypatch, capsys):
    network = UNet(8, 3, channels=(8, 8), layers=1, attention=())
    ImageModel(network.eval(), BlurringProcess(Cosine(-10, 10)), "eps", (3, 8, 8)).save(tmp_path / "model")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    args = ["information", "--model", str(tmp_path / "model"), "--n", "3", "--points", "4", "--out"]
    assert cli.main([*args, str(tmp_path / "out")]) == 0
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["information.json"]
    # A fresh network predicts no noise at all: its error is the noise itself.
    record = json.loads((tmp_path / "out" / "information.json").read_text())
    assert record["logsnr"][0] == pytest.approx(-10) and record["dimensions"] == 192


def test_bad_input(tmp_path, capsys):
    assert cli.main(["information", "--model", "sketch", "--n", "1", "--out", str(tmp_path / "x")]) == 2
    assert "at least 2" in capsys.readouterr().err
    assert cli.main(["information", "--model", "sketch"]) == 2
    assert "--out" in capsys.readouterr().err
