"""Classifiers, judged explanations and a search for nets, on handwritten digits: docs/results/judges.md.

    python scripts/judges.py --work judges       # killed? the same command goes on where it stopped
    python scripts/judges.py --work judges --only page

The page shows the very commands that are run, in one folder, and what they print; the methods' own pages are copied
beside it.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from commands import output, run
from digits import split
from sfumato.files import GENERATED, contact_sheet, save_png
from sfumato.pipeline import load

DATA = "--data digits/train.parquet --test digits/test.parquet"
SIDE_16 = "--preset small-run --size 16"
CLASSIFIERS = {
    "plain": "--size 16 --updates 600",
    "tract": "--size 16 --updates 600",
    "sla": f"{SIDE_16} --widths 16 32 64 --updates 600",
    "iformer": "--preset small-pictures --updates 600",
    "inception-v4": "--preset small-pictures --updates 600",
    "projection-head": "--size 16 --updates 600",
    "prototype-net": "--preset small-run",
    "prob-psenn": "--preset small-run",
}
SEARCH = (
    "sfumato train eagan --preset small-sketch --data digits/train.parquet --population 6 --rounds 3 "
    "--search-warmup 60 --round-updates 20 --samples 200 --updates 400 --out eagan/"
)
COMMANDS = [
    *(f"sfumato classify {name} {options} {DATA} --out {name}/" for name, options in CLASSIFIERS.items()),
    "sfumato train sid2 --preset small-digits --data digits/train.parquet --updates 1500 --out sid2/",
    "sfumato classify plain --size 8 --updates 600 --data digits/train.parquet --test digits/test.parquet "
    "--out judged/",
    "sfumato explain goar --classifier judged/model --projector sid2/model --data digits/train.parquet --updates 150 "
    "--attributions gradient integrated-gradients random --strengths 0.2 0.4 0.8 --out goar/",
    "sfumato explain goar --preset roar --classifier judged/model --data digits/train.parquet --updates 150 "
    "--attributions gradient integrated-gradients random --strengths 0.3 0.6 0.9 --out roar/",
    SEARCH,
]
PAGES = {
    "prototype-net": ("prototype-net/index.html", "Prototypes", 80),
    "prob-psenn": ("prob-psenn/index.html", "Prototypes", 90),
    "goar": ("goar/index.html", "Damaged pictures", 40),
    "roar": ("roar/index.html", "Damaged pictures", 40),
    "eagan": ("eagan/search/index.html", "", 0),
}
"""The methods' pages, and the part of each whose first pictures are shown, and how many."""
EACH_FIVE = (
    "Fives of a picture, an attribution of it (by gradient, then by integrated-gradients), and it at each strength."
)


def run_all(work: Path) -> None:
    """All commands, on digits that are split first; what has ended is not run again."""
    split(work / "digits")
    for command in COMMANDS:
        folder = work / output(command)
        if not ((folder / "model").exists() or (folder / "index.html").exists()):
            run(command, work)


def pictures(html: str, heading: str, most: int) -> list[np.ndarray]:
    """The first pictures behind a heading of a page."""
    rest = html[html.index(f"{heading}</") :] if heading in html else ""
    found = re.findall(r'<img[^>]*src="data:image/\w+;base64,([^"]+)"', rest)[:most]
    return [np.asarray(Image.open(BytesIO(base64.b64decode(data))).convert("RGB")) for data in found]


def shown(name: str, tiles: np.ndarray, docs: Path, columns: int) -> str:
    """Write a sheet beside the page; its Markdown."""
    sheet = contact_sheet(tiles, columns, gap=2, side=48)
    save_png(docs / "judges" / f"{name}.png", sheet, {"Source": GENERATED}, overwrite=True)
    return f"![{name}](judges/{name}.png)"


def scored(folder: Path) -> list[str]:
    """Rows of a table: each attribution's score."""
    figures = json.loads((folder / "figures.json").read_text())["figures"]["attributions"]
    rows = []
    for name, found in figures.items():
        score = found["score"]
        told = f"[{score['low']:.1f}, {score['high']:.1f}]" if score["low"] is not None else ""
        rows.append(f"| {name} | {score['value']:.1f} {told} |")
    return ["| attribution | score [95 %] |", "| --- | --- |", *rows]


def page(work: Path, docs: Path) -> str:
    """The page; sheets and the methods' pages go beside it."""
    (docs / "judges").mkdir(parents=True, exist_ok=True)
    rows, sheets = [], {}
    for name in CLASSIFIERS:
        card = json.loads((work / name / "model" / "card.json").read_text())
        right = card["top1"]
        low, high = right["low"], right["high"]
        rows.append(f"| [{name}](../methods/{name}.md) | {right['value']:.1%} [{low:.1%}, {high:.1%}] |")
    for name, (file, heading, most) in PAGES.items():
        shutil.copyfile(work / file, docs / "judges" / f"{name}.html")
        if heading and (tiles := pictures((work / file).read_text(encoding="utf-8"), heading, most)):
            side = max(len(x) for x in tiles)
            same = [np.asarray(Image.fromarray(x).resize((side, side), Image.Resampling.NEAREST)) for x in tiles]
            sheets[name] = shown(name, np.stack(same), docs, 10)
    model = load(str(work / "eagan" / "model"))
    drawn = (model.draw(None, range(40)).permute(0, 2, 3, 1) * 255).round().byte().numpy()
    sheets["eagan"] = shown("eagan", drawn, docs, 10)
    link = lambda name, what: f"[{what}](judges/{name}.html) (opens from disk)"
    return "\n".join([
        "# Classifiers, judged explanations, a search: on digits",
        "",
        "scikit-learn's handwritten digits, every fifth of them to measure with (`scripts/digits.py`). "
        "`scripts/judges.py` ran the commands at the end and made this page. One seed and short runs: they show that "
        "the methods work on real pictures; for comparisons with intervals over seeds see [the ledger](../ledger.md).",
        "",
        "| classifier | right [95 %] |",
        "| --- | --- |",
        *rows,
        "",
        "## Prototypes",
        "",
        f"From {link('prototype-net', 'the page of prototype-net')}:",
        "",
        sheets.get("prototype-net", ""),
        "",
        "## Prototypes that are distributions, and doubts",
        "",
        f"From {link('prob-psenn', 'the page of prob-psenn')}:",
        "",
        sheets.get("prob-psenn", ""),
        "",
        "## Explanations, judged",
        "",
        f"GOAR ({link('goar', 'its page')}) moves pictures against an attribution and projects them with a diffusion "
        "model of the same digits:",
        "",
        *scored(work / "goar"),
        "",
        EACH_FIVE,
        "",
        sheets.get("goar", ""),
        "",
        f"ROAR ({link('roar', 'its page')}) takes values out:",
        "",
        *scored(work / "roar"),
        "",
        EACH_FIVE,
        "",
        sheets.get("roar", ""),
        "",
        "## Generators, searched",
        "",
        "What the nets draw that were found, the first seeds, not selected; "
        f"{link('eagan', 'the fronts by generation')}:",
        "",
        sheets["eagan"],
        "",
        "## Commands",
        "",
        "```",
        *COMMANDS,
        "```",
        "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("judges"), help="where the commands run")
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    parser.add_argument("--only", choices=("run", "page"))
    args = parser.parse_args()
    if args.only != "page":
        run_all(args.work)
    if args.only != "run":
        torch.manual_seed(0)
        (args.docs / "judges.md").write_text(page(args.work, args.docs), encoding="utf-8")


if __name__ == "__main__":
    main()
