"""Blocks to compare a non-local block with: what is left of its gain when it is not non-local?

Each takes and returns maps (B, C, *size), starts as the identity, and has the weights of the block that it
stands for, or as many: the same look without the choice (`UniformBlock`), the same choice without the
distance (`WindowBlock`), the same number of weights spent on convolution (`ConvolutionBlock`); and for the
compact generalized block its other layers without its look (`ConstantBlock`).
"""

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from nlutils.arguments import positive_integer
from nlutils.instantiations import check_map
from nlutils.torch.blocks import CompactGeneralizedNonLocalBlock, NonLocalBlock

__all__ = ["ConstantBlock", "ConvolutionBlock", "UniformBlock", "WindowBlock"]

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class UniformBlock(NonLocalBlock):
    """A non-local block whose map is 1 / M everywhere: every position gets the mean of g(x_j) over all j.

    Options as of `NonLocalBlock`. theta and phi are there, so that weights of the block fit; they are
    computed, as there, and not trained. Raises ValueError for attention to parts of the map.
    """

    def __init__(self, in_channels: int, inner_channels: int | None = None, **options):
        super().__init__(in_channels, inner_channels, **options)
        _refuse_parts(self)
        for weight in (*self.theta.parameters(), *self.phi.parameters()):
            weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *size) -> (B, C, *size)."""
        self.check_input(x)
        _, _, g = self.embed(x)
        y = g.flatten(2).mean(dim=2).unflatten(1, (-1, *[1] * self.ndim))
        return x + self.norm(self.w_z(y.expand(-1, -1, *x.shape[2:])))


class ConstantBlock(CompactGeneralizedNonLocalBlock):
    """A compact generalized block whose number s of each group is 1: z = x + norm(W_z theta).

    What positions tell each other is gone but for the norm's mean and deviation, which are the clip's. phi
    and g are there, so that weights of the block fit, and are not trained. Options as of
    `CompactGeneralizedNonLocalBlock`; raises ValueError for another kernel than "dot".
    """

    def __init__(self, in_channels: int, inner_channels: int | None = None, **options):
        super().__init__(in_channels, inner_channels, **options)
        if self.kernel != "dot":
            raise ValueError(f"kernel={self.kernel!r}: a ConstantBlock has 'dot', one number a group")
        for weight in (*self.phi.parameters(), *self.g.parameters()):
            weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *size) -> (B, C, *size)."""
        check_map(x.shape, self.in_channels, self.ndim, None, channels_last=False)
        return x + self.norm(self.w_z(self.theta(x)))


class WindowBlock(NonLocalBlock):
    """An embedded Gaussian block that looks at a window around each position, and no further.

    `window` has an odd length for each axis of the map, (T, H, W) for ndim=3; at the border the positions
    that there are count. Other options as of `NonLocalBlock`, but without sub-sampling. Raises ValueError for
    other windows, instantiations and parts of the map.
    """

    def __init__(self, in_channels: int, inner_channels: int | None = None, *, window=(3, 3, 3), **options):
        super().__init__(in_channels, inner_channels, **options)
        _refuse_parts(self)
        if self.instantiation != "embedded_gaussian" or self.subsample is not None:
            raise ValueError(
                f"instantiation={self.instantiation!r}, subsample={self.subsample!r}: a window has "
                "'embedded_gaussian' and None"
            )
        self.window = _odd_sides("window", window, self.ndim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *size) -> (B, C, *size)."""
        self.check_input(x)
        theta, phi, g = self.embed(x)
        inside = torch.ones_like(theta[:1, :1])
        offsets = list(itertools.product(*(range(-(side // 2), side // 2 + 1) for side in self.window)))
        logits = torch.stack([(theta * _moved(phi, offset)).sum(dim=1) for offset in offsets])
        missing = torch.stack([_moved(inside, offset)[:, 0] == 0 for offset in offsets])
        weights = (logits * self.logit_scale).masked_fill(missing, -math.inf).softmax(dim=0)  # (K, B, *size)
        y = sum(
            weight.unsqueeze(1) * _moved(g, offset) for weight, offset in zip(weights, offsets, strict=True)
        )
        return x + self.norm(self.w_z(y))


class ConvolutionBlock(nn.Module):
    """A residual bottleneck, 1 - 3 - 1 convolutions, as wide as a non-local block's weights allow.

    Its width is the largest with no more weights than `NonLocalBlock(in_channels, inner_channels)` has, all
    forms but the Gaussian. `kernel` has an odd length for each axis of the map; None: 3 for each. Raises
    ValueError for another kernel, and when not even one channel fits.
    """

    def __init__(self, in_channels: int, inner_channels: int | None = None, *, ndim: int = 3, kernel=None):
        super().__init__()
        kernel = _odd_sides("kernel", (3,) * ndim if kernel is None else kernel, ndim)
        budget = _count(NonLocalBlock(in_channels, inner_channels, ndim=ndim))
        outside = 3 * in_channels  # the last bias, and gain and bias of the norm
        fixed, squared = 2 * in_channels + 2, math.prod(kernel)
        spare = budget - outside
        width = int((math.sqrt(fixed**2 + 4 * squared * max(spare, 0)) - fixed) / (2 * squared))
        if width < 1:
            raise ValueError(f"in_channels={in_channels} gives a block of {budget} weights: too few")
        conv = _CONV[ndim]
        self.layers = nn.Sequential(
            conv(in_channels, width, 1),
            nn.ReLU(inplace=True),
            conv(width, width, kernel, padding=[side // 2 for side in kernel]),
            nn.ReLU(inplace=True),
            conv(width, in_channels, 1),
        )
        self.norm = _NORM[ndim](in_channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *size) -> (B, C, *size)."""
        return x + self.norm(self.layers(x))


def _odd_sides(name, sides, ndim):
    found = tuple(positive_integer(name, side) for side in sides)
    if len(found) != ndim or not all(side % 2 for side in found):
        raise ValueError(f"{name}={sides!r} must be {ndim} odd numbers, one for each axis of the map")
    return found


def _refuse_parts(block):
    if block.attention != "spacetime" or block.frames_per_group is not None:
        raise ValueError(
            f"attention={block.attention!r}, frames_per_group={block.frames_per_group!r}: a "
            f"{type(block).__name__} has 'spacetime' and None"
        )


def _moved(maps, offset):
    """maps[..., p + offset] at each position p; zeros where that is outside."""
    padding = [side for step in reversed(offset) for side in (max(-step, 0), max(step, 0))]
    padded = functional.pad(maps, padding)
    for axis, (step, side) in enumerate(zip(offset, maps.shape[2:], strict=True), start=2):
        padded = padded.narrow(axis, max(step, 0), side)
    return padded


def _count(module):
    return sum(weight.numel() for weight in module.parameters())
