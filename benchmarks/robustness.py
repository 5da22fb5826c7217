"""What models make of images as another day, lamp, lens or camera gives them. Run by ``make bench-robustness``.

Every model is fitted once to a category, and scores its test images as they are and changed in the ways of ``KINDS``.
An image is changed at the network's resolution: after the model's own Resize, in [0, 1], before it is cropped or
normalised. So blur and noise are of pixels that the network sees, which are fewer than the camera's. The random
numbers depend on ``--seed``, the kind and the image's place among the test images alone, so all models get the same
images, in batches of any size. Scores are raw, as no threshold is needed: that of the rejects is the score that
``SHARE`` of the good images do not exceed as they are. The models stand in a YAML file; see ``configs/compare``.
"""

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from anomalib.data import AnomalibDataset
from anomalib.models import AnomalibModule
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Generator, Tensor
from torch.nn.functional import affine_grid, grid_sample
from torchvision.transforms.v2 import Resize, Transform
from torchvision.transforms.v2.functional import adjust_sharpness, gaussian_blur

from anomalib_cse.synthesis import generator_for

from cells import KEY, Cell, cells_parser, parse_cells, run_cells
from common import Row, aupro, hardware, markdown, peak_memory
from report import not_run, rejects, shared

MODELS = ["CseGaussian", "Cse", "MHPatchcore", "Patchcore", "Patchcore, strides 16 and 32", "Padim"]
SHARE = 0.95  # of the good images, as they are, that are accepted
BATCH = 2  # images to score at once: more are slower on a processor

Change = tuple[str, float]  # a kind and its strength, by which its amplitudes are multiplied
CLEAN: Change = ("clean", 0)
MIXED: list[Change] = [CLEAN, ("light", 1), ("noise", 1), ("blur", 1)]  # whose images are taken together
DRAWN = {  # kinds in the picture: what it calls their amplitudes, and how large they are
    "light": ("light: largest change, %", 20),
    "noise": ("noise: deviation, of 255 grey values", 5.1),
    "blur": ("blur: largest deviation, pixels", 1.2),
}


def between(rng: Generator, count: int) -> Tensor:
    """Return so many numbers, uniform from -1 to 1."""
    return 2 * torch.rand(count, generator=rng) - 1


def lit(image: Tensor, brightness: float, contrast: float, slope: float) -> Tensor:
    """Return an image ``(3, H, W)`` times its brightness, with contrast about its mean, then brighter to the right.

    The slope is the factor at the right edge; at the left edge it is as far from 1 on the other side.
    """
    image = (image * brightness).clamp(0, 1)
    image = ((image - image.mean()) * contrast + image.mean()).clamp(0, 1)
    return image * (1 + torch.linspace(-1, 1, image.shape[-1]) * (slope - 1))


def light(image: Tensor, strength: float, rng: Generator) -> Tensor:
    """Change brightness, contrast and a slope from left to right, each by a factor within 20 % of 1."""
    return lit(image, *(1 + 0.2 * strength * between(rng, 3)).tolist())


def noise(image: Tensor, strength: float, rng: Generator) -> Tensor:
    """Add a sensor's Gaussian noise, independent for pixels and channels, of 5 of 255 grey values."""
    return image + 0.02 * strength * torch.randn(image.shape, generator=rng)


def blur(image: Tensor, strength: float, rng: Generator) -> Tensor:
    """Blur by a Gaussian with a standard deviation of 0.3 to 1.2 pixels."""
    return gaussian_blur(image, [7, 7], [strength * (0.75 + 0.45 * between(rng, 1).item())])


def gamma(image: Tensor, strength: float, rng: Generator) -> Tensor:
    """Raise grey values to a power of 0.8 to 1.25, whose logarithm is uniform."""
    return image ** (1.25 ** (strength * between(rng, 1).item()))


def cast(image: Tensor, strength: float, rng: Generator) -> Tensor:
    """Multiply each colour channel by a factor within 10 % of 1."""
    return image * (1 + 0.1 * strength * between(rng, 3)).view(3, 1, 1)


def compress(image: Tensor, strength: float, _: Generator) -> Tensor:
    """Write a JPEG of quality 50, with less strength of a higher one, and read it."""
    file = BytesIO()
    pixels = (255 * image).round().to(torch.uint8).movedim(0, -1)
    Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=round(100 - 50 * strength))
    return torch.from_numpy(np.array(Image.open(file))).movedim(-1, 0) / 255


def move(image: Tensor, strength: float, rng: Generator) -> Tensor:
    """Scale by 3 %, rotate by 3 degrees and shift by 3 % of the sides, at most; borders are reflected."""
    scale, angle, right, down = (strength * between(rng, 4)).tolist()
    return placed(image, 1 + 0.03 * scale, 3 * angle, 0.03 * right, 0.03 * down)


def placed(image: Tensor, scale: float, degrees: float, right: float, down: float) -> Tensor:
    """Return an image enlarged and turned clockwise about its middle, then shifted by shares of its sides."""
    height, width = image.shape[-2:]
    angle = torch.tensor(degrees).deg2rad()
    pixels = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()]).view(2, 2) / scale  # of the inverse
    half = torch.tensor([width, height]) / 2
    turn = pixels * half / half[:, None]  # in halves of the sides, as the grid counts
    theta = torch.cat([turn, -turn @ (2.0 * torch.tensor([[right], [down]]))], dim=1)
    grid = affine_grid(theta[None], [1, *image.shape], align_corners=False)
    return grid_sample(image[None], grid, padding_mode="reflection", align_corners=False)[0]


def sharpen(image: Tensor, strength: float, _: Generator) -> Tensor:
    """Add to an image what smoothing it takes away: torchvision's factor is 2."""
    return adjust_sharpness(image, 1 + strength)


# What an image ``(3, H, W)`` in [0, 1] becomes, by a strength and a generator.
KINDS: dict[str, Callable[[Tensor, float, Generator], Tensor]] = {
    "light": light,
    "noise": noise,
    "blur": blur,
    "gamma": gamma,
    "cast": cast,
    "jpeg": compress,
    "geometry": move,
    "sharpen": sharpen,
}


def changed(image: Tensor, change: Change, seed: int, place: int) -> Tensor:
    """Return a test image ``(3, H, W)`` as it is changed; the random numbers are those of any other strength."""
    kind, strength = change
    if not strength:
        return image
    return KINDS[kind](image, strength, generator_for(seed, zlib.crc32(kind.encode()), place)).clamp(0, 1)


def changes_of(strengths: Sequence[float]) -> list[Change]:
    """Return all that is measured: images as they are, all kinds, and those in the picture with other strengths too."""
    return [CLEAN, *((kind, 1) for kind in KINDS), *((kind, s) for kind in DRAWN for s in strengths if s != 1)]


def column(figure: str, change: Change) -> str:
    """Return what ``results.csv`` calls a figure of a change."""
    kind, strength = change
    return f"{figure}_{kind}" if change == CLEAN or strength == 1 else f"{figure}_{kind}_{strength:g}"


def steps(model: AnomalibModule) -> tuple[list[Transform], list[Transform]]:
    """Return a model's transforms up to its last Resize, and those after it."""
    transform = getattr(model.pre_processor, "transform", None)
    transforms = list(getattr(transform, "transforms", [transform] if transform else []))
    resized = max((place for place, t in enumerate(transforms, start=1) if isinstance(t, Resize)), default=0)
    return transforms[:resized], transforms[resized:]


def applied(transforms: Sequence[Transform], image: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return an image, and its mask if it has one, as transforms leave them."""
    for transform in transforms:
        image, mask = transform(image, mask)
    return image, mask


@torch.no_grad()
def scores(
    model: AnomalibModule, data: AnomalibDataset, changes: Sequence[Change], seed: int, batch: int = BATCH
) -> tuple[dict[Change, NDArray[np.float64]], float]:
    """Return the raw scores of a dataset's images under each change, and AUPRO as they are, NaN without masks."""
    resizes, rest = steps(model.eval())
    found: dict[Change, list[Tensor]] = {change: [] for change in changes}
    maps, masks = [], []
    for first in range(0, len(data), batch):
        places = range(first, min(first + batch, len(data)))
        read = [data[place] for place in places]
        items = [applied(resizes, item.image, item.gt_mask) for item in read]
        masks += [applied(rest, *item)[1] for item in items]
        for change in changes:
            images = [
                changed(image.as_subclass(Tensor), change, seed, place)
                for place, (image, _) in zip(places, items, strict=True)
            ]
            output = model.model(torch.stack([applied(rest, image, None)[0] for image in images]))
            # of a model that gives no scores the highest of each map, as anomalib does
            score = output.anomaly_map.flatten(1).amax(dim=1) if output.pred_score is None else output.pred_score
            found[change].append(score.flatten())
            if change == CLEAN:
                maps.append(output.anomaly_map.reshape(len(images), *output.anomaly_map.shape[-2:]))
    overlap = np.nan if None in masks else aupro(torch.cat(maps).numpy(), torch.stack(masks).bool().numpy())
    return {change: torch.cat(parts).double().numpy() for change, parts in found.items()}, overlap


def accuracies(found: Mapping[Change, NDArray[np.float64]], defective: NDArray[np.bool_]) -> Row:
    """Return image AUROC of each change and of ``MIXED``, and shares of good images above the clean ones' quantile."""
    limit = np.quantile(found[CLEAN][~defective], SHARE)
    aurocs = {column("AUROC", change): float(roc_auc_score(defective, s)) for change, s in found.items()}
    rejected = {column("rejected", change): float((s[~defective] > limit).mean()) for change, s in found.items()}
    mixed = np.concatenate([found[change] for change in MIXED])
    return {**aurocs, "mixed": float(roc_auc_score(np.tile(defective, len(MIXED)), mixed)), **rejected}


def measure(cell: Cell, changes: Sequence[Change]) -> Row:
    """Fit a model, and score the test images under each change."""
    with TemporaryDirectory() as folder:
        model, images, seconds = cell.fit(folder, "cpu", evaluator=False, post_processor=False, visualizer=False)
    images.setup(TrainerFn.TESTING)
    start = time.perf_counter()
    found, overlap = scores(model, images.test_data, changes, cell.seed)
    costs = {"fit_s": seconds, "score_s": time.perf_counter() - start, "peak_MB": peak_memory()}
    return {**accuracies(found, images.test_data.samples["label_index"].to_numpy() == 1), "AUPRO": overlap, **costs}


def columns_of(changes: Sequence[Change]) -> list[str]:
    """Return the columns of ``results.csv``."""
    aurocs, rejected = ([column(figure, change) for change in changes] for figure in ("AUROC", "rejected"))
    costs = ["fit_s", "score_s", "peak_MB"]
    return [*KEY, "deviations", *aurocs, "mixed", *rejected, "AUPRO", *costs, "failed", "settings"]


def table(lines: pd.DataFrame) -> str:
    """Return Markdown tables: means over the sets that all models have, and each set's AUROC of the mixed images."""
    done = lines[lines["failed"] == ""]
    means = shared(done).groupby("model", sort=False).mean(numeric_only=True)
    sets = ", ".join(dict.fromkeys(shared(done)["category"])) or "no set that all models have"
    kinds = [kind for kind, _ in changes_of([])]
    others = {"mixed": "mixed", "AUPRO": "AUPRO", "fit_s": "fit s"}
    aurocs = means.rename(columns={f"AUROC_{kind}": kind for kind in kinds} | others)[[*kinds, *others.values()]]
    rejected = 100 * means.rename(columns={f"rejected_{kind}": kind for kind in kinds})[kinds]
    mixed = done.pivot_table(index="model", columns="category", values="mixed", sort=False)
    parts = {
        f"Image AUROC, mean of {sets}": aurocs,
        f"Good images rejected, %, mean of {sets}": rejected,
        f"Image AUROC of {', '.join(kind for kind, _ in MIXED)} taken together": mixed,
    }
    return "\n\n".join(f"### {title}\n\n{markdown(of_rows(part))}" for title, part in parts.items() if len(part))


def of_rows(table: pd.DataFrame) -> list[dict[str, str | float]]:
    """Return a table's rows with the model first; what is missing is empty."""
    return table.astype(object).where(table.notna(), "").reset_index().to_dict("records")


def curves(lines: pd.DataFrame, strengths: Sequence[float]) -> dict[str, tuple[list[float], pd.DataFrame]]:
    """Return, by the label of each kind in ``DRAWN``, amplitudes and per cents of good images rejected, by model."""
    means = 100 * shared(lines[lines["failed"] == ""]).groupby("model", sort=False).mean(numeric_only=True)
    return {
        label: (
            [0, *(amplitude * strength for strength in strengths)],
            means[[column("rejected", change) for change in (CLEAN, *((kind, s) for s in strengths))]],
        )
        for kind, (label, amplitude) in DRAWN.items()
    }


def main(arguments: list[str] | None = None) -> None:
    """Run what is to be run; write the tables and the picture of all that has been."""
    parser = cells_parser(__doc__, MODELS)
    shares = "of the changes in the picture, as shares of their amplitudes; 1 is always measured"
    parser.add_argument("--strengths", nargs="+", type=float, default=[0.25, 0.5, 1], help=shares)
    parser.add_argument("--seed", type=int, default=0, help="of the fit and of the changes")
    parser.add_argument("--output", type=Path, default=Path("results/robustness"))
    options = parse_cells(parser, arguments)
    if min(options.strengths) <= 0 or max(options.strengths) > 1:
        parser.error(f"--strengths must be above 0 and at most 1, got {' '.join(map(str, options.strengths))}")
    options.seeds, strengths = [options.seed], sorted({*options.strengths, 1})
    changes = changes_of(strengths)
    lines = run_cells(
        options,
        columns_of(changes),
        lambda cell: partial(measure, cell, changes),
        lambda row: f"mixed {row['mixed']:.3f}, fit {row['fit_s']:.0f} s, scores {row['score_s']:.0f} s",
    )
    text = f"{table(lines)}\n\n{not_run(lines)}seed {options.seed}\n\n{hardware()}\n"
    (options.output / "table.md").write_text(text)
    rejects(curves(lines, strengths), options.output / "rejected.png")
    print(text)


if __name__ == "__main__":
    main()
