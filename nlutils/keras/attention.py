"""What chosen positions look at: single rows of a block's map, in the memory of these rows alone."""

from collections.abc import Sequence

from keras import ops

from nlutils.keras.blocks import NonLocalBlock
from nlutils.keras.operations import pairwise
from nlutils.positions import check_queries, visible

__all__ = ["attention_rows"]


def attention_rows(block: NonLocalBlock, x, queries: Sequence[Sequence[int]]):
    """f(x_i, x_j) / C for all j, and for the positions i in `queries`: O(Q M) memory, not O(N M).

    x        the block's input (B, *size, C)
    queries  Q positions, each of `ndim` whole numbers: (t, h, w), (h, w) or (n,); negative ones count from
             the end. The same positions in every sample

    Returns (B, Q, *size'), on the grid of the keys: the size of x, with height and width halved where the
    block sub-samples. A position that i may not look at (another frame, place or group) has weight 0. For the
    two softmax forms a row sums to 1. Differentiable. Raises TypeError for another block, ValueError for a
    wrong query or input, or a block without weights.
    """
    if not isinstance(block, NonLocalBlock):
        raise TypeError(f"block is a {type(block).__name__}; it must be a nlutils.keras.NonLocalBlock")
    if not block.built:
        raise ValueError("block has no weights yet; call it once, or block.build(shape of the input)")
    x = ops.convert_to_tensor(x, dtype=block.compute_dtype)
    block.check_input(x)
    places = check_queries(queries, x.shape[1:-1])
    theta, phi, _ = block.embed(x)
    size = tuple(phi.shape[1:-1])
    if not places:
        return ops.zeros((x.shape[0], 0, *size), dtype=theta.dtype)
    # Positions that may look at the same keys are answered together.
    regions = {}
    for number, place in enumerate(places):
        regions.setdefault(visible(block, place, size), []).append(number)
    rows = [None] * len(places)
    for region, numbers in regions.items():
        weights = _weights(block, [theta[(slice(None), *places[number])] for number in numbers], phi, region)
        for number, row in zip(numbers, ops.unstack(weights, axis=1), strict=True):
            rows[number] = row
    return ops.stack(rows, axis=1)


def _weights(block, queries, phi, region):
    """The rows of positions (B, d) that may look at one region: (B, Q, *size), with 0 outside of it."""
    batch, *size, width = phi.shape
    keys = phi[(slice(None), *(slice(*ends) for ends in region))]
    sides = keys.shape[1:-1]
    keys = ops.reshape(keys, (batch, -1, width))
    queries = ops.stack(queries, axis=1)
    weights = pairwise(queries, keys, block.instantiation, w_f=_tensor(block.w_f), scale=block.logit_scale)
    weights = ops.reshape(weights, (batch, -1, *sides))
    outside = [(first, side - end) for (first, end), side in zip(region, size, strict=True)]
    return ops.pad(weights, ((0, 0), (0, 0), *outside))


def _tensor(variable):
    return None if variable is None else ops.convert_to_tensor(variable)
