"""Real input, end to end: train on emoji by three artists, erase a style and an object, audit both.

    python scripts/emoji.py --data DIR --out runs/emoji            # everything; killed? the same command goes on
    python scripts/emoji.py --data DIR --out runs/emoji --only page

DIR holds noto.parquet, openmoji.parquet and twemoji.parquet with the columns image, caption, group and style.
Stages: subset (a fixed choice of emoji that all three artists drew), train (`sfumato train t2i`), classify (a style
and a subject classifier, `transformers` ResNets trained on the real pictures), erase (five methods, two concepts; each
result is a folder that diffusers loads), audit, page (``docs/results/emoji.md`` with pictures). Every figure in that
page is printed from files under ``--out``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample

from sfumato.audit import audit
from sfumato.classify.plain import Plain
from sfumato.data.pictures import Pictures, open_pictures
from sfumato.erase import RECE, SPM, UCE, ESDu, ESDx
from sfumato.erase.base import Eraser
from sfumato.errors import BadInput
from sfumato.files import atomic_file, save_png
from sfumato.metrics.detectors import ClassifierDetector, Detection, Detector
from sfumato.pipeline import Text2Image, load_text2image, read_record
from sfumato.pipeline.equip import equip
from sfumato.train.t2i import TrainT2I

STYLES = ("noto", "openmoji", "twemoji")
ERASED_STYLE, ERASED_OBJECT = "noto", "panda"
GROUPS = ("animals-nature", "food-drink", "travel-places", "activities", "objects")
CAPTION = "{caption}, {style} style"
METHODS = ("uce", "rece", "esd-x", "esd-u", "spm")
SHOWN = 4
"""Pictures in a strip of each of: the erased concept, two others."""


def subset(data: Path, out: Path, count: int, seed: int = 0) -> Path:
    """``count`` emoji, each by every artist: rows of the three files, in one Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = out / "subset.parquet"
    if path.exists():
        if (held := len(captions_of(path))) != count:
            raise BadInput(f"{path} holds {held} emoji, not {count}: give another --out, or --count {held}")
        return path
    columns = ["image", "caption", "group", "style"]
    tables = [pq.read_table(data / f"{s}.parquet", columns=columns) for s in STYLES]
    known = [
        {c for c, g in zip(t["caption"].to_pylist(), t["group"].to_pylist(), strict=True) if g in GROUPS}
        for t in tables
    ]
    # No other caption may name the object that will be erased.
    everywhere = sorted(c for c in set.intersection(*known) if ERASED_OBJECT not in c.split())
    chosen = {ERASED_OBJECT, *np.random.default_rng(seed).choice(everywhere, count - 1, replace=False)}
    rows = [t.filter(pa.array([c in chosen for c in t["caption"].to_pylist()])) for t in tables]
    with atomic_file(path) as temporary:
        pq.write_table(pa.concat_tables(rows), temporary)
    return path


def captions_of(parquet: Path) -> list[str]:
    import pyarrow.parquet as pq

    return sorted(set(pq.read_table(parquet, columns=["caption"])["caption"].to_pylist()))


def train(parquet: Path, args: argparse.Namespace) -> Path:
    """The recipe of the embedded model on the emoji; its autoencoder starts from the embedded one."""
    recipe = TrainT2I(
        data=str(parquet), caption=CAPTION, start_from=args.start_from, start_with="autoencoder",
        autoencoder_updates=args.autoencoder_updates, autoencoder_lr=4e-4, updates=args.updates, batch=args.batch,
        vocabulary=2048, checkpoint_every=args.checkpoint_every,
    )  # fmt: skip
    return recipe.run(args.out / "train")


class Given(Pictures):
    """Bytes (n, 3, side, side) and the names of what they show."""

    def __init__(self, x: torch.Tensor, names: list[str]):
        self.x, self.names, self.label_names = x, names, tuple(sorted(set(names)))

    def __len__(self) -> int:
        return len(self.x)

    def picture(self, index: int) -> np.ndarray:
        return self.x[index].permute(1, 2, 0).numpy()

    def label(self, index: int) -> int:
        return self.label_names.index(self.names[index])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge(Plain):
    """A small ResNet that names the ``label`` ("style" or "caption") of a picture, trained on real pictures.

    The style's learns from all emoji of the same groups but those of the subset, and is measured on these. Subjects
    have three pictures each, so theirs is measured on fresh augmentations of the training pictures, and says so.
    """

    label: str
    """The column that it names."""
    others: str
    """Folder of the three artists' files."""

    @classmethod
    def name(cls) -> str:
        return "plain"

    def augmented(self, x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        return 2 * augment((x + 1) / 2, rng) - 1

    def parts(self) -> tuple[Pictures, Pictures, str]:
        x, names, _ = read(self.data, self.label)
        test = augment(x.float() / 255, torch.Generator().manual_seed(1)).mul(255).round().clamp(0, 255).byte()
        measured, told = Given(test, names), "fresh augmentations of the training pictures"
        if self.label == "style":
            known, told = set(captions_of(Path(self.data))), "the emoji of the subset, which it has not seen, augmented"
            x, names, rows = read(",".join(str(Path(self.others) / f"{s}.parquet") for s in STYLES), self.label)
            seen = [r["caption"] not in known and r["group"] in GROUPS for r in rows]
            x, names = x[torch.tensor(seen)], [n for n, s in zip(names, seen, strict=True) if s]
        return Given(x, names), measured, told


def classifier(parquet: Path, args: argparse.Namespace, label: str) -> Path:
    """The judge of the ``label``, trained first if need be."""
    updates = args.classifier_updates
    return Judge(
        data=str(parquet), others=str(args.data), label=label, label_smoothing=0.05, updates=updates,
        warmup=min(200, updates // 4), checkpoint_every=args.checkpoint_every,
    ).run(args.out / f"classifier-{label}")  # fmt: skip


def read(files: str, label: str) -> tuple[torch.Tensor, list[str], list[dict[str, str]]]:
    """Pictures as bytes, the ``label`` of each, and its caption and group."""
    import pyarrow.parquet as pq

    pictures = open_pictures(files, 64, CAPTION)
    x = torch.from_numpy(np.stack([pictures.picture(i) for i in range(len(pictures))])).permute(0, 3, 1, 2)
    rows = [r for f in files.split(",") for r in pq.read_table(f, columns=["caption", "style", "group"]).to_pylist()]
    return x, [row[label] for row in rows], rows


def augment(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Random shift and scale (white outside), mild blur and noise, as a small generator does it; pictures in [0, 1]."""
    n = len(x)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 + 0.16 * (torch.rand(n, generator=rng) - 0.5)
    theta[:, :, 2] = 0.16 * (torch.rand(n, 2, generator=rng) - 0.5)
    x = 1 - grid_sample(1 - x, affine_grid(theta, x.shape, align_corners=False), align_corners=False)
    soft = avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    mix, noise = torch.rand(2, n, 1, 1, 1, generator=rng)
    return mix * soft + (1 - mix) * x + 0.04 * noise * torch.randn(x.shape, generator=rng)


class Emoji(Detector):
    """Styles by the style classifier, everything else by the subject classifier."""

    def __init__(self, style: Path, subject: Path):
        self.style, self.subject = ClassifierDetector(style), ClassifierDetector(subject)
        self.name = "ResNets for style and subject, trained on the real emoji"
        self.hash, self.threshold = f"{self.style.hash}+{self.subject.hash}", "top-1"
        self.resize = self.style.resize

    def pick(self, concept: str) -> ClassifierDetector:
        return self.style if concept in STYLES else self.subject

    def check(self, concept: str) -> None:
        self.pick(concept).check(concept)

    def __call__(self, images: torch.Tensor, concept: str) -> Detection:
        return self.pick(concept)(images, concept)


def eraser(name: str, concept: str, captions: list[str], quick: bool) -> Eraser:
    """The method, told to preserve all other captions and styles where it is a closed-form edit."""
    others = tuple(c for c in (*captions, *STYLES) if c != concept)
    few = {"updates": 2} if quick else {}
    if name == "uce":
        return UCE(concepts=(concept,), preserve=others)
    if name == "rece":
        return RECE(concepts=(concept,), preserve=others, **RECE.presets["sketch"])
    if name == "spm":
        return SPM(concepts=(concept,), **{**SPM.presets["sketch"], **few}, progress=True)
    made = ESDx if name == "esd-x" else ESDu
    return made(concepts=(concept,), **{**made.presets["sketch"], **few}, progress=True)


def prompts_for(captions: list[str]) -> dict[str, tuple[list[str], list[str]]]:
    """Concept to erase -> prompts that ask for it (and for what is retained), and what is retained."""
    others = [c for c in captions if c != ERASED_OBJECT]
    picked = [others[i] for i in np.random.default_rng(1).choice(len(others), min(16, len(others)), replace=False)]
    return {
        ERASED_STYLE: ([f"{s}, {{concept}} style" for s in picked], [s for s in STYLES if s != ERASED_STYLE]),
        ERASED_OBJECT: ([f"{{concept}}, {s} style" for s in STYLES], picked[:12]),
    }


def erase_and_audit(model: Path, args: argparse.Namespace, detector: Detector, captions: list[str]) -> None:
    """Both concepts with every method; a finished edit or audit is not repeated."""
    pipe = load_text2image(model)
    specimens(pipe, args.out / "subset.parquet", captions, args.out / "strips" / "specimens.png")
    for concept, (prompts, retain) in prompts_for(captions).items():
        asked = [p.replace("{concept}", c) for c, p in product((concept, *retain[:2]), (prompts * SHOWN)[:SHOWN])]
        strip(pipe, asked, args.out / "strips" / f"{concept}-original.png")
        for name in METHODS:
            erased, report = (args.out / part / f"{concept}-{name}" for part in ("erased", "audits"))
            if not erased.exists():
                method = eraser(name, concept, captions, args.quick)
                began = time.perf_counter()
                made, log = method.run(pipe)
                cost = {"seconds": time.perf_counter() - began}
                record = {"method": {"name": name}, "configuration": dataclasses.asdict(method)}
                made.save(erased, provenance={**record, "cost": cost, "log": log})
            # An adapter acts as strongly as the prompt asks only where it is attached to the original.
            adapters = [erased] if name == "spm" else []
            after = model if adapters else erased
            strip(equip(load_text2image(after), after, adapters), asked, args.out / "strips" / f"{concept}-{name}.png")
            if report.exists():
                continue
            found = audit(
                model, after, (concept,), adapters=adapters, retain=retain, prompts=prompts, n=args.n,
                n_retain=max(1, args.n // 4), detector=detector, attacks=(), seed=7,
            )  # fmt: skip
            found.save(report)
            print(f"{concept} / {name}: erased {found.erasure[concept]}", flush=True)


def strip(pipe: Text2Image, prompts: list[str], path: Path) -> None:
    """One row of pictures, seed 3 for all, saved as PNG."""
    if path.exists():
        return
    row = torch.cat(list(pipe.draw(prompts, 3)), dim=2).permute(1, 2, 0).numpy()
    save_png(path, row, {"prompts": " | ".join(prompts)})


def specimens(pipe: Text2Image, parquet: Path, captions: list[str], path: Path) -> None:
    """Real pictures above generated ones of the same caption and style, a pair of rows for each artist."""
    if path.exists():
        return
    others = [c for c in captions if c != ERASED_OBJECT]
    chosen = [ERASED_OBJECT, *others[:: max(1, len(others) // 11)]][:12]
    pictures = open_pictures(str(parquet), pipe.size, CAPTION)
    place = {pictures.caption(i): i for i in range(len(pictures))}
    rows = []
    for style in STYLES:
        prompts = [CAPTION.format(caption=c, style=style) for c in chosen]
        rows.append(np.concatenate([pictures.picture(place[p]) for p in prompts], axis=1))
        drawn = torch.cat(list(pipe.draw(prompts, 3)), dim=2).permute(1, 2, 0).numpy()
        rows.append(np.rint(drawn * 255).astype(np.uint8))
    save_png(path, np.concatenate(rows), {"Source": "real pictures and generated ones, row by row"})


def page(args: argparse.Namespace) -> None:
    """``docs/results/emoji.md`` and its pictures, from the reports, cards and settings under ``--out``."""
    record = read_record(args.out / "train" / "pipeline")["provenance"]
    made = record["config"]
    where = {k: args.out / f"classifier-{k}" / "model" / "card.json" for k in ("style", "caption")}
    cards = {k: json.loads(file.read_text()) for k, file in where.items()}
    reports = {
        (c, name): json.loads((args.out / "audits" / f"{c}-{name}" / "report.json").read_text())
        for c, name in product((ERASED_STYLE, ERASED_OBJECT), METHODS)
    }
    percent = lambda r: "not measured" if r["rate"] is None else f"{r['rate']:.1%} [{r['low']:.1%}, {r['high']:.1%}]"
    judged = {k: tuple(c["top1"][x] for x in ("value", "low", "high")) for k, c in cards.items()}
    told = {k: f"{v:.1%} [{low:.1%}, {high:.1%}] right on {cards[k]['top1']['n']} pictures, {cards[k]['measured_on']}"
            for k, (v, low, high) in judged.items()}  # fmt: skip
    size = reports[ERASED_STYLE, "uce"]["protocol"]["size"]
    lines = [
        "# Real input: emoji by three artists",
        "",
        f"A text-to-image pipeline trained by `scripts/emoji.py` on {cards['caption']['labels']} emoji of Noto "
        "(SIL OFL 1.1 / Apache 2.0), OpenMoji (CC-BY-SA 4.0) and Twemoji (CC-BY 4.0) each, at "
        f"{size} pixels: its autoencoder from the embedded pipeline's by {made['autoencoder_updates']} updates of "
        f"{made['autoencoder_batch']} pictures, then text encoder and U-Net from scratch by {made['updates']} of "
        f"{made['batch']}. Judges, both trained on the real pictures: one of the style ({told['style']}) and one of "
        f"the subject ({told['caption']}).",
        "",
        "![Real and generated](emoji-specimens.png)",
        "",
        f"Rows in pairs, real above generated: {', '.join(STYLES)}; one seed, not selected.",
        "",
        "UCE and RECE preserve all other captions and styles; RECE, ESD and SPM run with the settings of the embedded "
        "model, which were not tuned here. SPM is judged as an adapter with facilitated transport.",
    ]
    args.docs.mkdir(parents=True, exist_ok=True)
    enlarged([args.out / "strips" / "specimens.png"], args.docs / "emoji-specimens.png")
    for concept in (ERASED_STYLE, ERASED_OBJECT):
        before = reports[concept, "uce"]["protocol"]["detected_before"]
        lines += [
            "", f"## Without {concept!r}", "",
            f"Of the original's pictures that ask for it, the judge finds it in {before[concept]:.1%}: an edit that "
            f"changes nothing would count as {1 - before[concept]:.1%} erased.", "",
            "| method | erased [95 %] | n | kept: mean | kept: least | integrity (0: same pictures) | edit |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]  # fmt: skip
        for name in METHODS:
            report = reports[concept, name]
            kept = {k: v for k, v in report["retention"].items() if v and v["rate"] is not None}
            least = min(kept, key=lambda k: kept[k]["rate"], default=None)
            average = f"{sum(v['rate'] for v in kept.values()) / len(kept):.1%}" if kept else "not measured"
            i, e = report["integrity"], report["erasure"][concept]
            lines.append(
                f"| {name} | {percent(e)} | {e['n']} | {average} | "
                f"{f'{least}: {percent(kept[least])}' if kept else 'not measured'} | {i['mean']:.3f} "
                f"[{i['low']:.3f}, {i['high']:.3f}] | {report['cost']['seconds']:.1f} s |"
            )
        rows = [args.out / "strips" / f"{concept}-{name}.png" for name in ("original", *METHODS)]
        enlarged(rows, args.docs / f"emoji-{concept}.png")
        lines += ["", f"![{concept}](emoji-{concept}.png)", "",
                  f"Rows: original, {', '.join(METHODS)}. The first {SHOWN} columns ask for the erased concept, the "
                  "others for something else; every picture has the same seed. Generated pictures."]  # fmt: skip
    (args.docs / "emoji.md").write_text("\n".join(lines) + "\n")
    print(f"written: {args.docs / 'emoji.md'}")


def enlarged(rows: list[Path], path: Path) -> None:
    """Strips below each other at twice their size."""
    sheet = Image.fromarray(np.concatenate([np.asarray(Image.open(row)) for row in rows]))
    sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--docs", type=Path, default=Path("docs/results"), help="where the page goes")
    parser.add_argument("--count", type=int, default=200, help="emoji, each by three artists")
    parser.add_argument("--updates", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--autoencoder-updates", type=int, default=900)
    parser.add_argument("--start-from", default="sketch", help="pipeline whose autoencoder training starts from")
    parser.add_argument("--classifier-updates", type=int, default=1500)
    parser.add_argument("--checkpoint-every", type=int, default=200)
    parser.add_argument("--n", type=int, default=96, help="pictures for each erased concept in an audit")
    parser.add_argument("--quick", action="store_true", help="edits of two steps: to see that everything runs")
    parser.add_argument("--only", choices=("train", "classify", "erase", "page"))
    args = parser.parse_args()
    only = lambda stage: args.only in (None, stage)
    parquet = subset(args.data, args.out, args.count)
    if only("train"):
        train(parquet, args)
    if only("classify") or only("erase"):
        judges = [classifier(parquet, args, label) for label in ("style", "caption")]
    if only("erase"):
        erase_and_audit(args.out / "train" / "pipeline", args, Emoji(*judges), captions_of(parquet))
    if only("page"):
        page(args)


if __name__ == "__main__":
    main()
