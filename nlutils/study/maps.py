"""What the maps of a trained network look like: how many positions count, and whether it matters who asks."""

import math

import torch

from nlutils.study.inputs import Inputs
from nlutils.study.recipe import Recipe
from nlutils.torch.attention import attention_rows
from nlutils.torch.blocks import NonLocalBlock
from nlutils.torch.controls import UniformBlock, WindowBlock

__all__ = ["map_statistics"]

# Rows of each clip's map that are looked at, the same ones in all clips.
ROWS = 16
SOFTMAX = ("gaussian", "embedded_gaussian")
DIGITS = 4


def map_statistics(model, inputs: Inputs, indices: torch.Tensor, recipe: Recipe) -> dict[str, dict]:
    """{block: statistics} of the softmax maps of `model` on the clips `indices`, central crop.

    keys       M, the positions that the block compares with
    effective  e to the power of a row's entropy, mean over clips and `ROWS` positions: 1 where all weight
               lies on one position, M where it is spread evenly
    apart      half the sum of |row - the clip's mean row|, mean likewise: 0 where all positions look at the
               same, whoever asks, towards 1 where each looks at something else

    Controls and forms without softmax have no entry.
    """
    blocks = {name: block for name, block in model.named_modules() if _has_softmax_map(block)}
    found: dict[str, list] = {name: [] for name in blocks}
    hooks = [block.register_forward_pre_hook(_Look(found[name])) for name, block in blocks.items()]
    was_training = model.training
    model.eval()
    try:
        for batch in indices.split(recipe.batch) if blocks else ():
            with torch.no_grad():
                model(inputs.batch(model.input, batch, recipe.size, time=recipe.time))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return {name: _statistics(torch.cat(rows)) for name, rows in found.items()}


def _has_softmax_map(block) -> bool:
    if not isinstance(block, NonLocalBlock) or isinstance(block, UniformBlock | WindowBlock):
        return False
    return block.instantiation in SOFTMAX


class _Look:
    """A hook that keeps some rows of the map, (B, ROWS, M), whenever its block is called."""

    def __init__(self, rows):
        self.rows = rows

    def __call__(self, block, args):
        (x,) = args
        draw = torch.Generator().manual_seed(0)
        queries = torch.stack([torch.randint(side, (ROWS,), generator=draw) for side in x.shape[2:]], dim=1)
        self.rows.append(attention_rows(block, x, queries.tolist()).flatten(2).double().cpu())


def _statistics(rows) -> dict:
    """Of `rows` (clips, ROWS, M)."""
    entropy = torch.special.entr(rows).sum(dim=2)
    apart = (rows - rows.mean(dim=1, keepdim=True)).abs().sum(dim=2) / 2
    figures = {"effective": entropy.exp().mean().item(), "apart": apart.mean().item()}
    if not all(map(math.isfinite, figures.values())):
        raise ValueError(f"maps that are not finite: {figures}")
    return {"keys": rows.shape[2], **{name: round(value, DIGITS) for name, value in figures.items()}}
