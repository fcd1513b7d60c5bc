"""The studio without a browser: forms, the queue, refusals, and what is shown as text."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import pickle
import shlex
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sfumato import catalog, progress
from sfumato.commands.attack import Attack
from sfumato.commands.options import parse
from sfumato.commands.sample import Sample
from sfumato.commands.steer import Steer
from sfumato.commands.studio import main
from sfumato.commands.verb import read
from sfumato.errors import BadInput
from sfumato.files import save_png
from sfumato.settings import settings_for
from sfumato.studio import actions, doors, ledgers, views
from sfumato.studio.child import ERR, MOVED, OUT, Notes
from sfumato.studio.forms import ELSEWHERE, Field, fields_of, lines, named, words
from sfumato.studio.jobs import Job, Jobs, Step
from sfumato.studio.serve import POLICY, Guard, bound

METHODS = [m for verb in ("steer", "erase", "attack") for m in catalog.methods(verb)]
HOSTILE = '"><script>alert(1)</script>\u202egnp\x1b[2J'


# Forms


def other(field: Field) -> Any:
    """A value that the form does not show at first, and that the command line understands."""
    if field.kind == "tick":
        return not field.value
    if field.kind == "choice":
        return next((c for c in field.choices if c not in ("", field.value)), field.value)
    if field.kind == "choices":
        return list(field.choices[:1]) if list(field.value) != list(field.choices[:1]) else list(field.choices)
    if field.kind == "lines":
        return "a red star\n-dashed\nit's one"
    return None


@pytest.mark.parametrize("entry", METHODS, ids=lambda m: m.name)
def test_every_method_has_its_form(entry):
    """As it stands it says nothing; what is changed comes out of the parser as it was filled in."""
    cls = entry.load()
    fields = fields_of(cls, settings_for(cls, "sketch"))
    assert fields and not {f.name for f in fields} & set(ELSEWHERE)
    assert words(fields, [f.value for f in fields]) == []
    required = {f.name: "star" for f in fields if f.required}
    values = [other(f) if f.name not in required else "star\nred" for f in fields]
    asked = [f.value if v is None else v for f, v in zip(fields, values, strict=True)]
    [given] = parse(entry.name, words(fields, asked), cls, defaults=settings_for(cls, "sketch"))
    for field, value in zip(fields, asked, strict=True):
        got = given[field.name]
        if field.kind == "lines":
            assert [str(x) for x in got or ()] == sorted(lines(value), key=lambda x: x.startswith("-"))
        elif field.kind == "choices":
            assert list(got) == value
        elif field.kind == "tick":
            assert got is value
        elif field.kind == "choice":
            assert str(got) == str(value or None)


def test_a_form_says_numbers_several_and_nothing():
    fields = {f.name: f for f in fields_of(catalog.get("uce").load())}
    scale = fields["preserve_scale"]
    assert scale.nothing and scale.value == "" and "number" in scale.help
    assert words([scale], ["0.5"]) == ["--preserve-scale", "0.5"]
    assert words([scale], ["-0.5"]) == ["--preserve-scale=-0.5"]
    betas = {f.name: f for f in fields_of(catalog.get("esd-x").load())}["betas"]
    assert betas.value == "0.9 0.999" and words([betas], ["0.8, 0.9"]) == ["--betas", "0.8", "0.9"]
    steps = fields_of(Sample, {"sampling_steps": 9}, only=("sampling_steps",))
    assert words(steps, [" 9 "]) == [] and words(steps, [""]) == ["--sampling-steps", "None"]


def test_the_fields_of_an_attack_and_of_an_audit():
    from sfumato.audit import Audit

    assert [f.name for f in fields_of(Attack, leave=("model",)) if f.required] == ["concept"]
    fields = fields_of(Audit, leave=("before", "after"))
    by_name = {f.name: f for f in fields}
    assert by_name["attacks"].kind == "lines" and by_name["n"].value == "64"
    told = {"concepts": "star", "attacks": "", "n": "4"}
    said = words(fields, [told.get(f.name, f.value) for f in fields])
    [given] = parse("audit", ["--before", "sketch", "--after", "x", *said], Audit)
    assert (tuple(given["concepts"]), tuple(given["attacks"]), given["n"]) == (("star",), (), 4)


# Commands


def read_back(step: Step) -> Any:
    """A step's words as the command understands them."""
    verb, *rest = step.args
    if verb == "sample":
        return Sample(**parse("sfumato sample", rest, Sample)[0])
    return read(verb, rest, Steer, "sfumato steer {name}")


def test_prompts_reach_the_command_as_they_are(tmp_path):
    prompts = ["a red star", "-- rm -rf", HOSTILE.replace("\x1b", ""), "$(touch x); `y`"]
    drawing = actions.Drawing("\n".join(prompts), ("--seeds", "0-2"))
    [step] = actions.draw("sketch", drawing)(tmp_path)
    options = read_back(step)
    assert list(options.prompts) == prompts and options.seeds == "0-2" and options.out == tmp_path / "pictures"
    line = actions.command(step, 7)
    assert shlex.split(line)[1:] == [w if w != str(step.out) else "pictures-007-again" for w in step.args]
    single = shlex.split(actions.one_picture(step, 7, prompts[1], "2"))
    assert list(Sample(**parse("sfumato sample", single[2:], Sample)[0]).prompts) == [prompts[1]]
    assert single[single.index("--seeds") + 1] == "2" and single.count("--seeds") == 1


def test_a_steered_run_stands_beside_the_plain_one(tmp_path):
    drawing = actions.Drawing("a red star", ("--seeds", "3"))
    plain, steered = actions.steer("decor", ["--undesired", "fish"], "sketch", drawing)(tmp_path)
    assert read_back(plain).seeds == "3" and "--undesired" not in plain.args
    _, patch, options = read_back(steered)
    assert patch.undesired == ("fish",) and options.seeds == "3" and options.out == tmp_path / "steered"
    assert not options.plain, "what stands beside it is drawn already"
    assert len(actions.steer("decor", [], "sketch", drawing, beside=False)(tmp_path)) == 1


def test_erasing_draws_the_same_before_and_after(tmp_path):
    steps = actions.erase("uce", ["--concepts", "star"], "sketch", actions.Drawing("a red star", ("--seeds", "1")))
    before, erase, after = steps(tmp_path)
    first, last = read_back(before), read_back(after)
    assert (first.prompts, first.seeds) == (last.prompts, last.seeds)
    assert (first.model, last.model) == ("sketch", str(erase.out)) and "--out" in erase.args


def test_what_lacks_something_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(BadInput, match="write at least one prompt"):
        actions.draw("sketch", actions.Drawing(" \n "))(tmp_path)
    with pytest.raises(BadInput, match="choose two reports"):
        actions.compare("", "x")
    for concepts, told in ((["--concepts", "xyzzy"], "unknown concept"), ([], "needs --concept")):
        with pytest.raises(BadInput, match=told):
            actions.erase("uce", concepts, "sketch", actions.Drawing("a red star"))(tmp_path)
    with pytest.raises(BadInput, match="cbs-window"):
        actions.steer("t2i-zero", ["--cbs-window", "many"], "sketch", actions.Drawing("a red star"))(tmp_path)
    assert named(["a", "b"]) == (["a", "b"], []) and named(["a", "-b"]) == ([], ["--", "a", "-b"])


# Jobs


def obey(args: list[str], folder: Path) -> None:
    """A process that does what its words say."""
    (folder / OUT).write_text(f"pid {os.getpid()}\n")
    tell = lambda does: os.write(log, f"{args[0]} {does}\n".encode())
    log = os.open(args[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    tell("begins")
    if args[0] == "refuse":
        (folder / ERR).write_text("sfumato: warning: careful\nsfumato: there is no model 'x'\n")
        sys.exit(2)
    if args[0] == "fall":
        os.kill(os.getpid(), 9)
    if args[0] == "last":
        notes = Notes(folder / MOVED)
        notes("drawing", 3, 7)
        time.sleep(60)
    tell("ends")


@pytest.fixture
def jobs(tmp_path):
    made = Jobs(tmp_path / "root", obey, multiprocessing.get_context("fork"))
    yield made
    made.close()


def until(true: Any, seconds: float = 30) -> None:
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < seconds, "it does not come"
        time.sleep(0.02)


def put(jobs: Jobs, tmp_path: Path, *what: str, kind: str = "try") -> Job:
    return jobs.submit(kind, lambda folder: [Step(w, (w, str(tmp_path / "log"))) for w in what])


def test_jobs_run_one_at_a_time_in_their_order(jobs, tmp_path):
    made = [put(jobs, tmp_path, "one", "two"), put(jobs, tmp_path, "three"), put(jobs, tmp_path, "four")]
    until(lambda: all(job.over for job in made))
    assert [job.state for job in made] == ["done"] * 3
    said = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert said == [[name, does] for name in ("one", "two", "three", "four") for does in ("begins", "ends")]
    assert [job.folder.name for job in made] == ["001-try", "002-try", "003-try"]


def test_a_running_job_is_cancelled_and_the_next_one_begins(jobs, tmp_path):
    long = put(jobs, tmp_path, "last", "never", kind="long")
    next_, gone = put(jobs, tmp_path, "one"), put(jobs, tmp_path, "two", kind="other")
    until(lambda: long.moved() is not None)
    assert long.moved() == ("drawing", 3, 7) and jobs.ahead(gone) == 2
    head, _ = views.running(long)
    assert "drawing: 3 of 7" in head and "(1 of 2)" in head
    assert "waits until 2 other jobs are over" in views.running(gone, jobs.ahead(gone))[0]
    process = int(long.said().split()[1])
    assert jobs.cancel("other") is gone and jobs.cancel() is long
    until(lambda: next_.over)
    assert (long.state, gone.state, next_.state) == ("cancelled", "cancelled", "done")
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    assert "never" not in (tmp_path / "log").read_text() and "two" not in (tmp_path / "log").read_text()
    assert jobs.cancel() is None


def test_a_refusal_is_one_sentence_and_a_crash_is_told(jobs, tmp_path):
    refused, fallen = put(jobs, tmp_path, "refuse", "never"), put(jobs, tmp_path, "fall")
    until(lambda: fallen.over)
    assert (refused.state, refused.sentence()) == ("refused", "there is no model 'x'")
    assert refused.warnings() == ["careful"]
    assert fallen.state == "failed" and "without a word" in fallen.sentence()


def test_numbers_go_on_where_an_earlier_studio_stopped(jobs, tmp_path):
    (tmp_path / "root" / "041-draw").mkdir(parents=True)
    assert put(jobs, tmp_path, "one").folder.name == "042-try"


def test_too_many_are_refused(jobs, tmp_path):
    made = [put(jobs, tmp_path, "last") for _ in range(9)]
    with pytest.raises(BadInput, match="waiting already"):
        put(jobs, tmp_path, "one")
    for job in made[1:]:
        job.state = "cancelled"


def test_progress_is_heard_in_the_place_of_stderr(monkeypatch, capsys):
    heard = []
    monkeypatch.setattr(progress, "listener", lambda *told: heard.append(told))
    assert list(progress.track(range(2), "drawing")) == [0, 1]
    assert heard == [("drawing", 0, 2), ("drawing", 1, 2), ("drawing", 2, 2)]
    list(progress.track(range(2), "drawing", show=False))
    assert len(heard) == 3 and capsys.readouterr().err == ""


# What comes in


def test_models_are_named_and_nothing_is_fetched(tmp_path):
    assert doors.model_named(" sketch ") == "sketch" and doors.model_named(str(tmp_path)) == str(tmp_path)
    for said in ("owner/name", "https://example.org/x", "", "\0", "~nobody-here/x", "a" * 5000):
        with pytest.raises(BadInput):
            doors.model_named(said)


class Trap:
    def __reduce__(self):
        return (os.system, ("touch trapped",))


def test_sent_files_are_opened_by_no_pickle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = {
        "model.safetensors": pickle.dumps(Trap(), protocol=4),
        "model.ckpt": b"anything",
        "model.pkl": pickle.dumps(Trap(), protocol=0),
        "text.safetensors": b"not a model at all",
        "short.safetensors": b"",
        "cut.safetensors": (10**6).to_bytes(8, "little") + b'{"a":',
        "lfs.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    }
    for name, content in bad.items():
        file = tmp_path / "sent" / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        with pytest.raises(BadInput) as told:
            doors.taken_in(file, name, tmp_path / "uploads", 10**9)
        assert "\n" not in str(told.value) and not file.exists(), name
    torch.save({"a": torch.ones(2)}, tmp_path / "zipped.safetensors")
    assert zipfile.is_zipfile(tmp_path / "zipped.safetensors")
    with pytest.raises(BadInput, match="pickle"):
        doors.model_named(str(tmp_path / "zipped.safetensors"))
    assert not (tmp_path / "uploads").exists() and not (tmp_path / "trapped").exists()


def test_sent_files_have_a_size_and_plain_names(tmp_path):
    file = tmp_path / "a.safetensors"
    for name, kept in (("../../<b>x\u202e.safetensors", "b-x.safetensors"), ("<b>x.safetensors", "b-x-1.safetensors")):
        save_file({"a": torch.ones(4)}, file)
        got = doors.taken_in(file, name, tmp_path / "uploads", 10**6)
        assert got == tmp_path / "uploads" / kept and got.is_file() and not file.exists()
    save_file({"a": torch.ones(4000)}, file)
    with pytest.raises(BadInput, match="more than"):
        doors.taken_in(file, "a.safetensors", tmp_path / "uploads", 1000)


# What is shown


def finished_job(tmp_path: Path, prompt: str) -> Job:
    folder = tmp_path / "003-draw"
    [step] = actions.draw("sketch", actions.Drawing(prompt))(folder)
    job = Job(3, "draw", (step,), folder, "done")
    picture = torch.zeros(8, 8, 3, dtype=torch.uint8).numpy()
    save_png(step.out / "000.png", picture, {"prompt": prompt, "seed": 4, "model": "sketch"})
    save_png(step.out / "sheet.png", picture, {})
    return job


def test_hostile_words_are_shown_as_text(tmp_path):
    head, body = views.finished(finished_job(tmp_path, HOSTILE))
    page = head + body + views.refused(HOSTILE)
    assert "<script" not in page and "\u202e" not in page and "\x1b" not in page
    assert "&lt;script&gt;" in page and "\\u202e" in page
    assert page.count("<img ") == 1 and 'src="/runs/003-draw/pictures/000.png"' in page


def test_every_picture_has_its_record_and_its_command(tmp_path):
    _, body = views.finished(finished_job(tmp_path, "a red star"))
    assert "<summary>record</summary>" in body and "<th>model</th><td>sketch</td>" in body
    assert "--out pictures-003-again --seeds 4" in body and body.count('class="copy"') == 2


def test_reports_are_folders_that_audits_wrote(tmp_path):
    for said in ("", "nowhere", "\0", str(tmp_path)):
        with pytest.raises(BadInput, match="no report"):
            ledgers.report_in(said)
    (tmp_path / "index.html").write_text("<script>")
    with pytest.raises(BadInput, match="no record"):
        ledgers.report_in(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(BadInput, match="JSON"):
        ledgers.report_in(tmp_path)
    (tmp_path / "report.json").write_text("{}")
    assert ledgers.report_in(str(tmp_path)) == tmp_path
    assert 'sandbox="allow-scripts"' in views.page("/reports/1/index.html")


def test_the_ledger_is_shown_and_a_spoiled_result_is_told(tmp_path):
    effect = {"value": 0.5, "low": 0.25, "high": 0.75}
    seeds = [{"seed": i, "method": 0.4 + i / 10, "baseline": 0.0, "n": 9} for i in range(3)]
    claim = {"sentence": "it <b>holds", "effect": effect, "verdict": "reproduced", "per_seed": seeds}
    (tmp_path / "rece.json").write_text(json.dumps({"name": "rece", "claims": {"a": claim}}))
    (tmp_path / "x.json").write_text('{"name": "x", "claims": {"a": {}}}')
    (tmp_path / "y.json").write_text("[")
    shown = ledgers.ledger(tmp_path)
    assert "+0.5 [+0.25, +0.75]" in shown and "it &lt;b&gt;holds" in shown and "not valid JSON" in shown
    assert "There are no results" in ledgers.ledger(tmp_path / "none")


# Who is answered


def asked(headers: dict[str, str]) -> tuple[int, dict[bytes, bytes]]:
    """Status and headers of an answer to a request with these headers."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def send(message: Any) -> None:
        seen.append(message)

    scope = {"type": "http", "headers": [(k.encode(), v.encode()) for k, v in headers.items()]}
    asyncio.run(Guard(app)(scope, None, send))
    return seen[0]["status"], dict(seen[0]["headers"])


def test_only_its_own_page_is_answered():
    here = {"host": "127.0.0.1:7860"}
    status, headers = asked(here)
    assert status == 200 and headers[b"content-security-policy"] == POLICY.encode()
    assert "http" not in POLICY.replace("https:", "http") and "*" not in POLICY
    assert asked({**here, "origin": "http://127.0.0.1:7860"})[0] == 200
    for bad in ({**here, "origin": "http://evil.example"}, {**here, "origin": "null"}, {"host": "evil.example"}, {}):
        assert asked(bad)[0] == 403, bad


def test_a_port_that_is_taken_is_refused():
    with bound(0) as taken, pytest.raises(BadInput, match="--port"), bound(taken.getsockname()[1]):
        pass


def test_without_gradio_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(BadInput, match=r"sfumato\[studio\]"):
        main(["--out", str(tmp_path / "studio"), "--port", "0"])
    assert not (tmp_path / "studio").exists()
