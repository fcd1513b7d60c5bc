"""The first stage of latent diffusion: the autoencoder's loss, and every picture as a latent, encoded once and kept."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.data.pictures import Pictures, to_tensor
from sfumato.files import atomic_file, clear_leftovers
from sfumato.progress import track


class AutoencoderRecipe:
    """Squared error, a little absolute error (small residues, clean edges) and a very small KL term."""

    name = "autoencoder"
    absolute, kl = 0.1, 1e-6

    def __init__(self, autoencoder: AutoencoderKL, pictures: Pictures):
        self.autoencoder, self.pictures = autoencoder, pictures

    def modules(self) -> dict[str, nn.Module]:
        return {"vae": self.autoencoder}

    def batch(self, step: int, rng: torch.Generator, size: int) -> Tensor:
        rows = torch.randint(len(self.pictures), (size,), generator=rng)
        return to_tensor([self.pictures.picture(int(i)) for i in rows])

    def loss(self, batch: Tensor, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch.to(self.autoencoder.device)
        posterior = self.autoencoder.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=rng).to(x.device)
        y = self.autoencoder.decode(posterior.mean + posterior.std * noise).sample.float()
        mse = F.mse_loss(y, x)
        return mse + self.absolute * F.l1_loss(y, x) + self.kl * posterior.kl().mean(), {"mse": mse.detach()}


@torch.no_grad()
def encode_all(
    autoencoder: AutoencoderKL, pictures: Pictures, cache: Path, of: str, precision: str = "no", progress: bool = False
) -> Tensor:
    """The posterior mean of every picture's latent, (n, channels, size/8, size/8), unscaled.

    Args:
        autoencoder: in evaluation mode.
        pictures: all of them are encoded.
        cache: a safetensors file in which they are kept, with ``of``; what it holds of something else is replaced.
        of: which autoencoder and pictures these are.
        precision: "no" for float32, "bf16" or "fp16" for automatic mixed precision.
        progress: show a bar.
    """
    if cache.exists():
        clear_leftovers(cache)
        with safe_open(cache, "pt") as kept:
            if (kept.metadata() or {}).get("of") == of:
                return kept.get_tensor("latents")
    parts = []
    device, batch = autoencoder.device, 128
    kind = torch.float16 if precision == "fp16" else torch.bfloat16
    for start in track(range(0, len(pictures), batch), "encoding pictures", progress):
        rows = range(start, min(start + batch, len(pictures)))
        x = to_tensor([pictures.picture(i) for i in rows]).to(device)
        with torch.autocast(device.type, kind, enabled=precision != "no"):
            parts.append(autoencoder.encode(x).latent_dist.mean.float().cpu())
    # In the layout in which a file gives them back: kernels round by layout, and a resumed run must do as this one.
    latents = torch.cat(parts).contiguous()
    with atomic_file(cache, overwrite=True) as temporary:
        save_file({"latents": latents}, temporary, metadata={"of": of})
    return latents
