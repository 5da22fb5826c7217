"""How anomalib comes to know Cse: an import hook, installed by a ``.pth`` file, that imports nothing itself.

anomalib has no entry points; it finds models among the imported subclasses of its base classes and the attributes of
its packages. So the hook waits for ``anomalib.models`` and adds Cse right after. It runs at every start of the
interpreter, in programs that never heard of anomalib: it may cost nothing and must not fail.
"""

import sys

OLDEST = (2, 7)  # 2.6 has no plugin for checkpoints
CLI = "anomalib.cli.cli"
PACKAGES = {
    "anomalib.models": {"Cse": "anomalib_cse.lightning_model"},
    "anomalib.data": {"MVTec": "anomalib_cse.datamodules", "SurfaceDemo": "anomalib_cse.demo"},
}


class RegistrationFinder:
    """Finds nothing itself; has what the other finders find registered after its import."""

    @staticmethod
    def find_spec(name, path=None, target=None):  # noqa: ANN001, ANN205  annotations would be the first import
        """The specification of one of :data:`PACKAGES` or the command line, whose execution ends with ours."""
        if name not in PACKAGES and name != CLI:
            return None
        then = honour_seed if name == CLI else register
        for finder in sys.meta_path:
            spec = None if finder is RegistrationFinder else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader.exec_module = lambda module, execute=spec.loader.exec_module: (
                    execute(module),
                    then(module),
                )
                return spec
        return None


def require_anomalib() -> None:
    """Refuse an anomalib that is too old, whose lack of this or that would tell nobody what to do.

    Raises:
        ImportError: If it is older than :data:`OLDEST`.
    """
    from importlib.metadata import version

    found = version("anomalib")
    if tuple(map(int, found.split(".")[:2])) < OLDEST:
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

    def __getattr__(name):  # noqa: ANN001, ANN202, N807
        if name in modules:
            return getattr(import_module(modules[name]), name)
        msg = f"module {package.__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)

    package.__getattr__ = __getattr__
    try:
        require_anomalib()
        for module in modules.values():
            import_module(module)
    except Exception as error:  # noqa: BLE001  whatever ails this plugin, anomalib must still work
        import warnings

        warnings.warn(f"anomalib-cse cannot be registered with this anomalib: {error!r}", stacklevel=2)


def plain_refusal(config, message):  # noqa: ANN001, ANN201
    """The error of one of our constructors, which jsonargparse buries among all arguments in a ``message`` of its own.

    Nothing, if it was not one of ours that failed.
    """
    from importlib import import_module

    for part in map(config.get, ("model", "data")):  # the data of predict are a path
        module, _, name = getattr(part, "class_path", "").rpartition(".")
        if module.partition(".")[0] == "anomalib_cse":
            given = part.get("init_args")
            try:
                getattr(import_module(module), name)(**(given.as_dict() if given else {}))
            except Exception as error:  # noqa: BLE001  whatever it is, it is what the user has to know
                first_line = str(error).partition("\n")[0]
                if first_line and first_line in message:
                    return error.with_traceback(None)
    return None


def honour_seed(module) -> None:  # noqa: ANN001
    """Have ``--seed_everything N`` do for Cse what its help says; anomalib 2.7 accepts it and does nothing with it."""
    instantiate_classes = getattr(getattr(module, "AnomalibCLI", None), "instantiate_classes", None)
    if instantiate_classes is None:  # another anomalib, whose command line must still work
        return

    def seeded(self) -> None:  # noqa: ANN001
        config = self.config.get(self.config["subcommand"]) or {}
        seed, model = config.get("seed_everything"), config.get("model")
        if type(seed) is int and model and model.class_path.rpartition(".")[2] == "Cse":
            from lightning import seed_everything

            seed_everything(seed)
        try:
            instantiate_classes(self)
        except ValueError as error:
            raise plain_refusal(config, str(error)) or error from None

    module.AnomalibCLI.instantiate_classes = seeded


def install() -> None:
    """Wait for anomalib, or register at once with what of it is already imported."""
    if RegistrationFinder in sys.meta_path:
        return
    sys.meta_path.insert(0, RegistrationFinder)
    for name in PACKAGES:
        if name in sys.modules:
            register(sys.modules[name])
    if CLI in sys.modules:
        honour_seed(sys.modules[CLI])
