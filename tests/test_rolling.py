"""The rolling recipe: its times and its loss in closed form, training to a model that rolls out, and the command."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

import sfumato as sf
from noise_cases import normal
from sfumato import cli
from sfumato.errors import BadInput
from sfumato.noise import Cosine, GaussianProcess, Shifted, Window
from sfumato.noise.analytic import GaussianMixture, MixtureDenoiser
from sfumato.pipeline import VideoModel
from sfumato.train.rolling import Rolling

RECIPE = Rolling(window=5, context=2)
TINY = Rolling(
    size=8, window=4, context=1, channels=(8, 16), layers=1, head_dim=8, embedding=16, updates=3, batch=2, warmup=1,
    checkpoint_every=2, sampling_steps=2, pictures=8,
)  # fmt: skip


class Given:
    """A denoiser whose prediction is given, and differentiable."""

    process, prediction = GaussianProcess(Cosine()), "v"

    def __init__(self, answer: torch.Tensor):
        self.answer = answer.requires_grad_()

    def __call__(self, z, t, cond=None):
        self.z, self.t = z, t
        return self.answer


def clips(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Data, noise and a prediction of frames [batch, frame, 1, 2, 2]."""
    return tuple(normal(*shape, 1, 2, 2, seed=seed) for seed in range(3))


def v_error(recipe: Rolling, x: torch.Tensor, eps: torch.Tensor, v: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """Squared error of v in each frame, [batch, frame]."""
    alpha, sigma = (c[..., None, None, None] for c in Given.process.alpha_sigma(times))
    return (v - (alpha * eps - sigma * x)).square().mean((2, 3, 4))


def test_with_the_standard_schedule_it_is_the_loss_of_pictures():
    """The mean over generated frames of the plain error of v, all at one time, the context at time 0."""
    recipe, (x, eps, v) = replace(RECIPE, frame_times="standard"), clips(3, 5)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    denoiser = Given(v)
    loss = recipe.loss(denoiser, x, t, eps)
    times = t[:, None].expand(3, 5).clone()
    times[:, :2] = 0
    assert torch.equal(denoiser.t, times)
    assert_close(loss, v_error(recipe, x, eps, v, times)[:, 2:].mean(1), rtol=1e-12, atol=0)


def test_rolling_and_init_by_hand():
    recipe, (x, eps, v) = replace(RECIPE, init_share=0.5), clips(2, 5)
    t = torch.tensor([0.25, 0.8], dtype=torch.float64)  # init at 0.5, rolling at 0.6
    times = torch.tensor([[0, 0, 0.5, 0.5 + 1 / 3, 1.0], [0, 0, 0.2, 1.6 / 3, 2.6 / 3]], dtype=torch.float64)
    counted = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]], dtype=torch.float64)
    denoiser = Given(v)
    loss = recipe.loss(denoiser, x, t, eps)
    assert_close(denoiser.t, times, rtol=0, atol=1e-12)
    assert_close(denoiser.z, Given.process.diffuse(x, times, eps), rtol=0, atol=1e-12)
    assert_close(loss, (counted * v_error(recipe, x, eps, v, times)).sum(1) / 3, rtol=1e-12, atol=0)


@given(st.integers(1, 8).flatmap(lambda w: st.tuples(st.just(w), st.integers(0, w - 1))), st.floats(0.01, 0.99))
def test_frames_that_are_left_out_get_no_gradient(shape, t):
    window, context = shape
    x, eps, v = clips(4, window)
    times = torch.tensor([t, t / 2, 1 - t / 2, 0.5], dtype=torch.float64)
    for recipe in (
        Rolling(window=window, context=context, init_share=0.5),
        Rolling(window=window, context=context, init_share=0.5, mask_waiting=False),
        Rolling(window=window, context=context, init_share=0.5, weighting="eps"),
        Rolling(window=window, context=context, frame_times="standard"),
    ):
        denoiser = Given(v.clone())
        recipe.loss(denoiser, x, times, eps).sum().backward()
        gradient = denoiser.answer.grad.flatten(2)
        counted = recipe.local(times)[1]
        assert (gradient[~counted] == 0).all()
        assert (gradient[counted] != 0).any(-1).all()
        assert not counted[:, :context].any()


def test_waiting_frames_are_counted_when_asked():
    t = torch.tensor([0.05], dtype=torch.float64)  # init phase at 0.5
    times, masked = RECIPE.local(t)
    assert times[0, -1] == 1 and masked[0].tolist() == [False, False, True, True, False]
    assert replace(RECIPE, mask_waiting=False).local(t)[1][0].tolist() == [False, False, True, True, True]


def test_the_share_of_init_phases_and_their_times():
    recipe, n = replace(RECIPE, init_share=0.25), 400
    t = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    times, _ = recipe.local(t)
    even = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    assert_close(times[:100], Window(5, 2).times("init", even), rtol=0, atol=1e-12)
    even = (torch.arange(300, dtype=torch.float64) + 0.5) / 300
    assert_close(times[100:], Window(5, 2).times("rolling", even), rtol=0, atol=1e-12)
    for share, phase in ((0.0, "rolling"), (1.0, "init")):
        assert torch.equal(replace(recipe, init_share=share).local(t)[0], Window(5, 2).times(phase, t))


@given(st.integers(0, 4), st.sampled_from([0.0, 1.0]))
def test_one_frame_under_way_trains_as_the_next_frame_model_to_the_bit(context, share):
    x, eps, v = clips(3, context + 1)
    t = torch.tensor([0.2, 0.6, 0.9], dtype=torch.float64)
    recipe = Rolling(window=context + 1, context=context, init_share=share)
    rolling, standard = Given(v.clone()), Given(v.clone())
    loss = recipe.loss(rolling, x, t, eps)
    assert torch.equal(loss, replace(recipe, frame_times="standard").loss(standard, x, t, eps))
    assert torch.equal(rolling.z, standard.z)


def test_the_errors_of_noise_and_v_differ_by_alpha_squared():
    x, eps, v = clips(1, 3)
    recipe = Rolling(window=3, context=2, init_share=0.0)
    t = torch.tensor([0.7], dtype=torch.float64)
    losses = [replace(recipe, weighting=kind).loss(Given(v), x, t, eps) for kind in ("eps", "v")]
    assert_close(losses[0], Given.process.alpha_sigma(t)[0] ** 2 * losses[1], rtol=1e-10, atol=0)


def test_the_true_denoiser_of_a_window_has_the_least_loss():
    """AR(1) frames: the exact conditional mean beats small changes of it, and its loss is the conditional variance."""
    place = torch.arange(4, dtype=torch.float64)
    data = GaussianMixture.gaussian(torch.zeros(4, 1, 1, 1), 0.8 ** (place[:, None] - place).abs())
    truth = MixtureDenoiser(GaussianProcess(Cosine()), data, "v")
    rng = torch.Generator().manual_seed(0)
    x = data.sample(4000, rng)
    eps = torch.randn(x.shape, dtype=torch.float64, generator=rng)
    recipe = Rolling(window=4, context=1)
    for t in (0.05, 0.5):  # init at 0.5, rolling at 4/9
        t = torch.full((1,), t, dtype=torch.float64)

        class Changed:
            process, prediction = truth.process, "v"

            def __init__(self, factor: float):
                self.factor = factor

            def __call__(self, z, t, cond=None):
                return self.factor * truth(z, t)

        losses = {f: recipe.loss(Changed(f), x, t, eps).mean() for f in (0.9, 1.0, 1.1)}
        assert losses[1.0] < min(losses[0.9], losses[1.1])
        times, counted = recipe.local(t)
        alpha, sigma = truth.process.alpha_sigma(times[0])
        noisy = alpha[:, None] * data.covariances[0] * alpha + torch.diag(sigma**2)
        cross = data.covariances[0] * alpha
        left = data.covariances[0] - cross @ torch.linalg.solve(noisy, cross.T)
        # v's error is x0's over sigma; the spread of a mean of squares of 4,000 normal numbers is 2.2 % of it
        expected = (left.diagonal() / sigma**2)[counted[0]].sum() / 3
        assert losses[1.0] == pytest.approx(expected.item(), rel=0.08)


def test_it_trains_resumes_and_rolls_out(tmp_path):
    folder = TINY.run(tmp_path / "run", progress=False)
    model = sf.load(folder, device="cpu")
    assert isinstance(model, VideoModel)
    assert model.window == Window(4, 1)
    assert model.defaults["schedule"] == "rolling" and model.defaults["clip"]
    context = TINY.read(TINY.open(), [0, 1])[:, :1]
    drawn = model.draw(context, [0, 1], n_frames=6)
    assert drawn.shape == (2, 6, 3, 8, 8) and torch.isfinite(drawn).all()
    weights = (folder / "network" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert TINY.run(tmp_path / "run", progress=False) == folder
    assert (folder / "network" / "diffusion_pytorch_model.safetensors").read_bytes() == weights
    with pytest.raises(BadInput, match="frame_times"):
        replace(TINY, frame_times="standard").run(tmp_path / "run", progress=False)


def test_the_loss_falls():
    """40 updates on one clip."""
    recipe = replace(TINY, lr=5e-3, init_share=0.2)
    torch.manual_seed(0)
    model, rng = recipe.model(()), torch.Generator().manual_seed(0)
    x = recipe.read(recipe.open(), [0]).expand(8, -1, -1, -1, -1)
    optimizer, losses = torch.optim.Adam(model.network.parameters(), lr=recipe.lr), []
    for _ in range(40):
        loss = recipe.loss(model.denoiser, x, recipe.times(8, rng), torch.randn(x.shape, generator=rng)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_pictures_to_look_at_while_it_trains():
    model = TINY.model(())
    shown = TINY.grid(model, TINY.open(), torch.Generator().manual_seed(0), 16)
    assert shown.shape == (16, 3, 8, 8)
    assert shown.min() >= 0 and shown.max() <= 1


class Fluid:
    """What the recipe asks of a source, without solving a flow."""

    channels, bounded = 1, False

    def __len__(self):
        return 5

    def clip(self, index):
        return normal(6, 1, 16, 16, seed=index).float()


@pytest.mark.parametrize("name", Rolling.presets)
def test_presets_are_whole(name):
    recipe = Rolling(**Rolling.presets[name])
    recipe.__dict__["_frames"] = Fluid()
    model = recipe.model(())
    assert model.shape == (recipe.window, 1, recipe.size, recipe.size)
    assert not model.defaults["clip"]
    assert model.network.config.periodic == (recipe.data == "kolmogorov")


def test_the_schedule_may_follow_the_size():
    assert TINY.process() == GaussianProcess(Cosine())
    assert replace(TINY, noise_size=4).process() == GaussianProcess(Shifted(Cosine(), 4, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": 4}, "cannot begin with 4 clean"),
        ({"init_share": 1.5}, "init_share"),
        ({"sampling_steps": 0}, "sampling_steps"),
        ({"data": "nowhere"}, "no frames at 'nowhere'"),
    ],
)
def test_bad_settings_are_named(change, message, tmp_path):
    with pytest.raises(BadInput, match=message):
        replace(TINY, **change).run(tmp_path / "run")


# The command


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return TINY.run(tmp_path_factory.mktemp("rolling") / "run", progress=False)


def rolled(trained, out, *flags):
    return cli.main(["rollout", "--model", str(trained), "--out", str(out), "--device", "cpu", *flags])


def test_a_rollout_is_an_animation_a_sheet_and_a_record(trained, tmp_path, capsys):
    assert rolled(trained, tmp_path / "a", "--frames", "7", "--seeds", "3,5", "--truth") == 0
    assert "2 sequences" in capsys.readouterr().out
    with Image.open(tmp_path / "a" / "rollout.gif") as animation:
        assert animation.n_frames == 7
    tensors = load_file(tmp_path / "a" / "frames.safetensors")
    assert tensors["frames"].shape == tensors["truth"].shape == (2, 7, 3, 8, 8)
    record = json.loads((tmp_path / "a" / "rollout.json").read_text())
    error = (tensors["frames"] - tensors["truth"]).square().mean((0, 2, 3, 4))
    assert record["error"] == pytest.approx(error.tolist())
    assert record["data"] == "sketch" and record["seeds"] == [3, 5]
    model = sf.load(trained, device="cpu")
    assert torch.equal(model.rollout([3, 5], tensors["context"], 7), tensors["frames"])
    assert rolled(trained, tmp_path / "a") == 2  # never overwritten unasked
    assert rolled(trained, tmp_path / "b", "--frames", "2", "--frame-times", "standard", "--finish") == 2
    assert "only with the rolling schedule" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--frames", "0"), "at least 1"),
        (("--seeds", "x"), "names no seeds"),
        (("--data", "nowhere"), "no frames at 'nowhere'"),
    ],
)
def test_bad_flags_are_one_sentence(trained, tmp_path, capsys, flags, message):
    assert rolled(trained, tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_models_are_refused(tmp_path, capsys):
    assert rolled("sketch", tmp_path / "out") == 2
    assert "no model of frames" in capsys.readouterr().err


def test_the_ledger_entry_measures_both_on_the_same_flows(tmp_path, monkeypatch):
    """With random fields for flows and one update: what comes out, not how it comes out."""
    from sfumato.ledger import rolling as entry

    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "sfumato.data.kolmogorov.KolmogorovFlow.trajectories",
        lambda self, n, frames, every, rng, **_: torch.randn(n, frames, self.size, self.size, generator=rng),
    )
    small = {"size": 8, "patch": 1, "channels": (8, 16), "head_dim": 8, "embedding": 16, "updates": 1, "batch": 2}
    monkeypatch.setattr(entry, "RECIPE", replace(entry.RECIPE, **small, pictures=10))
    for name, value in (("FLOWS", 3), ("FRAMES", 8), ("LATE", 4), ("BLOCK", 2)):
        monkeypatch.setattr(entry, name, value)
    measured = entry.EXPERIMENT.at(1)
    assert measured.keys() == entry.EXPERIMENT.claims.keys()
    for key, n in (("spectrum", 2), ("error", 3)):
        method, baseline = measured[key]
        assert len(method) == len(baseline) == n
        assert all(value > 0 for value in (*method, *baseline))
