"""T2I-Zero: both algorithms against loops and identities in float64, and where they act in pipelines."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch

from sfumato import cli
from sfumato.errors import BadInput
from sfumato.pipeline.attention import grid
from sfumato.pipeline.conditioning import Role
from sfumato.steer.faster_diffusion import FasterDiffusion
from sfumato.steer.parts.concepts import Concepts, phrases
from sfumato.steer.parts.suppression import smooth
from sfumato.steer.t2i_zero import T2IZero, cbs, ctnms, similarities

PROMPT = "a red star and a blue circle"


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def maps(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(-1)


# Correction by similarities


def loop(f, concepts, alpha, gamma, tau):
    """Algorithm 1 element by element."""
    out = f.clone()
    n, d = f.shape
    for c in concepts:
        top = max(float(f[c, j] * f[i, j]) for i in range(n) for j in range(d))
        for j in range(d):
            total = 0.0
            for i in range(max(0, c - gamma), min(n, c + gamma + 1)):
                s = float(f[c, j] * f[i, j]) / top
                total += (s if s > tau else 0.0) * float(f[i, j])
            out[c, j] = (1 - alpha) * f[c, j] + alpha * total
    return out


@pytest.mark.parametrize(("gamma", "tau"), [(0, 0.0), (1, 0.05), (3, 0.2), (20, 0.0)])
def test_it_is_algorithm_1(gamma, tau):
    f = randn(11, 6)
    torch.testing.assert_close(cbs(f, [2, 3, 9], 0.4, gamma, tau), loop(f, [2, 3, 9], 0.4, gamma, tau))


def test_without_a_window_it_is_a_cube():
    f, a, c = randn(9, 5), 0.7, 4
    top = (f[c] * f).max()
    torch.testing.assert_close(cbs(f, [c], a, 0, 0.0)[c], (1 - a) * f[c] + a * f[c] ** 3 / top)


def test_off_and_outside_the_concepts_all_is_kept_bit_for_bit():
    f = randn(9, 5)
    assert torch.equal(cbs(f, [1, 4], 0.0), f)
    changed = cbs(f, [1, 4], 0.5)
    others = [0, 2, 3, 5, 6, 7, 8]
    assert torch.equal(changed[others], f[others]) and not torch.equal(changed[[1, 4]], f[[1, 4]])
    assert torch.equal(cbs(f, [4, 1], 0.5), changed), "the order of the concepts does not matter"


def test_rows_outside_the_words_are_not_read():
    f, words = randn(9, 5), torch.tensor([0, 1, 1, 1, 1, 0, 0, 0, 0], dtype=torch.bool)
    other = f.clone()
    other[[0, 5]] *= 0.5  # smaller, so that the largest product may stay where it is
    top = lambda x: (x[4] * x).max()
    assert top(f) == top(other)
    assert torch.equal(cbs(f, [4], 1.0, 4, 0.0, words=words)[4], cbs(other, [4], 1.0, 4, 0.0, words=words)[4])
    assert not torch.equal(cbs(f, [4], 1.0, 4, 0.0)[4], cbs(other, [4], 1.0, 4, 0.0)[4])


def test_a_batch_with_concepts_of_its_own_each_is_separate_runs():
    f = randn(2, 7, 4)
    rows = torch.zeros(2, 7, dtype=torch.bool)
    rows[0, [1, 2]] = rows[1, [5]] = True
    expected = [cbs(f[0], [1, 2], 0.3), cbs(f[1], [5], 0.3)]
    assert torch.equal(cbs(f, rows, 0.3), torch.stack(expected))
    assert torch.equal(cbs(f, [3], 0.3)[1], cbs(f[1], [3], 0.3))


def test_the_other_thresholds():
    f, c = randn(8, 5), 3
    product = f[c] * f
    raw = similarities(f, c, 0.5, order="threshold_first")
    torch.testing.assert_close(raw, torch.where(product > 0.5, product, 0) / product.max())
    bound = torch.quantile(product.flatten(), 1 - torch.exp(torch.tensor(-1.0, dtype=torch.float64)))
    torch.testing.assert_close(
        similarities(f, c, 0.1, "quantile"), torch.where(product > bound, product, 0) / product.max()
    )
    cosines = torch.nn.functional.normalize(f, dim=-1) @ torch.nn.functional.normalize(f[c], dim=0)
    expected = torch.where(cosines > 0.2, cosines, 0)[:, None]
    torch.testing.assert_close(similarities(f, c, 0.2, "cosine"), expected)


@pytest.mark.parametrize("given", [(1.0, "relative"), (1.0, "cosine"), (9.0, "quantile")])
def test_where_nothing_passes_the_concept_is_kept(given):
    threshold, mode = given
    f = randn(6, 4).float() if mode == "quantile" else torch.ones(6, 4, dtype=torch.float64)
    assert torch.equal(cbs(f, [2], 0.5, 2, threshold, mode=mode), f)
    assert torch.equal(cbs(torch.zeros(6, 4), [2]), torch.zeros(6, 4))


def test_where_nothing_near_passes_the_concept_is_kept():
    f = randn(8, 4)
    f[0] = 100 * f[3].sign()  # a start token, outside the window, has the largest product with every row
    assert similarities(f, 3, 0.3) is not None
    assert torch.equal(cbs(f, [3], 0.5, 2, 0.3), f)
    assert torch.equal(cbs(f, [3], 0.5, 2, 0.3, rescale=True), f)
    words = torch.arange(8) > 0
    assert torch.equal(cbs(f, [3], 0.5, 7, 0.3, words=words), f)  # nor where it is near and no word
    assert not torch.equal(cbs(f, [3], 0.5, 7, 0.3), f)


def test_the_sum_can_keep_the_length_of_what_it_replaces():
    f = randn(8, 5)
    torch.testing.assert_close(cbs(f, [3], 1.0, rescale=True)[3].norm(), f[3].norm())
    half = cbs(f.half(), [3], 0.5)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), cbs(f, [3], 0.5), rtol=1e-2, atol=1e-2)


# Cross-token non-maximum suppression


def test_at_every_pixel_one_concept_is_left_with_its_value():
    a, concepts = maps(2, 3, 6, 5, 9), [2, 4, 7]
    out = ctnms(a, concepts)
    assert torch.equal(out[..., [0, 1, 3, 5, 6, 8]], a[..., [0, 1, 3, 5, 6, 8]])
    left = out[..., concepts]
    assert ((left > 0).sum(-1) == 1).all()
    assert torch.equal(left, torch.where(left > 0, a[..., concepts], 0))
    blurred = smooth(a[..., concepts].movedim(-1, -3), 3, 1.0)
    assert torch.equal(left.argmax(-1), blurred.argmax(-3))


def test_the_blur_is_the_outer_product_of_gaussians_reflected_at_the_border():
    x = randn(2, 4, 5)
    g = torch.exp(-0.5 * torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) ** 2 / 0.49)
    g = torch.outer(g, g) / g.sum() ** 2
    index = lambda i, n: -i if i < 0 else 2 * (n - 1) - i if i >= n else i
    expected = torch.zeros_like(x)
    for i in range(4):
        for j in range(5):
            for a in (-1, 0, 1):
                for b in (-1, 0, 1):
                    expected[:, i, j] += g[a + 1, b + 1] * x[:, index(i + a, 4), index(j + b, 5)]
    torch.testing.assert_close(smooth(x, 3, 0.7), expected)
    assert torch.equal(smooth(x, 1, 0.7), x)


def test_one_concept_or_none_is_no_contest():
    a = maps(2, 4, 4, 6)
    for scope in ("concepts", "all"):
        assert torch.equal(ctnms(a, [3], scope=scope), a) and torch.equal(ctnms(a, [[1, 2]], scope=scope), a)
    member = torch.zeros(2, 2, 6, dtype=torch.bool)
    member[0, 0, 1] = member[0, 1, 4] = member[1, 0, 2] = True
    out = ctnms(a, member)
    assert torch.equal(out[1], a[1]) and torch.equal(out[0], ctnms(a[0], [1, 4]))
    assert ctnms(a, [1, 4], strength=0.0) is a


def test_without_smoothing_it_is_idempotent_and_disjoint_maps_are_a_fixed_point():
    a = maps(3, 4, 4, 6)
    once = ctnms(a, [1, 2, 5], kernel=1)
    assert torch.equal(ctnms(once, [1, 2, 5], kernel=1), once) and not torch.equal(once, a)
    assert torch.equal(ctnms(a, [5, 1, 2], kernel=1), once), "the order of the concepts does not matter"


def test_a_tie_goes_to_the_first():
    a = torch.full((3, 3, 4), 0.25, dtype=torch.float64)
    assert torch.equal(ctnms(a, [2, 1])[..., [1, 2]], torch.stack([0 * a[..., 0], a[..., 0]], -1))


def test_the_listing_zeroes_every_other_token():
    a = maps(2, 4, 4, 6)
    out = ctnms(a, [1, 4], scope="all")
    assert ((out > 0).sum(-1) == 1).all() and torch.equal(out, torch.where(out > 0, a, 0))
    for scope in ("all", "concepts"):
        torch.testing.assert_close(
            ctnms(a, [1, 4], scope=scope, renorm=True).sum(-1), torch.ones(2, 4, 4, dtype=torch.float64)
        )
    torch.testing.assert_close(ctnms(a, [1, 4], strength=0.3), 0.7 * a + 0.3 * ctnms(a, [1, 4]))


def test_a_concept_of_several_tokens_wins_or_loses_as_one():
    a = maps(4, 4, 6)
    for span, joined in (("mean", a[..., [1, 2]].mean(-1)), ("max", a[..., [1, 2]].amax(-1))):
        out = ctnms(a, [[1, 2], 4], span=span, kernel=1)
        won = joined >= a[..., 4]
        assert torch.equal(out[..., 1] > 0, won) and torch.equal(out[..., 2] > 0, won)
        assert torch.equal(out[..., 4] > 0, ~won) and won.any() and not won.all()


def test_the_sides_of_a_feature_map():
    assert [grid(64, 8, 8), grid(12, 5, 8), grid(96, 64, 96), grid(6, 96, 64)] == [(8, 8), (3, 4), (8, 12), (3, 2)]


# Concepts of prompts


def test_the_phrases_of_a_prompt():
    assert phrases("a photo of a cat, two dogs and the Eiffel tower") == ("cat", "two dogs", "Eiffel tower")
    assert phrases("a red star on a sky background, chalk style") == ("red star",)
    assert phrases("a star and a <x> star and a star") == ("star", "<x> star") and phrases("") == ()


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sdxl", "tiny_sd3", "tiny_qwen", "tiny_zimage", "tiny_sana"])
def test_the_rows_of_concepts(request, family):
    p = request.getfixturevalue(family)
    cond = p.encode([PROMPT, "a star and a red star"])
    rows = Concepts(p).rows(cond)
    assert rows.shape[:2] == (2, 2) and (rows.sum(dim=1) <= 1).all()
    for i, k, phrase in ((0, 0, "red star"), (0, 1, "blue circle"), (1, 1, "red star")):
        assert torch.equal(rows[i, k], p.find(cond[i], phrase)[0])
    assert (cond.roles[rows.any(dim=1)] == Role.WORD).all()
    assert rows[1, 0].any() and not (rows[1, 0] & rows[1, 1]).any(), "the longer name has its rows"


# In pipelines


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_pixart", "tiny_sd3", "tiny_flux2", "tiny_zimage"])
def test_in_conditional_rows_every_pixel_attends_to_one_concept(request, family):
    p = request.getfixturevalue(family).copy()
    kind = "cross" if "cross" in {s.kind for s in p.anatomy.sites()} else "joint"
    patch = T2IZero(cbs_strength=0.0, ctnms_steps=(0.0, 0.5))
    rows = Concepts(p).rows(p.encode(PROMPT))[0]
    padding = 16 if family == "tiny_zimage" else 0  # its 16 pixels are filled up to 32
    with patch.patch(p), p.record_attention(kind, keep=None) as seen:
        p.draw([PROMPT], [1], sampling_steps=2, cfg_scale=3.0, negative=PROMPT)
    for call, conditional, step in zip(seen.calls, seen.rows, seen.steps, strict=True):
        for site, probs in call.items():
            end = probs.shape[2] - padding
            pixels = probs[:, :, end - site.resolution**2 : end]  # in joint attention the text stands before them
            torch.testing.assert_close(probs[:, :, end:].sum(-1), torch.ones_like(probs[:, :, end:, 0]))
            left = torch.stack([(pixels[..., : rows.shape[1]] * r[: pixels.shape[-1]]).sum(-1) > 0 for r in rows])
            several = left.all(0)
            assert not several[conditional].any() if step == 0 else several[conditional].any(), site
            assert several[~conditional].any()
            sums = pixels.sum(-1)
            torch.testing.assert_close(sums[~conditional], torch.ones_like(sums[~conditional]))


@pytest.mark.parametrize("sides", [(4, 4), (6, 6), (4, 6)])
def test_pixels_lie_where_they_are_also_behind_padding(tiny_zimage, sides):
    """Z-Image fills 16 or 24 pixels up to 32, 36 up to 64."""
    p = tiny_zimage.copy()
    p.pipe.set_progress_bar_config(disable=True)
    rows, seen = Concepts(p).rows(p.encode(PROMPT))[0], []

    def note(site, probs):
        seen.append((site.text, probs))
        return probs

    size = {"height": 4 * sides[0], "width": 4 * sides[1], "num_inference_steps": 1, "guidance_scale": 0.0}
    patch = T2IZero(cbs_strength=0.0, ctnms_steps=(0.0, 1.0))
    with p.edit_attention(note, "joint"), patch.patch(p), p.edit_attention(note, "joint"):
        p(PROMPT, **size, output_type="latent")
    for (text, before), (_, after) in zip(seen[::2], seen[1::2], strict=True):
        member = torch.nn.functional.pad(rows, (0, text - rows.shape[1]))
        due, end = before.clone(), text + sides[0] * sides[1]
        assert before.shape[2] > end
        maps = before[:, :, text:end, :text].unflatten(2, sides)
        due[:, :, text:end, :text] = ctnms(maps, member[None, None]).flatten(2, 3)
        assert torch.equal(after, due) and not torch.equal(after, before)


@pytest.mark.parametrize("steps", [(0.0, 0.5), (0.5, 1.0), (0.3, 0.8)])
def test_steps_decoded_ahead_are_suppressed_where_they_are_to_be(tiny_sd, steps):
    patch = T2IZero(cbs_strength=0.0, ctnms_steps=steps)

    def draw(mode: str) -> torch.Tensor:
        with FasterDiffusion(every=4, alpha=0.0, mode=mode).patch(tiny_sd) as told, patch.patch(tiny_sd):
            drawn = tiny_sd.draw(PROMPT, 0, sampling_steps=6, cfg_scale=3.0, scheduler="ddim")
        assert told["encoder_runs"] == 2 and told["decoder_runs"] <= (6 if mode == "serial" else 4)
        return drawn

    torch.testing.assert_close(draw("parallel"), draw("serial"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sdxl", "tiny_sd3"])
def test_the_conditional_half_is_told_the_corrected_rows(request, family):
    p = request.getfixturevalue(family).copy()
    cond, rows = p.encode(PROMPT), Concepts(p).rows(p.encode(PROMPT)).any(dim=1)
    words, tokens, start = cond.roles == Role.WORD, cond.tokens.clone(), 0
    for part in p.sections(cond):
        s = slice(start, start := start + part.ids.shape[1])
        tokens[:, s] = cbs(cond.tokens[:, s], rows[:, s], 0.9, 1, 0.1, words=words[:, s])
    plain = p.draw(cond, 1, sampling_steps=2, cfg_scale=3.0)
    with T2IZero(cbs_strength=0.9, cbs_window=1, cbs_threshold=0.1, ctnms_strength=0.0).patch(p) as told:
        drawn = p.draw(PROMPT, 1, sampling_steps=2, cfg_scale=3.0)
    assert torch.equal(drawn, p.draw(cond.replace(tokens=tokens), 1, sampling_steps=2, cfg_scale=3.0))
    assert not torch.equal(drawn, plain)
    assert told["concepts"] == {PROMPT: ["red star", "blue circle"]} and told["length after correction"] > 0


@pytest.mark.parametrize("family", ["tiny_sd3", "tiny_flux", "tiny_zimage", "tiny_qwen"])
def test_diffusers_own_call_knows_its_prompts(request, family):
    p = request.getfixturevalue(family).copy()
    p.pipe.set_progress_bar_config(disable=True)
    prompts, noise = [PROMPT, "a star"], {"num_inference_steps": 2, "height": p.size, "width": p.size}
    call = lambda prompts, seeds, **options: p(
        list(prompts), generator=[torch.Generator().manual_seed(s) for s in seeds], output_type="pt", **noise, **options
    ).images
    n = 1 if family == "tiny_qwen" else 2  # its own call mixes up the masks of several pictures of several prompts
    with T2IZero().patch(p):
        alone = torch.cat([call([prompt], [seed]) for prompt in prompts for seed in (3, 4)[:n]])
        together = call(prompts, [3, 4][:n] * 2, num_images_per_prompt=n)
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("given", "prompt", "told"),
    [
        ({"concepts": ("fish",)}, PROMPT, "does not have 'fish'"),
        ({"concepts": ("circle",)}, "red " * 90 + "circle", "cut off"),
        ({"tokens": (0,)}, PROMPT, "token 0 is no word"),
        ({"tokens": (400,)}, PROMPT, "token 400 is no word"),
    ],
)
@pytest.mark.filterwarnings("ignore:the prompt has")
def test_concepts_that_a_prompt_does_not_have(tiny_sd, given, prompt, told):
    with T2IZero(**given).patch(tiny_sd), pytest.raises(BadInput, match=told):
        tiny_sd.draw(prompt, 0, sampling_steps=1)


def test_embeddings_of_unknown_text_need_numbers(tiny_sd):
    p = tiny_sd.copy()
    p.pipe.set_progress_bar_config(disable=True)
    cond, calls = p.encode(PROMPT), {"num_inference_steps": 1, "output_type": "latent"}
    with T2IZero(concepts=("red star",)).patch(p), pytest.raises(BadInput, match="text behind"):
        p(prompt_embeds=cond.tokens, negative_prompt_embeds=cond.tokens, **calls)
    given = cond.replace(prompts=("",))
    for concepts, refused in (((), pytest.raises(BadInput, match="text behind")), (("red star",), nullcontext())):
        with T2IZero(concepts=concepts).patch(p), refused:
            p.draw(given, 0, sampling_steps=1)
    tokens = tuple(Concepts(p).rows(cond)[0, 0].nonzero().flatten().tolist())
    with T2IZero(tokens=tokens).patch(p):
        p(prompt_embeds=cond.tokens, negative_prompt_embeds=cond.tokens, **calls)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"concepts": ("star",), "tokens": (1,)}, "not both"),
        ({"concepts": ("star", "Star")}, "named twice"),
        ({"ctnms_kernel": 2}, "odd"),
        ({"ctnms_steps": (0.5, 0.5)}, "begin before"),
        ({"cbs_strength": 1.5}, "cbs_strength must be"),
    ],
)
def test_settings_that_make_no_sense(given, told):
    with pytest.raises(BadInput, match=told):
        T2IZero(**given)


def test_sides_that_the_network_does_not_have(tiny_sd):
    with pytest.raises(BadInput, match="choose from"), T2IZero(ctnms_sides=(999,)).patch(tiny_sd):
        pass


def test_the_command(tiny_sd, tmp_path, capsys):
    model, out = str(tiny_sd.save(tmp_path / "tiny")), tmp_path / "out"
    given = ["steer", "t2i-zero", PROMPT, "--model", model, "--steps", "2", "--device", "cpu", "--out", str(out)]
    assert cli.main([*given, "--concepts", "star", "fish"]) == 2
    assert "does not have 'fish'" in capsys.readouterr().err and not out.exists()
    assert cli.main([*given, "--concepts", "red star", "circle", "--ctnms-steps", "0", "0.9"]) == 0
    record = json.loads((out / "sample.json").read_text())
    assert record["log"]["concepts"] == {PROMPT: ["red star", "circle"]}
    assert record["method"]["configuration"]["ctnms_steps"] == [0.0, 0.9]
    given = ["steer", "decor", *given[2:-1], str(tmp_path / "decor")]
    assert cli.main([*given, "--undesired", "red", "--alpha", "1"]) == 0
    assert json.loads((tmp_path / "decor" / "sample.json").read_text())["log"]["axes"][0] >= 1
