"""``sfumato attack METHOD``: try to bring an erased concept back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.commands.erase import check_words
from sfumato.commands.verb import Equipped, beside, load, load_equipped, origin, read
from sfumato.errors import BadInput
from sfumato.fields import Count
from sfumato.files import refuse_existing
from sfumato.plan import human_time
from sfumato.text import counted

if TYPE_CHECKING:
    from sfumato.attack.base import Found
    from sfumato.data.cases import AttackCases
    from sfumato.metrics.detectors import Detector
    from sfumato.pipeline import Text2Image

EXAMPLE = "sfumato attack {name} --model erased/ --concept star --out attack/"


@dataclass(frozen=True, kw_only=True)
class Attack(Equipped):
    """Options of the verb."""

    model: str
    """The erased pipeline."""
    original: str | None = None
    """The pipeline before erasure, which draws pictures of the concept for attacks that learn from some, and whose
    predictions or text encoder others compare with; by default, without ``images``, the embedded model that the erased
    one was made from, where its record says so."""
    images: Path | None = None
    """A folder of pictures of the concept to learn from, in place of those that the original draws."""
    concept: str
    """The erased concept."""
    prompts: tuple[str, ...] = ()
    """Prompts with {concept} in them that are to show it again; by default four plain ones, or the sketch world's."""
    n: Count = 8
    """Pictures to bring back: the prompts in turn, another seed each."""
    detector: str | None = None
    """Who says whether they show it, as for `sfumato audit`; by default the oracles for models of the sketch world,
    and nobody for others."""
    retain: tuple[str, ...] = ()
    """Other concepts that pictures may show, for detectors that tell one from others, such as a CLIP."""
    out: Path = Path("attack")
    """Folder for the attack's pictures and its record."""
    overwrite: bool = False
    """Replace the output if it exists."""


def main(args: list[str]) -> None:
    from sfumato.attack.parts.outcome import shown_plainly
    from sfumato.attack.parts.spending import Spending

    entry, method, options = read("attack", args, Attack, EXAMPLE)
    refuse_existing(options.out, options.overwrite)
    if not options.concept.strip():
        raise BadInput("name the concept to attack, as in --concept star")
    before = options.original or (origin(options.model) if options.images is None else None)
    if before is not None:
        check_words(before, (options.concept,))
    if options.offload == "sequential":
        raise BadInput("attacks need whole parts of a model: use --offload model")
    erased = load_equipped(options.model, options)
    original = None if before is None else load(before, options)
    cases, judge = _given(options, original or erased, method.seed)
    method.check(erased, cases)
    if cases.pictures is None and method.learns_from and original is None:
        raise BadInput(f"{entry.name} learns from pictures of the concept: give --original MODEL, or --images FOLDER")
    with beside(options.out, method) as folder:
        until = [f"{folder}/ (until then: checkpoints)"] if folder else []
        writes = [f"{options.out}/ (pictures and attack.json)", *until]
        replace(method.plan(erased, cases), writes=writes).show()
        spent = Spending()
        with spent.counting(erased, *(() if original is None else (original,))):
            found = method.run(erased, cases, judge=judge, original=original, folder=folder)
        if judge is not None and found.before is None:
            found.before = shown_plainly(erased, cases, judge)
        pictures = found.draw(erased, cases.prompts, cases.seeds, progress=True)
        seen = None if judge is None else judge(pictures, cases.concept).present.tolist()
        told = [
            {"prompt": case.prompt, "seed": case.seed, "shows it": None if seen is None else seen[i]}
            for i, case in enumerate(cases.cases)
        ]
        apart = _outcome(found, seen, method.seed)
        about = {"pictures": told, "seconds": spent.seconds, "rows": spent.rows}
        about |= {} if apart is None else {"outcome": apart}
        found.save(options.out, pictures, about, options.overwrite)
    verdict = "" if seen is None else f"; {cases.concept!r} is seen in {sum(seen)} of {counted(len(seen), 'picture')}"
    verdict += "" if found.before is None else f" (before the attack: in {sum(found.before)})"
    took = f"in {human_time(spent.seconds)} and {counted(spent.rows, 'row')} through the network"
    print(f"{entry.name} against {options.model} {took}: {options.out}{verdict}")
    print("`sfumato audit` tells how often it succeeds, against a control and the original")


def _outcome(found: Found, seen: list[bool] | None, seed: int) -> dict[str, Any] | None:
    """Success before the attack and by it, with intervals; None where nobody judged."""
    import torch

    from sfumato.attack.parts.outcome import outcome
    from sfumato.audit.measures import interval

    if seen is None or found.before is None:
        return None
    apart = outcome(torch.tensor(found.before), torch.tensor(seen), torch.Generator().manual_seed(seed))
    return {name: interval(x).to_json() for name, x in vars(apart).items()}


def _given(options: Attack, pipe: Text2Image, seed: int) -> tuple[AttackCases, Detector | None]:
    """What the attack is given, and who judges it."""
    from sfumato.attack.parts.files import read_pictures
    from sfumato.audit.asked import cases_for
    from sfumato.data.cases import AttackCases, check_concepts, check_retained, template_cases
    from sfumato.metrics.detectors import detector_for

    concept, prompts = options.concept.strip(), options.prompts or None
    if options.detector is None and not pipe.vocabulary:
        judge, cases = None, template_cases((concept,), (), prompts, options.n, 1, seed)
    else:
        others = check_retained(options.retain)
        check_concepts((concept,), others)
        judge = detector_for(pipe.vocabulary, options.detector, (concept, *others))
        cases = cases_for(judge, (concept,), (), prompts, options.n, 1, seed)
    pictures = None if options.images is None else read_pictures(options.images, pipe.size)
    return AttackCases(concept, cases.targets[concept], pictures), judge
