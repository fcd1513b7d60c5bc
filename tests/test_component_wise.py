"""Closed-form edits of a folder by its files: the same bits as loading, editing and saving, without the loading."""

from __future__ import annotations

import errno
import hashlib
import json
import os

import pytest
import torch

import sfumato as sf
from conftest import make_tiny_sd3
from sfumato.cli import main
from sfumato.erase.rece import RECE
from sfumato.erase.uce import UCE
from sfumato.errors import BadInput
from sfumato.pipeline import partial as module
from sfumato.pipeline import wrap
from sfumato.pipeline.partial import float32_bytes, open_partially
from sfumato.plan import human_bytes
from test_single import same_weights

METHODS = {
    "uce": UCE(concepts=("star",), anchors=("circle",), preserve=("red square",)),
    "rece": RECE(concepts=("star",), epochs=1),
}


def saved(p, folder, sharded=True, dtype=torch.float32, variant=None):
    """A folder as diffusers writes it, its network in several files."""
    folder = p.copy("all").save(folder)
    network, component = p.copy("all").network.to(dtype), p.anatomy.component
    for file in (folder / component).iterdir():
        file.unlink()
    size = sum(x.numel() * x.element_size() for x in network.parameters())
    network.save_pretrained(folder / component, max_shard_size=size // 3 if sharded else "10GB", variant=variant)
    return folder


def hashes(folder):
    return {f.relative_to(folder): hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.rglob("*.safetensors")}


@pytest.mark.parametrize(("name", "method"), [("tiny_sdxl", "rece"), ("tiny_pixart", "uce")])
def test_the_bits_are_those_of_loading_editing_and_saving(name, method, request, tmp_path):
    p, method = request.getfixturevalue(name), METHODS[method]
    folder = saved(p, tmp_path / "model")
    before, component = hashes(folder), p.anatomy.component
    shards = sorted((folder / component).glob("*.safetensors"))
    assert len(shards) > 2
    told = method.run_in_folder(folder, tmp_path / "out", provenance={"seed": 0})
    assert hashes(folder) == before
    whole = method.apply(sf.load(folder, "cpu"))
    whole.save(tmp_path / "whole")
    ours, theirs = sf.load(tmp_path / "out", "cpu"), sf.load(tmp_path / "whole", "cpu")
    assert ours.describe()["sha256"] == theirs.describe()["sha256"] != p.describe()["sha256"]
    assert told["log"] == method.run(sf.load(folder, "cpu"))[1]
    record = json.loads((tmp_path / "out" / "sfumato.json").read_text())
    assert record["provenance"]["seed"] == 0 and "sha256" not in record["description"]
    # files without a projection are the original's own
    edited = {f"{x.name}.weight" for x in p.projections(*method.needs)}
    where = json.loads(next((folder / component).glob("*.index.json")).read_text())["weight_map"]
    concerned = {where[key] for key in edited}
    same = {f.name for f in shards if os.path.samefile(f, tmp_path / "out" / component / f.name)}
    assert same == {f.name for f in shards} - concerned
    done = told["component_wise"]
    size = sum(x.weight.numel() * 4 for x in p.projections(*method.needs))
    assert done["written_bytes"] == size and done["tensors"] == len(edited) and done["copied_files"] == len(concerned)
    encoders = [m for part, m in p.parts().items() if part.startswith("text_encoder")]
    assert done["read_bytes"] > size + sum(x.numel() * 4 for m in encoders for x in m.parameters()) / 2


def test_only_what_is_needed_is_in_memory(tiny_sd, tmp_path):
    folder = saved(tiny_sd, tmp_path / "model")
    partial = open_partially(folder)
    needed = [f"{x.name}.weight" for x in partial.pipe.projections("cross.k", "cross.v")]
    assert all(not x.weight.is_meta for x in partial.pipe.projections("cross.k", "cross.v"))
    there = {name for name, x in partial.pipe.network.named_parameters() if not x.is_meta}
    assert there == {*needed, "conv_in.weight"}
    here = {part: m for part, m in partial.pipe.parts().items() if part != "unet"}
    live, seen = [], set()

    def look(layer, args, output):
        seen.update(id(m) for m in (layer,))
        live.append(sum(x.numel() for m in here.values() for x in m.parameters() if not x.is_meta))

    for layer in here["text_encoder"].modules():
        layer.register_forward_hook(look)
    cond = partial.pipe.encode(["a red star"])
    assert torch.equal(cond.tokens, tiny_sd.encode(["a red star"]).tokens)
    assert all(x.is_meta for m in here.values() for x in m.parameters())
    largest = max(x.numel() for x in here["text_encoder"].parameters())
    assert live and max(live) <= 2 * largest and max(live) < sum(x.numel() for x in here["text_encoder"].parameters())


def test_half_precision_stays(tiny_sd, tmp_path):
    half = tiny_sd.copy("all")
    half.pipe.to(torch.float16)
    folder = saved(half, tmp_path / "model", dtype=torch.float16, variant="fp16")
    METHODS["uce"].run_in_folder(folder, tmp_path / "out")
    whole = METHODS["uce"].apply(sf.load(folder, "cpu", torch.float16))
    ours = sf.load(tmp_path / "out", "cpu", torch.float16)
    same_weights(ours.pipe, whole.pipe)
    assert list((tmp_path / "out" / "unet").glob("*.fp16*.safetensors"))
    assert not torch.equal(
        next(iter(ours.parameters("xattn-strict").values())),
        next(iter(tiny_sd.parameters("xattn-strict").values())).half(),
    )


@pytest.mark.parametrize("sharded", [False, True])
def test_no_other_form_of_the_weights_keeps_the_concept(tiny_sd, tmp_path, sharded):
    folder = saved(tiny_sd, tmp_path / "model", sharded)
    size = sum(x.numel() * 2 for x in tiny_sd.network.parameters()) // 3 if sharded else "10GB"
    tiny_sd.copy("all").network.half().save_pretrained(folder / "unet", max_shard_size=size, variant="fp16")
    torch.save(tiny_sd.network.state_dict(), folder / "unet" / "diffusion_pytorch_model.bin")
    others = {
        "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/nested/diffusion_pytorch_model.safetensors", "text_encoder/model.fp16.safetensors",
        "text_encoder/flax_model.msgpack", "vae/diffusion_pytorch_model.ckpt",
    }  # fmt: skip
    for name in others - {"unet/diffusion_pytorch_model.bin"}:
        (folder / name).parent.mkdir(exist_ok=True)
        part = name.split("/")[0]
        file = max((f for f in (folder / part).glob("*.safetensors") if "fp16" not in f.name), key=lambda f: f.name)
        (folder / name).write_bytes(file.read_bytes())
    others |= {f.relative_to(folder).as_posix() for f in folder.rglob("unet/*fp16*")}
    told = METHODS["uce"].run_in_folder(folder, tmp_path / "out")
    there = {f.relative_to(folder) for f in folder.rglob("*") if f.is_file()}
    written = {f.relative_to(tmp_path / "out") for f in (tmp_path / "out").rglob("*") if f.is_file()}
    assert {f.as_posix() for f in there - written} == others
    assert told["component_wise"]["left_out"] == sorted(others)
    assert json.loads((tmp_path / "out" / "sfumato.json").read_text())["provenance"]["left_out"] == sorted(others)
    whole = METHODS["uce"].apply(sf.load(folder, "cpu"))
    same_weights(sf.load(tmp_path / "out", "cpu").pipe, whole.pipe)


def test_it_reads_the_files_that_a_whole_load_reads(tiny_sd, tmp_path):
    """Of several forms that differ: diffusers reads the shards, transformers the whole file, both the variant."""
    folder, other = saved(tiny_sd, tmp_path / "model", sharded=False), tiny_sd.copy("all")
    with torch.no_grad():
        for module in (other.network, other.pipe.text_encoder):
            for x in module.parameters():
                x.mul_(1.1)
    other.network.save_pretrained(tmp_path / "n", max_shard_size=200_000)
    other.pipe.text_encoder.save_pretrained(tmp_path / "t", max_shard_size=20_000)
    for part, source in (("unet", "n"), ("text_encoder", "t")):
        for file in (tmp_path / source).glob("*"):
            (folder / part / file.name).write_bytes(file.read_bytes())
    assert len(list((folder / "text_encoder").glob("*.safetensors"))) > 2

    def same(out):
        METHODS["uce"].run_in_folder(folder, tmp_path / out)
        same_weights(sf.load(tmp_path / out, "cpu").pipe, METHODS["uce"].apply(sf.load(folder, "cpu")).pipe)

    same("a")
    read = sf.load(folder, "cpu").pipe
    same_weights(read, other.copy().pipe, ("unet",))
    same_weights(read, tiny_sd.pipe, ("text_encoder",))
    # the network is there as a variant only, and the text encoder in both
    for file in (folder / "unet").glob("*.safetensors"):
        file.unlink()
    other.network.save_pretrained(folder / "unet", variant="fp16")
    other.pipe.text_encoder.save_pretrained(folder / "text_encoder", variant="fp16")
    same("b")
    assert 'from_pretrained("this folder", variant="fp16")' in (tmp_path / "b" / "README.md").read_text()
    assert "variant" not in (tmp_path / "a" / "README.md").read_text().split("## What it is")[0]


def test_without_t5(tmp_path, tmp_path_factory):
    p = wrap(make_tiny_sd3(tmp_path_factory, t5=False))
    p.save(tmp_path / "model")
    assert sf.load(tmp_path / "model", "cpu").describe() == p.describe()
    card = (tmp_path / "model" / "README.md").read_text()
    assert 'from_pretrained("this folder", text_encoder_3=None, tokenizer_3=None)' in card
    METHODS["uce"].run_in_folder(tmp_path / "model", tmp_path / "out")
    same_weights(sf.load(tmp_path / "out", "cpu").pipe, METHODS["uce"].apply(sf.load(tmp_path / "model", "cpu")).pipe)


def test_a_full_disk_leaves_nothing(tiny_sd, tmp_path, monkeypatch):
    folder = saved(tiny_sd, tmp_path / "model", sharded=False)
    copy = module.shutil.copyfile

    def full(source, target):
        if source.suffix == ".safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        return copy(source, target)

    monkeypatch.setattr(module.shutil, "copyfile", full)
    with pytest.raises(BadInput, match="disk is full"):
        METHODS["uce"].run_in_folder(folder, tmp_path / "out")
    assert os.listdir(tmp_path) == ["model"]


def test_the_doctor_says_what_a_model_takes(tiny_sd, tmp_path, capsys):
    from sfumato.commands.doctor import Room, room

    folder = saved(tiny_sd, tmp_path / "model", sharded=False)
    rows = {what: (count, size) for what, count, size in room(Room(model=str(folder), method="esd-x"))}
    trained = sum(x.numel() for x in tiny_sd.parameters("xattn").values())
    weights = 4 * sum(x.numel() for m in tiny_sd.parts().values() for x in m.parameters())
    assert rows["unet"][0] == f"{sum(x.numel() for x in tiny_sd.network.parameters()):,}"
    assert rows["in all"][1] == human_bytes(weights) and rows["esd-x: optimiser"][1] == human_bytes(8 * trained)
    half = {what: size for what, _, size in room(Room(model=str(folder), method="uce", dtype="float16"))}
    vae = 4 * sum(x.numel() for x in tiny_sd.pipe.vae.parameters())  # which is loaded in float32
    assert half["vae"] == human_bytes(vae) and half["in all"] == human_bytes((weights + vae) / 2)
    assert "uce, by files: weights concerned" in half
    published = {what: (count, size) for what, count, size in room(Room(model="sd1", dtype="float16"))}
    for part, width in (("vae", 4), ("unet", 2)):
        assert published[part][1] == human_bytes(width * int(published[part][0].replace(",", "")))
    assert main(["doctor", "--method", "uce"]) == 2 and "--model" in capsys.readouterr().err


def test_bad_input(tiny_sd, tmp_path):
    folder = saved(tiny_sd, tmp_path / "model", sharded=False)
    uce = METHODS["uce"]
    with pytest.raises(BadInput, match="lies in the folder of the model"):
        uce.run_in_folder(folder, folder / "out")
    with pytest.raises(BadInput, match="exists already"):
        uce.run_in_folder(folder, tmp_path)
    with pytest.raises(BadInput, match="no folder of a model"):
        uce.run_in_folder("somebody/something", tmp_path / "out")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(BadInput, match="truncated or corrupt"):
        uce.run_in_folder(folder, tmp_path / "out")


def test_on_the_command_line(tiny_sd, tmp_path, capsys, monkeypatch):
    from sfumato.commands import erase

    folder = saved(tiny_sd, tmp_path / "model", sharded=False)
    assert float32_bytes(folder) == 4 * sum(x.numel() for m in tiny_sd.parts().values() for x in m.parameters())

    def run(method, out, *flags):
        status = main(
            ["erase", method, "--model", str(folder), "--concept", "star", "--out", str(tmp_path / out), *flags]
        )
        told = capsys.readouterr()
        return status, told.out + told.err

    status, told = run("uce", "a", "--component-wise", "always")
    assert status == 0 and "hard links" in told and "without loading the model" in told
    assert run("uce", "b")[0] == 0
    same_weights(sf.load(tmp_path / "a", "cpu").pipe, sf.load(tmp_path / "b", "cpu").pipe)
    record = lambda name: json.loads((tmp_path / name / "sfumato.json").read_text())
    assert "component_wise" in record("a")["provenance"] and "component_wise" not in record("b")["provenance"]
    assert record("a")["provenance"]["configuration"]["concepts"] == ["star"]
    monkeypatch.setattr(erase, "free_memory", lambda: 1000)
    assert run("uce", "c")[0] == 0 and "component_wise" in record("c")["provenance"]
    assert run("uce", "d", "--component-wise", "never")[0] == 0 and "component_wise" not in record("d")["provenance"]
    for flags in (
        ("esd-x", "x", "--component-wise", "always"),
        ("uce", "x", "--component-wise", "always", "--dtype", "bfloat16"),
    ):
        status, told = run(*flags)
        assert status == 2 and "--component-wise always does not go with this" in told
