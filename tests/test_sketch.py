"""The sketch world: pictures are functions of scenes, scenes are true to their captions, motion is exact."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sfumato.data import sketch
from sfumato.data.sketch import BACKGROUNDS, COLOURS, OBJECTS, STYLES, Item, Scene
from sfumato.data.sketch.render import _pixel_cover, backdrop
from sfumato.data.sketch.shapes import field, half_extent, sample
from sfumato.errors import BadInput

seeds = st.integers(0, 2**32 - 1)
counts = st.integers(1, 3)
few = settings(max_examples=40, deadline=None)


def one(**words: str) -> Scene:
    return sketch.sample_scene(np.random.default_rng(3), 1, **words)


def box(item: Item) -> tuple[float, float, float, float]:
    half_x, half_y = (extent * item.scale / 2 for extent in half_extent(item.object))
    return item.x - half_x, item.y - half_y, item.x + half_x, item.y + half_y


def test_vocabulary_is_as_large_as_promised_and_unambiguous():
    assert (len(OBJECTS), len(COLOURS), len(BACKGROUNDS), len(STYLES)) == (12, 8, 6, 5)
    words = OBJECTS + COLOURS + BACKGROUNDS + STYLES
    assert len(set(words)) == len(words)
    assert all(word.isalpha() and word.islower() for word in words)


@few
@given(seeds, counts)
def test_seed_decides_picture_and_caption(seed, n):
    a, b = (np.random.default_rng(seed) for _ in range(2))
    first, second = sketch.sample_scene(a, n), sketch.sample_scene(b, n)
    assert first == second
    assert (sketch.render(first) == sketch.render(second)).all()
    assert sketch.caption(first, a) == sketch.caption(second, b)


@few
@given(seeds, st.integers(0, 3))
def test_json_round_trip_gives_the_same_picture(seed, n):
    scene = sketch.sample_scene(np.random.default_rng(seed), n)
    again = Scene.from_json(scene.to_json())
    assert again == scene
    assert (sketch.render(again) == sketch.render(scene)).all()


@few
@given(seeds, counts)
def test_large_render_shrinks_to_the_small_one(seed, n):
    scene = sketch.sample_scene(np.random.default_rng(seed), n)
    small = sketch.render(scene, 64).astype(float)
    large = sketch.render(scene, 256).reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    # Anti-aliased edges are box filters only approximately; away from edges the two agree to rounding.
    assert np.abs(small - large).mean() < 3.0
    assert np.percentile(np.abs(small - large), 75) < 3.0


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", OBJECTS)
def test_every_object_shows_in_every_style(kind, style):
    scene = one(object=kind, style=style, background="white", colour="blue")
    empty = Scene((), "white", style, texture_seed=scene.texture_seed)
    changed = np.abs(sketch.render(scene).astype(int) - sketch.render(empty)).max(axis=2) > 40
    assert 0.06 < changed.mean() < 0.6


@few
@given(seeds, counts)
def test_objects_stay_on_the_canvas_in_every_style(seed, n):
    scene = sketch.sample_scene(np.random.default_rng(seed), n)
    for item in scene.objects:
        x0, y0, x1, y1 = box(item)
        assert x0 >= 0 and y0 >= 0 and x1 <= 1 and y1 <= 1
        if scene.style == "pixel":
            # Snapped to the block grid, a sprite has as many blocks here as in the middle: none is cut off.
            whole = _pixel_cover(Item(item.object, item.colour, 0.5, 0.5, item.scale), 16)
            assert _pixel_cover(item, 16).sum() == whole.sum()


@few
@given(seeds, st.integers(2, 3))
def test_relations_hold_geometrically(seed, n):
    scene = sketch.sample_scene(np.random.default_rng(seed), n)
    assert scene.relations
    for subject, relation, reference in scene.relations:
        a, b = box(scene.objects[subject]), box(scene.objects[reference])
        if relation == "inside":
            inner, outer = scene.objects[subject], scene.objects[reference]
            covered = sample(field(inner.object), inner.x, inner.y, inner.scale, 128) < 0
            hollow = sample(field(outer.object), outer.x, outer.y, outer.scale, 128)
            assert hollow[covered].max() < 0
            assert subject > reference, "what lies inside is drawn last"
        else:
            low, high, axis = {
                "left of": (a, b, 0), "right of": (b, a, 0), "above": (a, b, 1), "below": (b, a, 1)
            }[relation]  # fmt: skip
            assert low[2 + axis] < high[axis]


@few
@given(seeds, counts)
def test_captions_tell_the_truth_in_few_words(seed, n):
    rng = np.random.default_rng(seed)
    scene = sketch.sample_scene(rng, n)
    words = sketch.caption(scene, rng).replace(",", "").split()
    assert len(words) <= 28
    assert set(words) & set(COLOURS) <= {item.colour for item in scene.objects}
    assert set(words) & set(OBJECTS) <= {item.object for item in scene.objects}
    assert set(words) & set(BACKGROUNDS) <= {scene.background}
    assert set(words) & set(STYLES) <= {scene.style}
    if n > 1:
        assert all(item.object in words and item.colour in words for item in scene.objects)


def test_captions_are_mostly_complete_and_varied():
    rng = np.random.default_rng(0)
    scene = one(object="star", colour="red", background="sky", style="chalk")
    n = 4000
    drawn = Counter(sketch.caption(scene, rng) for _ in range(n))
    full = sum(k for text, k in drawn.items() if {"sky", "chalk"} <= set(text.replace(",", "").split()))
    # 0.72 with a standard error of 0.0071 at n = 4000; five of them.
    assert abs(full / n - 0.72) < 0.036
    assert len(drawn) > 12
    assert drawn["a red star on a sky background, chalk style"] == max(drawn.values())


def test_prompt_with_parts_left_out():
    assert sketch.prompt("star", "red", "sky", "chalk") == "a red star on a sky background, chalk style"
    assert sketch.prompt("arrow") == "an arrow"
    assert sketch.prompt("moon", style="pixel") == "a moon, pixel style"
    assert sketch.prompt(colour="orange") == "an orange shape"
    assert sketch.prompt(background="night") == "an empty night background"
    assert sketch.prompt() == ""


def test_empty_scene_is_its_background():
    for background in BACKGROUNDS:
        scene = sketch.sample_scene(np.random.default_rng(1), 0, background=background)
        shown = sketch.render(scene, 64)
        assert (shown == (backdrop(background, 64, scene.texture_seed % 4) + 0.5).astype(np.uint8)).all()
        assert sketch.caption(scene, np.random.default_rng(0)) == f"an empty {background} background"


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_every_colour_stands_out_from_every_background(background):
    for variant in range(4):
        ground = backdrop(background, 64, variant).reshape(-1, 3)
        for colour, rgb in sketch.PALETTE.items():
            far = np.linalg.norm(ground - np.array(rgb), axis=1)
            assert np.median(far) > 70, (background, colour)


def test_pixel_style_is_made_of_blocks():
    scene = one(object="heart", style="pixel", background="white")
    picture = sketch.render(scene, 64).reshape(16, 4, 16, 4, 3)
    assert (picture == picture[:, :1, :, :1]).all()
    large = np.asarray(Image.fromarray(sketch.render(scene, 64)).resize((192, 192), Image.Resampling.NEAREST))
    assert (large == sketch.render(scene, 192)).all()


@settings(max_examples=200, deadline=None)
@given(
    st.floats(0, 1), st.floats(-0.3, 0.3), st.integers(0, 200), st.floats(0.1, 0.4)
)  # fmt: skip
def test_bounce_is_an_exact_reflection(fraction, velocity, steps, low):
    high = 1 - low
    start = low + fraction * (high - low)
    position, speed = start, velocity
    for _ in range(steps):
        # Step by step: what overshoots a wall is reflected, as often as needed.
        position += speed
        while not low <= position <= high:
            position = 2 * (low if position < low else high) - position
            speed = -speed
    # Each of at most 200 steps rounds to about 1e-16, and the walls reflect the error without growing it.
    assert abs(sketch.bounce(start, velocity, steps, low, high) - position) < 1e-12


@few
@given(seeds, counts)
def test_sequences_move_inside_the_border_at_constant_speed(seed, n):
    frames = sketch.sequence(np.random.default_rng(seed), 40, n, speed=(0.02, 0.06))
    assert len(frames) == 40
    for frame in frames:
        for item in frame.objects:
            x0, y0, x1, y1 = box(item)
            assert min(x0, y0) >= -1e-12 and max(x1, y1) <= 1 + 1e-12
    for before, now in pairwise(frames):
        for a, b in zip(before.objects, now.objects, strict=True):
            # A reflection folds the step, so a step is at most the pace long.
            assert np.hypot(b.x - a.x, b.y - a.y) <= 0.06 + 1e-9
            assert (a.object, a.colour, a.scale) == (b.object, b.colour, b.scale)
    assert all(f.style == frames[0].style and f.texture_seed == frames[0].texture_seed for f in frames)


def test_batch_mix_shape_and_determinism():
    images, captions = sketch.batch(np.random.default_rng(5), 40, 32, (0.5, 0.25, 0.25))
    again, same = sketch.batch(np.random.default_rng(5), 40, 32, (0.5, 0.25, 0.25))
    assert images.shape == (40, 32, 32, 3) and images.dtype == np.uint8
    assert (images == again).all() and captions == same
    drawn = Counter(len(s.objects) for s in sketch.scenes(np.random.default_rng(6), 4000, (0.5, 0.3, 0.1)))
    for n, share in enumerate((0.1, 0.5, 0.3, 0.1)):
        assert abs(drawn[n] / 4000 - share) < 5 * np.sqrt(share * (1 - share) / 4000)


def test_dataset_items_depend_on_seed_and_index_only():
    data = sketch.SketchDataset(10, size=32, seed=7)
    item = data[4]
    assert item["image"].shape == (3, 32, 32)
    assert float(item["image"].abs().max()) <= 1
    other = sketch.SketchDataset(5, size=32, seed=7)[4]
    assert (other["image"] == item["image"]).all() and other["caption"] == item["caption"]
    assert len(Scene.from_json(item["scene"]).objects) <= 3
    assert json.loads(sketch.SketchDataset(5, size=32, seed=8)[4]["scene"]) != json.loads(item["scene"])
    with pytest.raises(IndexError):
        data[10]


def test_unknown_words_and_counts_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(BadInput, match="no object 'dragon'"):
        sketch.sample_scene(rng, 1, object="dragon")
    with pytest.raises(BadInput, match="no style 'oil'"):
        sketch.sample_scene(rng, 1, style="oil")
    with pytest.raises(BadInput, match="0 to 3 objects, not 4"):
        sketch.sample_scene(rng, 4)
    with pytest.raises(BadInput, match="sum at most 1"):
        sketch.batch(rng, 2, 64, (0.9, 0.9))
    with pytest.raises(BadInput, match="not 0 and 1"):
        sketch.sequence(rng, 0)
    with pytest.raises(BadInput, match="this is not a scene"):
        Scene.from_json("{}")
