"""Diff-Protect: the engine's box, the sources' directions, and folders that are killed and gone on with."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from sfumato import cli
from sfumato.errors import BadInput
from sfumato.protect.base import apart, seed_of, seen_over
from sfumato.protect.diff_protect import UNIT, DiffProtect, residuals
from sfumato.protect.parts import files, folder, mimicry, sources, survival
from sfumato.protect.parts.latents import displacement, noised
from sfumato.protect.parts.pgd import pgd, to_levels
from sfumato.protect.parts.tiles import blended, inside, starts, tiles_of, window


def rand(*shape, seed=0, low=-1.0):
    return low + (1 - low) * torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("decay", [False, True])
def test_every_step_stays_in_the_box_and_a_budget_of_nothing_returns_the_input(decay):
    x, eps, seen = rand(2, 3, 8, 8), 0.07, []

    def wild(now):
        seen.append(now.clone())
        return torch.randn(now.shape, generator=torch.Generator().manual_seed(len(seen)), dtype=now.dtype)

    start = 2 * eps * (rand(2, 3, 8, 8, seed=3, low=0) - 0.5)
    done = pgd(x, wild, eps=eps, alpha=0.03, updates=9, start=start, decay=decay)
    for now in (*seen, done):
        assert (now - x).abs().max() <= eps + 1e-12 and now.abs().max() <= 1
    assert torch.equal(pgd(x, wild, eps=0.0, alpha=0.03, updates=3), x)
    assert len(seen) == 12 and not torch.equal(done, x)


def test_a_decaying_step_is_the_cards():
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    ones = lambda now: torch.ones_like(now)
    done = pgd(x, ones, eps=1.0, alpha=0.01, updates=5, decay=True)
    assert float(done) == pytest.approx(sum(0.01 * (1 - 0.99 * k / 5) for k in range(5)), abs=1e-15)


@pytest.mark.parametrize("budget", [1, 4, 255])
def test_the_budget_is_exact_in_levels_after_rounding(budget):
    given = torch.arange(256).repeat(3, 1, 1).float()[None] / 255
    moved = (given + (rand(*given.shape, seed=budget).float() * (budget + 1) / 255)).clamp(0, 1)
    safe = to_levels(moved, given, budget)
    change = (255 * safe).round().long() - (255 * given).round().long()
    assert change.abs().max() == min(budget, 255) or budget == 255
    assert torch.equal(to_levels(given + 1, given, budget), (255 * given + budget).round().clamp_max(255) / 255)


class Linear:
    """An encoder z = W x and an affine network, in float64, by which every direction has a closed form."""

    def __init__(self, jacobian: float = 1.0):
        self.W = rand(6, 12, seed=5)
        self.a, self.sigma, self.jacobian = 0.6, 0.8, jacobian
        self.e, self.bias = rand(2, 6, seed=6), rand(2, 6, seed=7)

    def encode(self, x):
        return x.flatten(1) @ self.W.mT

    def residual(self, z):
        return self.jacobian * (self.a * z + self.sigma * self.e) + self.bias - self.e


X = rand(2, 3, 2, 2, seed=9)


def test_score_distillation_is_the_encoders_vjp_and_keeps_no_graph_of_the_network():
    world, flags = Linear(), []

    def residual(z):
        flags.append(z.requires_grad or torch.is_grad_enabled())
        return world.residual(z)

    v = world.residual(world.encode(X))
    expected = (v @ world.W).reshape(X.shape)
    torch.testing.assert_close(sources.sds_gradient(X, world.encode, residual), expected)
    assert flags == [False]
    x = X.clone().requires_grad_()
    (plain,) = torch.autograd.grad((v.detach() * world.encode(x)).sum(), x)
    torch.testing.assert_close(sources.direction("sds+", X, world.encode, world.residual), plain)
    torch.testing.assert_close(sources.direction("sds-", X, world.encode, world.residual), -plain)


@pytest.mark.parametrize("draws", [1, 3])
def test_score_distillation_differentiates_the_draw_of_the_posterior_that_it_noised(draws):
    world, taken = Linear(), iter([rand(2, 6, seed=20), rand(2, 6, seed=21)])

    def encode(x):  # a mean W x and a deviation W x / 2: another draw has another Jacobian
        return world.encode(x) * (1 + next(taken) / 2)

    found = sources.sds_gradient(X, encode, world.residual, draws)
    scale = 1 + rand(2, 6, seed=20) / 2
    v = world.residual(world.encode(X) * scale)
    torch.testing.assert_close(found, ((v * scale) @ world.W).reshape(X.shape))
    assert torch.equal(next(taken), rand(2, 6, seed=21))


def test_without_a_jacobian_to_drop_both_directions_coincide():
    world = Linear(jacobian=1.0)
    sds = sources.direction("sds+", X, world.encode, world.residual)
    advdm = sources.direction("advdm+", X, world.encode, world.residual)
    torch.testing.assert_close(advdm, sds * 2 * world.a / 6)  # the mean over 6 elements, and alpha_t
    assert torch.equal(sds.sign(), advdm.sign())


def test_every_source_is_the_gradient_that_its_line_says():
    world, y = Linear(0.3), rand(2, 6, seed=11)
    x = X.clone().requires_grad_()
    z = world.encode(x)
    semantic = world.residual(z).square().mean(1).sum()
    textural = (z - y).square().sum()
    s, t = (torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (semantic, textural))
    sds = sources.sds_gradient(X, world.encode, world.residual)
    expected = {
        "advdm+": s, "advdm-": -s, "encoder": -t, "mist": -(t - 1e4 * s), "mist-": -(-t - 1e4 * s),
        "sdst-": -5 * sds - t, "sdst+": 5 * sds - t,
    }  # fmt: skip
    for source, direction in expected.items():
        found = sources.direction(source, X, world.encode, world.residual, lambda: y)
        torch.testing.assert_close(found, direction)
    torch.testing.assert_close(
        sources.direction("mist", X, world.encode, world.residual, lambda: y, rate=2.0), 2 * s - t
    )


def test_the_encoder_attack_has_nothing_to_do_where_the_target_is_the_picture():
    world = Linear()
    still = sources.direction("encoder", X, world.encode, world.residual, lambda: world.encode(X))
    assert still.abs().max() == 0


def test_first_steps_up_and_down_mirror_each_other(tiny_sd):
    given = 0.25 + 0.5 * rand(1, 3, 16, 16, seed=1, low=0).float()
    given = (255 * given).round() / 255
    up, down = (DiffProtect(source=s, updates=1, step=3.0, budget=8).run(tiny_sd, given) for s in ("sds+", "sds-"))
    torch.testing.assert_close(up - given, given - down)
    assert (255 * (up - given)).round().abs().max() == 3


@pytest.mark.parametrize("source", ["advdm-", "sdst-", "encoder", "mist", "mist-"])
def test_every_source_stays_in_the_budget_on_a_pipeline(tiny_sd, source):
    given = (255 * rand(1, 3, 16, 16, seed=2, low=0)).round().float() / 255
    safe = DiffProtect(source=source, updates=2, budget=3).run(tiny_sd, given)
    levels = (255 * safe).round() - (255 * given).round()
    assert 0 < levels.abs().max() <= 3


def test_it_moves_latents_beyond_chance(tiny_sd):
    given = (255 * rand(2, 3, 16, 16, seed=3, low=0)).round().float() / 255
    safe = DiffProtect(source="encoder", updates=10, step=3.0, batch=2, posterior="mean").run(tiny_sd, given)
    moved, largest = displacement(tiny_sd, safe, given)
    chance, _ = displacement(tiny_sd, noised(given, 16), given)
    assert (moved > 1.5 * chance).all() and (largest <= moved).all()


def test_a_picture_is_protected_the_same_whatever_stands_beside_it(tiny_sd):
    given = (255 * rand(2, 3, 16, 16, seed=4, low=0)).round().float() / 255
    settings = DiffProtect(updates=2)
    assert torch.equal(settings.run(tiny_sd, given)[1:], settings.run(tiny_sd, given[1:]))
    assert seed_of(given[0], 0) != seed_of(given[1], 0) and seed_of(given[0], 0) != seed_of(given[0], 1)


@pytest.mark.parametrize("unit", [1, 4, 8])
def test_tiles_cover_a_picture_and_share_what_they_should(unit):
    side = 32
    for overlap in (0, 8, 13, 31):
        for length in range(1, 200):
            found = starts(length, side, overlap, unit)
            ends = [min(s + side, length) for s in found]
            assert found[0] == 0 and ends[-1] == length and all(s % unit == 0 for s in found)
            assert found == sorted(set(found))
            assert all(e - s > side - unit or length < side for s, e in zip(found, ends, strict=True))
            least = min(overlap, side - unit)
            assert all(e - s >= least for s, e in zip(found[1:], ends[:-1], strict=True))
    assert tiles_of(32, 20, 32, 8, 4) == [(slice(0, 32), slice(0, 20))] and len(tiles_of(33, 56, 32, 8)) == 4


def test_tiles_that_agree_are_the_whole_and_others_meet_without_a_seam():
    overlap, shape = 6, (1, 1, 40, 27)
    whole, tiles = rand(*shape, seed=1), tiles_of(40, 27, 16, overlap)
    laid = blended(shape, tiles, lambda tile: whole[..., tile[0], tile[1]], overlap)
    torch.testing.assert_close(laid, whole, rtol=0, atol=1e-14)
    assert all(window(tile, overlap).min() > 0 for tile in tiles) and len(tiles) == 12
    two = tiles_of(16, 26, 16, overlap)
    steps = blended((1, 1, 16, 26), two, lambda tile: torch.full((1, 1, 16, 16), float(tile[1].start > 0)), overlap)
    row = steps[0, 0, 8]
    assert len(two) == 2 and row[9] == 0 and row[16] == 1 and row.diff().max() <= 1 / overlap
    part = rand(1, 1, 16, 16).requires_grad_()
    put = inside(part, tiles[5], shape)
    assert torch.equal(put[..., tiles[5][0], tiles[5][1]], part)
    assert float(put.detach().sum()) == pytest.approx(float(part.detach().sum()))


def test_tiles_of_an_encoder_that_sees_blocks_alone_are_the_whole_picture():
    """With 4x4 blocks as latents, tiles that begin at multiples of 4 have the whole picture's own gradient."""
    W, x, y = rand(5, 48, seed=2), rand(2, 3, 40, 27, seed=3), rand(2, 3, 40, 27, seed=4)
    encode = lambda x: F.unfold(F.pad(x, (0, -x.shape[-1] % 4)), 4, stride=4).mT @ W.mT
    whole = sources.direction("encoder", x, encode, encode, lambda: encode(y))

    def one(tile):
        cut = lambda x: x[..., tile[0], tile[1]]
        view = lambda here: encode(cut(inside(here, tile, x.shape)))
        return sources.direction("encoder", cut(x), view, encode, lambda: encode(cut(y)))

    laid = blended(x.shape, tiles_of(40, 27, 16, 6, 4), one, 6)
    torch.testing.assert_close(laid, whole, rtol=1e-12, atol=1e-12)


def test_a_picture_that_fits_one_tile_is_protected_as_ever(tiny_sd):
    given = (255 * rand(1, 3, 16, 16, seed=11, low=0)).round().float() / 255
    whole = DiffProtect(source="encoder", updates=2, tile=0).run(tiny_sd, given)
    for settings in ({}, {"tile": 16}, {"tile": 64, "overlap": 0.5}):
        assert torch.equal(DiffProtect(source="encoder", updates=2, **settings).run(tiny_sd, given), whole)
    assert not torch.equal(DiffProtect(source="encoder", updates=2, tile=8).run(tiny_sd, given), whole)


def test_large_pictures_are_seen_in_tiles_within_one_budget(tiny_sd):
    given = (255 * rand(1, 4, 26, 20, seed=12, low=0)).round().float() / 255
    given[:, 3, :6] = 0
    seen = []

    class Watched(DiffProtect):
        def encoder(self, p, generators):
            encode = super().encoder(p, generators)
            return lambda x: seen.append(tuple(x.shape[-2:])) or encode(x)

    for source in ("sds-", "mist"):
        safe = Watched(source=source, updates=3, budget=3, step=2.0).run(tiny_sd, given)
        moved = (255 * safe).round().long() - (255 * given).round().long()
        assert moved.abs().max() == 3 and not moved[:, 3].any() and not moved[:, :3, :6].any()
        assert (moved[:, :3, 6:] != 0).double().mean() > 0.8
    assert torch.equal(DiffProtect(source=source, updates=3, budget=3, step=2.0).run(tiny_sd, given), safe)
    assert max(max(size) for size in seen) <= 16
    for overlap in (1.0, -0.1):
        with pytest.raises(BadInput, match="overlap"):
            DiffProtect(overlap=overlap)


def test_grey_alpha_and_odd_sizes_keep_their_kind(tiny_sd):
    grey = (255 * rand(1, 2, 15, 18, seed=5, low=0)).round().float() / 255
    grey[:, 1, :5] = 0
    safe = DiffProtect(updates=2, budget=5).run(tiny_sd, grey)
    assert safe.shape == grey.shape and torch.equal(safe[:, 1], grey[:, 1])
    assert torch.equal(safe[:, 0, :5], grey[:, 0, :5]) and not torch.equal(safe[:, 0, 5:], grey[:, 0, 5:])
    colour, alpha = apart(torch.full((1, 4, 2, 2), 0.5))
    assert torch.equal(seen_over(alpha)(2 * colour - 1), torch.full((1, 3, 2, 2), 0.5))


def test_times_and_noise_belong_to_the_picture(tiny_sd):
    z = rand(2, *tiny_sd.latent_shape(), seed=8).float()
    rngs = lambda *seeds: [torch.Generator().manual_seed(s) for s in seeds]
    cond = tiny_sd.encode("art")
    both = residuals(tiny_sd, cond, rngs(1, 2))(z)
    torch.testing.assert_close(residuals(tiny_sd, cond, rngs(2))(z[1:]), both[1:], rtol=1e-4, atol=1e-5)


def test_an_adapter_whose_gate_is_shut_takes_no_part(tiny_sd):
    pipe, z = tiny_sd.copy(), rand(2, *tiny_sd.latent_shape(), seed=8).float()
    rngs = lambda: [torch.Generator().manual_seed(s) for s in (1, 2)]
    drawn = {"at": torch.arange(2), "t": torch.tensor([0.4, 0.7]), "eps": z.flip(0)}

    def found():
        with pipe.add_token("<p0>", "star") as token:
            learned = mimicry.Word(pipe, token, z).loss(drawn, rngs()[0])[0]
        return residuals(pipe, pipe.encode("art"), rngs())(z), learned

    bare, adapter = found(), pipe.add_adapter("other", rank=2, alpha=20.0, generator=rngs()[0])
    for up in adapter.up.values():
        torch.nn.init.normal_(up, std=0.3, generator=rngs()[1])
    assert not any(torch.allclose(a, b, rtol=1e-3) for a, b in zip(found(), bare, strict=True))
    adapter.gate = lambda cond: torch.zeros(len(cond))
    for made, due in zip(found(), bare, strict=True):
        torch.testing.assert_close(made, due, rtol=1e-5, atol=1e-6)


def test_the_posterior_of_an_autoencoder_of_frames_is_that_of_one_frame(tiny_qwen):
    x = rand(1, 3, tiny_qwen.size, tiny_qwen.size).float()
    with torch.no_grad():
        mean, std = tiny_qwen.posterior(x)
        draw, noise = tiny_qwen.encode_image(x, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(0)
        torch.testing.assert_close(mean, tiny_qwen.encode_image(x))
        torch.testing.assert_close(mean + std * torch.randn(mean[:, :, None].shape, generator=noise)[:, :, 0], draw)


@pytest.mark.parametrize("wrong", [torch.zeros(1, 5, 4, 4), torch.zeros(3, 4, 4), torch.full((1, 3, 4, 4), 1.5),
                                   torch.zeros(1, 3, 4, 4, dtype=torch.uint8)])  # fmt: skip
def test_what_is_no_picture_is_refused(tiny_sd, wrong):
    with pytest.raises(BadInput):
        DiffProtect().run(tiny_sd, wrong)


# Folders


def save(path, mode, shape=(16, 16), seed=0):
    array = np.random.default_rng(seed).integers(0, 256, (*shape, {"L": 1, "RGB": 3, "RGBA": 4}[mode]), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array[..., 0] if mode == "L" else array).save(path)
    return path


@pytest.fixture
def images(tmp_path):
    for i, (name, mode) in enumerate([("a.png", "RGB"), ("b.png", "RGB"), ("sub/c.png", "RGBA"), ("sub/d.png", "L")]):
        save(tmp_path / "mine" / name, mode, seed=i)
    return tmp_path / "mine"


SHORT = DiffProtect(updates=2, budget=4, step=2.0)


def test_a_killed_folder_is_gone_on_with_to_the_same_files(tiny_sd, images, tmp_path, monkeypatch):
    whole = folder.protect_folder(SHORT, tiny_sd, images, tmp_path / "whole")
    assert set(whole["pictures"]) == {"a.png", "b.png", "sub/c.png", "sub/d.png"}
    assert all(0 < x["levels"] <= 4 for x in whole["pictures"].values())
    calls, run = [], DiffProtect.run

    def dies(self, *args, **more):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(self, *args, **more)

    monkeypatch.setattr(DiffProtect, "run", dies)
    with pytest.raises(KeyboardInterrupt):
        folder.protect_folder(SHORT, tiny_sd, images, tmp_path / "safe")
    assert len(list((tmp_path / "safe").rglob("*.png"))) == 2
    folder.protect_folder(SHORT, tiny_sd, images, tmp_path / "safe")
    assert len(calls) == 5
    for name in whole["pictures"]:
        assert (tmp_path / "safe" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    clean, safe = Image.open(images / "sub/c.png"), Image.open(tmp_path / "safe/sub/c.png")
    assert safe.mode == "RGBA" and np.array_equal(np.asarray(safe)[..., 3], np.asarray(clean)[..., 3])
    with pytest.raises(BadInput, match="other settings \\(budget: 4 there, 5 here"):
        folder.protect_folder(DiffProtect(updates=2, budget=5, step=2.0), tiny_sd, images, tmp_path / "safe")


def test_a_picture_that_changed_is_protected_again(tiny_sd, images, tmp_path):
    before = folder.protect_folder(SHORT, tiny_sd, images, tmp_path / "safe")
    save(images / "b.png", "RGB", seed=77)
    after = folder.protect_folder(SHORT, tiny_sd, images, tmp_path / "safe")
    assert {n for n in after["pictures"] if after["pictures"][n] != before["pictures"][n]} == {"b.png"}


def test_folders_that_cannot_be(tiny_sd, images, tmp_path):
    with pytest.raises(BadInput, match="lies in"):
        folder.protect_folder(SHORT, tiny_sd, images, images / "safe")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match=r"holds notes\.txt"):
        folder.protect_folder(SHORT, tiny_sd, images, tmp_path / "other")
    with pytest.raises(BadInput, match="no picture and no folder"):
        files.found_in(tmp_path / "nothing")


def test_modes_that_cannot_hold_small_changes_are_refused(tmp_path):
    grey = np.random.default_rng(0).integers(0, 65535, (8, 8), dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    save(tmp_path / "plain.png", "RGB")
    with Image.open(tmp_path / "plain.png") as plain:
        plain.quantize(8).save(tmp_path / "palette.png")
        plain.convert("CMYK").save(tmp_path / "print.jpg")
        plain.convert("1").save(tmp_path / "ink.png")
    for name, why in [("deep", "8 bits"), ("palette", "a palette"), ("print", "CMYK"), ("ink", "no grey")]:
        (file,) = tmp_path.glob(f"{name}.*")
        with pytest.raises(BadInput, match=why):
            files.read_picture(file)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(BadInput, match="cannot be read"):
        files.read_picture(tmp_path / "text.png")


def test_two_files_of_one_stem_get_two_names(tmp_path):
    save(tmp_path / "a.png", "RGB")
    save(tmp_path / "a.bmp", "RGB")
    save(tmp_path / "b.jpg", "RGB")
    assert sorted(g.name for g in files.found_in(tmp_path)) == ["a.bmp.png", "a.png.png", "b.png"]
    save(tmp_path / "b.jpg.png", "RGB")
    save(tmp_path / "b.png", "RGB")
    save(tmp_path / "A.jpg", "RGB")
    names = [g.name.casefold() for g in files.found_in(tmp_path)]
    assert len(set(names)) == len(names) == 6


# What is left


def test_changes_keep_the_size_and_what_they_should():
    flat = torch.full((1, 3, 16, 16), 100 / 255)
    for change in survival.CHANGES.values():
        torch.testing.assert_close(change(flat), flat)
    x = rand(1, 3, 16, 16, low=0).float()
    assert all(change(x).shape == x.shape for change in survival.CHANGES.values())
    doubled = survival.upscaled(lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    torch.testing.assert_close(doubled(flat), flat)
    with pytest.raises(BadInput, match="no diffusers pipeline on this machine"):
        survival.diffusion_upscaler("no/such-upscaler")
    spot = torch.zeros(1, 1, 9, 9)
    spot[..., 4, 4] = 1
    assert float(survival.blurred(spot)[0, 0, 4, 4]) == pytest.approx(1 / (2 * np.pi), abs=0.005)


def test_the_share_left_is_counted_beyond_chance():
    assert survival.share_left([3.0, 3.0], [1.0, 1.0], [5.0, 5.0], [1.0, 1.0]) == 0.5
    assert survival.share_left([1.0], [1.0], [1.0], [2.0]) is None


def test_inpainting_keeps_what_is_not_open(tiny_sd):
    known, pred, z = (rand(1, *tiny_sd.latent_shape(), seed=i) for i in (1, 2, 3))
    open_ = mimicry.half(known.shape[-1]).double()
    guided = mimicry.around(tiny_sd, known, open_)(pred, z, 0.7, None)
    x0 = tiny_sd.process.convert(guided, z, 0.7, tiny_sd.prediction, "x0")
    middle = known.shape[-1] // 2
    torch.testing.assert_close(x0[..., :middle], known[..., :middle])
    assert torch.equal(guided[..., middle:], pred[..., middle:])
    given = rand(1, 3, 16, 16, seed=6, low=0).float()
    half, whole = (mimicry.inpainted(tiny_sd, given, [0], m, prompt="art", sampling_steps=2)
                   for m in (mimicry.half(16), torch.ones(1, 1, 16, 16)))  # fmt: skip
    plain = tiny_sd.draw(["art"], [0], sampling_steps=2, cfg_scale=1.0, scheduler="ddim")
    torch.testing.assert_close(whole, plain)
    assert not torch.allclose(half, plain, atol=0.01)


def test_a_word_is_learned_and_the_pipeline_is_as_before(tiny_sd):
    given = rand(2, 3, 16, 16, seed=7, low=0).float()
    settings = mimicry.WordSettings(updates=2, batch=2)
    drawn = mimicry.imitated(tiny_sd, given, [0, 1], settings=settings, sampling_steps=1)
    assert drawn.shape == given.shape and not tiny_sd.learned


def test_the_command_protects_and_says_what_is_left(tiny_sd, images, tmp_path, capsys):
    model, out = str(tiny_sd.save(tmp_path / "tiny")), tmp_path / "safe"
    args = ["protect", "diff-protect", "--model", model, "--images", str(images), "--out", str(out), "--budget", "4",
            "--updates", "2", "--judged", "1", "--sampling-steps", "2", "--strengths", "0.5", "--word-updates", "1",
            "--device", "cpu"]  # fmt: skip
    assert cli.main(args) == 0
    told = json.loads((out / "audit.json").read_text())
    assert [row["name"] for row in told["survival"]] == list(survival.CHANGES)
    assert [row["title"] for row in told["proofs"]] == [
        "img2img, strength 0.5", "inpainting, right half", "textual inversion",
    ]  # fmt: skip
    page = (out / "index.html").read_text()
    assert all(finding.split(":")[0] in page for finding in told["findings"]) and "an upscaler (none" in page
    before = (out / "a.png").stat().st_mtime_ns
    assert cli.main(args) == 0 and (out / "a.png").stat().st_mtime_ns == before
    assert "changed by at most" in capsys.readouterr().out
    assert cli.main([*args, "--budget", "0"]) == 2 and "--budget must be at least 1" in capsys.readouterr().err


def test_targets_and_units():
    plate = sources.pattern(32, 32)
    assert plate.shape == (1, 3, 32, 32) and set(plate.unique().tolist()) == {-1.0, 1.0}
    assert 255 * UNIT == 2
