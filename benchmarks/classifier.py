"""The binary classifier that Table 4 compares CSE with: the same features and defects, no contrast and no centres."""

from typing import Any

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn
from torch.nn import functional as F

from anomalib_cse import Cse, CseModel
from anomalib_cse.lightning_model import together
from anomalib_cse.torch_model import Embedder, is_fitted, pool, upsample


class LogitEmbedder(Embedder):
    """Cse's embedder and one more pointwise convolution, to the logit of being corrupted ``(B, 1, H, W)``."""

    def __init__(self, in_channels: int, embedding_dim: int) -> None:
        super().__init__(in_channels, embedding_dim)
        self.append(nn.Sequential(nn.Conv2d(embedding_dim, 1, kernel_size=1)))


class ClassifierModel(nn.Module):
    """Scores images by the mean logit of their positions.

    Args:
        model: The network of Cse, whose features and pooling it takes over.
    """

    centres: Tensor
    simplified = CseModel.simplified

    def __init__(self, model: CseModel) -> None:
        super().__init__()
        self.backbone, self.pool_size = model.backbone, model.pool_size
        self.embedder = LogitEmbedder(sum(model.backbone.channels), model.centres.shape[1])
        self.register_buffer("centres", torch.full((1, 1), torch.nan))  # none; but what is NaN is not fitted

    @property
    def fitted(self) -> bool:
        """Whether training has come to its end."""
        return is_fitted(self.centres)

    def forget(self) -> None:
        """Be as before training."""
        self.centres.fill_(torch.nan)

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score images ``(B, 3, H, W)`` in [0, 1]: probabilities of being corrupted, ``(B,)`` and ``(B, 1, H, W)``."""
        logits = pool(self.embedder(self.backbone(images)), self.pool_size)
        anomaly_map = upsample(logits, images.shape[-2:]).sigmoid()
        return InferenceBatch(pred_score=logits.mean(dim=(1, 2, 3)).sigmoid(), anomaly_map=anomaly_map)


class BinaryClassifier(Cse):
    """Tells clean from corrupted images: the training data, recipe and choice of weights are Cse's.

    Args:
        arguments: Cse's, with the network, but for those of the decoder, the centres and the contrastive loss.

    Raises:
        ValueError: If one of those is given.
    """

    model: ClassifierModel  # type: ignore[assignment]

    def __init__(self, **arguments: Any) -> None:
        if useless := {"embedder", "decoder", "num_centres", "contrast_weight"} & arguments.keys():
            msg = f"a binary classifier has no {', '.join(sorted(useless))}"
            raise ValueError(msg)
        super().__init__(**arguments, embedder="network", decoder="none")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.effective_seed)
            self.embedder = LogitEmbedder(sum(self.model.backbone.channels), self.model.centres.shape[1])
            self.model = ClassifierModel(self.model).requires_grad_(requires_grad=False)
        self.train()

    def pair_loss(self, first: list[Tensor], second: list[Tensor], corrupt: Tensor) -> Tensor:
        """Binary cross-entropy of both images of every pair, the first ones being clean."""
        logits = pool(self.embedder(together(first, second)), self.model.pool_size).mean(dim=(1, 2, 3))
        targets = torch.cat([torch.zeros_like(corrupt), corrupt]).float()
        return F.binary_cross_entropy_with_logits(logits, targets)

    def fit_statistics(self) -> None:
        """There are none, but training is done."""
        self.model.centres.zero_()
