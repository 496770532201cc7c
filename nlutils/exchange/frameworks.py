"""Weights of a block between PyTorch and Keras, through NumPy arrays.

A block is a `NonLocalBlock` or a `CompactGeneralizedNonLocalBlock` of nlutils.torch or nlutils.keras.

The arrays have the names and layouts that the PyTorch block has in its state_dict: "theta.weight" of shape
(d, C, 1, 1, 1), "norm.running_mean", "w_f". Neither framework is imported here: a block brings its own.
"""

import numpy as np

__all__ = ["from_arrays", "keras_to_torch", "to_arrays", "torch_to_keras"]

_LAYERS = ("theta", "phi", "g", "w_z", "norm")
# Keras' variable names and PyTorch's.
_TORCH_NAME = {
    "kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def torch_to_keras(torch_block, keras_block) -> None:
    """Copy the weights of a block of `nlutils.torch` into the built block of `nlutils.keras`.

    Raises ValueError that lists every weight that one of them lacks or that has another shape; then nothing
    was copied. Options without weights (instantiation, sub-sampling, attention) are not looked at.
    """
    from_arrays(keras_block, to_arrays(torch_block))


def keras_to_torch(keras_block, torch_block) -> None:
    """Copy the weights of a built block of `nlutils.keras` into the block of `nlutils.torch`.

    Errors as in `torch_to_keras`. PyTorch's count of seen batches has no counterpart in Keras and stays.
    """
    from_arrays(torch_block, to_arrays(keras_block))


def to_arrays(block) -> dict[str, np.ndarray]:
    """The weights of a PyTorch or Keras block as new NumPy arrays, with PyTorch's names and layouts.

    In the block's precision, except bfloat16, which NumPy does not have: it goes out as float32, exactly.
    """
    if _is_torch(block):
        return {name: as_array(tensor).copy() for name, tensor in _torch_tensors(block).items()}
    return {
        name: _to_torch_layout(as_array(variable.value).copy())
        for name, variable in _keras_variables(block).items()
    }


def from_arrays(block, arrays: dict[str, np.ndarray]) -> None:
    """Write `arrays`, named and laid out as by `to_arrays`, into a PyTorch or a built Keras block.

    Numbers are rounded to the block's precision where it is lower.
    Raises ValueError that lists every missing name, unknown name and wrong shape; then nothing was written.
    """
    if _is_torch(block):
        tensors = _torch_tensors(block)
        _check(arrays, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, "the PyTorch block")
        for name, tensor in tensors.items():
            values = tensor.detach()  # shares memory with the parameter
            values.copy_(values.new_tensor(as_array(arrays[name])))
        return
    variables = _keras_variables(block)
    shapes = {name: _torch_shape(tuple(variable.shape)) for name, variable in variables.items()}
    _check(arrays, shapes, "the Keras block")
    for name, variable in variables.items():
        variable.assign(_to_keras_layout(as_array(arrays[name])))


def as_array(value) -> np.ndarray:
    """A tensor of any framework, or an array, as a NumPy array; bfloat16 becomes float32."""
    if hasattr(value, "detach"):  # PyTorch's, which does not give out bfloat16
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _is_torch(block):
    if hasattr(
        block, "get_config"
    ):  # first, because a Keras layer on the PyTorch backend is an nn.Module too
        return False
    if hasattr(block, "state_dict"):
        return True
    raise TypeError(
        f"block is a {type(block).__name__}; it must be a NonLocalBlock or a "
        "CompactGeneralizedNonLocalBlock of nlutils.torch or nlutils.keras"
    )


def _torch_tensors(block):
    """Parameters and statistics by name, without BatchNorm's count of batches, which Keras does not have."""
    tensors = block.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}


def _keras_variables(block):
    """Variables by the name that PyTorch has for them."""
    if not block.built:
        raise ValueError(
            "the Keras block has no weights yet; call it once, or block.build(shape of the input)"
        )
    variables = {
        f"{layer}.{_TORCH_NAME[variable.name]}": variable
        for layer in _LAYERS
        for variable in getattr(block, layer).weights
    }
    if getattr(block, "w_f", None) is not None:
        variables["w_f"] = block.w_f
    return variables


def _to_torch_layout(array):
    """A Keras kernel (*size, in, out) becomes (out, in, *size); vectors stay."""
    return array if array.ndim < 2 else np.moveaxis(array, (-1, -2), (0, 1))


def _to_keras_layout(array):
    """A PyTorch kernel (out, in, *size) becomes (*size, in, out); vectors stay."""
    return array if array.ndim < 2 else np.moveaxis(array, (0, 1), (-1, -2))


def _torch_shape(keras_shape):
    return keras_shape if len(keras_shape) < 2 else (keras_shape[-1], keras_shape[-2], *keras_shape[:-2])


def _check(arrays, shapes, owner):
    faults = [f"{name} is missing" for name in shapes if name not in arrays]
    faults += [f"{name} is not a weight of {owner}" for name in arrays if name not in shapes]
    faults += [
        f"{name} has shape {np.shape(arrays[name])}, {owner} needs {shape}"
        for name, shape in shapes.items()
        if name in arrays and np.shape(arrays[name]) != shape
    ]
    if faults:
        raise ValueError(f"these weights do not fit {owner}: {'; '.join(faults)}")
