"""The two softmax forms: softmax over j of (scale theta_i . phi_j), times g, without a large map.

Three ways to the same numbers (equal to rounding): the map at once while it is small; on the PyTorch backend
the fused attention, where it is linear in memory; else blocks of rows whose part of the map is computed again
in the backward pass.

Products are written with ops.einsum: on the PyTorch backend ops.matmul turns float64 into float32.
"""

from keras import backend, ops

from nlutils.keras.operations.precision import at_least_float32

__all__ = ["MAP_BYTES", "attend", "softmax_map"]

# A map of at most so many bytes, in float32, is built at once: below it, nothing is faster.
MAP_BYTES = 32 * 2**20
# Of a larger one so many bytes at a time.
_BLOCK_BYTES = 16 * 2**20
# What a batch size that a graph leaves open counts as, when the two are compared.
_OPEN_BATCH = 32


def attend(theta, phi, g, scale: float = 1.0):
    """y_i = sum over j of softmax_j(scale * theta_i . phi_j) g_j; shapes and result as in `non_local`.

    Half-precision operands have their logits and sums in float32. Where a TensorFlow graph leaves N or M
    open, the map is never built at once.
    """
    dtype = g.dtype
    if _map_is_small(theta, phi):
        theta, phi, g = map(at_least_float32, (theta, phi, g))
        y = ops.einsum("bnm,bmc->bnc", softmax_map(_scaled(theta, scale), phi), g)
    elif _fused_is_linear(theta, phi, g):
        # One head: (B, N, 1, d). Without the axis of heads the CPU kernel builds the map.
        heads = (operand[:, :, None] for operand in (theta, phi, g))
        y = ops.dot_product_attention(*heads, scale=scale)[:, :, 0]
    else:
        theta, phi, g = map(at_least_float32, (theta, phi, g))
        y = _by_blocks(_scaled(theta, scale), phi, g)
    return ops.cast(y, dtype)


def _scaled(theta, scale):
    return theta if scale == 1 else theta * scale


def softmax_map(theta, phi):
    """softmax over j of theta_i . phi_j: (B, N, d), (B, M, d) -> (B, N, M)."""
    logits = ops.einsum("bnd,bmd->bnm", theta, phi)
    if phi.shape[1] == 1:
        # The only weight is 1. ops.softmax would warn about it; this keeps the gradient, which is 0.
        return ops.exp(logits - logits)
    # ops.softmax subtracts each row's maximum first, so exp never overflows.
    return ops.softmax(logits, axis=2)


def _map_is_small(theta, phi):
    batch, queries, keys = theta.shape[0], theta.shape[1], phi.shape[1]
    if queries is None or keys is None:
        return False
    return 4 * (_OPEN_BATCH if batch is None else batch) * queries * keys <= MAP_BYTES


def _fused_is_linear(theta, phi, g):
    if backend.backend() != "torch" or theta.shape[2] != g.shape[2]:
        return False
    # In float64 Keras' fused attention would go to float32.
    return theta.dtype == phi.dtype == g.dtype and backend.standardize_dtype(g.dtype) != "float64"


def _by_blocks(theta, phi, g):
    @ops.custom_gradient
    def attention(theta, phi, g):
        def gradient(*arguments, upstream=None):
            # PyTorch's backend calls gradient(theta, phi, g, upstream=...), the others gradient(upstream).
            return _backward(theta, phi, g, arguments[0] if upstream is None else upstream)

        # Without stop_gradient TensorFlow would record, and keep, every block of the forward pass.
        return _forward(*map(ops.stop_gradient, (theta, phi, g))), gradient

    return attention(theta, phi, g)


def _forward(theta, phi, g):
    cut = _Blocks(theta, phi)
    queries, keys, values = cut.queries(theta), cut.keys(phi), cut.keys(g)

    def step(at, carry):
        y, turn = carry
        at, group = cut.place(at + turn)
        block = ops.einsum("bnm,bmc->bnc", softmax_map(queries[at], keys[group]), values[group])
        y = _put(y, at, block)
        return y, _turn(y)

    y = ops.zeros((*ops.shape(queries)[:3], g.shape[2]), dtype=g.dtype)
    y, _ = ops.fori_loop(0, cut.count, step, (y, _first_turn()))
    return cut.rows_of(y)


def _backward(theta, phi, g, upstream):
    cut = _Blocks(theta, phi)
    queries, keys, values, gradients = cut.queries(theta), cut.keys(phi), cut.keys(g), cut.queries(upstream)

    def step(at, carry):
        grad_theta, grad_phi, grad_g, turn = carry
        at, group = cut.place(at + turn)
        rows, columns, grad_y = queries[at], keys[group], gradients[at]
        weights = softmax_map(rows, columns)
        grad_g = _add(grad_g, group, ops.einsum("bnm,bnc->bmc", weights, grad_y))
        # dL/dlogit_ij = p_ij (dL/dp_ij - sum over k of p_ik dL/dp_ik)
        grad_logits = weights * ops.einsum("bnc,bmc->bnm", grad_y, values[group])
        grad_logits = grad_logits - weights * ops.sum(grad_logits, axis=2, keepdims=True)
        grad_phi = _add(grad_phi, group, ops.einsum("bnm,bnd->bmd", grad_logits, rows))
        block = ops.einsum("bnm,bmd->bnd", grad_logits, columns)
        grad_theta = _put(grad_theta, at, block)
        return grad_theta, grad_phi, grad_g, _turn(grad_theta, grad_phi, grad_g)

    start = (ops.zeros_like(queries), ops.zeros_like(keys), ops.zeros_like(values), _first_turn())
    grad_theta, grad_phi, grad_g, _ = ops.fori_loop(0, cut.count, step, start)
    return cut.rows_of(grad_theta), cut.samples_of(grad_phi), cut.samples_of(grad_g)


def _put(blocks, at, block):
    return ops.slice_update(blocks, (at, 0, 0, 0), block[None])


def _add(blocks, at, block):
    if blocks.shape[0] == 1:  # known to be: TensorFlow then adds in place
        return blocks + block[None]
    return _put(blocks, at, blocks[at] + block)


def _first_turn():
    return ops.zeros((), dtype="int32")


def _turn(*results):
    """0, known when all `results` of a turn are.

    A TensorFlow graph runs up to ten turns of a loop at once, with ten blocks in memory, unless each turn
    needs a number from the one before.
    """
    first = sum(result[0, 0, 0, 0] for result in results)
    return ops.minimum(0, ops.cast(first > float("inf"), "int32"))


class _Blocks:
    """How the map is cut: into blocks of `rows` rows of `samples` samples, with all M columns.

    Sizes are numbers; those that a TensorFlow graph leaves open, and what follows from them, scalar tensors.
    """

    def __init__(self, theta, phi):
        self.batch, self.positions = ops.shape(theta)[:2]
        columns = ops.shape(phi)[1]
        self.rows = _share(self.positions, _BLOCK_BYTES // 4 // columns)
        self.samples = _share(self.batch, _BLOCK_BYTES // 4 // (self.rows * columns))
        self.per_group = -(-self.positions // self.rows)
        self.groups = _larger(-(-self.batch // self.samples), 1)
        self.count = self.groups * self.per_group

    def place(self, at):
        """Of block number `at`: its place among the rows' blocks, and its samples' place among the groups."""
        return at, at // self.per_group

    def queries(self, x):
        """(B, N, w) -> (count, samples, rows, w), zeros added where the blocks go beyond B and N."""
        width = x.shape[2]
        more_samples = self.groups * self.samples - self.batch
        more_rows = self.per_group * self.rows - self.positions
        x = _pad(x, ((0, more_samples), (0, more_rows), (0, 0)))
        x = ops.reshape(x, (self.groups, self.samples, self.per_group, self.rows, width))
        x = ops.transpose(x, (0, 2, 1, 3, 4))
        return ops.reshape(x, (self.count, self.samples, self.rows, width))

    def rows_of(self, blocks):
        """The way back from `queries`."""
        width = blocks.shape[3]
        x = ops.reshape(blocks, (self.groups, self.per_group, self.samples, self.rows, width))
        x = ops.transpose(x, (0, 2, 1, 3, 4))
        x = ops.reshape(x, (self.groups * self.samples, self.per_group * self.rows, width))
        return x[: self.batch, : self.positions]

    def keys(self, x):
        """(B, M, w) -> (groups, samples, M, w)."""
        x = _pad(x, ((0, self.groups * self.samples - self.batch), (0, 0), (0, 0)))
        return ops.reshape(x, (self.groups, self.samples, ops.shape(x)[1], x.shape[2]))

    def samples_of(self, groups):
        """The way back from `keys`."""
        *_, positions, width = ops.shape(groups)
        return ops.reshape(groups, (self.groups * self.samples, positions, width))[: self.batch]


def _share(whole, most):
    """At most `most` of `whole`, and at least 1: a divisor of `whole` where there is one near."""
    if isinstance(whole, int) and isinstance(most, int):
        most = max(min(whole, most), 1)
        near = range(most, most // 2, -1)
        return next((size for size in near if whole % size == 0), most)
    return _larger(ops.minimum(whole, most), 1)


def _larger(size, least):
    return max(size, least) if isinstance(size, int) else ops.maximum(size, least)


def _pad(x, widths):
    if all(isinstance(after, int) and after == 0 for _, after in widths):
        return x
    return ops.pad(x, widths)
