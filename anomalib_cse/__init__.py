"""CSE, surface anomaly detection with contrastively selected embedding, as a model of anomalib."""

TYPE_CHECKING = False  # not imported: this package is touched at every start of the interpreter
if TYPE_CHECKING:
    from .lightning_model import Cse
    from .synthesis import AnomalySynthesis
    from .torch_model import CseModel

__all__ = ["AnomalySynthesis", "Cse", "CseModel"]

MODULES = {"AnomalySynthesis": "synthesis", "Cse": "lightning_model", "CseModel": "torch_model"}


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for."""
    from importlib import import_module

    from .plugin import require_anomalib

    if name not in MODULES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    require_anomalib()
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)


def __dir__() -> list[str]:
    """The public names."""
    return __all__
