"""How the operations treat half precision: what overflows or loses its digits is computed in float32."""

from contextlib import nullcontext

import torch
from torch import Tensor

__all__ = ["at_least_float32", "no_autocast"]


def at_least_float32(tensor: Tensor) -> Tensor:
    """float16 and bfloat16 become float32; other tensors stay what they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def no_autocast(tensor: Tensor):
    """A context in which autocast does not turn products back into half precision."""
    kind = tensor.device.type
    # The meta device, which only counts, has no autocast.
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
