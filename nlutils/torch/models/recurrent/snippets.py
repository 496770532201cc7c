"""Beyond Short Snippets: a CNN on every frame, joined by five temporal poolings or five LSTMs.

Ng, Hausknecht, Vijayanarasimhan, Vinyals, Monga, Toderici: Beyond Short Snippets: Deep Networks for Video
Classification, CVPR 2015, https://arxiv.org/abs/1503.08909.
"""

import torch
import torch.nn.functional as F
from torch import nn

from nlutils.architectures.sizes import pair
from nlutils.arguments import one_of, positive_integer, probability, truth_value
from nlutils.torch.models.common import (
    Expects,
    VideoClassifier,
    check_clip,
    check_input,
    frames_as_batch,
    mean_probability,
)
from nlutils.torch.models.recurrent.frames import FrameCNN, FrameInception, check_size, map_shape
from nlutils.torch.models.recurrent.lstm import PeepholeLSTM

__all__ = ["INFERENCE", "POOLINGS", "BeyondShortSnippets", "rising_gain", "window_maxima"]

POOLINGS = ("conv", "late", "slow", "local", "time_domain", "lstm")
INFERENCE = ("last", "max", "sum", "weighted")
# The options that only some poolings have.
OPTIONS = {
    "window": ("slow", "local", "time_domain"),
    "stride": ("slow", "local", "time_domain"),
    "kernels": ("time_domain",),
    "hidden": ("lstm",),
    "layers": ("lstm",),
    "peepholes": ("lstm",),
    "inference": ("lstm",),
}
WIDTHS = {"alexnet": 96, "inception": 64}  # channels of the first convolution as published
EXPECTS = Expects(
    frames=120,
    size=(220, 220),
    stride=30,
    source="Ng et al., CVPR 2015: a frame a second (stride 30 at 30 a second); normalisation not known",
)


def window_maxima(maps: torch.Tensor, window: int, stride: int) -> torch.Tensor:
    """Maxima over windows of time: (B, T, C, h, w) -> (B, windows, C, h, w).

    A window has `window` steps and begins `stride` after the one before it. The last may be cut off by the
    end of the clip, so that no step is lost; a clip shorter than a window is one window. Raises ValueError
    for a stride larger than the window.
    """
    check_windows(window, stride)
    window = min(window, maps.shape[1])
    maxima = F.max_pool3d(maps.transpose(1, 2), (window, 1, 1), (stride, 1, 1), ceil_mode=True)
    return maxima.transpose(1, 2)


def check_windows(window: int, stride: int) -> None:
    """ValueError unless both are whole numbers, and windows so far apart see every frame."""
    if positive_integer("stride", stride) > positive_integer("window", window):
        raise ValueError(f"stride={stride} must be at most window={window}: frames between were unseen")


def count_windows(frames: int, window: int, stride: int) -> int:
    """How many windows `window_maxima` makes of a clip."""
    return max(0, -(-(frames - window) // stride)) + 1


def rising_gain(steps: int, like: torch.Tensor) -> torch.Tensor:
    """The weights of time steps, rising linearly from 0 at the first to 1 at the last: (steps,).

    A single step has weight 1. `like` gives type and device.
    """
    if steps == 1:
        return like.new_ones(1)
    return torch.linspace(0, 1, steps, dtype=like.dtype, device=like.device)


class SpaceMean(nn.Module):
    """(..., C, h, w) -> (..., C)."""

    def forward(self, maps):
        return maps.mean(dim=(-2, -1))


def fully_connected(shape, widths, dropout) -> nn.Sequential:
    """Maps (..., C, h, w) -> (..., widths[-1]); without any widths their mean over space, (..., C).

    Stage 0 makes vectors of maps; each further one is a linear layer with ReLU and dropout.
    """
    C, h, w = shape
    stages, inputs = [nn.Flatten(-3) if widths else SpaceMean()], C * h * w
    for width in widths:
        stages.append(nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(dropout)))
        inputs = width
    return nn.Sequential(*stages)


class BeyondShortSnippets(VideoClassifier):
    """A network on every frame, joined in one of six ways: (B, C, T, H, W) -> (B, num_classes).

    pooling       what joins the frames; "max" is over time, "fc" are the fully connected layers
                  "conv"         max of the maps of all frames, fc
                  "late"         fc on every frame, max over all
                  "slow"         max of the maps within windows, first fc, max over all windows, second fc
                  "local"        max of the maps within windows, fc, a classifier that sees all windows side
                                 by side
                  "time_domain"  a convolution over time and space, then as "conv"
                  "lstm"         fc on every frame, LSTMs, a classifier at every frame
    encoder       "alexnet", "inception", or a module: (B, C, H, W) -> (B, C', h, w)
    width         channels of its first convolution; None: 96 or 64, as published. Not for a module
    fc            widths of the fully connected layers; None: (4096, 4096), but none with "inception", whose
                  maps are averaged over space instead
    size          (height, width) of the clips, or one number: fc are built for it, other clips raise
                  ValueError; without fc any size works
    frames        of the clips. "local" is built for it; the others take any number, "time_domain" one of
                  `window` or more
    window, stride   of the windows and of the convolution in time: 10 and 5 frames
    kernels       of the convolution, each `window` x 3 x 3: 256
    hidden, layers, peepholes   of "lstm": 5 of 512 (see `PeepholeLSTM`)
    inference     of "lstm": "last", the answer at the last frame; "max", "sum", "weighted", the maximum, mean
                  and weighted mean of the probabilities of all frames, weights rising linearly from 0 to 1.
                  The paper found the weighted one best, all within 1 %.

    An option that only other poolings have raises ValueError, unless it is left as it is.

    The loss of "lstm" weights the losses of the frames in the same way.

    What the sources at hand leave open, chosen here: AlexNet's layers as first published; Inception with
    batch normalisation; padding (space 1, time 0) and ReLU of the convolution over time; dropout; LSTMs
    without peepholes by default; the loss divided by the sum of its weights; windows cut off by the clip's
    end.

    "conv" and "late" do not know the order of frames. "slow" knows which ones share a window, "local" also
    where its window stands, "time_domain" what follows what within a window, "lstm" everything.

    The LSTMs have 17,846,272 parameters on AlexNet's 4,096 features and 11,554,816 on Inception's 1,024;
    peepholes add 7,680.
    """

    def __init__(
        self,
        num_classes,
        *,
        input="rgb",
        pooling="conv",
        encoder="alexnet",
        width=None,
        fc=None,
        size=220,
        frames=120,
        window=10,
        stride=5,
        kernels=256,
        hidden=512,
        layers=5,
        peepholes=False,
        inference="weighted",
        dropout=0.5,
    ):
        super().__init__()
        self.input, self.size = input, pair("size", size)
        self.pooling = one_of("pooling", pooling, POOLINGS)
        given = {"window": window, "stride": stride, "kernels": kernels, "hidden": hidden, "layers": layers}
        defaults = BeyondShortSnippets.__init__.__kwdefaults__
        check_options(pooling, {**given, "peepholes": peepholes, "inference": inference}, defaults)
        self.inference = one_of("inference", inference, INFERENCE)
        self.frames = positive_integer("frames", frames)
        check_windows(window, stride)
        self.window, self.stride = window, stride
        if pooling == "time_domain":
            self._check_length(frames)
        fc, dropout = _widths(fc, encoder), probability("dropout", dropout)

        self.encoder = make_encoder(encoder, check_input(input), width)
        if self._is_published(encoder, width):
            self.expects = EXPECTS
        shape = map_shape(self.encoder, check_input(input), self.size)
        if pooling == "time_domain":
            kernel, strides = (window, 3, 3), (stride, 1, 1)
            self.over_time = nn.Conv3d(
                shape[0], positive_integer("kernels", kernels), kernel, strides, (0, 1, 1)
            )
            shape = (kernels, *shape[1:])
        self.fc = fully_connected(shape, fc, dropout)
        features = fc[-1] if fc else shape[0]
        if pooling == "lstm":
            sizes = features, positive_integer("hidden", hidden), positive_integer("layers", layers)
            sees_cell = truth_value("peepholes", peepholes)
            self.lstm = PeepholeLSTM(*sizes) if sees_cell else nn.LSTM(*sizes, batch_first=True)
            features = hidden
        if pooling == "local":
            features *= count_windows(frames, window, stride)
        self.classifier = nn.Linear(features, num_classes)

    def _is_published(self, encoder, width):
        if isinstance(encoder, nn.Module) or width not in (None, WIDTHS[encoder]):
            return False
        return (self.input, self.frames, self.size) == ("rgb", EXPECTS.frames, EXPECTS.size)

    def clip_shapes(self):
        """`frames` of `size`."""
        return ((self.frames, *self.size),)

    def maps(self, x):
        """The encoder's maps of every frame: (B, C, T, H, W) -> (B, T, C', h, w)."""
        check_clip(x, self.input)
        if len(self.fc) > 1:
            check_size(x, self.size)
        return self.encoder(frames_as_batch(x)).unflatten(0, (x.shape[0], -1))

    def steps(self, x):
        """The logits after each frame, with pooling="lstm": (B, C, T, H, W) -> (B, T, num_classes)."""
        if self.pooling != "lstm":
            raise ValueError(f"pooling={self.pooling!r} has no answer a frame; pooling='lstm' has")
        states, _ = self.lstm(self.fc(self.maps(x)))
        return self.classifier(states)

    def forward(self, x):
        if self.pooling == "lstm":
            return self._infer(self.steps(x))
        return self.classifier(getattr(self, f"_{self.pooling}")(self.maps(x)))

    def loss(self, x, labels):
        if self.pooling != "lstm":
            return super().loss(x, labels)
        steps = self.steps(x).transpose(1, 2)  # (B, num_classes, T)
        labels = labels.unsqueeze(-1).expand(*labels.shape, steps.shape[2])
        losses = F.cross_entropy(steps, labels, reduction="none")  # (B, T)
        gain = rising_gain(steps.shape[2], losses)
        return (losses @ gain).mean() / gain.sum()

    # From the maps (B, T, C, h, w) to what the classifier sees, one method a pooling.

    def _conv(self, maps):
        return self.fc(maps.amax(dim=1))

    def _late(self, maps):
        return self.fc(maps).amax(dim=1)

    def _slow(self, maps):
        windows = window_maxima(maps, self.window, self.stride)
        return self.fc[2:](self.fc[:2](windows).amax(dim=1))

    def _local(self, maps):
        T = maps.shape[1]
        windows = window_maxima(maps, self.window, self.stride)
        if windows.shape[1] != count_windows(self.frames, self.window, self.stride):
            raise ValueError(
                f"clips of {T} frames have {windows.shape[1]} windows; the classifier was built for those of "
                f"frames={self.frames}; build the network with frames={T}"
            )
        return self.fc(windows).flatten(1)

    def _time_domain(self, maps):
        self._check_length(maps.shape[1])
        over_time = F.relu(self.over_time(maps.transpose(1, 2)))  # (B, kernels, windows, h, w)
        return self.fc(over_time.amax(dim=2))

    def _check_length(self, frames):
        if frames < self.window:
            raise ValueError(
                f"clips of {frames} frames are shorter than window={self.window} of the convolution over "
                "time; give longer clips or a smaller window"
            )

    def _infer(self, steps):
        if self.inference == "last":
            return steps[:, -1]
        if self.inference == "sum":
            return mean_probability(steps, dim=1)
        votes = F.log_softmax(steps, dim=-1)
        if self.inference == "max":
            return votes.amax(dim=1)
        gain = rising_gain(steps.shape[1], steps)
        return torch.logsumexp(votes + (gain / gain.sum()).log()[:, None], dim=1)


def check_options(pooling: str, given: dict, defaults: dict) -> None:
    """ValueError for options of other poolings: they would be ignored, and somebody believes in them."""
    for option, value in given.items():
        if pooling not in OPTIONS[option] and value != defaults[option]:
            theirs = " and ".join(map(repr, OPTIONS[option]))
            raise ValueError(f"{option}={value!r} is an option of {theirs}; pooling={pooling!r} has none")


def _widths(fc, encoder):
    """The widths of the fully connected layers as a tuple; ValueError for anything else."""
    if fc is None:
        return () if encoder == "inception" else (4096, 4096)
    if not isinstance(fc, tuple | list):
        raise ValueError(f"fc={fc!r} must hold the widths of the layers, such as (4096, 4096), or none: ()")
    return tuple(positive_integer("fc", units) for units in fc)


def make_encoder(encoder, in_channels: int, width: int | None) -> nn.Module:
    """The network for single frames that `BeyondShortSnippets` calls `encoder`."""
    if isinstance(encoder, nn.Module):
        if width is not None:
            raise ValueError(f"width={width!r} belongs to 'alexnet' and 'inception'; a module has its own")
        return encoder
    options = {} if width is None else {"width": width}
    if one_of("encoder", encoder, WIDTHS) == "inception":
        return FrameInception(in_channels, **options)
    return FrameCNN(in_channels, layers="alexnet", **options)
