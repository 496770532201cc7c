"""The concatenation form, y_i = (1/M) * sum over j of ReLU(a_i + b_j) g_j, by sorting: exact, no map.

Only the j with b_j > -a_i count, and for these ReLU is the identity, so with b in falling order and k_i the
number of such j,

    M y_i = a_i * (g_1 + ... + g_k) + (b_1 g_1 + ... + b_k g_k),    k = k_i.

A table of running sums and one look-up for each a_i: O((N + M) log(N + M) + (N + M) c) instead of O(N M c).
The gradients have the same form, with a and b, g and dL/dy changing places.
"""

from keras import ops

from nlutils.keras.operations.precision import at_least_float32, product

__all__ = ["rectified_sum"]

# A map of at most so many numbers is built: below it, sorting is not faster.
_MAP_ENTRIES = 2**20
# Running sums are made within runs of so many rows, by a product with a triangular matrix of ones, and then
# over the runs' totals: faster than ops.cumsum, and it keeps more digits, because no sum is longer than this.
_RUN = 64


def rectified_sum(a, b, g):
    """y_i = (1/M) * sum over j of ReLU(a_i + b_j) g_j: a (B, N), b (B, M), g (B, M, c) -> y (B, N, c).

    Computed in float32 at least, returned in the dtype of g. At a_i + b_j = 0 the gradient is that of 0.
    """
    dtype = g.dtype
    a, b, g = map(at_least_float32, (a, b, g))
    if _map_is_small(a, b):
        weights = ops.relu(a[:, :, None] + b[:, None, :])
        y = product(weights, g) / _count(b, g.dtype)
    else:
        y = _by_sorting(a, b, g)
    return ops.cast(y, dtype)


def _map_is_small(a, b):
    sizes = (*a.shape, b.shape[1])
    return None not in sizes and sizes[0] * sizes[1] * sizes[2] <= _MAP_ENTRIES


def _count(b, dtype):
    """M, a number; where a TensorFlow graph leaves it open, a scalar tensor."""
    count = ops.shape(b)[1]
    return count if isinstance(count, int) else ops.cast(count, dtype)


def _by_sorting(a, b, g):
    @ops.custom_gradient
    def active_sum(a, b, g):
        count = _count(b, g.dtype)
        active_b, active_a = _active(ops.stop_gradient(a), ops.stop_gradient(b))

        def gradient(*arguments, upstream=None):
            # PyTorch's backend calls gradient(a, b, g, upstream=...), the others gradient(upstream).
            grad_y = (arguments[0] if upstream is None else upstream) / count
            # For i the sum of the active g_j; for j that of dL/dy_i over the i for which j is active.
            sums = _look_up(_running_sums(_in_falling_order(b, g)[1]), active_b)
            totals, grad_g = _sums(b, a, grad_y, active_a)
            return ops.sum(sums * grad_y, axis=2), ops.sum(totals * g, axis=2), grad_g

        # Without stop_gradient TensorFlow would record, and keep, the tables of the forward pass.
        _, y = _sums(*map(ops.stop_gradient, (a, b, g)), active_b)
        return y / count, gradient

    return active_sum(a, b, g)


def _active(a, b):
    """For each a_i the number of b_j with a_i + b_j > 0, (B, N); for each b_j that of such a_i, (B, M).

    One sort of all a_i and -b_j: ops.searchsorted takes no batch. At a tie a_i comes first, and b_j is not
    counted.
    """
    queries = ops.shape(a)[1]
    order = ops.argsort(ops.concatenate([a, 0 - b], axis=1), axis=1)
    place = ops.argsort(order, axis=1)
    passed = ops.cumsum(ops.cast(order >= queries, "int32"), axis=1)  # how many -b_j up to here
    passed = ops.take_along_axis(passed, place, axis=1)
    # Up to b_j there are place_j + 1 numbers: passed_j times a -b, and else an a_i <= -b_j.
    return passed[:, :queries], (queries - 1 + passed - place)[:, queries:]


def _sums(a, b, g, active):
    """The sums over the active j of g_j, and of (a_i + b_j) g_j: (B, N, c) each."""
    # The sums keep more digits when b is centred: a_i + b_j = (a_i + mean) + (b_j - mean).
    mean = ops.mean(b, axis=1, keepdims=True)
    ranked, values = _in_falling_order(b, g)
    table = ops.concatenate([values, (ranked - mean)[:, :, None] * values], axis=2)
    looked_up, width = _look_up(_running_sums(table), active), g.shape[2]
    sums = looked_up[:, :, :width]
    return sums, (a + mean)[:, :, None] * sums + looked_up[:, :, width:]


def _in_falling_order(scores, values):
    order = ops.argsort(-scores, axis=1)
    return ops.take_along_axis(scores, order, axis=1), _look_up(values, order)


def _look_up(rows, places):
    """Rows (B, M, w) at the places (B, N) -> (B, N, w)."""
    batch, count, width = ops.shape(rows)
    first = ops.arange(batch, dtype="int32")[:, None] * count
    return ops.take(ops.reshape(rows, (-1, width)), ops.cast(places, "int32") + first, axis=0)


def _running_sums(rows):
    """(B, M, w) -> (B, M + 1, w): entry n is the sum of the first n rows."""
    batch, count, width = ops.shape(rows)
    runs = count // _RUN + 1  # one row more than M at least
    rows = ops.pad(rows, ((0, 0), (0, runs * _RUN - count), (0, 0)))
    rows = ops.reshape(rows, (batch, runs, _RUN, width))
    ones = ops.tril(ops.ones((_RUN, _RUN), dtype=rows.dtype), -1)
    within = product(ones, rows)
    if isinstance(runs, int):
        before = _running_sums(ops.sum(rows, axis=2))[:, :-1] if runs > 1 else ops.zeros_like(rows[:, :, 0])
    else:
        totals = ops.sum(rows, axis=2)
        before = ops.cumsum(totals, axis=1) - totals
    return ops.reshape(within + before[:, :, None], (batch, runs * _RUN, width))[:, : count + 1]
