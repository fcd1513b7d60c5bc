"""The first stage of latent diffusion: the autoencoder's loss, and every picture as a latent, encoded once and kept."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState
from diffusers import AutoencoderDC, AutoencoderKL
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.data.pictures import Pictures, to_tensor
from sfumato.files import atomic_file, clear_leftovers
from sfumato.progress import track

from . import draw
from .recipe import Recipe

BATCH = 128
"""Pictures encoded at once."""
CHUNK = 8 * BATCH
"""Pictures between files that outlast a kill."""


class AutoencoderRecipe(Recipe):
    """Squared error, a little absolute error (small residues, clean edges) and a very small KL term."""

    name = "autoencoder"
    absolute, kl = 0.1, 1e-6

    def __init__(self, autoencoder: AutoencoderKL, pictures: Pictures):
        self.autoencoder, self.pictures = autoencoder, pictures

    def modules(self) -> dict[str, nn.Module]:
        return {"vae": self.autoencoder}

    def batch(self, step: int, rng: torch.Generator, size: int) -> Tensor:
        rows = draw.integers(len(self.pictures), size, rng)
        return to_tensor([self.pictures.picture(int(i)) for i in rows])

    def loss(self, batch: Tensor, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch.to(self.autoencoder.device)
        posterior = self.autoencoder.encode(x).latent_dist
        noise = draw.normal(posterior.mean.shape, rng).to(x.device)
        y = self.autoencoder.decode(posterior.mean + posterior.std * noise).sample.float()
        mse = F.mse_loss(y, x)
        return mse + self.absolute * F.l1_loss(y, x) + self.kl * posterior.kl().mean(), {"mse": mse.detach()}


@torch.no_grad()
def encode_all(
    autoencoder: AutoencoderKL | AutoencoderDC,
    pictures: Pictures,
    cache: Path,
    of: str,
    precision: str = "no",
    progress: bool = False,
) -> Tensor:
    """The posterior mean of every picture's latent, (n, channels, size/8, size/8) for a factor of 8, unscaled.

    Killed, it goes on at the last `CHUNK` pictures; several processes share the work.

    Args:
        autoencoder: in evaluation mode.
        pictures: all of them are encoded.
        cache: a safetensors file in which they are kept, with ``of``; what it holds of something else is replaced.
        of: which autoencoder and pictures these are.
        precision: "no" for float32, "bf16" or "fp16" for automatic mixed precision.
        progress: show a bar.
    """
    process = PartialState(cpu=not torch.cuda.is_available())
    main, parts = process.is_main_process, cache.with_name(f"{cache.stem}.parts")
    if main:
        clear_leftovers(cache)
    process.wait_for_everyone()
    if (latents := _kept(cache, of)) is not None:
        if main:
            shutil.rmtree(parts, ignore_errors=True)
        return latents
    device, dtype = autoencoder.device, torch.float16 if precision == "fp16" else torch.bfloat16
    chunks = [range(i, min(i + CHUNK, len(pictures))) for i in range(0, len(pictures), CHUNK)]
    files = [parts / f"{rows.start:08d}.safetensors" for rows in chunks]
    mine = range(process.process_index, len(chunks), process.num_processes)
    for i in track(mine, "encoding pictures", progress and main):
        if _kept(files[i], of) is None:
            found = []
            for rows in (chunks[i][j : j + BATCH] for j in range(0, len(chunks[i]), BATCH)):
                x = to_tensor([pictures.picture(row) for row in rows]).to(device)
                with torch.autocast(device.type, dtype, enabled=precision != "no"):
                    encoded = autoencoder.encode(x)
                # A deterministic autoencoder (DC-AE) has no posterior.
                z = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent
                found.append(z.float().cpu())
            _keep(files[i], torch.cat(found), of)
    process.wait_for_everyone()
    if main:
        _keep(cache, torch.cat([_kept(file, of) for file in files]), of)
        shutil.rmtree(parts)
    process.wait_for_everyone()
    # From the file, in its layout: kernels round by layout, and a resumed run must do as this one.
    return _kept(cache, of)


def _kept(file: Path, of: str) -> Tensor | None:
    if file.exists():
        with suppress(SafetensorError), safe_open(file, "pt") as kept:
            if (kept.metadata() or {}).get("of") == of:
                return kept.get_tensor("latents")
    return None


def _keep(file: Path, latents: Tensor, of: str) -> None:
    with atomic_file(file, overwrite=True) as temporary:
        save_file({"latents": latents.contiguous()}, temporary, metadata={"of": of})
