"""Arguments and tensors, refused by one kind of error: what is wrong, what is allowed, what was given."""

import os
from collections.abc import Mapping, Sequence
from decimal import Decimal
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

OVERSHOOT = 0.2  # how far bicubic resizing, which users' transforms may do, leaves [0, 1]


def plain(value: Any) -> Any:
    """Return Python's own value for a subclass of its types, and one of NumPy's or torch's: no other can be loaded.

    That is text for paths, ``int`` for whole numbers, ``float`` for others, such as fractions; in lists and such, too.
    What is none of these is returned as it is.
    """
    if isinstance(value, np.ndarray | np.generic | Tensor):
        value = value.tolist()
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # a subclass, or an enumeration, may print as something else
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real | Decimal):
        return float(value)
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    if isinstance(value, Mapping):
        return {plain(name): plain(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return list(map(plain, value))
    return value


def check_plain(values: Mapping[str, object]) -> None:
    """Raise a ``ValueError`` if an argument, by its name, has another value than :func:`plain` makes of one."""
    for name, value in values.items():
        items = list(value) if type(value) in (list, tuple) else [value]  # type: ignore[call-overload]
        if any(item is not None and type(item) not in (bool, int, float, str) for item in items):
            msg = f"{name} must be text, a number, True, False, None or a list of these, got {value!r}"
            raise ValueError(msg)


def is_within(value: object, interval: str, *, whole: bool = False) -> bool:
    """Whether ``value`` is a number, or a whole one, in an interval written as in mathematics: ``"[0, 1)"``."""
    low, high = map(float, interval[1:-1].split(","))
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        return False
    return low < value < high or (value == low and interval[0] == "[") or (value == high and interval[-1] == "]")  # type: ignore[operator]


def check_number(name: str, value: object, interval: str, *, whole: bool = False) -> None:
    """Raise a ``ValueError`` unless ``value`` is a number, or a whole one, in ``interval``."""
    if not is_within(value, interval, whole=whole):
        msg = f"{name} must be a {'whole ' if whole else ''}number in {interval}, got {value!r}"
        raise ValueError(msg)


def check_size(name: str, size: object, least: int = 1, why: str = "") -> None:
    """Raise a ``ValueError`` unless ``size`` is a height and a width of at least ``least`` pixels, because ``why``."""
    two = isinstance(size, Sequence) and len(size) == 2
    if not (two and all(is_within(s, f"[{least}, inf)", whole=True) for s in size)):  # type: ignore[attr-defined]
        msg = f"{name} must be (height, width), two whole numbers of at least {least}{why}, got {size!r}"
        raise ValueError(msg)


def check_flag(name: str, value: object) -> None:
    """Raise a ``ValueError`` unless ``value`` is ``True`` or ``False``."""
    if not isinstance(value, bool):
        msg = f"{name} must be True or False, got {value!r}"
        raise ValueError(msg)


def check_pixels(images: Tensor, names: Sequence[object] | None = None, *, slack: float = OVERSHOOT) -> None:
    """Raise a ``ValueError`` unless ``images`` are ``(B, 3, H, W)`` of floats in [0, 1]; an exported graph cannot.

    Args:
        images: What is taken for images.
        names: What to call each of them, such as its path; else it has a number.
        slack: How far pixels may be outside the range.
    """
    if torch.compiler.is_compiling():
        return
    wanted = "images must be (B, 3, height, width) of floats in [0, 1]"
    if images.dim() != 4 or images.shape[1] != 3:
        msg = f"{wanted}, got the shape {tuple(images.shape)}: grey ones need three channels, a single one images[None]"
        raise ValueError(msg)
    if not images.is_floating_point() or images.dtype == torch.float64:
        msg = f"{wanted}, of single precision at most, got {images.dtype}: divide 0..255 by 255, call .float()"
        raise ValueError(msg)
    if not images.numel():
        msg = f"{wanted}, got none: shape {tuple(images.shape)}"
        raise ValueError(msg)
    low, high = images.aminmax()
    if low >= -slack and high <= 1 + slack:  # neither is true of NaN
        return
    for number, image in enumerate(images):
        low, high = image.aminmax()
        if not (low >= -slack and high <= 1 + slack):
            name = names[number] if names else f"image {number} of the batch"
            found = f"pixels in [{low:.4g}, {high:.4g}]" if low <= high else "pixels that are NaN"
            msg = (
                f"{wanted}, {name} has {found}: divide 0..255 by 255, leave Normalize out, which the model does itself"
            )
            raise ValueError(msg)


class Fittable(Protocol):
    """A model whose buffers tell what it is fitted to."""

    image_size: Tensor  # height and width of the training images (2,)

    @property
    def is_fitted(self) -> bool:
        """Whether it can score."""


def check_fitted(model: Fittable) -> None:
    """Raise a ``RuntimeError`` if a model is not fitted; an exported graph cannot."""
    if not torch.compiler.is_compiling() and not model.is_fitted:
        msg = (
            "the model is not fitted: train it, or give the checkpoint of a run that has been validated at least once "
            "(ckpt_path)"
        )
        raise RuntimeError(msg)


def check_same_size(images: Tensor, size: Tensor) -> None:
    """Raise a ``ValueError`` if images ``(B, 3, H, W)`` have not this height and width; an exported graph cannot."""
    if torch.compiler.is_compiling():
        return
    found, wanted = tuple(images.shape[-2:]), tuple(size.tolist())
    if found != wanted:
        msg = f"images must be {wanted} pixels high and wide, as in training, got {found}: resize them"
        raise ValueError(msg)


def check_large_enough(images: Tensor, least: int) -> None:
    """Raise a ``ValueError`` if images ``(B, 3, H, W)`` have a side of fewer pixels; an exported graph cannot."""
    if not torch.compiler.is_compiling() and min(images.shape[-2:]) < least:
        msg = (
            f"images must be at least {least} pixels high and wide, the stride of the coarsest layer, got "
            f"{tuple(images.shape[-2:])}: give larger ones, or leave the coarsest layer out of layers"
        )
        raise ValueError(msg)


def check_kinds(name: str, given: object, known: Sequence[str]) -> None:
    """Raise a ``ValueError`` unless ``given`` are some of the kinds that are ``known``, or none, each once."""
    listed = isinstance(given, Sequence) and not isinstance(given, str) and all(kind in known for kind in given)
    if not listed or len(set(given)) < len(given):  # type: ignore[arg-type, call-overload]
        msg = f"{name} must be some of {tuple(known)}, each once, got {given!r}"
        raise ValueError(msg)


def check_fit(
    memory_budget: object, seed: object, kinds: Sequence[str], defects: object, dtd_dir: object, download_dtd: object
) -> None:
    """Raise a ``ValueError`` if what both models are fitted by is outside its range.

    ``defects`` must be some of ``kinds``, each once, and textures have one source.
    """
    check_number("memory_budget", memory_budget, "[0, inf)", whole=True)
    if seed is not None:
        check_number("seed", seed, f"[0, {2**32})", whole=True)
    check_kinds("defects", defects, kinds)
    if not defects:
        msg = f"defects must be some of {tuple(kinds)}, got none"
        raise ValueError(msg)
    if not (isinstance(dtd_dir, str | Path) and str(dtd_dir)):
        msg = f"dtd_dir must be 'builtin' or a folder, got {dtd_dir!r}"
        raise ValueError(msg)
    check_flag("download_dtd", download_dtd)
    if download_dtd and str(dtd_dir) == "builtin":
        msg = "download_dtd needs a dtd_dir to download to, got dtd_dir='builtin', which downloads nothing"
        raise ValueError(msg)
