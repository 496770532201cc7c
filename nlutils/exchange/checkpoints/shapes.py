"""Shapes and orders of axes: theirs and ours, and what to do where they do not fit."""

from math import prod

import numpy as np

__all__ = ["cure", "ours_from", "same_but_for_ones", "shape_from", "theirs_from"]

# Where PyTorch's axes are in TensorFlow's kernels, (T, H, W, in, out).
_TENSORFLOW = (4, 3, 0, 1, 2)


def shape_from(shape: tuple, name: str, scheme: str) -> tuple:
    """The shape that `ours_from` gives an array of this shape."""
    if scheme != "i3d_tf":
        return shape
    return tuple(shape[axis] for axis in _TENSORFLOW) if _is_kernel(shape, name) else (prod(shape),)


def ours_from(array: np.ndarray, name: str, scheme: str) -> np.ndarray:
    """An array of a published code in PyTorch's order of axes; `name` is ours."""
    if scheme != "i3d_tf":
        return array
    # TensorFlow's vectors of a normalisation are (1, 1, 1, 1, channels).
    return array.transpose(_TENSORFLOW) if _is_kernel(array.shape, name) else array.reshape(-1)


def _is_kernel(shape, name):
    return name.endswith(".weight") and len(shape) == 5


def theirs_from(array: np.ndarray, name: str, scheme: str, model) -> np.ndarray:
    """An array of ours as the published code has it."""
    if scheme == "i3d_tf":
        if array.ndim == 5:
            return array.transpose(2, 3, 4, 1, 0)
        return array.reshape(1, 1, 1, 1, -1) if ".norm." in name else array
    if scheme == "mmaction2" and array.ndim == 5 and model.stem.conv.kernel_size[0] == 1:
        return array[:, :, 0]
    return array


def same_but_for_ones(found: tuple, needed: tuple) -> bool:
    """Whether one is the other with a time axis of length 1, or as a convolution of size 1."""
    if found == needed:
        return True
    short, long = sorted((found, needed), key=len)
    if len(short) == 2:
        return long[:2] == short and set(long[2:]) == {1}
    return (len(short), len(long)) == (4, 5) and long[2] == 1 and long[:2] + long[3:] == short


def cure(name: str, found: tuple, needed: tuple) -> str:
    """What to do where `found` does not fit the weight of ours called `name`."""
    if name.startswith(("classifier.", "logits.")) and found[1:2] == needed[1:2]:
        return f"make the model with num_classes={found[0]}, or keep its last layer with classifier=False"
    if len(found) in (4, 5) and len(needed) == 5 and found[:2] + found[-2:] == needed[:2] + needed[-2:]:
        one_frame = len(found) == 4 or found[2] == 1
        inflate = ", or inflate its weights, see nlutils.torch.inflation" if one_frame else ""
        return f"make the model with the file's inflate=, whose kernels see other numbers of frames{inflate}"
    if name.startswith(("stem.", "features.")) and found[:1] + found[2:] == needed[:1] + needed[2:]:
        return f"make the model with the input= that has the file's {found[1]} channels"
    return "make the model of the file's size (width=, depth=, num_classes=)"
