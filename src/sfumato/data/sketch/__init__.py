"""The sketch world: procedural, captioned pictures at any size whose truth is known.

A `Scene` is a scene graph; `render` draws it, `caption` and `prompt` put it into words, and `sample_scene`
draws one at random.  Everything is decided by the numpy generator passed in.
"""

from .captions import caption, prompt
from .dataset import DEFAULT_MIX, SketchDataset, batch, scenes
from .mix import training_scene, twin
from .motion import bounce, sequence
from .phrases import training_caption
from .render import PALETTE, render
from .scene import BACKGROUNDS, COLOURS, RELATIONS, STYLES, Item, Scene, sample_scene
from .shapes import OBJECTS

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "DEFAULT_MIX",
    "OBJECTS",
    "PALETTE",
    "RELATIONS",
    "STYLES",
    "Item",
    "Scene",
    "SketchDataset",
    "batch",
    "bounce",
    "caption",
    "prompt",
    "render",
    "sample_scene",
    "scenes",
    "sequence",
    "training_caption",
    "training_scene",
    "twin",
]
