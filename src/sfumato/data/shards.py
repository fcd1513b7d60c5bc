"""Pictures in WebDataset shards: tar files whose members are found once and then read in any order."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import tarfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sfumato.errors import BadInput
from sfumato.files import atomic_file, cache_folder

from .base import Pictures, to_square
from .captions import TEXTS as FIELDS
from .captions import clean, decode, first_of, text_of
from .tables import DEFAULT, check_labels, fields_of, filled
from .walk import SUFFIXES, hidden

KINDS = ("picture", "text", "json", "condition")
TEXTS = (".txt", ".caption")


class TarPictures(Pictures):
    """Samples of shards. Members that share their name up to the first dot are one sample.

    Where each member lies is read once and kept in the cache folder, so that any row is one read away: every process
    and thread reads just the rows it is asked for, and a resumed run needs no position in a stream.
    Shards belong on a disk with fast random access; compressed tars have none.

    Raises:
        BadInput: a shard is missing, damaged or compressed, or holds no picture; some samples but not all have a class
            or a condition.
    """

    def __init__(self, source: str, size: int, caption: str):
        self.shards = shards_of(source)
        self.size, self.template, self.fields = size, caption, fields_of(caption)
        self.index, self.keys, self.label_names, self.left_out = _index(self.shards)
        if not len(self.keys):
            raise BadInput(f"{source} holds no pictures (members KEY{', KEY'.join(sorted(SUFFIXES))})")
        self.conditions = self._all(self.index["condition"][:, 1] > 0, "condition")
        self._all(self.index["label"] >= 0, "class")

    def _all(self, has: np.ndarray, what: str) -> bool:
        if has.any() and not has.all():
            row = int(np.argmin(has))
            raise BadInput(f"{self.row(row)} has no {what}; others do")
        return bool(has.any())

    def __len__(self) -> int:
        return len(self.keys)

    def identity(self) -> str:
        """By the samples' names and where their members lie: to read all captions of large shards would take long."""
        hasher = hashlib.sha256(json.dumps([self.keys, self.template, self.label_names]).encode())
        for name in sorted(self.index):
            hasher.update(np.ascontiguousarray(self.index[name]).tobytes())
        return f"{len(self):,} with SHA-256 {hasher.hexdigest()}"

    def row(self, index: int) -> str:
        """What row ``index`` is called in complaints."""
        return f"{self.keys[index]} in {self.shards[self.index['shard'][index]]}"

    def caption(self, index: int) -> str:
        """The text member's, or the JSON member's by the template; "" for a sample that has neither."""
        values = {}
        if data := self._read("json", index):
            try:
                values = json.loads(decode(data, self.row(index)))
            except (ValueError, RecursionError) as error:
                raise BadInput(f"the JSON of {self.row(index)} cannot be read: {error}") from error
            if not isinstance(values, dict):
                raise BadInput(f"the JSON of {self.row(index)} is no object with the parts of a caption")
        if data := self._read("text", index):
            values["caption"] = clean(decode(data, f"the text of {self.row(index)}"))
        if self.template == DEFAULT:
            told = first_of(FIELDS, values)
            return text_of(values[told]) if told else ""
        if lacking := [f for f in self.fields if f not in values]:
            raise BadInput(f"{self.row(index)} does not fit the caption {self.template!r}: it has no {lacking[0]!r}")
        return filled(self.template, {f: values[f] for f in self.fields}, self.row(index))

    def name(self, index: int) -> str:
        return self.keys[index]

    def label(self, index: int) -> int:
        return int(self.index["label"][index]) if self.label_names else 0

    def picture(self, index: int) -> np.ndarray:
        return to_square(self.encoded(index), self.size, self.row(index))

    def condition(self, index: int) -> np.ndarray:
        if not self.conditions:
            return super().condition(index)
        return to_square(self._read("condition", index), self.size, f"the condition of {self.row(index)}")

    def encoded(self, index: int) -> bytes:
        """Picture ``index`` as it lies in its shard."""
        return self._read("picture", index)

    def _read(self, kind: str, index: int) -> bytes:
        start, length = self.index[kind][index].tolist()
        if not length:
            return b""
        with self.shards[self.index["shard"][index]].open("rb") as shard:
            shard.seek(start)
            return shard.read(length)


def shards_of(source: str) -> list[Path]:
    """The files that a path, several joined by commas, a pattern, or ranges as in "set-{000..127}.tar" name.

    Raises:
        BadInput: one of them is not there.
    """
    files: list[Path] = []
    for part in source.split(","):
        for name in _ranges(part):
            path = Path(name)
            files += sorted(path.parent.glob(path.name)) if "*" in path.name else [path]
    missing = [str(f) for f in files if not f.is_file()]
    if missing or not files:
        raise BadInput(f"no such shard: {', '.join(missing[:3]) or source}")
    return files


def _ranges(pattern: str) -> list[str]:
    """"a{08..10}" -> "a08", "a09", "a10"."""
    if not (match := re.search(r"\{(\d+)\.\.(\d+)\}", pattern)):
        return [pattern]
    first, last = match.groups()
    numbers = (str(i).zfill(len(first)) for i in range(int(first), int(last) + 1))
    return [name for n in numbers for name in _ranges(pattern[: match.start()] + n + pattern[match.end() :])]


def _index(shards: list[Path]) -> tuple[dict[str, np.ndarray], list[str], tuple[str, ...], dict[str, int]]:
    """Where all samples' members lie, the samples' names, the classes' names, what was left out; kept in the cache."""
    about = [(str(s.resolve()), s.stat().st_size, s.stat().st_mtime_ns) for s in shards]
    what = hashlib.sha256(repr((3, about)).encode()).hexdigest()  # 3: the version of what is kept
    file = cache_folder() / f"shards-{what[:24]}.safetensors"
    try:
        with safe_open(file, "numpy") as kept:
            words = json.loads(kept.metadata()["words"])
            return {k: kept.get_tensor(k) for k in kept.keys()}, words["keys"], tuple(words["labels"]), words["left"]  # noqa: SIM118
    except (OSError, LookupError, TypeError, ValueError, SafetensorError):  # not there yet, or damaged
        pass
    samples: list[Any] = []
    left: Counter[str] = Counter()
    for number, shard in enumerate(shards):
        those, out = _samples(shard)
        samples += [(number, *sample) for sample in those]
        left += out
    words = [classes for _, _, _, classes in samples]
    numbers = all(word is None or (word.isdecimal() and len(word) < 19) for word in words)
    known = sorted({word for word in words if word is not None}, key=int if numbers else str)
    if numbers:
        check_labels(map(int, known), 0, str(shards[0]))
    labels = tuple(map(str, range(int(known[-1]) + 1))) if numbers and known else tuple(known)
    place = {word: int(word) if numbers else i for i, word in enumerate(known)}
    index = {"shard": np.array([s[0] for s in samples], np.int32)}
    index["label"] = np.array([place.get(word, -1) for word in words], np.int64)
    for kind in KINDS:
        index[kind] = np.array([s[2].get(kind, (0, 0)) for s in samples], np.int64).reshape(-1, 2)
    keys = [s[1] for s in samples]
    # Kept to save time; where that cannot be, or another process is at it, nothing is lost.
    with contextlib.suppress(BadInput, OSError), atomic_file(file, overwrite=True) as temporary:
        tensors = {k: torch.from_numpy(v) for k, v in index.items()}
        save_file(tensors, temporary, metadata={"words": json.dumps({"keys": keys, "labels": labels, "left": left})})
    return index, keys, labels, dict(left)


def _samples(shard: Path) -> tuple[list[tuple[str, dict[str, tuple[int, int]], str | None]], Counter[str]]:
    """(name, where its members lie, class) of every sample with a picture, in the file's order; what was left out.

    A sample's name ends at the first dot, or where no sample goes by that short name, as in "1.5x.png", at the last
    (before ".cond." in "1.5x.cond.png"). Of two members of one kind the later counts. A hard link stands for the member
    that it names.
    """
    found: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    dotted: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    classes: dict[str, str] = {}
    left: Counter[str] = Counter()
    files: dict[str, tuple[int, int]] = {}
    end = 0
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                key, suffix = _split(member.name)
                if member.isfile():
                    files[member.name] = (member.offset_data, member.size)
                elif not (member.islnk() or member.issym()):
                    continue
                if hidden(tuple(member.name.removeprefix("./").split("/"))):
                    left["hidden or left by a system"] += 1
                    continue
                if not suffix or not key:
                    continue
                samples = found
                if suffix.lower() != ".cls" and not _kind(suffix):  # not one that is known: the name may hold dots
                    longer, suffix = _longer(suffix)
                    samples, key = dotted, key + longer
                named = member.name if member.isfile() else member.linkname if member.islnk() else ""
                kind, place = _kind(suffix), files.get(named)
                if not kind and suffix.lower() != ".cls":
                    continue
                if place is None:
                    left["links to what is no earlier member"] += 1
                elif not kind:
                    classes[key] = clean(decode(tar.extractfile(member).read(), f"{member.name} in {shard}"))
                else:
                    if kind in samples[key]:
                        left[f"further {kind}s of a sample"] += 1
                    samples[key][kind] = place
                    end = max(end, sum(place))
            _check_end(shard, tar.offset, end)
    except (tarfile.TarError, OSError) as error:
        raise BadInput(f"{shard} cannot be read as a tar file ({error}); compressed ones must be unpacked") from error
    for key, places in dotted.items():
        if "picture" in found.get(_split(key)[0], ()):
            left["further pictures of a sample"] += "picture" in places
        else:
            found[key] |= places
    whole = sorted((min(places.values()), key) for key, places in found.items() if "picture" in places)
    return [(key, found[key], classes.get(key)) for _, key in whole], Counter({k: n for k, n in left.items() if n})


def _split(name: str) -> tuple[str, str]:
    """(path up to the first dot of the name, the rest)."""
    folder, _, name = name.rpartition("/")
    key, dot, suffix = name.partition(".")
    return (f"{folder}/{key}" if folder and key else key), dot + suffix


def _longer(suffix: str) -> tuple[str, str]:
    """What of a suffix with several dots belongs to the name, and the suffix that is left."""
    longer, dot, last = suffix.rpartition(".")
    shorter, _, word = longer.rpartition(".")
    whole = f".{word}{dot}{last}"
    return (shorter, whole) if _kind(whole) == "condition" else (longer, dot + last)


def _check_end(shard: Path, offset: int, last: int) -> None:
    """A tar file that was cut off inside a header or a member looks, to a reader, like one that ends there.

    Raises:
        BadInput: there is something after the end, or the end is missing from the last member.
    """
    size = shard.stat().st_size
    with shard.open("rb") as file:
        file.seek(min(offset, size))
        rest = file.read(512)
    if last > size or any(rest):
        raise BadInput(f"{shard} cannot be read as a tar file (cut off after {size} bytes): fetch or write it again")


def _kind(suffix: str) -> str | None:
    """What a member with this suffix is, in whatever letters."""
    suffix = suffix.lower()
    if suffix in SUFFIXES:
        return "picture"
    if suffix.startswith(".cond.") and suffix.removeprefix(".cond") in SUFFIXES:
        return "condition"
    return "text" if suffix in TEXTS else "json" if suffix == ".json" else None
