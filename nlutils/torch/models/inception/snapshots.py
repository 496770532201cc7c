"""Inception-v1 on single frames and on stacks of flow: averaged, and fused by a 3D convolution.

Carreira and Zisserman, Quo Vadis, CVPR 2017, section 2.3.
"""

import torch
from torch import nn

from nlutils.arguments import positive_integer, probability
from nlutils.torch.models.common import VideoClassifier, check_pair, mean_probability
from nlutils.torch.models.inception.facts import SIZE, expects_flow, expects_rgb
from nlutils.torch.models.inception_v1 import WIDTH, ConvUnit, InceptionV1, SameMaxPool3d
from nlutils.torch.models.layers import cut_snapshots

__all__ = ["FusedTwoStream", "TwoStreamInception"]

STACK = 10  # fields of flow in a stack, as published


class _Snapshots(VideoClassifier):
    """An Inception-v1 on single frames, one on stacks of flow fields: what (c) and (d) share."""

    input = ("rgb", "flow")
    SNAPSHOTS: int  # that training sees of a clip

    def __init__(self, *, width, stack, norm_gain):
        super().__init__()
        self.stack = positive_integer("stack", stack)
        options = {"width": width, "inflated": False, "norm_gain": norm_gain}
        self.rgb = InceptionV1(3, **options)
        self.flow = InceptionV1(2 * stack, **options)

    def clip_shapes(self):
        """As many frames of 224 x 224 as training sees snapshots, and a stack of flow for each."""
        return (self.SNAPSHOTS, *SIZE), (self.SNAPSHOTS * self.stack, *SIZE)

    def features(self, x):
        """The streams' features a snapshot, each (B, 1024, S, H / 32, W / 32)."""
        rgb, flow = cut_snapshots(*check_pair(x), self.stack)
        return self.rgb(rgb), self.flow(flow)


class TwoStreamInception(_Snapshots):
    """(c): two streams of Inception-v1, probabilities averaged: -> their logarithm (B, num_classes).

    Section 2.3, after Simonyan and Zisserman, NIPS 2014: a snapshot is one RGB frame and `stack` = 10 flow
    fields; training sees one, a test 25 of a clip, whose probabilities are averaged. Takes rgb and flow as
    `cut_snapshots` says. Trained end to end: the loss is that of the average. 12,073,120 parameters with 400
    classes.
    """

    SNAPSHOTS = 1

    def __init__(self, num_classes, *, width=WIDTH, stack=STACK, norm_gain=True, dropout=0.5):
        super().__init__(width=width, stack=stack, norm_gain=norm_gain)
        self.dropout = nn.Dropout(probability("dropout", dropout))
        self.rgb_classifier = nn.Linear(self.rgb.out_channels, num_classes)
        self.flow_classifier = nn.Linear(self.flow.out_channels, num_classes)
        if (width, stack) == (WIDTH, STACK):
            self.expects = (expects_rgb(1), expects_flow(STACK))

    def votes(self, x):
        """The logits a stream and snapshot: (B, 2 S, num_classes), RGB first."""
        rgb, flow = (self.dropout(part.mean(dim=(3, 4)).transpose(1, 2)) for part in self.features(x))
        return torch.cat([self.rgb_classifier(rgb), self.flow_classifier(flow)], dim=1)

    def forward(self, x):
        return mean_probability(self.votes(x), dim=1)


class FusedTwoStream(_Snapshots):
    """(d), "3D-Fused": two streams of Inception-v1 under one 3D convolution: -> logits (B, num_classes).

    Section 2.3: 5 RGB frames, 10 apart, and the 50 flow fields in stacks of `stack` = 10; the streams'
    features before the last average pooling, 5 x 7 x 7 each, go together through a 3x3x3 convolution with
    `fused` = 512 channels (batch normalisation and ReLU as everywhere), 3x3x3 max pooling and a fully
    connected layer. Not in the paper, chosen here: pooling with stride 2 (to 3 x 4 x 4), the mean over the
    pooled grid, Gaussian weights of 0.01 in the new layers. Takes rgb and flow as `cut_snapshots` says, for
    any number of snapshots. 39,770,896 parameters with 400 classes; the paper says 39 M (see the head of
    this package).
    """

    SNAPSHOTS = 5

    def __init__(self, num_classes, *, width=WIDTH, stack=STACK, fused=512, norm_gain=True, dropout=0.5):
        super().__init__(width=width, stack=stack, norm_gain=norm_gain)
        both = self.rgb.out_channels + self.flow.out_channels
        self.fusion = ConvUnit(both, positive_integer("fused", fused), (3, 3, 3), norm_gain=norm_gain)
        self.pool = SameMaxPool3d((3, 3, 3), (2, 2, 2))
        self.dropout = nn.Dropout(probability("dropout", dropout))
        self.classifier = nn.Linear(fused, num_classes)
        for layer in (self.fusion.conv, self.classifier):
            nn.init.normal_(layer.weight, std=0.01)
        if (width, stack) == (WIDTH, STACK):
            self.expects = (expects_rgb(5, stride=10), expects_flow(5 * STACK))

    def forward(self, x):
        fused = self.pool(self.fusion(torch.cat(self.features(x), dim=1)))  # (B, fused, T', H', W')
        return self.classifier(self.dropout(fused.mean(dim=(2, 3, 4))))
