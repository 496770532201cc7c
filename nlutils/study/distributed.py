"""Several processes that train one network together: who they are, and what they tell each other.

`torchrun` starts the processes, on one machine or on many; each calls the same code. Here is what that code
asks: is this process the first, what does the first one know, do all mean the same.
"""

import itertools
import os
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as group

__all__ = [
    "agree",
    "count",
    "first",
    "from_first",
    "joined",
    "machine_first",
    "mean",
    "own_device",
    "rank",
]

# The longest that processes wait for each other: one may prepare many clips before the others go on.
PATIENCE = timedelta(hours=2)
_groups = itertools.count()


@contextmanager
def joined(device):
    """Join the processes that torchrun started, if it did, and leave them at the end of the block.

    They talk through NCCL about tensors on GPUs, through Gloo about all else. A process group that exists
    already is used as it is.
    """
    if not group.is_torchelastic_launched() or group.is_initialized():
        yield
        return
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    # Keys of an earlier group in the same processes would be taken for those of this one.
    store, number, total = next(group.rendezvous("env://", timeout=PATIENCE))
    group.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=group.PrefixStore(f"nlutils{next(_groups)}", store),
        rank=number,
        world_size=total,
        timeout=PATIENCE,
    )
    try:
        yield
    finally:
        group.destroy_process_group()


def count() -> int:
    """How many processes train together: 1 outside `joined`."""
    return group.get_world_size() if group.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0; known before and after `joined`, too."""
    if group.is_initialized():
        return group.get_rank()
    return int(os.environ["RANK"]) if group.is_torchelastic_launched() else 0


def first() -> bool:
    """Whether this is the process that writes and prints; a process alone is."""
    return rank() == 0


def own_device(device: torch.device) -> torch.device:
    """`device` of this process: a GPU without a number becomes that of its number on this machine.

    Raises ValueError when the machine has fewer GPUs than processes.
    """
    if device.type != "cuda" or device.index is not None or not group.is_torchelastic_launched():
        return device
    number, gpus = _number_on_machine(), torch.cuda.device_count()
    if number >= gpus:
        raise ValueError(
            f"process {number} of this machine has no GPU: there are {gpus}; "
            f"start torchrun with --nproc-per-node {gpus}, or choose device='cpu'"
        )
    return torch.device("cuda", number)


def from_first(make: Callable):
    """What `make()` returns on the first process, on all of them; an error of its is raised on all."""
    if count() == 1:
        return make()
    told = [None, None]
    if first():
        try:
            told[0] = make()
        except Exception as error:
            told[1] = error
    group.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise told[1]
    return told[0]


def agree(what: str, value) -> None:
    """Raise ValueError on all processes, naming `what`, unless `value` is the same on all."""
    if count() == 1:
        return
    values = [None] * count()
    group.all_gather_object(values, value)
    for other, found in enumerate(values):
        if found != values[0]:
            raise ValueError(
                f"process {other} has other {what} than process 0: {_shown(found)} and {_shown(values[0])}; "
                "all machines need the same code, arguments and data"
            )


def mean(value: torch.Tensor) -> float:
    """The mean over processes of `value`, a tensor of one number."""
    if count() > 1:
        value = value.detach().clone()
        group.all_reduce(value)
    return value.item() / count()


@contextmanager
def machine_first():
    """The first process of each machine goes through the block before the others of that machine do.

    What it puts into the machine's cache, the others then read.
    """
    if count() == 1:
        yield
        return
    before = _number_on_machine() == 0
    if not before:
        group.barrier()
    yield
    if before:
        group.barrier()


def _number_on_machine() -> int:
    return int(os.environ.get("LOCAL_RANK", rank()))


def _shown(value, longest=80):
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]}..."
