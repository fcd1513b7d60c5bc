"""Clean data as a teacher sees them: encoded by its autoencoder, with its kind of conditioning."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sfumato.data.pictures import Pictures, open_pictures, source_for, to_tensor
from sfumato.fields import Count, Share
from sfumato.pipeline import Condition, Model
from sfumato.pipeline.saving import weights_sha256
from sfumato.progress import say
from sfumato.settings import Tuned
from sfumato.train.autoencoder import encode_all
from sfumato.train.draw import integers, uniform


@dataclass(frozen=True, kw_only=True)
class FromPictures(Tuned):
    """The fields of a method that needs clean pictures; inherit it beside `Distiller`."""

    data: str = ""
    """"sketch", "digits", a folder of pictures, Parquet files, WebDataset shards, or hub:OWNER/NAME; by default, for
    teachers of the sketch world, "sketch"."""
    caption: str = "{caption}"
    """How a Parquet row becomes a caption, e.g. "{caption}, {style} style"."""
    pictures: Count = 40_000
    """How many pictures of the sketch world to draw."""
    unconditional: Share = 0.0
    """Share of pictures shown without caption or class, for a student that is to draw without them too."""

    def rows(self, model: Model) -> dict[str, str]:
        """What a run that goes on must find again beside its settings: the same rows of data.

        Raises:
            BadInput: as `found_for`.
        """
        return {"rows": self.found_for(model, getattr(self, "seed", 0)).identity()}

    def found_for(self, model: Model, seed: int) -> Pictures:
        """The pictures, at the size that ``model`` draws; none of them is looked at.

        Raises:
            BadInput: as `source_for`; nothing is found; classes that are not the model's.
        """
        found = open_pictures(source_for(self.data, model), model.size, self.caption, seed, self.pictures)
        model.asked_for(found, [])  # refuses classes that the model does not know
        return found

    def open_data(self, model: Model, folder: Path, seed: int, progress: bool = False) -> CleanData:
        """The data for ``model``; latents are encoded once and kept in ``folder``.

        Raises:
            BadInput: as `found_for`.
        """
        found = self.found_for(model, seed)
        if progress and found.origin and hasattr(model, "tokenizers"):
            say(f"captions of {self.data}: {found.origin}")
        if (autoencoder := model.autoencoder) is None:
            return CleanData(model, found, None, self.unconditional)
        key = [self.data, seed, found.identity(), model.size, weights_sha256({"vae": autoencoder})]
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
    def conditioning(self, rows: Int[Tensor, "n"], bare: Bool[Tensor, "n"]) -> Condition | None:
        """What the model is told about these pictures; None for a model that is never told anything."""
        empty = self.model.unconditional(len(rows))
        if empty is None:
            return None
        return self.model.told(self.model.asked_for(self.pictures, rows.tolist())).drop(bare, empty)
