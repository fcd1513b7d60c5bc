"""The audit report: its contract on disk, its page, and when two reports may be compared."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from report_fixtures import draw, interval, make_gallery, make_report
from sfumato.errors import BadInput
from sfumato.report import compare, images, page, words
from sfumato.report.audit import AuditReport
from sfumato.report.images import AttackPictures, Gallery, Pair
from sfumato.report.schema import Attack, Cost, Interval, PromptDistance

EVIL = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "'; {{ 7 * 7 }} </style>")
VOID = {"meta", "img", "col", "br", "line", "circle", "link", "input"}


class Page(HTMLParser):
    """Tags, attributes and visible text; fails where tags do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open, self.cells = "", [], [[]]
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        elif tag in ("th", "td"):
            self.cells[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.text += data
            if {"th", "td"} & set(self.open):
                self.cells[-1][-1] += data

    def rows(self) -> list[list[str]]:
        return [[cell.strip() for cell in row] for row in self.cells]

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.tags if name in attrs]


def test_json_round_trip_has_exactly_the_contract_keys(tmp_path):
    report = make_report()
    report.save(tmp_path / "r")
    data = json.loads((tmp_path / "r" / "report.json").read_text())
    assert set(data) == {
        "concepts", "erasure", "retention", "integrity", "alignment", "attacks", "cost", "protocol", "method",
        "created", "sfumato", "reproduce",
    }  # fmt: skip
    assert set(data["erasure"]["star"]) == {"rate", "low", "high", "n"}
    assert {"mean", "low", "high", "n"} < set(data["integrity"])
    apart = {"before", "further", "total"}
    told = {"recovered", "control", "original", "budget", "seconds", "rows"}
    assert set(data["attacks"]["concept-inversion"]) == told | apart
    for source in (tmp_path / "r", tmp_path / "r" / "report.json"):
        assert AuditReport.load(source).to_json() == report.to_json() == data


def test_what_was_not_measured_is_null_and_never_zero():
    gone = Interval(float("nan"), float("nan"), float("inf"), 0)
    assert gone.to_json() == {"rate": None, "low": None, "high": None, "n": 0}
    report = make_report(
        erasure={"star": None},
        retention={"circle": None, "square": gone},
        integrity=None,
        alignment=None,
        attacks={"concept-inversion": Attack(None)},
        cost=Cost(),
        method=None,
        created="",
        sfumato="",
        reproduce="",
    )
    assert AuditReport.from_json(json.loads(json.dumps(report.to_json()))).to_json() == report.to_json()
    text = Page(page.render(report)).text
    assert text.count("not measured") >= 12
    figures = text[: text.index("What the figures mean")].split("Under attack")[0]
    assert not re.search(r"\b0(\.0)?\s?%", figures.replace("0 50 100 %", "").replace("050100 %", ""))
    assert "Whether ‘star’ is gone was not measured" in text


@pytest.mark.parametrize("evil", EVIL)
def test_user_text_is_escaped_everywhere(evil):
    report = make_report(concepts=(evil,))
    report = replace(
        report,
        retention={evil: interval(0.9, 50)},
        attacks={evil: replace(report.attacks["concept-inversion"], budget={evil: [evil, {evil: evil}]})},
        method={"name": evil, evil: evil},
        protocol=dict(report.protocol, groups={evil: [evil]}, prompts=[evil], before=evil, size=evil),
        integrity=replace(report.integrity, distance=evil, per_prompt=[PromptDistance(evil, 0.1)]),
        alignment=replace(report.alignment, measure=evil),
        reproduce=evil, created=evil, sfumato=evil,
    )  # fmt: skip
    pairs = [Pair(draw("ring", 0), draw("star", 0), evil, 0)]
    gallery = Gallery({evil: pairs}, {evil: pairs}, {evil: AttackPictures(attacked=[draw("star", 0)])})
    html = page.render(report, gallery) + compare.render(report, report)
    assert evil not in html
    parsed = [Page(page.render(report, gallery)), Page(compare.render(report, report))]
    for p in parsed:
        assert evil in p.text
        assert [tag for tag, _ in p.tags].count("script") == 1
        assert not [name for _, attrs in p.tags for name in attrs if name.startswith("on")]


def test_the_page_asks_the_network_for_nothing():
    report = make_report()
    html = page.render(report, make_gallery(report))
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"base64,[^\"]*", "", html))
    parsed = Page(html)
    assert all(src.startswith("data:image/") for src in parsed.attributes("src"))
    assert not parsed.attributes("href") and "@import" not in html and "url(" not in html
    (policy,) = [c for c in parsed.attributes("content") if "default-src" in c]
    script = re.search(r"<script>(.*)</script>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none';") and policy.endswith(f"script-src 'sha256-{digest}'")


def test_every_figure_stands_with_its_interval_and_n():
    report = make_report(concepts=("star", "heart"))
    parsed = Page(page.render(report, make_gallery(report)))
    rows = [cells for cells in parsed.rows() if len(cells) >= 4]
    rates = dict(report.retention) | dict(report.erasure)
    for attack in report.attacks.values():
        rates |= {"edited, attacked": attack.recovered, "edited, control": attack.control}
        rates |= {"original, attacked": attack.original}
    for label, i in rates.items():
        (cells,) = [cells for cells in rows if cells[0] == label]
        assert cells[-3:] == [words.value(i), words.bounds(i), str(i.n)]
    for i in (report.integrity.mean, report.alignment.after):
        assert f"{words.value(i, False)}\n" in parsed.text
        assert f"{words.bounds(i, False)}, {words.count(i)}" in parsed.text
    assert words.full(report.alignment.before, rate=False) in parsed.text
    assert all(words.full(i) in parsed.text for i in report.erasure.values())


def test_pictures_have_alternatives_sizes_and_sharp_pixels():
    report = make_report()
    parsed = Page(page.render(report, make_gallery(report)))
    pictures = [attrs for tag, attrs in parsed.tags if tag == "img"]
    assert len(pictures) > 50
    for attrs in pictures:
        assert attrs["alt"] and attrs["width"] == attrs["height"] == "64"
        assert "small" in attrs["class"]


def test_large_pictures_shrink_until_the_page_fits(monkeypatch):
    assert page.LARGEST < 3_000_000
    monkeypatch.setattr(page, "LARGEST", 400_000)
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    gallery = Gallery({"star": [Pair(noise, noise, "noise", s) for s in range(8)]})
    assert 16 * len(images.embed(noise, page.SIDE).uri) > 800_000
    assert 200_000 < len(page.render(make_report(), gallery).encode()) <= 400_000


@pytest.mark.parametrize("concepts, others, attacks", [(1, 1, 0), (1, 0, 1), (3, 4, 1), (12, 200, 3)])
def test_any_number_of_concepts_and_attacks_renders(concepts, others, attacks):
    names = tuple(f"concept number {k}" for k in range(concepts))
    report = make_report(concepts=names, others=others)
    attack = report.attacks["concept-inversion"]
    report = replace(report, attacks={f"attack {k}": attack for k in range(attacks)})
    text = Page(page.render(report, make_gallery(report))).text
    assert all(name in text for name in [*names, *report.retention, *report.attacks])
    assert ("No attack was run" in text) == (attacks == 0)


def test_retention_rows_are_grouped_and_worst_first():
    rates = {"a": 0.9, "b": 0.5, "c": 0.7, "d": None, "e": 0.1}
    kept = {c: None if r is None else interval(r, 100) for c, r in rates.items()}
    report = make_report(retention=kept)
    report = replace(report, protocol={**report.protocol, "groups": {"near": ["a", "c", "d"], "far": ["b"]}})
    groups = [(name, [c for c, _ in rows]) for name, rows in page.retention_groups(report)]
    assert groups == [("near", ["c", "a", "d"]), ("far", ["b"]), ("other", ["e"])]


def test_percentages_are_never_flattered():
    assert [words.percent(x).replace(words.THIN, "") for x in (0, 1, 0.9997, 0.0003, 0.98, None)] == [
        "0%", "100%", ">99.9%", "<0.1%", "98.0%", "not measured",
    ]  # fmt: skip


def test_the_average_of_equal_figures_narrows_as_the_root_of_their_number():
    one = Interval(0.8, 0.7, 0.88, 50)
    mean = words.average([one] * 4 + [None])
    assert mean.n == 200
    np.testing.assert_allclose([mean.value, mean.low, mean.high], [0.8, 0.75, 0.84], rtol=1e-12)
    assert words.average([None]) is None


def test_a_failure_while_saving_leaves_nothing(tmp_path, monkeypatch):
    report = make_report()

    def fail(*_: object) -> str:
        raise OSError("no space left on device")

    monkeypatch.setattr(page, "render", fail)
    with pytest.raises(OSError, match="no space"):
        report.save(tmp_path / "r")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_report_is_replaced_only_when_asked(tmp_path):
    make_report().save(tmp_path / "r")
    with pytest.raises(BadInput, match="exist"):
        make_report(sfumato="9").save(tmp_path / "r")
    assert AuditReport.load(tmp_path / "r").sfumato == "0.1.0"
    make_report(sfumato="9").save(tmp_path / "r", overwrite=True)
    assert AuditReport.load(tmp_path / "r").sfumato == "9"
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["index.html", "report.json"]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"concepts": []}'])
def test_what_is_not_a_report_is_one_clear_sentence(tmp_path, content):
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(BadInput, match="report"):
        AuditReport.load(tmp_path)


def test_a_protocol_that_leaves_something_out_is_refused():
    protocol = {k: v for k, v in make_report().protocol.items() if k not in ("seeds", "guidance")}
    with pytest.raises(BadInput, match="seeds, guidance"):
        make_report(protocol=protocol)


@pytest.mark.parametrize(
    "field, value",
    [("sampling_steps", 50), ("seeds", [1]), ("before.hash", "0"), ("detector.threshold", 1), ("versions.torch", "2")],
)
def test_reports_with_different_protocols_refuse_and_name_the_field(field, value):
    first = make_report()
    protocol = json.loads(json.dumps(first.protocol))
    *parents, last = field.split(".")
    inner = protocol
    for key in parents:
        inner = inner[key]
    inner[last] = value
    with pytest.raises(BadInput, match=re.escape(f"protocol.{field}:")):
        compare.rows(first, replace(first, protocol=protocol))


def test_a_different_attack_budget_or_concept_is_refused_too():
    first = make_report()
    attack = replace(first.attacks["concept-inversion"], budget={"steps": 1})
    with pytest.raises(BadInput, match=r"attacks\.concept-inversion\.budget\.steps"):
        compare.rows(first, replace(first, attacks={"concept-inversion": attack}))
    with pytest.raises(BadInput, match="concepts"):
        compare.rows(first, make_report(concepts=("heart",)))


def test_reports_of_two_models_compare_with_differences(tmp_path):
    first = make_report()
    after = {"model": "other", "hash": "ff"}
    second = replace(
        AuditReport.from_json(first.to_json()),
        protocol={**first.protocol, "after": after, "seeds": tuple(first.protocol["seeds"])},
        erasure={"star": Interval(0.5, 0.4, 0.6, 256)},
        attacks={},
    )
    by_label = {(r.group, r.label): r for r in compare.rows(first, second)}
    star, was = by_label["Erased", "star"].difference, first.erasure["star"]
    assert star.value == pytest.approx(0.5 - was.value)
    assert star.low == pytest.approx(star.value - np.hypot(0.1, was.high - was.value))
    assert star.high == pytest.approx(star.value + np.hypot(0.1, was.value - was.low))
    assert by_label["Under attack", "concept-inversion, recovered"].difference is None
    compare.save(first, second, tmp_path / "c")
    text = Page((tmp_path / "c" / "index.html").read_text(encoding="utf-8")).text
    assert "not measured" in text and "other" in text


def test_the_difference_map_is_zero_for_equal_and_one_for_black_against_white():
    black, white = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    assert (images.difference(black, black) == 0).all()
    assert (images.difference(black, white) == 1).all()
    red = white * np.array([1, 0, 0], np.uint8)
    assert images.difference(black, red)[0, 0] == pytest.approx(3**-0.5, rel=1e-12)


def test_heat_colours_get_lighter_all_the_way():
    ramp = images.heat(np.linspace(0, 1, 101)[None]).astype(np.float64)[0] / 255
    linear = np.where(ramp <= 0.04045, ramp / 12.92, ((ramp + 0.055) / 1.055) ** 2.4)
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(luminance) > 0).all()


def test_the_worst_changed_pairs_come_first():
    a, b, c = (np.full((4, 4, 3), v, np.uint8) for v in (0, 100, 200))
    pairs = [Pair(a, a, "same"), Pair(a, c, "far"), Pair(a, b, "near")]
    assert [p.prompt for p in images.changed_most(pairs, 2)] == ["far", "near"]


def test_a_concept_that_was_not_measured_is_named_in_the_verdict():
    report = make_report(concepts=("star", "heart"))
    report = replace(report, erasure={"star": report.erasure["star"]})
    assert "Whether ‘heart’ is gone was not measured." in Page(page.render(report)).text


def test_a_pair_listed_under_two_concepts_is_shown_once():
    a, b = draw("star", 0), draw("ring", 0)
    pair, twin = Pair(a, b, "a red star", 3), Pair(a, b, "a red star", 3)
    gallery = Gallery(retained={"red": [pair], "star": [twin, Pair(a, a, "a star", 4)]})
    text = Page(page.render(make_report(), gallery)).text
    assert "The 2 most changed of 2 pairs" in text and text.count("a red star, seed 3") == 1


def test_a_report_saves_its_own_pictures_but_not_into_the_json(tmp_path):
    report = make_report()
    report = replace(report, gallery=make_gallery(report))
    report.save(tmp_path / "r")
    assert "9 pairs" in (tmp_path / "r" / "index.html").read_text(encoding="utf-8")
    assert AuditReport.load(tmp_path / "r").to_json() == report.to_json()


def test_the_histogram_counts_every_prompt():
    integrity = make_report().integrity
    h = page.histogram(integrity)
    assert sum(b.height * h["peak"] for b in h["bars"]) == pytest.approx(len(integrity.per_prompt))
    assert [kind for kind, _, _ in h["lines"]] == ["floor", "mean", "ceiling", "ceiling"]
    assert all(0 <= x <= 1 for _, x, _ in h["lines"])
    assert page.histogram(replace(integrity, floor=None))["missing"] == ["same model twice"]
