"""`ViewModel`: an `ImageModel` of several views of a scene at once, told of its slots and of the views' cameras."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers import ModelMixin
from jaxtyping import Float, Int
from torch import Tensor, nn

from sfumato.data.cameras import Cameras, orbit
from sfumato.errors import BadInput
from sfumato.nets import OSRT
from sfumato.noise import Denoiser
from sfumato.sample.paths import Blocks, Order

from .contract import Condition, Gradient, Guide, Told
from .drawing import right_kind
from .image import ImageModel
from .slots import Scene, Slots, edit, segments


@dataclass(eq=False)
class ViewModel(ImageModel):
    """An `ImageModel` of scenes, ``shape`` (view, channel, height, width), whose views are denoised together.

    Beside those of `ImageModel`, its ``defaults`` say ``cameras`` (poses in the frame of the canonical camera, and
    focal lengths: from where it draws unless told), ``block`` (how many views are denoised together at most, as in
    training) and ``order`` (how a longer path is cut into blocks, see `sfumato.sample.paths.partition`).

    Attributes:
        encoder: makes slots of posed pictures; None for a model of slots that come from elsewhere.
    """

    encoder: Any = None

    drawn_by: ClassVar[tuple[str, str]] = ("views", "views")
    own_defaults: ClassVar[tuple[str, ...]] = ("cameras", "block", "order")
    further: ClassVar[Mapping[str, tuple[type[ModelMixin], ...]]] = MappingProxyType({"encoder": (OSRT,)})

    def __post_init__(self) -> None:
        if len(self.shape) != 4:
            raise BadInput(f"a model of views has samples (view, channel, height, width), not {self.shape}")
        own = {"cameras": None, "block": self.shape[0], "order": "mixed"}
        self.defaults = {**own, **self.defaults}
        super().__post_init__()
        self.cameras(self.shape[0])  # raises what is wrong with them

    def parts(self) -> dict[str, nn.Module]:
        return {"network": self.network} | ({} if self.encoder is None else {"encoder": self.encoder})

    def cameras(self, n: int) -> Cameras:
        """``n`` cameras in the canonical camera's frame: the model's own, or others once around."""
        told = self.defaults["cameras"]
        if told is None:
            return orbit(Cameras(torch.eye(4)[None], torch.ones(1)), n)
        own = Cameras(torch.tensor(told["poses"]), torch.tensor(told["focal"]))
        return own if len(own) == n else orbit(own, n)

    # Slots

    @torch.no_grad()
    def encode(self, pictures: Float[Tensor, "batch view 3 side side"], cameras: Cameras) -> Slots:
        """The slots of scenes, from pictures in [0, 1] and their cameras, of which the first is canonical.

        Raises:
            BadInput: cameras that do not match the pictures, pictures of another size or range; a model whose slots
                come from elsewhere.
        """
        if self.encoder is None:
            raise BadInput("this model is told what is known of objects, and has no encoder: make slots with Slots.of")
        if pictures.ndim != 5 or pictures.shape[2:] != self.shape[1:]:
            want = ", ".join(map(str, self.shape[1:]))
            raise BadInput(f"pictures of scenes are [scene, view, {want}], not {list(pictures.shape)}")
        if pictures.shape[:2] != cameras.focal.shape:
            raise BadInput(
                f"cameras {list(cameras.focal.shape)} for pictures {list(pictures.shape[:2])} (scene, view): give "
                "every picture its own camera"
            )
        if not pictures.is_floating_point() or not 0 <= pictures.min() <= pictures.max() <= 1:
            raise BadInput("pictures to encode are numbers from 0 to 1")
        cameras, pictures = cameras.to(pictures.to(self.device)), pictures.to(self.device)
        values = self.encoder.encode(pictures, *cameras.seen_from(cameras.poses[..., 0, :, :]).rays(self.size))
        there = torch.ones(values.shape[:2], dtype=torch.bool, device=self.device)
        return Slots(values.float(), there, cameras.poses[:, 0])

    @torch.no_grad()
    def regressed(
        self, slots: Slots, cameras: Cameras
    ) -> tuple[Float[Tensor, "n view 3 height width"], Float[Tensor, "n view slot height width"]]:
        """Views by the encoder's own decoder, which are the mean of what may be there, and each slot's share of them.

        OSRT's pictures and segmentation, to compare with. On the CPU.

        Raises:
            BadInput: a model whose slots come from elsewhere; slots that are not all there, for that decoder mixes all.
        """
        if self.encoder is None:
            raise BadInput("this model has no encoder, and so no decoder of its slots: render them")
        if not slots.there.all():
            raise BadInput("the encoder's decoder mixes all slots: render the scene to leave some out")
        scene, side = self.scene(slots, cameras), self.size
        origins, ways = Cameras(scene.poses, scene.focal).rays(side)
        origins = origins[:, :, None, None].expand(ways.shape)
        colours, shares = self.encoder.decode(scene.slots.values, origins.flatten(1, 3), ways.flatten(1, 3))
        laid = [x.cpu().unflatten(1, (-1, side, side)).movedim(-1, 2) for x in (colours, shares)]
        return laid[0], laid[1]

    def told(self, asked: Slots | Condition | None) -> Scene | None:
        """A scene: slots (seen by the model's own cameras), or a `Scene`; None as `unconditional`."""
        if asked is None:
            return self.unconditional()
        if isinstance(asked, Slots):
            own = self.unconditional(len(asked))
            return own.replace(slots=self._known(asked))
        if (told := right_kind(asked, Scene, "slots and cameras")) is None:
            raise BadInput(f"a model of views is told slots and cameras: it knows no {str(asked)[:100]!r}")
        return told

    def scene(self, slots: Slots, cameras: Cameras) -> Scene:
        """``slots`` seen by ``cameras`` of the world's frame, as the network is told of them.

        Raises:
            BadInput: slots of another width, cameras of another number of scenes.
        """
        return Scene.seen(self._known(slots), cameras)

    def _known(self, slots: Slots) -> Slots:
        """``slots`` on the model's device, if they are of its kind."""
        width, known = slots.values.shape[2], dict(self.network.config)["slot_width"]
        if width != known:
            raise BadInput(
                f"slots of {width} numbers for a model that knows slots of {known}: take them from where it was trained"
            )
        return slots.map(lambda x: x.to(self.device))

    def asked_for(self, pictures: Any, rows: Sequence[int]) -> list[Any]:
        """Refused: a picture alone has no camera."""
        raise BadInput("a model of views is told slots and cameras, which plain pictures do not have")

    def unconditional(self, n: int = 1) -> Scene:
        """Nothing is known of the scene, ``n`` times; seen by the model's own cameras."""
        width = dict(self.network.config)["slot_width"]
        frame = torch.eye(4, device=self.device).expand(n, 4, 4)
        nothing = torch.zeros(n, 1, width, device=self.device)
        slots = Slots(nothing, torch.zeros(n, 1, dtype=torch.bool, device=self.device), frame)
        return Scene.seen(slots, self.cameras(self.shape[0]))

    def heard(self, cond: Any, z: Float[Tensor, "batch view *dims"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cond = cond.repeat(len(z)) if len(cond) == 1 else cond
        dtype = self.network.dtype
        moved = [x.to(z.device, dtype) for x in (cond.slots.values, cond.poses, cond.focal)]
        return moved[0], cond.slots.there.to(z.device), moved[1], moved[2]

    # Views

    def draw(
        self,
        asked: Slots | Scene | None,
        seeds: int | Sequence[int],
        *,
        cond: Told | None = None,
        **options: Any,
    ) -> Float[Tensor, "n view 3 height width"]:
        """All views of a scene, in [0, 1], for each scene and seed; ``options`` as for `ImageModel.draw`.

        However many cameras a scene has: of more than ``defaults["block"]`` some are denoised together at a time, in
        blocks that change from step to step; a ``guide`` is then called with the views of one block after the other.
        """
        if asked is not None and cond is not None:
            raise BadInput("give what is asked for or a condition, not both")
        scene = cond if asked is None else self.told(asked)
        views = scene.views if isinstance(scene, Scene) else self.shape[0]
        model = self if views == self.shape[0] else replace(self, shape=(views, *self.shape[1:]))
        return ImageModel.draw(model, None, seeds, cond=scene, **options)

    def render(
        self, slots: Slots, cameras: Cameras, seeds: int | Sequence[int] = 0, **options: Any
    ) -> Float[Tensor, "n view 3 height width"]:
        """Views of scenes by cameras of the world's frame, any number of them; see `draw`.

        The same seed gives edited and unedited slots the same noise.
        """
        return self.draw(self.scene(slots, cameras), seeds, **options)

    def segment_by_edit(
        self,
        slots: Slots,
        cameras: Cameras,
        seeds: int | Sequence[int] = 0,
        which: Sequence[int] | None = None,
        threshold: float = 0.1,
        smooth: int = 3,
        **options: Any,
    ) -> Int[Tensor, "n view height width"]:
        """The slot that each pixel shows, by leaving out one after the other; see `segments`.

        Args:
            which: slots that are left out; by default all that are there in every scene.

        Cost: a draw for each slot, and one.

        Raises:
            BadInput: none to leave out, or one that is not there in every scene.
        """
        which = torch.where(slots.there.all(0))[0].tolist() if which is None else slots.check(which)
        if not which:
            raise BadInput("no slot is there in every scene, to be left out: segment one scene at a time")
        full = self.render(slots, cameras, seeds, **options)
        without = torch.stack([self.render(edit(slots, [k]), cameras, seeds, **options) for k in which])
        found = segments(full, without, threshold, smooth)
        return torch.where(found < 0, found, torch.tensor(which)[found.clamp(min=0)])

    def guided(
        self,
        cond: Told | None = None,
        cfg_scale: float | None = None,
        cfg_interval: tuple[float, float] | None = None,
        n: int = 1,
        negative: Any = None,
        guide: Guide | None = None,
        grad: Gradient = False,
    ) -> Denoiser:
        rest = (cfg_scale, cfg_interval, n)
        if callable(cond) or self.shape[0] <= self.defaults["block"]:
            return super().guided(cond, *rest, negative, guide, grad)
        scene: Any = self.unconditional(n) if cond is None else cond
        some: Callable[[Tensor], Denoiser] = lambda views: super(ViewModel, self).guided(
            scene.at(views), *rest, negative, guide, grad
        )
        order: Order = self.defaults["order"]
        return Blocks(some, self.shape[0], self.defaults["block"], order)

    def describe(self) -> dict[str, Any]:
        encoder = None if self.encoder is None else type(self.encoder).__name__
        return {**super().describe(), "views": self.shape[0], "encoder": encoder}
