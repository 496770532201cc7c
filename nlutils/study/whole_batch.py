"""One step of one batch by several processes, with the sums that one process would do.

Each process sees a part of the batch. What a network does to every clip by itself needs nothing; batch
normalisation and dropout are about the whole batch. `WholeBatch` takes their calls over while a network runs,
so that networks, their weights and their names stay as they are.
"""

from typing import NamedTuple

import torch
import torch.distributed as group
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from nlutils.study import distributed

__all__ = ["Part", "SharedObjective", "WholeBatch", "part"]

# They draw a mask of another shape than their input's.
REFUSED = {F.alpha_dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout}


class Part(NamedTuple):
    """The clips `start` to `stop` of a batch of `total`: those of one process.

    A process without clips stands in: it takes the first `seen` clips along, so that it is there when all
    processes talk, and nothing of theirs counts.
    """

    start: int
    stop: int
    total: int

    @property
    def counts(self) -> bool:
        """Whether this process has clips of its own."""
        return self.stop > self.start

    @property
    def seen(self) -> int:
        """How many clips the network sees here."""
        return self.stop - self.start if self.counts else min(2, self.total)

    @property
    def share(self) -> float:
        """The part of the batch that this is."""
        return (self.stop - self.start) / self.total

    def rows(self, whole: torch.Tensor) -> torch.Tensor:
        """The rows of `whole` that belong to these clips; each clip may have several, one after the other."""
        each = len(whole) // self.total
        return whole[self.start * each : (self.start + self.seen) * each]


def part(total: int, rank: int, count: int) -> Part:
    """The part of a batch of `total` clips that the process `rank` of `count` takes.

    Parts follow each other, as equal as can be, and none is a single clip: some networks refuse to train on
    one, and its order in memory, which a mask is drawn in, cannot be told.
    """
    parts = max(1, min(count, total // 2))
    if rank >= parts:
        return Part(0, 0, total)
    edges = [total * i // parts for i in range(parts + 1)]
    return Part(edges[rank], edges[rank + 1], total)


class SharedObjective:
    """(x, targets) of the whole batch -> a loss whose gradient, when all processes call, is the batch's.

    `objective` is a module (x, targets) -> mean loss over clips. The mean over processes of what is returned
    is the loss of the batch. Raises ValueError for a recurrent layer with dropout of its own, which cannot be
    taken over.
    """

    def __init__(self, objective: nn.Module):
        for name, layer in objective.named_modules():
            if isinstance(layer, nn.RNNBase) and layer.dropout > 0 and layer.num_layers > 1:
                raise ValueError(
                    f"{name} has dropout={layer.dropout} between its layers, which several processes cannot "
                    "draw as one; train it with one process"
                )
        self.parallel = DistributedDataParallel(_Weighted(objective))

    def __call__(self, x, targets):
        mine = part(len(targets), distributed.rank(), distributed.count())
        x = mine.rows(x) if isinstance(x, torch.Tensor) else tuple(mine.rows(one) for one in x)
        return self.parallel(x, mine.rows(targets), mine)


class _Weighted(nn.Module):
    """The loss of a part, so weighted that the mean over processes is that of the whole batch."""

    def __init__(self, objective):
        super().__init__()
        self.objective = objective

    def forward(self, x, targets, part):
        with WholeBatch(part):
            loss = self.objective(x, targets)
        return loss * (part.share * distributed.count())


class WholeBatch(TorchFunctionMode):
    """While it is entered, batch normalisation and dropout do what they would do to the whole batch.

    Statistics, their gradients and running statistics are those of all processes' clips; a mask is drawn for
    the whole batch, from the same generator everywhere, and a process uses its rows. Rows of one clip must
    follow each other, as in (B, ...) flattened to (B T, ...).
    """

    def __init__(self, part: Part):
        super().__init__()
        self.part = part

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return self.batch_norm(*args, **kwargs)
        if func is F.dropout:
            return self.dropout(*args, **kwargs)
        if func in REFUSED:
            raise ValueError(
                f"{func.__name__} cannot be shared by several processes; use dropout, or one process"
            )
        return func(*args, **kwargs)

    def batch_norm(
        self,
        input,
        running_mean,
        running_var,
        weight=None,
        bias=None,
        training=False,
        momentum=0.1,
        eps=1e-5,
    ):
        """`torch.nn.functional.batch_norm` over the whole batch."""
        if not training:
            return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
        y, mean, var, values = _BatchNorm.apply(input, weight, bias, eps, self.part.counts)
        if running_mean is not None:
            with torch.no_grad():
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
                running_var.lerp_((var * (values / (values - 1))).to(running_var.dtype), momentum)
        return y

    def dropout(self, input, p=0.5, training=True, inplace=False):
        """`torch.nn.functional.dropout` with this part's rows of the whole batch's mask."""
        if not training or p == 0:
            return F.dropout(input, p, training, inplace)
        if input.ndim == 0 or len(input) % self.part.seen:
            raise ValueError(
                f"dropout of {tuple(input.shape)}: the first axis must hold the {self.part.seen} clips"
            )
        rows = len(input) // self.part.seen * self.part.total
        mask = self.part.rows(F.dropout(_ones_like(input, rows), p))
        return input.mul_(mask) if inplace else input * mask


def _ones_like(x, rows):
    """Ones, `rows` of them where x has len(x), in memory in the order of x: masks are drawn in that order."""
    axes = sorted(range(x.ndim), key=x.stride, reverse=True)
    sizes = (rows, *x.shape[1:])
    dense = torch.ones([sizes[axis] for axis in axes], dtype=x.dtype, device=x.device)
    return dense.permute([axes.index(axis) for axis in range(x.ndim)])


class _BatchNorm(torch.autograd.Function):
    """Normalisation by the statistics of all processes' rows; those of a process that stands in are left out.

    Ioffe and Szegedy, Batch Normalization, ICML 2015, algorithm 1 and the gradient behind it. Each process
    tells mean, variance and number of its values; those of all follow from them without a difference of large
    sums (Chan, Golub and LeVeque, 1979).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps, counts):
        wide = x if x.dtype == torch.float64 else x.float()
        axes = [axis for axis in range(x.ndim) if axis != 1]
        var, mean = torch.var_mean(wide, axes, correction=0)
        values = mean.new_tensor([x.numel() / x.shape[1] if counts else 0.0])
        mine = torch.cat([mean, var, values])
        told = [torch.empty_like(mine) for _ in range(group.get_world_size())]
        group.all_gather(told, mine)
        told = torch.stack(told)
        means, vars, values = told[:, : len(mean)], told[:, len(mean) : -1], told[:, -1:]
        total = values.sum()
        if total <= 1:
            raise ValueError(f"a batch of {total:.0f} value a channel has no variance; give 2 clips or more")
        mean = (values * means).sum(dim=0) / total
        var = (values * (vars + (means - mean) ** 2)).sum(dim=0) / total
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps), total)
        ctx.counts, ctx.axes = counts, axes
        y = F.batch_norm(wide, mean, var, weight, bias, False, 0.0, eps).to(x.dtype)
        ctx.mark_non_differentiable(mean, var, total)
        return y, mean, var, total

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight, mean, inverse, total = ctx.saved_tensors
        shape = [-1 if axis == 1 else 1 for axis in range(x.ndim)]
        grad_wide = grad.to(mean.dtype)
        normal = (x.to(mean.dtype) - mean.view(shape)) * inverse.view(shape)
        grad_bias = grad_wide.sum(ctx.axes)
        grad_weight = (grad_wide * normal).sum(ctx.axes)
        sums = torch.stack([grad_bias, grad_weight])
        group.all_reduce(sums)
        gain = inverse if weight is None else inverse * weight
        if ctx.counts:
            through_bias, through_weight = (sums / total).view(2, *shape)
            grad_wide = grad_wide - through_bias - normal * through_weight
        grad_x = (grad_wide * gain.view(shape)).to(x.dtype)
        grad_weight = grad_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, grad_bias if ctx.needs_input_grad[2] else None, None, None
