"""SFD: its losses in float64 by the card's identities; what is asked for; one-step models of pixels and of text."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.audit.drawing import draw as audited
from sfumato.cli import main
from sfumato.erase import ESDx
from sfumato.erase.parts.forgetting import Forgetting
from sfumato.erase.parts.score_identity import (
    fake_score_loss,
    generated,
    identity_loss,
    pseudo_labels,
    score_identity_loss,
    sound,
    time_of,
    times_between,
)
from sfumato.erase.sfd import SFD, overridden
from sfumato.errors import BadInput
from sfumato.metrics.resize import to_bytes
from sfumato.nets import UNet
from sfumato.noise import Cosine, GaussianProcess
from sfumato.noise.schedule import LinearBeta, ScaledLinearBeta
from sfumato.pipeline import ImageModel, as_flow, load
from sfumato.sample import Guided

SHORT = {"updates": 2, "batch": 2, "lr": 1e-3, "fake_lr": 1e-3}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@dataclass
class Toy:
    """A denoiser that is a curved function of what it sees and is told."""

    seed: int
    prediction: str = "eps"
    process = GaussianProcess(Cosine())

    def __call__(self, z: Tensor, t: Any, cond: Any = None) -> Tensor:
        w = normal(z[0].numel(), z[0].numel(), seed=self.seed) / 4
        return torch.tanh(z.flatten(1) @ w + (0.0 if cond is None else cond)).view_as(z)


X, EPS, T = normal(3, 2, 2, 2), normal(3, 2, 2, 2, seed=1), torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64)


# The losses


def test_two_equal_scores_that_are_told_the_same_pull_at_nothing():
    """Check (i)."""
    x = X.clone().requires_grad_()
    loss = score_identity_loss(Toy(1), Toy(1), x, T, EPS, 0.3, 0.3, alpha=1.2)
    assert not loss.any()
    loss.sum().backward()
    assert x.grad.abs().max() < 1e-15
    assert score_identity_loss(Toy(1), Toy(1), X, T, EPS, 0.3, -0.3, alpha=1.2).abs().min() > 1e-3


@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_the_generators_loss_and_gradient_are_the_formulas(alpha):
    """Checks (ii) and (iii): element by element, with the weight detached and both scores differentiated through."""
    teacher, fake = Toy(1), Toy(2)
    x, mine = X.clone().requires_grad_(), X.clone().requires_grad_()
    found = score_identity_loss(teacher, fake, x, T, EPS, 0.3, -0.2, alpha)
    alpha_t, sigma_t = teacher.process.alpha_sigma(T, X)
    z = alpha_t * mine + sigma_t * EPS
    f_phi, f_psi = ((z - sigma_t * net(z, T, c)) / alpha_t for net, c in ((teacher, 0.3), (fake, -0.2)))
    weight = 1 / (f_phi - mine).abs().mean(dim=(1, 2, 3)).detach()
    bracket = f_psi - mine if alpha == 1 else (f_phi - mine) - alpha * (f_phi - f_psi)
    expected = weight * ((f_phi - f_psi) * bracket).sum(dim=(1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    found.mean().backward()
    expected.mean().backward()
    torch.testing.assert_close(x.grad, mine.grad, rtol=1e-9, atol=1e-12)

    blind = X.clone().requires_grad_()
    instruct = score_identity_loss(teacher, fake, blind, T, EPS, 0.3, -0.2, alpha, through_scores=False)
    instruct.mean().backward()
    assert not torch.allclose(blind.grad, x.grad, rtol=0.1)
    expected = -(weight[:, None, None, None] * (f_phi - f_psi)).detach() / 3
    torch.testing.assert_close(blind.grad, expected, rtol=1e-10, atol=1e-12)


def test_the_weight_has_a_floor_and_rows_go_by_themselves():
    """Check (vii), and a teacher that is right to the last digit."""
    a, b = normal(3, 4, 1, 1, seed=5), normal(3, 4, 1, 1, seed=6)
    rows = identity_loss(a, b, X.reshape(3, 8, 1, 1)[:, :4], 1.2)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(identity_loss(a[order], b[order], X.reshape(3, 8, 1, 1)[order, :4], 1.2), rows[order])
    torch.testing.assert_close(identity_loss(a, b, a, 1.0), -1e5 * (a - b).square().sum(dim=(1, 2, 3)))


def test_the_fake_scores_loss_is_the_sum_over_pixels_in_either_kind():
    """For v the published weight SNR / (SNR + 1) makes the error of v that of eps."""
    found = fake_score_loss(Toy(1), X, T, EPS, 0.1)
    z = Toy.process.diffuse(X, T, EPS)
    torch.testing.assert_close(found, (Toy(1)(z, T, 0.1) - EPS).square().sum(dim=(1, 2, 3)))
    alpha, sigma = Toy.process.alpha_sigma(T, X)
    snr = (alpha / sigma).square().flatten()
    error = (Toy(1)(z, T, 0.1) - (alpha * EPS - sigma * X)).square().sum(dim=(1, 2, 3))
    torch.testing.assert_close(fake_score_loss(Toy(1, "v"), X, T, EPS, 0.1), error * snr / (snr + 1))


def test_a_generator_that_sees_no_noise_draws_sigma_z():
    """Check (vi)."""
    blind = Toy(1)
    blind.__class__ = type("Blind", (Toy,), {"__call__": lambda self, z, t, cond=None: torch.zeros_like(z)})
    t = time_of(blind.process, 2.5)
    torch.testing.assert_close(generated(blind, EPS, t), 2.5 * EPS)


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [(ScaledLinearBeta().discrete(), (625, 20, 979)), (LinearBeta().discrete(), (440, 38, 711))],
)
def test_noise_levels_are_the_published_timesteps(schedule, steps):
    method, process = SFD(concepts="star"), GaussianProcess(schedule)
    found = [time_of(process, s) for s in (method.sigma_init, method.sigma_min, method.sigma_max)]
    assert [round(t * 1000) - 1 for t in found] == list(steps)
    drawn = times_between(process, found[1], found[2], torch.tensor([0.0, 0.999999, 0.5])) * 1000 - 1
    assert drawn[:2].tolist() == pytest.approx([steps[1], steps[2]])
    assert float(drawn[2]) == pytest.approx(round(float(drawn[2])), abs=1e-9)
    smooth = GaussianProcess(Cosine())
    t = time_of(smooth, 2.5)
    alpha, sigma = smooth.alpha_sigma(t)
    assert float(sigma / alpha) == pytest.approx(2.5)
    assert times_between(smooth, 0.2, 0.6, torch.tensor([0.25])).tolist() == pytest.approx([0.3])


def test_pseudo_labels_are_never_what_is_to_be_forgotten():
    logits = torch.tensor([[5.0, 1.0, 0.0, 2.0], [0.0, 3.0, 1.0, 9.0]])
    assert pseudo_labels(logits, [0, 3]).tolist() == [1, 1]
    n = 4000
    drawn = pseudo_labels(logits[:1].expand(n, -1), [0], torch.rand(n, generator=generator()))
    shares = torch.bincount(drawn, minlength=4) / n
    expected = torch.tensor([0.0, *torch.tensor([1.0, 0.0, 2.0]).softmax(0).tolist()])
    torch.testing.assert_close(shares, expected, atol=0.03, rtol=0)
    assert pseudo_labels(logits, [3], torch.tensor([1.0, 1.0])).max() < 3


def test_pseudo_labels_where_the_detector_gives_no_other_label_a_chance():
    logits = torch.tensor([[0.9, 0.0, 0.0], [0.5, 0.0, 0.3]], dtype=torch.float64).log()
    assert pseudo_labels(logits, [0]).tolist() == [1, 2]
    for u in (0.0, 0.5, 0.999, 1.0):
        first, second = pseudo_labels(logits, [0], torch.full((2,), u)).tolist()
        assert first == (1 if u < 0.5 else 2) and second == 2
    assert pseudo_labels(logits[:, [1, 2, 0]], [2], torch.tensor([1.0, 1.0])).tolist() == [1, 1]


def test_losses_that_are_no_numbers_are_left_out_unless_all_are():
    nan = math.nan
    assert sound(torch.tensor([1.0, nan, 2.0, math.inf])).tolist() == [1, 2]
    assert sound(torch.tensor([nan, nan])).isnan().all()


# What is asked for


def test_the_anchor_takes_the_concepts_place_whole_and_in_any_case():
    assert overridden("A Red star in a STAR, starfish", "star", "dog") == "A Red dog in a dog, starfish"
    assert overridden("a photo of a star", "star", "") == "a photo of a"
    assert overridden("Two stars", "star", "dog") == "Two dogs" and overridden("two Stars", "star", "") == "two"
    assert overridden("c++ (code)", "c++", r"\1") == r"\1 (code)"


def test_captions_are_kept_or_used_to_forget(tiny_sd, tmp_path):
    from PIL import Image

    for name, caption in (("a", "a red star"), ("b", "a blue circle"), ("c", "a starfish"), ("d", "a blue circle"),
                          ("e", "Two stars")):  # fmt: skip
        Image.new("RGB", (16, 16)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(caption)
    sfd = SFD(concepts="star", anchors="square", captions=str(tmp_path), templates=("a photo of {}",))
    assert sfd.remaining(tiny_sd) == ["a blue circle", "a starfish"]
    assert sfd.forgotten(tiny_sd) == [
        ("a photo of star", "a photo of square"), ("a red star", "a red square"), ("Two stars", "Two squares")
    ]  # fmt: skip
    both = SFD(concepts="star", preserve="art", captions=str(tmp_path), override="random")
    assert both.remaining(tiny_sd)[0] == "art" and both.forgotten(tiny_sd)[0] == ("star", None)
    recipe = Forgetting(SFD(concepts="star", preserve="art", keywords=("photo",)), tiny_sd, *[tiny_sd.copy("full")] * 2)
    seen = set(recipe.decorated(["star"] * 20, generator()))
    assert seen == {"photo star", "star, photo"}


# Models of pixels


@pytest.fixture(scope="module")
def pixels() -> ImageModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UNet(8, 3, classes=3, channels=(8, 8), layers=1, attention=(4,))
        torch.nn.init.normal_(network.unet.conv_out.weight, std=0.1)
    labels = ("cat", "dog", "fish")
    return ImageModel(network.eval(), GaussianProcess(Cosine()), "v", (3, 8, 8), labels, {"cfg_scale": 2.0})


def test_classes_are_forgotten_from_an_image_model_which_then_draws_in_one_step(pixels, tmp_path):
    before = pixels.describe()["sha256"]
    erased, log = SFD(concepts="cat", ema=0.5, **SHORT).run(pixels)
    assert pixels.describe()["sha256"] == before != erased.describe()["sha256"]
    assert set(log["losses"]) == {"fake/loss", "generator/loss"} and len(log["losses"]["fake/loss"]) == 2
    drawn = erased.draw(["cat", "dog"], [3, 4])
    noise = torch.stack([torch.randn(3, 8, 8, generator=generator(s)) for s in (3, 4)])
    with torch.no_grad():
        x = generated(erased.denoiser, noise, time_of(pixels.process, 2.5), erased.told(["cat", "dog"]))
    torch.testing.assert_close(drawn, ((x + 1) / 2).clamp(0, 1), atol=2e-3, rtol=0)
    with pytest.raises(BadInput, match="distilled for 1 steps"):
        erased.draw("dog", 1, sampling_steps=2)
    erased.save(tmp_path / "erased")
    assert torch.equal(load(tmp_path / "erased", "cpu").draw(["cat", "dog"], [3, 4]), drawn)
    z = erased.invert(erased.encode_image(normal(1, 3, 8, 8).float()), erased.told("dog"), 1)
    assert z.isfinite().all()


def test_without_a_weight_for_concepts_it_is_plain_distillation_to_the_bit(pixels):
    """Check (iv): the first stage asks for all classes, and so does a run without weights for what is forgotten."""
    kinds = {"alpha": 1.2, "dropout": 0.0, **SHORT}
    fake, recipes = pixels.copy("full"), []
    with torch.no_grad():
        for w in fake.network.parameters():
            w.add_(0.05 * torch.randn(w.shape, generator=generator(1)))
    for changes in ({"distill_updates": 1}, {"forget_weight": 0.0, "fake_forget_weight": 0.0}):
        recipes.append(Forgetting(SFD(concepts="cat", **kinds, **changes), pixels, fake, pixels.copy("full")))
    first = recipes[0]
    assert first.every == ["dog", "fish", "cat"] and first.keep == ["dog", "fish"]
    batch = {"step": 0, "remain": torch.tensor([0, 1, 1])}
    for loss in ("fake_loss", "generator_loss"):
        values = [getattr(r, loss)(batch, generator(7))[0] for r in recipes]
        assert torch.equal(*values)
    rng, cond, process = generator(7), pixels.told(["dog", "fish", "fish"]), pixels.process
    torch.rand(3, generator=rng)  # who goes without a class
    x = generated(pixels.denoiser, torch.randn(3, 3, 8, 8, generator=rng), first.start, cond)
    t = times_between(process, first.low, first.high, torch.rand(3, generator=rng))
    eps = torch.randn(3, 3, 8, 8, generator=rng)
    rows = score_identity_loss(pixels.denoiser, fake.denoiser, x, t, eps, cond, cond, 1.2)
    torch.testing.assert_close(rows.sum() / 3, values[0])
    assert float(values[0].detach().abs()) > 1e-2
    assert set(first.batch(0, generator(), 50)["remain"].tolist()) == {0, 1, 2}
    assert set(first.batch(1, generator(), 50)["remain"].tolist()) == {0, 1}


def test_only_the_network_whose_turn_it_is_drops_out(pixels):
    """Check (i) under dropout: a fake score that is the teacher pulls at nothing, as in the paper's code."""
    method = SFD(concepts="cat", dropout=0.5, alpha=1.2, forget_weight=0.0, fake_forget_weight=0.0, **SHORT)
    fake, made = pixels.copy("full"), pixels.copy("full")
    recipe, batch = Forgetting(method, pixels, fake, made), {"step": 0, "remain": torch.tensor([0, 1])}
    networks = [model.network for model in (fake, made, pixels)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        losses = [float(recipe.fake_loss(batch, generator(7))[0].detach()) for _ in range(2)]
        assert losses[0] != losses[1] and [n.training for n in networks] == [True, False, False]
        assert not recipe.generator_loss(batch, generator(7))[0].any()
    assert [n.training for n in networks] == [False, True, False]


class Told:
    """A detector of classes by how bright a picture is."""

    def __call__(self, pictures, label):
        share = {"cat": 0.9, "dog": 0.02, "fish": 0.08}[label]
        return type("Found", (), {"score": torch.full((len(pictures),), share)})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, {1, 2}), ({"anchors": "dog"}, {1}), ({"override": "random"}, {1, 2}),
     ({"override": "likeliest", "detector": "oracle"}, {2})],
)  # fmt: skip
def test_what_overrides_a_class(pixels, changes, expected, monkeypatch):
    monkeypatch.setattr(SFD, "judge", lambda self, labels: Told() if self.detector else None)
    recipe = Forgetting(SFD(concepts="cat", **changes), pixels, pixels, pixels)
    recipe.lost = [recipe.forget[0]] * 30
    chosen = recipe.override(["cat"] * 30, torch.zeros(30, dtype=torch.bool), generator())
    chosen = chosen(torch.zeros(30, 3, 8, 8)) if callable(chosen) else chosen
    assert set(chosen.numbers.tolist()) == expected


def test_at_the_prompt_an_image_model_is_erased_from_too(pixels, tmp_path, capsys):
    pixels.save(tmp_path / "model")
    args = [f"--{name.replace('_', '-')}={value}" for name, value in SHORT.items()]
    done = main(["erase", "sfd", "--model", str(tmp_path / "model"), "--concepts", "cat", *args, "--out",
                 str(tmp_path / "erased"), "--device", "cpu"])  # fmt: skip
    assert done == 0 and "erased cat" in capsys.readouterr().out
    assert load(tmp_path / "erased", "cpu").draw("dog", 0).shape == (1, 3, 8, 8)


def test_erasers_of_pipelines_refuse_an_image_model_and_name_one_that_does_not(pixels):
    with pytest.raises(BadInput, match=r"ESDx does not fit this ImageModel.* that fit it are .*sfd"):
        ESDx(concepts="cat").apply(pixels)
    with pytest.raises(BadInput, match="cow"):
        SFD(concepts="cow").apply(pixels)
    with pytest.raises(BadInput, match="nothing remains"):
        SFD(concepts=("cat", "dog", "fish")).apply(pixels)
    with pytest.raises(BadInput, match="models that take text"):
        SFD(concepts="cat", captions="sketch").apply(pixels)


# Pipelines


def test_a_pipeline_draws_in_one_call_of_its_network_in_diffusers_too(tiny_sd_eps, tmp_path):
    erased = SFD(concepts="star", preserve=("circle", "art"), **SHORT).apply(tiny_sd_eps)
    calls = []
    handle = erased.network.register_forward_hook(lambda *_: calls.append(1))
    drawn = erased.draw("a red star", 5)
    handle.remove()
    assert len(calls) == 1
    noise = torch.randn(4, 8, 8, generator=generator(5))[None]
    with torch.no_grad():
        x = generated(erased.denoiser, noise, 626 / 1000, erased.encode("a red star"))
        expected = ((erased.decode_latents(x) + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=0)
    erased.save(tmp_path / "erased")
    again = load(tmp_path / "erased", "cpu")
    again.pipe.set_progress_bar_config(disable=True)
    torch.testing.assert_close(again.draw("a red star", 5), drawn, atol=1e-6, rtol=0)
    theirs = again("a red star", generator=generator(5), output_type="pt").images
    torch.testing.assert_close(theirs, drawn, atol=1e-5, rtol=0)


def test_a_flow_forgets_in_one_step_from_its_own_noise_level(tiny_sd, tmp_path):
    flow = tiny_sd.copy()
    as_flow(flow)
    erased = SFD(concepts="star", preserve=("art",), **SHORT).apply(flow)
    drawn = erased.draw("a red star", 5)
    erased.save(tmp_path / "erased")
    torch.testing.assert_close(load(tmp_path / "erased", "cpu").draw("a red star", 5), drawn, atol=1e-6, rtol=0)
    assert erased.pipe.scheduler.timesteps.tolist() == pytest.approx([1000 * 2.5 / 3.5], abs=1e-2)


def test_an_audit_draws_it_in_its_own_step(tiny_sd_eps):
    erased = SFD(concepts="star", preserve=("art",), **SHORT).apply(tiny_sd_eps)
    sampling = {"sampling_steps": 3, "cfg_scale": 2.0, "scheduler": "ddim", "batch": 4, "size": None}
    setup: Any = SimpleNamespace(sampling=sampling, progress=False)
    pictures = audited(setup, erased, ["a red star", "art"], [1, 2], "the edited model")
    assert torch.equal(pictures, to_bytes(erased.draw(["a red star", "art"], [1, 2])))
    assert audited(setup, tiny_sd_eps, ["art"], [2], "the original model").shape == (1, 3, 16, 16)


def test_guidance_is_everywhere_and_a_negative_prompt_where_it_was_asked_for(tiny_sd):
    method = SFD(concepts="star", preserve="art", negative="circle", **SHORT)
    assert method.guidance(tiny_sd) == (4.5, 4.5, 4.5)
    recipe, cond = Forgetting(method, tiny_sd, tiny_sd, tiny_sd), tiny_sd.encode(["star", "star"])
    empty, circle = tiny_sd.unconditional(2).tokens, tiny_sd.encode(["circle"] * 2).tokens
    for place, lost, expected in (("teacher", True, circle), ("teacher", False, empty), ("fake", True, empty)):
        guided = recipe.guided(tiny_sd, 4.5, cond, torch.zeros(2, dtype=torch.bool), place, lost, generator())
        assert isinstance(guided, Guided) and torch.equal(guided.uncond.tokens, expected)


def test_what_is_asked_for_nothing_is_guided_away_from_nothing(tiny_sd, monkeypatch):
    """As in the published loop, whose dropout empties both texts of a picture."""
    everywhere = ("fake training", "fake", "teacher")
    settings = {"concepts": "star", "preserve": "art", "negative": "circle", "negative_for": everywhere, **SHORT}
    seen: list[Guided] = []

    def watched(*given):
        seen.append(Guided(*given))
        return seen[-1]

    monkeypatch.setattr("sfumato.erase.parts.forgetting.Guided", watched)
    null = tiny_sd.unconditional(2).tokens
    z = torch.randn(2, *tiny_sd.latent_shape(), generator=generator())
    for share in (1.0, 0.0):
        recipe = Forgetting(SFD(**settings, unconditional=share), tiny_sd, tiny_sd, tiny_sd)
        seen.clear()
        with torch.no_grad():
            for loss in (recipe.fake_loss, recipe.generator_loss):
                loss(recipe.batch(0, generator(), 2), generator())
            assert len(seen) == 6
            for guided in seen:
                if share:
                    assert torch.equal(guided.uncond.tokens, null)
                    bare = tiny_sd.denoiser(z, 0.5, guided.uncond)
                    assert torch.allclose(guided(z, 0.5, guided.cond), bare, atol=1e-5)
            assert sum(not torch.equal(guided.uncond.tokens, null) for guided in seen) == (0 if share else 3)


@pytest.mark.parametrize("wrong", [{"sigma_init": 100.0}, {"sigma_min": 0.001}, {"sigma_max": 1e4}])
def test_noise_levels_beyond_the_table_are_refused_with_its_range(tiny_sd_eps, wrong):
    with pytest.raises(BadInput, match=f"{next(iter(wrong))} must be .* go from ([\\d.]+) to ([\\d.]+), got") as caught:
        SFD(concepts="star", preserve="art", **wrong).check(tiny_sd_eps)
    low, high = map(float, re.findall(r"from ([\d.]+) to ([\d.]+)", str(caught.value))[0])
    alpha, sigma = tiny_sd_eps.process.alpha_sigma(torch.tensor([0.001, 1.0], dtype=torch.float64))
    torch.testing.assert_close(torch.tensor([low, high]).double(), sigma / alpha, rtol=1e-3, atol=0)
    SFD(concepts="star", preserve="art", sigma_min=low, sigma_max=high).check(tiny_sd_eps)


def test_words_to_keep_are_needed_where_the_model_knows_no_world(tiny_sd):
    with pytest.raises(BadInput, match="nothing remains to be kept"):
        SFD(concepts="star").apply(tiny_sd)


def test_without_a_template_nothing_asks_for_the_concept(tiny_sd):
    with pytest.raises(BadInput, match="nothing asks for the concepts"):
        SFD(concepts="star", preserve="art", templates=()).apply(tiny_sd)


@pytest.mark.parametrize(
    "wrong",
    [{"sigma_min": 20.0}, {"distill_updates": 12_500}, {"templates": ("a",)}, {"detector": "oracle"}, {"alpha": -1.0},
     {"override": "likeliest"}, {"cfg_scale": 4.5}],
)  # fmt: skip
def test_bad_settings(wrong):
    said = {"templates": "template", "override": "detector"}
    with pytest.raises(BadInput, match=said.get(next(iter(wrong)), next(iter(wrong)))):
        SFD(concepts="star", **wrong)
