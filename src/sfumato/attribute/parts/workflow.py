"""A workflow of parts that can be switched on and off, and what one alliance of them draws."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from sfumato.errors import BadInput, unknown
from sfumato.files import sha256_of
from sfumato.foreign import reading
from sfumato.pipeline import Text2Image, load_text2image
from sfumato.pipeline.equip import equip
from sfumato.pipeline.load import wrap
from sfumato.pipeline.watermark import marked_pictures, payloads

Kind = Literal["checkpoint", "lora", "control", "phrase", "python"]
ORDER: Mapping[str, int] = {"checkpoint": 0, "lora": 1, "control": 2, "phrase": 3, "python": 4}
"""In which order parts are switched on, whichever the file has."""


@dataclass(frozen=True)
class Setup:
    """How pictures are drawn, as parts change it one after the other.

    Attributes:
        pipe: the pipeline, for this alliance alone.
        prompt: what it is asked for, with {NAME} for each phrase that has a place in it.
        control: a ControlNet, its picture and its strength; None without.
        after: what is done to pictures in [0, 1] when they are drawn.
        bare, loras: the pipeline before the first LoRA, and the parts of that kind; adapters do not travel with a copy,
            and words that are learned make one.
    """

    pipe: Text2Image
    prompt: str
    control: tuple[Any, Image.Image, float] | None = None
    after: tuple[Callable[[Tensor], Tensor], ...] = ()
    bare: Text2Image | None = None
    loras: tuple[Part, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Part:
    """One player.

    Attributes:
        name: what it is called.
        kind: "checkpoint" (takes the base model's place; at most one can be on), "lora", "control" (a ControlNet),
            "phrase" (words in the prompt) or "python".
        source: a model, a LoRA file or one of ``customize`` (whose words are then known), a ControlNet's folder, or the
            words.
        weight: of a LoRA or ControlNet.
        image: the control picture.
        apply: of "python": maps the `Setup` without the part to that with it. It needs one process (jobs=1).
    """

    name: str
    kind: Kind
    source: str = ""
    weight: float = 1.0
    image: str = ""
    apply: Callable[[Setup], Setup] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w.-]+", self.name):
            raise BadInput(f"{self.name!r} cannot name a part: use letters, digits, - and _")
        if self.kind not in get_args(Kind):
            raise unknown("kind of part", str(self.kind), get_args(Kind))
        if (self.kind == "python") != (self.apply is not None) or (self.kind != "python" and not self.source):
            need = "apply, a function" if self.kind == "python" else "source"
            raise BadInput(f"the part {self.name} of kind {self.kind} needs {need}")
        if self.kind == "control" and not self.image:
            raise BadInput(f"the ControlNet {self.name} needs image: the picture that it follows")

    def on(self, setup: Setup) -> Setup:
        """The setup with this part."""
        if self.apply is not None:
            return self.apply(setup)
        if self.kind == "checkpoint":
            return dataclasses.replace(setup, pipe=_model(self.source, str(setup.pipe.device)).copy())
        if self.kind == "lora":
            bare, loras = setup.bare or setup.pipe, (*setup.loras, self)
            made = equip(bare, None, [(part.source, part.weight) for part in loras])
            return dataclasses.replace(setup, pipe=made, bare=bare, loras=loras)
        if self.kind == "control":
            return dataclasses.replace(setup, control=(*_control(self.source, self.image, setup.pipe), self.weight))
        place = f"{{{self.name}}}"
        words = setup.prompt.replace(place, self.source) if place in setup.prompt else f"{setup.prompt}, {self.source}"
        return dataclasses.replace(setup, prompt=words)


@dataclass(frozen=True, kw_only=True)
class Workflow:
    """What is always on, the parts, and how pictures are drawn: the same for every alliance, seeds included.

    Attributes:
        model: the base, what `sfumato.load` takes; or in Python a pipeline.
        prompt: what is asked for; {NAME} is where the phrase of that name goes, others come at the end.
        parts: the players.
        seeds: one picture each, the same for every alliance.
        sampling_steps, cfg_scale, negative, size: None: the base model's own, with every checkpoint. (The sampler goes
            with the checkpoint, whose weights may need it.)
    """

    model: str | Text2Image
    prompt: str
    parts: tuple[Part, ...]
    seeds: tuple[int, ...] = tuple(range(16))
    sampling_steps: int | None = None
    cfg_scale: float | None = None
    negative: str | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        names = self.players
        if not names:
            raise BadInput("a workflow without parts has nobody to attribute to: name at least one")
        if twice := {name for name in names if names.count(name) > 1}:
            raise BadInput(f"two parts are called {min(twice)}: give each a name of its own")
        if sum(part.kind == "checkpoint" for part in self.parts) > 1:
            raise BadInput("at most one part can take the base model's place: make workflows of one checkpoint each")
        if sum(part.kind == "control" for part in self.parts) > 1:
            raise BadInput("at most one ControlNet can be on: make workflows of one each")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise BadInput("a workflow needs seeds, each once: seeds = [0, 1, 2]")

    @property
    def players(self) -> list[str]:
        return [part.name for part in self.parts]

    @property
    def portable(self) -> bool:
        """Whether other processes can draw it: everything comes from files."""
        return isinstance(self.model, str) and all(part.apply is None for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        """All that decides its pictures: of files their hashes."""
        told = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("model", "parts")}
        model = _hash(self.model) if isinstance(self.model, str) else self.model.describe()["sha256"]
        parts = []
        for part in self.parts:
            own = {k: v for k, v in vars(part).items() if k != "apply"}
            own |= {k: _hash(own[k]) for k in ("source", "image") if part.kind != "phrase" and own[k]}
            parts.append(own)
        return json.loads(json.dumps({**told, "model": model, "parts": parts}))


def read_workflow(file: Path) -> Workflow:
    """A workflow from a TOML or JSON file: the fields of `Workflow`, and for every part those of `Part`.

    Files are named relative to it; seeds are a list, or a number of them.

    Raises:
        BadInput: it cannot be read, lacks a field or has an unknown one, or a file that it names is not there.
    """
    with reading(file, "a workflow", advice="see `sfumato attribute copyscope --help` for an example"):
        text = Path(file).read_text(encoding="utf-8")
        data = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    if not isinstance(data, dict) or not isinstance(data.get("parts"), list):
        raise BadInput(f"{file} lists no parts: give each a [[parts]] with name, kind and source")
    known = {f.name for f in dataclasses.fields(Workflow)}
    own = {f.name for f in dataclasses.fields(Part)} - {"apply"}
    for name in sorted(data.keys() - known):
        raise unknown(f"field of {file}", name, known)
    if lacking := sorted({"model", "prompt"} - data.keys()):
        raise BadInput(f"{file} lacks {lacking[0]}: a workflow has a model and a prompt")
    parts = []
    for told in data["parts"]:
        for name in sorted(told.keys() - own):
            raise unknown(f"field of a part in {file}", name, own)
        if lacking := sorted({"name", "kind"} - told.keys()):
            raise BadInput(f"a part in {file} lacks {lacking[0]}")
        if told["kind"] == "python":
            raise BadInput(f"the part {told['name']} in {file} is of kind python, which a file cannot hold")
        there = {k: _beside(file, told[k]) for k in ("source", "image") if told.get(k) and told["kind"] != "phrase"}
        parts.append(Part(**{**told, **there}))
    seeds = data.get("seeds", 16)
    data |= {"parts": tuple(parts), "seeds": tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)}
    return Workflow(**{**data, "model": _beside(file, data["model"])})


@torch.no_grad()
def drawn(
    workflow: Workflow, alliance: int, seeds: Sequence[int], batch: int = 32, device: str | None = None
) -> Tensor:
    """What the parts of ``alliance`` (bit i: part i is on) draw with these seeds, in [0, 1]."""
    base = base_of(workflow, device)
    setup = Setup(base.copy(), workflow.prompt)
    on = [part for i, part in enumerate(workflow.parts) if alliance >> i & 1]
    for part in sorted(on, key=lambda part: ORDER[part.kind]):
        setup = part.on(setup)
    off = [part.name for part in workflow.parts if part not in on]
    prompt = tidy(_without(setup.prompt, off))
    own = {k: base.defaults.get(k) for k in ("cfg_scale", "negative")}
    own |= {"sampling_steps": base.sampling_steps, "size": base.size}
    how: dict[str, Any] = {k: x if getattr(workflow, k) is None else getattr(workflow, k) for k, x in own.items()}
    if setup.control is None:
        pictures = setup.pipe.draw([prompt], list(seeds), batch=batch, **how)
    else:
        pictures = _controlled(setup, prompt, seeds, batch, how)
    for change in setup.after:
        pictures = change(pictures)
    pictures = pictures.clamp(0, 1)
    marked = setup.pipe.defaults.get("marked")
    if marked is not None and setup.after:  # a change wears the mark down that they were drawn with
        numbers = payloads(marked, [prompt] * len(seeds), seeds, min(pictures.shape[-2:]))
        return marked_pictures(pictures, numbers)
    return pictures


def base_of(workflow: Workflow, device: str | None = None) -> Text2Image:
    """The base model, which is loaded once."""
    return _model(workflow.model, device) if isinstance(workflow.model, str) else workflow.model


def _without(prompt: str, names: Sequence[str]) -> str:
    for name in names:
        prompt = prompt.replace(f"{{{name}}}", "")
    return prompt


def tidy(prompt: str) -> str:
    """A prompt without the blanks and commas that a phrase left behind."""
    words = [" ".join(piece.split()) for piece in prompt.split(",")]
    return ", ".join(piece for piece in words if piece)


def to_levels(pictures: Float[Tensor, "n 3 height width"]) -> UInt8[np.ndarray, "n height width 3"]:
    """Pictures as files hold them."""
    return (255 * pictures).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _controlled(
    setup: Setup, prompt: str, seeds: Sequence[int], batch: int, how: Mapping[str, Any]
) -> Float[Tensor, "n 3 height width"]:
    """Through diffusers' own pipeline with a ControlNet, from the noise that `draw` would begin with."""
    if not setup.pipe.control_class or setup.control is None:
        raise BadInput("a ControlNet can be a part of workflows on Stable Diffusion 1.x, 2.x and XL only: leave it out")
    network, image, weight = setup.control
    made: Any = setup.pipe.with_control(network)
    wrap(made, controlled=True)
    side = how["size"]
    given = image.convert("RGB").resize((side, side))
    pictures = []
    for i in range(0, len(seeds), batch):
        some = list(seeds[i : i + batch])
        pictures.append(
            made(
                [prompt] * len(some), image=[given] * len(some), height=side, width=side, output_type="pt",
                num_inference_steps=how["sampling_steps"], guidance_scale=how["cfg_scale"],
                negative_prompt=[how["negative"]] * len(some) if how["negative"] else None,
                generator=[torch.Generator().manual_seed(s) for s in some],
                controlnet_conditioning_scale=float(weight),
            ).images.float().cpu()
        )  # fmt: skip
    return torch.cat(pictures)


@lru_cache(maxsize=2)
def _model(source: str, device: str | None) -> Text2Image:
    return load_text2image(source, device)


@lru_cache(maxsize=2)
def _network(source: str, dtype: torch.dtype) -> Any:
    from diffusers import ControlNetModel

    with reading(source, "a ControlNet"):
        made = ControlNetModel.from_pretrained(source, torch_dtype=dtype, use_safetensors=True, local_files_only=True)
    return made.eval().requires_grad_(False)


def _control(source: str, image: str, pipe: Text2Image) -> tuple[Any, Image.Image]:
    with reading(image, "a picture"), Image.open(image) as opened:
        picture = opened.convert("RGB")
    return _network(source, pipe.dtype).to(pipe.device), picture


def _beside(file: Path, name: str) -> str:
    """A path relative to the workflow's file, where there is one of that name; else the name itself."""
    there = file.parent / name
    return str(there) if there.exists() else name


def _hash(source: str) -> str:
    return f"sha256 {sha256_of(source)}" if Path(source).exists() else source
