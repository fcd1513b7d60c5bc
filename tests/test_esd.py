"""ESD: the target's identities in float64, and the loop's on a tiny pipeline."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.erase.esd import ESD, SUBSETS, ESDu, ESDx, negative_guidance_target
from sfumato.erase.parts import visited
from sfumato.errors import BadInput
from sfumato.noise import GaussianProcess, ScaledLinearBeta

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64, a handful of operations
SHORT = {"updates": 2, "sampling_steps": 3, "lr": 1e-3}

etas = st.floats(-2, 5)
few = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31)


def predictions(seed: int, n: int = 2) -> torch.Tensor:
    return torch.randn(n, 2, 4, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@few
@given(seeds, etas)
def test_a_host_keeps_its_own_prediction_less_the_concept(seed, eta):
    e0, ec, host = predictions(seed, 3)
    torch.testing.assert_close(negative_guidance_target(e0, ec, eta, host) - host, eta * (e0 - ec), **EXACT)
    assert torch.equal(negative_guidance_target(e0, ec, eta, host=e0), negative_guidance_target(e0, ec, eta))


@few
@given(seeds, etas, st.floats(0.01, 0.99), st.sampled_from(["v", "x0", "score", "flow"]))
def test_the_target_is_the_same_whatever_the_network_predicts(seed, eta, t, kind):
    process = GaussianProcess(ScaledLinearBeta())
    e0, ec, host, z = predictions(seed, 4)
    to = lambda eps: process.convert(eps, z, t, "eps", kind)
    for given_host in ([], [host]):
        expected = to(negative_guidance_target(e0, ec, eta, *given_host))
        actual = negative_guidance_target(to(e0), to(ec), eta, *map(to, given_host))
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)  # divides by sigma >= 0.03


def test_loss_in_v_weighs_by_one_over_alpha_squared():
    process = GaussianProcess(ScaledLinearBeta())
    e0, ec, z = predictions(0, 3)
    alpha, _ = process.alpha_sigma(0.4, z)
    v0, vc = (process.convert(e, z, 0.4, "eps", "v") for e in (e0, ec))
    torch.testing.assert_close(alpha**2 * (vc - v0).square().mean(), (ec - e0).square().mean().expand(alpha.shape))


def test_first_loss_on_the_pipeline(tiny_sd):
    pipe = tiny_sd
    student = pipe.copy(own="xattn")
    esd = ESDx(concepts="star", eta=1.5, sampling_steps=4)
    esd_loss = esd.loss(pipe, student)
    # The step's own draw of (i, seed) is not ours to know: replay it from a generator in the same state.
    generator = step()
    torch.randint(1, (1,), generator=generator)
    i = int(torch.randint(4, (), generator=generator))
    seed = torch.randint(2**31, (1,), generator=generator).tolist()
    z, t = pipe.trajectory("star", seed, sampling_steps=4, stop_after=i, cfg_scale=3.0)
    with torch.no_grad():
        e0, ec = (pipe.denoiser(z, t, pipe.encode(prompt)) for prompt in ("", "star"))
    expected = (1 + 1.5) ** 2 * (ec - e0).square().mean()
    torch.testing.assert_close(esd_loss(step()).detach(), expected, rtol=1e-4, atol=1e-9)  # float32 network


@pytest.mark.parametrize("concept, eta", [("star", -1.0), (" ", 1.0)])
def test_nothing_to_learn_without_a_difference(tiny_sd, concept, eta):
    """eta = -1 asks for the concept itself; a concept encoded like the empty prompt has no guidance."""
    student = tiny_sd.copy(own="xattn")
    esd = ESDx(concepts="star", eta=eta, sampling_steps=3)
    if concept == " ":
        object.__setattr__(esd, "concepts", ("",))
    parameters = student.parameters("xattn")
    loss = esd.loss(tiny_sd, student)(step())
    loss.backward()
    assert loss.item() <= 1e-12
    assert all(p.grad is None or p.grad.abs().max() <= 1e-6 for p in parameters.values())


@pytest.mark.parametrize("variant", SUBSETS)
def test_only_the_variants_weights_change(tiny_sd, variant):
    before = {k: p.detach().clone() for k, p in tiny_sd.parameters("full").items()}
    erased = ESD(concepts="star", variant=variant, **SHORT).apply(tiny_sd)
    assert all(torch.equal(p, before[k]) for k, p in tiny_sd.parameters("full").items()), "the teacher changed"
    changed = {k for k, p in erased.parameters("full").items() if not torch.equal(p, before[k])}
    allowed = set(erased.parameters(SUBSETS[variant]))
    assert changed <= allowed
    # A bias that a following normalisation removes has a gradient of rounding size, and Adam moves it all the same;
    # only keys have none at all (softmax ignores what is added to every key), and those have no bias here.
    assert changed == allowed
    assert not any(p.requires_grad for p in erased.parameters("full").values())


def test_thin_classes_fix_the_variant(tiny_sd):
    assert (ESDx(concepts="a").variant, ESDu(concepts="a").variant) == ("x", "u")
    with pytest.raises(TypeError):
        ESDx(concepts="a", variant="u")
    both = [ESD(concepts="star", variant="u", **SHORT), ESDu(concepts="star", **SHORT)]
    a, b = (e.apply(tiny_sd).parameters("full") for e in both)
    assert all(torch.equal(a[k], b[k]) for k in a), "same seed, same result"


def test_targets_carry_no_gradient_and_training_lowers_the_loss(tiny_sd):
    esd = ESDx(concepts=("star", "circle"), updates=12, sampling_steps=3, lr=3e-3, batch=2)
    teacher, student = tiny_sd, tiny_sd.copy(own="xattn")
    before = sum(float(esd.loss(teacher, student)(step(i)).detach()) for i in range(4))
    erased, log = esd.run(teacher)
    losses = log["losses"]
    after = sum(float(esd.loss(teacher, erased)(step(i)).detach()) for i in range(4))
    assert len(losses) == 12
    assert after < before
    assert not any(p.grad is not None for p in teacher.parameters("full").values())


def test_a_pool_gives_the_teachers_own_latents(tiny_sd):
    esd = ESDx(concepts=("star", "circle"), sampler="teacher", pool=4, sampling_steps=3)
    asked = tiny_sd.encode(esd.concepts)
    latents = esd._latents(tiny_sd, tiny_sd, asked)
    generator = torch.Generator().manual_seed(esd.seed)
    seeds = torch.randint(2**31, (4,), generator=generator).tolist()
    every = [
        tiny_sd.trajectory(asked[[0, 1, 0, 1]], seeds, sampling_steps=3, stop_after=i, cfg_scale=3.0) for i in range(3)
    ]
    for trial in range(6):
        z, t = latents(torch.tensor([1, 0]), step(trial))
        (state,) = (z_i for z_i, t_i in every if t_i == t)
        assert any(torch.equal(z[0], state[k]) for k in (1, 3)), "a row of concept 1"
        assert any(torch.equal(z[1], state[k]) for k in (0, 2)), "a row of concept 0"


@pytest.mark.parametrize("of", [visited.pooled, visited.noised])
def test_a_pool_is_sampled_in_parts_that_fit_and_is_the_same(tiny_sd, of, monkeypatch):
    asked, at_once = tiny_sd.encode(["star", "circle"]), []
    draw = lambda: of(tiny_sd, asked, 5, 0, 3, cfg_scale=3.0)
    whole = draw()
    monkeypatch.setattr(visited, "AT_ONCE", 2)
    hook = tiny_sd.network.register_forward_pre_hook(lambda _, args: at_once.append(len(args[0])))
    try:
        parts = draw()
    finally:
        hook.remove()
    assert max(at_once) == 4, "two trajectories, both halves of guidance"
    for trial in range(6):
        (a, t), (b, same) = (latents(torch.tensor([1, 0, 1]), step(trial)) for latents in (whole, parts))
        assert t == same
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # the rounding of batching


def test_hosts_anchors_and_preserved_prompts(tiny_sd):
    options = {"concepts": "star", "sampling_steps": 3, "sampler": "teacher"}
    student = tiny_sd.copy(own="xattn")
    at_start = lambda **more: float(ESDx(**options, **more).loss(tiny_sd, student)(step()).detach())
    # At the start the student predicts the host itself, so what is left is eta^2 |ec - e0|^2.
    assert at_start(erase_from="red star", eta=0.0) <= 1e-12
    assert at_start(erase_from="red star", eta=1.0) > 0
    # Preserved prompts cost nothing before anything has moved.
    assert at_start(preserve=("blue square",)) == pytest.approx(at_start(), rel=1e-4)


def test_it_works_on_sdxl(tiny_sdxl):
    erased = ESDx(concepts="star", updates=1, sampling_steps=2, lr=1e-3).apply(tiny_sdxl)
    before, after = tiny_sdxl.parameters("xattn"), erased.parameters("xattn")
    assert any(not torch.equal(before[k], after[k]) for k in after)


def test_the_plan_counts_what_is_trained(tiny_sd):
    plan = ESDx(concepts="star", **SHORT).plan(tiny_sd)
    trained = sum(p.numel() for p in tiny_sd.parameters("xattn").values())
    assert plan.memory["gradients"] == 4 * trained
    assert plan.memory["optimiser"] == 8 * trained
    assert plan.seconds > 0


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"variant": "xattn"}, "x, u, full"),
        ({"pool": 4}, "teacher"),
        ({"updates": 0}, "updates must be at least 1"),
        ({"lr": 0.0}, "lr must be more than 0"),
        ({"sampler": "nobody"}, "unknown sampler 'nobody': choose one of student, teacher"),
        ({"erase_from": ("a", "b")}, "erase_from"),
        ({"concepts": " "}, "concept"),
        ({"concepts": ("circle", "star"), "anchors": "Star "}, "'star' is its own anchor"),
        ({"concepts": ("circle", "star"), "anchors": ("a", "Circle")}, "'star' would turn into 'Circle', which is"),
    ],
)
def test_bad_settings_get_one_sentence(wrong, words):
    with pytest.raises(BadInput, match=words):
        ESD(**{"concepts": "star", **wrong})
