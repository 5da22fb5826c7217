"""Features of images that never change, kept in memory."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class FeatureCache:
    """Keep the frozen features of images, by path, up to a number of bytes; later images are computed each time.

    Images pass the backbone one by one, so that what is kept does not depend on the batch it came in: a resumed run
    then goes on with the numbers of an uninterrupted one. Only on a GPU, which is slow at that and rounds as it likes,
    are those that find no room computed together.

    Args:
        budget: Most bytes to keep; on a GPU no more than half of what is free there.
        device: Where they are kept.
    """

    def __init__(self, budget: int, device: torch.device | None = None) -> None:
        self.on_gpu = device is not None and device.type == "cuda"
        self.bytes_left = min(budget, torch.cuda.mem_get_info(device)[0] // 2) if self.on_gpu else budget
        self.is_full = False
        self.features: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def __call__(
        self, images: Tensor, paths: Sequence[str], extract: Callable[[Tensor], Sequence[Tensor]]
    ) -> list[Tensor]:
        """Return the features, of each layer ``(B, C, h, w)``, that ``extract`` computes of images ``(B, 3, H, W)``.

        Raises:
            ValueError: If features are not finite.
        """
        new = [number for number, path in enumerate(paths) if path not in self.features]
        of_new: dict[int, list[Tensor]] = {}
        if new and self.on_gpu and self.is_full:
            together = [layer.split(1) for layer in extract(images[new])]
            of_new = {number: list(layers) for number, *layers in zip(new, *together, strict=True)}
        found = []
        for number, path in enumerate(paths):
            features = self.features.get(path) or of_new.get(number) or list(extract(images[number : number + 1]))
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
        self.is_full = self.is_full or size > self.bytes_left
        if not self.is_full:
            self.bytes_left -= size
            self.features[path] = features
