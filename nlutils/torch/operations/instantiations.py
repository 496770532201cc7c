"""The paper's four instantiations as pure functions on (B, N, d) tensors.

Wang, Girshick, Gupta, He: Non-local Neural Networks, CVPR 2018, https://arxiv.org/abs/1711.07971, section 3
"""

import torch
from torch import Tensor

from nlutils.instantiations import SOFTMAX_FORMS, check_operation, check_shapes
from nlutils.torch.operations.concatenation import rectified_sum
from nlutils.torch.operations.precision import at_least_float32, no_autocast
from nlutils.torch.operations.softmax import attend

__all__ = ["non_local", "pairwise"]


def non_local(
    theta: Tensor,
    phi: Tensor,
    g: Tensor,
    instantiation: str = "embedded_gaussian",
    *,
    w_f: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """y_i = (1 / C) * sum over all j of f(x_i, x_j) g(x_j), the paper's equation 1.

    theta  (B, N, d): theta(x_i); for "gaussian" the features x_i themselves
    phi    (B, M, d): phi(x_j); for "gaussian" the features x_j. M differs from N under sub-sampling
    g      (B, M, c): g(x_j)
    w_f    (2d,): for "concatenation" only, first the half for theta, then the half for phi
    scale: multiplies theta_i . phi_j in "gaussian" and "embedded_gaussian"

    Returns y, (B, N, c), in the dtype of g and on its device. What each instantiation computes,
    `nlutils.reference.non_local` states. Exact, forward and backward, in memory that grows with N + M: the
    softmax forms build no map above 32 MiB, "concatenation" builds none, and "dot_product" only where that is
    less work than its (d, c) matrix. Softmax forms above 32 MiB, and "concatenation", can be differentiated
    once, not twice.
    Raises ValueError, naming the argument, for what does not fit.
    """
    check_operation(instantiation, w_f, scale)
    check_shapes(theta.shape, phi.shape, g.shape, None if w_f is None else w_f.shape)
    if instantiation in SOFTMAX_FORMS:
        return attend(theta, phi, g, scale)
    if instantiation == "dot_product":
        return _dot_product(theta, phi, g)
    a, b = _scores(theta, phi, w_f)
    return rectified_sum(a, b, g)


def _dot_product(theta, phi, g):
    """(theta phi^T) g / M, in the cheaper of its two orders.

    theta (phi^T g) never builds the map: a matrix (d, c) that depends on the data is applied to each
    position, as a convolution of size 1 would be. M is divided out before the second product.
    """
    (queries, width), (positions, values), dtype = theta.shape[1:], g.shape[1:], g.dtype
    through_map = queries * positions * (width + values)
    through_matrix = (queries + positions) * width * values
    with no_autocast(theta):
        theta, phi, g = at_least_float32(theta), at_least_float32(phi), at_least_float32(g)
        # Under export the sizes may change later: take what is linear in all of them.
        if not torch.compiler.is_exporting() and through_map < through_matrix:
            return ((theta / positions) @ phi.mT @ g).to(dtype)
        return (theta @ (phi.mT @ g / positions)).to(dtype)


def _scores(theta, phi, w_f):
    """a and b of w_f . [theta_i, phi_j] = a_i + b_j: the (N, M, 2d) concatenation is never built."""
    width = theta.shape[2]
    with no_autocast(theta):
        theta, phi, w_f = at_least_float32(theta), at_least_float32(phi), at_least_float32(w_f)
        return theta @ w_f[:width], phi @ w_f[width:]


def pairwise(
    theta: Tensor, phi: Tensor, instantiation: str, *, w_f: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """The normalised map itself, f(x_i, x_j) / C, as a (B, N, M) tensor: for looking at small maps.

    Arguments and errors as in `non_local`. The rows of the two softmax forms sum to 1. The other two forms
    are divided by M: their rows sum to anything, and "dot_product" may be negative.
    """
    check_operation(instantiation, w_f, scale)
    check_shapes(theta.shape, phi.shape, w_f=None if w_f is None else w_f.shape)
    if instantiation == "concatenation":
        a, b = _scores(theta, phi, w_f)
        return (torch.relu(a[:, :, None] + b[:, None, :]) / phi.shape[1]).to(theta.dtype)
    with no_autocast(theta):
        dtype, theta, phi = theta.dtype, at_least_float32(theta), at_least_float32(phi)
        if instantiation == "dot_product":
            return ((theta / phi.shape[1]) @ phi.mT).to(dtype)
        # torch.softmax subtracts each row's maximum first, so exp never overflows.
        return torch.softmax((theta * scale) @ phi.mT, dim=2).to(dtype)
