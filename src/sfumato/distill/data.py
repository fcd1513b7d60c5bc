"""Clean data as a teacher sees them: encoded by its autoencoder, with its kind of conditioning."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sfumato.data.pictures import Pictures, open_pictures, to_tensor
from sfumato.errors import BadInput
from sfumato.fields import Count, Share
from sfumato.pipeline import Conditioning, ImageModel
from sfumato.pipeline.saving import weights_sha256
from sfumato.settings import Tuned
from sfumato.train.autoencoder import encode_all
from sfumato.train.draw import integers, uniform

from .base import Model


@dataclass(frozen=True, kw_only=True)
class FromPictures(Tuned):
    """The fields of a method that needs clean pictures; inherit it beside `Distiller`."""

    data: str = "sketch"
    """"sketch", "digits", a folder of pictures, Parquet files, WebDataset shards, or hub:OWNER/NAME."""
    caption: str = "{caption}"
    """How a Parquet row becomes a caption, e.g. "{caption}, {style} style"."""
    pictures: Count = 40_000
    """How many pictures of the sketch world to draw."""
    unconditional: Share = 0.0
    """Share of pictures shown without caption or class, for a student that is to draw without them too."""

    def open_data(self, model: Model, folder: Path, seed: int, progress: bool = False) -> CleanData:
        """The data for ``model``; latents are encoded once and kept in ``folder``.

        Raises:
            BadInput: nothing is found there; classes that are not the model's.
        """
        found = open_pictures(self.data, model.size, self.caption, seed, self.pictures)
        if isinstance(model, ImageModel):
            if model.labels and found.label_names != model.labels:
                ours, theirs = (", ".join(names) or "none" for names in (model.labels, found.label_names))
                raise BadInput(f"the teacher knows the classes {ours}; these pictures have {theirs}")
            return CleanData(model, found, None, self.unconditional)
        autoencoder = model.parts()["vae"]
        key = [self.data, seed, len(found), model.size, weights_sha256({"vae": autoencoder})]
        folder.mkdir(parents=True, exist_ok=True)
        latents = encode_all(autoencoder, found, folder / "latents.safetensors", json.dumps(key), progress=progress)
        return CleanData(model, found, model.scale_latents(latents), self.unconditional)


@dataclass(frozen=True)
class CleanData:
    """Pictures, or their latents, in batches drawn by a generator."""

    model: Model
    pictures: Pictures
    latents: Float[Tensor, "n channel height width"] | None
    unconditional: Share

    def batch(self, rng: torch.Generator, size: int) -> dict[str, Tensor]:
        """``size`` rows, drawn with ``rng`` only: clean data ``x``, their numbers, which go without conditioning."""
        rows = integers(len(self.pictures), size, rng)
        bare = uniform(size, rng) < self.unconditional
        x = to_tensor([self.pictures.picture(i) for i in rows.tolist()]) if self.latents is None else self.latents[rows]
        return {"x": x.float(), "rows": rows, "bare": bare}

    @torch.no_grad()
    def conditioning(self, rows: Int[Tensor, "n"], bare: Bool[Tensor, "n"]) -> Any:
        """What the model is told about these pictures: a `Conditioning`, class numbers, or None."""
        without = self.model.unconditional(len(rows))
        if without is None:
            return None
        if isinstance(self.model, ImageModel):
            labels = torch.tensor([self.pictures.label(i) for i in rows.tolist()]).to(without.device)
            return torch.where(bare.to(without.device), without, labels)
        rows, bare = rows.cpu(), bare.cpu()
        told = self.model.encode([self.pictures.caption(i) for i in rows.tolist()])
        numbers = torch.arange(len(rows))
        return Conditioning.cat([told, without])[torch.where(bare, numbers + len(rows), numbers)]
