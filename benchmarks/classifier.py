"""The binary classifier that Table 4 compares CSE with: the same features and defects, no contrast and no centres."""

from collections.abc import Sequence

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn
from torch.nn import functional as F

from anomalib_cse import Cse, CseModel
from anomalib_cse.cse.torch_model import Embedder
from anomalib_cse.cse.training_pairs import Pairs
from anomalib_cse.features import pool, resize

OF_THE_NETWORK = ("backbone", "layers", "pre_trained", "weights", "embedding_dim", "pool_size")


class LogitEmbedder(Embedder):
    """Cse's embedder and one more pointwise convolution, to the logit of being corrupted ``(B, 1, H, W)``."""

    def __init__(self, in_channels: int, embedding_dim: int) -> None:
        super().__init__(in_channels, embedding_dim)
        self.append(nn.Conv2d(embedding_dim, 1, kernel_size=1))


class ClassifierModel(CseModel):
    """Scores images by the mean logit of their positions; it has no use for its centres.

    Args:
        arguments: As for :class:`~anomalib_cse.CseModel`.
    """

    def __init__(self, **arguments: object) -> None:
        super().__init__(**arguments)
        self.embedder = LogitEmbedder(sum(self.backbone.channels), self.centres.shape[1])

    def score(self, features: Sequence[Tensor], size: Sequence[int]) -> InferenceBatch:
        """Return probabilities of being corrupted, ``(B,)`` and ``(B, 1, H, W)``."""
        logits = self.embed(features)
        anomaly_map = resize(logits, size).sigmoid()
        return InferenceBatch(pred_score=logits.mean(dim=(1, 2, 3)).sigmoid(), anomaly_map=anomaly_map)


class BinaryClassifier(Cse):
    """Tells clean from corrupted images: the training data, recipe and choice of weights are Cse's.

    Args:
        arguments: Cse's, but for those of the decoder, the centres and the contrastive loss.

    Raises:
        ValueError: If one of those is given.
    """

    model: ClassifierModel

    def __init__(self, **arguments: object) -> None:
        if useless := {"decoder", "num_centres", "contrast_weight"} & arguments.keys():
            msg = f"a binary classifier has no {', '.join(sorted(useless))}"
            raise ValueError(msg)
        super().__init__(**arguments, decoder="none")
        with self.own_random_numbers():
            self.model = ClassifierModel(**{name: self.hparams[name] for name in OF_THE_NETWORK})
            self.embedder = LogitEmbedder(sum(self.backbone.channels), self.hparams["embedding_dim"])
        self.model.requires_grad_(requires_grad=False)
        self.train()

    def pair_loss(self, pairs: Pairs) -> Tensor:
        """Return the binary cross-entropy of both images of every pair, the first ones being clean."""
        logits = pool(self.embedder(pairs.features()), self.model.pool_size).mean(dim=(1, 2, 3))
        targets = torch.cat([torch.zeros_like(pairs.corrupted), pairs.corrupted]).float()
        return F.binary_cross_entropy_with_logits(logits, targets)
