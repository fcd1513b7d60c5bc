"""A class-conditional pixel model of real pictures, end to end: train, draw, judge, and write docs/results/.

    python scripts/cifar10.py --data cifar10/train.parquet --test cifar10/test.parquet --out runs/cifar10
    python scripts/cifar10.py --data digits --preset small-digits --out runs/digits
    python scripts/cifar10.py ... --only page                      # killed? the same command goes on where it stopped

Stages: train (`sfumato train sid2` with a preset), judge (a small classifier of the real pictures), draw (``--n``
pictures, all classes alike, kept on disk), page (``docs/results/NAME.md`` with the loss curve and a sheet of samples).
Distances are in the judge's features, or with ``--extractor inception --weights FILE`` in those of the FID.
Every figure of the page is printed from files under ``--out``. "digits" are those of scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sfumato.data.pictures import Pictures, open_pictures
from sfumato.files import GENERATED, contact_sheet, save_png, write_json
from sfumato.metrics.bootstrap import wilson
from sfumato.metrics.extractors import CallableFeatures, Extractor, make_extractor
from sfumato.metrics.record import Score
from sfumato.metrics.sets import FID, KID
from sfumato.pipeline import load
from sfumato.train.sid2 import PRESETS, SiD2


def recipe(args: argparse.Namespace) -> SiD2:
    """The preset, with what the command line says."""
    changes = {k: getattr(args, k) for k in ("steps", "batch") if getattr(args, k)}
    return SiD2(**{**PRESETS[args.preset], **changes}, data=args.data, checkpoint_every=200)


def pixels(source: str, size: int, limit: int = 0) -> tuple[torch.Tensor, torch.Tensor, Pictures]:
    """Pictures as bytes (n, 3, size, size) and class numbers of a source, at most ``limit``, evenly spread."""
    pictures = open_pictures(source, size)
    rows = np.arange(len(pictures))
    if limit and limit < len(rows):
        rows = rows[np.linspace(0, len(rows) - 1, limit).astype(int)]
    x = torch.from_numpy(np.stack([pictures.picture(int(i)) for i in rows])).permute(0, 3, 1, 2)
    return x, torch.tensor([pictures.label(int(i)) for i in rows]), pictures


class Judge(nn.Module):
    """A small convolutional classifier of bytes; its features are the averages before the last layer."""

    def __init__(self, classes: int, width: int = 48):
        super().__init__()
        layers, before = [], 3
        for channels in (width, 2 * width, 4 * width, 4 * width):
            stride = 1 if before == 3 else 2
            layers += [nn.Conv2d(before, channels, 3, stride, 1), nn.BatchNorm2d(channels), nn.ReLU()]
            before = channels
        self.body, self.head = nn.Sequential(*layers), nn.Linear(before, classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x.float() / 127.5 - 1).mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


def judge(args: argparse.Namespace, size: int, flip: bool) -> Judge:
    """The classifier under ``out/judge``, trained there first if need be; its accuracy is written beside it."""
    folder = args.out / "judge"
    x, y, pictures = pixels(args.data, size)
    net = Judge(len(pictures.label_names))
    if (folder / "card.json").exists():
        net.load_state_dict(load_file(folder / "judge.safetensors"))
        return net.eval()
    # Without pictures of its own to be measured on, every fifth is left out.
    held = torch.zeros(len(x), dtype=torch.bool)
    held[::5] = not args.test
    rows, rng = (~held).nonzero().flatten(), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(net.train().parameters(), lr=2e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=args.judge_steps)
    for step in range(args.judge_steps):
        some = rows[torch.randint(len(rows), (128,), generator=rng)]
        batch = shaken(x[some], flip, rng)
        loss = nn.functional.cross_entropy(net(batch), y[some], label_smoothing=0.05)
        loss.backward()
        optimizer.step(), rate.step(), optimizer.zero_grad()
        if step % 100 == 0:
            print(f"judge: step {step}, loss {loss.item():.3f}", flush=True)
    net.eval()
    x, y = pixels(args.test, size)[:2] if args.test else (x[held], y[held])
    right = int((logits(net, x).argmax(1) == y).sum())
    low, high = wilson(right, len(y))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), folder / "judge.safetensors")
    card = {"accuracy": right / len(y), "low": low, "high": high, "n": len(y), "steps": args.judge_steps}
    write_json(folder / "card.json", card, overwrite=True)
    return net


def shaken(x: torch.Tensor, flip: bool, rng: torch.Generator) -> torch.Tensor:
    """Pictures moved by up to an eighth of their side, mirrored where that changes no class."""
    side = x.shape[-1]
    pad = side // 8
    x = nn.functional.pad(x.float(), (pad,) * 4, mode="replicate")
    top, left = torch.randint(2 * pad + 1, (2,), generator=rng).tolist()
    x = x[..., top : top + side, left : left + side]
    return torch.where(torch.rand(len(x), 1, 1, 1, generator=rng) < 0.5, x.flip(-1), x) if flip else x


@torch.no_grad()
def logits(net: Judge, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([net(part) for part in x.split(256)])


def draw(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """``n`` pictures as bytes, with the seeds 0 to n - 1, class i mod classes; those on disk are not drawn again."""
    folder, model = args.out / "samples", load(str(args.out / "train" / "model"))
    parts = []
    for first in range(0, args.n, 256):
        seeds = range(first, min(first + 256, args.n))
        file = folder / f"{first:06d}-{len(seeds)}-{model.describe()['sha256'][:12]}.safetensors"
        if not file.exists():
            began = time.perf_counter()
            x = model.sample(seeds, [s % len(model.labels) for s in seeds])
            folder.mkdir(parents=True, exist_ok=True)
            save_file({"x": (x * 255).round().byte()}, file)
            print(f"drawn: {first + len(seeds)} of {args.n}, {time.perf_counter() - began:.0f} s", flush=True)
        parts.append(load_file(file)["x"])
    x = torch.cat(parts)
    return x, torch.arange(len(x)) % len(model.labels)


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


def page(args: argparse.Namespace, net: Judge, training: SiD2) -> None:
    """``docs/NAME.md``, with the curve and a sheet: one row a class, the first twelve seeds of each, not selected."""
    x, asked = draw(args)
    real = pixels(args.test or args.data, training.size, args.n_real)[0]
    other = pixels(args.data, training.size, len(x))[0]
    judged = args.extractor == "judge"
    made = CallableFeatures(net.features, "the judge") if judged else make_extractor(args.extractor, args.weights)
    scores, floor = score(made, x, real), score(made, other, real)
    right = int((logits(net, x).argmax(1) == asked).sum())
    low, high = wilson(right, len(x))
    card = json.loads((args.out / "judge" / "card.json").read_text())
    log = [json.loads(row) for row in (args.out / "train" / "training" / "log.jsonl").read_text().splitlines()]
    model, name = load(str(args.out / "train" / "model")), args.out.name
    about = model.describe()
    write_json(
        args.out / "score.json",
        {"asked for": right, "n": len(x), **{k: [a.to_json(), floor[k].to_json()] for k, a in scores.items()}},
        overwrite=True,
    )
    args.docs.mkdir(parents=True, exist_ok=True)
    classes = len(model.labels)
    order = [row * classes + c for c in range(classes) for row in range(12) if row * classes + c < len(x)]
    sheet = contact_sheet(x[order].permute(0, 2, 3, 1).numpy(), len(order) // classes, gap=2, side=48)
    said = {"Source": GENERATED, "model": name, "sha256": about["sha256"]}
    save_png(args.docs / f"{name}.png", sheet, said, overwrite=True)
    curve(log, args.docs / f"{name}-loss.png")
    held = "its test split" if args.test else "the pictures it was trained on"
    between = lambda s: f"{s.value:.3g} [{s.low:.3g}, {s.high:.3g}]"
    share = lambda k, n, lo, hi: f"{k / n:.1%} [{lo:.1%}, {hi:.1%}]"
    lines = [
        f"# {name}: a small pixel model, class-conditional",
        "",
        f"`SiD2(**PRESETS['{args.preset}'])`: {about['parameters']:,} parameters, {training.steps} updates of "
        f"{training.batch} pictures of {training.size} px. `scripts/cifar10.py` trained it and made this page. A model "
        "of this size and training shows that the method works, not what it can do.",
        "",
        f"| measured [95 %] | {len(x)} samples | {len(other)} real training pictures |",
        "| --- | --- | --- |",
        *(f"| {k}, {made.name}, to {len(real)} pictures of {held} | {between(scores[k])} | {between(floor[k])} |"
          for k in scores),
        f"| the judge sees the class asked for | {share(right, len(x), low, high)} | "
        f"{share(card['accuracy'], 1, card['low'], card['high'])} of {card['n']} held out |",
        "",
        "The judge is a small classifier trained by the same script on the real pictures. Distances in its features "
        "are not the FID of the Inception network: compare them with the last column only." if judged else "",
        "",
        f"{model.defaults['steps']} steps of {model.defaults['sampler']}, guidance {model.defaults['cfg_scale']:g} at "
        f"log-SNRs {model.defaults['cfg_interval']}. One row a class ({', '.join(model.labels)}), the first seeds of "
        "each, not selected:",
        "",
        f"![samples]({name}.png)",
        "",
        f"![loss]({name}-loss.png)",
        "",
    ]  # fmt: skip
    (args.docs / f"{name}.md").write_text("\n".join(lines))
    print("\n".join(lines[4:9 + len(scores)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help='Parquet with image, label (and name); or "digits"')
    parser.add_argument("--test", help="the same for pictures that the model is not trained on")
    parser.add_argument("--preset", default="small-cifar10", choices=sorted(PRESETS))
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    parser.add_argument("--steps", type=int, help="updates; by default the preset's")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--n", type=int, default=2000, help="samples")
    parser.add_argument("--n-real", type=int, default=10_000)
    parser.add_argument("--judge-steps", type=int, default=1000)
    parser.add_argument("--extractor", default="judge", help="features of distances: judge, or one of sfumato score")
    parser.add_argument("--weights", help="of the extractor, where it needs any")
    parser.add_argument("--only", choices=("train", "judge", "draw", "page"))
    args = parser.parse_args()
    training, only = recipe(args), lambda stage: args.only in (None, stage)
    if only("train"):
        training.run(args.out / "train")
    if only("draw"):
        draw(args)
    if only("judge") or only("page"):
        net = judge(args, training.size, training.flip)
    if only("page"):
        page(args, net, training)


if __name__ == "__main__":
    main()
