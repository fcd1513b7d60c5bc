"""``sfumato attack METHOD``: try to bring an erased concept back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sfumato.commands.erase import check_words, plan
from sfumato.commands.verb import Equipped, beside, load, load_equipped, read
from sfumato.errors import BadInput
from sfumato.files import refuse_existing

EXAMPLE = "sfumato attack {name} --model erased/ --concept star --out attack/"


@dataclass(frozen=True, kw_only=True)
class Attack(Equipped):
    """Options of the verb."""

    model: str
    """The erased pipeline."""
    original: str = "sketch"
    """The pipeline before erasure, which draws pictures of the concept for attacks that learn from some."""
    images: Path | None = None
    """A folder of pictures of the concept to learn from instead."""
    concept: str
    """The erased concept."""
    out: Path = Path("attack")
    """Folder for the attack's pictures and its record."""
    overwrite: bool = False
    """Replace the output if it exists."""


def main(args: list[str]) -> None:
    entry, method, options = read("attack", args, Attack, EXAMPLE)
    refuse_existing(options.out, options.overwrite)
    if not options.concept.strip():
        raise BadInput("name the concept to attack, as in --concept star")
    if options.images is None:
        check_words(options.original, (options.concept,))
    erased = load_equipped(options.model, options)
    original = load(options.original, options) if options.images is None else None
    with beside(options.out, method) as folder:
        until = [f"{folder}/ (until then: checkpoints)"] if folder else []
        plan(entry, method, erased, [options.concept], [f"{options.out}/ (pictures and attack.json)", *until]).show()
        found = method.run(erased, options.concept, images=options.images, original=original, folder=folder)
        found.save(options.out, overwrite=options.overwrite)
    print(f"{entry.name} against {options.model}: {options.out}; `sfumato audit` tells how often it succeeds")
