"""What the training recipe of the paper asks of its arguments and of a trainer (Section 4.1)."""

from collections.abc import Iterable

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import OneCycleLR

from ..checks import check_number

DECODERS = ("random", "joint", "pretrained", "none")  # Table 5


def check_recipe(decoder: object, contrast_weight: object, learning_rate: object, holdout_ratio: object) -> None:
    """Raise a ``ValueError`` if an argument of the training recipe is outside its range."""
    if decoder not in DECODERS:
        msg = f"decoder must be 'random', 'joint', 'pretrained' or 'none', got {decoder!r}"
        raise ValueError(msg)
    check_number("contrast_weight", contrast_weight, "(0, inf)")
    check_number("learning_rate", learning_rate, "(0, inf)")
    check_number("holdout_ratio", holdout_ratio, "[0, 1)")


def one_cycle(parameters: Iterable[nn.Parameter], rate: float, steps: float) -> OptimizerLRScheduler:
    """Return Adam with a one-cycle schedule over ``steps``, or raise a ``ValueError`` if they have no end."""
    if steps == float("inf"):
        msg = "the one-cycle schedule needs to know its end: set max_epochs or max_steps"
        raise ValueError(msg)
    optimizer = Adam(parameters, lr=rate)
    schedule = OneCycleLR(optimizer, max_lr=rate, total_steps=int(steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def check_end(trainer: Trainer) -> None:
    """Raise a ``ValueError`` if ``max_steps`` are reached before the first epoch that is validated."""
    every = trainer.check_val_every_n_epoch or 1
    epochs = -(-trainer.max_steps * trainer.accumulate_grad_batches // int(trainer.num_training_batches))
    if trainer.enable_validation and 0 < epochs < every:
        msg = (
            f"max_steps {trainer.max_steps} end in epoch {epochs}, and the first to be validated is {every}: set "
            "check_val_every_n_epoch to less, or max_steps to more"
        )
        raise ValueError(msg)
