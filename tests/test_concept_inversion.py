"""Concept inversion on a tiny random pipeline: what it touches, what it leaves, and that it learns."""

import json
from dataclasses import replace

import pytest
import torch

from sfumato.attack.concept_inversion import (
    ConceptInversion,
    Latents,
    WordLearning,
    check_length,
    denoising_loss,
    neutral_word,
)
from sfumato.attack.parts.files import read_pictures
from sfumato.data.cases import AttackCases, say
from sfumato.data.templates import PUBLISHED
from sfumato.errors import BadInput

TEMPLATES = ("a photo of {}", "a {}")
TINY = ConceptInversion(updates=3, lr=0.05, batch=4, n_images=3, init_word="square", templates=TEMPLATES)


def pictures(n=3, seed=0):
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def shown(n=3, captions=None):
    """Pictures of the concept, with nothing asked for."""
    return AttackCases("star", pictures=pictures(n), captions=captions)


def weights(pipe):
    return {f"{k}.{name}": p.detach().clone() for k, m in pipe.parts().items() for name, p in m.named_parameters()}


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl"])
def test_only_the_new_row_changes_and_all_else_is_restored(name, request):
    pipe = request.getfixturevalue(name)
    before, words = weights(pipe), pipe.pipe.tokenizer.get_vocab()
    parts = {k: id(m.get_input_embeddings()) for k, m in pipe.parts().items() if k.startswith("text")}
    found = TINY.run(pipe, shown(), progress=False)
    after = weights(pipe)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.grad is None and not p.requires_grad for m in pipe.parts().values() for p in m.parameters())
    assert pipe.pipe.tokenizer.get_vocab() == words
    assert {k: id(getattr(pipe.pipe, k).get_input_embeddings()) for k in parts} == parts
    start = pipe.pipe.text_encoder.get_input_embeddings().weight[words["square</w>"]]
    assert found.embedding.shape == (1, len(start)) and not torch.equal(found.embedding[0], start)
    assert len(found.losses) == TINY.updates


def test_no_steps_leave_the_clean_init_embedding(tiny_sd):
    found = replace(TINY, updates=0).run(tiny_sd, shown(), progress=False)
    row = tiny_sd.pipe.tokenizer.get_vocab()["square</w>"]
    assert torch.equal(found.embedding[0], tiny_sd.pipe.text_encoder.get_input_embeddings().weight[row])
    # The new word then means exactly what its init word means.
    same = tiny_sd.draw(["a red square"], [7], sampling_steps=2)
    assert torch.equal(found.draw(tiny_sd, ["a red star"], [7], sampling_steps=2), same)


def test_no_tokens_reduce_the_attack_to_the_clean_prompt(tiny_sd):
    found = replace(TINY, tokens=0).run(tiny_sd, shown(), progress=False)
    assert found.embedding is None and found.losses == []
    clean = tiny_sd.draw(["a red star"], [1], sampling_steps=2)
    assert torch.equal(found.draw(tiny_sd, ["a red star"], [1], sampling_steps=2), clean)


def test_it_learns_and_the_seed_decides(tiny_sd):
    attack = replace(TINY, updates=25, batch=8, n_images=1)
    x = pictures(1)
    found = attack.run(tiny_sd, shown(1), progress=False)
    again = attack.run(tiny_sd, shown(1), progress=False)
    assert torch.equal(found.embedding, again.embedding)
    z0 = tiny_sd.encode_image(x * 2 - 1).expand(64, -1, -1, -1)
    rng = torch.Generator().manual_seed(1)
    t, eps = torch.rand(64, generator=rng), torch.randn(z0.shape, generator=rng)
    with torch.no_grad(), found.token:
        learned = denoising_loss(tiny_sd, z0, t, eps, tiny_sd.encode("a photo of " + found.word))
        plain = denoising_loss(tiny_sd, z0, t, eps, tiny_sd.encode("a photo of square"))
    assert learned < plain  # on noise that it was not trained on


def test_the_loss_is_zero_for_a_denoiser_that_knows(tiny_sd, tiny_sd_eps):
    for pipe in (tiny_sd, tiny_sd_eps):

        class Knowing:
            process, prediction = pipe.denoiser.process, pipe.denoiser.prediction

            def __init__(self, x0):
                self.x0 = x0

            def __call__(self, z, t, cond):
                return self.process.convert(self.x0, z, t, "x0", self.prediction)

        z0, eps = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        view = type("View", (), {"denoiser": Knowing(z0), "adapters": {}})()
        loss = denoising_loss(view, z0, torch.tensor([0.1, 0.5, 0.9, 1.0]), eps, None)
        assert float(loss) < 1e-20  # float64: (1e-16 / sigma)^2


def test_several_tokens_and_no_more_than_fit(tiny_sd):
    found = replace(TINY, tokens=3).run(tiny_sd, shown(), progress=False)
    assert found.embedding.shape[0] == 3
    room = tiny_sd.context_length - 2
    check_length(tiny_sd, ["{}"], room)
    for tokens in (room + 1, 500):
        with pytest.raises(BadInput, match=f"context holds {room}"):
            replace(TINY, tokens=tokens).run(tiny_sd, shown(), progress=False)
    with pytest.raises(BadInput, match=r"do not fit into 'a photo of \{\}'"):
        replace(TINY, tokens=room - 2).run(tiny_sd, shown(), progress=False)


def test_captions_put_the_word_where_the_name_was(tiny_sd):
    attack = replace(TINY, captions=True, n_images=2)
    found = attack.run(tiny_sd, shown(2, ["a red star", "a blue star"]), progress=False)
    assert len(found.losses) == 3
    with pytest.raises(BadInput, match="'star' in each"):
        attack.run(tiny_sd, shown(2, ["a red star", "a blue circle"]), progress=False)
    assert say("a red star, starry star", "star", "<v0>") == "a red <v0>, starry <v0>"


def test_pictures_come_from_the_original_or_a_folder(tiny_sd, tmp_path):
    asked = AttackCases("star")
    with pytest.raises(BadInput, match="original model"):
        TINY.run(tiny_sd, asked, progress=False)
    with pytest.raises(BadInput, match="no folder of pictures"):
        read_pictures(tmp_path / "absent", 16)
    attack = replace(TINY, updates=1)
    found = attack.run(tiny_sd, asked, original=tiny_sd, progress=False)
    out = found.save(tmp_path / "attack", pictures(2), {"seconds": 1.5})
    record = json.loads((out / "attack.json").read_text())
    assert record["concept"] == "star" and record["budget"]["updates"] == 1 and len(record["losses"]) == 1
    assert record["budget"]["box"] == "white" and record["seconds"] == 1.5
    assert sorted(p.suffix for p in out.iterdir()) == [".json", ".png", ".png", ".safetensors"]
    (tmp_path / "pictures").mkdir()
    for picture in out.glob("*.png"):
        picture.rename(tmp_path / "pictures" / picture.name)
    again = attack.run(tiny_sd, replace(asked, pictures=read_pictures(tmp_path / "pictures", 16)), progress=False)
    assert len(again.losses) == 1


def test_a_control_learns_another_word_and_asks_in_place_of_the_concept(tiny_sd):
    own, other = shown(), AttackCases("circle", pictures=pictures(seed=1))
    found = TINY.control(tiny_sd, own, other, progress=False)
    learned = TINY.run(tiny_sd, other, progress=False)
    assert (found.concept, learned.concept) == ("star", "circle") and torch.equal(found.embedding, learned.embedding)
    there = learned.draw(tiny_sd, ["a red circle"], [0], sampling_steps=2)
    assert torch.equal(found.draw(tiny_sd, ["a red star"], [0], sampling_steps=2), there)
    assert TINY.control(tiny_sd, own, None, progress=False) is None


def test_the_published_templates_are_the_default():
    assert {kind: len(said) for kind, said in PUBLISHED.items()} == {"object": 27, "style": 19, "person": 2}
    assert all(t.count("{}") == 1 for said in PUBLISHED.values() for t in said)
    assert ConceptInversion().phrases == PUBLISHED["object"] and "a photo of a clean {}" in PUBLISHED["object"]
    style = ConceptInversion(kind="style").phrases
    assert {"the painting in the style of {}", "a close-up painting in the style of {}"} < set(style)
    assert ConceptInversion(templates=("{}",)).phrases == ("{}",)


def test_every_step_draws_from_the_posterior_and_mirrors_every_other_picture(tiny_sd):
    attack = replace(TINY, batch=400, n_images=1)
    with torch.no_grad():
        latents = attack._latents(tiny_sd, pictures(1))
        z = torch.stack([tiny_sd.encode_image(x * 2 - 1) for x in (pictures(1), pictures(1).flip(-1))])
        assert torch.equal(latents.mean, z) and not torch.equal(z[0], z[1])
        rng = torch.Generator().manual_seed(3)
        drawn = tiny_sd.encode_image(pictures(1) * 2 - 1, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(drawn.shape, generator=rng)
    torch.testing.assert_close(latents.mean[0] + latents.std[0] * noise, drawn)
    # Means far apart tell which view a row is of, and what is left over is the draw.
    apart = torch.tensor([-100.0, 100.0]).view(2, 1, 1, 1, 1).expand_as(z)
    latents = Latents(apart, torch.full_like(apart, 2.0))
    recipe = WordLearning(attack, tiny_sd, tiny_sd.add_token("<w>", "square", 1), latents, [["<w>"]])
    first, second = recipe.drawn(0)[0].clone(), recipe.drawn(1)[0]
    mirrored = (first.mean((1, 2, 3)) > 0).float().mean()
    rest = first - 100 * first.sign()
    assert abs(mirrored - 0.5) < 0.1 and abs(rest.std() - 2) < 0.05 and not torch.equal(first, second)
    for flip, there in ((0.0, False), (1.0, True)):
        plain = replace(attack, flip=flip, sample_posterior=False)
        z0 = WordLearning(plain, tiny_sd, tiny_sd.add_token("<w>", "square", 1), latents, [["<w>"]]).drawn(0)[0]
        assert torch.equal(z0, apart[int(there)].expand_as(z0))


def test_bad_input(tiny_sd):
    for wrong in ({"updates": -1}, {"batch": 0}, {"templates": ("a photo",)}, {"flip": 1.5}, {"kind": "thing"}):
        with pytest.raises(BadInput, match=next(iter(wrong))[:5]):
            ConceptInversion(**wrong)
    with pytest.raises(BadInput, match="name the concept"):
        AttackCases("  ")
    found = TINY.run(tiny_sd, shown(), progress=False)
    with pytest.raises(BadInput, match="does not name"):
        found.draw(tiny_sd, ["a circle"], [0], sampling_steps=1)
    assert neutral_word(tiny_sd) == "art"


def test_a_gated_adapter_is_attacked_at_its_strength(tiny_sd):
    pipe = tiny_sd.copy()
    adapter = pipe.add_adapter("membrane", generator=torch.Generator().manual_seed(0))
    for up in adapter.up.values():
        up.data.fill_(0.05)
    z0, eps = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t, cond = torch.tensor([0.3, 0.6]), pipe.encode(["a star", "a circle"])
    loss = lambda: float(denoising_loss(pipe, z0, t, eps, cond).detach())
    full = loss()
    adapter.gate = lambda cond: torch.zeros(len(cond))
    assert loss() == float(denoising_loss(tiny_sd, z0, t, eps, cond).detach()) != full
    adapter.gate = lambda cond: torch.ones(len(cond))
    assert loss() == pytest.approx(full, rel=1e-5)  # one scale a row instead of one for all
    assert adapter.scale == 1.0
