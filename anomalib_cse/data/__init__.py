"""Datasets under the names that users know, and one that needs no download."""

from .datamodules import MVTec
from .demo import SurfaceDemo

__all__ = ["MVTec", "SurfaceDemo"]
