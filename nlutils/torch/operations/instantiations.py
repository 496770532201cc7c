"""The non-local operation as pure functions on (B, N, d) tensors.

Wang, Girshick, Gupta, He: Non-local Neural Networks, CVPR 2018, https://arxiv.org/abs/1711.07971, section 3
"""

import torch
from torch import Tensor

from nlutils.instantiations import SOFTMAX_FORMS, check_operation, check_shapes

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

    Returns y, (B, N, c), in the dtype and on the device of the arguments. What each instantiation computes,
    `nlutils.reference.non_local` states. Raises ValueError, naming the argument, for what does not fit.
    """
    check_operation(instantiation, w_f, scale)
    check_shapes(theta.shape, phi.shape, g.shape, None if w_f is None else w_f.shape)
    return _pairwise(theta, phi, instantiation, w_f, scale) @ g


def pairwise(
    theta: Tensor, phi: Tensor, instantiation: str, *, w_f: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """The normalised map itself, f(x_i, x_j) / C, as a (B, N, M) tensor: for looking at small maps.

    Arguments and errors as in `non_local`. The rows of the two softmax forms sum to 1. The other two forms
    are divided by M: their rows sum to anything, and "dot_product" may be negative.
    """
    check_operation(instantiation, w_f, scale)
    check_shapes(theta.shape, phi.shape, w_f=None if w_f is None else w_f.shape)
    return _pairwise(theta, phi, instantiation, w_f, scale)


def _pairwise(theta, phi, instantiation, w_f, scale):
    positions, width = phi.shape[1:]
    if instantiation in SOFTMAX_FORMS:
        # torch.softmax subtracts each row's maximum first, so exp never overflows.
        return torch.softmax((theta * scale) @ phi.transpose(1, 2), dim=2)
    if instantiation == "dot_product":
        # M is divided out before the sum over d, half on each side: float16 would overflow otherwise.
        root = positions**-0.5
        return (theta * root) @ (phi * root).transpose(1, 2)
    # w_f . [theta_i, phi_j] = a_i + b_j: the (N, M, 2d) concatenation is never built.
    a = theta @ w_f[:width]
    b = phi @ w_f[width:]
    return torch.relu(a[:, :, None] + b[:, None, :]) / positions
