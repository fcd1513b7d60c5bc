"""GOAR and its kin: how pictures are moved, ROAR's masks, ROAD's imputation, projection, the dense direction."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sfumato.classify.plain import Plain
from sfumato.cli import main
from sfumato.errors import BadInput
from sfumato.explain.goar import GOAR
from sfumato.explain.parts.attributions import ATTRIBUTIONS, attribution, maps_of
from sfumato.explain.parts.curves import cumulative
from sfumato.explain.parts.damage import NEIGHBOURS, imputed, mask, moved, pixels, radius, removed, unit
from sfumato.explain.parts.projector import DiffusionProjector, projected
from sfumato.explain.parts.retraining import fresh, from_scratch, said
from sfumato.nets import UNet
from sfumato.noise import Cosine, GaussianProcess
from sfumato.noise.analytic import GaussianMixture, MixtureDenoiser
from sfumato.pipeline import ImageModel

PROCESS = GaussianProcess(Cosine())
QUICK = {"runs": 1, "updates": 4, "retrain_batch": 4, "leakage": False, "shown": 0, "strengths": (0.4,)}


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(d: int, v: torch.Tensor) -> nn.Module:
    """Two logits whose difference is v . x."""
    layer = nn.Linear(d, 2, bias=False)
    layer.weight.data = torch.stack([-v, v]).to(layer.weight) / 2
    return nn.Sequential(nn.Flatten(), layer).eval().requires_grad_(False)


@pytest.fixture
def judged():
    """A tiny network, twelve pictures of 4 pixels and two classes that it tells apart."""
    x, v = rand(12, 1, 4, 4).float(), rand(16, seed=1).float()
    return linear(16, v), x, (x.flatten(1) @ v > 0).long()


def test_labels_and_pictures_of_other_kinds_are_judged_alike(judged):
    """Whole numbers of any width, pictures of any precision; what cannot be is said."""
    network, x, y = judged
    method = GOAR(metric="roar", attributions=("gradient",), **QUICK)
    expected = method.run(network, x, y)
    assert method.run(network, x.double(), y.int()) == expected
    with pytest.raises(BadInput, match="true or false"):
        method.run(network, x, y.bool())
    with pytest.raises(BadInput, match="give one shape"):
        method.run(network, x, y, test=(torch.zeros(4, 1, 6, 6), torch.tensor([0, 1, 0, 1])))
    with pytest.raises(BadInput, match="another name"):
        method.run(network, x, y, others={"gradient": lambda *given: given[1]})


# Moving


def test_all_pictures_go_the_same_length_and_nothing_moves_without_a_direction_or_a_length():
    x, sizes = rand(5, 3, 4, 4), 10.0 ** torch.arange(-200, 300, 100).double()
    a = rand(5, 3, 4, 4, seed=1) * sizes[:, None, None, None]
    r = radius(x)
    far = (moved(x, a, 0.3, r) - x).flatten(1).norm(dim=1)
    torch.testing.assert_close(far, torch.full_like(far, 0.3 * r))
    assert torch.equal(moved(x, a, 0.0, r), x) and torch.equal(moved(x, torch.zeros_like(a), 0.3, r), x)
    torch.testing.assert_close(moved(x, 7 * a[2:3], 0.3, r), moved(x, a[2:3], 0.3, r))
    torch.testing.assert_close(moved(moved(x, a, 0.3, r), a, 0.3, r, 1), x)
    assert torch.allclose(r * torch.ones(()).double(), (x - x.mean(0)).flatten(1).norm(dim=1).mean())


def test_a_rotation_of_space_carries_goar_along_but_not_roar():
    """GOAR on Q x with the attributions of f(Q^T .) is Q times GOAR on x; ROAR's masks know their axes."""
    d, x, v = 12, rand(20, 1, 1, 12), rand(12, seed=1)
    q = torch.linalg.qr(rand(d, d, seed=2))[0]
    turn = lambda t: t @ q.T
    net = nn.Sequential(nn.Flatten(), nn.Linear(d, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    turned = nn.Sequential(nn.Flatten(), nn.Linear(d, d, bias=False), *net[1:]).double()
    turned[1].weight.data = q.T
    classes = (x.flatten(1) @ v > 0).long()
    a, b = (ATTRIBUTIONS["gradient"](f, z, classes, None) for f, z in ((net, x), (turned, turn(x))))
    r = radius(x)
    assert abs(radius(turn(x)) - r) < 1e-12
    assert (moved(turn(x), b, 0.4, r) - turn(moved(x, a, 0.4, r))).abs().max() < 1e-12
    plain, other = removed(x, a, 0.5, x.mean((0, 2, 3))), removed(turn(x), b, 0.5, turn(x).mean((0, 2, 3)))
    assert (other - turn(plain)).abs().max() > 0.1


# Masks


def test_roar_takes_out_exactly_the_largest_share_and_keeps_the_rest():
    x, a = rand(4, 3, 5, 5), rand(4, 3, 5, 5, seed=1)
    mean = x.mean((0, 2, 3))
    means = mean[None, :, None, None].expand_as(x)
    assert torch.equal(removed(x, a, 0.0, mean), x) and torch.equal(removed(x, a, 1.0, mean), means)
    for share in (0.1, 0.29, 0.5, 0.9):
        gone = removed(x, a, share, mean)
        changed = (gone != x).flatten(1)
        assert changed.sum(1).tolist() == [int(share * 75 + 1e-9)] * 4
        # the smallest that goes is larger than the largest that stays
        size = a.square().flatten(1)
        assert (torch.where(changed, size, torch.inf).amin(1) > torch.where(changed, 0, size).amax(1)).all()
        kept = removed(x, a, share, mean, keep=True)
        assert ((kept == x) ^ (gone == x)).all() and torch.equal(torch.where(gone == x, kept, gone), means)


def test_monotone_changes_of_a_map_leave_roar_and_change_goar():
    x, a = rand(4, 1, 5, 5), rand(4, 1, 5, 5, seed=1).abs()
    mean = x.mean((0, 2, 3))
    for f in (torch.exp, torch.sqrt, lambda t: 3 * t + 1):
        assert torch.equal(removed(x, f(a), 0.3, mean), removed(x, a, 0.3, mean))
        assert (moved(x, f(a), 0.3, 1.0) - moved(x, a, 0.3, 1.0)).abs().max() > 1e-3
    assert not torch.equal(mask(-a + 1, 0.3, squared=False), mask(a, 0.3, squared=False))


def test_equal_numbers_go_in_their_order():
    flat = torch.zeros(1, 1, 2, 3)
    assert mask(flat, 0.5).flatten().tolist() == [True] * 3 + [False] * 3


def test_road_imputes_means_of_neighbours_that_are_themselves_imputed():
    x, gone = rand(2, 3, 5, 6), pixels(rand(2, 3, 5, 6, seed=1), 0.6)
    rng = torch.Generator()
    made = imputed(x, gone, 0.0, rng)
    keep = ~gone[:, None].expand_as(x)
    assert gone.flatten(1).sum(1).tolist() == [18, 18] and torch.equal(made[keep], x[keep])
    for n, i, j in gone.nonzero().tolist():
        near = {(i + a, j + b): w for (a, b), w in NEIGHBOURS.items() if 0 <= i + a < 5 and 0 <= j + b < 6}
        mean = sum(w * made[n, :, a, b] for (a, b), w in near.items()) / sum(near.values())
        torch.testing.assert_close(made[n, :, i, j], mean)
    noisy = imputed(x, gone, 0.5, rng.manual_seed(0)) - made
    assert noisy[keep].abs().max() == 0 and 0.3 < noisy[~keep].std() < 0.7
    # a constant picture stays one, and of nothing comes the mean
    assert (imputed(torch.ones_like(x), gone, 0.0, rng) - 1).abs().max() < 1e-12
    everything = imputed(x, torch.ones_like(gone), 0.0, rng)
    torch.testing.assert_close(everything, x.mean((2, 3), keepdim=True).expand_as(x))


@pytest.mark.parametrize("squared", [True, False])
def test_small_numbers_in_half_precision_are_ranked_as_they_are(squared):
    maps = (1e-4 * rand(2, 3, 8, 8)).half()
    for chosen in (mask, pixels):
        whole = chosen(maps.float(), 0.3, squared=squared)
        assert torch.equal(chosen(maps, 0.3, squared=squared), whole) and whole.any()


# Projection


@pytest.mark.parametrize(("t0", "steps"), [(0.1, 1), (0.3, 1), (0.3, 100)])
def test_a_gaussian_projector_shrinks_what_is_off_the_manifold_by_the_closed_form(t0, steps):
    """Data N(0, diag v): one step is the posterior mean, many are the probability flow."""
    v = torch.tensor([1.0, 0.25, 1e-4]).double()
    denoiser = MixtureDenoiser(PROCESS, GaussianMixture.gaussian(torch.zeros(3), torch.diag(v)))
    x, n = rand(6, 3), rand(6, 3, seed=1)
    alpha, sigma = PROCESS.alpha_sigma(torch.tensor(t0, dtype=torch.float64), x)
    var = alpha**2 * v + sigma**2
    last, rest = PROCESS.alpha_sigma(torch.tensor(0.0, dtype=torch.float64), x)  # the schedule ends just above clean
    flow = ((last**2 * v + rest**2) / var).sqrt()
    factor = (last * alpha * v + rest * sigma) / var if steps == 1 else flow
    found = projected(denoiser, x, n, t0, steps)
    torch.testing.assert_close(found, factor * (alpha * x + sigma * n), rtol=0, atol=1e-9 if steps == 1 else 2e-2)
    assert found[:, 2].abs().max() < 0.05 < x[:, 2].abs().max()


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = UNet(8, 3, channels=(8, 8), layers=1, attention=())
        return ImageModel(net.eval(), PROCESS, "v", (3, 8, 8), (), {"scheduler": "ddim"})


@pytest.mark.parametrize("ancestral", [False, True])
def test_the_noise_of_a_picture_belongs_to_it_alone(model, ancestral):
    project = DiffusionProjector(model, 2, ancestral, seed=3, batch=2)
    x = rand(3, 3, 8, 8).float().clamp(-1, 1)
    whole = project(x, 0.3, range(5, 8))
    torch.testing.assert_close(project(x[2:], 0.3, [7]), whole[2:])
    assert not torch.allclose(project(x[2:], 0.3, [6]), whole[2:]) and whole.abs().max() <= 1
    with pytest.raises(BadInput, match="3x8x8, and these have 3x4x4"):
        project(rand(1, 3, 4, 4).float(), 0.3, [0])


def test_goar_with_a_model_of_the_project(model):
    x, y = rand(8, 3, 8, 8).float(), torch.arange(8) % 2
    method = GOAR(attributions=("random",), sampling_steps=2, **QUICK)
    told = method.run(linear(192, rand(192)), x, y, projector=model)
    assert told["projector"] and told["attributions"]["random"]["score"]["n"] == 1
    with pytest.raises(BadInput, match="leave the projector out"):
        GOAR(metric="roar", **QUICK).run(linear(192, rand(192)), x, y, projector=model)


# Attributions


def test_attributions_of_a_linear_and_of_a_quadratic_network():
    class Quadratic(nn.Module):
        def forward(self, x):
            s = x.flatten(1).pow(3).sum(1)
            return torch.stack([-s, s], 1)

    x, v, rng = rand(3, 1, 2, 4), rand(8, seed=1), torch.Generator().manual_seed(0)
    classes = torch.tensor([1, 0, 1])
    sign = torch.tensor([1.0, -1, 1])[:, None, None, None]
    net = linear(8, v).double()
    slope = sign * v.view(1, 2, 4) / 2
    for name in ("gradient", "smoothgrad"):
        torch.testing.assert_close(ATTRIBUTIONS[name](net, x, classes, rng), slope.expand_as(x), rtol=1e-6, atol=1e-7)
    for name in ("input-gradient", "integrated-gradients"):
        torch.testing.assert_close(ATTRIBUTIONS[name](net, x, classes, rng), slope * x, rtol=1e-6, atol=1e-7)
    curved = ATTRIBUTIONS["integrated-gradients"](Quadratic(), x, classes, rng)
    torch.testing.assert_close(curved, sign * x**3, rtol=1e-3, atol=1e-3)  # complete: sums to the logit
    torch.testing.assert_close(ATTRIBUTIONS["input-gradient"](Quadratic(), x, classes), 3 * sign * x**3)
    ramp = torch.arange(5.0).expand(1, 1, 4, 5)
    assert ATTRIBUTIONS["edges"](net, ramp, classes)[0, 0, :, 1:4].unique().tolist() == [8.0]


def test_what_stands_before_a_name_changes_its_maps():
    x, net, y = rand(6, 1, 2, 4), linear(8, rand(8, seed=1)).double(), torch.tensor([0, 1] * 3)
    maps = lambda name: maps_of(attribution(name), name, net, x, y, torch.Generator().manual_seed(0), 64)
    plain = maps("input-gradient")
    assert torch.equal(maps("minus:input-gradient"), -plain)
    assert torch.equal(maps("squared:input-gradient"), plain.square())
    assert torch.equal(maps("shuffled:input-gradient").flatten(1).sum(1).sort()[0], plain.flatten(1).sum(1).sort()[0])
    assert not torch.equal(maps("shuffled:input-gradient"), plain)
    wide = torch.nn.functional.pad(plain, (1, 1, 1, 1), mode="replicate")
    torch.testing.assert_close(maps("blurred:input-gradient")[..., 0, 2], wide[..., 0:3, 2:5].mean((2, 3)))


def test_shuffled_maps_are_those_of_other_pictures_whatever_the_batch():
    x, net, y = rand(9, 1, 2, 4), linear(8, rand(8, seed=1)).double(), torch.tensor([0, 1, 1] * 3)

    def maps(name, batch):
        rng = torch.Generator().manual_seed(0)
        return maps_of(attribution(name), name, net, x, y, rng, batch).flatten(1)

    plain = maps("input-gradient", 9)
    for name, expected in (("shuffled:input-gradient", plain), ("minus:shuffled:input-gradient", -plain)):
        found = {batch: maps(name, batch) for batch in (1, 4, 8, 9)}
        for shuffled in found.values():
            torch.testing.assert_close(shuffled, found[9])
            own = torch.cdist(shuffled, expected) < 1e-9
            assert not own.diagonal().any() and (own.sum(0) == 1).all() and (own.sum(1) == 1).all()


def test_captum():
    pytest.importorskip("captum", reason="captum is not installed")
    x, net, y = rand(2, 1, 2, 4).float(), linear(8, rand(8, seed=1)), torch.tensor([0, 1])
    ours = ATTRIBUTIONS["input-gradient"](net, x, y)
    torch.testing.assert_close(attribution("captum:InputXGradient")(net, x, y, torch.Generator()), ours)


# The study


def test_errors_add_up():
    assert cumulative([1, 2, 6], [0.1, 0.2, 0.4], "sum") == 9
    assert cumulative([1, 2, 6], [0.1, 0.2, 0.4], "area") == pytest.approx((0.15 + 0.8) / 0.3)
    assert cumulative([3], [0.5], "area") == 3


def test_the_dense_direction_stands_out_under_goar_and_not_under_roar():
    """The label is the sign of v . x with |v_j| equal: directions differ where rankings of values do not."""
    d, n = 20, 400
    x, v = rand(n, 1, 1, d).float(), (torch.arange(d) % 2 * 2.0 - 1) / d**0.5
    y = (x.flatten(1) @ v > 0).long()

    def along(direction):
        return lambda net, some, classes, rng: (2.0 * classes - 1)[:, None, None, None] * direction.view(1, 1, 1, d)

    others = {"dense": along(v), "one axis": along(torch.eye(d)[0] * v.sign()[0])}
    gap: dict[str, float] = {}
    settings = {"attributions": ("random",), "runs": 1, "updates": 60, "leakage": False, "shown": 0, "lr": 0.05}
    for metric, strengths in (("goar", (0.05, 0.1, 0.15)), ("roar", (0.3, 0.5, 0.7))):
        method = GOAR(metric=metric, strengths=strengths, **settings)
        found = method.run(linear(d, 20 * v), x[:300], y[:300], test=(x[300:], y[300:]), others=others)
        scores = {name: told["score"]["value"] / (3 * 100) for name, told in found["attributions"].items()}
        gap[metric] = scores["dense"] - max(scores["one axis"], scores["random"])
        if metric == "goar":
            assert found["ranking"][0] == "dense"
    assert gap["goar"] > 0.1 > abs(gap["roar"])


def test_a_killed_study_goes_on_with_the_points_that_are_left(judged, tmp_path):
    method, calls = GOAR(attributions=("gradient", "random"), **QUICK), []
    whole = method.run(*judged)
    train = from_scratch(judged[0], 4, 4, 1e-3)

    def killed(x, y, seed):
        calls.append(seed)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(x, y, seed)

    def counted(x, y, seed):
        calls.append(seed)
        return train(x, y, seed)

    with pytest.raises(KeyboardInterrupt):
        method.run(*judged, retrain=killed, folder=tmp_path)
    assert method.run(*judged, retrain=counted, folder=tmp_path) == whole
    assert len(calls) == 1 + 1 + 2 and method.trainings() == 3
    # what is asked for beyond it is added
    more = GOAR(attributions=("gradient", "random", "zero"), **QUICK).run(*judged, retrain=counted, folder=tmp_path)
    assert len(calls) == 5 and more["attributions"]["gradient"] == whole["attributions"]["gradient"]
    with pytest.raises(BadInput, match="seed=0, and this run has seed=1"):
        GOAR(attributions=("gradient",), seed=1, **QUICK).run(*judged, folder=tmp_path)


def test_road_asks_the_classifier_itself(judged):
    found = GOAR(metric="road", attributions=("gradient",), **QUICK).run(*judged)
    assert found["wrong"]["retrained"] is None and GOAR(metric="road", **QUICK).trainings() == 0
    told = found["attributions"]["gradient"]
    (point,) = told["curve"]
    n = found["pictures"]["measured on"]
    assert point["retrained"] is None and told["score"]["runs"] == [point["as it is"] * n]


def test_fresh_weights_are_others_and_one_seed_gives_them_again():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2)).requires_grad_(False)
    net[1].running_mean += 1
    one, same, other = (fresh(net, seed) for seed in (1, 1, 2))
    assert torch.equal(one[0].weight, same[0].weight) and not torch.equal(one[0].weight, other[0].weight)
    assert one[1].running_mean.abs().max() == 0 and net[1].running_mean.min() == 1 and one[0].weight.requires_grad
    net.register_parameter("own", nn.Parameter(torch.zeros(1)))
    with pytest.raises(BadInput, match="own of the network does not say how it begins"):
        fresh(net, 0)


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"metric": "roar", "strengths": (1.5,)}, "shares of at most 1"),
        ({"attributions": ()}, "at least one attribution"),
        ({"strengths": (0.1, 0.1)}, "each attribution and strength once"),
        ({"strengths": (-0.1,)}, "strengths"),
        ({"noise_times": (0.0, 0.3)}, "noise_times"),
        ({"runs": 0}, "runs"),
    ],
)
def test_settings_that_cannot_be(settings, wrong):
    with pytest.raises(BadInput, match=wrong):
        GOAR(**settings)


def test_input_that_cannot_be_judged(judged):
    net, x, y = judged
    method = GOAR(attributions=("gradient",), **QUICK)
    flat = lambda network, some, classes, rng: some.flatten(1)
    for args, more, wrong in (
        ((net, x, torch.zeros_like(y)), {}, "one label"),
        ((net, x, y + 5), {}, "knows 2 classes"),
        ((net, x * torch.nan, y), {}, "not finite"),
        ((net, x[:3], torch.tensor([0, 0, 1])), {}, "class 1 has one picture"),
        ((nn.Identity(), x, y), {}, "logits shaped"),
        ((net, x, y), {"others": {"flat": flat}}, r"'flat' gives maps shaped \(12, 16\)"),
    ):
        with pytest.raises(BadInput, match=wrong):
            method.run(*args, **more)
    for name, wrong in (("gradent", "did you mean gradient"), ("mius:gradient", "did you mean minus")):
        with pytest.raises(BadInput, match=wrong):
            attribution(name)


def test_the_command_judges_a_classifier_by_its_own_recipe_and_writes_a_page(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for i in range(12):
        file = tmp_path / "pictures" / ("cat", "dog")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        level = 60 + 120 * (i % 2)
        Image.fromarray((level + rng.integers(0, 40, (16, 16, 3))).astype(np.uint8)).save(file)
    trained = Plain(**{**Plain.EXAMPLE, "data": str(tmp_path / "pictures")}).run(tmp_path / "run", progress=False)
    line = ["explain", "goar", "--classifier", str(trained), "--out", str(tmp_path / "judged"), "--strengths", "0.2",
            "--runs", "2", "--attributions", "gradient", "random", "--shown", "1", "--device", "cpu"]  # fmt: skip
    assert main(line) == 0
    assert "gradient" in capsys.readouterr().out
    figures = json.loads((tmp_path / "judged" / "figures.json").read_text())
    assert figures["labels"] == ["cat", "dog"] and figures["figures"]["pictures"]["measured on"] == 4
    page = (tmp_path / "judged" / "index.html").read_text()
    assert page.count("<figure>") == 2 * 3 and "Leakage" not in page.split("<body>")[0]
    points = (tmp_path / "judged" / "points.json").read_text()
    assert main(line) == 0 and (tmp_path / "judged" / "points.json").read_text() == points
    again = Plain.of(trained).trained_on(torch.zeros(4, 3, 16, 16), torch.tensor([0, 1, 0, 1]), ("cat", "dog"), 0)
    assert said(again, torch.zeros(2, 3, 16, 16), 64).shape == (2,) and unit(torch.ones(1, 4)).norm() == 1
