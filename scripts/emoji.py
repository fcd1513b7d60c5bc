"""Real input, end to end: train on emoji by three artists, erase a style and an object, audit both.

    python scripts/emoji.py --data DIR --out runs/emoji            # everything; killed? the same command goes on
    python scripts/emoji.py --data DIR --out runs/emoji --only page

DIR holds noto.parquet, openmoji.parquet and twemoji.parquet with the columns image, caption, group and style.
Stages: subset (a fixed choice of emoji that all three artists drew), train (`sfumato train t2i`), classify (a style
and a subject classifier, `transformers` ResNets trained on the real pictures), erase (five methods, two concepts), page
(``docs/results/emoji.md`` with pictures). Every figure in that page is printed from the audits' ``report.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sfumato.audit import audit
from sfumato.audit.detectors import ClassifierDetector, Detection, Detector
from sfumato.data.pictures import open_pictures, to_tensor
from sfumato.erase import RECE, SPM, UCE, ESDu, ESDx, esd, spm
from sfumato.erase.base import Eraser
from sfumato.files import save_png, write_json
from sfumato.pipeline import Text2Image, load
from sfumato.train.t2i import TrainT2I

STYLES = ("noto", "openmoji", "twemoji")
ERASED_STYLE, ERASED_OBJECT = "noto style", "cat face"
GROUPS = ("animals-nature", "food-drink", "travel-places", "activities", "objects")
CAPTION = "{caption}, {style} style"


def subset(data: Path, out: Path, count: int, seed: int = 0) -> Path:
    """``count`` emoji, each by every artist: rows of the three files, in one Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = out / "subset.parquet"
    if path.exists():
        return path
    columns = ["image", "caption", "group", "style"]
    tables = [pq.read_table(data / f"{s}.parquet", columns=columns) for s in STYLES]
    known = [
        {c for c, g in zip(t["caption"].to_pylist(), t["group"].to_pylist(), strict=True) if g in GROUPS}
        for t in tables
    ]
    everywhere = sorted(set.intersection(*known) - {ERASED_OBJECT})
    chosen = {ERASED_OBJECT, *np.random.default_rng(seed).choice(everywhere, count - 1, replace=False)}
    rows = [t.filter(pa.array([c in chosen for c in t["caption"].to_pylist()])) for t in tables]
    out.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.concat_tables(rows), path)
    return path


def train(parquet: Path, out: Path, steps: int, autoencoder_steps: int, start_from: str) -> Path:
    """The recipe of the embedded model on the emoji; its autoencoder starts from the embedded one."""
    recipe = TrainT2I(
        data=str(parquet), caption=CAPTION, start_from=start_from, autoencoder_steps=autoencoder_steps,
        autoencoder_lr=4e-4, steps=steps, batch=64, channels=(96, 128), context=32, vocabulary=2048,
        checkpoint_every=200,
    )  # fmt: skip
    return recipe.run(out / "train")


def classifier(parquet: Path, out: Path, label: str, steps: int, seed: int = 0) -> Path:
    """A small ResNet that names the ``label`` ("style" or "caption") of a picture, saved as a transformers folder.

    Trained on the real pictures with random shifts, scales, blur and noise; one picture in eight (every artist's)
    is held out for the style, whose accuracy there is written beside the weights. Subjects have three pictures each,
    so theirs is measured on fresh augmentations of the training pictures, and says so.
    """
    import pyarrow.parquet as pq
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

    folder = out / f"classifier-{label}"
    if (folder / "config.json").exists():
        return folder
    pictures = open_pictures(str(parquet), 64, CAPTION)
    x = to_tensor([pictures.picture(i) for i in range(len(pictures))])
    names = pq.read_table(parquet, columns=[label])[label].to_pylist()
    labels = sorted(set(names))
    y = torch.tensor([labels.index(n) for n in names])
    held = torch.zeros(len(x), dtype=torch.bool)
    if label == "style":
        held[::8] = True
    torch.manual_seed(seed)
    shown = [f"{n} style" if label == "style" else n for n in labels]
    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[48, 96, 160, 256], depths=[1, 1, 1, 1], layer_type="basic",
        downsample_in_first_stage=False, num_labels=len(labels),
        id2label=dict(enumerate(shown)), label2id={n: i for i, n in enumerate(shown)},
    )  # fmt: skip
    net = ResNetForImageClassification(config).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    rng = torch.Generator().manual_seed(seed)
    train_rows = (~held).nonzero().flatten()
    for step in range(steps):
        rows = train_rows[torch.randint(len(train_rows), (64,), generator=rng)]
        loss = torch.nn.functional.cross_entropy(net(augment(x[rows], rng)).logits, y[rows], label_smoothing=0.05)
        loss.backward()
        optimizer.step(), rate.step(), optimizer.zero_grad()
        if step % 100 == 0:
            print(f"{label} classifier: step {step}, loss {loss.item():.3f}", flush=True)
    net.eval()
    rows = held.nonzero().flatten() if held.any() else torch.arange(len(x))
    with torch.no_grad():
        right = [net(augment(x[r], rng)).logits.argmax(1) == y[r] for r in rows.split(128)]
    card = {
        "accuracy": torch.cat(right).float().mean().item(), "n": len(rows), "steps": steps,
        "measured on": "held-out pictures, augmented" if held.any() else "fresh augmentations of training pictures",
    }  # fmt: skip
    net.save_pretrained(folder)
    size = {"height": 64, "width": 64}
    ViTImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    (folder / "card.json").write_text(json.dumps(card, indent=1))
    print(label, card, flush=True)
    return folder


def augment(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Random shift and scale (white outside), mild blur and noise: what a small generator does to a picture."""
    n = len(x)
    scale = 1 + 0.16 * (torch.rand(n, generator=rng) - 0.5)
    shift = 0.16 * (torch.rand(n, 2, generator=rng) - 0.5)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = shift
    grid = torch.nn.functional.affine_grid(theta, x.shape, align_corners=False)
    x = 1 - torch.nn.functional.grid_sample(1 - x, grid, align_corners=False)
    soft = torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    mix = torch.rand(n, 1, 1, 1, generator=rng)
    return (
        mix * soft + (1 - mix) * x + 0.08 * torch.rand(n, 1, 1, 1, generator=rng) * torch.randn(x.shape, generator=rng)
    )


class Emoji(Detector):
    """Styles by the style classifier, everything else by the subject classifier."""

    def __init__(self, style: Path, subject: Path):
        self.style, self.subject = ClassifierDetector(style), ClassifierDetector(subject)
        self.name = "ResNets for style and subject, trained on the real emoji"
        self.hash, self.threshold = f"{self.style.hash}+{self.subject.hash}", "top-1"
        self.resize = self.style.resize

    def pick(self, concept: str) -> ClassifierDetector:
        return self.style if concept.endswith(" style") else self.subject

    def check(self, concept: str) -> None:
        self.pick(concept).check(concept)

    def __call__(self, images: torch.Tensor, concept: str) -> Detection:
        return self.pick(concept)(images, concept)


def methods(concept: str) -> dict[str, Eraser]:
    """The five erasers, with their presets for models of this size (chosen on the embedded model, other concepts)."""
    anchor = "emoji" if concept.endswith(" style") else "dog face"
    common = {"concepts": (concept,)}
    return {
        "uce": UCE(**common, anchors=(anchor,)),
        "rece": RECE(**common, anchors=(anchor,)),
        "esd-x": ESDx(**common, **esd.PRESETS["sketch"]),
        "esd-u": ESDu(**common, **esd.PRESETS["sketch"]),
        "spm": SPM(**common, **spm.PRESETS["sketch"]),
    }


def plans(captions: list[str]) -> dict[str, tuple[list[str], list[str]]]:
    """Concept to erase -> prompts that ask for it (and for what is retained), and what is retained."""
    others = [c for c in captions if c != ERASED_OBJECT]
    picked = [others[i] for i in np.random.default_rng(1).choice(len(others), 16, replace=False)]
    return {
        ERASED_STYLE: ([f"{s}, {{concept}}" for s in picked], [f"{s} style" for s in STYLES[1:]]),
        ERASED_OBJECT: ([f"{{concept}}, {s} style" for s in STYLES], picked[:12]),
    }


def erase_and_audit(model: Path, out: Path, detector: Detector, captions: list[str], n: int) -> None:
    """Both concepts with every method; a finished audit is not repeated."""
    pipe = load(str(model))
    for concept, (prompts, retain) in plans(captions).items():
        asked = [p.replace("{concept}", c) for c, p in product((concept, *retain[:2]), prompts[:4])]
        strip(pipe, asked, out / "strips" / f"{slug(concept)}-original.png")
        for name, method in methods(concept).items():
            folder = out / "audits" / f"{slug(concept)}-{name}"
            if (folder / "report.json").exists():
                continue
            began = time.perf_counter()
            erased = method.apply(pipe)
            seconds = time.perf_counter() - began
            strip(erased, asked, out / "strips" / f"{slug(concept)}-{name}.png")
            report = audit(
                pipe, erased, (concept,), retain=retain, prompts=prompts, n=n, n_retain=max(8, n // 4),
                detector=detector, attacks=(), edit=method, seed=7,
            )  # fmt: skip
            report.save(folder)
            write_json(folder / "edit.json", {"seconds": seconds})
            print(f"{concept} / {name}: erased {report.erasure[concept]}, edit {seconds:.0f} s", flush=True)


def slug(concept: str) -> str:
    return concept.replace(" ", "-")


def strip(pipe: Text2Image, prompts: list[str], path: Path) -> None:
    """One row of pictures, seed 3 for all, saved as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = pipe.sample(prompts, 3)
    row = (torch.cat(list(pictures), dim=2) * 255).round().byte().permute(1, 2, 0).numpy()
    save_png(path, row, {"generated by": "an image diffusion model", "prompts": " | ".join(prompts)})


def page(out: Path, docs: Path) -> None:
    """``docs/results/emoji.md`` and its pictures, from the reports, cards and settings under ``out``."""
    settings = json.loads((out / "train" / "pipeline" / "sfumato.json").read_text())["config"]
    cards = {k: json.loads((out / f"classifier-{k}" / "card.json").read_text()) for k in ("style", "caption")}
    first = json.loads(next((out / "audits").glob("*/report.json")).read_text())
    lines = [
        "# Real input: emoji by three artists",
        "",
        f"A text-to-image pipeline trained by `scripts/emoji.py` on {first['protocol']['size']} px emoji of Noto "
        f"(SIL OFL 1.1 / Apache 2.0), OpenMoji (CC-BY-SA 4.0) and Twemoji (CC-BY 4.0): "
        f"{settings['autoencoder_steps']} autoencoder steps of {settings['autoencoder_batch']}, then "
        f"{settings['steps']} diffusion steps of {settings['batch']}, on two CPU cores. Judges: "
        f"a style classifier ({cards['style']['accuracy']:.1%} right, {cards['style']['measured on']}, "
        f"n = {cards['style']['n']}) and a subject classifier ({cards['caption']['accuracy']:.1%} right, "
        f"{cards['caption']['measured on']}, n = {cards['caption']['n']}), both trained on the real pictures.",
    ]
    rate = lambda r: f"{r['rate']:.1%} [{r['low']:.1%}, {r['high']:.1%}]"
    for concept in (ERASED_STYLE, ERASED_OBJECT):
        lines += ["", f"## Without '{concept}'", "", "| method | erased [95 %] | n | kept: mean | kept: least | "
                  "integrity (lower is better) | edit |", "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
        rows = []
        for name in ("original", *methods(concept)):
            picture = out / "strips" / f"{slug(concept)}-{name}.png"
            if picture.exists():
                rows.append(np.asarray(Image.open(picture)))
            folder = out / "audits" / f"{slug(concept)}-{name}"
            if not (folder / "report.json").exists():
                continue
            report, edit = (json.loads((folder / f).read_text()) for f in ("report.json", "edit.json"))
            kept = {k: v for k, v in report["retention"].items() if v and v["rate"] is not None}
            least = min(kept, key=lambda k: kept[k]["rate"])
            mean = sum(v["rate"] for v in kept.values()) / len(kept)
            i, e = report["integrity"], report["erasure"][concept]
            lines.append(
                f"| {name} | {rate(e)} | {e['n']} | {mean:.1%} | {least}: {rate(kept[least])} | {i['mean']:.3f} "
                f"[{i['low']:.3f}, {i['high']:.3f}] | {edit['seconds']:.1f} s |"
            )
        detected = first["protocol"].get("detected_before")
        lines += [f"\nThe judge finds the concept in the original's pictures: {detected}."] if detected else []
        docs.mkdir(parents=True, exist_ok=True)
        sheet = np.concatenate(rows)
        Image.fromarray(sheet).save(docs / f"emoji-{slug(concept)}.png")
        order = ", ".join(["original", *methods(concept)][: len(rows)])
        lines += ["", f"![{concept}](emoji-{slug(concept)}.png)", "", f"Rows: {order}. The first four columns ask for "
                  "the erased concept, the others for something else; every picture has the same seed."]  # fmt: skip
    (docs / "emoji.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--count", type=int, default=200, help="emoji, each by three artists")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--autoencoder-steps", type=int, default=900)
    parser.add_argument("--start-from", default="")
    parser.add_argument("--classifier-steps", type=int, default=900)
    parser.add_argument("--n", type=int, default=48, help="pictures for each erased concept in an audit")
    parser.add_argument("--only", choices=("train", "classify", "erase", "page"))
    args = parser.parse_args()
    only = lambda stage: args.only in (None, stage)
    parquet = subset(args.data, args.out, args.count)
    if only("train"):
        train(parquet, args.out, args.steps, args.autoencoder_steps, args.start_from)
    model = args.out / "train" / "pipeline"
    if only("classify") or only("erase"):
        style = classifier(parquet, args.out, "style", args.classifier_steps)
        subject = classifier(parquet, args.out, "caption", args.classifier_steps)
    if only("erase"):
        import pyarrow.parquet as pq

        captions = sorted(set(pq.read_table(parquet, columns=["caption"])["caption"].to_pylist()))
        erase_and_audit(model, args.out, Emoji(style, subject), captions, args.n)
    if only("page"):
        page(args.out, Path("docs/results"))


if __name__ == "__main__":
    main()
