"""Arguments outside their range, refused by one kind of error: argument, what is allowed, what was given."""

from collections.abc import Sequence
from numbers import Integral, Real


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


def check_range(name: str, values: object, interval: str, *, whole: bool = False) -> None:
    """Raise a ``ValueError`` unless ``values`` are two numbers in ``interval``, the second not below the first."""
    two = isinstance(values, Sequence) and len(values) == 2
    if not (two and all(is_within(v, interval, whole=whole) for v in values) and values[0] <= values[1]):  # type: ignore[attr-defined, index]
        msg = f"{name} must be two increasing {'whole ' if whole else ''}numbers in {interval}, got {values!r}"
        raise ValueError(msg)


def check_size(name: str, size: object, least: int = 1, why: str = "") -> None:
    """Raise a ``ValueError`` unless ``size`` is a height and a width of at least ``least`` pixels.

    Args:
        name: The argument's.
        size: Its value.
        least: Fewest pixels.
        why: What demands that, for the message.
    """
    two = isinstance(size, Sequence) and len(size) == 2
    if not (two and all(is_within(s, f"[{least}, inf)", whole=True) for s in size)):  # type: ignore[attr-defined]
        msg = f"{name} must be (height, width), two whole numbers of at least {least}{why}, got {size!r}"
        raise ValueError(msg)


def check_flag(name: str, value: object) -> None:
    """Raise a ``ValueError`` unless ``value`` is ``True`` or ``False``."""
    if not isinstance(value, bool):
        msg = f"{name} must be True or False, got {value!r}"
        raise ValueError(msg)
