"""What compact generalized non-local asks of its arguments: rules for the NumPy, PyTorch and Keras code.

Yue, Sun, Yuan, Zhou, Ding, Xu: Compact Generalized Non-local Network, NeurIPS 2018, section 3,
https://arxiv.org/abs/1810.13125. No framework is imported here; shapes come in as tuples, and None stands for
a size that Keras does not know yet.
"""

import math

from nlutils.arguments import one_of, positive_integer
from nlutils.instantiations import POOL_WINDOW

__all__ = ["BETA", "GAMMA", "KERNELS", "check_entries", "check_generalized_block", "check_kernel"]

KERNELS = ("dot", "rbf")
# The RBF kernel is exp(-GAMMA (a - b)^2) = exp(-GAMMA (a^2 + b^2)) exp(2 GAMMA a b). In place of the first
# factor the released code puts the constant BETA, its value for a^2 + b^2 = 2; for the second, a Taylor sum.
GAMMA = 1e-4
BETA = math.exp(-2 * GAMMA)


def check_kernel(groups, kernel, order) -> None:
    """Raise ValueError when `groups`, `kernel` or `order` is not one that the operation knows."""
    positive_integer("groups", groups)
    one_of("kernel", kernel, KERNELS)
    positive_integer("order", order)


def check_entries(theta, phi, g, groups, *, batched: bool = True) -> None:
    """Raise ValueError unless theta, phi and g have one shape (B, N, C) and `groups` divides C.

    Without `batched` there is no B.
    """
    axes = "(B, N, C)" if batched else "(N, C)"
    for name, shape in (("theta", theta), ("phi", phi), ("g", g)):
        if len(shape) != 2 + batched:
            raise ValueError(f"{name} of shape {tuple(shape)} must have the axes {axes}")
    for name, shape in (("phi", phi), ("g", g)):
        pairs = zip(theta, shape, strict=True)
        if any(one is not None and other is not None and one != other for one, other in pairs):
            raise ValueError(
                f"theta of shape {tuple(theta)} and {name} of shape {tuple(shape)} do not fit: "
                f"theta, phi and g must have one shape {axes}"
            )
    _divides(groups, theta[-1], f"theta of shape {tuple(theta)} has {theta[-1]} channels")


def check_generalized_block(in_channels, inner_channels, ndim, groups, kernel, order) -> None:
    """Raise ValueError when the options of a `CompactGeneralizedNonLocalBlock` are wrong or do not fit."""
    for name, value in (("in_channels", in_channels), ("inner_channels", inner_channels)):
        if value is not None:
            positive_integer(name, value)
    one_of("ndim", ndim, POOL_WINDOW)
    check_kernel(groups, kernel, order)
    _divides(groups, in_channels, f"in_channels={in_channels}")
    if inner_channels is None and in_channels is not None:
        half = max(in_channels // 2, 1)
        _divides(groups, half, f"inner_channels is half of in_channels={in_channels}, {half}")
    _divides(groups, inner_channels, f"inner_channels={inner_channels}")


def _divides(groups, channels, what):
    if channels is not None and channels % groups:
        raise ValueError(f"groups={groups} must divide the channels, and {what}")
