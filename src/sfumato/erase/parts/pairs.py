"""Aligned pairs of pictures, one that shows a concept and one that does not: drawn and edited, or a user's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from safetensors.torch import save_file
from torch import Tensor

from sfumato.data.pictures import open_pictures
from sfumato.errors import BadInput
from sfumato.files import atomic_file
from sfumato.foreign import read_tensors, reading, shaped
from sfumato.pipeline import Text2Image
from sfumato.pipeline.contract import Noised

from .finetune import seeds

Seen = Callable[[Float[Tensor, "n 3 height width"]], Bool[Tensor, "n"]]
"""Whether the concept is in each of some pictures."""
_MADE = "sfumato.pairs"
FOLDERS = ("with", "without")
"""What the two folders of a user's pairs are called."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pictures with the concept and, row by row, the same ones without it.

    Attributes:
        drawn: how many pictures were drawn, and edited, to have them; the rest was rejected. 0: they were given.
    """

    shown: UInt8[Tensor, "n 3 height width"]
    removed: UInt8[Tensor, "n 3 height width"]
    drawn: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        return len(self.shown)

    def both(self) -> Float[Tensor, "two_n 3 height width"]:
        """All with the concept, then all without, in [-1, 1]."""
        return torch.cat([self.shown, self.removed]).float() / 127.5 - 1

    def sheet(self, n: int = 16) -> UInt8[np.ndarray, "two_n height width 3"]:
        """The first pairs, one beside the other, for a contact sheet with an even number of columns."""
        rows = torch.stack([self.shown[:n], self.removed[:n]], dim=1).flatten(0, 1)
        return rows.permute(0, 2, 3, 1).numpy()

    def save(self, file: Path, made: Mapping[str, Any]) -> None:
        """Write them, for `load`, and by what they were made (JSON types)."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file, overwrite=True) as temporary:
            tensors = {"shown": self.shown, "removed": self.removed, "drawn": torch.tensor(self.drawn)}
            named = {name: x.contiguous() for name, x in tensors.items()}
            save_file(named, temporary, metadata={"format": "pt", _MADE: json.dumps(made)})

    @classmethod
    def load(cls, file: Path, made: Mapping[str, Any]) -> Pairs:
        """What `save` wrote.

        Raises:
            BadInput: the file is damaged; the pairs were made by other settings, or with another model.
        """
        found, header = read_tensors(file)
        with reading(file, "a file of pairs"):
            before = shaped(json.loads(header.get(_MADE, "{}")), dict, f"the header of {file}")
        for name, value in json.loads(json.dumps(made)).items():
            if name not in before or before[name] != value:
                raise BadInput(
                    f"{file} holds pairs that were made with {name}={before.get(name)!r}, and these are to have "
                    f"{name}={value!r}: use the same setting to go on, or another folder to start anew"
                )
        drawn, edited = found["drawn"].tolist()
        return cls(found["shown"], found["removed"], (drawn, edited))


def read_pairs(folder: Path, size: int) -> Pairs:
    """The pairs in ``folder/with`` and ``folder/without``, in the order of their names, each cut to its central square.

    Raises:
        BadInput: a folder is missing or empty, their numbers differ, or a picture cannot be read.
    """
    sides = []
    for name in FOLDERS:
        if not (folder / name).is_dir():
            raise BadInput(
                f"{folder} has no folder {name!r}: put pictures with the concept into {folder / 'with'}, and the same "
                f"pictures without it into {folder / 'without'}"
            )
        # Another picture in the place of one that cannot be read would not be its pair.
        found = open_pictures(str(folder / name), size, bad_share=0.0)
        sides.append(torch.from_numpy(np.stack([found.picture(i) for i in range(len(found))])).permute(0, 3, 1, 2))
    if len(sides[0]) != len(sides[1]):
        raise BadInput(
            f"{folder} holds {len(sides[0])} pictures with the concept and {len(sides[1])} without: pairs need as many "
            "of either, in the same order of names"
        )
    return Pairs(sides[0], sides[1])


@torch.no_grad()
def draw_pairs(
    pipe: Text2Image,
    asked: Sequence[str],
    instead: Sequence[str],
    n: int,
    generator: torch.Generator,
    *,
    strength: float,
    sampling_steps: int,
    cfg_scale: float | None = None,
    seen: Seen | None = None,
    tries: int = 1,
    batch: int = 16,
) -> Pairs:
    """Pictures of the prompts ``asked``, and each noised and denoised again (SDEdit, arXiv:2108.01073) towards another
    prompt and away from its own.

    Args:
        asked: prompts that name the concept, taken in turn.
        instead: for each of them the prompt of the edited picture.
        n: how many pairs; those for which ``seen`` is still wrong after all ``tries`` are left out.
        generator: of the seeds.
        strength: how much the edit draws anew, in (0, 1].
        cfg_scale: guidance of both; None is the model's.
        seen: whether the concept is there: pictures in which it is not, and edits in which it is, are drawn again. None
            takes them as they come.
        tries: how often one is drawn at most.
        batch: pictures drawn together.

    Raises:
        BadInput: no picture shows the concept, or no edit is without it.
    """
    options: dict[str, Any] = {"sampling_steps": sampling_steps, "cfg_scale": cfg_scale, "batch": batch}
    rows = torch.arange(n) % len(asked)
    told, other = pipe.encode(list(asked))[rows], pipe.encode(list(instead))[rows]

    def draw(where: Tensor, starts: list[int]) -> Tensor:
        return pipe.draw(told[where], [starts[i] for i in where.tolist()], **options)

    shown, drawn = _until(draw, torch.arange(n), seen, tries, n, generator)
    if not len(shown):
        raise BadInput(
            f"{_told(asked)} drew no picture in which the detector finds the concept: does the model know it? ask with "
            "other templates, or raise tries"
        )

    def edit(where: Tensor, starts: list[int]) -> Tensor:
        first = Noised(torch.stack([shown[i] for i in where.tolist()]), strength)
        numbers = [starts[i] for i in where.tolist()]
        return pipe.draw(other[where], numbers, start=first, negative=told[where], **options)

    kept = torch.tensor(sorted(shown))
    removed, edited = _until(edit, kept, None if seen is None else lambda x: ~seen(x), tries, n, generator)
    if not len(removed):
        raise BadInput(
            f"the detector still finds the concept in every edit towards {_told(instead)}: raise strength or tries, or "
            "name an anchor that looks different"
        )
    order = sorted(removed)
    first, second = ((torch.stack([x[i] for i in order]) * 255).round().to(torch.uint8) for x in (shown, removed))
    return Pairs(first, second, (drawn, edited))


def _until(
    draw: Callable[[Tensor, list[int]], Tensor],
    rows: Tensor,
    right: Seen | None,
    tries: int,
    n: int,
    generator: torch.Generator,
) -> tuple[dict[int, Tensor], int]:
    """Draw ``rows`` of ``n`` until they are right: those that are, by row, and how many were drawn."""
    found: dict[int, Tensor] = {}
    count = 0
    for _ in range(tries):
        starts = seeds(n, generator)  # for all rows, so that a row's seed does not depend on how the others fared
        pictures = draw(rows, starts)
        count += len(rows)
        good = torch.ones(len(rows), dtype=torch.bool) if right is None else right(pictures)
        # Picked out, not looked at where they are: one picture would hold those that were rejected with it.
        found |= dict(zip(rows[good].tolist(), pictures[good.to(pictures.device)], strict=True))
        rows = rows[~good]
        if not len(rows):
            break
    return found, count


def _told(prompts: Sequence[str]) -> str:
    return ", ".join(repr(p) for p in dict.fromkeys(prompts))
