"""What a model of the sketch world learns from: mixes of scenes, their twins, the ways of asking for them, and what a
phrase asks for."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.data import sketch
from sfumato.data.pictures import open_pictures
from sfumato.data.sketch import BACKGROUNDS, COLOURS, OBJECTS, STYLES, Item, Scene
from sfumato.data.sketch.asked import Asked, asked
from sfumato.data.sketch.mix import ALIKE, SHARES, is_inside
from sfumato.data.sketch.phrases import training_caption
from sfumato.errors import BadInput
from sfumato.train import draw

seeds = st.integers(0, 10**6)
few = settings(max_examples=60, deadline=None)


def scene(seed: int) -> Scene:
    return sketch.training_scene(np.random.default_rng(seed))


def pairs(some: Scene) -> list[tuple[str, str]]:
    return [(item.object, item.colour) for item in some.objects]


def test_the_mix_has_its_shares():
    rng, n = np.random.default_rng(0), 4000
    drawn = [sketch.training_scene(rng) for _ in range(n)]
    for count, share in enumerate(SHARES):
        # Five standard errors.
        assert abs(sum(len(s.objects) == count for s in drawn) / n - share) < 5 * (share * (1 - share) / n) ** 0.5
    two = [s for s in drawn if len(s.objects) == 2 and not is_inside(s)]
    alike = sum(pairs(s)[0] == pairs(s)[1] for s in two) / len(two)
    assert abs(alike - ALIKE) < 5 * (ALIKE / len(two)) ** 0.5


@few
@given(seeds)
def test_a_twin_differs_in_what_only_words_tell(seed):
    one = scene(seed)
    other = sketch.twin(one, np.random.default_rng(seed + 1))
    assert other != one
    assert (other.style, other.relations, other.texture_seed) == (one.style, one.relations, one.texture_seed)
    assert [(i.x, i.y, i.scale) for i in other.objects] == [(i.x, i.y, i.scale) for i in one.objects]
    if len(one.objects) > 1 and len(set(pairs(one))) == len(one.objects):
        # Exchanged: the same kinds and the same colours, in other pairs or places.
        assert sorted(i.object for i in other.objects) == sorted(i.object for i in one.objects)
        assert sorted(i.colour for i in other.objects) == sorted(i.colour for i in one.objects)
        assert other.background == one.background


def test_what_lies_inside_another_only_changes_colours():
    rng = np.random.default_rng(0)
    inside = [s for s in (sketch.training_scene(rng) for _ in range(600)) if is_inside(s)]
    assert len(inside) > 20
    for one in inside:
        other = sketch.twin(one, rng)
        assert [i.object for i in other.objects] == [i.object for i in one.objects]
        assert [i.colour for i in other.objects] == [i.colour for i in one.objects][::-1]


@few
@given(seeds)
def test_training_captions_tell_the_truth_in_few_words(seed):
    rng, one = np.random.default_rng(seed), scene(seed)
    text = training_caption(one, rng)
    words = text.replace(",", " ,").split()
    assert len(words) <= 28
    singular = {w.removesuffix("es") if w.endswith(("shes", "sses")) else w.removesuffix("s") for w in words}
    kinds = {i.object for i in one.objects}
    assert (set(words) | singular) & set(OBJECTS) <= kinds
    assert set(words) & set(COLOURS) <= {i.colour for i in one.objects}
    # "white" and "sky" stand for nothing else; "in the sky" is the background too.
    assert set(words) & (set(BACKGROUNDS) | {"dots"}) <= {one.background, "dots"}
    assert set(words) & set(STYLES) <= {one.style}
    if len(set(pairs(one))) > 1:
        assert kinds <= set(words), "every object is named"


@few
@given(seeds)
def test_relations_in_training_captions_hold(seed):
    rng = np.random.default_rng(seed)
    left, right = Item("star", "red", 0.27, 0.5, 0.4), Item("fish", "blue", 0.73, 0.5, 0.4)
    one = Scene((left, right), "white", "flat", ((0, "left of", 1),))
    text = training_caption(one, rng)
    star, fish = text.index("star"), text.index("fish")
    before = "to the left of" in text or "left of" in text or ("on the left" in text and "on the right" in text)
    if "right of" in text:
        assert fish < star
    elif "on the left" in text:
        assert (star < fish) == (text.index("on the left") < text.index("on the right"))
    elif before:
        assert star < fish


def test_pairs_of_the_source_are_twins_and_labels_hold():
    source = open_pictures("sketch-scenes", 64, seed=3, count=40)
    assert len(source) == 40 and source.group == 2
    for i in range(0, 40, 2):
        one, other = source.scene(i), source.scene(i + 1)
        assert one != other and one.texture_seed == other.texture_seed
        first = one.relations[0][0] if one.relations else 0
        assert source.label(i) == (OBJECTS.index(one.objects[first].object) if one.objects else 0)
        assert (source.picture(i) == sketch.render(one, 64)).all()
        assert source.caption(i) == source.caption(i)


def test_grouped_draws_hold_both_of_a_pair_on_any_number_of_processes():
    whole = draw.grouped(1000, 12, 2, draw.Share((1, 2, 0), range(12), 12))
    assert (whole[::2] % 2 == 0).all() and (whole[1::2] == whole[::2] + 1).all()
    parts = [draw.grouped(1000, len(r), 2, draw.Share((1, 2, 0), r, 12)) for r in (range(5), range(5, 12))]
    assert torch.equal(torch.cat(parts), whole)


def test_groups_of_one_are_plain_draws():
    key = lambda: draw.Share((1, 2, 0), range(9), 9)
    assert torch.equal(draw.grouped(77, 9, 1, key()), draw.integers(77, 9, key()))


def test_what_a_phrase_asks_for():
    star, fish, moon = ("red", "star"), ("blue", "fish"), (None, "moon")
    assert asked("a red star left of a blue fish") == Asked((star, fish), ((0, "left of", 1),))
    assert asked("a red star to the left of a blue fish") == asked("a red star left of a blue fish")
    assert asked("blue fish and moon") == Asked((fish, moon))
    assert asked("a red star, a blue fish and a moon") == Asked((star, fish, moon))
    assert asked("two red stars") == Asked((star, star))
    assert asked("a red star inside a blue fish and a moon above the fish") == Asked(
        (star, fish, moon), ((0, "inside", 1), (2, "above", 1))
    )
    assert asked("a red star left of a red star") == Asked((star, star), ((0, "left of", 1),))


@pytest.mark.parametrize("text", ["a red star left of the star", "the fish below a moon and the moon inside the moon"])
def test_nothing_stands_beside_itself(text):
    with pytest.raises(BadInput, match="itself"):
        asked(text)


def test_words_that_the_world_has_not_are_named():
    with pytest.raises(BadInput, match="boat"):
        asked("a red star left of a blue boat")
    with pytest.raises(BadInput, match="names no object"):
        asked("a red star left of")


def test_scenes_refuse_relations_that_cannot_be():
    items = (Item("star", "red", 0.3, 0.5, 0.4), Item("fish", "blue", 0.7, 0.5, 0.4))
    with pytest.raises(BadInput, match="itself"):
        Scene(items, "white", "flat", ((0, "left of", 0),))
    with pytest.raises(BadInput, match="beside"):
        Scene(items, "white", "flat", ((0, "beside", 1),))
    with pytest.raises(BadInput, match="object 2 of 2"):
        Scene(items, "white", "flat", ((0, "above", 2),))
