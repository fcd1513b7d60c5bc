"""Cameras, the world of solids, scenes in folders, paths in blocks, and how well segments match."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close

from sfumato.data.cameras import Cameras, directions, look_at, orbit, relative, stacked
from sfumato.data.solids import FLOOR, NOTHING, Solid, World, rays, render, shown, some_world
from sfumato.data.views import open_views
from sfumato.errors import BadInput
from sfumato.metrics.segmentation import foreground_ari, mean_iou
from sfumato.noise import Cosine, GaussianProcess
from sfumato.sample.paths import Blocks, partition

EYES = torch.tensor([[3.0, 0, 2], [0, -3, 1], [2, 2, 3]], dtype=torch.float64)
UP = torch.tensor([0.0, 0, 1], dtype=torch.float64)


def ring() -> Cameras:
    return Cameras(look_at(EYES, torch.zeros_like(EYES), UP), torch.full((3,), 1.2, dtype=torch.float64))


def moved(cameras: Cameras, seed: int = 0) -> Cameras:
    """The same cameras after a rigid change of the world."""
    rng = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=rng, dtype=torch.float64))[0]
    motion = torch.eye(4, dtype=torch.float64)
    motion[:3, :3] = turn * torch.linalg.det(turn).sign()
    motion[:3, 3] = torch.randn(3, generator=rng, dtype=torch.float64)
    return Cameras((motion @ cameras.poses.double()).to(cameras.poses), cameras.focal)


# Cameras


def test_a_camera_looks_at_its_target_with_up_upwards():
    cameras = ring()
    middle = directions(cameras.poses, cameras.focal, 3)[:, 1, 1]
    assert_close(middle, -EYES / EYES.norm(dim=1, keepdim=True))
    top, bottom, left, right = (directions(cameras.poses, cameras.focal, 3)[:, i, j] for i, j in
                                ((0, 1), (2, 1), (1, 0), (1, 2)))  # fmt: skip
    assert (top[:, 2] > bottom[:, 2]).all()
    assert_close(torch.linalg.cross(right - left, top - bottom)[0], (EYES[0] / EYES[0].norm()) * (
        torch.linalg.cross(right - left, top - bottom)[0].norm()))  # fmt: skip
    # the outer pixels' middles lie a third of the width off the axis
    assert_close((right * middle).sum(-1), torch.cos(torch.atan(torch.full((3,), 1 / 3 / 1.2, dtype=torch.float64))))


def test_the_frame_of_a_camera_does_not_depend_on_the_world():
    cameras = ring()
    own = relative(cameras.poses, cameras.poses[0])
    assert_close(own[0], torch.eye(4, dtype=torch.float64))
    assert_close(relative(moved(cameras).poses, moved(cameras).poses[0]), own)
    assert_close(own, torch.linalg.inv(cameras.poses[0]) @ cameras.poses)
    several = stacked([cameras, moved(cameras)])
    assert_close(several.seen_from(several.poses[:, 0]).poses, own.expand(2, -1, -1, -1))


def test_mixed_precision_does_not_reach_cameras():
    cameras = Cameras(ring().poses.float(), ring().focal.float())
    with torch.autocast("cpu", torch.bfloat16):
        origins, ways = cameras.seen_from(cameras.poses[0]).rays(4)
    assert_close(ways, cameras.seen_from(cameras.poses[0]).rays(4)[1], rtol=0, atol=0)
    assert origins.dtype == ways.dtype == torch.float32


@pytest.mark.parametrize("change", [lambda c: c, moved])
def test_an_orbit_goes_around_what_all_look_at_from_the_first(change):
    cameras = change(ring())
    path = orbit(cameras, 4)
    assert_close(path.poses[0], cameras.poses[0], rtol=0, atol=1e-5)
    unit = Cameras(torch.eye(4, dtype=torch.float64)[None], torch.ones(1, dtype=torch.float64))
    middle = change(unit).poses[0, :3, 3]
    place, axis = path.poses[:, :3, 3], -path.poses[:, :3, 2]
    assert_close((place - middle).norm(dim=1), EYES[0].norm().expand(4), rtol=0, atol=1e-5)
    assert_close(axis, (middle - place) / EYES[0].norm(), rtol=0, atol=1e-5)
    assert_close((place[2] - place[0]).norm(), torch.tensor(6.0, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("poses", "focal", "message"),
    [
        (torch.eye(4), torch.ones(1), "a focal length for each"),
        (torch.eye(4)[None], torch.ones(2), "a focal length for each"),
        (2 * torch.eye(4)[None], torch.ones(1), "last row"),
        (torch.diag(torch.tensor([2.0, 1, 1, 1]))[None], torch.ones(1), "a rotation"),
        (torch.diag(torch.tensor([-1.0, 1, 1, 1]))[None], torch.ones(1), "mirroring"),
        (torch.full((1, 4, 4), math.nan), torch.ones(1), "not finite"),
        (torch.eye(4)[None], torch.zeros(1), "positive"),
    ],
)
def test_what_is_no_camera_is_refused(poses, focal, message):
    with pytest.raises(BadInput, match=message):
        Cameras(poses, focal)


# The world of solids

BALL = Solid("sphere", (0.0, 0.0), 0.5, 1.0, 0.0, (1.0, 0.0, 0.0))
BOX = Solid("box", (0.0, 0.0), 0.5, 1.0, 0.3, (0.0, 1.0, 0.0))
TIN = Solid("cylinder", (0.0, 0.0), 0.5, 1.0, 0.0, (0.0, 0.0, 1.0))


def cast(solid: Solid, origin, way) -> tuple[float, np.ndarray]:
    way = np.array(way, float) / np.linalg.norm(way)
    far, normal = solid.hit(np.array([origin], float), way[None])
    return far[0], normal[0]


def test_rays_hit_solids_where_they_are():
    down = ((0, 0, 3), (0, 0, -1))
    for solid in (BALL, BOX, TIN):
        far, normal = cast(solid, *down)
        assert far == pytest.approx(2) and np.allclose(normal, [0, 0, 1])
        assert cast(solid, (0, 0, 3), (0, 0, 1))[0] == math.inf and cast(solid, (3, 0, 3), (0, 1, 0))[0] == math.inf
    for solid in (BALL, TIN):
        far, normal = cast(solid, (3, 0, 0.5), (-1, 0, 0))
        assert far == pytest.approx(2.5) and np.allclose(normal, [1, 0, 0])
    corner = np.array([math.cos(0.3), math.sin(0.3), 0])
    far, normal = cast(BOX, 3 * corner + [0, 0, 0.5], -corner)
    assert far == pytest.approx(2.5) and np.allclose(normal, corner)
    inside, outside = (cast(TIN, (x, 0, 3), (0, 0, -1))[0] for x in (0.49, 0.51))
    assert inside == pytest.approx(2) and outside == math.inf


def test_points_seen_by_a_camera_lie_on_what_they_show_and_project_back_to_their_pixels():
    world = some_world(np.random.default_rng(1))
    pose, focal = ring().poses[0].numpy(), 1.2
    which, points = shown(world, pose, focal, 12)
    assert {*np.unique(which)} <= {NOTHING, FLOOR, *range(len(world.solids))} and (which >= 0).any()
    assert np.allclose(points[which == FLOOR][:, 2], 0, atol=1e-9)
    for i, solid in enumerate(world.solids):
        if solid.kind == "sphere" and (which == i).any():
            assert np.allclose(np.linalg.norm(points[which == i] - solid.centre, axis=1), solid.radius)
    local = (points.reshape(-1, 3) - pose[:3, 3]) @ pose[:3, :3]
    x, y = focal * local[:, 0] / -local[:, 2], -focal * local[:, 1] / -local[:, 2]
    row, column = np.divmod(np.arange(144), 12)
    assert np.allclose(x, (column + 0.5) / 12 - 0.5) and np.allclose(y, (row + 0.5) / 12 - 0.5)
    origin, way = rays(pose, focal, 12)
    torch_way = directions(torch.from_numpy(pose), torch.tensor(focal, dtype=torch.float64), 12)
    assert np.allclose(way.reshape(12, 12, 3), torch_way.numpy()) and np.allclose(origin, pose[:3, 3])


def test_a_solid_that_goes_changes_its_own_pixels_and_its_shadow():
    world = World((BALL, replace(BOX, place=(2.0, 2.0))), (0.5, 0.5, 0.5), (0.0, 0.0, 1.0))
    pose = ring().poses[0].numpy()
    full, rest = (render(w, pose, 1.2, 16, 1).astype(int) for w in (world, world.without(0)))
    which, points = shown(world, pose, 1.2, 16)
    changed = (full != rest).any(-1)
    below = (which == FLOOR) & (np.hypot(points[..., 0], points[..., 1]) < 0.5)  # the light stands above
    assert (changed == ((which == 0) | below)).all() and changed.any()
    assert (rest[which == 0] == rest[(which == FLOOR) & ~below][0]).all(), "the lit floor is seen behind it"


def test_objects_are_described_from_the_first_camera_alone():
    """Turning the world about its vertical axis together with the camera changes no number."""
    world, angle = some_world(np.random.default_rng(3)), 0.7
    c, s = math.cos(angle), math.sin(angle)
    turn = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    solids = tuple(
        replace(x, place=(c * x.place[0] - s * x.place[1], s * x.place[0] + c * x.place[1]), turn=x.turn + angle)
        for x in world.solids
    )
    turned = World(solids, world.floor, tuple(turn[:3, :3] @ np.array(world.light)))
    pose = ring().poses[0].numpy()
    vectors = world.vectors(pose)
    assert np.allclose(vectors, turned.vectors(turn @ pose), atol=1e-5)
    assert vectors.shape == (1 + len(world.solids), 18) and (vectors[0, :4] == [1, 0, 0, 0]).all()
    plain = world.vectors(pose, coloured=False)
    assert (plain[:, :-3] == vectors[:, :-3]).all() and not plain[:, -3:].any()


def test_scenes_of_the_world_are_always_the_same():
    one, other = (open_views("solids", 8, count=3, seed=5) for _ in range(2))
    assert (one.pictures(2, [4, 1]) == other.pictures(2, [4, 1])).all()
    assert (one.pictures(2, [1, 4])[::-1] == one.pictures(2, [4, 1])).all()
    assert not (one.pictures(1, [0]) == one.pictures(2, [0])).all() and len(one) == 3
    heights = {round(float(one.cameras(i).poses[0, 2, 3]), 5) for i in range(3)}
    assert len(heights) == 1, "slots of one scene stand on the floor of another"
    assert len(one.objects(0)) <= one.most and one.objects(0).shape[1] == one.width
    with pytest.raises(BadInput, match="no views at"):
        open_views("nowhere", 8)


# Scenes in folders


def scene(folder, views: int = 3, width: int = 8, height: int = 8, **told):
    """A folder in NeRF's layout."""
    folder.mkdir(parents=True)
    cameras = open_views("solids", 8).cameras(0)
    frames = []
    for i in range(views):
        picture = np.random.default_rng(i).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"r_{i}.png")
        frames.append({"file_path": f"./r_{i}", "transform_matrix": cameras.poses[i].tolist()})
    data = {"camera_angle_x": 0.8, "frames": frames, **told}
    (folder / "transforms.json").write_text(json.dumps(data))
    return data


def test_folders_in_nerfs_layout_are_scenes(tmp_path):
    scene(tmp_path / "a", objects=[[1, 2], [3, 4]])
    scene(tmp_path / "b", 4, width=16, objects=[[5, 6]])
    views = open_views(str(tmp_path), 8, 3)
    assert (len(views), views.each, views.width, views.most) == (2, 3, 2, 2)
    assert_close(views.cameras(0).poses, open_views("solids", 8).cameras(0).poses[:3])
    assert float(views.cameras(0).focal[0]) == pytest.approx(0.5 / math.tan(0.4))
    assert float(views.cameras(1).focal[0]) == pytest.approx(2 * 0.5 / math.tan(0.4)), "in widths of the cropped square"
    assert (views.pictures(0, [2, 0])[0] == np.asarray(Image.open(tmp_path / "a" / "r_2.png"))).all()
    assert views.objects(1).tolist() == [[5, 6]]
    assert len(open_views(str(tmp_path / "b"), 8)) == 1


def test_cameras_far_from_the_middle_of_their_world_keep_their_distances(tmp_path):
    """Maps have coordinates of millions of metres, of which float32 knows but halves."""
    data = scene(tmp_path / "a")
    near = open_views(str(tmp_path), 8).cameras(0)
    for frame in data["frames"]:
        for row, far in zip(frame["transform_matrix"], (500_000.25, 4_649_776.125, 120.0), strict=False):
            row[3] += far
    (tmp_path / "a" / "transforms.json").write_text(json.dumps(data))
    there = open_views(str(tmp_path), 8).cameras(0)
    assert_close(relative(there.poses, there.poses[0]), relative(near.poses, near.poses[0]), atol=1e-5, rtol=0)


def test_a_frames_own_lens_goes_before_that_of_all(tmp_path):
    data = scene(tmp_path / "a", fl_x=16.0, camera_model="PINHOLE")
    data["frames"][1]["camera_angle_x"] = 0.5
    (tmp_path / "a" / "transforms.json").write_text(json.dumps(data))
    found = open_views(str(tmp_path), 8).cameras(0).focal.tolist()
    assert found == pytest.approx([2.0, 0.5 / math.tan(0.25), 2.0])


BREAKS = {
    "there is no such picture": lambda d, f: (f / "r_1.png").unlink(),
    "has no camera in": lambda d, f: Image.new("RGB", (8, 8)).save(f / "extra.png"),
    "several cameras for one picture": lambda d, f: d["frames"][1].update(file_path="r_0.png"),
    "lies outside": lambda d, f: d["frames"][1].update(file_path="../x.png"),
    "give 4 rows of 4": lambda d, f: d["frames"][1].update(transform_matrix=[[1, 2], [3]]),
    "last row": lambda d, f: d["frames"][1].update(transform_matrix=np.ones((4, 4)).tolist()),
    "is distorted": lambda d, f: d.update(k1=0.1),
    "has 8x8 pixels": lambda d, f: d.update(w=16, h=8),
    "off the middle": lambda d, f: d.update(cx=1.0),
    "says neither": lambda d, f: d.pop("camera_angle_x"),
    "fl_x and fl_y differ": lambda d, f: d.update(fl_x=8, fl_y=9),
    "must be a number": lambda d, f: d.update(fl_x="long"),
    "it holds a number of 401 digits": lambda d, f: d["frames"][1]["transform_matrix"][0].__setitem__(0, 10**400),
    "no pinhole's": lambda d, f: d.update(camera_model="OPENCV_FISHEYE"),
    "but there is no such picture": lambda d, f: d["frames"][1].update(file_path="a" * 300),
    "positive": lambda d, f: d.update(fl_x=-8.0),
    "names no frames": lambda d, f: d.update(frames=[]),
    "finite numbers": lambda d, f: d.update(objects=[[1, 2], [3]]),
    "is no list": lambda d, f: d.update(objects=5),
    "cannot be read as a picture": lambda d, f: (f / "r_1.png").write_text("no"),
}


@pytest.mark.parametrize("message", BREAKS)
def test_cameras_that_do_not_match_their_pictures_are_refused(message, tmp_path):
    data = scene(tmp_path / "a")
    BREAKS[message](data, tmp_path / "a")
    (tmp_path / "a" / "transforms.json").write_text(json.dumps(data))
    with pytest.raises(BadInput, match=message):
        open_views(str(tmp_path), 8)


def test_too_few_views_and_folders_without_scenes_are_refused(tmp_path):
    scene(tmp_path / "a", 2)
    with pytest.raises(BadInput, match="2 views: 3 are needed"):
        open_views(str(tmp_path), 8, 3)
    (tmp_path / "none").mkdir()
    with pytest.raises(BadInput, match=r"has a transforms.json"):
        open_views(str(tmp_path / "none"), 8)


# Paths


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 5), st.sampled_from(["mixed", "consecutive"]))
def test_every_view_is_in_one_block_of_every_step(n, length, step, order):
    blocks = partition(n, length, step, order)
    assert torch.cat(blocks).sort().values.tolist() == list(range(n))
    assert all(1 <= len(block) <= length for block in blocks)
    if n <= length:
        assert len(blocks) == 1 and blocks[0].tolist() == list(range(n))


def test_the_borders_change_from_step_to_step():
    found = [[block.tolist() for block in partition(6, 4, step)] for step in range(3)]
    assert found[:2] == [[[0, 1, 2, 3], [4, 5]], [[0, 1], [2, 3, 4, 5]]] and found[2] not in found[:2]
    assert partition(9, 3, 1, "consecutive")[0].tolist() == [0, 1, 2]
    assert partition(9, 3, 2)[0].tolist() != partition(9, 3, 5)[0].tolist()
    with pytest.raises(BadInput, match="at least one view"):
        partition(0, 3, 0)


class Counting:
    """Adds up the views that it is given together."""

    process, prediction = GaussianProcess(Cosine()), "x0"

    def __init__(self, views, calls):
        self.views, self.calls = views, calls

    def __call__(self, z, t, cond=None):
        self.calls.append(self.views.tolist())
        return z + z.sum(1, keepdim=True)


def test_blocks_are_put_back_in_their_places_and_one_block_is_the_denoiser_itself():
    calls: list = []
    z = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0))
    blocks = Blocks(lambda views: Counting(views, calls), 7, 3)
    for step in range(3):
        calls.clear()
        out = blocks(z, 0.5)
        assert sorted(v for call in calls for v in call) == list(range(7)), "each view once a step"
        for block in partition(7, 3, step):
            assert torch.equal(out[:, block], z[:, block] + z[:, block].sum(1, keepdim=True))
    assert torch.equal(Blocks(lambda views: Counting(views, []), 7, 7)(z, 0.5), Counting(torch.arange(7), [])(z, 0.5))


# Segments


def by_pairs(truth: np.ndarray, found: np.ndarray) -> float:
    """The adjusted Rand index, every pair of pixels looked at by itself."""
    one, other = (x[:, None] == x[None] for x in (truth, found))
    pairs = np.triu(np.ones_like(one), 1).astype(bool)
    both, first, second = ((x & pairs).sum() for x in (one & other, one, other))
    chance = first * second / pairs.sum()
    return (both - chance) / ((first + second) / 2 - chance)


def test_the_index_counts_pairs_of_the_foreground_and_names_do_not_matter():
    rng = np.random.default_rng(0)
    truth, found = rng.integers(-1, 4, (3, 8, 8)), rng.integers(-1, 3, (3, 8, 8))
    truth[0], found[0] = np.arange(64).reshape(8, 8) // 16 - 1, (np.arange(64).reshape(8, 8) + 3) // 16
    got = foreground_ari(torch.from_numpy(truth), torch.from_numpy(found))
    want = [by_pairs(t[t >= 0], f[t >= 0]) for t, f in zip(truth, found, strict=True)]
    assert got.tolist() == pytest.approx(want)
    renamed = torch.tensor([3, 1, 0, 7, 5])[torch.from_numpy(truth) + 1]
    assert_close(foreground_ari(torch.from_numpy(truth), renamed), torch.ones(3, dtype=torch.float64))
    assert foreground_ari(torch.full((1, 4), -1), torch.zeros(1, 4, dtype=torch.long)).isnan().all()


def test_overlaps_by_hand():
    truth, found = torch.tensor([[-1, 0, 0, 1, 1, 1]]), torch.tensor([[5, 5, 5, 2, 2, -1]])
    assert mean_iou(truth, found).item() == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert mean_iou(truth, truth).item() == 1 and mean_iou(truth, torch.full_like(truth, -1)).item() == 0
    with pytest.raises(BadInput, match="one shape"):
        mean_iou(truth, found[:, 1:])


def test_scenes_are_in_the_order_in_which_people_count(tmp_path):
    for n in (10, 2, 1):
        scene(tmp_path / f"scene{n}", objects=[[n]])
    scene(tmp_path / ".hidden", objects=[[0]])
    views = open_views(str(tmp_path), 8)
    assert [views.objects(i).item() for i in range(len(views))] == [1, 2, 10]


def test_pictures_that_are_shown_turned_are_refused(tmp_path):
    scene(tmp_path / "a")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "r_1.png", exif=exif)
    with pytest.raises(BadInput, match=r"r_1\.png is shown turned"):
        open_views(str(tmp_path), 8)


def test_pictures_may_be_links(tmp_path, monkeypatch):
    data = scene(tmp_path / "a")
    (tmp_path / "blobs").mkdir()
    blob = (tmp_path / "a" / "r_1.png").rename(tmp_path / "blobs" / "xyz")
    (tmp_path / "a" / "r_1.png").symlink_to(blob)
    data["frames"][1]["file_path"] = "r_1.png"
    (tmp_path / "a" / "transforms.json").write_text(json.dumps(data))
    assert open_views(str(tmp_path), 8).pictures(0, [1]).shape == (1, 8, 8, 3)
    monkeypatch.chdir(tmp_path / "a")
    assert open_views(".", 8).pictures(0, [1]).shape == (1, 8, 8, 3)
    for named in ("../blobs/xyz", str(blob)):
        data["frames"][1]["file_path"] = named
        (tmp_path / "a" / "transforms.json").write_text(json.dumps(data))
        with pytest.raises(BadInput, match="lies outside"):
            open_views(".", 8)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_cameras_in_half_precision_are_cameras(kind):
    cameras = moved(ring()).to(torch.zeros(1, dtype=kind))
    assert cameras.poses.dtype == kind
    poses = cameras.poses.clone()
    poses[0, :3, :3] *= 1.05
    with pytest.raises(BadInput, match="without scaling"):
        Cameras(poses, cameras.focal)
