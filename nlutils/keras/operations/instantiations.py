"""The non-local operation as pure functions on (B, N, d) tensors of any Keras backend.

Wang, Girshick, Gupta, He: Non-local Neural Networks, CVPR 2018, https://arxiv.org/abs/1711.07971, section 3
"""

from keras import ops

from nlutils.instantiations import SOFTMAX_FORMS, check_operation, check_shapes

__all__ = ["non_local", "pairwise"]


def non_local(theta, phi, g, instantiation: str = "embedded_gaussian", *, w_f=None, scale: float = 1.0):
    """y_i = (1 / C) * sum over all j of f(x_i, x_j) g(x_j), the paper's equation 1.

    theta  (B, N, d): theta(x_i); for "gaussian" the features x_i themselves
    phi    (B, M, d): phi(x_j); for "gaussian" the features x_j. M differs from N under sub-sampling
    g      (B, M, c): g(x_j)
    w_f    (2d,): for "concatenation" only, first the half for theta, then the half for phi
    scale: multiplies theta_i . phi_j in "gaussian" and "embedded_gaussian"

    Returns y, (B, N, c), in the dtype of the arguments; but on the PyTorch and JAX backends Keras multiplies
    float64 matrices in float32. What each instantiation computes, `nlutils.reference.non_local` states.
    Raises ValueError, naming the argument, for what does not fit.
    """
    check_operation(instantiation, w_f, scale)
    check_shapes(theta.shape, phi.shape, g.shape, None if w_f is None else w_f.shape)
    return ops.matmul(_pairwise(theta, phi, instantiation, w_f, scale), g)


def pairwise(theta, phi, instantiation: str, *, w_f=None, scale: float = 1.0):
    """The normalised map itself, f(x_i, x_j) / C, as a (B, N, M) tensor: for looking at small maps.

    Arguments and errors as in `non_local`. The rows of the two softmax forms sum to 1. The other two forms
    are divided by M: their rows sum to anything, and "dot_product" may be negative.
    """
    check_operation(instantiation, w_f, scale)
    check_shapes(theta.shape, phi.shape, w_f=None if w_f is None else w_f.shape)
    return _pairwise(theta, phi, instantiation, w_f, scale)


def _pairwise(theta, phi, instantiation, w_f, scale):
    if instantiation in SOFTMAX_FORMS:
        logits = ops.matmul(theta * scale, ops.transpose(phi, (0, 2, 1)))
        if phi.shape[1] == 1:
            # The only weight is 1. ops.softmax would warn about it; this keeps the gradient, which is 0.
            return ops.exp(logits - logits)
        # ops.softmax subtracts each row's maximum first, so exp never overflows.
        return ops.softmax(logits, axis=2)
    positions, width = _positions(phi), phi.shape[2]
    if instantiation == "dot_product":
        # M is divided out before the sum over d, half on each side: float16 would overflow otherwise.
        root = positions**-0.5
        return ops.matmul(theta * root, ops.transpose(phi * root, (0, 2, 1)))
    # w_f . [theta_i, phi_j] = a_i + b_j: the (N, M, 2d) concatenation is never built.
    a = ops.matmul(theta, w_f[:width])
    b = ops.matmul(phi, w_f[width:])
    return ops.relu(a[:, :, None] + b[:, None, :]) / positions


def _positions(phi):
    """M, a number; in a TensorFlow graph that leaves M open, a scalar tensor."""
    positions = ops.shape(phi)[1]
    if positions is None:
        raise ValueError(
            f"phi of shape {tuple(phi.shape)} does not tell M, the number of positions; give it a size"
        )
    return positions if isinstance(positions, int) else ops.cast(positions, phi.dtype)
