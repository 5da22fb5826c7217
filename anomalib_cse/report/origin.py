"""Where a model comes from: the images that it was fitted to, and those that its threshold was set by."""

from collections import Counter
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from anomalib.post_processing import PostProcessor
from lightning.pytorch import Trainer

from ..preflight import datamodule_of, datasets_of, samples_of

KEY = "anomalib_cse_origin"  # in checkpoints


class Origin(NamedTuple):
    """What a checkpoint tells of the images that made it.

    Attributes:
        training: Numbers of training images by their folders.
        validation: Numbers of the images last validated with, by their folders.
        validated: A short mark of each of these, see :func:`mark`.
        has_both: Whether some of these are good and some defective, or it is not known.
    """

    training: Mapping[str, int] = {}
    validation: Mapping[str, int] = {}
    validated: frozenset[str] = frozenset()
    has_both: bool = True

    def noted(self, trainer: Trainer, *, trains: bool) -> "Origin":
        """Return what is known once a trainer's datamodule has been fitted to, or validated with alone."""
        datasets = datasets_of(datamodule_of(trainer))
        training = [sample.image for sample in samples_of(datasets["train"])]
        samples = samples_of(datasets["val"]) if trainer.limit_val_batches else []
        validation = [sample.image for sample in samples]
        return Origin(
            training=folders(training) if trains else self.training,
            validation=folders(validation),
            validated=frozenset(map(mark, validation)),
            has_both=len({sample.is_defect for sample in samples}) != 1,
        )

    def as_plain(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {
            "training": dict(self.training),
            "validation": dict(self.validation),
            "validated": sorted(self.validated),
            "has_both": self.has_both,
        }

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> "Origin":
        """Read what a checkpoint has kept; one of an earlier version has kept nothing."""
        kept = checkpoint.get(KEY, {})
        return cls(**{**kept, "validated": frozenset(kept.get("validated", ()))})


def mark(path: str) -> str:
    """Return a few characters for an image's name, that of its folder, and its size in bytes.

    So images are known again in another place, without their names in the checkpoint.
    """
    file = Path(path)
    size = file.stat().st_size if file.is_file() else 0  # what is missing is an error elsewhere
    name = "/".join((*file.parts[-2:], str(size)))
    return blake2b(name.encode(errors="surrogateescape"), digest_size=6).hexdigest()


def folders(paths: Iterable[str]) -> dict[str, int]:
    """Return how many images lie in each folder."""
    return dict(Counter(str(Path(path).parent) for path in paths))


def listed(counts: Mapping[str, int], most: int = 12) -> str:
    """Return folders and their numbers of images in words, those of one folder together."""
    beside: dict[Path, list[str]] = {}
    for folder, count in list(counts.items())[:most]:
        beside.setdefault(Path(folder).parent, []).append(f"{Path(folder).name} ({count:,})")
    # a single folder as it is, several behind the one that they lie in
    lines = [
        f"{parent / names[0]}" if len(names) == 1 else f"{parent}: {', '.join(names)}"
        for parent, names in beside.items()
    ]
    rest = f"; {len(counts) - most} more folders" if len(counts) > most else ""
    return "; ".join(lines) + rest


def threshold_source(own: object, origin: Origin, tested: Iterable[str | None]) -> tuple[str, str]:
    """Return in a sentence where a post-processor's threshold comes from, and a warning if ``tested`` images gave it.

    The warning is empty if none of them did.
    """
    if not isinstance(own, PostProcessor) or bool(own.image_threshold.isnan()):
        return "There is none: nothing was validated, and no rate of rejects was asked for.", ""
    rate = getattr(own, "rate_in_force", None)
    if rate is not None:
        number = int(own.get_buffer("good_images")[0])
        return (
            f"It is to reject {100 * rate:.3g} % of good images, by scores of {number:,} training images that the fits "
            "to the others gave them. No defect and no test image had a part in it.",
            "",
        )
    number = sum(origin.validation.values())
    where = f" on {number:,} validation images ({listed(origin.validation)})" if number else " on validation images"
    source = f"It gave the best F1{where}."
    if not origin.has_both:
        source = f"It lies at the end of the scores{where}. These are of one kind, so there is no best F1."
    paths = [path for path in tested if path]
    same = sum(mark(path) in origin.validated for path in paths) if origin.validated else 0
    if not same:
        return source, ""
    share = "All" if same == len(paths) else f"{same:,}"
    return source, (
        f"{share} of these {len(paths):,} images set the threshold themselves, by name and size of the files. So fewer "
        "mistakes are to be expected here than among others: judge the threshold by images that had no part in it."
    )
