"""Centres of defect-free images (Section 3.5), and scores of images that had no part in them."""

import copy

import torch
from sklearn.cluster import KMeans
from torch import Tensor
from torch.optim.swa_utils import update_bn
from torch.utils.data import Dataset, Subset

from ..deployment import UnseenScores, extremes
from ..synthesis import Stream, generator_for
from .torch_model import CseModel
from .training_pairs import Pairing, paths_of

MOST_CLUSTERED = 8192  # images for k-means, drawn at random beyond that, so that memory is bounded


def image_centres(embeddings: Tensor, count: int, seed: int) -> Tensor:
    """Cluster images by k-means, each one's whole pooled embedding being one sample (Section 3.5).

    Args:
        embeddings: ``(N, D, h, w)``.
        count: K, how many centres, at most N.
        seed: Decides where k-means begins, in [0, 2^32).

    Returns:
        ``(K, D, h, w)``: the mean map of every cluster.
    """
    kmeans = KMeans(n_clusters=count, n_init=3, random_state=seed).fit(embeddings.flatten(1).cpu().double().numpy())
    return torch.from_numpy(kmeans.cluster_centers_).to(embeddings).view(count, *embeddings.shape[1:])


def fit_centres(model: CseModel, pairing: Pairing, images: Dataset, size: tuple[int, int], seed: int) -> None:
    """Give a model the centres of images, as its embedder has them; K is no more than there are."""
    count = len(images)  # type: ignore[arg-type]
    if count > MOST_CLUSTERED:
        drawn = torch.randperm(count, generator=generator_for(seed, Stream.CLUSTERED))[:MOST_CLUSTERED]
        images = Subset(images, sorted(drawn.tolist()))
    embeddings = torch.cat([model.embed(features) for features in pairing.clean_features(images)])
    model.set_centres(image_centres(embeddings, min(model.num_centres, count), seed), size)


@torch.no_grad()
def unseen_scores(model: CseModel, pairing: Pairing, size: tuple[int, int], seed: int) -> UnseenScores | None:
    """Score the held-out images by a model that has its centres from the others; ``None`` if none are held out.

    The weights stay those of the embedder. BatchNorm averages and centres are computed anew, as the deployed model has
    averages of held-out images and centres of all images.
    """
    if pairing.held_out is None:
        return None
    refitted = copy.deepcopy(model, {id(model.backbone): model.backbone})  # the cache has most features
    update_bn(((pairs.features(),) for pairs in pairing.pairs_like_held_out()), refitted.embedder)
    fit_centres(refitted, pairing, pairing.training, size, seed)
    features = pairing.clean_features(pairing.held_out)
    return UnseenScores.of((extremes(refitted.score(f, size)) for f in features), paths_of(pairing.held_out))
