"""What is found before anything is computed: errors, which are raised together, and warnings, each given once."""

from collections.abc import Iterable
from typing import NamedTuple

from lightning.pytorch.utilities import rank_zero_warn

NAMED = 5  # errors, of maybe hundreds of files: more would bury them


class Finding(NamedTuple):
    """Something that is wrong, or may be: what it is, of which file or argument, and what to do about it."""

    message: str
    is_error: bool


def error(message: str) -> Finding:
    """Return what makes a run fail, or its results wrong."""
    return Finding(message, is_error=True)


def warning(message: str) -> Finding:
    """Return what may be wrong."""
    return Finding(message, is_error=False)


def messages(findings: Iterable[Finding]) -> tuple[list[str], list[str]]:
    """Return what is wrong and what may be, each once."""
    found = list(dict.fromkeys(findings))
    return [f.message for f in found if f.is_error], [f.message for f in found if not f.is_error]


def settle(findings: Iterable[Finding]) -> None:
    """Warn of what may be wrong.

    Raises:
        ValueError: If something is wrong; it lists all that is, but for the last of many.
    """
    errors, warnings = messages(findings)
    if errors:
        more = [f"and {len(errors) - NAMED} more"] if len(errors) > NAMED else []
        raise ValueError("\n".join([*errors[:NAMED], *more]))
    for message in warnings:
        rank_zero_warn(message)
