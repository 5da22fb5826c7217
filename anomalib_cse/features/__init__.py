"""Frozen deep features of a timm backbone, where its weights come from, and how feature maps are resized."""

from .backbone import FrozenBackbone, filled_up
from .cache import FeatureCache
from .resize import fuse, pool, resize

__all__ = ["FeatureCache", "FrozenBackbone", "filled_up", "fuse", "pool", "resize"]
