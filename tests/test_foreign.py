"""What comes from elsewhere, whole or damaged: read, or refused in one sentence that names it."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sfumato.data.cases import names, say
from sfumato.data.frames import open_frames
from sfumato.data.pictures import open_pictures
from sfumato.errors import BadInput
from sfumato.foreign import read_json, read_tensors, reading
from sfumato.ledger.page import table
from sfumato.metrics.alignment import ClipScore
from sfumato.metrics.detectors import make_detector
from sfumato.metrics.extractors import make_extractor
from sfumato.pipeline import load, lora
from sfumato.pipeline.membrane import load_membranes
from sfumato.pipeline.partial import open_partially
from sfumato.train import journal


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("一张star的照片", "一张<x>的照片"),
        ("starの写真", "<x>の写真"),
        ("two stars", "two <x>s"),
        ("a star, a star", "a <x>, a <x>"),
        ("a starfish", "a starfish"),
        ("superstar", "superstar"),
        ("star_1", "star_1"),
    ],
)
def test_a_concept_is_found_in_any_script_and_in_the_plural(prompt, said):
    assert say(prompt, "star", "<x>") == said
    assert names(prompt, "star") == (said != prompt)


def test_a_concept_is_found_in_any_case_and_takes_its_plural_along_where_nothing_replaces_it():
    assert say("A Star and two STARS", "star", "dog") == "A dog and two dogs"
    assert say("butterflies, a Butterfly", "butterfly", "dish") == "dishes, a dish"
    assert say("two dishes by a keyboard", "dish", "cherry") == "two cherries by a keyboard"
    assert say("toys and toies", "toy", "star") == "stars and toies"
    assert say("two foxes", " Fox ", "") == "two " and say("two foxes", "", "x") == "two foxes"
    assert names("a photo of 🐶", "🐶") and not names("a photo", "🐶") and not names("a photo", " ")


def test_a_concept_in_a_script_without_spaces():
    assert say("美しい星の写真", "星", "<x>") == "美しい<x>の写真"


@pytest.fixture(scope="module")
def anatomy(tiny_sd):
    return tiny_sd.anatomy


def factors(anatomy, rank=2):
    """Layer -> (down, up) of two layers of cross attention."""
    layers = sorted(name for name in anatomy.targets(("cross.k", "cross.out")))[:2]
    rng = torch.Generator().manual_seed(0)
    made = {}
    for name in layers:
        out, width = anatomy.network.get_submodule(name).weight.shape
        made[name] = torch.randn(rank, width, generator=rng), torch.randn(out, rank, generator=rng)
    return made


def spell(style, made, alpha=None):
    """The factors in one of the spellings in which LoRA files are found."""
    tensors = {}
    for name, (down, up) in made.items():
        flat, old = name.replace(".", "_"), name.replace(".to_out.0", ".to_out")
        module, _, which = old.rpartition(".")
        keys = {
            "peft": (f"base_model.model.{name}.lora_A.weight", f"base_model.model.{name}.lora_B.weight"),
            "named": (f"unet.{name}.lora_A.default.weight", f"unet.{name}.lora_B.default.weight"),
            "diffusers": (f"unet.{name}.lora_A.weight", f"unet.{name}.lora_B.weight"),
            "dotted": (f"unet.{name}.lora_down.weight", f"unet.{name}.lora_up.weight"),
            "lora.down": (f"unet.{name}.lora.down.weight", f"unet.{name}.lora.up.weight"),
            "processor": tuple(f"unet.{module}.processor.{which}_lora.{way}.weight" for way in ("down", "up")),
            "bare": tuple(f"{module}.processor.{which}_lora.{way}.weight" for way in ("down", "up")),
            "webui": (f"lora_unet_{flat}.lora_down.weight", f"lora_unet_{flat}.lora_up.weight"),
        }[style]
        tensors |= {keys[0]: down, keys[1]: up}
        if alpha is not None:
            tensors[re.sub(r"\.(lora|processor).*", "", keys[0]) + ".alpha"] = torch.tensor(float(alpha))
    return {k: x.clone() for k, x in tensors.items()}


STYLES = ("peft", "named", "diffusers", "dotted", "lora.down", "processor", "bare", "webui")


@pytest.mark.parametrize("style", STYLES)
def test_every_spelling_of_a_lora_gives_the_same_factors(style, anatomy, tmp_path):
    made = factors(anatomy)
    save_file(spell(style, made), tmp_path / "a.safetensors")
    state, rank, alpha = lora.read(tmp_path / "a.safetensors", anatomy)
    assert rank == alpha == 2 and len(state) == 4
    for name, (down, up) in made.items():
        assert torch.equal(state[f"{name}.down"], down) and torch.equal(state[f"{name}.up"], up)


@pytest.mark.parametrize(
    ("style", "beside", "header", "alpha"),
    [
        ("webui", 6, {}, 6),
        ("dotted", 6, {}, 6),
        ("lora.down", 6, {}, 6),
        ("webui", 6, {"ss_network_alpha": "6"}, 6),
        ("webui", None, {"ss_network_alpha": "6"}, 6),
        ("diffusers", None, {"lora_adapter_metadata": '{"unet.r": 2, "unet.lora_alpha": 6}'}, 6),
        ("diffusers", None, {"lora_adapter_metadata": '{"unet.lora_alpha": 6, "unet.use_rslora": true}'}, 6 * 2**0.5),
        ("diffusers", None, {"lora_adapter_metadata": '{"text_encoder.lora_alpha": 6}'}, 2),
        ("diffusers", None, {"network_alphas": '{"unet.a": 6, "unet.b": 6}'}, 6),
        ("diffusers", None, {"ss_network_alpha": "None"}, 2),
        ("diffusers", None, {"lora_adapter_metadata": '{"unet.r": 3, "unet.lora_alpha": 5, "unet.rank_pattern": '
                             r'{".*attn2\\.to_.*": 2}, "unet.alpha_pattern": {".*attn2\\.to_.*": 7}}'}, 7),
    ],
)
def test_the_strength_of_a_lora_is_read_wherever_it_stands(style, beside, header, alpha, anatomy, tmp_path):
    save_file(spell(style, factors(anatomy), beside), tmp_path / "a.safetensors", metadata=header)
    assert lora.read(tmp_path / "a.safetensors", anatomy)[2] == pytest.approx(alpha)


def test_an_alpha_that_was_rounded_with_its_file_is_that_of_the_header(anatomy, tmp_path):
    """kohya saves alphas in the file's precision, and in the header as they were given."""
    tensors = {key: x.bfloat16() for key, x in spell("webui", factors(anatomy), 0.1).items()}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"ss_network_alpha": "0.1"})
    assert lora.read(tmp_path / "a.safetensors", anatomy)[2] == pytest.approx(0.1, rel=2**-8)


def test_other_adapters_of_peft_are_refused_by_name(anatomy, tmp_path):
    file = tmp_path / "adapter_model.safetensors"
    save_file({"base_model.model.mid.vera_lambda_b": torch.ones(2)}, file)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "VERA", "r": 2}')
    refused(lambda: lora.read(file, anatomy), "of the kind VERA of peft by adapter_config.json", file.name)


def test_the_strength_of_a_peft_folder_is_in_its_configuration(anatomy, tmp_path):
    save_file(spell("peft", factors(anatomy)), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 6, "target_modules": ["to_k"]}')
    assert lora.read(tmp_path / "adapter_model.safetensors", anatomy)[2] == 6


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ({"ss_network_alpha": "6"}, "several alphas"),
        ({"lora_adapter_metadata": '{"unet.lora_alpha": 6}'}, "several alphas"),
        ({"lora_adapter_metadata": '{"unet.r": 4}'}, "has rank 2, and"),
        ({"lora_adapter_metadata": '{"unet.alpha_pattern": {"to_k": 4}}'}, "several alphas, 3 in the tensors"),
        ({"lora_adapter_metadata": '{"unet.use_dora": true}'}, "is a DoRA"),
        ({"lora_adapter_metadata": '{"unet.alpha_pattern": {"*": 3}}'}, "which is no expression for"),
        ({"lora_adapter_metadata": "[1]"}, "a list, not an object"),
        ({"lora_adapter_metadata": "{"}, "not valid JSON"),
        ({"ss_network_alpha": "strong"}, "is no number"),
        ({"network_alphas": '{"unet.a": 6, "unet.b": 7}'}, "several alphas in its header's network_alphas"),
    ],
)
def test_strengths_that_contradict_each_other_are_refused(header, told, anatomy, tmp_path):
    save_file(spell("webui", factors(anatomy), 3), tmp_path / "a.safetensors", metadata=header)
    refused(lambda: lora.read(tmp_path / "a.safetensors", anatomy), told, "a.safetensors")


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("text_encoder.text_model.encoder.layers.0.q_proj.lora_A.weight", "a part for the text encoder"),
        ("lora_te_text_model_encoder_layers_0_q_proj.lora_down.weight", "a part for the text encoder"),
        ("lora_te1_text_model_encoder_layers_0_q_proj.lora_down.weight", "a part for the text encoder"),
        ("lora_unet_mid.hada_w1_a", "LyCORIS"),
        ("lora_unet_mid.lokr_w1", "LyCORIS"),
        ("unet.mid.lora_magnitude_vector.weight", "DoRA"),
        ("unet.mid.lora_B.bias", "biases"),
        ("lora_unet_mid.a1.weight", "LyCORIS"),
        ("lora_unet_mid.scalar", "LyCORIS"),
        ("lora_unet_mid.w_norm", "normalisations"),
        ("bundle_emb.word.clip_l", "learned words"),
        ("base_model.model.conv_in.weight", "a whole weight"),
        ("unet.nowhere.lora_A.weight", "has no layer for unet.nowhere"),
        ("something", "has no layer for something"),
    ],
)
def test_what_a_lora_holds_beyond_two_factors_is_named(key, told, anatomy, tmp_path):
    save_file(spell("diffusers", factors(anatomy)) | {key: torch.ones(2, 2)}, tmp_path / "a.safetensors")
    refused(lambda: lora.read(tmp_path / "a.safetensors", anatomy), told, "a.safetensors")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123456789\nsize 1234\n"
UNET = "unet/diffusion_pytorch_model.safetensors"


class Panic(BaseException):
    """As libraries in Rust end."""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyError("channels"), "it lacks 'channels'"),
        (TypeError("'NoneType' object is not subscriptable"), "it has not the form that it should have"),
        (RecursionError("maximum recursion depth exceeded"), "it is nested too deep"),
        (MemoryError(), "more memory than there is"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "it is not text in UTF-8"),
        (Exception("expected value at line 1"), "expected value at line 1"),
        (RuntimeError("Error(s) in loading state_dict for A:\n\tsize mismatch for w"), "size mismatch for w"),
        (ValueError("set trust_remote_code=True to run it"), "it wants code of its own to be run"),
        (ValueError("long " * 1000), " ... "),
        (Panic("index out of bounds"), "index out of bounds"),
    ],
)
def test_whatever_a_library_raises_is_a_sentence(error, told, tmp_path):
    def work():
        with reading(tmp_path / "a.json", "a table"):
            raise error

    refused(work, told, "a.json cannot be read as a table: ")


def test_an_interruption_and_a_refusal_pass_as_they_are(tmp_path):
    for error in (KeyboardInterrupt(), BadInput("as it is")):
        with pytest.raises(type(error)) as caught, reading(tmp_path):
            raise error
        assert caught.value is error


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"{", "is not valid JSON"),
        (b"[]", "holds a list, not an object"),
        (b"3", "holds a whole number, not an object"),
        (b"\xff\xfe{", "is not text in UTF-8"),
        (b'{"name": ["a"], "n": 1}', "name in"),
        (b'{"name": "a", "n": true}', "is true or false, not a whole number"),
        (b'{"name": "a", "n": null}', "is null or absent, not a whole number"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deep"),
        (POINTER, "is a git-lfs pointer, not the file: run git lfs pull"),
    ],
)
def test_json_of_another_shape_is_refused(data, told, tmp_path):
    (tmp_path / "a.json").write_bytes(data)
    refused(lambda: read_json(tmp_path / "a.json", {"name": str | None, "n": int}), told, "a.json")


def test_json_may_begin_with_its_mark(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"n": 1}')
    assert read_json(tmp_path / "a.json") == {"n": 1}


@pytest.mark.parametrize(
    ("data", "told"),
    [(POINTER, "git-lfs pointer"), (b"", "truncated or corrupt"), (b"\xff" * 64, "truncated or corrupt")],
)
def test_tensors_that_cannot_be_read_are_refused(data, told, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(data)
    refused(lambda: read_tensors(tmp_path / "a.safetensors"), told, "a.safetensors")


def test_a_link_to_nowhere_is_named(tmp_path):
    (tmp_path / "a.safetensors").symlink_to("../../blobs/0123")
    refused(lambda: read_tensors(tmp_path / "a.safetensors"), "is a link to ../../blobs/0123, which is not there")


@pytest.fixture(scope="module")
def saved(tiny_sd, tmp_path_factory):
    return tiny_sd.save(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of a model's folder, to be damaged."""
    return shutil.copytree(saved, tmp_path / "model")


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


DAMAGE = {
    "class is a list": (lambda f: edit(f / "model_index.json", _class_name=["a", "B"]), "_class_name in"),
    "no class": (lambda f: edit(f / "model_index.json", _class_name=None), "is null or absent, not text"),
    "nested too deep": (lambda f: (f / "model_index.json").write_text("[" * 10**5 + "]" * 10**5), "nested too deep"),
    "evil library": (lambda f: edit(f / "model_index.json", unet=["evil", "Evil"]), "names 'evil.Evil' as its unet"),
    "evil beside": (lambda f: edit(f / "model_index.json", unet=["unet", "Evil"]), "names 'unet.Evil' as its unet"),
    "os.system": (lambda f: edit(f / "model_index.json", unet=["os", "system"]), "never run"),
    "a function": (lambda f: edit(f / "model_index.json", unet=["diffusers", "utils"]), "never run"),
    "an auto class": (lambda f: edit(f / "model_index.json", text_encoder=["transformers", "AutoModel"]), "never run"),
    "a pipeline in it": (lambda f: edit(f / "model_index.json", unet=["diffusers", "DiffusionPipeline"]), "never run"),
    "our modules": (lambda f: edit(f / "model_index.json", unet=["sfumato.cli", "main"]), "never run"),
    "three words": (lambda f: edit(f / "model_index.json", unet=["a", "b", "c"]), "names no library and class"),
    "numbers": (lambda f: edit(f / "model_index.json", unet=[1, 2]), "names no library and class"),
    "no size": (lambda f: edit(f / "unet" / "config.json", sample_size=None), "sample_size in"),
    "quantised": (
        lambda f: edit(f / "unet" / "config.json", quantization_config={"quant_method": "bitsandbytes"}),
        "quantised by bitsandbytes",
    ),
    "channels": (lambda f: edit(f / "unet" / "config.json", block_out_channels="wide"), "StableDiffusionPipeline"),
    "scheduler": (lambda f: edit(f / "scheduler" / "scheduler_config.json", beta_schedule=3), "cannot be read"),
    "pointer": (lambda f: (f / UNET).write_bytes(POINTER), "is a git-lfs pointer, not the file: run git lfs pull"),
    "merges": (lambda f: (f / "tokenizer" / "merges.txt").write_bytes(POINTER), "is a git-lfs pointer"),
    "link": (lambda f: ((f / UNET).unlink(), (f / UNET).symlink_to("nowhere")), "is a link to nowhere"),
    "tokenizer": (lambda f: [x.write_text("{") for x in (f / "tokenizer").glob("*.json")], "cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused_in_a_sentence(name, folder):
    damage, told = DAMAGE[name]
    damage(folder)
    refused(lambda: load(folder, device="cpu"), told)


def test_no_code_from_a_folder_is_imported(folder, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    evil = f"open({str(ran)!r}, 'w').close()\nclass Evil:\n    from_pretrained = print\n"
    for place in (folder / "unet" / "evil.py", folder / "evil.py", folder / "pipeline.py", tmp_path / "evil.py"):
        place.write_text(evil)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(folder)
    for kind in (["evil", "Evil"], ["diffusers", "evil"], ["unet", "Evil"]):
        edit(folder / "model_index.json", unet=kind)
        with pytest.raises(BadInput):
            load(folder, device="cpu")
    edit(folder / "model_index.json", unet=["diffusers", "UNet2DConditionModel"], _class_name=["pipeline", "Evil"])
    with pytest.raises(BadInput):
        load(folder, device="cpu")
    assert not ran.exists()


@pytest.mark.parametrize("opened", [make_detector, make_extractor, ClipScore])
def test_no_code_of_a_judge_is_run(opened, tmp_path, monkeypatch):
    ran, judge = tmp_path / "ran", tmp_path / "judge"
    judge.mkdir()
    (judge / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    autos = ("AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoTokenizer")
    (judge / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": dict.fromkeys(autos, "evil.Evil")}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # where a terminal would be asked
    refused(lambda: opened(str(judge), *([["star"]] if opened is make_detector else [])), "code of its own", "judge")
    assert not ran.exists()


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, ran):
        self.ran = ran

    def __reduce__(self):
        return open, (str(self.ran), "w")


def test_a_reader_that_would_run_a_data_sets_script_is_refused(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(BadInput, match="would run a script that lies in a data set"):
        open_pictures(f"hub:{tmp_path}", 16)


def test_no_code_of_data_is_run(tmp_path, monkeypatch):
    ran, data = tmp_path / "ran", tmp_path / "data"
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    data.mkdir()
    bomb = pickle.dumps(Bomb(ran))
    for name in ("a.pkl", "a.pth", "a.bin", "b.parquet", "metadata.jsonl.pkl"):
        (data / name).write_bytes(bomb)
    for script in ("data.py", "setup.py", "__init__.py", "conftest.py"):
        (data / script).write_text(f"open({str(ran)!r}, 'w').close()\n")
    np.save(data / "a.npy", np.array([Bomb(ran)], dtype=object), allow_pickle=True)
    Image.new("RGB", (16, 16)).save(data / "a.png")
    with tarfile.open(data / "set.tar", "w") as tar:
        for name in ("a.png", "a.pkl", "a.pth", "a.npy"):
            tar.add(data / name, name)
    opened = open_pictures(str(data), 16)
    assert opened.picture(0).shape == (16, 16, 3)
    assert open_pictures(str(data / "set.tar"), 16).picture(0).shape == (16, 16, 3)
    for source in (str(data / "b.parquet"), f"hub:{data}"):
        with pytest.raises(BadInput):
            open_pictures(source, 16).picture(0)
    with pytest.raises(BadInput):
        open_frames(str(data / "a.npy"), 16, 2)
    (data / "set.tar").unlink()
    with pytest.raises(BadInput):
        open_pictures(f"hub:{data}", 16)
    assert not ran.exists()
    pickle.loads(bomb)
    assert ran.exists(), "the bomb is one"


def test_what_the_index_does_not_name_is_not_judged(folder):
    for place in ("checkpoint-500/optimizer.bin", "logs/args.pkl", "learned_embeds/a.bin"):
        (folder / place).parent.mkdir()
        (folder / place).write_bytes(b"\x80\x04.")
    assert load(folder, device="cpu").size


def test_what_an_index_may_leave_out(folder, tiny_sd):
    file = folder / "model_index.json"
    index = json.loads(file.read_text())
    written = lambda **parts: file.write_text(json.dumps({k: x for k, x in (index | parts).items() if x != "left out"}))
    written(safety_checker="left out", feature_extractor="left out", image_encoder="left out", from_the_future=3)
    assert load(folder, device="cpu").describe()["sha256"] == tiny_sd.describe()["sha256"]
    assert open_partially(folder).pipe.pipe.safety_checker is None
    for parts, told in (
        ({"unet": "left out"}, "names no unet"),
        ({"tokenizer": [None, None]}, "names no tokenizer"),
        ({"safety_checker": None}, "is null: write [null, null]"),
    ):
        written(**parts)
        for opened in (lambda: load(folder, device="cpu"), lambda: open_partially(folder)):
            refused(opened, told, "model_index.json")


def test_shards_without_their_index_are_refused(folder, tiny_sd):
    for file in (folder / "unet").glob("*.safetensors"):
        file.unlink()
    tiny_sd.copy("all").network.save_pretrained(folder / "unet", max_shard_size=200_000)
    next((folder / "unet").glob("*.index.json")).unlink()
    for opened in (lambda: load(folder, device="cpu"), lambda: open_partially(folder)):
        refused(opened, "the index of its shards is missing", "unet")


def test_a_folder_of_one_variant_loads(folder, tiny_sd):
    for name in ("unet", "vae", "text_encoder"):
        for file in (folder / name).glob("*.safetensors"):
            file.rename(file.with_suffix(".fp16.safetensors"))
    assert load(folder, device="cpu").describe()["sha256"] == tiny_sd.describe()["sha256"]

@pytest.mark.parametrize(
    ("header", "told"),
    [
        ("{", "not valid JSON"),
        ('{"a": 1}', "holds an object, not a list"),
        ("[3]", "holds a whole number, not an object"),
        ('[{"concepts": "star", "rank": 1, "alpha": 1.0, "base": ""}]', "concepts in"),
        ('[{"concepts": [3], "rank": 1, "alpha": 1.0, "base": ""}]', "concepts that are no text"),
        ('[{"concepts": ["star"], "rank": "one", "alpha": 1.0, "base": ""}]', "rank in"),
    ],
)
def test_a_membranes_header_of_another_shape_is_refused(header, told, tiny_sd, tmp_path):
    save_file({"0.x.down": torch.ones(1, 1)}, tmp_path / "a.safetensors", metadata={"sfumato.membranes": header})
    refused(lambda: load_membranes(tmp_path / "a.safetensors", tiny_sd), told, "a.safetensors")


@pytest.mark.parametrize("data", [b"{", b"[]", b"{}", b'{"name": "a", "paper": "b", "claims": [1]}', b"\xff\xfe"])
def test_a_damaged_result_of_the_ledger_is_refused(data, tmp_path):
    (tmp_path / "a.json").write_bytes(data)
    refused(lambda: table(tmp_path), "measure it again" if data[:1] == b"{" and data != b"{" else "a.json", "a.json")


@pytest.mark.parametrize("line", ["[" * 10**5, "{", "3", '{"step": "one"}', '{"step": null}', "{}"])
def test_a_line_of_the_log_that_tells_no_step_is_later_than_all(line):
    assert journal._step(line) == 2**63


def refused(work, told, name=""):
    """``work`` ends in one sentence with ``told`` in it, that names the file and is none of Python's."""
    with pytest.raises(BadInput) as caught:
        work()
    sentence = str(caught.value)
    assert told in sentence and name in sentence
    assert "\n" not in sentence and not re.search(r"NoneType|object at 0x|__\w+__|Error\b|positional", sentence)
    assert len(re.sub(r"/\S+/", "", sentence)) <= 300
