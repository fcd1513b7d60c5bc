"""Checking the evidence of an audit: its hashes, its signature, and some of its pictures drawn anew."""

from __future__ import annotations

import random
import re
import secrets
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from sfumato.errors import BadInput
from sfumato.fields import Natural, Seed, check
from sfumato.files import as_chunk, read_png_metadata, sha256_of
from sfumato.foreign import read_json, reading, shaped
from sfumato.metrics.resize import to_bytes
from sfumato.pipeline import Text2Image, load_text2image
from sfumato.pipeline.load import precision, single_file

from .drawing import CEILING, FLOOR, OTHER_SEEDS
from .evidence import FORMAT, MANIFEST, PUBLIC, SIGNATURE, SUMS, require_cryptography

LARGEST = 20_000_000_000
"""Bytes that an archive may unfold to."""
REPORT = "report/report.json"
SHAPE = {
    "format": int, "concepts": list, "protocol": dict, "models": dict, "drawing": dict, "pictures": list,
    "versions": dict,
}  # fmt: skip
WAYS = {"sampling_steps": int | None, "cfg_scale": int | float | None, "scheduler": str | None}


@dataclass(frozen=True)
class Checked:
    """What was found.

    Attributes:
        files: how many files have the hash that is written down.
        wrong: what does not hold, a sentence each, with the file's name.
        signed: fingerprint of the key that signed, or "".
        redrawn: pictures that were drawn anew.
        furthest: the largest difference of a channel of theirs, of 255; None where none was drawn.
        notes: what a reader should know besides.
        seed: of the choice of those pictures, with which the check can be repeated; None where none was to be drawn.
    """

    files: int
    wrong: Sequence[str] = ()
    signed: str = ""
    redrawn: int = 0
    furthest: int | None = None
    notes: Sequence[str] = field(default=())
    seed: int | None = None

    @property
    def sound(self) -> bool:
        return not self.wrong


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Checks an evidence folder, or its ZIP: every hash, what is missing or was added, the signature, whether manifest,
    report and pictures say the same, and some pictures drawn anew.

    Pictures are drawn in batches of one, and batches of other sizes round differently: hence the tolerance. What was
    drawn under attack is not drawn again, since the attack would have to be found again, and the report's figures are
    not computed again, since the detector would have to look again: run the audit's command.
    """

    redraw: Natural = 4
    """How many random pictures to draw anew, of both models; 0: only hashes and signature."""
    tolerance: Natural = 3
    """How far a channel of such a picture may be from the one in the folder, of 255."""
    before: str | Text2Image | None = None
    """The original model, where it is not where the evidence says."""
    after: str | Text2Image | None = None
    """The edited model, likewise."""
    public_key: Path | None = None
    """The key in PEM that must have signed; by default whichever lies in the folder, whose fingerprint is shown."""
    seed: Seed | None = None
    """Of the choice of pictures, to repeat a check; by default another each time, which is told: whoever made the
    evidence cannot know which pictures will be looked at."""
    device: str | None = None
    """Where the models run: cpu, cuda, cuda:1, mps ...; by default the fastest there is."""

    def __post_init__(self) -> None:
        check(self)

    def run(self, evidence: str | Path) -> Checked:
        """Check a folder or a ZIP.

        Raises:
            BadInput: it is no evidence at all; a model cannot be loaded.
        """
        with _opened(Path(evidence)) as folder:
            right, wrong = checked_sums(folder)
            signed, complaint = self._signature(folder)
            if wrong := [*wrong, *complaint]:  # of a manifest that may have been changed nothing follows
                return Checked(right, wrong, signed, notes=["no picture was drawn anew"])
            manifest = read_json(folder / MANIFEST, SHAPE, "it is no evidence of an audit")
            if manifest["format"] != FORMAT:
                raise BadInput(f"{evidence} is of format {manifest['format']}, this package reads {FORMAT}: update it")
            with reading(folder / MANIFEST, "the manifest of an audit", "it is no evidence of an audit"):
                wrong = contradictions(folder, manifest)
            lacking = {"floor", "ceiling"} - {row["kind"] for row in manifest["pictures"]}
            notes = ["pictures of floor and ceiling are not there, as of earlier versions"] if lacking else []
            if wrong or not self.redraw:
                notes += ["no picture was drawn anew"] if wrong else []
                return Checked(right, wrong, signed, notes=notes)
            found = self._redrawn(folder, manifest, right, signed)
            return replace(found, notes=[*notes, *found.notes])

    def _signature(self, folder: Path) -> tuple[str, list[str]]:
        """(fingerprint or "", complaints)."""
        there = folder / SIGNATURE
        if not there.is_file():
            if self.public_key:
                return "", ["it is not signed, and a key was named"]
            return "", [f"{SIGNATURE} is missing, though {PUBLIC} is there"] if (folder / PUBLIC).is_file() else []
        if self.public_key is None and not (folder / PUBLIC).is_file():
            return "", [f"{PUBLIC} is missing, though {SIGNATURE} is there"]
        require_cryptography()
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

        path = self.public_key or folder / PUBLIC
        with reading(path, "a public key in PEM"):
            key = load_pem_public_key(path.read_bytes())
        if not isinstance(key, Ed25519PublicKey):
            raise BadInput(f"{path} holds another kind of key than Ed25519")
        try:
            key.verify(there.read_bytes(), (folder / SUMS).read_bytes())
        except InvalidSignature:
            return "", [f"{SIGNATURE} is no signature of {SUMS} by that key"]
        return key.public_bytes(Encoding.Raw, PublicFormat.Raw).hex(), []

    def _redrawn(self, folder: Path, manifest: Mapping[str, Any], right: int, signed: str) -> Checked:
        wrong, notes, furthest, drawn = [], [], 0, 0
        plain = [
            (row["model"], one) for row in manifest["pictures"] if "attack" not in row["kind"] for one in row["files"]
        ]
        seed = secrets.randbelow(2**32) if self.seed is None else self.seed
        chosen = random.Random(seed).sample(plain, min(self.redraw, len(plain)))
        for whose in ("before", "after"):
            if not (mine := [one for model, one in chosen if model == whose]):
                continue
            pipe = self._model(whose, manifest["models"][whose])
            about, told = pipe.describe(), manifest["models"][whose]
            if about["sha256"] != told["hash"]:
                wrong.append(
                    f"{told['model']} has weights of hash {about['sha256'][:16]}, audited was {told['hash'][:16]}"
                )
                continue
            for one in mine:
                asked = shaped(manifest["drawing"][whose], WAYS, folder / MANIFEST)
                asked = {name: asked.get(name) for name in WAYS}
                picture = to_bytes(pipe.draw([one["prompt"]], [one["seed"]], **asked))[0].permute(1, 2, 0).cpu().numpy()
                with reading(folder / one["file"], "a picture"), Image.open(folder / one["file"]) as image:
                    before = np.asarray(image.convert("RGB"))
                if before.shape != picture.shape:
                    wrong.append(f"{one['file']}: drawn anew it has another size")
                    continue
                gap = int(np.abs(before.astype(int) - picture.astype(int)).max())
                drawn, furthest = drawn + 1, max(furthest, gap)
                if gap > self.tolerance:
                    wrong.append(
                        f"{one['file']}: drawn anew it differs by up to {gap} of 255 (allowed: {self.tolerance})"
                    )
        from sfumato.versions import versions

        if others := [n for n, v in versions().items() if manifest["versions"].get(n) != v]:
            notes.append(f"drawn with other versions of {', '.join(others)} than the audit's")
        return Checked(right, wrong, signed, drawn, furthest if drawn else None, notes, seed)

    def _model(self, whose: str, told: Mapping[str, Any]) -> Text2Image:
        given = getattr(self, whose)
        if isinstance(given, Text2Image):
            return given
        name = given or told["model"]
        if told.get("adapters"):
            raise BadInput(f"{name} was audited with adapters attached: give the pipeline in Python, or --redraw 0")
        # Only files whose keys leave it open are told what they predict; all others say it themselves.
        told_of = told.get("prediction") if single_file(name) else None
        try:
            return load_text2image(name, self.device, precision(told.get("dtype")), told_of)
        except BadInput as error:
            raise BadInput(
                f"{error}; say where the model is with --{whose}, or check hashes only: --redraw 0"
            ) from error


def checked_sums(folder: Path) -> tuple[int, list[str]]:
    """(files whose hash is right, complaints): changed, missing and added files, by name.

    Raises:
        BadInput: there are no sums.
    """
    with reading(folder / SUMS, "the hashes of an evidence folder", "it is no evidence of an audit"):
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    told: dict[str, str] = {}
    for line in lines:
        found = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if found is None or Path(found[2]).is_absolute() or ".." in Path(found[2]).parts:
            raise BadInput(f"{folder / SUMS} has a line that is no hash and file: it is no evidence of an audit")
        if told.setdefault(found[2], found[1]) != found[1]:
            raise BadInput(f"{folder / SUMS} has two hashes of {found[2]}: it is no evidence of an audit")
    # A link to a folder is a folder to whoever follows it, and nothing that is told.
    files = [f for f in folder.rglob("*") if f.is_symlink() or not f.is_dir()]
    there = {f.relative_to(folder).as_posix() for f in files} - {SUMS, SIGNATURE}
    wrong = [f"{name} is a link" for name in (SUMS, SIGNATURE) if (folder / name).is_symlink()]
    wrong += [f"{name} is missing" for name in sorted(told.keys() - there)]
    wrong += [f"{name} was added" for name in sorted(there - told.keys())]
    right = 0
    for name in sorted(told.keys() & there):
        if (folder / name).is_symlink():
            wrong.append(f"{name} is a link")
        elif sha256_of(folder / name) == told[name]:
            right += 1
        else:
            wrong.append(f"{name} was changed")
    return right, wrong


def contradictions(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """What manifest, report and pictures say differently of one another, though every hash is right."""
    report = read_json(folder / REPORT, {"concepts": list, "protocol": dict, "erasure": dict})
    protocol = manifest["protocol"]
    wrong = [] if report["concepts"] == manifest["concepts"] else [f"{REPORT} and {MANIFEST} differ in concepts"]
    names = sorted(report["protocol"].keys() | protocol.keys())
    if odd := [name for name in names if report["protocol"].get(name) != protocol.get(name)]:
        wrong.append(f"{REPORT} and {MANIFEST} differ in the protocol's {', '.join(odd)}")
    for whose in ("before", "after"):
        told = manifest["models"][whose]
        if any(told.get(name) != protocol[whose].get(name) for name in protocol[whose]):
            wrong.append(f"{MANIFEST} tells two things of the model {whose} the edit")
    return wrong + _pictures(folder, manifest)


def _pictures(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """The same of pictures: listed once each, with the prompt and seed that lie inside, and all that were asked."""
    rows, protocol = manifest["pictures"], manifest["protocol"]
    listed = [one["file"] for row in rows for one in row["files"]]
    there = {f"pictures/{f.name}" for f in (folder / "pictures").iterdir()}
    wrong = [f"{name} is listed in {MANIFEST} and not there" for name in sorted(set(listed) - there)]
    wrong += [f"{name} is not listed in {MANIFEST}" for name in sorted(there - set(listed))]
    wrong += [f"{name} is listed twice in {MANIFEST}" for name, times in Counter(listed).items() if times > 1]
    for row in rows:
        for one in (one for one in row["files"] if one["file"] in there):
            with reading(folder / one["file"], "a picture"):
                about = read_png_metadata(folder / one["file"])
            said = {"prompt": one["prompt"], "seed": one["seed"], "drawn as": row["kind"]}
            said["model"] = protocol[row["model"]]
            if odd := [name for name, text in said.items() if about.get(name) != as_chunk(text)]:
                wrong.append(f"{one['file']} says another {', '.join(odd)} than {MANIFEST}")
    asked = list(zip(protocol["prompts"], protocol["seeds"], strict=True))
    for whose in ("before", "after"):
        own = [row for kind in ("kept", "asked") for row in rows if (row["kind"], row["model"]) == (kind, whose)]
        if [(one["prompt"], one["seed"]) for row in own for one in row["files"]] != asked:
            wrong.append(f"{MANIFEST} lists other pictures of the model {whose} the edit than its protocol asks for")
    kept = [(one["prompt"], one["seed"]) for row in rows if row["kind"] == "kept" for one in row["files"]]
    for kind, count, offset in (("floor", FLOOR, 0), ("ceiling", CEILING, OTHER_SEEDS)):
        own = [(one["prompt"], one["seed"]) for row in rows if row["kind"] == kind for one in row["files"]]
        # Both models draw what is kept, the one before the edit first.
        expected = [(prompt, seed + offset) for prompt, seed in kept[: min(count, len(kept) // 2)]]
        if kind in {row["kind"] for row in rows} and own != expected:
            wrong.append(f"{MANIFEST} lists other pictures of the {kind} than an audit draws")
    return wrong


@contextmanager
def _opened(path: Path) -> Iterator[Path]:
    """The folder itself, or what an archive holds, unfolded for the block.

    Raises:
        BadInput: neither; an archive with paths that lead out of it, or of an unreasonable size.
    """
    if path.is_dir():
        yield path
        return
    with TemporaryDirectory() as unfolded:
        with (
            reading(path, "an evidence folder or its ZIP", "give the folder or the ZIP"),
            zipfile.ZipFile(path) as archive,
        ):
            members = archive.infolist()
            name, times = max(Counter(m.filename for m in members).items(), key=lambda item: item[1], default=("", 0))
            if times > 1:
                raise BadInput(f"{path} holds {name} twice, of which tools unpack one or the other: it is no evidence")
            if sum(m.file_size for m in members) > LARGEST:
                raise BadInput(f"{path} would unfold to more than {LARGEST // 10**9} GB: it is no evidence of an audit")
            if any(Path(m.filename).is_absolute() or ".." in Path(m.filename).parts for m in members):
                raise BadInput(f"{path} holds a path that leads out of it: it is no evidence of an audit")
            archive.extractall(unfolded)
        inside = list(Path(unfolded).iterdir())
        if len(inside) != 1 or not inside[0].is_dir():
            found = ", ".join(sorted(p.name for p in inside)[:5]) or "nothing"
            raise BadInput(f"{path} holds {found} where there is to be one folder: it is no evidence of an audit")
        yield inside[0]
