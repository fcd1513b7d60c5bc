"""OSRT (arXiv:2206.06922): posed pictures to a set of slots, and rays through slots to colours."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import BadInput

from .rays import ray_encoding, ray_map


def slot_shares(
    queries: Float[Tensor, "*n slot dim"], keys: Float[Tensor, "*n token dim"], eps: float = 1e-8
) -> Float[Tensor, "*n slot token"]:
    """How much of each token goes to each slot: slots compete for tokens (a softmax over slots, plus ``eps``), then
    every slot's shares are made to add up to 1."""
    shares = (queries @ keys.mT / queries.shape[-1] ** 0.5).softmax(dim=-2) + eps
    return shares / shares.sum(dim=-1, keepdim=True)


class HeadedAttention(nn.Module):
    """Plain multi-head attention, of ``x`` to itself or to a set of ``other`` vectors."""

    def __init__(self, width: int, heads: int, head_dim: int, other: int | None = None):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width if other is None else other, 2 * inner, bias=False)
        self.out = nn.Linear(inner, width)

    def forward(self, x: Float[Tensor, "batch token width"], other: Tensor | None = None) -> Tensor:
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.to_kv(x if other is None else other).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention and a perceptron, each a residual behind a layer normalisation."""

    def __init__(self, width: int, heads: int, head_dim: int, hidden: int, other: int | None = None):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = HeadedAttention(width, heads, head_dim, other)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), other)
        return x + self.mlp(self.norm2(x))


class SlotAttention(nn.Module):
    """Slots that compete for tokens, from learned beginnings, in ``rounds`` rounds of a gated recurrent unit."""

    def __init__(self, slots: int, tokens: int, width: int, rounds: int = 1):
        super().__init__()
        self.rounds = rounds
        self.first = nn.Parameter(torch.randn(slots, width))
        self.norm_tokens = nn.LayerNorm(tokens)
        self.norm_slots, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = nn.Linear(tokens, width, bias=False), nn.Linear(tokens, width, bias=False)
        self.gru = nn.GRUCell(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch slot width"]:
        tokens = self.norm_tokens(tokens)
        k, v = self.to_k(tokens), self.to_v(tokens)
        slots = self.first.expand(len(tokens), -1, -1)
        for _ in range(self.rounds):
            found = slot_shares(self.to_q(self.norm_slots(slots)), k) @ v
            slots = self.gru(found.flatten(0, 1), slots.flatten(0, 1)).view_as(found)
            slots = slots + self.mlp(self.norm_mlp(slots))
        return slots


class OSRT(ModelMixin, ConfigMixin):
    """The encoder with slots, and the slot mixer that turns rays into colours.

    Defaults are the paper's, as independent code has them. Positions and rays are those of cameras in the frame of the
    first picture's.

    Args:
        slots, width: how many slots, and numbers of each.
        channels: of the first convolution; each of ``blocks`` doubles them and halves the side.
        blocks: pairs of 3x3 convolutions.
        tokens: width of the transformer of ``depth`` layers and ``heads`` heads of tokens / heads.
        rounds: of slot attention.
        mixers: cross-attention layers of the decoder, of ``heads`` heads of width / heads.
        octaves, first_octave: of the encoding of rays (positions from ``first_octave`` on).

    Raises:
        BadInput: widths that are not whole heads.
    """

    @register_to_config
    def __init__(
        self,
        slots: int = 32,
        width: int = 1536,
        channels: int = 96,
        blocks: int = 3,
        tokens: int = 768,
        depth: int = 5,
        heads: int = 12,
        rounds: int = 1,
        mixers: int = 2,
        octaves: int = 15,
        first_octave: int = -5,
    ):
        super().__init__()
        if tokens % heads or width % heads:
            raise BadInput(f"tokens of {tokens} and slots of {width} numbers are not whole numbers of {heads} heads")
        ray = 12 * octaves
        convolutions: list[nn.Module] = []
        for i in range(blocks):
            inside, narrow = (ray + 3, channels) if not i else (channels << i, channels << i)
            convolutions += [nn.Conv2d(inside, narrow, 3, padding=1, bias=False), nn.ReLU()]
            convolutions += [nn.Conv2d(narrow, channels << (i + 1), 3, 2, padding=1, bias=False), nn.ReLU()]
        self.convolutions = nn.Sequential(*convolutions)
        self.patch = nn.Conv2d(channels << blocks, tokens, 1)
        self.layers = nn.ModuleList(Layer(tokens, heads, tokens // heads, 2 * tokens) for _ in range(depth))
        self.slot_attention = SlotAttention(slots, tokens, width, rounds)
        self.query = nn.Sequential(nn.Linear(ray, 2 * ray), nn.ReLU(), nn.Linear(2 * ray, ray))
        self.mixing = nn.ModuleList(Layer(ray, heads, width // heads, 2 * width, width) for _ in range(mixers))
        self.to_q, self.to_k = nn.Linear(ray, width, bias=False), nn.Linear(width, width, bias=False)
        colour: list[nn.Module] = []
        for i in range(4):
            colour += [nn.Linear(width if i else width + ray, width), nn.LeakyReLU()]
        self.colour = nn.Sequential(*colour, nn.Linear(width, 3), nn.Sigmoid())

    def encode(
        self,
        pictures: Float[Tensor, "batch view 3 height width"],
        origins: Float[Tensor, "batch view 3"],
        directions: Float[Tensor, "batch view height width 3"],
    ) -> Float[Tensor, "batch slot dim"]:
        """Slots of scenes from their pictures in [0, 1]."""
        rays = ray_map(origins, directions, self.config["octaves"], self.config["first_octave"])
        x = self.patch(self.convolutions(torch.cat([pictures, rays], dim=2).flatten(0, 1)))
        tokens = x.flatten(2).mT.unflatten(0, pictures.shape[:2]).flatten(1, 2)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.slot_attention(tokens)

    def decode(
        self,
        slots: Float[Tensor, "batch slot dim"],
        origins: Float[Tensor, "batch ray 3"],
        directions: Float[Tensor, "batch ray 3"],
    ) -> tuple[Float[Tensor, "batch ray 3"], Float[Tensor, "batch ray slot"]]:
        """Colours in [0, 1] of rays, and how much of each slot went into them, which adds up to 1: a segmentation."""
        rays = self.query(ray_encoding(origins, directions, self.config["octaves"], self.config["first_octave"]))
        x = rays
        for layer in self.mixing:
            x = layer(x, slots)
        shares = (self.to_q(x) @ self.to_k(slots).mT / self.config["width"] ** 0.5).softmax(dim=-1)
        return self.colour(torch.cat([shares @ slots, rays], dim=-1)), shares

    def forward(self, pictures: Tensor, origins: Tensor, directions: Tensor) -> Tensor:
        """`encode`."""
        return self.encode(pictures, origins, directions)


def from_stelzner(encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of github.com/stelzner/osrt, its encoder's and its slot mixer's, by the names that `OSRT` has."""
    made: dict[str, Tensor] = {}

    def layers(to: str, state: Mapping[str, Tensor], at: str) -> None:
        for i in range(len({name for name in state if name.startswith(at) and name.endswith(".0.norm.weight")})):
            a, b = f"{at}{i}.0", f"{at}{i}.1"
            names = {"norm1": f"{a}.norm", "norm2": f"{b}.norm", "attention.out": f"{a}.fn.to_out.0"}
            names |= {"mlp.0": f"{b}.fn.net.0", "mlp.2": f"{b}.fn.net.3"}
            for new, old in names.items():
                made.update({f"{to}.{i}.{new}.{x}": state[f"{old}.{x}"] for x in ("weight", "bias")})
            if f"{a}.fn.to_qkv.weight" in state:
                q, k, v = state[f"{a}.fn.to_qkv.weight"].chunk(3)
                q, kv = q.contiguous(), torch.cat([k, v])
            else:
                q, kv = state[f"{a}.fn.to_q.weight"], state[f"{a}.fn.to_kv.weight"]
            made.update({f"{to}.{i}.attention.to_q.weight": q, f"{to}.{i}.attention.to_kv.weight": kv})

    layers("layers", encoder, "srt_encoder.transformer.layers.")
    layers("mixing", decoder, "allocation_transformer.transformer.layers.")
    plain = {"srt_encoder.per_patch_linear": "patch", "slot_attention.initial_slots": "slot_attention.first",
             "slot_attention.norm_input": "slot_attention.norm_tokens", "slot_attention.norm_pre_mlp":
             "slot_attention.norm_mlp", "allocation_transformer.input_mlp": "query", "mixing_block": "",
             "render_mlp.net": "colour"}  # fmt: skip
    for name, x in (*encoder.items(), *decoder.items()):
        if name.startswith("srt_encoder.conv_blocks."):
            block, _, at = name.split(".")[2:5]
            made[f"convolutions.{4 * int(block) + int(at)}.weight"] = x
        elif old := next((old for old in plain if name.startswith(old)), None):
            made[(plain[old] + name.removeprefix(old)).removeprefix(".")] = x
        elif name.startswith("slot_attention."):
            made[name] = x
    return made
