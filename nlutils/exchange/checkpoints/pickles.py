"""Pickles of NumPy arrays, read without running anything that they name.

Caffe2's checkpoints are pickles, and a pickle is a program: it names functions of any module and calls them.
Here a name is looked up in the table below and nowhere else. What stands there are not NumPy's own functions
but recorders that take down type, shape and bytes, so that no state from the file reaches NumPy unchecked.
"""

import pickle
import re
from collections import OrderedDict
from math import prod

import numpy as np

from nlutils.paths import shown

__all__ = ["read_pickle"]


def read_pickle(path):
    """What the pickle at `path` holds: numbers, texts, dicts, lists, tuples, and NumPy arrays of numbers.

    Pickles of Python 2 too; their strings become text, one character a byte (Latin-1). Of a larger file the
    first pickle is read.

    Raises ValueError that names the function or class when the file asks for anything else, such as
    "os.system", and ValueError when it is no pickle or a broken one. Nothing that it names was run then.
    """
    with open(path, "rb") as file:
        try:
            return _plain(_ArraysOnly(file, encoding="latin1").load(), {})
        except _RefusedError as refused:
            raise ValueError(
                f"{shown(path)} asks for {refused}; from a pickle only NumPy arrays of numbers in plain "
                "containers are read, because anything else could run code. Take the file from where its "
                "authors published it"
            ) from None
        except Exception as error:  # a broken pickle can raise whatever its instructions lead to
            raise ValueError(f"{shown(path)} cannot be read as a pickle: {error}") from error


class _RefusedError(Exception):
    """The file names something that is not in the table."""


class _NdArray:
    """Stands for the class numpy.ndarray; nothing can be done with it."""

    __slots__ = ()

    def __init__(self):
        raise ValueError("an array without a shape")


class _Type:
    """numpy.dtype: of whole and floating numbers and truth values."""

    __slots__ = ("dtype",)

    def __init__(self, code, *_):
        if not re.fullmatch(r"[<>=|]?[biuf]\d{1,2}", _text(code)):
            raise ValueError(f"arrays of type {code!r}, which are no numbers")
        self.dtype = np.dtype(_text(code))

    def __setstate__(self, state):
        _, order, *structure = state
        if any(part is not None for part in structure[:3]):
            raise ValueError("an array of records")
        self.dtype = self.dtype.newbyteorder(_text(order))


class _Array:
    """numpy.core.multiarray._reconstruct: an empty array, whose shape and bytes follow as its state."""

    __slots__ = ("array",)

    def __init__(self, *_):
        self.array = None

    def __setstate__(self, state):
        _, shape, kind, by_columns, data = state
        self.array = _filled(data, kind, shape, "F" if by_columns else "C")


class _FromBuffer:
    """numpy.core.numeric._frombuffer: an array in a pickle of protocol 5."""

    __slots__ = ("array",)

    def __init__(self, data, kind, shape, order):
        self.array = _filled(data, kind, shape, _text(order))


class _Scalar:
    """numpy.core.multiarray.scalar: one number with NumPy's type."""

    __slots__ = ("array",)

    def __init__(self, kind, data):
        self.array = _filled(data, kind, (), "C")[()]


class _Encoded:
    """_codecs.encode, and bytes without any: how Python 3 writes bytes for Python 2."""

    __slots__ = ("data",)

    def __init__(self, text="", encoding="latin1"):
        if encoding != "latin1":
            raise ValueError(f"bytes encoded as {encoding!r}")
        self.data = text.encode("latin1")


# Module and name, as Python 2, 3, NumPy 1 and 2 write them: what is made of it.
_TABLE = {
    ("numpy", "ndarray"): _NdArray,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _Encoded,
    ("__builtin__", "bytes"): _Encoded,
    ("collections", "OrderedDict"): OrderedDict,
}
for _core in ("numpy.core", "numpy._core"):
    _TABLE[f"{_core}.multiarray", "_reconstruct"] = _Array
    _TABLE[f"{_core}.multiarray", "scalar"] = _Scalar
    _TABLE[f"{_core}.numeric", "_frombuffer"] = _FromBuffer


class _ArraysOnly(pickle.Unpickler):
    """An unpickler for which there is nothing but `_TABLE`."""

    def find_class(self, module, name):
        if (module, name) not in _TABLE:
            raise _RefusedError(f"{module}.{name}")
        return _TABLE[module, name]

    def persistent_load(self, key):
        raise _RefusedError(f"something outside the file, {key!r}")


def _filled(data, kind, shape, order):
    """An array of its own memory, in this machine's byte order."""
    data = data.data if isinstance(data, _Encoded) else data
    data = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(data, bytes | bytearray | memoryview):
        raise ValueError("an array whose numbers are no bytes")
    shape = tuple(shape)
    if any(not isinstance(side, int) or side < 0 for side in shape):
        raise ValueError(f"an array of shape {shape}")
    values = np.frombuffer(data, kind.dtype)
    if values.size != prod(shape):
        raise ValueError(f"an array of shape {shape} with {values.size} numbers")
    return values.astype(kind.dtype.newbyteorder("=")).reshape(shape, order=order)


def _plain(value, made):
    """`value` with arrays in place of recorders; `made` holds what was made of containers, by identity."""
    if isinstance(value, _Array | _FromBuffer | _Scalar):
        if value.array is None:
            raise ValueError("an array without numbers")
        return value.array
    if isinstance(value, _Encoded):
        return value.data
    if not isinstance(value, dict | list | tuple):
        return value
    if id(value) in made:
        return made[id(value)]
    if isinstance(value, dict):
        made[id(value)] = plain = {}
        plain.update((key, _plain(item, made)) for key, item in value.items())
    elif isinstance(value, list):
        made[id(value)] = plain = []
        plain.extend(_plain(item, made) for item in value)
    else:
        made[id(value)] = plain = tuple(_plain(item, made) for item in value)
    return plain


def _text(value):
    return value.decode("latin1") if isinstance(value, bytes) else str(value)
