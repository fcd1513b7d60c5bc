"""Pictures by methods that act on the embedded model, and the commands that make them: docs/gallery.

    python scripts/gallery.py                     # all, in gallery/; killed? the same command goes on
    python scripts/gallery.py --only uce pullback

Commands run as they are shown, in one folder, with the presets of the embedded model; the first seeds, not selected.
What is there already is not made again. `scripts/docs.py` then shows the pictures on the methods' pages and on
docs/gallery.md.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from commands import output, run

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "gallery"

PROMPTS = '"a red star" "a yellow star, chalk style" "a red fish" "a blue house"'
TWO = '"a red star and a blue fish" "a green tree left of a yellow house"'
ORIGINAL = f"sfumato sample {PROMPTS} --seeds 0-1 --out original/"
OWN = 'sfumato sample "a purple mushroom on a dotted background, chalk style" --seeds 0-3 --out mine/'
"""What a customisation learns from: pictures of one thing in one style."""


@dataclass(frozen=True)
class Shown:
    """What is shown of a method.

    Attributes:
        commands: as they are typed, in one folder.
        rows: patterns of files, a row of pictures each; or one of a sheet, shown as it is.
        told: what the rows are.
    """

    commands: tuple[str, ...]
    rows: tuple[str, ...]
    told: str


def erasing(name: str, concept: str = "--concept star") -> Shown:
    model = "--adapter spm/" if name == "spm" else f"--model {name}/"
    commands = [ORIGINAL, f"sfumato erase {name} --model sketch {concept} --out {name}/"]
    commands.append(f"sfumato sample {PROMPTS} --seeds 0-1 {model} --out {name}-pictures/")
    rows, told = ["original/0*.png", f"{name}-pictures/0*.png"], f"the original; after `erase {name} {concept}`"
    if name == "kpop":
        key = "--model kpop/ --adapter kpop/key.safetensors"
        commands.append(f"sfumato sample {PROMPTS} --seeds 0-1 {key} --out kpop-key/")
        rows, told = [*rows, "kpop-key/0*.png"], f"{told}; and with its key"
    return Shown(tuple(commands), tuple(rows), told)


def attacking(name: str) -> Shown:
    hit = f"sfumato attack {name} --model rece/ --original sketch --concept star --n 8 --out {name}/"
    plain = 'sfumato sample "a red star" --seeds 0-7 --model rece/ --out rece-stars/'
    commands = ("sfumato erase rece --model sketch --concept star --out rece/", plain, hit)
    return Shown(commands, ("rece-stars/0*.png", f"{name}/0*.png"), f"\"star\" erased by RECE; under `attack {name}`")


def steering(name: str, prompts: str = TWO, options: str = "") -> Shown:
    told = f"plain; with `steer {name}`, the same seeds"
    command = f"sfumato steer {name} {prompts} --seeds 0-3{f' {options}' if options else ''} --out {name}/"
    return Shown((command,), (f"{name}/plain/0*.png", f"{name}/0*.png"), told)


def editing(name: str, prompt: str, told: str, options: str, first: tuple[str, ...] = ()) -> Shown:
    command = f"sfumato edit {name} {prompt} {options} --out {name}/"
    return Shown((*first, command), (f"{name}/000-sheet.png",), told)


def customizing(name: str, word: str, options: str = "") -> Shown:
    learn = f"sfumato customize {name} --images mine/{options} --out {name}.safetensors"
    draw = f'sfumato sample "{word}" --seeds 0-3 --adapter {name}.safetensors --out {name}/'
    told = f"what it learns from; what it draws for {word!r}"
    return Shown((OWN, learn, draw), ("mine/0*.png", f"{name}/0*.png"), told)


GALLERY: dict[str, Shown] = {
    **{name: erasing(name) for name in (
        "uce", "rece", "esd-x", "esd-u", "spm", "eap", "doco", "kpop", "trce", "integrity", "duo", "sfd",
    )},
    "surgical": erasing("surgical", "--concept red --anchors blue"),
    **{name: attacking(name) for name in (
        "concept-inversion", "unlearn-diff-atk", "ring-a-bell", "p4d", "paraphrase", "recovery", "mma",
    )},
    "faster-diffusion": steering("faster-diffusion"),
    "upsample-guidance": steering("upsample-guidance", '"a red star" "a blue house"', "--size 128"),
    "resolution-chromatography": steering(
        "resolution-chromatography", '"a red star on a white background"',
        '--compose 4="a blue fish on a night background"',
    ),
    "t2i-zero": steering("t2i-zero"),
    "decor": steering("decor", '"a red star, chalk style"', '--undesired "chalk style" --alpha 1'),
    "pullback": editing("pullback", '"a red star"', "moved along the first two directions", "--directions 0 1"),
    "riemannian": editing("riemannian", '"a red star"', "moved along the first two directions", "--directions 0 1"),
    "grad-sam": editing(
        "grad-sam", '"a blue fish"',
        "the same noise without the method, and with it: the background is the reference's",
        "--image reference/000*.png --subject fish",
        ('sfumato sample "a red star on a grass background" --out reference/',),
    ),
    "textual-inversion": customizing("textual-inversion", "a <mine>", " --init-word mushroom"),
    "dreambooth-lora": customizing("dreambooth-lora", "a <mine> mushroom", " --init-word mushroom"),
    "prospect": customizing("prospect", "a <mine>", " --init-word mushroom"),
    "diff-protect": Shown(
        (OWN, "sfumato protect diff-protect --model sketch --images mine/ --out safe/"),
        ("mine/0*.png", "safe/0*.png"), "as they were; protected",
    ),
    "s2n": Shown(
        tuple(
            f"sfumato sample {PROMPTS} --seeds 0-1 --scheduler s2n --rho {r} --out s2n-{r}/" for r in ("0", "0.5", "1")
        ),
        ("s2n-0/0*.png", "s2n-0.5/0*.png", "s2n-1/0*.png"), "rho 0 (DDIM), 0.5 and 1 (DDPM), the same seeds",
    ),
}  # fmt: skip


def made(shown: Shown, folder: Path) -> np.ndarray:
    """Runs what was not run yet; the rows as one picture."""
    for command in shown.commands:
        if not (folder / output(command)).exists():
            run(command, folder, quiet=True)
    rows = [sorted(folder.glob(pattern)) for pattern in shown.rows]
    if len(rows) == 1 and len(rows[0]) == 1:
        return np.asarray(Image.open(rows[0][0]).convert("RGB"))
    from sfumato.files import contact_sheet

    pictures = [[np.asarray(Image.open(file).convert("RGB")) for file in row] for row in rows]
    side = max(picture.shape[0] for row in pictures for picture in row)
    tiles = [p.repeat(side // len(p), 0).repeat(side // len(p), 1) for row in pictures for p in row]
    return contact_sheet(np.stack(tiles), len(rows[0]), side=side)


def pictured(name: str) -> bool:
    """Whether there is a picture by a method."""
    return name in GALLERY and (PICTURES / f"{name}.png").exists()


def gallery_page() -> str:
    """docs/gallery.md: every picture that is there, with its commands; what several start from comes first, once."""
    names = [name for name in GALLERY if pictured(name)]
    used = Counter(command for name in names for command in GALLERY[name].commands)
    shared = [command for command, times in used.items() if times > 1]
    lines = [
        "# Gallery", "",
        "Pictures by the methods on the embedded model, with its presets: the first seeds, not selected. All are "
        "generated. Each block of commands runs as it stands, behind the first (`python scripts/gallery.py` runs them "
        "all).", "",
    ]  # fmt: skip
    if shared:
        lines += ["What several of them start from comes first:", "", "```", *shared, "```", ""]
    for name in names:
        lines += [f"## {name}", "", *section(name, "gallery", shared), "", f"[Its page](methods/{name}.md).", ""]
    return "\n".join(lines)


def section(name: str, folder: str, known: Sequence[str] = ()) -> list[str]:
    """The picture of a method, what it shows, and its commands that are not known yet, as Markdown."""
    shown = GALLERY[name]
    told = shown.told if len(shown.rows) == 1 else f"Rows: {shown.told}"
    commands = [command for command in shown.commands if command not in known]
    return [f"![{name}]({folder}/{name}.png)", "", f"{told[0].upper()}{told[1:]}.", "", "```", *commands, "```"]


def main() -> None:
    from sfumato.files import save_png

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=GALLERY, metavar="METHOD")
    parser.add_argument("--work", type=Path, default=Path("gallery"), help="where the commands run")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for name in args.only or GALLERY:
        target = PICTURES / f"{name}.png"
        if args.only or not target.exists():
            shown = GALLERY[name]
            about = {"model": "sketch", "commands": "; ".join(shown.commands), "rows": shown.told}
            PICTURES.mkdir(parents=True, exist_ok=True)
            save_png(target, made(shown, args.work), about, overwrite=True)
            print(f"written: {target}", flush=True)


if __name__ == "__main__":
    main()
