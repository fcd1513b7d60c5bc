"""The kinds of links: a method of some verb, and what people do with weights and files."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from sfumato import catalog
from sfumato.attack.recovery import Recovery, Relearned
from sfumato.customize.base import Customizer
from sfumato.data.cases import AttackCases
from sfumato.data.pictures import read_pictures, source_for
from sfumato.distill.base import Distiller
from sfumato.distill.parts.data import FromPictures
from sfumato.errors import BadInput
from sfumato.fields import Count, Natural, Positive, Seed, Share
from sfumato.pipeline import Text2Image, load_text2image, wrap
from sfumato.pipeline.customization import attach
from sfumato.pipeline.equip import equip, with_strength
from sfumato.pipeline.load import require_named
from sfumato.pipeline.low_rank import as_low_rank, with_low_rank
from sfumato.settings import Tuned
from sfumato.steer.base import Patch
from sfumato.text import counted

from .base import Chained, Given, Link

OTHERS = 2**21
"""Offset of the seeds of pictures that are trained on, so that none is a picture of the audit."""


OWN_WAY = "a student draws in its own way: no other scheduler suits it"
ORDER = "a student draws in its own way: let the scheduler be the last link, or leave it out"


@dataclass(frozen=True)
class By(Link):
    """A method of the catalogue: one more eraser, a distillation, a patch, or a word learned from pictures.

    Attributes:
        method: as configured; of an eraser, its concepts too.
        images: a folder of pictures, for what learns from some.
    """

    method: Any
    images: Path | None = None

    @property
    def title(self) -> str:
        entry = self._entry
        return f"{entry.verb} {entry.name}"

    @property
    def settings(self) -> Mapping[str, Any]:
        own = {f.name: getattr(self.method, f.name) for f in dataclasses.fields(self.method)}
        return {**own, "images": self.images}

    @property
    def _entry(self) -> catalog.Method:
        name = type(self.method).__name__
        entry = next((m for m in catalog.methods() if m.class_name == name and m.verb in _VERBS), None)
        if entry is None:
            raise BadInput(f"{name} is no method of {', '.join(_VERBS)}: a chain has links of these, and callables")
        return entry

    def check(self, given: Given, before: Sequence[Link]) -> None:
        method = self.method
        if isinstance(method, Patch):
            self._fits(given.original)
            if any(isinstance(link, By) and type(link.method) is type(method) for link in before):
                raise BadInput("it acts on the pipeline already, by an earlier link: name it once")
        elif isinstance(method, Distiller):
            if any(isinstance(link, Scheduler) for link in before):
                raise BadInput(ORDER)
            if isinstance(method, FromPictures):
                source_for(method.data, given.original)
        elif isinstance(method, Customizer):
            self._folder()

    def act(self, chained: Chained, given: Given) -> Chained:
        return _VERBS[self._entry.verb](self, chained, given)

    def _fits(self, pipe: Text2Image) -> None:
        if not self.method.fits(pipe.network):
            raise BadInput(f"{type(self.method).__name__} does not fit a {type(pipe.network).__name__}")

    def _folder(self) -> Path:
        if self.images is None:
            raise BadInput(f"{self.title} learns from pictures: name their folder, as in `{self.title} --images mine/`")
        return _there(self.images)

    def _erase(self, chained: Chained, given: Given) -> Chained:
        return replace(chained, pipe=self.method.run(chained.whole, given.folder)[0])

    def _steer(self, chained: Chained, given: Given) -> Chained:
        self._fits(chained.pipe)
        return replace(chained, patches=(*chained.patches, self.method))

    def _distill(self, chained: Chained, given: Given) -> Chained:
        if chained.sampling:
            raise BadInput(ORDER)
        method: Distiller = replace(self.method, teacher=chained.whole)
        with _room(given) as folder:
            made = load_text2image(method.run(folder, progress=given.progress), chained.pipe.device)
        return replace(chained, pipe=made)

    def _customize(self, chained: Chained, given: Given) -> Chained:
        method: Customizer = self.method
        pictures, prompts = read_pictures(self._folder(), chained.pipe.size, names=False)
        learned = method.learn(chained.whole, pictures, prompts, given.folder)
        return replace(chained, pipe=attach(chained.whole, [learned]))


_VERBS: dict[str, Callable[[By, Chained, Given], Chained]] = {
    "erase": By._erase, "distill": By._distill, "steer": By._steer, "customize": By._customize,
}  # fmt: skip


NO_PROMPTS = (
    "there is no prompt without an erased concept to draw pictures of: retain some concept, or give a folder of "
    "pictures, as in `finetune --images mine/`"
)


@dataclass(frozen=True, kw_only=True)
class FineTune(Tuned, Link):
    """Fine-tuning on pictures of other things, by the model's own training loss (uniform times, AdamW).

    That erased concepts come back in this way is the finding of arXiv:2410.08074.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"sketch": {"updates": 100, "lr": 1e-4, "batch": 8}}
    """Settings by name: some for models as small as the embedded one."""

    images: Path | None = None
    """A folder of pictures with their captions (NAME.txt); by default pictures that the original model draws of prompts
    that name nothing erased."""
    n_images: Count = 64
    """How many pictures the original draws, when no folder is given."""
    updates: Natural = 500
    """Updates of the weights."""
    lr: Positive = 1e-5
    """Learning rate."""
    batch: Count = 4
    """Pictures (each with its noise and time) in an update."""
    subset: str = "full"
    """Which of the network's weights are trained: full, xattn, noxattn, selfattn, ..."""
    seed: Seed = 0
    """Seed of all that is drawn."""

    @property
    def title(self) -> str:
        return f"finetune, {counted(self.updates, 'update')}"

    def check(self, given: Given, before: Sequence[Link]) -> None:
        if self.images is not None:
            _there(self.images)
        elif not given.prompts:
            raise BadInput(NO_PROMPTS)

    def act(self, chained: Chained, given: Given) -> Chained:
        pipe = chained.whole.copy(own=self.subset)
        pictures, texts = self._pictures(given, pipe.size)
        if unnamed := [i for i, text in enumerate(texts) if not text]:
            raise BadInput(
                f"{self.images} holds a picture without a caption (number {unnamed[0]}): put NAME.txt beside"
            )
        # Nobody looks: the loss, the optimiser and the loop are those of the attack that learns a concept again.
        shared = {name: getattr(self, name) for name in ("updates", "lr", "batch", "subset", "seed")}
        tuning = Recovery(**shared, n_images=len(pictures), progress=given.progress)
        asked = AttackCases(" and ".join(given.concepts) or "nothing", (), pictures, texts)
        found = tuning.run(pipe, asked, progress=given.progress, folder=given.folder)
        assert isinstance(found, Relearned)
        own = pipe.parameters("full")
        with torch.no_grad():
            for name, x in found.weights.items():
                own[name].copy_(x.to(own[name]))
        return replace(chained, pipe=pipe)

    def _pictures(self, given: Given, size: int) -> tuple[Float[Tensor, "n 3 s s"], list[str]]:
        if self.images is not None:
            return read_pictures(self.images, size)
        if not given.prompts:
            raise BadInput(NO_PROMPTS)
        texts = [given.prompts[i % len(given.prompts)] for i in range(self.n_images)]
        seeds = [OTHERS + self.seed * self.n_images + i for i in range(self.n_images)]
        drawn = [given.original.draw(texts[i : i + 16], seeds[i : i + 16]) for i in range(0, len(texts), 16)]
        return torch.cat(drawn), texts


@dataclass(frozen=True, kw_only=True)
class Merge(Link):
    """The weights of another model of the same kind are mixed in, as people merge checkpoints."""

    model: str | Text2Image = "sketch"
    """An embedded model, a folder, a .safetensors file, or a hub id."""
    weight: Share = 0.5
    """The other model's share: 0 changes nothing, 1 leaves nothing of the edited one."""

    @property
    def title(self) -> str:
        name = self.model if isinstance(self.model, str) else "a model in memory"
        return f"merge {self.weight:g} of {name}"

    def check(self, given: Given, before: Sequence[Link]) -> None:
        if isinstance(self.model, str):
            require_named(self.model)
        elif self.model.family != given.original.family:
            raise BadInput(f"it is a {self.model.family}, not a {given.original.family}, so it is no such model")

    def act(self, chained: Chained, given: Given) -> Chained:
        other = load_text2image(self.model) if isinstance(self.model, str) else self.model
        made, theirs = chained.whole.copy(own="all"), other.parts()
        with torch.no_grad():
            for part, module in made.parts().items():
                known = dict(theirs[part].named_parameters()) if part in theirs else {}
                for name, x in module.named_parameters():
                    if name not in known or known[name].shape != x.shape:
                        raise BadInput(f"it has no {part}.{name} of that shape, so it is no such model")
                    x.lerp_(known[name].to(x), self.weight)
        return replace(chained, pipe=made)


@dataclass(frozen=True, kw_only=True)
class Cast(Link):
    """All weights in half precision, in which the model then draws."""

    dtype: Literal["float16", "bfloat16"] = "float16"
    """Precision of the weights."""

    @property
    def title(self) -> str:
        return f"cast to {self.dtype}"

    def act(self, chained: Chained, given: Given) -> Chained:
        with tempfile.TemporaryDirectory() as folder:
            saved = chained.whole.save(Path(folder) / "model")
            return replace(chained, pipe=load_text2image(saved, chained.pipe.device, getattr(torch, self.dtype)))


@dataclass(frozen=True, kw_only=True)
class Scheduler(Link):
    """Another way of drawing with the same weights."""

    scheduler: str = "dpm++"
    """ddim, dpm++, or a sampler of the catalogue, such as s2n."""
    sampling_steps: Count | None = None
    """Denoising steps; by default the audit's."""
    cfg_scale: float | None = None
    """Guidance; by default the audit's."""

    @property
    def title(self) -> str:
        told = [self.scheduler, *([counted(self.sampling_steps, "step")] if self.sampling_steps else [])]
        return "scheduler " + ", ".join([*told, *([] if self.cfg_scale is None else [f"guidance {self.cfg_scale:g}"])])

    def check(self, given: Given, before: Sequence[Link]) -> None:
        if any(isinstance(link, By) and isinstance(link.method, Distiller) for link in before):
            raise BadInput(OWN_WAY)

    def act(self, chained: Chained, given: Given) -> Chained:
        if chained.pipe.distilled_steps:
            raise BadInput(OWN_WAY)
        own = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return replace(chained, sampling={**chained.sampling, **own})


@dataclass(frozen=True, kw_only=True)
class Export(Link):
    """Written for other tools, and read again: as a folder, as one file, or as a LoRA on the original model."""

    format: Literal["diffusers", "single-file", "lora"] = "diffusers"
    """diffusers: a folder; single-file: the original layout of SD 1.x, 2.x and XL; lora: what the edit changed, as
    products on the original model's weights. What no LoRA holds is left out, and the report says so."""
    rank: Count | None = None
    """Of a LoRA: at most this in each layer."""
    energy: Share | None = None
    """Of a LoRA: the least rank in each layer with this share of the squared change; without a rank 0.99."""

    @property
    def title(self) -> str:
        return f"export {self.format}" + (f", rank {self.rank}" if self.rank else "")

    def act(self, chained: Chained, given: Given) -> Chained:
        if self.format == "lora":
            energy = self.energy if self.energy is not None or self.rank is not None else 0.99
            low = as_low_rank(given.original, chained.whole, self.rank, energy)
            said = f"left out: {low.lost}" if low.lost else ""
            return replace(chained, pipe=cast(Text2Image, with_low_rank(given.original, low.factors)), said=said)
        with tempfile.TemporaryDirectory() as folder:
            pipe, path = chained.whole, Path(folder) / "model"
            if self.format == "single-file":
                path = path.with_suffix(".safetensors")
                pipe.save_file(path)
            else:
                pipe.save(path)
            return replace(chained, pipe=load_text2image(path, pipe.device, pipe.dtype))


@dataclass(frozen=True, kw_only=True)
class Attach(Link):
    """Adapters of any origin: LoRA files, files of ``customize``, membranes."""

    files: tuple[Path, ...]
    """Files, or folders that hold one."""

    @property
    def title(self) -> str:
        return "adapter " + ", ".join(file.name for file in self.files)

    def check(self, given: Given, before: Sequence[Link]) -> None:
        for file in self.files:
            if not (path := with_strength(file)[0]).exists():
                raise BadInput(f"{path} is not there: name a file of an adapter, or a folder that holds one")

    def act(self, chained: Chained, given: Given) -> Chained:
        return replace(chained, pipe=equip(chained.whole.copy(), chained.pipe, self.files))


@dataclass(frozen=True)
class Call(Link):
    """Any function from pipeline to pipeline; it may get diffusers' or give it back."""

    function: Callable[[Text2Image], Text2Image | DiffusionPipeline]

    @property
    def title(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def act(self, chained: Chained, given: Given) -> Chained:
        return replace(chained, pipe=wrap(self.function(chained.whole)))


def link_of(given: Any) -> Link:
    """A link as it is, a method of the catalogue as `By`, and any other callable as `Call`.

    Raises:
        BadInput: none of these.
    """
    if isinstance(given, Link):
        return given
    if isinstance(given, (Patch, Distiller, Customizer)) or hasattr(given, "concepts"):
        return By(given)
    if callable(given):
        return Call(given)
    raise BadInput(f"a chain has links, methods and functions from pipeline to pipeline, not a {type(given).__name__}")


def _there(folder: Path) -> Path:
    if not folder.is_dir():
        raise BadInput(f"there is no folder of pictures at {folder}: name one")
    return folder


def _room(given: Given) -> AbstractContextManager[Path | str]:
    """The link's folder, or a temporary one."""
    return nullcontext(given.folder) if given.folder is not None else tempfile.TemporaryDirectory()
