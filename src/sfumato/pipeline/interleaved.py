"""One sequence of text and pictures (OmniGen, arXiv:2409.11340): its tokens, where pictures stand, who attends to whom.

A row of the sequence is [text and input pictures, one token of the time, output picture]. The input pictures stand
where the instruction has their places, ``<img><|image_1|></img>`` for the first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from sfumato.errors import BadInput
from sfumato.text import counted

from .conditioning import Conditioning, Role
from .contract import Condition

BEFORE = "<|user|>\nGenerate an image according to the following instructions\n"
AFTER = "<|end|>\n<|assistant|>\n<|diffusion|>"
"""What stands around an instruction."""
DROPPED = "<cfg>"
"""The instruction that training puts in the place of one that is dropped."""
SIGNS = ("<|user|>", "<|end|>", "<|assistant|>", "<|diffusion|>", "<img>", "</img>", DROPPED)
"""What is a token of its own in a vocabulary made for such instructions."""
_PLACE = re.compile(r"<\|image_(\d+)\|>")

Span = tuple[int, int]
"""Where a picture's tokens stand: the first, and the first behind them."""


@dataclass(frozen=True, eq=False)
class Instruction:
    """What is asked of a model that reads text and pictures in one sequence.

    Attributes:
        text: with a place for every picture, `place` (1) for the first; a picture may stand in several places.
        pictures: files, PIL images, or 8-bit arrays (height, width, 3); of any size.
    """

    text: str
    pictures: tuple[Any, ...] = ()


def place(k: int) -> str:
    """The place of picture ``k``, counted from 1, in an instruction."""
    return f"<img><|image_{k}|></img>"


def places(text: str, pictures: int) -> list[int]:
    """Which pictures stand in an instruction, from 0, in the order of its places.

    Raises:
        BadInput: a place without its picture, a picture without a place.
    """
    said = [int(k[:9]) for k in _PLACE.findall(text)]  # Python makes no number of thousands of digits
    for k in said:
        if not 1 <= k <= pictures:
            raise BadInput(
                f"the instruction has a place for picture {k} and came with {counted(pictures, 'picture')}: give that "
                f"picture too, or leave {place(k)} out"
            )
    for k in range(1, pictures + 1):
        if k not in said:
            raise BadInput(
                f"picture {k} has no place in the instruction {text[:80]!r}: put {place(k)} where it belongs, or leave "
                "the picture out"
            )
    return [k - 1 for k in said]


def only_pictures(pictures: int) -> str:
    """The instruction that shows pictures and says nothing, for guidance on the pictures."""
    return " ".join(place(k) for k in range(1, pictures + 1))


def tokens_of(text: str, counts: Sequence[int], tokenizer: Any) -> tuple[list[int], list[Span]]:
    """The token ids of one instruction, framed by `BEFORE` and `AFTER`, and the spans of its pictures.

    The text between two pictures is tokenised by itself; the start token that a tokenizer puts before each is kept
    before the first only. Tokens of pictures have the id 0.

    Args:
        text: see `Instruction`.
        counts: how many tokens each picture has.

    Raises:
        BadInput: as `places`.
    """
    order = places(text, len(counts))
    start = getattr(tokenizer, "bos_token_id", None)
    ids: list[int] = []
    spans: list[Span] = []
    for i, chunk in enumerate(re.split(r"<\|image_\d+\|>", f"{BEFORE}{text}{AFTER}")):
        if i:
            count = counts[order[i - 1]]
            spans.append((len(ids), len(ids) + count))
            ids += [0] * count
        said = list(tokenizer(chunk).input_ids)
        ids += said[1:] if i and said and start is not None and said[0] == start else said
    return ids, spans


def positions_of(lengths: Int[Tensor, "batch"], outputs: int) -> Int[Tensor, "batch sequence"]:
    """The place of every token in its own row: 0 for the padding on the left, then 0, 1, ...; the time counts as one.

    Args:
        lengths: tokens of text and input pictures in each row.
        outputs: tokens of the largest output picture.
    """
    longest = int(lengths.max())
    return (torch.arange(longest + 1 + outputs) - (longest - lengths)[:, None]).clamp(min=0)


def attention_of(
    lengths: Int[Tensor, "batch"],
    spans: Sequence[Sequence[Span]],
    outputs: Int[Tensor, "batch"],
    bidirectional: bool = True,
    longest: int | None = None,
) -> Bool[Tensor, "batch sequence sequence"]:
    """Who may attend (rows) to whom (columns), in rows that are padded on the left to the longest.

    Text, input pictures and the time see what stands before them (and a picture all of itself), never the output; the
    output sees everything. Nobody sees padding, on the left or behind a smaller output; padding on the left sees all
    but that, so that no softmax is empty.

    Args:
        lengths: tokens of text and input pictures in each row.
        spans: of each row's input pictures, from its own first token.
        outputs: tokens of each row's output picture.
        bidirectional: whether an input picture sees all of itself; else it is causal as text is.
        longest: to how many tokens of text and input pictures rows are padded; None: to those of the longest.
    """
    longest, most = int(lengths.max()) if longest is None else longest, int(outputs.max())
    i, left = torch.arange(longest + 1 + most), (longest - lengths)[:, None]
    out = i > longest
    there = i < longest + 1 + outputs[:, None]  # not behind a smaller output
    sees = (out[:, None] | (i <= i[:, None]) & ~out) & (there & (i >= left))[:, None]
    if bidirectional:
        owner = torch.zeros_like(there, dtype=torch.long)
        for row, some in enumerate(spans):
            for n, (first, end) in enumerate(some, start=1):
                owner[row, first + left[row, 0] : end + left[row, 0]] = n
        sees |= (owner[:, :, None] == owner[:, None]) & (owner > 0)[:, None]
    return sees | (i < left)[:, :, None] & there[:, None]


@dataclass(frozen=True)
class Sequences:
    """A batch of sequences, padded on the left.

    Attributes:
        ids: of text and input pictures (0 there).
        mask: False for padding.
        spans: of each row's input pictures, in the padded row.
        positions: see `positions_of`.
        attention: see `attention_of`.
    """

    ids: Int[Tensor, "batch length"]
    mask: Bool[Tensor, "batch length"]
    spans: tuple[tuple[Span, ...], ...]
    positions: Int[Tensor, "batch sequence"]
    attention: Bool[Tensor, "batch sequence sequence"]


def build_sequence(
    texts: Sequence[str],
    counts: Sequence[Sequence[int]],
    outputs: Sequence[int],
    tokenizer: Any,
    padding: int = 2,
    bidirectional: bool = True,
) -> Sequences:
    """What a batch of instructions with pictures is to the network.

    Args:
        texts: instructions, with places for their pictures.
        counts: tokens of each of a row's pictures, (height / 16) (width / 16) in the published model.
        outputs: tokens of each row's output picture.
        tokenizer: called with a text; its ``input_ids`` are read, and its ``bos_token_id``.
        padding: the id of padding.
        bidirectional: as for `attention_of`.

    Raises:
        BadInput: a place without its picture, a picture without a place; numbers of rows that differ.
    """
    if not len(texts) == len(counts) == len(outputs) or not texts:
        raise BadInput(f"{len(texts)} texts, {len(counts)} rows of pictures and {len(outputs)} outputs: give one each")
    rows, spans = zip(*(tokens_of(*row, tokenizer) for row in zip(texts, counts, strict=True)), strict=True)
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    ids = torch.tensor([[padding] * (longest - len(row)) + row for row in rows])
    made = torch.tensor(list(outputs))
    return Sequences(
        ids=ids,
        mask=torch.arange(longest) >= (longest - lengths)[:, None],
        spans=tuple(_moved(some, longest - len(row)) for row, some in zip(rows, spans, strict=True)),
        positions=positions_of(lengths, int(made.max())),
        attention=attention_of(lengths, spans, made, bidirectional),
    )


def _moved(spans: Sequence[Span], by: int) -> tuple[Span, ...]:
    return tuple((first + by, end + by) for first, end in spans)


@dataclass(frozen=True)
class Interleaved(Conditioning):
    """A batch of instructions with pictures. Rows are padded on the left; joined, to the longest of all.

    Attributes:
        tokens: rows of the network's own table of words; those of pictures are made when the network is called.
        latents: of each row's input pictures, one for each of its places.
        spans: where they stand, from the row's own first token.
        wordless: the same pictures without the instruction, for guidance on the pictures; None where no row has any,
            and in what guidance steers away from.
        image_scale: how strongly each row is guided on its pictures.
    """

    latents: tuple[tuple[Tensor, ...], ...] = ()
    spans: tuple[tuple[Span, ...], ...] = ()
    wordless: Interleaved | None = None
    image_scale: Float[Tensor, "batch"] | None = None

    @property
    def lengths(self) -> Int[Tensor, "batch"]:
        """Tokens of each row that are no padding."""
        return self.mask.sum(dim=1).cpu()

    def longer(self, length: int) -> Self:
        """The same rows, padded on the left to ``length`` tokens."""
        more = length - self.ids.shape[1]
        roles = None if self.roles is None else pad(self.roles, (more, 0), value=int(Role.PADDING))
        rows = {"tokens": pad(self.tokens, (0, 0, more, 0)), "ids": pad(self.ids, (more, 0), value=2)}
        return self.replace(**rows, mask=pad(self.mask, (more, 0)), roles=roles)

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        longest = max(part.ids.shape[1] for part in parts)
        parts = [part.longer(longest) for part in parts]
        if any(part.wordless is None for part in parts):
            parts = [part.replace(wordless=None, image_scale=None) for part in parts]
        return super().cat(parts)

    def guided_at(self, scale: float) -> bool:
        on_pictures = self.wordless is not None and self.image_scale is not None and bool((self.image_scale != 1).any())
        return scale != 1 or on_pictures

    def between(self, empty: Condition) -> list[tuple[Condition, Tensor]]:
        if self.wordless is None or self.image_scale is None:
            return []
        bare = torch.tensor([not some for some in self.latents])
        return [(self.wordless.drop(bare, cast(Interleaved, empty)), self.image_scale)]


def fitted(image: Image.Image, most: int, unit: int = 16) -> Image.Image:
    """An input picture as OmniGen takes it: both sides multiples of ``unit``, and as long as ``most`` where one would
    be longer, unless the shorter one would then be less than ``unit``.

    It is halved (box filter) while its shorter side is at least 2 ``most``, then scaled (bicubic) so that the longer
    one is at most ``most`` and the shorter one at least ``unit``, and cropped in the middle.
    """
    while min(image.size) >= 2 * most:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if max(image.size) > most:
        image = _scaled(image, most / max(image.size))
    if min(image.size) < unit:
        image = _scaled(image, unit / min(image.size))
    left, top = (image.width % unit) // 2, (image.height % unit) // 2
    wide, high = image.width - image.width % unit, image.height - image.height % unit
    return image.crop((left, top, left + wide, top + high))


def _scaled(image: Image.Image, scale: float) -> Image.Image:
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.BICUBIC)
