"""PixArt, SD3 and Flux through the adapter, each held to what diffusers itself does."""

from __future__ import annotations

import pytest
import torch

from conftest import LENGTH, make_tiny_flux, make_tiny_pixart, make_tiny_sd3, tiny_vae
from sfumato.errors import BadInput
from sfumato.pipeline import wrap
from sfumato.pipeline.codec import Codec
from sfumato.pipeline.conditioning import Role

FAMILIES = ["tiny_pixart", "tiny_sd3", "tiny_flux"]
ALL = ["tiny_sd", "tiny_sdxl", *FAMILIES]
PROMPTS = ["a red star", "a photo of a blue circle"]


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
    if p.family == "sd3":
        tokens, _, pooled, _ = p.pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
        return tokens, None, pooled
    tokens, pooled, _ = p.pipe.encode_prompt(prompts)
    return tokens, None, pooled


@torch.no_grad()
def test_encode_equals_the_pipelines_own_bit_for_bit(p):
    tokens, mask, pooled = own_encoding(p, PROMPTS)
    cond = p.encode(PROMPTS)
    assert torch.equal(cond.tokens, tokens)
    assert mask is None or torch.equal(cond.mask, mask.bool())
    assert cond.pooled is pooled is None or torch.equal(cond.pooled, pooled)
    assert cond.ids.shape == cond.mask.shape == cond.roles.shape == tokens.shape[:2]
    guidance = {"flux": 3.5}.get(p.family)
    assert cond.guidance is None if guidance is None else (cond.guidance == guidance).all()


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
    start = 1 if any_family.tokenizers[0].bos_token_id is not None and any_family.family != "flux" else 0
    words = [len(prompt.split()) for prompt in cond.prompts]
    for row, n in enumerate(words):
        expected = [Role.START] * start + [Role.WORD] * n + [Role.END] + [Role.PADDING]
        assert cond.roles[row, : len(expected)].tolist() == expected
    assert any_family.last_word_token(cond).tolist() == [start + n - 1 if n else 0 for n in words]
    assert torch.equal(cond.roles == Role.PADDING, ~cond.mask)
    found = any_family.find(cond, "red star")
    assert found[0, start + 1 : start + 3].all() and not found[1:].any()
    assert found.sum() == (4 if any_family.family == "sd3" else 2)  # once for CLIP, once for T5
    assert not any_family.find(cond, "blue star").any() and not any_family.find(cond, "").any()


def test_token_ids_and_embeddings_are_encoded_as_their_text(any_family):
    p, prompt = any_family, "a red star"
    expected = p.encode(prompt)
    ids = [
        tokenizer([p._texts([prompt])[0]], padding="max_length", max_length=length, return_tensors="pt").input_ids
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


def test_pictures_and_latents_as_the_pipeline_scales_them(p):
    z = torch.randn(2, *p.latent_shape(16), generator=torch.Generator().manual_seed(0))
    config = p.pipe.vae.config
    latents = z / config.scaling_factor + (config.shift_factor or 0.0)
    with torch.no_grad():
        expected = p.pipe.vae.decode(latents, return_dict=False)[0]
        assert torch.equal(p.decode_latents(z), expected)
        torch.testing.assert_close(p.scale_latents(latents), z)
        mean = p.pipe.vae.encode(expected).latent_dist.mode()
        torch.testing.assert_close(
            p.encode_image(expected), (mean - (config.shift_factor or 0.0)) * config.scaling_factor
        )
    assert (config.shift_factor is None) == (p.family == "pixart")
    with pytest.raises(BadInput, match="multiple of 4 pixels"):
        p.latent_shape(18)


def test_codec_takes_a_deterministic_autoencoder():
    from diffusers import AutoencoderDC

    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock",) * 3,
        decoder_block_types=("ResBlock",) * 3,
        encoder_block_out_channels=(4, 8, 8),
        decoder_block_out_channels=(4, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        scaling_factor=0.4,
    )
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
