"""A pipeline as one file of the original layout, which web UIs, diffusers' ``from_single_file`` and `read` read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.errors import BadInput
from sfumato.files import atomic_file

from ..offload import refuse
from ..organs import Organs
from ..saving import describe, write_bpe
from ..tokens import without_learned
from .facts import KNOWN
from .names import LAYOUTS, SD1, SD2, SDXL, Layout
from .read import CONFIGS, RECORD, SCHEDULERS, WORDS, read_tokenizer, slots_of

_ARCHITECTURES = {
    SD1.title: "stable-diffusion-v1",
    SD2.title: "stable-diffusion-v2",
    SDXL.title: "stable-diffusion-xl-v1-base",
}


def write(
    p: Organs, path: str | Path, overwrite: bool = False, provenance: Mapping[str, Any] | None = None
) -> list[str]:
    """Write the whole model to one safetensors file, in the precision that its weights have.

    Attached adapters are merged. The header says what shapes do not: the configurations, the words of a tokenizer that
    is not CLIP's, what is predicted (by the keys of ModelSpec too), and the record of the making. So `sfumato.load`
    gives the same model back, of whatever size; other tools take what is usual for the layout.

    Args:
        provenance: as in `Text2Image.save`.

    Returns:
        What the pipeline has and the file cannot hold, in words.

    Raises:
        BadInput: a family without such a layout, or a network that differs from its own; a patch is active; the file
            exists; the disk is full. Nothing is left behind.
    """
    if p.patches:
        raise BadInput("a patch acts on this pipeline and cannot be written with it: leave its block first")
    refuse(p.pipe, "written")
    with without_learned(p):
        merged = p.merged() if p.adapters else p
        layout = layout_for(merged)
        tensors = original_tensors(merged, layout)
        header, left = _header(merged, layout, provenance or {})
        with atomic_file(path, overwrite) as temporary:
            save_file(tensors, temporary, metadata=header)
    return left


def layout_for(p: Organs) -> Layout:
    """The layout in which a pipeline can be written.

    Raises:
        BadInput: there is none, or none that can say what it predicts.
    """
    here = [
        layout
        for layout in LAYOUTS
        if layout.pipeline == type(p.pipe).__name__ and layout.prefixes.keys() <= p.parts().keys()
    ]
    if not here:
        raise BadInput(f"a {p.title} has no single file of an original layout here, as {KNOWN} have: write a folder")
    if p.prediction == "flow":  # none of these layouts can say that: they would be read as one of eps
        raise BadInput(f"this {p.title} predicts a flow, which a single file of its layout cannot say: write a folder")
    if len(here) > 1:  # the text encoder tells 1.x and 2.x apart
        return SD2 if p.pipe.text_encoder.config.hidden_act == "gelu" else SD1
    return here[0]


def original_tensors(p: Organs, layout: Layout) -> dict[str, Tensor]:
    """All weights of a pipeline by the keys of a layout, on the CPU.

    Raises:
        BadInput: a weight for which the layout has no name.
    """
    tensors: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for part in layout.prefixes:
        module: nn.Module = p.parts()[part]
        try:
            slots = slots_of(layout, part, module)
        except (KeyError, ValueError, AttributeError) as error:
            raise BadInput(f"the {part} of this pipeline is not as {layout.title} has it: write a folder") from error
        for name, x in module.named_parameters():
            slot, x = slots[name], x.detach().cpu()
            if slot.form == "third":
                thirds.setdefault(slot.key, {})[slot.third] = x
            elif slot.key in tensors:
                raise BadInput(f"{name} of the {part} has no place of its own in {layout.title}: write a folder")
            else:
                tensors[slot.key] = slot.put(x).contiguous()
    return tensors | {key: torch.cat([rows[i] for i in range(3)]) for key, rows in thirds.items()}


def _header(p: Organs, layout: Layout, provenance: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    left = [name for name, part in p.parts().items() if name not in layout.prefixes]
    configs = {part: _config(p.parts()[part].config) for part in layout.prefixes}
    configs |= {name: _words(getattr(p.pipe, name)) for name, _ in p.text_parts()}
    scheduler = _config(p.pipe.scheduler.config)
    scheduler["_class_name"] = type(p.pipe.scheduler).__name__
    if scheduler["_class_name"] not in SCHEDULERS:
        left.append(f"the scheduler {scheduler['_class_name']} (DDIM in its place)")
        scheduler["_class_name"] = "DDIMScheduler"
    record = {"defaults": p.defaults, "description": describe(p, weights=True), "provenance": dict(provenance)}
    said = {"eps": "epsilon", "v": "v"}.get(p.prediction, p.prediction)
    header = {
        "format": "pt",
        CONFIGS: json.dumps({**configs, "scheduler": scheduler}),
        RECORD: json.dumps(record, default=str),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": _ARCHITECTURES[layout.title],
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.prediction_type": said,
        "modelspec.title": str(provenance.get("title", layout.title)),
    }
    return header, left


def _config(config: Any) -> dict[str, Any]:
    """A configuration in JSON's types, without where it was read from."""
    told = config.to_diff_dict() if hasattr(config, "to_diff_dict") else dict(config)
    return {k: v for k, v in json.loads(json.dumps(told, default=str)).items() if not k.startswith("_")}


def _words(tokenizer: Any) -> dict[str, Any]:
    """What tells a tokenizer: its padding and length; its words too, where they are not CLIP's."""
    if not type(tokenizer).__name__.startswith("CLIPTokenizer"):
        raise BadInput(f"a {type(tokenizer).__name__} is no tokenizer of CLIP: write a folder")
    told = {"pad_token": tokenizer.pad_token, "model_max_length": tokenizer.model_max_length}
    if len(tokenizer) == WORDS and tokenizer.get_vocab() == read_tokenizer("!").get_vocab():
        return told
    with TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        write_bpe(folder, tokenizer)
        merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
        told |= {"vocab": json.loads((folder / "vocab.json").read_text(encoding="utf-8")), "merges": merges}
    # Words that were learned stand beside that vocabulary.
    ids = {word: i for word, i in tokenizer.get_added_vocab().items() if word not in told["vocab"]}
    return {**told, "added": sorted(ids, key=ids.__getitem__)} if ids else told
