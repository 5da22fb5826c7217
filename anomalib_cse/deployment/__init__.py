"""What makes a model deployable: exact pre-processing, thresholds, whole checkpoints, export with equal scores."""

from ..plugin import import_waiting
from ..preflight import datamodule_of, transform_of
from .checkpoints import WholeCheckpointIO
from .comparison import compare_good_images
from .good_scores import UnseenScores, extremes
from .mixin import DeploymentMixin
from .post_processing import MidwayPostProcessor, choose_post_processor
from .pre_processing import choose_pre_processor, fixed_size

__all__ = [
    "DeploymentMixin",
    "MidwayPostProcessor",
    "UnseenScores",
    "WholeCheckpointIO",
    "choose_post_processor",
    "choose_pre_processor",
    "compare_good_images",
    "datamodule_of",
    "extremes",
    "fixed_size",
    "transform_of",
]

import_waiting()
