"""Leaving out what a run says that is not true of this package's models, or that its user can do nothing about."""

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

VERBOSE = "ANOMALIB_CSE_VERBOSE"  # in the environment, shows all

OF_MODELS = re.compile(r"Initializing Cse(Gaussian)? model|Overriding num_sanity_val_steps from .* for Cse(Gaussian)?$")
WARNINGS = (
    "`LightningModule.configure_optimizers` returned `None`",  # CseGaussian has no gradients
    "`training_step` returned `None`",
    r"Found \d+ module\(s\) in eval mode at the start of training",  # the backbone is frozen
    "The ``compute`` method of metric .* was called before the ``update`` method",  # thresholds of good images
    "The dirpath has changed from",  # a checkpoint is used elsewhere than where it was saved
    "The '.*' does not have many workers which may be a bottleneck",  # features are kept, images read once
    "'pin_memory' argument is set as true but no accelerator is found",  # anomalib sets it
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    ".*ckpt_path` is not provided",  # the model in memory is to be tested
)
EXPORTERS = ("onnxscript", "onnx_ir")  # what they log of single operations


def is_about_other_things(record: logging.LogRecord) -> bool:
    """Whether a log's line is to be shown: not that a model of this package is made, as its user has asked for it."""
    return bool(os.environ.get(VERBOSE)) or not OF_MODELS.match(record.getMessage())


for name in ("anomalib.models.components.base.anomalib_module", "anomalib.engine.engine"):
    logging.getLogger(name).addFilter(is_about_other_things)


class Silence:
    """No ``WARNINGS`` between ``begin`` and ``end``; ``ANOMALIB_CSE_VERBOSE=1`` in the environment shows them."""

    def __init__(self) -> None:
        self.filters: list[object] = []

    def begin(self) -> None:
        """Ignore them from now on."""
        self.end()
        if os.environ.get(VERBOSE):
            return
        for message in WARNINGS:
            warnings.filterwarnings("ignore", message)
        self.filters = list(warnings.filters[: len(WARNINGS)])

    def end(self) -> None:
        """Have them shown again, as far as others show them."""
        # not catch_warnings, which would undo what others have changed in the meantime
        warnings.filters[:] = [kept for kept in warnings.filters if not any(kept is own for own in self.filters)]  # type: ignore[index]
        self.filters = []


@contextmanager
def quiet_exporters() -> Iterator[bool]:
    """Have exporters log nothing but warnings; gives whether they are to tell what they do."""
    verbose = bool(os.environ.get(VERBOSE))
    loggers = {name: logging.getLogger(name) for name in EXPORTERS}
    levels = {name: logger.level for name, logger in loggers.items()}
    for logger in loggers.values():
        logger.setLevel(logger.level if verbose else logging.WARNING)
    try:
        yield verbose
    finally:
        for name, logger in loggers.items():
            logger.setLevel(levels[name])
