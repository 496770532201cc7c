"""What the networks share: their inputs, the loss, what they were published with, a per-frame encoder."""

import torch
import torch.nn.functional as F
from torch import nn

from nlutils.architectures.expects import Expects
from nlutils.architectures.inputs import INPUT_CHANNELS, check_input
from nlutils.arguments import positive_integer

__all__ = [
    "INPUT_CHANNELS",
    "WIDTHS",
    "Expects",
    "FrameEncoder",
    "VideoClassifier",
    "check_input",
    "check_widths",
    "frames_as_batch",
    "mean_probability",
]

# Channels of the four stages of the small networks. All of them share these, so a 3D network is its 2D
# neighbour with longer kernels.
WIDTHS = (16, 32, 64, 128)


def check_widths(widths, count: int = 4) -> tuple[int, ...]:
    """`widths` as a tuple of `count` positive whole numbers, one a stage; else ValueError."""
    widths = tuple(widths)
    if len(widths) != count:
        raise ValueError(f"widths={widths!r} has {len(widths)} numbers; give {count}, one a stage")
    return tuple(positive_integer("widths", width) for width in widths)


def mean_probability(logits: torch.Tensor, dim: int) -> torch.Tensor:
    """The logarithm of the mean over `dim` of softmax(logits): class scores of several votes averaged."""
    votes = logits.shape[dim]
    return torch.logsumexp(F.log_softmax(logits, dim=-1), dim=dim) - torch.log(
        logits.new_tensor(float(votes))
    )


class VideoClassifier(nn.Module):
    """A network that maps clips to class scores.

    `input` names what it takes: "rgb", "differences" or "flow", each a tensor (B, C, T, H, W); a tuple of
    names means a tuple of such tensors. `forward` returns (B, num_classes): the softmax of a row are the
    class probabilities. `loss` is what training minimises.
    """

    input: str | tuple[str, ...]
    # One for each name in `input`; None: of no published size.
    expects: Expects | tuple[Expects, ...] | None = None
    # True where `fit(batches)` must see all training clips once more when `loss` was minimised.
    second_stage: bool = False

    def loss(self, x, labels: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy of a batch."""
        return F.cross_entropy(self(x), labels)


class FrameEncoder(nn.Sequential):
    """A small 2D network: (B, C, H, W) -> (B, widths[-1]).

    Four 3x3 convolutions, each with batch normalisation and ReLU: stride 2 in the first, 2x2 max pooling
    after the second and third, the mean over space at the end.
    """

    def __init__(self, in_channels: int, widths):
        layers = []
        for stage, width in enumerate(check_widths(widths), start=1):
            layers += [
                nn.Conv2d(in_channels, width, 3, stride=2 if stage == 1 else 1, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            if stage in (2, 3):
                layers.append(nn.MaxPool2d(2))
            in_channels = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def frames_as_batch(x: torch.Tensor) -> torch.Tensor:
    """(B, C, T, H, W) -> (B T, C, H, W): every frame an example of its own."""
    return x.transpose(1, 2).flatten(0, 1)
