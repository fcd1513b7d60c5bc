"""ProSpect: the mapper, who says what in which stage, and what a stage's loss reaches."""

from __future__ import annotations

import pytest
import torch

from sfumato.customize import ProSpect
from sfumato.customize.parts.learning import Drawn
from sfumato.customize.parts.mapper import Mapper, clipped
from sfumato.customize.prospect import attribute_prompts, by_stage, stage_texts
from sfumato.errors import BadInput
from sfumato.pipeline import Noised
from sfumato.pipeline.customization import Customization, add_words, attach, load, save
from sfumato.pipeline.tokens import standing_in
from sfumato.train.words import denoising_loss, encode_once

PICTURES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def mapper():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Mapper(torch.randn(16), 10).double()


def test_the_mapper_is_the_papers_block(mapper):
    """Against torch's own attention over the one row, with queries and keys of any value."""
    m, e0 = mapper.eval(), mapper.start

    def attention(part, norm, context):
        heads = lambda x: x.view(1, 1, 8, 64).transpose(1, 2)
        query, key = (torch.randn(1, 1, 512, dtype=torch.float64) for _ in range(2))
        value = part.to_v(context)
        out = torch.nn.functional.scaled_dot_product_attention(heads(query), heads(key), heads(value))
        return part.to_out(out.transpose(1, 2).reshape(1, 1, 512))

    x = e0 + attention(m.attn1, m.norm1, m.norm1(e0))
    x = x + attention(m.attn2, None, e0)
    y = m.norm3(x)
    hidden = y @ m.ff.net[0].proj.weight.T + m.ff.net[0].proj.bias
    value, gate = hidden[..., :64], hidden[..., 64:]
    out = (value * torch.nn.functional.gelu(gate)) @ m.ff.net[2].weight.T + m.ff.net[2].bias
    torch.testing.assert_close(m(), out.view(10, 16))
    assert torch.equal(m(), m()) and not torch.equal(m.train()(), m())


def test_a_stage_reaches_its_own_rows_alone(mapper):
    mapper.train()()[7].sum().backward()
    gradient = mapper.ff.net[2].weight.grad.view(10, 16, -1)
    assert gradient[7].abs().max() > 0
    assert gradient[[s for s in range(10) if s != 7]].abs().max() == 0
    mapper.zero_grad()


def test_norms_are_clipped():
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    assert torch.equal(clipped(rows, 0), rows)
    torch.testing.assert_close(clipped(rows, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4]]))


def test_attributes_are_said_in_their_stages():
    at = lambda a: [s for s, p in enumerate(attribute_prompts("a * cat", a)) if "*" in p]
    assert at("layout") == [9] and at("content") == list(range(8)) and at("material") == list(range(5))
    assert at("all") == list(range(10)) and attribute_prompts("a * cat", "layout")[0] == "a cat"
    said = lambda a, n: [s for s, p in enumerate(attribute_prompts("*", a, stages=n)) if p]
    for n in range(1, 21):  # the stage with which a draw begins, and others of ten or more stages that lie there too
        assert said("layout", n) == ([n - 1] if n < 15 else [n - 2, n - 1])
        assert n == 1 or not set(said("content", n)) & set(said("layout", n))
        assert all(said(a, n) for a in ("content", "material", "style"))
    with pytest.raises(BadInput, match="unknown attribute"):
        attribute_prompts("*", "colour")


def test_texts_and_numbers_of_stages():
    words = ["w0", "w1", "w2", "w3"]
    assert stage_texts(["a * cat", 0, 3, "*"], words) == ["a w0 cat", "a w0 cat", "w3", "w3"]
    assert stage_texts(["", "red *", "*", 1], words, "a * here")[:2] == ["a here", "a red w1 here"]
    with pytest.raises(BadInput, match="no stage 4"):
        stage_texts(["*", "*", "*", 4], words)
    with pytest.raises(BadInput, match="2 prompts for 4 stages"):
        stage_texts(["*", "*"], words)


@pytest.fixture(scope="module")
def learned(tiny_sdxl):
    return ProSpect(**ProSpect.EXAMPLE).learn(tiny_sdxl, PICTURES)


def test_ten_words_for_each_of_two_encoders(learned, tiny_sdxl, tmp_path):
    assert list(learned.words) == [f"<mine-{s}>" for s in range(10)]
    assert all(len(rows) == 2 for rows in learned.words.values()) and len(learned.about["norms"]) == 2
    assert learned.stages["<mine:layout>"] == [""] * 9 + ["<mine-9>"]
    save(tmp_path / "mine.safetensors", learned, tiny_sdxl)
    again = load(tmp_path / "mine.safetensors", tiny_sdxl)
    assert again.stages == dict(learned.stages)
    draws = [attach(tiny_sdxl, [x]).draw("a <mine>", 1, sampling_steps=3) for x in (learned, again)]
    assert torch.equal(*draws)


def test_prompts_take_a_part(learned, tiny_sdxl):
    pipe, words = attach(tiny_sdxl, [learned]), list(learned.words)
    draw = lambda prompt, **more: pipe.draw(prompt, 1, sampling_steps=10, cfg_scale=1.0, **more)
    texts = stage_texts(attribute_prompts("a *", "material"), words)
    assert torch.equal(draw("a <mine:material>"), draw(None, cond=by_stage(pipe, texts)))
    # What is said before the half of the way is the same, and material is said after it only.
    states = lambda prompt: [z for z, _ in pipe.states(prompt, 1, sampling_steps=10, cfg_scale=1.0)]
    plain, material, layout = (states(p) for p in ("a", "a <mine:material>", "a <mine:layout>"))
    assert torch.equal(plain[5], material[5]) and not torch.equal(plain[6], material[6])
    assert not torch.equal(plain[1], layout[1])
    # From a picture the layout's stage is behind the start.
    start = Noised(PICTURES[:1], 0.6)
    assert torch.equal(draw("a", start=start), draw("a <mine:layout>", start=start))
    assert not torch.equal(draw("a", start=start), draw("a <mine:material>", start=start))


def test_equal_rows_are_textual_inversion_and_a_batch_is_the_mean_of_its_rows(tiny_sd):
    method, rng = ProSpect(**ProSpect.EXAMPLE), torch.Generator().manual_seed(0)
    row = torch.randn(1, 16, generator=rng)
    student = add_words(tiny_sd, [Customization({w: (torch.zeros(1, 16),) for w in method.stage_words})])
    z0, eps = torch.randn(2, 3, 4, 8, 8, generator=rng)
    drawn = Drawn(torch.zeros(3), torch.zeros(3), z0, torch.tensor([0.05, 0.5, 0.95]), eps, ["a {}"] * 3)
    said = method.said(student, drawn)
    assert said == ["a <mine-0>", "a <mine-4>", "a <mine-9>"]

    def loss(rows, texts, part=slice(None)):
        with standing_in(student, "<mine-0>", [rows]):
            cond = encode_once(student, texts)
        return denoising_loss(student, z0[part], drawn.t[part], eps[part], cond)

    rows = row.repeat(10, 1).requires_grad_(True)
    several = loss(rows, said)
    several.backward()
    plain = row.clone().requires_grad_(True)
    with tiny_sd.add_token("<x>", "star") as token:
        token.embedding.data.copy_(plain.detach())
        one = denoising_loss(tiny_sd, z0, drawn.t, eps, encode_once(tiny_sd, ["a <x>"] * 3))
        (gradient,) = torch.autograd.grad(one, [token.embedding])
    torch.testing.assert_close(several, one, rtol=1e-5, atol=0)
    torch.testing.assert_close(rows.grad.sum(dim=0), gradient[0], rtol=1e-4, atol=1e-6)
    assert rows.grad[[1, 2, 3, 5, 6, 7, 8]].abs().max() == 0
    each = [loss(rows, said[i : i + 1], slice(i, i + 1)) for i in range(3)]
    torch.testing.assert_close(torch.stack(each).mean(), several, rtol=1e-5, atol=0)


def test_what_is_refused_or_told(tiny_sd):
    with pytest.warns(UserWarning, match="first alone"):
        ProSpect(init_word="red star").starts(tiny_sd)
    with pytest.raises(BadInput, match="as <star>"):
        ProSpect(word="star")
    with pytest.raises(BadInput, match="already a word"):
        known = attach(tiny_sd, [Customization({"<mine>": (torch.zeros(1, 16),)})])
        ProSpect(**ProSpect.EXAMPLE).run(known, PICTURES)
