"""Whether a folder is sound: what its files are, before a library stumbles over them or makes up what is missing."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.feature_extraction_utils import FeatureExtractionMixin
from transformers.image_processing_base import ImageProcessingMixin

from sfumato.errors import BadInput
from sfumato.finite import require_finite
from sfumato.foreign import read_json, refuse_pointers, shortened

from .single.facts import PICKLE

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_BASES = (
    ModelMixin, SchedulerMixin, PreTrainedModel, PreTrainedTokenizerBase, ImageProcessingMixin, FeatureExtractionMixin,
)  # fmt: skip
"""What a pipeline's parts may be: not another pipeline, nor a class that looks for its code in the part's folder."""
_NAMED = re.compile(r"\.(\w+)(?=(?:-\d+-of-\d+)?\.safetensors$)")
"""A variant in the name of a file of weights: "model.fp16.safetensors"."""
_SHARD = re.compile(r"-\d+-of-\d+\.")


def check_classes(source: str, index: Mapping[str, Any]) -> None:
    """Refuse an index that names, as a part of the pipeline, what is not a part's class of diffusers or transformers.

    Else its loader would import what the index says, from the model's own folder too.
    """
    for name, kind in index.items():
        if not isinstance(kind, list) or kind == [None, None]:
            continue
        if not (len(kind) == 2 and all(isinstance(word, str) for word in kind)):
            raise BadInput(f"{name} in model_index.json of {source} names no library and class: write it again")
        if not _is_part(*kind):
            word = shortened(".".join(kind), 100)
            raise BadInput(
                f"model_index.json of {source} names {word!r} as its {name}, which is no model, scheduler, tokenizer "
                "or processor of diffusers or transformers: code of a model's own is never run"
            )


def _is_part(library: str, name: str) -> bool:
    if library in ("diffusers", "transformers"):
        home: Any = importlib.import_module(library)
    elif re.fullmatch(r"sfumato\.sample\.\w+", library) and importlib.util.find_spec(library):
        home = importlib.import_module(library)
    elif library.isidentifier() and not library.startswith("_"):  # such as the safety checker's "stable_diffusion"
        home = getattr(diffusers.pipelines, library, None)
    else:
        return False
    try:
        found = getattr(home, name, None)
    except (ImportError, RuntimeError):  # a class of theirs whose own requirements are not installed
        return False
    return isinstance(found, type) and issubclass(found, _BASES)


def variant_of(folder: Path, parts: Mapping[str, Any]) -> str | None:
    """The variant ("fp16") in which a part's weights are there, where they are not there without one."""
    for name, kind in parts.items():
        files = [f.name for f in (folder / name).glob("*.safetensors")] if isinstance(kind, list) else []
        kinds = {_NAMED.sub("", file) for file in files}
        found = {match[1] for file in files if (match := _NAMED.search(file))}
        if found and not kinds & set(files):
            return "fp16" if "fp16" in found else min(found)
    return None


def check_files(folder: Path, parts: Mapping[str, Any]) -> None:
    """Name what is missing, pickled, truncated or corrupt before a library stumbles over it, or makes it up.

    Raises:
        BadInput: one of ``parts`` (as a pipeline's index names them) is not there, or not its vocabulary; a folder
            has pickled weights only, or a safetensors file whose header and length disagree.
    """
    for name, kind in parts.items():
        if not isinstance(kind, list) or None in kind:
            continue
        words = [folder / name / file for file in ("tokenizer.json", "vocab.json", "spiece.model")]
        if not (folder / name).is_dir() or (name.startswith("tokenizer") and not any(w.is_file() for w in words)):
            raise BadInput(f"{folder} is incomplete, its {name} is missing: fetch or write the folder again")
    refuse_pointers(folder)
    for part in sorted(folder / name for name, kind in parts.items() if isinstance(kind, list) and None not in kind):
        _check_config(part / "config.json")
        safe = sorted(part.glob("*.safetensors"))
        pickles = sorted(f for f in part.iterdir() if f.suffix in PICKLES)
        if pickles and not safe:
            raise BadInput(f"{pickles[0]} is a pickle, which can run code when it is read: {PICKLE}")
        shards = [f for f in safe if _SHARD.search(f.name)]
        if shards and shards == safe and not any(part.glob("*.index*.json")):
            raise BadInput(f"{part} is incomplete, the index of its shards is missing: fetch or write the folder again")
        for file in safe:
            try:
                with safe_open(file, "pt") as opened:
                    opened.keys()
            except (SafetensorError, OSError, RuntimeError) as error:
                raise BadInput(
                    f"{file} cannot be read: it is truncated or corrupt ({error}): fetch or write it again"
                ) from error


def _check_config(file: Path) -> None:
    """Refuse a network's configuration that a library could only stumble over."""
    if not file.is_file():
        return
    config = read_json(file, {"quantization_config": dict | None})
    if quantised := config.get("quantization_config"):
        method = shortened(str(quantised.get("quant_method", "an unknown method")), 40)
        raise BadInput(f"{file.parent} holds weights quantised by {method}, which are not read: take the full weights")
    if "sample_size" in config and not isinstance(config["sample_size"], (int, list)):
        raise BadInput(f"sample_size in {file} is no number: fetch or write it again, or write the latents' side there")


def check_complete(pipe: DiffusionPipeline, folder: Path | None) -> None:
    """Refuse a pipeline some of whose weights were in no file: libraries only log that they made them up.

    diffusers leaves such weights without storage; transformers draws random ones, so its files are looked at.

    Raises:
        BadInput: names the first weight that is missing.
    """
    for part, module in pipe.components.items():
        if not isinstance(module, torch.nn.Module):
            continue
        missing = [name for name, x in module.named_parameters() if x.is_meta]
        if folder is not None and not missing and part.startswith("text_encoder"):
            stored: set[str] = set()
            for file in (folder / part).glob("*.safetensors"):
                with safe_open(file, "pt") as opened:
                    stored |= {_inner(key) for key in opened.keys()}  # noqa: SIM118
            missing = [name for name, _ in module.named_parameters() if _inner(name) not in stored]
        if missing:
            raise BadInput(f"the weight {missing[0]} of {part} is missing: fetch or write the model again")


def _inner(name: str) -> str:
    """A weight's name without that of the model around, which differs from one version of transformers to another."""
    return re.sub(r"^(?:(?:text_model|language_model|model)\.)+", "", name)


def plain_files(part: Path, variant: str | None = None) -> list[Path]:
    """The files of weights in a part's folder that its library reads.

    Args:
        variant: in which the pipeline is loaded; a part that is not there in it is read without one.
    """
    kinds = {f: match[1] if (match := _NAMED.search(f.name)) else None for f in sorted(part.glob("*.safetensors"))}
    wanted = variant if variant in kinds.values() else None
    files = [f for f, kind in kinds.items() if kind == wanted]
    shards = [f for f in files if _SHARD.search(f.name)]
    whole = [f for f in files if f not in shards]
    indices = [f for f in part.glob("*.index*.json") if (wanted or "safetensors") in f.name.split(".")]
    indices = indices if wanted else [f for f in indices if len(f.name.split(".")) == 4]
    if not shards or not indices:
        return files
    # where both are there diffusers follows the index, and transformers does not
    if whole and not whole[0].name.startswith("diffusion_pytorch_model"):
        return whole
    named = set(read_json(indices[0], {"weight_map": dict})["weight_map"].values())
    return [f for f in shards if f.name in named]


def check_finite(parts: Mapping[str, Any], source: str) -> None:
    """Refuse a model some of whose weights are NaN or infinite.

    Raises:
        NotFinite: names the first.
    """
    for part, module in parts.items():
        if isinstance(module, torch.nn.Module):
            require_finite(module.state_dict().items(), f"the {part} in {source}")
