"""Datamodules under the names that users know."""

from pathlib import Path
from typing import Any

from anomalib.data import MVTecAD
from anomalib.data.datasets.image.mvtecad import CATEGORIES

from ..preflight import check_layout


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
