"""The compact generalized non-local block as a Keras 3 layer: TensorFlow, PyTorch and JAX run it.

Yue, Sun, Yuan, Zhou, Ding, Xu: Compact Generalized Non-local Network, NeurIPS 2018,
https://arxiv.org/abs/1810.13125. Layers and initialisation follow the authors' released code.
"""

import keras
from keras import layers, ops
from keras.initializers import RandomNormal

from nlutils.instantiations import check_map
from nlutils.keras.operations import compact_generalized
from nlutils.kernels import check_generalized_block

__all__ = ["CompactGeneralizedNonLocalBlock"]

_CONV = {1: layers.Conv1D, 2: layers.Conv2D, 3: layers.Conv3D}


@keras.saving.register_keras_serializable(package="nlutils")
class CompactGeneralizedNonLocalBlock(layers.Layer):
    """z = x + norm(W_z y), around y of `compact_generalized`, which compares entries (position, channel).

    Takes and returns feature maps (B, N, C), (B, H, W, C) or (B, T, H, W, C) for `ndim` 1, 2, 3.

    in_channels     C; groups must divide it. None: whatever the first input has
    inner_channels  the width of theta, phi and g; groups must divide it. None: half of C
    groups          the channels of theta, phi and g, of W_z and of the norm are cut into so many groups
    kernel          "dot", or "rbf": a Taylor sum of powers 0 to `order`
    order           of "rbf", 1 or more

    theta, phi and g are convolutions of size 1 without bias, w_z is one in groups, norm is a
    GroupNormalization. Weights start as N(0, 0.01), the norm's gain and bias as 0, so that the block starts
    as the identity. Where the layer computes in float16 or bfloat16, y, W_z and the norm are computed in
    float32. `kwargs` (name, dtype, trainable) go to `keras.layers.Layer`. Raises ValueError, naming the
    argument, for what does not fit.

    The same weights give the same output, gradient and training as
    `nlutils.torch.CompactGeneralizedNonLocalBlock`; its docstring says what the norm does to the dot kernel.
    """

    def __init__(
        self,
        in_channels: int | None = None,
        inner_channels: int | None = None,
        *,
        ndim: int = 3,
        groups: int = 8,
        kernel: str = "dot",
        order: int = 3,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self._options = {
            "in_channels": in_channels,
            "inner_channels": inner_channels,
            "ndim": ndim,
            "groups": groups,
            "kernel": kernel,
            "order": order,
        }
        check_generalized_block(**self._options)
        self.in_channels = in_channels
        self.inner_channels = inner_channels
        self.ndim = ndim
        self.groups = groups
        self.kernel = kernel
        self.order = order

    def build(self, input_shape) -> None:
        """Make the weights, for inputs of the channels that `input_shape` ends with."""
        check_map(input_shape, self.in_channels, self.ndim, None, channels_last=True)
        if input_shape[-1] is None:
            raise ValueError(
                f"x of shape {tuple(input_shape)} must have a known number of channels, the last axis"
            )
        check_generalized_block(**{**self._options, "in_channels": input_shape[-1]})
        self.in_channels = in_channels = input_shape[-1]
        self.inner_channels = inner_channels = self.inner_channels or max(in_channels // 2, 1)
        maps, inner_maps = tuple(input_shape), (*input_shape[:-1], inner_channels)

        self.theta = self._conv(inner_channels, maps, "theta")
        self.phi = self._conv(inner_channels, maps, "phi")
        self.g = self._conv(inner_channels, maps, "g")
        # Their inputs grow with the map and leave float16.
        full = "float32" if self.compute_dtype in ("float16", "bfloat16") else self.dtype_policy
        self.w_z = self._conv(in_channels, inner_maps, "w_z", groups=self.groups, dtype=full)
        self.norm = layers.GroupNormalization(
            self.groups, axis=-1, epsilon=1e-5, gamma_initializer="zeros", dtype=full, name="norm"
        )
        self.norm.build(maps)

    def _conv(self, channels, input_shape, name, groups=1, dtype=None):
        conv = _CONV[self.ndim](
            channels,
            1,
            groups=groups,
            use_bias=False,
            data_format="channels_last",
            kernel_initializer=RandomNormal(stddev=0.01),
            dtype=dtype or self.dtype_policy,
            name=name,
        )
        conv.build(input_shape)
        return conv

    def call(self, x):
        """(B, *size, C) -> (B, *size, C)."""
        check_map(x.shape, self.in_channels, self.ndim, None, channels_last=True)
        if x.shape[0] == 0:  # Keras' GroupNormalization cannot take it on the PyTorch and JAX backends
            return x
        batch, *size = ops.shape(x)[:-1]
        theta, phi, g = (
            ops.reshape(layer(x), (batch, -1, self.inner_channels))
            for layer in (self.theta, self.phi, self.g)
        )
        y = compact_generalized(theta, phi, g, groups=self.groups, kernel=self.kernel, order=self.order)
        y = ops.reshape(y, (batch, *size, self.inner_channels))
        return x + ops.cast(self.norm(self.w_z(y)), x.dtype)

    def compute_output_shape(self, input_shape):
        """The shape of the input."""
        return tuple(input_shape)

    def get_config(self) -> dict:
        """The arguments that make this layer again."""
        return {**super().get_config(), **self._options}
