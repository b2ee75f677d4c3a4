"""Argument checks that say what was given and what is allowed; every noun calls them at construction."""

import math
from collections.abc import Iterable


def require_positive(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is a finite number above zero."""
    if not _is_number(value) or value <= 0:
        raise ValueError(f"{name}={value}, must be a finite number above 0")


def require_non_negative(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is a finite number of at least zero."""
    if not _is_number(value) or value < 0:
        raise ValueError(f"{name}={value}, must be a finite number of at least 0")


def require_whole(name: str, value: int, at_least: int = 1) -> None:
    """Raise ValueError unless ``value`` is an integer of at least ``at_least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name}={value}, must be a whole number of at least {at_least}")


def require_share(name: str, value: float, *, below_one: bool = False) -> None:
    """Raise ValueError unless ``value`` lies in [0, 1], or in [0, 1) with ``below_one``."""
    if not _is_number(value) or not 0 <= value <= 1 or (below_one and value == 1):
        raise ValueError(f"{name}={value}, must lie in [0, 1{')' if below_one else ']'}")


def require_one_of(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    options = tuple(allowed)
    if value not in options:
        raise ValueError(f"{name}={value}, must be one of {', '.join(map(str, options))}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
