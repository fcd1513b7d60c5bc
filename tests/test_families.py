"""Families of transformers through the adapter, each held to what diffusers itself does."""

from __future__ import annotations

import copy
import json
from inspect import signature

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence

import sfumato as sf
from conftest import LENGTH, make_tiny_flux, make_tiny_pixart, make_tiny_sd3, noise_behind, tiny_vae
from sfumato.errors import BadInput
from sfumato.pipeline import Noised, watermark, wrap
from sfumato.pipeline.codec import Codec
from sfumato.pipeline.conditioning import Role
from tiny_families import make_tiny_flux2, tiny_dc_ae

FAMILIES = ["tiny_pixart", "tiny_sana", "tiny_sd3", "tiny_flux", "tiny_qwen", "tiny_zimage", "tiny_flux2"]
ALL = ["tiny_sd", "tiny_sdxl", *FAMILIES]
PROMPTS = ["a red star", "a photo of a blue circle"]
OWN = {"qwen": {"negative_prompt": " ", "true_cfg_scale": 4.0}}
"""What the pipeline's own call is given besides the prompt in its model's card."""


@pytest.fixture(params=FAMILIES)
def p(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=ALL)
def any_family(request):
    return request.getfixturevalue(request.param)


def some_of(cond):
    """A number that depends on a conditioning; normalised rows would add up to a constant."""
    return sum(x[..., ::2].sum() for x in (cond.tokens, cond.pooled) if x is not None)


def own_encoding(p, prompts):
    """(tokens, mask or None, pooled or None) of the pipeline's own ``encode_prompt``."""
    if p.family == "pixart":
        tokens, mask, *_ = p.pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        return tokens, mask, None
    if p.family == "sana":
        said = signature(p.pipe.__call__).parameters["complex_human_instruction"].default
        tokens, mask, *_ = p.pipe.encode_prompt(prompts, False, complex_human_instruction=said)
        return tokens, mask, None
    if p.family == "qwen":
        return *p.pipe.encode_prompt(prompts, max_sequence_length=512), None
    if p.family == "flux2":
        return p.pipe.encode_prompt(prompts)[0], None, None
    if p.family == "zimage":
        rows, _ = p.pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)
        tokens, ones = pad_sequence(rows, True), [torch.ones(len(row)) for row in rows]
        return tokens, pad_sequence(ones, True), None
    if p.family == "sd3":
        tokens, _, pooled, _ = p.pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
        return tokens, None, pooled
    tokens, pooled, _ = p.pipe.encode_prompt(prompts)
    return tokens, None, pooled


@torch.no_grad()
def test_encode_equals_the_pipelines_own_bit_for_bit(p):
    tokens, mask, pooled = own_encoding(p, PROMPTS)
    cond = p.encode(PROMPTS)
    length = tokens.shape[1]
    assert torch.equal(cond.tokens[:, :length], tokens)
    assert mask is None or torch.equal(cond.mask[:, :length], mask.bool())
    if length < cond.tokens.shape[1]:  # those pipelines pad to the longest
        assert p.family in ("qwen", "zimage")
        assert not cond.mask[:, length:].any() and not cond.tokens[:, length:].any()
    assert cond.pooled is pooled is None or torch.equal(cond.pooled, pooled)
    assert cond.ids.shape == cond.mask.shape == cond.roles.shape == cond.tokens.shape[:2]
    guidance = {"flux": 3.5}.get(p.family)
    assert cond.guidance is None if guidance is None else (cond.guidance == guidance).all()


@torch.no_grad()
def test_sana_steers_away_from_what_is_read_without_the_instruction(tiny_sana):
    _, _, tokens, mask = tiny_sana.pipe.encode_prompt("a star", negative_prompt="a blue square")
    cond = tiny_sana.unconditional(2, "a blue square")
    assert torch.equal(cond.tokens, tokens.repeat(2, 1, 1)) and torch.equal(cond.mask, mask.bool().repeat(2, 1))
    assert not torch.allclose(cond.tokens[:1, 1], tiny_sana.encode("a blue square").tokens[:, 1])


def test_sd3_without_t5_and_flux_schnell(tmp_path_factory):
    p = wrap(make_tiny_sd3(tmp_path_factory, t5=False))
    tokens, _, pooled = own_encoding(p, PROMPTS)
    cond = p.encode(PROMPTS)
    assert torch.equal(cond.tokens, tokens) and torch.equal(cond.pooled, pooled)
    assert not cond.mask[:, LENGTH:].any() and (cond.roles[:, LENGTH:] == Role.PADDING).all()
    assert p.text_parts() == [("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")]
    assert wrap(make_tiny_flux(tmp_path_factory, guidance=False)).encode("a star").guidance is None


def test_roles_and_words(any_family):
    cond = any_family.encode([*PROMPTS, ""])
    # The start token, or what a chat template has before the prompt, and what there is behind it.
    start = {"pixart": 0, "flux": 0, "qwen": 0, "zimage": 3, "flux2": 3}.get(any_family.family, 1)
    end = {"sana": 0, "qwen": 5, "zimage": 5, "flux2": 11}.get(any_family.family, 1)
    words = [len(prompt.split()) for prompt in cond.prompts]
    for row, n in enumerate(words):
        if any_family.family == "sana":  # whose empty prompt is the space that ends the instruction
            words[row] = n = n or 1
        expected = [Role.START] * start + [Role.WORD] * n + [Role.END] * end + [Role.PADDING]
        assert cond.roles[row, : len(expected)].tolist() == expected
    assert any_family.last_word_token(cond).tolist() == [max(start + n - 1, 0) for n in words]
    assert torch.equal(cond.roles == Role.PADDING, ~cond.mask)
    found = any_family.find(cond, "red star")
    assert found[0, start + 1 : start + 3].all() and not found[1:].any()
    assert found.sum() == (4 if any_family.family == "sd3" else 2)  # once for CLIP, once for T5
    assert not any_family.find(cond, "blue star").any() and not any_family.find(cond, "").any()


def test_token_ids_and_embeddings_are_encoded_as_their_text(any_family):
    p, prompt = any_family, "a red star"
    expected = p.encode(prompt)
    options = {"padding": p.padding, "padding_side": "right", "return_tensors": "pt"}
    ids = [
        tokenizer([p._texts([prompt])[0]], max_length=length, **options).input_ids
        for tokenizer, length in zip(p.tokenizers, p.text_lengths(), strict=True)
    ]
    tables = [getattr(p.pipe, encoder).get_input_embeddings().weight for _, encoder in p.text_parts()]
    rows = [table[i].detach().requires_grad_() for table, i in zip(tables, ids, strict=True)]
    hot = [torch.nn.functional.one_hot(i, len(table)).float() for table, i in zip(tables, ids, strict=True)]
    for cond in (p.encode_ids(ids), p.encode_ids(ids, embeddings=rows), p.encode_ids(ids, embeddings=hot)):
        for name in ("tokens", "ids", "mask", "roles"):
            assert torch.equal(getattr(cond, name), getattr(expected, name)), name
        assert cond.pooled is expected.pooled is None or torch.equal(cond.pooled, expected.pooled)
        assert not cond.tokens.requires_grad
    cond = p.encode_ids(ids, embeddings=rows, grad=True)
    some_of(cond).backward()
    assert all(r.grad is not None and r.grad[:, 1].abs().sum() > 1e-4 for r in rows)
    assert all(table.grad is None for table in tables)
    with pytest.raises(BadInput, match="tensors of token ids"):
        p.encode_ids([*ids, ids[0]])
    with pytest.raises(BadInput, match="one row a token"):
        p.encode_ids(ids, embeddings=[r[..., :-1] for r in rows])


def test_learned_words_reach_every_text_encoder(any_family):
    p = any_family
    before = p.encode("a red star")
    with p.add_token("<new>", "star", vectors=2) as token:
        cond = p.encode("a red <new>", grad=True)
        some_of(cond).backward()
        assert len(token.embeddings) == len(p.text_parts())
        assert all(rows.grad.abs().sum() > 1e-4 for rows in token.embeddings)
        assert torch.equal(p.encode("a red star").tokens, before.tokens)
    assert torch.equal(p.encode("a red star").tokens, before.tokens)
    for _, encoder in p.text_parts():
        assert not any("Extended" in type(m).__name__ for m in getattr(p.pipe, encoder).modules())


def own_prediction(p, z, timestep, cond):
    """The prediction by diffusers' own call of the network, as its pipeline writes it."""
    network, step = p.pipe.transformer, timestep.expand(len(z))
    if p.family == "sana":
        options = {"encoder_attention_mask": cond.mask, "encoder_hidden_states": cond.tokens}
        return network(z, timestep=step * network.config.timestep_scale, return_dict=False, **options)[0]
    if p.family == "zimage":
        pictures, said = list(z[:, :, None]), [x[m] for x, m in zip(cond.tokens, cond.mask, strict=True)]
        return -torch.stack(network(pictures, (1000 - step) / 1000, said, return_dict=False)[0])[:, :, 0]
    if p.family == "flux2":
        ids = {"img_ids": p.pipe._prepare_latent_ids(z), "txt_ids": p.pipe._prepare_text_ids(cond.tokens)}
        packed, words = p.pipe._pack_latents(z), cond.tokens
        out = network(packed, encoder_hidden_states=words, timestep=step / 1000, return_dict=False, **ids)[0]
        return p.pipe._unpack_latents_with_ids(out, ids["img_ids"], *z.shape[-2:])
    if p.family == "qwen":
        options = {"encoder_hidden_states": cond.tokens, "img_shapes": [[(1, z.shape[-2] // 2, z.shape[-1] // 2)]] * 2}
        packed = p.pipe._pack_latents(z, *z.shape)
        longest = cond.mask.sum(dim=1).max()
        mask, options["encoder_hidden_states"] = cond.mask[:, :longest].long(), cond.tokens[:, :longest]
        out = network(packed, timestep=step / 1000, encoder_hidden_states_mask=mask, return_dict=False, **options)[0]
        return p.pipe._unpack_latents(out, *(side * p.scale_factor for side in z.shape[-2:]), p.scale_factor)[:, :, 0]
    if p.family == "pixart":
        options = {"encoder_attention_mask": cond.mask.long(), "added_cond_kwargs": {}}
        out = network(z, encoder_hidden_states=cond.tokens, timestep=step, return_dict=False, **options)[0]
        return out.chunk(2, dim=1)[0]
    options = {"encoder_hidden_states": cond.tokens, "pooled_projections": cond.pooled, "return_dict": False}
    if p.family == "sd3":
        return network(z, timestep=step, **options)[0]
    packed = p.pipe._pack_latents(z, *z.shape)
    side = z.shape[-1] // 2
    positions = p.pipe._prepare_latent_image_ids(len(z), side, side, z.device, z.dtype)
    ids = {"txt_ids": torch.zeros(cond.tokens.shape[1], 3), "img_ids": positions, "guidance": cond.guidance}
    out = network(packed, timestep=step / 1000, **options, **ids)[0]
    return p.pipe._unpack_latents(out, 2 * z.shape[-2], 2 * z.shape[-1], 2)


@torch.no_grad()
@pytest.mark.parametrize("any_family", [*ALL, "tiny_omnigen"], indirect=True)
def test_what_a_network_does_not_look_at_is_what_changes_nothing(any_family):
    p = any_family
    z = torch.randn(2, *p.latent_shape(), generator=torch.Generator().manual_seed(0))
    cond = p.encode(PROMPTS)
    changed = noise_behind(cond)
    out = p.denoiser(z, 0.5, cond)
    assert torch.equal(out, p.denoiser(z, 0.5, p.as_seen(cond)))
    assert torch.equal(out, p.denoiser(z, 0.5, changed)) is p.masked
    assert torch.equal(p.as_seen(changed).tokens, p.as_seen(cond).tokens) is p.masked


@torch.no_grad()
@pytest.mark.parametrize("timestep", [1000.0, 640.25, 1.0])
def test_denoiser_is_diffusers_own_call_bit_for_bit(p, timestep):
    z = torch.randn(2, *p.latent_shape(), generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor(min(timestep, 999.0) // 1 if p.family == "pixart" else timestep)
    cond = p.encode(PROMPTS)
    t = p.clock.time(timestep)
    expected = own_prediction(p, z, timestep, cond)
    assert torch.equal(p.denoiser(z, t, cond), expected)
    assert torch.equal(p.denoiser(z, torch.tensor([t, t], dtype=torch.float64), cond), expected)
    assert not torch.allclose(p.denoiser(z, t, p.encode("")), expected)
    x0 = p.denoiser.predict(z, t, cond, "x0")
    alpha, sigma = p.clock.process.alpha_sigma(t)
    native = {"eps": (z - alpha * x0) / sigma, "flow": (z - x0) / sigma}[p.denoiser.prediction]
    torch.testing.assert_close(native.float(), expected, rtol=1e-3, atol=1e-3)


def own_pictures(p, prompts, seeds, steps, **options):
    p.pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    binning = {"use_resolution_binning": False} if p.family in ("pixart", "sana") else {}
    sizes = {"num_inference_steps": steps, "height": p.size, "width": p.size}
    return p(prompts, generator=generators, output_type="pt", **sizes, **binning, **options).images


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_draw_equals_the_diffusers_pipeline(p, cfg_scale):
    seeds = [3, 11]
    guidance = {
        "flux": {"guidance_scale": 3.5, "true_cfg_scale": cfg_scale}, "qwen": {"true_cfg_scale": cfg_scale},
        "zimage": {"guidance_scale": cfg_scale - 1},
    }.get(p.family, {"guidance_scale": cfg_scale})  # fmt: skip
    negative = "" if p.family == "flux2" else "a blue square"  # its pipeline takes no other
    options = {**guidance, **({"negative_prompt": [negative] * 2} if negative else {})}
    ours = p.draw(PROMPTS, seeds, sampling_steps=4, cfg_scale=cfg_scale, negative=negative)
    assert ours.shape == (2, 3, p.size, p.size)
    torch.testing.assert_close(ours, own_pictures(p, list(PROMPTS), seeds, 4, **options), rtol=0, atol=1e-5)
    alone = p.draw(PROMPTS, seeds, sampling_steps=4, cfg_scale=cfg_scale, negative=negative, batch=1)
    torch.testing.assert_close(ours, alone, rtol=0, atol=1e-5)
    other = p.draw("", seeds, sampling_steps=4, cfg_scale=cfg_scale, negative=negative)
    assert (ours - other).abs().max() > 1e-3  # the text is listened to


def test_defaults_are_the_pipelines_own(p):
    theirs = own_pictures(p, "a red star", [5], 3, **OWN.get(p.family, {}))
    torch.testing.assert_close(p.draw("a red star", 5, sampling_steps=3), theirs, rtol=0, atol=1e-5)


def test_other_members_of_the_families(tmp_path_factory):
    members = (
        make_tiny_sd3(tmp_path_factory, dual=(0, 1)),
        make_tiny_sd3(tmp_path_factory, t5=False),
        make_tiny_flux(tmp_path_factory, guidance=False),
    )
    for pipe in members:
        p = wrap(pipe, {"size": 16})
        theirs = own_pictures(p, "a red star", [5], 3)
        torch.testing.assert_close(p.draw("a red star", 5, sampling_steps=3), theirs, rtol=0, atol=1e-5)


def test_named_schedulers(p):
    own = p.draw("a red star", 5, sampling_steps=20)
    for name in ("ddim", "dpm++"):
        drawn = p.draw("a red star", 5, sampling_steps=20, scheduler=name)
        own_name = "dpm++" if p.family == "sana" else "ddim"
        assert (drawn - own).abs().max() < (1e-6 if name == own_name else 0.2)
    with pytest.raises(BadInput, match="this model was trained under"):
        p.draw("a red star", 5, sampling_steps=2, scheduler=wrong_kind(p))


def wrong_kind(p):
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler() if p.family == "pixart" else DDIMScheduler()


def test_states_carry_their_time(p):
    states = list(p.states(PROMPTS, [1, 2], sampling_steps=3))
    times = [t for _, t in states]
    assert len(states) == 4 and times == sorted(times, reverse=True) and times[-1] == 0.0
    middle, t = p.trajectory(PROMPTS, [1, 2], sampling_steps=3, stop_after=2)
    assert torch.equal(middle, states[2][0]) and t == times[2]
    if p.clock.prediction == "flow":
        noise = torch.stack([torch.randn(p.latent_shape(), generator=torch.Generator().manual_seed(s)) for s in (1, 2)])
        assert times[0] == 1.0 and torch.equal(states[0][0], noise)


def test_what_is_saved_is_loaded_bit_for_bit(p, tmp_path):
    folder = p.save(tmp_path / "model", provenance={"method": "none"})
    again = sf.load(folder, device="cpu")
    assert type(again) is type(p) and again.describe() == p.describe() and again.defaults == p.defaults
    for name, part in p.parts().items():
        theirs = dict(again.parts()[name].named_parameters())
        assert all(torch.equal(x, theirs[key]) for key, x in part.named_parameters()), name
    assert torch.equal(again.encode(PROMPTS).tokens, p.encode(PROMPTS).tokens)
    # The same weights, but mapped from a file: some kernels sum in another order for tensors that are not aligned.
    drawn = p.draw("a red star", 1, sampling_steps=2)
    torch.testing.assert_close(again.draw("a red star", 1, sampling_steps=2), drawn, rtol=0, atol=1e-6)
    foreign = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    theirs = own_pictures(wrap(foreign, p.defaults), "a red star", [1], 2, **OWN.get(p.family, {}))
    torch.testing.assert_close(drawn, theirs, rtol=0, atol=1e-5)


def test_a_folder_written_by_diffusers_is_loaded(p, tmp_path):
    p.pipe.save_pretrained(tmp_path)
    again = sf.load(tmp_path, device="cpu")
    assert torch.equal(again.encode(PROMPTS).tokens, p.encode(PROMPTS).tokens)
    assert again.describe()["sha256"] == p.describe()["sha256"]


def test_a_weight_missing_from_t5_is_refused(tiny_sd3, tmp_path):
    tiny_sd3.pipe.save_pretrained(tmp_path)
    file = tmp_path / "text_encoder_3" / "model.safetensors"
    tensors = load_file(file)
    del tensors["shared.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BadInput, match="missing"):
        sf.load(tmp_path, device="cpu")


def test_a_student_that_could_not_be_told_how_it_draws_is_refused_before_it_is_trained(p):
    from sfumato.distill import MultistepCM

    with pytest.raises(BadInput, match="cannot be marked as distilled"):
        MultistepCM(teacher=p).open_teacher()


def test_pictures_of_the_pipelines_own_call_are_marked(any_family):
    marked = any_family.copy()
    marked.defaults = {**marked.defaults, "marked": {"<m1>": {"origin": "synthetic"}}}
    given = {"num_inference_steps": 2, "height": marked.size, "width": marked.size}
    given |= {"use_resolution_binning": False} if marked.family in ("pixart", "sana") else {}
    drawn = marked("a red star", generator=torch.Generator().manual_seed(3), **given).images
    found = watermark.read(np.asarray(drawn[0]))
    expected = watermark.payloads(marked.defaults["marked"], ["a red star"], [3], marked.size)
    assert found.marked and [found.payload] == expected
    with pytest.raises(BadInput, match="marked pictures only"):
        marked("a red star", output_type="latent", **given)


def test_copies_share_what_they_do_not_own(p):
    copy = p.copy(own="xattn")
    assert copy.defaults == p.defaults
    assert torch.equal(copy.draw("a red star", 1, sampling_steps=2), p.draw("a red star", 1, sampling_steps=2))
    owned, before = copy.parameters("xattn"), p.draw("a red star", 1, sampling_steps=2)
    with torch.no_grad():
        for weight in owned.values():
            weight.add_(0.3)
    assert torch.equal(p.draw("a red star", 1, sampling_steps=2), before)
    assert not torch.equal(copy.draw("a red star", 1, sampling_steps=2), before)


def test_projections_adapters_and_taps(p):
    kinds = {projection.kind for projection in p.projections()}
    crossed = p.family in ("pixart", "sana")
    assert kinds >= ({"cross.k", "cross.v", "self.q"} if crossed else {"joint.k", "text.k", "text.in"})
    before = p.draw("a red star", 1, sampling_steps=2)
    made = p.add_adapter("a", rank=2)
    try:
        assert torch.equal(p.draw("a red star", 1, sampling_steps=2), before)
        with torch.no_grad():
            for weight in made.parameters():
                weight.add_(0.1)
        assert not torch.equal(p.draw("a red star", 1, sampling_steps=2), before)
    finally:
        made.remove()
    with p.tap("bottleneck") as tap:
        assert torch.equal(p.draw("a red star", 1, sampling_steps=2), before)
    assert tap.value is not None


def test_adapters_travel_in_the_spelling_of_diffusers(p, tmp_path):
    one, other, theirs = p.copy(), p.copy(), p.copy()
    made = one.add_adapter("a", rank=2, generator=torch.Generator().manual_seed(0))
    for up in made.up.values():
        torch.nn.init.normal_(up, std=0.3, generator=torch.Generator().manual_seed(1))
    made.save_lora(tmp_path / "lora.safetensors")
    drawn = one.draw("a red star", 1, sampling_steps=2)
    assert (drawn - p.draw("a red star", 1, sampling_steps=2)).abs().max() > 1e-3
    other.load_adapter("a", tmp_path / "lora.safetensors")
    torch.testing.assert_close(other.draw("a red star", 1, sampling_steps=2), drawn, rtol=0, atol=1e-5)
    pytest.importorskip("peft")
    if not hasattr(theirs.pipe, "load_lora_weights"):
        assert p.family == "pixart"  # for which diffusers has no loader
        return
    theirs.pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    torch.testing.assert_close(theirs.draw("a red star", 1, sampling_steps=2), drawn, rtol=0, atol=1e-5)


def test_attention_is_watched_and_changed(p):
    plain = p.draw(PROMPTS, [1, 2], sampling_steps=2, cfg_scale=3.0)
    with p.record_attention(None) as seen:
        shown = p.draw(PROMPTS, [1, 2], sampling_steps=2, cfg_scale=3.0)
    torch.testing.assert_close(shown, plain, rtol=0, atol=1e-5)
    assert set(seen.maps) == set(p.anatomy.sites()) and seen.rows[-1].tolist() == [True, True, False, False]
    with p.record_attention(None) as called:
        own_pictures(p, list(PROMPTS), [1, 2], 2, **OWN.get(p.family, {}))
    (rows,) = called.rows  # of the last call: the pipeline's own may make two, the other half first
    halves = {"flux": None, "qwen": [False] * 2, "flux2": [False] * 2, "zimage": [True, True, False, False]}
    assert (rows if rows is None else rows.tolist()) == halves.get(p.family, [False, False, True, True])
    kind = "cross" if p.family in ("pixart", "sana") else "joint"
    with p.edit_attention(lambda site, probs: probs.flip(-1), kind):
        assert (p.draw(PROMPTS, [1, 2], sampling_steps=2, cfg_scale=3.0) - plain).abs().max() > 1e-4
    assert torch.equal(p.draw(PROMPTS, [1, 2], sampling_steps=2, cfg_scale=3.0), plain)


def test_a_picture_depends_on_its_own_prompt_only(p):
    short, long = p.encode("art"), p.encode("a photo of a blue circle")
    joined = type(short).cat([short, long])
    z = torch.randn(2, *p.latent_shape(), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = p.denoiser(z, 0.5, joined)
        apart = torch.cat([p.denoiser(z[:1], 0.5, short), p.denoiser(z[1:], 0.5, long)])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-4)


def test_pictures_and_latents_as_the_pipeline_scales_them(p):
    z = torch.randn(2, *p.latent_shape(), generator=torch.Generator().manual_seed(0))
    vae, frame = p.pipe.vae, (lambda x: x[:, :, None]) if p.family == "qwen" else (lambda x: x)
    shift, scale = vae.config.get("shift_factor") or 0.0, vae.config.get("scaling_factor")
    if p.family == "qwen":
        shift, scale = (torch.tensor(vae.config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
        scale = 1 / scale
    if p.family == "flux2":
        shift = vae.bn.running_mean.view(1, -1, 1, 1)
        scale = 1 / (vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).sqrt()
    patched, whole = (lambda x: x), (lambda x: x)
    if p.family == "flux2":
        patched, whole = p.pipe._patchify_latents, p.pipe._unpatchify_latents
    with torch.no_grad():
        latents = whole(z / scale + shift)
        expected = vae.decode(frame(latents), return_dict=False)[0]
        expected = expected[:, :, 0] if p.family == "qwen" else expected
        torch.testing.assert_close(p.decode_latents(z), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(p.scale_latents(latents), z)
        encoded = vae.encode(frame(expected))
        mean = encoded.latent if p.family == "sana" else encoded.latent_dist.mode()
        mean = mean[:, :, 0] if p.family == "qwen" else mean
        torch.testing.assert_close(p.encode_image(expected), (patched(mean) - shift) * scale)
    assert bool(torch.as_tensor(shift).any()) == (p.family not in ("pixart", "sana"))
    with pytest.raises(BadInput, match="multiple of 4 pixels"):
        p.latent_shape(18)


def test_codec_takes_a_deterministic_autoencoder():
    vae = tiny_dc_ae()
    codec = Codec(vae)
    assert codec.factor == 4 and codec.latent_shape(16) == (4, 4, 4)
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    z = codec.encode(x)
    torch.testing.assert_close(z, vae.encode(x).latent * 0.4)
    codec.decode(z).sum().backward()
    assert x.grad.abs().sum() > 0


def test_codec_with_statistics_by_channel():
    codec = Codec(tiny_vae(latents_mean=[0.0, 1.0, 2.0, 3.0], latents_std=[1.0, 2.0, 4.0, 8.0], scaling_factor=0.5))
    z = torch.ones(1, 4, 2, 2)
    assert torch.equal(codec.scale(z)[0, :, 0, 0], torch.tensor([0.5, 0.0, -0.125, -0.125]))
    assert torch.equal(codec.unscale(codec.scale(z)), z)


def test_variants_are_refused(tmp_path_factory):
    from diffusers import FluxTransformer2DModel

    pipe = make_tiny_flux(tmp_path_factory)
    config = {**pipe.transformer.config, "in_channels": 128, "out_channels": 64}
    pipe.transformer = FluxTransformer2DModel.from_config(config)
    with pytest.raises(BadInput, match="variant"):
        wrap(pipe)
    pipe = make_tiny_pixart()
    pipe.vae = tiny_vae(8)
    with pytest.raises(BadInput, match="variant"):
        wrap(pipe)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLPipeline"),  # the refiner's
        ("StableDiffusionInpaintPipeline", "StableDiffusionPipeline"),
        ("StableDiffusion3ControlNetPipeline", "StableDiffusion3Pipeline"),
        ("FluxFillPipeline", "FluxPipeline"),
        ("SanaSprintPipeline", "SanaPipeline"),
        ("QwenImageEditPipeline", "QwenImagePipeline"),
        ("ZImageOmniPipeline", "ZImagePipeline"),
        ("Flux2KleinInpaintPipeline", "Flux2KleinPipeline"),
    ],
)
def test_folders_of_variants_are_refused_with_the_plain_class(tiny_sd, tmp_path, name, known):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name, "unet": ["diffusers", "X"]}))
    with pytest.raises(BadInput, match=rf"is a {name}, a variant of .* not supported: take a plain {known}$"):
        sf.load(tmp_path, device="cpu")


@pytest.mark.parametrize("name", ["Flux3Pipeline", "Flux2Pipeline", "LongCatImagePipeline"])
def test_folders_of_families_that_are_not_known_are_refused_with_those_that_are(tmp_path, name):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(BadInput, match=rf"is a {name}, which is not supported; supported are .*FluxPipeline.*ZImage"):
        sf.load(tmp_path, device="cpu")


@torch.no_grad()
def test_a_distilled_flux2_is_drawn_from_without_guidance():
    p = wrap(make_tiny_flux2(distilled=True), {"size": 16})
    theirs = own_pictures(p, "a red star", [5], 3)
    torch.testing.assert_close(p.draw("a red star", 5, sampling_steps=3), theirs, rtol=0, atol=1e-5)
    assert p.defaults["cfg_scale"] == 1.0


def test_text_encoders_whose_names_differ_from_one_version_to_another_are_complete(tiny_qwen, tmp_path):
    """As in released folders of Qwen-Image, written before transformers put "language_model" into the names."""
    tiny_qwen.pipe.save_pretrained(tmp_path)
    (file,) = (tmp_path / "text_encoder").glob("*.safetensors")
    tensors = {key.replace("model.language_model.", "model."): x for key, x in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    again = sf.load(tmp_path, device="cpu")
    assert torch.equal(again.encode(PROMPTS).tokens, tiny_qwen.encode(PROMPTS).tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_network_computes_in_is_what_diffusers_says(any_family, dtype):
    network = copy.deepcopy(any_family.network).to(dtype)
    anatomy = type(any_family.anatomy)(network)
    assert anatomy.dtype == network.dtype == dtype


def test_weights_that_are_only_stored_in_one_byte_are_not_what_is_computed_in(tiny_sd):
    network = copy.deepcopy(tiny_sd.network)
    network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert type(tiny_sd.anatomy)(network).dtype == network.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sd3", "tiny_flux", "tiny_qwen", "tiny_zimage"])
def test_image_to_image_begins_where_diffusers_begins(request, name):
    p = request.getfixturevalue(name)
    theirs = AutoPipelineForImage2Image.from_pipe(p.pipe)
    for steps in (1, 4, 7, 28, 30):
        theirs.scheduler.set_timesteps(steps, **({"mu": 0.5} if name != "tiny_sd" else {}))
        for strength in (0.03, 0.3, 0.5, 0.6, 0.65, 0.9, 1.0):
            times, _ = theirs.get_timesteps(steps, strength, "cpu")
            if len(times):
                assert p.clock.first_step(strength, steps) == steps - len(times), (steps, strength)
            else:
                with pytest.raises(BadInput, match="less than one step"):
                    p.clock.first_step(strength, steps)


def test_image_to_image_of_a_flow_is_diffusers_own(tiny_sd3):
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    cond, z = tiny_sd3.told("a red star"), tiny_sd3.encode_image(x * 2 - 1)
    ours = tiny_sd3.draw(cond, 3, sampling_steps=5, cfg_scale=1.0, start=Noised(x, 0.65))
    theirs = AutoPipelineForImage2Image.from_pipe(tiny_sd3.pipe)
    theirs.set_progress_bar_config(disable=True)
    kept = theirs.encode_prompt("a red star", None, None, do_classifier_free_guidance=False)
    with torch.no_grad():
        drawn = theirs(
            prompt_embeds=kept[0], pooled_prompt_embeds=kept[2], image=z, strength=0.65, guidance_scale=1.0,
            num_inference_steps=5, generator=torch.Generator().manual_seed(3), output_type="pt", height=16, width=16,
        ).images  # fmt: skip
    torch.testing.assert_close(ours, drawn.float(), rtol=0, atol=1e-4)
