"""Geodesic edits, held to flat maps, the sphere, and the linear case in which the contrast comes back exactly."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sfumato.edit import Pullback, Riemannian
from sfumato.edit.base import Given
from sfumato.edit.parts.directions import FILE
from sfumato.edit.parts.geometry import dense_basis, geodesic_distance, local_basis, projected, pushed, unit
from sfumato.edit.riemannian import (
    by_basis,
    by_gradient,
    lerp,
    matched,
    normalised,
    path_length,
    pooled,
    shared_directions,
    shoot,
    slerp,
)  # fmt: skip
from sfumato.errors import BadInput


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


def sphere(rows: torch.Tensor) -> torch.Tensor:
    """(theta, phi) to the unit sphere."""
    theta, phi = rows[:, 0], rows[:, 1]
    return torch.stack([theta.sin() * phi.cos(), theta.sin() * phi.sin(), theta.cos()], 1)


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5)).double().requires_grad_(False)


def carried(f, rank, flat, x, u):
    return by_basis(dense_basis(f, x, rank), u, flat)


@pytest.mark.parametrize("how", ["gradient", "inverse", "flat"])
def test_over_a_flat_map_a_geodesic_is_a_straight_line(how):
    a, x = randn(5, 8, seed=1), randn(8)
    f = lambda rows: rows @ a.T
    basis = dense_basis(f, x, 3)
    carry = partial(by_gradient, f) if how == "gradient" else partial(carried, f, 3, how == "flat")
    points = shoot(x, basis.u[0], basis.v[0], 0.25, 8, carry)
    torch.testing.assert_close(torch.stack(points), torch.stack([x + 0.25 * i * basis.v[0] for i in range(9)]))
    assert sum(path_length([dense_basis(f, p, 3).u for p in points])) < 1e-8
    inside = unit(basis.u[0] + 2 * basis.u[2])
    torch.testing.assert_close(projected(inside, dense_basis(f, points[-1], 3)), inside)


@pytest.mark.parametrize("how", ["gradient", "inverse", "flat"])
def test_over_a_flat_map_a_global_direction_is_a_straight_line_from_its_first_move(how):
    a = torch.tensor([8.0, 3, 1, 0.3], dtype=torch.float64)[:, None] * randn(4, 12, seed=1)

    class Flat(Riemannian):
        def f(self, pipe, time, cond):
            return lambda rows: rows.flatten(1) @ a.T

    edit, mixed = Flat(carry=how, rank=4, moves=4, stops=4, length=4.0, normalise="none"), randn(1, 4, seed=2)
    points = edit.moved(SimpleNamespace(adapters={}), randn(3, 2, 2), 0.9, None, (mixed, [])).latents[0]
    moves = points.diff(dim=0)
    torch.testing.assert_close(moves, moves[:1].expand_as(moves), rtol=0, atol=1e-8)
    torch.testing.assert_close(moves.flatten(1).norm(dim=1), torch.ones(8, dtype=torch.float64))


def test_one_move_is_the_plain_step(net):
    x, basis = randn(8), dense_basis(net, randn(8), 3)
    never = lambda x, u: pytest.fail("one move carries nothing")
    assert torch.equal(shoot(x, basis.u[1], basis.v[1], 0.7, 1, never)[-1], x + 0.7 * basis.v[1])
    assert shoot(x, basis.u[1], basis.v[1], 0.7, 0, never) == [x]


def test_on_the_sphere_it_follows_the_great_circle():
    start = torch.tensor([1.0, 0.2], dtype=torch.float64)
    v = unit(torch.tensor([0.3, 1.0], dtype=torch.float64))
    ahead = unit(pushed(sphere, start, v[None])[0])
    pole = torch.linalg.cross(sphere(start[None])[0], ahead)

    def away(moves: int) -> float:
        end = shoot(start, ahead, v, 1.2 / moves, moves, partial(carried, sphere, 2, False))[-1]
        return abs(float(pole @ sphere(end[None])[0]))

    straight, coarse, fine = away(1), away(40), away(80)
    assert fine < straight / 20 and fine < coarse / 1.8, "first order in the step"


def test_there_and_back_again(net):
    x, basis = randn(8), dense_basis(net, randn(8), 3)
    carry = partial(carried, net, 3, False)
    u, v = carry(x, basis.u[0])

    def missed(moves: int) -> float:
        end = shoot(x, u, v, 1.0 / moves, moves, carry)[-1]
        far = u
        for p in shoot(x, u, v, 1.0 / moves, moves, carry)[1:]:
            far, back = carry(p, far)
        return float((shoot(end, far, back, -1.0 / moves, moves, carry)[-1] - x).norm())

    assert missed(40) < missed(20) / 1.8


def test_the_gradient_weights_by_s_and_the_inverse_goes_where_it_is_told(net):
    x, u = randn(8), unit(randn(5, seed=2))
    basis = dense_basis(net, x, 5)
    gradient = by_gradient(net, x, u)[1]
    due = basis.v.T @ (basis.sigma * (basis.u @ u))
    torch.testing.assert_close(gradient, unit(due), rtol=0, atol=1e-6)
    small = dense_basis(net, x, 3)
    told, v = by_basis(small, u)
    torch.testing.assert_close(told, unit(small.u.T @ (small.u @ u)))
    torch.testing.assert_close(unit(pushed(net, x, v[None])[0]), told, rtol=0, atol=1e-6)
    flat = by_basis(small, u, flat=True)[1]
    assert (flat - v).norm() > 1e-2 and (gradient - flat).norm() > 1e-2


def test_pooled_features():
    h = randn(2, 3, 4, 4)
    torch.testing.assert_close(pooled(h, "sum"), h.sum((2, 3)))
    torch.testing.assert_close(pooled(h, "avg2")[0, 0, 0, 0], h[0, 0, :2, :2].mean())
    torch.testing.assert_close(pooled(randn(2, 6, 3), "sum"), randn(2, 6, 3).sum(1))
    assert pooled(h, "none") is h
    with pytest.raises(BadInput, match="no map of rows and columns"):
        pooled(randn(2, 6, 3), "avg2")


def test_summed_and_whole_bases_coincide_where_features_are_summed_already(net):
    f = lambda rows: net(rows)[:, :, None, None]
    x = randn(8)
    summed = dense_basis(lambda rows: pooled(f(rows), "sum"), x, 3)
    whole = local_basis(f, x, 3, rng(), iterations=(5, 200), tol=1e-10, oversample=2)
    assert float(geodesic_distance(summed.v, whole.v)) < 1e-4
    torch.testing.assert_close(summed.sigma, whole.sigma, rtol=1e-6, atol=0)


def test_global_directions_do_not_depend_on_signs_or_order():
    u = torch.linalg.qr(randn(6, 6))[0].T[:3]
    same, alike = shared_directions([u, u.clone(), u.clone()])
    torch.testing.assert_close(same, u)
    torch.testing.assert_close(alike, torch.ones(3, dtype=torch.float64))
    noisy = [torch.linalg.qr((u + 0.1 * randn(3, 6, seed=s)).T)[0].T for s in (1, 2)]
    signs = torch.tensor([[-1.0], [1], [-1]], dtype=torch.float64)
    mean, alike = shared_directions([u, *noisy])
    turned, again = shared_directions([u, signs * noisy[0], (signs * noisy[1])[[2, 0, 1]]])
    torch.testing.assert_close(turned, mean)
    torch.testing.assert_close(again, alike)
    torch.testing.assert_close(mean.norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert (alike < 1).all() and (alike > 0.5).all()
    alone, certain = shared_directions([u])
    torch.testing.assert_close(alone, u)
    assert certain.tolist() == [1, 1, 1]


@pytest.mark.parametrize("per_channel", [False, True])
def test_mean_and_deviation_are_those_before(per_channel):
    dims = (1, 2) if per_channel else (0, 1, 2)
    x, like = randn(3, 4, 4), 2 + 5 * randn(3, 4, 4, seed=1)
    made = matched(x, like, per_channel)
    torch.testing.assert_close(made.mean(dims), like.mean(dims))
    torch.testing.assert_close(made.std(dims), like.std(dims))
    assert torch.equal(matched(x, x, per_channel), x)


def test_the_contrast_comes_back_exactly_where_the_noise_is_linear():
    alpha, sigma, kappa = 0.6, 0.8, 0.99
    b, x, moved = randn(3, 4, 4), randn(3, 4, 4, seed=1), randn(3, 4, 4, seed=2)
    predict = lambda rows: (rows - sigma * (kappa * rows + b)) / alpha
    target = matched(predict(moved[None])[0], predict(x[None])[0])
    made = normalised(x, moved, predict, alpha, sigma, kappa)
    torch.testing.assert_close(predict(made[None])[0], target, rtol=0, atol=1e-6)
    assert torch.equal(normalised(x, x, predict, alpha, sigma, kappa), x)
    plain = normalised(x, moved, predict, alpha, sigma, 0.0)
    torch.testing.assert_close(plain, x + alpha * (target - predict(x[None])[0]))


def test_the_two_ways_between_points():
    a, b = unit(randn(5)), unit(randn(5, seed=1))
    straight, round_ = lerp(a, b, 4), slerp(a, b, 4)
    for way in (straight, round_):
        torch.testing.assert_close(way[0], a)
        torch.testing.assert_close(way[-1], b)
    angles = [math.acos(float(p @ q)) for p, q in pairwise(round_)]
    assert angles == pytest.approx([angles[0]] * 3) and all(float(p.norm()) == pytest.approx(1) for p in round_)
    assert float(straight[1].norm()) < 1 and torch.equal(slerp(a, a, 3)[1], a)


SMALL = {"sampling_steps": 4, "moves": 2, "stops": 1, "rank": 4, "chunk": 32, "sides": "plus"}
FEW = {**SMALL, "sampling_steps": 2, "moves": 1, "rank": 1}


@pytest.mark.parametrize(
    "settings",
    [
        {"carry": "inverse", "normalise": "renoise"},
        {"carry": "flat", "normalise": "shell"},
        {"carry": "gradient", "normalise": "none", "per_channel": True, "pool": "avg2", "iterations": (1, 2)},
    ],
)
def test_every_way_moves_a_picture(tiny_sd, settings):
    edited = Riemannian(**SMALL, **settings).edit(tiny_sd, Given(("a red star",), (3,)))
    assert not torch.equal(edited.strips[:, 0, 0], edited.strips[:, 0, 1])
    still = Riemannian(**SMALL, **settings, length=0.0).edit(tiny_sd, Given(("a red star",), (3,)))
    torch.testing.assert_close(still.strips[:, 0, 0], still.strips[:, 0, 1], rtol=0, atol=1e-5)


def test_global_directions_are_found_written_and_used(tiny_sd, tmp_path):
    from safetensors.torch import save_file

    found = Riemannian(**SMALL, samples=2, time=0.7).edit(tiny_sd, Given(("a red star",), (3,)))
    assert len(found.told["pictures"][0]["agreement"]) == 4
    save_file({k: x.contiguous() for k, x in found.tensors.items()}, tmp_path / FILE, dict(found.labels))
    again = Riemannian(**SMALL, use=tmp_path, time=0.7).edit(tiny_sd, Given(("a red star",), (3,)))
    torch.testing.assert_close(again.strips, found.strips, rtol=0, atol=1e-4)


def test_curvedness_is_told(tiny_sd):
    edit = Riemannian(**SMALL, curvedness=True, segments=2)
    told = edit.edit(tiny_sd, Given(("a red star",), (3, 4))).told["curvedness"]
    assert set(told) == {"lerp", "slerp", "geodesic"} and all(row[0] > 0 for row in told.values())
    with pytest.raises(BadInput, match="between two pictures"):
        edit.edit(tiny_sd, Given(("a red star",), (3,)))


def test_equal_pictures_are_no_way_apart(tiny_sd):
    edit = Riemannian(**FEW, curvedness=True, segments=2)
    edited = edit.edit(tiny_sd, Given(("a red star",), (3, 3)))
    assert edited.told["curvedness"] == {"lerp": [0.0], "slerp": [0.0], "geodesic": [0.0]}


def test_pictures_of_another_size(tiny_sd, tmp_path):
    from safetensors.torch import save_file

    given = Given(("a red star",), (0,), torch.rand(2, 3, 32, 32, generator=rng()))
    whole = {**FEW, "pool": "none", "iterations": (1, 1)}
    found = Riemannian(**whole, samples=2, curvedness=True, segments=1).edit(tiny_sd, given)
    assert found.strips.shape[-1] == 32 and found.told["curvedness"]["lerp"][0] > 0
    save_file({k: x.contiguous() for k, x in found.tensors.items()}, tmp_path / FILE, dict(found.labels))
    with pytest.raises(BadInput, match="find them anew for this one"):
        Riemannian(**whole, use=tmp_path).edit(tiny_sd, Given(("a red star",), (3,)))


def test_summed_features_take_directions_of_every_size(tiny_sd, tmp_path):
    from safetensors.torch import save_file

    edit, seen = Riemannian(**FEW, samples=2), []
    found = edit.edit(tiny_sd, Given(("a red star",), (0,), torch.rand(1, 3, 32, 32, generator=rng())))
    save_file({k: x.contiguous() for k, x in found.tensors.items()}, tmp_path / FILE, dict(found.labels))
    Riemannian(**FEW, use=tmp_path).edit(tiny_sd, Given(("a red star",), (3,)))
    handle = tiny_sd.network.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-1]))
    edit.prepared(tiny_sd, 1.0, 32)
    handle.remove()
    assert set(seen) == {tiny_sd.latent_shape(32)[-1]}


@pytest.mark.parametrize("settings", [{}, {"pool": "none", "iterations": (1, 1)}])
def test_a_pipeline_in_half_precision_has_geodesics_too(tiny_sd, settings):
    pipe = tiny_sd.copy("all")
    for part in pipe.parts().values():
        part.bfloat16()
    pictures = torch.rand(1, 3, 16, 16, generator=rng())
    for given in (Given(("a red star",), (0,), pictures), Given(("a red star",), (0,))):
        edited = Riemannian(**FEW, **settings).edit(pipe, given)
        assert edited.strips.isfinite().all() and edited.tensors["v"].dtype == torch.float32


@pytest.mark.parametrize("per_channel", [True, False])
def test_what_has_no_deviation_is_shifted_only(per_channel):
    like = randn(3, 4, 4)
    plain = torch.tensor([0.1, 0.7, -0.3], dtype=torch.float64) if per_channel else torch.full((3,), 0.1).double()
    flat = plain[:, None, None].expand(3, 4, 4)
    mean = like.mean((-2, -1) if per_channel else (-3, -2, -1), keepdim=True)
    torch.testing.assert_close(matched(flat, like, per_channel), mean.expand(3, 4, 4), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", [Pullback, Riemannian])
def test_fresh_noise_is_refused_for_flows_before_anything_is_computed(tiny_sd3, method):
    with pytest.raises(BadInput, match="leave boost out"):
        method(**method.EXAMPLE, boost=0.2).check(tiny_sd3, Given(("a red star",), (0,)))


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"samples": 2, "use": "x"}, "give one of the two"), ({"moves": 1, "stops": 2}, "cannot be shown")],
)
def test_bad_input(settings, told):
    with pytest.raises(BadInput, match=told):
        Riemannian(**{**SMALL, **settings})
