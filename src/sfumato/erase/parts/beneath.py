"""Editing weights beneath attached adapters, which go on acting on the result."""

from __future__ import annotations

import torch

from sfumato.errors import BadInput
from sfumato.pipeline import Text2Image


def beneath(p: Text2Image) -> Text2Image:
    """The pipeline to edit in place of one with adapters: without them, but with what they always add in its weights.

    An adapter of fixed strength counts as part of the weights, so that a concept which it has taught is erased too. One
    with a gate, whose strength depends on the prompt, is left out: no weights say what it adds.

    Raises:
        BadInput: an adapter's scale differs from row to row; a key is attached, with a gate or without one.
    """
    for key, a in p.adapters.items():
        if not a.layers:  # of a key, which cannot be attached to layers again; it says what to do
            a.strength(key)
    fixed = {key: a for key, a in p.adapters.items() if a.gate is None}
    for key, a in fixed.items():
        if torch.is_tensor(a.scale) and a.scale.ndim:
            raise BadInput(f"adapter {key!r} has one scale per picture: set its scale to one number first")
    if not p.adapters:
        return p
    made = p.copy({f"{name}.weight" for a in fixed.values() for name in a.layers})
    for a in fixed.values():
        a.add_to(made, float(a.scale))
    return made


def put_back(p: Text2Image, under: Text2Image, made: Text2Image) -> Text2Image:
    """``p`` with the change from ``under = beneath(p)`` to ``made`` in its weights, and its adapters attached again."""
    names = {part: dict(module.named_parameters()) for part, module in under.parts().items()}
    changed = {
        f"{part}.{name}": (names[part][name], x)
        for part, module in made.parts().items()
        for name, x in module.named_parameters()
        if x.data_ptr() != names[part][name].data_ptr()
    }
    result = p.copy(own=changed)
    parts = result.parts()
    with torch.no_grad():
        for name, (before, after) in changed.items():
            part, _, key = name.partition(".")
            weight = parts[part].get_parameter(key)
            # What no adapter touches takes the new weights as they are, to the bit.
            same = torch.equal(weight, before)
            weight.copy_(after if same else weight.double() + (after.double() - before.double()))
    for key, a in p.adapters.items():
        again = result.add_adapter(key, a.rank, a.alpha, sorted(a.layers))
        again.load_state_dict(a.state_dict())
        again.scale, again.gate = a.scale, a.gate
    result.companions.extend(p.companions)
    return result
