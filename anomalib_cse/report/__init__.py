"""A page of what a test or a prediction has found, to choose a threshold by."""

from .callback import Report
from .pictures import folded, is_strip

__all__ = ["Report", "folded", "is_strip"]
