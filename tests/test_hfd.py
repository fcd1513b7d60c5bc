"""HFD: what bits cost, contexts, fixed point, bytes in another process, less noisy schedules, tiles."""

from __future__ import annotations

import math
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.testing import assert_close

import sfumato as sf
from sfumato import cli
from sfumato.errors import BadInput
from sfumato.ledger import core
from sfumato.nets import Elic, RestoringUNet
from sfumato.nets.elic import conv, deconv
from sfumato.nets.entropy import (
    CheckerboardConv2d,
    FactorisedPrior,
    bits,
    checkerboard,
    gaussian_counts,
    gaussian_likelihood,
    lower_bound,
    scale_index,
    scale_table,
    ste_round,
    tabulated,
)
from sfumato.nets.exact import VALUE, WEIGHT, exact, on_grid
from sfumato.noise import Cosine, GaussianProcess
from sfumato.pipeline import CompressionModel, Degraded
from sfumato.pipeline.bitstream import RangeReader, RangeWriter, Tally, pack, unpack
from sfumato.pipeline.compression import blended, start
from sfumato.sample import ddim
from sfumato.sample.tiles import Tiling, tiled
from sfumato.sample.times import uniform
from sfumato.train.codec import CodecRecipe, cropped, rate_distortion
from sfumato.train.hfd import HFD, HFDTraining, less_noisy, straight

coder = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("constriction"), reason="pip install 'sfumato[compress]'"
)
TINY = {"width": 4, "latent": 6, "groups": (2, 4), "context": (6, 4), "blocks": 1}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=rng(seed))


def stirred(net: nn.Module, by: float = 0.1) -> nn.Module:
    """Random weights everywhere, also where a new network has zeros."""
    generator = rng(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator).to(p.dtype))
    return net.requires_grad_(False).eval()


def codec(**changes) -> Elic:
    torch.manual_seed(0)
    made = stirred(Elic(**{**TINY, **changes}), 0.05)
    with torch.no_grad():  # latents that are worth coding
        last = [m for m in made.g_a.modules() if isinstance(m, nn.Conv2d)][-1] if not made.config.attention else None
        for layer in [last] if last is not None else [made.g_a[-2]]:
            layer.weight.mul_(20)
        for own, layers in zip(made.config.groups, made.merge if made.config.hyper else (), strict=False):
            layers[-1].bias[:own] += 2  # scales that few of them lie outside of
    made.freeze()
    return made


def picture(height: int = 50, width: int = 70, seed: int = 0) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (height // 5 + 1, width // 5 + 1, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


@pytest.fixture(scope="module")
def counts() -> torch.Tensor:
    return gaussian_counts(scale_table())


@pytest.fixture(scope="module")
def model() -> CompressionModel:
    recipe = HFD(**HFD.EXAMPLE)
    torch.manual_seed(0)
    made = recipe.model((), codec())
    stirred(made.network)
    return made


# What bits cost


def test_gaussian_likelihood_is_the_difference_of_distribution_functions():
    values, means = normal(200).mul(3).round(), normal(200, seed=1)
    scales = normal(200, seed=2).exp()
    law = torch.distributions.Normal(means, scales.clamp(min=0.11))
    expected = law.cdf(values + 0.5) - law.cdf(values - 0.5)
    assert_close(gaussian_likelihood(values, scales, means), expected.clamp(min=1e-9), rtol=1e-6, atol=1e-12)
    far = gaussian_likelihood(torch.tensor([100.0]), torch.tensor([0.01]))
    assert far == 1e-9 and bits(far[None]).item() == pytest.approx(29.9, abs=0.01)
    small = gaussian_likelihood(torch.zeros(1).double(), torch.tensor([1e-5]).double())
    assert_close(small, torch.special.erf(torch.tensor([0.5 / 0.11 / math.sqrt(2)]).double()))


def test_bounds_pass_the_gradients_that_lead_back():
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    (lower_bound(x, 0.0) * torch.tensor([1.0, 1.0])).sum().backward()
    assert x.grad.tolist() == [0, 1]  # a descent would go farther below
    x.grad = None
    (lower_bound(x, 0.0) * torch.tensor([-1.0, -1.0])).sum().backward()
    assert x.grad.tolist() == [-1, -1]


def test_rounding_passes_gradients_straight_through():
    x = torch.tensor([0.4, 1.6, -2.5], requires_grad=True)
    y = ste_round(x)
    y.square().sum().backward()
    assert y.tolist() == [0, 2, -2] and x.grad.tolist() == [0, 4, -4]


def test_the_factorised_prior_is_a_density_of_each_channel():
    torch.manual_seed(0)
    prior = stirred(FactorisedPrior(3), 0.3).double()
    x = torch.arange(-400.0, 401.0, dtype=torch.float64)
    mass = prior.likelihood(x.expand(1, 3, -1))
    assert_close(mass.sum(-1), torch.ones(1, 3).double(), rtol=1e-5, atol=1e-5)
    logits = prior.logits(x.expand(3, 1, -1))
    assert (logits.diff(dim=-1) > 0).all() and (mass[0, 0] - mass[0, 1]).abs().max() > 1e-3


def test_the_median_is_learned_and_moves_nothing_else():
    torch.manual_seed(0)
    prior = FactorisedPrior(3)
    optimizer = torch.optim.Adam([prior.median], lr=0.3)
    with torch.no_grad():
        prior.median.add_(8.0)
    for _ in range(80):
        loss = prior.median_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is None for name, p in prior.named_parameters() if name != "median")
    at = torch.sigmoid(prior.logits(prior.median.detach()[:, None, None]))
    assert (at - 0.5).abs().max() < 0.03


def test_the_table_of_scales_and_the_first_entry_that_is_no_smaller():
    table = scale_table()
    assert len(table) == 64 and table[0].item() == pytest.approx(0.11) and table[-1].item() == pytest.approx(256)
    assert_close(table[1:] / table[:-1], (table[1] / table[0]).expand(63))
    scales = torch.tensor([-1.0, 0.0, 0.11, 0.12, float(table[7]), 255.0, 256.0, 1e6]).double()
    expected = [next((i for i, s in enumerate(table) if s >= x), 63) for x in scales]
    assert scale_index(scales, table).tolist() == expected


@given(st.integers(1, 40), st.integers(0, 2**31))
@settings(deadline=None, max_examples=20)
def test_tables_are_whole_numbers_that_sum_to_a_power_of_two(n, seed):
    mass = torch.rand(2, n, generator=rng(seed), dtype=torch.float64) ** 8
    mass = mass / mass.sum(1, keepdim=True) * torch.rand(2, 1, generator=rng(seed), dtype=torch.float64)
    counts = tabulated(mass)
    assert counts.sum(1).tolist() == [2**24, 2**24] and counts.min() >= 1 and counts.dtype == torch.int32
    assert (counts[:, :-1].double() / 2**24 - mass).abs().max() < 1e-5


# Contexts


def test_the_second_pass_sees_the_first_and_nothing_of_its_own_colour():
    layer = CheckerboardConv2d(2, 3, 5, padding=2).double()
    x = normal(1, 2, 6, 8).requires_grad_()
    first = checkerboard(6, 8)
    for where, seen in ((first, ~first), (~first, first)):
        (gradient,) = torch.autograd.grad((layer(x) * where).sum(), x)
        assert not gradient[:, :, ~seen].any() and gradient[:, :, seen].all()
    assert first[0, 0] and not first[0, 1] and not first[1, 0]


@pytest.mark.parametrize("k", [0, 1])
def test_what_is_told_of_a_value_depends_on_what_came_before_it_alone(k):
    """Group by group, and pass by pass: changing a value changes no mean that was used before it was known."""
    net = codec().double()
    z = normal(1, 4, 2, 2)
    order: list[tuple[slice, torch.Tensor, torch.Tensor]] = []

    def run(y):
        order.clear()

        def choose(own, where, scales, means):
            order.append((own, where, (means * where).clone()))
            return y[:, own] * where

        net.walk(z, choose, lambda layer, x: layer(x))
        return [told for *_, told in order]

    y = normal(1, 6, 8, 8)
    before = run(y)
    assert [own for own, *_ in order] == [slice(0, 2), slice(0, 2), slice(2, 6), slice(2, 6)]
    for step, (own, where, _) in enumerate(list(order)):
        if step % 2 != k:
            continue
        changed = y.clone()
        changed[:, own] += 5 * where
        same = [torch.equal(a, b) for a, b in zip(before, run(changed), strict=True)]
        assert same == [i <= step for i in range(4)]


def test_bits_with_noise_are_differentiable_and_reach_every_parameter():
    torch.manual_seed(0)
    net = Elic(**TINY)
    x = torch.rand(1, 3, 64, 64, generator=rng()) * 2 - 1
    noise = [torch.rand(shape, generator=rng()) - 0.5 for shape in net.latent_shapes(1, 64, 64)]
    x_hat, cost = net(x, noise)
    assert x_hat.shape == x.shape and cost.shape == (1,) and cost > 0
    (cost.sum() / 1000 + (x_hat - x).square().mean() + net.prior.median_loss()).backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None]


def test_bits_are_counted_in_full_precision_whatever_the_networks_compute_in():
    net, x = codec(), tensor(picture(64, 64))
    y = net.g_a(x)
    with torch.autocast("cpu", torch.bfloat16):
        cost, same = net.rounded(y)[1], net.reconstruct(x)
    assert cost.dtype == torch.float32 and cost.item() == pytest.approx(net.rounded(y)[1].item(), rel=0.05)
    assert torch.equal(same, net.reconstruct(x))


def test_groups_have_to_sum_to_the_latents():
    with pytest.raises(BadInput, match="sum to 6 channels"):
        Elic(**{**TINY, "latent": 7})


# Fixed point


@pytest.mark.parametrize("transposed", [False, True])
def test_fixed_point_is_arithmetic_of_whole_numbers(transposed):
    """Against sums of Python's integers, so that no float is in the reference at all."""
    torch.manual_seed(0)
    layer = (deconv(3, 2, 5, 2) if transposed else conv(3, 2, 5, 2)).requires_grad_(False)
    x = on_grid(30 * normal(1, 3, 6, 6))
    found = exact(nn.Sequential(layer, nn.ReLU()), x)
    whole = lambda t, step: (t.double() * step).round().long()
    weight, values = whole(layer.weight, WEIGHT), whole(x, VALUE)
    if transposed:  # the same as a convolution of what is spread out, with the kernel turned round
        spread = torch.zeros(1, 3, 16, 16, dtype=torch.long)
        spread[..., 2:14:2, 2:14:2] = values
        values, weight, stride = spread, weight.flip(2, 3).transpose(0, 1), 1
    else:
        values, stride = nn.functional.pad(values, (2, 2, 2, 2)), 2
    bias = whole(layer.bias, WEIGHT * VALUE).tolist()
    for o in range(2):
        for r in range(found.shape[2]):
            for c in range(found.shape[3]):
                cut = values[0, :, r * stride : r * stride + 5, c * stride : c * stride + 5]
                total = sum(a * b for a, b in zip(cut.flatten().tolist(), weight[o].flatten().tolist(), strict=True))
                total += bias[o]
                quotient, rest = divmod(total, int(WEIGHT))
                half = int(WEIGHT) // 2
                quotient += rest > half or (rest == half and quotient % 2 == 1)
                assert found[0, o, r, c].item() == max(0, quotient) / VALUE


def test_fixed_point_does_not_depend_on_the_order_of_summation():
    torch.manual_seed(0)
    layer = conv(64, 5, 5).requires_grad_(False)
    x, order = 100 * normal(1, 64, 9, 9), torch.randperm(64, generator=rng())
    other = conv(64, 5, 5).requires_grad_(False)
    other.weight.copy_(layer.weight[:, order])
    other.bias.copy_(layer.bias)
    assert torch.equal(exact(layer, x), exact(other, x[:, order]))
    with pytest.raises(ValueError, match="not exact"):
        exact(conv(2000, 1, 5), torch.zeros(1, 2000, 1, 1))


# Bytes


@coder
@pytest.mark.parametrize("row", [0, 20, 40, 63])
def test_bytes_are_as_many_as_the_tables_say(row, counts):
    """Of values drawn from the model: to the coder's own words; and within 1 % of what the likelihood says."""
    scale = float(scale_table()[row])
    values = (scale * normal(20_000)).round().long()
    rows = torch.full_like(values, row)
    tally, writer = Tally(), RangeWriter()
    for one in (tally, writer):
        one.code(values, rows, counts)
    assert -1 < 8 * len(writer.payload()) - tally.bits < 66
    ideal = bits(gaussian_likelihood(values.double(), torch.full((1,), scale).double())[None]).item()
    assert tally.bits == pytest.approx(ideal, rel=0.01, abs=64)


@coder
def test_what_is_rare_costs_what_its_count_says(counts):
    """The smallest count there is, 24 bits a time, to less than a hundredth of a bit."""
    half = int((counts[40] > 0).sum()) // 2 - 1
    assert counts[40, 0] == 1
    values, rows = torch.full((2000,), -half), torch.full((2000,), 40)
    writer = RangeWriter()
    writer.code(values, rows, counts)
    assert -1 < 8 * len(writer.payload()) - 24 * 2000 < 66


@coder
def test_numbers_come_back_and_outliers_too(counts):
    rows = torch.randint(64, (3000,), generator=rng())
    values = (2 * scale_table()[rows] * normal(3000)).round().long().clamp(-4096, 4096)
    values[:4] = torch.tensor([4096, -4096, 1000, -1])
    writer = RangeWriter()
    writer.code(values, rows, counts)
    assert torch.equal(RangeReader(writer.payload()).code(None, rows, counts), values)


@coder
@pytest.mark.parametrize("changes", [{}, {"hyper": False}, {"attention": False, "blocks": 0}])
def test_latents_come_back_exactly_as_they_were_rounded(changes):
    net = codec(**changes)
    y = net.g_a(tensor(picture(64, 128)))
    writer, tally = RangeWriter(), Tally()
    sent = net.coded(writer, 64, 128, y)
    assert torch.equal(net.coded(tally, 64, 128, y), sent)
    assert torch.equal(net.coded(RangeReader(writer.payload()), 64, 128), sent)
    assert (sent - y).abs().max() <= 0.5 + 1e-6 and sent.unique().numel() > 10
    assert -1 < 8 * len(writer.payload()) - tally.bits < 66
    _, ideal = net.rounded(y)  # in floating point, and for scales that are in no table
    assert tally.bits == pytest.approx(ideal.item(), rel=0.05)


def test_a_codec_without_tables_is_refused():
    with pytest.raises(BadInput, match="no tables yet"):
        Elic(**TINY).coded(Tally(), 64, 64, torch.zeros(1, 6, 4, 4))


@coder
@pytest.mark.parametrize("size", [(1, 1), (64, 64), (50, 131)])
def test_pictures_of_any_size_come_back(model, size):
    given = picture(*size)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        data = model.compress(given)
    assert ["one hyper-latent" in str(w.message) for w in told] == [True] * (max(size) > 64)
    drawn = model.decompress(data, seed=3)
    assert drawn.shape == (3, *size) and 0 <= drawn.min() <= drawn.max() <= 1
    assert torch.equal(drawn, model.decompress(data, seed=3))
    assert not torch.equal(drawn, model.decompress(data, seed=4))
    assert -1 < 8 * (len(data) - 4 - 4 - 4) - model.bits(given) < 66 + 8 * 6


@coder
def test_without_realism_the_picture_is_the_codecs(model):
    """And the codec's without bytes: they differ where fixed point rounds a latent the other way."""
    given = picture()
    mse = model.decompress(model.compress(given), realism=0)
    assert_close(mse, model.reconstruct(tensor(given))[0] / 2 + 0.5, rtol=0, atol=0.05)
    drawn = model.decompress(model.compress(given), realism=1)
    half = model.decompress(model.compress(given), realism=0.5)
    assert_close(half, (mse + drawn) / 2)


@coder
def test_the_bytes_are_read_by_the_model_that_was_saved_on_other_threads(model, tmp_path):
    model.save(tmp_path / "model")
    data, threads = model.compress(picture(70, 66)), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 2)
        found = sf.load(tmp_path / "model", "cpu").decode_mse(data)
    finally:
        torch.set_num_threads(threads)
    assert_close(found, model.decode_mse(data), rtol=0, atol=1e-5)


@coder
@pytest.mark.slow
def test_the_bytes_are_read_in_another_process_on_another_number_of_threads(model, tmp_path):
    model.save(tmp_path / "model")
    given = picture(70, 66)
    (tmp_path / "bytes").write_bytes(model.compress(given))
    code = f"""
import torch, sfumato as sf
torch.set_num_threads(3)
model = sf.load({str(tmp_path / "model")!r}, "cpu")
data = open({str(tmp_path / "bytes")!r}, "rb").read()
torch.save({{"mse": model.decode_mse(data), "x": model.decompress(data)}}, {str(tmp_path / "found.pt")!r})
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(sf.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=600)
    found = torch.load(tmp_path / "found.pt")
    data = model.compress(given)
    assert_close(found["mse"], model.decode_mse(data), rtol=0, atol=1e-5)
    assert_close(found["x"], model.decompress(data), rtol=0, atol=1e-3)


@coder
def test_streams_that_are_foreign_cut_off_or_damaged_are_refused(model):
    data = model.compress(picture())
    refused = {
        b"": "is no picture that", b"\x89PNG\r\n": "is no picture that", data[:3]: "is no picture that",
        data[:6]: "cut off", data[:10]: "cut off", data[:20]: "cut off", data[:-1]: "cut off",
        data + b"\0": "1 bytes behind its end", data[:4] + b"\0\0\0\0" + data[8:]: "written with another model",
    }  # fmt: skip
    for broken, told in refused.items():
        with pytest.raises(BadInput, match=told):
            model.decompress(broken)
    own = model.hash4()
    for at in range(8, len(data)):
        with pytest.raises(BadInput, match=r"damaged|cut off|behind its end"):
            unpack(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], own)


@coder
def test_a_forged_stream_is_a_sentence_and_no_crash(model):
    forged = pack(b"\xff" * 8, 2**20, 2**20, model.hash4())
    with pytest.raises(BadInput, match="memory"):
        model.decompress(forged)
    for payload in (b"", b"\xff" * 8):  # arithmetic coding gives a picture of most noise; or it is refused
        try:
            assert model.decompress(pack(payload, 64, 64, model.hash4()), realism=0).shape == (3, 64, 64)
        except BadInput as error:
            assert "cannot be read as a compressed picture" in str(error)


@given(st.integers(1, 2**28), st.integers(1, 2**28), st.binary(max_size=40).map(lambda b: b[: len(b) // 4 * 4]))
def test_the_header_holds_any_size(height, width, payload):
    assert unpack(pack(payload, height, width, b"abcd"), b"abcd") == (height, width, payload)


# Less noise, losses, blends


@given(st.floats(0.01, 0.99), st.floats(-2, 6))
def test_the_schedule_is_the_cosine_with_less_noise(t, shift):
    found = less_noisy(shift).logsnr(t).item()
    expected = -2 * (math.log(math.tan(math.pi * t / 2)) + math.log(math.exp(-shift / 2)))
    assert found == pytest.approx(max(-15, min(15, expected)), abs=1e-9)
    assert straight(shift).logsnr(t).item() == pytest.approx(2 * math.log((1 - t) / t) + shift, abs=1e-9)


def test_no_shift_is_the_cosine_and_every_one_begins_with_noise():
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    assert_close(less_noisy(0.0).logsnr(t), Cosine(-math.inf, math.inf).logsnr(t), rtol=1e-9, atol=1e-9)
    assert [less_noisy(s).logsnr(1.0).item() for s in (0, 2, 6)] == [-15, -15, -15]
    assert HFD(**HFD.EXAMPLE).process().schedule == less_noisy(2.0)
    assert HFD(**{**HFD.EXAMPLE, "decoder": "flow"}).process().schedule == straight(0.0)


def test_where_signal_is_left_sampling_begins_at_the_blurred_picture():
    x, eps, t = normal(1, 3, 4, 4), normal(1, 3, 4, 4, seed=1), torch.tensor(1.0)
    noisy, clean = GaussianProcess(Cosine(-15, 15)), GaussianProcess(Cosine(-4, 15))
    assert_close(start(noisy, x, eps, t), noisy.alpha_sigma(t)[1] * eps)
    assert_close(start(clean, x, eps, t), clean.diffuse(x, t, eps))


@pytest.mark.parametrize("decoder", ["diffusion", "flow"])
def test_the_losses_are_the_papers(decoder):
    recipe = HFD(**{**HFD.EXAMPLE, "decoder": decoder})
    x, eps, t = normal(3, 3, 4, 4), normal(3, 3, 4, 4, seed=1), torch.tensor([0.2, 0.5, 0.9]).double()
    answer = normal(3, 3, 4, 4, seed=2)
    denoiser = lambda z, t, cond: answer
    denoiser.process, denoiser.prediction = recipe.process(), recipe.prediction
    alpha, sigma = denoiser.process.alpha_sigma(t, x)
    z = alpha * x + sigma * eps
    if decoder == "diffusion":
        expected = (eps - (sigma * z + alpha * answer)).square()
    else:
        assert_close(alpha, (1 - t).view(-1, 1, 1, 1))
        expected = (eps - x - answer).square()
    assert_close(recipe.loss(denoiser, x, t, eps, None), expected.mean((1, 2, 3)))


def test_rate_and_distortion():
    x = torch.zeros(2, 3, 4, 4)
    assert_close(rate_distortion(torch.tensor([0.3, 0.5]), x, x + 0.2, 0.01), torch.tensor([0.3, 0.5]) + 6.5025)


def test_a_picture_drawn_given_the_bits_has_twice_the_error_and_a_blend_one_plus_beta_squared():
    """x normal, rounded to a scalar's cells; x' is another one of the same cell: 3.01 dB."""
    x = torch.randn(400_000, generator=rng(), dtype=torch.float64)
    step = 1.0
    cell = (x / step).round()
    low, high = (torch.special.ndtr((cell + side / 2) * step) for side in (-1, 1))
    again = torch.special.ndtri(low + (high - low) * torch.rand(x.shape, generator=rng(1), dtype=torch.float64))
    density = lambda at: torch.exp(-at.square() / 2) / math.sqrt(2 * math.pi)
    mean = (density((cell - 0.5) * step) - density((cell + 0.5) * step)) / (high - low)
    least = (x - mean).square().mean()
    for beta in (0.0, 0.5, 1.0):
        ratio = (x - blended(mean, again, beta)).square().mean() / least
        assert ratio.item() == pytest.approx(1 + beta**2, abs=0.01)


def test_a_flow_with_the_true_velocity_is_there_in_one_step():
    x, eps = normal(1, 3, 8, 8).clamp(-1, 1), normal(1, 3, 8, 8, seed=1)
    denoiser = lambda z, t, cond=None: eps - x
    denoiser.process, denoiser.prediction = GaussianProcess(straight(0.0)), "flow"
    assert_close(ddim(denoiser, eps, uniform(1)), x)


# The network, tiles


def test_the_network_is_local_and_takes_any_size():
    net = stirred(RestoringUNet(3, (4, 8), (1, 1), 8)).double()
    z, told, logsnr = normal(1, 3, 64, 96), normal(1, 3, 64, 96, seed=1), torch.zeros(1).double()
    whole, reach = net(z, logsnr, told), net.reach
    assert reach < 24
    tile = net(z[..., 8:64, 16:80], logsnr, told[..., 8:64, 16:80])
    inside = slice(reach, -reach)
    inner = whole[..., 8 + reach : 64 - reach, 16 + reach : 80 - reach]
    assert_close(tile[..., inside, inside], inner, rtol=1e-10, atol=1e-10)
    moved = told.clone()
    moved[..., 32, 48] += 1
    changed = (net(z, logsnr, moved) - whole).abs().amax((0, 1)) > 0
    rows, columns = changed.nonzero().T
    assert 0 < (rows - 32).abs().max() <= reach and 0 < (columns - 48).abs().max() <= reach


def test_what_is_drawn_depends_on_the_blurred_picture(model):
    told = torch.zeros(1, 3, 64, 64, requires_grad=True)
    model.denoiser(torch.zeros(1, 3, 64, 64), 0.5, Degraded(told)).sum().backward()
    assert told.grad.abs().sum() > 0


@given(st.integers(1, 200), st.integers(1, 200), st.sampled_from([(16, 4), (16, 8), (32, 4)]))
@settings(deadline=None, max_examples=30)
def test_tiles_cover_everything_and_those_of_a_colour_do_not_touch(height, width, sides):
    tiling = Tiling(*sides)
    height, width = tiling.padded(height), tiling.padded(width)
    covered = torch.zeros(height, width)
    for group in tiling.groups(height, width):
        own = torch.zeros(height, width)
        for r, c in group:
            assert r + tiling.side <= height and c + tiling.side <= width
            own[r : r + tiling.side, c : c + tiling.side] += 1
        assert own.max() == 1
        covered += own
    assert covered.min() >= 1
    with pytest.raises(BadInput, match="overlap"):
        Tiling(16, 9)


def test_tiles_of_an_oracle_make_the_whole():
    """Where the clean picture is known, tiles with known pixels put back at every step give it, whatever the noise."""
    x = normal(1, 3, 40, 28).clamp(-1, 1)
    tiling, process = Tiling(16, 4), GaussianProcess(straight(0.0))
    assert (tiling.padded(40), tiling.padded(28)) == (40, 28)

    def oracle(cut):
        denoiser = lambda z, t, cond=None: cut
        denoiser.process, denoiser.prediction = process, "x0"
        return denoiser

    eps, times = normal(1, 3, 40, 28, seed=1), uniform(4)
    z = process.alpha_sigma(times[0])[1] * eps
    assert_close(tiled(ddim, oracle, x, z, eps, times, tiling, batch=2), x, rtol=1e-6, atol=1e-6)


def test_later_tiles_are_given_what_is_finished():
    """At the step's noise: alpha done + sigma eps, inside the overlap; and their own noise elsewhere."""
    process, tiling, seen = GaussianProcess(straight(0.0)), Tiling(8, 2), []
    eps = normal(1, 1, 8, 14)

    def make(cut):
        def denoiser(z, t, cond=None):
            seen.append((float(t), z.clone()))
            return torch.full_like(z, 0.5)

        denoiser.process, denoiser.prediction = process, "x0"
        return denoiser

    times = uniform(3)
    start_ = process.alpha_sigma(times[0])[1] * eps
    tiled(ddim, make, torch.zeros(1, 1, 8, 14).double(), start_, eps, times, tiling)
    assert len(seen) == 6
    for t, z in seen[3:]:
        due = process.diffuse(torch.full((1, 1, 8, 2), 0.5).double(), t, eps[..., 6:8])
        assert_close(z[..., :2], due)


def test_tiles_of_a_model(model):
    x = torch.zeros(1, 3, 100, 70)
    drawn = model.restore(x, [0], sampling_steps=2, tile=64, overlap=16)
    assert drawn.shape == x.shape and torch.equal(drawn, model.restore(x, [0], sampling_steps=2, tile=64, overlap=16))
    assert torch.equal(model.restore(x, [0], tile=128), model.restore(x, [0]))
    for tile in (63, 2, 3, 0):
        with pytest.raises(BadInput, match=f"tile must be a multiple of 2, at least 4, not {tile}"):
            model.restore(x, [0], tile=tile)
    with pytest.raises(BadInput, match="overlap must be a multiple of 2, not 3"):
        model.restore(x, [0], tile=64, overlap=3)
    small = torch.zeros(1, 3, 20, 9)  # a quarter of 12 is no multiple of 2
    drawn = model.restore(small, [0], sampling_steps=2, tile=12)
    assert torch.equal(drawn, model.restore(small, [0], sampling_steps=2, tile=12, overlap=2))
    with pytest.raises(BadInput, match="one each"):
        model.restore(x, [0, 1])


@pytest.mark.parametrize(("tile", "total"), [(None, 4), (64, 16), (36, 16)])
def test_every_step_of_the_drawing_is_counted(model, monkeypatch, tile, total):
    seen = []
    monkeypatch.setattr("sfumato.progress.listener", lambda *told: seen.append(told))
    model.restore(torch.zeros(2, 3, 100, 70), [0, 1], sampling_steps=2, tile=tile, progress=True)
    assert seen == [("drawing", i, total) for i in range(total + 1)]


# Training


def test_the_decoder_is_shown_the_rounded_picture_clipped(model, monkeypatch):
    """The trap of the paper's kind: noisy latents at training would be another blur than the one that is decoded."""
    recipe = HFD(**HFD.EXAMPLE)
    training = HFDTraining(recipe, model, recipe.open())
    batch = training.batch(0, rng(), 2)
    shown = []
    monkeypatch.setattr(HFD, "loss", lambda self, d, x, t, eps, cond: (shown.append(cond.pictures), x.sum())[1])
    training.loss(batch, rng())
    y_hat, _ = model.codec.rounded(model.codec.g_a(batch["x"]))
    assert_close(shown[0], model.codec.g_s(y_hat).clamp(-1, 1))


def test_a_codec_learns_a_picture():
    """Bits and squared error together fall, from noisy latents and straight-through rounding."""
    recipe = HFD(**{**HFD.EXAMPLE, "codec_attention": False, "codec_width": 8, "lam": 0.02})
    torch.manual_seed(0)
    training = CodecRecipe(recipe.codec(), recipe.open(), 64, recipe.lam)
    optimizer = torch.optim.Adam(training.codec.parameters(), lr=5e-3)
    batch, losses = training.batch(0, rng(), 1), []
    for step in range(30):
        loss, _ = training.loss(batch, rng(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_squares_with_one_hyper_latent_are_warned_of(tmp_path):
    """What neighbours say of each other is not learned from them."""
    recipe = HFD(**{**HFD.EXAMPLE, "size": 128, "crop": 64, "updates": 1, "codec_updates": 1})
    with pytest.warns(UserWarning, match="one hyper-latent.* --crop 128 or more"):
        recipe.run(tmp_path, progress=False)
    assert HFD.presets["tiny-photos"]["crop"] >= 128


def test_crops_are_squares_from_anywhere():
    recipe = HFD(**{**HFD.EXAMPLE, "size": 80, "crop": 64})
    pictures = recipe.open()
    whole = cropped(pictures, [0] * 12, None, rng())
    found = cropped(pictures, [0] * 12, 64, rng())
    places = set()
    for one in found:
        here = [(r, c) for r in range(17) for c in range(17) if torch.equal(whole[0, :, r : r + 64, c : c + 64], one)]
        assert here
        places.add(here[0])
    assert len(places) > 3 and recipe.model(()).shape == (3, 64, 64)


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"size": 96}, "multiple of 64"), ({"crop": 128}, "cannot be larger"), ({"lam": 0.0}, "lam"),
     ({"decoder": "gan"}, "decoder"), ({"blocks": (1,)}, "number of blocks a level"), ({"shift": 2000.0}, "shift"),
     ({"size": 40, "hyper": False}, "multiple of 16")],
)  # fmt: skip
def test_settings_that_cannot_be(changes, told):
    with pytest.raises(BadInput, match=told):
        HFD(**{**HFD.EXAMPLE, **changes})


def test_the_published_sizes():
    with torch.device("meta"):
        net = Elic()
    count = lambda part: sum(p.numel() for p in part.parameters())
    assert net.factor == 64 and net.config.groups == (16, 16, 32, 64, 192)
    assert net.merge[0][0].in_channels == 2 * 16 + 384 and net.merge[4][-1].out_channels == 384
    assert 30e6 < count(net) < 40e6


# The command line


@coder
def test_there_and_back_on_the_command_line(model, tmp_path, capsys):
    model.save(tmp_path / "model")
    Image.fromarray(picture(30, 40)).save(tmp_path / "a.png")
    options = ["--model", str(tmp_path / "model"), "--device", "cpu"]
    assert cli.main(["compress", str(tmp_path / "a.png"), *options, "--out", str(tmp_path / "a.sfc")]) == 0
    size = (tmp_path / "a.sfc").stat().st_size
    assert f"{8 * size / 1200:.3f} bits per pixel" in capsys.readouterr().out
    spaced = tmp_path / "of one name"  # the bytes beside their picture, under a name that a shell would take apart
    spaced.mkdir()
    Image.fromarray(picture(30, 40)).save(spaced / "a b.png")
    assert cli.main(["compress", str(spaced / "a b.png"), *options, "--out", str(spaced / "a b.sfc")]) == 0
    line = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("get it back: "))
    assert cli.main([*line[1:], "--steps", "2"]) == 0 and (spaced / "a b-back.png").is_file()
    back = ["decompress", str(tmp_path / "a.sfc"), *options, "--steps", "2", "--out", str(tmp_path / "b.png")]
    assert cli.main(back) == 0
    with Image.open(tmp_path / "b.png") as found:
        assert found.size == (40, 30)
    assert cli.main(back) == 2 and "exists already" in capsys.readouterr().err
    (tmp_path / "c.sfc").write_bytes((tmp_path / "a.sfc").read_bytes()[:-2])
    back[1] = str(tmp_path / "c.sfc")
    assert cli.main([*back, "--overwrite"]) == 2 and "c.sfc is cut off" in capsys.readouterr().err
    assert cli.main(["compress", "nowhere.png", *options, "--out", str(tmp_path / "d")]) == 2
    assert "no picture nowhere.png" in capsys.readouterr().err


def test_without_the_range_coder_one_is_told_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(BadInput, match=r"sfumato\[compress\]"):
        model.compress(picture())
    assert model.bits(picture()) > 0


@pytest.mark.slow
def test_the_ledgers_entry_measures_what_it_claims():
    experiment = core.load("hfd")
    figures = {arm: experiment.measure(0, arm, codec_updates=1, updates=1, n=4) for arm in experiment.arms}
    found = experiment.found(figures)
    for claim in experiment.claims:
        method, baseline = found[claim]
        assert len(method) == len(baseline) > 0 and np.isfinite([*method, *baseline]).all()
