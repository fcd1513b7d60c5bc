"""What the pixel recipes share: training, resuming, losses with their closed forms, and what is saved."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato as sf
from sfumato.errors import BadInput
from sfumato.nets import UNet
from sfumato.noise import Cosine, GaussianProcess
from sfumato.noise.analytic import GaussianMixture, MixtureDenoiser
from sfumato.train.draw import Share
from sfumato.train.pixels import PixelRecipe, PixelTraining


@dataclass(frozen=True, kw_only=True)
class Small(PixelRecipe):
    """The least that a recipe must say."""

    def process(self):
        return GaussianProcess(Cosine())

    def network(self, classes):
        return UNet(self.size, 3, classes, channels=(8, 8), layers=1, attention=())


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "data" / f"{i}.png")
    return str(tmp_path / "data")


def small(folder, **changes):
    settings = {"data": folder, "size": 8, "updates": 4, "batch": 3, "warmup": 1, "checkpoint_every": 2, **changes}
    return Small(**settings)


def test_times_cover_every_level_evenly():
    t = Small().times(8, torch.Generator().manual_seed(0))
    assert t.dtype == torch.float64
    assert (t.sort().values * 8).floor().tolist() == list(range(8))


def test_a_batch_in_shares_has_the_loss_of_the_whole(folder):
    recipe = small(folder, flip=True)
    training = PixelTraining(recipe, recipe.model(()), recipe.open())

    def loss(rows: range) -> torch.Tensor:
        batch = training.batch(3, Share((0, 3, 0), rows, 5), len(rows))
        return training.loss(batch, Share((0, 3, 1), rows, 5))[0] * len(rows) / 5

    torch.testing.assert_close(loss(range(2)) + loss(range(2, 5)), loss(range(5)))


def test_the_loss_of_the_true_denoiser_is_the_conditional_variance():
    """For data N(0, c^2): E ||eps - E[eps | z]||^2 = c^2 alpha^2 / (c^2 alpha^2 + sigma^2) in every dimension."""
    process, c = GaussianProcess(Cosine()), 0.5
    data = GaussianMixture.isotropic(torch.zeros(1, 3, 2, 2), c)
    rng = torch.Generator().manual_seed(0)
    n = 4000
    x, eps = data.sample(n, rng), torch.randn(n, 3, 2, 2, dtype=torch.float64, generator=rng)
    t = torch.full((n,), 0.4, dtype=torch.float64)
    losses = Small().loss(MixtureDenoiser(process, data, "v"), x, t, eps, None)
    alpha, sigma = process.alpha_sigma(0.4)
    expected = (c * alpha) ** 2 / ((c * alpha) ** 2 + sigma**2)
    assert losses.shape == (n,)
    assert abs(losses.mean() - expected) < 4 * losses.std() / n**0.5


def test_a_run_writes_a_model_that_loads_and_goes_on_where_it_stopped(folder, tmp_path):
    small(folder).run(tmp_path / "whole", progress=False)
    run, training = tmp_path / "cut", small(folder)

    class Killed(Exception):
        pass

    class Stops(Small):
        def loss(self, *args):
            calls.append(0)
            if len(calls) > 3:
                raise Killed
            return super().loss(*args)

    calls: list[int] = []
    with pytest.raises(Killed):
        Stops(**vars(training)).run(run, progress=False)
    training.run(run, progress=False)
    one, two = sf.load(tmp_path / "whole" / "model", "cpu"), sf.load(run / "model", "cpu")
    assert one.describe()["sha256"] == two.describe()["sha256"]
    assert one.draw(None, 0, sampling_steps=2).shape == (1, 3, 8, 8)


def test_pictures_to_look_at_while_training_lasts(folder, tmp_path):
    small(folder, grid_every=2, track="none").run(tmp_path / "run", progress=False)
    small(folder, grid_every=0, track="none").run(tmp_path / "plain", progress=False)
    assert [f.name for f in sorted((tmp_path / "run/training/grids").iterdir())] == ["0000002.png", "0000004.png"]
    with Image.open(tmp_path / "run/training/grids/0000004.png") as sheet:
        assert sheet.size == (4 * 132 + 4, 4 * 132 + 4)
    shas = [sf.load(tmp_path / name / "model", "cpu").describe()["sha256"] for name in ("run", "plain")]
    assert shas[0] == shas[1]


def test_other_settings_do_not_go_on_from_a_run(folder, tmp_path):
    recipe = small(folder, updates=2)
    recipe.run(tmp_path / "run", progress=False)
    with pytest.raises(BadInput, match="label_dropout"):
        replace(recipe, label_dropout=0.5).run(tmp_path / "run", progress=False)


@pytest.mark.parametrize("change", [{"updates": 0}, {"label_dropout": 1.0}, {"size": 0}])
def test_bad_settings(change):
    with pytest.raises(BadInput, match=next(iter(change))):
        Small(**change)
