"""Grad-SAM: importance against brute Jacobians and differences, masks, and what is kept of the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sfumato.edit import GradSAM
from sfumato.edit.base import Given, through_autoencoder
from sfumato.edit.grad_sam import (
    attention_importance,
    blurred,
    by_attention,
    by_column,
    by_element,
    by_scaling,
    dilated,
    kept,
    laid_out,
    rectified,
    sites_of,
    subject_mask,
)  # fmt: skip
from sfumato.edit.parts.importance import boxed
from sfumato.errors import BadInput


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def toy():
    """Attention of two heads over four keys, and a curved map of what it reads to 2 x 2 x 2 elements."""
    w = randn(2, 4, 4).softmax(-1)
    value, mix = randn(2, 4, 3, seed=1), randn(24, 8, seed=2)
    f = lambda added: ((w + added) @ value).flatten().tanh().matmul(mix).view(2, 2, 2)
    where = torch.zeros(4, 4, dtype=torch.bool)
    where[1:, 1:3] = True
    jacobian = torch.autograd.functional.jacobian(f, torch.zeros_like(w)).flatten(0, 2)
    return f, w, where, jacobian


@pytest.mark.parametrize("rectifier", ["abs", "relu"])
def test_elements_and_scaling_are_the_brute_jacobians(toy, rectifier):
    f, w, where, jacobian = toy
    due = (rectified(jacobian, rectifier) * w * where).sum((1, 2, 3)).view(2, 2, 2)
    for chunk in (1, 3, 99):
        torch.testing.assert_close(by_element(f, w, where, rectifier, chunk), due, rtol=0, atol=1e-12)
    whole = rectified((jacobian * w * where).sum((1, 2, 3)), rectifier).view(2, 2, 2)
    torch.testing.assert_close(by_scaling(f, w, where, rectifier), whole, rtol=0, atol=1e-12)
    h = 1e-5
    slope = (f(h * w * where) - f(-h * w * where)) / (2 * h)
    torch.testing.assert_close(by_scaling(f, w, where, rectifier), rectified(slope, rectifier), rtol=0, atol=1e-6)


@pytest.mark.parametrize("squares", [False, True])
def test_columns_are_differences_of_entries(toy, squares):
    f, w, where, _ = toy
    y = lambda added: float(f(added).square().sum() / 2 if squares else f(added).sum())
    made, due, h = by_column(f, w, where, squares=squares), torch.zeros(4, dtype=torch.float64), 1e-5
    for head in range(2):
        for q, k in where.nonzero().tolist():
            step = torch.zeros_like(w)
            step[head, q, k] = h
            due[q] += w[head, q, k] * abs(y(step) - y(-step)) / (2 * h) / 2
    torch.testing.assert_close(made, due, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(by_attention(w, where), (w * where).sum(2).mean(0))


def test_a_value_of_zero_has_no_importance_and_tokens_may_be_exchanged():
    w, value, mix = randn(2, 4, 4).softmax(-1), randn(2, 4, 3, seed=1), randn(24, 8, seed=2)
    value[:, 2] = 0
    read = lambda w, value: lambda added: ((w + added) @ value).flatten().tanh().matmul(mix).view(2, 2, 2)
    only = lambda k: torch.arange(4).eq(k).expand(4, 4)
    assert by_element(read(w, value), w, only(2)).abs().max() == 0
    assert by_scaling(read(w, value), w, only(2)).abs().max() == 0
    order = [3, 0, 2, 1]
    turned = by_element(read(w[..., order], value[:, order]), w[..., order], only(1))
    torch.testing.assert_close(turned, by_element(read(w, value), w, only(0)))


def test_blur_keeps_what_is_level_and_dilation_only_adds():
    level = torch.full((2, 5, 5), 3.0, dtype=torch.float64)
    torch.testing.assert_close(blurred(level), level)
    x = randn(2, 9, 9)
    assert (dilated(x) >= x).all() and torch.equal(dilated(-torch.ones(1, 4, 4)), -torch.ones(1, 4, 4))
    dot = torch.zeros(1, 9, 9)
    dot[0, 4, 4] = 1
    assert dilated(dot, 3).sum() == 49 and boxed(dot).sum() == 9
    kernel = blurred(dot.double())[0, 3:6, 3:6]
    assert kernel.max() / kernel.min() < 1.03, "nearly a box"
    torch.testing.assert_close(kernel.sum(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("smooth", ["card", "official"])
def test_masks_follow_what_they_show_and_cut_strictly(smooth):
    x = torch.zeros(2, 16, 16, dtype=torch.float64)
    x[0, 5:7, 6:9], x[1, 9, 9] = 1.0, 2.0
    mask = subject_mask(x, smooth)
    moved = subject_mask(x.roll((2, 1), (1, 2)), smooth)
    assert torch.equal(mask.roll((2, 1), (1, 2)), moved)
    assert mask[0, 5:7, 6:9].all() and mask[1, 9, 9] and not mask[0, 13, 1]
    one = subject_mask(x, smooth, per_channel=False)
    assert torch.equal(one[0], one[1])
    assert not subject_mask(torch.ones(1, 6, 6), "card").any(), "nothing is above its own mean"


def test_the_official_mask_is_one_box_of_sums():
    x = randn(3, 8, 8).abs()
    box = F.conv2d(x[None], torch.ones(3, 1, 3, 3, dtype=torch.float64), padding=1, groups=3)[0]
    for i in range(3):
        assert torch.equal(subject_mask(x, "official")[i], box[i] > box[i].mean() + 0.5 * box[i].std())


def test_scores_of_queries_become_those_of_a_latent():
    made = laid_out(torch.tensor([[0.0, 1], [2, 4]]), (3, 4, 4))
    assert made.shape == (3, 4, 4) and float(made.max()) == 1 and torch.equal(made[0], made[2])
    assert laid_out(torch.zeros(2, 2), (1, 4, 4)).abs().max() == 0
    a, b = randn(2, 3), randn(2, 3, seed=1)
    assert torch.equal(kept(a, b, torch.ones(2, 3, dtype=torch.bool)), a)


@pytest.fixture(scope="module")
def double(tiny_sd):
    pipe = tiny_sd.copy("all")
    for part in pipe.parts().values():
        part.double()
    return pipe


def test_a_pipelines_importance_is_its_slope_and_modes_agree_on_what_they_see(double):
    z, cond = randn(1, *double.latent_shape()), double.encode("a red star")
    (site,) = sites_of(double)
    columns = double.find(cond, "star")[0]
    assert site.name.startswith("up_blocks") and columns.sum() == 1
    ask = lambda mode: attention_importance(double, z, 0.6, cond, columns, site, mode, chunk=64)

    def scaled(s: float) -> torch.Tensor:
        grow = lambda at, probs: probs * (1 + s * columns.to(probs))
        with double.edit_attention(grow, where=lambda at: at.name == site.name):
            return double.denoiser.predict(z, 0.6, cond, "eps")[0]

    h = 1e-4
    torch.testing.assert_close(ask("scaling"), ((scaled(h) - scaled(-h)) / (2 * h)).abs(), rtol=1e-5, atol=1e-8)
    element = ask("element")
    assert (element >= ask("scaling") - 1e-9).all(), "by the triangle's inequality"
    for mode in ("column", "attention"):
        assert ask(mode).shape == z.shape[1:] and float(ask(mode).max()) == pytest.approx(1)
    nothing = attention_importance(double, z, 0.6, cond, torch.zeros_like(columns), site)
    assert nothing.abs().max() == 0


@pytest.mark.parametrize("sides", [(9, 9), (9, 13)])
def test_no_query_is_left_out_at_sides_that_do_not_halve(tiny_sdxl, sides):
    """A U-Net makes 5 of 9 and 7 of 13, more than half."""
    pipe, z = tiny_sdxl, torch.randn(1, 4, *sides, generator=rng())
    cond = pipe.encode("a red star")
    (site,), columns = sites_of(pipe), pipe.find(cond, "star")[0]
    here, seen = lambda other: other.name == site.name, []
    with torch.no_grad(), pipe.edit_attention(lambda _, probs: seen.append(probs[0]) or probs, None, here):
        pipe.denoiser(z, 0.5, cond)
    w, rows = seen[0], tuple((x + 1) // 2 for x in sides)
    assert w.shape[1] == rows[0] * rows[1]
    where = columns.expand(w.shape[1:])

    def respond(added: torch.Tensor) -> torch.Tensor:
        with pipe.edit_attention(lambda _, probs: probs + added[None], None, here):
            return pipe.denoiser.predict(z, 0.5, cond, "eps")[0]

    made = attention_importance(pipe, z, 0.5, cond, columns, site)
    torch.testing.assert_close(made, by_scaling(respond, w, where), rtol=1e-4, atol=1e-6)
    due = F.interpolate(by_attention(w, where).view(1, 1, *rows), sides, mode="bilinear", align_corners=False)[0]
    made = attention_importance(pipe, z, 0.5, cond, columns, site, "attention")
    torch.testing.assert_close(made, (due / due.max()).expand_as(z[0]))


def test_an_adapter_whose_gate_is_shut_takes_no_part(tiny_sd):
    pipe = tiny_sd.copy()
    z, cond, edit = torch.randn(1, *pipe.latent_shape(), generator=rng()), pipe.encode("a red star"), GradSAM(**SMALL)
    (site,), columns = sites_of(pipe), pipe.find(cond, "star")[0]
    ask = lambda mode: attention_importance(pipe, z, 0.5, cond, columns, site, mode)
    bare, plain = {mode: ask(mode) for mode in ("scaling", "column", "attention")}, edit.edit(pipe, given()).strips
    adapter = pipe.add_adapter("other", rank=2, alpha=20.0, generator=rng())
    for up in adapter.up.values():
        torch.nn.init.normal_(up, std=0.3, generator=rng(1))
    assert not torch.allclose(ask("scaling"), bare["scaling"], rtol=0.1)
    adapter.gate = lambda cond: torch.zeros(len(cond))
    for mode, due in bare.items():
        torch.testing.assert_close(ask(mode), due, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(edit.edit(pipe, given()).strips, plain, rtol=0, atol=1e-6)


SMALL = {"sampling_steps": 4, "subjects": ("star",), "strength": 1.0}


def given(n: int = 1) -> Given:
    return Given(("a red star",), (3,), torch.rand(n, 3, 16, 16, generator=rng()))


def test_where_all_is_kept_it_is_the_plain_draw_and_at_the_end_the_reference(tiny_sd, monkeypatch):
    module = "sfumato.edit.grad_sam.subject_mask"
    monkeypatch.setattr(module, lambda score, *_: torch.ones_like(score, dtype=torch.bool))
    strips = GradSAM(**SMALL, mask_steps=(1, 3)).edit(tiny_sd, given()).strips[:, 0]
    assert torch.equal(strips[:, 0], strips[:, 1])
    monkeypatch.setattr(module, lambda score, *_: torch.zeros_like(score, dtype=torch.bool))
    with pytest.warns(UserWarning, match="look at the masks"):
        end = GradSAM(**SMALL, mask_steps=(4,)).edit(tiny_sd, given())
    z, _ = through_autoencoder(tiny_sd, given().pictures)
    back = ((tiny_sd.decode_latents(z) + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(end.strips[:, 0, 1], back, rtol=0, atol=1e-6)
    assert not torch.equal(end.strips[:, 0, 0], end.strips[:, 0, 1])


def test_what_is_outside_the_mask_is_the_reference_at_the_samplers_level(tiny_sd, monkeypatch):
    half = torch.zeros(4, 8, 8, dtype=torch.bool)
    half[:, :, 4:] = True
    monkeypatch.setattr("sfumato.edit.grad_sam.subject_mask", lambda score, *_: half)
    seen, original = [], kept

    def note(z, reference, mask):
        seen.append((z, reference, original(z, reference, mask)))
        return seen[-1][2]

    monkeypatch.setattr("sfumato.edit.grad_sam.kept", note)
    edited = GradSAM(**SMALL, mask_steps=(2,), eta=0.0).edit(tiny_sd, given())
    z, reference, made = seen[0]
    assert torch.equal(made[..., 4:], z[..., 4:]) and torch.equal(made[..., :4], reference[..., :4])
    assert all(torch.equal(other[1], reference) for other in seen), "one noise throughout"
    (time,) = (float(t) for t in edited.told["mask_share"])
    alpha, sigma = (float(x) for x in tiny_sd.process.alpha_sigma(time))
    eps = (reference - alpha * through_autoencoder(tiny_sd, given().pictures)[0]) / sigma
    assert abs(float(eps.mean())) < 0.25 and abs(float(eps.std()) - 1) < 0.15
    assert edited.told["mask_share"][f"{time:.3f}"] == [0.5]


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "column", "warmup": True, "start": "reference"},
        {"mode": "attention", "smooth": "official", "per_channel": False, "subjects": ()},
        {"resolutions": (8,), "subjects": ("star", "red"), "eta": 0.0},
    ],
)
def test_every_choice_makes_pictures_and_maps(tiny_sd, settings):
    edited = GradSAM(**{**SMALL, "mask_steps": (2,), **settings}).edit(tiny_sd, given(2))
    words = settings.get("subjects", ("star",)) or ("all words",)
    assert len(edited.maps) == 1 + len(words) and all(x.shape == (2, 8, 8) for x in edited.maps.values())
    assert edited.strips.shape == (2, 1, 2, 3, 16, 16) and edited.strips.isfinite().all()


def test_the_papers_steps_in_proportion():
    assert GradSAM(sampling_steps=50).masked == (5, 18, 28) and GradSAM(sampling_steps=50).taken == 45
    assert GradSAM(sampling_steps=25).masked == (2, 9, 14)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"subjects": ("fish",)}, "has no 'fish'"),
        ({"mask_steps": (9,)}, "beyond the 4 steps"),
        ({"mask_steps": (0, 1)}, "count from 1"),
        ({"strength": 1.5}, "strength must lie"),
        ({"resolutions": (3,)}, "no layer reads the text at 3 x 3"),
    ],
)
def test_bad_input(tiny_sd, settings, told):
    with pytest.raises(BadInput, match=told):
        GradSAM(**{**SMALL, **settings}).edit(tiny_sd, given())


def test_it_needs_a_picture_and_a_prompt(tiny_sd):
    with pytest.raises(BadInput, match="give one"):
        GradSAM(**SMALL).edit(tiny_sd, Given(("a red star",)))
    with pytest.raises(BadInput, match="say what is to come"):
        GradSAM(sampling_steps=4).edit(tiny_sd, Given(("",), (0,), given().pictures))
