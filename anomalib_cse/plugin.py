"""How anomalib comes to know the models: an import hook, installed by a ``.pth`` file, that imports nothing itself.

anomalib has no entry points; it finds models among the imported subclasses of its base classes and the attributes of
its packages. So the hook waits for ``anomalib.models`` and adds the models right after. It runs at every start of the
interpreter, in programs that never heard of anomalib: it may cost nothing and must not fail.
"""

import sys

OLDEST = (2, 7)  # 2.6 has no plugin for checkpoints
PACKAGES = {
    "anomalib.models": {"Cse": "anomalib_cse.cse", "CseGaussian": "anomalib_cse.cse_gaussian"},
    "anomalib.data": {"MVTec": "anomalib_cse.data", "SurfaceDemo": "anomalib_cse.data"},
}
WAITING: dict = {}  # names of rooms, in order


class RegistrationFinder:
    """Finds nothing itself; has what the other finders find registered after its import."""

    @staticmethod
    def find_spec(name, path=None, target=None):  # noqa: ANN001, ANN205  annotations would be the first import
        """Return the specification of one of :data:`PACKAGES`, whose execution ends with :func:`register`."""
        if name not in PACKAGES:
            return None
        for finder in sys.meta_path:
            spec = None if finder is RegistrationFinder else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader.exec_module = lambda module, execute=spec.loader.exec_module: (
                    execute(module),
                    register(module),
                )
                return spec
        return None


def require_anomalib() -> None:
    """Refuse an anomalib that is too old, whose lack of this or that would tell nobody what to do.

    Raises:
        ImportError: If it is older than :data:`OLDEST`.
    """
    from importlib.metadata import version

    from packaging.version import Version

    found = version("anomalib")
    if Version(found).release < OLDEST:
        msg = (
            f"anomalib-cse needs anomalib {'.'.join(map(str, OLDEST))} or newer, found {found}: pip install -U anomalib"
        )
        raise ImportError(msg)


def register(package) -> None:  # noqa: ANN001
    """Add to one of :data:`PACKAGES` what it lacks.

    The names become attributes that are imported on demand, since this may run in the middle of importing them; the
    import below then puts the classes among the subclasses in which anomalib's command line looks.
    """
    from importlib import import_module

    modules = {name: module for name, module in PACKAGES[package.__name__].items() if not hasattr(package, name)}
    own = vars(package).get("__getattr__")

    def __getattr__(name):  # noqa: ANN001, ANN202, N807
        if name in modules:
            return getattr(import_module(modules[name]), name)
        if own is not None:
            return own(name)
        msg = f"module {package.__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)

    package.__getattr__ = __getattr__
    import_rooms(*modules.values())


def import_rooms(*names) -> None:  # noqa: ANN002
    """Import rooms of this package by their names; if one that they need is being imported, at the end of that.

    A room that is the first to be imported imports anomalib, whose end this is called at.
    """
    from importlib import import_module

    try:
        require_anomalib()
        for name in names:
            import_module(name)
    except Exception as error:  # noqa: BLE001  whatever ails this plugin, anomalib must still work
        if isinstance(error, ImportError) and is_importing():
            WAITING.update(dict.fromkeys(names))
            return
        import warnings

        warnings.warn(f"anomalib-cse cannot be registered with this anomalib: {error!r}", stacklevel=2)


def is_importing() -> bool:
    """Whether a room of this package has begun to be imported: all end their imports with ``__all__``."""
    package = __name__.rpartition(".")[0]
    rooms = [m for name, m in sys.modules.items() if name.rpartition(".")[0] == package and hasattr(m, "__path__")]
    return any(not hasattr(room, "__all__") for room in rooms)


def import_waiting() -> None:
    """Import the rooms that waited for one to be imported, which calls this at its end."""
    names = list(WAITING)
    WAITING.clear()
    import_rooms(*names)


def install() -> None:
    """Wait for anomalib, or register at once with what of it is already imported."""
    if RegistrationFinder in sys.meta_path:
        return
    sys.meta_path.insert(0, RegistrationFinder)
    for name in PACKAGES:
        if name in sys.modules:
            register(sys.modules[name])
