"""A pixel model of real pictures, with and without classes, end to end: train, draw, judge, and write docs/results/.

    python scripts/cifar10.py --data cifar10/train.parquet --test cifar10/test.parquet --out runs/cifar10
    python scripts/cifar10.py --data digits --preset small-digits --out runs/digits
    python scripts/cifar10.py ... --only page                      # killed? the same command goes on where it stopped

Stages: train (`sfumato train sid2` with a preset), judge (a small ResNet of the real pictures), draw (``--n``
pictures, all classes alike, kept on disk), page (``docs/results/NAME.md`` with the loss curve and a sheet of samples).
Distances are in the judge's features, or with ``--extractor inception --weights FILE`` in those of the FID.
Every figure of the page is printed from files under ``--out``. "digits" are those of scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from sfumato.classify.plain import Plain
from sfumato.data.pictures import Pictures, open_pictures
from sfumato.files import GENERATED, contact_sheet, save_png, write_json
from sfumato.metrics.bootstrap import Estimate, wilson
from sfumato.metrics.extractors import Extractor, make_extractor
from sfumato.metrics.record import Score
from sfumato.metrics.sets import FID, KID
from sfumato.metrics.vision import load_vision
from sfumato.pipeline import load
from sfumato.train.sid2 import SiD2


def recipe(args: argparse.Namespace) -> SiD2:
    """The preset, with what the command line says."""
    changes = {k: getattr(args, k) for k in ("updates", "batch") if getattr(args, k)}
    return SiD2(**{**SiD2.presets[args.preset], **changes}, data=args.data, checkpoint_every=200)


def pixels(source: str, size: int, limit: int = 0) -> tuple[torch.Tensor, torch.Tensor, Pictures]:
    """Pictures as bytes (n, 3, size, size) and class numbers of a source, at most ``limit``, evenly spread."""
    pictures = open_pictures(source, size)
    rows = np.arange(len(pictures))
    if limit and limit < len(rows):
        rows = rows[np.linspace(0, len(rows) - 1, limit).astype(int)]
    x = torch.from_numpy(np.stack([pictures.picture(int(i)) for i in rows])).permute(0, 3, 1, 2)
    return x, torch.tensor([pictures.label(int(i)) for i in rows]), pictures


def judge(args: argparse.Namespace, flip: bool) -> Path:
    """The classifier of the real pictures, ``out/judge/model``, trained there first if need be."""
    updates = args.judge_updates
    return Plain(
        data=args.data, test=args.test, held_out=0.2, flip=flip, label_smoothing=0.05, updates=updates,
        warmup=min(200, updates // 4),
    ).run(args.out / "judge")  # fmt: skip


@torch.no_grad()
def seen_in(judge: Path, x: torch.Tensor) -> torch.Tensor:
    """The classes that the judge sees in bytes."""
    from transformers import AutoModelForImageClassification

    model = load_vision(judge, AutoModelForImageClassification)
    parts = [model.network(model.prepare(part.to(model.device).float() / 255)).logits for part in x.split(256)]
    return torch.cat(parts).argmax(1).cpu()


def draw(args: argparse.Namespace, classes: bool) -> torch.Tensor:
    """``n`` pictures as bytes, with the seeds 0 to n - 1; those on disk are not drawn again.

    With ``classes``, the class of picture i is i mod classes, and guided; without, none is asked for.
    """
    folder = args.out / "samples"
    model: Any = load(str(args.out / "train" / "model"))
    parts = []
    for first in range(0, args.n, 256):
        seeds = range(first, min(first + 256, args.n))
        asked = [s % len(model.labels) for s in seeds] if classes else None
        kind = "conditional" if classes else "unconditional"
        file = folder / f"{first:06d}-{len(seeds)}-{model.describe()['sha256'][:12]}-{kind}.safetensors"
        if not file.exists():
            began = time.perf_counter()
            x = model.draw(asked, seeds, cfg_scale=None if classes else 1.0)
            folder.mkdir(parents=True, exist_ok=True)
            save_file({"x": (x * 255).round().byte()}, file)
            print(f"{kind}: {first + len(seeds)} of {args.n} drawn, {time.perf_counter() - began:.0f} s", flush=True)
        parts.append(load_file(file)["x"])
    return torch.cat(parts)


def score(extractor: Extractor, x: torch.Tensor, real: torch.Tensor) -> dict[str, Score]:
    """Distances of samples from real pictures, both bytes, with intervals."""
    found = {}
    for metric in (FID(extractor), KID(extractor)):
        for images, is_real in ((real, True), (x, False)):
            for part in images.split(256):
                metric.update(part, real=is_real)
        result = metric.compute()
        found[result.metric] = result
    return found


def curve(log: list[dict], file: Path) -> None:
    """The loss against the updates, smoothed over neighbours, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, loss = np.array([[row["step"], row["loss"]] for row in log if "loss" in row]).T
    width = max(1, len(loss) // 50)
    padded = np.pad(loss, (width // 2, width - 1 - width // 2), mode="edge")
    smooth = np.convolve(padded, np.ones(width) / width, "valid")
    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    axes.plot(steps, loss, color="0.8", linewidth=0.7)
    axes.plot(steps, smooth, color="black")
    axes.set(xlabel="updates", ylabel="loss", yscale="log")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def page(args: argparse.Namespace, seen_by: Path, training: SiD2) -> None:
    """``docs/NAME.md``, with the curve and a sheet: one row a class, the first twelve seeds of each, not selected."""
    x, free = draw(args, classes=True), draw(args, classes=False)
    real = pixels(args.test or args.data, training.size, args.n_real)[0]
    judged = args.extractor == "judge"
    made = make_extractor(str(seen_by) if judged else args.extractor, args.weights)
    sets = {"class-conditional": x, "unconditional": free}
    if args.test:  # otherwise these are what the distance is taken from
        sets["real training pictures"] = pixels(args.data, training.size, len(x))[0]
    scores = {key: score(made, y, real) for key, y in sets.items()}
    card = json.loads((seen_by / "card.json").read_text())
    log = [json.loads(row) for row in (args.out / "train" / "training" / "log.jsonl").read_text().splitlines()]
    model, name = load(str(args.out / "train" / "model")), args.out.name
    about, classes = model.describe(), len(model.labels)
    right = int((seen_in(seen_by, x) == torch.arange(len(x)) % classes).sum())
    told = {key: {k: s.to_json() for k, s in found.items()} for key, found in scores.items()}
    write_json(args.out / "score.json", {"asked for": right, "n": len(x), **told}, overwrite=True)
    args.docs.mkdir(parents=True, exist_ok=True)
    order = [row * classes + c for c in range(classes) for row in range(12) if row * classes + c < len(x)]
    sheet = contact_sheet(x[order].permute(0, 2, 3, 1).numpy(), len(order) // classes, gap=2, side=48)
    said = {"Source": GENERATED, "model": name, "sha256": about["sha256"]}
    save_png(args.docs / f"{name}.png", sheet, said, overwrite=True)
    curve(log, args.docs / f"{name}-loss.png")
    held = "the test split" if args.test else "the pictures it was trained on"
    between = lambda s: f"{s.value:.3g} [{s.low:.3g}, {s.high:.3g}]"
    share = lambda k, n: "{:.1%} [{:.1%}, {:.1%}]".format(k / n, *wilson(k, n))
    features = "the judge's features" if judged else made.name
    compared = {k: " | ".join(between(found[k]) for found in scores.values()) for k in told["unconditional"]}
    lines = [
        f"# {name}: a small pixel model, with and without classes",
        "",
        f"`SiD2(**SiD2.presets['{args.preset}'])`: {about['parameters']:,} parameters, {training.updates} updates of "
        f"{training.batch} pictures of {training.size} px. `scripts/cifar10.py` trained it and made this page. A model "
        "of this size and training shows that the method works, not what it can do.",
        "",
        "| measured [95 %] | " + " | ".join(f"{len(y)} {key}" for key, y in sets.items()) + " |",
        "| --- |" + " --- |" * len(sets),
        *(f"| {k}, {features}, to {len(real)} of {held} | {row} |" for k, row in compared.items()),
        f"| the judge sees the class asked for | {share(right, len(x))} |" + " |" * (len(sets) - 1),
        "",
        "The judge is a small classifier trained by `sfumato classify plain` on real pictures; it is right on "
        f"{between(Estimate(**card['top1']))} of {card['top1']['n']}: {card['measured_on']}."
        + (" Distances in its features are not the FID of the Inception network." if judged else ""),
        "",
        f"{model.defaults['sampling_steps']} steps of {model.defaults['scheduler']}, "
        f"guidance {model.defaults['cfg_scale']:g} at log-SNRs {model.defaults['cfg_interval']}. "
        f"One row a class ({', '.join(model.labels)}), the first seeds of each, not selected:",
        "",
        f"![samples]({name}.png)",
        "",
        f"![loss]({name}-loss.png)",
        "",
    ]  # fmt: skip
    (args.docs / f"{name}.md").write_text("\n".join(lines))
    print("\n".join(lines[4 : 7 + len(compared)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help='Parquet with image, label (and name); or "digits"')
    parser.add_argument("--test", help="the same for pictures that the model is not trained on")
    parser.add_argument("--preset", default="small-cifar10", choices=sorted(SiD2.presets))
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    parser.add_argument("--updates", type=int, help="by default the preset's")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--n", type=int, default=2000, help="samples")
    parser.add_argument("--n-real", type=int, default=10_000)
    parser.add_argument("--judge-updates", type=int, default=1000)
    parser.add_argument("--extractor", default="judge", help="features of distances: judge, or one of sfumato score")
    parser.add_argument("--weights", help="of the extractor, where it needs any")
    parser.add_argument("--only", choices=("train", "judge", "draw", "page"))
    args = parser.parse_args()
    training, only = recipe(args), lambda stage: args.only in (None, stage)
    if only("train"):
        training.run(args.out / "train")
    if only("draw"):
        draw(args, classes=True), draw(args, classes=False)
    if only("judge") or only("page"):
        seen_by = judge(args, training.flip)
    if only("page"):
        page(args, seen_by, training)


if __name__ == "__main__":
    main()
