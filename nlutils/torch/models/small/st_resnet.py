"""ST-ResNet-style: two 2D streams with residual stages, motion connected into appearance between them.

Feichtenhofer, Pinz, Wildes: Spatiotemporal Residual Networks for Video Action Recognition, NIPS 2016
(additive connections, convolutions over three frames); by the same, Spatiotemporal Multiplier Networks for
Video Action Recognition, CVPR 2017 (multiplicative ones). Smaller here, so that a CPU trains it in minutes:
four stages of one convolution, as the other small networks have, instead of a ResNet-50.
"""

import torch
import torch.nn.functional as F
from torch import nn

from nlutils.arguments import one_of, positive_integer, probability, truth_value
from nlutils.torch.models.common import (
    STUDY_CLIP,
    WIDTHS,
    VideoClassifier,
    check_pair,
    check_widths,
    mean_probability,
)
from nlutils.torch.models.layers import ConvNorm, frames_and_stacks

__all__ = ["STResNetSmall"]

# What the residual branch of appearance sees, of its own maps and of motion's.
CONNECTIONS = {
    "additive": torch.add,
    "multiplicative": torch.mul,
    "none": lambda appearance, motion: appearance,
}


class STResNetSmall(VideoClassifier):
    """((B, 3, T, H, W), (B, 2, F, H, W)), frames and flow -> (B, num_classes), log of the mean probability.

    Two streams, `appearance` on S = F // stack frames and `motion` on the S stacks of `stack` flow fields
    that go with them (cut as `nlutils.torch.models.layers.frames_and_stacks` says). The first stage of each
    is a 3x3 convolution of stride 2; the three others are residual, with 2x2 max pooling behind the second
    and third:

        x_(l+1) = ReLU(W_l x_l + F(x_l o m_l))      of appearance; of motion F(m_l)

    F is a 3x1x1 convolution over time, ReLU, and a 1x3x3 one over space, W_l a 1x1x1 one, each with batch
    normalisation. The skip path sees nothing of motion, and nothing goes from appearance to motion.

    connection  what o is: "additive" (2016), "multiplicative" (2017), or "none", two streams apart
    temporal    False: the convolution over time is 1x1x1, too. It starts as such a one, divided by 3 and
                repeated

    Each stream has a classifier of the mean over space and time and a loss; `loss` is their sum, which
    reaches motion through the connections, too. Probabilities are averaged.
    """

    input = ("rgb", "flow")

    def __init__(
        self, num_classes, *, widths=WIDTHS, stack=4, connection="additive", temporal=True, dropout=0.5
    ):
        super().__init__()
        self.stack = positive_integer("stack", stack)
        self.connection = one_of("connection", connection, CONNECTIONS)
        options = {"widths": check_widths(widths), "temporal": truth_value("temporal", temporal)}
        options["dropout"] = probability("dropout", dropout)
        self.appearance = _Stream(3, num_classes, **options)
        self.motion = _Stream(2 * stack, num_classes, **options)

    def clip_shapes(self):
        """The study's clips, longer where a stack of flow is."""
        T, H, W = STUDY_CLIP
        return ((max(T, self.stack), H, W),) * 2

    def streams(self, x):
        """The logits of each stream, appearance first: two tensors (B, num_classes)."""
        frames, stacks = frames_and_stacks(*check_pair(x), self.stack)
        a, m = self.appearance.stem(frames), self.motion.stem(stacks)
        connect = CONNECTIONS[self.connection]
        for see, move in zip(self.appearance.stages, self.motion.stages, strict=True):
            a, m = see(a, connect(a, m)), move(m, m)
        return self.appearance.answer(a), self.motion.answer(m)

    def forward(self, x):
        return mean_probability(torch.stack(self.streams(x), dim=1), dim=1)

    def loss(self, x, labels):
        """The sum of the streams' mean cross-entropies."""
        return sum(F.cross_entropy(logits, labels) for logits in self.streams(x))


class _Stream(nn.Module):
    """One stream in three parts: `stem`, the residual `stages`, `answer`."""

    def __init__(self, in_channels, num_classes, *, widths, temporal, dropout):
        super().__init__()
        self.stem = ConvNorm(in_channels, widths[0], (1, 3, 3), (1, 2, 2))
        steps = zip(widths[:-1], widths[1:], (True, True, False), strict=True)
        self.stages = nn.ModuleList(_Stage(inner, outer, temporal, pooled) for inner, outer, pooled in steps)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(widths[-1], num_classes)

    def answer(self, maps):
        """(B, D, S, h, w) -> logits (B, num_classes)."""
        return self.classifier(self.dropout(maps.mean(dim=(2, 3, 4))))


class _Stage(nn.Module):
    """ReLU(W x + F(seen)), pooled over space unless told; `x` and `seen` have one shape."""

    def __init__(self, in_channels, out_channels, temporal, pooled):
        super().__init__()
        frames = 3 if temporal else 1
        self.a = ConvNorm(in_channels, in_channels, (frames, 1, 1), repeated=True)
        self.b = ConvNorm(in_channels, out_channels, (1, 3, 3), relu=False)
        self.shortcut = ConvNorm(in_channels, out_channels, (1, 1, 1), relu=False)
        self.pool = nn.MaxPool3d((1, 2, 2)) if pooled else nn.Identity()

    def forward(self, x, seen):
        return self.pool(F.relu(self.shortcut(x) + self.b(self.a(seen))))
