"""The non-local block as a Keras 3 layer, in keras.ops only: TensorFlow, PyTorch and JAX run it.

Wang, Girshick, Gupta, He: Non-local Neural Networks, CVPR 2018, section 3.3, https://arxiv.org/abs/1711.07971
Initialisation and the order of pooling follow the authors' released code.
"""

import keras
from keras import layers, ops
from keras.initializers import RandomNormal

from nlutils.instantiations import check_block, check_map
from nlutils.keras.operations import non_local
from nlutils.keras.operations.concatenation import rectified_sum

__all__ = ["NonLocalBlock"]

_CONV = {1: layers.Conv1D, 2: layers.Conv2D, 3: layers.Conv3D}


@keras.saving.register_keras_serializable(package="nlutils")
class NonLocalBlock(layers.Layer):
    """z_i = W_z y_i + x_i, the paper's equation 6, around the non-local operation y of equation 1.

    Takes and returns feature maps (B, N, C), (B, H, W, C) or (B, T, H, W, C) for `ndim` 1, 2, 3.

    in_channels       C; None: whatever the first input has
    inner_channels    d, the width of theta, phi and g; None: half of C
    instantiation     "gaussian" (theta and phi are the identity, without weights), "embedded_gaussian",
                      "dot_product" or "concatenation" (with a vector `w_f` of 2d weights)
    subsample         "before": phi and g see the map max-pooled by 2 in height and width (released code);
                      "after": what phi and g return is pooled (the paper's figure 2); None: no pooling
    scale             True: theta_i . phi_j is multiplied by (width of theta)^(-1/2); softmax forms only
    norm              batch normalisation after W_z
    zero_init         start as the identity, z = x: the norm's gain is 0, or W_z is 0 where there is no norm
    attention         "spacetime": each position looks at all; "space": at its own frame; "time": at its own
                      place in all frames. The last two need ndim=3
    frames_per_group  look at groups of so many frames instead of all T; it must divide T. None: all

    Weights start as N(0, 0.01), biases as 0. `kwargs` (name, dtype, trainable) go to `keras.layers.Layer`.
    Raises ValueError, naming the argument, for what does not fit.

    The same weights give the same output and gradient as `nlutils.torch.NonLocalBlock`. One thing differs in
    training: Keras puts the biased variance of a batch into the moving variance, PyTorch the unbiased one.
    """

    def __init__(
        self,
        in_channels: int | None = None,
        inner_channels: int | None = None,
        *,
        ndim: int = 3,
        instantiation: str = "embedded_gaussian",
        subsample: str | None = None,
        scale: bool = False,
        norm: bool = True,
        zero_init: bool = True,
        attention: str = "spacetime",
        frames_per_group: int | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self._options = {
            "in_channels": in_channels,
            "inner_channels": inner_channels,
            "ndim": ndim,
            "instantiation": instantiation,
            "subsample": subsample,
            "scale": scale,
            "norm": norm,
            "zero_init": zero_init,
            "attention": attention,
            "frames_per_group": frames_per_group,
        }
        check_block(**self._options)
        self.in_channels = in_channels
        self.inner_channels = inner_channels
        self.ndim = ndim
        self.instantiation = instantiation
        self.subsample = subsample
        self.scale = scale
        self.zero_init = zero_init
        self.attention = attention
        self.frames_per_group = frames_per_group

    def build(self, input_shape) -> None:
        """Make the weights, for inputs of the channels that `input_shape` ends with."""
        check_map(input_shape, self.in_channels, self.ndim, self.frames_per_group, channels_last=True)
        if input_shape[-1] is None:
            raise ValueError(
                f"x of shape {tuple(input_shape)} must have a known number of channels, the last axis"
            )
        self.in_channels = in_channels = input_shape[-1]
        self.inner_channels = inner_channels = self.inner_channels or max(in_channels // 2, 1)
        maps, inner_maps = tuple(input_shape), (*input_shape[:-1], inner_channels)

        embedded = self.instantiation != "gaussian"
        self.theta = self._conv(inner_channels, maps, "theta") if embedded else self._identity("theta")
        self.phi = self._conv(inner_channels, maps, "phi") if embedded else self._identity("phi")
        self.g = self._conv(inner_channels, maps, "g")
        self.w_f = None
        if self.instantiation == "concatenation":
            self.w_f = self.add_weight(
                name="w_f", shape=(2 * inner_channels,), initializer=RandomNormal(stddev=0.01)
            )
        has_norm = self._options["norm"]
        self.w_z = self._conv(in_channels, inner_maps, "w_z", zeros=self.zero_init and not has_norm)
        self.norm = self._batch_norm(maps) if has_norm else self._identity("norm")

    def _conv(self, channels, input_shape, name, zeros=False):
        conv = _CONV[self.ndim](
            channels,
            1,
            data_format="channels_last",
            kernel_initializer="zeros" if zeros else RandomNormal(stddev=0.01),
            dtype=self.dtype_policy,
            name=name,
        )
        conv.build(input_shape)
        return conv

    def _batch_norm(self, input_shape):
        # Keras' momentum 0.9 keeps as much of the old statistics as PyTorch's 0.1.
        norm = layers.BatchNormalization(
            axis=-1,
            momentum=0.9,
            epsilon=1e-5,
            gamma_initializer="zeros" if self.zero_init else "ones",
            dtype=self.dtype_policy,
            name="norm",
        )
        norm.build(input_shape)
        return norm

    def _identity(self, name):
        return layers.Identity(dtype=self.dtype_policy, name=name)

    def call(self, x, training=None):
        """(B, *size, C) -> (B, *size, C)."""
        self.check_input(x)
        y = self._concatenation(x) if self._folds else self._operation(*self.embed(x))
        return x + self.norm(self.w_z(self._maps(y, x)), training=training)

    def check_input(self, x) -> None:
        """Raise ValueError unless `x` is a batch of maps that this block can take."""
        check_map(x.shape, self.in_channels, self.ndim, self.frames_per_group, channels_last=True)

    def embed(self, x):
        """theta(x), phi(x), g(x) as maps (B, *size, d), the last two sub-sampled."""
        keys = self._pool(x) if self.subsample == "before" else x
        theta, phi, g = self.theta(x), self.phi(keys), self.g(keys)
        if self.subsample == "after":
            phi, g = self._pool(phi), self._pool(g)
        return theta, phi, g

    @property
    def logit_scale(self) -> float:
        """What multiplies theta_i . phi_j: (width of theta)^(-1/2) with scale=True, else 1."""
        width = self.in_channels if self.instantiation == "gaussian" else self.inner_channels
        return width**-0.5 if self.scale else 1.0

    def _operation(self, theta, phi, g):
        theta, phi, g = (self._sequences(maps) for maps in (theta, phi, g))
        return non_local(theta, phi, g, self.instantiation, w_f=self.w_f, scale=self.logit_scale)

    @property
    def _folds(self):
        # w_f . [theta_i, phi_j] needs one number a position, and a maximum over phi none of them.
        return self.instantiation == "concatenation" and self.subsample != "after"

    def _concatenation(self, x):
        """w_f folds into theta and phi: each is one vector C -> 1, so only g is a wide convolution."""
        keys = self._pool(x) if self.subsample == "before" else x
        half_theta, half_phi = ops.split(ops.convert_to_tensor(self.w_f), 2)
        a, b = _fold(self.theta, half_theta, x), _fold(self.phi, half_phi, keys)
        a, b, g = (self._sequences(maps) for maps in (a, b, self.g(keys)))
        return rectified_sum(a[:, :, 0], b[:, :, 0], g)

    def _pool(self, maps):
        # Frame by frame, because TensorFlow's 3D pooling knows no float64. A map of 1 x 1 stays as it is, and
        # an odd last row or column is left out, as in PyTorch: padding keeps both, and the slice takes off
        # the half-filled windows.
        sides = min(self.ndim, 2)
        *outer, channels = ops.shape(maps)
        outer, size = outer[:-sides], outer[-sides:]
        frames = ops.reshape(maps, (-1, *size, channels))
        pooled = ops.max_pool(frames, 2, 2, padding="same", data_format="channels_last")
        kept = [_at_least_one(side // 2) for side in size]
        pooled = pooled[(slice(None), *(slice(0, count) for count in kept))]
        return ops.reshape(pooled, (*outer, *kept, channels))

    def _sequences(self, maps):
        """(B, *size, C) -> (B', N, C): each of the B' rows holds positions that look at each other."""
        channels = maps.shape[-1]
        if self.attention == "time":
            maps = ops.transpose(maps, (0, 2, 3, 1, 4))
            group = self.frames_per_group or ops.shape(maps)[3]
            return ops.reshape(maps, (-1, group, channels))
        batch, *size = ops.shape(maps)[:-1]
        if self.attention == "space":
            return ops.reshape(maps, (-1, size[1] * size[2], channels))
        if self.frames_per_group:
            return ops.reshape(maps, (-1, self.frames_per_group * size[1] * size[2], channels))
        return ops.reshape(maps, (batch, -1, channels))

    def _maps(self, y, x):
        """The way back: (B', N, c) -> (B, *size, c), with the size of x."""
        batch, *size = ops.shape(x)[:-1]
        if self.attention == "time":
            frames, height, width = size
            y = ops.reshape(y, (batch, height, width, frames, self.inner_channels))
            return ops.transpose(y, (0, 3, 1, 2, 4))
        return ops.reshape(y, (batch, *size, self.inner_channels))

    def compute_output_shape(self, input_shape):
        """The shape of the input."""
        return tuple(input_shape)

    def get_config(self) -> dict:
        """The arguments that make this layer again."""
        return {**super().get_config(), **self._options}


def _fold(conv, vector, maps):
    """vector . conv(maps), (B, *size, C) -> (B, *size, 1), by one vector instead of the whole convolution."""
    kernel = ops.reshape(conv.kernel, (-1, conv.filters))
    return ops.matmul(maps, ops.matmul(kernel, vector[:, None])) + ops.sum(conv.bias * vector)


def _at_least_one(size):
    # A TensorFlow graph may leave a size open; JAX needs every size as a plain number.
    return max(size, 1) if isinstance(size, int) else ops.maximum(size, 1)
