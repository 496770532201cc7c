"""Files of checkpoints: Caffe2's pickles, PyTorch's, TensorFlow's; no code in them runs."""

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nlutils.exchange.checkpoints.pickles import read_pickle
from nlutils.exchange.frameworks import as_array
from nlutils.paths import shown

__all__ = ["Checkpoint", "numbers", "read_checkpoint", "shape_of"]

# How a file begins that torch.save wrote: as a zip archive, and before PyTorch 1.6.
_ZIP = b"PK\x03\x04"
_TORCH = (_ZIP, b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
_PROTOCOL = 3  # of pickle, the last that torch.load reads without running code
# Where the codes put the weights: Caffe2; SlowFast and pytorchvideo; mmaction2.
_WRAPPERS = ("blobs", "model_state", "state_dict")


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a file by their published names, and the names of what else it holds.

    weights  NumPy arrays or PyTorch tensors
    others   entries that are no weights: the optimiser's state, the number of the iteration
    source   the file's name, or "a dict"
    """

    weights: dict
    others: tuple[str, ...]
    source: str


def read_checkpoint(source) -> Checkpoint:
    """The weights in a file, or in the dict that such a file holds.

    source  path of a pickle of Caffe2 (.pkl), of what torch.save wrote (.pth, .pyth, .pt), or of a TensorFlow
            checkpoint without its ending (model.ckpt; it needs TensorFlow); or a dict. The weights may lie in
            its entry "blobs", "model_state" or "state_dict"

    Only arrays, numbers, texts and containers are read. Raises ValueError that names the function or class
    when a file asks for anything else, and ValueError when it cannot be read or holds no weights.
    """
    if isinstance(source, Mapping):
        return _unwrapped(source, "a dict")
    path = Path(source)
    if path.with_name(path.name + ".index").is_file():
        return _unwrapped(_read_tensorflow(path), path.name)
    with open(path, "rb") as file:
        start = file.read(max(map(len, _TORCH)))
    if start.startswith(_ZIP):
        _check_archive(path)
    read = _read_torch if start.startswith(_TORCH) else read_pickle
    return _unwrapped(read(path), path.name)


def numbers(value, key: str) -> np.ndarray:
    """The real, finite numbers of the weight called `key`, in this machine's byte order.

    value  array or tensor of any framework; a view of it is given back where its type stays

    Raises ValueError that names `key`: for sparse, quantised and other tensors that NumPy does not have, for
    complex numbers and for what are no numbers, and where one of them is infinite or not a number.
    """
    try:
        array = as_array(value)
    except (TypeError, ValueError, RuntimeError):  # of PyTorch, for whatever has no counterpart in NumPy
        raise ValueError(_no_numbers(value, key)) from None
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{key} is {_kind(array)}; weights are real numbers")
    if array.size and not (np.isfinite(array.min()) and np.isfinite(array.max())):
        raise ValueError(f"{key} has numbers that are not finite (NaN or infinity)")
    wide = array.dtype.itemsize > 8  # PyTorch has no such numbers
    return array.astype(np.float64 if wide else array.dtype.newbyteorder("="), copy=False)


def shape_of(value, key: str) -> tuple[int, ...]:
    """The shape of a weight, without looking at its numbers; ValueError when it has none."""
    try:
        return tuple(value.shape)
    except RuntimeError:  # of nested tensors of PyTorch
        raise ValueError(_no_numbers(value, key)) from None


def _no_numbers(value, key):
    return f"{key} is {_kind(value)}; only dense tensors of numbers are read"


def _kind(value):
    facts = [str(getattr(value, fact)) for fact in ("dtype", "layout", "device") if hasattr(value, fact)]
    nested = "nested " if getattr(value, "is_nested", False) else ""
    return f"a {nested}{type(value).__name__} of {', '.join(facts)}"


def _unwrapped(found, source):
    if not isinstance(found, Mapping):
        raise ValueError(f"{source} holds a {type(found).__name__}, and no dict of weights by name")
    inner, around = _by_name(found), ()
    for wrapper in _WRAPPERS:
        if isinstance(inner.get(wrapper), Mapping):
            around = tuple(key for key in inner if key != wrapper)
            inner = _by_name(inner[wrapper])
            break
    # Asked of the class, because nested tensors of PyTorch raise when they are asked.
    weights = {key: value for key, value in inner.items() if hasattr(type(value), "shape")}
    if not weights:
        names = ", ".join(list(inner)[:5])
        raise ValueError(
            f"{source} holds no weights by name; it has {names or 'nothing'}. They are looked for in the "
            f"dict itself and in its entry {', '.join(map(repr, _WRAPPERS))}"
        )
    inside = tuple(key for key in inner if key not in weights)
    return Checkpoint(weights, inside + around, source)


def _by_name(mapping):
    """With text as keys, as which Python 2's come as bytes now and then."""
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): mapping[key] for key in mapping}


def _check_archive(path):
    """ValueError where a zip archive is not as torch.save writes it, before torch.load looks into it.

    It has to be as large as what is in it, so that nothing is decompressed; and to begin with its first entry
    and end without a comment, so that torch.load finds the same list of entries as this function.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries, comment = archive.infolist(), archive.comment
            start = b""
            for entry in entries:
                if entry.filename.endswith("/data.pkl"):
                    start = archive.open(entry).read(2)
    except Exception as error:  # of many kinds, for broken archives
        raise ValueError(f"{shown(path)} cannot be read by torch.load: the archive is damaged") from error
    fault = None
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        fault = "it is a TorchScript archive, a program with its weights; let who made it save its state_dict"
    elif not entries or min(entry.header_offset for entry in entries) or comment:
        fault = "the archive was not written by torch.save"
    elif any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        fault = "its entries are compressed, which torch.save never does"
    elif sum(entry.file_size for entry in entries) > path.stat().st_size:
        fault = "its entries are said to be larger than the file"
    elif start[:1] == b"\x80" and start[1:] > bytes([_PROTOCOL]):
        fault = (
            f"it was saved with pickle_protocol={start[1]}; without running code torch.load reads "
            "torch.save's own, 2. Save it again with that"
        )
    if fault:
        raise ValueError(f"{shown(path)} cannot be read by torch.load: {fault}")


def _read_torch(path):
    import torch  # here, so that nobody needs PyTorch for Caffe2's files

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, for broken files
        # PyTorch's own text is not passed on: it says how to run the file's code all the same.
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
    if refused:
        raise ValueError(
            f"{shown(path)} asks for {refused[1]}; only tensors in plain containers are read, because "
            "anything else could run code. Take the file from where its authors published it, or let who "
            "trained the network save its state_dict only"
        )
    raise ValueError(
        f"{shown(path)} cannot be read by torch.load: it is damaged, or has something else than tensors in "
        "plain containers. Take it anew from where its authors published it, or let who trained the network "
        "save its state_dict only"
    )


def _read_tensorflow(path):
    try:
        from tensorflow import train
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{shown(path)} is a checkpoint of TensorFlow, which is not installed: "
            "pip install 'nlutils[keras]'"
        ) from error
    try:
        reader = train.load_checkpoint(str(path))
        return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    except Exception as error:  # of many kinds, for broken files
        raise ValueError(f"{shown(path)} cannot be read by TensorFlow: {error}") from error
