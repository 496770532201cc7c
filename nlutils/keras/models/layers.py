"""Layers that networks need and Keras lacks: response normalisation, frames as examples, averaged votes.

Sizes that a graph leaves open (None) fit every check here.
"""

import keras
from keras import ops
from keras.layers import Layer

from nlutils.arguments import positive_integer
from nlutils.keras.operations.precision import at_least_float32

__all__ = ["BatchAsFrames", "FramesAsBatch", "LeastClip", "MeanProbability", "ResponseNorm", "Snapshots"]


@keras.saving.register_keras_serializable(package="nlutils")
class LeastClip(Layer):
    """Clips (B, T, H, W, C) as they are; ValueError for one that is smaller than `least`, its (T, H, W)."""

    def __init__(self, least, **kwargs):
        super().__init__(**kwargs)
        self.least = tuple(least)

    def call(self, clips):
        """(B, T, H, W, C) -> (B, T, H, W, C)."""
        self._check(tuple(clips.shape))
        return clips

    def _check(self, shape):
        if any(side is not None and side < need for side, need in zip(shape[1:4], self.least, strict=True)):
            raise ValueError(
                f"clips of shape {shape} are too small: T, H and W must be at least "
                f"{', '.join(map(str, self.least))}"
            )

    def compute_output_shape(self, input_shape):
        """The shape of the input."""
        self._check(tuple(input_shape))
        return tuple(input_shape)

    def get_config(self) -> dict:
        """The arguments that make this layer again."""
        return {**super().get_config(), "least": self.least}


@keras.saving.register_keras_serializable(package="nlutils")
class ResponseNorm(Layer):
    """Local response normalisation of (..., C), Krizhevsky, Sutskever, Hinton, NIPS 2012, section 3.3.

        b_c = a_c / (k + alpha / n * (sum of a^2 over the n channels around c)) ^ beta

    Channels beyond the first and the last count as 0. As in Caffe and in PyTorch's LocalResponseNorm, alpha
    is divided by n; the paper's alpha is not. Half precision is computed in float32.
    """

    def __init__(self, n: int = 5, *, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, **kwargs):
        super().__init__(**kwargs)
        self.n, self.alpha, self.beta, self.k = positive_integer("n", n), alpha, beta, k

    def call(self, x):
        """(..., C) -> (..., C)."""
        a, channels = at_least_float32(x), x.shape[-1]
        edges = [(0, 0)] * (len(x.shape) - 1) + [(self.n // 2, (self.n - 1) // 2)]
        squares = ops.pad(ops.square(a), edges)
        around = sum(squares[..., start : start + channels] for start in range(self.n))
        return ops.cast(a / (self.k + self.alpha / self.n * around) ** self.beta, x.dtype)

    def compute_output_shape(self, input_shape):
        """The shape of the input."""
        return tuple(input_shape)

    def get_config(self) -> dict:
        """The arguments that make this layer again."""
        return {**super().get_config(), "n": self.n, "alpha": self.alpha, "beta": self.beta, "k": self.k}


@keras.saving.register_keras_serializable(package="nlutils")
class FramesAsBatch(Layer):
    """(B, T, H, W, C) -> (B T, H, W, C): every frame an example of its own."""

    def call(self, x):
        """(B, T, H, W, C) -> (B T, H, W, C)."""
        batch, frames, *rest = ops.shape(x)
        return ops.reshape(x, (batch * frames, *rest))

    def compute_output_shape(self, input_shape):
        """(B, T, ...) -> (B T, ...), None where B or T is."""
        batch, frames, *rest = input_shape
        return (None if None in (batch, frames) else batch * frames, *rest)


@keras.saving.register_keras_serializable(package="nlutils")
class BatchAsFrames(Layer):
    """The way back from `FramesAsBatch`: (B T, ...) and the clips (B, T, ...) -> (B, T, ...)."""

    def call(self, x, clips):
        """(B T, ...), (B, T, ...) -> (B, T, ...): the numbers of `x`; of `clips` only B and T are used."""
        return ops.reshape(x, (*ops.shape(clips)[:2], *ops.shape(x)[1:]))

    def compute_output_shape(self, x_shape, clips_shape):
        """B and T of the clips, the other sides of x."""
        return (*clips_shape[:2], *x_shape[1:])


@keras.saving.register_keras_serializable(package="nlutils")
class MeanProbability(Layer):
    """S votes averaged: logits (B, S, num_classes) -> the log of their mean softmax, (B, num_classes).

    Half precision is computed in float32.
    """

    def call(self, votes):
        """(B, S, num_classes) -> (B, num_classes)."""
        logits = at_least_float32(votes)
        total = ops.logsumexp(ops.log_softmax(logits, axis=-1), axis=1)
        count = ops.cast(ops.shape(votes)[1], logits.dtype)
        return ops.cast(total - ops.log(count), votes.dtype)

    def compute_output_shape(self, input_shape):
        """(B, S, num_classes) -> (B, num_classes)."""
        return (input_shape[0], *input_shape[2:])


@keras.saving.register_keras_serializable(package="nlutils")
class Snapshots(Layer):
    """A clip cut into S places in time, a frame and a stack of flow each.

    rgb (B, T, H, W, 3) and flow (B, F, H, W, 2) -> (B, S, H, W, 3) and (B, S, H, W, 2 stack), S = F // stack:
    the middle frame of each of S equal parts of the clip (with T = S all frames), and the fields of each
    stack as channels dx, dy, dx, dy, ...

    Raises ValueError for less flow than a stack, or fewer frames than stacks, or where the two differ in
    batch, height or width.
    """

    def __init__(self, stack: int = 10, **kwargs):
        super().__init__(**kwargs)
        self.stack = positive_integer("stack", stack)

    def call(self, rgb, flow):
        """(B, T, H, W, 3), (B, F, H, W, 2) -> (B, S, H, W, 3), (B, S, H, W, 2 stack)."""
        self._check(tuple(rgb.shape), tuple(flow.shape))
        (batch, fields, height, width, parts), frames = ops.shape(flow), ops.shape(rgb)[1]
        count = fields // self.stack
        picks = (2 * ops.arange(count, dtype="int32") + 1) * frames // (2 * count)
        stacks = ops.reshape(flow[:, : count * self.stack], (batch, count, self.stack, height, width, parts))
        stacks = ops.transpose(stacks, (0, 1, 3, 4, 2, 5))
        stacks = ops.reshape(stacks, (batch, count, height, width, self.stack * parts))
        return ops.take(rgb, picks, axis=1), stacks

    def _check(self, rgb, flow):
        frames, fields = rgb[1], flow[1]
        if fields is not None and fields < self.stack:
            raise ValueError(f"flow has {fields} fields; stack={self.stack} needs at least as many")
        if fields is not None and frames is not None and frames < fields // self.stack:
            raise ValueError(
                f"rgb has {frames} frames for {fields // self.stack} stacks of flow; give one a stack or more"
            )
        pairs = zip((rgb[0], *rgb[2:4]), (flow[0], *flow[2:4]), strict=True)
        if any(None not in (one, other) and one != other for one, other in pairs):
            raise ValueError(f"rgb {rgb} and flow {flow} must agree in batch, height and width")

    def compute_output_shape(self, rgb_shape, flow_shape):
        """The shapes of the frames and of the stacks."""
        self._check(tuple(rgb_shape), tuple(flow_shape))
        batch, fields, *size, parts = flow_shape
        count = None if fields is None else fields // self.stack
        return (batch, count, *size, rgb_shape[-1]), (batch, count, *size, self.stack * parts)

    def get_config(self) -> dict:
        """The arguments that make this layer again."""
        return {**super().get_config(), "stack": self.stack}
