"""``sfumato studio``: the commands in the browser, on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated

from sfumato.commands.options import parse
from sfumato.fields import Positive, within

EXAMPLE = "sfumato studio --out studio/"
ABOUT = """Load a model, draw, steer, erase and see before and after, audit, attack, compare and read reports, in the
browser. It answers this machine only (from another one: ssh -L 7860:127.0.0.1:7860 MACHINE), fetches nothing and tells
nobody. One job runs at a time. Every picture has its record and the command that makes it again. Needs gradio: pip
install 'sfumato[studio]'"""


@dataclass(frozen=True, kw_only=True)
class Studio:
    """Options of the command."""

    out: Path = Path("studio")
    """Folder for all that is made; one that is there is gone on with."""
    port: Annotated[int, within(0, 65535)] = 7860
    """The port on 127.0.0.1; 0 for any that is free."""
    ledger: Path | None = None
    """Where results of the ledger are kept; by default those that come with the package."""
    largest_upload: Positive = 8.0
    """Gigabytes of a file that the browser may send."""
    browse: bool = False
    """Open the page in the browser."""


def main(args: list[str]) -> None:
    options = Studio(**parse("sfumato studio", args, Studio, about=f"Example: {EXAMPLE}\n\n{ABOUT}")[0])
    # by its name, as commands are found by theirs: the studio stands above the commands that it runs
    serve = import_module("sfumato.studio.serve").serve
    serve(options.out, options.ledger, options.port, int(options.largest_upload * 1e9), options.browse)
