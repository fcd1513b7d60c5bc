"""One-shot figures of models that are shown pictures, as a page: docs/results/NAME.md.

    sfumato train semantica --preset small-sketch --out runs/pairs
    sfumato train semantica --preset small-sketch --pairs same --out runs/same
    python scripts/semantica.py pairs=runs/pairs/model same=runs/same/model --data sketch --out runs/semantica
    python scripts/digits.py --out digits/                    # for digits, as docs/results/semantica.md has it
    sfumato train semantica --preset small-digits --data digits/train.parquet --out runs/pairs
    sfumato train semantica --preset small-digits --data digits/train.parquet --pairs same --out runs/same
    python scripts/semantica.py pairs=runs/pairs/model same=runs/same/model --data digits/test.parquet --n 160 \\
        --each-class 2 --out runs/semantica
    python scripts/semantica.py ... --extractor inception --weights FILE        # then the Fréchet distance is the FID

The protocol of arXiv:2405.14857: few pictures of the data are shown (``--each-class`` of every class, or ``--shown``
where there are none), ``--n`` are drawn in turn of all of them, and these are compared with other real pictures, never
with those shown. What was drawn is kept under ``--out``, as are the figures, from which the page is printed; killed,
the same command goes on. Two rows need no model: the shown pictures themselves (all copies), and real pictures.
The data should be other pictures than the models learned from: "sketch" is drawn anew, of files name a test split.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfumato.data.pictures import Pictures, open_pictures
from sfumato.errors import BadInput
from sfumato.files import GENERATED, atomic_file, contact_sheet, save_png, write_json
from sfumato.metrics.bootstrap import wilson
from sfumato.metrics.extractors import INCEPTION, make_extractor
from sfumato.metrics.one_shot import one_shot
from sfumato.pipeline import VariationModel, load, read_record
from sfumato.train.semantica import pixels

FRESH = 10**6
"""Added to the seed of the sketch world, so that its pictures are none that a model learned from."""
AT_ONCE = 64
COLUMNS = 8
REAL, COPIES = "other real pictures", "the shown pictures, copied"


def chosen(pictures: Pictures, each_class: int, shown: int, seed: int) -> tuple[Int[Tensor, "k"], Int[Tensor, "m"]]:
    """Rows to be shown, as many of every class, or of all where there are no classes; and all other rows.

    Raises:
        BadInput: too few pictures.
    """
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))
    if pictures.label_names:
        labels = torch.tensor([pictures.label(i) for i in order.tolist()])
        kept = torch.cat([(labels == c).nonzero()[:each_class, 0] for c in range(len(pictures.label_names))])
    else:
        kept = torch.arange(min(shown, len(order)))
    rest = torch.ones(len(order), dtype=torch.bool).index_fill(0, kept, False)
    if rest.sum() < 2 * len(kept) or not len(kept):
        raise BadInput(f"{len(pictures)} pictures are too few to show {len(kept)}: name more, or show fewer")
    return order[kept], order[rest]


def drawn(model: VariationModel, shown: UInt8[Tensor, "k 3 h w"], args: argparse.Namespace) -> UInt8[Tensor, "n 3 h w"]:
    """Picture i is drawn of the shown picture i mod k with the seed i; those on disk are not drawn again."""
    sha, scale = model.describe()["sha256"][:12], args.cfg_scale
    cond, parts = model.seen(shown), []
    for first in range(0, args.n, AT_ONCE):
        seeds = range(first, min(first + AT_ONCE, args.n))
        told = f"{sha}-{args.seed}-{len(shown)}-{'own' if scale is None else scale}-{args.steps or 'own'}"
        file = args.out / "drawn" / f"{told}-{first:06d}-{len(seeds)}.safetensors"
        if not file.exists():
            rows = torch.tensor(seeds) % len(shown)
            x = model.draw(None, seeds, cond=cond[rows], cfg_scale=scale, sampling_steps=args.steps)
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(file) as temporary:
                save_file({"x": (x * 255).round().byte()}, temporary)
            print(f"{first + len(seeds)} of {args.n} drawn", flush=True)
        parts.append(load_file(file)["x"])
    return torch.cat(parts)


def measured(models: dict[str, VariationModel], pictures: Pictures, args: argparse.Namespace) -> dict[str, Any]:
    """All figures, written to ``out/figures.json``, and the sheet of the first pictures of each model."""
    rows, rest = chosen(pictures, args.each_class, args.shown, args.seed)
    if len(rest) < args.n + 2:
        raise BadInput(
            f"{len(rest)} real pictures besides those shown: at least {args.n + 2} are needed for --n {args.n}"
        )
    judge = make_extractor(args.extractor, args.weights)
    seen = lambda x: torch.cat([judge(part).cpu() for part in x.split(256)])
    shown = pixels(pictures, rows.tolist())
    # As many real pictures as are drawn stand in for a model; others are what all is compared with.
    stand_in, real = rest[: args.n], rest[args.n :][: args.n_real]
    of, others = seen(shown)[torch.arange(args.n) % len(shown)], seen(pixels(pictures, real.tolist()))
    sets = {name: drawn(model, shown, args) for name, model in models.items()}
    features = {name: seen(x) for name, x in sets.items()}
    features |= {COPIES: of, REAL: seen(pixels(pictures, stand_in.tolist()))}
    found = {name: asdict(one_shot(x, of, others)) for name, x in features.items()}
    args.docs.mkdir(parents=True, exist_ok=True)
    sheets = [sheet(shown, x) for x in sets.values()]
    for name, array in zip(sets, sheets, strict=True):
        said = {"Source": GENERATED, "model": name, "sha256": models[name].describe()["sha256"]}
        save_png(args.docs / f"{args.name}-{name}.png", array, said, overwrite=True)
    record = {
        "figures": found, "n": args.n, "shown": len(shown), "real": len(real), "data": args.data, "seed": args.seed,
        "extractor": judge.name, "weights": judge.hash, "resize": judge.resize,
        "models": {name: told(model, args) for name, model in models.items()},
    }  # fmt: skip
    write_json(args.out / "figures.json", record, overwrite=True)
    return record


def sheet(shown: UInt8[Tensor, "k 3 h w"], x: UInt8[Tensor, "n 3 h w"]) -> Any:
    """Of each of the first shown pictures a row: itself, and what was drawn of it."""
    k = len(shown)
    rows = [torch.cat([shown[i : i + 1], x[i::k][: COLUMNS - 1]]) for i in range(min(k, COLUMNS))]
    longest = max(map(len, rows))
    filled = [torch.cat([row, row.new_full((longest - len(row), *row.shape[1:]), 255)]) for row in rows]
    return contact_sheet(torch.cat(filled).permute(0, 2, 3, 1).numpy(), longest, gap=2, side=64)


def told(model: VariationModel, args: argparse.Namespace) -> dict[str, Any]:
    """What the page says of a model."""
    about, said = model.describe(), model.defaults
    return {
        "sha256": about["sha256"], "parameters": about["parameters"], "encoder": said["encoder"],
        "cfg_scale": said["cfg_scale"] if args.cfg_scale is None else args.cfg_scale,
        "sampling_steps": args.steps or said["sampling_steps"],
    }  # fmt: skip


def page(record: dict[str, Any], name: str) -> str:
    """The page of these figures."""
    fid = record["extractor"].startswith(INCEPTION)
    share = lambda x, n: "{:.1%} [{:.1%}, {:.1%}]".format(x, *wilson(round(x * n), n))
    figures = (
        ("FID" if fid else "Fréchet distance", lambda f: f"{f['frechet']:.4g}"),
        ("precision", lambda f: f"{f['precision']:.3f}"), ("recall", lambda f: f"{f['recall']:.3f}"),
        ("copied [95 %]", lambda f: share(f["copied"], record["n"])),
        ("likeness to the shown one", lambda f: f"{f['consistency']:.3f}"),
        ("distance among those of one shown", lambda f: f"{f['diversity']:.3f}"),
    )  # fmt: skip
    lines = [
        f"# {name}: models that are shown pictures, one-shot",
        "",
        f"{record['shown']} pictures of {record['data']} are shown and {record['n']} drawn in turn of all of them; "
        f"these are compared with {record['real']} other real pictures, by {record['extractor']} ({record['resize']}). "
        "`scripts/semantica.py` made this page. A picture counts as copied where it lies nearer to the one that it was "
        "drawn of than any of the real ones does; likeness is a mean cosine, distance 1 - cosine.",
        "",
        "| | " + " | ".join(title for title, _ in figures) + " |",
        "| --- |" + " --- |" * len(figures),
        *(f"| {k} | " + " | ".join(say(f) for _, say in figures) + " |" for k, f in record["figures"].items()),
        "",
        f"\"{COPIES}\" is what a model would draw that copies; \"{REAL}\" are as many that nobody drew, each set "
        "beside a shown picture by chance." + ("" if fid else " Distances in these features are no FID."),
        "",
    ]  # fmt: skip
    for label, about in record["models"].items():
        lines += [
            f"**{label}**: {about['parameters']:,} parameters, encoder {about['encoder']}, "
            f"{about['sampling_steps']} steps, guidance {about['cfg_scale']:g}; sha256 {about['sha256'][:12]}. The "
            "first picture of each row is shown, the others are drawn of it, the first seeds, not selected:",
            "",
            f"![{label}]({name}-{label}.png)",
            "",
        ]
    return "\n".join(lines)


def named(models: list[str]) -> dict[str, VariationModel]:
    """The models by their labels.

    Raises:
        BadInput: not LABEL=FOLDER, or a model of another kind.
    """
    found: dict[str, VariationModel] = {}
    for each in models:
        label, _, folder = each.partition("=")
        if not label.isidentifier() or not folder:
            raise BadInput(f"name models like pairs=runs/pairs/model, not {each!r}")
        model: Any = load(folder)
        if not isinstance(model, VariationModel):
            raise BadInput(f"{folder} is shown no pictures: `sfumato train semantica` makes such models")
        found[label] = model
    if len({model.size for model in found.values()}) > 1:
        raise BadInput("these models draw pictures of several sizes: give those of one")
    return found


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="LABEL=FOLDER of each model")
    parser.add_argument("--data", help="what is shown and compared with; by default the first model's, if it is sketch")
    parser.add_argument("--out", type=Path, default=Path("runs/semantica"))
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    parser.add_argument("--name", default="semantica", help="of the page")
    parser.add_argument("--n", type=int, default=2000, help="pictures drawn with each model")
    parser.add_argument("--n-real", type=int, default=5000)
    parser.add_argument("--each-class", type=int, default=1, help="pictures shown of each class")
    parser.add_argument("--shown", type=int, default=50, help="pictures shown of data without classes")
    parser.add_argument("--cfg-scale", type=float, help="by default each model's own")
    parser.add_argument("--steps", type=int, help="by default each model's own")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of what is shown")
    parser.add_argument("--extractor", default="random-cnn", help="features: one of sfumato score")
    parser.add_argument("--weights", help="of the extractor, where it needs any")
    args = parser.parse_args(given)
    models = named(args.models)
    if args.data is None:
        made = read_record(args.models[0].partition("=")[2]).get("provenance") or {}
        args.data = made.get("config", {}).get("data")
        if args.data != "sketch":
            raise BadInput(
                f"these models learned from {args.data}: name other pictures with --data, such as a test split"
            )
    size, most = next(iter(models.values())).size, 2 * (args.n + args.n_real)
    pictures = open_pictures(args.data, size, seed=FRESH + args.seed, count=most)
    args.out.mkdir(parents=True, exist_ok=True)
    measured(models, pictures, args)
    record = json.loads((args.out / "figures.json").read_text())
    text = page(record, args.name)
    (args.docs / f"{args.name}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
