"""Features of images that never change, kept in memory."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class FeatureCache:
    """Keep the frozen features of images, by path, up to a number of bytes; later images are computed each time.

    Images pass the backbone one by one, so that what is kept does not depend on the batch it came in: a resumed run
    then goes on with the numbers of an uninterrupted one.

    Args:
        budget: Most bytes to keep.
    """

    def __init__(self, budget: int) -> None:
        self.bytes_left = budget
        self.features: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def __call__(
        self, images: Tensor, paths: Sequence[str], extract: Callable[[Tensor], Sequence[Tensor]]
    ) -> list[Tensor]:
        """Return the features, of each layer ``(B, C, h, w)``, that ``extract`` computes of images ``(B, 3, H, W)``.

        Raises:
            ValueError: If features are not finite.
        """
        found = []
        for image, path in zip(images, paths, strict=True):
            features = self.features.get(path) or list(extract(image[None]))
            if path not in self.features:
                self.keep(path, features)
            found.append(features)
        return [torch.cat(layer) for layer in zip(*found, strict=True)]

    def of_paths(self, paths: Sequence[str]) -> list[Tensor]:
        """Return features that are kept, of each layer ``(B, C, h, w)``."""
        return [torch.cat(layer) for layer in zip(*(self.features[path] for path in paths), strict=True)]

    def keep(self, path: str, features: list[Tensor]) -> None:
        """Keep the features of an image, if there is room; raise a ``ValueError`` if they are not finite."""
        if not all(f.isfinite().all() for f in features):
            msg = f"features of {path} are NaN or infinite: so are its pixels, or 16 bits are too few for this backbone"
            raise ValueError(msg)
        size = sum(f.nbytes for f in features)
        if size <= self.bytes_left:
            self.bytes_left -= size
            self.features[path] = features
