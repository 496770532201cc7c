"""The papers' sums, written literally in NumPy float64, loops and all: slow, what tests compare with.

Wang, Girshick, Gupta, He: Non-local Neural Networks, CVPR 2018, https://arxiv.org/abs/1711.07971
Yue, Sun, Yuan, Zhou, Ding, Xu: Compact Generalized Non-local Network, NeurIPS 2018,
https://arxiv.org/abs/1810.13125
"""

import math

import numpy as np

from nlutils.arguments import one_of
from nlutils.instantiations import POOL_WINDOW, SOFTMAX_FORMS, check_operation, check_shapes
from nlutils.kernels import BETA, GAMMA, check_entries, check_kernel

__all__ = ["compact_generalized", "compact_generalized_block", "non_local", "non_local_block"]


def non_local(theta, phi, g, instantiation: str, *, w_f=None, scale: float = 1.0) -> np.ndarray:
    """Equation 1 of the paper for one sample: y_i = (1 / C) * sum over all j of f(x_i, x_j) g(x_j).

    theta  (N, d): theta(x_i), one row a position; for "gaussian" the features x_i themselves
    phi    (M, d): phi(x_j); for "gaussian" the features x_j. M differs from N under sub-sampling
    g      (M, c): g(x_j)
    w_f    (2d,):  for "concatenation" only, first the half for theta, then the half for phi
    scale: multiplies theta_i . phi_j in "gaussian" and "embedded_gaussian"

    Returns y, (N, c), float64. With s = scale * theta_i . phi_j (section 3.2 of the paper):

    - "gaussian", "embedded_gaussian": f = exp(s), C = sum of f over j (equations 2 and 3)
    - "dot_product": f = theta_i . phi_j, C = M (equation 4)
    - "concatenation": f = ReLU(w_f . [theta_i, phi_j]), C = M (equation 5)

    Raises ValueError for a wrong argument, OverflowError when a sum of exponentials leaves float64.
    """
    theta, phi, g = (np.asarray(operand, dtype=np.float64) for operand in (theta, phi, g))
    w_f = None if w_f is None else np.asarray(w_f, dtype=np.float64)
    check_operation(instantiation, w_f, scale)
    check_shapes(theta.shape, phi.shape, g.shape, None if w_f is None else w_f.shape, batched=False)

    y = np.zeros((len(theta), g.shape[1]))
    for i in range(len(theta)):
        total = 0.0
        for j in range(len(phi)):
            f = _similarity(theta[i], phi[j], instantiation, w_f, scale)
            total += f
            y[i] += f * g[j]
        if instantiation in SOFTMAX_FORMS:
            if not 0 < total < np.inf:
                raise OverflowError(
                    f"the sum of exp(theta_i . phi_j) over j is {total} in float64 at i={i}; "
                    "use smaller features or a smaller scale"
                )
            y[i] /= total
        else:
            y[i] /= len(phi)
    return y


def _similarity(theta_i, phi_j, instantiation, w_f, scale):
    """f(x_i, x_j), one number."""
    if instantiation in SOFTMAX_FORMS:
        with np.errstate(over="ignore"):  # non_local reports an infinite sum
            return np.exp(scale * np.dot(theta_i, phi_j))
    if instantiation == "dot_product":
        return np.dot(theta_i, phi_j)
    return max(0.0, np.dot(w_f, np.concatenate([theta_i, phi_j])))


def non_local_block(
    x, weights, instantiation: str, *, subsample=None, scale: bool = False, epsilon: float = 1e-5
):
    """Equation 6 of the paper for one sample: z_i = W_z y_i + x_i, in inference.

    x        (C, N), (C, H, W) or (C, T, H, W)
    weights  NumPy arrays by the names of `nlutils.exchange.to_arrays`: "theta.weight" (d, C) with or without
             further axes of size 1, "theta.bias" (d,), the same for phi, g and w_z; where there is a norm
             "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var" (C,); "w_f" (2d,)
    subsample, scale: as in `nlutils.torch.NonLocalBlock`

    Returns z, float64, of the shape of x.
    """
    one_of("subsample", subsample, (None, "before", "after"))
    x = np.asarray(x, dtype=np.float64)

    def convolve(name, maps):
        """A convolution of size 1: one matrix for every position."""
        bias = np.asarray(weights[f"{name}.bias"], dtype=np.float64)
        matrix = np.asarray(weights[f"{name}.weight"], dtype=np.float64).reshape(len(bias), len(maps))
        return (_rows(maps) @ matrix.T + bias).T.reshape(len(bias), *maps.shape[1:])

    keys = _max_pool(x) if subsample == "before" else x
    gaussian = instantiation == "gaussian"
    theta = x if gaussian else convolve("theta", x)
    phi = keys if gaussian else convolve("phi", keys)
    g = convolve("g", keys)
    if subsample == "after":
        phi, g = _max_pool(phi), _max_pool(g)

    factor = len(theta) ** -0.5 if scale else 1.0
    y = non_local(_rows(theta), _rows(phi), _rows(g), instantiation, w_f=weights.get("w_f"), scale=factor)
    update = convolve("w_z", y.T.reshape(len(g), *x.shape[1:]))
    if "norm.weight" in weights:
        channel = (len(x),) + (1,) * (x.ndim - 1)
        gain, bias, mean, variance = (
            np.asarray(weights[f"norm.{name}"], dtype=np.float64).reshape(channel)
            for name in ("weight", "bias", "running_mean", "running_var")
        )
        update = gain * (update - mean) / np.sqrt(variance + epsilon) + bias
    return x + update


def _rows(maps):
    """(C, *size) -> (N, C), one row a position."""
    return maps.reshape(len(maps), -1).T


def _max_pool(maps):
    """Halve height and width by maxima; a size of 1 stays, an odd last row or column is left out."""
    window = [min(size, side) for size, side in zip(maps.shape[1:], POOL_WINDOW[maps.ndim - 1], strict=True)]
    pooled = np.zeros([len(maps), *(size // side for size, side in zip(maps.shape[1:], window, strict=True))])
    for place in np.ndindex(*pooled.shape[1:]):
        cells = tuple(slice(at * side, (at + 1) * side) for at, side in zip(place, window, strict=True))
        pooled[(slice(None), *place)] = maps[(slice(None), *cells)].reshape(len(maps), -1).max(axis=1)
    return pooled


def compact_generalized(theta, phi, g, *, groups: int = 8, kernel: str = "dot", order: int = 3) -> np.ndarray:
    """Generalized non-local for one sample: pairs of *entries* (position, channel) instead of positions.

    theta, phi, g  (N, C) each
    groups         C is cut into so many runs of C / groups channels; entries meet within their run only
    kernel         how two entries compare, "dot" or "rbf"
    order          the highest power of "rbf", 1 or more; "dot" has none

    Returns y, (N, C), float64. For channels c, c' of one group, summed over all positions j and all c',
    y_ic = sum of f(theta_ic, phi_jc') g_jc', with no divisor, where (section 3 of the paper)

    - "dot": f(a, b) = a b
    - "rbf": f(a, b) = sum over p = 0 ... order of BETA (2 GAMMA a b)^p / p!, the Taylor sum of
      BETA exp(2 GAMMA a b), with BETA and GAMMA of the released code, see `nlutils.kernels`

    Raises ValueError for a wrong argument.
    """
    theta, phi, g = (np.asarray(operand, dtype=np.float64) for operand in (theta, phi, g))
    check_kernel(groups, kernel, order)
    check_entries(theta.shape, phi.shape, g.shape, groups, batched=False)

    positions, channels = theta.shape
    width = channels // groups
    y = np.zeros((positions, channels))
    for i, c in np.ndindex(positions, channels):
        first = c // width * width  # of c's group
        for j in range(positions):
            for other in range(first, first + width):
                y[i, c] += _entry_similarity(theta[i, c], phi[j, other], kernel, order) * g[j, other]
    return y


def _entry_similarity(a, b, kernel, order):
    """f(a, b), one number from two."""
    if kernel == "dot":
        return a * b
    return sum(BETA * (2 * GAMMA) ** p / math.factorial(p) * (a * b) ** p for p in range(order + 1))


def compact_generalized_block(
    x, weights, *, groups: int = 8, kernel: str = "dot", order: int = 3, epsilon: float = 1e-5
):
    """The block around `compact_generalized` for one sample: z = x + norm(W_z y), W_z in `groups` groups.

    x        (C, N), (C, H, W) or (C, T, H, W)
    weights  NumPy arrays by the names of `nlutils.exchange.to_arrays`: "theta.weight" (c, C) with or without
             further axes of size 1, the same for phi and g; "w_z.weight" (C, c / groups);
             "norm.weight", "norm.bias" (C,)

    Returns z, float64, of the shape of x. The norm takes mean and variance over a group's channels and all
    positions (Wu, He: Group Normalization, ECCV 2018).
    """
    x = np.asarray(x, dtype=np.float64)
    weights = {name: np.asarray(array, dtype=np.float64) for name, array in weights.items()}

    rows = _rows(x)
    theta, phi, g = (rows @ weights[f"{name}.weight"].reshape(-1, len(x)).T for name in ("theta", "phi", "g"))
    y = compact_generalized(theta, phi, g, groups=groups, kernel=kernel, order=order)
    w_z = weights["w_z.weight"].reshape(len(x), -1)
    update = np.zeros_like(rows)
    for group in range(groups):
        taken = slice(group * y.shape[1] // groups, (group + 1) * y.shape[1] // groups)
        given = slice(group * len(x) // groups, (group + 1) * len(x) // groups)
        mixed = y[:, taken] @ w_z[given].T
        normalised = (mixed - mixed.mean()) / np.sqrt(mixed.var() + epsilon)
        update[:, given] = weights["norm.weight"][given] * normalised + weights["norm.bias"][given]
    return x + update.T.reshape(x.shape)
