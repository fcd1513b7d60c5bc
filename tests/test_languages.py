"""A concept asked for in several languages: the file, the cases, and erasure by language in report and page."""

from __future__ import annotations

import json

import pytest

from sfumato.audit import Audit, Detection, Detector, audit
from sfumato.audit.asked import cases_for
from sfumato.data.languages import Said, language_cases, language_file, read_languages
from sfumato.errors import BadInput
from sfumato.metrics.detectors import OracleDetector
from sfumato.report import page
from sfumato.report.audit import AuditReport

ROWS = "# a comment\nEnglish\tstar\ta {concept}\ta red {concept}\n\nDeutsch\tStern\tein {concept}\n日本語\t星\n"
SAID = [Said("English", "star", ("a {concept}", "a red {concept}")), Said("Deutsch", "Stern", ("ein {concept}",))]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "star.tsv"
    path.write_text(ROWS, encoding="utf-8")
    return path


def test_a_row_is_a_language(file, tmp_path):
    assert read_languages(file) == [*SAID, Said("日本語", "星", ("{concept}",))]
    (tmp_path / "star.csv").write_text('\ufeffEnglish,star,"a {concept}, red"\n', encoding="utf-8")
    assert read_languages(tmp_path / "star.csv") == [Said("English", "star", ("a {concept}, red",))]
    assert language_file([str(file)]) == file
    assert language_file(["a {concept}"]) is language_file(None) is language_file([str(file), "x"]) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("English", r"row 1 of .* is not a row of prompts: give LANGUAGE"),
        ("English\tstar\ta star", r"row 1 of .* is not a row"),
        ("English\tstar\nEnglish\tstars", "two rows for 'English'"),
        ("\tstar\ta {concept}", r"row 1 of .* is not a row"),
        ("English\t\tstar\ta {concept}", r"row 1 of .* is not a row"),
        ("# nothing", "has no row"),
        (b"\xff\xfe\x00", "is not text in UTF-8"),
    ],
)
def test_other_files_are_refused(text, said, tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadInput, match=said):
        read_languages(path)


def test_a_file_of_prompts_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"no file of prompts at .*none\.tsv"):
        language_file([str(tmp_path / "none.tsv")])
    assert language_file(["star"]) is None


def test_a_quote_that_is_not_closed_swallows_no_rows(tmp_path):
    (tmp_path / "rows.csv").write_text('English,star,"a {concept}\nDeutsch,Stern,ein {concept}\n')
    with pytest.raises(BadInput, match=r"rows\.csv cannot be read"):
        read_languages(tmp_path / "rows.csv")


def test_the_same_noise_in_every_language():
    cases = language_cases("star", SAID, n=3, seed=2)
    told = [(c.prompt, c.seed, c.language) for c in cases]
    assert told == [
        ("a star", 200_000, "English"), ("a red star", 200_001, "English"), ("a star", 200_002, "English"),
        ("ein Stern", 200_000, "Deutsch"), ("ein Stern", 200_001, "Deutsch"), ("ein Stern", 200_002, "Deutsch"),
    ]  # fmt: skip
    assert {c.names for c in cases} == {("star",)}


def test_what_is_retained_stays_as_it_is(file):
    detector = OracleDetector()
    plain = cases_for(detector, ("star",), None, None, 4, 2, 0)
    spoken = cases_for(detector, ("star",), None, [str(file)], 4, 2, 0)
    assert spoken.retained == plain.retained and spoken.groups == plain.groups and plain.languages == []
    assert spoken.languages == ["English", "Deutsch", "日本語"] and len(spoken.targets["star"]) == 12
    with pytest.raises(BadInput, match="audit one concept at a time"):
        cases_for(detector, ("star", "fish"), None, [str(file)], 4, 2, 0)


def test_words_to_retain_are_read_as_concepts_are():
    detector = OracleDetector()
    kept = cases_for(detector, ("star",), ["Fish", "Blue"], None, 2, 2, 0)
    assert {w for case in kept.retained for w in case.names} == {"fish", "blue"}
    for word, said in (("red fish", "names 2 things"), ("Star", "both erased and retained")):
        with pytest.raises(BadInput, match=said):
            cases_for(detector, ("star",), [word], None, 2, 2, 0)


def test_attacks_need_prompts_that_name_the_concept_and_that_is_said_first(tiny_sd, tmp_path):
    rows = tmp_path / "rows.tsv"
    rows.write_text("Deutsch\tStern\tein Bild von {concept}\nEnglish\tstar\ta picture of {concept}\n")
    given = {"retain": ("circle",), "n": 1, "n_retain": 1, "sampling_steps": 1, "distance": "mse", "progress": False}
    audit = Audit(before=tiny_sd, after=tiny_sd, concepts=["star"], detector=Dark(), prompts=[str(rows)], **given)
    with pytest.raises(BadInput, match="put the row of the language that calls it so first"):
        audit.prepare()


class Dark(Detector):
    """Sees a concept in the darker half of all pictures, which two random models share differently."""

    name, hash, threshold, resize = "dark", "none", 0.5, "none"

    def check(self, concept):
        pass

    def __call__(self, images, concept):
        score = 1 - images.mean((1, 2, 3))
        return Detection(score > 0.5, score)


def test_erasure_by_language_is_in_report_and_page(file, tiny_sd, tmp_path):
    given = {"retain": ("circle",), "n": 2, "n_retain": 1, "sampling_steps": 1, "distance": "mse", "attacks": ()}
    report = audit(tiny_sd, tiny_sd, ["star"], detector=Dark(), prompts=[str(file)], progress=False, **given)
    assert list(report.languages) == ["English", "Deutsch", "日本語"]
    for i, found in enumerate(report.languages.values()):
        x = tiny_sd.draw(report.protocol["prompts"][1 + 2 * i : 3 + 2 * i], [0, 1], sampling_steps=1)
        there = float((1 - x.mean((1, 2, 3)) > 0.5).double().mean())
        assert found.seen == pytest.approx(there) and found.erased.value == pytest.approx(1 - there)
        assert found.erased.n == 2
    pooled = sum(found.erased.value for found in report.languages.values()) / 3
    assert report.erasure["star"].value == pytest.approx(pooled) and report.erasure["star"].n == 6
    assert report.protocol["languages"] == [name for name in report.languages for _ in range(2)]
    read = AuditReport.load(report.save(tmp_path / "report"))
    assert read.languages == report.languages
    html = page.render(report)
    assert "by the language of the prompt" in html and html.count("日本語") >= 2
    data = json.loads((tmp_path / "report" / "report.json").read_text())
    del data["languages"]  # as reports of one language have it
    plain = AuditReport.from_json(data)
    assert plain.languages == {} and "languages" not in plain.to_json()
    assert "by the language" not in page.render(plain)
