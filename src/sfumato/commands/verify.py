"""``sfumato verify DIR``: is the evidence of an audit what it says? Of pictures, see `sfumato.commands.marks`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from sfumato.commands import marks
from sfumato.commands.options import parse
from sfumato.errors import SfumatoError
from sfumato.text import counted

EXAMPLE = "sfumato verify evidence/"
SHOWN = 10
ABOUT = """Every hash, what is missing or was added, the signature, whether manifest, report and pictures agree, and
some pictures drawn anew. The report's figures are not computed again.

Of pictures in its place the marks are read: `sfumato verify two/*.png`, and `sfumato verify two/one.png --help`."""


@dataclass(frozen=True, kw_only=True)
class Which:
    """Options of the command; the fields of `sfumato.audit.verify.Verify` come on top."""

    evidence: Annotated[Path, Positional]
    """The folder that `sfumato audit --evidence` wrote, or its ZIP."""


class Unsound(SfumatoError):
    """The evidence is not what it says."""


def main(args: list[str]) -> None:
    if marks.asked(args):
        marks.main(args)
        return

    from sfumato.audit.verify import Verify
    from sfumato.pipeline.saving import quiet

    settings, own = parse("sfumato verify", args, Verify, Which, about=f"Example: {EXAMPLE}\n\n{ABOUT}")
    with quiet():
        found = Verify(**settings).run(own["evidence"])
    print(f"hashes: {counted(found.files, 'file')} as written down")
    print(f"signature: by the key {found.signed}" if found.signed else "signature: none")
    if found.furthest is not None:
        same = "to the same bits" if found.furthest == 0 else f"no channel further off than {found.furthest} of 255"
        print(f"drawn anew: {counted(found.redrawn, 'picture')}, {same}")
    if found.seed is not None:
        print(f"which pictures: chosen with --seed {found.seed}")
    for note in found.notes:
        print(note)
    if found.wrong:
        more = [f"and {len(found.wrong) - SHOWN} more"] if found.wrong[SHOWN:] else []
        raise Unsound("; ".join([*found.wrong[:SHOWN], *more]))
    print("sound; the figures were not computed again: the audit's command, in README.txt, does that")
