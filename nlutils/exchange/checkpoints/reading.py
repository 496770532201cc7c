"""Files of checkpoints: Caffe2's pickles, PyTorch's, TensorFlow's; no code in them runs."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nlutils.exchange.checkpoints.pickles import read_pickle
from nlutils.paths import shown

__all__ = ["Checkpoint", "read_checkpoint"]

# How a file begins that torch.save wrote: as a zip archive, and before PyTorch 1.6.
_TORCH = (b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
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
    read = _read_torch if start.startswith(_TORCH) else read_pickle
    return _unwrapped(read(path), path.name)


def _unwrapped(found, source):
    if not isinstance(found, Mapping):
        raise ValueError(f"{source} holds a {type(found).__name__}, and no dict of weights by name")
    inner, around = found, ()
    for wrapper in _WRAPPERS:
        if isinstance(found.get(wrapper), Mapping):
            inner, around = found[wrapper], tuple(str(key) for key in found if key != wrapper)
            break
    weights = {str(key): value for key, value in inner.items() if hasattr(value, "shape")}
    if not weights:
        names = ", ".join(map(str, list(inner)[:5]))
        raise ValueError(
            f"{source} holds no weights by name; it has {names or 'nothing'}. They are looked for in the "
            f"dict itself and in its entry {', '.join(map(repr, _WRAPPERS))}"
        )
    inside = tuple(str(key) for key, value in inner.items() if not hasattr(value, "shape"))
    return Checkpoint(weights, inside + around, source)


def _read_torch(path):
    import torch  # here, so that nobody needs PyTorch for Caffe2's files

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, for broken files
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise ValueError(
                f"{shown(path)} asks for {refused[1]}; only tensors in plain containers are read, because "
                "anything else could run code. Take the file from where its authors published it, or let who "
                "trained the network save its state_dict only"
            ) from None
        raise ValueError(f"{shown(path)} cannot be read by torch.load: {error}") from error


def _read_tensorflow(path):
    try:
        from tensorflow import train
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{shown(path)} is a checkpoint of TensorFlow, which is not installed: "
            "pip install 'nlutils[keras]'"
        ) from error
    reader = train.load_checkpoint(str(path))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
