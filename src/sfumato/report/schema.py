"""What an audit found: the public contract of ``report.json``.

Nothing heavy is imported here, so reading, comparing and printing a report needs no torch.  A figure that was
not measured is ``None`` everywhere (``null`` in the file), never zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from sfumato.errors import BadInput
from sfumato.foreign import read_json, reading, reason

PROTOCOL_KEYS = (
    "before", "after", "detector", "prompts", "seeds", "scheduler", "sampling_steps", "guidance", "size", "resize",
    "versions",
)  # fmt: skip
"""What ``AuditRecord.protocol`` must say; see `AuditRecord` for the shape of each."""


def _finite(x: float | None) -> float | None:
    return None if x is None or not math.isfinite(x) else float(x)


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval ``[low, high]`` over ``n`` pictures (or prompts, where so stated).

    Rates are shares in [0, 1].  NaN and infinities become ``None``: not measured.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int

    def __post_init__(self) -> None:
        for name in ("value", "low", "high"):
            object.__setattr__(self, name, _finite(getattr(self, name)))
        if self.n < 0 or (self.low is not None and self.high is not None and self.low > self.high):
            raise BadInput(f"not an interval: low {self.low}, high {self.high}, n {self.n}")

    @property
    def measured(self) -> bool:
        return self.value is not None and self.n > 0

    def to_json(self, key: str = "rate") -> dict[str, float | int | None]:
        return {key: self.value, "low": self.low, "high": self.high, "n": self.n}

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | None, key: str = "rate") -> Interval | None:
        if data is None:
            return None
        return cls(data[key], data["low"], data["high"], data["n"])


@dataclass(frozen=True)
class PromptDistance:
    """How far the pictures of one retained prompt moved (mean over its seeds)."""

    prompt: str
    distance: float


@dataclass(frozen=True)
class Integrity:
    """Perceptual distance between the two models' pictures of retained prompts, same seeds; 0 = same picture.

    ``floor`` is the distance of the original model to itself, ``ceiling_seeds`` the distance between its
    pictures of one prompt with different seeds, ``ceiling_prompts`` between those of different prompts.
    """

    mean: Interval
    distance: str
    floor: float | None = None
    ceiling_seeds: float | None = None
    ceiling_prompts: float | None = None
    per_prompt: Sequence[PromptDistance] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            **self.mean.to_json("mean"),
            "distance": self.distance,
            "floor": _finite(self.floor),
            "ceiling_seeds": _finite(self.ceiling_seeds),
            "ceiling_prompts": _finite(self.ceiling_prompts),
            "per_prompt": [{"prompt": p.prompt, "distance": _finite(p.distance)} for p in self.per_prompt],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Integrity:
        mean = Interval(data["mean"], data["low"], data["high"], data["n"])
        rest = {k: data[k] for k in ("distance", "floor", "ceiling_seeds", "ceiling_prompts")}
        return cls(mean, **rest, per_prompt=[PromptDistance(**p) for p in data["per_prompt"]])


@dataclass(frozen=True)
class Language:
    """How much is erased of what is asked for in one language.

    ``erased``: share of the edited model's pictures without the concept. ``seen``: share of the original's with it;
    where that is small the model does not understand the language, and ``erased`` says nothing.
    """

    erased: Interval | None
    seen: float | None

    def to_json(self) -> dict[str, Any]:
        return {"erased": self.erased and self.erased.to_json(), "seen": self.seen}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Language:
        return cls(Interval.from_json(data["erased"]), data["seen"])


@dataclass(frozen=True)
class Alignment:
    """How well pictures match their prompts, before and after, by ``measure`` (for example "CLIP score")."""

    before: Interval | None
    after: Interval | None
    measure: str

    def to_json(self) -> dict[str, Any]:
        sides = {"before": self.before, "after": self.after}
        return {k: v and v.to_json("mean") for k, v in sides.items()} | {"measure": self.measure}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Alignment:
        before, after = (Interval.from_json(data[k], "mean") for k in ("before", "after"))
        return cls(before, after, data["measure"])


@dataclass(frozen=True)
class Attack:
    """How often an attack makes the detector find the concept again.

    ``recovered``: on the edited model.  ``control``: the same budget without the attack's knowledge.
    ``original``: the same attack on the unedited model, which must succeed for the rest to mean anything.
    ``budget``: what the attacker was given, for example steps, learning rate, tokens, training pictures.
    ``seconds``: wall time of the searches on the edited model, with and without knowledge of the concept.
    ``rows``: what went through the denoising networks in them, a backward pass counted as two.
    ``before``: how often the plain prompts of the same cases show the concept on the edited model without any attack;
    ``further``: of the cases that do not, how many the attack breaks; ``total``: how many show it either way.
    """

    recovered: Interval | None
    control: Interval | None = None
    original: Interval | None = None
    budget: Mapping[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    rows: int | None = None
    before: Interval | None = None
    further: Interval | None = None
    total: Interval | None = None

    def to_json(self) -> dict[str, Any]:
        names = ("recovered", "control", "original", "before", "further", "total")
        rates = {k: getattr(self, k) for k in names}
        told = {"budget": dict(self.budget), "seconds": _finite(self.seconds), "rows": self.rows}
        return {k: v and v.to_json() for k, v in rates.items()} | told

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Attack:
        rates = {k: Interval.from_json(data[k]) for k in ("recovered", "control", "original")}
        apart = {k: Interval.from_json(data.get(k)) for k in ("before", "further", "total")}
        return cls(**rates, **apart, budget=data["budget"], seconds=data.get("seconds"), rows=data.get("rows"))


@dataclass(frozen=True)
class Cost:
    """What the edit took: wall-clock seconds, peak bytes of memory, numbers of parameters."""

    seconds: float | None = None
    peak_memory_bytes: int | None = None
    parameters_changed: int | None = None
    parameters_total: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, kw_only=True)
class AuditRecord:
    """An audit of one edited model against the original, as ``report.json`` keeps it.

    ``erasure``: concept -> share of pictures in which it is gone.  ``retention``: concept -> share of
    pictures in which it is still there as often as before.  ``protocol`` holds `PROTOCOL_KEYS`: ``before``
    and ``after`` are ``{"model": name, "hash": sha256}``, ``detector`` is ``{"name", "hash", "threshold"}``,
    the others any JSON.  It may also hold ``groups`` (group name -> retained concepts, nearest group first),
    ``detected_before`` (concept -> share of the original's pictures asked to show it in which the detector
    finds it) and ``detected_unasked`` (the same share where it was not asked for).
    ``method`` is ``{"name": ..., **exact configuration}``, with what the method found, if anything, as ``found``.
    """

    concepts: Sequence[str]
    erasure: Mapping[str, Interval | None]
    retention: Mapping[str, Interval | None]
    kept: Mapping[str, Interval | None] = field(default_factory=dict)
    """The mean of ``retention`` over all concepts ("all"), and over those of each of several groups, with intervals
    over pictures, each of which may count for several concepts; absent from files of earlier versions."""
    languages: Mapping[str, Language] = field(default_factory=dict)
    """By language, where the concept was asked for in several; absent from the file where it was not."""
    integrity: Integrity | None = None
    alignment: Alignment | None = None
    attacks: Mapping[str, Attack] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    protocol: Mapping[str, Any]
    method: Mapping[str, Any] | None = None
    created: str = ""
    """When the audit ran, ISO 8601."""
    sfumato: str = ""
    """Version of this package."""
    reproduce: str = ""
    """The command line that repeats the audit."""

    def __post_init__(self) -> None:
        if missing := [k for k in PROTOCOL_KEYS if k not in self.protocol]:
            raise BadInput(f"the protocol of a report must say: {', '.join(missing)}")

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, numbers and strings."""
        return {
            "concepts": list(self.concepts),
            "erasure": {k: v and v.to_json() for k, v in self.erasure.items()},
            "retention": {k: v and v.to_json() for k, v in self.retention.items()},
            **({"kept": {k: v and v.to_json() for k, v in self.kept.items()}} if self.kept else {}),
            **({"languages": {k: v.to_json() for k, v in self.languages.items()}} if self.languages else {}),
            "integrity": self.integrity and self.integrity.to_json(),
            "alignment": self.alignment and self.alignment.to_json(),
            "attacks": {k: v.to_json() for k, v in self.attacks.items()},
            "cost": self.cost.to_json(),
            "protocol": dict(self.protocol),
            "method": None if self.method is None else dict(self.method),
            "created": self.created,
            "sfumato": self.sfumato,
            "reproduce": self.reproduce,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; raises `BadInput` naming what is missing or unknown."""
        known, optional = {f.name for f in fields(AuditRecord)}, {"kept", "languages"}
        if not isinstance(data, Mapping) or set(data) | optional != known:
            keys = set(data) if isinstance(data, Mapping) else set()
            odd = [f"missing {k!r}" for k in sorted(known - keys - optional)]
            odd += [f"unknown {k!r}" for k in sorted(keys - known)]
            raise BadInput(f"not a report of this version of sfumato: {', '.join(odd)}")
        try:
            return cls(
                **{k: data[k] for k in ("concepts", "protocol", "method", "created", "sfumato", "reproduce")},
                erasure={k: Interval.from_json(v) for k, v in data["erasure"].items()},
                retention={k: Interval.from_json(v) for k, v in data["retention"].items()},
                kept={k: Interval.from_json(v) for k, v in data.get("kept", {}).items()},
                languages={k: Language.from_json(v) for k, v in data.get("languages", {}).items()},
                integrity=data["integrity"] and Integrity.from_json(data["integrity"]),
                alignment=data["alignment"] and Alignment.from_json(data["alignment"]),
                attacks={k: Attack.from_json(v) for k, v in data["attacks"].items()},
                cost=Cost(**data["cost"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise BadInput(f"the report is damaged ({reason(error)}): run the audit again") from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a report from its folder or its ``report.json``; raises `BadInput` where there is none."""
        path = Path(path)
        file = path / "report.json" if path.is_dir() else path
        if not file.is_file():
            raise BadInput(f"no report at {path}: give a folder written by `sfumato audit`")
        with reading(file, "a report", "run the audit again"):
            return cls.from_json(read_json(file, advice="run the audit again"))
