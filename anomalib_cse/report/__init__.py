"""What a test or a prediction leaves: a table of scores, and a page to choose a threshold by."""

from .callback import RawScores, Report, scale_of
from .origin import KEY, Origin
from .page import Scale
from .pictures import COLOURS, folded, is_strip

__all__ = ["COLOURS", "KEY", "Origin", "RawScores", "Report", "Scale", "folded", "is_strip", "scale_of"]
