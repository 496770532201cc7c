"""Inception-v1 in 3D and frame by frame, with TensorFlow's "SAME" padding.

Szegedy et al., Going Deeper with Convolutions, CVPR 2015; with batch normalisation: Ioffe and Szegedy, Batch
Normalization, ICML 2015; inflated: Carreira and Zisserman, Quo Vadis, CVPR 2017, section 2.4 and figure 3.
"""

import torch
import torch.nn.functional as F
from torch import nn

from nlutils.arguments import positive_integer, truth_value

__all__ = ["WIDTH", "ConvUnit", "InceptionV1", "SameMaxPool3d", "same_padding"]

# Widths of the branches of each Mixed layer: 1x1 | 1x1, then 3x3 | 1x1, then 3x3 | pooling, then 1x1.
MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
# The poolings that stand before a Mixed layer: name, edge of the window. All have stride 2.
POOLED = {"Mixed_4b": ("MaxPool3d_4a_3x3", 3), "Mixed_5b": ("MaxPool3d_5a_2x2", 2)}
WIDTH = 64  # channels of the first convolution as published


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """What TensorFlow's "SAME" puts before and after an axis of length `size`: (before, after).

    There are ceil(size / stride) windows, the last of them starts at (ceil(size / stride) - 1) * stride. What
    the windows need beyond `size` is shared out, the odd one after the end: windows of 3 or 7 at stride 2 get
    one more there when `size` is even. PyTorch's own padding is always the same on both sides.
    """
    windows = -(-size // stride)
    total = max((windows - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _padded(x, kernel, stride, value):
    """`x` and the symmetric padding still to be done, which together are "SAME"."""
    pads = [same_padding(*axis) for axis in zip(x.shape[2:], kernel, stride, strict=True)]
    if all(before == after for before, after in pads):
        return x, tuple(before for before, _ in pads)  # the layer does it without a copy of x
    return F.pad(x, [count for pair in reversed(pads) for count in pair], value=value), 0


class SameConv3d(nn.Conv3d):
    """Conv3d with TensorFlow's "SAME" padding: sizes are divided by the stride, rounded up."""

    def forward(self, x):
        x, padding = _padded(x, self.kernel_size, self.stride, 0.0)
        return F.conv3d(x, self.weight, self.bias, self.stride, padding)


class SameMaxPool3d(nn.MaxPool3d):
    """MaxPool3d with TensorFlow's "SAME" padding, which is never the largest value."""

    def forward(self, x):
        x, padding = _padded(x, self.kernel_size, self.stride, float("-inf"))
        return F.max_pool3d(x, self.kernel_size, self.stride, padding)


class BatchNormWithoutGain(nn.BatchNorm3d):
    """BatchNorm3d with a bias and no gain."""

    def __init__(self, channels, **options):
        super().__init__(channels, **options)
        self.register_parameter("weight", None)

    def reset_parameters(self):
        self.reset_running_stats()
        nn.init.zeros_(self.bias)


class ConvUnit(nn.Module):
    """Convolution, batch normalisation, ReLU. kernel and stride are (time, height, width)."""

    def __init__(self, in_channels, out_channels, kernel=(1, 1, 1), stride=(1, 1, 1), *, norm_gain=True):
        super().__init__()
        self.conv = SameConv3d(in_channels, out_channels, kernel, stride, bias=False)
        # eps is part of the published network: its weights need it.
        self.norm = (nn.BatchNorm3d if norm_gain else BatchNormWithoutGain)(out_channels, eps=1e-3)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Four branches side by side: (B, in_channels, T, H, W) -> (B, sum of their widths, T, H, W)."""

    def __init__(self, in_channels, widths, kernel, *, norm_gain):
        super().__init__()
        b0, b1a, b1b, b2a, b2b, b3 = widths
        options = {"norm_gain": norm_gain}
        self.branch0 = ConvUnit(in_channels, b0, **options)
        self.branch1 = nn.Sequential(
            ConvUnit(in_channels, b1a, **options), ConvUnit(b1a, b1b, kernel, **options)
        )
        # 3x3 here too, in place of the 5x5 of the first Inception, as in the authors' code.
        self.branch2 = nn.Sequential(
            ConvUnit(in_channels, b2a, **options), ConvUnit(b2a, b2b, kernel, **options)
        )
        self.branch3 = nn.Sequential(SameMaxPool3d(kernel, (1, 1, 1)), ConvUnit(in_channels, b3, **options))
        self.out_channels = b0 + b1b + b2b + b3

    def forward(self, x):
        return torch.cat([self.branch0(x), self.branch1(x), self.branch2(x), self.branch3(x)], dim=1)


class InceptionV1(nn.Sequential):
    """Inception-v1 up to its last average pooling, in 3D or frame by frame.

    inflated=True    N x N windows become N x N x N, strides go over time as well, but for the first two
                     poolings, which leave time alone (section 2.4):
                     (B, C, T, H, W) -> (B, 1024, T / 8, H / 32, W / 32), each rounded up
    inflated=False   windows and strides are 1 in time, so each frame is a picture of its own:
                     (B, C, T, H, W) -> (B, 1024, T, H / 32, W / 32)

    Both have the same layers under the same names; weights differ in the length of their time axis only.
    `width` is the number of channels of the first convolution, 64 as published; all others scale with it,
    rounded. `norm_gain=False` leaves out the gains of the batch normalisations, as the released code does.
    `out_channels` tells how many come out.
    """

    def __init__(self, in_channels, *, width=WIDTH, inflated=True, norm_gain=True):
        super().__init__()
        positive_integer("width", width)
        truth_value("norm_gain", norm_gain)

        def cube(edge):
            return (edge if inflated else 1, edge, edge)

        def scaled(channels):
            return max(1, round(channels * width / WIDTH))

        def unit(in_channels, out_channels, edge, stride=1):
            return ConvUnit(in_channels, out_channels, cube(edge), cube(stride), norm_gain=norm_gain)

        first, third = scaled(64), scaled(192)
        self.add_module("Conv3d_1a_7x7", unit(in_channels, first, 7, stride=2))
        self.add_module("MaxPool3d_2a_3x3", SameMaxPool3d((1, 3, 3), (1, 2, 2)))
        self.add_module("Conv3d_2b_1x1", unit(first, first, 1))
        self.add_module("Conv3d_2c_3x3", unit(first, third, 3))
        self.add_module("MaxPool3d_3a_3x3", SameMaxPool3d((1, 3, 3), (1, 2, 2)))
        channels = third
        for name, widths in MIXED.items():
            if name in POOLED:
                pool, edge = POOLED[name]
                self.add_module(pool, SameMaxPool3d(cube(edge), cube(2)))
            mixed = Mixed(channels, [scaled(one) for one in widths], cube(3), norm_gain=norm_gain)
            self.add_module(name, mixed)
            channels = mixed.out_channels
        self.out_channels = channels
