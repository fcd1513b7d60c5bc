"""The command line: exit statuses, one-sentence errors, flags made from dataclasses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest

import sfumato
from sfumato import catalog, cli
from sfumato.commands import erase as erase_command
from sfumato.commands.options import field_docs, parse, sayable
from sfumato.commands.sample import read_seeds
from sfumato.commands.verb import read
from sfumato.errors import BadInput, SfumatoError
from sfumato.files import GENERATED, contact_sheet, read_png_metadata
from sfumato.plan import Plan, human_bytes, human_time

SOURCE = str(Path(sfumato.__file__).parents[1])


def run(*args: str, columns: str = "120", **options) -> subprocess.CompletedProcess:
    """The command in a process of its own."""
    env = {**os.environ, "PYTHONPATH": SOURCE, "COLUMNS": columns}
    command = [sys.executable, "-m", "sfumato", *args]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, **options)


def sentence(capsys) -> str:
    """What the command complained about: exactly one line on stderr, nothing on stdout."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and err.startswith("sfumato: ")
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(args, capsys):
    assert cli.main(args) == 0
    out = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert f"\n  {command} " in out


@pytest.mark.parametrize(
    "command", [*cli.COMMANDS, *(method.command for method in catalog.METHODS)]
)
def test_help_of_every_command_starts_with_an_example(command, capsys):
    assert cli.main([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: sfumato {command}")
    assert f"Example: sfumato {command.split()[0]}" in out.splitlines()[2]


def test_methods_as_json(capsys):
    assert cli.main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {m["name"] for m in listed} >= {"uce", "rece", "esd-x", "esd-u", "spm", "concept-inversion", "t2i"}
    for entry in listed:
        assert {"verb", "name", "class", "paper", "summary"} <= set(entry)


def test_methods_as_a_table_is_one_line_a_method_in_a_pipe():
    lines = run("methods", columns="").stdout.splitlines()
    for method in catalog.METHODS:
        assert any(method.name in line and method.summary in line for line in lines)


def test_tables_are_as_wide_as_columns_says():
    assert max(map(len, run("methods", columns="90").stdout.splitlines())) <= 90


def test_choose_names_every_method_of_the_verb(capsys):
    assert cli.main(["choose", "erase"]) == 0
    out = capsys.readouterr().out
    assert all(method.name in out for method in catalog.methods("erase"))


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ("metods", "did you mean methods?"),
        ("erase", "name a method"),
        ("erase rec --concept star --out x", "did you mean rece?"),
        ("erase concept-inversion", "unknown erase method"),
        ("cite reec", "did you mean rece?"),
        ("cite", "name one method"),
        ("choose eras", "did you mean erase?"),
        ("choose", "name one verb"),
        ("methods --jsn", "did you mean --json?"),
        ("ledger recee", "did you mean rece"),
        ("ledger", "name an entry"),
        ("sample star", "needs --out"),
        ("sample star --out", "--out"),
        ("sample star --sed 1 --out x", "--seeds"),
        ("sample star --steps many --out x", "--steps"),
        ("sample star --scheduler euler --out x", "--scheduler"),
        ("sample --out x", "at least one prompt"),
        ("sample star --seeds a --out x", "names no seeds"),
        ("doctor --fast", "unknown option"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(args, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(args.split()) == 2
    assert told in sentence(capsys)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_prompt_is_bad_input(capsys, tmp_path):
    assert cli.main(["sample", "star", " ", "--out", str(tmp_path / "x")]) == 2
    assert "none of them empty" in sentence(capsys)


def test_an_existing_output_is_refused_before_anything_is_loaded(capsys, tmp_path):
    assert cli.main(["sample", "star", "--out", str(tmp_path)]) == 2
    assert "--overwrite" in sentence(capsys)


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (BadInput("no such star"), 2, "no such star"),
        (SfumatoError("diverged"), 1, "diverged"),
        (RuntimeError("inner"), 1, "RuntimeError: inner (add --debug"),
        (OSError(28, "No space left on device"), 2, "disk is full"),
        (OSError(36, "File name too long", "a" * 300), 2, "too long for the name of a file"),
        (MemoryError(), 1, "out of memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_become_statuses(error, status, told, capsys, monkeypatch):
    def fail(args):
        raise error

    monkeypatch.setattr("sfumato.commands.methods.main", fail)
    assert cli.main(["methods"]) == status
    assert told in sentence(capsys)


def test_debug_shows_the_traceback_and_keeps_the_status(capsys):
    assert cli.main(["cite", "reec", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("did you mean rece?\n")


def test_terminated_process_cleans_up(tmp_path):
    code = """
import sys, time
from sfumato import cli
from sfumato.commands import methods
from sfumato.files import atomic_folder
def write(args):
    with atomic_folder(sys.argv[1]):
        print("writing", flush=True)
        time.sleep(60)
methods.main = write
sys.exit(cli.main(["methods"]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": SOURCE},
    )
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    process.stdout.close()
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_closes_the_pipe_is_no_error():
    command = f"{sys.executable} -m sfumato cite rece | true"
    env = {**os.environ, "PYTHONPATH": SOURCE}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=env)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


@pytest.mark.parametrize("args", [["--help"], ["methods"]])
def test_first_commands_answer_soon(args, record_property):
    run(*args)  # fills the file cache
    before = os.times()
    assert run(*args).returncode == 0
    after = os.times()
    # wall time also measures whatever else the machine does; the promise is 0.7 s of it on two idle cores
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    record_property("cpu seconds", seconds)
    assert 0 < seconds < 2


# Flags from dataclasses


@dataclass(frozen=True, kw_only=True)
class Base:
    concepts: tuple[str, ...]
    """What to erase."""
    anchors: tuple[str, ...] = ()
    """What it turns into."""
    preserve: tuple[str, ...] = ()
    """What stays."""
    seed: int = 0
    """Seed."""


@dataclass(frozen=True, kw_only=True)
class Gentle(Base):
    """Erases gently.

    Attributes:
        strength: how much.
    """

    presets: ClassVar[dict] = {"paper": {}, "sketch": {"strength": 3.0, "steps": 7}}

    strength: float = 0.5
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates
    of the averages."""
    mode: Literal["plain", "tensor"] = "plain"
    """Which variant."""
    skip_start: bool = False
    """Leave the start token alone."""
    steps: int | None = None
    """Steps; by default as many as it takes."""
    hidden: list = field(default_factory=list, init=False)

    def costs(self, pipe):
        return Plan("gently", memory={"weights": 36})

    def run(self, pipe, folder=None):
        return pipe.erased(self), {"condition_number": 3.0}


def gentle(*args: str) -> Gentle:
    return Gentle(**parse("sfumato erase gentle", list(args), Gentle)[0])


def test_fields_become_flags_with_their_defaults():
    assert gentle("--concept", "star") == Gentle(concepts=("star",))
    given = "--concept star --strength 2 --betas 0.5 0.6 --mode tensor --skip-start --steps 7 --seed -3"
    assert gentle(*given.split()) == Gentle(
        concepts=("star",), strength=2.0, betas=(0.5, 0.6), mode="tensor", skip_start=True, steps=7, seed=-3
    )


@pytest.mark.parametrize(
    "args",
    [
        ["--concept", "red star", "--concept", "boat"],
        ["--concepts", "red star", "boat"],
        ["--concept=red star", "--concept=boat"],
        ["--concept", "red star", "--seed", "0", "--concepts", "boat"],
    ],
)
def test_repeatable_flags(args):
    assert gentle(*args).concepts == ("red star", "boat")


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit):
        gentle("--help")
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for text in ("--concept", "--anchor", "--no-skip-start", "What stays.", "how much.", "averages."):
        assert text in out
    assert "hidden" not in out


def test_field_docs_come_from_literals_and_from_attributes():
    docs = field_docs(Gentle)
    assert docs["strength"] == "how much."
    assert docs["betas"] == "Decay rates\nof the averages."
    assert docs["concepts"] == "What to erase."


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (str | Base | None, str | None),
        (Sequence[str] | None, tuple[str, ...] | None),
        (Sequence[str | Base], tuple[str, ...]),
        (str | Path | SfumatoError, str | Path),
        (Sequence[str | SfumatoError], tuple[str, ...]),
        (SfumatoError | None, None),
        (Any, None),
        (tuple[int, ...], tuple[int, ...]),
        (tuple[SfumatoError, ...], None),
        (Literal["a"] | None, Literal["a"] | None),
    ],
)
def test_the_sayable_part_of_a_type(kind, said):
    assert sayable(kind) == said


def test_functions_become_flags_too():
    def audit(before: str, n: int = 3, detector: Any = None, retain: Sequence[str] | None = None):
        """Audit.

        Args:
            before: the original.
            n: how many.
            retain: what must stay.
        """

    args = ["--before", "a", "--concept", "x", "--n", "5", "--retain", "y", "--retain", "z"]
    own, settings = parse("sfumato audit", args, Base, audit)
    assert settings == {"before": "a", "n": 5, "retain": ("y", "z")}
    assert own["concepts"] == ("x",)


def test_a_name_shared_by_two_sources_is_one_flag():
    @dataclass
    class Other:
        seed: int = 9
        """Another's."""

    base, other = parse("x", ["--concept", "a", "--seed", "4"], Base, Other)
    assert base["seed"] == other["seed"] == 4


# `erase` from end to end, with a pipeline that only remembers


class FakePipe:
    """The part of `Text2Image` that the command uses."""

    def __init__(self, value: float = 0.0):
        import torch

        self.network = torch.nn.Linear(2, 3)
        self.network.weight.data.fill_(value)
        self.device, self.dtype, self.adapters = torch.device("cpu"), torch.float32, {}

    def parameters(self, subset):
        return dict(self.network.named_parameters())

    def describe(self, weights=True):
        return {"family": "fake", "parameters": {"unet": 9}, "sha256": "0" * 64}

    def erased(self, method):
        other = FakePipe(1.0)
        other.network.bias = self.network.bias
        return other

    def save(self, folder, overwrite=False, provenance=None):
        from sfumato.files import atomic_folder, write_json

        with atomic_folder(folder, overwrite) as temporary:
            write_json(temporary / "sfumato.json", provenance)


@pytest.fixture
def gentle_in_catalog(monkeypatch):
    cites = catalog.get("uce").cites
    entry = catalog.Method("erase", "gentle", f"{__name__}:Gentle", cites, "Gently.", "none", "never", "it")
    monkeypatch.setattr(catalog, "METHODS", (*catalog.METHODS, entry))
    monkeypatch.setattr(erase_command, "load_any", lambda model, where: FakePipe())


def test_a_catalogue_entry_is_all_that_a_method_needs(gentle_in_catalog, tmp_path, capsys):
    out = tmp_path / "erased"
    args = ["erase", "gentle", "--model", "any", "--concept", "star", "--strength", "2", "--out", str(out)]
    assert cli.main(args) == 0
    record = json.loads((out / "sfumato.json").read_text())
    assert record["method"] == {"verb": "erase", "name": "gentle", "paper": str(catalog.get("uce").paper)}
    assert record["configuration"]["strength"] == 2.0
    assert record["configuration"]["concepts"] == ["star"]
    assert record["parent"]["model"] == "any" and record["parent"]["sha256"] == "0" * 64
    assert record["cost"]["parameters_changed"] == 6 and record["cost"]["parameters_total"] == 9
    assert record["versions"]["sfumato"] == sfumato.__version__
    captured = capsys.readouterr()
    assert "plan" in captured.err and "36 B" in captured.err
    assert str(out) in captured.out
    assert cli.main(args) == 2
    assert cli.main([*args, "--overwrite"]) == 0


def test_a_failing_method_leaves_nothing(gentle_in_catalog, tmp_path, capsys, monkeypatch):
    def fail(self, pipe, folder=None):
        raise SfumatoError("it diverged")

    monkeypatch.setattr(Gentle, "run", fail)
    out = tmp_path / "erased"
    assert cli.main(["erase", "gentle", "--model", "any", "--concept", "star", "--out", str(out)]) == 1
    assert capsys.readouterr().err.endswith("sfumato: it diverged\n")
    assert list(tmp_path.iterdir()) == []


# Small parts


@pytest.mark.parametrize(
    ("text", "seeds"), [("3", [3]), ("0-3", [0, 1, 2, 3]), ("1,5, 9", [1, 5, 9]), ("0-1,7", [0, 1, 7])]
)
def test_seeds(text, seeds):
    assert read_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "3-1", "5,3-1", "1;2"])
def test_bad_seeds(text):
    with pytest.raises(BadInput, match="seeds"):
        read_seeds(text)


def test_contact_sheet_places_every_picture():
    pictures = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    sheet = contact_sheet(pictures, columns=2, gap=1, side=16)
    assert sheet.shape == (2 * 17 + 1, 2 * 17 + 1, 3)
    corners = {(1, 1): 0, (1, 18): 1, (18, 1): 2, (18, 18): 255}
    for (y, x), level in corners.items():
        assert (sheet[y : y + 16, x : x + 16] == level).all()


def test_plan_sums_its_parts():
    plan = Plan("x", memory={"weights": 1_500_000, "gradients": 500_000}, seconds=600, writes=["out/"])
    assert dict(plan.lines()) == {
        "memory: weights": "1.5 MB",
        "memory: gradients": "500 kB",
        "memory: in all": "2 MB",
        "time": "about 10 min",
        "writes": "out/",
    }


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (999_600, "1 MB"), (2.5e9, "2.5 GB"), (3e12, "3 TB")]
)
def test_human_bytes(size, text):
    assert human_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.056, "0.056 s"), (2.4, "2.4 s"), (119.2, "119 s"), (600, "10 min"), (9000, "2.5 h")]
)
def test_human_time(seconds, text):
    assert human_time(seconds) == text


def test_doctor_finds_a_changed_and_a_missing_file(tmp_path):
    import hashlib

    from sfumato.commands.doctor import assets

    (tmp_path / "model").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "model" / name).write_text(name)
    lines = [f"{hashlib.sha256(name.encode()).hexdigest()}  ./model/{name}\n" for name in ("a", "b", "c")]
    (tmp_path / "SHA256SUMS").write_text("".join(lines))
    assert [row[0] for row in assets(tmp_path)] == ["ok"]
    (tmp_path / "model" / "a").write_text("changed")
    (tmp_path / "model" / "b").unlink()
    [(state, what, found)] = assets(tmp_path)
    assert (state, what) == ("BROKEN", "embedded model")
    assert "model/a differs" in found and "model/b is missing" in found and "model/c" not in found
    assert assets(tmp_path / "nowhere")[0][0] == "BROKEN"


@pytest.mark.parametrize(
    ("flags", "strength", "steps"),
    [
        ("--model any", 0.5, None),
        ("--model sketch", 3.0, 7),
        ("", 3.0, 7),
        ("--preset paper", 0.5, None),
        ("--model=any --preset=sketch --strength 1", 1.0, 7),
    ],
)
def test_presets_are_defaults_that_flags_override(gentle_in_catalog, flags, strength, steps):
    args = ["gentle", "--concept", "star", "--out", "x", *flags.split()]
    method = read("erase", args, erase_command.Erase, erase_command.EXAMPLE)[1]
    assert (method.strength, method.steps) == (strength, steps)


def test_unknown_preset(gentle_in_catalog, capsys):
    assert cli.main(["erase", "gentle", "--concept", "star", "--out", "x", "--preset", "skech"]) == 2
    assert "did you mean sketch?" in sentence(capsys)


def test_checksums_cover_every_embedded_file():
    from sfumato.commands.doctor import SUMS, assets

    folder = Path(sfumato.__file__).parent / "assets"
    assert [row for row in assets(folder) if row[0] != "ok"] == []
    listed = {line.split(maxsplit=1)[1] for line in (folder / SUMS).read_text().splitlines()}
    there = {f"./{f.relative_to(folder).as_posix()}" for f in folder.rglob("*") if f.is_file()}
    assert listed == there - {f"./{SUMS}"}, "run scripts/checksums"


def test_warnings_are_one_sentence(capsys, monkeypatch):
    import warnings

    def warn(args):
        warnings.warn("cut off: 'boat'", stacklevel=1)

    monkeypatch.setattr("sfumato.commands.methods.main", warn)
    assert cli.main(["methods"]) == 0
    assert sentence(capsys) == "sfumato: warning: cut off: 'boat'\n"


# With a real pipeline, tiny and random


@pytest.fixture(scope="module")
def tiny_model(tiny_sd, tmp_path_factory):
    return tiny_sd.save(tmp_path_factory.mktemp("models") / "tiny")


def test_sample_writes_pictures_with_their_provenance(tiny_model, tiny_sd, tmp_path, capsys):
    from PIL import Image

    out = tmp_path / "pictures"
    args = ["sample", "a red star", "a blue circle", "--model", str(tiny_model), "--seeds", "0,3", "--steps", "2"]
    assert cli.main([*args, "--out", str(out), "--device", "cpu"]) == 0
    pictures = sorted(out.glob("0*.png"))
    assert [p.name for p in pictures] == [
        "000-a-red-star-seed0.png",
        "001-a-red-star-seed3.png",
        "002-a-blue-circle-seed0.png",
        "003-a-blue-circle-seed3.png",
    ]
    about = read_png_metadata(pictures[1])
    assert (about["prompt"], about["seed"], about["sampling_steps"]) == ("a red star", "3", "2")
    assert about["model-sha256"] == tiny_sd.describe()["sha256"]
    assert about["Source"] == GENERATED
    direct = tiny_sd.draw("a red star", 3, sampling_steps=2)[0].permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(Image.open(pictures[1])) / 255.0 - direct).max() <= 1 / 255
    assert Image.open(out / "sheet.png").size == (2 * 128 + 12, 2 * 128 + 12)
    assert json.loads((out / "sample.json").read_text())["seeds"] == [0, 3]


def test_sample_starts_from_pictures(tiny_model, tiny_sd, tmp_path, capsys):
    import torch
    from PIL import Image

    from sfumato.pipeline.contract import Noised

    files, side = [], tiny_sd.size
    for i, colour in enumerate([(200, 30, 30), (30, 30, 200)]):
        files.append(str(tmp_path / f"{i}.png"))
        Image.new("RGB", (side, side), colour).save(files[-1])
    common = ["--model", str(tiny_model), "--seeds", "0-1", "--steps", "4", "--device", "cpu"]
    base = ["sample", "a red star", "a blue circle", *common]
    assert cli.main([*base, "--image", *files, "--strength", "0.5", "--out", str(tmp_path / "a")]) == 0
    about = read_png_metadata(tmp_path / "a" / "002-a-blue-circle-seed0.png")
    assert about["strength"] == "0.5" and files[1] in about["image"]
    blue = torch.tensor([30, 30, 200])[None, :, None, None] / 255
    start = Noised(blue.expand(1, 3, side, side), 0.5)
    direct = tiny_sd.draw("a blue circle", 0, sampling_steps=4, start=start)[0].permute(1, 2, 0).numpy()
    drawn = np.asarray(Image.open(tmp_path / "a" / "002-a-blue-circle-seed0.png")) / 255.0
    assert np.abs(drawn - direct).max() <= 1 / 255
    twice = ["sample", "art", "art", *common, "--image", *files, "--strength", "0.5", "--out", str(tmp_path / "c")]
    assert cli.main(twice) == 0
    first, _, second, _ = (np.asarray(Image.open(file)) for file in sorted((tmp_path / "c").glob("0*.png")))
    assert not np.array_equal(first, second), "the same prompt and seed, from two pictures"
    for wrong, told in [
        (["a star", "--strength", "0.5"], "how much of --image"),
        (["a star", "--image", files[0]], "with --strength it starts from the picture"),
        (["a star", "--image", files[0], "--strength", "0"], "strength must lie in"),
        (["a star", "--image", *files, "--strength", "0.5"], "one for all or one for each prompt"),
        (["--image", files[0], "--strength", "0.5"], "give at least one prompt"),
    ]:
        assert cli.main(["sample", *wrong, *common, "--out", str(tmp_path / "b")]) == 2
        assert told in capsys.readouterr().err and not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), "model_index.json"),
        (lambda folder: os.truncate(next((folder / "unet").glob("*.safetensors")), 5000), "truncated or corrupt"),
    ],
)
def test_broken_models_are_bad_input(tiny_model, break_it, told, tmp_path, capsys):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    break_it(broken)
    assert cli.main(["sample", "a star", "--model", str(broken), "--out", str(tmp_path / "out")]) == 2
    assert told in sentence(capsys)
    assert not (tmp_path / "out").exists()


def test_unknown_model_is_bad_input(tmp_path, capsys):
    assert cli.main(["sample", "a star", "--model", "skech", "--out", str(tmp_path / "out")]) == 2
    assert "sketch" in sentence(capsys)


def test_unknown_concept_word_is_bad_input():
    with pytest.raises(BadInput, match="did you mean star"):
        erase_command.check_words("sketch", ("sttar",))
    erase_command.check_words("sketch", ("red star",))
    erase_command.check_words("another/model", ("sttar",))
