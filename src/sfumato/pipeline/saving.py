"""What a pipeline is, in words and hashes, and writing it so that other tools load it."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel
from transformers.utils import logging as transformers_logging

from sfumato.errors import BadInput
from sfumato.files import atomic_folder, tensors_sha256, write_json
from sfumato.text import plain

from .offload import refuse, stored
from .organs import Organs
from .tokens import without_learned

RECORD = "sfumato.json"

_CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
tags: [sfumato]
---
# {title}

{loads}:

```python
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({call})
```

## What it is
```json
{description}
```

## How it was made
```json
{provenance}
```
"""


_LOADS = "Loads with diffusers alone"
_BETAS = ("beta_schedule", "beta_start", "beta_end", "rescale_betas_zero_snr")
_FLOW = ("shift", "flow_shift", "use_dynamic_shifting", "base_shift", "max_shift", "shift_terminal")


def save(p: Organs, folder: str | Path, overwrite: bool, provenance: dict[str, Any]) -> Path:
    """Write the pipeline as a diffusers folder in safetensors, with a model card and a record of its making.

    The folder is whole or absent: it is written beside its place and renamed. Attached adapters are merged into the
    weights (see `Text2Image.merged`); attention edits and learned words are not part of it. What the pipeline's
    ``companions`` write comes beside it.

    Args:
        folder: where to; must not exist unless ``overwrite``.
        provenance: what the record should say (method, configuration, seed, parent's hash, ...), JSON values.

    Raises:
        BadInput: the folder exists, the disk is full, or a patch is active; nothing is left behind.
    """
    if p.patches:
        names = " and ".join(type(patch).__name__ for patch in p.patches)
        raise BadInput(f"{names} acts on this pipeline and cannot be saved with it: leave its block first")
    refuse(p.pipe, "saved")
    with without_learned(p):
        return _save(p, Path(folder), overwrite, provenance)


def _save(p: Organs, folder: Path, overwrite: bool, provenance: dict[str, Any]) -> Path:
    companions = p.companions
    p = p.merged() if p.adapters else p
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        description = describe(p, weights=True)
        with quiet():
            p.pipe.save_pretrained(temporary, safe_serialization=True)
        for tokenizer, encoder in p.text_parts():
            write_bpe(temporary / tokenizer, getattr(p.pipe, tokenizer))
            prefix_clip_keys(temporary / encoder, getattr(p.pipe, encoder))
        for write in companions:
            write(temporary)
        write_card(temporary, p, description, provenance, folder.name)
    return folder


def write_card(
    folder: Path,
    p: Organs,
    description: dict[str, Any],
    provenance: dict[str, Any],
    name: str,
    variant: str | None = None,
) -> None:
    """The record of a pipeline's making and its model card, beside its weights, which are of a ``variant``."""
    versions = {m.__name__: m.__version__ for m in (torch, diffusers, transformers)}
    record = {"description": description, "provenance": provenance, "versions": versions}
    write_json(folder / RECORD, {"defaults": p.defaults, **record})
    title = plain(str(provenance.get("title") or name))
    own = type(p.pipe.scheduler).__module__.startswith("sfumato.")
    loads = "Loads with diffusers where sfumato, which has its scheduler, is installed" if own else _LOADS
    lacks = [f"{part}=None" for part in p.may_lack if getattr(p.pipe, part) is None]
    call = ", ".join(['"this folder"', *([f'variant="{variant}"'] if variant else []), *lacks])
    told = {"description": _json(description), "provenance": _json(provenance)}
    text = _CARD.format(title=title, loads=loads, call=call, **told)
    (folder / "README.md").write_text(text, encoding="utf-8")


def describe(p: Organs, weights: bool) -> dict[str, Any]:
    """See `Text2Image.describe`."""
    described = {
        "family": p.family,
        "pipeline": type(p.pipe).__name__,
        "prediction": p.denoiser.prediction,
        "schedule": {**schedule_of(p.pipe.scheduler), "timesteps": p.clock.timesteps},
        "size": p.size,
        "latent": list(p.latent_shape()),
        "context_length": p.context_length,
        "dtype": str(p.dtype).removeprefix("torch."),
        "parameters": {k: sum(x.numel() for x in m.parameters()) for k, m in p.parts().items()},
    }
    if p.origin:
        described["origin"] = p.origin
    if p.adapters:
        described["adapters"] = {name: a.describe() for name, a in p.adapters.items()}
    if not weights:
        return described
    with without_learned(p):
        return {**described, "sha256": weights_sha256(p.parts())}


def schedule_of(scheduler: Any) -> dict[str, Any]:
    """What a scheduler's configuration says of the noise: a table of betas, or a flow and how it is shifted."""
    config = scheduler.config
    flow = "beta_schedule" not in config or config.get("use_flow_sigmas", False)
    return {k: config[k] for k in _FLOW if k in config} if flow else {k: config.get(k) for k in _BETAS}


def weights_sha256(parts: dict[str, nn.Module]) -> str:
    """`sfumato.files.tensors_sha256` over every parameter of a pipeline's parts."""
    # transformers 5 dropped the prefix "text_model." from the text encoder's names; the hash must not notice.
    named = {
        f"{part}.{name.removeprefix('text_model.')}": x
        for part, m in parts.items()
        for name, x in stored(m)
    }
    return tensors_sha256(named)


@contextmanager
def quiet() -> Iterator[None]:
    """No file-by-file bars, news of renamed arguments or advice from diffusers and transformers inside the block."""
    levels = [(lib, lib.get_verbosity()) for lib in (diffusers_logging, transformers_logging)]
    for lib, level in levels:
        lib.set_verbosity(max(level, logging.ERROR))
    shown = [lib for lib in (diffusers_logging, transformers_logging) if lib.is_progress_bar_enabled()]
    for lib in shown:
        lib.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # diffusers 0.42 renames torch_dtype, which 0.39 needs
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for lib in shown:
            lib.enable_progress_bar()
        for lib, level in levels:
            lib.set_verbosity(level)


def prefix_clip_keys(folder: Path, encoder: nn.Module) -> None:
    """Name a CLIP text encoder's tensors as every released checkpoint does: with the prefix "text_model.".

    transformers 5 writes ``CLIPTextModel`` without the prefix; older ones would find none of the weights and
    silently start from random ones. Both read the prefixed names. Other encoders (T5, Gemma, ...) are left as they
    are written: with that prefix they would be the ones that load empty.
    """
    if not isinstance(encoder, CLIPTextModel):
        return
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            keys, metadata = list(opened.keys()), opened.metadata()
        if any(k.startswith("text_model.") for k in keys):
            continue
        tensors: dict[str, Tensor] = {f"text_model.{k}": x for k, x in load_file(file).items()}
        save_file(tensors, file, metadata=metadata or {"format": "pt"})


def write_bpe(folder: Path, tokenizer) -> None:
    """Write ``vocab.json`` and ``merges.txt``, which transformers before 5 needs and 5 no longer writes."""
    wanted = "vocab.json" in tokenizer.vocab_files_names.values()  # CLIP's; T5's is one file of another kind
    if not wanted or (folder / "vocab.json").exists() or not (folder / "tokenizer.json").exists():
        return
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    pairs = (m if isinstance(m, str) else " ".join(m) for m in model["merges"])
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{m}\n" for m in pairs), encoding="utf-8")


def _json(value: dict[str, Any]) -> str:
    # Text from users must not be able to close the fence that it stands in.
    return json.dumps(value, indent=2, default=str).replace("```", "` ` `")
