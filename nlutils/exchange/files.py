"""One file of weights for both frameworks: a block's arrays, and the options that make the block again."""

import json
from numbers import Integral
from zipfile import BadZipFile

import numpy as np

from nlutils.exchange.frameworks import from_arrays, to_arrays
from nlutils.paths import atomic_path

__all__ = ["load_block", "save_block", "saved_options"]

# The arguments of the two blocks, by name of the class in both frameworks.
_OPTIONS = {
    "NonLocalBlock": (
        "in_channels",
        "inner_channels",
        "ndim",
        "instantiation",
        "subsample",
        "scale",
        "norm",
        "zero_init",
        "attention",
        "frames_per_group",
    ),
    "CompactGeneralizedNonLocalBlock": (
        "in_channels",
        "inner_channels",
        "ndim",
        "groups",
        "kernel",
        "order",
    ),
}
_HEADER = "nlutils"
_VERSION = 1


def save_block(block, path) -> None:
    """Write the weights and options of a PyTorch or a built Keras block to `path`, a NumPy .npz file.

    The arrays are those of `to_arrays`, in the precision that the block has (bfloat16 as float32); the entry
    "nlutils" holds the class and its options as JSON. The file appears whole or not at all.

    Raises ValueError when the name does not end in .npz, TypeError for what is no block of nlutils.
    """
    if not str(path).endswith(".npz"):
        raise ValueError(f"path={str(path)!r} must end in .npz")
    header = {"version": _VERSION, "block": type(block).__name__, "options": _options(block)}
    arrays = to_arrays(block)
    with atomic_path(path) as temporary:
        np.savez(temporary, **{_HEADER: np.array(json.dumps(header))}, **arrays)


def load_block(block, path) -> None:
    """Read the weights that `save_block` wrote into a PyTorch or a built Keras block.

    Raises ValueError when the file is none of `save_block`'s, lists the options in which the block differs
    from the one that was saved (`zero_init` may differ, it is about the start only), or lists the arrays that
    do not fit; then nothing was read. For a block to read into: NonLocalBlock(**saved_options(path)).
    """
    header, arrays = _read(path)
    found = type(block).__name__
    if found != header["block"]:
        raise ValueError(f"{path} holds a {header['block']}, and the block is a {found}")
    options = _options(block)
    differing = [
        f"{name}={saved!r} in the file and {options[name]!r} in the block"
        for name, saved in header["options"].items()
        if name != "zero_init" and options[name] != saved
    ]
    if differing:
        raise ValueError(f"{path} was saved from a block with other options: {'; '.join(differing)}")
    from_arrays(block, arrays)


def saved_options(path) -> dict:
    """The arguments of the block in a file of `save_block`: `NonLocalBlock(**saved_options(path))`."""
    return _read(path)[0]["options"]


def _options(block):
    name = type(block).__name__
    if name not in _OPTIONS:
        raise TypeError(f"block is a {name}; it must be one of {', '.join(_OPTIONS)}")
    options = {option: getattr(block, option) for option in _OPTIONS[name]}
    if "norm" in options:  # there the layer stands, not the option
        options["norm"] = any(array.startswith("norm.") for array in to_arrays(block))
    return {
        option: int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value
        for option, value in options.items()
    }


def _read(path):
    try:
        with np.load(path, allow_pickle=False) as file:
            header = json.loads(str(file[_HEADER]))
            arrays = {name: file[name] for name in file.files if name != _HEADER}
        if not isinstance(header, dict) or not {"version", "block", "options"} <= header.keys():
            raise ValueError(f"its entry {_HEADER!r} must hold version, block and options")
    except (BadZipFile, KeyError, TypeError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a file of save_block: {error}") from error
    if header["version"] != _VERSION:
        raise ValueError(
            f"{path} has version {header['version']} of the format, this nlutils reads {_VERSION}"
        )
    known = _OPTIONS.get(str(header["block"]))
    if known is None:
        raise ValueError(f"{path} holds a {header['block']}; known are {', '.join(_OPTIONS)}")
    if not isinstance(header["options"], dict) or set(header["options"]) != set(known):
        found = header["options"]
        found = ", ".join(map(str, found)) if isinstance(found, dict | list) else found
        raise ValueError(
            f"{path} has the options {found}; a {header['block']} has {', '.join(known)} in this nlutils"
        )
    return header, arrays
