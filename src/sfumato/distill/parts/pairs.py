"""Pairs of noise and what a model's ODE makes of it, in shards that outlast a kill.

A pair is a row of a data set's captions or classes, standard normal noise, and the clean end. Which noise a pair has
depends on its number and the store's seed alone, and which pairs are drawn together on the shards, so a store that was
killed goes on to the same bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.files import atomic_file, clear_leftovers
from sfumato.progress import track
from sfumato.train.draw import step_seed

Ends = Callable[[Float[Tensor, "n *latent"], Int[Tensor, "n"]], Float[Tensor, "n *latent"]]
"""(noise, rows of the data) -> clean ends."""


class PairStore:
    """``count`` pairs in ``folder``: files FIRST.safetensors with "noise" and "clean", float32, of ``shard`` each.

    Args:
        of: whose pairs they are, in plain values: the model's hash, the sampler, the data, the seed.

    Raises:
        BadInput: the folder holds pairs of something else; the message says of what.
    """

    def __init__(self, folder: Path, count: int, of: dict[str, Any], shard: int = 256):
        self.folder, self.count, self.shard = Path(folder), count, shard
        self.of = json.loads(json.dumps({**of, "count": count, "shard": shard}))
        for file in sorted(self.folder.glob("*.safetensors")):
            if (theirs := _of(file)) is not None and theirs | self.of != theirs:
                raise BadInput(f"{self.folder} holds pairs of another {_other(theirs, self.of)}: choose another folder")

    @cached_property
    def files(self) -> list[Path]:
        return [self.folder / f"{first:08d}.safetensors" for first in range(0, self.count, self.shard)]

    def rows(self, i: int) -> range:
        """The pairs in file ``i``."""
        return range(i * self.shard, min((i + 1) * self.shard, self.count))

    @torch.no_grad()
    def fill(self, ends: Ends, shape: tuple[int, ...], prompts: int, batch: int, progress: bool = False) -> None:
        """Draw the pairs that are not there yet, or whose bytes have changed; several processes share the work.

        Args:
            ends: clean ends of noise, for rows below ``prompts``: pair i has row i modulo their number.
            shape: of one noise.
            batch: pairs drawn together.
        """
        process = PartialState(cpu=not torch.cuda.is_available())
        self.folder.mkdir(parents=True, exist_ok=True)
        mine = range(process.process_index, len(self.files), process.num_processes)
        for i in track(mine, "drawing pairs", progress):
            clear_leftovers(self.files[i])
            if _sound(self.files[i]):
                continue
            rows = self.rows(i)
            noise = torch.stack([self.noise(row, shape) for row in rows])
            which = torch.arange(rows.start, rows.stop) % prompts
            cut = [slice(first, first + batch) for first in range(0, len(rows), batch)]
            clean = torch.cat([ends(noise[part], which[part]).float().cpu() for part in cut])
            with atomic_file(self.files[i], overwrite=True) as temporary:
                tensors = {"noise": noise, "clean": clean.contiguous()}
                told = {**self.of, "sha256": _sha256(tensors)}
                save_file(tensors, temporary, metadata={"of": json.dumps(told, sort_keys=True)})
        process.wait_for_everyone()

    def noise(self, i: int, shape: tuple[int, ...]) -> Float[Tensor, "*shape"]:
        """The noise of pair ``i``."""
        generator = torch.Generator().manual_seed(step_seed(self.of.get("seed", 0), i, 4))
        return torch.randn(shape, generator=generator)

    def pairs(self, rows: Int[Tensor, "n"]) -> tuple[Float[Tensor, "n *latent"], Float[Tensor, "n *latent"]]:
        """(noise, clean) of these pairs, read from their files.

        Raises:
            BadInput: a file is missing or damaged.
        """
        noise, clean = [], []
        for row in rows.tolist():
            file, at = self._open(row // self.shard), row % self.shard
            noise.append(file.get_slice("noise")[at : at + 1])
            clean.append(file.get_slice("clean")[at : at + 1])
        return torch.cat(noise), torch.cat(clean)

    def _open(self, i: int) -> Any:
        if i not in self._opened:
            try:
                self._opened[i] = safe_open(self.files[i], "pt").__enter__()
            except (OSError, SafetensorError) as error:
                raise BadInput(f"{self.files[i]} cannot be read: remove it, and its pairs are drawn anew") from error
        return self._opened[i]

    @cached_property
    def _opened(self) -> dict[int, Any]:
        return {}


def _of(file: Path) -> dict[str, Any] | None:
    """Whose pairs a file holds, and their hash; None where it is not there or was cut short."""
    if file.exists():
        with suppress(SafetensorError), safe_open(file, "pt") as kept:
            told: Any = None
            with suppress(ValueError):  # another tool's file may say anything
                told = json.loads((kept.metadata() or {}).get("of", "{}"))
            return told if isinstance(told, dict) else {}
    return None


def _sound(file: Path) -> bool:
    """Whether a file holds what was written: it was not cut short, and no byte of its pairs has changed."""
    if told := _of(file):
        with safe_open(file, "pt") as kept:
            return told.get("sha256") == _sha256({name: kept.get_tensor(name) for name in ("clean", "noise")})
    return False


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    hashed = hashlib.sha256()
    for name in sorted(tensors):
        hashed.update(tensors[name].numpy())
    return hashed.hexdigest()


def _other(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    return next((name for name in ours if theirs.get(name) != ours[name]), "kind")
