"""The evidence of an audit: a folder, and a ZIP of it, that a reviewer can check without us.

It holds the report, every picture with its provenance, what is needed to draw any of them again, and ``SHA256SUMS``,
which ``sha256sum -c`` reads; with a key, an Ed25519 signature of that file.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from torch import Tensor

from sfumato import __version__, catalog
from sfumato.data.cases import Case
from sfumato.errors import BadInput
from sfumato.files import atomic_file, atomic_folder, refuse_existing, save_png, sha256_of, write_json
from sfumato.foreign import reading
from sfumato.report.audit import AuditReport
from sfumato.versions import versions

from .drawing import CEILING, FLOOR, OTHER_SEEDS, Drawn, Setup, way
from .gallery import arrays
from .measures import Attacks

MANIFEST, SUMS, SIGNATURE, PUBLIC = "manifest.json", "SHA256SUMS", "SHA256SUMS.sig", "public.pem"
FORMAT = 1
README = """Evidence of an audit, written by sfumato {version}.

report/index.html   what was found, to be read in a browser; report/report.json for machines
pictures/           every picture that the figures were read off, with its prompt and seed inside; those that attacks
                    learned from are no part of them, and drawn again by the command below
manifest.json       both models with the hashes of their weights, the protocol, how each picture was drawn, versions
ledger/             what the methods used are known to do, where it was measured
SHA256SUMS          of every file here

Without sfumato:    sha256sum -c SHA256SUMS
With it:            sfumato verify .             (hashes, signature, and some pictures drawn anew)
{signed}
The audit again:    {command}
"""


@dataclass(frozen=True)
class Evidence:
    """What an audit leaves to be checked.

    Attributes:
        setup, drawn, attacked: as the audit's steps gave them.
        report: what it found.
        command: the command line.
        key: file of an Ed25519 private key in PEM, to sign with; None: unsigned.
    """

    setup: Setup
    drawn: Drawn
    attacked: Attacks
    report: AuditReport
    command: str = ""
    key: Path | None = None

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write the folder and ``FOLDER.zip`` beside it: whole or not at all.

        Raises:
            BadInput: something is there (without ``overwrite``); the key cannot be read.
        """
        folder = Path(folder)
        archive = folder.with_name(f"{folder.name}.zip")
        refuse_existing(archive, overwrite)
        key = None if self.key is None else private_key(self.key)
        with atomic_folder(folder, overwrite) as temporary:
            self._fill(temporary, key)
            with atomic_file(archive, overwrite) as zipped:
                _zip(temporary, zipped, folder.name)
        return folder

    def _fill(self, folder: Path, key: Any) -> None:
        self.report.save(folder / "report")
        (folder / "pictures").mkdir()
        rows = [self._picture(folder, *one) for one in self._pictures()]
        names = self._methods()
        (folder / "ledger").mkdir()
        for name in names:
            if (record := recorded(name)) is not None:
                shutil.copyfile(record, folder / "ledger" / f"{name}.json")
        write_json(folder / MANIFEST, {
            "format": FORMAT, "concepts": list(self.report.concepts), "protocol": self.report.protocol,
            "models": {whose: self._model(whose) for whose in ("before", "after")},
            "drawing": {"before": self._way(self.setup.old), "after": self._way(self.setup.new)},
            "pictures": rows, "command": self.command or self.report.reproduce, "versions": versions(),
            "ledger": {name: (folder / "ledger" / f"{name}.json").exists() for name in names},
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        })  # fmt: skip
        signed = f"Signed:             {SIGNATURE} is the Ed25519 signature of {SUMS} by {PUBLIC}\n" if key else ""
        told = README.format(version=__version__, signed=signed, command=self.command or self.report.reproduce)
        (folder / "README.txt").write_text(told, encoding="utf-8")
        if key is not None:
            (folder / PUBLIC).write_bytes(_public_pem(key))
        (folder / SUMS).write_text(sums(folder), encoding="utf-8")
        if key is not None:
            (folder / SIGNATURE).write_bytes(key.sign((folder / SUMS).read_bytes()))

    def _model(self, whose: str) -> dict[str, Any]:
        """What the protocol says of a model, and how it was loaded."""
        pipe = self.setup.old if whose == "before" else self.setup.new
        loaded = {"dtype": str(pipe.dtype).removeprefix("torch."), "prediction": pipe.prediction}
        return {**self.report.protocol[whose], **loaded}

    def _way(self, pipe: Any) -> dict[str, Any]:
        """Settings of `Text2Image.draw`, as JSON has them."""
        return {name: value for name, value in way(self.setup, pipe).items() if name != "batch"}

    def _methods(self) -> list[str]:
        """Catalogue names of the eraser and the attacks, as far as they are known."""
        known = {m.class_name: m.name for m in catalog.METHODS} | {m.name: m.name for m in catalog.METHODS}
        eraser = (self.report.method or {}).get("name")
        attacks = [type(attack).__name__ for attack in self.setup.attacks.values()]
        return [known[name] for name in dict.fromkeys([eraser, *attacks]) if name in known]

    def _pictures(self) -> Iterator[tuple[str, str, Sequence[Case], UInt8[Tensor, "n 3 h w"]]]:
        """(kind, whose, cases, pictures) of all that figures were read off."""
        kept, asked = self.setup.cases.retained, self.setup.targets
        for whose in ("before", "after"):
            yield "kept", whose, kept, getattr(self.drawn.kept, whose)
            yield "asked", whose, asked, getattr(self.drawn.asked, whose)
        yield "floor", "before", kept[:FLOOR], self.drawn.again
        others = [replace(case, seed=case.seed + OTHER_SEEDS) for case in kept[:CEILING]]
        yield "ceiling", "before", others, self.drawn.reseeded
        for name, found in self.attacked.items():
            for k, (concept, pictures) in enumerate(found.items(), 1):
                of = f", concept {k}" if len(found) > 1 else ""
                cases = self.setup.cases.targets[concept][: self.setup.n_attack]
                for part, whose in (("recovered", "after"), ("control", "after"), ("original", "before")):
                    if (drawn := getattr(pictures, part)) is not None:
                        yield f"attack {name}, {part}{of}", whose, cases, drawn

    def _picture(
        self, folder: Path, kind: str, whose: str, cases: Sequence[Case], pictures: UInt8[Tensor, "n 3 h w"]
    ) -> dict[str, Any]:
        """Write them; gives their row of the manifest."""
        stem = "-".join([*kind.replace(",", "").split(), whose])
        told = []
        for i, (case, picture) in enumerate(zip(cases, arrays(pictures), strict=True)):
            name = f"pictures/{stem}-{i:05d}.png"
            about = {"prompt": case.prompt, "seed": case.seed, "model": self.report.protocol[whose], "drawn as": kind}
            save_png(folder / name, picture, about)
            told.append({"file": name, "prompt": case.prompt, "seed": case.seed})
        return {"kind": kind, "model": whose, "files": told}


def sums(folder: Path) -> str:
    """Lines of ``sha256sum``: every file below ``folder`` but the sums themselves and their signature."""
    found = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
    return "".join(f"{sha256_of(folder / name)}  {name}\n" for name in found if name not in (SUMS, SIGNATURE))


def recorded(method: str) -> Path | None:
    """The record of a method's ledger entry inside the package; None where there is none."""
    name = catalog.get(method).ledger
    path = Path(str(files("sfumato"))) / "ledger" / "records" / f"{name}.json"
    return path if path.is_file() else None


def private_key(path: str | Path) -> Any:
    """An Ed25519 private key from a PEM file without a password, as ``openssl genpkey -algorithm ed25519`` writes it.

    Raises:
        BadInput: the library is not installed; no such file, or another kind of key.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    with reading(path, "a private key in PEM", "make one: openssl genpkey -algorithm ed25519 -out key.pem"):
        key = load_pem_private_key(Path(path).read_bytes(), password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise BadInput(f"{path} holds another kind of key: make one with openssl genpkey -algorithm ed25519")
    return key


def require_cryptography() -> None:
    """Refuse to go on where the library that signs is missing.

    Raises:
        BadInput: says how to install it.
    """
    import importlib.util

    if importlib.util.find_spec("cryptography") is None:
        raise BadInput("signatures need the library cryptography: pip install 'sfumato[sign]'")


def _public_pem(key: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _zip(folder: Path, path: Path, name: str) -> None:
    """The folder in an archive, under its name; the same folder gives the same bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(f for f in folder.rglob("*") if f.is_file()):
            about = zipfile.ZipInfo(f"{name}/{file.relative_to(folder).as_posix()}")
            about.compress_type = zipfile.ZIP_STORED if file.suffix == ".png" else zipfile.ZIP_DEFLATED
            archive.writestr(about, file.read_bytes())
