"""A style and a subject from a few pictures, protected, attributed: docs/results/customise.md and protect.md.

    python scripts/emoji.py --data DIR --out runs/emoji --only train
    python scripts/emoji.py --data DIR --out runs/emoji --only classify
    python scripts/customise.py --data DIR --emoji runs/emoji --out runs/customise     # killed? the same goes on

DIR holds the emoji as for `scripts/emoji.py`, whose pipeline learns here from emoji that it has not seen: a style from
one artist's pictures, a subject from three artists' pictures of it. Then the style's pictures are protected and
learned again, and the parts of a workflow with both are held against the artist's pictures. Pages show the very
commands that are run, and figures that are read from files under ``--out``.
"""

from __future__ import annotations

import argparse
import shlex
from itertools import product
from pathlib import Path
from shutil import copyfile
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from commands import output, run
from emoji import GROUPS, STYLES, captions_of, read
from sfumato.files import GENERATED, contact_sheet, save_png, write_json
from sfumato.metrics.bootstrap import wilson
from sfumato.metrics.detectors import ClassifierDetector
from sfumato.metrics.extractors import make_extractor

STYLE, WORD, OTHER = "noto", "<mine>", "<one>"
LEARNED = 12
"""Pictures that the style is learned from."""
ASKED, SEEDS = 16, 3
"""Subjects that are asked for in the learned style; pictures of each."""
CANDIDATES = 50
"""Unseen subjects among which the learned one is to be found."""
METHODS = {"textual-inversion": WORD, "prospect": "<mine:style>", "dreambooth-lora": WORD}
"""What says the learned style in a prompt, by method."""
ALONE = {"dreambooth-lora": " --n-prior 0"}
"""Options of a method: a style is of no class, of which pictures could be drawn to keep it as it was."""
ABOUT = {"Source": GENERATED}


class Emoji:
    """What the pages are made of: the artists' pictures that the pipeline has not seen, and its own subjects."""

    def __init__(self, data: Path, emoji: Path):
        self.known = captions_of(emoji / "subset.parquet")
        x, captions, rows = read(",".join(str(data / f"{s}.parquet") for s in STYLES), "caption")
        at = {(c, r["style"]): i for i, (c, r) in enumerate(zip(captions, rows, strict=True)) if r["group"] in GROUPS}
        everyone = sorted({c for c, _ in at if all((c, s) in at for s in STYLES)} - set(self.known))
        order = np.random.default_rng(0).permutation(len(everyone))
        self.unseen = [everyone[i] for i in order[: LEARNED + CANDIDATES]]
        self.pictures = lambda caption: x[[at[caption, s] for s in STYLES]]
        self.subject, self.taught = self.unseen[0], self.unseen[CANDIDATES:]
        asked = [c for c in self.known if len(c.split()) < 3]
        self.asked = [asked[i] for i in np.random.default_rng(1).permutation(len(asked))[:ASKED]]

    def write(self, out: Path) -> None:
        """The pictures to learn from, as files."""
        for name, tiles in {
            "style": [self.pictures(c)[STYLES.index(STYLE)] for c in self.taught],
            "subject": list(self.pictures(self.subject)),
        }.items():
            (out / name).mkdir(parents=True, exist_ok=True)
            for i, x in enumerate(tiles):
                Image.fromarray(x.permute(1, 2, 0).numpy()).save(out / name / f"{i:02d}.png")


def prompts(emoji: Emoji, says: str) -> list[str]:
    return [f"{caption}, {says} style" if says else caption for caption in emoji.asked]


def learning(pipeline: str, emoji: Emoji, few: str) -> dict[str, list[str]]:
    """The commands that learn and draw, by what is learned; one folder for all."""
    found: dict[str, list[str]] = {}
    teach = f"sfumato customize {{}} --model {pipeline} --preset sketch"
    draw = f"sfumato sample {{}} --model {pipeline} --seeds 0-{SEEDS - 1}{{}} --out {{}}/"
    found["named"] = [draw.format(shlex.join(prompts(emoji, STYLE)), "", "named")]
    found["not asked"] = [draw.format(shlex.join(prompts(emoji, "")), "", "plain")]
    for images, (name, says) in product(("style", "safe"), METHODS.items()):
        learn = f"{teach.format(name)} --images {images}/ --init-word style{ALONE.get(name, '')}{few}"
        file = f"{images}-{name}.safetensors"
        drawn = draw.format(shlex.join(prompts(emoji, says)), f" --adapter {file}", f"{images}-{name}")
        found[f"{images} by {name}"] = [f"{learn} --out {file}", drawn]
    asked = shlex.join([f"{OTHER}, {s} style" for s in STYLES])
    for name in METHODS:
        learn = f"{teach.format(name)} --images subject/ --word '{OTHER}'{ALONE.get(name, '')}{few}"
        file = f"subject-{name}.safetensors"
        drawn = draw.format(asked, f" --adapter {file}", f"subject-{name}")
        found[f"subject by {name}"] = [f"{learn} --out {file}", drawn]
    return found


def protecting(pipeline: str, few: str) -> str:
    return f"sfumato protect diff-protect --model {pipeline} --preset sketch --images style/{few} --out safe/"


def attributing() -> str:
    return "sfumato attribute copyscope --workflow flow.toml --originals style/ --extractor random-cnn --out shares/"


def workflow(pipeline: str, emoji: Emoji) -> str:
    """Two adapters, of which one has learned the artist's style, and the phrase that asks for it."""
    loras = "".join(
        f'\n[[parts]]\nname = "{what}"\nkind = "lora"\nsource = "{what}-dreambooth-lora.safetensors"\n'
        for what in ("style", "subject")
    )
    phrase = f'\n[[parts]]\nname = "asked"\nkind = "phrase"\nsource = "{WORD} style"\n'
    return f'model = "{pipeline}"\nprompt = "{emoji.asked[0]}"\nseeds = {list(range(24))}\n{loras}{phrase}'


def run_all(commands: list[str], out: Path) -> None:
    """What has left something behind is not run again, but for protection and attribution, which go on themselves."""
    for command in commands:
        if command.split()[1] in ("protect", "attribute") or not (out / output(command)).exists():
            run(command, out)


def drawn(folder: Path) -> Float[Tensor, "n 3 h w"]:
    """The pictures in a folder, in [0, 1]."""
    files = sorted(folder.glob("[0-9]*.png"))
    x = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files])
    return torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255


def measured(emoji: Emoji, args: argparse.Namespace) -> dict[str, Any]:
    """How often the style is seen, and the subject found, as counts; written to ``out/figures.json``."""
    style = ClassifierDetector(args.emoji / "classifier-style" / "model")
    counted = lambda present: [int(present.sum()), len(present)]
    unseen = [emoji.pictures(c).float() / 255 for c in emoji.unseen]
    real = {told: torch.cat([x[[s in some for s in STYLES]] for x in unseen])
            for told, some in ((f"real, by {STYLE}", {STYLE}), ("real, by others", set(STYLES) - {STYLE}))}  # fmt: skip
    folders = {"named": "named", "not asked": "plain"}
    folders |= {f"{i} by {n}": f"{i}-{n}" for i, n in product(("style", "safe"), METHODS)}
    styles = {told: counted(style(x, STYLE).present) for told, x in real.items()}
    styles |= {told: counted(style(drawn(args.out / at), STYLE).present) for told, at in folders.items()}
    judge = make_extractor(str(args.emoji / "classifier-caption" / "model"))
    features = lambda x: torch.nn.functional.normalize(judge(x).float(), dim=1)
    others = torch.cat([features(emoji.pictures(c)) for c in emoji.unseen[:CANDIDATES]]).unflatten(0, (-1, len(STYLES)))
    subjects = {}
    for name in METHODS:
        x = features((drawn(args.out / f"subject-{name}") * 255).round().byte())
        # How like each candidate it is: the most like of its artists' pictures. The learned one is the first.
        place = torch.einsum("nd,csd->ncs", x, others).amax(2).argsort(1, descending=True)
        subjects[name] = {f"top {k}": [int((place[:, :k] == 0).any(1).sum()), len(x)] for k in (1, 5)}
    found = {"style": styles, "subject": subjects, "named": emoji.subject}
    write_json(args.out / "figures.json", found, overwrite=True)
    return found


def share(pair: list[int]) -> str:
    return "{:.1%} [{:.1%}, {:.1%}]".format(pair[0] / pair[1], *wilson(*pair))


def sheet(folders: list[str], args: argparse.Namespace, name: str, each: int = 12) -> str:
    """The first pictures of each folder in a row; its Markdown."""
    rows = torch.cat([drawn(args.out / folder)[:each] for folder in folders])
    pictures = (rows.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    save_png(args.docs / f"{name}.png", contact_sheet(pictures, each, gap=2), ABOUT, overwrite=True)
    return f"![{name}]({name}.png)"


def pages(found: dict[str, Any], commands: dict[str, list[str]], args: argparse.Namespace) -> None:
    """Both pages and their pictures."""
    args.docs.mkdir(parents=True, exist_ok=True)
    learned = [told for told in found["style"] if not told.startswith("safe")]
    rows = [f"| {told} | {share(found['style'][told])} |" for told in learned]
    faces = [f"| {n} | {share(of['top 1'])} | {share(of['top 5'])} |" for n, of in found["subject"].items()]
    block = lambda *names: ["```", *(line for name in names for line in commands[name]), "```", ""]
    customise = [
        "# Customised: a style and a subject of real emoji", "",
        "The pipeline of [emoji.md](emoji.md) learns from pictures that it has not seen, with the settings of the "
        "embedded model. `scripts/customise.py` ran the commands and made this page.", "",
        f"## A style: {LEARNED} emoji of {STYLE}", "",
        f"How often the judge of styles sees {STYLE} in pictures of {ASKED} subjects, {SEEDS} of each:", "",
        "| asked for | seen [95 %] |", "| --- | --- |", *rows, "",
        "\"real\": the artists' pictures of subjects that nothing here has seen, which tell how well the judge sees; "
        "\"named\": by the style's name, which the pipeline knows; \"not asked\": no style.", "",
        sheet(["style", "plain", *(f"style-{name}" for name in METHODS)], args, "customise-style"), "",
        f"Rows: what is learned from; no style asked; {', '.join(METHODS)}. The first pictures, not selected.", "",
        f"## A subject: {found['named']}, by {len(STYLES)} artists", "",
        f"How often it is the likeliest, or among the five likeliest, of {CANDIDATES} unseen subjects (features of the "
        f"judge of subjects, which knows none of them; by chance {1 / CANDIDATES:.0%} and {5 / CANDIDATES:.0%}):", "",
        "| method | first [95 %] | among five [95 %] |", "| --- | --- | --- |", *faces, "",
        sheet(["subject", *(f"subject-{name}" for name in METHODS)], args, "customise-subject", each=3 * SEEDS), "",
        f"Rows: what is learned from; {', '.join(METHODS)}.", "",
        "## Who made the likeness", "",
        f"A workflow of two adapters and a phrase, held against {STYLE}'s pictures: "
        "[the page](customise-shares.html) (opens from disk).", "",
        "## Commands", "",
        *block(*(name for name in commands if not name.startswith("safe") and name != "protect")),
    ]  # fmt: skip
    copyfile(args.out / "shares" / "index.html", args.docs / "customise-shares.html")
    pairs = [(f"style by {name}", f"safe by {name}", name) for name in METHODS]
    lines = [f"| {n} | {share(found['style'][a])} | {share(found['style'][b])} |" for a, b, n in pairs]
    copyfile(args.out / "safe" / "index.html", args.docs / "protect-proof.html")
    protect = [
        "# Protected: the same emoji, learned again", "",
        f"The {LEARNED} pictures of [customise.md](customise.md), protected by diff-protect, and the style learned "
        "from them as before. `scripts/customise.py` ran the commands and made this page. How often the judge sees "
        f"{STYLE}:", "",
        "| method | of clean pictures [95 %] | of protected ones [95 %] |", "| --- | --- | --- |", *lines, "",
        sheet(["style", "safe", *(f"safe-{name}" for name in METHODS)], args, "protect-style"), "",
        f"Rows: clean; protected; drawn by {', '.join(METHODS)} of the protected ones.", "",
        "What img2img makes of them, and what is left after JPEG, resizing and blur: [the proof](protect-proof.html) "
        "(opens from disk).", "",
        "## Commands", "", *block("protect", *(name for name in commands if name.startswith("safe"))),
    ]  # fmt: skip
    (args.docs / "customise.md").write_text("\n".join(customise), encoding="utf-8")
    (args.docs / "protect.md").write_text("\n".join(protect), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--emoji", type=Path, default=Path("runs/emoji"), help="what scripts/emoji.py wrote")
    parser.add_argument("--out", type=Path, default=Path("runs/customise"))
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    parser.add_argument("--quick", action="store_true", help="two updates: to see that everything runs")
    parser.add_argument("--only", choices=("run", "page"))
    args = parser.parse_args()
    emoji, few = Emoji(args.data, args.emoji), " --updates 2" if args.quick else ""
    pipeline = "emoji"  # a link in the folder, so that no command names a path of this machine
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / pipeline).exists():
        (args.out / pipeline).symlink_to((args.emoji / "train" / "pipeline").resolve())
    learn = learning(pipeline, emoji, few)
    safe = {name: learn.pop(name) for name in list(learn) if name.startswith("safe")}
    commands = {**learn, "attribute": [attributing()], "protect": [protecting(pipeline, few)], **safe}
    if args.only != "page":
        emoji.write(args.out)
        (args.out / "flow.toml").write_text(workflow(pipeline, emoji), encoding="utf-8")
        run_all([line for lines in commands.values() for line in lines], args.out)
    if args.only != "run":
        pages(measured(emoji, args), commands, args)


if __name__ == "__main__":
    main()
