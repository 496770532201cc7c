"""Checks of arguments: an error names the argument, the value and what is allowed."""

import math
from collections.abc import Iterable
from numbers import Real

import numpy as np

__all__ = [
    "all_finite",
    "one_of",
    "positive_integer",
    "positive_number",
    "probability",
    "truth_value",
    "whole_number",
]


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


def whole_number(name: str, value) -> int:
    """Return `value` when it is a whole number, 0 or more; else raise ValueError."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < 0:
        raise ValueError(f"{name}={value!r} must be a whole number, 0 or more")
    return value.__index__()


def positive_number(name: str, value):
    """Return `value` when it is a finite number above zero; else raise ValueError."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r} must be a finite number above 0")
    return value


def probability(name: str, value):
    """Return `value` when it is a number from 0 to 1; else raise ValueError."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r} must be a number from 0 to 1")
    return value


def truth_value(name: str, value) -> bool:
    """Return `value` when it is True or False; else raise ValueError: in Python "no" counts as true."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}={value!r} must be True or False")
    return bool(value)


def all_finite(name: str, values: np.ndarray) -> np.ndarray:
    """Return the array `values` when it holds neither NaN nor infinity; else raise ValueError."""
    wrong = ~np.isfinite(values)
    if wrong.any():
        place = tuple(map(int, np.argwhere(wrong)[0]))
        raise ValueError(f"{name}[{', '.join(map(str, place))}]={values[place]} must be a finite number")
    return values
