"""Frame averaging: one 2D network on every frame, the mean of its features classified.

The 2D baseline of video classification ("C2D" in Wang et al., Non-local Neural Networks, CVPR 2018, section
4): time enters only in the mean at the end, so the order of the frames cannot matter.
"""

from torch import nn

from nlutils.arguments import probability
from nlutils.torch.models.common import (
    WIDTHS,
    FrameEncoder,
    VideoClassifier,
    check_clip,
    check_input,
    frames_as_batch,
)

__all__ = ["FrameAverage"]


class FrameAverage(VideoClassifier):
    """(B, C, T, H, W) -> (B, num_classes)."""

    def __init__(self, num_classes, *, input="rgb", widths=WIDTHS, dropout=0.5):
        super().__init__()
        self.input = input
        self.encoder = FrameEncoder(check_input(input), widths)
        self.dropout = nn.Dropout(probability("dropout", dropout))
        self.classifier = nn.Linear(widths[-1], num_classes)

    def forward(self, x):
        B = check_clip(x, self.input).shape[0]
        features = self.encoder(frames_as_batch(x)).unflatten(0, (B, -1))  # (B, T, D)
        return self.classifier(self.dropout(features.mean(dim=1)))
