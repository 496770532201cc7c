"""What a notebook prints about numbers: are two results equal, is an answer right, what went wrong."""

from collections.abc import Callable

import numpy as np

__all__ = ["check", "difference"]

# Rounding differs between machines. Coarse steps keep the printed bound the same on all of them: float64 sums
# stay below the first, float32 sums below the third.
_BOUNDS = (1e-12, 1e-8, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def difference(a, b, name: str = "", *, below: float | None = None) -> None:
    """Print in one line whether `a` and `b` are equal: exact, approximate, or different.

    Approximate means: the largest difference is at most a thousandth of the largest value. The line gives
    a power of ten that the largest difference stays below, and no digits, so that it is the same on every
    machine. Where even *exact* could depend on the machine, give `below`: the line then states that bound,
    and a larger difference raises AssertionError. Raises ValueError for unequal shapes and for NaN.
    """
    label = f"{name}: " if name else ""
    a, b = _array(a), _array(b)
    if a.shape != b.shape:
        raise ValueError(
            f"{label}the shapes {a.shape} and {b.shape} differ, so their values cannot be compared"
        )
    if not (_is_number(a) and _is_number(b)):
        unequal = int(np.sum(a != b))
        print(label + ("exact" if unequal == 0 else f"different in {unequal} of {a.size} places"))
        return
    for values in (a, b):
        if np.isnan(values).any():
            raise ValueError(f"{label}there is NaN at {_first(np.isnan(values))}, and NaN equals nothing")
    gap = np.abs(a[a != b].astype(np.float64) - b[a != b].astype(np.float64))
    largest = float(gap.max(initial=0.0))
    if below is not None:
        assert largest < below, f"{label}the largest difference is {largest:.3g}, not below {below:g}"
        print(f"{label}approximate, largest difference below {below:.0e}")
    elif largest == 0:
        print(f"{label}exact")
    else:
        word = "approximate" if largest <= 1e-3 * max(_scale(a), _scale(b)) else "different"
        print(f"{label}{word}, largest difference below {_bound(largest):.0e}")


def check(
    name: str, answer: Callable, expected, mistakes: dict | None = None, tolerance: float | None = None
) -> None:
    """Call `answer` and print whether what it returns is `expected`; when it is not, say what went wrong.

    Prints *not yet* while `answer` returns None. `mistakes` maps a description of a mistake to the value
    that it leads to. Numbers, arrays, tensors, strings and tuples of them are accepted. `tolerance` is the
    largest difference allowed, as a share of the largest expected value; by default 1e-9, 1e-4 where one
    side is float32, 1e-2 for float16, and 0 for whole numbers. An exception in the answer is printed, not
    raised.
    """
    if not callable(answer):
        raise TypeError(
            f"{name}: the answer must be a function, such as `lambda: my_function(x)`, not {answer!r}"
        )
    for mistake, wrong in (mistakes or {}).items():
        if _compare(wrong, expected, tolerance)[0]:
            raise ValueError(
                f"{name}: the mistake {mistake!r} leads to the expected value, so it is no mistake"
            )
    try:
        given = answer()
    except Exception as error:
        reason = str(error).strip().splitlines()
        print(
            f"{name}: not right: your code raised {type(error).__name__}"
            + (f": {reason[0]}" if reason else "")
        )
        return
    if _missing(given):
        print(f"{name}: not yet")
        return
    right, verdict = _compare(given, expected, tolerance)
    if right:
        print(f"{name}: right ({verdict})")
        return
    for mistake, wrong in (mistakes or {}).items():
        if _compare(given, wrong, tolerance)[0]:
            verdict = mistake
            break
    print(f"{name}: not right: {verdict}")


def _missing(value) -> bool:
    return value is None or (isinstance(value, tuple) and any(part is None for part in value))


def _compare(given, expected, tolerance) -> tuple[bool, str]:
    """Whether `given` is `expected`, and the words for it."""
    if isinstance(expected, tuple):
        if not isinstance(given, tuple | list) or len(given) != len(expected):
            many = f"{len(given)} parts" if isinstance(given, tuple | list) else f"one {type(given).__name__}"
            return False, f"a tuple of {len(expected)} parts is expected, and you return {many}"
        verdicts = [_compare(g, e, tolerance) for g, e in zip(given, expected, strict=True)]
        for position, (right, verdict) in enumerate(verdicts):
            if not right:
                return False, f"part {position + 1}: {verdict}"
        rounded = [verdict for _, verdict in verdicts if verdict != "exact"]
        return True, rounded[0] if rounded else "exact"
    try:
        given, expected = _array(given), _array(expected)
    except (TypeError, ValueError) as error:
        return False, f"what you return cannot be read as numbers: {error}"
    if _is_number(given) != _is_number(expected):
        return False, f"{_kind(expected)} is expected, and you return {_kind(given)}"
    if given.shape != expected.shape:
        return False, f"the shape is {given.shape}, and {expected.shape} is expected"
    if not _is_number(expected):
        unequal = given != expected
        if not unequal.any():
            return True, "exact"
        if expected.ndim == 0:
            return False, f"{given.item()!r} is not what is expected"
        return False, f"{int(unequal.sum())} of {expected.size} values differ, first at {_first(unequal)}"
    return _compare_numbers(given, expected, tolerance)


def _compare_numbers(given, expected, tolerance) -> tuple[bool, str]:
    nan_given, nan_expected = np.isnan(given), np.isnan(expected)
    if not np.array_equal(nan_given, nan_expected):
        place = _first(nan_given != nan_expected)
        return False, f"NaN at {place}" if nan_given[place] else f"NaN is expected at {place}"
    gap = np.zeros(expected.shape)
    unequal = (given != expected) & ~nan_expected
    gap[unequal] = np.abs(given[unequal].astype(np.float64) - expected[unequal].astype(np.float64))
    largest = float(gap.max(initial=0.0))
    if largest == 0:
        return True, "exact"
    if tolerance is None:
        tolerance = _tolerance(given, expected)
    if largest <= tolerance * _scale(expected):
        return True, f"approximate, largest difference below {_bound(largest):.0e}"
    if expected.ndim == 0:
        return False, f"you return {given.item():.6g}, which is {largest:.3g} away"
    return False, f"the largest difference is {largest:.3g}, at {_first(gap == largest)}"


def _tolerance(given, expected) -> float:
    """What rounding may change, as a share of the largest value: that of the side with fewer digits."""
    floats = [array.dtype.itemsize for array in (given, expected) if array.dtype.kind == "f"]
    return {2: 1e-2, 4: 1e-4}.get(min(floats), 1e-9) if floats else 0.0


def _scale(values) -> float:
    finite = np.abs(values[np.isfinite(values)].astype(np.float64))
    return float(finite.max(initial=0.0)) or 1.0


def _bound(largest: float) -> float:
    """The first of `_BOUNDS` above `largest`; above all of them, the next power of ten."""
    for bound in _BOUNDS:
        if largest < bound:
            return bound
    return 10.0 ** (np.floor(np.log10(largest)) + 1) if np.isfinite(largest) else np.inf


def _array(value) -> np.ndarray:
    """`value` as an array: numbers, strings, lists, arrays, PyTorch tensors on any device, Keras tensors."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            value = value.float()
        value = value.numpy()
    array = np.asarray(value)
    if array.dtype.kind not in "biufU":
        raise ValueError(f"{type(value).__name__} {value!r} holds no real numbers and no text")
    return array


def _is_number(array) -> bool:
    return array.dtype.kind in "biuf"


def _kind(array) -> str:
    if array.ndim:
        return "an array of " + ("numbers" if _is_number(array) else "strings")
    return "a number" if _is_number(array) else "a string"


def _first(mask) -> tuple[int, ...]:
    """The index of the first True."""
    return tuple(int(i) for i in np.argwhere(mask)[0])
