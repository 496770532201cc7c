"""Weights of a block or a whole network between PyTorch and Keras, through NumPy arrays.

A block is a `NonLocalBlock` or a `CompactGeneralizedNonLocalBlock` of nlutils.torch or nlutils.keras, a
network one that `create_model` of both makes. In Keras any `keras.Model` will do whose layers have the names
of the PyTorch modules, in the form of `nlutils.architectures.names`.

The arrays have the names and layouts of PyTorch's state_dict: "theta.weight" of shape (d, C, 1, 1, 1),
"norm.running_mean", "w_f"; in a network "stages.0.1.a.conv.weight", and of a block in it
"stages.2.4.non_local.theta.weight". Neither framework is imported here: a block brings its own.

An LSTM has one bias in Keras and two in PyTorch, which are only ever added: their sum goes to Keras, and
comes back as the first, with a second of zeros.
"""

from collections.abc import Mapping

import numpy as np

from nlutils.architectures.names import to_module_path

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
# Gates are in the same order in both: input, forget, cell, output.
_TORCH_LSTM_NAME = {"kernel": "weight_ih_l0", "recurrent_kernel": "weight_hh_l0", "bias": "bias_ih_l0"}
_FIRST_BIAS, _SECOND_BIAS = "bias_ih_l0", "bias_hh_l0"


def torch_to_keras(torch_block, keras_block) -> None:
    """Copy the weights of a block or network of `nlutils.torch` into the built one of `nlutils.keras`.

    Raises ValueError that lists every weight that one of them lacks or that has another shape; then nothing
    was copied. Options without weights (instantiation, sub-sampling, attention, strides, pools) are not
    looked at.
    """
    _check_frameworks(torch_block, keras_block)
    from_arrays(keras_block, to_arrays(torch_block))


def keras_to_torch(keras_block, torch_block) -> None:
    """Copy the weights of a built block or network of `nlutils.keras` into the one of `nlutils.torch`.

    Errors as in `torch_to_keras`. PyTorch's count of seen batches has no counterpart in Keras and stays.
    """
    _check_frameworks(torch_block, keras_block)
    from_arrays(torch_block, to_arrays(keras_block))


def to_arrays(block) -> dict[str, np.ndarray]:
    """The weights of a PyTorch or Keras block or network: new NumPy arrays, PyTorch's names and layouts.

    In its precision, except bfloat16, which NumPy does not have: it goes out as float32, exactly.
    """
    if _is_torch(block):
        return {name: as_array(tensor).copy() for name, tensor in _torch_tensors(block).items()}
    arrays = {}
    for name, variable in _keras_variables(block).items():
        arrays[name] = _to_torch_layout(as_array(variable.value).copy())
        if (second := _second_bias(name)) is not None:
            arrays[second] = np.zeros_like(arrays[name])
    return arrays


def from_arrays(block, arrays: dict[str, np.ndarray]) -> None:
    """Write `arrays`, named and laid out as by `to_arrays`, into a PyTorch or built Keras block or network.

    Numbers are rounded to its precision where that is lower; those beyond its range become infinite.
    Raises ValueError that lists every missing name, unknown name, wrong shape, and array of other than real
    numbers; then nothing was written.
    """
    if _is_torch(block):
        tensors = _torch_tensors(block)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        arrays = _checked(arrays, shapes, f"the PyTorch {_kind(block)}")
        for name, tensor in tensors.items():
            values = tensor.detach()  # shares memory with the parameter
            values.copy_(values.new_tensor(arrays[name]))
        return
    variables = _keras_variables(block)
    shapes = {name: _torch_shape(tuple(variable.shape)) for name, variable in variables.items()}
    seconds = {name: second for name in variables if (second := _second_bias(name)) is not None}
    shapes |= {second: shapes[name] for name, second in seconds.items()}
    arrays = _checked(arrays, shapes, f"the Keras {_kind(block)}")
    for name, variable in variables.items():
        array = arrays[name]
        if name in seconds:
            array = array + arrays[seconds[name]]
        variable.assign(_to_keras_layout(array))


def as_array(value) -> np.ndarray:
    """A tensor of any framework, or an array, as a NumPy array; bfloat16 becomes float32."""
    if hasattr(value, "detach"):  # PyTorch's, which does not give out bfloat16
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _is_torch(block):
    is_object = not isinstance(block, type)
    # Keras first, because on the PyTorch backend its layers are modules too.
    if is_object and hasattr(block, "get_config") and hasattr(block, "count_params"):
        return False
    if is_object and hasattr(block, "named_parameters"):
        return True
    kind = f"the class {block.__name__}" if isinstance(block, type) else f"a {type(block).__name__}"
    raise TypeError(
        f"block is {kind}; it must be a NonLocalBlock or a CompactGeneralizedNonLocalBlock, or a network, of "
        "nlutils.torch or nlutils.keras"
    )


def _check_frameworks(torch_block, keras_block):
    """Copying would work the other way round, too, and write over the weights that were meant to stay."""
    for name, block, expected in (("torch_block", torch_block, True), ("keras_block", keras_block, False)):
        if _is_torch(block) != expected:
            found, wanted = ("PyTorch", "Keras")[expected], ("Keras", "PyTorch")[expected]
            raise TypeError(
                f"{name} is a {type(block).__name__} of {found}, and must be of {wanted}; the order is "
                "torch_to_keras(torch_block, keras_block) and keras_to_torch(keras_block, torch_block)"
            )


def _kind(block):
    return "block" if _is_block(block) else "network"


def _is_block(block):
    return hasattr(block, "inner_channels")  # the other parts are not there before it is built


def _torch_tensors(block):
    """Parameters and statistics by name, without BatchNorm's count of batches, which Keras does not have."""
    tensors = block.state_dict(keep_vars=True)
    if any(tensor.is_meta for tensor in tensors.values()):
        raise ValueError(
            f'the PyTorch {_kind(block)} is on the device "meta", where it has no numbers; make it on "cpu"'
        )
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}


def _keras_variables(block):
    """Variables by the name that PyTorch has for them."""
    if not block.built:
        raise ValueError(
            f"the Keras {_kind(block)} has no weights yet; call it once, or block.build(shape of the input)"
        )
    variables = {}
    for name, variable in _walk(block):
        if name in variables:
            raise ValueError(f"the Keras network has two weights called {name}; give its layers other names")
        variables[name] = variable
    return variables


def _walk(layer, path=""):
    """(PyTorch's name, variable) of all weights; `path` is the layer's own, with a dot at its end."""
    if _is_block(layer):
        for part in _LAYERS:
            yield from _walk(getattr(layer, part), f"{path}{part}.")
        if getattr(layer, "w_f", None) is not None:
            yield f"{path}w_f", layer.w_f
    elif hasattr(layer, "layers"):  # a network
        for inner in layer.layers:
            yield from _walk(inner, f"{path}{to_module_path(inner.name)}.")
    else:
        names = _TORCH_LSTM_NAME if type(layer).__name__ == "LSTM" else _TORCH_NAME
        for variable in layer.weights:
            if variable.name not in names:
                raise ValueError(
                    f"the Keras layer {layer.name!r}, a {type(layer).__name__}, has a weight "
                    f"{variable.name!r} for which PyTorch has no name; known are {', '.join(names)}"
                )
            yield path + names[variable.name], variable


def _second_bias(name):
    """The name of the bias that PyTorch's LSTM adds to the one called `name`; None for other weights."""
    if name.rpartition(".")[2] != _FIRST_BIAS:
        return None
    return name.removesuffix(_FIRST_BIAS) + _SECOND_BIAS


def _to_torch_layout(array):
    """A Keras kernel (*size, in, out) becomes (out, in, *size); vectors stay."""
    return array if array.ndim < 2 else np.moveaxis(array, (-1, -2), (0, 1))


def _to_keras_layout(array):
    """A PyTorch kernel (out, in, *size) becomes (*size, in, out); vectors stay."""
    return array if array.ndim < 2 else np.moveaxis(array, (0, 1), (-1, -2))


def _torch_shape(keras_shape):
    return keras_shape if len(keras_shape) < 2 else (keras_shape[-1], keras_shape[-2], *keras_shape[:-2])


def _checked(arrays, shapes, owner):
    """The `arrays` as NumPy's; ValueError unless they have these names and shapes, and real numbers."""
    if not isinstance(arrays, Mapping):
        raise TypeError(f"arrays is a {type(arrays).__name__}; it must be a dict of arrays by name")
    faults = [f"{name} is missing" for name in shapes if name not in arrays]
    faults += [f"{name} is not a weight of {owner}" for name in arrays if name not in shapes]
    checked = {}
    for name in (name for name in shapes if name in arrays):
        # The shape first: a few bytes can say that they are a tensor of any size.
        shape = np.shape(arrays[name]) if hasattr(arrays[name], "shape") else as_array(arrays[name]).shape
        if tuple(shape) != shapes[name]:
            faults.append(f"{name} has shape {tuple(shape)}, {owner} needs {shapes[name]}")
            continue
        checked[name] = as_array(arrays[name])
        if checked[name].dtype.kind not in "iuf":
            faults.append(f"{name} is of {checked[name].dtype}, {owner} needs real numbers")
    if faults:
        raise ValueError(f"these weights do not fit {owner}: {'; '.join(faults)}")
    return checked
