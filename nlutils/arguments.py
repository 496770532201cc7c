"""Checks of arguments: an error names the argument, the value and what is allowed."""

from collections.abc import Iterable

__all__ = ["one_of", "positive_integer"]


def one_of(name: str, value, allowed: Iterable):
    """Return `value` when it is among `allowed`; else raise ValueError."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; use one of {', '.join(map(repr, allowed))}")
    return value


def positive_integer(name: str, value) -> int:
    """Return `value` when it is a whole number above zero; else raise ValueError."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < 1:
        raise ValueError(f"{name}={value!r} must be a whole number, 1 or more")
    return value.__index__()
