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
    `nlutils.reference.non_local` states. Exact, forward and backward, in memory that grows with N + M:
    no map above 32 MiB is ever built. Beyond that size the softmax forms, and "concatenation" at any size,
    can be differentiated once, not twice.
    Raises ValueError, naming the argument, for what does not fit.
    """
    check_operation(instantiation, w_f, scale)
    check_shapes(theta.shape, phi.shape, g.shape, None if w_f is None else w_f.shape)
    if instantiation in SOFTMAX_FORMS:
        return attend(theta, phi, g, scale)
    if instantiation == "dot_product":
        with no_autocast(theta):
            dtype = torch.promote_types(torch.promote_types(theta.dtype, phi.dtype), g.dtype)
            return _dot_product(theta.to(dtype), phi.to(dtype), g.to(dtype)).to(g.dtype)
    a, b = _scores(theta, phi, w_f)
    return rectified_sum(a, b, g)


def _dot_product(theta, phi, g):
    """(theta phi^T) g / M, in the cheaper of its two orders.

    theta (phi^T g) never builds the map: a matrix (d, c) that depends on the data is applied to each
    position, as a convolution of size 1 would be.
    """
    (positions, width), values = phi.shape[1:], g.shape[2]
    if torch.compiler.is_exporting():  # the sizes may change later: take what is linear in all of them
        return theta @ _MeanProduct.apply(phi.transpose(1, 2), g, positions)
    queries = theta.shape[1]
    through_map = queries * positions * (width + values)
    through_matrix = (queries + positions) * width * values
    if through_map < through_matrix:
        return _MeanProduct.apply(theta, phi.transpose(1, 2), positions) @ g
    return theta @ _MeanProduct.apply(phi.transpose(1, 2), g, positions)


class _MeanProduct(torch.autograd.Function):
    """left @ right / positions. The division comes before the result is rounded to half precision.

    Of torch.baddbmm's own gradients this does not hold: they divide what may have overflowed already.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(left, right, positions):
        return torch.baddbmm(left.new_zeros(1, 1, 1), left, right, beta=0, alpha=1 / positions)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *factors, ctx.positions = inputs
        ctx.save_for_backward(*factors)

    @staticmethod
    def backward(ctx, grad):
        left, right = ctx.saved_tensors
        return (
            _MeanProduct.apply(grad, right.mT, ctx.positions) if ctx.needs_input_grad[0] else None,
            _MeanProduct.apply(left.mT, grad, ctx.positions) if ctx.needs_input_grad[1] else None,
            None,
        )


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
    if instantiation in SOFTMAX_FORMS:
        # torch.softmax subtracts each row's maximum first, so exp never overflows.
        with no_autocast(theta):
            logits = (at_least_float32(theta) * scale) @ at_least_float32(phi).transpose(1, 2)
            return torch.softmax(logits, dim=2).to(theta.dtype)
    if instantiation == "dot_product":
        return _MeanProduct.apply(theta, phi.transpose(1, 2), phi.shape[1])
    a, b = _scores(theta, phi, w_f)
    return (torch.relu(a[:, :, None] + b[:, None, :]) / phi.shape[1]).to(theta.dtype)
