"""What other embeddings, covariances and distances are worth in CseGaussian's place. Run by ``make bench-embeddings``.

A variant changes one part of the fit; all else is the package's. Directions: of least variance, of largest, at random,
or all, whitened and all alike. Sums: without the training images that cross-validation scores highest, or of the
vectors that scikit-learn's minimum covariance determinant keeps; these, and the fit as it is, also with a share of
defective training images. Distances: to the nearest training vectors in the embedding. A tenth as many defective images
as there are training images is set apart for that; all others test every variant.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from anomalib.data import ImageBatch, MVTecAD
from lightning.pytorch.trainer.states import TrainerFn
from sklearn.covariance import MinCovDet
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from torch import Generator, Tensor
from torch.utils.data import DataLoader

from anomalib_cse import CseGaussian, CseGaussianModel
from anomalib_cse.cse_gaussian import fit as package
from anomalib_cse.cse_gaussian.folds import unseen_scores
from anomalib_cse.cse_gaussian.lightning_model import SAMPLED, TEXTURES, TEXTURES_READ
from anomalib_cse.cse_gaussian.moments import RIDGE, Moments, inverse_root
from anomalib_cse.cse_gaussian.sample import BATCH, Seen, TrainingSample
from anomalib_cse.cse_gaussian.torch_model import geometric_mean, image_score
from anomalib_cse.features import fuse, resize
from anomalib_cse.synthesis import AnomalySynthesis, generator_for, textures_from

from common import Row, aupro, hardware, markdown
from contenders import chosen, parser_of

SPOILT, BASIS, BANK, ROBUST = 20, 21, 22, 23  # set apart the random numbers that one seed gives; the package has others
SHARES, TRIMMED = (0.0, 0.05, 0.1), 0.1  # of the training images: defective ones, those that are left out
ROBUST_VECTORS = 500  # of a layer: scikit-learn takes half a minute for 2000 with 112 channels
NEIGHBOURS = 1, 3
BANKED, MOST_BANKED, SCALED_BY = 0.1, 10_000, 48  # vectors of a layer to find them among, images to scale by

Embed = Callable[[CseGaussianModel, Sequence[Moments], Sequence[Moments]], list[Tensor]]  # as fit_directions


class Images(NamedTuple):
    """N images ``(N, 3, H, W)``, features of each layer ``(N, C, h, w)``, whether and where they are defective."""

    images: Tensor
    features: list[Tensor]
    labels: Tensor
    masks: Tensor

    def at(self, places: Tensor) -> "Images":
        """Return some of the images."""
        return Images(self.images[places], [f[places] for f in self.features], self.labels[places], self.masks[places])

    def batches(self) -> Iterator[Seen]:
        """Give images and features in batches."""
        parts = zip(*(values.split(BATCH) for values in (self.images, *self.features)), strict=True)
        return (Seen(images, features) for images, *features in parts)


class Training:
    """Training images as a fit sees them: sampled, and some of them with synthetic defects."""

    def __init__(self, model: CseGaussianModel, synthesis: AnomalySynthesis, shown: Images, seed: int) -> None:
        self.model, self.synthesis, self.shown, self.seed = model, synthesis, shown, seed
        self.sample = TrainingSample(2**30, generator_for(seed, SAMPLED, 0))
        for places in torch.arange(len(shown.images)).split(BATCH):
            paths = [str(place) for place in places.tolist()]
            self.sample.add(shown.images[places], [f[places] for f in shown.features], paths)
        count = -(-min(max(self.sample.count, package.FEWEST_CORRUPTED), package.MOST_CORRUPTED) // 2)
        some, others = self.sample.halves
        self.corrupted = [list(package.corrupted_features(model, h, synthesis, count, seed)) for h in (some, others)]
        self.defects = package.defect_moments(chain(*self.corrupted), some.moments)
        self.moments = [a + b for a, b in zip(some.moments, others.moments, strict=True)]

    def embedded(self, embed: Embed) -> tuple[CseGaussianModel, list[Tensor]]:
        """Return a copy of the model with directions alone, and what deviations along them say."""
        model = copy.deepcopy(self.model, {id(self.model.backbone): self.model.backbone})
        model.image_size.copy_(torch.tensor(self.shown.images.shape[-2:]))
        return model, embed(model, [m.pooled() for m in self.moments], package.over_folds(self.defects))

    def fit(self, embed: Embed = package.fit_directions) -> tuple[CseGaussianModel, package.Fit]:
        """Fit a copy of the model as the package's ``fit`` does, but for the choice of directions."""
        model, factors = self.embedded(embed)
        return model, package.Fit(self.defects, package.fit_covariances(model, self.sample, factors, self.corrupted[1]))

    def trimmed(self) -> "Training":
        """Return the images but for the share that fits without them score highest."""
        model, fitted = self.fit()
        unseen = unseen_scores(model, copy.deepcopy(self.sample), fitted)  # which uses up sums
        kept = unseen.images.argsort()[: len(unseen.paths) - round(TRIMMED * len(unseen.paths))]
        places = torch.tensor(sorted(int(unseen.paths[place]) for place in kept))
        return Training(self.model, self.synthesis, self.shown.at(places), self.seed)


CHOICES: dict[str, Callable[[Tensor, int, Generator], Tensor]] = {
    "directions of least variance": lambda vectors, dim, _: vectors[:, :dim],
    "directions at random": lambda vectors, dim, generator: (
        torch.linalg.qr(torch.randn(len(vectors), dim, generator=generator, dtype=vectors.dtype)).Q
    ),
    "directions of largest variance": lambda vectors, dim, _: vectors[:, -dim:],
    "all directions": lambda vectors, *_: vectors,
}


def whitened(choose: Callable[[Tensor, int, Generator], Tensor], generator: Generator) -> Embed:
    """Return a choice of directions, all alike: what spans a basis, chosen of eigenvectors, the least first."""

    def embed(model: CseGaussianModel, background: Sequence[Moments], _: Sequence[Moments]) -> list[Tensor]:
        factors = []
        for gaussian, clean in zip(model.maps, background, strict=True):
            covariance = clean.about(clean.mean)
            covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance)).to(covariance)
            basis = choose(torch.linalg.eigh(covariance).eigenvectors, gaussian.directions.shape[1], generator)
            gaussian.set("directions", basis @ inverse_root(basis.mT @ covariance @ basis))
            gaussian.set("mean", clean.mean)
            factors.append(basis.new_ones(basis.shape[1]))
        return factors

    return embed


def robust(shown: Images, seed: int) -> Embed:
    """Return the package's choice of directions, by vectors that a minimum covariance determinant keeps."""

    def embed(model: CseGaussianModel, background: Sequence[Moments], defects: Sequence[Moments]) -> list[Tensor]:
        kept = [Moments(m.first.shape[-1]) for m in background]
        for moments, features in zip(kept, shown.features, strict=True):
            vectors = drawn(features.movedim(1, -1).flatten(0, 2), ROBUST_VECTORS, seed, ROBUST)
            found = MinCovDet(support_fraction=1 - TRIMMED, random_state=seed).fit(vectors.double().numpy())
            moments.add(vectors[torch.from_numpy(found.support_)])
        return package.fit_directions(model, kept, defects)

    return embed


def drawn(vectors: Tensor, count: int, *numbers: int) -> Tensor:
    """Draw so many of the vectors ``(N, C)``; the numbers decide."""
    return vectors[torch.randperm(len(vectors), generator=generator_for(*numbers))[:count]]


def neighbour_maps(training: Training, test: Images) -> dict[int, Tensor]:
    """Return joint maps ``(N, 1, h, w)`` of the mean distance to so many nearest training vectors in the embedding.

    A tenth of what the scale of rows and columns comes from are their own neighbours: that only multiplies the map.
    """
    model, factors = training.embedded(package.fit_directions)
    package.fit_common(model, factors, training.shown.batches())  # for the layers' weights
    layers: dict[int, list[Tensor]] = {count: [] for count in NEIGHBOURS}
    for layer, gaussian in enumerate(model.maps):
        matrix, mean = gaussian.directions @ gaussian.roots, gaussian.mean
        shown, tested = ((i.features[layer].movedim(1, -1) - mean) @ matrix for i in (training.shown, test))
        most = min(MOST_BANKED, round(BANKED * shown[..., 0].numel()))
        bank = drawn(shown.flatten(0, 2), most, training.seed, BANK, layer)
        search = NearestNeighbors(n_neighbors=max(NEIGHBOURS), algorithm="brute").fit(bank.numpy())
        usual, found = (
            torch.from_numpy(search.kneighbors(points.flatten(0, 2).numpy())[0]).view(*points.shape[:3], -1)
            for points in (shown[:SCALED_BY], tested)
        )
        for count, maps in layers.items():
            total = usual[..., :count].mean(dim=-1).sum(dim=0)
            scale = package.of_rows_and_columns(total, torch.full_like(total, len(usual)))
            maps.append((found[..., :count].mean(dim=-1) / scale)[:, None])
    return {count: geometric_mean(fuse(maps), model.layer_weights) for count, maps in layers.items()}


def variants(of_share: Callable[[float], Training], test: Images, seed: int) -> Iterator[tuple[str, float, Tensor]]:
    """Give each variant's name, the share of defective training images, and the test images' joint maps."""

    def maps(fitted: tuple[CseGaussianModel, package.Fit]) -> Tensor:
        return torch.cat([fitted[0].joint_distances(seen.features) for seen in test.batches()])

    for share, training in zip(SHARES, map(of_share, SHARES), strict=True):
        yield "as it is", share, maps(training.fit())
        yield "sums without 10 % of the images", share, maps(training.trimmed().fit())
        yield "minimum covariance determinant", share, maps(training.fit(robust(training.shown, seed)))
        if share:
            continue
        rng = generator_for(seed, BASIS)
        yield from ((name, share, maps(training.fit(whitened(choose, rng)))) for name, choose in CHOICES.items())
        yield from ((f"nearest neighbours, {k}", share, joint) for k, joint in neighbour_maps(training, test).items())


def accuracy(joint: Tensor, test: Images) -> Row:
    """Return image AUROC and AUPRO of joint maps ``(N, 1, h, w)``."""
    maps = resize(joint, test.images.shape[-2:])[:, 0].numpy()
    auroc = float(roc_auc_score(test.labels, image_score(joint)))
    return {"image AUROC": auroc, "AUPRO": aupro(maps, test.masks.numpy())}


def read(model: CseGaussian, dataset: Path) -> tuple[Images, int]:
    """Return all images of a dataset in MVTec AD's layout as the model sees them, and how many come first to train."""
    files = MVTecAD(root=dataset.parent, category=dataset.name, num_workers=0)
    files.setup(TrainerFn.FITTING)
    loaders = [DataLoader(data, collate_fn=ImageBatch.collate) for data in (files.train_data, files.test_data)]
    parts = [(*model.pre_processor.transform(batch.image, batch.gt_mask), batch.gt_label) for batch in chain(*loaders)]
    images, masks, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    features = [model.model.smoothed_features(part) for part in images.split(BATCH)]
    return Images(images, [torch.cat(f) for f in zip(*features, strict=True)], labels, masks), len(files.train_data)


def measure(model: CseGaussian, every: Images, count: int, seed: int) -> Iterator[Row]:
    """Give a row for each variant and share; the first ``count`` of all images are to train."""
    textures = textures_from(model.hparams["dtd_dir"], generator_for(seed, TEXTURES), TEXTURES_READ)
    synthesis = AnomalySynthesis(textures, kinds=model.hparams["defects"])
    spoilt = drawn(every.labels.nonzero()[:, 0], round(max(SHARES) * count), seed, SPOILT, 0)
    places = drawn(torch.arange(count), len(spoilt), seed, SPOILT, 1)

    def of_share(share: float) -> Training:
        numbers, replaced = torch.arange(count), round(share * count)
        numbers[places[:replaced]] = spoilt[:replaced]
        return Training(model.model, synthesis, every.at(numbers), seed)

    rest = torch.arange(count, len(every.images))
    test = every.at(rest[~torch.isin(rest, spoilt)])
    for name, share, joint in variants(of_share, test, seed):
        yield {"variant": name, "defective %": 100 * share, **accuracy(joint, test)}


def table(lines: pd.DataFrame) -> str:
    """Return a table of means over seeds, image AUROC / AUPRO in per cent, of each set and of all."""
    keys = ["variant", "defective %"]
    means = 100 * lines.groupby([*keys, "category"], sort=False)[["image AUROC", "AUPRO"]].mean()
    rows = []
    for (variant, share), found in means.groupby(keys, sort=False):
        sets = found.droplevel(keys)
        sets.loc["mean"] = sets.mean()
        figures = {name: f"{auroc:.1f} / {pro:.1f}" for name, (auroc, pro) in sets.iterrows()}
        rows.append({"variant": variant, "defective %": f"{share:g}", **figures})
    return markdown(rows)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Measure, write a line for each variant, set and seed, and print means over seeds as a table."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="CseGaussian", help="name of the list, a CseGaussian")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("results/embeddings"))
    options = parser.parse_args(arguments)
    [contender] = chosen(parser, options.config, [options.model])
    options.output.mkdir(parents=True, exist_ok=True)
    lines = []
    for category in options.categories:
        model = contender.build(options.seeds[0], evaluator=False, visualizer=False).eval()
        images = read(model, options.root / category)
        for seed in options.seeds:
            for row in measure(model, *images, seed):
                lines.append({"category": category, "seed": seed, **row})
                print(lines[-1], flush=True)
            pd.DataFrame(lines).to_csv(options.output / "results.csv", index=False)
    note = f"{contender.name}, {contender.note}; seeds {', '.join(map(str, options.seeds))}"
    text = f"{table(pd.DataFrame(lines))}\n\n{note}\n\n{hardware()}\n"
    (options.output / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
