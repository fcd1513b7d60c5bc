"""``sfumato protect METHOD``: pictures that models imitate and edit badly, and a page that says how far that goes."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.commands.verb import Equipped, load_equipped, read
from sfumato.errors import BadInput
from sfumato.fields import Count, Natural
from sfumato.plan import Plan, human_time
from sfumato.text import counted

if TYPE_CHECKING:
    from sfumato.pipeline import Text2Image
    from sfumato.protect.base import Protection
    from sfumato.report.protection import ProtectionReport

EXAMPLE = "sfumato protect {name} --model sketch --images mine/ --out safe/"


@dataclass(frozen=True, kw_only=True)
class Protect(Equipped):
    """Options of the verb."""

    model: str
    """The latent diffusion model against which pictures are protected."""
    images: Path
    """A folder of pictures, or one: 8 bits a channel, grey or colour, with alpha or without."""
    out: Path
    """Folder for the protected pictures (PNG), the record and the page; the same command goes on with one."""
    judged: Natural = 4
    """How many of the pictures are put to the proof; 0: no page is written."""
    strengths: tuple[float, ...] = (0.05, 0.1, 0.3)
    """Strengths of the proof's img2img, in (0, 1]; what is left is judged at the last."""
    sampling_steps: Count = 100
    """Denoising steps of the proof, without guidance."""
    word_updates: Natural = 0
    """Updates of the proof's textual inversion, of the clean and of the protected pictures; 0: none (300 do)."""
    upscaler: Path | None = None
    """A diffusers upscaling pipeline on this machine, as one more change that protection has to survive."""


def main(args: list[str]) -> None:
    from sfumato.protect.parts.files import found_in
    from sfumato.protect.parts.folder import pairs, protect_folder

    entry, method, options = read("protect", args, Protect, EXAMPLE)
    given = found_in(options.images)
    if not options.strengths or not all(0 < s <= 1 for s in options.strengths):
        raise BadInput(f"strengths lie in (0, 1], got {', '.join(map(str, options.strengths)) or 'none'}")
    pipe = load_equipped(options.model, options)
    updates = method.steps(len(given))
    title = f"{counted(len(given), 'picture')}, {counted(updates, 'step')}, at most {method.budget} of 255 levels"
    writes = [f"{options.out}/ (PNG, protect.json{', index.html, audit.json' if options.judged else ''})"]
    Plan(title, seconds=_seconds(method, pipe, given[0].file, updates), writes=writes).show()
    began = time.perf_counter()
    record = protect_folder(method, pipe, options.images, options.out, progress=True)
    took = human_time(time.perf_counter() - began)
    most = max(x["levels"] for x in record["pictures"].values())
    print(f"{counted(len(given), 'picture')} in {options.out}, changed by at most {most} of 255 levels, in {took}")
    if options.judged:
        told = {"name": entry.name, "paper": str(entry.paper), **asdict(method)}
        report = judged(pipe, method, options, record, told, pairs(options.images, options.out, options.judged))
        report.write(options.out)
        print(*report.findings()[1:], f"page: {options.out / 'index.html'}", sep="\n")


def _seconds(method: Protection, pipe: Text2Image, file: Path, updates: int) -> float | None:
    """The time of all steps, from one step on the first picture."""
    from dataclasses import replace

    from sfumato.protect.parts.files import read_picture

    if not hasattr(method, "updates"):
        return None
    clean, once = read_picture(file), replace(method, **{"updates": 1})
    start = time.perf_counter()
    once.run(pipe, clean)
    return (time.perf_counter() - start) * updates * method.batch


def judged(
    pipe: Text2Image,
    method: Protection,
    options: Protect,
    record: dict[str, Any],
    told: dict[str, Any],
    found: list[Any],
) -> ProtectionReport:
    """The proof sheet and what is left, for the page."""
    import torch

    from sfumato.metrics.perceptual import PSNR, OneMinusSSIM
    from sfumato.progress import bar
    from sfumato.protect.parts.mimicry import WordSettings
    from sfumato.protect.parts.proof import prove
    from sfumato.protect.parts.survival import (
        CHANGES,
        diffusion_upscaler,
        interval,
        judge_of,
        square,
        survival,
        upscaled,
    )
    from sfumato.report.protection import ProtectionReport, Strip
    from sfumato.versions import versions

    changes, left_out = dict(CHANGES), []
    if options.upscaler is None:
        left_out.append("an upscaler (none was named with --upscaler)")
    else:
        changes["an upscaler"] = upscaled(diffusion_upscaler(options.upscaler))
    how: dict[str, Any] = {"prompt": getattr(method, "prompt", "a photo"), "sampling_steps": options.sampling_steps}
    how["seed"] = method.seed
    word = WordSettings(updates=options.word_updates, seed=method.seed) if options.word_updates else None
    with bar("judging", (len(changes) + 1) * len(found), True) as advance:
        proofs = prove(pipe, found, strengths=options.strengths, word=word, advance=advance, **how)
        left = survival(
            pipe, found, method.budget, changes=changes, strength=options.strengths[-1], advance=advance, **how
        )
    cut = [square(pipe, pair) for pair in found]
    fidelity = {"PSNR, dB": [float(PSNR()(safe, clean)) for clean, safe in cut]}
    if all(clean.shape[-1] >= 11 for clean, _ in cut):
        fidelity["SSIM"] = [1 - float(OneMinusSSIM()(safe, clean)) for clean, safe in cut]
    finite = {name: x for name, x in fidelity.items() if torch.tensor(x).isfinite().all()}
    strips = []
    for i, (pair, (clean, safe)) in enumerate(zip(found, cut, strict=True)):
        row = [("clean", clean[0]), ("protected", safe[0])]
        for proof in proofs:
            row += [
                (f"{proof.title}, of the clean", proof.clean[i]),
                (f"{proof.title}, of the protected", proof.safe[i]),
            ]
        bytes_of = lambda x: (255 * x.clamp(0, 1)).round().byte().permute(1, 2, 0).cpu().numpy()
        strips.append(Strip(pair.name, [(label, bytes_of(x)) for label, x in row]))
    return ProtectionReport(
        method=told,
        model=options.model,
        pictures={name: {"levels": x["levels"], "file": x["file"]} for name, x in record["pictures"].items()},
        fidelity={name: interval(x) for name, x in finite.items()},
        survival=[x.to_json(left[0]) for x in left],
        proofs=[x.to_json() for x in proofs],
        judge=judge_of(cut[0][0].shape[-1]).name,
        left_out=left_out,
        strips=strips,
        versions=versions(),
        reproduce=shlex.join(["sfumato", *sys.argv[1:]]),
    )
