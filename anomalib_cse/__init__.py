"""CSE, surface anomaly detection with contrastively selected embedding, as two models of anomalib."""

TYPE_CHECKING = False  # not imported: this package is touched at every start of the interpreter
if TYPE_CHECKING:
    from .cse import Cse, CseModel
    from .cse_gaussian import CseGaussian, CseGaussianModel
    from .synthesis import AnomalySynthesis

__all__ = ["AnomalySynthesis", "Cse", "CseGaussian", "CseGaussianModel", "CseModel"]

ROOMS = {
    "AnomalySynthesis": "synthesis",
    "Cse": "cse",
    "CseModel": "cse",
    "CseGaussian": "cse_gaussian",
    "CseGaussianModel": "cse_gaussian",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for."""
    from importlib import import_module

    from .plugin import require_anomalib

    if name not in ROOMS:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    require_anomalib()
    return getattr(import_module(f"{__name__}.{ROOMS[name]}"), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
