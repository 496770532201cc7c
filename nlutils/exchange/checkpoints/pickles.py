"""Pickles of NumPy arrays, read without running anything that they name.

Caffe2's checkpoints are pickles, and a pickle is a program: it calls functions of any module, sets
attributes, and can double what it made with every few bytes. Here its instructions are followed one by one,
on a stack of our own. A name is looked up in the table below and nowhere else; what stands there are
functions of this file that take down type, shape and bytes, so that no state from the file reaches NumPy
unchecked. No attribute of anything is set, and the arrays have at most a few times the file's size.
"""

import codecs
import mmap
import pickletools
import re
import reprlib
from math import prod
from types import FunctionType

import numpy as np

from nlutils.paths import shown

__all__ = ["read_pickle"]

# Bytes of arrays and texts for each byte of the file: Python 3 writes for Python 2 what is decoded twice.
_MOST = 4
_AXES = 64  # NumPy's limit


def read_pickle(path):
    """What the pickle at `path` holds: numbers, texts, dicts, lists, tuples, and NumPy arrays of numbers.

    Pickles of Python 2 too; their strings become text, one character a byte (Latin-1), and so do keys that
    are bytes. Of a larger file the first pickle is read.

    Raises ValueError that names the function or class when the file asks for anything else, such as
    "os.system", and ValueError when it is no pickle or a broken one, has keys that are no texts or numbers,
    or says the same so often that it would fill the memory. Nothing that it names was run then.
    """
    with open(path, "rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _plain(_Machine(len(data)).run(data), {})
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


class _Type:
    """numpy.dtype: of whole and floating numbers and truth values."""

    def __init__(self, code):
        self.dtype = np.dtype(code)

    def fill(self, machine, state):
        if not isinstance(state, tuple) or not 2 <= len(state) <= 9:
            raise ValueError("a type with an unknown state")
        _, order, *structure = state
        if any(part is not None for part in structure[:3]):
            raise ValueError("an array of records")
        if _word(order) not in ("<", ">", "=", "|"):
            raise ValueError(f"bytes in the order {_shortly(order)}")
        self.dtype = self.dtype.newbyteorder(_word(order))


class _Array:
    """An array whose shape and bytes follow as its state."""

    array = None

    def fill(self, machine, state):
        _, shape, kind, by_columns, data = state
        self.array = machine.array(data, kind, shape, "F" if by_columns else "C")


class _Machine:
    """Follows the instructions of a pickle of `size` bytes.

    stack  what was made and not used up: values, containers, functions of the table, `_Type`, `_Array`
    marks  how high the stack was at each open mark
    memo   what the pickle gave a number to
    left   bytes that may still be made of bytes
    """

    def __init__(self, size):
        self.stack, self.marks, self.memo = [], [], {}
        self.left = _MOST * size

    def run(self, data):
        """What lies on the stack at the end of the program."""
        while True:
            code = data.read(1).decode("latin1")
            if code not in pickletools.code2op:
                raise ValueError(f"no pickle has the instruction {code!r}" if code else "its end is missing")
            instruction = pickletools.code2op[code]
            if instruction.name == "STOP":
                return self.stack.pop()
            if instruction.name == "STRING":  # pickletools takes those with letters of ASCII only
                argument = pickletools.read_stringnl(data, decode=False)
                argument = codecs.escape_decode(argument)[0].decode("latin1")
            else:
                argument = instruction.arg and instruction.arg.reader(data)
            self.step(instruction.name, argument)

    def step(self, name, argument):
        """Follow one instruction, by pickletools' name."""
        stack = self.stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.marks.append(len(stack))
            case "POP":
                if self.marks and self.marks[-1] == len(stack):
                    self.marks.pop()
                else:
                    stack.pop()
            case "POP_MARK":
                self.since_mark()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(name[-1]))]
                stack.append(tuple(reversed(items)))
            case "TUPLE":
                stack.append(tuple(self.since_mark()))
            case "LIST":
                stack.append(self.since_mark())
            case "DICT":
                stack.append(self.put({}, self.since_mark()))
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if name == "APPEND" else self.since_mark()
                if not isinstance(stack[-1], list):
                    raise ValueError("items for what is no list")
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else self.since_mark()
                self.put(stack[-1], items)
            case "GLOBAL":
                stack.append(_look_up(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                function, module = stack.pop(), stack.pop()
                stack.append(_look_up(_word(module), _word(function)))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                if not isinstance(function, FunctionType) or not isinstance(arguments, tuple):
                    raise ValueError("a call of what is no function")
                stack.append(function(self, *arguments))
            case "BUILD":
                state = stack.pop()
                if not isinstance(stack[-1], _Array | _Type):
                    raise ValueError("a state for what has none")
                stack[-1].fill(self, state)
            case "PERSID":
                raise _RefusedError(f"something outside the file, {_shortly(argument)}")
            case "BINPERSID":
                raise _RefusedError(f"something outside the file, {_shortly(stack.pop())}")
            case "INST":
                raise _RefusedError(_joined(*argument.split(" ", 1)))
            case _ if name in _CONSTANTS:
                stack.append(_CONSTANTS[name]())
            case _ if name in _LITERALS:
                stack.append(argument)
            case _:
                raise ValueError(f"its instruction {name} makes no array and no plain container")

    def since_mark(self):
        """Take what was put on the stack since the last mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def put(self, target, items):
        """Keys and values in turn into a dict, which is given back."""
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("entries for what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, bytes):
                self.spend(len(key))
                key = key.decode("latin1")
            # A tuple of tuples can take hours to be looked up, and whole numbers can be made to collide.
            if not isinstance(key, str | int | float) or (isinstance(key, int) and abs(key) >= 2**60):
                raise ValueError(f"a key that is no text or number of a usual size: {_shortly(key)}")
            target[key] = value
        return target

    def array(self, data, kind, shape, order):
        """An array of its own memory, in this machine's byte order."""
        if not isinstance(data, str | bytes | bytearray):
            raise ValueError("an array whose numbers are no bytes")
        if not isinstance(kind, _Type):
            raise ValueError("an array without a type")
        shape = _sides(shape)
        self.spend(len(data))
        values = np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, kind.dtype)
        if values.size != prod(shape):
            raise ValueError(f"an array of shape {shape} with {values.size} numbers")
        return values.astype(kind.dtype.newbyteorder("=")).reshape(shape, order=order)

    def spend(self, count):
        self.left -= count
        if self.left < 0:
            raise ValueError(f"it would become more than {_MOST} times as large in memory as the file is")


_CONSTANTS = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
# Instructions that are followed by a value.
_LITERALS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
_LITERALS |= {"STRING", "BINSTRING", "SHORT_BINSTRING"}
_LITERALS |= {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_LITERALS |= {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}


def _ndarray(machine):
    """numpy.ndarray: named in every array, called in none."""
    raise ValueError("an array without a shape")


def _dtype(machine, code, align=False, copy=True):
    if not re.fullmatch(r"[<>=|]?[biuf]\d{1,2}", _word(code)):
        raise ValueError(f"arrays of type {_shortly(code)}, which are no numbers")
    return _Type(_word(code))


def _reconstruct(machine, kind, shape, code):
    return _Array()


def _from_buffer(machine, data, kind, shape, order):
    """An array in a pickle of protocol 5."""
    return machine.array(data, kind, shape, _word(order))


def _scalar(machine, kind, data):
    """One number with NumPy's type."""
    return machine.array(data, kind, (), "C")[()]


def _encode(machine, text="", encoding="latin1"):
    """_codecs.encode, and bytes without any: how Python 3 writes bytes for Python 2."""
    if not isinstance(text, str) or _word(encoding) != "latin1":
        raise ValueError(f"bytes encoded as {_shortly(encoding)}")
    machine.spend(len(text))
    return text.encode("latin1")


def _ordered(machine, pairs=()):
    """OrderedDict; Python 2 writes its entries as a list of lists."""
    if not isinstance(pairs, list | tuple):
        raise ValueError("a dict of what is no list")
    machine.spend(len(pairs))
    if any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in pairs):
        raise ValueError("a dict of what are no pairs")
    return machine.put({}, [part for pair in pairs for part in pair])


# Module and name, as Python 2, 3, NumPy 1 and 2 write them: what is made of it.
_TABLE = {
    ("numpy", "ndarray"): _ndarray,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _encode,
    ("collections", "OrderedDict"): _ordered,
}
for _core in ("numpy.core", "numpy._core"):
    _TABLE[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
    _TABLE[f"{_core}.multiarray", "scalar"] = _scalar
    _TABLE[f"{_core}.numeric", "_frombuffer"] = _from_buffer


def _look_up(module, name):
    if (module, name) not in _TABLE:
        raise _RefusedError(_joined(module, name))
    return _TABLE[module, name]


def _joined(module, name):
    return f"{module}.{name}"[:200]


def _sides(shape):
    if not isinstance(shape, tuple | list) or len(shape) > _AXES:
        raise ValueError("an array whose shape is no row of numbers")
    if any(not isinstance(side, int) for side in shape):
        raise ValueError("an array whose shape is no row of whole numbers")
    if any(not 0 <= side < 2**63 for side in shape):
        raise ValueError(f"an array of shape {tuple(shape)}")
    return tuple(shape)


def _word(value):
    """A text of Python 2 or 3."""
    if not isinstance(value, str | bytes):
        raise ValueError(f"{_shortly(value)} in the place of a text")
    return value.decode("latin1") if isinstance(value, bytes) else value


def _shortly(value):
    """For a message; never a container, whose text can be without end."""
    return reprlib.repr(value) if isinstance(value, str | bytes) else f"a {type(value).__name__}"


def _plain(value, made):
    """`value` with arrays in place of `_Array`; `made` holds what was made of containers, by identity."""
    if isinstance(value, _Array):
        if value.array is None:
            raise ValueError("an array without numbers")
        return value.array
    if value is None or isinstance(value, int | float | str | bytes | bytearray | np.ndarray | np.generic):
        return value
    if not isinstance(value, dict | list | tuple):
        raise ValueError("a function or a type of numbers by itself, which is no value")
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
