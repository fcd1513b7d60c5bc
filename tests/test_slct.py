"""sLCT: parametrisation, curriculum, losses and coupling against their formulas, its parts as switches, and a run."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

from sfumato.cli import main
from sfumato.commands.latents import draw
from sfumato.errors import BadInput
from sfumato.metrics.tails import posterior_mean, tails, temporal_differences
from sfumato.nets import ConsistencyUNet
from sfumato.nets.consistency import NonScalingLayerNorm, non_scaling_norm, preconditioning
from sfumato.noise import GaussianProcess, Karras
from sfumato.noise.analytic import GaussianMixture, MixtureDenoiser
from sfumato.pipeline import ImageModel, LatentModel, load, open_autoencoder, standardised
from sfumato.pipeline.codec import Codec
from sfumato.sample import consistency
from sfumato.sample.times import uniform
from sfumato.train.consistency import (
    assigned,
    couple,
    diffusion_loss,
    draw_indices,
    early,
    index_law,
    levels_at,
    loss_scale,
    noise_levels,
    robust,
    shortest_paths,
)
from sfumato.train.slct import SLCT, SLCTTraining

NET = {"size": 4, "in_channels": 2, "channels": (8, 8), "blocks": (1, 1), "attention": (2,), "head_dim": 8,
       "embedding": 16}  # fmt: skip


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=rng(seed))


def stirred(**changes) -> ConsistencyUNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = ConsistencyUNet(**{**NET, **changes})
        for p in net.parameters():
            nn.init.normal_(p, std=0.1)
    return net.eval()


def test_without_noise_it_is_the_identity_and_with_much_it_forgets():
    c_skip, c_out, c_in = preconditioning(torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64))
    assert c_skip[0] == 1 and c_out[0] == 0
    assert_close(c_skip[1], torch.tensor(0.25 / (0.498**2 + 0.25), dtype=torch.float64))
    assert_close(c_in[1], torch.tensor(math.sqrt(2), dtype=torch.float64))
    assert c_skip[2] < 4e-5 and abs(c_out[2] - 0.5) < 3e-5
    z = normal(2, 2, 4, 4).float()
    at = lambda sigma: torch.full((2,), -2 * math.log(sigma))
    assert_close(stirred()(z, at(0.002)), z, rtol=0, atol=1e-6)
    assert (stirred()(z, at(1.0)) - z).abs().max() > 0.1


def test_non_scaling_norm_is_layer_norm_without_a_weight_and_forgets_scale_and_shift():
    h, bias = normal(3, 5, 4, 4), normal(5, 4, 4, seed=1)
    plain = nn.functional.layer_norm(h, (5, 4, 4), None, bias)
    assert_close(non_scaling_norm(h, bias), plain)
    assert_close(non_scaling_norm(3 * h + 7, bias, eps=0.0), non_scaling_norm(h, bias, eps=0.0))
    by_channel = nn.functional.layer_norm(h.movedim(1, -1), (5,)).movedim(-1, 1)
    assert_close(non_scaling_norm(h, torch.zeros(5, 1, 1).double(), "channel"), by_channel)


@pytest.mark.parametrize("axes", ["sample", "channel"])
def test_it_replaces_every_normalisation_of_blocks_and_output(axes):
    net = stirred(axes=axes)
    norms = [m for m in net.modules() if isinstance(m, NonScalingLayerNorm)]
    assert len(norms) == sum(isinstance(m, nn.GroupNorm) for m in stirred(norm="group").modules()) > 8
    assert not any(isinstance(m, nn.GroupNorm) for m in net.modules())
    assert all([n for n, _ in m.named_parameters()] == ["bias"] for m in norms)


def test_the_curriculum_doubles_the_grid_at_equal_intervals():
    assert [levels_at(100 * i, 700) for i in range(8)] == [11, 21, 41, 81, 161, 321, 641, 641]
    assert levels_at(99, 700) == 11 and levels_at(700, 700) == 641
    assert levels_at(0, 1, 10, 10) == 11


def test_the_grid_is_that_of_the_process():
    levels, process = noise_levels(41), GaussianProcess(Karras())
    times = 1 - torch.arange(41).double() / 40
    assert_close(process.alpha_sigma(times)[1], levels)
    assert_close(levels[[0, -1]], torch.tensor([80.0, 0.002], dtype=torch.float64))
    assert abs(float(noise_levels(641)[400]) - 0.743) < 5e-4


def test_the_scale_of_the_loss():
    assert abs(loss_scale(11, 4096) - 0.03456) < 1e-12
    for n, c in ((21, 0.0136353), (641, 2.5336e-4)):
        assert abs(loss_scale(n, 4096) / c - 1) < 1e-4
        assert loss_scale(n, 64) == loss_scale(n, 4096)
    assert loss_scale(641, 4096, adaptive=False) == loss_scale(11, 4096)
    assert loss_scale(21, 9, c0=0.5) / loss_scale(21, 9) == pytest.approx(0.5 / 0.03456)


def test_the_cauchy_loss_and_its_gradient():
    difference, c = normal(3, 4, 2).requires_grad_(), 0.3
    m = difference.detach().square().flatten(1).mean(1)
    loss = robust(difference, c)
    assert_close(loss.detach(), (m / 2 + c**2).log() - 2 * math.log(c))
    (gradient,) = torch.autograd.grad(loss.sum(), difference)
    assert_close(gradient, 2 * difference.detach() / (8 * (2 * c**2 + m)[:, None, None]))
    far = torch.full((1, 8), 1e6).double()
    assert_close(robust(2 * far, c) - robust(far, c), torch.tensor([math.log(4)]).double())


@pytest.mark.parametrize("reduction", ["mean", "sum", "element"])
def test_losses_of_large_scale_are_half_the_square(reduction):
    difference, c = normal(3, 4), 1e4
    r2 = difference.square().sum(1) if reduction == "sum" else difference.square().mean(1)
    assert_close(c**2 * robust(difference, c, "cauchy", reduction), r2 / 2, rtol=1e-6, atol=0)
    assert_close(c * robust(difference, c, "pseudo-huber", reduction), r2 / 2, rtol=1e-6, atol=1e-7)
    assert_close(4 * c**2 * robust(difference, c, "geman-mcclure", reduction), r2, rtol=1e-6, atol=0)
    assert_close(robust(difference, c, "l2", reduction), r2)


def test_pairs_follow_the_normal_law_of_log_noise():
    levels = noise_levels(11)
    law = index_law(levels)
    cdf = torch.distributions.Normal(-1.1, 2.0).cdf(levels.log())
    assert_close(law, (cdf[:-1] - cdf[1:]) / (cdf[0] - cdf[-1]), rtol=1e-5, atol=1e-9)
    n = 20_000
    drawn = torch.bincount(draw_indices(law, (torch.arange(n) + 0.5) / n), minlength=10) / n
    assert_close(drawn.double(), law, rtol=0, atol=1e-4)


def test_the_diffusion_loss_looks_at_the_last_quarter():
    j = torch.arange(640)
    assert torch.equal(early(j, 641), j >= 480)
    guess, x = normal(3, 2, 2), normal(3, 2, 2, seed=1)
    chosen = torch.tensor([True, False, True])
    one = diffusion_loss(guess, x, torch.tensor([0.5, 9.0, 0.5]), chosen)
    assert_close(one, 8 * (guess - x)[chosen].square().mean())
    assert diffusion_loss(guess, x, torch.ones(3), torch.zeros(3, dtype=torch.bool)) == 0


def test_coupling_is_what_brute_force_finds_and_does_not_see_scale_or_order():
    x, z = normal(6, 3), normal(6, 3, seed=1)
    order = couple(x, z)
    cost = lambda p: float((x[torch.as_tensor(tuple(p))] - z).square().sum())
    best = min(itertools.permutations(range(6)), key=cost)
    assert tuple(order.tolist()) == best and cost(order) <= cost(range(6))
    assert torch.equal(couple(x, 80 * z), order)
    mixed = torch.randperm(6, generator=rng())
    assert torch.equal(x[mixed][couple(x[mixed], z)], x[order])
    assert torch.equal(x[mixed][couple(x[mixed], x)], x)
    with pytest.raises(BadInput, match="finite"):
        couple(x * math.nan, z)
    for other in (z[:5], z[:, :2], torch.cat([z, z])):
        with pytest.raises(BadInput, match="a noise of its shape"):
            couple(x, other)
    assert couple(x[:1], z[:1]).tolist() == [0]


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_the_assignment_in_numpy_is_scipys(n):
    pytest.importorskip("scipy")
    cost = np.random.default_rng(n).normal(size=(n, n))
    assert (shortest_paths(cost) == assigned(cost)).all()
    for tied in (cost.round(), np.repeat(cost[:1], n, 0), 0 * cost):
        found = shortest_paths(tied)
        assert sorted(found) == list(range(n))
        assert_close(tied[range(n), found].sum(), tied[range(n), assigned(tied)].sum())


def test_consistency_sampling_of_the_true_consistency_function_keeps_a_gaussian():
    """For data N(0, s^2) the flow is x -> x s / sqrt(s^2 + t^2), up to t_min."""
    s, process = 0.5, GaussianProcess(Karras())
    sigma = lambda t: process.alpha_sigma(t)[1]
    low = float(sigma(0.0))

    class Exact:
        prediction = "x0"

        def __init__(self):
            self.process, self.times = process, []

        def __call__(self, z, t, cond=None):
            self.times.append(float(t))
            return z * math.sqrt(s**2 + low**2) / torch.sqrt(s**2 + sigma(t) ** 2)

    z = 80 * normal(20_000, 1)
    for steps, middle in ((1, None), (2, None), (2, 0.375), (3, 0.375)):
        f = Exact()
        x = consistency(f, z, uniform(steps), generator=rng(2), middle=middle)
        assert abs(float(x.std()) / s - 1) < 0.02
        begins = [1.0, *([0.375] if steps == 2 and middle else [1 - i / steps for i in range(1, steps)])]
        assert f.times == pytest.approx(begins)
    with pytest.raises(BadInput, match="generator"):
        consistency(Exact(), z, uniform(2))
    with pytest.raises(BadInput, match="middle"):
        consistency(Exact(), z, uniform(2), generator=rng(), middle=1.5)


def recipe(**changes) -> SLCT:
    return SLCT(**{**SLCT.EXAMPLE, **changes})


def training(n: int = 12, classes: tuple[str, ...] = (), **changes) -> SLCTTraining:
    """On random latents; the model has no autoencoder."""
    method, net = recipe(**changes), stirred(classes=len(classes), dropout=changes.get("dropout", 0.0))
    model = ImageModel(net.train(), method.process(), "x0", (2, 4, 4), classes, method.sampling())
    labels = torch.arange(n) % len(classes) if classes else None
    return SLCTTraining(method, model, 0.5 * normal(n, 2, 4, 4).float(), labels)


def test_all_switches_off_it_is_ict():
    off = SLCT.presets["ict"]
    t = training(**off)
    batch = t.batch(0, rng(), 6)
    assert torch.equal(batch["noise"], training(coupling="transport").batch(0, rng(), 6)["noise"])
    loss, told = t.loss(batch, rng(1))
    n = t.slct.levels(0)
    levels = noise_levels(n)
    j = draw_indices(index_law(levels), torch.rand(6, generator=rng(1)))
    high, low = (levels[k].float().view(-1, 1, 1, 1) for k in (j, j + 1))
    f = lambda sigma: t.model.network(batch["x"] + sigma * batch["noise"], -2 * sigma.flatten().log(), None)
    c = 0.00054 * math.sqrt(32)
    m = (f(high) - f(low)).square().flatten(1).mean(1)
    assert_close(loss, (((m + c**2).sqrt() - c) / (high - low).flatten()).mean(), rtol=1e-4, atol=1e-6)
    assert "diffusion" not in told


def test_the_target_has_no_gradient_and_the_same_dropout():
    t = training(dropout=0.5, diffusion_weight=0.0, first_levels=300, last_levels=300)
    batch = t.batch(0, rng(), 6)
    _, told = t.loss(batch, rng(1))
    # With masks of their own the two passes would differ by as much as the predictions themselves.
    assert told["difference"] < 0.05
    state = torch.get_rng_state()
    loss, _ = t.loss(batch, rng(1))
    assert torch.equal(torch.get_rng_state(), state)
    loss.backward()
    assert all(p.grad is not None for p in t.model.network.parameters())


def test_labels_travel_with_their_latents():
    t = training(classes=("a", "b", "c"), label_dropout=0.0)
    batch = t.batch(0, rng(), 8)
    where = [int((t.latents == x).flatten(1).all(1).nonzero()) for x in batch["x"]]
    assert batch["labels"].tolist() == [w % 3 for w in where]
    apart = replace(t.slct, coupling="none")
    other = SLCTTraining(apart, t.model, t.latents, t.labels).batch(0, rng(), 8)
    product = lambda b: float((b["x"] * b["noise"]).sum())
    assert product(batch) > product(other)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slct") / "run"
    recipe(classes=False, updates=1, grid_every=0).run(folder, progress=False)
    return folder


def test_a_model_of_latents_knows_its_autoencoder_and_scale(run):
    model = load(run, "cpu")
    assert isinstance(model, LatentModel) and model.size == 16 and model.latent_shape() == (8, 2, 2)
    pictures = 0.5 * normal(2, 3, 16, 16).float()
    z = model.encode_image(pictures)
    original = open_autoencoder("sketch")
    raw = original.encode(pictures).latent_dist.mean
    std, mean = (torch.tensor(model.vae.config[k]).view(1, -1, 1, 1) for k in ("latents_std", "latents_mean"))
    assert_close(z, 0.5 * (raw - mean) / std, rtol=1e-4, atol=1e-4)
    assert_close(model.decode_latents(z), original.decode(raw).sample, rtol=1e-4, atol=1e-4)
    assert_close(model.copy().draw(None, [1]), model.draw(None, [1]))
    one, two = model.draw(None, [1], sampling_steps=1), model.draw(None, [1], sampling_steps=2)
    assert one.shape == (1, 3, 16, 16) and not torch.equal(one, two)
    assert open_autoencoder(str(run)).config.latents_std == model.vae.config.latents_std


def test_data_that_changed_since_are_refused(tmp_path):
    """As many as before under the settings' own names, but other rows."""
    for i in range(3):
        Image.new("RGB", (16, 16), (80 * i, 10, 10)).save(tmp_path / f"{i}.png")
    made = recipe(data=str(tmp_path), classes=False, updates=1, grid_every=0)
    made.run(tmp_path / "run", progress=False)
    shutil.rmtree(tmp_path / "run" / "model")
    (tmp_path / "2.png").rename(tmp_path / "02.png")
    with pytest.raises(BadInput, match="training holds a run with rows='3 with SHA-256"):
        made.run(tmp_path / "run", progress=False)


def test_standardised_latents():
    vae, z = open_autoencoder("sketch"), 3 * normal(20, 8, 2, 2).float() + 1
    scaled = standardised(vae, z)
    assert_close(scaled.std((0, 2, 3)), torch.full((8,), 0.5), rtol=1e-4, atol=1e-5)
    assert_close(Codec(vae).unscale(scaled), z, rtol=1e-4, atol=1e-4)


def test_tails_of_known_numbers():
    x = normal(100_000)
    told = tails(x)
    assert abs(told.kurtosis) < 0.06 and abs(told.outside - 0.00698) < 1e-3 and told.far < 5e-5
    assert tails(torch.cat([x, torch.tensor([30.0]).double()])).most == 30
    box = tails(torch.arange(5))
    assert (box.low, box.median, box.high, box.inner, box.outer) == (1, 2, 3, (-2, 6), (-5, 9))


def test_differences_of_the_ideal_denoiser():
    data = normal(6, 2, 3)
    ideal = MixtureDenoiser(GaussianProcess(Karras()), GaussianMixture.isotropic(data, 1e-9), "x0")
    z, sigma = normal(4, 2, 3, seed=1), torch.full((4,), 0.7).double()
    expected = ideal(z, float(Karras().time(-2 * sigma[0].log())))
    assert_close(posterior_mean(z, sigma, data), expected, rtol=1e-5, atol=1e-6)
    linear = lambda z, sigma: z * sigma.view(-1, 1, 1)
    high, low = torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0])
    x, noise = data[:2], normal(2, 2, 3, seed=2)
    by = lambda t: t.view(-1, 1, 1)
    expected = by(high - low) * x + by(high**2 - low**2) * noise
    assert_close(temporal_differences(linear, x, noise, high, low), expected)


def test_the_command_measures_latents(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sfumato.commands.latents.draw", lambda *args: False)
    asked = ["latents", "--n", "4", "--levels", "5", "--size", "16"]
    assert main([*asked, "--out", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "latents.json").read_text())
    assert len(record["temporal_differences"]) == 4 and record["shape"] == [8, 2, 2]
    assert main([*asked, "--model", str(run), "--out", str(tmp_path / "model")]) == 0
    said = capsys.readouterr().out
    assert "channel 7" in said and "matplotlib is not installed" in said
    assert main([*asked, "--model", "sketch", "--out", str(tmp_path / "not")]) == 2


@pytest.mark.slow  # matplotlib takes longer to start than all else here
def test_the_command_draws(tmp_path):
    pytest.importorskip("matplotlib")
    x, grid = normal(20, 2, 2, 2), noise_levels(4)
    assert draw(tmp_path / "latents.png", x, grid, [tails(normal(9, seed=i)) for i in range(3)])
    assert (tmp_path / "latents.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"first_levels": 20, "last_levels": 10}, "first_levels"),
        ({"middle": 0.0}, "middle"),
        ({"t_min": 90.0}, "sigma_min"),
        ({"t_min": 1e-5}, "t_min"),
        ({"blocks": (1,)}, "levels have"),
        ({"loss_kind": "lpips"}, "loss_kind"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, match):
    with pytest.raises(BadInput, match=match):
        recipe(**change)


def test_what_has_no_autoencoder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(BadInput, match="AutoencoderKL"):
        open_autoencoder(str(tmp_path))
    with pytest.raises(BadInput, match="multiple of"):
        recipe(size=12).run(tmp_path / "run", progress=False)
