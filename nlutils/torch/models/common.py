"""What the networks share: their inputs, the loss, what they were published with, a per-frame encoder."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nlutils.arguments import one_of, positive_integer

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

# What a network may be fed with, and its channels: colour frames; differences of consecutive frames;
# optical flow (dx, dy). `nlutils.study.inputs` makes them.
INPUT_CHANNELS = {"rgb": 3, "differences": 3, "flow": 2}


def check_input(value: str) -> int:
    """The number of channels of the input called `value`; ValueError when there is no such input."""
    return INPUT_CHANNELS[one_of("input", value, INPUT_CHANNELS)]


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


@dataclass(frozen=True)
class Expects:
    """What a network was published with, so that nobody has to guess.

    frames, stride   the time steps that it sees, and the frames of the video from one step to the next
    size             (height, width)
    mean, std        a channel: (value - mean) / std goes in; colours are in [0, 1], flow in pixels a step
    colour           "RGB" or "BGR": the order of the channels; "" for flow
    source           where this is written
    clip             flow is cut off at this many pixels first; None: it is not
    """

    frames: int
    size: tuple[int, int]
    stride: int = 1
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    colour: str = "RGB"
    source: str = ""
    clip: float | None = None


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
