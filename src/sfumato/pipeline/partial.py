"""A diffusers folder opened without loading it: only the weights that are asked for are read, and written back.

The networks stand there without weights (on torch's meta device), in the precision that their files have. Text encoders
run all the same: each of their layers reads its weights when it is called and lets go of them afterwards. An edit is
written into copies of the files that it concerns; all others are linked.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from sfumato.errors import BadInput
from sfumato.files import atomic_folder
from sfumato.foreign import reading

from .anatomy import Projection
from .base import Text2Image
from .codec import overflows
from .load import absent, inspected, read_record, wrap
from .saving import describe, quiet, write_card
from .sound import PICKLES, plain_files, variant_of

_KINDS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass
class Store:
    """The weights of one part in its files, sharded or not.

    Attributes:
        files: the file of each tensor.
        kinds: the precision of each.
        read_bytes: of all tensors read so far.
        largest: of the largest of them.
    """

    files: dict[str, Path]
    kinds: dict[str, torch.dtype]
    read_bytes: int = 0
    largest: int = 0

    @classmethod
    def of(cls, folder: Path, variant: str | None = None) -> Store:
        """By the headers of the files in a part's folder; ``variant`` as in `plain_files`.

        Raises:
            BadInput: a file that cannot be read, or weights in a precision that is not known.
        """
        files: dict[str, Path] = {}
        kinds: dict[str, torch.dtype] = {}
        for file in plain_files(folder, variant):
            with reading(file), safe_open(file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    kind = str(opened.get_slice(key).get_dtype())
                    if kind not in _KINDS:
                        raise BadInput(f"{key} in {file} is in {kind}, which is not read: take the full weights")
                    files[key], kinds[key] = file, _KINDS[kind]
        return cls(files, kinds)

    def key(self, names: Iterable[str]) -> str:
        """What the files call a weight that the network knows by these names (several where it is tied).

        Raises:
            BadInput: it is in no file.
        """
        names = list(names)
        for name in names:
            for key in (name, f"text_model.{name}", name.removeprefix("text_model.")):
                if key in self.files:
                    return key
        raise BadInput(f"the weight {names[0]} is missing: fetch or write the model again")

    def read(self, key: str) -> Tensor:
        with reading(self.files[key]), safe_open(self.files[key], "pt") as opened:
            x = opened.get_tensor(key)
        size = x.numel() * x.element_size()
        self.read_bytes, self.largest = self.read_bytes + size, max(self.largest, size)
        return x


@dataclass
class Partial:
    """A pipeline of which only some weights are there.

    Attributes:
        folder: where it lies.
        variant: in which its weights are read.
        pipe: the pipeline. Its text can be encoded, and the weights of the projections that it is asked for are there.
            It cannot draw.
        stores: of its networks, by part.
        held: bytes of weights that stay in memory.
    """

    folder: Path
    variant: str | None
    pipe: Text2Image
    stores: dict[str, Store]
    held: int = 0
    hooks: list[Any] = field(default_factory=list)

    @property
    def read_bytes(self) -> int:
        """Of all tensors read so far, each time they were."""
        return sum(store.read_bytes for store in self.stores.values())

    def largest_streamed(self) -> int:
        """Bytes of the largest tensor of a text encoder."""
        modules = self.pipe.text_encoders
        return max(x.numel() * x.element_size() for module in modules for x in module.parameters())

    def hold(self, names: Iterable[str]) -> None:
        """Read these parameters of the denoising network, which stay."""
        component = self.pipe.anatomy.component
        for name in names:
            owner, _, last = name.rpartition(".")
            module = self.pipe.network.get_submodule(owner)
            if module._parameters[last].is_meta:
                x = self.stores[component].read(self.stores[component].key([name])).to(module._parameters[last].dtype)
                self.held += x.numel() * x.element_size()
                module._parameters[last] = nn.Parameter(x, requires_grad=False)


def float32_bytes(folder: Path) -> int:
    """What the weights in a pipeline's folder take in memory as `sfumato.load` has them; 0 where there are none."""
    total = 0
    parts = [p for p in folder.iterdir() if p.is_dir()]
    variant = variant_of(folder, {p.name: [] for p in parts})
    for part in parts:
        for file in plain_files(part, variant):
            with reading(file), safe_open(file, "pt") as opened:
                total += sum(4 * math.prod(opened.get_slice(k).get_shape()) for k in opened.keys())  # noqa: SIM118
    return total


def open_partially(model: str | Path, dtype: torch.dtype | None = None) -> Partial:
    """A folder's pipeline without its weights.

    Args:
        dtype: the precision in which they would be loaded; by default each as its file has it.

    Raises:
        BadInput: as `sfumato.load` for a folder.
    """
    folder, index = inspected(model)
    variant = variant_of(folder, index)
    kind_of_pipe = getattr(import_module("diffusers"), index["_class_name"])
    known = inspect.signature(kind_of_pipe.__init__).parameters
    components: dict[str, Any] = dict.fromkeys(absent(folder, index))
    stores: dict[str, Store] = {}
    with quiet(), reading(folder, f"a {index['_class_name']}"):
        for name, kind in index.items():
            if not isinstance(kind, list):
                continue
            if None in kind or name == "safety_checker":
                components[name] = None
                continue
            found: Any = getattr(import_module(kind[0]), kind[1]) if "." in kind[0] or kind[0] in _HOMES else None
            if found is None:
                raise BadInput(f"{name} of {folder} is of {kind[0]}, which only a whole load reads: load the model")
            if issubclass(found, (ModelMixin, PreTrainedModel)):
                stores[name] = Store.of(folder / name, variant)
                components[name] = _empty(found, folder / name, stores[name], dtype)
            else:
                components[name] = found.from_pretrained(folder / name, local_files_only=True)
        settings = {k: v for k, v in index.items() if not isinstance(v, list) and k in known}
        settings |= {"requires_safety_checker": False} if "requires_safety_checker" in settings else {}
        pipe = kind_of_pipe(**components, **settings)
    defaults = read_record(folder).get("defaults")
    made = Partial(folder, variant, wrap(pipe, defaults if isinstance(defaults, dict) else None), stores)
    # the first weight tells where the network is, and in which precision
    made.hold([next(name for name, _ in made.pipe.network.named_parameters())])
    listed = made.pipe.projections

    def projections(*kinds: str) -> list[Projection]:
        """As the pipeline's own; their weights are read."""
        found = listed(*kinds)
        made.hold(f"{p.name}.weight" for p in found)
        return found

    vars(made.pipe)["projections"] = projections
    for _, encoder in made.pipe.text_parts():
        made.hooks += _streamed(getattr(pipe, encoder), stores[encoder])
    anatomy = made.pipe.anatomy
    for name in anatomy.text_layers:
        made.hooks += _streamed(anatomy.network.get_submodule(name), stores[anatomy.component], f"{name}.")
    return made


_HOMES = ("diffusers", "transformers")


def _empty(kind: Any, folder: Path, store: Store, asked: torch.dtype | None) -> nn.Module:
    """A network without weights, its parameters in the precision ``asked`` for or of its files; buffers are there."""
    with init_empty_weights(include_buffers=False):
        if issubclass(kind, ModelMixin):
            module = kind.from_config(kind.load_config(folder, local_files_only=True))
            asked = torch.float32 if asked == torch.float16 and overflows(module) else asked
        else:
            module = kind(kind.config_class.from_pretrained(folder, local_files_only=True))
    wide = tuple(getattr(kind, "_keep_in_fp32_modules", None) or ())
    for name, old in dict(module.named_parameters(remove_duplicate=False)).items():
        dtype = _kept(asked or store.kinds[store.key(_aliases(module, name))], name, wide)
        owner, _, last = name.rpartition(".")
        new = nn.Parameter(torch.empty(old.shape, dtype=dtype, device="meta"), requires_grad=False)
        module.get_submodule(owner)._parameters[last] = new
    return module.eval()


def _kept(dtype: torch.dtype, name: str, wide: tuple[str, ...]) -> torch.dtype:
    """Some layers overflow in float16, and their libraries load them in float32."""
    return torch.float32 if dtype == torch.float16 and set(wide) & set(name.split(".")) else dtype


def _aliases(module: nn.Module, name: str) -> list[str]:
    """What a weight may be called in files: by its own name, or by that of one to which it is tied."""
    tied = getattr(module, "_tied_weights_keys", None) or {}
    pairs = list(tied.items()) if isinstance(tied, dict) else []
    pairs.append(("encoder.embed_tokens.weight", "shared.weight"))  # T5's, which transformers before 5 does not say
    return [name, *(b for a, b in pairs if a == name), *(a for a, b in pairs if b == name)]


def _streamed(module: nn.Module, store: Store, within: str = "") -> list[Any]:
    """Hooks by which each layer has its weights while it runs, and only then; names in files begin with ``within``."""
    hooks = []
    for prefix, layer in module.named_modules():
        own = {last: f"{prefix}.{last}".removeprefix(".") for last, x in layer._parameters.items() if x is not None}
        if own:
            keys = {last: store.key([within + alias for alias in _aliases(module, name)]) for last, name in own.items()}
            hooks.append(layer.register_forward_pre_hook(_reader(store, keys)))
            hooks.append(layer.register_forward_hook(_forgetter(dict(layer._parameters))))
    return hooks


def _reader(store: Store, keys: Mapping[str, str]) -> Callable[..., None]:
    def read(layer: nn.Module, args: Any) -> None:
        for last, key in keys.items():
            wanted = layer._parameters[last].dtype
            layer._parameters[last] = nn.Parameter(store.read(key).to(wanted), requires_grad=False)

    return read


def _forgetter(empty: Mapping[str, nn.Parameter]) -> Callable[..., None]:
    def forget(layer: nn.Module, args: Any, output: Any) -> None:
        layer._parameters.update(empty)

    return forget


def write_edited(
    partial: Partial,
    weights: Mapping[str, Tensor],
    out: str | Path,
    overwrite: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the folder with other values for some of the network's parameters.

    The files that hold them are copied and the new values written in their place, so their layout stays; the other
    files of weights become hard links to the original's where the disk allows it (writing *into* one of them would
    change both: tools replace them), and copies elsewhere. Of the networks only the weights that `Store` has are
    carried over: in a pickle or a variant beside them the original would live on, for any tool that prefers it.

    Returns:
        ``written_bytes`` of weights, the number of files ``copied_files`` and ``linked_files``, and where there are any
        ``left_out``, those that are not carried over, by their paths in the folder.

    Raises:
        BadInput: the output exists or lies in the model's folder, or the disk is full; nothing is left behind.
    """
    store = partial.stores[partial.pipe.anatomy.component]
    edits: dict[Path, dict[str, Tensor]] = {}
    for name, x in weights.items():
        key = store.key([name])
        edits.setdefault(store.files[key], {})[key] = x.detach().to("cpu", store.kinds[key])
    out, folder = Path(out), partial.folder
    if out.resolve().is_relative_to(folder.resolve()):
        raise BadInput(f"{out} lies in the folder of the model itself: choose another place")
    told: dict[str, Any] = {"written_bytes": 0, "copied_files": 0, "linked_files": 0}
    parts = [name for name, part in partial.pipe.pipe.components.items() if part is not None]
    parts += [name for name in ("safety_checker",) if (folder / name).is_dir()]
    files = sorted(f for part in parts for f in (folder / part).rglob("*") if f.is_file())
    left_out = {f for name, part in partial.stores.items() for f in _not_read(folder / name, part, files)}
    told |= {"left_out": [f.relative_to(folder).as_posix() for f in sorted(left_out)]} if left_out else {}
    with atomic_folder(out, overwrite=overwrite) as temporary:
        shutil.copyfile(folder / "model_index.json", temporary / "model_index.json")
        for file in (f for f in files if f not in left_out):
            target = temporary / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file in edits:
                shutil.copyfile(file, target)
                told["written_bytes"] += sum(_overwrite(target, edits[file]))
                told["copied_files"] += 1
            elif file.suffix == ".safetensors" and _linked(file, target):
                told["linked_files"] += 1
            else:
                shutil.copyfile(file, target)
        record = {**(provenance or {}), **({"left_out": told["left_out"]} if left_out else {})}
        write_card(temporary, partial.pipe, describe(partial.pipe, weights=False), record, out.name, partial.variant)
    return told


_WEIGHTS = (".safetensors", ".msgpack", ".h5", ".onnx", ".gguf", ".ot", *PICKLES)
"""How files of weights end, in whichever library's form."""


def _not_read(part: Path, store: Store, files: Iterable[Path]) -> list[Path]:
    """Files in a part's folder with weights that ``store`` has not from there, and the indices that name any such."""
    read = set(store.files.values())
    names = {file.name for file in read}
    found = []
    for file in (f for f in files if f.is_relative_to(part)):
        if ".index." in file.name and file.suffix == ".json":
            with reading(file):
                table = json.loads(file.read_text(encoding="utf-8")).get("weight_map") or {}
            if file.parent != part or not names.issuperset(table.values()):
                found.append(file)
        elif file.suffix.lower() in _WEIGHTS and file not in read:
            found.append(file)
    return found


def _linked(file: Path, target: Path) -> bool:
    if Path(__file__).parents[1] in file.resolve().parents:
        return False  # nobody should be able to change an embedded model
    try:
        os.link(file.resolve(), target)
    except OSError:
        return False
    return True


def _overwrite(file: Path, tensors: Mapping[str, Tensor]) -> Iterable[int]:
    """Put tensors in the place of those of the same name, shape and precision in a safetensors file."""
    with open(file, "r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        for key, x in tensors.items():
            start, end = header[key]["data_offsets"]
            data = x.contiguous().reshape(-1).view(torch.uint8).numpy()
            if len(data) != end - start:
                raise BadInput(f"{key} has another size in {file.name}: the edit is of another model")
            stream.seek(8 + length + start)
            stream.write(data)
            yield len(data)
