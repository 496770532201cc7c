"""What the networks share: their inputs, the losses, what they were published with, a per-frame encoder."""

import torch
import torch.nn.functional as F
from torch import nn

from nlutils.architectures.expects import Expects
from nlutils.architectures.inputs import INPUT_CHANNELS, check_input
from nlutils.arguments import positive_integer

__all__ = [
    "INPUT_CHANNELS",
    "STUDY_CLIP",
    "WIDTHS",
    "Expects",
    "FrameEncoder",
    "VideoClassifier",
    "check_clip",
    "check_input",
    "check_pair",
    "check_widths",
    "frames_as_batch",
    "mean_probability",
    "vote_loss",
]

# Channels of the four stages of the small networks. All of them share these, so a 3D network is its 2D
# neighbour with longer kernels.
WIDTHS = (16, 32, 64, 128)
STUDY_CLIP = 16, 40, 56  # T x H x W of the study's clips, for which the small networks were made


def check_widths(widths, count: int = 4) -> tuple[int, ...]:
    """`widths` as a tuple of `count` positive whole numbers, one a stage; else ValueError."""
    widths = tuple(widths)
    if len(widths) != count:
        raise ValueError(f"widths={widths!r} has {len(widths)} numbers; give {count}, one a stage")
    return tuple(positive_integer("widths", width) for width in widths)


def check_clip(x, kind: str, name: str = "x") -> torch.Tensor:
    """Return `x` when it is a clip of the input called `kind`, (B, C, T, H, W) and floating; else ValueError.

    `name` is what the error calls it. No number of the clip is read.
    """
    needed = f"(B, {INPUT_CHANNELS[kind]}, T, H, W), because it is {kind}"
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name} is {_said(x)}; it must be one tensor {needed}")
    if x.ndim != 5 or x.shape[1] != INPUT_CHANNELS[kind]:
        raise ValueError(f"{name} of shape {tuple(x.shape)} must be {needed}")
    if 0 in x.shape:
        raise ValueError(f"{name} of shape {tuple(x.shape)} is empty; B, T, H and W must be 1 or more")
    if not x.is_floating_point():
        raise ValueError(
            f"{name} of {x.dtype} must hold floating-point numbers; bytes become such by {name}.float(), and "
            "are then scaled as in training"
        )
    return x


def check_pair(
    x, kinds: tuple[str, str] = ("rgb", "flow"), *, same_frames: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `x` when it is a pair of the same clips, one of each of `kinds`, as `check_clip` wants them.

    The two must agree in batch, height and width; with `same_frames` in T, too. Else raises ValueError.
    """
    if not isinstance(x, tuple | list) or len(x) != 2:
        raise ValueError(f"x is {_said(x)}; it must be a pair of tensors, ({', '.join(kinds)})")
    one, other = (check_clip(clip, kind, kind) for clip, kind in zip(x, kinds, strict=True))
    agree = one.shape[0] == other.shape[0] and one.shape[3:] == other.shape[3:]
    if not agree or (same_frames and one.shape[2] != other.shape[2]):
        sides = "batch, frames, height and width" if same_frames else "batch, height and width"
        raise ValueError(
            f"{kinds[0]} {tuple(one.shape)} and {kinds[1]} {tuple(other.shape)} must agree in {sides}"
        )
    return one, other


def _said(x):
    if isinstance(x, torch.Tensor):
        return f"one tensor of shape {tuple(x.shape)}"
    return f"a {type(x).__name__} of {len(x)}" if isinstance(x, tuple | list) else f"a {type(x).__name__}"


def mean_probability(logits: torch.Tensor, dim: int) -> torch.Tensor:
    """The logarithm of the mean over `dim` of softmax(logits): class scores of several votes averaged."""
    votes = logits.new_full((), logits.shape[dim])  # made where the logits are
    return torch.logsumexp(F.log_softmax(logits, dim=-1), dim=dim) - votes.log()


def vote_loss(votes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy over clips and votes: logits (B, votes, num_classes), labels (B,).

    Labels may also be class probabilities, (B, num_classes), as for PyTorch's `cross_entropy`.
    """
    return F.cross_entropy(votes.flatten(0, 1), labels.repeat_interleave(votes.shape[1], dim=0))


class VideoClassifier(nn.Module):
    """A network that maps clips to class scores.

    `input` names what it takes: "rgb", "differences" or "flow", each a tensor (B, C, T, H, W); a tuple of
    names means a tuple of such tensors. `forward` returns (B, num_classes): the softmax of a row are the
    class probabilities. `loss` is what training minimises.
    """

    input: str | tuple[str, ...]
    # One for each name in `input`; None where input, size or width are not the published ones.
    expects: Expects | tuple[Expects, ...] | None = None
    # False where `loss` has no weight to train, and `fit` learns all there is.
    trains: bool = True
    # True where `fit(batches)` must see all training clips once more when `loss` was minimised.
    second_stage: bool = False

    def clip_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(T, H, W) of a clip that it was made for, one for each name in `input`.

        As published; where nothing was published, by the options. A network of any size names one of many.
        """
        kinds = (self.input,) if isinstance(self.input, str) else self.input
        if self.expects is not None:
            facts = self.expects if isinstance(self.expects, tuple) else (self.expects,)
            return tuple((one.frames, *one.size) for one in facts)
        return (STUDY_CLIP,) * len(kinds)

    def fitted_numbers(self) -> int:
        """How many numbers `fit` has learnt; 0 where there is no `fit`."""
        return 0

    def loss(self, x, labels: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy of a batch; `labels` are classes (B,) or probabilities (B, num_classes)."""
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
