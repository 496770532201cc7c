"""What several of the small networks are built of: maps of single frames."""

import torch
from torch import nn

from nlutils.torch.models.common import FrameEncoder, frames_as_batch

__all__ = ["FrameMaps"]


class FrameMaps(nn.Sequential):
    """`FrameEncoder` without its mean over space: (B, C, H, W) -> (B, widths[-1], H / 8, W / 8).

    Layers have the names that they have there, so a trained encoder's weights fit.
    """

    def __init__(self, in_channels: int, widths):
        super().__init__(*list(FrameEncoder(in_channels, widths))[:-2])

    def of_clip(self, x: torch.Tensor) -> torch.Tensor:
        """The maps of every frame: (B, C, T, H, W) -> (B, widths[-1], T, H / 8, W / 8)."""
        return self(frames_as_batch(x)).unflatten(0, (x.shape[0], -1)).transpose(1, 2)
