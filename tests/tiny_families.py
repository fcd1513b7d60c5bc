"""Tiny pipelines of the genuine classes whose text encoders are language models, with random weights."""

from __future__ import annotations

from conftest import WORDS


def gemma_tokenizer(known: str, words=WORDS):
    """A genuine Gemma tokenizer that knows these words, and those of the text ``known``, each as one token."""
    from transformers import GemmaTokenizer

    merges, letters = {}, {*known.replace(" ", "▁"), *"".join(words), "▁"}
    for word in dict.fromkeys([*words, *known.split()]):
        left = "▁"
        for letter in word:
            merges[left, letter] = None
            left += letter
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *sorted(letters), *("".join(pair) for pair in merges)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return GemmaTokenizer(vocab=vocab, merges=list(merges), mask_token=None, add_bos_token=True)


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
