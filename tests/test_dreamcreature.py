"""DreamCreature: parts out of patches, the mapper, the loss on attention across parts, scores."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model

from sfumato.customize import DreamCreature
from sfumato.customize.dreamcreature import snr_weights
from sfumato.customize.parts.features import patches
from sfumato.customize.parts.parts import (
    PartDictionary,
    TokenMapper,
    across_parts,
    code_similarity,
    cosine_kmeans,
    discover,
    exact_matches,
    nearest,
    part_loss,
)
from sfumato.errors import BadInput

PICTURES = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_clusters_by_direction_alone():
    axes = torch.eye(3, dtype=torch.float64).repeat_interleave(20, dim=0) + 0.05 * random(60, 3)
    found = cosine_kmeans(axes, 3, torch.Generator().manual_seed(0))
    label = nearest(axes, found)
    assert all(len(label[i : i + 20].unique()) == 1 for i in (0, 20, 40)) and len(label.unique()) == 3
    scaled = cosine_kmeans(axes * (0.1 + 9 * random(60, 1)), 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, scaled)
    means = torch.stack([F.normalize(F.normalize(axes[label == k], dim=-1).sum(0), dim=-1) for k in range(3)])
    torch.testing.assert_close(found, means)


@pytest.fixture(scope="module")
def creatures():
    """Features of eight 8x8 pictures: a head and a body in front of a background, each of two variants."""
    directions = 4 * F.one_hot(torch.arange(5), 6).double()  # background, head, body, two marks of variants
    features = directions[0].expand(8, 8, 8, 6).clone()
    for i in range(8):
        features[i, 2:4, 2:6] = 3 * directions[1] + (1.0 if i % 2 else -1.0) * directions[3]
        features[i, 4:6, 2:6] = 3 * directions[2] + (1.0 if i // 2 % 2 else -1.0) * directions[4]
    features += 0.01 * random(8, 8, 8, 6)
    truth = torch.zeros(8, 8, dtype=torch.long)
    truth[2:4, 2:6], truth[4:6, 2:6] = 1, 2
    return features, truth


def test_parts_and_variants_are_found(creatures, tmp_path):
    features, truth = creatures
    found = discover(features, parts=3, variants=2)
    parts = found.parts(features)
    pairs = {(int(a), int(b)) for a, b in zip(parts.flatten(), truth.repeat(8, 1).flatten(), strict=True)}
    assert len(pairs) == 3 and found.background in {a for a, b in pairs if b == 0}
    masks = found.masks(features)
    assert torch.equal(masks.sum(dim=1), torch.ones(8, 8, 8).double()) and found.in_front(features).sum() == 8 * 16
    name = {b: a for a, b in pairs}
    codes = found.codes(features)
    for part, variant in ((1, torch.arange(8) % 2), (2, torch.arange(8) // 2 % 2)):
        told = codes[:, name[part]]
        assert torch.equal(told, variant) or torch.equal(told, 1 - variant)
    without = features.clone()
    without[:, 2:4, 2:6] = features[:, :2, 2:6]
    assert (found.codes(without)[:, name[1]] == found.variants).all()
    found.save(tmp_path / "parts.safetensors")
    assert torch.equal(PartDictionary.load(tmp_path / "parts.safetensors").codes(features), codes)
    assert exact_matches(codes, codes, found.variants).eq(1).all()
    torch.testing.assert_close(code_similarity(found, codes, codes), torch.ones(8))
    one = codes.clone()
    one[:, name[1]] = 1 - one[:, name[1]]
    torch.testing.assert_close(exact_matches(one, codes, found.variants), torch.full((8,), 2 / 3))
    with pytest.raises(BadInput, match="all alike"):
        discover(torch.ones(4, 8, 8, 6))


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """A tiny DINOv2 whose own rule for pictures cuts their border off."""
    folder = tmp_path_factory.mktemp("dino")
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**shape)).save_pretrained(folder)
    rule = {"size": {"shortest_edge": 32}, "do_center_crop": True, "crop_size": {"height": 28, "width": 28}}
    (folder / "preprocessor_config.json").write_text(json.dumps(rule))
    return str(folder)


def test_parts_are_told_out_of_some_pictures_and_variants_out_of_all(creatures):
    features, _ = creatures
    chosen = torch.randperm(8, generator=torch.Generator().manual_seed(0))[:4]
    left = [i for i in range(8) if i not in chosen]
    other = features.clone()
    other[left, 2:4, 2:6] += torch.tensor([0, 0, 0, 0, 0, 2.0]).double()
    plain, found = (discover(x, parts=3, variants=2, sample=4) for x in (features, other))
    assert torch.equal(found.split, plain.split) and torch.equal(found.coarse, plain.coarse)
    assert any(not torch.equal(a, b) for a, b in zip(found.fine, plain.fine, strict=True))


def test_patches_are_of_the_whole_picture(dino):
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    framed = pictures.clone()
    framed[..., :1] = framed[..., -1:] = 1
    plain = patches(pictures, dino)
    assert plain.shape == (2, 4, 4, 8) and (patches(framed, dino) - plain).abs().max() > 1e-3


def test_the_loss_looks_at_parts_beside_one_another():
    maps, masks = random(2, 3, 4, 4), F.one_hot(torch.arange(16).view(4, 4) % 3, 3).permute(2, 0, 1).double()
    masks = masks.expand(2, 3, 4, 4)
    torch.testing.assert_close(across_parts(maps).sum(dim=1), torch.ones(2, 4, 4).double())
    torch.testing.assert_close(part_loss(0.01 * maps, masks), part_loss(maps, masks))
    assert part_loss(masks, masks) == 0
    uniform = -math.log(1 / 3) / 3 - 2 / 3 * math.log(2 / 3)
    assert float(part_loss(torch.ones(2, 3, 4, 4).double(), masks)) == pytest.approx(uniform)
    published = F.binary_cross_entropy((maps / maps.sum(1, keepdim=True).clamp(min=1e-6)).clamp(0, 1), masks)
    torch.testing.assert_close(part_loss(maps, masks), published)
    silent = maps.clone()
    silent[:, 0] = 0
    said = torch.tensor([[0, 1, 1]] * 2)
    assert part_loss(silent, masks) > 10 and part_loss(silent, masks, said) < 10
    torch.testing.assert_close(part_loss(maps, masks, torch.ones(2, 3)), published)


def test_the_mapper_looks_rows_up():
    mapper = TokenMapper(3, 4, 6, layers=0)
    with torch.no_grad():
        mapper.pe.zero_()
    part, variant = torch.tensor([0, 2, 1]), torch.tensor([3, 0, 4])
    assert torch.equal(mapper(part, variant), mapper.embedding.weight[[3, 10, 9]])
    deep = TokenMapper(3, 4, 6)
    assert [type(x).__name__ for x in deep.projection] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    deep(part[:2], variant[:2]).sum().backward()
    used = deep.embedding.weight.grad.abs().sum(dim=1) > 0
    assert set(used.nonzero().flatten().tolist()) <= {3, 10} and deep.pe.grad[1].abs().max() == 0


def test_weights_by_signal_to_noise():
    snr = torch.tensor([0.1, 5.0, 20.0])
    torch.testing.assert_close(snr_weights(snr, "eps"), torch.tensor([1.0, 1.0, 0.25]))
    torch.testing.assert_close(snr_weights(snr, "v"), torch.tensor([0.1 / 1.1, 5 / 6, 5 / 21]))
    assert snr_weights(snr, "eps", 0).eq(1).all()


def test_weighted_errors_are_those_of_x0_whatever_is_predicted():
    rng = torch.Generator().manual_seed(0)
    t, x0, eps, off = torch.linspace(0.05, 1, 20).double(), *torch.randn(3, 20, generator=rng).double()
    weighted = lambda kind, snr, error: snr_weights(snr, kind) * error.square()
    angle = t * torch.pi / 2
    for alpha, sigma, kinds in ((1 - t, t, ["flow"]), (angle.cos(), angle.sin(), ["v", "x0"])):
        snr, z = (alpha / sigma).square(), alpha * x0 + sigma * eps
        expected = snr.clamp(max=5) * off.square()  # of a prediction that is off by so much in x0
        wrong = (z - alpha * (x0 + off)) / sigma
        told = {"flow": wrong - (x0 + off), "v": alpha * wrong - sigma * (x0 + off), "x0": x0 + off}
        true = {"flow": eps - x0, "v": alpha * eps - sigma * x0, "x0": x0}
        for kind in kinds:
            torch.testing.assert_close(weighted(kind, snr, told[kind] - true[kind]), expected)
        here = slice(0, -1)  # at t = 1 nothing of x0 follows from eps
        error = weighted("eps", snr[here], (wrong - eps)[here])
        torch.testing.assert_close(error, expected[here])
    none = torch.zeros(1).double()
    assert [float(snr_weights(none, kind)) for kind in ("eps", "v", "x0", "flow")] == [1, 0, 0, 0]


def test_every_present_variant_has_a_word(tiny_sd):
    method = DreamCreature(**DreamCreature.EXAMPLE)
    learned = method.learn(tiny_sd, PICTURES)
    codes = torch.tensor(learned.about["codes"])
    assert codes.shape == (8, 2) and set(learned.products) == {p.name for p in tiny_sd.projections()}
    assert list(learned.words) == sorted({f"<{m}:{k}>" for m in range(2) for k in codes[:, m].tolist() if k < 2})
    assert all(x.up.abs().max() > 0 for x in learned.products.values())
    assert sorted(method.said("a {}", torch.tensor([1, 0]), 2, 0.3).split()) == ["<0:1>", "<1:0>", "a"]
    assert DreamCreature(word="<bird->").named(2, 17) == "<bird-2:17>"


def test_attention_to_each_word_is_held_to_the_places_of_its_part(tiny_sd, monkeypatch):
    """Where every cell attends to the word of the part that is there, nothing is lost; to another's, all is."""
    runs, texts = [], []
    said = DreamCreature.said
    monkeypatch.setattr(DreamCreature, "fit", lambda self, recipe, folder: runs.append(recipe) or {})
    monkeypatch.setattr(DreamCreature, "said", lambda self, *args: texts.append(said(self, *args)) or texts[-1])
    method = DreamCreature(**{**DreamCreature.EXAMPLE, "flip": 0.5, "attention_weight": 2.0})
    codes = torch.tensor(method.learn(tiny_sd, PICTURES).about["codes"])
    dictionary, features = method.found(PICTURES)
    whole = (codes < dictionary.variants).all(dim=1).nonzero().flatten()[:4]
    assert len(whole) == 4
    (recipe,) = runs
    views = torch.tensor([0, 0, 1, 1])
    views_of = [dictionary.masks(x) for x in (features, patches(PICTURES.flip(-1)))]
    batch = {**recipe.batch(0, torch.Generator().manual_seed(0), 4), "at": whole, "view": views}
    figures = {}
    for exchanged in (False, True):
        texts.clear()

        def attend(site, probs, exchanged=exchanged):
            side = round(probs.shape[2] ** 0.5)
            made = torch.zeros_like(probs)
            for i, (at, view) in enumerate(zip(whole.tolist(), views.tolist(), strict=True)):
                masks = F.interpolate(views_of[view][at : at + 1], (side, side))[0].flatten(1)
                words = texts[i].split()
                for m, mask in enumerate(masks.flip(0) if exchanged else masks):
                    (place,) = (k for k, word in enumerate(words) if word.startswith(f"<{m}:"))
                    made[i, :, :, 1 + place] = mask.to(made)
            return made

        with recipe.pipe.edit_attention(attend, "cross"):
            total, told = recipe.loss(batch, torch.Generator().manual_seed(3))
        torch.testing.assert_close(total, told["denoising"] + 2 * told["attention"])
        figures[exchanged] = float(told["attention"])
    assert {text.index("<1:") > text.index("<0:") for text in texts} == {False, True}
    assert figures == {False: 0, True: pytest.approx(100)}


def test_one_mapper_serves_all_encoders(tiny_sdxl, monkeypatch):
    """As in the SDXL script, whose one mapper is as wide as both encoders; its rows are cut into their parts."""
    runs = []
    monkeypatch.setattr(DreamCreature, "fit", lambda self, recipe, folder: runs.append(recipe) or {})
    learned = DreamCreature(**{**DreamCreature.EXAMPLE, "layers": 1}).learn(tiny_sdxl, PICTURES)
    mapper, widths = runs[0].modules()["mapper"], [table.shape[1] for table in tiny_sdxl.word_tables]
    assert mapper.projection[0].weight.shape == (sum(widths), sum(widths)) and len(widths) == 2
    for word, rows in learned.words.items():
        m, k = (torch.tensor([int(x)]) for x in word.strip("<>").split(":"))
        assert [x.shape[1] for x in rows] == widths
        torch.testing.assert_close(torch.cat(rows, dim=1), mapper(m, k).detach())


@pytest.mark.parametrize("side", [8, 32])
def test_pictures_of_another_size_than_the_models(tiny_sd, side):
    pictures = torch.rand(8, 3, side, side, generator=torch.Generator().manual_seed(0))
    losses = DreamCreature(**DreamCreature.EXAMPLE).learn(tiny_sd, pictures).about["losses"]
    assert len(losses) == 2 and all(map(math.isfinite, losses))


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"parts": 11}, "do not fit"), ({"dictionary": "no"}, "no file of parts"), ({"word": "a b"}, "without spaces")],
)
def test_bad_input(tiny_sd, settings, told):
    with pytest.raises(BadInput, match=told):
        DreamCreature(**{**DreamCreature.EXAMPLE, **settings}).run(tiny_sd, PICTURES)
