"""``sfumato doctor``: is this installation sound?"""

from __future__ import annotations

import platform
import shutil
from importlib import metadata, util
from pathlib import Path

import sfumato
from sfumato.commands.tables import show_table
from sfumato.errors import unknown
from sfumato.files import sha256_of
from sfumato.plan import human_bytes

HELP = """usage: sfumato doctor

Example: sfumato doctor

Versions, devices, optional extras, embedded models and disk. Exit status 1 if something is broken.
"""
SUMS = "SHA256SUMS"


def main(args: list[str]) -> int:
    if {"-h", "--help"} & set(args):
        print(HELP, end="")
        return 0
    if args:
        raise unknown("option of sfumato doctor", args[0], ["--help"])
    rows = [("ok", "sfumato", sfumato.__version__), ("ok", "python", platform.python_version())]
    rows += requirements() + devices() + assets(Path(sfumato.__file__).parent / "assets")
    rows.append(("ok", "free disk here", human_bytes(shutil.disk_usage(".").free)))
    show_table(("", "what", "found"), rows)
    broken = [what for state, what, _ in rows if state == "BROKEN"]
    print(f"broken: {', '.join(broken)}" if broken else "all is well")
    return 1 if broken else 0


def requirements() -> list[tuple[str, str, str]]:
    """(state, name, version) of what sfumato needs (missing is broken) and of its extras (they may be)."""
    from packaging.requirements import Requirement

    rows = {}
    try:
        lines = metadata.requires("sfumato") or []
    except metadata.PackageNotFoundError:
        return [("BROKEN", "installation", "the package is not installed: pip install -e .")]
    for line in lines:
        needed = Requirement(line)
        extra = needed.marker is not None and not needed.marker.evaluate({"extra": ""})
        if needed.name == "sfumato" or (extra and needed.name in rows):
            continue
        try:
            found = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            state, found = ("-", "not installed (optional)") if extra else ("BROKEN", "missing")
        else:
            fits = needed.specifier.contains(found, prereleases=True)
            state, found = ("ok", found) if fits else ("BROKEN", f"{found}, but {needed.specifier} is needed")
        rows[needed.name] = (state, needed.name, found)
    return sorted(rows.values(), key=lambda row: row[0] == "-")


def devices() -> list[tuple[str, str, str]]:
    """What torch can compute on."""
    if util.find_spec("torch") is None:
        return []
    import torch

    rows = [("ok", "cpu", f"{torch.get_num_threads()} threads")]
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        rows.append(("ok", f"cuda:{i}", f"{found.name}, {human_bytes(found.total_memory)}"))
    if torch.backends.mps.is_available():
        rows.append(("ok", "mps", "available"))
    return rows


def assets(folder: Path) -> list[tuple[str, str, str]]:
    """Every embedded file against its line in ``SHA256SUMS``, which ``sha256sum`` wrote."""
    sums = folder / SUMS
    if not sums.is_file():
        return [("BROKEN", "embedded models", f"{SUMS} is missing: install the package again")]
    rows: dict[str, list[str]] = {}
    for line in sums.read_text(encoding="utf-8").splitlines():
        digest, name = line.split(maxsplit=1)
        name = name.removeprefix("*").removeprefix("./")
        wrong = rows.setdefault(name.split("/")[0], [])
        if not (folder / name).is_file():
            wrong.append(f"{name} is missing")
        elif sha256_of(folder / name) != digest:
            wrong.append(f"{name} differs from what was shipped")
    return [
        ("BROKEN" if wrong else "ok", f"embedded {name}", "; ".join(wrong) or "checksums agree")
        for name, wrong in rows.items()
    ]
