"""Erasers by what happens to models afterwards, on an embedded model: docs/results/composition.md.

    python scripts/compositions.py --work bench       # hours; killed? the same command goes on where it stopped
    python scripts/compositions.py --work bench --only page

Cells are kept in docs/results/composition/ without their pages, so that the bench can be gone on with there.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path

from PIL import Image

from commands import run
from erasure import EACH, ROOT, Rows, cells_of, decoded, gone_on, keep_cells, sheet, table
from sfumato.bench.erase import CELL

NAME = "composition"
COMMAND = "sfumato bench compose --methods {} --concepts {} --seeds 1 --n 32 --n-retain 2 --out composition/"
METHODS = ("uce", "rece", "esd-x", "esd-u", "spm", "trce", "kpop", "surgical")
SQUARE = re.compile(r"(?P<erased>.*) \(kept (?P<kept>.*?); \d+ cells?(?P<broken>; broken in \d+)?\)")


def pictures(html: str, stages: int) -> list[list[Image.Image]]:
    """The first pictures of an audit's page, of the original and of each stage."""
    data = re.findall(r'<img[^>]*base64,([A-Za-z0-9+/=]+)"', html)
    shown = len(data) // (1 + stages)
    return [[decoded(d) for d in data[i * shown : i * shown + EACH]] for i in range(1 + stages)]


def squares(printed: str) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """(header, rows of what is erased, rows of what is kept) of the table that the command writes."""
    header, *rows = cells_of(printed)
    gone = lambda m: f"**{m['erased']}**" if m["broken"] else m["erased"]
    each = lambda cells, say: [say(m) if (m := SQUARE.fullmatch(cell)) else cell for cell in cells]
    kept = [[method, *each(cells, lambda m: m["kept"])] for method, *cells in rows]
    return header, [[method, *each(cells, gone)] for method, *cells in rows], kept


def page(printed: str, reproduce: str, told: dict, concepts: str) -> str:
    """What is said of a bench, with the table that the command wrote."""
    header, erased, kept = squares(printed)
    return "\n".join([
        "# What happens to erased models afterwards",
        "",
        f"Erased from the embedded pipeline: {concepts}; seed {', '.join(map(str, told['seeds']))}; {told['n']} "
        f"pictures of the concept, {told['sampling_steps']} steps, read by both oracles ([of one]"
        "(../oracle.md), [of three](../scenes.md)). Every method runs with its preset for this model. Each thing "
        "happens to the erased model by itself, as `sfumato audit --compose` does it.",
        "",
        "Share of pictures asked for the concept in which it is not found [95 % interval]; bold where that broke the "
        "erasure, which is where the intervals before and after are apart:",
        "",
        table(header, erased),
        "",
        "Share of other concepts that are still drawn:",
        "",
        table(header, kept),
        "",
        f"![The first pictures of every method after each link]({NAME}/afterwards.png)",
        "",
        "The first pictures asked for the concept; in the first row the model before any edit.",
        "",
        "What a LoRA of a given rank cannot hold is lost with it, and what it holds best is the largest change, not "
        "the one that erases: without a rank, `sfumato export --format lora` takes what `--energy` asks for, and "
        "`sfumato audit ... --compose \"export lora --rank 16\"` tries one.",
        "",
        f"The whole page: [{NAME}/index.html]({NAME}/index.html) (opens from disk), "
        f"[fates.json]({NAME}/fates.json). The cells' own pages are made by the command and not kept here.",
        "",
        "```",
        reproduce,
        "```",
        "",
    ])  # fmt: skip


def write(work: Path, docs: Path, command: str) -> None:
    """The page, its picture, and the cells without theirs."""
    report = json.loads((work / NAME / "fates.json").read_text())
    first, links, target = report["fates"][0], report["links"], docs / "results" / NAME
    file = target / "fates.json"
    shown = lambda fate: (fate["concepts"], fate["seed"]) == (first["concepts"], first["seed"])
    seen: Rows = {}
    for fate in filter(shown, report["fates"]):
        if fate["page"]:
            stages = [f["link"] for f in report["fates"] if f["page"] == fate["page"] and f["figures"]]
            before, *after = pictures((work / NAME / fate["page"]).read_text(), len(stages))
            seen.setdefault("none", {links[0]: before})
            seen[fate["method"]] = dict(zip(stages, after, strict=True))
    target.mkdir(parents=True, exist_ok=True)
    if seen:
        there = json.loads(file.read_text())["fates"] if file.exists() else []
        methods = dict.fromkeys(["none", *(fate["method"] for fate in filter(shown, there))])
        rows = gone_on(seen, target / "afterwards.png", list(methods), links)
        sheet(rows, links).quantize().save(target / "afterwards.png", optimize=True)
    cells = {Path(fate["page"]).parent for fate in report["fates"] if fate["page"]}
    keep_cells(work / NAME, target, cells, [CELL, "report.json"])
    run(command, docs / "results")  # nothing is left to measure there: it writes the page and the figures
    made = json.loads((target / "fates.json").read_text())
    sets = [" and ".join(f["concepts"]) for f in made["fates"]]
    concepts = ", ".join(f"“{name}”" for name in dict.fromkeys(sets))
    text = page((target / "table.md").read_text(), made["reproduce"], made["configuration"], concepts)
    (docs / "results" / f"{NAME}.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the bench, kept")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--concepts", nargs="+", default=["fish"])
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--only", choices=("bench", "page"), help="by default both")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    command = COMMAND.format(shlex.join(args.methods), shlex.join(args.concepts))
    if args.only != "page":
        run(command, args.work)
    if args.only != "bench":
        write(args.work, args.docs, command)


if __name__ == "__main__":
    main()
