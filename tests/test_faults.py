"""Faults from end to end: kill -9, full disks, damaged models, and what people type wrong.

Kills: one helper process imports the libraries once and forks a child for every command, so that a kill costs what
the command costs.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sfumato
from conftest import make_tiny_sd, shared_data
from sfumato import cli
from sfumato.files import held

FORKS = """
import json, os, sys
import torch
import sfumato.audit, sfumato.erase.uce, sfumato.pipeline, sfumato.report.page, sfumato.train.t2i
from sfumato import cli
torch.set_num_threads(1)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        silence = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silence, stream)
        os._exit(cli.main(json.loads(line)))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forks:
    """Runs command lines in forks of one process, and kills them."""

    def __init__(self) -> None:
        env = {**os.environ, "PYTHONPATH": str(Path(sfumato.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", FORKS], env=env, **pipes)

    def run(self, args: list[str], until: Callable[[], bool] | None = None) -> int:
        """The exit status; the command is killed as soon as ``until()`` is true."""
        self.process.stdin.write(json.dumps(args) + "\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        if until is not None:
            while not until() and Path(f"/proc/{child}").exists():
                time.sleep(0.001)
            with suppress(ProcessLookupError):  # it was done before
                os.kill(child, signal.SIGKILL)
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def forks():
    if not hasattr(os, "fork") or not Path("/proc/self").exists():
        pytest.skip("needs fork and /proc")
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny pipeline's folder."""
    folder = tmp_path_factory.mktemp("model") / "sd"
    make_tiny_sd(tmp_path_factory).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Path:
    """A classifier with random weights that knows three words."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    labels = dict(enumerate(("star", "circle", "square")))
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8,
        id2label=labels, label2id={word: i for i, word in labels.items()},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("detector")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ViTForImageClassification(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 16, "width": 16}}))
    return folder


def erase(model: Path, out: Path) -> list[str]:
    return f"erase uce --model {model} --concept star --out {out}".split()


def audit(model: Path, detector: Path, out: Path, after: Path | None = None) -> list[str]:
    return (
        f"audit --before {model} --after {after or model} --concept star --retain circle --detector {detector} "
        f"--n 2 --n-retain 2 --steps 1 --distance mse --attacks --out {out}"
    ).split()


def train(data: Path, out: Path) -> list[str]:
    return (
        f"train t2i --data {data} --out {out} --size 16 --autoencoder-channels 8 8 8 8 --autoencoder-updates 6 "
        "--autoencoder-batch 2 --updates 6 --batch 2 --channels 16 16 --text-width 16 --context 8 --vocabulary 560 "
        "--precision no --checkpoint-every 4"
    ).split()


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file by name; the weights with their bytes (the others tell the time of day)."""
    files = (f for f in folder.rglob("*") if f.is_file())
    return {str(f.relative_to(folder)): f.read_bytes() if f.suffix == ".safetensors" else None for f in files}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def after(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def while_writing(target: Path) -> Callable[[], bool]:
    """Once the temporary sibling of the output is there."""
    return lambda: any(target.parent.glob(f".{target.name}.tmp-*"))


@pytest.mark.parametrize("command", ["erase", "audit"])
def test_killed_at_any_moment_the_output_is_absent_or_whole(command, forks, model, detector, tmp_path):
    make = lambda out: erase(model, out) if command == "erase" else audit(model, detector, out)
    whole, target = tmp_path / "whole", tmp_path / "killed" / "out"
    start = time.monotonic()
    assert forks.run(make(whole)) == 0
    seconds = time.monotonic() - start
    expected = contents(whole)
    draw = random.Random(0).uniform
    for moment in (after(draw(0, seconds)), after(draw(0, seconds)), while_writing(target), while_writing(target)):
        forks.run(make(target), moment)
        if target.exists():
            assert contents(target) == expected
            shutil.rmtree(target)
    assert forks.run(make(target)) == 0
    assert contents(target) == expected
    assert names(target.parent) == ["out"], "what the killed runs left is cleared away"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Three captioned pictures."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("red box", "blue box", "a dot"):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


def test_killed_training_goes_on_to_the_same_bits(forks, pictures, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start = time.monotonic()
    assert forks.run(train(pictures, whole)) == 0
    seconds = time.monotonic() - start
    moments = [
        after(random.Random(1).uniform(0, seconds)),
        while_writing(killed / "autoencoder" / "checkpoint"),
        (killed / "latents.safetensors").exists,  # before the second stage has a checkpoint
        (killed / "diffusion" / "checkpoint").exists,
        while_writing(killed / "pipeline"),
    ]
    for moment in moments:
        forks.run(train(pictures, killed), moment)
        if (killed / "pipeline").exists():
            assert contents(killed / "pipeline") == contents(whole / "pipeline")
    assert forks.run(train(pictures, killed)) == 0
    assert contents(killed / "pipeline") == contents(whole / "pipeline")
    assert names(killed) == names(whole)


def learn(model: Path, out: Path) -> list[str]:
    return (
        f"erase esd-x --model {model} --concept star --updates 8 --sampling-steps 2 --lr 0.001 --checkpoint-every 2 "
        f"--out {out}"
    ).split()


def test_killed_erasure_goes_on_to_the_same_bits(forks, model, tmp_path):
    whole, target = tmp_path / "whole", tmp_path / "killed" / "out"
    assert forks.run(learn(model, whole)) == 0
    state = target.with_name("out.training") / "training"
    moments = [(state / "checkpoint").exists, while_writing(state / "checkpoint"), while_writing(target)]
    for moment in moments:
        forks.run(learn(model, target), moment)
        assert target.exists() or (state / "checkpoint" / "run.json").exists() or any(state.parent.iterdir())
    if not target.exists():
        assert forks.run([*learn(model, target), "--lr", "0.002"]) == 2, "another rate does not go on from there"
        assert forks.run(learn(model, target)) == 0
    assert contents(target) == contents(whole)
    assert names(target.parent) == ["out"], "the state goes when the output is whole"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["erase", "audit", "train"])
def test_many_random_kills(command, forks, model, detector, pictures, tmp_path):
    make = {"erase": lambda out: erase(model, out), "audit": lambda out: audit(model, detector, out),
            "train": lambda out: train(pictures, out)}[command]  # fmt: skip
    whole, target = tmp_path / "whole", tmp_path / "killed" / "out"
    start = time.monotonic()
    assert forks.run(make(whole)) == 0
    seconds = time.monotonic() - start
    rng = random.Random(2)
    for _ in range(20):
        forks.run(make(target), after(rng.uniform(0, seconds)))
        done = target / "pipeline" if command == "train" else target
        if done.exists():
            assert contents(done) == contents(whole / "pipeline" if command == "train" else whole)
            shutil.rmtree(target)
    assert forks.run(make(target)) == 0
    assert contents(target) == contents(whole)


def complaint(args: list[str], capsys, told: str) -> None:
    """The command is refused: status 2, one sentence that says ``told``, and no traceback."""
    capsys.readouterr()
    assert cli.main(args) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("sfumato: ") and "warning: " not in line]
    assert len(lines) == 1 and told in lines[0], err
    assert "Traceback" not in err and err.rstrip().endswith(lines[0])


@pytest.fixture
def damaged(model, tmp_path) -> Path:
    """A copy of the model to be damaged."""
    return Path(shutil.copytree(model, tmp_path / "damaged"))


def truncate(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def corrupt(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    file.write_bytes(b"\xff" * 16 + file.read_bytes()[16:])


def pickled(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))


def without_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def of_another_family(folder: Path) -> None:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "KolorsPipeline"}))


def without_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")


DAMAGE = [
    (without_tokenizer, "is incomplete, its tokenizer is missing"),
    (truncate, "unet/diffusion_pytorch_model.safetensors cannot be read: it is truncated or corrupt"),
    (corrupt, "text_encoder/model.safetensors cannot be read: it is truncated or corrupt"),
    (pickled, "is a pickle, which can run code when it is read: convert it"),
    (without_index, "has no model_index.json"),
    (of_another_family, "KolorsPipeline, which is not supported; supported are Stable Diffusion"),
]


@pytest.mark.parametrize(("damage", "told"), DAMAGE, ids=[damage.__name__ for damage, _ in DAMAGE])
def test_a_damaged_model_is_refused_by_every_command(damage, told, damaged, model, detector, capsys, tmp_path):
    damage(damaged)
    out = tmp_path / "out"
    complaint(erase(damaged, out), capsys, told)
    complaint(audit(model, detector, out, after=damaged), capsys, told)
    complaint(["sample", "a star", "--model", str(damaged), "--out", str(out)], capsys, told)
    attack = f"attack concept-inversion --model {damaged} --original {model} --concept star --out {out}"
    complaint(attack.split(), capsys, told)
    assert names(tmp_path) == ["damaged"]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ("erase uce --model nowhere --concept star --out out", "there is no model 'nowhere'"),
        ("erase ucee --model {model} --concept star --out out", "did you mean uce?"),
        ("erase uce --concept stra --out out", "did you mean star?"),
        ("demo --concept stra --out out", "did you mean star?"),
        ("erase uce --model {model} --out out", "needs --concept"),
        ("erase uce --model {model} --concept star --concept star --out out", "named twice"),
        ("erase uce --model {model} --concept star --preset sketch --out out", "has no presets"),
        ("erase uce --model {model} --concept star --out {model}/unet/config.json/out", "is no folder"),
        ("sample star --model {model} --steps 2000 --out out", "between 1 and 1000"),
        ("sample star --model {model} --adapter {model} --out out", "no adapter file"),
        ("audit --before {model} --after {model} --concept star --batch 0 --out out", "batch must be"),
        ("erase uce --model {model} --concept star --device warp9 --out out", "there is no device 'warp9'"),
        ("erase uce --model {model} --concept star --preserve star --out out", "both erased and preserved"),
        ("sample star --model {model} --size 17 --out out", "not a multiple"),
        ("sample star --model {model} --steps 0 --out out", "steps"),
        ("sample star --model {model} --seeds 99999999999999999999 --out out", "below 2**63"),
        ("attack concept-inversio --model {model} --concept star --out out", "did you mean concept-inversion?"),
        (
            "attack concept-inversion --model {model} --original {model} --init-word art --concept star --tokens 11 "
            "--out out",
            "this model's context holds 10",
        ),
        (
            "attack concept-inversion --model {model} --images nowhere --templates {{}} --concept star --out out",
            "nowhere is no folder of pictures",
        ),
        ("train t2i --data nowhere --out out", "no pictures at 'nowhere'"),
        ("train t2i --data {model}/model_index.json --out out", "no pictures at"),
        ("train t2i --data {model}/unet --out out", "holds no pictures"),
        ("train t2i --data {model}/unet/config.json.parquet --out out", "no such Parquet file"),
        ("train t2i --batch 0 --out out", "must be at least 1"),
        ("train t2i --channels 10 --out out", "channels must be multiples of 16"),
        ("train t2i --autoencoder-channels 8 8 --out out", "must be four multiples of 8"),
        ("train t2i --autoencoder-updates 0 --out out", "only be 0 with start_from"),
        ("train t2i --lr nan --out out", "--lr must be a finite number"),
        ("train t2i --data {pictures} --start-from nowhere --out out", "there is no model 'nowhere'"),
        ("train t2j --out out", "did you mean t2i?"),
        ("compare {model} {model} --out out", "no report at"),
        ("compare {model} --out out", "name two reports"),
    ],
)
def test_bad_input(args, told, model, pictures, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    complaint(args.format(model=model, pictures=pictures).split(), capsys, told)
    assert names(tmp_path) == []


def test_a_concept_that_the_detector_does_not_know(model, detector, capsys, tmp_path):
    args = [arg.replace("circle", "circel") for arg in audit(model, detector, tmp_path / "out")]
    complaint(args, capsys, "did you mean circle?")
    assert names(tmp_path) == []


@pytest.mark.parametrize("empty", ["", " "])
def test_empty_prompts_and_concepts(empty, model, detector, capsys, tmp_path):
    out = tmp_path / "out"
    complaint(["sample", empty, "--model", str(model), "--out", str(out)], capsys, "none of them empty")
    for args in (
        erase(model, out), audit(model, detector, out),
        f"attack concept-inversion --model {model} --original {model} --concept star --out {out}".split(),
    ):  # fmt: skip
        complaint([empty if arg == "star" else arg for arg in args], capsys, "concept")
    assert names(tmp_path) == []


def test_an_existing_output_is_left_as_it_is(model, detector, pictures, capsys, tmp_path):
    (tmp_path / "mine").write_text("mine")
    attack = f"attack concept-inversion --model {model} --original {model} --concept star --out {tmp_path}".split()
    sample = ["sample", "a star", "--model", str(model), "--out", str(tmp_path)]
    for args in (erase(model, tmp_path), audit(model, detector, tmp_path), attack, sample):
        complaint(args, capsys, "exists already: choose another name, or add --overwrite")
    complaint(train(pictures, tmp_path / "mine"), capsys, "is a file where a folder is to be written")
    assert names(tmp_path) == ["mine"] and (tmp_path / "mine").read_text() == "mine"


SMALL = (
    "--data digits --size 8 --updates 1 --batch 2 --channels 8 16 --kinds res res --blocks 1 --middle 1 --head-dim 8 "
    "--embedding 16 --track none"
)


def test_what_is_in_the_way_of_a_model_is_refused_before_the_work(capsys, tmp_path):
    args = ["train", "sid2", *SMALL.split(), "--out", str(tmp_path / "run")]
    mine = tmp_path / "run" / "model" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    complaint(args, capsys, "is in the way and no result of this run")
    assert names(tmp_path / "run") == ["model"] and mine.read_text() == "mine"
    assert cli.main([*args, "--overwrite"]) == 0 and not mine.exists()
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "run").rglob("*") if f.is_file()}
    (tmp_path / "run" / ".model.old-12345").mkdir()  # of a kill when all was done
    capsys.readouterr()
    assert cli.main(args) == 0 and "finished already" in capsys.readouterr().out
    assert not (tmp_path / "run" / ".model.old-12345").exists()
    complaint([*args, "--seed", "1"], capsys, "was made with seed=0, and this run has seed=1")
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "run").rglob("*") if f.is_file()} == before
    shutil.rmtree(tmp_path / "run" / "model")
    complaint([*args, "--seed", "1"], capsys, "holds a run with seed=0, and this one has seed=1")
    with held(tmp_path / "run"):
        complaint(args, capsys, "another run is at work in")
    assert names(tmp_path / "run") == ["training"]


def test_two_seeds_into_one_folder_at_once(capsys, tmp_path):
    args = ["train", "sid2", *SMALL.split(), "--out", str(tmp_path / "run")]
    with held(tmp_path / "run"):
        complaint([*args, "--seed", "1"], capsys, "another run is at work in")
    assert names(tmp_path) == []


def test_a_prompt_longer_than_the_context_is_cut_with_a_warning(model, capsys, tmp_path):
    prompt = "a photo of a red star of a blue circle of art"
    assert cli.main(["sample", prompt, "--model", str(model), "--steps", "1", "--out", str(tmp_path / "out")]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warnings == ["sfumato: warning: the prompt has 14 tokens, the model reads 12; cut off: 'of art'"]


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("command", ["erase", "audit", "sample"])
def test_a_full_disk_leaves_nothing_half_written(command, model, detector, capsys, tmp_path, monkeypatch):
    out = tmp_path / "new" / "out"
    args = {
        "erase": erase(model, out), "audit": audit(model, detector, out),
        "sample": ["sample", "star", "--steps", "1", "--model", str(model), "--out", str(out)],
    }[command]  # fmt: skip
    monkeypatch.setattr(os, "fsync", full_disk)
    complaint(args, capsys, "the disk is full")
    assert names(tmp_path) == []


def test_a_disk_that_fills_up_while_training(pictures, capsys, tmp_path, monkeypatch):
    args = train(pictures, tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr("sfumato.train.state.save_file", full_disk)
        complaint(args, capsys, "the disk is full")
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("checkpoint*"))
    with monkeypatch.context() as patched:
        patched.setattr("sfumato.train.autoencoder.save_file", full_disk)
        complaint(args, capsys, "the disk is full")
    assert names(tmp_path / "run") == ["autoencoder"]


def test_a_damaged_checkpoint_is_named(pictures, capsys, tmp_path, monkeypatch):
    args = train(pictures, tmp_path / "run")
    monkeypatch.setattr("sfumato.train.t2i.encode_all", full_disk)  # ends after the first stage
    complaint(args, capsys, "the disk is full")
    file = tmp_path / "run" / "autoencoder" / "checkpoint" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    complaint(args, capsys, "autoencoder/checkpoint is damaged")


def test_training_on_real_parquet_files(tmp_path, capsys):
    pq = pytest.importorskip("pyarrow.parquet")
    source = shared_data() / "emoji" / "noto.parquet"
    if not source.exists():
        pytest.skip("the emoji pictures are not at hand (shared/data/emoji)")
    pq.write_table(pq.read_table(source).slice(0, 4), tmp_path / "some.parquet")
    args = train(tmp_path / "some.parquet", tmp_path / "run")
    complaint([*args, "--caption", "{caption} in {colour}"], capsys, "no column of")
    assert cli.main([*args, "--caption", "{caption}, noto style"]) == 0
    (tmp_path / "some.parquet").write_bytes(b"PAR1")
    again = train(tmp_path / "some.parquet", tmp_path / "another")
    complaint(again, capsys, "cannot be read as Parquet files")
