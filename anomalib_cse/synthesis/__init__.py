"""Synthetic defects that training paints into images of good parts (Section 3.1 of the paper)."""

from .perlin import perlin_masks
from .textures import builtin_textures, download_textures, load_textures, textures_from
from .transform import KINDS, AnomalySynthesis, Stream, SynthesisParams, generator_for

__all__ = [
    "KINDS",
    "AnomalySynthesis",
    "Stream",
    "SynthesisParams",
    "builtin_textures",
    "download_textures",
    "generator_for",
    "load_textures",
    "perlin_masks",
    "textures_from",
]
