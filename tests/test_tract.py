"""TrAct: the closed form and what it is made from, layers that are otherwise as they were, folders."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from sfumato.classify.parts import preactivations
from sfumato.classify.parts.networks import by_name
from sfumato.classify.parts.preactivations import primal
from sfumato.classify.parts.standard import Standardised
from sfumato.classify.plain import Plain
from sfumato.classify.tract import TrAct, first_layer, tract_gradient, unwrap, wrap
from sfumato.errors import BadInput
from sfumato.metrics.detectors import make_detector

rng = torch.Generator().manual_seed(0)
EVEN = {"mean": (0.5, 0.4, 0.6), "std": (0.2, 0.3, 0.25)}
EYE = torch.eye(7, dtype=torch.float64)


@pytest.fixture
def pictures(tmp_path):
    """Three pictures of each of two classes."""
    noise = torch.randint(255, (6, 16, 16, 3), generator=rng, dtype=torch.uint8).numpy()
    for i, pixels in enumerate(noise):
        file = tmp_path / "pictures" / ("cat", "dog")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    return str(tmp_path / "pictures")


def normal(*shape):
    return torch.randn(shape, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("rows", [3, 7, 20])
def test_the_closed_form_and_its_dual(rows):
    a, g, damping = normal(rows, 7), normal(rows, 5), 0.3
    gram = sum(torch.outer(row, row) for row in a) / rows
    products = sum(torch.outer(z, row) for z, row in zip(g, a, strict=True))
    naive = products @ torch.inverse(gram + damping * EYE)
    for form in ("auto", "primal", "dual"):
        torch.testing.assert_close(tract_gradient(a, g, damping, form), naive, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(tract_gradient(3 * a, g, 9 * damping), naive / 3)


def test_it_is_the_gradient_of_a_layer_that_reads_a_rewritten_input():
    a, w, damping = normal(9, 4), normal(3, 4).requires_grad_(), 0.1
    rewritten = a @ torch.inverse(a.mT @ a / 9 + damping * EYE[:4, :4])
    z, proxy = (a @ w.mT).detach().requires_grad_(), rewritten @ w.mT
    value = proxy + (z - proxy).detach()
    (g,) = torch.autograd.grad(z.tanh().square().mean(), z)
    (found,) = torch.autograd.grad(value.tanh().square().mean(), w)
    torch.testing.assert_close(tract_gradient(a, g, damping), found)


def test_limits():
    a, g = normal(12, 5), normal(12, 3)
    plain = g.mT @ a
    torch.testing.assert_close(1e9 * tract_gradient(a, g, 1e9), plain, rtol=1e-7, atol=1e-7)
    white = torch.linalg.qr(a)[0] * 12**0.5  # a^T a / b = I
    torch.testing.assert_close(tract_gradient(white, g, 0.4), g.mT @ white / 1.4)
    # without damping, the new weights are those of the least squares for the moved pre-activations
    w, eta = normal(3, 5), 0.1
    moved = torch.linalg.lstsq(a, a @ w.mT - eta * 12 * g).solution.mT
    torch.testing.assert_close(w - eta * tract_gradient(a, g, 1e-13), moved, rtol=1e-8, atol=1e-9)
    kernel = torch.eye(12, dtype=torch.float64) - a @ torch.linalg.pinv(a)  # what no weights see
    assert tract_gradient(a, kernel @ g, 0.1).abs().max() < 1e-12


def test_a_vocabulary_moves_each_word_by_the_mean_of_its_gradients():
    words = torch.tensor([0, 1, 1, 2, 2, 2, 3])
    g, damping = normal(7, 4), 0.2
    found = tract_gradient(F.one_hot(words).double(), g, damping)
    for word in range(4):
        share = (words == word).double().mean()
        mean = (7 * g)[words == word].mean(0)
        torch.testing.assert_close(found[:, word], share / (share + damping) * mean)


LAYERS = {
    "linear": (nn.Linear(6, 4), (3, 5, 6)),
    "few rows": (nn.Linear(6, 4, bias=False), (3, 6)),
    "one row": (nn.Linear(6, 4), (6,)),
    "stem": (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 6, 5)),
    "patches": (nn.Conv2d(3, 4, 4, stride=4), (1, 3, 8, 8)),
    "dilated": (nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=(2, 0), dilation=2, bias=False), (2, 2, 8, 9)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7)),
    "groups, few rows": (nn.Conv2d(4, 6, 3, groups=2), (1, 4, 4, 4)),
    "same": (nn.Conv2d(3, 4, (2, 3), padding="same"), (2, 3, 5, 6)),
    "reflected": (nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect"), (2, 3, 5, 6)),
    "no batch": (nn.Conv2d(3, 4, 3), (3, 7, 8)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", LAYERS)
def test_all_but_the_weights_gradient_is_the_plain_layers(name, monkeypatch):
    monkeypatch.setattr(preactivations, "AT_ONCE", 1)
    layer, shape = LAYERS[name]
    layer = layer.double()
    x = normal(*shape).requires_grad_()

    def run():
        layer.zero_grad()
        x.grad = None
        y = layer(x)
        y.sin().sum().backward()
        return y.detach(), x.grad, layer.bias is not None and layer.bias.grad.clone(), layer.weight.grad.clone()

    keys, plain = list(layer.state_dict()), run()
    assert wrap(layer, 0.3) is layer and list(layer.state_dict()) == keys
    found, kind = run(), type(layer)
    for i in range(3):
        assert plain[i] is False or torch.equal(plain[i], found[i])
    torch.testing.assert_close(found[3], by_hand(layer, x, plain[0]), rtol=1e-10, atol=1e-12)
    assert type(unwrap(layer)) is not kind and not hasattr(layer, "damping")
    assert torch.equal(run()[3], plain[3])


def by_hand(layer, x, y):
    """TrAct's gradient for the loss sum(sin(y)), on patches that are cut out one by one."""
    g, x = y.cos(), x.detach()
    if isinstance(layer, nn.Linear):
        return tract_gradient(x.reshape(-1, 6), g.reshape(-1, 4), 0.3)
    x, g = (x, g) if x.ndim == 4 else (x[None], g[None])
    (top, left), (bottom, right) = ((2, 2), (2, 2)) if layer.padding_mode == "reflect" else _sides(layer)
    x = F.pad(x, (left, right, top, bottom), mode="reflect" if layer.padding_mode == "reflect" else "constant")
    (down, across), (high, wide), (tall, broad) = layer.stride, layer.dilation, layer.kernel_size
    parts = []
    for xs, gs in zip(x.chunk(layer.groups, 1), g.chunk(layer.groups, 1), strict=True):
        a = [
            picture[:, i * down :, j * across :][:, : high * (tall - 1) + 1 : high, : wide * (broad - 1) + 1 : wide]
            for picture in xs for i in range(g.shape[2]) for j in range(g.shape[3])
        ]  # fmt: skip
        rows = torch.stack([patch.flatten() for patch in a])
        parts.append(tract_gradient(rows, gs.permute(0, 2, 3, 1).flatten(0, 2), 0.3))
    return torch.cat(parts).reshape(layer.weight.shape)


def _sides(layer):
    if layer.padding == "same":  # of an even kernel, the odd one comes after
        total = [size - 1 for size in layer.kernel_size]
        return [t // 2 for t in total], [t - t // 2 for t in total]
    return layer.padding, layer.padding


def test_calls_have_matrices_of_their_own_and_frozen_weights_no_gradient():
    layer, x, y = wrap(nn.Linear(3, 2).double()), normal(5, 3), normal(5, 3)
    gradient = lambda *inputs: torch.autograd.grad(sum(layer(z).square().sum() for z in inputs), layer.weight)[0]
    torch.testing.assert_close(gradient(x, y), gradient(x) + gradient(y))
    layer.requires_grad_(False)
    assert not layer(x).requires_grad


def test_half_precision_is_solved_in_full():
    layer, x, seen = nn.Linear(4, 3), torch.randn(64, 4, generator=rng) * 100, []
    with torch.autocast("cpu", torch.bfloat16):
        y = wrap(layer, 0.1)(x.bfloat16())
        y.register_hook(seen.append)
        y.square().mean().backward()
    assert y.dtype == seen[0].dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32
    a = x.bfloat16()
    plain = (seen[0].mT @ a).double()  # what the product gives in half precision is all that is known of it
    expected = primal(plain, a.double().mT @ a.double() / len(a), 0.1)
    torch.testing.assert_close(layer.weight.grad.double(), expected, rtol=1e-5, atol=1e-8)


def test_together_the_matrix_is_over_the_rows_of_all_processes(monkeypatch):
    here, there, g = normal(2, 4), normal(5, 4), normal(2, 3)
    layer = wrap(nn.Linear(4, 3).double(), 0.1, together=True)
    theirs = torch.cat([(there.mT @ there).flatten(), torch.tensor([5.0]).double()])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sums.add_(theirs))
    found = torch.autograd.grad((layer(here) * g).sum(), layer.weight)[0]
    every = torch.cat([here, there])
    torch.testing.assert_close(found, tract_gradient(every, torch.cat([g, torch.zeros(5, 3).double()])))


def test_the_first_layer_is_the_first_that_is_called():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.late, self.early = nn.Linear(2, 2), nn.Conv2d(3, 2, 3)

        def forward(self, x):
            return self.late(self.early(x).mean((2, 3)))

    net, x = Backwards(), torch.zeros(1, 3, 4, 4)
    assert first_layer(net, x) == ("early", net.early) and not net.early._forward_pre_hooks
    with pytest.raises(BadInput, match="no layer"):
        first_layer(nn.ReLU(), x)
    with pytest.raises(BadInput, match="cannot take a layer of type BatchNorm2d"):
        wrap(first_layer(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3)), x)[1])
    with pytest.raises(BadInput, match="more than 0"):
        wrap(nn.Linear(2, 2), 0)


def test_a_network_sees_standardised_pictures_and_its_folder_says_so(tmp_path, pictures):
    method = TrAct(data=pictures, **{**TrAct.EXAMPLE, "updates": 2}, **EVEN)
    x = torch.rand(4, 3, 16, 16, generator=rng)
    seen = Standardised(nn.Identity(), method.mean, method.std)(2 * x - 1)
    torch.testing.assert_close(seen[:, 1], (x[:, 1] - 0.4) / 0.3)
    folder = method.run(tmp_path / "run", progress=False)
    assert {*TrAct.read(folder).net.state_dict()} == {*by_name("resnet", ("a", "b"), 16, (8, 16)).state_dict()}
    with torch.no_grad():
        shares = TrAct.read(folder)(2 * x - 1).softmax(1)
    torch.testing.assert_close(make_detector(folder, ["cat"])(x, "cat").score, shares[:, 0])
    card = json.loads((folder / "card.json").read_text())
    assert card["condition"]["damped"] > 1 and card["input"]["mean_square"] > 0.5


def test_without_damping_it_is_the_plain_network():
    torch.manual_seed(0)
    plain = Plain(widths=(8, 16)).network(("a", "b"))
    torch.manual_seed(0)
    net = TrAct(widths=(8, 16), damping=None, mean=(0.5,) * 3, std=(0.5,) * 3).network(("a", "b"))
    assert {type(m) for m in net.net.modules()} == {type(m) for m in plain.modules()}
    x = torch.rand(2, 3, 64, 64, generator=rng)
    torch.testing.assert_close(net.eval()(x), plain.eval()(x))
