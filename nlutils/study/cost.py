"""What a network costs: weights, multiply-adds, milliseconds, memory."""

import statistics
import time
import warnings
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from nlutils.torch.models.common import INPUT_CHANNELS

__all__ = [
    "HeldBytes",
    "example_input",
    "forward_milliseconds",
    "measure",
    "multiply_adds",
    "parameters",
    "training_memory",
]

# PyTorch's counter knows its fused attention on a GPU, not that on a CPU; the formula is the same.
_FUSED_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: (
        sdpa_flop_count(query, key, value)
    )
}

HOW = (
    "one clip forward: multiply-adds of convolutions and matrix products (PyTorch's FLOP counter, halved); "
    "forward_ms: median, on a CPU processor time of one thread, on a GPU wall time; "
    "training_mb: most memory that tensors hold during one training step of one batch, weights included, "
    "optimizer's state not, 1 MB = 10^6 bytes"
)


def example_input(model, frames: int, size, batch: int = 1):
    """Random input of the right shape: (batch, C, frames, *size), a tuple of them for several streams."""
    device = _device(model)
    draw = torch.Generator().manual_seed(0)
    kinds = (model.input,) if isinstance(model.input, str) else model.input
    made = tuple(
        torch.randn(batch, INPUT_CHANNELS[kind], frames, *size, generator=draw).to(device) for kind in kinds
    )
    return made[0] if isinstance(model.input, str) else made


def _device(model) -> torch.device:
    """Where the weights lie; the CPU for a model that has none."""
    return next((weight.device for weight in model.parameters()), torch.device("cpu"))


def parameters(model) -> int:
    """The number of trained numbers."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


@torch.no_grad()
def multiply_adds(model, x) -> int:
    """Multiply-adds of one forward pass: convolutions and matrix products only, as papers count them."""
    model.eval()
    # oneDNN runs an LSTM as one operation, which the counter does not know; without it the products are seen.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")
        counter = FlopCounterMode(display=False, custom_mapping=_FUSED_ON_CPU)
        with torch.backends.mkldnn.flags(enabled=False), counter:
            model(x)
    return counter.get_total_flops() // 2


@torch.no_grad()
def forward_milliseconds(model, x, repeats: int = 9) -> float:
    """The median time of a forward pass in milliseconds, after two passes to warm up.

    On a CPU it is the processor time of the process, which other programs on the machine hardly change; for
    one thread and an idle machine it equals the time on the wall. On a GPU it is time on the wall,
    synchronised.
    """
    model.eval()
    on_gpu = _device(model).type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    times = []
    for _ in range(repeats + 2):
        start = clock()
        model(x)
        if on_gpu:
            torch.cuda.synchronize()
        times.append(clock() - start)
    return 1000 * statistics.median(times[2:])


def training_memory(model, x) -> int:
    """The most bytes that tensors hold at once during one training step (forward, loss, backward).

    Weights and the batch are included, the optimizer's state is not. On a CPU every tensor is counted as it
    comes and goes (see `HeldBytes`), so the number is the same at every run; on a GPU it is PyTorch's
    `max_memory_allocated`, less what else lies there (the study's clips, other networks).
    """
    device = next(model.parameters()).device
    batch_is_one = isinstance(x, torch.Tensor)
    batch = len(x) if batch_is_one else len(x[0])
    labels = torch.zeros(batch, dtype=torch.long, device=device)
    model.train()
    model.zero_grad(set_to_none=True)
    own = [*model.parameters(), *model.buffers(), *([x] if batch_is_one else x)]
    if device.type == "cuda":
        mine = sum(tensor.untyped_storage().nbytes() for tensor in own)
        others = torch.cuda.memory_allocated(device) - mine
        torch.cuda.reset_peak_memory_stats(device)
        model.loss(x, labels).backward()
        peak = torch.cuda.max_memory_allocated(device) - others
    else:
        with HeldBytes(own) as held:
            model.loss(x, labels).backward()
        peak = held.highest
    model.zero_grad(set_to_none=True)
    return peak


class HeldBytes(TorchDispatchMode):
    """Counts the bytes of all tensors alive inside the block; `highest` is the most at once.

    Every operation's results pass through `__torch_dispatch__`; a tensor's storage is counted when it is
    first seen, and taken off when Python's garbage collection reports its end. A kernel's own scratch space
    is unseen.
    """

    def __init__(self, tensors=()):
        super().__init__()
        self.now = self.highest = 0
        self._seen = weakref.WeakKeyDictionary()
        for tensor in tensors:
            self._count(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor):
                self._count(result)
        return results

    def _count(self, tensor):
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen[storage] = size = storage.nbytes()
            self.now += size
            self.highest = max(self.highest, self.now)
            weakref.finalize(storage, self._give_back, size)

    def _give_back(self, size):
        self.now -= size


def measure(model, x, batch) -> dict:
    """All of it, as the results record it: one clip `x`, and a training step of the clips `batch`.

    `parameters` are all numbers learnt, those of a second stage (PCA, mixtures, SVM) included. A network
    whose weights no gradient trains has no multiply-adds that the counter knows, and no training step: None.
    Changes the model's batch statistics: measure a copy.
    """
    return {
        "parameters": parameters(model) + model.fitted_numbers(),
        "multiply_adds": multiply_adds(model, x) if model.trains else None,
        "forward_ms": round(forward_milliseconds(model, x), 2),
        "training_mb": round(training_memory(model, batch) / 1e6, 1) if model.trains else None,
        "how": HOW,
    }
