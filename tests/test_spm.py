"""SPM: anchors, matches and losses in float64; adapters, transport and files on a tiny pipeline."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn.functional import mse_loss

from conftest import noise_behind
from matrix.families import FAMILIES
from sfumato.erase.esd import negative_guidance_target
from sfumato.erase.spm import SPM, draw_anchors, random_conditionings, spm_loss
from sfumato.errors import BadInput, SfumatoError
from sfumato.pipeline import load
from sfumato.pipeline.equip import equip
from sfumato.pipeline.membrane import (
    Membrane,
    attach,
    embedding_match,
    load_membranes,
    save_lora,
    save_membranes,
    token_match,
    transport_strength,
)  # fmt: skip
from sfumato.pipeline.membrane import (
    _gamma as gamma_of,
)

SHORT = {"updates": 3, "warmup": 1, "sampling_steps": 3, "n_anchors": 2, "lr": 1e-2}

few = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def double(pipe):
    """The pipeline with a network in float64, for identities that float32 would blur."""
    made = pipe.copy("all")
    made.network.double()
    return made


def random_membrane(pipe, concept: str, seed: int, size: float = 0.3) -> Membrane:
    """A membrane whose factors are all random: a fresh adapter's up is zero."""
    adapter = pipe.copy().add_adapter("a", generator=generator(seed))
    made = Membrane.of(adapter, (concept,), "base")
    weights = {k: size * torch.randn(x.shape, generator=generator(seed + 1)).to(x) for k, x in made.weights.items()}
    return Membrane(made.concepts, made.rank, made.alpha, weights, made.base)


@pytest.fixture(scope="module")
def pipe(tiny_sd):
    return double(tiny_sd)


@pytest.fixture(scope="module")
def two(pipe):
    return [random_membrane(pipe, "red star", 1), random_membrane(pipe, "circle", 5)]


def latents(pipe, n: int, seed: int = 3) -> torch.Tensor:
    return normal(n, *pipe.latent_shape(), seed=seed)


def predict(pipe, prompts, n: int = 1, z=None):
    z = latents(pipe, len(prompts) * n) if z is None else z
    with torch.no_grad():
        return pipe.denoiser(z, 0.5, pipe.encode(prompts).repeat(n))


# Anchors


@few
@given(seeds, st.floats(0.1, 10))
def test_anchors_have_nearly_the_concepts_norm(seed, size):
    concept = size * normal(4, 6, seed=seed % 1000)
    norms = draw_anchors(concept, 5, generator(seed)).flatten(1).norm(dim=1) / concept.norm()
    assert norms.min() >= 0.8 - 1e-9
    assert norms.max() <= 1.2 + 1e-9
    assert len(set(norms.tolist())) == 5


def test_anchors_that_resemble_the_concept_are_drawn_less():
    """In one dimension a direction is +-1, with cosine +-1 to the concept: only the opposite is ever accepted."""
    assert (draw_anchors(torch.tensor([2.0]), 50, generator()) < 0).all()
    # In two dimensions accepted angles have a density proportional to min(1, 1 - cos). Integrating over the circle,
    # the mean of cos is -(pi / 2) / (2 pi - 2) and that of its square (pi - 4 / 3) / (2 pi - 2).
    concept = torch.tensor([1.0, 0.0], dtype=torch.float64)
    drawn = draw_anchors(concept, 2000, generator(), scale=(1.0, 1.0))
    mean, square = -math.pi / 2 / (2 * math.pi - 2), (math.pi - 4 / 3) / (2 * math.pi - 2)
    error = math.sqrt((square - mean**2) / 2000)
    assert float(drawn[:, 0].mean()) == pytest.approx(mean, abs=4 * error)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_anchors_of_an_embedding_that_is_not_finite_are_not_waited_for(number):
    concept = normal(3, 4)
    concept[0, 0] = number
    with pytest.raises(SfumatoError, match="not finite"):
        draw_anchors(concept, 2, generator())


def test_anchor_rejection_is_inert_in_the_width_of_real_encoders():
    concept = normal(77, 768)
    drawn = draw_anchors(concept, 4, generator())
    cosines = (drawn.flatten(1) @ concept.flatten()) / drawn.flatten(1).norm(dim=1) / concept.norm()
    assert cosines.abs().max() < 6 / math.sqrt(77 * 768)  # six standard deviations


def test_tokens_and_pooled_embeddings_are_drawn_apart(tiny_sdxl):
    cond = tiny_sdxl.encode("star")
    (first, second) = random_conditionings(tiny_sdxl, cond, 2, generator())
    assert first.tokens.shape == cond.tokens.shape and first.pooled.shape == cond.pooled.shape
    for anchor in (first, second):
        assert 0.8 - 1e-5 <= float(anchor.pooled.norm() / cond.pooled.norm()) <= 1.2 + 1e-5
        assert 0.8 - 1e-5 <= float(anchor.tokens.norm() / cond.tokens.norm()) <= 1.2 + 1e-5
    assert not torch.equal(first.tokens, second.tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_anchors_are_as_long_as_the_concept_in_what_the_network_looks_at(family, request):
    p = request.getfixturevalue(family)
    cond = p.encode(["star"])
    anchors = random_conditionings(p, cond, 4, generator())
    norms = [float(p.as_seen(c).tokens.norm()) for c in (cond, *anchors)]
    assert 0.8 - 1e-5 <= min(norms[1:]) / norms[0] <= max(norms[1:]) / norms[0] <= 1.2 + 1e-5


# The loss


@few
@given(seeds, st.floats(0, 4), st.floats(0, 2000))
def test_loss_is_erasure_plus_weighted_mean_over_anchors(seed, eta, weight):
    e0, ec, erased = normal(3, 2, 4, 3, 3, seed=seed)
    anchored, original = normal(2, 5, 4, 3, 3, seed=seed + 1)
    target = negative_guidance_target(e0, ec, eta)
    each = [(a - o).square().mean() for a, o in zip(anchored, original, strict=True)]
    expected = (erased - target).square().mean() + weight * sum(each) / len(each)
    torch.testing.assert_close(spm_loss(erased, target, anchored, original, weight), expected, rtol=1e-12, atol=1e-12)


def replay(spm: SPM, pipe, seed: int):
    """The latent and the time that a step with this seed uses before anything is trained."""
    draws = generator(seed)
    m = 1 + int(torch.randint(spm.sampling_steps - 1, (), generator=draws))
    start = torch.randint(2**31, (1,), generator=draws).tolist()
    options = {"sampling_steps": spm.sampling_steps, "stop_after": m, "cfg_scale": spm.start_guidance}
    z, _ = pipe.trajectory(pipe.encode(spm.concepts[0]), start, **options)
    return z, 1 - (m * 1000 // spm.sampling_steps) / 1000


def test_first_loss_on_the_pipeline_is_the_squared_guidance(tiny_sd):
    spm = SPM(concepts="star", eta=1.5, sampling_steps=4, n_anchors=2, anchor_empty=True, preserve=("blue",))
    student = tiny_sd.copy()
    student.add_adapter("spm", generator=generator())
    z, t = replay(spm, tiny_sd, seed=2)
    with torch.no_grad():
        e0, ec = (tiny_sd.denoiser(z, t, tiny_sd.encode(prompt)) for prompt in ("", "star"))
    loss = spm.loss(tiny_sd, student, 0)(generator(2)).detach()
    # The anchoring term is 0 up to float32 noise, times 1000.
    torch.testing.assert_close(loss, (1 + 1.5) ** 2 * (ec - e0).square().mean(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("family", ["tiny_sd3", "tiny_flux"])
def test_the_network_is_told_the_time_that_the_latents_of_a_flow_have(family, request, monkeypatch):
    """Their schedulers' shift moves the times of all steps."""
    p, told, passed = request.getfixturevalue(family), [], []
    student = p.copy()
    student.add_adapter("spm", generator=generator())
    walk, M = student.trajectory, 7

    def noted(*args, stop_after, **options):
        z, t = walk(*args, stop_after=stop_after, **options)
        passed.append((stop_after, t))
        return z, t

    monkeypatch.setattr(student, "trajectory", noted)
    hook = p.network.register_forward_pre_hook(lambda _, args, given: told.append(given["timestep"]), with_kwargs=True)
    try:
        for seed in range(3):
            SPM(concepts="star", sampling_steps=M, n_anchors=1).loss(p, student, 0)(generator(seed))
            assert (told[-1] == p.clock.number(passed[-1][1]).to(told[-1])).all()
    finally:
        hook.remove()
    assert all(abs(t - (1 - m / M)) > 1e-2 for m, t in passed) and len(set(passed)) > 1


def test_anchoring_is_silent_at_the_start_and_only_up_learns(pipe):
    student = pipe.copy()
    adapter = student.add_adapter("spm", generator=generator())
    cond = pipe.encode("star")
    anchors = random_conditionings(pipe, cond, 1, generator())[0]
    z = latents(pipe, 1)
    with torch.no_grad():
        original = pipe.denoiser(z, 0.5, anchors)
        target = negative_guidance_target(pipe.denoiser(z, 0.5, pipe.encode("")), pipe.denoiser(z, 0.5, cond), 1.0)
    anchoring = mse_loss(student.denoiser(z, 0.5, anchors), original)
    anchoring.backward()
    assert anchoring.item() == 0
    assert all(p.grad.abs().max() == 0 for p in adapter.up.values())
    mse_loss(student.denoiser(z, 0.5, cond), target).backward()
    assert all(p.grad.abs().max() == 0 for p in adapter.down.values())
    assert any(p.grad.abs().max() > 0 for p in adapter.up.values())


def test_without_anchoring_it_is_esd_in_two_factors(pipe):
    """lambda = 0: the gradient of a factor is ESD's gradient of the weight, seen through the other factor."""
    spm = SPM(concepts="star", anchor_weight=0.0, sampling_steps=4)
    student, full = pipe.copy(), pipe.copy("full")
    adapter = student.add_adapter("spm", alpha=2.0, generator=generator())
    spm.loss(pipe, student, 0)(generator(2)).backward()
    z, t = replay(spm, pipe, seed=2)
    with torch.no_grad():
        e0, ec = (pipe.denoiser(z, t, pipe.encode(prompt)) for prompt in ("", "star"))
    mse_loss(full.denoiser(z, t, full.encode("star")), negative_guidance_target(e0, ec, spm.eta)).backward()
    for name in adapter.layers:
        gradient = full.network.get_submodule(name).weight.grad.flatten(1)
        expected = 2.0 * gradient @ adapter.down[name].detach().flatten(1).T
        # Latents of the two runs differ by the rounding of batching: float64, but through a whole trajectory.
        torch.testing.assert_close(adapter.up[name].grad, expected, rtol=1e-6, atol=1e-12)


# Facilitated transport


@few
@given(seeds, st.floats(0.1, 5))
def test_embedding_match_is_one_for_the_same_direction(seed, size):
    a, b = normal(2, 3, 4, 5, seed=seed)
    match = embedding_match(a, torch.cat([size * a[:1], b]))
    torch.testing.assert_close(match[0, 0], torch.tensor(1.0, dtype=torch.float64))
    assert match.abs().max() <= 1 + 1e-12
    expected = (a[1] * b[2]).sum() / a[1].norm() / b[2].norm()
    torch.testing.assert_close(match[1, 3], expected)


@few
@given(st.lists(st.integers(10, 20), max_size=5), st.lists(st.integers(10, 20), min_size=1, max_size=5))
def test_token_match_counts_distinct_shared_tokens(asked, erased):
    pad = lambda ids: [0, *ids, 1] + [1] * (5 - len(ids))
    match = token_match(torch.tensor([pad(asked)]), torch.tensor([pad(erased)]), special={0, 1})
    assert match.item() == pytest.approx(len(set(asked) & set(erased)) / len(set(erased)), abs=1e-15)


def test_strength_of_prompts_on_the_pipeline(tiny_sd):
    special = set(tiny_sd.pipe.tokenizer.all_special_ids)
    concept = tiny_sd.encode(["red star"])
    prompts = ["red star", "a photo of a star red", "star", "blue circle", ""]
    gamma = transport_strength(tiny_sd.encode(prompts), concept, special)
    torch.testing.assert_close(gamma[:2], torch.ones(2), rtol=0, atol=1e-6)  # float32 cosine; all tokens present
    assert gamma[2] >= 0.5
    assert gamma[3] < 1 and gamma[4] < 1
    tokens = transport_strength(tiny_sd.encode(prompts), concept, special, "tokens")
    assert tokens.tolist() == [1, 1, 0.5, 0, 0]
    embedding = transport_strength(tiny_sd.encode(prompts), concept, special, "embedding")
    assert torch.equal(gamma, torch.maximum(tokens, embedding))
    several = transport_strength(tiny_sd.encode(prompts), tiny_sd.encode(["red star", "circle"]), special)
    assert several[3] == 1 and (several >= gamma).all()


def test_strength_goes_by_what_the_network_looks_at(tiny_pixart):
    concept, cond = tiny_pixart.as_seen(tiny_pixart.encode("red star")), tiny_pixart.encode("a photo of a blue circle")
    gamma = gamma_of(tiny_pixart, ("red star",), "embedding")
    rows = lambda c: c.tokens[c.mask].double().flatten()
    mine, other = rows(concept), rows(cond)
    expected = mine @ other[: len(mine)] / (mine.norm() * other.norm())
    assert gamma(cond) == gamma(noise_behind(cond)) == pytest.approx(float(expected), abs=1e-6)


def test_strength_depends_on_no_other_prompt_of_the_batch(tiny_omnigen):
    """Which may have been padded with what the network does not look at."""
    gamma, asked = gamma_of(tiny_omnigen, ("red star",), "embedding"), ["blue circle", "a photo of a red star"]
    together = gamma(tiny_omnigen.encode(asked))
    torch.testing.assert_close(together, torch.cat([gamma(tiny_omnigen.encode([one])) for one in asked]))


def gates(pipe):
    """The adapters' strengths for some prompts, as sampling would set them."""
    return lambda prompts: torch.stack([a.gate(pipe.encode(prompts)) for a in pipe.adapters.values()])


def test_sampling_uses_one_strength_per_picture_for_both_halves_of_guidance(pipe, two):
    """Every picture equals one drawn alone with its adapters fixed at its own gammas."""
    made = attach(pipe, two)
    prompts = ["red star", "a blue circle", "art"]
    together = made.draw(prompts, [1, 2, 3], sampling_steps=2, cfg_scale=3.0)
    gammas = gates(made)(prompts)
    fixed = attach(pipe, two, transport="none")
    for k, prompt in enumerate(prompts):
        for adapter, gamma in zip(fixed.adapters.values(), gammas[:, k], strict=True):
            adapter.scale = float(gamma)
        alone = fixed.draw(prompt, k + 1, sampling_steps=2, cfg_scale=3.0)
        torch.testing.assert_close(together[k : k + 1], alone, rtol=0, atol=1e-5)
    assert not torch.allclose(together, pipe.draw(prompts, [1, 2, 3], sampling_steps=2, cfg_scale=3.0), atol=1e-3)


# Adapters: silent at the start, linear, commutative, merged


def test_a_fresh_or_switched_off_membrane_changes_nothing(pipe, two):
    base = predict(pipe, ["star"])
    fresh = pipe.copy()
    fresh.add_adapter("spm", generator=generator())
    assert torch.equal(predict(fresh, ["star"]), base)
    trained = attach(pipe, two, transport="none")
    assert not torch.allclose(predict(trained, ["star"]), base)
    for adapter in trained.adapters.values():
        adapter.scale = 0.0
    assert torch.equal(predict(trained, ["star"]), base)


def effect(pipe, layer: str, x: torch.Tensor) -> torch.Tensor:
    """What the adapters add to one layer's output."""
    module = pipe.network.get_submodule(layer)
    with torch.no_grad():
        return module(x) - module.forward(x)


def test_composition_commutes_and_is_linear_in_each_strength(pipe, two):
    layer = next(n for n in two[0].layers if n.endswith("attn2.to_k"))
    x = normal(2, 5, pipe.network.get_submodule(layer).in_features)
    one, other = (attach(pipe, [m], transport="none") for m in two)
    both, reverse = attach(pipe, two, transport="none"), attach(pipe, two[::-1], transport="none")
    exact = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(effect(both, layer, x), effect(one, layer, x) + effect(other, layer, x), **exact)
    torch.testing.assert_close(effect(both, layer, x), effect(reverse, layer, x), **exact)
    for gamma in (0.25, -1.5):
        next(iter(both.adapters.values())).scale = gamma
        expected = gamma * effect(one, layer, x) + effect(other, layer, x)
        torch.testing.assert_close(effect(both, layer, x), expected, **exact)


def test_the_official_composition_is_the_product_of_the_sums(pipe, two):
    layer = next(n for n in two[0].layers if n.endswith("attn2.to_k"))
    x = normal(3, 5, pipe.network.get_submodule(layer).in_features)
    prompts = ["star", "blue circle", "red"]
    made, plain = attach(pipe, two, composition="official"), attach(pipe, two)
    for adapter, gamma in zip(made.adapters.values(), gates(made)(prompts), strict=True):
        adapter.scale = gamma
    gammas = gates(plain)(prompts)
    for row in range(3):
        up, down = (
            sum(gammas[k, row] * two[k].weights[f"{layer}.{which}"] for k in range(2)) for which in ("up", "down")
        )
        # The strengths come from a text encoder in float32.
        torch.testing.assert_close(effect(made, layer, x)[row], x[row] @ down.T @ up.T, rtol=1e-5, atol=1e-7)


def test_one_membrane_in_the_official_form_acts_with_the_square(pipe, two):
    prompts = ["star", "blue circle"]
    official, paper = (gates(attach(pipe, two[:1], composition=c))(prompts) for c in ("official", "paper"))
    torch.testing.assert_close(official, paper**2)


def test_merged_weights_equal_the_hooked_forward(pipe, two):
    made = attach(pipe, two, transport="none")
    whole = made.merged()
    assert not whole.adapters
    torch.testing.assert_close(predict(whole, ["star", ""]), predict(made, ["star", ""]), rtol=1e-9, atol=1e-9)
    assert torch.equal(predict(pipe, ["star"]), predict(pipe.copy(), ["star"]))


def test_the_description_tells_an_adapted_pipeline_from_its_base(tiny_sd):
    adapted, other = (attach(tiny_sd, [random_membrane(tiny_sd, "star", seed)]) for seed in (1, 5))
    described = [p.describe() for p in (tiny_sd, adapted, other)]
    assert "adapters" not in described[0]
    assert described[1]["sha256"] == described[0]["sha256"], "the weights are the base's"
    assert described[1]["adapters"]["spm.0"] != described[2]["adapters"]["spm.0"]
    assert adapted.merged().describe()["sha256"] != described[0]["sha256"]


def test_number_of_parameters(tiny_sd):
    """Per transformer block with one layer: 32 C + 2 x the text's width (card: 32 C + 1536 on SD 1.x)."""
    adapter = tiny_sd.copy().add_adapter("spm")
    expected = sum(32 * p.shape[0] + 2 * p.shape[1] for p in tiny_sd.projections("cross.k"))
    assert sum(p.numel() for p in adapter.parameters()) == expected


# Training


def test_training_moves_only_its_own_adapter(tiny_sd):
    before = {k: p.detach().clone() for k, p in tiny_sd.parameters("full").items()}
    erased = SPM(concepts=("star", "circle"), **SHORT).apply(tiny_sd)
    assert list(erased.adapters) == ["spm.0", "spm.1"]
    for pipe in (tiny_sd, erased):
        assert all(torch.equal(p, before[k]) for k, p in pipe.parameters("full").items())
    assert not tiny_sd.adapters
    assert all(p.abs().max() > 0 for a in erased.adapters.values() for p in a.up.values())
    assert not any(p.requires_grad for a in erased.adapters.values() for p in a.parameters())


def test_each_concept_is_trained_as_if_alone(tiny_sd):
    together = SPM(concepts=("star", "circle"), **SHORT).train(tiny_sd)[0]
    ((alone,), _) = SPM(concepts="circle", **SHORT).train(tiny_sd)
    assert together[1].concepts == alone.concepts == ("circle",)
    assert all(torch.equal(x, alone.weights[k]) for k, x in together[1].weights.items())
    assert together[0].base == tiny_sd.describe()["sha256"]


def test_training_lowers_the_loss(tiny_sd):
    spm = SPM(concepts="star", **{**SHORT, "updates": 16, "anchor_weight": 10.0, "batch": 2, "restarts": 1})
    student = tiny_sd.copy()
    student.add_adapter("spm", generator=generator())
    start = sum(float(spm.loss(tiny_sd, student, 0)(generator(i)).detach()) for i in range(3))
    adapter, losses = spm.train_one(tiny_sd, 0)
    trained = attach(tiny_sd, [Membrane.of(adapter, spm.concepts, "")], transport="none")
    end = sum(float(spm.loss(tiny_sd, trained, 0)(generator(i)).detach()) for i in range(3))
    assert len(losses) == 16
    assert end < start


def test_it_works_on_sdxl(tiny_sdxl):
    erased = SPM(concepts="star", **{**SHORT, "updates": 1, "sampling_steps": 2}).apply(tiny_sdxl)
    assert erased.draw("star", 0, sampling_steps=1).shape[0] == 1


@pytest.mark.parametrize("changes", [{}, {"preserve": ("blue",)}, {"anchor_empty": True}])
def test_without_random_anchors_what_is_left_is_held(tiny_sd, tiny_sdxl, changes):
    for pipe in (tiny_sd, tiny_sdxl):
        assert random_conditionings(pipe, pipe.encode("star"), 0, generator()) == []
    student = tiny_sd.copy()
    adapter = student.add_adapter("spm", generator=generator())
    for up in adapter.up.values():
        torch.nn.init.normal_(up, std=0.3, generator=generator(2))
    loss = lambda n, weight: float(
        SPM(concepts="star", sampling_steps=2, n_anchors=n, anchor_weight=weight, **changes)
        .loss(tiny_sd, student, 0)(generator()).detach()
    )  # fmt: skip
    assert (loss(0, 10.0) > loss(0, 0.0)) == bool(changes)


# Files


def same(a: Membrane, b: Membrane) -> bool:
    head = (a.concepts, a.rank, a.alpha, a.base) == (b.concepts, b.rank, b.alpha, b.base)
    equal = [torch.equal(x, b.weights[k]) for k, x in a.weights.items() if k in b.weights]
    return head and len(equal) == len(a.weights) == len(b.weights) and all(equal)


def test_files_keep_membranes_to_the_bit_and_combine(pipe, two, tmp_path):
    save_membranes(tmp_path / "both.safetensors", two)
    assert all(map(same, two, load_membranes(tmp_path / "both.safetensors", pipe)))
    for k, membrane in enumerate(two):
        save_membranes(tmp_path / f"{k}.safetensors", [membrane])
    joined = [m for k in range(2) for m in load_membranes(tmp_path / f"{k}.safetensors", pipe)]
    prompts = ["star", ""]
    assert torch.equal(predict(attach(pipe, joined), prompts), predict(attach(pipe, two), prompts))
    with pytest.raises(BadInput, match="exists"):
        save_membranes(tmp_path / "0.safetensors", two)


def test_files_of_the_published_code_are_read(pipe, two, tmp_path):
    tensors = {}
    for layer in two[0].layers:
        key = "lora_unet_" + layer.replace(".", "_")
        down, up = (two[0].weights[f"{layer}.{which}"] for which in ("down", "up"))
        tensors[f"{key}.lora_down.weight"] = down.contiguous()
        tensors[f"{key}.lora_up.weight"] = up.view(*up.shape, *[1] * (down.ndim - 2)).contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "a.safetensors", metadata={"prompts": "red star", "rank": "1", "alpha": "1.0"})
    (read,) = load_membranes(tmp_path / "a.safetensors", pipe)
    assert (read.concepts, read.rank, read.alpha) == (("red star",), 1, 1.0)
    assert torch.equal(predict(attach(pipe, [read]), ["star"]), predict(attach(pipe, two[:1]), ["star"]))


def test_the_saved_folder_is_merged_and_carries_adapter_and_lora(tiny_sd, tmp_path):
    from diffusers import StableDiffusionPipeline

    from sfumato.pipeline import load, wrap

    membranes = [random_membrane(tiny_sd, "star", 1, 0.1), random_membrane(tiny_sd, "circle", 5, 0.1)]
    made = attach(tiny_sd, membranes)
    made.save(tmp_path / "erased")
    expected = predict(made, ["star"])  # outside sampling: strength 1
    plain = load(tmp_path / "erased")
    torch.testing.assert_close(predict(plain, ["star"]), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(predict(tiny_sd, ["star"]), expected, atol=1e-3)
    again = attach(tiny_sd, load_membranes(tmp_path / "erased" / "adapter.safetensors", tiny_sd))
    assert torch.equal(predict(again, ["star"]), expected)
    tiny_sd.copy().save(tmp_path / "base")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "base")
    pipe.load_lora_weights(tmp_path / "erased" / "lora")
    with_lora = wrap(pipe)
    torch.testing.assert_close(predict(with_lora, ["star"]), expected, rtol=1e-4, atol=1e-5)
    assert "transport is off" in (tmp_path / "erased" / "lora" / "README.md").read_text()


def test_adapters_are_attached_by_their_folder(pipe, two, tmp_path):
    """As ``--adapter`` does it: to the original with transport; not on top of weights that hold them already."""
    attach(pipe, two).save(tmp_path / "erased")
    equipped = equip(pipe, "the original", [tmp_path / "erased"])
    expected = attach(pipe, two).draw("a star", 0, sampling_steps=2)
    assert torch.equal(equipped.draw("a star", 0, sampling_steps=2), expected)
    assert equip(pipe, "any", ()) is pipe
    with pytest.raises(BadInput, match="merged in already"):
        equip(load(tmp_path / "erased", "cpu"), tmp_path / "erased", [tmp_path / "erased"])
    with pytest.raises(BadInput, match="no adapter file"):
        equip(pipe, "the original", [tmp_path])
    with pytest.raises(BadInput, match="no strength"):
        equip(pipe, "the original", [f"{tmp_path / 'erased'}:0.5"])


def test_lora_of_several_ranks_and_both_spellings(pipe, tmp_path):
    adapter = pipe.copy().add_adapter("a", rank=2, alpha=3.0, generator=generator())
    weights = {k: normal(*x.shape, seed=i) / 4 for i, (k, x) in enumerate(adapter.state_dict().items())}
    membranes = [random_membrane(pipe, "star", 1), Membrane(("circle",), 2, 3.0, weights)]
    made = attach(pipe, membranes)
    for style in ("diffusers", "webui"):
        save_lora(tmp_path / f"{style}.safetensors", made, style)
        loaded = pipe.copy()
        loaded.load_adapter("lora", tmp_path / f"{style}.safetensors")
        torch.testing.assert_close(predict(loaded, ["star"]), predict(made, ["star"]), rtol=1e-9, atol=1e-9)


def test_lora_has_the_strength_of_what_is_attached(pipe, tmp_path):
    made = pipe.copy()
    for i, scale in enumerate((0.25, torch.tensor(-2.0))):
        adapter = made.add_adapter(f"a{i}", rank=i + 1, alpha=3.0, generator=generator(i))
        adapter.load_state_dict({k: normal(*x.shape, seed=i) / 4 for k, x in adapter.state_dict().items()})
        adapter.scale = scale
    loaded = pipe.copy()
    save_lora(tmp_path / "l.safetensors", made)
    loaded.load_adapter("lora", tmp_path / "l.safetensors")
    torch.testing.assert_close(predict(loaded, ["star"]), predict(made, ["star"]), rtol=1e-9, atol=1e-9)
    adapter.scale = torch.tensor([1.0, 2.0])
    with pytest.raises(BadInput, match="one scale per picture"):
        save_lora(tmp_path / "m.safetensors", made)


def test_files_that_are_no_membranes(pipe, two, tmp_path):
    with pytest.raises(BadInput, match="no adapter file"):
        load_membranes(tmp_path / "absent.safetensors", pipe)
    (tmp_path / "broken.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(BadInput, match="truncated or corrupt"):
        load_membranes(tmp_path / "broken.safetensors", pipe)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(BadInput, match="no adapter file"):
        load_membranes(tmp_path / "other.safetensors", pipe)
    save_membranes(tmp_path / "a.safetensors", two[:1])
    stray = load_file(tmp_path / "a.safetensors")
    stray["0.nowhere.down"], stray["0.nowhere.up"] = torch.zeros(1, 2), torch.zeros(2, 1)
    header = {"sfumato.membranes": json.dumps([{"concepts": ["a"], "rank": 1, "alpha": 1.0, "base": ""}])}
    save_file(stray, tmp_path / "stray.safetensors", metadata=header)
    with pytest.raises(BadInput, match="nowhere"):
        attach(pipe, load_membranes(tmp_path / "stray.safetensors", pipe))


@pytest.fixture(scope="module")
def apart(pipe, two):
    """Two membranes that share some layers and have others of their own."""
    layers = two[0].layers
    return [
        Membrane(m.concepts, m.rank, m.alpha, {k: x for k, x in m.weights.items() if k.rsplit(".", 1)[0] in some})
        for m, some in zip(two, (layers[:-3], layers[3:]), strict=True)
    ]


@pytest.mark.parametrize("composition", ["paper", "official"])
def test_membranes_on_different_layers_combine(pipe, apart, composition):
    """On a layer of one alone, it acts as if alone; on a shared one, as the composition says."""
    made = attach(pipe, apart, "none", composition)
    layers = [apart[0].layers[0], apart[0].layers[-1], apart[1].layers[-1]]
    assert layers[0] not in apart[1].layers and layers[1] in apart[1].layers and layers[2] not in apart[0].layers
    for layer in layers:
        weight = pipe.network.get_submodule(layer).weight
        here = [m.weights for m in apart if layer in m.layers]
        ups, downs = ([w[f"{layer}.{which}"].flatten(1) for w in here] for which in ("up", "down"))
        each = sum(u @ d for u, d in zip(ups, downs, strict=True))
        expected = sum(ups) @ sum(downs) if composition == "official" else each
        added = made.merged().network.get_submodule(layer).weight - weight
        torch.testing.assert_close(added, expected.view_as(weight).to(added), rtol=1e-6, atol=1e-7)


def test_membranes_on_different_layers_are_saved(pipe, apart, tmp_path):
    made = attach(pipe, apart, "none")
    made.save(tmp_path / "erased")
    again = attach(pipe, load_membranes(tmp_path / "erased", pipe), "none")
    assert torch.equal(predict(again, ["star"]), predict(made, ["star"]))
    loaded = pipe.copy()
    loaded.load_adapter("lora", tmp_path / "erased" / "lora" / "pytorch_lora_weights.safetensors")
    torch.testing.assert_close(predict(loaded, ["star"]), predict(made, ["star"]), rtol=1e-9, atol=1e-9)


def test_attach_refuses_what_it_cannot_do(pipe, two):
    with pytest.raises(BadInput, match="at least one"):
        attach(pipe, [])
    with pytest.raises(BadInput, match="transport"):
        attach(pipe, two, transport="always")
    with pytest.raises(BadInput, match="merge or remove"):
        attach(attach(pipe, two), two)
    with pytest.raises(BadInput, match="rank"):
        attach(pipe, [two[0], Membrane(("a",), 2, 1.0, {})], composition="official")


def test_the_plan_counts_what_is_trained(tiny_sd):
    spm = SPM(concepts=("star", "circle"), **SHORT)
    plan = spm.plan(tiny_sd)
    trained = sum(p.numel() for p in tiny_sd.copy().add_adapter("spm").parameters())
    assert plan.memory["gradients"] == 4 * trained
    assert plan.memory["optimiser"] == 8 * trained
    assert plan.seconds > 0
    assert not tiny_sd.adapters


@pytest.mark.parametrize(
    "wrong", [{"updates": 0}, {"rank": 0}, {"lr": -1.0}, {"sampling_steps": 1}, {"n_anchors": -1}, {"concepts": ""}]
)
def test_bad_settings(wrong):
    with pytest.raises(BadInput, match=next(iter(wrong)).removesuffix("s")):
        SPM(**{"concepts": "star", **wrong})
