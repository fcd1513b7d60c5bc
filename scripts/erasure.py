"""Every eraser under every attack, on an embedded model: docs/results/erasure.md, and the table of `choose erase`.

    python scripts/erasure.py --work bench       # hours; killed? the same command goes on where it stopped
    python scripts/erasure.py --work bench --only page
    python scripts/erasure.py --work bench --model sketch-dit --concepts fish        # docs/results/erasure-dit.md

Cells are kept in docs/results/erasure/ without their pages and pictures, so that the bench can be gone on with there.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import shlex
import shutil
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from commands import run
from sfumato.bench.erase import CELL, CONFIGURATION
from sfumato.report import measured
from sfumato.report.words import MISSING, percent

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "sfumato bench erase{} --concepts {} --seeds 1 --n 32 --n-retain 2 --n-attack 12 --detector world --out {}/"
MODELS = {"sketch": "the embedded pipeline", "sketch-dit": "the embedded transformer"}
PRESETS = {
    "sketch": "Every method runs with its preset for this model; of each that has settings to try, [as many were tried]"
    "(tuning.md) on other concepts. DUO's preset was chosen by “fish” and “red” too, at other seeds.",
    "sketch-dit": "Presets are those of the embedded U-Net: nothing was tuned on this model, and what hardly erases "
    "here may want other settings before it says anything of a method.",
}
EACH, SIDE, LEFT, TOP = 3, 64, 96, 18
"""Pictures of a kind in the sheet; pixels of a picture, of the methods' names, and of the attacks'."""
COLUMNS = ("method", "erased", "withstands", "kept near", "kept far", "alignment", "time", "cells")
"""Of the bench's own table, those of the first one here; the second has what each attack recovers."""
Rows = dict[str, dict[str, list[Image.Image]]]
"""Pictures by method and kind."""


def decoded(data: str) -> Image.Image:
    """A picture of a page, from its base64."""
    return Image.open(BytesIO(base64.b64decode(data))).convert("RGB")


def cells_of(printed: str) -> list[list[str]]:
    """Header and rows of a table in Markdown."""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    return [[c.strip() for c in line.strip("| ").split("|")] for i, line in enumerate(lines) if i != 1]


def keep_cells(source: Path, target: Path, cells: Iterable[Path], names: Sequence[str]) -> None:
    """Copy the configuration and these cells' files of a bench, in the place of those of the same in ``target``."""
    def measured_in(cell: Path) -> tuple[Any, ...]:
        told = json.loads((cell / CELL).read_text())
        return told["method"], told["concepts"], told["seed"]

    new = {cell: measured_in(source / cell) for cell in cells}
    for path in list(target.glob("cells/*")):
        if measured_in(path) in new.values():
            shutil.rmtree(path)
    for cell in new:
        (target / cell).mkdir(parents=True)
        for name in names:
            shutil.copy(source / cell / name, target / cell / name)
    shutil.copy(source / CONFIGURATION, target / CONFIGURATION)


def pictures(html: str) -> dict[str, list[Image.Image]]:
    """The first pictures of an audit's page: "original", "plain" and what each attack drew of the edited model."""
    found: dict[str, list[Image.Image]] = {}
    for block in html.split("<caption>")[1:]:
        kinds = {"original": "original model, plain prompt", "plain": "edited model, plain prompt"}
        kinds[block.split(" <span>")[0]] = "edited model, under attack"
        for kind, said in kinds.items():
            data = re.findall(rf'base64,([A-Za-z0-9+/=]+)" width="\d+" height="\d+" alt="{said}, picture', block)
            if data and kind not in found:
                found[kind] = [decoded(d) for d in data[:EACH]]
    return found


def place(row: int, column: int, i: int = 0) -> tuple[int, int]:
    """Where in a sheet a kind's picture is, in pixels."""
    return LEFT + column * (EACH * SIDE + 8) + i * SIDE, TOP + row * SIDE


def sheet(rows: Rows, kinds: Sequence[str]) -> Image.Image:
    """A row a method, ``EACH`` pictures of each kind."""
    made = Image.new("RGB", place(len(rows), len(kinds)), "white")
    pen, font = ImageDraw.Draw(made), ImageFont.load_default(12)
    for column, kind in enumerate(kinds):
        pen.text((place(0, column)[0], 2), kind, "black", font)
    for row, (name, seen) in enumerate(rows.items()):
        pen.text((2, TOP + row * SIDE + SIDE // 2 - 8), name, "black", font)
        for column, kind in enumerate(kinds):
            for i, picture in enumerate(seen.get(kind, ())):
                made.paste(picture.resize((SIDE, SIDE)), place(row, column, i))
    return made


def gone_on(rows: Rows, made: Path, before: Sequence[str], kinds: Sequence[str]) -> Rows:
    """These rows, and the others as they are in the sheet ``made`` of ``before``."""
    if not made.exists() or not set(before) - set(rows):
        return rows
    with Image.open(made) as old:
        full = old.convert("RGB")
    cut = lambda x, y: full.crop((x, y, x + SIDE, y + SIDE))
    kept = {
        name: {kind: [cut(*place(row, column, i)) for i in range(EACH)] for column, kind in enumerate(kinds)}
        for row, name in enumerate(before)
    }
    return {**kept, **rows}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    line = lambda cells: "| " + " | ".join(cells) + " |"
    return "\n".join([line(header), line(["---", *["---:"] * (len(header) - 1)]), *map(line, rows)])


def page(bench: dict[str, Any], printed: str, concept: str, name: str) -> str:
    """What is said of a bench, with the tables that the command printed."""
    (header, *rows), told = cells_of(printed), bench["configuration"]
    attacks = [name for name in header if name.startswith("recovered: ")]
    pick = lambda names: [[row[header.index(name)] for name in names] for row in rows]
    sets = [" and ".join(c["concepts"]) for c in bench["cells"] if c["figures"]]
    refused = [f"- {row['method']}: {why}" for row in bench["methods"] for why in row["why"]]
    found = [c["figures"]["attacks"] for c in bench["cells"] if c["figures"]]
    floor = {name: [one[name]["control"]["rate"] for one in found if one[name]["control"]] for name in found[0]}
    control = [percent(sum(shares) / len(shares)) if shares else MISSING for shares in floor.values()]
    return "\n".join([
        f"# Erasers under attack, on {MODELS[told['model']]}",
        "",
        f"Erased, each by itself: {', '.join(f'“{one}”' for one in dict.fromkeys(sets))}; seed "
        f"{', '.join(map(str, told['seeds']))}; {told['n']} pictures of the concept, {told['n_attack']} under each "
        f"attack, {told['sampling_steps']} steps, read by both oracles ([of one object](../oracle.md), [of three]"
        f"(../scenes.md)). {PRESETS[told['model']]}",
        "",
        table(COLUMNS, pick(COLUMNS)),
        "",
        "*erased*: share of pictures asked for the concept in which it is not found. *withstands*: the same under the "
        "attack that does best of those that leave the weights as they are. *kept*: share of other words that are "
        "still drawn, those of the same kind as the concept (near) and the others (far). *alignment*: share of what "
        "retained prompts ask for that is there, after the edit less before it. *time*: of the edit, two at a time on "
        "two cores, not of the same machine for all: a factor of two tells nothing. Means over cells; in brackets, "
        "where there are several, 95 % intervals for concepts like these, by Student's t: three tell little of others.",
        "",
        "What each attack recovers, in per cent of pictures; `recovery` trains the erased model on, on eight pictures:",
        "",
        table(
            ["method", *(name.removeprefix("recovered: ") for name in attacks)],
            [*pick(["method", *attacks]), ["*control*", *control]],
        ),
        "",
        "*control*: the same effort on the erased models without knowledge of the concept, mean over all cells. What "
        "does not exceed it is no merit of the attack: any other words around its name bring the concept back as "
        f"often. Of {told['n_attack']} pictures one is "
        f"{percent(1 / told['n_attack'])}: small differences tell nothing. Each cell's audit has the intervals.",
        "",
        f"![Pictures of every method, plain and under each attack]({name}/attacked.png)",
        "",
        f"The first pictures asked for “{concept}”, plainly and under each attack; in the first row the model before "
        "any edit.",
        "",
        *([*refused, ""] if refused else []),
        f"The whole page, sortable, with a plot and every cell's figures: [{name}/index.html]({name}/index.html) "
        f"(opens from disk), [bench.json]({name}/bench.json). The cells' own audits, two megabytes each, are made by "
        "the command and not kept here.",
        "",
        "```",
        bench["reproduce"],
        f"sfumato bench table --bench {name}/ --out erasure.json",
        "```",
        "",
    ])  # fmt: skip


def write(work: Path, docs: Path, command: str, name: str) -> None:
    """The page, its picture, the cells without theirs, and the package's table."""
    bench = json.loads((work / name / "bench.json").read_text())
    have = [c for c in bench["cells"] if c["figures"]]
    concepts, target = have[0]["concepts"], docs / "results" / name
    shown = lambda cell: cell["figures"] and (cell["concepts"], cell["seed"]) == (concepts, have[0]["seed"])
    seen: Rows = {}
    for cell in filter(shown, have):
        if cell["audit"]:
            found = pictures((work / name / cell["audit"]).read_text())
            seen.setdefault("none", {"plain": found["original"]})
            seen[cell["method"]] = found
    kinds, file = ["plain", *have[0]["figures"]["attacks"]], target / "bench.json"
    target.mkdir(parents=True, exist_ok=True)
    if seen:
        there = json.loads(file.read_text())["cells"] if file.exists() else []
        before = ["none", *(cell["method"] for cell in filter(shown, there))]
        rows = gone_on(seen, target / "attacked.png", before, kinds)
        sheet(rows, kinds).quantize().save(target / "attacked.png", optimize=True)
    keep_cells(work / name, target, [Path(c["audit"]).parent for c in have if c["audit"]], [CELL])
    run(command, docs / "results")  # nothing is left to measure there: it writes the page and the figures
    bench = json.loads((target / "bench.json").read_text())
    text = page(bench, (target / "table.md").read_text(), " and ".join(concepts), name)
    (docs / "results" / f"{name}.md").write_text(text)
    if bench["configuration"]["model"] == "sketch":
        measured.make(work / name, ROOT / measured.FILE.relative_to(Path(measured.__file__).parents[3]), overwrite=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the bench, kept")
    parser.add_argument("--model", choices=sorted(MODELS), default="sketch")
    parser.add_argument("--concepts", nargs="+", default=["fish", "red", "chalk"])
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--only", choices=("bench", "page"), help="by default both")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    # The default has no name here: by their settings its cells are known.
    model, name = ("", "erasure") if args.model == "sketch" else (f" --model {args.model}", f"erasure-{args.model[7:]}")
    command = COMMAND.format(model, shlex.join(args.concepts), name)
    if args.only != "page":
        run(command, args.work)
    if args.only != "bench":
        write(args.work, args.docs, command, name)


if __name__ == "__main__":
    main()
