"""Datamodules under the names that users know."""

from pathlib import Path
from typing import Any

from anomalib.data import MVTecAD
from anomalib.data.datasets.image.mvtecad import CATEGORIES, IMG_EXTENSIONS
from anomalib.data.utils.path import is_within_directory


class MVTec(MVTecAD):
    """MVTec AD under the name it had in anomalib 1, or another dataset in its layout.

    Args:
        root: Folder of the dataset.
        category: A folder in it.
        train_batch_size: 8, the CSE paper's number (Section 4.1); anomalib's own is 32.
        **kwargs: As for anomalib's ``MVTecAD``.

    Raises:
        ValueError: If there is no such category, a kind of defect has not as many masks as images, or a link
            leads to a folder or to an image outside of the category.
    """

    def __init__(
        self,
        root: Path | str = "./datasets/MVTecAD",
        category: str = "bottle",
        train_batch_size: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, category=category, train_batch_size=train_batch_size, **kwargs)

    def prepare_data(self) -> None:
        """Download MVTec AD if it is one of its categories that is not there."""
        if not (self.root / self.category).is_dir() and self.category not in CATEGORIES:
            there = sorted(path.name for path in self.root.glob("*") if path.is_dir())
            msg = (
                f"category must be a folder of {self.root} ({', '.join(there) or 'which has none'}) or, to download "
                f"it, one of MVTec AD's ({', '.join(CATEGORIES)}), got {self.category!r}"
            )
            raise ValueError(msg)
        super().prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Check that all images are there, and for each defect a mask, then read the folders."""
        check_layout(self.root / self.category)
        super().setup(stage)


def check_layout(category: Path) -> None:
    """Raise a ``ValueError`` if a folder in MVTec AD's layout lacks masks, or has links that anomalib leaves out."""
    for link in filter(Path.is_symlink, category.rglob("*")):
        if link.is_dir() or (link.suffix in IMG_EXTENSIONS and not is_within_directory(category, link)):
            msg = f"{link} leads to {link.resolve()}: anomalib leaves such links out, copy what they lead to"
            raise ValueError(msg)
    folders = [path for part in ("test", "ground_truth") for path in category.glob(f"{part}/*") if path.is_dir()]
    for kind in sorted({path.name for path in folders} - {"good"}):
        images, masks = category / "test" / kind, category / "ground_truth" / kind
        found, expected = (
            sum(file.suffix in IMG_EXTENSIONS for file in folder.glob("*")) for folder in (masks, images)
        )
        if found != expected:
            msg = (
                f"{images} holds {expected} images (.png) and {masks} {found} masks: MVTec AD's layout has one for "
                "each, NAME_mask.png; anomalib's Folder takes other kinds of files, and does without masks"
            )
            raise ValueError(msg)
