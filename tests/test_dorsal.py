"""DORSal: its network and OSRT in closed form, slots edited and transferred, long paths, training, the command."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import sfumato as sf
from sfumato import cli
from sfumato.data.cameras import Cameras, stacked
from sfumato.data.views import open_views
from sfumato.errors import BadInput
from sfumato.ledger import core
from sfumato.nets import OSRT, ViewUNet
from sfumato.nets.osrt import SlotAttention, from_stelzner, slot_shares
from sfumato.nets.rays import octaves, ray_encoding, ray_map
from sfumato.noise import Cosine, GaussianProcess
from sfumato.pipeline import Labels, Scene, Slots, ViewModel
from sfumato.pipeline.slots import changes, edit, segments, transfer
from sfumato.train.dorsal import Dorsal, DorsalTraining
from sfumato.train.osrt import OSRTTraining

NET = {
    "size": 8, "slot_width": 5, "channels": (8, 16), "layers": 1, "attention_from": 4, "head_dim": 8, "embedding": 16,
    "octaves": 3, "first_octave": -1, "rays": 4,
}  # fmt: skip


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stir(net: torch.nn.Module, size: float = 0.1) -> torch.nn.Module:
    """Random weights everywhere, also where a new network has zeros."""
    generator = rng(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator).to(p.dtype))
    return net.eval().requires_grad_(False)


def small(**changes) -> Dorsal:
    return Dorsal(**{**Dorsal.EXAMPLE, **changes})


def heard(batch: int = 2, views: int = 3, slots: int = 4, dtype=torch.float64):
    """What the network is told: slots of which all are there, and cameras."""
    scenes = open_views("solids", 8)
    cameras = stacked([scenes.cameras(i).seen_from(scenes.cameras(i).poses[0]).at(range(views)) for i in range(batch)])
    values = torch.randn(batch, slots, NET["slot_width"], generator=rng(2), dtype=dtype)
    return values, torch.ones(batch, slots, dtype=torch.bool), cameras.poses.to(dtype), cameras.focal.to(dtype)


def noisy(batch: int = 2, views: int = 3, dtype=torch.float64):
    z = torch.randn(batch, views, 3, 8, 8, generator=rng(), dtype=dtype)
    return z, torch.tensor([[0.3], [-1.0]], dtype=dtype)[:batch].expand(batch, views)


@pytest.fixture(scope="module")
def net() -> ViewUNet:
    torch.manual_seed(0)
    return stir(ViewUNet(**NET).double())


@pytest.fixture(scope="module")
def model() -> ViewModel:
    torch.manual_seed(0)
    made = small(slots="objects").model(())
    stir(made.network)
    return made


@pytest.fixture(scope="module")
def seeing() -> ViewModel:
    """A model with an encoder."""
    torch.manual_seed(0)
    made = small().model(())
    stir(made.network), stir(made.encoder)
    return made


def scenes_of(model: ViewModel, *rows: int) -> tuple[Slots, Cameras]:
    """Descriptions of objects of some scenes, and the first cameras of the first."""
    views = open_views("solids", model.size)
    frame = torch.stack([views.cameras(i).poses[0] for i in rows])
    return Slots.of([views.objects(i) for i in rows], frame), views.cameras(rows[0])


# Rays and OSRT


def test_rays_are_encoded_in_180_channels():
    origins, ways = torch.zeros(2, 3, dtype=torch.float64), torch.randn(2, 3, generator=rng()).double()
    encoded = ray_encoding(origins, ways)
    assert encoded.shape == (2, 180)
    assert not encoded[:, :45].any() and (encoded[:, 45:90] == 1).all()
    assert_close(encoded[:, 90], torch.sin(math.pi * ways[:, 0]))
    o, dim = 4, 1
    assert_close(octaves(ways, 6, -2)[:, dim * 6 + o], torch.sin(2.0 ** (o - 2) * math.pi * ways[:, dim]))
    assert_close(octaves(ways, 6, -2)[:, 18 + dim * 6 + o], torch.cos(2.0 ** (o - 2) * math.pi * ways[:, dim]))
    mapped = ray_map(origins, ways[:, None, None].expand(2, 4, 5, 3))
    assert_close(mapped, encoded[..., None, None].expand(2, 180, 4, 5))


def test_slots_share_tokens_out():
    q, k = torch.randn(2, 4, 6, generator=rng()).double(), torch.randn(2, 9, 6, generator=rng(1)).double()
    raw = (q @ k.mT / 6**0.5).softmax(1)
    assert_close(raw.sum(1), torch.ones(2, 9).double())
    shares = slot_shares(q, k)
    assert_close(shares.sum(2), torch.ones(2, 4).double())
    assert_close(shares, (raw + 1e-8) / (raw + 1e-8).sum(2, keepdim=True))
    assert_close(slot_shares(q[:, :1], k), torch.full((2, 1, 9), 1 / 9).double())  # one slot takes the mean


def test_a_single_slot_sees_the_mean_of_the_values():
    attention = stir(SlotAttention(1, 6, 8).double())
    tokens = torch.randn(2, 5, 6, generator=rng()).double()
    mean = attention.to_v(attention.norm_tokens(tokens)).mean(1)
    slot = attention.gru(mean, attention.first.expand(2, 8))
    assert_close(attention(tokens)[:, 0], slot + attention.mlp(attention.norm_mlp(slot)))


def test_what_rays_see_is_mixed_from_slots_in_any_order():
    torch.manual_seed(0)
    osrt = stir(OSRT(3, 8, 4, 1, 8, 1, 2, octaves=3, first_octave=-1).double())
    slots, ways = torch.randn(2, 3, 8, generator=rng()).double(), torch.randn(2, 7, 3, generator=rng(1)).double()
    colours, shares = osrt.decode(slots, ways, ways)
    assert colours.shape == (2, 7, 3) and (colours > 0).all() and (colours < 1).all()
    assert_close(shares.sum(2), torch.ones(2, 7).double())
    turned, moved = osrt.decode(slots[:, [2, 0, 1]], ways, ways)
    assert_close(turned, colours)
    assert_close(moved, shares[..., [2, 0, 1]])
    assert (osrt.decode(slots + 1, ways, ways)[0] - colours).abs().max() > 1e-6


def test_weights_of_the_independent_code_find_their_places():
    """Made by its names; the shapes are the paper's, divided by 48."""
    osrt = OSRT(2, 32, 2, 3, 16, 5, 4, mixers=2)
    state = stir(osrt).state_dict()
    encoder, decoder = {}, {}
    for i in range(6):
        encoder[f"srt_encoder.conv_blocks.{i // 2}.layers.{i % 2 * 2}.weight"] = state[f"convolutions.{2 * i}.weight"]
    pairs = [(f"{s}.{i}", encoder if s == "layers" else decoder, s) for s, n in (("layers", 5), ("mixing", 2)) for i in
             range(n)]  # fmt: skip
    for name, to, kind in pairs:
        at = ("srt_encoder" if kind == "layers" else "allocation_transformer") + f".transformer.{name}".replace(
            "mixing", "layers")  # fmt: skip
        for x in ("weight", "bias"):
            for old, new in (("0.norm", "norm1"), ("1.norm", "norm2"), ("0.fn.to_out.0", "attention.out"),
                             ("1.fn.net.0", "mlp.0"), ("1.fn.net.3", "mlp.2")):  # fmt: skip
                to[f"{at}.{old}.{x}"] = state[f"{name}.{new}.{x}"]
        q, kv = (state[f"{name}.attention.to_{x}.weight"] for x in ("q", "kv"))
        if kind == "layers":
            to[f"{at}.0.fn.to_qkv.weight"] = torch.cat([q, kv])
        else:
            to |= {f"{at}.0.fn.to_q.weight": q, f"{at}.0.fn.to_kv.weight": kv}
    renamed = {"first": "initial_slots", "norm_tokens": "norm_input", "norm_mlp": "norm_pre_mlp"}
    for name, x in state.items():
        first, _, rest = name.partition(".")
        if first == "slot_attention":
            head = rest.split(".")[0]
            encoder[f"slot_attention.{rest.replace(head, renamed.get(head, head), 1)}"] = x
        elif first in ("patch", "query", "colour", "to_q", "to_k"):
            old = {"patch": "srt_encoder.per_patch_linear", "query": "allocation_transformer.input_mlp",
                   "colour": "render_mlp.net"}.get(first, f"mixing_block.{first}")  # fmt: skip
            (encoder if first == "patch" else decoder)[f"{old}.{rest}"] = x
    found = from_stelzner(encoder, decoder)
    assert found.keys() == state.keys() and all(torch.equal(found[name], x) for name, x in state.items())


# The network


def test_slots_are_a_set_and_views_are_one(net):
    (z, logsnr), told = noisy(), heard()
    out = net(z, logsnr, told)
    order = torch.tensor([2, 0, 3, 1])
    assert_close(net(z, logsnr, (told[0][:, order], *told[1:])), out)
    views = torch.tensor([1, 2, 0])
    moved = (*told[:2], told[2][:, views], told[3][:, views])
    assert_close(net(z[:, views], logsnr, moved), out[:, views])
    assert_close(net(z[1:], logsnr[1:], tuple(x[1:] for x in told)), out[1:])
    assert net(z[:, :1], logsnr[:, :1], (*told[:2], told[2][:, :1], told[3][:, :1])).shape == (2, 1, 3, 8, 8)


def test_everything_told_is_heard(net):
    (z, logsnr), (values, there, poses, focal) = noisy(), heard()
    out = net(z, logsnr, (values, there, poses, focal))
    closer = poses.clone()
    closer[:, :, 0, 3] += 0.1
    for told in ((values + torch.eye(5)[0], there, poses, focal), (values, there, closer, focal),
                 (values, there, poses, 2 * focal)):  # fmt: skip
        assert (net(z, logsnr, told) - out).abs().max() > 1e-5
    other = z.clone()
    other[:, 2] += 1
    assert (net(other, logsnr, (values, there, poses, focal)) - out)[:, :2].abs().max() > 1e-5, "views see each other"
    alone = stir(ViewUNet(**NET, across=False).double())
    assert_close(alone(other, logsnr, (values, there, poses, focal))[:, :2], alone(
        z, logsnr, (values, there, poses, focal))[:, :2])  # fmt: skip


def test_a_slot_that_is_not_there_is_as_one_removed_on_both_ways(net):
    (z, logsnr), (values, there, poses, focal) = noisy(), heard()
    masked = there.clone()
    masked[:, 1] = False
    wild = values.clone()
    wild[:, 1] = 1e3
    kept = [0, 2, 3]
    out = net(z, logsnr, (wild, masked, poses, focal))
    assert_close(out, net(z, logsnr, (values[:, kept], there[:, kept], poses, focal)))
    assert (out - net(z, logsnr, (values, there, poses, focal))).abs().max() > 1e-5
    assert_close(net._mean(values, masked), values[:, kept].mean(1))
    none = net(z, logsnr, (values, torch.zeros_like(there), poses, focal))
    assert_close(none, net(z, logsnr, (wild[:, :1], torch.zeros_like(there[:, :1]), poses, focal)))


def test_a_new_network_is_a_plain_one_of_single_pictures():
    torch.manual_seed(0)
    net = ViewUNet(**NET).double()
    (z, logsnr), told = noisy(), heard()
    assert not net(z, logsnr, told).any()
    torch.nn.init.normal_(net.leave[-1].weight)
    out = net(z, logsnr, told)
    assert out.abs().max() > 0
    other = heard(slots=2)
    assert_close(net(z, logsnr, (other[0] + 1, other[1], other[2].flip(1), 2 * other[3])), out, rtol=0, atol=0)
    assert_close(net(z[:, 1:2], logsnr[:, :1], (*told[:2], told[2][:, :1], told[3][:, :1])), out[:, 1:2])
    net(z, logsnr, told).square().sum().backward()
    silent = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [n for n in silent if ".out." in n or "ray_map" in n], "what is zero learns at once"


def test_as_many_cameras_as_views(net):
    (z, logsnr), told = noisy(), heard(views=2)
    with pytest.raises(BadInput, match="give one for each"):
        net(z, logsnr, told)
    for change in ({"size": 9}, {"head_dim": 3}):
        with pytest.raises(BadInput):
            ViewUNet(**{**NET, **change})
    with pytest.raises(BadInput, match="heads"):
        OSRT(tokens=10, heads=3)


# Slots


def test_slots_are_left_out_and_taken_over():
    slots = Slots.of([torch.ones(2, 3), 2 * torch.ones(3, 3)], torch.eye(4).expand(2, 4, 4))
    assert slots.there.tolist() == [[True, True, False], [True] * 3]
    less = edit(slots, [0])
    assert less.there.tolist() == [[False, True, False], [False, True, True]] and slots.there[0, 0]
    assert edit(slots, []).there.equal(slots.there)
    donor = Slots.of([torch.arange(6.0).view(2, 3)], 2 * torch.eye(4)[None])
    more = transfer(slots, donor, [1])
    assert more.values.shape == (2, 4, 3) and more.values[:, 3].tolist() == [[3.0, 4.0, 5.0]] * 2
    assert more.there[:, 3].all() and more.frame.equal(slots.frame)
    joined = Slots.cat([slots, donor])
    assert joined.there.tolist() == [*slots.there.tolist(), [True, True, False]]
    for wrong in ([2], [-1], [7]):
        with pytest.raises(BadInput, match="its slots are 0, 1"):
            edit(slots, wrong)
    with pytest.raises(BadInput, match="its slots are 1"):
        transfer(slots, edit(donor, [0]), [0])
    with pytest.raises(BadInput, match="same encoder"):
        transfer(slots, Slots.of([torch.ones(1, 2)], torch.eye(4)[None]), [0])
    with pytest.raises(BadInput, match="as many numbers"):
        Slots.of([torch.ones(1, 2), torch.ones(1, 3)], torch.eye(4).expand(2, 4, 4))


def test_segments_of_opaque_discs_are_found_exactly():
    """Discs painted one over the other, a slot each."""
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    discs = [(8.0, 8.0, 6.0), (12.0, 12.0, 5.0), (18.0, 6.0, 4.0)]
    masks = [(x - a) ** 2 + (y - b) ** 2 < r * r for a, b, r in discs]
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])

    def painted(*kept: int) -> torch.Tensor:
        picture = torch.full((3, 24, 24), 0.5)
        for k in kept:
            picture = torch.where(masks[k], colours[k][:, None, None], picture)
        return picture

    without = torch.stack([painted(*({0, 1, 2} - {k})) for k in range(3)])
    truth = torch.full((24, 24), -1)
    for k in range(3):
        truth[masks[k]] = k
    assert segments(painted(0, 1, 2), without).equal(truth)
    assert segments(painted(0, 1, 2)[None], without[:, None]).equal(truth[None])
    assert (segments(painted(0, 1, 2), without, threshold=2.0) == -1).all()
    flat = torch.zeros(3, 5, 5)
    dot = flat.clone()
    dot[0, 2, 2] = 9.0
    assert_close(changes(flat, dot[None], 3)[0, 1:4, 1:4], torch.ones(3, 3))
    with pytest.raises(BadInput, match="odd"):
        changes(flat, dot[None], 2)


# The model


def test_views_of_a_scene_do_not_depend_on_the_worlds_frame(seeing):
    views = open_views("solids", 8)
    cameras = views.cameras(0)
    motion = torch.linalg.qr(torch.randn(3, 3, generator=rng()))[0]
    moved = torch.eye(4)
    moved[:3, :3], moved[:3, 3] = motion * torch.linalg.det(motion).sign(), torch.tensor([1.0, -2.0, 0.5])
    elsewhere = Cameras(moved @ cameras.poses, cameras.focal)
    pictures = torch.from_numpy(views.pictures(0, [0, 1])).permute(0, 3, 1, 2)[None].float() / 255
    drawn = []
    for at in (cameras, elsewhere):
        slots = seeing.encode(pictures, stacked([at.at([0, 1])]))
        assert slots.values.shape == (1, 3, 8) and slots.there.all()
        drawn.append(seeing.render(slots, at.at([2, 3]), 5))
    assert_close(drawn[0], drawn[1], rtol=0, atol=1e-4)
    assert (drawn[0] - seeing.render(slots, elsewhere.at([3, 4]), 5)).abs().max() > 1e-3


def test_cameras_that_do_not_match_pictures_are_refused(seeing, model):
    pictures, cameras = torch.rand(1, 2, 3, 8, 8, generator=rng()), open_views("solids", 8).cameras(0)
    with pytest.raises(BadInput, match="its own camera"):
        seeing.encode(pictures, stacked([cameras.at([0, 1, 2])]))
    with pytest.raises(BadInput, match="its own camera"):
        seeing.encode(pictures, cameras.at([0, 1]))
    with pytest.raises(BadInput, match=r"\[scene, view, 3, 8, 8\]"):
        seeing.encode(pictures[..., :4], stacked([cameras.at([0, 1])]))
    with pytest.raises(BadInput, match="from 0 to 1"):
        seeing.encode(pictures * 255, stacked([cameras.at([0, 1])]))
    with pytest.raises(BadInput, match="has no encoder"):
        model.encode(pictures, stacked([cameras.at([0, 1])]))
    slots, _ = scenes_of(model, 0)
    with pytest.raises(BadInput, match="cameras of 2 scenes for slots of 1"):
        model.render(slots, stacked([cameras, cameras]))
    with pytest.raises(BadInput, match="take them from where it was trained"):
        seeing.render(slots, cameras)
    with pytest.raises(BadInput, match="slots and cameras, not Labels"):
        model.told(Labels(torch.zeros(1, dtype=torch.long)))
    with pytest.raises(BadInput, match="it knows no 'a star'"):
        model.told("a star")
    with pytest.raises(BadInput, match="plain pictures"):
        model.asked_for(None, [0])


def test_what_is_asked_in_many_ways(model):
    slots, cameras = scenes_of(model, 0, 1)
    told = model.scene(slots, cameras.at([1, 2]))
    assert isinstance(told, Scene) and model.told(told) is told and len(told) == 2 and told.views == 2
    drawn = model.draw(told, [3, 4])
    assert drawn.shape == (2, 2, 3, 8, 8) and drawn.min() >= 0 and drawn.max() <= 1
    assert torch.equal(drawn, model.render(slots, cameras.at([1, 2]), [3, 4]))
    assert torch.equal(drawn, model.draw(None, [3, 4], cond=told))
    assert_close(drawn[1:], model.draw(told[1], 4), rtol=0, atol=1e-5)
    assert model.draw(slots, [3, 4]).shape == drawn.shape and model.draw(None, [3, 4, 5]).shape == (3, 2, 3, 8, 8)
    with pytest.raises(BadInput, match="not both"):
        model.draw(told, 1, cond=told)
    one, other = (model.scene(Slots.of([x], torch.eye(4)[None]), cameras.at([1, 2])) for x in
                  (torch.ones(2, 18), torch.ones(4, 18)))  # fmt: skip
    both = Scene.cat([one, other])
    assert both.slots.there.sum(1).tolist() == [2, 4] and both[1].poses.equal(other.poses) and len(both.repeat(2)) == 4


def test_guidance_drops_slots_and_keeps_cameras(model):
    slots, cameras = scenes_of(model, 0, 1)
    told = model.scene(slots, cameras.at([1, 2]))
    dropped = told.drop(torch.tensor([True, False]), model.unconditional())
    assert not dropped.slots.there[0].any() and dropped.slots.there[1].equal(told.slots.there[1])
    assert dropped.poses.equal(told.poses) and dropped.focal.equal(told.focal)
    nothing = model.draw(told.drop(torch.tensor([True, True]), model.unconditional(2)), [3, 4])
    assert_close(model.draw(told, [3, 4], cfg_scale=0.0), nothing, rtol=0, atol=1e-5)
    assert (model.draw(told, [3, 4], cfg_scale=2.0) - nothing).abs().max() > 1e-3
    path = model.scene(slots, cameras.at(range(5)))
    assert model.draw(path, [3, 4], cfg_scale=2.0).shape == (2, 5, 3, 8, 8)


def test_a_path_of_one_block_is_drawn_as_one_to_the_bit_and_longer_ones_in_blocks(model):
    slots, cameras = scenes_of(model, 0)
    five = model.scene(slots, cameras.at(range(5)))
    whole = replace(model, defaults={**model.defaults, "block": 5})
    one = replace(model, shape=(5, *model.shape[1:]), defaults={**model.defaults, "block": 9})
    assert torch.equal(whole.draw(five, 1), one.draw(five, 1))
    blocks = model.draw(five, 1)
    assert blocks.shape == (1, 5, 3, 8, 8) and (blocks - whole.draw(five, 1)).abs().max() > 1e-4
    consecutive = replace(model, defaults={**model.defaults, "order": "consecutive"})
    assert (blocks - consecutive.draw(five, 1)).abs().max() > 1e-5
    apart = torch.randn(5, 3, 8, 8, generator=rng(1)).split(2)
    drawn = [model.draw(five.at(torch.tensor(v)), 0, start=z[None], scheduler="ddim") for v, z in
             zip(([0, 1], [2, 3]), apart, strict=False)]  # fmt: skip
    start = torch.cat(apart)[None]
    together = consecutive.draw(five, 0, start=start, scheduler="ddim")
    assert_close(together[:, :4], torch.cat(drawn, 1), rtol=0, atol=1e-5)


def test_segments_by_edits_name_slots(model):
    slots, cameras = scenes_of(model, 0)
    found = model.segment_by_edit(slots, cameras.at([1, 2]), 3, which=[1, 2], threshold=0.0)
    full = model.render(slots, cameras.at([1, 2]), 3)
    without = torch.stack([model.render(edit(slots, [k]), cameras.at([1, 2]), 3) for k in (1, 2)])
    assert found.equal(segments(full, without, 0.0, 3).add(1).where(segments(full, without, 0.0, 3) >= 0, -1))
    assert {*found.unique().tolist()} <= {-1, 1, 2} and found.shape == (1, 2, 8, 8)


def test_the_encoders_own_decoder_draws_and_segments_too(seeing, model):
    views = open_views("solids", 8)
    cameras = views.cameras(0)
    pictures = torch.from_numpy(views.pictures(0, [0, 1])).permute(0, 3, 1, 2)[None].float() / 255
    slots = seeing.encode(pictures, stacked([cameras.at([0, 1])]))
    drawn, shares = seeing.regressed(slots, cameras.at([2, 3, 4]))
    assert drawn.shape == (1, 3, 3, 8, 8) and shares.shape == (1, 3, 3, 8, 8)
    assert_close(shares.sum(2), torch.ones(1, 3, 8, 8))
    origins, ways = cameras.seen_from(cameras.poses[0]).rays(8)
    colour, share = seeing.encoder.decode(slots.values, origins[None, 3:4], ways[None, 3:4, 2, 5])
    assert_close(drawn[:, 1, :, 2, 5], colour[:, 0], rtol=0, atol=1e-5)
    assert_close(shares[:, 1, :, 2, 5], share[:, 0], rtol=0, atol=1e-5)
    with pytest.raises(BadInput, match="mixes all slots"):
        seeing.regressed(edit(slots, [0]), cameras)
    with pytest.raises(BadInput, match="no encoder"):
        model.regressed(slots, cameras)


def test_saved_with_its_encoder_or_without(seeing, model, tmp_path):
    for name, made in (("with", seeing), ("without", model)):
        again = sf.load(made.save(tmp_path / name), "cpu")
        assert isinstance(again, ViewModel) and (again.encoder is None) == (name == "without")
        assert_close(again.draw(None, [1]), made.draw(None, [1]), rtol=0, atol=1e-4)
        assert again.defaults["cameras"] == made.defaults["cameras"] and "views" in again.describe()
    assert set(seeing.copy().parts()) == {"network", "encoder"}


# The recipe


class Given:
    """A denoiser whose prediction is given."""

    process, prediction = GaussianProcess(Cosine()), "v"

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, z, t, cond=None):
        self.z = z
        return self.answer


def test_the_loss_is_the_error_of_the_noise_or_of_v_with_one_time_for_all_views():
    x, eps, v = (torch.randn(2, 3, 3, 4, 4, generator=rng(i)).double() for i in range(3))
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    denoiser = Given(v)
    alpha, sigma = (c[:, None, None, None, None] for c in Given.process.alpha_sigma(t))
    loss = small(weighting="v").loss(denoiser, x, t, eps, None)
    assert_close(denoiser.z, alpha * x + sigma * eps)
    assert_close(loss, (v - (alpha * eps - sigma * x)).square().mean((1, 2, 3, 4)))
    noise = alpha * v + sigma * denoiser.z
    assert_close(small().loss(denoiser, x, t, eps, None), (noise - eps).square().mean((1, 2, 3, 4)))


def test_slots_are_left_out_at_their_rates_and_views_are_those_that_the_encoder_was_not_shown():
    recipe = small(slots="objects", label_dropout=0.25, slot_dropout=0.4)
    training = DorsalTraining(recipe, recipe.model(()), recipe.open())
    kept = training.batch(0, rng(), 400)["kept"]
    given = kept.any(1).double().mean().item()
    assert given == pytest.approx(0.75 * (1 - 0.4**5), abs=0.08)
    assert kept.double().mean().item() == pytest.approx(0.75 * 0.6, abs=0.06)
    recipe = small()
    batch = DorsalTraining(recipe, recipe.model(()), recipe.open()).batch(0, rng(), 2)
    views = recipe.open()
    others = [torch.from_numpy(views.pictures(i, range(2, 10))).permute(0, 3, 1, 2) / 127.5 - 1 for i in range(3)]
    for x in batch["x"].flatten(0, 1):
        assert min((x - o).abs().amax((1, 2, 3)).min() for o in others) < 1e-5
    assert batch["shown"].shape == (2, 2, 3, 8, 8) and batch["x"].shape == (2, 2, 3, 8, 8)


def test_rays_of_the_first_stage_carry_the_colours_of_their_pixels():
    """A decoder that knows the world would make no error: rays and colours belong together."""
    recipe = small()
    training = OSRTTraining(recipe.encoder(), recipe.open(), 2, 3, 40)
    batch = training.batch(0, rng(), 3)
    assert batch["colours"].shape == batch["ray_origins"].shape == batch["ray_directions"].shape == (3, 40, 3)
    views = recipe.open()
    known = {}
    for i in range(3):
        cameras = views.cameras(i).seen_from(views.cameras(i).poses[0])
        pictures = torch.from_numpy(views.pictures(i, range(2, 10))).float() / 255
        _, ways = cameras.at(range(2, 10)).rays(8)
        for way, colour in zip(ways.reshape(-1, 3), pictures.reshape(-1, 3), strict=True):
            known[tuple(round(float(w), 4) for w in way)] = colour
    for way, colour in zip(batch["ray_directions"].flatten(0, 1), batch["colours"].flatten(0, 1), strict=True):
        assert_close(known[tuple(round(float(w), 4) for w in way)], colour)
    loss, _ = training.loss(batch, rng())
    loss.backward()
    assert all(p.grad is not None for p in training.network.parameters())


def test_the_second_stage_leaves_the_encoder_as_it_is(seeing):
    recipe = small()
    model = recipe.model(())
    model.encoder.requires_grad_(False)
    training = DorsalTraining(recipe, model, recipe.open())
    torch.nn.init.normal_(model.network.leave[-1].weight)
    training.loss(training.batch(0, rng(), 2), rng())[0].backward()
    assert all(p.grad is None for p in model.encoder.parameters()) and set(training.modules()) == {"network"}
    assert model.network.enter.weight.grad.any()


def test_the_loss_falls():
    """40 updates on one scene."""
    recipe = small(slots="objects", pictures=1, weighting="v", label_dropout=0.0)
    torch.manual_seed(0)
    model = recipe.model(())
    training = DorsalTraining(recipe, model, recipe.open())
    optimizer, losses = torch.optim.Adam(model.network.parameters(), lr=5e-3), []
    for i in range(40):
        loss = training.loss(training.batch(i, rng(i), 8), rng(i))[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_mixed_precision_trains(seeing):
    recipe = small()
    model = recipe.model(())
    model.encoder.requires_grad_(False)
    training = DorsalTraining(recipe, model, recipe.open())
    batch = training.batch(0, rng(), 2)
    plain = training.loss(batch, rng())[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(training.loss(batch, rng())[0], plain, rtol=0.05, atol=0, check_dtype=False)


def test_settings_and_data_that_cannot_be(tmp_path):
    with pytest.raises(BadInput, match="osrt_heads"):
        small(osrt_heads=3)
    folder = tmp_path / "scene"
    folder.mkdir()
    poses = open_views("solids", 8).cameras(0).poses.tolist()
    for i in range(4):
        Image.new("RGB", (8, 8)).save(folder / f"{i}.png")
    frames = [{"file_path": f"{i}.png", "transform_matrix": poses[i]} for i in range(4)]
    (folder / "transforms.json").write_text(json.dumps({"camera_angle_x": 0.8, "frames": frames}))
    with pytest.raises(BadInput, match="--slots osrt"):
        small(data=str(tmp_path), slots="objects").run(tmp_path / "run", progress=False)
    with pytest.raises(BadInput, match="4 views: 5 are needed"):
        small(data=str(tmp_path), inputs=3).run(tmp_path / "run", progress=False)
    assert small(data=str(tmp_path)).plan().seconds > 0


def test_pictures_to_look_at_are_true_and_drawn_views():
    recipe = small(slots="objects")
    shown = recipe.grid(recipe.model(()), recipe.open(), rng(), 8)
    assert shown.shape == (8, 3, 8, 8) and shown.min() >= 0 and shown.max() <= 1


@pytest.mark.parametrize("name", Dorsal.presets)
def test_presets_are_whole(name):
    recipe = Dorsal(**Dorsal.presets[name])
    with torch.device("meta"):
        net = recipe.network(0)
        encoder = recipe.encoder()
    assert net.config["slot_width"] == (18 if encoder is None else encoder.config["width"])
    count = sum(p.numel() for p in net.parameters())
    least, most = {"msn-hard": (5e7, 1e10), "tiny": (3e5, 6e5)}.get(name, (1e6, 4e6))
    assert least < count < most


# The command and the ledger


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dorsal") / "model"
    config = {"data": "solids", "seed": 0, "inputs": 2}
    return model.save(folder, provenance={"recipe": "train dorsal", "config": config})


def drawn_by_command(saved, out, *flags):
    words = ["views", "--model", str(saved), "--out", str(out), "--device", "cpu", "--threshold", "0", *flags]
    return cli.main(words)


def test_views_are_an_animation_a_sheet_and_a_page(saved, model, tmp_path, capsys):
    flags = ("--frames", "3", "--remove", "1", "--donor", "2", "--take", "1", "2", "--segment", "--scene", "1")
    assert drawn_by_command(saved, tmp_path / "a", *flags) == 0
    record = json.loads((tmp_path / "a" / "views.json").read_text())
    assert record["tracks"][:3] == ["all slots", "without slot 1", "with slot 1, 2 of scene 2"]
    assert record["tracks"][-1] == "which slot it is" and record["views"] == ["0°", "120°", "240°"]
    page = (tmp_path / "a" / "index.html").read_text()
    assert page.count("data-slide") >= len(record["tracks"]) and "with slot 1, 2 of scene 2" in page
    with Image.open(tmp_path / "a" / "views.gif") as animation, Image.open(tmp_path / "a" / "sheet.png") as sheet:
        assert animation.n_frames == 3 and sheet.width == 3 * 132 + 4
        first = np.asarray(sheet)[4 : 4 + 128 : 16, 4 : 4 + 128 : 16]
    scenes = open_views("solids", 8, seed=10**6)
    slots = Slots.of([scenes.objects(1)], scenes.cameras(1).poses[:1])
    from sfumato.data.cameras import orbit

    views = model.render(slots, orbit(scenes.cameras(1), 3), 0)[0]
    assert np.abs(first / 255 - views[0].permute(1, 2, 0).numpy()).max() <= 2 / 255
    assert drawn_by_command(saved, tmp_path / "a") == 2, "never overwritten unasked"
    assert drawn_by_command(saved, tmp_path / "b", "--path", "cameras", "--frames", "2") == 0
    assert json.loads((tmp_path / "b" / "views.json").read_text())["tracks"] == ["the true pictures", "all slots"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--remove", "9"), "there is no slot 9"),
        (("--donor", "1"), "say both"),
        (("--scene", "20000"), "there is no 20000"),
        (("--data", "nowhere"), "no views at 'nowhere'"),
        (("--model", "sketch"), "no model of views"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(saved, tmp_path, capsys, flags, message):
    assert drawn_by_command(saved, tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_sample_names_the_command_of_views(saved, tmp_path, capsys):
    assert cli.main(["sample", "--model", str(saved), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "`sfumato views` draws with it" in capsys.readouterr().err


def test_true_pictures_agree_on_the_colours_of_solids():
    from sfumato.ledger.dorsal import SIZE, Seen

    scenes = open_views("solids", SIZE, seed=3)
    found = [Seen.of(scenes.world(i), scenes.cameras(i).at([1, 2, 3])) for i in range(4)]
    true = [seen.disagreement(seen.truth) for seen in found]
    mixed = [seen.disagreement(torch.stack([v.roll(k, 0) for k, v in enumerate(seen.truth)])) for seen in found]
    assert all(t < 0.3 * m for t, m in zip(true, mixed, strict=True)), "a view with its channels moved does not"


@pytest.mark.slow
def test_the_entry_runs_in_miniature():
    experiment = core.load("dorsal")
    found = experiment.found({arm: experiment.measure(9, arm, updates=2, n=2) for arm in experiment.arms})
    for method, baseline in (found[name] for name in experiment.claims):
        assert len(method) == len(baseline) == 2 and all(map(math.isfinite, [*method, *baseline]))
    assert found["views and edits"].keys() == set(experiment.arms)
