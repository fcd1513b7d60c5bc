"""A text encoder that is made larger says what it said before."""

import re

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from sfumato.data.world import WORDS, strangers, vocabulary
from sfumato.errors import BadInput
from sfumato.train.grow import grown
from sfumato.train.tokenizer import learn_pieces, learn_tokenizer

OLD = ["a red star", "a blue fish", "a red fish and a blue star"]
NEW = [*OLD, "two red stars", "a star under a fish"]


def clip():
    tokenizer = learn_tokenizer(OLD, 12)
    ends = {k: getattr(tokenizer, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, projection_dim=16, **ends,
    )  # fmt: skip
    return CLIPTextModel(config), tokenizer


def t5():
    tokenizer = learn_pieces(OLD, 12)
    ends = {k: getattr(tokenizer, k) for k in ("eos_token_id", "pad_token_id")}
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, **ends,
    )  # fmt: skip
    return T5EncoderModel(config), tokenizer


@pytest.fixture(scope="module", params=[clip, t5])
def small(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text, tokenizer = request.param()
        for p in text.parameters():  # biases and norms away from where they start
            p.data += 0.1 * torch.randn_like(p)
    return text.eval(), tokenizer


@torch.no_grad()
def states(text, tokenizer, captions):
    ids = tokenizer(captions, padding="max_length", max_length=12, return_tensors="pt").input_ids
    return text.eval()(ids).last_hidden_state


def test_it_says_what_it_said_before(small):
    larger, tokenizer = grown(*small, 5, NEW)
    assert larger.config.num_hidden_layers == 5 and len(tokenizer) > len(small[1])
    assert torch.equal(states(larger, tokenizer, OLD), states(*small, OLD))


def test_new_layers_can_learn(small):
    larger, tokenizer = grown(*small, 3, NEW)
    ids = tokenizer(NEW, padding="max_length", max_length=12, return_tensors="pt").input_ids
    larger(ids).last_hidden_state.square().sum().backward()
    last = ("out_proj.weight", "SelfAttention.o.weight")
    of = lambda name: re.search(r"\.(layers|block)\.2\.", name) and name.endswith(last)
    new = {name: p.grad for name, p in larger.named_parameters() if of(name)}
    assert new and all(g.abs().sum() > 0 for g in new.values())


def test_a_new_word_starts_from_the_one_that_it_begins_with(small):
    larger, tokenizer = grown(*small, 2, NEW)
    table = larger.get_input_embeddings().weight
    row = lambda word: table[tokenizer(word, add_special_tokens=False).input_ids[0]]
    assert len(tokenizer("stars", add_special_tokens=False).input_ids) == 1
    assert torch.equal(row("stars"), row("star"))
    assert row("under").abs().max() < 0.2 and not torch.equal(row("under"), row("two"))


def test_it_does_not_shrink(small):
    with pytest.raises(BadInput, match="2 layers already"):
        grown(*small, 1, NEW)


@pytest.mark.parametrize("learn", [learn_tokenizer, learn_pieces])
def test_strangers_are_words_that_a_small_vocabulary_spells(learn):
    tokenizer = learn(OLD, 12)
    assert strangers(tokenizer, ["a blue boat", "a red star, blue boat and van gogh"]) == ["boat", "van", "gogh"]
    assert strangers(tokenizer, ["A red STAR"]) == [] and strangers(tokenizer, ["", "<star>"]) == []


@pytest.mark.parametrize("learn", [learn_tokenizer, learn_pieces])
def test_a_tokenizer_of_the_world_knows_each_of_its_words(learn):
    words = [w for known in WORDS.values() for w in known]
    assert vocabulary(learn([f"a {w}" for w in words], 12)) == WORDS
    assert vocabulary(learn([f"a {w}" for w in words[1:]], 12)) == {}
