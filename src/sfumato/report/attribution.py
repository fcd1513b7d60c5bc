"""The page of an attribution: bars of the parts' shares, the table of alliances, and what each of them draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfumato.files import atomic_file, write_json
from sfumato.report.images import Embedded, Picture, embed
from sfumato.report.page import SIDE, environment
from sfumato.report.words import MISSING, number
from sfumato.text import counted, shown

SHOWN = 64
"""Alliances on the page that get pictures."""
LIMITS = (
    "A share says how much a part makes pictures more like the original, by one measure and for one prompt. It is not "
    "a legal statement, and says nothing of what a part was trained on.",
    "Shares are relative: among parts none of which matters one has the largest. Look at the worth of all together.",
    "Parts act together: a negative share is no mistake, but a part that takes away from the likeness.",
    "Intervals are over seeds (and sampled orders), with everything else as it is.",
)  # fmt: skip


@dataclass(frozen=True)
class AttributionReport:
    """What an attribution found.

    Attributes:
        shares: of `sfumato.attribute.parts.study.Shares.to_json`.
        workflow: as its file has it (JSON types).
        method: its name and settings.
        pictures: some of every alliance, uint8, by its number among ``shares["alliances"]``.
        originals: some of them, uint8.
    """

    shares: Mapping[str, Any]
    workflow: Mapping[str, Any]
    method: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=dict)
    reproduce: str = ""
    pictures: Mapping[int, Sequence[Picture]] = field(default_factory=dict, repr=False)
    originals: Sequence[Picture] = field(default=(), repr=False)

    def findings(self) -> list[str]:
        """What the figures say, in sentences; no more than they say."""
        parts = self.shares["parts"]
        whole = self.shares["whole"]
        if whole <= 0:
            said = ["All parts together bring pictures no nearer to the original than the bare base model does."]
        else:
            said = [f"All parts together bring pictures nearer to the original, by {number(whole)}."]
        first, *rest = sorted(parts, key=lambda name: -parts[name]["share"]["value"])
        said.append(f"The largest share is that of {first}: {_figure(parts[first]['share'])}.")
        if rest and not _apart(parts[first]["shapley"], parts[rest[0]]["shapley"]):
            said.append(f"Its interval overlaps that of {rest[0]}: the two are not told apart.")
        idle = [name for name in parts if _holds_zero(parts[name]["shapley"])]
        if idle:
            said.append(f"Not told from nothing: {', '.join(idle)}.")
        if self.shares.get("mode") == "dividend":
            said.append("Values are those of the published code, which overcount: they do not sum to what all add.")
        if self.shares["orders"]:
            said.append(
                f"{counted(self.shares['orders'], 'order')} of the parts were sampled, not all alliances drawn."
            )
        if self.shares["views"]:
            said.append(f"The one original stands for itself by {self.shares['views']} cut and mirrored views of it.")
        return said

    def to_json(self) -> dict[str, Any]:
        return {
            "shares": self.shares, "workflow": self.workflow, "method": self.method, "versions": self.versions,
            "findings": self.findings(),
        }  # fmt: skip

    def render(self) -> str:
        """The page, which asks the network for nothing."""
        parts = self.shares["parts"]
        bars = [
            {"name": name, **{kind: _bar(parts[name][key]) for kind, key in
                              (("shapley", "share"), ("loo", "leave_one_out_share"))},
             "value": _figure(parts[name]["shapley"]), "left": _figure(parts[name]["leave_one_out"]),
             "error": MISSING if parts[name]["sampling_error"] is None else number(parts[name]["sampling_error"])}
            for name in sorted(parts, key=lambda name: -parts[name]["share"]["value"])
        ]  # fmt: skip
        alliances = [
            {"name": " + ".join(x["parts"]) or "none of the parts", "worth": number(x["worth"]),
             "measured": number(x["measured"]),
             "pictures": [_small(p) for p in self.pictures.get(i, ())] if i < SHOWN else []}
            for i, x in enumerate(self.shares["alliances"])
        ]  # fmt: skip
        context = {
            "report": shown({**self.to_json(), "reproduce": self.reproduce}), "bars": shown(bars), "limits": LIMITS,
            "alliances": alliances, "originals": [_small(p) for p in self.originals],
            "value": "dividends" if self.shares.get("mode") == "dividend" else "Shapley",
            "gap": f"{self.shares['efficiency_gap']:.1e}",
        }  # fmt: skip
        return environment().get_template("attribution.html.j2").render(context)

    def write(self, folder: Path) -> None:
        """``index.html`` and ``shares.json`` into a folder that is there."""
        with atomic_file(folder / "index.html", overwrite=True) as temporary:
            temporary.write_text(self.render(), encoding="utf-8")
        write_json(folder / "shares.json", self.to_json(), overwrite=True)


def _figure(x: Mapping[str, Any]) -> str:
    if x["low"] is None or x["high"] is None:
        return number(x["value"])
    return f"{number(x['value'])} [{number(x['low'])}, {number(x['high'])}]"


def _bar(x: Mapping[str, Any]) -> dict[str, Any]:
    """Where a share's bar lies between -1 and 1, in per cent of the plot's width."""
    place = lambda value: 50 + 50 * min(max(value, -1.0), 1.0)
    ends = sorted((50.0, place(x["value"])))
    low, high = (place(x["value"] if x[k] is None else x[k]) for k in ("low", "high"))
    return {"left": ends[0], "width": ends[1] - ends[0], "low": low, "high": high, "text": _figure(x)}


def _apart(x: Mapping[str, Any], y: Mapping[str, Any]) -> bool:
    if None in (x["low"], x["high"], y["low"], y["high"]):
        return False
    return bool(x["low"] > y["high"] or y["low"] > x["high"])


def _holds_zero(x: Mapping[str, Any]) -> bool:
    return x["low"] is None or x["high"] is None or bool(x["low"] <= 0 <= x["high"])


def _small(picture: Picture) -> Embedded:
    return embed(picture, SIDE // 3)
