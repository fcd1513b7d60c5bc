"""AttenCraft: masks out of attention, the losses, who is asked for, and what gradients reach."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sfumato.customize import AttenCraft
from sfumato.customize.parts.crafting import Course
from sfumato.customize.parts.learning import Drawn, Given
from sfumato.customize.parts.maps import (
    affinity,
    assigned,
    attention_loss,
    averaged,
    js_divergence,
    masked_loss,
    minmax,
    refined,
    resized,
    sampling_ratios,
    separated,
    start_detached,
    structural_similarity,
)
from sfumato.errors import BadInput
from sfumato.train.words import latents_of

PICTURES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_divergence():
    a, b = 5 * random(3, 8, 8), 5 * random(3, 8, 8, seed=1)
    assert js_divergence(a, a).abs().max() < 1e-12
    torch.testing.assert_close(js_divergence(a, b), js_divergence(b, a))
    far = torch.zeros(2, 8, 8, dtype=torch.float64)
    far[0, 0, 0] = far[1, 1, 1] = 1e3
    torch.testing.assert_close(float(js_divergence(far[0], far[1])), math.log(2))
    p, q = (x.flatten(1).softmax(1) for x in (a, b))
    m = (p + q) / 2
    kl = lambda x: (x * (x / m).log()).sum(1)
    torch.testing.assert_close(js_divergence(a, b), (kl(p) + kl(q)) / 2)
    maps, masks = random(3, 8, 8), (random(3, 8, 8, seed=2) > 0.5).double()
    torch.testing.assert_close(attention_loss(maps, masks), js_divergence(minmax(maps), masks).mean())


def test_labels_partition_cells_and_do_not_know_the_order_of_words():
    maps = minmax(random(3, 8, 8))
    for threshold in (0.0, 0.1):
        masks = separated(maps, threshold)
        assert masks.sum(dim=0).max() == 1 and (threshold or masks.sum() == 64)
        order = [2, 0, 1]
        assert torch.equal(separated(maps[order], threshold), masks[order])
        assert assigned(maps, masks).tolist() == [0, 1, 2]
    second = maps.sort(dim=0).values
    assert torch.equal(separated(maps, 0.1).any(dim=0), second[-1] - second[-2] > 0.1)


def test_maps_spread_along_self_attention():
    maps = random(2, 4, 4)
    torch.testing.assert_close(refined(maps, torch.eye(16, dtype=torch.float64)), minmax(maps.square()))
    blocks = torch.block_diag(random(6, 6) + 0.5, random(10, 10, seed=1) + 0.5)
    closeness = affinity(blocks)
    assert closeness[:6, 6:].abs().max() == 0 and closeness[6:, :6].abs().max() == 0
    inside = torch.zeros(1, 16, dtype=torch.float64)
    inside[0, 2] = 1.0
    spread = refined(inside.view(1, 4, 4), closeness).flatten()
    assert spread[6:].abs().max() == 0 and spread[:6].max() == 1
    s = minmax(blocks)
    torch.testing.assert_close(closeness, minmax(s @ s @ s @ s))
    assert minmax(torch.ones(2, 3, 3)).abs().max() == 0


def test_denoising_inside_a_mask():
    pred, target, ones = random(2, 4, 8, 8), random(2, 4, 8, 8, seed=1), torch.ones(2, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(masked_loss(pred, target, ones, "mean"), F.mse_loss(pred, target))
    torch.testing.assert_close(masked_loss(pred, target, ones), 4 * F.mse_loss(pred, target))
    half = ones.clone()
    half[..., 4:] = 0
    wanted = F.mse_loss(pred[..., :4], target[..., :4]) / 2
    torch.testing.assert_close(masked_loss(pred, target, half, "mean"), wanted)


def test_ratios_of_words_and_of_all_together():
    assert sampling_ratios([0.3, 0.1], estimated=False).tolist() == pytest.approx([1 / 3] * 3)
    assert sampling_ratios([0.3, 0.1], estimated=True).tolist() == pytest.approx([1 / 6, 1 / 2, 1 / 3])
    assert sampling_ratios([0.5], estimated=True).tolist() == [0, 1]
    assert float(sampling_ratios([0.2, 0.1, 0.7], estimated=True).sum()) == pytest.approx(1)


def test_similarity_is_the_field_standard_one():
    a, b = random(32, 32), random(32, 32, seed=1)
    assert float(structural_similarity(a, a)) == pytest.approx(1)
    x, y = a.numpy(), b.numpy()
    windows = lambda z: np.lib.stride_tricks.sliding_window_view(z, (7, 7)).reshape(26, 26, 49)
    wx, wy = windows(x), windows(y)
    ux, uy = wx.mean(-1), wy.mean(-1)
    cov = ((wx - ux[..., None]) * (wy - uy[..., None])).sum(-1) / 48
    top = (2 * ux * uy + 1e-4) * (2 * cov + 9e-4)
    bottom = (ux**2 + uy**2 + 1e-4) * (wx.var(-1, ddof=1) + wy.var(-1, ddof=1) + 9e-4)
    assert float(structural_similarity(a, b)) == pytest.approx((top / bottom).mean())


def test_bicubic_masks_overshoot_as_published():
    mask = torch.zeros(32, 32)
    mask[8:20, 8:20] = 1
    large = resized(mask, 64)
    assert large.shape == (64, 64) and large.max() > 1 and large.min() < 0 and resized(mask, 32) is mask
    whole = F.pad(torch.ones(24, 24), (16, 24, 16, 24))
    assert torch.equal(resized(mask, 64, "nearest"), whole)
    soft = resized(mask, 64, "bilinear")
    assert set((16 * soft).unique().tolist()) == {0, 1, 3, 4, 9, 12, 16}


def test_masks_grow_as_they_are_told_to(tiny_sd, example):
    sides = []
    for how in ("bicubic", "bilinear", "nearest"):
        learned = replace(example, upsampling=how, updates=1).learn(tiny_sd, PICTURES[:1])
        sides.append(learned.about["losses"][0])
    assert len(set(sides)) == 3


def test_the_start_token_gets_no_gradient():
    key, value = (random(1, 2, 5, 3, seed=i).requires_grad_(True) for i in range(2))
    k, v = start_detached(None, key, value)
    assert torch.equal(k, key) and torch.equal(v, value)
    (k.sum() + v.sum()).backward()
    for x in (key, value):
        assert x.grad[:, :, 0].abs().max() == 0 and x.grad[:, :, 1:].min() == 1


@pytest.fixture(scope="module")
def example():
    return AttenCraft(**{**AttenCraft.EXAMPLE, "updates": 3, "ssim": -1.0})


def test_words_keys_and_values_are_learned(tiny_sd, example):
    learned = example.learn(tiny_sd, PICTURES[:1])
    assert list(learned.words) == ["<new1>", "<new2>"] and len(learned.about["losses"]) == 3
    projections = tiny_sd.projections("cross.k", "cross.v")
    assert set(learned.products) == {p.name for p in projections}
    for p in projections:
        x = learned.products[p.name]
        assert x.up.shape[0] == len(p.weight) and (x.alpha / x.rank * x.up @ x.down).abs().max() > 0
    assert learned.about["masks found anew"] >= 1 and len(learned.about["sampling ratios"][0]) == 3


@pytest.mark.parametrize("side", [24, 32])
def test_pictures_of_another_size_than_the_models(tiny_sd, example, side):
    pictures = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    learned = replace(example, updates=2).learn(tiny_sd, pictures)
    assert all(map(math.isfinite, learned.about["losses"])) and learned.about["masks found anew"] >= 1


def test_a_killed_run_tells_what_a_whole_one_does(tiny_sd, example, tmp_path, killed_at):
    whole = replace(example, updates=5).learn(tiny_sd, PICTURES[:1], folder=tmp_path / "whole")
    with killed_at(4):
        replace(example, updates=5).learn(tiny_sd, PICTURES[:1], folder=tmp_path / "killed")
    again = replace(example, updates=5).learn(tiny_sd, PICTURES[:1], folder=tmp_path / "killed")
    assert again.about == whole.about and whole.about["masks found anew"] > 1


def test_a_rejected_refresh_and_the_second_version_keep_the_masks(tiny_sd, example):
    of = lambda **more: AttenCraft(**{**AttenCraft.EXAMPLE, "updates": 3, **more}).learn(tiny_sd, PICTURES[:1]).about
    strict, second = of(ssim=1.1), of(version="second")
    area = "share of cells by word and background"
    assert strict["masks found anew"] == second["masks found anew"] == 0 and strict[area] == second[area]
    ratios = second["sampling ratios"][0]
    assert ratios[2] == pytest.approx(1 / 3) and ratios[0] != pytest.approx(1 / 3)


@contextmanager
def course(pipe, **settings):
    """A run that has found its masks, and rows of an update to come, with the new words active."""
    method = AttenCraft(**{**AttenCraft.EXAMPLE, **settings})
    given = Given(latents_of(pipe, PICTURES[:1], mirrored=True), method.texts(pipe, [""]), PICTURES[:1])
    student = pipe.copy(own=[f"{p.name}.weight" for p in pipe.projections("cross.k", "cross.v")])
    with ExitStack() as active:
        for word, init in zip(method.words, method.init_words, strict=True):
            active.enter_context(student.add_token(word, init))
        yield Course(method, pipe, student, given)


def rows(run, n, step=1):
    z0, eps = run.given.latents.mean[0, :1].repeat(n, 1, 1, 1), torch.randn(n, *run.given.latents.mean.shape[2:])
    at = torch.zeros(n, dtype=torch.long)
    return Drawn(at, at, z0, torch.full((n,), 0.3).to(z0), eps.to(z0), [""] * n, step)


def test_words_are_asked_for_as_often_as_the_ratios_say(tiny_sd):
    n, rng = 4000, torch.Generator().manual_seed(0)
    with course(tiny_sd, refresh=20, n_prior=0) as run:
        run.ratios = [torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)]
        asked = Counter(map(tuple, run.chosen(rows(run, n), rng)))
        wanted = {(0,): 0.2, (1,): 0.5, (0, 1): 0.15, (1, 0): 0.15}
        assert asked.keys() == wanted.keys()
        chi_square = sum((asked[k] - n * share) ** 2 / (n * share) for k, share in wanted.items())
        assert chi_square < 16.27  # 0.1 % of three degrees of freedom
        assert run.chosen(rows(run, 3, step=20), rng) == [[0, 1]] * 3


def test_maps_are_those_of_the_words_said(tiny_sd):
    with course(tiny_sd, described=("{} star", "red {}"), n_prior=0) as run:
        cond = run.student.encode(["<new2>", "red <new2> <new1> star"])  # start, red, <new2>, <new1>, star
        cross = random(16, cond.ids.shape[1])
        column = lambda k: cross[:, k].view(4, 4)
        alone, strongest = (run.words_of(cross, cond, 1, [0, 1], spans=spans) for spans in (False, True))
        assert torch.equal(alone, torch.stack([column(3), column(2), column(0)]))
        of = [column(3).maximum(column(4)), column(1).maximum(column(2)), column(0)]
        assert torch.equal(strongest, torch.stack(of))
        assert torch.equal(run.words_of(cross, cond, 0, [1], spans=False)[0], column(1))


def test_the_loss_is_made_of_its_parts(tiny_sd):
    """Of each word said, and the background, attention is held to its own mask; the start token learns nothing."""
    told, keys = [], []

    def kept(site, key, value):
        for x in (key, value):
            x.retain_grad()
        keys.extend((key, value))
        return key, value

    for attention, prior in ((1.0, 1.0), (3.0, 0.5)):
        with course(tiny_sd, attention_weight=attention, prior_weight=prior, refresh=0) as run:
            run.ratios = [torch.tensor([0.0, 0.0, 1.0])]
            run.kept.masks[0] = (random(3, *run.kept.masks.shape[2:], seed=3) > 0.5).to(run.kept.masks)
            torch.manual_seed(0)
            drawn, rng = rows(run, 1), torch.Generator().manual_seed(1)
            with ExitStack() as looking:
                looking.enter_context(run.student.edit_attention(kept, "cross", stage="kv"))
                seen = looking.enter_context(averaged(run.student, "cross", run.cross))
                asked = run.chosen(drawn, torch.Generator().manual_seed(1))[0]
                run.prior_loss, count = lambda n, rng: torch.tensor(0.7), len(keys)
                total, figures = run.loss(drawn, rng)
            total.backward()
            assert len(keys) > count and all(x.grad[:, :, 0].abs().max() == 0 for x in keys[count:])
            assert all(x.grad[:, :, 1:].abs().max() > 0 for x in keys[count:])
            maps = seen.mean[0].detach()[:, [1, 2, 0]].T.unflatten(1, (round(len(seen.mean[0]) ** 0.5), -1))
            masks = run.kept.masks[0, [*asked, 2]]
            by_hand = attention_loss(resized(maps, masks.shape[-1]), masks)
            torch.testing.assert_close(figures["attention"].detach(), by_hand)
            assert by_hand > 0 and figures["prior"] == pytest.approx(0.7)
            sum_ = figures["denoising"] + attention * figures["attention"] + prior * figures["prior"]
            torch.testing.assert_close(total, sum_)
            told.append(figures["denoising"].detach())
    torch.testing.assert_close(*told)


def test_a_picture_shows_what_its_prompt_names(tiny_sd, example):
    assert example.held("") == [0, 1] and example.held("a red circle") == [1] and example.held("a <new1>") == [0]
    assert example.texts(tiny_sd, ["", "a circle"]) == [["<new1> <new2>"], ["<new2>"]]
    told = AttenCraft(init_words=("star", "circle"), described=("{} star", "red {}"))
    assert told.says([1, 0]) == "a photo of red <new2> and <new1> star"


@pytest.mark.parametrize(
    ("settings", "prompts", "told"),
    [
        ({}, ["a blue square"], "names none"),
        ({"threshold": 1.0}, None, "shows no place of its own for"),
        ({"init_words": ()}, None, "say what each new word starts from"),
        ({"init_words": ("star",)}, None, "give one for each"),
        ({"words": ("<a>", "<a>")}, None, "each once"),
        ({"words": ("s10", "s1")}, None, "s1 stands inside of s10"),
        ({"words": ("star", "<b>")}, None, "already a word"),
        ({"phrase": "a photo of a red star of art of a {}"}, None, "do not fit"),
        ({"phrase": "a"}, None, "need {}"),
    ],
)
def test_bad_input(tiny_sd, settings, prompts, told):
    with pytest.raises(BadInput, match=told):
        AttenCraft(**{**AttenCraft.EXAMPLE, **settings}).run(tiny_sd, PICTURES[:1], prompts)


def test_networks_without_such_attention_are_refused(tiny_sd3):
    with pytest.raises(BadInput, match="needs cross-attention"):
        AttenCraft(**AttenCraft.EXAMPLE).run(tiny_sd3, PICTURES[:1])
