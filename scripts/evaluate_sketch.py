"""How well the embedded pipeline draws, by the oracle: writes docs/model.md and its picture.

    python scripts/evaluate_sketch.py --model sketch --n 2048
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sfumato.data import oracle as oracles
from sfumato.data import sketch
from sfumato.data.cases import balanced
from sfumato.data.world import WORDS
from sfumato.metrics.bootstrap import wilson
from sfumato.pipeline import load, read_record
from sfumato.train.parent import chain
from sfumato.train.t2i import TrainT2I

BARS = {"object": 0.985, "colour": 0.985, "background": 0.985, "style": 0.97}


def commands(made: dict[str, Any]) -> list[str]:
    """The command lines that made a pipeline, the first one first, from its record's chain of parents.

    Options that the recipe has gained since are left at their defaults. Where a run was not what its command
    says (stopped early, say), its record's note stands behind it.
    """
    standard = {f.name: f.default for f in fields(TrainT2I)}
    lines = []
    for number, step in enumerate(chain(made), start=1):
        words = ["sfumato", "train", "t2i", "--data", step["config"]["data"], "--out", f"run{number}/"]
        for name, value in step["config"].items():
            value = tuple(value) if isinstance(value, list) else value
            if name == "data" or value == standard.get(name, value):
                continue
            if name == "start_from" and number > 1:
                value = f"run{number - 1}/pipeline"
            words += ["--" + name.replace("_", "-"), *map(str, value if isinstance(value, tuple) else (value,))]
        note = f"  # {step['note']}" if step.get("note") else ""
        lines.append(shlex.join(words) + note)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sketch")
    parser.add_argument("--n", type=int, default=2048)
    parser.add_argument("--sampling-steps", "--steps", type=int, default=25)
    parser.add_argument("--cfg-scale", type=float, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--docs", type=Path, help="write model.md and model.png there; without it, only print")
    args = parser.parse_args()

    pipe, rng = load(args.model), torch.Generator().manual_seed(args.seed)
    asked = {a: balanced(words, args.n, rng) for a, words in WORDS.items()}
    prompts = [sketch.prompt(**{a: asked[a][i] for a in WORDS}) for i in range(args.n)]
    began = time.perf_counter()
    pictures = pipe.draw(
        prompts, range(args.n), sampling_steps=args.sampling_steps, cfg_scale=args.cfg_scale, batch=64, progress=True
    )
    seconds = time.perf_counter() - began
    read = oracles.load()(pictures)
    rows, right = [], {}
    for a in WORDS:
        words = oracles.WORDS[a]
        found = [words[i] for i in read[a].argmax(dim=1)]
        right[a] = torch.tensor([f == w for f, w in zip(found, asked[a], strict=True)])
        by_word = {w: right[a][[x == w for x in asked[a]]].float().mean().item() for w in WORDS[a]}
        worst = min(by_word, key=by_word.get)
        hits = int(right[a].sum())
        low, high = wilson(hits, args.n)
        rows.append(
            f"| {a} | {hits / args.n:.2%} [{low:.2%}, {high:.2%}] | {BARS[a]:.1%} | {worst}: {by_word[worst]:.1%} |"
        )
    table = ["| read off | right [95 %] | aim | least right |", "| --- | --- | --- | --- |", *rows]
    print("\n".join(table))
    if not args.docs:
        return
    folder = Path(pipe.pipe.config._name_or_path)
    made = read_record(args.model)["provenance"]
    size = sum(f.stat().st_size for f in folder.rglob("*.safetensors")) / 1e6
    about = pipe.describe()
    text = [
        "# The embedded pipeline",
        "",
        f"`sf.load(\"sketch\")`: a `StableDiffusionPipeline` of {size:.1f} MB in safetensors, trained on the "
        "[sketch world](sketch.md). Every command of its making, the first one first:",
        "",
        "```",
        *commands(made),
        "```",
        "",
        f"Read by the [oracle](oracle.md) on {args.n} balanced prompts, {args.sampling_steps} steps, guidance "
        f"{args.cfg_scale or pipe.defaults['cfg_scale']:g}, one seed each ({seconds:.0f} s of sampling; "
        f"`python scripts/evaluate_sketch.py --n {args.n} --docs docs`):",
        "",
        *table,
        "",
        "![Samples at four times their size](model.png)",
        "",
        "The first pictures of the same run, in order, not selected.",
        "",
        "```json",
        json.dumps({"recipe": made["config"], "describe": about}, indent=1, default=str),
        "```",
        "",
    ]
    (args.docs / "model.md").write_text("\n".join(text))
    rows = [torch.cat(list(pictures[i : i + 6]), dim=2) for i in range(0, 18, 6)]
    sheet = (torch.cat(rows, dim=1) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(sheet).resize((sheet.shape[1] * 4, sheet.shape[0] * 4), Image.Resampling.NEAREST).save(
        args.docs / "model.png", optimize=True
    )


if __name__ == "__main__":
    main()
