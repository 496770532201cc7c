"""ST-ResNet: two residual networks, joined by residuals across the streams and over time.

Feichtenhofer, Pinz and Wildes, Spatiotemporal Residual Networks for Video Action Recognition, NIPS 2016,
https://arxiv.org/abs/1611.02155; what the paper leaves open is as in the authors' code,
feichtenhofer/st-resnet, STResNet_stage1.m and STResNet_stage2.m.
"""

import torch
import torch.nn.functional as F
from torch import nn

from nlutils.architectures.resnet import residual_blocks
from nlutils.arguments import positive_integer, probability, truth_value
from nlutils.torch.models.common import (
    Expects,
    VideoClassifier,
    check_pair,
    mean_probability,
    vote_loss,
)
from nlutils.torch.models.layers import ConvNorm, frames_and_stacks

__all__ = ["STResNet"]

FRAMES, SIZE, STACK = 11, (224, 224), 10  # as released

INJECTED = 1  # the residual unit of each stage, from 0, that sees the other stream and three frames

_SOURCE = (
    "feichtenhofer/st-resnet, STResNet_stage2.m: frames 1 to 15 apart, ten fields around each, the mean of "
    "the training pictures subtracted (flow as bytes)"
)


class STResNet(VideoClassifier):
    """((B, 3, T, H, W), (B, 2, F, H, W)), frames and flow -> (B, num_classes), log of the mean probability.

    Two ResNets, `appearance` on S = F // stack frames and `motion` on the S stacks of L = `stack` flow fields
    that go with them (cut as `TwoStream` does). Two things make them one network:

    injection   in the second unit of each stage what motion knows is added to what the residual branch of
                appearance sees, x_(l+1) = ReLU(x_l) + F(x_l + ReLU(m_l)). The skip path ReLU(x_l) has none
                of it, and nothing goes the other way
    temporal    in the second unit of each stage of both streams the two 1x1 convolutions see three frames,
                3x1x1, padded with zeros. They start as 2D kernels, divided by 3 and repeated

    width       channels of conv1; depth: 50, 101, or residual units in each of the four stages, 2 or more
    pool        (window, stride) of the max pooling over time behind res5: (5, 2) as released for 11 frames,
                (1, 1) for none, as in the first of the two trainings. It shrinks to clips that are shorter

    Each window is a vote of its stream. Probabilities are averaged over windows, then streams (both streams
    have a loss and a classifier; how their answers meet is our choice). The stride of a stage is in its first
    1x1, as in He et al. 2016. Any size works. 58,624,394 parameters with 101 classes; 47,483,274 without
    `temporal`. Weights start as in He et al. 2015; `nlutils.torch.inflate_weights` brings those of 2D ResNets
    into either stream, with `mean_inputs=["stem.conv"]` into the stem of motion, as the authors do.
    """

    input = ("rgb", "flow")

    def __init__(
        self,
        num_classes: int,
        *,
        depth=50,
        width: int = 64,
        stack: int = STACK,
        injection: bool = True,
        temporal: bool = True,
        pool: tuple[int, int] = (5, 2),
        dropout: float = 0.0,
    ):
        super().__init__()
        self.stack = positive_integer("stack", stack)
        self.injection = truth_value("injection", injection)
        self.pool = _pair(pool)
        blocks = tuple(residual_blocks(depth).values())
        if min(blocks) <= INJECTED:
            raise ValueError(f"depth={depth!r}: each stage needs two residual units or more, as (2, 2, 2, 2)")
        options = {"blocks": blocks, "width": positive_integer("width", width)}
        options |= {"temporal": truth_value("temporal", temporal), "dropout": probability("dropout", dropout)}
        self.appearance = _Stream(3, num_classes, **options)
        self.motion = _Stream(2 * stack, num_classes, **options)
        if (blocks, width, stack) == (tuple(residual_blocks(50).values()), 64, STACK):
            rgb = Expects(FRAMES, SIZE, source=_SOURCE)
            flow = Expects(FRAMES * STACK, SIZE, mean=(0.0, 0.0), std=(1.0, 1.0), colour="", source=_SOURCE)
            self.expects = rgb, flow

    def clip_shapes(self):
        """11 frames of 224 x 224, and a stack of flow for each; any size works."""
        return (FRAMES, *SIZE), (FRAMES * self.stack, *SIZE)

    def maps(self, x):
        """What res5 of each stream returns, appearance first: (B, 32 width, S, H / 32, W / 32)."""
        frames, stacks = frames_and_stacks(*check_pair(x), self.stack)
        a, m = self.appearance.begin(frames), self.motion.begin(stacks)
        for a_units, m_units in zip(self.appearance.stages, self.motion.stages, strict=True):
            for index, (a_unit, m_unit) in enumerate(zip(a_units, m_units, strict=True)):
                injected = F.relu(m) if self.injection and index == INJECTED else None
                a, m = a_unit(a, injected), m_unit(m)
        return F.relu(a), F.relu(m)

    def votes(self, x):
        """Logits of each stream a window of time, appearance first: two tensors (B, windows, num_classes)."""
        streams = (self.appearance, self.motion)
        return tuple(
            stream.answer(maps, self.pool) for stream, maps in zip(streams, self.maps(x), strict=True)
        )

    def forward(self, x):
        streams = [mean_probability(votes, dim=1) for votes in self.votes(x)]
        return mean_probability(torch.stack(streams, dim=1), dim=1)

    def losses(self, x, labels):
        """The mean cross-entropy over the windows of each stream, appearance first: two scalars."""
        return tuple(vote_loss(votes, labels) for votes in self.votes(x))

    def loss(self, x, labels):
        """The sum of both streams' losses; what appearance lacks reaches motion through the injections."""
        return sum(self.losses(x, labels))


class _Stream(nn.Module):
    """One ResNet, in three parts: `begin`, the units of `stages`, `answer`."""

    def __init__(self, in_channels, num_classes, *, blocks, width, temporal, dropout):
        super().__init__()
        self.stem = _conv(in_channels, width, (1, 7, 7), stride=2)
        self.pool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
        self.stages, channels = nn.ModuleList(), width
        for stage, count in enumerate(blocks):
            units = nn.ModuleList()
            for index in range(count):
                stride = 2 if index == 0 and stage > 0 else 1
                units.append(_Unit(channels, width, stride, temporal and index == INJECTED))
                channels = 4 * width
            self.stages.append(units)
            width *= 2
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(channels, num_classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def begin(self, x):
        return self.pool(F.relu(self.stem(x)))

    def answer(self, maps, pool):
        """(B, C, S, H, W) -> (B, windows, num_classes): max over time, then the mean over space."""
        window = min(pool[0], maps.shape[2])
        maps = F.max_pool3d(maps, (window, 1, 1), (pool[1], 1, 1))
        return self.classifier(self.dropout(maps.mean(dim=(3, 4)).transpose(1, 2)))


class _Unit(nn.Module):
    """x_(l+1) = shortcut(ReLU(x_l)) + F(ReLU(x_l)); sums go in and out before their ReLU.

    With `injected` (same shape as x_l) the branch F sees x_l + injected instead.
    """

    def __init__(self, channels, width, stride, temporal):
        super().__init__()
        frames = 3 if temporal else 1
        self.a = _conv(channels, width, (frames, 1, 1), stride)
        self.b = _conv(width, width, (1, 3, 3))
        self.c = _conv(width, 4 * width, (frames, 1, 1))
        self.shortcut = None
        if channels != 4 * width or stride != 1:
            self.shortcut = _conv(channels, 4 * width, (1, 1, 1), stride)

    def branch(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)))))

    def forward(self, x, injected=None):
        skip = F.relu(x)
        branch = self.branch(skip if injected is None else x + injected)
        return branch + (skip if self.shortcut is None else self.shortcut(skip))


def _conv(in_channels, out_channels, kernel, stride=1):
    """Without a ReLU, for sums come before it; kernels over time start as a 2D one, repeated."""
    stride = (1, stride, stride)
    return ConvNorm(in_channels, out_channels, kernel, stride, relu=False, repeated=True)


def _pair(pool):
    if not isinstance(pool, tuple | list) or len(pool) != 2:
        raise ValueError(f"pool={pool!r} must be (window, stride) over time, such as (5, 2)")
    return tuple(positive_integer("pool", value) for value in pool)
