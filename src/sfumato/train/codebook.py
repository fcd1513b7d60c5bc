"""The first stage of models of codes: an autoencoder with a codebook, and every picture as codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import VQModel
from jaxtyping import Float, Int
from torch import Tensor, nn

from sfumato.data.pictures import Pictures, to_tensor
from sfumato.nets.blocks import groups
from sfumato.pipeline.token_model import codes_of

from . import draw
from .recipe import Recipe, Turn
from .schedule import Schedule
from .state import put, whole

BATCH = 64
REVIVED, LATENTS = 20, 16
"""Updates after which unused codes are put elsewhere, and how many latents for each code must be nearer to others."""


def codebook(size: int, channels: tuple[int, ...], values: int, dimensions: int = 8) -> VQModel:
    """diffusers' ``VQModel``, a level for each of ``channels``, each but the last halving the side."""
    vae = VQModel(
        down_block_types=("DownEncoderBlock2D",) * len(channels), up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels, layers_per_block=1, latent_channels=dimensions, num_vq_embeddings=values,
        norm_num_groups=groups(*channels), sample_size=size,
    )  # fmt: skip
    with torch.no_grad():  # as far apart as new latents are: at the usual 1 / values nearly all codes stay unused
        vae.quantize.embedding.weight.normal_(std=0.5)
    return vae


class CodebookRecipe(Recipe):
    """Squared error of the pictures, a little absolute error, and the codebook's own loss (arXiv:1711.00937, eq. 3).

    A code that no latent is nearest to hears nothing from these losses and stays unused. So in the first half of the
    updates, every `REVIVED` of them, such codes are set to latents of pictures, as in Jukebox (arXiv:2005.00341). How
    many are in use is logged as their perplexity in a batch: 1 where all is one code.
    """

    name = "codebook"
    absolute = 0.1

    def __init__(self, vae: VQModel, pictures: Pictures, schedule: Schedule):
        self.vae, self.pictures, self.schedule = vae, pictures, schedule

    def modules(self) -> dict[str, nn.Module]:
        return {"vae": self.vae}

    def batch(self, step: int, rng: torch.Generator, size: int) -> Tensor:
        rows = draw.integers(len(self.pictures), size, rng)
        return to_tensor([self.pictures.picture(int(i)) for i in rows])

    def loss(self, batch: Tensor, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch.to(self.vae.device)
        quantised, own, (_, _, codes) = self.vae.quantize(self.vae.encode(x).latents)
        y = self.vae.decode(quantised, force_not_quantize=True).sample.float()
        mse = F.mse_loss(y, x)
        share = torch.bincount(codes, minlength=self.vae.config["num_vq_embeddings"]) / len(codes)
        told = {"mse": mse.detach(), "perplexity": torch.special.entr(share).sum().exp()}
        return mse + self.absolute * F.l1_loss(y, x) + own, told

    def after_update(self, turn: Turn, step: int) -> None:
        if step % REVIVED == 0 and 2 * step <= self.schedule.updates:
            rng = torch.Generator().manual_seed(draw.step_seed(self.schedule.seed, step))  # alike on all processes
            found: list[Tensor] = []
            while sum(map(len, found)) < LATENTS * self.vae.config["num_vq_embeddings"]:
                x = self.batch(step, rng, BATCH).to(self.vae.device)
                found.append(self.vae.encode(x).latents.movedim(1, -1).flatten(0, -2))
            revive(self.vae, torch.cat(found), rng)


@torch.no_grad()
def revive(vae: VQModel, latents: Float[Tensor, "n dimensions"], rng: torch.Generator) -> int:
    """Set codes that none of these latents is nearest to to some of them, and say how many."""
    table = whole(vae.quantize.embedding.weight).clone()
    unused = torch.ones(len(table), dtype=torch.bool, device=table.device)
    unused[torch.cdist(latents.to(table), table).argmin(1)] = False
    chosen = draw.integers(len(latents), int(unused.sum()), rng)
    table[unused] = latents[chosen.to(latents.device)].to(table)
    put(vae.quantize.embedding.weight, table)
    return len(chosen)


def encode_codes(vae: VQModel, pictures: Pictures) -> Int[Tensor, "n h w"]:
    """The codes of all pictures."""
    found = []
    for start in range(0, len(pictures), BATCH):
        rows = range(start, min(start + BATCH, len(pictures)))
        found.append(codes_of(vae, to_tensor([pictures.picture(i) for i in rows]).to(vae.device)).cpu())
    return torch.cat(found)
