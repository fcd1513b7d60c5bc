"""Tiny pipelines of the genuine classes whose text encoders are language models, with random weights."""

from __future__ import annotations

import re

from conftest import WORDS, byte_letters, tiny_vae

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
"""The released Qwen tokenizers' chat template, without tools and pictures."""


WORD_OF_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""What it takes for a word, in the words of `tokenizers`."""


def qwen_tokenizer(known: str = "", words=WORDS):
    """A genuine Qwen tokenizer that knows these words, and those of the text ``known``, each as one token."""
    import transformers
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    spaced = dict.fromkeys([*re.findall(r"[A-Za-z]+", known), *words])
    # A word's merges come before those that would break it up.
    first = ["assistant", "Describe", "system", "user", *sorted(words, key=len, reverse=True)]
    merges: dict[tuple[str, str], None] = {}
    for start, found in (("Ġ", spaced), ("", first)):
        for word in found:
            left = start or word[0]
            for letter in word[0 if start else 1 :]:
                merges[left, letter] = None
                left += letter
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    pieces = [*byte_letters(), *("".join(pair) for pair in merges), *special]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    if transformers.__version__.startswith("4"):
        made = Tokenizer(models.BPE(vocab, list(merges), continuing_subword_prefix="", end_of_word_suffix=""))
        made.normalizer, made.decoder = normalizers.NFC(), decoders.ByteLevel()
        parts = [
            pre_tokenizers.Split(Regex(WORD_OF_QWEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        made.pre_tokenizer = pre_tokenizers.Sequence(parts)
        told = {"tokenizer_object": made}
    else:
        told = {"vocab": vocab, "merges": list(merges)}
    tokenizer = transformers.Qwen2TokenizerFast(**told, eos_token="<|im_end|>", chat_template=CHATML)
    tokenizer.add_tokens(special, special_tokens=True)
    return tokenizer


def tiny_qwen_vl(tokenizer, width: int = 16):
    """Qwen 2.5 VL, whose eyes are as small as they can be."""
    import transformers
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    if transformers.__version__.startswith("4"):
        text["rope_scaling"] = {"type": "default", "mrope_section": [1, 1, 2]}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def tiny_qwen3(tokenizer, width: int = 16, layers: int = 2, head: bool = False):
    """Qwen 3, with or without the head that names the next word."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.3,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return (Qwen3ForCausalLM if head else Qwen3Model)(config).eval()


def make_tiny_zimage(seed: int = 0):
    """A ZImagePipeline: Qwen 3, one stream of text and picture."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = qwen_tokenizer()
        transformer = ZImageTransformer2DModel(
            in_channels=4,
            dim=16,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[2, 2, 4],
            axes_lens=[600, 32, 32],
        ).eval()
        for name in ("x_pad_token", "cap_pad_token"):  # which are empty until they are loaded
            torch.nn.init.normal_(getattr(transformer, name), std=0.02)
        vae = tiny_vae(scaling_factor=0.36, shift_factor=0.12)
        flow = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
        return ZImagePipeline(flow, vae, tiny_qwen3(tokenizer), tokenizer, transformer)


def make_tiny_flux2(seed: int = 0, distilled: bool = False):
    """A Flux2KleinPipeline: three layers of Qwen 3, fused single blocks, latents in patches with statistics."""
    import torch
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = qwen_tokenizer()
        vae = AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=16,
        ).eval()
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2.0)
        transformer = Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=48,
            timestep_guidance_channels=16,
            axes_dims_rope=(2, 2, 2, 2),
            guidance_embeds=False,
        ).eval()
        flow = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
        encoder = tiny_qwen3(tokenizer, layers=27, head=True)
        return Flux2KleinPipeline(flow, vae, encoder, tokenizer, transformer, is_distilled=distilled)


def make_tiny_qwen(seed: int = 0):
    """A QwenImagePipeline: a chat template of the genuine length, two streams, an autoencoder of videos."""
    import torch
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    template = (
        "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of "
        "the objects and background:"
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = qwen_tokenizer(template)
        vae = AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[-0.7, 0.1, 0.4, -0.2],
            latents_std=[2.8, 1.4, 2.3, 1.9],
        ).eval()
        transformer = QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(2, 2, 4),
        ).eval()
        flow = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02, max_shift=0.9)
        return QwenImagePipeline(flow, vae, tiny_qwen_vl(tokenizer), tokenizer, transformer)


def gemma_tokenizer(known: str, words=WORDS):
    """A genuine Gemma tokenizer that knows these words, and those of the text ``known``, each as one token."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges, letters = {}, {*known.replace(" ", "▁"), *"".join(words), "▁"}
    for word in dict.fromkeys([*words, *known.split()]):
        left = "▁"
        for letter in word:
            merges[left, letter] = None
            left += letter
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *sorted(letters), *("".join(pair) for pair in merges)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    if transformers.__version__.startswith("4"):
        made = Tokenizer(models.BPE(vocab, list(merges), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        made.normalizer = normalizers.Replace(" ", "▁")
        made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        told = {"tokenizer_object": made}
    else:
        told = {"vocab": vocab, "merges": list(merges), "mask_token": None}
    return transformers.GemmaTokenizerFast(**told, add_bos_token=True)


def tiny_gemma(tokenizer, width: int = 16):
    """A Gemma 2 decoder, without a head."""
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        initializer_range=0.3,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    )
    return Gemma2Model(config).eval()


def tiny_dc_ae(channels: int = 4):
    """A deep autoencoder with a factor of 4."""
    from diffusers import AutoencoderDC

    return AutoencoderDC(
        latent_channels=channels,
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
    ).eval()


def make_tiny_sana(seed: int = 0):
    """A SanaPipeline, for 32x32 pictures: Gemma 2, linear self-attention, a DC-AE, a flow by DPM-Solver."""
    import inspect

    import torch
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        said = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
        tokenizer = gemma_tokenizer("\n".join(said))
        transformer = SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=8,
        ).eval()
        torch.nn.init.normal_(transformer.scale_shift_table)  # a small one hides the text from the output
        flow = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++"
        )
        return SanaPipeline(tokenizer, tiny_gemma(tokenizer), tiny_dc_ae(), transformer, flow)


def make_tiny_omnigen(seed: int = 0):
    """An OmniGenPipeline: a language model's layers over text and pictures, a flow that counts from 0 to 1."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, OmniGenTransformer2DModel

    from sfumato.pipeline.interleaved import AFTER, BEFORE, DROPPED, SIGNS
    from sfumato.pipeline.omnigen import pipeline_class
    from sfumato.train.tokenizer import learn_spoken

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = learn_spoken([BEFORE, AFTER, " ".join(("", *WORDS)), DROPPED], SIGNS, 512)
        transformer = OmniGenTransformer2DModel(
            in_channels=4, hidden_size=16, num_attention_heads=2, num_key_value_heads=2, intermediate_size=24,
            num_layers=2, pad_token_id=2, vocab_size=len(tokenizer), pos_embed_max_size=16,
            rope_scaling={"short_factor": [1.0, 1.2, 1.4, 1.7], "long_factor": [1.0, 2.0, 3.0, 4.0]},
        ).eval()  # fmt: skip
        torch.nn.init.normal_(transformer.embed_tokens.weight)  # a small one hides the text from the output
        flow = FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1)
        vae = AutoencoderKL(  # of a factor of 8, which diffusers' own call takes for granted
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 4, 8), norm_num_groups=4, latent_channels=4, sample_size=32, scaling_factor=0.5,
        ).eval()  # fmt: skip
        made = pipeline_class()(transformer, flow, vae, tokenizer)
        made.default_sample_size = 4
        return made
