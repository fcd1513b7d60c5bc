"""Textual inversion: what it minimises, and that it learns."""

from __future__ import annotations

import torch

from sfumato.customize import TextualInversion
from sfumato.customize.parts.learning import Given, Learning
from sfumato.train.draw import Share
from sfumato.train.words import denoising_loss, latents_of

PICTURES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_the_word_starts_as_its_init_word_and_only_its_rows_are_learned(tiny_sd):
    kept = TextualInversion(**{**TextualInversion.EXAMPLE, "updates": 0}).learn(tiny_sd, PICTURES)
    encoder, tokenizer = tiny_sd.pipe.text_encoder, tiny_sd.pipe.tokenizer
    row = encoder.get_input_embeddings().weight[tokenizer.get_vocab()["star</w>"]]
    assert kept.products == {} and torch.equal(kept.words["<mine>"][0][0], row)
    moved = TextualInversion(**{**TextualInversion.EXAMPLE, "tokens": 2}).learn(tiny_sd, PICTURES)
    assert moved.words["<mine>"][0].shape == (2, len(row)) and not torch.equal(moved.words["<mine>"][0][0], row)


def test_an_update_is_adamw_on_the_denoising_loss(tiny_sd):
    method = TextualInversion(**{**TextualInversion.EXAMPLE, "updates": 1, "weight_decay": 0.0, "flip": 0.0})
    learned = method.learn(tiny_sd, PICTURES, ["a {}", "", "a {}"])
    given = Given(latents_of(tiny_sd, PICTURES, mirrored=False), method.texts(tiny_sd, ["a {}", "", "a {}"]))
    seen = []
    recipe = Learning("x", tiny_sd, {}, given, lambda drawn, rng: seen.append(drawn))
    recipe.loss(recipe.batch(0, Share((0, 0, 0), range(2), 2), 2), None)
    (drawn,) = seen
    with tiny_sd.add_token("<mine>", "star") as token:
        cond = tiny_sd.encode([t.replace("{}", "<mine>") for t in drawn.said], grad=True)
        loss = denoising_loss(tiny_sd, drawn.z0, drawn.t, drawn.eps, cond)
        (gradient,) = torch.autograd.grad(loss, [token.embedding])
        wanted = token.embedding.detach() - 0.05 * gradient.sign()  # AdamW's first step
    clear = gradient.abs() > 1e-4 * gradient.abs().max()
    torch.testing.assert_close(learned.words["<mine>"][0][clear], wanted[clear], rtol=0, atol=1e-3)
