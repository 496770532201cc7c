"""What the tests of the PyTorch operations and blocks share: data, forced ways of computing, memory."""

import contextlib
from unittest import mock

import torch

from nlutils.torch import NonLocalBlock
from nlutils.torch.operations import concatenation, softmax

# Small data takes every way only when the limits are small too: (name in softmax, value).
_TILES = {
    "MAP_BYTES": -1,
    "_fused_is_linear": lambda *_: False,
    "_TILE": (2, 3),
    "_SYMMETRIC_TILE": (2, 2),
}
WAYS = {
    "map": {"MAP_BYTES": 2**25},
    "fused where it applies": {"MAP_BYTES": -1},
    "tiles": _TILES | {"_TILE_BYTES": 1},  # one sample at a time
    "tiles of two samples": _TILES | {"_TILE_BYTES": 2 * 2 * 3 * 8},
    "one tile": _TILES | {"_TILE": (256, 256), "_SYMMETRIC_TILE": (256, 256)},
}
TABLE_BYTES = {"default": 2**20, "one channel, one sample": 1, "several samples": 400}


@contextlib.contextmanager
def way(name):
    """The softmax forms computed in one of WAYS."""
    with mock.patch.multiple(softmax, **WAYS[name]):
        yield


def ways(instantiation):
    """Contexts, by name, in each of which an instantiation is computed in another way."""
    if instantiation == "concatenation":
        return {
            f"tables: {name}": mock.patch.object(concatenation, "_TABLE_BYTES", size)
            for name, size in TABLE_BYTES.items()
        }
    if instantiation == "dot_product":
        return {"as it is": contextlib.nullcontext()}
    return {name: way(name) for name in WAYS}


def normal(*shape, seed=0, dtype=torch.float64):
    """Numbers drawn from N(0, 1)."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_block(*arguments, seed=1, **options):
    """A block in float64 for inference, all weights and statistics far from their start."""
    block = NonLocalBlock(*arguments, **options).double().eval()
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in block.state_dict().items():
        if tensor.is_floating_point():
            low = 0.5 if name.endswith("running_var") else -1.0
            tensor.copy_(low + 2 * torch.rand(tensor.shape, generator=draw, dtype=torch.float64))
    return block


class Memory:
    """Counts what PyTorch allocates inside `with`, in bytes, below the dispatcher too: no clock, no noise.

    largest  the largest single tensor
    peak     the most that was held at one time, above what was held before
    """

    def __enter__(self):
        self._profile = torch.autograd.profiler.profile(use_kineto=True, profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error):
        self._profile.__exit__(*error)
        events = self._profile.kineto_results.events()
        changes = [event.nbytes() for event in events if event.name() == "[memory]"]
        self.largest = max(changes, default=0)
        held = self.peak = 0
        for change in changes:
            held += change
            self.peak = max(self.peak, held)
