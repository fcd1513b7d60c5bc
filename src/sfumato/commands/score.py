"""``sfumato score``: the numbers that judge generated pictures, against real ones, references or prompts."""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sfumato.commands.options import parse
from sfumato.commands.tables import show_table
from sfumato.files import refuse_existing, write_json
from sfumato.metrics.inception import CONVERT
from sfumato.metrics.record import Score
from sfumato.metrics.scoring import PAIRS, SETS, USUAL, Run, Scoring
from sfumato.plan import human_time
from sfumato.versions import versions

EXAMPLE = "sfumato score --real photos/ --fake samples/ --extractor inception --weights inception.safetensors"
FEW = 10_000

ABOUT = f"""Example: {EXAMPLE} --out score.json

Metrics: {", ".join((*SETS, *PAIRS))}; by default {", ".join(USUAL)}, and is where the extractor classifies.

psnr, ssim and lpips hold each generated picture against the real one of its name; clip holds it against a line of
--prompts. Of the metrics that are measured by default, those that the pictures are too few for are left out.

The weights of the FID's Inception are read from safetensors only; a .pth file is converted once by:
python -c "{CONVERT}" IN.pth OUT.safetensors"""


@dataclass(frozen=True, kw_only=True)
class Options(Scoring):
    """Options of the command."""

    out: Path
    """JSON file for the scores, each with its protocol."""
    overwrite: bool = False
    """Replace the output if it exists."""


def main(args: list[str]) -> None:
    options = Options(**parse("sfumato score", args, Options, about=ABOUT)[0])
    options.wanted()  # what can be wrong with the words is told before anything is opened
    refuse_existing(options.out, options.overwrite)
    run = Run(options)
    run.plan([str(options.out)]).show()
    began = time.perf_counter()
    scores = run.scores()
    seconds = time.perf_counter() - began
    record = {
        "scores": {score.metric: score.to_json() for score in scores},
        "command": shlex.join(["sfumato", *sys.argv[1:]]),
        "sources": {s.where: {"n": s.n, "features": str(s.kept or "")} for s in run.sources},
        "seconds": round(seconds, 1),
        "versions": versions(),
    }
    write_json(options.out, record, options.overwrite)
    show_table(("metric", "value", "95 % interval", "spread", "better", "real", "generated"), map(row, scores))
    for note in (*(f"left out: {why}" for why in run.skipped.values()), *notes(scores)):
        print(note)
    print(f"written: {options.out} (in {human_time(seconds)})")


def row(score: Score) -> tuple[str, ...]:
    """A score as a line of the table."""
    interval = "none" if math.isnan(score.low) else f"[{score.low:.5g}, {score.high:.5g}]"
    spread = "" if score.spread is None else f"{score.spread:.3g}"
    counts = str(score.n_real or "-"), str(score.n_gen)
    return score.metric, f"{score.value:.6g}", interval, spread, score.better, *counts


def notes(scores: Sequence[Score]) -> list[str]:
    """What the reader should know of these numbers."""
    told = []
    few = [s for s in scores if s.metric in ("fid", "fd") and min(s.n_gen, s.n_real) < FEW]
    if few:
        told.append(
            f"{few[0].metric} of fewer than {FEW} pictures lies above its limit, by an amount that depends on the "
            "model: compare at equal numbers only, or measure fid-inf"
        )
    if any(s.metric == "is" for s in scores):
        told.append("the Inception score says something about pictures of the kinds its classifier knows")
    return told
