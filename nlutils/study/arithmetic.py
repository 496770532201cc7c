"""How a network's sums are done: precision, the order of numbers in memory, compilation."""

import torch
from torch import nn

from nlutils.study import distributed
from nlutils.study.recipe import Recipe

__all__ = ["Objective", "autocast", "channels_last", "objective"]


def autocast(recipe: Recipe, device) -> torch.autocast:
    """The context in which networks run; with precision="bfloat16" in that where autocast allows it.

    Raises ValueError for bfloat16 on a CPU: there the weight gradient of a 3D convolution over a small map,
    4 x 2 x 4 x 4, reads memory that nobody wrote (PyTorch 2.13, oneDNN), and no time is saved.
    """
    kind = torch.device(device).type
    if recipe.precision == "bfloat16" and kind == "cpu":
        raise ValueError(
            f"precision={recipe.precision!r} needs a GPU: on a CPU, gradients of small 3D convolutions are "
            "wrong in it now and then; use 'float32'"
        )
    return torch.autocast(kind, torch.bfloat16, enabled=recipe.precision == "bfloat16")


def channels_last(model: nn.Module) -> nn.Module:
    """`model` with its convolutions' kernels stored channels-last, in place; their values stay.

    Convolutions then run in the order of numbers that their fastest kernels want: `data/results/throughput`
    has what a training step of the small networks gains.
    """
    orders = {4: torch.channels_last, 5: torch.channels_last_3d}
    for weight in model.parameters():
        if weight.ndim in orders:
            weight.data = weight.data.contiguous(memory_format=orders[weight.ndim])
    return model


class Objective(nn.Module):
    """(x, targets) -> the loss of `model`, as a module: what is compiled, and what processes share."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, targets):
        return self.model.loss(x, targets)


def objective(model: nn.Module, recipe: Recipe):
    """The loss of `model`, called with (x, targets) of a batch; compiled if the recipe says so.

    Of several processes (`nlutils.study.distributed`) each works on a part of the batch, and gradients are
    those of the whole batch. Raises ValueError when they are told to compile: the compiler would not see what
    they share.
    """
    made = Objective(model)
    if distributed.count() == 1:
        return torch.compile(made) if recipe.compile else made
    if recipe.compile:
        raise ValueError(
            f"compile={recipe.compile!r} with {distributed.count()} processes is not supported; "
            "set compile=False, or train with one process"
        )
    from nlutils.study.whole_batch import SharedObjective  # nobody else needs it

    return SharedObjective(made)
