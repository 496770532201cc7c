"""Compact generalized non-local as a pure function on (B, N, C) tensors.

Yue, Sun, Yuan, Zhou, Ding, Xu: Compact Generalized Non-local Network, NeurIPS 2018, section 3,
https://arxiv.org/abs/1810.13125. GAMMA, BETA and the powers 0 to `order` are those of the released code.
"""

import math

import torch
from torch import Tensor

from nlutils.kernels import BETA, GAMMA, check_entries, check_kernel
from nlutils.torch.operations.precision import at_least_float32

__all__ = ["compact_generalized"]


def compact_generalized(
    theta: Tensor, phi: Tensor, g: Tensor, *, groups: int = 8, kernel: str = "dot", order: int = 3
) -> Tensor:
    """y_ic = sum of f(theta_ic, phi_jc') g_jc' over all positions j and all channels c' of c's group.

    theta, phi, g  (B, N, C) each
    groups         C is cut into so many runs of C / groups channels
    kernel         "dot": f(a, b) = a b; "rbf": the Taylor sum of BETA exp(2 GAMMA a b), with BETA and GAMMA
                   of `nlutils.kernels`
    order          the highest power in the sum of "rbf", 1 or more; "dot" has none

    Returns y, (B, N, C), on the device of the arguments and in their dtype, but float32 for float16 and
    bfloat16: there is no divisor, so y grows with N C / groups and soon leaves float16. Time and memory grow
    with N C (order + 1): the (N C) x (N C) pairs are never formed. `nlutils.reference.compact_generalized`
    says what is computed. Raises ValueError, naming the argument, for what does not fit.
    """
    check_kernel(groups, kernel, order)
    check_entries(theta.shape, phi.shape, g.shape, groups)
    # Elementwise products and sums only: no matrix product, hence nothing that autocast or TF32 would round.
    theta, phi, g = (_runs(operand, groups) for operand in (theta, phi, g))
    if kernel == "dot":
        return (theta * _sum(phi * g)).flatten(2)

    # With a = sqrt(2 GAMMA) theta, b = sqrt(2 GAMMA) phi: y = sum of s_p a^p / p!, s_p = BETA * sum of b^p g.
    # The root goes into a and b, because (2 GAMMA)^p alone leaves float32 at p = 11.
    root = math.sqrt(2 * GAMMA)
    a, b = theta * root, phi * root
    moments, term = [BETA * _sum(g)], g
    for _ in range(order):
        term = term * b
        moments.append(BETA * _sum(term))
    # Horner: s_0 + a / 1 (s_1 + a / 2 (s_2 + ...)).
    y = moments[order]
    for p in range(order, 0, -1):
        y = torch.addcmul(moments[p - 1], a, y, value=1 / p)
    return y.flatten(2)


def _runs(operand, groups):
    """(B, N, C) -> (B, N, groups, C / groups), in float32 at least."""
    return at_least_float32(operand).unflatten(2, (groups, operand.shape[2] // groups))


def _sum(entries):
    """One number for each sample and group."""
    return entries.sum(dim=(1, 3), keepdim=True)
