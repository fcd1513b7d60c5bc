"""The page of a protection: what was changed, what a mimic gets, and how much of it is left after everyday changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.files import atomic_file, write_json
from sfumato.report.images import Embedded, Picture, embed
from sfumato.report.page import SIDE, environment
from sfumato.report.schema import Interval
from sfumato.report.words import MISSING, number, percent
from sfumato.text import counted, shown

LIMITS = (
    "Protection lives in the autoencoder's latents: models that work on pixels are not affected, and other "
    "autoencoders only as far as they resemble this one.",
    "Whoever wants to remove it can: by the changes measured here, by purification with a diffusion model, or by "
    "others yet to come. A published picture stays published, protected as it was on that day.",
    "What is left is measured on few pictures of this folder, with this model; a wide interval says so.",
    "The change can be seen: more budget protects better and shows more.",
)


@dataclass(frozen=True)
class Strip:
    """One picture's row on the sheet: its name, and labelled pictures (uint8, height x width x 3)."""

    name: str
    pictures: Sequence[tuple[str, Picture]]


@dataclass(frozen=True)
class ProtectionReport:
    """What a run of a protection found, as JSON types, and the pictures of its sheet.

    Attributes:
        method: its name and settings.
        model: what it was made with.
        pictures: for each its file and the levels by which it changed.
        fidelity: how near the protected pictures are to the clean ones, by measure: means with intervals.
        survival: rows of `sfumato.protect.parts.survival.Left.to_json`, the first without a change.
        proofs: rows of `sfumato.protect.parts.proof.Proof.to_json`.
        judge: what distances of pictures are measured by.
        left_out: changes that could not be tried here, and why.
    """

    method: Mapping[str, Any]
    model: str
    pictures: Mapping[str, Mapping[str, Any]]
    fidelity: Mapping[str, Any] = field(default_factory=dict)
    survival: Sequence[Mapping[str, Any]] = ()
    proofs: Sequence[Mapping[str, Any]] = ()
    judge: str = ""
    left_out: Sequence[str] = ()
    strips: Sequence[Strip] = field(default=(), repr=False)
    versions: Mapping[str, str] = field(default_factory=dict)
    reproduce: str = ""

    @property
    def levels(self) -> int:
        return max((p["levels"] for p in self.pictures.values()), default=0)

    def findings(self) -> list[str]:
        """What the figures say, in sentences; no more than they say."""
        n = counted(len(self.pictures), "picture")
        said = [f"{n}: no value was changed by more than {self.levels} of 255 levels."]
        if self.survival:
            first, *rest = self.survival
            times = first["moved"]["value"] / max(first["chance"]["value"], 1e-12)
            said.append(f"It moves latents {number(times)} times as far as random noise of the same budget does.")
            if first["left"] is None:
                said.append("That is no further than chance: against this model they are not protected.")
            known = [(row["left"], row["name"]) for row in rest if row["left"] is not None]
            if known:
                least, name = min(known)
                rate = "nothing" if least <= 0 else percent(least)
                said.append(f"Of what it moves beyond noise, {rate} is left after the worst change tried: {name}.")
        for proof in self.proofs:
            if proof["from_safe"]["value"] <= proof["from_clean"]["value"]:
                said.append(f"{proof['title']}: the protected pictures were imitated no worse than the clean ones.")
        return said

    def to_json(self) -> dict[str, Any]:
        names = ("method", "model", "pictures", "fidelity", "survival", "proofs", "judge", "left_out", "versions")
        return {**{name: getattr(self, name) for name in names}, "findings": self.findings()}

    def render(self) -> str:
        """The page, which asks the network for nothing."""
        rows = [
            {
                "name": row["name"],
                "moved": _figure(row["moved"]), "chance": _figure(row["chance"]),
                "spoiled": _figure(row["spoiled"]), "spoiled_by_chance": _figure(row["spoiled_by_chance"]),
                "left": _share(row["left"]), "left_of_edits": _share(row["left_of_edits"]),
                "bar": 100 * min(max(row["left"] or 0.0, 0.0), 1.0),
            }
            for row in self.survival
        ]  # fmt: skip
        proofs = [
            {"title": x["title"], "clean": _figure(x["from_clean"]), "safe": _figure(x["from_safe"])}
            for x in self.proofs
        ]
        strips = [(strip.name, [(label, _embedded(p)) for label, p in strip.pictures]) for strip in self.strips]
        context = {
            "report": shown({**self.to_json(), "reproduce": self.reproduce}), "rows": rows, "proofs": proofs,
            "strips": strips, "limits": LIMITS, "levels": self.levels,
            "fidelity": [(name, _figure(x)) for name, x in self.fidelity.items()],
        }  # fmt: skip
        return environment().get_template("protection.html.j2").render(context)

    def write(self, folder: Path) -> None:
        """``index.html`` and ``audit.json`` into the folder of the protected pictures."""
        with atomic_file(folder / "index.html", overwrite=True) as temporary:
            temporary.write_text(self.render(), encoding="utf-8")
        write_json(folder / "audit.json", self.to_json(), overwrite=True)


def _figure(x: Mapping[str, Any]) -> str:
    made = Interval(x["value"], x["low"], x["high"], x["n"])
    if made.low is None or made.high is None:
        return number(made.value)
    return f"{number(made.value)} [{number(made.low)}, {number(made.high)}]"


def _share(x: float | None) -> str:
    return MISSING if x is None else percent(x)


def _embedded(picture: Picture) -> Embedded:
    return embed(np.ascontiguousarray(picture), SIDE)
