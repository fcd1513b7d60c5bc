from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from sfumato.errors import BadInput, SfumatoError
from sfumato.pipeline import load, wrap

PIPES = ["tiny_sd", "tiny_sdxl"]


@pytest.fixture(params=PIPES)
def p(request):
    return request.getfixturevalue(request.param).copy()


def parts(p):
    """The tokenizers and embedding tables themselves, to compare by identity, and their sizes."""
    found = [(getattr(p.pipe, t), getattr(p.pipe, e).get_input_embeddings()) for t, e in p.text_parts()]
    return found, [(len(t), e.weight.shape, e.weight.data_ptr()) for t, e in found]


def same(a, b):
    return a[1] == b[1] and all(
        x is y for s, t in zip(a[0], b[0], strict=True) for x, y in zip(s, t, strict=True)
    )


def test_a_new_word_starts_as_its_initial_word(p):
    star = p.encode("a red star")
    with p.add_token("<new>", "star") as token:
        new = p.encode("a red <new>")
        assert torch.equal(new.tokens, star.tokens)
        if p.family == "sdxl":
            assert torch.equal(new.pooled, star.pooled)
        assert not torch.equal(new.ids, star.ids) and torch.equal(new.mask, star.mask)
        assert torch.equal(p.encode("a red star").tokens, star.tokens)
        assert token.embedding.shape == (1, 16)


def test_everything_is_restored_also_after_an_exception(p):
    before, sha = parts(p), p.describe()["sha256"]
    prompt = p.encode("a red <new>")
    with pytest.raises(RuntimeError, match="midway"), p.add_token("<new>", "star"):
        assert not same(parts(p), before)
        raise RuntimeError("midway")
    assert same(parts(p), before) and p.describe()["sha256"] == sha
    assert torch.equal(p.encode("a red <new>").ids, prompt.ids)
    assert not p.learned


def test_gradients_reach_the_row_and_nothing_else(p):
    z = torch.randn(1, *p.latent_shape(), generator=torch.Generator().manual_seed(0))
    with p.add_token("<new>", "star") as token:
        assert not p.encode("a <new>").tokens.requires_grad
        p.denoiser(z, 0.5, p.encode("a <new>", grad=True)).square().sum().backward()
        assert len(token.parameters()) == len(p.text_parts())
        assert all(e.grad.abs().sum() > 0 for e in token.parameters())
        optimizer = torch.optim.AdamW(token.parameters(), lr=0.1)
        before = p.encode(["a <new>", "a star"]).tokens
        optimizer.step()
        after = p.encode(["a <new>", "a star"]).tokens
        assert not torch.allclose(before[0], after[0]) and torch.equal(before[1], after[1])
        assert all(
            w.grad is None
            for m in (p.network, p.pipe.text_encoder)
            for n, w in m.named_parameters()
            if "rows" not in n
        )


def test_the_block_can_be_entered_again_and_blocks_nest(p):
    before = parts(p)
    one, two = p.add_token("<one>", "star"), p.add_token("<two>", "red circle")
    with one, two:
        both = p.encode("a <two> <one>")
        with torch.no_grad():
            assert torch.equal(both.ids, p.encode("a <two> <one>").ids)
            one.embedding.add_(1.0)
        changed = p.encode("a <two> <one>")
        assert not torch.allclose(changed.tokens, both.tokens)
        with pytest.raises(SfumatoError, match="already active"):
            one.__enter__()
        with pytest.raises(SfumatoError, match="must be left before"):
            one.__exit__()
    assert same(parts(p), before)
    with one:
        torch.testing.assert_close(p.encode("<one>").tokens, p.encode("<one>").tokens)
        assert len(p.pipe.tokenizer) == before[1][0][0] + 1
    # A word started from several tokens starts at their mean.
    table = p.pipe.text_encoder.get_input_embeddings().weight
    ids = p.pipe.tokenizer("red circle", add_special_tokens=False).input_ids
    torch.testing.assert_close(two.embedding.detach()[0], table[ids].mean(dim=0))


def test_the_longer_table_is_where_the_table_is(p):
    """As where it is offloaded, and the rows are on the accelerator."""
    with p.copy("all").add_token("<new>", "star") as token:
        for _, encoder in token._p.text_parts():
            table = getattr(token._p.pipe, encoder).get_input_embeddings()
            wanted = table.weight.shape
            table.table.to("meta")
            assert table.weight.is_meta and table.weight.shape == wanted


def test_a_word_of_several_vectors(p):
    with p.add_token("<new>", "star", vectors=3) as token:
        assert token.embedding.shape[0] == 3
        cond = p.encode("a <new>")
        assert cond.mask.sum() == 2 + 1 + 3
        assert torch.equal(cond.tokens, p.encode("a star star star").tokens)


def test_copies_and_files_made_inside_the_block_have_the_plain_vocabulary(p, tmp_path):
    plain, sha = p.encode("a <new>"), p.describe()["sha256"]
    with p.add_token("<new>", "star"), p.add_token("<more>", "red"):
        inside = p.encode("a <new>")
        p.save(tmp_path / "out")
        for other in (p.copy("all"), load(tmp_path / "out", device="cpu")):
            assert torch.equal(other.encode("a <new>").ids, plain.ids) and not other.learned
            assert torch.equal(other.encode("a <new>").tokens, plain.tokens)
            assert other.describe()["sha256"] == sha
        assert p.describe()["sha256"] == sha
        assert torch.equal(p.encode("a <new>").ids, inside.ids)


@pytest.mark.parametrize("vectors", [1, 2])
def test_the_file_is_a_textual_inversion_that_diffusers_loads(tmp_path, tmp_path_factory, vectors):
    import conftest

    generator = torch.Generator().manual_seed(0)
    for make in (conftest.make_tiny_sd, conftest.make_tiny_sdxl):
        pipe = make(tmp_path_factory)
        p = wrap(pipe)
        file = tmp_path / f"{make.__name__}.safetensors"
        with p.add_token("<new>", "star", vectors=vectors) as token:
            with torch.no_grad():
                for e in token.embeddings:
                    e.copy_(torch.randn(e.shape, generator=generator))
            ours = p.encode("a red <new>")
        token.save(file)
        if p.family == "sd":
            pipe.load_textual_inversion(file)
        else:
            state = load_file(file)
            for key, tok, enc in (
                ("clip_l", "tokenizer", "text_encoder"),
                ("clip_g", "tokenizer_2", "text_encoder_2"),
            ):
                pipe.load_textual_inversion(
                    state[key], token="<new>", tokenizer=getattr(pipe, tok), text_encoder=getattr(pipe, enc)
                )
        theirs = wrap(pipe).encode("a red <new>")
        torch.testing.assert_close(theirs.tokens, ours.tokens)
        assert torch.equal(theirs.ids, ours.ids)
        if p.family == "sd":
            torch.testing.assert_close(pipe.encode_prompt("a red <new>", p.device, 1, False)[0], ours.tokens)


def test_bad_input(p):
    with pytest.raises(BadInput, match=r"context holds 1 to 10"):
        p.add_token("<new>", "star", vectors=11)
    with pytest.raises(BadInput, match="without spaces"):
        p.add_token("a new", "star")
    with pytest.raises(BadInput, match="already a word"):
        p.add_token("Star", "circle")
    with pytest.raises(BadInput, match="start from is empty"):
        p.add_token("<new>", "")
    with (
        p.add_token("<new>", "star", vectors=6),
        pytest.raises(BadInput, match="11 learned tokens"),
        p.add_token("<more>", "star", vectors=5),
    ):
        pass
    assert not p.learned


def test_pooling_does_not_depend_on_the_historical_end_token(tiny_sdxl):
    """Released SDXL checkpoints say that the end token is 2, and then pool at the largest id."""
    p = tiny_sdxl.copy()
    model = p.pipe.text_encoder_2.text_model
    if not hasattr(model, "eos_token_id"):
        pytest.skip("this version of transformers keeps the end token elsewhere")
    plain = p.encode("a star of art").pooled
    model.eos_token_id = 2
    assert torch.equal(p.encode("a star of art").pooled, plain)
    with p.add_token("<new>", "star"):
        assert torch.equal(p.encode("a <new> of art").pooled, plain)
