"""From a name, a folder or a diffusers pipeline to a `Text2Image`; what is unsafe or unknown is refused."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from sfumato.errors import BadInput
from sfumato.foreign import read_json, reading, refuse_pointers, shaped
from sfumato.hub import require_hub
from sfumato.settings import EMBEDDED

from . import marking
from .base import Text2Image
from .codec import overflows, widen
from .compression import CompressionModel
from .flux import Flux
from .flux2 import Flux2Klein
from .graphs import GraphModel
from .image import ImageModel
from .image_files import load_image_model
from .latent import LatentModel
from .offload import Offload, accelerator
from .omnigen import OmniGen
from .pixart import PixArtSigma
from .prototypes import PrototypeModel
from .qwen import QwenImage
from .sana import Sana
from .saving import RECORD, quiet
from .sd import StableDiffusion
from .sd3 import StableDiffusion3
from .sdxl import StableDiffusionXL
from .single import read as single
from .single.facts import PICKLE
from .sound import PICKLES, check_classes, check_complete, check_files, check_finite, variant_of
from .token_model import TokenModel
from .variations import VariationModel
from .video import VideoModel
from .views import ViewModel
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
    "OmniGenPipeline": OmniGen,
}
"""Families by the name of diffusers' pipeline class, which is imported when such a model is loaded."""
_CONTROLLED = {family.control_class: family for family in _FAMILIES.values() if family.control_class}
_PIXEL_MODELS = {kind.__name__: kind for kind in (
    CompressionModel, GraphModel, ImageModel, LatentModel, PrototypeModel, TokenModel, VariationModel, VideoModel,
    ViewModel,
)}  # fmt: skip
_SUPPORTED = ", ".join(f"{family.title} ({name})" for name, family in _FAMILIES.items())
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load(
    model: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    prediction: single.Said | None = None,
    offload: Offload | None = None,
) -> Text2Image | ImageModel:
    """Load a text-to-image pipeline, or an `ImageModel` of this project; only safetensors weights are read.

    Args:
        model: "sketch" (the embedded model) or "sketch-dit" (the embedded transformer), a folder written by
            ``save_pretrained`` or by a training run, a file of SD 1.x, 2.x or SDXL in the original layout, or a hub id
            "owner/name" (the only case that may use the network, and only if no folder of that name exists).
        device: default: the GPU if there is one, else the CPU.
        dtype: of the weights; default float32.
        prediction: what the network in a single file predicts, where the file does not say it; folders say it.
        offload: "model" or "sequential" keeps the weights in the machine's own memory, and brings one part or one layer
            at a time to the device, which must be an accelerator; see `Text2Image.offload`.

    Raises:
        BadInput: unknown name, not a diffusers folder, pickled or damaged weights, an unsupported family, a device that
            is not there, or a folder that predicts something else; of a single file, see `sfumato.pipeline.single`.
    """
    if offload is not None:
        device = accelerator(None if device is None else _device(device))
        made = load(model, "cpu", dtype, prediction)
        if not isinstance(made, Text2Image):
            raise BadInput(f"{model} is one network, of which no part can be offloaded: leave offload out")
        return made.offload(offload, device)
    if (file := single_file(model)) is not None:
        return _adapted(single.read(file, dtype, prediction), model, _device(device), dtype)
    folder = _folder(str(model))
    source = str(model) if folder is None else str(folder)
    index = _index(source, folder)
    own = _PIXEL_MODELS.get(index.get("_class_name", "")) if folder is not None else None
    if own is not None:
        shaped(index, {"network": list, "process": dict, "prediction": str, "shape": list}, folder / "model_index.json")
        check_files(folder, {name: index.get(name) for name in ("network", *own.further)})
        made_here = load_image_model(own, folder, index, _device(device))
        check_finite(made_here.parts(), source)
        return made_here
    name = str(index["_class_name"])
    if name not in _FAMILIES:
        raise BadInput(f"{model} is a {name}, {_unsupported(name)}")
    check_classes(source, index)
    if folder is not None:
        check_files(folder, index)
    device = _device(device)
    lacks = absent(source, index)
    with quiet(), reading(source, f"a {name}"):
        pipe = _FAMILIES[name].pipelines(name).from_pretrained(
            source,
            torch_dtype=dtype or torch.float32,
            use_safetensors=True,
            local_files_only=folder is not None,
            trust_remote_code=False,
            variant=None if folder is None else variant_of(folder, index),
            **{part: None for part in lacks if part in _FAMILIES[name].may_lack},
        )
    check_complete(pipe, folder)
    made = _adapted(pipe, model, device, dtype)
    if prediction not in (None, made.prediction):
        raise BadInput(f"{model} says itself that it predicts {made.prediction}: leave prediction out")
    return made


def inspected(model: str | Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a text-to-image model and its index, found sound as `load` wants it, without reading weights.

    Raises:
        BadInput: as `load`; it is no folder.
    """
    folder = None if single_file(model) else _folder(str(model))
    if folder is None:
        raise BadInput(f"{model} is no folder of a model: give a folder written by save_pretrained")
    index = _index(str(folder), folder)
    if index["_class_name"] not in _FAMILIES:
        raise BadInput(f"{model} is a {index['_class_name']}, which is not supported; supported are {_SUPPORTED}")
    check_classes(str(folder), index)
    check_files(folder, index)
    return folder, index


def absent(source: str | Path, index: Mapping[str, Any]) -> list[str]:
    """The parts of a pipeline that its index does not name, or names as null, and that it can do without.

    Raises:
        BadInput: names one that it cannot do without.
    """
    family = _FAMILIES[str(index["_class_name"])]
    kind = family.pipelines(str(index["_class_name"]))
    wanted = inspect.signature(kind.__init__).parameters.values()
    named = [x.name for x in wanted if x.default is x.empty and x.kind is x.POSITIONAL_OR_KEYWORD and x.name != "self"]
    if null := [part for part in named if part in index and index[part] is None]:
        raise BadInput(f"{null[0]} in model_index.json of {source} is null: write [null, null] there, or leave it out")
    lacks = [part for part in named if index.get(part, [None, None]) == [None, None]]
    if missing := [part for part in lacks if part not in (*kind._optional_components, *family.may_lack)]:
        raise BadInput(
            f"{source} is incomplete, its model_index.json names no {missing[0]}: fetch or write the folder again"
        )
    return lacks


def _adapted(pipe: Any, model: str | Path, device: torch.device, dtype: torch.dtype | None) -> Text2Image:
    """The adapter for a pipeline just loaded."""
    if dtype == torch.float16 and overflows(pipe.vae):
        widen(pipe.vae)
    pipe = pipe.to(device)
    check_finite(pipe.components, str(model))
    with reading(model, f"a {type(pipe).__name__}"):
        made = wrap(pipe, _defaults(read_record(model)))
    made.origin = origin_of(model)
    return made


def load_text2image(
    model: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    prediction: single.Said | None = None,
    offload: Offload | None = None,
) -> Text2Image:
    """`load`, for what needs a model that takes text.

    Raises:
        BadInput: as `load`; a model that takes none.
    """
    found = load(model, device, dtype, prediction, offload)
    if not isinstance(found, Text2Image):
        raise BadInput(f"{model} draws pictures without text: here a text-to-image pipeline is needed")
    return found


def wrap(
    pipe: DiffusionPipeline | Text2Image, defaults: dict[str, Any] | None = None, controlled: bool = False
) -> Text2Image:
    """The adapter for a diffusers pipeline; a `Text2Image` is returned as it is. Freezes the weights.

    An autoencoder that overflows in float16 is asked in float32, and stays as it is.

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
    return adapter(pipe, {**(defaults or {}), **marking.of(pipe)})


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


def precision(name: str | None) -> torch.dtype | None:
    """The type of weights of that name in settings and records; None as it is, which means float32."""
    if name not in (None, "float32", "float16", "bfloat16"):
        raise BadInput(f"dtype must be float32, float16 or bfloat16, got {name!r}")
    return None if name is None else getattr(torch, name)


def single_file(model: str | Path) -> Path | None:
    """The file that ``model`` names, if it is one."""
    path = Path(model).expanduser()
    return path if str(model) and path.is_file() else None


def require_named(model: str) -> None:
    """Refuse a word that names no model, without loading any; of hub ids only the form is looked at.

    Raises:
        BadInput: says what would do.
    """
    if single_file(model) is None:
        _folder(model)


def _folder(model: str) -> Path | None:
    """The local folder that ``model`` names, or None for a hub id."""
    path = Path(model).expanduser()
    if model and path.is_dir():
        # The folder of a training run stands for the model in it.
        inside = [path / name for name in ("model", "pipeline") if (path / name / "model_index.json").is_file()]
        return inside[0] if inside and not (path / "model_index.json").is_file() else path
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
        "save_pretrained, a .safetensors file, or a hub id like owner/name"
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
        pickles = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
        if pickles:
            raise BadInput(
                f"{folder} holds a pickle ({pickles[0]}), which can run code when it is read: {PICKLE}"
            )
        raise BadInput(
            f"{folder} has no model_index.json: give a folder written by a pipeline's save_pretrained"
        )
    return read_json(file, {"_class_name": str}, "fetch or write the folder again")


def read_record(model: str | Path) -> dict[str, Any]:
    """What the folder of ``model`` says of its making (see `sfumato.pipeline.saving`); empty where nothing is said.

    Raises:
        BadInput: there is no such model.
    """
    if (file := single_file(model)) is not None:
        return single.record_of(file)
    folder = _folder(str(model))
    try:
        return read_json(folder / RECORD) if folder else {}
    except BadInput:
        return {}  # a foreign file of that name says nothing to us


def origin_of(model: str | Path) -> str | None:
    """The embedded model that ``model`` is, or was made from by its record; None where there is none, or no model."""
    try:
        record = read_record(model)
        folder = None if single_file(model) else _folder(str(model))
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
    kinds: dict[str, Callable[[Any], Any]] = {"cfg_scale": float, "sampling_steps": int, "size": int}
    kinds |= {"guidance": float, "image_cfg_scale": float, "bidirectional": bool, "negative": str, "stages": _stages}
    told = record.get("defaults", {})
    # Whatever else is wrong with a record, pictures that it wants marked are marked.
    wanted = told["marked"] if isinstance(told, dict) and "marked" in told else None
    marked = {} if wanted is None else {"marked": dict(wanted) if isinstance(wanted, dict) else {}}
    try:
        return {k: kinds[k](v) for k, v in told.items() if k in kinds} | marked
    except (ValueError, TypeError, AttributeError, ArithmeticError):
        return marked


def _stages(told: Any) -> dict[str, list[str]]:
    """Words with what they stand for in each stage of time; ValueError for anything else."""
    if not all(isinstance(of, list) and of and all(isinstance(x, str) for x in of) for of in told.values()):
        raise ValueError("no stages")
    return {str(word): list(of) for word, of in told.items()}
