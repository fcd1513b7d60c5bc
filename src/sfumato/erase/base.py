"""What an eraser is: a dataclass of hyper-parameters whose verb is `apply`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, overload

from diffusers import DiffusionPipeline

from sfumato import catalog
from sfumato.errors import BadInput, SfumatoError
from sfumato.fields import Seed
from sfumato.finite import finite
from sfumato.pipeline import ImageModel, Model, Text2Image
from sfumato.pipeline.backward import Learning
from sfumato.pipeline.lent import lent, require_finite, tensors
from sfumato.pipeline.offload import refuse
from sfumato.settings import Tuned

from .parts.beneath import beneath, put_back
from .parts.words import check_readable

if TYPE_CHECKING:
    from sfumato.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Eraser(Tuned, ABC):
    """Fields that every eraser has, and what is the same in all of them.

    A method says in `erased` what it does to a pipeline, and in its class attributes what it needs and keeps. The rest
    is done here, once: plain diffusers pipelines are taken and given back as they were; what cannot be used is refused
    before anything is computed; attached adapters are kept or refused; the result is checked, and frozen.

    One that erases classes from an `ImageModel` too says so in `fits`.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {}
    """Settings with which it takes about a second on a tiny pipeline, for the tests that all erasers share."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Kinds of projections (see `Text2Image.projections`) without which it has nothing to work on."""
    needs_instead: ClassVar[tuple[str, ...]] = ()
    """Kinds that it works on where a network has not what it `needs`; none: it works on nothing else."""
    not_joint: ClassVar[str] = ""
    """Why it works on no joint attention of text and picture, where that is not said by what it `needs`."""
    keeps_adapters: ClassVar[bool] = False
    """Whether it can edit beneath attached adapters, which then go on acting on the result; else they are refused."""
    draws: ClassVar[bool] = True
    """Whether anything in it is random, so that another ``seed`` gives another result."""

    removable: ClassVar[bool] = False
    """Whether what it makes is attached beside the original's own weights, and comes off again."""
    PICTURES: ClassVar[frozenset[str]] = frozenset({"images", "data"})
    """What the fields are called by which pictures are given to those that learn from them."""
    keeps_world: ClassVar[bool] = False
    """Whether the words of the model's own vocabulary are preserved where ``preserve`` is None."""

    concepts: tuple[str, ...]
    """What to erase, each a word or phrase as a prompt would say it."""
    anchors: tuple[str, ...] = ()
    """What each concept should turn into: none (the method's default), one for all, or one per concept."""
    preserve: tuple[str, ...] | None = None
    """Prompts whose pictures must not change. By default closed-form erasers preserve all other words of a model that
    says which words it knows, as the embedded one does, and the others none."""
    seed: Seed = 0
    """Seed of all randomness in the edit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.concepts or any(not c.strip() for c in self.concepts):
            raise BadInput("name at least one concept to erase, for example concepts=['star']")
        said = [c.strip().lower() for c in self.concepts]
        if twice := [c for i, c in enumerate(self.concepts) if said[i] in said[:i]]:
            raise BadInput(f"{twice[0]!r} is named twice: name every concept once")
        if len(self.anchors) not in (0, 1, len(self.concepts)):
            raise BadInput(
                "give no anchor, one anchor for all, or one per concept: "
                f"got {len(self.anchors)} for {len(self.concepts)}"
            )
        kept = {p.strip().lower() for p in self.preserve or ()}
        if clash := [c for c in self.concepts if c.strip().lower() in kept]:
            raise BadInput(f"{clash[0]!r} is both erased and preserved: name it in one of the two only")

    def anchor_for(self, index: int, default: str) -> str:
        """The anchor of concept number ``index``, or ``default`` when none was given."""
        return default if not self.anchors else self.anchors[index if len(self.anchors) > 1 else 0]

    def kept(self, pipe: Text2Image) -> tuple[str, ...]:
        """The prompts that are preserved on ``pipe``: ``preserve``, or what follows from the model where it is None."""
        if self.preserve is not None or not self.keeps_world:
            return self.preserve or ()
        named = {word for concept in self.concepts for word in concept.lower().split()}
        return tuple(w for words in pipe.vocabulary.values() for w in words if w not in named)

    # What a method says

    @abstractmethod
    def erased(self, pipe: Text2Image) -> tuple[Text2Image, dict[str, Any]]:
        """A new pipeline without the concepts, and what there is to say about how it went (JSON types).

        What it found out that readers of a report should know goes under "found": lists of words by a label for them.

        Args:
            pipe: sound, fitting, and without adapters; only to be read. A `Text2Image.copy` that owns what is to
                change is the way to the new one.
        """

    def plan(self, pipe: Text2Image) -> Plan:
        """What it will cost, where that can be told beforehand; by default the memory of the weights."""
        from sfumato.plan import Plan, weights_of

        return Plan(f"{type(self).__name__}: {', '.join(self.concepts)}", memory=weights_of(pipe.parts()))

    def costs(self, pipe: Text2Image) -> Plan:
        """`plan`, with what settings that all methods of a kind share change of it."""
        return self.plan(pipe)

    def learning(self, pipe: Text2Image) -> Learning | None:
        """What one of its updates differentiates; None: nothing."""
        return None

    # What is the same for all

    @overload
    def apply(self, pipe: ImageModel) -> ImageModel: ...
    @overload
    def apply(self, pipe: Text2Image | DiffusionPipeline) -> Text2Image: ...
    def apply(self, pipe: Any) -> Any:
        """A new pipeline without the concepts; ``pipe``, which may be a plain diffusers pipeline, is not changed.

        Raises:
            BadInput: as `check`.
        """
        return self.run(pipe)[0]

    @overload
    def run(self, pipe: ImageModel, folder: str | Path | None = None) -> tuple[ImageModel, dict[str, Any]]: ...
    @overload
    def run(
        self, pipe: Text2Image | DiffusionPipeline, folder: str | Path | None = None
    ) -> tuple[Text2Image, dict[str, Any]]: ...
    def run(self, pipe: Any, folder: str | Path | None = None) -> tuple[Any, dict[str, Any]]:
        """`apply`, and what the method has to say about how it went, for the record (JSON types).

        Args:
            pipe: not changed.
            folder: where a method that trains keeps its state; killed, the same call goes on to the same bits. None:
                in memory only.

        Raises:
            BadInput: as `check`; the folder holds the state of other settings, or of another model.
            SfumatoError: the result is not finite.
        """
        borrowed: Any = nullcontext(pipe) if isinstance(pipe, ImageModel) else lent(pipe)
        with borrowed as p:
            self.check(p)
            under = beneath(p)
            made, log = self.within(None if folder is None else Path(folder), under)
            if p.adapters:
                made, log = put_back(p, under, made), {**log, "adapters_kept": list(p.adapters)}
            self._seal(p, made)
        return made, log

    def check(self, pipe: Model) -> None:
        """Refuse what the method cannot work on, before anything is computed.

        Raises:
            BadInput: the network lacks what the method edits; adapters are attached that it cannot keep; a weight is
                not finite; the tokenizer cannot read a concept, an anchor or what is preserved, or the model has no
                such class.
        """
        if not self.fits(pipe):
            lacks = f", whose network has no {' or '.join(self.needs)}" if self.needs else ""
            lacks = lacks if isinstance(pipe, Text2Image) else ", which draws pictures without text"
            if self.not_joint and isinstance(pipe, Text2Image) and "joint.k" in pipe.anatomy.kinds:
                lacks += f" ({self.not_joint})"
            name = type(getattr(pipe, "pipe", pipe)).__name__
            raise BadInput(f"{type(self).__name__} does not fit this {name}{lacks}: {fitting(pipe)}")
        if loaded := [part for part, m in pipe.parts().items() if getattr(m, "peft_config", None)]:
            raise BadInput(
                f"a LoRA is loaded into the {loaded[0]} of this pipeline: fuse it (pipe.fuse_lora() and then "
                "pipe.unload_lora_weights()), or unload it"
            )
        if pipe.adapters and not self.keeps_adapters:
            names = ", ".join(pipe.adapters)
            others = [m.name for m in catalog.methods("erase") if m.load().keeps_adapters]
            raise BadInput(
                f"adapters are attached to this pipeline ({names}), and {type(self).__name__} cannot work beneath them:"
                f" merge or remove them first, or erase with {' or '.join(others)}, which keep them"
            )
        if isinstance(pipe, Text2Image):
            refuse(pipe.pipe, "edited")
        require_finite(pipe)
        if isinstance(pipe, Text2Image):
            check_readable(pipe, [*self.concepts, *self.anchors, *(self.preserve or ())])
        else:
            pipe.told(list(self.concepts))

    @classmethod
    def fits(cls, pipe: Model) -> bool:
        """Whether it is a pipeline whose network has what the method edits: projections of all kinds it `needs`."""
        if not isinstance(pipe, Text2Image):
            return False
        return any(_has(pipe, kinds) for kinds in (cls.needs, cls.needs_instead or cls.needs))

    def within(self, folder: Path | None, pipe: Text2Image) -> tuple[Text2Image, dict[str, Any]]:
        """`erased`, for methods that have nothing to keep in a folder."""
        return self.erased(pipe)

    def _seal(self, pipe: Text2Image, made: Text2Image) -> None:
        """Check what ``made`` does not share with ``pipe``, and freeze everything."""
        shared = {x.data_ptr() for _, _, x in tensors(pipe)}
        for part, name, x in tensors(made):
            if x.data_ptr() not in shared and not finite(x):
                raise SfumatoError(
                    f"{type(self).__name__} ended with numbers that are not finite in {name} of {part}: nothing was "
                    "erased; use milder settings, or float32 weights"
                )
        factors = [x for adapter in made.adapters.values() for x in adapter.parameters()]
        for x in [*factors, *(x for part in made.parts().values() for x in part.parameters())]:
            x.requires_grad_(False)
            x.grad = None


def _has(pipe: Text2Image, kinds: Sequence[str]) -> bool:
    try:
        return all(pipe.projections(kind) for kind in kinds)
    except BadInput:  # a kind that this network does not know
        return False


def fitting(pipe: Model) -> str:
    """Which erasers fit a model, in words."""
    names = [m.name for m in catalog.methods("erase") if m.load().fits(pipe)]
    return f"erasers that fit it are {', '.join(names)}" if names else "no eraser of this package fits it"
