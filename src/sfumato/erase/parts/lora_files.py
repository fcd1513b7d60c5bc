"""The LoRA files that stand beside a saved pipeline into which adapters were merged, one for each concept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from sfumato.files import save_png
from sfumato.pipeline.adapter import Adapter
from sfumato.text import plain

_CARD = """# LoRA

The original model with these is the one without {concepts}. Each concept has a file of its own; all act together at
weight 1:

```python
{lines}
pipe.set_adapters([{names}])
```
"""


@dataclass(frozen=True, eq=False)
class Lora:
    """An adapter that erases one concept, and a picture of what it was trained on."""

    concept: str
    adapter: Adapter
    sheet: UInt8[np.ndarray, "height width 3"] | None = None


LONGEST = 80
"""Bytes of a concept in a file's name."""


def write_loras(folder: Path, loras: Sequence[Lora]) -> None:
    """Write ``folder/lora``: NAME.safetensors for each concept, its picture, and how they are loaded."""
    place = folder / "lora"
    place.mkdir()
    names = file_names([one.concept for one in loras])
    for name, one in zip(names, loras, strict=True):
        one.adapter.save_lora(place / f"{name}.safetensors")
        if one.sheet is not None:
            save_png(place / f"{name}.png", one.sheet)
    load = 'pipe.load_lora_weights("this folder", weight_name="{0}.safetensors", adapter_name="{0}")'
    text = _CARD.format(
        concepts=", ".join(plain(one.concept) for one in loras),
        lines="\n".join(load.format(name) for name in names),
        names=", ".join(f'"{name}"' for name in names),
    )
    (place / "README.md").write_text(text, encoding="utf-8")


def file_names(concepts: Sequence[str]) -> list[str]:
    """A file's name for each concept: its letters and digits, `LONGEST` at most, and a number where it is taken."""
    names: list[str] = []
    for concept in concepts:
        letters = "".join(c if c.isalnum() else " " for c in concept.lower())
        name = "-".join(letters.split()).encode()[:LONGEST].decode(errors="ignore").rstrip("-") or "concept"
        numbered = (f"{name}-{i}" for i in count(len(names)))
        names.append(name if name not in names else next(n for n in numbered if n not in names))
    return names
