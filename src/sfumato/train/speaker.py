"""OmniGen's network to begin training with: from random weights, or from a language model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import OmniGenTransformer2DModel
from torch import Tensor, nn

from sfumato.errors import BadInput
from sfumato.foreign import reading
from sfumato.pipeline.interleaved import SIGNS
from sfumato.pipeline.saving import quiet

PADDING = 2
"""The id of padding, Llama's </s>."""


@torch.no_grad()
def initialise(network: OmniGenTransformer2DModel) -> None:
    """Weights to train from scratch, from torch's generator: linear layers Xavier-uniform, patch embedders too on
    flattened kernels, the time's layers N(0, 0.02), words N(0, 0.02); what makes the output is zero, and so is it."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for embedder in (network.time_token, network.t_embedder):
        nn.init.normal_(embedder.linear_1.weight, std=0.02)
        nn.init.normal_(embedder.linear_2.weight, std=0.02)
    for last in (network.norm_out.linear, network.proj_out):
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)


def fresh_network(
    channels: int, words: int, width: int, heads: int, mlp: int, blocks: int, side: int
) -> OmniGenTransformer2DModel:
    """A network from random weights (see `initialise`); rotary places are not stretched.

    Args:
        channels: of the latents.
        words: of the vocabulary.
        width, heads, mlp, blocks: of the transformer.
        side: cells along a side of the table of places, of a patch each.
    """
    even = [1.0] * (width // heads // 2)
    network = OmniGenTransformer2DModel(
        in_channels=channels, hidden_size=width, num_attention_heads=heads, num_key_value_heads=heads,
        intermediate_size=mlp, num_layers=blocks, pad_token_id=PADDING, vocab_size=words, max_position_embeddings=4096,
        pos_embed_max_size=side, rope_scaling={"short_factor": even, "long_factor": even},
    )  # fmt: skip
    initialise(network)
    return network


def from_language_model(name: str, channels: int) -> tuple[OmniGenTransformer2DModel, Any]:
    """A network that begins as a Phi-3 language model, and its tokenizer with the signs of instructions.

    Layers, norms and the table of words are the language model's; what it has not (patches, time, output, words of its
    own) begins as `initialise` says. So text is read exactly as the language model reads it.

    Args:
        name: a folder or hub id of transformers, safetensors weights.
        channels: of the latents.

    Raises:
        BadInput: it cannot be read, is no Phi-3, or turns only a part of each head.
    """
    from transformers import AutoConfig, AutoTokenizer, Phi3Model

    local = {"local_files_only": Path(name).expanduser().is_dir(), "trust_remote_code": False}
    with quiet(), reading(name, "a Phi-3 of transformers"):
        config = AutoConfig.from_pretrained(name, **local)
        if config.model_type != "phi3":
            raise BadInput(f"{name} is a {config.model_type}: OmniGen's network has the shape of a phi3")
        tokenizer = AutoTokenizer.from_pretrained(name, **local)
        model: Any = Phi3Model.from_pretrained(name, use_safetensors=True, **local).float()
    told = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if told.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0)) != 1.0:
        raise BadInput(f"{name} turns a part of each head only, which OmniGen's network does not: take another Phi-3")
    tokenizer.add_tokens([sign for sign in SIGNS if sign not in tokenizer.get_vocab()], special_tokens=True)
    even = [1.0] * (config.hidden_size // config.num_attention_heads // 2)
    network = OmniGenTransformer2DModel(
        in_channels=channels, hidden_size=config.hidden_size, num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads, intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers, rms_norm_eps=config.rms_norm_eps, pad_token_id=PADDING,
        vocab_size=max(config.vocab_size, len(tokenizer)), max_position_embeddings=config.max_position_embeddings,
        original_max_position_embeddings=config.original_max_position_embeddings,
        rope_base=int(told.get("rope_theta", getattr(config, "rope_theta", 10_000))),
        rope_scaling={name: list(told.get(name) or even) for name in ("short_factor", "long_factor")},
    )  # fmt: skip
    initialise(network)
    network.load_state_dict(spoken(model.state_dict(), network, config.num_key_value_heads), strict=False)
    return network, tokenizer


@torch.no_grad()
def spoken(phi3: dict[str, Tensor], network: OmniGenTransformer2DModel, shared: int) -> dict[str, Tensor]:
    """A Phi-3's weights by the names of OmniGen's; rows of words that it lacks are the network's own.

    Args:
        shared: heads of its keys and values, each of which is written out for all the heads that share it.
    """
    heads = network.config.num_attention_heads
    width = network.config.hidden_size // heads
    named: dict[str, Tensor] = {}
    for name, x in phi3.items():
        if name.endswith("qkv_proj.weight"):
            query, *others = x.split([width * heads, width * shared, width * shared])
            written = [y.unflatten(0, (shared, width)).repeat_interleave(heads // shared, 0) for y in others]
            parts = zip(("to_q", "to_k", "to_v"), (query, *(y.flatten(0, 1) for y in written)), strict=True)
            named |= {name.replace("qkv_proj", part): w for part, w in parts}
        elif name == "embed_tokens.weight":
            table = network.embed_tokens.weight.clone()
            table[: len(x)] = x
            named[name] = table
        else:
            named[name.replace("o_proj", "to_out.0")] = x
    return named
