"""OmniGen's training: its loss and weights by closed form, tasks in one format, tuning whole and by products."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato as sf
from sfumato.data import sketch
from sfumato.data.instructions import TASKS, InstructionFile, SketchInstructions, edges, layout
from sfumato.errors import BadInput
from sfumato.pipeline import Instruction
from sfumato.pipeline.interleaved import DROPPED, place, places
from sfumato.train.draw import normal
from sfumato.train.omnigen import OmniGenTraining, TrainOmniGen
from sfumato.train.speaker import from_language_model
from sfumato.train.tokenizer import learn_spoken
from sfumato.train.velocity import between, emphasis, velocity_loss


def recipe(**changes) -> TrainOmniGen:
    return TrainOmniGen(**{**TrainOmniGen.EXAMPLE, **changes})


def test_the_way_from_noise_to_data():
    rng = torch.Generator().manual_seed(0)
    x1, x0 = torch.randn(2, 3, 2, 2, 2, generator=rng, dtype=torch.float64).unbind()
    t = torch.tensor([0.0, 1.0, 0.25])
    x, v = between(x1, x0, t)
    assert torch.equal(x[0], x0[0]) and torch.equal(x[1], x1[1]) and torch.equal(v, x1 - x0)
    torch.testing.assert_close(x + (1 - t.double())[:, None, None, None] * v, x1)
    guess = torch.randn(3, 2, 2, 2, generator=rng, dtype=torch.float64)
    assert velocity_loss(v, x1, x0).abs().max() == 0
    losses = velocity_loss(guess, x1, x0, torch.full_like(guess, 3.0))
    torch.testing.assert_close(losses, 3 * (guess - x1 + x0).square().mean((1, 2, 3)))


def test_edits_weigh_more_where_they_are():
    before = torch.zeros(4, 10, 10, dtype=torch.float64)
    after = before.clone()
    after[0, 0, :4] = 1.0  # a mean of 0.01: the weight would be 100
    assert torch.equal(emphasis(after, before), 1 + 63 * after)
    after[0] = 0.4  # 0.1
    torch.testing.assert_close(emphasis(after, before), torch.where(after > 0.3, 1 / (0.1 + 1e-6), 1.0).double())
    after[:] = 0.31
    assert (emphasis(after, before) == 5).all()
    assert (emphasis(before + 0.81, before) == 1).all() and (emphasis(before + 0.0009, before) == 0).all()
    after = before.clone()
    after[0, 0, 0] = 0.3
    after[1:] = 0.2
    assert (emphasis(after, before) == 1).all(), "a difference of 0.3 is not yet one"


def test_a_fresh_model_answers_nothing_and_its_loss_is_that_of_nothing():
    training = OmniGenTraining(recipe(batch=3), recipe().open())
    rng = torch.Generator().manual_seed(1)
    batch = training.batch(0, rng, 3)
    loss, _ = training.loss(batch, torch.Generator().manual_seed(2))
    rng = torch.Generator().manual_seed(2)
    mean, std = (torch.stack(some) for some in zip(*batch["outputs"], strict=True))
    x1 = mean + std * normal(mean.shape, rng)
    torch.randint(2**31, (3,), generator=rng)
    normal((3,), rng)
    x0 = normal(mean.shape, rng)
    torch.testing.assert_close(loss, (x1 - x0).square().mean())
    loss.backward()
    assert training.model.network.proj_out.weight.grad.abs().max() > 0


def test_what_is_dropped_is_text_and_pictures():
    dropping = recipe(tasks=("edit",), condition_dropout=0.5)
    training = OmniGenTraining(dropping, dropping.open())
    batch = training.batch(0, torch.Generator().manual_seed(0), 40)
    dropped = [text == DROPPED for text in batch["texts"]]
    assert dropped == [not some for some in batch["inputs"]]
    for text, some in zip(batch["texts"], batch["inputs"], strict=True):
        assert len(places(text, len(some))) == len(some) and (text != DROPPED or not some)
    assert 8 < sum(dropped) < 32


def test_every_parameter_learns_from_the_tasks():
    """In three updates: the first one moves the last layer only, the second what scales before it."""
    training = OmniGenTraining(recipe(emphasis=True), recipe().open())
    optimizer = torch.optim.SGD(training.model.network.parameters(), lr=1.0)
    for step in range(3):
        optimizer.zero_grad()
        loss, _ = training.loss(training.batch(step, torch.Generator().manual_seed(step), 8), torch.Generator())
        loss.backward()
        optimizer.step()
    silent = [n for n, p in training.model.network.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


# Rows


def test_tasks_of_the_sketch_world():
    data = SketchInstructions(32, 0, 70, tuple(TASKS))
    for i in range(14):
        row, task = data.row(i), tuple(TASKS)[i % 7]
        assert places(row.text, len(row.inputs)) == list(range(len(row.inputs)))
        shown = [data.picture(name) for name in (*row.inputs, row.output)]
        assert all(x.shape == (32, 32, 3) and x.dtype == np.uint8 for x in shown)
        assert (len(shown) == 1) == (task == "draw") and row.edit == (task == "edit")
        if task == "edit":
            assert 0 < (shown[0] != shown[1]).any(axis=2).mean() < 1
            word = row.text.rsplit(" ", 1)[1]
            assert word in sketch.COLOURS and word not in {item.colour for item in data.scene(i).objects}
    assert not edges(np.full((8, 8, 3), 7, np.uint8)).any()
    step = np.zeros((4, 4, 3), np.uint8)
    step[:, 2:, 1] = 41
    assert (edges(step)[:, 1] == 255).all() and edges(step).sum() == 4 * 3 * 255 and not edges(step, 41).any()
    scene = sketch.Scene((sketch.Item("star", "red", 0.5, 0.25, 0.5),), "night", "flat")
    assert (layout(scene, 8)[0:4, 2:6] == sketch.PALETTE["red"]).all() and (layout(scene, 8) > 0).any(2).sum() == 16


@pytest.fixture
def album(tmp_path):
    """Two pictures and lines that speak of them."""
    rng = np.random.default_rng(0)
    for name, shape in (("a.png", (40, 48, 3)), ("b.png", (32, 32, 3))):
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / name)
    rows = [
        {"instruction": "a red star", "input_images": None, "output_image": "b.png"},
        {"instruction": f"{place(1)} in {place(2)}", "input_images": ["a.png", "b.png"], "output_image": "b.png"},
        {"instruction": f"{place(1)} in red", "input_images": ["b.png"], "output_image": "a.png", "edit": True},
    ]
    return written(tmp_path, rows)


def written(folder, rows):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_lines_that_are_no_rows_are_refused_by_their_number(album):
    data = InstructionFile(album)
    assert len(data) == 3 and data.row(2).edit and data.row(1).inputs == ("a.png", "b.png")
    good = json.loads(album.read_text().splitlines()[0])
    for change, said in (
        ({"output_image": "c.png"}, "line 2 of .* names a picture that is not there: 'c.png'"),
        ({"instruction": 3}, "line 2 of .* needs an instruction"), ({"output_image": None}, "needs an instruction"),
        ({"instruction": place(1)}, "line 2 of .*: the instruction has a place for picture 1"),
        ({"input_images": ["a.png"]}, "line 2 of .*: picture 1 has no place"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=said):
            recipe(data=str(written(album.parent, [good, good | change]))).open()
    for line, said in (
        (json.dumps({**good, "edit": "false"}).encode(), "edit in line 1 of .* is true or false, not 'false'"),
        (json.dumps({**good, "output_image": "a" * 300}).encode(), "names a picture that is not there"),
        (json.dumps({**good, "instruction": "half \ud83d"}).encode(), "line 1 of .* is no JSON"),
        (b'{"a":' * 100_000, "line 1 of .* is no JSON"), ("caf\u00e9".encode("latin-1"), "is no text in UTF-8"),
    ):  # fmt: skip
        album.write_bytes(line)
        with pytest.raises(BadInput, match=said):
            InstructionFile(album)
    told = {**good, "instruction": f"{good['instruction']} a\u2028b"}
    for kind in ("utf-8-sig", "utf-16"):
        album.write_bytes(json.dumps(told, ensure_ascii=False).encode(kind))
        assert InstructionFile(album).row(0).text.endswith("a\u2028b")
    album.write_text("{no")
    with pytest.raises(BadInput, match=r"line 1 of .* is no JSON"):
        InstructionFile(album)
    album.write_text("\n")
    with pytest.raises(BadInput, match="has no lines"):
        InstructionFile(album)


@pytest.fixture
def start(tiny_omnigen, tmp_path):
    """A tiny pipeline in a folder, whose words know the signs."""
    tiny_omnigen.save(tmp_path / "start")
    return str(tmp_path / "start")


def test_products_are_trained_on_lines_of_json(album, start, tmp_path):
    tuned = recipe(data=str(album), start_from=start, trains="lora", rank=2, size=32, emphasis=True, save_memory=True)
    assert tuned.plan().seconds > 0
    model = sf.load(tuned.run(tmp_path / "run", progress=False).parent, "cpu")
    before = sf.load(start, "cpu")
    changed = {n for n, x in model.network.state_dict().items() if not torch.equal(x, before.network.state_dict()[n])}
    attention = ("to_q", "to_k", "to_v", "to_out")
    assert changed and all(any(name in n for name in attention) and n.startswith("layers.") for n in changed)
    parent = sf.pipeline.read_record(tmp_path / "run")["provenance"]["parent"]
    assert parent == {"model": start, "sha256": before.describe()["sha256"]}
    before.load_adapter("lora", tmp_path / "run" / "model" / "lora.safetensors")
    asked = [Instruction(f"{place(1)} in red", (album.parent / "b.png",))]
    ours, theirs = (m.draw(asked, 1, sampling_steps=2) for m in (model, before))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_a_run_does_not_go_on_with_other_rows(album, tmp_path):
    """The vocabulary is learnt from the instructions: in others' words the tokens would be others."""
    scratch = recipe(data=str(album), size=32)
    scratch.run(tmp_path / "run", progress=False)
    shutil.rmtree(tmp_path / "run" / "model")  # as if it had been killed before
    scratch.run(tmp_path / "run", progress=False)
    shutil.rmtree(tmp_path / "run" / "model")
    album.write_text(album.read_text().replace("red", "blue"))
    with pytest.raises(BadInput, match=r"holds a run with rows=.* another folder to start anew"):
        scratch.run(tmp_path / "run", progress=False)


def test_an_instruction_that_is_too_long_is_refused(album, start, tmp_path):
    model = sf.load(start, "cpu")
    model.pipe.tokenizer.model_max_length = 16
    with pytest.raises(BadInput, match=r"tokens, of 16 at most: shorten it"):
        model.encode("word " * 17)
    album.write_text(album.read_text().replace("a red star", "a red star " * 40))
    with pytest.raises(BadInput, match=r"line 1 of .* tokens, of 32 at most: shorten it"):
        recipe(data=str(album), size=32, context=32).run(tmp_path / "run", progress=False)


def test_all_of_a_trained_model_is_tuned(album, start, tmp_path):
    tuned = recipe(data=str(album), start_from=start, size=32, keep_latents=False, updates=2, lr=0.01)
    model = sf.load(tuned.run(tmp_path / "run", progress=False), "cpu")
    before = sf.load(start, "cpu").network
    moved = [n for n, x in model.network.named_parameters() if not torch.equal(x, before.get_parameter(n))]
    assert len(moved) == len(list(before.named_parameters()))


def test_a_language_model_reads_in_it_as_by_itself(tmp_path):
    from transformers import Phi3Config, Phi3Model

    words = learn_spoken(["a red star"], (), 64)
    rope = {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [1.0, 3.0]}
    config = Phi3Config(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=131_072, original_max_position_embeddings=4096, pad_token_id=2,
        bos_token_id=1, eos_token_id=2, rope_scaling=rope,
    )  # fmt: skip
    torch.manual_seed(0)
    spoken = Phi3Model(config).eval()
    spoken.save_pretrained(tmp_path / "phi")
    words.save_pretrained(tmp_path / "phi")
    network, tokenizer = from_language_model(str(tmp_path / "phi"), 8)
    assert tokenizer(DROPPED, add_special_tokens=False).input_ids == [network.config.vocab_size - 1]
    ids = torch.tensor([[1, 5, 9, 4, 200, 7]])
    seen = []
    network.layers[-1].register_forward_hook(lambda m, a, out: seen.append(out))
    mask, places_ = torch.ones(1, 8, 8).tril(), torch.arange(8)[None]
    out = network.eval()(torch.randn(1, 8, 2, 2), torch.ones(1), ids, [], {}, mask, places_).sample
    torch.testing.assert_close(network.norm(seen[0][:, :6]), spoken(ids).last_hidden_state, rtol=0, atol=1e-5)
    assert not out.any()
    trained = recipe(language_model=str(tmp_path / "phi"), size=32, updates=1).run(tmp_path / "run", progress=False)
    assert sf.load(trained, "cpu").network.config.num_layers == 2
    (tmp_path / "phi" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(BadInput, match="is a gpt2"):
        from_language_model(str(tmp_path / "phi"), 8)


def test_settings_that_cannot_be(tmp_path, tiny_sd):
    tiny_sd.save(tmp_path / "sd")
    for changes, said in (
        ({"size": 24}, "multiple of 16"), ({"trains": "lora"}, "name one with start_from"),
        ({"width": 18, "heads": 2}, "multiple of 4"), ({"tasks": ()}, "at least one of"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=said):
            recipe(**changes)
    with pytest.raises(BadInput, match="unknown task 'drew'"):
        recipe(tasks=("drew",)).open()
    large = recipe(size=1040)
    with pytest.raises(BadInput, match="draw 1024 at most"):
        OmniGenTraining(recipe(), recipe().open()).model.latent_shape(1040)
    assert large.fresh(large.open()).latent_shape() == (8, 130, 130), "a larger table is made for larger pictures"
    with pytest.raises(BadInput, match="not an OmniGen"):
        recipe(start_from=str(tmp_path / "sd")).plan()


def test_causal_pictures_stay_causal(tmp_path):
    trained = recipe(tasks=("picture-to-edges",), bidirectional=False, size=32, updates=1)
    model = sf.load(trained.run(tmp_path / "run", progress=False), "cpu")
    assert model.anatomy.bidirectional is False and model.defaults["negative"] == DROPPED
    assert model.sampling_steps == 50 and model.size == 32
