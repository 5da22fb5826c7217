"""CSE in closed form: the directions in which synthetic defects stand out, and Gaussian distances along them."""

from .lightning_model import CseGaussian
from .torch_model import CseGaussianModel

__all__ = ["CseGaussian", "CseGaussianModel"]
