"""From a name, a folder or a diffusers pipeline to a `Text2Image`; what is unsafe or unknown is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open

from sfumato.errors import BadInput
from sfumato.hub import require_hub
from sfumato.settings import EMBEDDED

from .base import Text2Image
from .flux import Flux
from .image import ImageModel, load_image_model
from .pixart import PixArtSigma
from .saving import RECORD, quiet
from .sd import StableDiffusion
from .sd3 import StableDiffusion3
from .sdxl import StableDiffusionXL
from .video import VideoModel

_FAMILIES: dict[str, type[Text2Image]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "PixArtSigmaPipeline": PixArtSigma,
}
"""Families by the name of diffusers' pipeline class, which is imported when such a model is loaded."""
_CONTROLLED: dict[str, type[Text2Image]] = {
    "StableDiffusionControlNetPipeline": StableDiffusion,
    "StableDiffusionXLControlNetPipeline": StableDiffusionXL,
}
_PIXEL_MODELS = {kind.__name__: kind for kind in (ImageModel, VideoModel)}
_SUPPORTED = ", ".join(f"{family.title} ({name})" for name, family in _FAMILIES.items())
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_CONVERT = (
    "convert it in an isolated environment: load it there with diffusers (from_pretrained or "
    "from_single_file) and write it with save_pretrained(folder, safe_serialization=True)"
)
# What libraries raise on files that do not fit their classes.
_LOADING = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, SafetensorError)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load(
    model: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> Text2Image | ImageModel:
    """Load a text-to-image pipeline, or an `ImageModel` of this project; only safetensors weights are read.

    Args:
        model: "sketch" (the embedded model), a folder written by ``save_pretrained`` or by a training run, or a hub id
            "owner/name" (the only case that may use the network, and only if no folder of that name exists).
        device: default: the GPU if there is one, else the CPU.
        dtype: of the weights; default float32.

    Raises:
        BadInput: unknown name, not a diffusers folder, pickled or damaged weights, an unsupported family, or a device
            that is not there.
    """
    folder = _folder(str(model))
    source = str(model) if folder is None else str(folder)
    index = _index(source, folder)
    own = _PIXEL_MODELS.get(index.get("_class_name", "")) if folder is not None else None
    if own is not None:
        _check_files(folder, {"network": index.get("network")})
        return load_image_model(own, folder, index, _device(device))
    name = str(index.get("_class_name"))
    if name not in _FAMILIES:
        raise BadInput(f"{model} is a {name}, which is not supported; supported are {_SUPPORTED}")
    if folder is not None:
        _check_files(folder, index)
    device = _device(device)
    with quiet():
        try:
            pipe = getattr(diffusers, name).from_pretrained(
                source,
                torch_dtype=dtype or torch.float32,
                use_safetensors=True,
                local_files_only=folder is not None,
            )
        except _LOADING as error:
            reason = str(error).strip().split("\n")[0]
            raise BadInput(f"{model} could not be loaded as a {name}: {reason}") from error
    _check_complete(pipe, folder)
    if dtype == torch.float16 and pipe.vae.config.get("force_upcast"):
        pipe.vae.to(torch.float32)  # such autoencoders overflow in float16
    made = wrap(pipe.to(device), _defaults(read_record(model)))
    made.origin = origin_of(model)
    return made


def load_text2image(
    model: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> Text2Image:
    """`load`, for what needs a model that takes text.

    Raises:
        BadInput: as `load`; a model that takes none.
    """
    found = load(model, device, dtype)
    if not isinstance(found, Text2Image):
        raise BadInput(f"{model} draws pictures without text: here a text-to-image pipeline is needed")
    return found


def wrap(
    pipe: DiffusionPipeline | Text2Image, defaults: dict[str, Any] | None = None, controlled: bool = False
) -> Text2Image:
    """The adapter for a diffusers pipeline; a `Text2Image` is returned as it is. Freezes the weights.

    Args:
        controlled: take pipelines with a ControlNet too, for what acts on the pipeline's own call only: the adapter
            itself draws without the control.

    Raises:
        BadInput: the pipeline's family is not supported.
    """
    if isinstance(pipe, Text2Image):
        return pipe
    name = type(pipe).__name__
    adapter = (_FAMILIES | _CONTROLLED if controlled else _FAMILIES).get(name)
    if adapter is None:
        raise BadInput(f"{name} is not supported; supported are {_SUPPORTED}")
    if not adapter.plain(pipe):
        raise BadInput(
            f"this {name} is an inpainting, editing or guidance-distilled variant, which is not supported; "
            f"supported are plain {_SUPPORTED}"
        )
    return adapter(pipe, defaults)


def _device(device: str | torch.device | None) -> torch.device:
    """The device, if this machine and this torch have it."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    there += ["mps"] if torch.backends.mps.is_available() else []
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise BadInput(f"there is no device {str(device)!r} here: choose from {', '.join(there)}") from error
    return found


def _folder(model: str) -> Path | None:
    """The local folder that ``model`` names, or None for a hub id."""
    path = Path(model).expanduser()
    if model and path.is_dir():
        # The folder of a training run stands for the model in it.
        inside = [path / name for name in ("model", "pipeline") if (path / name / "model_index.json").is_file()]
        return inside[0] if inside and not (path / "model_index.json").is_file() else path
    if path.is_file():
        if path.suffix in _PICKLES:
            raise BadInput(f"{model} is a pickle, which can run code when it is read: {_CONVERT}")
        raise BadInput(f"{model} is a single file, not a diffusers folder: {_CONVERT}")
    if model in EMBEDDED:
        embedded = _embedded(model)
        if not embedded.is_dir():
            raise BadInput(
                f"the embedded model {model!r} is missing from this installation: install the full package"
            )
        return embedded
    if _HUB_ID.fullmatch(model) and not model.startswith("."):
        return None
    raise BadInput(
        f"there is no model {model!r}: give an embedded one ({', '.join(EMBEDDED)}), a folder written by "
        "save_pretrained, or a hub id like owner/name"
    )


def _embedded(model: str) -> Path:
    """Where an embedded model lies in the package."""
    return Path(__file__).parent.parent / "assets" / model


def _index(source: str, folder: Path | None) -> dict[str, Any]:
    """The pipeline's ``model_index.json``."""
    if folder is None:
        require_hub(source, "model_index.json")
        try:
            return DiffusionPipeline.load_config(source)
        except (OSError, ValueError) as error:
            raise BadInput(
                f"{source} is neither a folder here nor a diffusers pipeline that can be fetched from the hub"
            ) from error
    file = folder / "model_index.json"
    if not file.is_file():
        pickles = sorted(f.name for f in folder.iterdir() if f.suffix in _PICKLES)
        if pickles:
            raise BadInput(
                f"{folder} holds a pickle ({pickles[0]}), which can run code when it is read: {_CONVERT}"
            )
        raise BadInput(
            f"{folder} has no model_index.json: give a folder written by a pipeline's save_pretrained"
        )
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadInput(f"{file} is not valid JSON: fetch or write the folder again") from error
    if not isinstance(index, dict):
        raise BadInput(f"{file} does not describe a pipeline: fetch or write the folder again")
    return index


def _check_files(folder: Path, parts: Mapping[str, Any]) -> None:
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
    for part in sorted(f for f in folder.iterdir() if f.is_dir()):
        safe = sorted(part.glob("*.safetensors"))
        pickles = sorted(f for f in part.iterdir() if f.suffix in _PICKLES)
        if pickles and not safe:
            raise BadInput(f"{pickles[0]} is a pickle, which can run code when it is read: {_CONVERT}")
        for file in safe:
            try:
                with safe_open(file, "pt") as opened:
                    opened.keys()
            except (SafetensorError, OSError) as error:
                raise BadInput(
                    f"{file} is truncated or corrupt ({error}): fetch or write it again"
                ) from error


def _check_complete(pipe: DiffusionPipeline, folder: Path | None) -> None:
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
                    stored |= {key.removeprefix("text_model.") for key in opened.keys()}  # noqa: SIM118
            names = (name for name, _ in module.named_parameters())
            missing = [name for name in names if name.removeprefix("text_model.") not in stored]
        if missing:
            raise BadInput(f"the weight {missing[0]} of {part} is missing: fetch or write the model again")


def read_record(model: str | Path) -> dict[str, Any]:
    """What the folder of ``model`` says of its making (see `sfumato.pipeline.saving`); empty where nothing is said.

    Raises:
        BadInput: there is no such model.
    """
    folder = _folder(str(model))
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8")) if folder else {}
    except (OSError, ValueError):
        return {}  # a foreign file of that name says nothing to us
    return record if isinstance(record, dict) else {}


def origin_of(model: str | Path) -> str | None:
    """The embedded model that ``model`` is, or was made from by its record; None where there is none, or no model."""
    try:
        folder, record = _folder(str(model)), read_record(model)
    except BadInput:
        return None
    if str(model) in EMBEDDED and folder == _embedded(str(model)):
        return str(model)
    described, made = (record.get(k) if isinstance(record.get(k), dict) else {} for k in ("description", "provenance"))
    parent = made.get("parent") if isinstance(made.get("parent"), dict) else {}
    named = (described.get("origin"), parent.get("origin"), parent.get("model"))
    return next((name for name in named if name in EMBEDDED), None)


def _defaults(record: dict[str, Any]) -> dict[str, Any]:
    """Sampling defaults that a record states; empty for other folders."""
    kinds = {"cfg_scale": float, "sampling_steps": int, "size": int, "guidance": float}
    try:
        return {k: kinds[k](v) for k, v in record.get("defaults", {}).items() if k in kinds}
    except (ValueError, TypeError, AttributeError):
        return {}
