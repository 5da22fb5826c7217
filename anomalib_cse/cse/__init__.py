"""CSE as in the paper: a trained embedder, a frozen random decoder, k-means over images, cosine distance."""

from .lightning_model import Cse
from .torch_model import CseModel

__all__ = ["Cse", "CseModel"]
