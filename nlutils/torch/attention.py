"""What chosen positions look at: single rows of a block's map, in the memory of these rows alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nlutils.positions import check_queries, visible
from nlutils.torch.blocks import NonLocalBlock
from nlutils.torch.controls import UniformBlock, WindowBlock
from nlutils.torch.operations import pairwise

__all__ = ["attention_rows"]


def attention_rows(block: NonLocalBlock, x: Tensor, queries: Sequence[Sequence[int]]) -> Tensor:
    """f(x_i, x_j) / C for all j, and for the positions i in `queries`: O(Q M) memory, not O(N M).

    x        the block's input (B, C, *size)
    queries  Q positions, each of `ndim` whole numbers: (t, h, w), (h, w) or (n,); negative ones count from
             the end. They are the same in every sample

    Returns (B, Q, *size'), on the grid of the keys: the size of x, with height and width halved where the
    block sub-samples. A position that i may not look at (another frame, place or group) has weight 0. For the
    two softmax forms a row sums to 1. Differentiable. Raises ValueError for a wrong query or input.
    """
    if not isinstance(block, NonLocalBlock):
        raise TypeError(f"block is a {type(block).__name__}; it must be a nlutils.torch.NonLocalBlock")
    if isinstance(block, UniformBlock | WindowBlock):
        raise TypeError(f"block is a {type(block).__name__}, a control that does not use its map")
    block.check_input(x)
    places = check_queries(queries, x.shape[2:])
    theta, phi, _ = block.embed(x)
    keys = phi.shape[2:]
    rows = [_row(block, theta[(slice(None), slice(None), *place)], phi, place) for place in places]
    return torch.stack(rows, 1) if rows else x.new_zeros(len(x), 0, *keys)


def _row(block, theta, phi, place):
    """One position's row: theta (B, d) against those of phi's positions that it may look at."""
    region = tuple(slice(*ends) for ends in visible(block, place, phi.shape[2:]))
    part = phi[(slice(None), slice(None), *region)]
    keys = part.flatten(2).transpose(1, 2)
    weights = pairwise(theta[:, None], keys, block.instantiation, w_f=block.w_f, scale=block.logit_scale)
    row = phi.new_zeros(len(phi), *phi.shape[2:])
    row[(slice(None), *region)] = weights[:, 0].unflatten(1, part.shape[2:])
    return row
