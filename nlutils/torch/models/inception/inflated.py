"""Inflated Inception-v1 ("I3D"), one stream and two.

Carreira and Zisserman, Quo Vadis, CVPR 2017, section 2.4; layers, paddings and the missing gains as in the
authors' code, deepmind/kinetics-i3d.
"""

import torch
import torch.nn.functional as F
from torch import nn

from nlutils.arguments import one_of, probability
from nlutils.torch.models.common import (
    VideoClassifier,
    check_clip,
    check_input,
    check_pair,
    mean_probability,
)
from nlutils.torch.models.inception.facts import SIZE, expects_flow, expects_rgb
from nlutils.torch.models.inception_v1 import WIDTH, InceptionV1

__all__ = ["I3DInception", "TwoStreamI3D"]

FRAMES = 64  # as published


class I3DInception(VideoClassifier):
    """Inflated Inception-v1: (B, C, T, H, W) -> logits (B, num_classes).

    As published T = 64, H = W = 224. The last features, 8 x 7 x 7, are averaged over windows of 2 x 7 x 7
    (time steps in the middle count twice), classified at each of the 7 places, and the logits are averaged.
    Any other size works: a window larger than the features shrinks to them.

    input       "rgb", "flow" or "differences"
    width       channels of the first convolution, 64 as published
    norm_gain   False: batch normalisation without gains, as in the released code and weights
    dropout     before the classifier

    400 classes, 64 frames of 224 x 224: 12,697,264 parameters and 111.15 G multiply-adds for RGB, 12,675,312
    and 102.34 G for flow; 7,280 parameters less without gains.
    """

    def __init__(self, num_classes, *, input="rgb", width=WIDTH, norm_gain=True, dropout=0.5):
        super().__init__()
        self.input = input
        if width == WIDTH:
            self.expects = {"rgb": expects_rgb(FRAMES), "flow": expects_flow(FRAMES)}.get(input)
        self.features = InceptionV1(check_input(input), width=width, norm_gain=norm_gain)
        self.dropout = nn.Dropout(probability("dropout", dropout))
        self.logits = nn.Conv3d(self.features.out_channels, num_classes, 1)

    def clip_shapes(self):
        """64 frames of 224 x 224; any size works."""
        return ((FRAMES, *SIZE),)

    def windows(self, x):
        """Logits of each window: (B, C, T, H, W) -> (B, num_classes, T', H', W'), as published 7 x 1 x 1."""
        features = self.features(check_clip(x, self.input))
        window = [min(pair) for pair in zip((2, 7, 7), features.shape[2:], strict=True)]
        return self.logits(self.dropout(F.avg_pool3d(features, window, stride=1)))

    def forward(self, x):
        return self.windows(x).mean(dim=(2, 3, 4))


class TwoStreamI3D(VideoClassifier):
    """Two inflated Inception-v1: ((B, 3, T, H, W), (B, 2, T, H, W)), frames and flow -> (B, num_classes).

    The streams are trained apart: `loss` is the sum of their losses. `fusion` says how their answers meet:
    "logits" are summed, as in the released code; "probabilities" are averaged, which the paper's words allow
    ("averaged their predictions"), and their logarithm is returned. Other options: see `I3DInception`.
    25,372,576 parameters with 400 classes.
    """

    input = ("rgb", "flow")

    def __init__(self, num_classes, *, width=WIDTH, norm_gain=True, dropout=0.5, fusion="logits"):
        super().__init__()
        self.fusion = one_of("fusion", fusion, ("logits", "probabilities"))
        options = {"width": width, "norm_gain": norm_gain, "dropout": dropout}
        self.rgb = I3DInception(num_classes, input="rgb", **options)
        self.flow = I3DInception(num_classes, input="flow", **options)
        if width == WIDTH:
            self.expects = (self.rgb.expects, self.flow.expects)

    def clip_shapes(self):
        """64 frames of 224 x 224 and their flow; any size works."""
        return self.rgb.clip_shapes() + self.flow.clip_shapes()

    def forward(self, x):
        rgb, flow = check_pair(x, same_frames=True)
        streams = torch.stack([self.rgb(rgb), self.flow(flow)], dim=1)  # (B, 2, num_classes)
        return streams.sum(dim=1) if self.fusion == "logits" else mean_probability(streams, dim=1)

    def loss(self, x, labels):
        rgb, flow = check_pair(x, same_frames=True)
        return self.rgb.loss(rgb, labels) + self.flow.loss(flow, labels)
