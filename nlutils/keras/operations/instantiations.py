"""The non-local operation as pure functions on (B, N, d) tensors of any Keras backend.

Wang, Girshick, Gupta, He: Non-local Neural Networks, CVPR 2018, https://arxiv.org/abs/1711.07971, section 3
"""

import keras
from keras import ops

from nlutils.instantiations import SOFTMAX_FORMS, check_operation, check_shapes
from nlutils.keras.operations.concatenation import rectified_sum
from nlutils.keras.operations.precision import at_least_float32, product
from nlutils.keras.operations.softmax import attend, softmax_map

__all__ = ["non_local", "pairwise"]


def non_local(theta, phi, g, instantiation: str = "embedded_gaussian", *, w_f=None, scale: float = 1.0):
    """y_i = (1 / C) * sum over all j of f(x_i, x_j) g(x_j), the paper's equation 1.

    theta  (B, N, d): theta(x_i); for "gaussian" the features x_i themselves
    phi    (B, M, d): phi(x_j); for "gaussian" the features x_j. M differs from N under sub-sampling
    g      (B, M, c): g(x_j)
    w_f    (2d,): for "concatenation" only, first the half for theta, then the half for phi
    scale: multiplies theta_i . phi_j in "gaussian" and "embedded_gaussian"

    Returns y, (B, N, c), in the dtype of g; float16 and bfloat16 are computed in float32. What each
    instantiation computes, `nlutils.reference.non_local` states. Memory grows with N + M, gradients included:
    the map of N x M numbers is built only while it is small. The tensors may be those of a functional model.
    Raises ValueError, naming the argument, for what does not fit.
    """
    check_operation(instantiation, w_f, scale)
    check_shapes(theta.shape, phi.shape, g.shape, None if w_f is None else w_f.shape)
    operands = (theta, phi, g) if w_f is None else (theta, phi, g, w_f)
    if any(isinstance(operand, keras.KerasTensor) for operand in operands):
        return _NonLocal(instantiation, scale)(*operands)
    return _non_local(*map(ops.convert_to_tensor, operands), instantiation=instantiation, scale=scale)


def _non_local(theta, phi, g, w_f=None, *, instantiation, scale):
    if instantiation in SOFTMAX_FORMS:
        return attend(theta, phi, g, scale)
    if instantiation == "dot_product":
        return _dot_product(theta, phi, g)
    return rectified_sum(*_scores(theta, phi, w_f), g)


@keras.saving.register_keras_serializable(package="nlutils", name="non_local")
class _NonLocal(keras.Operation):
    """`non_local` as a node of a functional model."""

    def __init__(self, instantiation, scale, *, name=None):
        super().__init__(name=name)
        self.instantiation, self.scale = instantiation, scale

    def call(self, *operands):
        return _non_local(*operands, instantiation=self.instantiation, scale=self.scale)

    def compute_output_spec(self, theta, phi, g, w_f=None):
        return keras.KerasTensor((*theta.shape[:2], g.shape[2]), dtype=g.dtype)

    def get_config(self):
        return {"name": self.name, "instantiation": self.instantiation, "scale": self.scale}


def _dot_product(theta, phi, g):
    """(theta phi^T) g / M in the cheaper order of the two products; both are exact.

    theta (phi^T g) needs no (N, M) map: a matrix (d, c) that depends on the data is applied to each position,
    as a convolution of size 1 would be. M is divided out before the second product.
    """
    dtype, positions = g.dtype, _positions(phi)
    theta, phi, g = map(at_least_float32, (theta, phi, g))
    queries, keys, width, values = theta.shape[1], phi.shape[1], theta.shape[2], g.shape[2]
    if None not in (queries, keys) and queries * keys * (width + values) < (queries + keys) * width * values:
        y = ops.einsum("bnm,bmc->bnc", ops.einsum("bnd,bmd->bnm", theta / positions, phi), g)
    else:
        y = ops.einsum("bnd,bdc->bnc", theta, product(ops.transpose(phi, (0, 2, 1)), g) / positions)
    return ops.cast(y, dtype)


def _scores(theta, phi, w_f):
    """a and b of w_f . [theta_i, phi_j] = a_i + b_j: the (N, M, 2d) concatenation is never built."""
    theta, phi, w_f = map(at_least_float32, (theta, phi, w_f))
    half_theta, half_phi = ops.split(w_f, 2)
    return ops.einsum("bnd,d->bn", theta, half_theta), ops.einsum("bmd,d->bm", phi, half_phi)


def pairwise(theta, phi, instantiation: str, *, w_f=None, scale: float = 1.0):
    """The normalised map itself, f(x_i, x_j) / C, as a (B, N, M) tensor: for looking at small maps.

    Arguments and errors as in `non_local`. The rows of the two softmax forms sum to 1. The other two forms
    are divided by M: their rows sum to anything, and "dot_product" may be negative.
    """
    check_operation(instantiation, w_f, scale)
    check_shapes(theta.shape, phi.shape, w_f=None if w_f is None else w_f.shape)
    dtype = theta.dtype
    theta, phi = at_least_float32(theta), at_least_float32(phi)
    if instantiation in SOFTMAX_FORMS:
        weights = softmax_map(theta * scale, phi)
    elif instantiation == "dot_product":
        weights = ops.einsum("bnd,bmd->bnm", theta / _positions(phi), phi)
    else:
        positions = _positions(phi)
        a, b = _scores(theta, phi, w_f)
        weights = ops.relu(a[:, :, None] + b[:, None, :]) / positions
    return ops.cast(weights, dtype)


def _positions(phi):
    """M, a number; in a TensorFlow graph that leaves M open, a scalar tensor."""
    positions = ops.shape(phi)[1]
    if positions is None:
        raise ValueError(
            f"phi of shape {tuple(phi.shape)} does not tell M, the number of positions; give it a size"
        )
    return positions if isinstance(positions, int) else ops.cast(positions, at_least_float32(phi).dtype)
