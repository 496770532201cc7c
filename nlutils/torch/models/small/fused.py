"""Fused two-stream: maps of two 2D streams, joined by one convolution over time and space.

Feichtenhofer, Pinz, Zisserman: Convolutional Two-Stream Network Fusion for Video Action Recognition, CVPR
2016; "3D-Fused" in Carreira and Zisserman, Quo Vadis, Action Recognition?, CVPR 2017, section 2.3. Smaller
here, so that a CPU trains it in minutes: the study's encoder in both streams, and a global mean in place of
the 3D pooling.
"""

import torch
from torch import nn

from nlutils.arguments import positive_integer, probability
from nlutils.torch.models.common import STUDY_CLIP, WIDTHS, VideoClassifier, check_pair
from nlutils.torch.models.layers import ConvNorm, cut_snapshots
from nlutils.torch.models.small.layers import FrameMaps

__all__ = ["FusedTwoStreamSmall"]


class FusedTwoStreamSmall(VideoClassifier):
    """((B, 3, T, H, W), (B, 2, F, H, W)), frames and flow -> (B, num_classes).

    The clip has S = F // stack places in time; at each the RGB stream sees one frame, the flow stream `stack`
    fields as channels (cut as `nlutils.torch.models.layers.cut_snapshots` says). Their last maps, side by
    side, go through a 3x3x3 convolution of `fused` kernels with batch normalisation and ReLU; the mean over
    space and time is classified. The two train together, by one loss.

    The convolution costs 27 x 2 widths[-1] weights a kernel: 0.42 million in all with the defaults;
    widths=(12, 24, 48, 96) and fused=36 make 0.30 million.
    """

    input = ("rgb", "flow")

    def __init__(self, num_classes, *, widths=WIDTHS, stack=4, fused=32, dropout=0.5):
        super().__init__()
        self.stack = positive_integer("stack", stack)
        self.rgb = FrameMaps(3, widths)
        self.flow = FrameMaps(2 * stack, widths)
        self.fusion = ConvNorm(2 * widths[-1], positive_integer("fused", fused), (3, 3, 3))
        self.dropout = nn.Dropout(probability("dropout", dropout))
        self.classifier = nn.Linear(fused, num_classes)

    def clip_shapes(self):
        """The study's clips, longer where a stack of flow is."""
        T, H, W = STUDY_CLIP
        return ((max(T, self.stack), H, W),) * 2

    def forward(self, x):
        frames, stacks = cut_snapshots(*check_pair(x), self.stack)
        maps = torch.cat([self.rgb.of_clip(frames), self.flow.of_clip(stacks)], dim=1)  # (B, 2 D, S, h, w)
        return self.classifier(self.dropout(self.fusion(maps).mean(dim=(2, 3, 4))))
