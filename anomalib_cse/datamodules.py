"""Datamodules under the names that users know."""

from anomalib.data import MVTecAD


class MVTec(MVTecAD):
    """MVTec AD under the name it had in anomalib 1, or another dataset in its layout.

    Raises:
        ValueError: On setup, if a kind of defect has not as many masks as images.
    """

    def _setup(self, _stage: str | None = None) -> None:
        category = self.root / self.category
        for images in sorted(path for path in category.glob("test/*") if path.is_dir() and path.name != "good"):
            masks = category / "ground_truth" / images.name
            found = len(list(masks.glob("*")))
            expected = len(list(images.iterdir()))
            if found != expected:
                msg = (
                    f"{images} holds {expected} images and {masks} {found} masks: MVTec AD's layout has one for each, "
                    "NAME_mask.png; anomalib's Folder does without masks"
                )
                raise ValueError(msg)
        super()._setup(_stage)
