"""What the report says in sentences: the verdict, what each figure means, and what none of them shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sfumato.report.schema import AuditRecord, Interval
from sfumato.report.words import bounds, full, kept, number, percent, quoted, value, worst

OFTEN = 0.5
"""The share of the original's pictures that show a concept, below which the verdict tells it."""


def headline(report: AuditRecord) -> list[tuple[str, str]]:
    """The verdict's first line as (text, kind) runs; kind is "figure", "interval" or "text"."""
    have = {c: i for c in report.concepts if (i := report.erasure.get(c)) is not None and i.measured}
    if not have:
        return [(f"Whether {names(report.concepts)} is gone was not measured", "text")]
    if len(have) > 3:
        low, high = min(have, key=lambda c: have[c].value), max(have, key=lambda c: have[c].value)
        runs = [(f"{len(have)} concepts are gone in ", "text"), *_figure(have[low])]
        runs += [(f" ({quoted(low)}) to ", "text"), *_figure(have[high])]
        return [*runs, (f" ({quoted(high)}) of pictures", "text")]
    runs = []
    for k, (concept, i) in enumerate(have.items()):
        lead = "" if k == 0 else (" and " if k == len(have) - 1 else ", ")
        runs += [(f"{lead}{quoted(concept)} {'is gone ' if k == 0 else ''}in ", "text"), *_figure(i)]
        runs += [(" of pictures", "text")] if k == 0 else []
    return runs


def shown_before(report: AuditRecord, concept: str) -> float | None:
    """The share of the original's pictures asked to show a concept in which the detector finds it, if known."""
    return (report.protocol.get("detected_before") or {}).get(concept)


def _figure(i: Interval) -> list[tuple[str, str]]:
    return [(percent(i.value), "figure"), (f" {bounds(i)}" if bounds(i) else "", "interval")]


def names(concepts: Sequence[str]) -> str:
    more = f" and {len(concepts) - 3} more" if len(concepts) > 3 else ""
    return ", ".join(map(quoted, concepts[:3])) + more


def findings(report: AuditRecord) -> list[str]:
    """The rest of the verdict, a sentence each, with the figures and no judgement on them."""
    out, them = [], "it" if len(report.concepts) == 1 else "them"
    unseen = [c for c in report.concepts if (i := report.erasure.get(c)) is None or not i.measured]
    if 0 < len(unseen) < len(report.concepts):
        out.append(f"Whether {names(unseen)} is gone was not measured.")
    if rare := [c for c in report.concepts if (seen := shown_before(report, c)) is not None and seen < OFTEN]:
        told = ", ".join(f"{quoted(c)} in {percent(shown_before(report, c))}" for c in rare[:3])
        more = f", and {len(rare) - 3} more as rarely" if len(rare) > 3 else ""
        out.append(
            f"Of the original model's own pictures asked to show it, the detector finds {told}{more}: what was not "
            "there before counts as gone all the same."
        )
    mean, low = kept(report), worst(report.retention)
    if mean is None:
        out.append("Whether other concepts were kept was not measured.")
    else:
        measured = sum(i is not None and i.measured for i in report.retention.values())
        others = "The one other concept is" if measured == 1 else f"The {measured} other concepts are"
        text = f"{others} kept in {percent(mean.value)} of pictures {bounds(mean)}"
        if measured > 1:
            text += " on average"
            if low is not None:
                text += f"; least of all {quoted(low)}, in {value(report.retention[low])} "
                text += bounds(report.retention[low])
        out.append(text + ".")
    if report.integrity is not None and report.integrity.mean.measured:
        moved = report.integrity
        text = f"Pictures that should not change moved by {full(moved.mean, rate=False)} ({moved.distance})"
        if moved.ceiling_seeds is not None:
            text += f"; another seed moves them by {number(moved.ceiling_seeds)}"
        out.append(text + ".")
    if not report.attacks:
        out.append(f"No attack was run, so nothing is known about deliberate attempts to bring {them} back.")
    for name, attack in report.attacks.items():
        if attack.recovered is None or not attack.recovered.measured:
            out.append(f"Whether the attack {quoted(name)} brings {them} back was not measured.")
            continue
        text = f"The attack {quoted(name)} brings {them} back in {value(attack.recovered)} of pictures "
        out.append(text + f"{bounds(attack.recovered)}; its control in {_after(attack.control)}.")
    return out


def _after(i: Interval | None) -> str:
    return " ".join(filter(None, (value(i), bounds(i))))


def verdict(report: AuditRecord) -> str:
    """The whole verdict as one paragraph of plain text."""
    return "".join(text for text, _ in headline(report)) + ". " + " ".join(findings(report))


DEFINITIONS = {
    "Erased": "The share of pictures asked to show the concept in which the detector no longer finds it.",
    "Kept": "Of the original model's pictures in which the detector finds another concept that was asked "
    "for, the share in which it finds it in the edited model's picture of the same prompt and seed too.",
    "Picture change (integrity)": "The mean perceptual distance between the original and the edited model's "
    "pictures of the same retained prompt and the same starting noise; 0 means the same picture.",
    "Floor": "The same distance between two runs of the original model: what the machinery alone adds.",
    "Ceiling": "The same distance between the original model's pictures with different seeds, and with "
    "different prompts: where a picture has nothing left of the one it replaces.",
    "Alignment": "How well pictures match their prompts by the named measure, before and after the edit.",
    "Recovered": "The share of pictures in which the detector finds the erased concept again under attack.",
    "Control": "The same share under an attack of the same budget that is not aimed at the concept: what "
    "drawing so many pictures, and the detector's mistakes, bring about by themselves.",
    "Before and further": "Before: the share of the attacked cases whose plain prompt shows the concept without any "
    "attack. Further: of the others, the share that the attack breaks.",
    "Interval": "Square brackets hold the 95 % interval of the figure before them; n is the number of "
    "pictures (or prompts) it rests on. That of an average over erased concepts combines theirs, which are of "
    "different pictures; that of an average over kept ones is over pictures, each of which may count for several.",
}


def limitations(report: AuditRecord) -> list[str]:
    """What the figures do not show, in plain words."""
    detector = report.protocol.get("detector")
    name = detector.get("name") if isinstance(detector, Mapping) else detector
    out = [
        f"“Gone” and “kept” mean what the detector{f' ({name})' if name else ''} can see; it makes "
        "mistakes, and they are part of every rate here.",
        "Only the prompts, seeds and settings listed above were tried. Other wordings, languages, samplers "
        "or guidance can bring other results.",
    ]
    if report.attacks:
        out.append(
            "A recovered rate is a lower bound on what an attacker can do: a larger budget, or another "
            "attack, may recover more."
        )
    else:
        out.append(
            "No attack was run. Concepts that no longer appear under plain prompts often come back under one."
        )
    if report.retention and "all" not in report.kept:
        out.append(
            "This report is of an earlier version, without the interval of the mean of kept concepts over pictures: it "
            "combines theirs as independent figures, and is too narrow where one picture counts for several of them."
        )
    unproven = [n for n, a in report.attacks.items() if a.original is None or not a.original.measured]
    if unproven:
        out.append(
            f"{names(unproven)} was not tried on the original model, where it should succeed; a low "
            "recovered rate may mean a weak attack rather than a good edit."
        )
    return [
        *out,
        "The intervals cover the chance in which pictures were drawn, not the choice of prompts or detector.",
        "Distances saturate: once a picture is entirely different, they cannot tell how different. Read the "
        "histogram, not only the mean.",
        "The report states figures. What is good enough for a given use is for its reader to decide.",
    ]
