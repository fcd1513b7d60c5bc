from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import sfumato as sf
from conftest import make_tiny_sd, make_tiny_sdxl
from sfumato.cli import main
from sfumato.erase.uce import UCE
from sfumato.errors import BadInput
from sfumato.pipeline import as_flow, wrap
from sfumato.pipeline.equip import equip
from sfumato.pipeline.low_rank import as_low_rank, truncated, with_low_rank, write_low_rank
from sfumato.pipeline.single.write import write
from single_cases import config_folder, original
from test_single import same_weights


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl"])
def test_a_single_file_comes_back_to_the_same_bits(name, request, tmp_path):
    p, file = request.getfixturevalue(name), tmp_path / "m.safetensors"
    assert write(p, file, provenance={"method": "none"}) == []
    by_hand = original(p.pipe, "sd1" if name == "tiny_sd" else "sdxl")
    by_hand.pop("conditioner.embedders.1.model.logit_scale", None)
    written = load_file(file)
    assert written.keys() == by_hand.keys() and all(torch.equal(x, written[k]) for k, x in by_hand.items())
    again = sf.load(file, "cpu")
    assert again.describe() == p.describe() and again.defaults == p.defaults
    assert torch.equal(again.draw("a red star", 1, sampling_steps=2), p.draw("a red star", 1, sampling_steps=2))
    theirs = type(p.pipe).from_single_file(
        file, config=str(config_folder(p.pipe, tmp_path / "c")), local_files_only=True
    )
    same_weights(theirs, p.pipe)
    with pytest.raises(BadInput, match="exists already"):
        write(p, file)


def test_adapters_are_merged_and_other_families_refused(tiny_sd, tiny_pixart, tmp_path):
    p = tiny_sd.copy()
    adapter = p.add_adapter("a", targets="cross.k")
    for x in adapter.up.values():
        torch.nn.init.ones_(x)
    write(p, tmp_path / "m.safetensors")
    same_weights(sf.load(tmp_path / "m.safetensors", "cpu").pipe, p.merged().pipe)
    with pytest.raises(BadInput, match=r"PixArt.* no single file"):
        write(tiny_pixart, tmp_path / "p.safetensors")


@pytest.mark.parametrize("make", [make_tiny_sd, make_tiny_sdxl])
def test_learned_words_are_in_the_file(make, tmp_path, tmp_path_factory):
    """As diffusers loads them; the second in the alphabet comes first."""
    pipe = make(tmp_path_factory)
    for tokenizer, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        if hasattr(pipe, tokenizer):
            given = {"tokenizer": getattr(pipe, tokenizer), "text_encoder": getattr(pipe, encoder)}
            width = given["text_encoder"].get_input_embeddings().weight.shape[1]
            for i, word in enumerate(("<two>", "<one>")):
                pipe.load_textual_inversion(torch.full((1, width), i + 0.5), token=word, **given)
    p = wrap(pipe)
    assert write(p, tmp_path / "m.safetensors") == []
    again = sf.load(tmp_path / "m.safetensors", "cpu")
    same_weights(again.pipe, p.pipe)
    for ours, theirs in zip(again.tokenizers, p.tokenizers, strict=True):
        assert ours.get_vocab() == theirs.get_vocab()
    told, known = again.encode("a <one> red <two>"), p.encode("a <one> red <two>")
    assert torch.equal(told.ids, known.ids) and torch.equal(told.tokens, known.tokens)


def test_a_flow_has_no_single_file(tiny_sd, tmp_path):
    flow = tiny_sd.copy(own="full")
    as_flow(flow)
    with pytest.raises(BadInput, match=r"predicts a flow.*write a folder"):
        write(flow, tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


def test_a_full_disk_leaves_nothing(tiny_sd, tmp_path, monkeypatch):
    from sfumato.pipeline.single import write as module

    def full(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(BadInput, match="disk is full"):
        write(tiny_sd, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


WRITERS = {
    "single-file": "sfumato.pipeline.single.write.save_file", "diffusers": "safetensors.torch.save_file",
    "lora": "sfumato.pipeline.lora.save_file", "kohya": "sfumato.pipeline.lora.save_file",
    "peft": "sfumato.pipeline.low_rank.save_file",
}  # fmt: skip
"""Format of an export -> what writes its weights."""


@pytest.fixture(scope="module")
def folders(tiny_sd, erased, tmp_path_factory):
    """(edited, base) as folders."""
    where = tmp_path_factory.mktemp("edit")
    return erased.save(where / "erased"), tiny_sd.save(where / "base")


def export(folders, style, out, *flags):
    edited, base = map(str, folders)
    lora = [] if style in ("single-file", "diffusers") else ["--base", base, "--pictures", "0"]
    return ["export", "--model", edited, "--device", "cpu", "--format", style, "--out", str(out), *lora, *flags]


@pytest.mark.parametrize("style", WRITERS)
def test_a_disk_that_fills_up_in_mid_export_leaves_what_was_there(style, folders, tmp_path, monkeypatch, capsys):
    out = tmp_path / ("folder" if style in ("diffusers", "peft") else "m.safetensors")

    def full(tensors, path, *args, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(WRITERS[style], full)
        assert main(export(folders, style, out)) == 2
        assert "the disk is full" in capsys.readouterr().err and not list(tmp_path.iterdir())
    # what a run leaves that was killed while it wrote
    remains = tmp_path / f".{out.name}.tmp-{2**22 + 1}"
    remains.mkdir()
    (remains / "model.safetensors").write_bytes(b"half")
    assert main(export(folders, style, out)) == 0
    assert [path.name for path in tmp_path.iterdir()] == [out.name], "cleared away"
    files = [out] if out.is_file() else sorted(f for f in out.rglob("*") if f.is_file())
    before = [f.read_bytes() for f in files]
    with monkeypatch.context() as patched:
        patched.setattr(WRITERS[style], full)
        assert main(export(folders, style, out, "--overwrite")) == 2
    assert [f.read_bytes() for f in files] == before and len(list(tmp_path.iterdir())) == 1


def test_half_an_export_is_refused_by_who_reads_it(folders, tiny_sd, tmp_path):
    for style, read in (("single-file", sf.load), ("kohya", lambda file: tiny_sd.copy().load_adapter("l", file))):
        file = tmp_path / f"{style}.safetensors"
        assert main(export(folders, style, file)) == 0
        data = file.read_bytes()
        for part in (4, 40, len(data) // 2, len(data) - 1):
            file.write_bytes(data[:part])
            with pytest.raises(BadInput, match="fetch or write it again"):
                read(file)
    assert main(export(folders, "diffusers", tmp_path / "d")) == 0
    weights = next((tmp_path / "d" / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BadInput, match="fetch or write it again"):
        sf.load(tmp_path / "d", "cpu")


def test_truncation_is_the_nearest_of_its_rank():
    delta = torch.randn(7, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s = torch.linalg.svdvals(delta.flatten(1))
    for rank in range(1, 8):
        down, up, error = truncated(delta, rank)
        assert down.shape == (rank, 3, 2, 2) and up.shape == (7, rank)
        left = delta.flatten(1) - up @ down.flatten(1)
        assert abs(left.norm() - s[rank:].square().sum().sqrt()) < 1e-12
        assert abs(error - left.norm() / delta.norm()) < 1e-12
        share = float(s[:rank].square().sum() / s.square().sum())
        assert (
            len(truncated(delta, energy=share - 1e-9)[0])
            == rank
            == len(truncated(delta, energy=share - 1e-9, rank=7)[0])
        )
    two = torch.randn(5, 2).double() @ torch.randn(2, 6).double()
    assert len(truncated(two)[0]) == 2 and truncated(two)[2] < 1e-7


@pytest.fixture(scope="module")
def erased(tiny_sd):
    return UCE(concepts=("star",), anchors=("circle",)).apply(tiny_sd)


@pytest.mark.parametrize(
    ("name", "style"),
    [
        ("tiny_sd", "lora"),
        ("tiny_sdxl", "kohya"),
        pytest.param("tiny_sd", "kohya", marks=pytest.mark.slow),
        pytest.param("tiny_sdxl", "lora", marks=pytest.mark.slow),
    ],
)
def test_diffusers_and_we_read_the_lora_of_an_edit(name, style, request, tmp_path, tmp_path_factory):
    pipe = (make_tiny_sd if name == "tiny_sd" else make_tiny_sdxl)(tmp_path_factory)
    base = wrap(pipe)
    edited = UCE(concepts=("star",), anchors=("circle",)).apply(base)
    encoder = base.text_parts()[-1][1]
    layer = next(n for n, m in base.parts()[encoder].named_modules() if n.endswith("1.self_attn.out_proj"))
    edited = edited.copy([f"{encoder}.{layer}.weight"])
    with torch.no_grad():
        edited.parts()[encoder].get_submodule(layer).weight += 0.3
    low = as_low_rank(base, edited, energy=None)
    assert not low.left and low.factors.keys() == {"unet", encoder} and max(low.errors.values()) < 1e-5
    file = tmp_path / "l.safetensors"
    write_low_rank(low, base, file, style, False, {"rank": "all"})
    if style == "kohya":
        keys = load_file(file).keys()
        assert all(k.startswith(("lora_unet_", "lora_te2_" if name == "tiny_sdxl" else "lora_te_")) for k in keys)
        assert any("_input_blocks_" in k for k in keys) == (name == "tiny_sdxl")
    draw = lambda p: p.draw("a red star", 4, sampling_steps=2, cfg_scale=2.0)
    wanted, plain = draw(edited), draw(base)
    assert (wanted - plain).abs().max() > 1e-3
    torch.testing.assert_close(draw(with_low_rank(base, low.factors)), wanted, rtol=0, atol=2e-4)
    adapter = base.load_adapter("mine", file)
    torch.testing.assert_close(draw(base), wanted, rtol=0, atol=2e-4)
    torch.testing.assert_close(draw(base.merged()), wanted, rtol=0, atol=2e-4)
    adapter.remove()
    assert torch.equal(draw(base), plain)
    pipe.load_lora_weights(file)
    torch.testing.assert_close(draw(base), wanted, rtol=0, atol=2e-4)


def test_peft_reads_its_folder(tiny_sd, erased, tmp_path):
    from peft import PeftModel

    low = as_low_rank(tiny_sd, erased, rank=3, energy=None)
    assert set(low.ranks.values()) == {3} and max(low.errors.values()) > 0
    write_low_rank(low, tiny_sd, tmp_path / "l", "peft", False, {})
    network = tiny_sd.copy().network
    z, words = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), tiny_sd.encode("a star").tokens
    ours = with_low_rank(tiny_sd, low.factors).network(z, 3, words).sample
    theirs = PeftModel.from_pretrained(network, tmp_path / "l" / "unet")(z, 3, words).sample
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_kohyas_spelling_is_refused_where_nobody_reads_it(tiny_sd3, tmp_path):
    edited = UCE(concepts=("star",), anchors=("circle",)).apply(tiny_sd3)
    low = as_low_rank(tiny_sd3, edited, rank=1, energy=None)
    with pytest.raises(BadInput, match=r"kohya's spelling of sd3.*--format lora or peft"):
        write_low_rank(low, tiny_sd3, tmp_path / "l.safetensors", "kohya", False, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tiny_sdxl", "tiny_sd3"])
def test_its_folders_are_read_back(name, request, tmp_path):
    """Of several networks, each into its own: those of two text encoders have the same names for layers."""
    base = request.getfixturevalue(name)
    where = {part: next(n for n, _ in m.named_modules() if n.endswith("1.mlp.fc1"))
             for part, m in base.parts().items() if part in ("text_encoder", "text_encoder_2")}  # fmt: skip
    layer = next(iter(base.projections("text.in" if name == "tiny_sd3" else "cross.k"))).name
    where[base.anatomy.component] = layer
    edited = base.copy([f"{layer}.weight", *(f"{part}.{n}.weight" for part, n in where.items() if n != layer)])
    with torch.no_grad():
        for i, (part, n) in enumerate(where.items()):
            edited.parts()[part].get_submodule(n).weight += 0.1 * (i + 1)
    write_low_rank(as_low_rank(base, edited, energy=None), base, tmp_path / "l", "peft", False, {})
    made = equip(base, "model", [tmp_path / "l"])
    assert len(made.adapters) == 3 and not base.adapters
    for part, n in where.items():
        ours, theirs = (p.parts()[part].get_submodule(n).weight for p in (made.merged(), edited))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    encoder = equip(base, "model", [f"{tmp_path / 'l' / 'text_encoder_2'}:0.5"]).adapters["lora.0"]
    assert list(encoder.layers) == [f"text_encoder_2.{where['text_encoder_2']}"] and encoder.scale == 0.5


def test_what_no_lora_holds_is_named(tiny_sd, tiny_sdxl):
    key = "conv_norm_out.weight"
    edited = tiny_sd.copy([key])
    with torch.no_grad():
        edited.network.conv_norm_out.weight += 1
    with pytest.raises(BadInput, match=r"only where no LoRA acts \(unet\.conv_norm_out\.weight\): export a whole"):
        as_low_rank(tiny_sd, edited)
    with pytest.raises(BadInput, match="do not differ"):
        as_low_rank(tiny_sd, tiny_sd.copy())
    with pytest.raises(BadInput, match=r"text_encoder_2|different networks"):
        as_low_rank(tiny_sd, tiny_sdxl)


def test_the_command(tiny_sd, erased, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    base, folder = tiny_sd.save(tmp_path / "base"), tmp_path / "erased"
    erased.save(folder, provenance={"parent": {"model": str(base)}, "configuration": {"concepts": ["star"]}})

    def run(*flags):
        status = main(["export", "--model", str(folder), "--device", "cpu", *flags])
        told = capsys.readouterr()
        return status, told.out + told.err

    status, told = run("--format", "lora", "--out", str(tmp_path / "l.safetensors"), "--rank", "2", "--pictures", "1")
    assert status == 0 and "error, relative to the change" in told and "pictures lora to edit" in told
    p = tiny_sd.copy()
    p.load_adapter("l", tmp_path / "l.safetensors")
    assert p.adapters["l"].rank == 2
    status, told = run("--out", str(tmp_path / "m.safetensors"))
    assert status == 0
    same_weights(sf.load(tmp_path / "m.safetensors", "cpu").pipe, erased.pipe)
    assert sf.pipeline.read_record(tmp_path / "m.safetensors")["provenance"]["configuration"] == {"concepts": ["star"]}
    assert run("--format", "diffusers", "--out", str(tmp_path / "d"))[0] == 0
    record = json.loads((tmp_path / "d" / "sfumato.json").read_text())
    assert record["provenance"]["export"]["model"] == str(folder)
    for flags, match in (
        (("--out", str(tmp_path / "x")), "ends with .safetensors"),
        (("--format", "peft", "--out", str(tmp_path / "x.safetensors")), "writes a folder"),
        (("--rank", "2", "--out", str(tmp_path / "x.safetensors")), "--rank is for a LoRA"),
        (("--out", str(tmp_path / "m.safetensors")), "exists already"),
    ):
        status, told = run(*flags)
        assert status == 2 and match in told
