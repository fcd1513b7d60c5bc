"""Diffusion pullback: singular vectors without the Jacobian, held to linear maps, dense Jacobians and differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sfumato.edit import Pullback
from sfumato.edit.base import Given
from sfumato.edit.parts.directions import FILE, in_common, read_directions
from sfumato.edit.parts.geometry import dense_basis, pulled, pushed, stops_of
from sfumato.edit.parts.tangents import apart, tangents
from sfumato.edit.pullback import (
    Basis,
    geodesic_distance,
    local_basis,
    mean_frequency,
    paper_gamma,
    power_spectrum,
    transported,
    traversed,
)
from sfumato.errors import BadInput
from sfumato.sample import predict

LONG = {"iterations": (5, 60), "tol": 1e-10, "oversample": 12, "chunk": 16}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(out: int, dims: tuple[int, ...], sigma: torch.Tensor) -> torch.Tensor:
    """A matrix with these singular values."""
    size = math.prod(dims)
    u = torch.linalg.qr(torch.randn(out, len(sigma), generator=rng(1), dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(size, len(sigma), generator=rng(2), dtype=torch.float64))[0]
    return u * sigma @ v.T


@pytest.fixture(scope="module")
def net():
    """A small curved map of 3 x 6 x 6 to 5 x 3 x 3."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 5, 3, 2, 1)]
        return nn.Sequential(*layers).double().requires_grad_(False)


@pytest.fixture(scope="module")
def x():
    return torch.randn(3, 6, 6, generator=rng(3), dtype=torch.float64)


def test_a_linear_map_has_its_singular_vectors():
    sigma = torch.tensor([9.0, 6, 4, 2.5, 1, 0.5, 0.2], dtype=torch.float64)
    a = linear(11, (2, 4, 4), sigma)
    point = torch.randn(2, 4, 4, generator=rng(), dtype=torch.float64)
    basis = local_basis(lambda rows: rows.flatten(1) @ a.T, point, 3, rng(), **LONG)
    torch.testing.assert_close(basis.sigma, sigma[:3], rtol=0, atol=1e-8)
    _, _, vh = torch.linalg.svd(a)
    overlap = (basis.v.flatten(1) @ vh[:3].T).abs()
    torch.testing.assert_close(overlap, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-8)
    assert torch.equal(mean_frequency(basis.v).isfinite(), torch.ones(3, dtype=torch.bool))


def test_forward_and_backward_are_adjoint_and_agree_with_differences(net, x):
    v = torch.randn(3, 3, 6, 6, generator=rng(4), dtype=torch.float64)
    jv = pushed(net, x, v, 2)
    u = torch.randn(jv.shape, generator=rng(5), dtype=torch.float64)
    forth, back = (u * jv).sum((1, 2, 3)), (pulled(net, x, u) * v).sum((1, 2, 3))
    torch.testing.assert_close(forth, back, rtol=1e-10, atol=1e-10)
    h = 1e-5
    torch.testing.assert_close((net(x + h * v) - net(x - h * v)) / (2 * h), jv, rtol=1e-6, atol=1e-8)


def test_the_basis_is_the_dense_jacobians(net, x):
    jacobian = torch.autograd.functional.jacobian(lambda rows: net(rows), x[None])[0, :, :, :, 0].reshape(45, -1)
    basis, dense = local_basis(net, x, 4, rng(), **LONG), torch.linalg.svd(jacobian, full_matrices=False)
    torch.testing.assert_close(basis.sigma, dense.S[:4], rtol=1e-5, atol=0)
    assert float(geodesic_distance(basis.v, dense.Vh[:4])) < 1e-4
    whole = dense_basis(net, x, 4)
    torch.testing.assert_close(whole.sigma, dense.S[:4], rtol=1e-10, atol=0)
    assert float(geodesic_distance(basis.u, whole.u)) < 1e-4
    torch.testing.assert_close(pushed(net, x, whole.v), whole.sigma.view(-1, 1, 1, 1) * whole.u, rtol=0, atol=1e-10)


@pytest.mark.parametrize("iterations", [(1, 1), (3, 3), (10, 60)])
def test_however_far_it_has_come_j_v_is_sigma_u_and_both_are_orthonormal(net, x, iterations):
    basis = local_basis(net, x, 4, rng(), iterations=iterations, oversample=2)
    eye = torch.eye(4, dtype=torch.float64)
    for rows in (basis.v.flatten(1), basis.u.flatten(1)):
        torch.testing.assert_close(rows @ rows.T, eye, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        pushed(net, x, basis.v), basis.sigma.view(-1, 1, 1, 1) * basis.u, rtol=0, atol=1e-10
    )
    assert (basis.sigma.diff() <= 0).all() and (basis.sigma > 0).all()


def test_neither_the_chunk_nor_a_start_changes_what_is_found(net, x):
    one, all_ = (local_basis(net, x, 3, rng(), **{**LONG, "chunk": chunk}) for chunk in (1, 9))
    torch.testing.assert_close(one.v, all_.v, rtol=0, atol=1e-10)
    near = local_basis(net, x, 3, rng(7), iterations=(2, 60), tol=1e-10, start=one.v, oversample=12)
    torch.testing.assert_close(near.sigma, one.sigma, rtol=1e-9, atol=0)
    assert (near.v.flatten(1) * one.v.flatten(1)).sum(1).min() > 1 - 1e-9, "and keeps its signs"


def test_sigma_is_the_rate_of_change_and_no_direction_beats_the_first(net, x):
    basis = local_basis(net, x, 1, rng(), **LONG)
    d = 1e-5
    rate = (net((x + d * basis.v[0])[None]) - net((x - d * basis.v[0])[None])).norm() / (2 * d)
    torch.testing.assert_close(rate, basis.sigma[0], rtol=1e-6, atol=0)
    others = torch.randn(50, 3, 6, 6, generator=rng(8), dtype=torch.float64)
    others /= others.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert pushed(net, x, others).flatten(1).norm(dim=1).max() < basis.sigma[0]


def test_the_walk_is_exact_where_eps_is_linear():
    b = torch.randn(5, 5, generator=rng(), dtype=torch.float64) / 5
    point, v = torch.randn(2, 5, generator=rng(1), dtype=torch.float64)
    eps = lambda rows: rows @ b.T
    walk = traversed(eps, point, v, 0.5, 2.0, 3)
    torch.testing.assert_close(walk[-1], point + 3 * 0.5 * 2.0 * b @ v)
    back = traversed(eps, point, v, 0.5, -2.0, 3)
    torch.testing.assert_close(walk[-1] - point, point - back[-1])
    assert torch.equal(traversed(eps, point, v, 0.0, 2.0, 3)[-1], point)
    assert traversed(eps, point, v, 0.5, 2.0, 0) == [point]


def test_transport_home_is_the_identity_and_its_inverse_projects(net, x):
    here = local_basis(net, x, 4, rng(), **LONG)
    for i in range(4):
        for pinv in (False, True):
            torch.testing.assert_close(transported(here.u[i], here, pinv), here.v[i], rtol=0, atol=1e-6)
    there = local_basis(net, x.flip(2), 4, rng(), **LONG)
    v = transported(here.u[0], there, pinv=True)
    pushed_there = pushed(net, x.flip(2), v[None])[0].flatten()
    flat = there.u.flatten(1)
    due = flat.T @ (flat @ here.u[0].flatten())
    torch.testing.assert_close(pushed_there / pushed_there.norm(), due / due.norm(), rtol=0, atol=1e-6)


def test_distances_of_tangent_spaces():
    q = torch.linalg.qr(torch.randn(12, 12, generator=rng(), dtype=torch.float64))[0].T
    a, b = q[:3], q[3:6]
    turn = torch.linalg.qr(torch.randn(3, 3, generator=rng(1), dtype=torch.float64))[0]
    assert float(geodesic_distance(a, a)) < 1e-12 and float(geodesic_distance(a, turn @ a)) < 1e-12
    assert float(geodesic_distance(a, b)) == pytest.approx(math.sqrt(3) * math.pi / 2, abs=1e-10)
    for angle in (1e-9, 0.3, math.pi / 2 - 1e-9):
        tilted = torch.stack([math.cos(angle) * a[0] + math.sin(angle) * b[0], a[1], a[2]])
        assert float(geodesic_distance(turn @ a, tilted)) == pytest.approx(angle, abs=1e-12)


def test_waves_have_their_frequency():
    y, x = torch.meshgrid(*[torch.arange(8, dtype=torch.float64)] * 2, indexing="ij")
    waves = torch.stack([torch.ones(8, 8), (2 * torch.pi * 2 * x / 8).cos(), (2 * torch.pi * 4 * y / 8).cos()])
    bands = power_spectrum(waves.double()[:, None])
    assert bands.shape == (3, 5)
    torch.testing.assert_close(bands, torch.eye(5, dtype=torch.float64)[[0, 2, 4]], rtol=0, atol=1e-12)
    torch.testing.assert_close(mean_frequency(waves.double()[:, None]), torch.tensor([0, 0.5, 1.0]).double())


def test_features_are_the_taps_and_stop_there(tiny_sd):
    z = torch.randn(2, *tiny_sd.latent_shape(), generator=rng())
    cond = tiny_sd.encode(["a red star", "art"])
    ran = []
    handle = tiny_sd.network.conv_out.register_forward_hook(lambda *_: ran.append(1))
    inside = tiny_sd.features(z, 0.6, cond)
    handle.remove()
    assert ran == []
    with tiny_sd.tap("bottleneck") as seen:
        tiny_sd.denoiser(z, 0.6, cond)
    torch.testing.assert_close(inside, seen.value, rtol=0, atol=1e-5)
    one = tiny_sd.features(z[:1], 0.6, cond[0])
    torch.testing.assert_close(one, inside[:1], rtol=0, atol=1e-5)
    with pytest.raises(BadInput, match="no place 'attic'"):
        tiny_sd.features(z, 0.6, cond, "attic")


def test_a_pipelines_jacobian_agrees_with_differences(tiny_sd):
    pipe = tiny_sd.copy("all")
    for part in pipe.parts().values():
        part.double()
    z, v = torch.randn(2, *pipe.latent_shape(), generator=rng(), dtype=torch.float64)
    f = lambda rows: pipe.features(rows, 0.6, pipe.encode("a red star"))
    h = 1e-4
    plus, minus = f((z + h * v)[None])[0], f((z - h * v)[None])[0]
    torch.testing.assert_close(pushed(f, z, v[None])[0], (plus - minus) / (2 * h), rtol=1e-5, atol=1e-6)
    u = torch.randn(plus.shape, generator=rng(1), dtype=torch.float64)
    torch.testing.assert_close((pulled(f, z, u[None])[0] * v).sum(), (pushed(f, z, v[None])[0] * u).sum())


def test_the_way_on_from_features_is_the_rest_of_the_network(tiny_sd):
    pipe = tiny_sd.copy("all")
    for part in pipe.parts().values():
        part.double()
    z = torch.randn(pipe.latent_shape(), generator=rng(), dtype=torch.float64)
    cond = pipe.encode("a red star")
    h = pipe.features(z[None], 0.6, cond)
    on = lambda rows: pipe.continued(rows, z, 0.6, cond)
    torch.testing.assert_close(on(h)[0], predict(pipe.denoiser, z[None], 0.6, cond, "eps")[0], rtol=0, atol=1e-10)
    v = torch.randn(h.shape, generator=rng(1), dtype=torch.float64)
    u = torch.randn(1, *z.shape, generator=rng(2), dtype=torch.float64)
    e = 1e-4
    torch.testing.assert_close(pushed(on, h[0], v), (on(h + e * v) - on(h - e * v)) / (2 * e), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((pulled(on, h[0], u) * v).sum(), (pushed(on, h[0], v) * u).sum())
    edit = Pullback(rank=2, half="decoder", iterations=(2, 2), oversample=1)
    found = edit.basis(pipe, z, 0.6, cond)
    assert found.v.shape == (2, *z.shape) and found.u.shape == (2, *h.shape[1:])
    torch.testing.assert_close(pushed(on, h[0], found.u), found.sigma.view(-1, 1, 1, 1) * found.v, rtol=0, atol=1e-8)
    clean = lambda rows: (z - 0.6 * on(rows)) / 0.8  # of the predicted picture they are the same directions
    torch.testing.assert_close(pushed(clean, h[0], found.u), -0.75 * pushed(on, h[0], found.u), rtol=0, atol=1e-10)


def test_what_spans_have_in_common():
    eye = torch.eye(6, dtype=torch.float64)
    turned = torch.linalg.qr(torch.randn(2, 2, generator=rng(), dtype=torch.float64))[0]
    spans = torch.stack([eye[[0, 1]], eye[[0, 2]], turned @ eye[[0, 1]]])
    found = in_common(spans.reshape(3, 2, 3, 2)).flatten(1)
    torch.testing.assert_close(found, eye[:2], rtol=0, atol=1e-12)  # 0 is in all of them, 1 in two, 2 in one
    cost = lambda span: sum(2 - (span @ one.T).square().sum() for one in spans)
    others = [torch.linalg.qr(torch.randn(6, 2, generator=rng(i), dtype=torch.float64))[0].T for i in range(50)]
    assert all(cost(found) <= cost(other) for other in others)


SMALL = {"sampling_steps": 4, "moves": 2, "stops": 1, "iterations": (1, 3), "oversample": 1}
FEW = {**SMALL, "sampling_steps": 2, "moves": 1, "iterations": (1, 1)}


def test_a_prompt_moves_the_directions_and_errors_are_told(tiny_sd):
    given = Given(("a red star",), (0,), torch.rand(1, 3, 16, 16, generator=rng()))
    plain, told = (Pullback(**SMALL, edit_prompt=p).edit(tiny_sd, given) for p in ("", "a blue circle"))
    assert not torch.equal(plain.tensors["v"], told.tensors["v"])
    assert plain.tracks == ("direction 0",) and plain.stops == ("\N{MINUS SIGN}1", "0", "+1") and plain.plain == 1
    back = (plain.strips[:, 0, 1] - given.pictures).square().mean().sqrt()
    assert plain.told["errors"]["inversion"][0] == pytest.approx(float(back))
    assert plain.told["errors"]["autoencoder"][0] > 0


def test_a_picture_that_is_drawn_is_the_plain_draw(tiny_sd):
    edited = Pullback(**SMALL, sides="plus").edit(tiny_sd, Given(("a red star",), (3, 4)))
    plain = tiny_sd.draw("a red star", [3, 4], sampling_steps=4, cfg_scale=1, scheduler="ddim")
    torch.testing.assert_close(edited.strips[:, 0, edited.plain], plain, rtol=0, atol=1e-5)
    assert edited.before is None and "errors" not in edited.told


def test_directions_of_a_file_are_used_and_others_refused(tiny_sd, tmp_path):
    from safetensors.torch import save_file

    edit = Pullback(**SMALL, time=0.6)
    found = edit.edit(tiny_sd, Given(("a red star",), (3,)))
    save_file({k: x.contiguous() for k, x in found.tensors.items()}, tmp_path / FILE, dict(found.labels))
    again = Pullback(**SMALL, time=0.6, use=tmp_path).edit(tiny_sd, Given(("a red star",), (3,)))
    torch.testing.assert_close(again.strips, found.strips, rtol=0, atol=1e-4)
    Pullback(**SMALL, time=0.6, use=tmp_path, common=True).edit(tiny_sd, Given(("a red star",), (3,)))
    with pytest.raises(BadInput, match="belong to where"):
        Pullback(**SMALL, time=0.6, use=tmp_path, half="decoder").edit(tiny_sd, Given(("a red star",), (3,)))
    with pytest.raises(BadInput, match="belong to time"):
        Pullback(**SMALL, time=0.2, use=tmp_path).edit(tiny_sd, Given(("a red star",), (3,)))
    other = tiny_sd.copy("full")
    with torch.no_grad():
        next(iter(other.parameters("full").values())).mul_(1.01)
    with pytest.raises(BadInput, match="belong to model"):
        Pullback(**SMALL, time=0.6, use=tmp_path).edit(other, Given(("a red star",), (3,)))
    with pytest.raises(BadInput, match="there is no 5"):
        read_directions(tmp_path, "u", found.labels, (5,))


@pytest.mark.parametrize(("dtype", "half"), [(torch.bfloat16, "decoder"), (torch.float16, "encoder")])
def test_a_pipeline_in_half_precision_has_directions_too(tiny_sd, dtype, half):
    pipe = tiny_sd.copy("all")
    for part in pipe.parts().values():
        part.to(dtype)
    pictures = torch.rand(1, 3, 16, 16, generator=rng())
    for given in (Given(("a red star",), (0,), pictures), Given(("a red star",), (0,))):
        edited = Pullback(**FEW, half=half).edit(pipe, given)
        assert edited.strips.isfinite().all() and edited.tensors["v"].dtype == torch.float32
        v = edited.tensors["v"][0].flatten(1)
        torch.testing.assert_close(v @ v.T, torch.eye(2), rtol=0, atol=1e-5)


def test_features_in_half_precision_are_those_in_full(tiny_sd):
    pipe = tiny_sd.copy("all")
    for part in pipe.parts().values():
        part.bfloat16()
    z = torch.randn(2, *pipe.latent_shape(), generator=rng())
    inside = pipe.features(z, 0.6, pipe.encode("a red star"))
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, tiny_sd.features(z, 0.6, tiny_sd.encode("a red star")), rtol=0.1, atol=0.2)


def test_pictures_of_another_size_are_analysed_and_keep_their_directions_to_themselves(tiny_sd, tmp_path):
    from safetensors.torch import save_file

    given = Given(("a red star",), (0,), torch.rand(1, 3, 32, 32, generator=rng()))
    edit = Pullback(**FEW, analyse=(0.9,), compare=("a red star", "art"))
    found = edit.edit(tiny_sd, given)
    assert found.strips.shape[-1] == 32 and len(found.told["analysis"]["frequency"]) == 1
    save_file({k: x.contiguous() for k, x in found.tensors.items()}, tmp_path / FILE, dict(found.labels))
    with pytest.raises(BadInput, match="find them anew for this one"):
        Pullback(**FEW, use=tmp_path).edit(tiny_sd, Given(("a red star",), (0,)))


def test_a_pipeline_that_hears_sizes_is_told_the_pictures(tiny_sdxl, monkeypatch):
    heard, encode = [], type(tiny_sdxl)._encode
    monkeypatch.setattr(type(tiny_sdxl), "_encode", lambda p, reads, size: heard.append(size) or encode(p, reads, size))
    edit = Pullback(**FEW, edit_prompt="art")
    edit.edit(tiny_sdxl, Given(("a red star",), (0,), torch.rand(1, 3, 32, 32, generator=rng())))
    assert tiny_sdxl.size != 32 and set(heard) == {32}


def test_analysis_has_the_papers_figures(tiny_sd):
    edit = Pullback(**SMALL, analyse=(0.3, 0.9), compare=("a red star", "art"))
    edited = edit.edit(tiny_sd, Given(("a red star",), (3, 4)))
    told = edited.told["analysis"]
    assert len(told["frequency"]) == 2 and len(edited.figures) == 4
    assert set(edited.figures[-1].lines) == {"between samples", "between prompts"}
    states = [(torch.randn(2, 3, generator=rng()), t) for t in (0.9, 0.5)]
    basis = lambda pipe, z, t, cond: Basis(z[None], z.norm()[None], (z / z.norm())[None])
    found = tangents(basis, tiny_sd, states, (0.8,), [None, None])
    a, b = states[0][0]
    assert list(found) == [0.9]
    assert apart(found[0.9]) == pytest.approx(math.acos(abs(float(a @ b / a.norm() / b.norm()))), abs=1e-5)


def test_the_papers_lengths_and_stops():
    assert [paper_gamma(t) for t in (1.0, 0.9, 0.8, 0.7, 0.6, 0.2)] == [0.5, 0.5, 1, 1, 2, 2]
    assert stops_of(16, 4) == [4, 8, 12, 16] and stops_of(5, 2) == [3, 5]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"directions": (0, 0)}, "name each direction once"),
        ({"moves": 2, "stops": 3}, "cannot be shown in 3 stops"),
        ({"iterations": (9, 3)}, "above the most"),
        ({"compare": ("a", "b")}, "times to analyse"),
        ({"where": "attic"}, "no place"),
        ({"common": True}, "name it with use"),
        ({"half": "decoder", "pinv": True}, "there is none"),
        ({"rank": 9999}, "a rank between 1 and 256"),
    ],
)
def test_bad_input(tiny_sd, settings, told):
    with pytest.raises(BadInput, match=told):
        Pullback(**{**SMALL, **settings}).edit(tiny_sd, Given(("art",)))


def test_given_that_does_not_match():
    with pytest.raises(BadInput, match="give one for each"):
        Given(("a", "b"), (0, 1, 2))
    with pytest.raises(BadInput, match=r"values in \[0, 1\]"):
        Given(pictures=torch.full((1, 3, 8, 8), 1.5))
