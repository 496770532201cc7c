"""The layers that the networks are built of, with PyTorch's numbers: padding, pooling, initial weights.

Each function applies one layer to a Keras tensor, channels last. `name` is the path of the same module in the
PyTorch network, "stages.0.1.a.conv"; the layer gets it in the form of `nlutils.architectures.names`. Numbers
such as `stride` are one for all axes, or one for each.
"""

import math

import keras
from keras import Input, InputSpec, layers, ops
from keras.initializers import VarianceScaling

from nlutils.architectures.names import to_layer_name
from nlutils.arguments import probability

__all__ = [
    "MaxPool",
    "batch_norm",
    "clips",
    "convolution",
    "dropout",
    "he_normal",
    "linear",
    "max_pool",
    "relu",
]

_CONV = {2: layers.Conv2D, 3: layers.Conv3D}
_PAD = {2: layers.ZeroPadding2D, 3: layers.ZeroPadding3D}


def clips(channels: int, *, frames: int | None = None, size=(None, None), name: str = "clips"):
    """The input of a network: clips (B, T, H, W, channels). None: any number of frames, any side."""
    return Input((frames, *size, channels), name=name)


def he_normal(mode: str = "fan_in") -> VarianceScaling:
    """N(0, 2 / fan), PyTorch's `kaiming_normal_` for ReLU. (Keras' own HeNormal cuts the tails off.)"""
    return VarianceScaling(2.0, mode=mode, distribution="untruncated_normal")


def convolution(x, filters: int, kernel, *, name, stride=1, padding=0, bias=True, groups=1, initializer=None):
    """A convolution in 2D or 3D, as `kernel` has two or three numbers.

    `padding` zeros are put before and as many behind each axis. (With a stride, Keras' own padding="same"
    puts fewer before than behind.) Weights start as `initializer` says, `he_normal()` if None, biases as 0.
    """
    axes = len(kernel)
    stride, padding = _each(stride, axes), _each(padding, axes)
    keeps_size = stride == (1,) * axes and all(
        side == 2 * zeros + 1 for side, zeros in zip(kernel, padding, strict=True)
    )
    if any(padding) and not keeps_size:
        x = _PAD[axes](padding, data_format="channels_last", name=to_layer_name(f"{name}.padding"))(x)
    return _CONV[axes](
        filters,
        tuple(kernel),
        strides=stride,
        padding="same" if keeps_size else "valid",
        data_format="channels_last",
        groups=groups,
        use_bias=bias,
        kernel_initializer=he_normal() if initializer is None else initializer,
        name=to_layer_name(name),
    )(x)


def linear(x, units: int, *, name, bias=True, initializer=None):
    """A linear layer on the last axis; initial weights as in `convolution`."""
    initializer = he_normal() if initializer is None else initializer
    return layers.Dense(units, use_bias=bias, kernel_initializer=initializer, name=to_layer_name(name))(x)


def batch_norm(x, *, name, epsilon=1e-5, momentum=0.9, gain="ones"):
    """Batch normalisation over all axes but the last; `gain` is what gamma starts as.

    Keras' momentum is 1 minus PyTorch's, so 0.9 is PyTorch's default of 0.1. In training Keras puts the
    biased variance of a batch into the moving variance, PyTorch the unbiased one.
    """
    return layers.BatchNormalization(
        axis=-1, epsilon=epsilon, momentum=momentum, gamma_initializer=gain, name=to_layer_name(name)
    )(x)


def relu(x, *, name):
    """max(x, 0)."""
    return layers.ReLU(name=to_layer_name(name))(x)


def dropout(x, rate: float, *, name):
    """Zeros in place of a share `rate` of the numbers in training; the others grow by 1 / (1 - rate)."""
    option = name.rpartition(".")[2]  # layers of dropout are called as the option of their rate
    return layers.Dropout(probability(option, rate), name=to_layer_name(name))(x)


def max_pool(x, window, *, name, stride=None, padding=0, ceil=False):
    """The maximum in each window, see `MaxPool`."""
    return MaxPool(window, stride, padding, ceil, name=to_layer_name(name))(x)


@keras.saving.register_keras_serializable(package="nlutils")
class MaxPool(layers.Layer):
    """The maximum in each window, (B, *size, C) -> (B, *size', C), in 2D or 3D as `window` has numbers.

    stride   None: `window`
    padding  so many places before and behind each axis, which are never the maximum
    ceil     keep a last window that reaches over the border (PyTorch's ceil_mode)

    In 3D first over space, then over time, which gives the same maximum: TensorFlow's own 3D pooling knows no
    float64. Raises ValueError where a window could lie in the padding alone, also where `ceil` leaves out
    places between windows, and for maps without a window.
    """

    def __init__(self, window, stride=None, padding=0, ceil: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.window, axes = tuple(window), len(window)
        if axes not in _CONV:
            raise ValueError(f"window={self.window} must have two numbers, or three for clips")
        self.input_spec = InputSpec(ndim=axes + 2)
        self.stride = _each(self.window if stride is None else stride, axes)
        self.padding, self.ceil = _each(padding, axes), ceil
        if ceil and any(step > size for size, step in zip(self.window, self.stride, strict=True)):
            raise ValueError(f"stride={self.stride} must be at most window={self.window} with ceil=True")
        most = tuple(
            size - step if ceil else size - 1 for size, step in zip(self.window, self.stride, strict=True)
        )
        if any(places > limit for places, limit in zip(self.padding, most, strict=True)):
            raise ValueError(
                f"padding={self.padding} is too much for window={self.window}, stride={self.stride}, "
                f"ceil={ceil}: there would be windows of padding alone; use {most} at most"
            )

    def _behind(self, size):
        """The places behind each axis; with `ceil` so many more that the last window is whole."""
        if not self.ceil:
            return self.padding
        axes = zip(size, self.padding, self.window, self.stride, strict=True)
        return tuple(
            # Where a graph leaves the side open, stride - 1 more are enough for any.
            places + (step - 1 if side is None else -(side + 2 * places - window) % step)
            for side, places, window, step in axes
        )

    def call(self, x):
        """(B, *size, C) -> (B, *size', C)."""
        self.compute_output_shape(x.shape)  # raises where no window would be left
        behind = self._behind(x.shape[1:-1])
        if any(behind):
            widths = ((0, 0), *zip(self.padding, behind, strict=True), (0, 0))
            x = ops.pad(x, widths, constant_values=-math.inf)
        if len(self.window) == 2:
            return _pool_2d(x, self.window, self.stride)
        batch, frames, *size, channels = ops.shape(x)
        x = _pool_2d(ops.reshape(x, (batch * frames, *size, channels)), self.window[1:], self.stride[1:])
        size = ops.shape(x)[1:3]
        x = ops.reshape(x, (batch, frames, size[0] * size[1], channels))
        x = _pool_2d(x, (self.window[0], 1), (self.stride[0], 1))
        return ops.reshape(x, (batch, ops.shape(x)[1], *size, channels))

    def compute_output_shape(self, input_shape):
        """(B, *size, C) -> (B, *size', C); None stays. Raises ValueError for maps without a window."""
        batch, *size, channels = input_shape
        sides = zip(size, self.padding, self._behind(size), self.window, self.stride, strict=True)
        pooled = [
            None if side is None else (side + before + behind - window) // stride + 1
            for side, before, behind, window, stride in sides
        ]
        if any(side is not None and side < 1 for side in pooled):
            raise ValueError(
                f"maps of shape {tuple(input_shape)} are too small for {self.name}, which pools over "
                f"{' x '.join(map(str, self.window))} positions; use larger clips"
            )
        return (batch, *pooled, channels)

    def get_config(self) -> dict:
        """The arguments that make this layer again."""
        own = {"window": self.window, "stride": self.stride, "padding": self.padding, "ceil": self.ceil}
        return {**super().get_config(), **own}


def _pool_2d(x, window, stride):
    if window == stride == (1, 1):
        return x
    return ops.max_pool(x, window, stride, "valid", data_format="channels_last")


def _each(value, axes):
    return tuple(value) if isinstance(value, tuple | list) else (value,) * axes
