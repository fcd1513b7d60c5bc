"""``sfumato views``: a scene seen along a path of cameras, with slots removed or taken over from another scene."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sfumato.commands.options import STEPS, parse
from sfumato.commands.rollout import animate
from sfumato.errors import BadInput
from sfumato.fields import Count, Natural, NotNegative, Seed
from sfumato.files import GENERATED, atomic_folder, contact_sheet, refuse_existing, save_png, write_json
from sfumato.plan import Plan
from sfumato.text import counted
from sfumato.versions import versions

if TYPE_CHECKING:
    from jaxtyping import Int, UInt8
    from torch import Tensor

    from sfumato.data.cameras import Cameras
    from sfumato.data.views import Views as Scenes
    from sfumato.pipeline import Slots, ViewModel

EXAMPLE = "sfumato views --model run/ --scene 3 --remove 1 --out views/"
ABOUT = f"""Example: {EXAMPLE}

Slots are numbered from 0; --segment shows what each of them is, by leaving it out. With descriptions of objects, slot 0
of the world of solids is its floor."""
HELD_OUT = 10**6
"""Added to the seed of the data that a model was trained on."""
INKS = np.array(
    [(86, 57, 40), (191, 98, 40), (63, 110, 140), (220, 161, 74), (96, 125, 70), (150, 76, 110), (60, 60, 60),
     (130, 170, 180), (200, 120, 120)], np.uint8,
)  # fmt: skip
"""Of segments, over and over; what is in none is white."""


@dataclass(frozen=True, kw_only=True)
class Views:
    """Options of the command."""

    model: Path
    """Folder of a model of views, such as `sfumato train dorsal` writes."""
    out: Path
    """Folder for the page (index.html), the animation, the strips and the record."""
    data: str | None = None
    """Where scenes come from; by default what the model was trained on, of the world of solids other scenes."""
    scene: Natural = 0
    """Which of them."""
    path: Literal["orbit", "cameras"] = "orbit"
    """Once around what the scene's cameras look at, or those cameras themselves."""
    frames: Count = 12
    """Views of the path; of the scene's own cameras at most so many."""
    remove: tuple[Natural, ...] = ()
    """Slots to leave out, all together."""
    donor: Natural | None = None
    """The scene from which slots are taken over."""
    take: tuple[Natural, ...] = ()
    """Slots of the donor to take over."""
    segment: bool = False
    """Leave out every slot in turn, and show which slot each pixel is of."""
    threshold: NotNegative = 0.1
    """Smallest change of a pixel that makes it a slot's."""
    seed: Seed = 0
    """Of the noise."""
    sampling_steps: Count | None = None
    """Denoising steps; by default the model's own."""
    cfg_scale: float | None = None
    """Guidance; 1 is none; by default the model's own."""
    block: Count | None = None
    """Views that are denoised together at most; by default as many as in training."""
    order: Literal["mixed", "consecutive"] | None = None
    """How a longer path is cut into blocks: neighbours, moved neighbours and chance in turn, or neighbours."""
    fps: Count = 6
    """Views a second of the animation."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps ...; by default the fastest there is."""
    overwrite: bool = False
    """Replace the output if it exists."""


def main(args: list[str]) -> None:
    options = Views(**parse("sfumato views", args, Views, about=ABOUT, aliases=STEPS)[0])
    refuse_existing(options.out, options.overwrite)
    if (options.donor is None) != (not options.take):
        raise BadInput("to take over slots say both: --donor, the scene they come from, and --take, which they are")

    from safetensors.torch import save_file

    from sfumato.report.views import ViewsReport, render

    model, scenes, config = opened(options)
    slots = slots_of(model, scenes, options.scene, config)
    cameras, names = path_of(scenes, options)
    settings = {"sampling_steps": options.sampling_steps, "cfg_scale": options.cfg_scale}
    model.defaults |= {"block": options.block or model.defaults["block"]}
    model.defaults |= {"order": options.order or model.defaults["order"]}
    asked = edited(model, scenes, slots, options, config)
    title = f"{counted(len(names), 'view')} of {counted(len(asked), 'scene')}"
    Plan(title, writes=[f"{options.out}/ (index.html, views.gif, sheet.png, views.safetensors, views.json)"]).show()
    drawn = {name: model.render(s, cameras, options.seed, progress=True, **settings)[0] for name, s in asked.items()}
    tracks: dict[str, Any] = {name: as_bytes(x) for name, x in drawn.items()}
    if model.encoder is not None:
        tracks["all slots, by the encoder's own decoder"] = as_bytes(model.regressed(slots, cameras)[0][0])
    if options.path == "cameras":
        tracks = {"the true pictures": scenes.pictures(options.scene, range(len(names))), **tracks}
    if options.segment:
        tracks |= {"which slot it is": inked(segmented(drawn, options.threshold))}
    about = {
        "model": str(options.model), "model-sha256": model.describe()["sha256"], "data": config["data"],
        "scene": options.scene, "frames": len(names), "block": model.defaults["block"],
        "order": model.defaults["order"], "seed": options.seed, **settings, "slots": slots.there.shape[1],
        "versions": versions(),
    }  # fmt: skip
    with atomic_folder(options.out, options.overwrite) as folder:
        stacked = np.stack(list(tracks.values()))
        animate(folder / "views.gif", [contact_sheet(x, len(x)) for x in stacked.swapaxes(0, 1)], options.fps)
        sheet = contact_sheet(stacked.reshape(-1, *stacked.shape[2:]), len(names))
        save_png(folder / "sheet.png", sheet, {**about, "rows": list(tracks)})
        tensors = {"slots": slots.values, "poses": cameras.poses, "focal": cameras.focal}
        tensors |= {f"views {i}": x for i, x in enumerate(drawn.values())}
        save_file({k: x.contiguous().cpu() for k, x in tensors.items()}, folder / "views.safetensors")
        record = {**about, "options": asdict(options), "tracks": list(tracks), "views": names, "source": GENERATED}
        write_json(folder / "views.json", record)
        report = ViewsReport(tracks, names, about, shlex.join(["sfumato", *sys.argv[1:]]))
        (folder / "index.html").write_text(render(report), encoding="utf-8")
    print(f"{title} in {options.out / 'sheet.png'}; look at them in {options.out / 'index.html'}")


def opened(options: Views) -> tuple[ViewModel, Scenes, dict[str, Any]]:
    """The model, scenes, and the settings that the model was trained with, as far as they are known."""
    from sfumato.data.views import open_views
    from sfumato.pipeline import ViewModel, load, read_record

    model = load(str(options.model), device=options.device)
    if not isinstance(model, ViewModel):
        raise BadInput(f"{options.model} is no model of views: `sfumato train dorsal` makes one")
    made = read_record(options.model).get("provenance")
    trained = made.get("config") if isinstance(made, dict) and isinstance(made.get("config"), dict) else {}
    source = options.data or trained.get("data")
    if not isinstance(source, str):
        raise BadInput(f"{options.model} does not say what it was trained on: name a source of scenes with --data")
    seed, inputs = (trained.get(k) if isinstance(trained.get(k), int) else v for k, v in (("seed", 0), ("inputs", 4)))
    scenes = open_views(source, model.size, 1 if model.encoder is None else inputs, seed=seed + HELD_OUT)
    for scene in (options.scene, options.donor or 0):
        if scene >= len(scenes):
            raise BadInput(f"{source} has {counted(len(scenes), 'scene')}, numbered from 0: there is no {scene}")
    return model, scenes, {"data": source, "inputs": inputs}


def slots_of(model: ViewModel, scenes: Scenes, scene: int, config: Mapping[str, Any]) -> Slots:
    """What is known of the scene's objects, or what the model's encoder sees in its first pictures."""
    import torch

    from sfumato.data.cameras import stacked
    from sfumato.pipeline import Slots

    cameras = scenes.cameras(scene)
    if model.encoder is None:
        if not scenes.width:
            raise BadInput(f"{config['data']} says nothing of its objects, which this model is told: see --data")
        return Slots.of([scenes.objects(scene)], cameras.poses[:1])
    shown = list(range(config["inputs"]))
    pictures = torch.from_numpy(scenes.pictures(scene, shown)).permute(0, 3, 1, 2).float()[None] / 255
    return model.encode(pictures, stacked([cameras.at(shown)]))


def path_of(scenes: Scenes, options: Views) -> tuple[Cameras, list[str]]:
    """The cameras, and what their views are called."""
    from sfumato.data.cameras import orbit

    cameras = scenes.cameras(options.scene)
    if options.path == "cameras":
        n = min(options.frames, len(cameras))
        return cameras.at(range(n)), [f"camera {i}" for i in range(n)]
    n = options.frames
    return orbit(cameras, n), [f"{360 * i / n:.0f}°" for i in range(n)]


def edited(
    model: ViewModel, scenes: Scenes, slots: Slots, options: Views, config: Mapping[str, Any]
) -> dict[str, Slots]:
    """The slots and what is to become of them, by name."""
    from sfumato.pipeline.slots import edit, transfer

    asked = {"all slots": slots}
    if options.remove:
        asked[f"without slot {', '.join(map(str, options.remove))}"] = edit(slots, options.remove)
    if options.donor is not None:
        given = transfer(slots, slots_of(model, scenes, options.donor, config), options.take)
        asked[f"with slot {', '.join(map(str, options.take))} of scene {options.donor}"] = given
    if options.segment:
        asked |= {f"without slot {k}": edit(slots, [k]) for k in range(slots.there.shape[1])}
    return asked


def segmented(drawn: Mapping[str, Tensor], threshold: float) -> Int[np.ndarray, "view side side"]:
    """Which slot each pixel shows, from the views without each."""
    import torch

    from sfumato.pipeline.slots import segments

    without = [drawn[f"without slot {k}"] for k in range(len(drawn)) if f"without slot {k}" in drawn]
    return segments(drawn["all slots"], torch.stack(without), threshold, smooth=3).numpy()


def inked(which: Int[np.ndarray, "view side side"]) -> UInt8[np.ndarray, "view side side 3"]:
    """Segments in colours."""
    return np.where((which < 0)[..., None], np.uint8(255), INKS[which % len(INKS)])


def as_bytes(views: Tensor) -> UInt8[np.ndarray, "view side side 3"]:
    """Views in [0, 1] as pixels."""
    return (views.movedim(-3, -1).cpu().numpy() * 255).round().astype(np.uint8)
