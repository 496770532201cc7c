"""The two softmax forms: softmax over j of (scale theta_i . phi_j), times g, without a large map.

Three ways to the same numbers (equal to rounding): the map at once while it is small; PyTorch's fused
attention, where it is linear in memory; else blocks of rows whose part of the map is computed again in the
backward pass. When theta and phi are one tensor (the Gaussian form), the map before normalisation is
symmetric, and the backward pass computes only its upper half.
"""

import itertools

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nlutils.torch.operations.precision import at_least_float32, no_autocast
from nlutils.torch.operations.registration import operator

__all__ = ["MAP_BYTES", "attend"]

# A map of at most so many bytes is built at once: below it, nothing is faster.
MAP_BYTES = 32 * 2**20
# The map is made in tiles of so many rows and columns, small enough for a processor's cache.
_TILE = (256, 2048)
_SYMMETRIC_TILE = (512, 512)
_TILE_BYTES = 2 * 2**20
_HALF = (torch.float16, torch.bfloat16)


def attend(theta: Tensor, phi: Tensor, g: Tensor, scale: float = 1.0) -> Tensor:
    """y_i = sum over j of softmax_j(scale * theta_i . phi_j) g_j; shapes and result as in `non_local`.

    Half-precision operands have their logits and sums in float32, and autocast does not make them halves.
    """
    with no_autocast(theta):
        return _attend(theta, phi, g, scale)


def _attend(theta, phi, g, scale):
    half = any(tensor.dtype in _HALF for tensor in (theta, phi, g))
    if not half and _map_is_small(theta, phi):
        return torch.softmax((theta * scale) @ phi.transpose(1, 2), dim=2) @ g
    if _fused_is_linear(theta, phi, g):
        # Only with an axis of heads, and with the widths side by side, does the CPU kernel take it.
        q, k, v = (tensor.contiguous()[:, None] for tensor in (theta, phi, g))
        return scaled_dot_product_attention(q, k, v, scale=scale)[:, 0]
    if theta is phi:
        return _symmetric_rows(at_least_float32(theta), at_least_float32(g), scale)[0].to(g.dtype)
    operands = (at_least_float32(tensor) for tensor in (theta, phi, g))
    return _rows(*operands, scale)[0].to(g.dtype)


def _map_is_small(theta, phi):
    # Under export the sizes may change later: the map is then never built.
    if torch.compiler.is_exporting():
        return False
    return theta.shape[0] * theta.shape[1] * phi.shape[1] * theta.element_size() <= MAP_BYTES


def _fused_is_linear(theta, phi, g):
    if theta.shape[2] != g.shape[2] or not theta.dtype == phi.dtype == g.dtype:
        return False
    if theta.device.type == "cuda":  # there float64, and widths that fill no matrix instruction, take the map
        return theta.dtype != torch.float64 and theta.shape[2] % 8 == 0
    return theta.device.type == "cpu"


def _pairs(theta, phi):
    """B N M of the shapes (B, N, d) and (B, M, d)."""
    return theta[0] * theta[1] * phi[1]


def _keep(ctx, inputs, output):
    *operands, ctx.scale = inputs
    ctx.save_for_backward(*operands, *output)


@operator(
    "softmax_rows_backward(Tensor grad_y, Tensor theta, Tensor phi, Tensor g, Tensor y, Tensor log_sum, "
    "float scale) -> (Tensor, Tensor, Tensor)",
    fake=lambda grad_y, theta, phi, g, y, log_sum, scale: (_empty(theta), _empty(phi), _empty(g)),
    flops=lambda grad_y, theta, phi, g, *_: 2 * _pairs(theta, phi) * (3 * theta[2] + 2 * g[2]),
)
def _rows_backward(grad_y, theta, phi, g, y, log_sum, scale):
    """Gradients for theta, phi and g; each tile of the map is computed again."""
    grad_theta, grad_phi, grad_g = _zeros(theta), _zeros(phi), _zeros(g)
    with no_autocast(theta):
        # dL/dlogit_ij = p_ij (dL/dp_ij - sum over k of p_ik dL/dp_ik), and that sum is dL/dy_i . y_i.
        mean = (grad_y * y).sum(2, keepdim=True)
        for batch, rows in _parts(theta, phi, _TILE):
            part = (batch, rows)
            for columns in _slices(phi.shape[1], _TILE[1]):
                tile = (batch, columns)
                weights = _logits(theta[part], phi[tile], scale).sub_(log_sum[part]).exp_()
                grad_g[tile].baddbmm_(weights.mT, grad_y[part])
                grad_logits = weights.mul_((grad_y[part] @ g[tile].mT).sub_(mean[part]))
                grad_theta[part].baddbmm_(grad_logits, phi[tile], alpha=scale)
                grad_phi[tile].baddbmm_(grad_logits.mT, theta[part], alpha=scale)
    return grad_theta, grad_phi, grad_g


@operator(
    "softmax_rows(Tensor theta, Tensor phi, Tensor g, float scale) -> (Tensor, Tensor)",
    fake=lambda theta, phi, g, scale: (
        theta.new_empty(*theta.shape[:2], g.shape[2]),
        theta.new_empty(*theta.shape[:2], 1),
    ),
    backward=lambda ctx, grad_y, _: (*_rows_backward(grad_y, *ctx.saved_tensors, ctx.scale), None),
    keep=_keep,
    flops=lambda theta, phi, g, _: 2 * _pairs(theta, phi) * (theta[2] + g[2]),
)
def _rows(theta, phi, g, scale):
    """y (B, N, c), and the logarithm of each row's sum of exponentials (B, N, 1), tile by tile.

    Each tile gives its part of sum over j of exp(s_ij - m_i) and of exp(s_ij - m_i) g_j, where m_i is the
    largest logit so far; when a tile brings a larger one, the sums so far are multiplied by
    exp(old m_i - new m_i).
    """
    y = theta.new_zeros(*theta.shape[:2], g.shape[2])
    log_sum = theta.new_empty(*theta.shape[:2], 1)
    with no_autocast(theta):
        for batch, rows in _parts(theta, phi, _TILE):
            part, sums = theta[batch, rows], y[batch, rows]
            largest = theta.new_full((*part.shape[:2], 1), -torch.inf)
            total = torch.zeros_like(largest)
            for columns in _slices(phi.shape[1], _TILE[1]):
                logits = _logits(part, phi[batch, columns], scale)
                larger = torch.maximum(largest, logits.amax(2, keepdim=True))
                weights = logits.sub_(larger).exp_()
                shrink = largest.sub_(larger).exp_()
                total = total.mul_(shrink).add_(weights.sum(2, keepdim=True))
                sums.mul_(shrink).baddbmm_(weights, g[batch, columns])
                largest = larger
            sums.div_(total)
            log_sum[batch, rows] = total.log_().add_(largest)
    return y, log_sum


@operator(
    "symmetric_softmax_rows_backward(Tensor grad_y, Tensor x, Tensor g, Tensor y, Tensor log_sum, "
    "float scale) -> (Tensor, Tensor)",
    fake=lambda grad_y, x, g, y, log_sum, scale: (_empty(x), _empty(g)),
    flops=lambda grad_y, x, g, *_: _pairs(x, x) * (3 * x[2] + 4 * g[2]),  # of half the pairs
)
def _symmetric_rows_backward(grad_y, x, g, y, log_sum, scale):
    """Gradients for x and g. As s_ij = s_ji, only the tiles on and above the diagonal are computed."""
    grad_x, grad_g = _zeros(x), _zeros(g)
    with no_autocast(x):
        mean = (grad_y * y).sum(2, keepdim=True)
        for batch, rows in _parts(x, x, _SYMMETRIC_TILE):
            for columns in _slices(x.shape[1], _SYMMETRIC_TILE[1], first=rows.start):
                part, tile = (batch, rows), (batch, columns)
                logits = _logits(x[part], x[tile], scale)
                above = torch.exp(logits - log_sum[part])  # p_ij
                grad_g[tile].baddbmm_(above.mT, grad_y[part])
                above.mul_((grad_y[part] @ g[tile].mT).sub_(mean[part]))
                if columns != rows:  # the tiles on the diagonal count once
                    below = logits.sub_(log_sum[tile].mT).exp_()  # p_ji, at the place of ij
                    grad_g[part].baddbmm_(below, grad_y[tile])
                    above.add_(below.mul_((g[part] @ grad_y[tile].mT).sub_(mean[tile].mT)))
                grad_x[tile].baddbmm_(above.mT, x[part], alpha=scale)
                grad_x[part].baddbmm_(above, x[tile], alpha=scale)
    return grad_x, grad_g


@operator(
    "symmetric_softmax_rows(Tensor x, Tensor g, float scale) -> (Tensor, Tensor)",
    fake=lambda x, g, scale: (_empty(g), x.new_empty(*x.shape[:2], 1)),
    backward=lambda ctx, grad_y, _: (*_symmetric_rows_backward(grad_y, *ctx.saved_tensors, ctx.scale), None),
    keep=_keep,
    flops=lambda x, g, _: 2 * _pairs(x, x) * (x[2] + g[2]),
)
def _symmetric_rows(x, g, scale):
    """`_rows` with x as theta and as phi."""
    return _rows(x, x, g, scale)


def _parts(theta, phi, tile):
    """Pairs of slices: of the rows, and of as many samples as fit with them into _TILE_BYTES."""
    samples, queries = theta.shape[:2]
    rows, columns = min(tile[0], max(queries, 1)), min(tile[1], phi.shape[1])
    together = max(_TILE_BYTES // (rows * columns * theta.element_size()), 1)
    return list(itertools.product(_slices(samples, together), _slices(queries, rows)))


def _slices(count, size, first=0):
    return [slice(at, min(at + size, count)) for at in range(first, count, size)]


def _logits(theta, phi, scale):
    logits = theta @ phi.mT
    return logits if scale == 1 else logits.mul_(scale)


def _empty(tensor):
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _zeros(tensor):
    return torch.zeros_like(tensor, memory_format=torch.contiguous_format)
