"""Pictures from scene graphs by transformers: a graph becomes a layout, and the layout is followed by codes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from diffusers import ModelMixin, VQModel
from jaxtyping import Float
from torch import Tensor

from sfumato.data.graphs import Vocabulary, graphs_of, open_graphs
from sfumato.data.pictures import Pictures
from sfumato.errors import BadInput
from sfumato.fields import Count, Decay, Natural, NotNegative, Positive, Share, Temperature, at_least
from sfumato.memory import require_memory
from sfumato.nets import ImageTransformer, SceneGraphTransformer
from sfumato.nets.layout import LayoutCode
from sfumato.noise import Absorbing
from sfumato.pipeline import GraphModel, load
from sfumato.plan import Plan

from .codebook import CodebookRecipe, codebook, encode_codes
from .graph_stages import CodeTraining, LayoutTraining
from .loop import Run
from .pixels import PixelRecipe
from .schedule import Schedule
from .state import configuration, goes_on, rows_of

_COCO = {
    "relations": "drawn", "updates": 117_000, "layout_updates": 58_000, "batch": 64, "layout_batch": 128,
    "precision": "bf16",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrfSG2Im(PixelRecipe):
    """A graph transformer draws the layout of a scene graph, and a causal transformer writes the codes of its picture.

    arXiv:2303.04634. Three trainings, one after the other. An autoencoder with a codebook. Stage 1: the graph
    transformer (`sfumato.nets.SceneGraphTransformer`), told each node's name and place in the graph (eigenvectors of
    its Laplacian, with random signs), gives boxes and classes: squared error + CIoU + cross-entropy (`layout_loss`).
    Stage 2: the layout becomes 92 tokens (`sfumato.nets.layout`), objects in random order, which the image transformer
    reads before the 256 codes that it learns to write by cross-entropy; the graph transformer goes on learning by a
    loss of its own, and no gradient of the codes reaches it. `sfumato graph` draws with the model, and so does
    `sfumato sample GRAPH.json`.

    The defaults are the published code's for COCO; the paper's own tables were not at hand. ``head``, ``directed``,
    ``padding``, ``shared`` keep what is odd in that code: logits behind a GELU, the eigenvectors of a directed
    Laplacian, padded nodes in norms and losses, one vocabulary of classes, places and codes. Each has the other way.
    ``bidirectional`` is an extension: an object that nothing refers to hears nothing otherwise.

    Differs from the paper: corners of predicted boxes are sorted before they become tokens; the autoencoder is
    `train discrete`'s, learns by squared and absolute error without a perceptual loss or a discriminator, and sees
    pictures in [-1, 1]; OneCycle moves the rate and not Adam's beta; weight decay spares all but linear layers' weights
    as the code has it, and its optimiser's other settings are fixed; drawn relations go by the middles of boxes, not of
    masks; COCO's choice of objects (3 to 8, of at least 2 % of the area) is left to who writes the JSON; sampling keeps
    keys and values of the codes before.
    Unconfirmed: whether the paper symmetrises the Laplacian.
    Cost: one call of each transformer with gradients an update of stage 2; every picture once through the encoder.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        **{k: v for k, v in PixelRecipe.EXAMPLE.items() if k != "warmup"}, "codes": 16, "code_channels": (8, 8),
        "code_dimensions": 4, "code_updates": 1, "layout_updates": 2, "layout_batch": 2, "graph_width": 16,
        "graph_depth": 1, "graph_heads": 2, "positions": 4, "sections": 8, "slots": 4, "shared": False, "width": 16,
        "depth": 1, "heads": 2,
    }  # fmt: skip
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "coco": _COCO,
        "visual-genome": {
            **_COCO, "relations": "given", "slots": 31, "layout_lr": 3e-4, "layout_updates": 145_000,
            "updates": 290_000,
        },
        "small-sketch": {
            "size": 32, "codes": 256, "code_channels": (32, 64, 64), "code_dimensions": 8, "code_updates": 2000,
            "code_batch": 32, "code_lr": 1e-3, "graph_width": 64, "graph_depth": 3, "graph_heads": 4, "positions": 4,
            "directed": False, "bidirectional": True, "head": "plain", "padding": False, "layout_updates": 3000,
            "layout_batch": 64, "layout_lr": 2e-3, "joint_lr": 2e-4, "sections": 16, "slots": 4, "shared": False,
            "width": 128, "depth": 4, "heads": 4, "dropout": 0.0, "updates": 6000, "batch": 64, "lr": 1e-3,
            "pictures": 16_000, "top_k": 16,
        },
    }  # fmt: skip
    """``coco``: the published configuration and about its 300 epochs; ``visual-genome``: the data's relations (stage 1
    there had 8 eigenvectors and stage 2 32, which do not fit each other: 32 here; and 30 slots for 30 objects and the
    picture: 31 here); ``small-sketch``: for a CPU, untuned, with edges both ways: the first object of a pair would hear
    nothing of its relation, and its box be the middle of all that it may have."""

    classes: ClassVar[bool] = False  # type: ignore[misc]  # a graph is what it is told
    data: str = "sketch"
    """"sketch", "sketch-scenes", or a folder of pictures, each with its graph and boxes in NAME.json beside it."""
    relations: Literal["given", "drawn"] = "given"
    """"given": the data's own relations; "drawn": from the boxes, each object with a random partner, every time."""
    size: Count = 256
    flip: bool = field(default=False, init=False)
    """What is left would be right."""
    label_dropout: Decay = 0.0
    """Share of pictures of which no layout is told, so that the model draws without a graph too; the paper's is 0."""
    updates: Count = 100_000
    batch: Count = 64
    lr: Positive = 3e-4
    """Highest rate of the image transformer: one cycle, torch's OneCycleLR."""
    warmup: Natural = field(default=0, init=False)
    """The cycle has its own."""
    decay: Literal["cosine", "linear", "constant"] = field(default="cosine", init=False)
    """As the cycle."""
    final_lr: NotNegative = field(default=0.0, init=False)
    """As the cycle."""
    betas: tuple[Decay, Decay] = field(default=(0.9, 0.95), init=False)
    """AdamW's for the image transformer; the graph transformer's Adam has torch's."""
    weight_decay: NotNegative = 1e-4
    """AdamW's, of linear layers' weights in the image transformer."""
    ema: Decay = 0.0
    autoencoder: str = ""
    """Folder of a model whose autoencoder to take: one of this recipe, whose graph transformer is taken over as well,
    or of `train discrete` on codes. Empty: one is trained first."""
    codes: Annotated[int, at_least(2)] = 8192
    """Entries of the codebook."""
    code_channels: tuple[Count, ...] = (128, 128, 256, 256, 512)
    """Channels of the autoencoder, each level but the last halving the side."""
    code_dimensions: Count = 256
    """Channels of a code's vector."""
    code_updates: Natural = 100_000
    """Updates of the autoencoder."""
    code_batch: Count = 16
    """Pictures in them."""
    code_lr: Positive = 1e-4
    """Their learning rate."""
    layout_updates: Natural = 100_000
    """Updates of stage 1; 0: none."""
    layout_batch: Count = 128
    """Graphs in them."""
    layout_lr: Positive = 2e-5
    """Highest rate of stage 1: one cycle."""
    joint_lr: Positive = 1e-4
    """Rate of the graph transformer in stage 2, constant."""
    true_layout: bool = False
    """Stage 2 reads the true layouts, and the graph transformer stays as stage 1 left it."""
    box_weight: Positive = 10.0
    """Weight of the boxes' absolute error in stage 2."""
    graph_width: Count = 768
    """Channels of the graph transformer."""
    graph_depth: Count = 12
    """Its layers."""
    graph_heads: Count = 12
    """Its heads of attention."""
    positions: Count = 32
    """Eigenvectors of the Laplacian that a node is told."""
    directed: bool = True
    """Of the directed Laplacian, as published; otherwise of the symmetric one, by a fixed convention."""
    bidirectional: bool = False
    """Every edge gets one back, with relations of its own."""
    edge_features: bool = True
    """Tell the edges their relation."""
    head: Literal["published", "plain"] = "published"
    """What boxes and logits end in: SiLU and GELU, or a sigmoid and nothing."""
    padding: bool = True
    """Fill up the graphs of a batch with nodes that count in norms and losses, as published."""
    sections: Annotated[int, at_least(2)] = 90
    """Cells along a side in which a box's corners lie."""
    slots: Annotated[int, at_least(2)] = 30
    """Objects of a layout at most, the picture itself among them."""
    shared: bool = True
    """One vocabulary of classes, places and codes; otherwise each has its own."""
    width: Count = 1056
    """Channels of the image transformer."""
    depth: Count = 24
    """Its blocks."""
    heads: Count = 12
    """Its heads of attention."""
    dropout: Decay = 0.1
    """Dropout in both transformers."""
    top_k: Count = 100
    """Of how many of the likeliest codes one is drawn."""
    temperature: Temperature = 1.0
    """What logits are divided by before."""
    top_p: Share = 1.0
    """Only the likeliest codes that together have this probability."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size % self._factor:
            raise BadInput(f"size must be a multiple of {self._factor} for these code_channels, got {self.size}")
        for width, heads, name in ((self.width, self.heads, ""), (self.graph_width, self.graph_heads, "graph_")):
            if width % heads:
                raise BadInput(f"{name}width must be a multiple of {name}heads, got {width} and {heads}")
        if self.graph_width < 4:
            raise BadInput(f"graph_width must be at least 4, got {self.graph_width}")
        if self.shared and self.sections > isqrt(self.codes):
            raise BadInput(f"{self.codes} codes name at most {isqrt(self.codes)} sections: lower it, or --no-shared")

    @property
    def _factor(self) -> int:
        return 2 ** (len(self.code_channels) - 1)

    def open(self) -> Any:
        pictures = open_graphs(self.data, self.size, self.seed, self.pictures)
        if pictures.most >= self.slots:
            raise BadInput(f"a graph has {pictures.most} objects: slots must be at least {pictures.most + 1}")
        return pictures

    def process(self) -> Any:  # a TokenProcess, where other recipes have a Gaussian one
        return Absorbing(self.codes + 1)

    def code(self, vocabulary: Vocabulary) -> LayoutCode:
        """What the tokens mean."""
        return LayoutCode(self.codes, len(vocabulary.objects), self.sections, self.slots, self.shared)

    def network(self, classes: int) -> ModelMixin:
        """The image transformer, for so many names of objects."""
        code = LayoutCode(self.codes, classes, self.sections, self.slots, self.shared)
        length = code.length + (self.size // self._factor) ** 2
        return ImageTransformer(code.vocabulary, self.codes, length, self.width, self.depth, self.heads, self.dropout)

    def graph_network(self, vocabulary: Vocabulary) -> SceneGraphTransformer:
        """The graph transformer."""
        relations = len(vocabulary.relations) * (2 if self.bidirectional else 1)
        return SceneGraphTransformer(
            len(vocabulary.objects), relations, self.graph_width, self.graph_depth, self.graph_heads, self.positions,
            self.dropout, self.edge_features, self.head,
        )  # fmt: skip

    def vae(self) -> VQModel:
        """A fresh autoencoder."""
        return codebook(self.size, self.code_channels, self.codes, self.code_dimensions)

    def sampling(self) -> dict[str, Any]:
        own = ("sections", "slots", "shared", "directed", "bidirectional", "top_k", "temperature", "top_p")
        return {name: getattr(self, name) for name in own}

    def model(
        self,
        labels: tuple[str, ...],
        vocabulary: Vocabulary | None = None,
        vae: VQModel | None = None,
        layout: SceneGraphTransformer | None = None,
    ) -> GraphModel:
        """A fresh model of these names, or with these parts; ``labels`` are none."""
        vocabulary = vocabulary or self.open().vocabulary
        side = self.size // self._factor
        defaults = {**self.sampling(), "objects": list(vocabulary.objects), "relations": list(vocabulary.relations)}
        return GraphModel(
            self.network(len(vocabulary.objects)), self.process(), "posterior",  # type: ignore[arg-type]
            (1, side, side), (), defaults, vae or self.vae(), layout or self.graph_network(vocabulary),
        )  # fmt: skip

    def grid(self, model: Any, pictures: Pictures, rng: torch.Generator, n: int) -> Float[Tensor, "n 3 h w"]:
        """Pictures of graphs of the data."""
        rows = torch.randint(len(pictures), (n,), generator=rng).tolist()
        asked = [graph if graph.objects else None for graph in graphs_of(pictures, rows)]
        told = [model.unconditional() if graph is None else model.told(graph) for graph in asked]
        return model.draw(None, torch.randint(2**31, (n,), generator=rng).tolist(), cond=type(told[0]).cat(told))

    @torch.no_grad()
    def plan(self) -> Plan:
        """Memory, and time of stage 2 from one forward pass (a training step costs about three)."""
        require_memory(12 * self.size**2 * (4 + self.batch), f"batches of {self.batch:,} pictures of this size")
        model = self.model(())
        tokens = torch.zeros(1, model.code.length + model.sampling_steps - 1, dtype=torch.long)
        began = time.perf_counter()
        model.network(tokens)
        seconds = 3 * self.batch * self.updates * (time.perf_counter() - began)
        weights = 4 * sum(p.numel() for part in model.parts().values() for p in part.parameters())
        memory = {"weights": weights, "gradients": weights, "optimiser": 2 * weights}
        return Plan(f"train {self.name()} on {self.data}", memory=memory, seconds=seconds)

    def _run(self, out: Path, progress: bool, overwrite: bool) -> None:
        pictures = self.open()
        rows = rows_of(self.data, pictures)
        own = {**self.beyond(), **rows}
        goes_on(out / "training", configuration(self.name(), self, own))
        torch.manual_seed(self.seed)
        vae, layout = self._taken(pictures.vocabulary)
        if vae is None:
            vae = self.vae()
            names = ("data", "pictures", "size", "codes", "code_channels", "code_dimensions")
            keys = {**{name: getattr(self, name) for name in names}, **rows}
            first = self._stage(self.code_updates, self.code_batch, self.code_lr, ema=0.995)
            Run(CodebookRecipe(vae, pictures, first), first, out / "codebook", keys).fit(progress)
        elif torch.cuda.is_available():
            vae.to("cuda")
        vae.requires_grad_(False).eval()
        # Whether an earlier stage was done just now or before a kill must not matter.
        torch.manual_seed(self.seed + 1)
        layout = layout or self.graph_network(pictures.vocabulary)
        told = (pictures.vocabulary, pictures, self.relations, self.padding, self.directed, self.bidirectional)
        if self.layout_updates:
            stage = LayoutTraining(layout, *told, updates=self.layout_updates, lr=self.layout_lr)
            second = self._stage(self.layout_updates, self.layout_batch, self.layout_lr)
            Run(stage, second, out / "layout", own).fit(progress)
        torch.manual_seed(self.seed + 2)
        model = self.model((), pictures.vocabulary, vae, layout)
        for part in model.parts().values():
            part.to(vae.device)
        training = CodeTraining(self, model, encode_codes(vae, pictures), *told)
        run = Run(training, self, out / "training", own)
        model.vae.to(run.device)
        run.fit(progress)
        for part in model.parts().values():
            part.requires_grad_(False).eval()
        run.finish(lambda: model.save(out / "model", overwrite=overwrite, provenance=self.made()))

    def _stage(self, updates: int, batch: int, lr: float, ema: float = 0.0) -> Schedule:
        shared = {name: getattr(self, name) for name in ("precision", "seed", "checkpoint_every", "compile", "track")}
        return Schedule(updates=updates, batch=batch, lr=lr, ema=ema, **shared)

    def _taken(self, vocabulary: Vocabulary) -> tuple[VQModel | None, SceneGraphTransformer | None]:
        """What is taken over from another model: its autoencoder, and if it is of this recipe its graph transformer.

        Raises:
            BadInput: it has none, or other sizes or names.
        """
        if not self.autoencoder:
            return None, None
        found: Any = load(self.autoencoder, "cpu")
        vae = getattr(found, "vae", None)
        if not isinstance(vae, VQModel):
            raise BadInput(f"{self.autoencoder} has no autoencoder of codes: give a model of this recipe, or of "
                           "`train discrete` on codes")  # fmt: skip
        told = (vae.config.num_vq_embeddings, tuple(vae.config.block_out_channels))
        if told != (self.codes, self.code_channels):
            raise BadInput(
                f"the autoencoder of {self.autoencoder} has other codes and code_channels: {told}, give those"
            )
        if not isinstance(found, GraphModel):
            return vae, None
        layout = self.graph_network(vocabulary)
        ours, theirs = (
            {name: value for name, value in net.config.items() if name[0] != "_" and name != "dropout"}
            for net in (layout, found.layout)
        )
        if found.vocabulary != vocabulary or ours != theirs:
            raise BadInput(f"the graph transformer of {self.autoencoder} has other names or sizes than this run")
        return vae, found.layout.requires_grad_(True).train()
