"""Where a picture reads the text, and what each element of its latent owes to what it reads there."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sfumato.errors import BadInput
from sfumato.pipeline import Conditioning, Text2Image
from sfumato.pipeline.anatomy import Site
from sfumato.pipeline.attention import pixels_of
from sfumato.pipeline.sampling import gated
from sfumato.sample import predict

from .importance import Rectifier, Response, by_attention, by_column, by_element, by_scaling, laid_out

Mode = Literal["scaling", "element", "column", "attention"]


def sites_of(pipe: Text2Image, resolutions: tuple[int, ...] = ()) -> list[Site]:
    """The layers where the picture reads the text: the last one, or all at these sides of the feature map.

    Raises:
        BadInput: none at a side; the network has none at all.
    """
    every = pipe.anatomy.sites()
    found = [s for s in every if s.kind == "cross"] or [s for s in every if s.kind == "joint"]
    if not found:
        raise BadInput(f"GradSAM needs attention to the text, which a {pipe.anatomy.name} has not")
    sides = sorted({s.resolution for s in found})
    if odd := [r for r in resolutions if r not in sides]:
        raise BadInput(f"no layer reads the text at {odd[0]} x {odd[0]}: the sides are {', '.join(map(str, sides))}")
    if resolutions:
        return [s for s in found if s.resolution in resolutions]
    # By the order in which blocks run: a U-Net's layers are listed with the middle block at the end.
    order = {block: i for i, block in enumerate(pipe.anatomy.blocks())}
    place = lambda s: max((i for block, i in order.items() if s.name.startswith(f"{block}.")), default=-1)
    return [max(enumerate(found), key=lambda pair: (place(pair[1]), pair[0]))[1]]


def attention_importance(
    pipe: Text2Image,
    z: Float[Tensor, "1 *latent"],
    t: float,
    cond: Conditioning,
    columns: Bool[Tensor, "length"],
    site: Site,
    mode: Mode = "scaling",
    rectifier: Rectifier = "abs",
    chunk: int = 8,
) -> Float[Tensor, "*latent"]:
    """How much each element of the conditional noise prediction owes to some tokens, through one layer's attention.

    Args:
        z, t, cond: one picture's noisy latent, its time, and its row of the conditioning.
        columns: which tokens.
        mode: "element" and "scaling" differentiate every element by the layer's attention; "column" its sum, for each
            query; "attention" takes the attention itself.

    Cost: "scaling" two calls of the network; "column" two and a backward pass; "element" a backward pass for each
    element.
    """
    here, z = lambda other: other.name == site.name, z.contiguous()
    with gated(pipe, cond), sdpa_kernel(SDPBackend.MATH):
        seen: list[tuple[Tensor, int, slice, tuple[int, int]]] = []

        def note(at: Site, probs: Tensor) -> Tensor:
            pixels, sides = pixels_of(at, probs.shape[2], (z.shape[-2], z.shape[-1]), pipe.anatomy.side)
            seen.append((probs[0].detach(), at.text if at.kind == "joint" else 0, pixels, sides))
            return probs

        with torch.no_grad(), pipe.edit_attention(note, None, here):
            pipe.denoiser(z, t, cond)
        w, text, picture, sides = seen[-1]  # in joint attention the text's queries and keys come first
        where = torch.zeros(w.shape[1:], dtype=torch.bool, device=w.device)
        read = min(text or w.shape[2], len(columns))
        where[picture, :read] = columns[:read].to(w.device)
        if mode == "attention":
            return laid_out(by_attention(w, where)[picture].view(sides), z.shape[1:])

        def respond(added: Tensor) -> Tensor:
            with pipe.edit_attention(lambda _, probs: probs + added[None], None, here):
                return predict(pipe.denoiser, z, t, cond, "eps")[0]

        f: Response = respond
        if mode == "scaling":
            return by_scaling(f, w, where, rectifier)
        if mode == "element":
            return by_element(f, w, where, rectifier, chunk)
        return laid_out(by_column(f, w, where, rectifier)[picture].view(sides), z.shape[1:])
