"""What each tab does, as the commands that do it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sfumato.errors import BadInput

from .child import LOOK
from .forms import lines, named
from .jobs import Step

Steps = Callable[[Path], Sequence[Step]]
"""The commands, given the job's folder."""


@dataclass(frozen=True)
class Drawing:
    """What is to be drawn: prompts, a line each, and the words of the options."""

    prompts: str
    options: tuple[str, ...] = ()

    def step(self, title: str, model: str, out: Path, command: Sequence[str] = ("sample",)) -> Step:
        """The command that draws it."""
        if not (told := lines(self.prompts)):
            raise BadInput("write at least one prompt, as in: a red star")
        first, last = named(told)
        args = [*command, *first, "--model", model, *self.options, "--out", str(out), *last]
        return Step(title, tuple(args), out)


def checked(step: Step) -> Step:
    """A step of a method, if its settings are what they should be: asked before anything is drawn.

    Raises:
        BadInput: as the command itself would say it.
    """
    from sfumato.commands import attack, erase, steer
    from sfumato.commands.verb import read

    verb, *rest = step.args
    options = {"steer": steer.Steer, "erase": erase.Erase, "attack": attack.Attack}[verb]
    _, method, chosen = read(verb, rest, options, f"sfumato {verb} {{name}}")
    if verb == "erase":
        erase.check_words(chosen.model, method.concepts)
    return step


def look(model: str) -> Steps:
    """Load a model and say what it is."""
    return lambda folder: [Step("load", (LOOK, model))]


def draw(model: str, drawing: Drawing) -> Steps:
    """Pictures."""
    return lambda folder: [drawing.step("drawn", model, folder / "pictures")]


def steer(method: str, options: Sequence[str], model: str, drawing: Drawing, beside: bool = True) -> Steps:
    """Pictures under a patch, and with ``beside`` the same seeds without it first."""

    def steps(folder: Path) -> list[Step]:
        patched = replace(drawing, options=(*drawing.options, *options, "--no-plain"))
        with_it = checked(patched.step(f"with {method}", model, folder / "steered", ("steer", method)))
        return [drawing.step("without", model, folder / "plain"), with_it] if beside else [with_it]

    return steps


def erase(method: str, options: Sequence[str], model: str, drawing: Drawing) -> Steps:
    """An erased model, and the same prompts and seeds drawn with the model before and after."""

    def steps(folder: Path) -> list[Step]:
        erased = folder / "model"
        args = ("erase", method, "--model", model, *options, "--out", str(erased))
        return [
            drawing.step("before", model, folder / "before"),
            checked(Step(f"erase with {method}", args, erased)),
            drawing.step("after", str(erased), folder / "after"),
        ]

    return steps


def attack(method: str, options: Sequence[str], model: str) -> Steps:
    """An attack on an erased model."""

    def steps(folder: Path) -> list[Step]:
        out = folder / "attack"
        args = ("attack", method, "--model", model, *options, "--out", str(out))
        return [checked(Step(f"attacked with {method}", args, out))]

    return steps


def audit(before: str, after: str, options: Sequence[str]) -> Steps:
    """The report of an audit."""

    def steps(folder: Path) -> list[Step]:
        out = folder / "report"
        return [Step("audit", ("audit", "--before", before, "--after", after, *options, "--out", str(out)), out)]

    return steps


def compare(first: str, second: str) -> Steps:
    """Two reports side by side."""
    if not first or not second:
        raise BadInput("choose two reports that audits wrote")

    def steps(folder: Path) -> list[Step]:
        out = folder / "comparison"
        return [Step("comparison", ("compare", first, second, "--out", str(out)), out)]

    return steps


def command(step: Step, number: int) -> str:
    """The line that does it again, in a folder of another name so that nothing is in its way."""
    if step.args[0] == LOOK:
        return shlex.join(["sfumato", "doctor", "--model", step.args[1]])
    args = list(step.args)
    if step.out is not None:
        args[args.index(str(step.out))] = f"{step.out.name}-{number:03d}-again"
    return shlex.join(["sfumato", *args])


def one_picture(step: Step, number: int, prompt: str, seed: str) -> str | None:
    """The line that draws one picture of a step again; None where a step does not draw prompts."""
    if step.args[0] not in ("sample", "steer") or not prompt:
        return None
    args = list(step.args)
    head = 1 if args[0] == "sample" else 2
    start = next(i for i in range(head, len(args)) if args[i] == "--model")
    options = args[start : args.index("--")] if "--" in args else args[start:]
    if "--seeds" in options:
        at = options.index("--seeds")
        del options[at : at + 2]
    first, last = named([prompt])
    again = [*args[:head], *first, *options, "--seeds", seed, *last]
    return command(replace(step, args=tuple(again)), number)
