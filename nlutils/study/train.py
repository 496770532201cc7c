"""The training loop."""

import os
import pickle
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch

from nlutils.paths import atomic_path
from nlutils.study import distributed
from nlutils.study.arithmetic import autocast, channels_last, objective
from nlutils.study.inputs import Inputs
from nlutils.study.recipe import Recipe
from nlutils.study.stopwatch import Stopwatch
from nlutils.torch.blocks import CompactGeneralizedNonLocalBlock, NonLocalBlock
from nlutils.torch.controls import ConvolutionBlock

__all__ = ["central_crops", "epoch_batches", "loss_targets", "seeded", "shown_epochs", "train"]

# What `Recipe.block_lr` is about; the other controls are non-local blocks themselves.
BLOCKS = NonLocalBlock, CompactGeneralizedNonLocalBlock, ConvolutionBlock


@contextmanager
def seeded(seed: int):
    """Seed PyTorch inside the block, and give the generators' states back afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def train(
    model,
    inputs: Inputs,
    indices: torch.Tensor,
    recipe: Recipe,
    *,
    checkpoint=None,
    progress: bool = False,
    after_epoch: Callable[[int, float], None] | None = None,
    watch: Stopwatch | None = None,
) -> list[float]:
    """Train `model` in place on the clips `indices` of `inputs`; returns the mean loss of each epoch.

    Runs all of `recipe.epochs`; nothing stops it early. `inputs` lie on the device of `model` (see
    `Inputs.to`). With `checkpoint` (a path), the state is written there after every epoch, and a run that was
    killed goes on after its last full epoch, to the same weights: everything random in an epoch follows from
    (seed, epoch). `after_epoch(epoch, loss)` is called after each. `watch` is told the time that went into
    the epochs of the checkpoint.

    Several processes (`nlutils.study.distributed`) that all call this train as one would, up to the order of
    sums: each takes its part of every batch. The first alone reads and writes the checkpoint.

    Raises FloatingPointError when the loss is no longer finite, ValueError for a checkpoint of another run.
    """
    device = inputs.frames.device
    optimizer = torch.optim.AdamW(
        _parameter_groups(channels_last(model), recipe), weight_decay=recipe.weight_decay
    )
    targets = loss_targets(inputs, recipe).to(device)
    loss_of = objective(model, recipe)
    watch = watch or Stopwatch()
    losses = _resume(checkpoint, model, optimizer, recipe, watch)
    for epoch in shown_epochs(len(losses), recipe.epochs, progress and distributed.first()):
        model.train()
        with seeded(1_000_003 * recipe.seed + epoch):
            draw = torch.Generator().manual_seed(1_000_003 * recipe.seed + epoch)
            batches = epoch_batches(indices, recipe.batch, draw)
            total = 0.0
            for step, batch in enumerate(batches):
                _set_rate(optimizer, recipe.rate(epoch + step / len(batches)))
                x = inputs.batch(
                    model.input, batch, recipe.size, generator=draw, flip=recipe.flip, time=recipe.time
                )
                with autocast(recipe, device):
                    loss = loss_of(x, targets[batch])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total += distributed.mean(loss) * len(batch)
        losses.append(total / len(indices))
        if not torch.isfinite(torch.tensor(losses[-1])):
            raise FloatingPointError(f"the loss is {losses[-1]} in epoch {epoch}; lower lr={recipe.lr}")
        if checkpoint is not None and distributed.first():
            _save(checkpoint, model, optimizer, recipe, losses, watch)
        if after_epoch is not None:
            after_epoch(epoch, losses[-1])
    return losses


def _parameter_groups(model, recipe) -> list[dict]:
    """The weights of blocks apart from all others, with what the learning rate of each is multiplied by."""
    blocks = [module for module in model.modules() if isinstance(module, BLOCKS)]
    inside = {id(weight): weight for block in blocks for weight in block.parameters()}
    others = [weight for weight in model.parameters() if id(weight) not in inside]
    groups = [{"params": others, "lr": recipe.lr, "factor": 1.0}]
    if inside:
        groups.append({"params": list(inside.values()), "lr": recipe.lr, "factor": recipe.block_lr})
    return groups


def _set_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def loss_targets(inputs, recipe) -> torch.Tensor:
    """What the loss compares with, a row a clip: the class, or its smoothed probabilities."""
    if recipe.label_smoothing == 0:
        return inputs.labels
    sure = torch.nn.functional.one_hot(inputs.labels, len(inputs.classes)).float()
    return (1 - recipe.label_smoothing) * sure + recipe.label_smoothing / len(inputs.classes)


def central_crops(kind, inputs: Inputs, indices: torch.Tensor, recipe: Recipe):
    """The clips `indices` once, in order: (x, labels) of `recipe.batch` clips at a time, none mirrored."""
    for batch in indices.split(recipe.batch):
        yield inputs.batch(kind, batch, recipe.size, time=recipe.time), inputs.labels[batch]


def epoch_batches(indices, size, generator):
    """The clips in a new order, cut into batches; a last clip alone joins the batch before it."""
    order = indices[torch.randperm(len(indices), generator=generator)]
    batches = list(order.split(size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def shown_epochs(start, stop, progress):
    if not progress:
        return range(start, stop)
    from tqdm.auto import tqdm

    return tqdm(range(start, stop), initial=start, total=stop, desc="epochs", unit="epoch")


def _save(path, model, optimizer, recipe, losses, watch):
    state = {
        "settings": recipe.settings(),
        "losses": losses,
        "seconds": watch.read(),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def _resume(path, model, optimizer, recipe, watch) -> list[float]:
    """Load the checkpoint at `path` when there is one; returns the losses of the epochs behind it."""
    state = None if path is None else distributed.from_first(lambda: _load(path, recipe))
    if state is None:
        return []
    with _named(path):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        watch.add(state["seconds"])
    return state["losses"]


def _load(path, recipe) -> dict | None:
    if not Path(path).is_file():
        return None
    with _named(path):
        state = torch.load(path, map_location="cpu", weights_only=True)
        settings = state["settings"]
    if settings != recipe.settings():
        raise ValueError(
            f"{os.fspath(path)} is a checkpoint of another recipe, {settings}; delete it or name another"
        )
    return state


@contextmanager
def _named(path):
    """Errors of a file that is no checkpoint, or of another network's, name it."""
    try:
        yield
    except (RuntimeError, KeyError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(
            f"{os.fspath(path)} is not a checkpoint of this network ({error}); delete it"
        ) from error
