"""The concatenation form, y_i = (1/M) * sum over j of ReLU(a_i + b_j) g_j, by sorting: exact, no map.

Only the j with b_j > -a_i count, and for these ReLU is the identity, so with b in falling order and k_i the
number of such j,

    M y_i = a_i * (g_1 + ... + g_k) + (b_1 g_1 + ... + b_k g_k),    k = k_i.

Two tables of running sums and one search for each a_i: O((N + M) log M + (N + M) c) instead of O(N M c).
The gradients have the same form, with a and b, g and dL/dy changing places.

The tables are made for a few channels at a time, each channel's numbers side by side in memory, as a
convolution leaves them: they stay in a processor's cache, and never exist as a whole.
"""

import torch
from torch import Tensor

from nlutils.torch.operations.precision import at_least_float32, no_autocast
from nlutils.torch.operations.registration import operator

__all__ = ["rectified_sum"]

# The size of the tables that are made together.
_TABLE_BYTES = 2**20


def rectified_sum(a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """y_i = (1/M) * sum over j of ReLU(a_i + b_j) g_j: a (B, N), b (B, M), g (B, M, c) -> y (B, N, c).

    Computed in float32 at least, returned in the dtype of g. In memory, y is laid out as (B, c, N).
    """
    operands = (at_least_float32(a).contiguous(), at_least_float32(b).contiguous(), at_least_float32(g))
    return _rectified_sum(*operands)[0].to(g.dtype)


def _empty_results(a, b, g):
    active, order = (torch.empty_like(scores, dtype=torch.int64) for scores in (a, b))
    return _channels_first(a, g).mT, active, order


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output[1:])


@operator(
    "rectified_sum_backward(Tensor grad_y, Tensor a, Tensor b, Tensor g, Tensor active_b, Tensor order_b) "
    "-> (Tensor, Tensor, Tensor)",
    fake=lambda grad_y, a, b, g, active_b, order_b: (
        torch.empty_like(a),
        torch.empty_like(b),
        _channels_first(b, g).mT,
    ),
)
def _rectified_sum_backward(grad_y, a, b, g, active_b, order_b):
    """With G_i the sum of the g_j that are active for i, and Y_j that of the dL/dy_i for which j is active:

    M dL/da_i = G_i . dL/dy_i,  M dL/db_j = Y_j . g_j,  M dL/dg_j = sum over i of ReLU(a_i + b_j) dL/dy_i.
    """
    count = b.shape[1]
    grad_a, grad_b, grad_g = torch.zeros_like(a), torch.zeros_like(b), _channels_first(b, g)
    with no_autocast(g):
        active_a, order_a, ranked_a, lifted_b = _rank(b, a, count)
        channels_g, channels_y = _channel_rows(g), _channel_rows(grad_y)
        for batch, channels in _chunks(a, b, g):
            values, grad = channels_g[batch, channels], channels_y[batch, channels]
            sums, _ = _tables(values, order_b[batch])
            grad_a[batch] += (_take(sums, active_b[batch]) * grad).sum(1)
            sums, weighted = _tables(grad, order_a[batch], ranked_a[batch])
            total = _take(sums, active_a[batch])
            grad_b[batch] += (total * values).sum(1)
            part = _take(weighted, active_a[batch], out=grad_g[batch, channels])
            part.addcmul_(total, lifted_b[batch, None])
    return grad_a.div_(count), grad_b.div_(count), grad_g.mT


@operator(
    "rectified_sum(Tensor a, Tensor b, Tensor g) -> (Tensor, Tensor, Tensor)",
    fake=_empty_results,
    backward=lambda ctx, grad_y, *_: _rectified_sum_backward(grad_y, *ctx.saved_tensors),
    keep=_keep,
)
def _rectified_sum(a, b, g):
    """y, and for the backward pass how many b_j are active for each a_i, and the order of b."""
    y = _channels_first(a, g)
    with no_autocast(g):
        active, order, ranked, lifted = _rank(a, b, b.shape[1])
        channels_g = _channel_rows(g)
        for batch, channels in _chunks(a, b, g):
            sums, weighted = _tables(channels_g[batch, channels], order[batch], ranked[batch])
            part = _take(weighted, active[batch], out=y[batch, channels])
            part.addcmul_(_take(sums, active[batch]), lifted[batch, None])
    return y.mT, active, order


def _channels_first(scores, g):
    """An empty (B, c, N) for scores (B, N)."""
    return g.new_empty(g.shape[0], g.shape[2], scores.shape[1])


def _chunks(a, b, g):
    """Pairs of slices, of the batch and of the channels, whose tables have about _TABLE_BYTES."""
    samples, _, width = g.shape
    row = max(a.shape[1], b.shape[1]) * g.element_size()
    channels = min(max(_TABLE_BYTES // row, 1), max(width, 1))
    batch = max(_TABLE_BYTES // (channels * row), 1)
    for first in range(0, samples, batch):
        for at in range(0, width, channels):
            yield slice(first, first + batch), slice(at, at + channels)


def _channel_rows(rows):
    """(B, M, c) -> (B, c, M), each channel in one piece. A matrix at a time: those torch transposes fast."""
    if rows.mT.is_contiguous():
        return rows.mT
    channels = rows.new_empty(rows.mT.shape)
    for sample, result in zip(rows, channels, strict=True):
        result.copy_(sample.T)
    return channels


def _rank(a, b, count):
    """How many b_j are active for each a_i; the order in which b falls; b in that order, and a, for the sums.

    Whether j is active for i is decided on the numbers as they are. The products that are summed keep more
    digits when b is centred: a_i + b_j = (a_i + mean) + (b_j - mean). Both are divided by `count` here.
    """
    ranked, order = torch.sort(b, dim=1, descending=True)
    active = torch.searchsorted(-ranked, a)  # -b_j < a_i
    mean = b.sum(1, keepdim=True) / max(b.shape[1], 1)  # of no number: 0
    return active, order, (ranked - mean) / count, (a + mean) / count


def _tables(values, order, ranked=None):
    """Running sums over `values` (B, k, M) in `order` (B, M), and over `ranked` (B, M) times them."""
    values = _take(values, order)
    sums = _running_sums(values)
    return sums, None if ranked is None else _running_sums(values.mul_(ranked[:, None]))


def _running_sums(values):
    """(B, k, M) -> (B, k, M + 1): entry n is the sum of the first n values."""
    sums = values.new_empty(*values.shape[:2], values.shape[2] + 1)
    sums[:, :, 0] = 0
    torch.cumsum(values, 2, out=sums[:, :, 1:])
    return sums


def _take(values, index, out=None):
    """(B, k, M) at `index` (B, N) along the last axis -> (B, k, N)."""
    if len(values) == 1:  # the faster of two ways to the same
        out = None if out is None else out[0]
        return torch.index_select(values[0], 1, index[0], out=out)[None]
    return torch.gather(values, 2, index[:, None].expand(*values.shape[:2], -1), out=out)
