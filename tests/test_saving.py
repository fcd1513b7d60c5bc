"""Text encoders of every kind come back from where they were saved, and so do adapters of every network."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from anatomy_cases import MAKERS, latent, make, number, told
from sfumato.errors import BadInput
from sfumato.pipeline import lora
from sfumato.pipeline.adapter import Adapter
from sfumato.pipeline.saving import prefix_clip_keys, write_bpe

SMALL = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def clip():
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**SMALL, max_position_embeddings=6))


def clip_projected():
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(CLIPTextConfig(**SMALL, max_position_embeddings=6, projection_dim=8))


def t5():
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))


def gemma():
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=4))


def qwen():
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=4))


@pytest.mark.parametrize("encoder", [clip, clip_projected, t5, gemma, qwen])
def test_a_saved_encoder_comes_back_whole(encoder, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = encoder().eval()
    made.save_pretrained(tmp_path)
    prefix_clip_keys(tmp_path, made)
    again, report = type(made).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    before = dict(made.named_parameters())
    assert before.keys() == dict(again.named_parameters()).keys()
    assert all(torch.equal(x, before[name]) for name, x in again.named_parameters())
    if encoder in (clip, clip_projected):
        with safe_open(tmp_path / "model.safetensors", "pt") as opened:
            assert all(key.startswith(("text_model.", "text_projection.")) for key in opened.keys())  # noqa: SIM118


def test_only_tokenizers_that_read_a_vocabulary_are_given_one(tmp_path):
    """T5's has scores in the place of merges."""
    from tokenizers import Tokenizer, models
    from transformers import T5TokenizerFast

    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("▁star", -2.0)]
    tokenizer = T5TokenizerFast(tokenizer_object=Tokenizer(models.Unigram(words, unk_id=2)), extra_ids=0)
    tokenizer.save_pretrained(tmp_path)
    write_bpe(tmp_path, tokenizer)
    assert (tmp_path / "tokenizer.json").exists() and not (tmp_path / "vocab.json").exists()
    assert type(tokenizer).from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()


@torch.no_grad()
@pytest.mark.parametrize("style", lora.STYLES)
@pytest.mark.parametrize("name", MAKERS)
def test_an_adapter_of_every_network_comes_back_from_its_file(name, style, tmp_path):
    anatomy, z = make(name), latent(make(name))
    draw = lambda: anatomy.call(z, number(anatomy), told())
    plain = draw()
    adapter = Adapter(anatomy, 2, 3.0, "transformer", torch.Generator().manual_seed(0))
    for up in adapter.up.values():
        up.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    ours, file = draw(), tmp_path / "a.safetensors"
    assert not torch.allclose(ours, plain, atol=1e-3)
    adapter.save_lora(file, style)
    adapter.remove()
    prefix = {"diffusers": f"{anatomy.component}.", "webui": f"lora_{anatomy.component}_"}[style]
    assert anatomy.component == ("unet" if name == "unet" else "transformer")
    assert all(key.startswith(prefix) for key in load_file(file))
    state, rank, alpha = lora.read(file, anatomy)
    again = Adapter(anatomy, rank, alpha, sorted({key.rsplit(".", 1)[0] for key in state}))
    again.load_state_dict(state)
    torch.testing.assert_close(draw(), ours, rtol=1e-4, atol=1e-5)
    again.remove()
    other = make("unet" if name != "unet" else "sd3")
    with pytest.raises(BadInput, match="does not fit this network"):
        lora.read(file, other)
    if style == "diffusers" and hasattr(anatomy.network, "load_lora_adapter"):
        anatomy.network.load_lora_adapter(load_file(file), prefix=anatomy.component)
        torch.testing.assert_close(draw(), ours, rtol=1e-4, atol=1e-5)


def test_the_schedule_of_a_flow_is_described_as_one():
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    from sfumato.pipeline.saving import schedule_of

    flow = schedule_of(SimpleNamespace(config=FlowMatchEulerDiscreteScheduler(shift=3.0).config))
    assert flow["shift"] == 3.0 and not any(key.startswith("beta") for key in flow)
    assert schedule_of(SimpleNamespace(config=DDIMScheduler().config)) == {
        "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "rescale_betas_zero_snr": False,
    }  # fmt: skip
