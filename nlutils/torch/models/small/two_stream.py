"""Two-stream: a spatial network on single frames, a temporal network on stacks of optical flow.

Simonyan and Zisserman, Two-Stream Convolutional Networks for Action Recognition in Videos, NIPS 2014: the
streams are trained apart, and their class probabilities are averaged.
"""

import torch
from torch import nn

from nlutils.arguments import positive_integer, probability
from nlutils.torch.models.common import (
    STUDY_CLIP,
    WIDTHS,
    FrameEncoder,
    VideoClassifier,
    check_pair,
    frames_as_batch,
    mean_probability,
    vote_loss,
)
from nlutils.torch.models.layers import middle_frames

__all__ = ["TwoStreamSmall"]


class TwoStreamSmall(VideoClassifier):
    """((B, 3, T, H, W), (B, 2, T, H, W)) -> (B, num_classes), the logarithm of the streams' mean probability.

    The spatial stream sees `spatial_frames` frames, evenly spread over the clip, one at a time; the temporal
    stream sees `stack` consecutive flow fields at once, as 2 x `stack` channels (the paper's L = 10), stack
    after stack.
    """

    input = ("rgb", "flow")

    def __init__(self, num_classes, *, widths=WIDTHS, stack=8, spatial_frames=4, dropout=0.5):
        super().__init__()
        self.stack = positive_integer("stack", stack)
        self.spatial_frames = positive_integer("spatial_frames", spatial_frames)
        dropout = probability("dropout", dropout)
        self.spatial = nn.Sequential(
            FrameEncoder(3, widths), nn.Dropout(dropout), nn.Linear(widths[-1], num_classes)
        )
        self.temporal = nn.Sequential(
            FrameEncoder(2 * stack, widths), nn.Dropout(dropout), nn.Linear(widths[-1], num_classes)
        )

    def clip_shapes(self):
        """The study's clips, longer where a stack of flow is."""
        T, H, W = STUDY_CLIP
        return ((max(T, self.stack), H, W),) * 2

    def streams(self, x):
        """Each stream's votes: logits (B, frames, num_classes) and (B, stacks, num_classes)."""
        rgb, flow = check_pair(x)
        B = rgb.shape[0]
        stacks = flow.shape[2] // self.stack
        if stacks == 0:
            raise ValueError(f"flow has {flow.shape[2]} fields; stack={self.stack} needs at least as many")
        frames = frames_as_batch(middle_frames(rgb, self.spatial_frames))
        # (B, 2, stacks L, H, W) -> (B stacks, 2 L, H, W)
        fields = flow[:, :, : stacks * self.stack].unflatten(2, (stacks, self.stack)).transpose(1, 2)
        fields = fields.flatten(0, 1).flatten(1, 2)
        return self.spatial(frames).unflatten(0, (B, -1)), self.temporal(fields).unflatten(0, (B, -1))

    def forward(self, x):
        streams = [mean_probability(votes, dim=1) for votes in self.streams(x)]
        return mean_probability(torch.stack(streams, dim=1), dim=1)

    def loss(self, x, labels):
        """The sum of the streams' mean cross-entropies.

        The streams share no weight, so minimising the sum trains each as if it were alone.
        """
        return sum(vote_loss(votes, labels) for votes in self.streams(x))
