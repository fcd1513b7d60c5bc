"""From a name, a folder or a diffusers pipeline to a `Text2Image`; what is unsafe or unknown is refused."""

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
from sfumato.foreign import read_json, reading, refuse_pointers, shaped, shortened
from sfumato.hub import require_hub
from sfumato.settings import EMBEDDED

from .base import Text2Image
from .flux import Flux
from .flux2 import Flux2Klein
from .image import ImageModel, load_image_model
from .pixart import PixArtSigma
from .qwen import QwenImage
from .sana import Sana
from .saving import RECORD, quiet
from .sd import StableDiffusion
from .sd3 import StableDiffusion3
from .sdxl import StableDiffusionXL
from .video import VideoModel
from .zimage import ZImage

_FAMILIES: dict[str, type[Text2Image]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "Flux2KleinPipeline": Flux2Klein,
    "PixArtSigmaPipeline": PixArtSigma,
    "SanaPipeline": Sana,
    "QwenImagePipeline": QwenImage,
    "ZImagePipeline": ZImage,
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
_BASES = (
    ModelMixin, SchedulerMixin, PreTrainedModel, PreTrainedTokenizerBase, ImageProcessingMixin, FeatureExtractionMixin,
)  # fmt: skip
"""What a pipeline's parts may be: not another pipeline, nor a class that looks for its code in the part's folder."""
_NAMED = re.compile(r"\.(\w+)(?=(?:-\d+-of-\d+)?\.safetensors$)")
"""A variant in the name of a file of weights: "model.fp16.safetensors"."""
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
        shaped(index, {"network": list, "process": dict, "prediction": str, "shape": list}, folder / "model_index.json")
        _check_files(folder, {"network": index["network"]})
        return load_image_model(own, folder, index, _device(device))
    name = str(index["_class_name"])
    if name not in _FAMILIES:
        raise BadInput(f"{model} is a {name}, {_unsupported(name)}")
    _check_classes(source, index)
    if folder is not None:
        _check_files(folder, index)
    device = _device(device)
    with quiet(), reading(source, f"a {name}"):
        pipe = getattr(diffusers, name).from_pretrained(
            source,
            torch_dtype=dtype or torch.float32,
            use_safetensors=True,
            local_files_only=folder is not None,
            trust_remote_code=False,
            variant=None if folder is None else _variant(folder, index),
        )
    _check_complete(pipe, folder)
    if dtype == torch.float16 and pipe.vae.config.get("force_upcast"):
        pipe.vae.to(torch.float32)  # such autoencoders overflow in float16
    pipe = pipe.to(device)
    with reading(source, f"a {name}"):
        made = wrap(pipe, _defaults(read_record(model)))
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
        raise BadInput(f"this is a {name}, {_unsupported(name)}")
    if not adapter.plain(pipe):
        raise BadInput(
            f"this {name} is an inpainting, editing or guidance-distilled variant, which is not supported; "
            f"supported are plain {_SUPPORTED}"
        )
    return adapter(pipe, defaults)


def _unsupported(name: str) -> str:
    """What to say of a pipeline's class that is none of the families': which is its plain one, or which there are."""
    stems = {re.sub("Pipeline$", "", known): known for known in _FAMILIES}
    kin = [stem for stem in stems if re.match(rf"{stem}[A-Z]", name)]
    if kin and name not in stems.values():
        known = stems[max(kin, key=len)]
        what = "for inpainting, editing, refining, further inputs or fewer steps, which is not supported"
        return f"a variant of {_FAMILIES[known].title} {what}: take a plain {known}"
    return f"which is not supported; supported are {_SUPPORTED}"


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
            return shaped(DiffusionPipeline.load_config(source), {"_class_name": str}, f"model_index.json of {source}")
        except BadInput:
            raise
        except (OSError, ValueError) as error:
            raise BadInput(
                f"{source} is neither a folder here nor a diffusers pipeline that can be fetched from the hub"
            ) from error
    file = folder / "model_index.json"
    refuse_pointers(file)
    if not file.is_file():
        pickles = sorted(f.name for f in folder.iterdir() if f.suffix in _PICKLES)
        if pickles:
            raise BadInput(
                f"{folder} holds a pickle ({pickles[0]}), which can run code when it is read: {_CONVERT}"
            )
        raise BadInput(
            f"{folder} has no model_index.json: give a folder written by a pipeline's save_pretrained"
        )
    return read_json(file, {"_class_name": str}, "fetch or write the folder again")


def _check_classes(source: str, index: Mapping[str, Any]) -> None:
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


def _variant(folder: Path, parts: Mapping[str, Any]) -> str | None:
    """The variant ("fp16") in which a part's weights are there, where they are not there without one."""
    for name, kind in parts.items():
        files = [f.name for f in (folder / name).glob("*.safetensors")] if isinstance(kind, list) else []
        kinds = {_NAMED.sub("", file) for file in files}
        found = {match[1] for file in files if (match := _NAMED.search(file))}
        if found and not kinds & set(files):
            return "fp16" if "fp16" in found else min(found)
    return None


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
    refuse_pointers(folder)
    for part in sorted(folder / name for name, kind in parts.items() if isinstance(kind, list) and None not in kind):
        _check_config(part / "config.json")
        safe = sorted(part.glob("*.safetensors"))
        pickles = sorted(f for f in part.iterdir() if f.suffix in _PICKLES)
        if pickles and not safe:
            raise BadInput(f"{pickles[0]} is a pickle, which can run code when it is read: {_CONVERT}")
        for file in safe:
            try:
                with safe_open(file, "pt") as opened:
                    opened.keys()
            except (SafetensorError, OSError, RuntimeError) as error:
                raise BadInput(
                    f"{file} is truncated or corrupt ({error}): fetch or write it again"
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
                    stored |= {_inner(key) for key in opened.keys()}  # noqa: SIM118
            missing = [name for name, _ in module.named_parameters() if _inner(name) not in stored]
        if missing:
            raise BadInput(f"the weight {missing[0]} of {part} is missing: fetch or write the model again")


def _inner(name: str) -> str:
    """A weight's name without that of the model around, which differs from one version of transformers to another."""
    return re.sub(r"^(?:(?:text_model|language_model|model)\.)+", "", name)


def read_record(model: str | Path) -> dict[str, Any]:
    """What the folder of ``model`` says of its making (see `sfumato.pipeline.saving`); empty where nothing is said.

    Raises:
        BadInput: there is no such model.
    """
    folder = _folder(str(model))
    try:
        return read_json(folder / RECORD) if folder else {}
    except BadInput:
        return {}  # a foreign file of that name says nothing to us


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
    except (ValueError, TypeError, AttributeError, ArithmeticError):
        return {}
