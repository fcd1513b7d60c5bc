"""A class-conditional pixel model of real pictures, end to end: train, draw, judge, and write docs/results/.

    python scripts/cifar10.py --data cifar10/train.parquet --test cifar10/test.parquet --out runs/cifar10
    python scripts/cifar10.py --data digits --preset small-digits --out runs/digits
    python scripts/cifar10.py ... --only page                      # killed? the same command goes on where it stopped

Stages: train (`sfumato train sid2` with a preset), judge (a small classifier of the real pictures), draw (``--n``
pictures, all classes alike, kept on disk), page (``docs/results/NAME.md`` with the loss curve and a sheet of samples).
Every figure of the page is printed from files under ``--out``.
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

from sfumato.commands.sample import contact_sheet
from sfumato.data.pictures import Pictures, open_pictures, to_tensor
from sfumato.files import GENERATED, save_png, write_json
from sfumato.ledger.pixels import frechet
from sfumato.metrics.bootstrap import wilson
from sfumato.pipeline import load
from sfumato.train.sid2 import PRESETS, SiD2


def recipe(args: argparse.Namespace) -> SiD2:
    """The preset, with what the command line says."""
    changes = {k: getattr(args, k) for k in ("steps", "batch") if getattr(args, k)}
    return SiD2(**{**PRESETS[args.preset], **changes}, data=args.data, checkpoint_every=200)


def tensors(source: str, size: int, limit: int = 0) -> tuple[torch.Tensor, torch.Tensor, Pictures]:
    """Pictures in [-1, 1] and class numbers of a source, at most ``limit`` of them, evenly spread."""
    pictures = open_pictures(source, size)
    rows = np.arange(len(pictures))
    if limit and limit < len(rows):
        rows = rows[np.linspace(0, len(rows) - 1, limit).astype(int)]
    x = to_tensor([pictures.picture(int(i)) for i in rows])
    return x, torch.tensor([pictures.label(int(i)) for i in rows]), pictures


class Judge(nn.Module):
    """A small convolutional classifier; its features are the averages before the last layer."""

    def __init__(self, classes: int, width: int = 48):
        super().__init__()
        layers, before = [], 3
        for channels in (width, 2 * width, 4 * width, 4 * width):
            stride = 1 if before == 3 else 2
            layers += [nn.Conv2d(before, channels, 3, stride, 1), nn.BatchNorm2d(channels), nn.ReLU()]
            before = channels
        self.body, self.head = nn.Sequential(*layers), nn.Linear(before, classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


def judge(args: argparse.Namespace, size: int, flip: bool) -> Judge:
    """The classifier under ``out/judge``, trained there first if need be; its accuracy is written beside it."""
    folder = args.out / "judge"
    x, y, pictures = tensors(args.data, size)
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
    x, y = tensors(args.test, size)[:2] if args.test else (x[held], y[held])
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
    x = nn.functional.pad(x, (pad,) * 4, mode="replicate")
    top, left = torch.randint(2 * pad + 1, (2,), generator=rng).tolist()
    x = x[..., top : top + side, left : left + side]
    return torch.where(torch.rand(len(x), 1, 1, 1, generator=rng) < 0.5, x.flip(-1), x) if flip else x


@torch.no_grad()
def logits(net: Judge, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([net(part) for part in x.split(256)])


@torch.no_grad()
def features(net: Judge, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([net.features(part) for part in x.split(256)]).double()


def draw(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """``n`` pictures in [-1, 1] with the seeds 0 to n - 1, class i mod classes; those on disk are not drawn again."""
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
    return x.float() / 127.5 - 1, torch.arange(len(x)) % len(model.labels)


def score(net: Judge, x: torch.Tensor, asked: torch.Tensor, real: torch.Tensor, other: torch.Tensor) -> dict:
    """How far samples are from real pictures, and whether they show what was asked for.

    Args:
        net: whose features and verdicts are used.
        x, asked: samples and their classes.
        real: real pictures to compare with.
        other: real pictures that the same distance is measured on: what a perfect model would reach.
    """
    truth = features(net, real)
    right = int((logits(net, x).argmax(1) == asked).sum())
    low, high = wilson(right, len(x))
    return {
        "distance": frechet(features(net, x), truth),
        "distance_of_real": frechet(features(net, other[: len(x)]), truth),
        "n": len(x), "n_real": len(real), "n_other": len(other[: len(x)]),
        "asked_for": right / len(x), "asked_for_low": low, "asked_for_high": high,
    }  # fmt: skip


def curve(log: list[dict], file: Path) -> None:
    """The loss against the updates, smoothed over neighbours, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, loss = np.array([[row["step"], row["loss"]] for row in log if "loss" in row]).T
    width = max(1, len(loss) // 50)
    smooth = np.convolve(np.pad(loss, (width // 2, width - 1 - width // 2), mode="edge"), np.ones(width) / width, "valid")
    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    axes.plot(steps, loss, color="0.8", linewidth=0.7)
    axes.plot(steps, smooth, color="black")
    axes.set(xlabel="updates", ylabel="loss", yscale="log")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def page(args: argparse.Namespace, net: Judge, training: SiD2) -> None:
    """``docs/NAME.md``, with the curve and a sheet: one row a class, the first twelve seeds of each, not selected."""
    x, asked = draw(args)
    real = tensors(args.test or args.data, training.size, args.n_real)[0]
    other = tensors(args.data, training.size, len(x))[0]
    result = score(net, x, asked, real, other)
    model = load(str(args.out / "train" / "model"))
    card = json.loads((args.out / "judge" / "card.json").read_text())
    log = [json.loads(row) for row in (args.out / "train" / "training" / "log.jsonl").read_text().splitlines()]
    name = args.out.name
    args.docs.mkdir(parents=True, exist_ok=True)
    classes = len(model.labels)
    order = [row * classes + c for c in range(classes) for row in range(12) if row * classes + c < len(x)]
    sheet = ((x[order] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    about = {"Source": GENERATED, "model": name, "sha256": model.describe()["sha256"]}
    columns = len(order) // classes
    save_png(args.docs / f"{name}.png", contact_sheet(sheet, columns, gap=2, side=48), about, overwrite=True)
    curve(log, args.docs / f"{name}-loss.png")
    write_json(args.out / "score.json", result, overwrite=True)
    guided = f"guidance {model.defaults['cfg_scale']:g} at log-SNRs {model.defaults['cfg_interval']}"
    held = "its test split" if args.test else "the training pictures"
    lines = [
        f"# {name}: a small pixel model, class-conditional",
        "",
        f"`SiD2(**PRESETS['{args.preset}'])`: {model.describe()['parameters']:,} parameters, {training.steps} updates of "
        f"{training.batch} pictures of {training.size} px, on a CPU. `scripts/cifar10.py` made this page. A model "
        "of this size and training shows that the method works; published ones train a thousand times longer.",
        "",
        "| measured | value |",
        "| --- | --- |",
        f"| Fréchet distance to {result['n_real']} pictures of {held}, {result['n']} samples, features of the judge | "
        f"{result['distance']:.2f} |",
        f"| the same for {result['n_other']} real training pictures | {result['distance_of_real']:.2f} |",
        f"| samples in which the judge sees the class asked for | {result['asked_for']:.1%} "
        f"[{result['asked_for_low']:.1%}, {result['asked_for_high']:.1%}] |",
        f"| real pictures that it names rightly ({card['n']}) | {card['accuracy']:.1%} "
        f"[{card['low']:.1%}, {card['high']:.1%}] |",
        "",
        "The judge is a small classifier trained by the same script on the real pictures: its distance is not the FID "
        "of the Inception network, and can only be compared with the row below it.",
        "",
        f"{model.defaults['steps']} steps of {model.defaults['sampler']}, {guided}. One row a class "
        f"({', '.join(model.labels)}), the first seeds of each, not selected:",
        "",
        f"![samples]({name}.png)",
        "",
        f"![loss]({name}-loss.png)",
        "",
    ]
    (args.docs / f"{name}.md").write_text("\n".join(lines))
    print("\n".join(lines[6:12]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help='Parquet with image, label (and name), or another source')
    parser.add_argument("--test", help="the same for pictures that the model is not trained on")
    parser.add_argument("--preset", default="small-cifar10", choices=sorted(PRESETS))
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    parser.add_argument("--steps", type=int, help="updates; by default the preset's")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--n", type=int, default=2000, help="samples")
    parser.add_argument("--n-real", type=int, default=10_000)
    parser.add_argument("--judge-steps", type=int, default=1000)
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
