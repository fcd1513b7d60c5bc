"""`GraphModel`: from a scene graph to a layout, and from the layout to the codes of a picture, one after the other."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, cast

import torch
from diffusers import ModelMixin, VQModel
from jaxtyping import Float, Int
from torch import Tensor, nn

from sfumato.data.graphs import WHOLE, Box, SceneGraph, Vocabulary, from_json, graphs_of, read_graphs, require_drawable
from sfumato.errors import BadInput
from sfumato.fields import Count, Share, Temperature, check
from sfumato.nets import ImageTransformer, SceneGraphTransformer
from sfumato.nets.graph_batch import GraphBatch
from sfumato.nets.image_transformer import Past
from sfumato.nets.layout import LayoutCode, signs, sorted_corners
from sfumato.progress import track

from .contract import Condition
from .drawing import Rows, finished, right_kind
from .image import ImageModel
from .token_model import codes_of

if TYPE_CHECKING:
    from sfumato.data.base import Pictures


@dataclass(frozen=True)
class Graphs(Condition):
    """A batch of scene graphs; one without objects tells nothing.

    Attributes:
        graphs: with boxes where the layout is fixed.
    """

    graphs: tuple[SceneGraph, ...]


@dataclass(frozen=True)
class Layout:
    """What is where in a picture: names and boxes, left, top, right, bottom from 0 to 1."""

    objects: tuple[str, ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Sampling:
    """How codes are drawn from logits."""

    top_k: Count = 100
    """Only the so many likeliest."""
    temperature: Temperature = 1.0
    """What logits are divided by."""
    top_p: Share = 1.0
    """Only the likeliest that together have this probability."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(eq=False)
class GraphModel(ImageModel):
    """An `ImageModel` that is told a scene graph and writes a picture's codes one after the other (arXiv:2303.04634).

    ``network`` is an `ImageTransformer`, ``layout`` gives boxes and classes, ``vae`` has the codebook; ``shape`` is
    (1, height, width) of the codes. The process is the absorbing one: tokens come back in a fixed order. ``defaults``
    beside those of `ImageModel`: the names of ``objects`` and ``relations``, the picture's first; ``sections``,
    ``slots`` and ``shared`` of `LayoutCode`; ``directed`` and ``bidirectional`` of `GraphBatch`; and `Sampling`'s.
    """

    vae: Any = None
    layout: Any = None
    vocabulary: Vocabulary = field(init=False)
    code: LayoutCode = field(init=False)

    process: Any  # a TokenProcess
    own_defaults: ClassVar[tuple[str, ...]] = (
        "objects", "relations", "sections", "slots", "shared", "directed", "bidirectional", "top_k", "temperature",
        "top_p",
    )  # fmt: skip
    further: ClassVar[Mapping[str, tuple[type[ModelMixin], ...]]] = MappingProxyType(
        {"vae": (VQModel,), "layout": (SceneGraphTransformer,)}
    )

    def __post_init__(self) -> None:
        if not isinstance(self.vae, VQModel) or not isinstance(self.layout, SceneGraphTransformer):
            raise BadInput("a model of graphs needs its autoencoder and its graph transformer: fetch or write it again")
        steps, usual = torch.Size(self.shape).numel(), vars(Sampling())
        own = {"sections": 90, "slots": 30, "shared": True, "directed": True, "bidirectional": False, **usual}
        self.defaults = {"scheduler": "one after the other", "clip": False, **own, **self.defaults}
        self.defaults |= {"sampling_steps": steps, "distilled_steps": steps}
        super().__post_init__()
        said = self.defaults
        self.vocabulary = Vocabulary(tuple(said["objects"]), tuple(said["relations"]))
        names, codes = len(self.vocabulary.objects), self.vae.config.num_vq_embeddings
        self.code = LayoutCode(codes, names, said["sections"], said["slots"], said["shared"])
        config: Any = self.network.config
        relations = len(self.vocabulary.relations) * (2 if said["bidirectional"] else 1)
        told = (config["vocabulary"], config["values"], config["length"], self.layout.config.objects)
        due = (self.code.vocabulary, codes, self.code.length + steps, names)
        if told != due or self.layout.config.relations != relations:
            raise BadInput(f"the networks of this model do not fit its names and codes ({told}, not {due})")

    @property
    def size(self) -> int:
        return self.shape[-1] * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def autoencoder(self) -> nn.Module:
        return self.vae

    def parts(self) -> dict[str, nn.Module]:
        return {"network": self.network, "vae": self.vae, "layout": self.layout}

    def latent_shape(self, size: int | None = None) -> tuple[int, ...]:
        if size not in (None, self.size):
            raise BadInput(f"this model has one size: {self.size}, not {size}")
        return self.shape

    def call(self, z: Tensor, t: Any, cond: Any) -> NoReturn:
        raise BadInput("this model removes no noise, it writes codes one after the other: draw with it")

    def invert(self, z: Tensor, cond: Any, sampling_steps: int) -> NoReturn:
        raise BadInput("this model has no noise to go back to: encode pictures with `encode_image`")

    def encode_image(
        self, x: Float[Tensor, "n 3 height width"], generator: torch.Generator | None = None
    ) -> Int[Tensor, "n 1 h w"]:
        """The codes of pictures in [-1, 1]."""
        return codes_of(self.vae, x)[:, None]

    def decode_latents(self, z: Int[Tensor, "n 1 h w"]) -> Float[Tensor, "n 3 height width"]:
        """Pictures in [-1, 1] of codes."""
        shape = (len(z), *z.shape[2:], self.vae.config.vq_embed_dim or self.vae.config.latent_channels)
        return self.vae.decode(self.vae.quantize.get_codebook_entry(z.flatten(), shape), force_not_quantize=True).sample

    # What it is told

    def told(self, asked: Any) -> Graphs:
        """Scene graphs: files of JSON with one graph each, what JSON gives, or `SceneGraph`s; None as `unconditional`.

        Raises:
            BadInput: no graph, an empty one, more objects than slots, names that the model does not know, or relations
                that go round in a circle (see `require_drawable`).
        """
        if asked is None:
            return self.unconditional()
        if isinstance(asked, Condition):
            return right_kind(asked, Graphs, "scene graphs")
        graphs = [self._graph(each) for each in (asked if isinstance(asked, list | tuple) else [asked])]
        if not graphs:
            raise BadInput("this model is told scene graphs: give at least one")
        for graph in graphs:
            require_drawable(graph)
            self.vocabulary.encode(graph)
            if len(graph.objects) >= self.code.slots:
                most = self.code.slots - 1
                raise BadInput(f"{len(graph.objects)} objects: this model draws at most {most}, name fewer")
        return Graphs(tuple(graphs))

    @staticmethod
    def _graph(asked: Any) -> SceneGraph:
        if isinstance(asked, SceneGraph):
            return asked
        if isinstance(asked, Mapping):
            return from_json(dict(asked), "the graph")
        if not isinstance(asked, str | Path) or not os.path.isfile(asked):
            raise BadInput(f"this model is told scene graphs: {str(asked)[:100]!r} is no JSON file; name one")
        graphs = read_graphs(asked)
        if len(graphs) > 1:
            raise BadInput(f"{asked} holds {len(graphs)} graphs: `sfumato graph` draws all of them")
        return graphs[0]

    def asked_for(self, pictures: Pictures, rows: Sequence[int]) -> list[SceneGraph]:
        """The graphs of these pictures."""
        return list(graphs_of(pictures, rows))

    def unconditional(self, n: int = 1) -> Graphs:
        """Graphs without objects, which tell nothing, ``n`` times."""
        return Graphs((SceneGraph(()),) * n)

    # Layouts and pictures

    def layouts(self, asked: Any, seeds: int | Sequence[int]) -> list[Layout]:
        """One layout for each graph and seed: the one from which `draw` draws. Fixed boxes are returned as they are.

        Raises:
            BadInput: as `told`; numbers of graphs and seeds that do not match.
        """
        rows = Rows.make(self, self._several(asked), seeds)
        told = cast(Graphs, rows.told(self.told)) if rows.asked is not None else self.unconditional(len(rows))
        found = []
        for graph, rng in zip(told.graphs, rows.generators(), strict=True):
            boxes, labels = self._layout(graph, rng)
            names = tuple(self.vocabulary.objects[i] for i in labels[:-1].tolist())
            predicted = tuple(tuple(box) for box in boxes[:-1].tolist())
            found.append(Layout(names, predicted if graph.boxes is None else graph.boxes))  # float32 has rounded these
        return found

    @torch.no_grad()
    def _layout(self, graph: SceneGraph, rng: torch.Generator) -> tuple[Float[Tensor, "n 4"], Int[Tensor, "n"]]:
        """Boxes and classes of all nodes, the picture's own last, on the CPU; the signs are drawn in any case."""
        labels, triples = self.vocabulary.encode(graph)
        k = self.layout.config.positions
        turned = signs(k, rng)
        if graph.boxes is not None:
            return torch.tensor([*graph.boxes, WHOLE]), torch.tensor(labels)
        more = len(self.vocabulary.relations) if self.defaults["bidirectional"] else 0
        batch = GraphBatch.of(labels, triples, k, self.defaults["directed"], more).to(self.device)
        boxes, logits = self.layout(
            batch.labels, batch.positions * turned.to(self.device), batch.source, batch.target, batch.relation
        )
        return sorted_corners(boxes.float().clamp(0, 1)).cpu(), logits.argmax(-1).cpu()

    def _tokens(self, graph: SceneGraph, rng: torch.Generator) -> Int[Tensor, "one length"]:
        """The layout's tokens, its objects in an order of their own."""
        if not graph.objects:
            return self.code.nothing()
        boxes, labels = self._layout(graph, rng)
        return self.code(boxes[None], labels[None], torch.randperm(len(labels), generator=rng))

    @staticmethod
    def _several(asked: Any) -> Any:
        """A graph, alone or among others, as `Rows` takes it: in a list, and to be told apart from others."""
        several = [asked] if isinstance(asked, SceneGraph | Mapping) else asked
        if not isinstance(several, list | tuple):
            return several
        return [from_json(dict(each), "the graph") if isinstance(each, Mapping) else each for each in several]

    @torch.no_grad()
    def draw(
        self,
        asked: Any,
        seeds: int | Sequence[int],
        *,
        sampling_steps: int | None = None,
        cfg_scale: float | None = None,
        cond: Graphs | None = None,
        batch: int = 16,
        size: int | None = None,
        top_k: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        progress: bool = False,
        **others: Any,
    ) -> Float[Tensor, "n 3 height width"]:
        """One picture in [0, 1] for each graph and seed, on the CPU; see `Model.draw`.

        What differs between seeds: the signs of the positions, the objects' order, and the codes. Cost: a call of the
        graph transformer, and one of the image transformer for every code, with what it knows of those before.

        Args:
            sampling_steps: None, or the number of codes.
            top_k, temperature, top_p: see `Sampling`; default: the model's.

        Raises:
            BadInput: as `told`; guidance, a sampler, a start, another number of steps.
        """
        asking = {"cfg_scale": None if cfg_scale == 1 else cfg_scale, **others}
        if strange := [name for name, value in asking.items() if value is not None and value is not False]:
            raise BadInput(f"this model writes codes one after the other, without {strange[0]}: leave it out")
        if sampling_steps not in (None, self.sampling_steps):
            raise BadInput(f"this model writes its {self.sampling_steps} codes one after the other: leave steps out")
        given: dict[str, Any] = {"top_k": top_k, "temperature": temperature, "top_p": top_p}
        how = Sampling(**{k: self.defaults[k] if value is None else value for k, value in given.items()})
        rows = Rows.make(self, self._several(asked), seeds, cond, size=size)
        parts = []
        for some in track(rows.chunks(batch), "drawing", progress):
            generators = some.generators()
            told = self.unconditional(len(some)) if some.asked is None else cast(Graphs, some.told(self.told))
            layout = torch.cat([self._tokens(g, rng) for g, rng in zip(told.graphs, generators, strict=True)])
            network: Any = self.network
            codes = written(network, layout.to(self.device), self.sampling_steps, how, generators)
            parts.append(finished(self.decode_latents(codes.unflatten(1, self.shape)), False, some.seeds))
        return torch.cat(parts)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), **{name: self.defaults[name] for name in ("objects", "relations")}}


def kept(
    logits: Float[Tensor, "batch values"], top_k: int | None = None, top_p: float = 1.0
) -> Float[Tensor, "batch values"]:
    """Logits with all but the ``top_k`` largest (and what equals the least of them) at minus infinity; of those, with
    ``top_p`` below 1, the likeliest until their probabilities reach that, at least one."""
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, where = logits.sort(descending=True)
        share = ordered.softmax(-1)
        over = share.cumsum(-1) - share > top_p  # those before it are enough
        logits = logits.masked_fill(torch.zeros_like(over).scatter(1, where, over), -torch.inf)
    return logits


def written(
    network: ImageTransformer,
    layout: Int[Tensor, "batch length"],
    n: int,
    how: Sampling,
    generators: Sequence[torch.Generator],
) -> Int[Tensor, "batch n"]:
    """``n`` codes after the ``layout``, each drawn of what the network says of it; a generator for each row."""
    tokens, past, codes = layout, cast(Past | None, None), []
    for _ in range(n):
        logits, past = network.follow(tokens, past)
        law = kept(logits[:, -1].float() / how.temperature, how.top_k, how.top_p).softmax(-1).cpu()
        drawn = [torch.multinomial(row, 1, generator=rng) for row, rng in zip(law, generators, strict=True)]
        tokens = torch.stack(drawn).to(layout.device)
        codes.append(tokens)
    return torch.cat(codes, dim=1)
