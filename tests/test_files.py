"""Outputs are absent or whole, whatever happens while they are written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import sfumato.files as files
from sfumato.errors import BadInput
from sfumato.files import (
    GENERATED,
    atomic_file,
    atomic_folder,
    read_png_metadata,
    save_png,
    sha256_of,
    write_json,
)

WRITER = """
import sys, time
from pathlib import Path
from sfumato.files import atomic_folder
with atomic_folder(sys.argv[1], overwrite="overwrite" in sys.argv) as folder:
    for i in range(3):
        (folder / f"part{i}").write_bytes(b"new" * 1000)
    print("writing", flush=True)
    time.sleep(60)
"""


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def start_writer(target: Path, *flags: str) -> subprocess.Popen:
    """A process that is halfway through writing ``target``."""
    source = str(Path(files.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(target), *flags],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": source},
    )
    assert process.stdout.readline() == b"writing\n"
    return process


def fill_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_folder_appears_whole_at_the_end(tmp_path):
    target = tmp_path / "new" / "out"
    with atomic_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("a")
        assert not target.exists()
        assert folder.parent == target.parent and folder.name.startswith(".out.tmp-")
    assert names(target.parent) == ["out"]
    assert (target / "sub" / "a").read_text() == "a"


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1)])
def test_folder_is_absent_after_a_failure(tmp_path, error):
    with pytest.raises(type(error)), atomic_folder(tmp_path / "deep" / "out") as folder:
        (folder / "a").write_text("a")
        raise error
    assert names(tmp_path) == []


def test_existing_output_is_refused_before_the_block_runs(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(BadInput, match="--overwrite"), atomic_folder(tmp_path / "out"):
        pytest.fail("the block ran")
    assert names(tmp_path) == ["out"]


def test_overwrite_keeps_the_old_folder_until_the_new_one_is_complete(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(ValueError), atomic_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("new")
        raise ValueError
    assert names(target) == ["old"]
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("new")
        assert names(target) == ["old"]
    assert names(target) == ["new"]
    assert names(tmp_path) == ["out"]


def test_overwrite_spares_the_working_and_repository_folders(tmp_path, monkeypatch):
    (tmp_path / "repository" / ".git").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for target in (tmp_path, tmp_path.parent, tmp_path / "repository"):
        with pytest.raises(BadInput, match="not replaced"), atomic_folder(target, overwrite=True):
            pytest.fail("the block ran")


def test_an_output_that_appears_meanwhile_is_left_alone(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(BadInput, match="appeared"), atomic_folder(target) as folder:
        (folder / "mine").write_text("mine")
        target.mkdir()
        (target / "theirs").write_text("theirs")
    assert names(target) == ["theirs"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_full_disk_is_bad_input_and_leaves_nothing(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files.os, name, fill_disk)
    with pytest.raises(BadInput, match="disk is full"), atomic_folder(tmp_path / "deep" / "out") as folder:
        (folder / "a").write_text("a")
    assert names(tmp_path) == []


def test_a_full_disk_inside_a_nested_write_names_the_outer_output(tmp_path, monkeypatch):
    monkeypatch.setattr(files.json, "dumps", fill_disk)
    refused = pytest.raises(BadInput, match=r"so .*/out was not written")
    with refused, atomic_folder(tmp_path / "out") as folder:
        write_json(folder / "inner.json", {})
    assert names(tmp_path) == []


def test_where_no_folder_can_be_made_it_is_said(tmp_path, monkeypatch):
    def none(folder, *args, **kwargs):  # as in /proc, which is there and may be written to
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(files.Path, "mkdir", none)
    with pytest.raises(BadInput, match="no folder can be made in"), atomic_file(tmp_path / "a"):
        pass


def test_a_library_that_reports_a_full_disk_only_as_text_is_understood(tmp_path):
    with pytest.raises(BadInput, match="disk is full"), atomic_file(tmp_path / "weights.safetensors"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")


def test_killed_writer_leaves_no_output_and_the_next_run_cleans_up(tmp_path):
    target = tmp_path / "out"
    process = start_writer(target)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not target.exists()
    assert names(tmp_path) == [f".out.tmp-{process.pid}"]
    with atomic_folder(target) as folder:
        (folder / "a").write_text("a")
    assert names(tmp_path) == ["out"]


def test_killed_overwrite_leaves_the_old_output(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    process = start_writer(target, "overwrite")
    process.kill()
    process.communicate()
    assert names(target) == ["old"]


def test_a_run_in_progress_is_not_disturbed(tmp_path):
    target = tmp_path / "out"
    process = start_writer(target)
    try:
        with pytest.raises(BadInput, match="another run"), atomic_folder(target):
            pytest.fail("the block ran")
        assert names(tmp_path / f".out.tmp-{process.pid}") == ["part0", "part1", "part2"]
    finally:
        process.kill()
        process.communicate()


def test_killed_between_the_two_renames_of_a_swap_the_old_output_comes_back(tmp_path):
    old = tmp_path / ".out.old-12345"
    old.mkdir()
    (old / "a").write_text("old")
    with pytest.raises(BadInput, match="exists already"), atomic_folder(tmp_path / "out"):
        pytest.fail("the block ran")
    assert (tmp_path / "out" / "a").read_text() == "old"


def test_what_killed_runs_left_inside_a_run_is_gone_at_its_next_start(tmp_path):
    run = tmp_path / "run"
    for place in ("training/.checkpoint.tmp-12345/part", "training/.checkpoint.old-12345", ".model.tmp-12345"):
        (run / place).mkdir(parents=True)
    (run / "training/checkpoint").mkdir()
    (run / ".latents.old-99").mkdir()
    (run / ".mine").write_text("mine")
    with files.held(run / "busy"), files.atomic_folder(run / "busy" / "out") as writing, files.held(run):
        assert names(run) == [".mine", "busy", "latents", "training"], "an output comes back"
        assert names(run / "training") == ["checkpoint"]
        assert writing.is_dir(), "what a living process writes stays"
    assert (run / ".mine").read_text() == "mine"


def test_a_run_that_sweeps_between_making_and_locking_does_no_harm(tmp_path, monkeypatch):
    lock, swept = files.lock_folder, []

    def sweeping(folder):
        if not swept:  # another run of the same output finds the folder before it is locked
            swept.append(folder)
            files._sweep(tmp_path / "out", "out")
        return lock(folder)

    monkeypatch.setattr(files, "lock_folder", sweeping)
    with files.atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        assert swept and files.lock_folder(folder) is None, "locked all the same"
    assert (tmp_path / "out" / "a").read_text() == "1"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems replace a folder in two steps")
def test_a_replaced_folder_is_there_at_every_moment(tmp_path):
    out, absent, done = tmp_path / "out", [], threading.Event()

    def watch():
        while not done.is_set():
            if not (out / "a").exists():
                absent.append(True)

    with files.atomic_folder(out) as folder:
        (folder / "a").write_text("0")
    watcher = threading.Thread(target=watch)
    watcher.start()
    for i in range(100):
        with files.atomic_folder(out, overwrite=True) as folder:
            (folder / "a").write_text(str(i))
    done.set()
    watcher.join()
    assert not absent and sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("~nobody-of-that-name/x", "no such user"), ("/dev/null/x", "is no folder"), ("x" * 300, "at most 230 bytes"),
        ("a\0b", "not a name"),
    ],
)
def test_what_cannot_be_a_name_is_refused_before_the_work(name, told):
    with pytest.raises(BadInput, match=told):
        files.refuse_existing(name)


def test_killed_at_any_moment_the_output_is_absent_or_whole(tmp_path):
    code = WRITER.replace("time.sleep(60)", "")
    env = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1])}
    for delay in np.linspace(0.02, 0.12, 25):
        target = tmp_path / f"out{delay:.4f}"
        command = [sys.executable, "-c", code, str(target)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env)
        time.sleep(delay)
        process.kill()
        process.wait()
        assert not target.exists() or [p.stat().st_size for p in target.iterdir()] == [3000] * 3


def test_file_keeps_its_name_and_replaces_in_one_step(tmp_path):
    target = tmp_path / "a.json"
    with atomic_file(target) as temporary:
        assert temporary.name == "a.json"
        temporary.write_text("1")
    with pytest.raises(BadInput), atomic_file(target):
        pytest.fail("the block ran")
    with atomic_file(target, overwrite=True) as temporary:
        temporary.write_text("2")
    assert target.read_text() == "2"
    assert names(tmp_path) == ["a.json"]


def test_a_parent_that_is_a_file_is_bad_input(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(BadInput, match="cannot write"), atomic_folder(tmp_path / "a" / "out"):
        pytest.fail("the block ran")


def test_json_is_stable_and_strict(tmp_path):
    value = {"b": (1, 2), "a": {"path": Path("x"), "n": np.float64(0.5), "v": np.arange(2)}, "ö": {"z", "y"}}
    write_json(tmp_path / "1.json", value)
    write_json(tmp_path / "2.json", dict(reversed(value.items())))
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()
    read = json.loads((tmp_path / "1.json").read_text(encoding="utf-8"))
    assert read == {"a": {"n": 0.5, "path": "x", "v": [0, 1]}, "b": [1, 2], "ö": ["y", "z"]}
    with pytest.raises(ValueError):
        write_json(tmp_path / "3.json", float("nan"))
    assert names(tmp_path) == ["1.json", "2.json"]


def test_sha256_of_a_file_and_of_a_folder(tmp_path):
    folder = tmp_path / "f"
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_bytes(b"abc")
    (folder / "sub" / "b").write_bytes(b"")
    assert sha256_of(folder / "a") == hashlib.sha256(b"abc").hexdigest()
    first = sha256_of(folder)
    os.rename(folder, tmp_path / "g")
    assert sha256_of(tmp_path / "g") == first
    os.rename(tmp_path / "g" / "a", tmp_path / "g" / "c")
    assert sha256_of(tmp_path / "g") != first


def test_png_carries_its_provenance(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    save_png(tmp_path / "a.png", picture, {"prompt": "ein roter Stern ☆", "seed": 3})
    read = read_png_metadata(tmp_path / "a.png")
    assert read["prompt"] == "ein roter Stern ☆"
    assert read["seed"] == "3"
    assert read["Source"] == GENERATED
    assert read["Software"].startswith("sfumato ")
    from PIL import Image

    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), picture)


def test_png_of_floating_point_rounds_to_the_nearest_level(tmp_path):
    from PIL import Image

    levels = np.linspace(0, 255, 256).reshape(16, 16).repeat(3).reshape(16, 16, 3)
    save_png(tmp_path / "a.png", levels / 255.0)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), levels.astype(np.uint8))


def test_a_file_system_without_locks_holds_nobody_up(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refused(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    other = tmp_path / ".out.tmp-1"  # of a process that may be at work
    other.mkdir()
    with files.held(tmp_path / "run"), files.atomic_folder(tmp_path / "out") as folder:
        (folder / "x").touch()
    assert (tmp_path / "out" / "x").exists() and other.exists()
    (tmp_path / f".out.tmp-{os.getpid()}").mkdir()
    files.clear_leftovers(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.tmp-1", "out"]
