"""Two-stream in 3D: two C3D-style networks on two inputs of the same clip, probabilities averaged.

Carreira and Zisserman, Quo Vadis, Action Recognition?, CVPR 2017, section 2.4 (two-stream I3D): the streams
are trained apart, and their predictions are averaged.
"""

import torch
from torch import nn

from nlutils.torch.models.common import WIDTHS, VideoClassifier, check_input, check_pair, mean_probability
from nlutils.torch.models.small.c3d import C3DSmall

__all__ = ["TwoStream3DSmall"]


class TwoStream3DSmall(VideoClassifier):
    """Two clips, (B, C, T, H, W) each -> (B, num_classes), the logarithm of the streams' mean probability.

    `inputs` names the two, which differ: ("differences", "flow"), ("rgb", "flow") or others. Each stream is a
    `C3DSmall` of its own and gets the other options; `networks` holds them by the names of their inputs. With
    `widths` as in the other small networks it has the weights of two of them, 0.59 million;
    widths=(11, 22, 44, 88) makes 0.28 million.
    """

    def __init__(
        self,
        num_classes,
        *,
        inputs=("differences", "flow"),
        widths=WIDTHS,
        dropout=0.5,
        non_local=(),
        kind="non_local",
        block=None,
    ):
        super().__init__()
        self.input = _two_kinds(inputs)
        options = {"widths": widths, "dropout": dropout, "non_local": non_local, "kind": kind, "block": block}
        self.networks = nn.ModuleDict(
            {one: C3DSmall(num_classes, input=one, **options) for one in self.input}
        )

    def streams(self, x):
        """The logits of each stream, in the order of `inputs`: two tensors (B, num_classes)."""
        clips = zip(self.input, check_pair(x, self.input, same_frames=True), strict=True)
        return tuple(self.networks[kind](clip) for kind, clip in clips)

    def forward(self, x):
        return mean_probability(torch.stack(self.streams(x), dim=1), dim=1)

    def loss(self, x, labels):
        """The sum of the streams' losses.

        The streams share no weight, so minimising the sum trains each as if it were alone.
        """
        clips = zip(self.input, check_pair(x, self.input, same_frames=True), strict=True)
        return sum(self.networks[kind].loss(clip, labels) for kind, clip in clips)


def _two_kinds(inputs):
    if not isinstance(inputs, tuple | list) or len(inputs) != 2 or inputs[0] == inputs[1]:
        raise ValueError(f"inputs={inputs!r} must name two inputs that differ, such as ('rgb', 'flow')")
    for kind in inputs:
        check_input(kind)
    return tuple(inputs)
