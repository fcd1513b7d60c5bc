"""The pipelines that `train t2i` can make: which networks, which words, and how one call predicts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from .tokenizer import learn_pieces, learn_tokenizer

if TYPE_CHECKING:
    from .t2i import TrainT2I


class Shape(ABC):
    """A kind of pipeline: a denoising network and a text encoder that are trained together."""

    component: ClassVar[str]
    """The network's name in the pipeline."""
    settings: ClassVar[tuple[str, ...]]
    """The recipe's settings that shape the network; the text encoder's are the same for all."""

    @abstractmethod
    def network(self, recipe: TrainT2I) -> nn.Module:
        """The denoising network, from scratch."""

    @abstractmethod
    def text_encoder(self, recipe: TrainT2I, tokenizer: Any) -> nn.Module:
        """The text encoder for what ``tokenizer`` says, from scratch."""

    @abstractmethod
    def learn(self, captions: Sequence[str], context: int, vocabulary: int) -> Any:
        """A tokenizer of the pipeline's kind for ``captions``."""

    def ids(self, tokenizer: Any, texts: Sequence[str]) -> Int[Tensor, "n context"]:
        """Token ids, cut off or padded to the tokenizer's context."""
        settings = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
        return tokenizer(list(texts), **settings, return_tensors="pt").input_ids

    @abstractmethod
    def predict(
        self, network: nn.Module, text: nn.Module, z: Float[Tensor, "batch channel height width"],
        t: Int[Tensor, "batch"], ids: Int[Tensor, "batch context"],
    ) -> Float[Tensor, "batch channel height width"]:  # fmt: skip
        """The network's output for noised latents at timesteps ``t`` under the texts."""

    @abstractmethod
    def pipeline(
        self, autoencoder: AutoencoderKL, text: nn.Module, tokenizer: Any, network: nn.Module, scheduler: Any
    ) -> DiffusionPipeline:
        """The parts, put together."""


class UNetShape(Shape):
    """Stable Diffusion's: a U-Net with cross-attention at every level, and CLIP's text encoder."""

    component = "unet"
    settings = ("channels", "layers")

    def network(self, recipe: TrainT2I) -> UNet2DConditionModel:
        levels = len(recipe.channels)
        return UNet2DConditionModel(
            sample_size=recipe.size // 8,
            in_channels=recipe.latent_channels,
            out_channels=recipe.latent_channels,
            block_out_channels=recipe.channels,
            layers_per_block=recipe.layers,
            down_block_types=("CrossAttnDownBlock2D",) * levels,
            up_block_types=("CrossAttnUpBlock2D",) * levels,
            cross_attention_dim=recipe.text_width,
            attention_head_dim=4,
            norm_num_groups=16,
        )

    def text_encoder(self, recipe: TrainT2I, tokenizer: Any) -> CLIPTextModel:
        width = recipe.text_width
        return CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=4 * width,
                num_attention_heads=4,
                num_hidden_layers=recipe.text_layers,
                max_position_embeddings=recipe.context,
                projection_dim=width,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
            )
        )

    def learn(self, captions: Sequence[str], context: int, vocabulary: int) -> Any:
        return learn_tokenizer(captions, context, vocabulary)

    def predict(self, network: nn.Module, text: nn.Module, z: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return network(z, t, text(ids).last_hidden_state).sample

    def pipeline(
        self, autoencoder: AutoencoderKL, text: nn.Module, tokenizer: Any, network: nn.Module, scheduler: Any
    ) -> DiffusionPipeline:
        return StableDiffusionPipeline(
            vae=autoencoder,
            text_encoder=text,
            tokenizer=tokenizer,
            unet=network,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


class PixArtShape(Shape):
    """PixArt-Sigma's: a transformer over single latents with cross-attention, and T5's text encoder.

    Its output has no learned variance.
    """

    component = "transformer"
    settings = ("width", "blocks")

    def network(self, recipe: TrainT2I) -> PixArtTransformer2DModel:
        heads = recipe.width // HEAD
        return PixArtTransformer2DModel(
            sample_size=recipe.size // 8,
            patch_size=1,
            in_channels=recipe.latent_channels,
            out_channels=recipe.latent_channels,
            num_attention_heads=heads,
            attention_head_dim=HEAD,
            num_layers=recipe.blocks,
            cross_attention_dim=recipe.width,
            caption_channels=recipe.text_width,
            use_additional_conditions=False,
        )

    def text_encoder(self, recipe: TrainT2I, tokenizer: Any) -> T5EncoderModel:
        width = recipe.text_width
        return T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=width,
                d_kv=width // 4,
                d_ff=2 * width,
                num_layers=recipe.text_layers,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )

    def learn(self, captions: Sequence[str], context: int, vocabulary: int) -> Any:
        return learn_pieces(captions, context, vocabulary)

    def ids(self, tokenizer: Any, texts: Sequence[str]) -> Tensor:
        return super().ids(tokenizer, [text.lower().strip() for text in texts])  # as the pipeline reads them

    def predict(self, network: nn.Module, text: nn.Module, z: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        mask = (ids != text.config.pad_token_id).long()
        sizes = {"resolution": None, "aspect_ratio": None}
        return network(
            z,
            encoder_hidden_states=text(ids, attention_mask=mask)[0],
            encoder_attention_mask=mask,
            timestep=t,
            added_cond_kwargs=sizes,
        ).sample

    def pipeline(
        self, autoencoder: AutoencoderKL, text: nn.Module, tokenizer: Any, network: nn.Module, scheduler: Any
    ) -> DiffusionPipeline:
        return PixArtSigmaPipeline(tokenizer, text, autoencoder, network, scheduler)


HEAD = 32
"""Width of a head of the transformer."""
SHAPES: dict[str, Shape] = {"unet": UNetShape(), "pixart": PixArtShape()}
