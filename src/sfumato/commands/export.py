"""``sfumato export``: a model, or what an edit of it changed, in the files of other tools."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sfumato.commands.options import parse
from sfumato.commands.tables import show_table
from sfumato.commands.verb import Equipped, load, load_equipped
from sfumato.errors import BadInput
from sfumato.fields import Count, Natural, Share
from sfumato.files import refuse_existing
from sfumato.versions import versions

if TYPE_CHECKING:
    from sfumato.pipeline import Text2Image
    from sfumato.pipeline.low_rank import LowRank

EXAMPLE = "sfumato export --model erased/ --format single-file --out erased.safetensors"
ABOUT = "A model as one file or a folder, or as a LoRA what an edit changed in it. Strict: what is left out is said."
Format = Literal["single-file", "diffusers", "lora", "kohya", "peft"]


@dataclass(frozen=True, kw_only=True)
class Export(Equipped):
    """Options of the command."""

    model: str
    """An embedded model, a folder written by save_pretrained, a .safetensors file of SD 1.x, 2.x or XL, or a hub id."""
    format: Format = "single-file"
    """single-file: the whole model in the original layout, for web UIs; diffusers: a folder; lora, kohya, peft: what
    the model differs by from --base, as a LoRA in the spelling of diffusers, of kohya and the web UIs (with alpha), or
    as folders of peft."""
    out: Path
    """Where to: a .safetensors file; with diffusers and peft a folder."""
    base: str | None = None
    """For a LoRA: the model that was edited; by default the one that the edited model's record names."""
    rank: Count | None = None
    """For a LoRA: at most this rank in each layer."""
    energy: Share | None = None
    """For a LoRA: the least rank in each layer with this share of the squared change; without a rank 0.99."""
    strict: bool = True
    """Refuse a LoRA of an edit that also changed what no LoRA holds (biases, normalisations, embeddings)."""
    pictures: Natural = 4
    """For a LoRA: pictures that are drawn with the edit and with the LoRA, to say how much they differ; 0 for none."""
    overwrite: bool = False
    """Replace the output if it exists."""


def main(args: list[str]) -> None:
    [values] = parse("sfumato export", args, Export, about=f"Example: {EXAMPLE}\n\n{ABOUT}")
    options = Export(**values)
    _check(options)
    refuse_existing(options.out, options.overwrite)
    pipe = load_equipped(options.model, options)
    made = {"command": shlex.join(["sfumato", *sys.argv[1:]]), "versions": versions(), "exported": options.format}
    if options.format == "single-file":
        left = pipe.save_file(options.out, options.overwrite, _provenance(options.model, made))
        if left:
            print(f"not in the file, which has no place for it: {', '.join(left)}")
    elif options.format == "diffusers":
        pipe.save(options.out, options.overwrite, _provenance(options.model, made))
    else:
        _lora(options, pipe)
    print(f"{options.format}: {options.out}")


def _check(options: Export) -> None:
    whole = options.format in ("single-file", "diffusers")
    if whole and (given := [n for n in ("base", "rank", "energy") if getattr(options, n) is not None]):
        raise BadInput(f"--{given[0]} is for a LoRA: choose --format lora, kohya or peft, or leave it out")
    if options.format in ("diffusers", "peft"):
        if options.out.suffix == ".safetensors":
            raise BadInput(f"--format {options.format} writes a folder: give --out a name without .safetensors")
    elif options.out.suffix != ".safetensors":
        raise BadInput(f"--format {options.format} writes a file: give --out a name that ends with .safetensors")


def _provenance(model: str, made: dict[str, Any]) -> dict[str, Any]:
    """How the model was made, as its own record says, and that it was exported."""
    from sfumato.pipeline import read_record

    before = read_record(model).get("provenance")
    return {**(before if isinstance(before, dict) else {}), "export": {**made, "model": model}}


def _lora(options: Export, pipe: Text2Image) -> None:
    from sfumato.pipeline.low_rank import as_low_rank, check_style, write_low_rank

    base = load(_base(options), options)
    check_style(base, options.format)
    edited = pipe.merged() if pipe.adapters else pipe
    energy = options.energy if options.energy is not None or options.rank is not None else 0.99
    low = as_low_rank(base, edited, options.rank, energy)
    if low.left:
        if options.strict:
            advice = "export a whole model, or leave them out with --no-strict"
            raise BadInput(f"the edit also changed {low.lost}: {advice}")
        print(f"left out: {low.lost}")
    drawn = _drawn(options, base, edited, low)
    errors = {"rank": str(options.rank), "energy": str(energy), "worst_layer": max(low.errors.values()), **drawn}
    write_low_rank(low, base, options.out, options.format, options.overwrite, {k: str(v) for k, v in errors.items()})
    ranks = low.ranks
    worst = sorted(low.errors, key=lambda name: -low.errors[name])
    rows = [(name, str(ranks[name]), f"{low.errors[name]:.2%}") for name in worst]
    show_table(("layer", "rank", "error, relative to the change"), rows)
    for name, value in drawn.items():
        print(f"{name.replace('_', ' ')}: {value:.4f} (mean absolute difference, pixels from 0 to 1)")


def _base(options: Export) -> str:
    """The model that was edited."""
    from sfumato.pipeline import read_record

    if options.base is not None:
        return options.base
    made = read_record(options.model).get("provenance")
    parent = made.get("parent") if isinstance(made, dict) else None
    named = parent.get("model") if isinstance(parent, dict) else None
    if not isinstance(named, str):
        raise BadInput(f"{options.model} does not say what it was made from: name the edited model with --base")
    return named


def _drawn(options: Export, base: Text2Image, edited: Text2Image, low: LowRank) -> dict[str, float]:
    """How far pictures drawn with the LoRA are from those of the edit, and for comparison those of the base."""
    from sfumato.pipeline import read_record
    from sfumato.pipeline.low_rank import picture_error, with_low_rank

    if not options.pictures:
        return {}
    made = read_record(options.model).get("provenance")
    configured = made.get("configuration") if isinstance(made, dict) else None
    named = configured.get("concepts") if isinstance(configured, dict) else None
    words = [str(word) for word in named] if isinstance(named, list) else []
    prompts = [*words, "", "a photo of a red house", "a painting", "a person"][: options.pictures]
    with_it = with_low_rank(base, low.factors)
    return {
        "pictures_lora_to_edit": picture_error(with_it, edited, prompts),
        "pictures_base_to_edit": picture_error(base, edited, prompts),
    }
