"""Centres of defect-free images (Section 3.5)."""

import torch
from sklearn.cluster import KMeans
from torch import Tensor


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
