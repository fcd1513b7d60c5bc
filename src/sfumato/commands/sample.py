"""``sfumato sample``: pictures from prompts, from classes or from pictures, as the model was trained."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from tyro.conf import Positional

from sfumato import catalog
from sfumato.commands import patches
from sfumato.commands.options import STEPS, parse
from sfumato.commands.verb import Equipped, equipped, load_any
from sfumato.errors import BadInput, unknown
from sfumato.fields import Count, Share
from sfumato.files import GENERATED, atomic_folder, contact_sheet, refuse_existing, save_png, write_json
from sfumato.plan import Plan
from sfumato.settings import EMBEDDED
from sfumato.text import counted

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.pipeline import Model
    from sfumato.pipeline.contract import Noised

SCHEDULERS = ("ddim", "addim", "dpm++")
MOST = 1_000_000
"""Seeds of one command."""
PIXEL_SCHEDULERS = (*SCHEDULERS, "ddpm", "heun")
EXAMPLE = 'sfumato sample "a red star" "a blue fish" --seeds 0-3 --out pictures/'


@dataclass(frozen=True, kw_only=True)
class Sample(Equipped):
    """Options of the command."""

    writes: ClassVar[str] = "PNG, sheet.png, sample.json"
    """What lies in the output."""

    prompts: Annotated[tuple[str, ...], Positional]
    """What to draw; one row of the contact sheet each. For a model of classes their names; none: of any class."""
    image: tuple[Path, ...] = ()
    """Pictures to draw variations of, one row of the contact sheet each, for a model that is shown pictures; for one
    that reads pictures in its prompts those that go with every prompt, the first for <img><|image_1|></img>. With
    --strength, for any model: pictures to start from, one for all prompts or one for each; cropped to squares."""
    strength: Share | None = None
    """How much of --image is drawn anew (img2img): the share of the denoising steps that are taken, in (0, 1]."""
    out: Path
    """Folder for the pictures, the contact sheet and the record."""
    model: str = "sketch"
    """An embedded model, a folder written by save_pretrained, a .safetensors file of SD 1.x, 2.x or XL, or a hub id."""
    seeds: str = "0"
    """Seeds, as in 7 or 0-3 or 1,5,9; every prompt is drawn once with each."""
    sampling_steps: Count | None = None
    """Denoising steps; by default what the model was saved or distilled with, or 25."""
    cfg_scale: float | None = None
    """Guidance; 1 is none; by default the model's own."""
    image_cfg_scale: float | None = None
    """Guidance on the pictures that go with a prompt; 1 is none; by default the model's own."""
    negative_prompt: str | None = None
    """What guidance steers away from, as for the prompts."""
    scheduler: str | None = None
    """The sampler: ddim, addim, dpm++, for models of classes also ddpm and heun, or a method of the verb (`sfumato
    choose sample`), which brings its own options (see --scheduler NAME --help); by default the model's own."""
    size: Count | None = None
    """Side of the pictures in pixels; by default the model's own."""
    with_: tuple[str, ...] = ()
    """A method of steer and its flags in one word, as in --with "faster-diffusion --preset uniform"; may be repeated:
    all act on the drawing, in this order. Prompts stand before it."""
    overwrite: bool = False
    """Replace the output if it exists."""

    @property
    def shown(self) -> tuple[Path, ...]:
        """The pictures that belong to what is asked; with a strength they are where drawing starts."""
        return self.image if self.strength is None else ()


def main(args: list[str]) -> None:
    options, rule = _read(seed_alias(args))
    jobs = jobs_of(options, EXAMPLE)
    steering = patches.named(options.with_, options.model)
    patches.refuse_twice(steering)
    model = equipped(load_any(options.model, options), options.model, options)
    with patches.acting(model, steering) as logs:
        pictures, settings = drawn(model, jobs, options, rule)
    settings |= {f"scheduler-{name}": value for name, value in (asdict(rule) if rule else {}).items()}
    if steering:
        settings["with"] = patches.told(steering, logs)
    write(options, model, jobs, pictures, settings)


def jobs_of(options: Sample, example: str) -> list[tuple[str | Path | None, int]]:
    """One (prompt or picture to show, seed) per picture; what is bad is refused before anything is loaded."""
    if any(not prompt.strip() for prompt in options.prompts):
        raise BadInput(f"give at least one prompt, none of them empty, as in `{example}`")
    if missing := [file for file in options.image if not file.is_file()]:
        raise BadInput(f"--image: there is no file {missing[0]}")
    if options.strength is not None:
        from sfumato.pipeline.contract import Noised

        Noised(None, options.strength)  # refuses 0
        if len(options.image) not in {1, len(options.prompts)}:
            raise BadInput("--strength says how much of --image is drawn anew: give one for all or one for each prompt")
    if not options.prompts and not options.shown and options.model in EMBEDDED:
        raise BadInput(f"{options.model} draws what it is told: give at least one prompt, as in `{example}`")
    seeds = read_seeds(options.seeds)
    refuse_existing(options.out, options.overwrite)
    return [(prompt, seed) for prompt in options.prompts or options.shown or (None,) for seed in seeds]


def write(
    options: Sample,
    model: Model,
    jobs: list[tuple[str | Path | None, int]],
    pictures: Tensor,
    settings: Mapping[str, Any],
    more: Callable[[Path, Sequence[str], Mapping[str, Any]], None] | None = None,
) -> None:
    """Pictures, contact sheet and record; ``settings`` is what is to be said of how they were made.

    ``more`` writes what else belongs in the folder, given that, the pictures' names and what was said of them all.
    """
    arrays = as_levels(pictures)
    seeds = read_seeds(options.seeds)
    described = model.describe()
    about = {"model": options.model, "model-sha256": described["sha256"], "adapters": described.get("adapters", {})}
    settings = {**about, **settings}
    words = [prompt.stem if isinstance(prompt, Path) else prompt or "" for prompt, _ in jobs]
    names = [f"{i:03d}-{_slug(words[i])}-seed{seed}.png" for i, (_, seed) in enumerate(jobs)]
    with atomic_folder(options.out, options.overwrite) as folder:
        for (prompt, seed), name, array in zip(jobs, names, arrays, strict=True):
            save_png(folder / name, array, {**settings, "prompt": str(prompt or ""), "seed": seed})
        # One row a prompt; a single row of many would be too long to look at.
        several = len(options.prompts or options.image) > 1
        columns = len(seeds) if several else min(len(seeds), max(8, round(len(seeds) ** 0.5)))
        about = {**settings, "prompts": options.prompts or [str(file) for file in options.image], "seeds": seeds}
        if single := "marked" in model.defaults:  # what shows several at once would hold none of their marks
            more = None
        else:
            save_png(folder / "sheet.png", contact_sheet(arrays, columns), about)
        asked = {name.rstrip("_"): value for name, value in asdict(options).items()}
        write_json(folder / "sample.json", {**asked, **about, "source": GENERATED})
        if more is not None:
            more(folder, names, about)
    where = "each marked; no sheet, which would not be" if single else f"side by side in {options.out / 'sheet.png'}"
    print(f"{counted(len(jobs), 'picture')} in {options.out}, {where}")


def as_levels(pictures: Tensor) -> np.ndarray:
    """Pictures in [0, 1] as (n, height, width, 3), uint8."""
    return (pictures.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)


def drawn(
    model: Model, jobs: list, options: Sample, rule: Any = None, also: str = ""
) -> tuple[Tensor, dict[str, Any]]:
    """The pictures, and the settings that made them; ``rule`` is a sampler of the catalogue.

    ``also`` is what the plan says beyond them.
    """
    kind, command = model.drawn_by
    if command != "sample":
        raise BadInput(f"{options.model} is a model of {kind}: `sfumato {command}` draws with it")
    said = None if jobs[0][0] is None else [prompt for prompt, _ in jobs]
    if said is None and hasattr(model, "encode"):
        raise BadInput(f"{options.model} draws what it is told: give at least one prompt, as in `{EXAMPLE}`")
    asked = asked_of(model, jobs, options)
    if asked is not None and options.shown:
        model.told(asked[:1])  # refuses pictures where it is not shown any
    if options.image_cfg_scale is not None:
        if "image_cfg_scale" not in model.defaults:
            raise BadInput(f"{options.model} reads no pictures in its prompts: leave --image-cfg-scale out")
        model.defaults["image_cfg_scale"] = options.image_cfg_scale
    if hasattr(model, "tokenizers"):
        from sfumato.data.world import strangers

        if unheard := strangers(model.tokenizers[0], said):
            names = ", ".join(map(repr, unheard))
            warnings.warn(f"{options.model} has no word for {names}: what it draws for that is chance", stacklevel=2)
    if options.size is not None and options.size > model.size and not getattr(model, "patches", ()):
        warnings.warn(
            f"{options.model} was trained on pictures of {model.size} pixels: in larger ones it repeats what it draws; "
            "`sfumato steer upsample-guidance` with the same words draws whole multiples without that",
            stacklevel=2,
        )
    steps = model.sampling_steps if options.sampling_steps is None else options.sampling_steps
    writes = [f"{options.out}/ ({options.writes})"]
    Plan(f"{counted(len(jobs), 'picture')} with {counted(steps, 'step')}{also}", writes=writes).show()
    pictures = draw(model, jobs, options, rule)
    settings = {"sampling_steps": steps, "scheduler": options.scheduler or model.scheduler_name}
    if asked is not None:  # where nothing is asked for there is nothing to guide towards
        cfg_scale = model.defaults["cfg_scale"] if options.cfg_scale is None else options.cfg_scale
        settings |= {"cfg_scale": cfg_scale, "negative_prompt": options.negative_prompt}
        named = ("cfg_interval", *(("image_cfg_scale",) if options.shown else ()))
        settings |= {name: model.defaults[name] for name in named if name in model.defaults}
    if options.strength is not None:
        settings |= {"image": [str(file) for file in options.image], "strength": options.strength}
    return pictures, settings


def asked_of(model: Model, jobs: list, options: Sample) -> list[Any] | None:
    """What the model is asked for in each picture; None: nothing."""
    if jobs[0][0] is None:
        return None
    every = dict(zip(options.prompts or options.shown, model.asking(options.prompts, options.shown), strict=True))
    return [every[prompt] for prompt, _ in jobs]


def draw(model: Model, jobs: list, options: Sample, rule: Any = None) -> Tensor:
    """The pictures alone."""
    return model.draw(
        asked_of(model, jobs, options),
        [seed for _, seed in jobs],
        sampling_steps=model.sampling_steps if options.sampling_steps is None else options.sampling_steps,
        cfg_scale=options.cfg_scale,
        negative=options.negative_prompt,
        scheduler=rule or options.scheduler,
        size=options.size,
        start=None if options.strength is None else _start(model, jobs, options),
        progress=True,
    )


def _start(model: Model, jobs: list, options: Sample) -> Noised:
    """The pictures that drawing starts from."""
    from sfumato.data.pictures import squares
    from sfumato.pipeline.contract import Noised

    pictures = squares(options.image, options.size or model.size)
    return Noised(pictures.repeat_interleave(len(jobs) // len(pictures), dim=0), options.strength)


def _read(args: list[str]) -> tuple[Sample, Any]:
    """The options, and the sampler as its own options configure it where ``--scheduler`` names one of the catalogue."""
    words = dict(pairwise(args)) | dict(a.split("=", 1) for a in args if a.startswith("--scheduler="))
    methods = {m.name: m for m in catalog.methods("sample")}
    method = methods.get(words.get("--scheduler"))
    if method is None and args and args[0] in methods and not {"-h", "--help"}.isdisjoint(args):
        method = methods[args[0]]  # as one asks for the help of other verbs' methods
    about = f"Example: {EXAMPLE}"
    if method is None:
        options = Sample(**parse("sfumato sample", args, Sample, about=about, aliases=STEPS)[0])
        if options.scheduler not in (None, *PIXEL_SCHEDULERS):
            raise unknown("--scheduler", options.scheduler, (*PIXEL_SCHEDULERS, *methods))
        return options, None
    about += f" --scheduler {method.name}\n\n{method.summary}\n\n{method.paper}\n\nCost: {method.cost}."
    cls = method.load()
    given, settings = parse(f"sfumato {method.command}", args, Sample, cls, about=about, aliases=STEPS)
    return Sample(**given), cls(**settings)


def read_seeds(text: str) -> list[int]:
    """"3", "0-3" and "1,5,9" as lists of seeds."""
    seeds: list[int] = []
    for part in text.split(","):
        if not (match := re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)):
            raise BadInput(f"{text!r} names no seeds: write them like 7 or 0-3 or 1,5,9")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise BadInput(f"{part.strip()} in {text!r} is an empty range of seeds: write it like {last}-{first}")
        if last >= 2**63:
            raise BadInput(f"seeds lie below 2**63: {last} does not")
        if last - first >= MOST or len(seeds) >= MOST:
            raise BadInput(f"{text!r} names more than {MOST:,} seeds: draw them in several parts")
        seeds.extend(range(first, last + 1))
    return seeds


def seed_alias(args: list[str]) -> list[str]:
    """The arguments, with ``--seed`` understood as ``--seeds``."""
    return [re.sub(r"^--seed(?==|$)", "--seeds", arg) for arg in args]


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "picture"
