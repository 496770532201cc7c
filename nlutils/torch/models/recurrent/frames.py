"""Networks that see one frame at a time, and the size of what they return."""

import torch
from torch import nn
from torch.func import functional_call

from nlutils.architectures.frame_networks import CNNS, scaled
from nlutils.arguments import one_of, positive_integer
from nlutils.torch.models.inception_v1 import InceptionV1
from nlutils.torch.models.layers import response_norm

__all__ = ["FrameCNN", "FrameInception", "check_size", "map_shape"]


class FrameCNN(nn.Sequential):
    """Five convolutions of the early years, on single frames: (B, in_channels, H, W) -> (B, C, h, w).

    layers   "lrcn": the CaffeNet hybrid of LRCN, 227 x 227 -> 384 x 6 x 6, 4,310,656 parameters for 3
             channels; "alexnet": AlexNet's, 220 x 220 -> 256 x 6 x 6
    width    channels of the first convolution, 96 as published; the others scale with it, rounded to an even
             number, since some convolutions work in 2 groups

    Modules have Caffe's names. Response normalisation runs over 5 channels with alpha 1e-4 and beta 0.75, as
    in Caffe. `out_channels` tells how many come out.
    """

    def __init__(self, in_channels: int, *, layers: str = "lrcn", width: int = 96):
        super().__init__()
        table = CNNS[one_of("layers", layers, CNNS)]
        positive_integer("width", width)
        for number, (channels, kernel, stride, padding, groups, then) in enumerate(table, start=1):
            channels = scaled(channels, width, first=table[0][0])
            convolution = nn.Conv2d(in_channels, channels, kernel, stride, padding, groups=groups)
            self.add_module(f"conv{number}", convolution)
            self.add_module(f"relu{number}", nn.ReLU(inplace=True))
            for kind in then:
                self.add_module(f"{kind}{number}", self._pool() if kind == "pool" else self._norm())
            in_channels = channels
        self.out_channels = in_channels

    @staticmethod
    def _pool():
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    @staticmethod
    def _norm():
        return response_norm(1e-4, k=1.0)


class FrameInception(nn.Module):
    """Inception-v1 with batch normalisation, on single frames: (B, C, H, W) -> (B, 1024, H / 32, W / 32)."""

    def __init__(self, in_channels: int, *, width: int = 64):
        super().__init__()
        self.features = InceptionV1(in_channels, width=width, inflated=False)
        self.out_channels = self.features.out_channels

    def forward(self, x):
        return self.features(x[:, :, None])[:, :, 0]


def map_shape(encoder: nn.Module, in_channels: int, size) -> tuple[int, int, int]:
    """(C, h, w) that `encoder` makes of a picture of `size`; nothing is computed.

    Raises ValueError when such a picture is too small for it, or when it returns no maps.
    """
    tensors = [*encoder.named_parameters(), *encoder.named_buffers()]
    on_meta = {name: tensor.detach().to("meta") for name, tensor in tensors}
    pictures = torch.empty(2, in_channels, *size, device="meta")
    try:
        maps = functional_call(encoder, on_meta, pictures)
    except RuntimeError as error:
        raise ValueError(f"size={tuple(size)} does not pass through the encoder: {error}") from error
    if maps.ndim != 4:
        shape = tuple(maps.shape)
        raise ValueError(f"encoder={type(encoder).__name__} returns {shape}; it must return (B, C, h, w)")
    return tuple(maps.shape[1:])


def check_size(x: torch.Tensor, size: tuple[int, int]) -> None:
    """ValueError when frames (..., H, W) are not of the `size` that fully connected layers were built for."""
    have = tuple(x.shape[-2:])
    if have != size:
        raise ValueError(
            f"clips of {have[0]} x {have[1]} pixels do not fit the fully connected layers, which were built "
            f"for size={size}; build the network with size={have}"
        )
