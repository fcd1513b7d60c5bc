"""``sfumato jumps``: where the few steps of a model of tokens should be, and samples drawn along them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sfumato.commands.options import STEPS, parse
from sfumato.commands.sample import contact_sheet, read_seeds
from sfumato.errors import BadInput
from sfumato.fields import Count, Seed
from sfumato.files import GENERATED, atomic_folder, refuse_existing, save_png, write_json
from sfumato.plan import Plan
from sfumato.text import counted

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.sample import JumpSchedule

EXAMPLE = "sfumato jumps --model run/model --steps 16 --out jumps/"
HELD_OUT = 10**6
"""Added to the seed of the data that a model was trained on."""


@dataclass(frozen=True, kw_only=True)
class Jumps:
    """Options of the command."""

    model: Path
    """Folder of a model of tokens, such as `sfumato train discrete` writes."""
    out: Path
    """Folder for schedule.json and for samples along it, beside samples in as many equal steps."""
    schedule: Path | None = None
    """A schedule.json of this model, to draw along it without a search."""
    sampling_steps: Count = 16
    """The largest number of steps searched, a power of two, in which the samples are drawn too."""
    kind: Literal["euler", "tau_leaping", "k_gillespie"] | None = None
    """The sampler; by default the model's own."""
    terms: Literal["full", "official"] = "full"
    """What is maximised: the whole bound, or the term of it that the published code evaluates."""
    estimator: Literal["data", "path"] = "data"
    """How its expectation is estimated."""
    points: Count = 1024
    """Steps of the grid."""
    samples: Count = 64
    """Sequences that it is estimated on."""
    data: str | None = None
    """Where these come from; by default what the model was trained on, drawn anew."""
    seed: Seed = 42
    """Of the search."""
    seeds: str = "0-7"
    """Of the samples drawn, as in 7 or 0-3 or 1,5,9."""
    overwrite: bool = False
    """Replace the output if it exists."""


def main(args: list[str]) -> None:
    about = f"Example: {EXAMPLE}\n\nJump Your Steps, arXiv:2410.07761."
    options = Jumps(**parse("sfumato jumps", args, Jumps, about=about, aliases=STEPS)[0])
    seeds = read_seeds(options.seeds)
    refuse_existing(options.out, options.overwrite)

    from sfumato.pipeline import TokenModel, load

    model = load(options.model, "cpu")
    if not isinstance(model, TokenModel):
        raise BadInput(f"{options.model} is no model of tokens: `sfumato train discrete` makes one")
    work = "search" if options.schedule is None else "draw along a schedule"
    writes = [f"{options.out}/ (schedule.json, samples)"]
    Plan(f"{work}: {counted(options.sampling_steps, 'step')}", writes=writes).show()
    schedule = found(model, options)
    steps = options.sampling_steps
    ways: dict[str, dict[str, Any]] = {"searched": {"schedule": schedule}, "equal": {"scheduler": schedule.kind}}
    record = {"options": asdict(options), "model": model.describe(), "times": schedule.times(steps).tolist()}
    with atomic_folder(options.out, options.overwrite) as folder:
        schedule.save(folder / "schedule.json")
        for name, asked in ways.items():
            draw(model, folder, name, seeds, sampling_steps=steps, **asked)
        write_json(folder / "jumps.json", {**record, "source": GENERATED})
    told = ", ".join(f"{t:.3g}" for t in record["times"])
    print(f"{counted(steps, 'step')} ({schedule.kind}): {told}; written: {options.out}")


def found(model: Any, options: Jumps) -> JumpSchedule:
    """The schedule of the file, or a new one."""
    from sfumato.sample import JYS, JumpSchedule

    if options.schedule is not None:
        schedule = JumpSchedule.load(options.schedule, model.describe()["sha256"])
        schedule.times(options.sampling_steps)
        return schedule
    names = ("sampling_steps", "terms", "estimator", "points", "samples", "seed")
    given = {name: getattr(options, name) for name in names}
    method = JYS(kind=options.kind or model.defaults["scheduler"], **given)
    return model.search(material(model, options), method)


def material(model: Any, options: Jumps) -> Tensor:
    """Clean tokens that the model was not trained on, where its data can be drawn anew."""
    import torch

    from sfumato.data.characters import text_of
    from sfumato.data.pictures import open_pictures, to_tensor
    from sfumato.pipeline import read_record

    made = read_record(options.model).get("provenance")
    trained = made.get("config") if isinstance(made, dict) and isinstance(made.get("config"), dict) else {}
    source = options.data or trained.get("data")
    if not source:
        raise BadInput(f"{options.model} does not say what it was trained on: name its data with --data")
    rng = torch.Generator().manual_seed(options.seed)
    if model.defaults["symbols"]:
        text, length = text_of(source), model.shape[0]
        if len(text) < length:
            raise BadInput(f"{source!r} is no text of at least {length} characters: name one with --data")
        places = torch.randint(len(text) - length + 1, (options.samples,), generator=rng).tolist()
        return model.read([text[i : i + length] for i in places])
    pictures = open_pictures(source, model.size, seed=int(trained.get("seed", 0)) + HELD_OUT, count=options.samples)
    rows = torch.randperm(len(pictures), generator=rng)[: options.samples].tolist()
    with torch.no_grad():
        return model.encode_image(to_tensor([pictures.picture(i) for i in rows]))


def draw(model: Any, folder: Path, name: str, seeds: list[int], **asked: Any) -> None:
    """Samples as a contact sheet, or as a text with one on a line."""
    if model.defaults["symbols"]:
        lines = "".join(f"{text!r}\n" for text in model.write(seeds, **asked))
        (folder / f"{name}.txt").write_text(lines, encoding="utf-8")
        return
    pictures = (model.draw(None, seeds, **asked).permute(0, 2, 3, 1).numpy() * 255).round().astype("uint8")
    save_png(folder / f"{name}.png", contact_sheet(pictures, min(8, len(pictures))), {"seeds": seeds})
