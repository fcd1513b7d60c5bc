"""How well an embedded pipeline draws, by the oracles: writes docs/model.md or docs/model-dit.md, and its picture.

    python scripts/evaluate_sketch.py --model sketch --n 1024
    python scripts/evaluate_sketch.py --model sketch-dit --n 2048

Prompts: one object with colour, background and style; two objects in a relation; two objects and no relation; a bare
object. The oracle (docs/oracle.md) reads pictures of one object, the scene oracle (docs/scenes.md) those of two.
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import fields
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato.data import oracle as oracles
from sfumato.data import scenes, sketch
from sfumato.data.cases import balanced
from sfumato.data.sketch.scene import CONTAINERS
from sfumato.data.world import WORDS
from sfumato.metrics.bootstrap import wilson
from sfumato.pipeline import load, read_record
from sfumato.train.parent import chain
from sfumato.train.t2i import TrainT2I

Bars = dict[tuple[str, str], float]
"""(Kind of prompt, what is read off) -> share that is aimed at."""
BARS: dict[str, Bars] = {"sketch": {
    ("one object", "object"): 0.988,
    ("one object", "colour"): 0.985,
    ("one object", "background"): 0.99,
    ("one object", "style"): 0.988,
    ("two objects with a relation", "both objects"): 0.85,
    ("two objects with a relation", "both colours"): 0.90,
    ("two objects with a relation", "relation"): 0.90,
    ("two objects, no relation", "both objects"): 0.85,
    ("a bare object", "object"): 0.97,
}, "sketch-dit": {
    ("one object", "object"): 0.95,
    ("one object", "colour"): 0.95,
    ("one object", "background"): 0.95,
    ("one object", "style"): 0.93,
}}  # fmt: skip
"""What is aimed at. Colours and relations of two objects are counted where both objects are there."""
PAGES = {"sketch": "model", "sketch-dit": "model-dit"}
"""Names of a model's page and picture."""
TITLES = {"sketch": "# The embedded pipeline", "sketch-dit": "# The embedded transformer"}
RENAMED = {"steps": "updates", "autoencoder_steps": "autoencoder_updates"}
"""Settings of older records, as they are called now."""


def commands(made: dict[str, Any]) -> list[str]:
    """The command lines that made a pipeline, the first one first, from its record's chain of parents.

    Options that the recipe has gained since are left at their defaults. Where a run was not what its command
    says (stopped early, say), its record's note stands behind it. Of a model that only gave its autoencoder the name is
    enough.
    """
    standard = {f.name: f.default for f in fields(TrainT2I)}
    steps, lines = list(chain(made)), []
    first = max((i for i, step in enumerate(steps) if step["config"].get("start_with") == "autoencoder"), default=0)
    for number, step in enumerate(steps[first:], start=1):
        if step.get("recipe") == "read captions":
            words = ["python", "scripts/read_captions.py", "--out", f"run{number}/"]
        else:
            words = ["sfumato", "train", "t2i", "--data", step["config"]["data"], "--out", f"run{number}/"]
        for name, value in step["config"].items():
            name, value = RENAMED.get(name, name), tuple(value) if isinstance(value, list) else value
            own = words[0] == "python" and name == "text_layers"  # of which that script has another default
            if name == "data" or (value == standard.get(name, value) and not own):
                continue
            if name == "start_from" and number > 1:
                name = "model" if words[0] == "python" else name
                value = f"run{number - 1}/pipeline"
            words += ["--" + name.replace("_", "-"), *map(str, value if isinstance(value, tuple) else (value,))]
        note = f"  # {step['note']}" if step.get("note") else ""
        lines.append(shlex.join(words) + note)
    return lines


Result = dict[str, dict[str, list[bool]]]
"""Kind of prompt -> what is read off -> whether it is right, one for each picture."""


def single(n: int, rng: torch.Generator) -> tuple[list[str], list[dict[str, str]]]:
    """Prompts that name all four attributes, each word as often as every other, and the words."""
    asked = {a: balanced(words, n, rng) for a, words in WORDS.items()}
    told = [{a: asked[a][i] for a in WORDS} for i in range(n)]
    return [sketch.prompt(**t) for t in told], told


def double(n: int, related: bool, seed: int) -> tuple[list[str], list[dict[str, Any]]]:
    """Prompts for two objects of different kind and colour; every other one names background and style too."""
    rng, prompts, told = np.random.default_rng(seed), [], []
    for i in range(n):
        kinds, colours = rng.permutation(sketch.OBJECTS)[:2].tolist(), rng.permutation(sketch.COLOURS)[:2].tolist()
        relation = sketch.RELATIONS[i % len(sketch.RELATIONS)] if related else None
        if relation == "inside":  # in what has room
            kinds[1] = str(rng.choice([c for c in CONTAINERS if c != kinds[0]]))
        first, second = (sketch.prompt(k, c) for k, c in zip(kinds, colours, strict=True))
        prompt = f"{first} {relation or 'and'} {second}"
        if i // len(sketch.RELATIONS) % 2:
            ground = sketch.prompt(background=str(rng.choice(sketch.BACKGROUNDS))).removeprefix("an empty ")
            style = str(rng.choice(sketch.STYLES))
            prompt += f" on {'an' if ground[0] in 'aeiou' else 'a'} {ground}, {style} style"
        prompts.append(prompt)
        told.append({"objects": kinds, "colours": colours, "relation": relation})
    return prompts, told


def read_single(pictures: Tensor, told: Sequence[dict[str, str]]) -> dict[str, list[bool]]:
    """Attribute -> whether it is as told, by the oracle."""
    read = oracles.load()(pictures)
    words = {a: [oracles.WORDS[a][i] for i in read[a].argmax(dim=1)] for a in told[0]}
    return {a: [w == t[a] for w, t in zip(words[a], told, strict=True)] for a in told[0]}


def read_double(
    pictures: Tensor, told: Sequence[dict[str, Any]], oracle: scenes.SceneOracle
) -> dict[str, list[bool]]:
    """Whether both objects are there; where they are, whether in their colours and in their relation; and all."""
    result: dict[str, list[bool]] = {"both objects": [], "both colours": [], "relation": [], "all of it": []}
    found = [seen for part in pictures.split(64) for seen in oracle.read(part)]
    for seen, t in zip(found, told, strict=True):
        pairs = [p for p in permutations(seen, 2) if [f.object for f in p] == t["objects"]]
        result["both objects"].append(bool(pairs))
        right = [[f.colour for f in p] == t["colours"] for p in pairs]
        related = [t["relation"] is None or scenes.holds(p[0], t["relation"], p[1]) for p in pairs]
        if pairs:
            result["both colours"].append(any(right))
            if t["relation"]:
                result["relation"].append(any(related))
        result["all of it"].append(any(a and b for a, b in zip(right, related, strict=True)))
    return {k: v for k, v in result.items() if v}


def measure(draw: Any, n: int, more: int, seed: int, oracle: scenes.SceneOracle) -> tuple[Result, Tensor]:
    """What is right, by kind of prompt and by what is read off; and some of the pictures.

    ``draw``: prompts and seeds -> pictures in [0, 1]. ``n`` prompts of one object, and ``more`` of each other kind.
    """
    result, shown = {}, []
    prompts, told = single(n, torch.Generator().manual_seed(seed))
    pictures = draw(prompts, range(n))
    result["one object"] = read_single(pictures, told)
    shown.append(pictures[:6])
    for name, related in (("two objects with a relation", True), ("two objects, no relation", False)):
        prompts, pairs = double(more, related, seed)
        pictures = draw(prompts, range(more))
        result[name] = read_double(pictures, pairs, oracle)
        shown.append(pictures[: 12 if related else 6])
    bare = balanced(sketch.OBJECTS, more, torch.Generator().manual_seed(seed + 1))
    pictures = draw([sketch.prompt(o) for o in bare], range(more))
    result["a bare object"] = read_single(pictures, [{"object": o} for o in bare])
    return result, torch.cat([*shown, pictures[:6]])


def table(result: Result, bars: Bars) -> list[str]:
    """Markdown, with 95 % intervals (Wilson) and what was aimed at."""
    rows = ["| asked for | read off | right [95 %] | of | aim |", "| --- | --- | --- | ---: | --- |"]
    for kind, read in result.items():
        for what, right in read.items():
            low, high = wilson(sum(right), len(right))
            aim = f"{bars[kind, what]:.1%}" if (kind, what) in bars else ""
            share = sum(right) / len(right)
            rows.append(f"| {kind} | {what} | {share:.1%} [{low:.1%}, {high:.1%}] | {len(right)} | {aim} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sketch", help="sketch, sketch-dit, or another (not with --docs)")
    parser.add_argument("--n", type=int, default=1024, help="prompts of one object")
    parser.add_argument("--n-more", type=int, help="prompts of each other kind; by default as many")
    parser.add_argument("--sampling-steps", "--steps", type=int, default=25)
    parser.add_argument("--cfg-scale", type=float, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=Path, help="a folder with another scene oracle than the shipped one")
    parser.add_argument("--docs", type=Path, help="write the model's page and picture there; without it, only print")
    args = parser.parse_args()
    if args.docs and args.model not in PAGES:
        parser.error(f"a page is made of {' or '.join(PAGES)}, not of {args.model}")

    pipe = load(args.model)
    draw = lambda prompts, seeds: pipe.draw(
        prompts, seeds, sampling_steps=args.sampling_steps, cfg_scale=args.cfg_scale, batch=64, progress=True
    )
    began = time.perf_counter()
    result, pictures = measure(draw, args.n, args.n_more or args.n, args.seed, scenes.load(args.scenes))
    seconds = time.perf_counter() - began
    lines = table(result, BARS.get(args.model, {}))
    print("\n".join(lines))
    if not args.docs:
        return
    folder = Path(pipe.pipe.config._name_or_path)
    made = read_record(args.model)["provenance"]
    size = sum(f.stat().st_size for f in folder.rglob("*.safetensors")) / 1e6
    about = pipe.describe()
    page, other = PAGES[args.model], "" if args.model == "sketch" else f" --model {args.model}"
    more = f" --n-more {args.n_more}" if args.n_more else ""
    text = [
        TITLES[args.model],
        "",
        f"`sf.load(\"{args.model}\")`: a `{about['pipeline']}` of {size:.1f} MB in safetensors, trained on the "
        "[sketch world](sketch.md). Every command of its making, the first one first:",
        "",
        "```",
        *commands(made),
        "```",
        "",
        "Read by the [oracle](oracle.md) and the [scene oracle](scenes.md) on as many prompts of a kind as the table "
        f"says, {args.sampling_steps} steps, guidance {args.cfg_scale or pipe.defaults['cfg_scale']:g}, one seed each "
        f"({seconds:.0f} s; `python scripts/evaluate_sketch.py{other} --n {args.n}{more} --docs docs`). Colours and "
        "relations of two objects are counted where both objects are there:",
        "",
        *lines,
        "",
        f"![Samples at four times their size]({page}.png)",
        "",
        "The first pictures of each kind of prompt, in order, not selected: one object; two in a relation (two rows); "
        "two without one; a bare object.",
        "",
        "```json",
        json.dumps({"recipe": made["config"], "describe": about}, indent=1, default=str),
        "```",
        "",
    ]
    (args.docs / f"{page}.md").write_text("\n".join(text))
    rows = [torch.cat(list(pictures[i : i + 6]), dim=2) for i in range(0, len(pictures), 6)]
    sheet = (torch.cat(rows, dim=1) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(sheet).resize((sheet.shape[1] * 4, sheet.shape[0] * 4), Image.Resampling.NEAREST).save(
        args.docs / f"{page}.png", optimize=True
    )


if __name__ == "__main__":
    main()
