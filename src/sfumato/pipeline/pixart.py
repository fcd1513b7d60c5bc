"""PixArt-Sigma: one T5 text encoder, a transformer with cross-attention, eps-prediction with a learned variance."""

from __future__ import annotations

from diffusers.utils import is_bs4_available, is_ftfy_available

from . import text
from .anatomy import PixArtAnatomy
from .base import Text2Image
from .codec import Codec
from .conditioning import Conditioning


class PixArtSigma(Text2Image):
    """The adapter for ``PixArtSigmaPipeline``. The learned variance is not used, as in the pipeline itself."""

    family = "pixart"
    title = "PixArt-Sigma"
    default_cfg_scale = 4.5
    anatomy_type = PixArtAnatomy
    masked = True

    @classmethod
    def plain(cls, pipe) -> bool:
        config = pipe.transformer.config
        return config.in_channels == pipe.vae.config.latent_channels and not config.out_channels % config.in_channels

    def text_parts(self) -> list[tuple[str, str]]:
        return [("tokenizer", "text_encoder")]

    def text_lengths(self) -> list[int]:
        return [300]

    @property
    def codec(self) -> Codec:
        return Codec(self.pipe.vae, self.network.config.patch_size)

    def _texts(self, prompts: list[str]) -> list[str]:
        return self.pipe._text_preprocessing(prompts, clean_caption=is_bs4_available() and is_ftfy_available())

    def _encode(self, reads: list[text.Read], size: int) -> Conditioning:
        (read,) = reads
        tokens = text.run(self.pipe.text_encoder, read, attention_mask=read.mask)[0]
        return Conditioning(tokens=tokens, **text.layout(read))
