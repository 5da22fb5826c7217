"""What makes a model deployable: exact pre-processing, thresholds, whole checkpoints, export with equal scores."""

from .mixin import DeploymentMixin
from .pre_processing import choose_pre_processor, fixed_size

__all__ = ["DeploymentMixin", "choose_pre_processor", "fixed_size"]
