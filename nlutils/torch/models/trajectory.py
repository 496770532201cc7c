"""Trajectory-pooled deep descriptors: convolutional maps of two streams, summed along dense trajectories.

Wang, Qiao and Tang, "Action recognition with trajectory-pooled deep-convolutional descriptors", CVPR 2015;
where the paper is silent, the code released with it (github.com/wanglimin/TDD) decides.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from nlutils.arguments import one_of, positive_integer, positive_number, probability
from nlutils.torch.models.common import (
    Expects,
    check_pair,
    frames_as_batch,
    mean_probability,
    vote_loss,
)
from nlutils.torch.models.fisher import FisherClassifier, single
from nlutils.torch.models.layers import response_norm
from nlutils.video.tracks import Limits, Tracks, dense_tracks, motion_levels

__all__ = [
    "NORMALISATIONS",
    "TDD",
    "ConvolutionalStream",
    "normalise_maps",
    "pool_tracks",
]

NORMALISATIONS = ("spatiotemporal", "channel")
LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5")
# Added to the largest value that a map is divided by, so that zero stays zero.
EPSILON = 2.0**-52
# So many pixels go through a stream at a time: four pictures of 480 x 640. Long clips fit into memory so.
TOGETHER = 4 * 480 * 640

WIDTH = 96  # channels of conv1 as published
_SOURCE = (
    "wanglimin/TDD, script_demo.m: videos of 240 x 320, of 16 frames or more for tracks of 15 steps, seen at "
    "480 x 640, 340 x 454, 240 x 320, 170 x 227 and 120 x 160; "
)
EXPECTS_RGB = Expects(
    frames=1, size=(240, 320), source=_SOURCE + "not known here: mean, scale and order of the colours"
)
EXPECTS_FLOW = Expects(
    frames=10,
    size=(240, 320),
    mean=(0.0, 0.0),
    std=(1.0, 1.0),
    colour="",
    source=_SOURCE + "TV-L1 flow; not known here: its mean and scale",
)


def normalise_maps(maps: torch.Tensor, kind: str) -> torch.Tensor:
    """Convolutional maps of a clip, (T, C, h, w), not negative, brought to values from 0 to 1.

    "spatiotemporal": each channel divided by its largest value over space and time; "channel": each position
    (x, y, t) divided by its largest value over channels. The paper uses both, side by side. Half precision
    becomes float32: it does not hold the small number that keeps 0 / 0 away.
    """
    one_of("kind", kind, NORMALISATIONS)
    maps = single(maps)
    largest = maps.amax(dim=(0, 2, 3) if kind == "spatiotemporal" else 1, keepdim=True)
    return maps / (largest + EPSILON)


def pool_tracks(maps: torch.Tensor, tracks: Tracks, ratio) -> torch.Tensor:
    """The sum of `maps` along each track: (T, C, h, w) -> (count, C).

    `ratio` = r is the number of pixels of the clip a position of the map, one number or (r_x, r_y): a point
    (x, y) lies at column round(x / r) and row round(y / r) of the map, or the nearest that there is; a half
    is rounded up. A track of L steps counts with its first L points. (The released code takes 1 from x and y
    before it divides, though they start at 0.) Raises ValueError for tracks that go on after the last map.
    """
    T, C, height, width = maps.shape
    last = tracks.start.max(initial=0) + tracks.length
    if len(tracks) and last > T:
        raise ValueError(f"there are maps of {T} frames; the tracks need {last}")
    places = np.floor(tracks.positions[:, :-1] / np.float32(ratio) + 0.5).astype(np.int64)
    column = torch.from_numpy(places[..., 0]).clamp(0, width - 1).to(maps.device)
    row = torch.from_numpy(places[..., 1]).clamp(0, height - 1).to(maps.device)
    start = torch.from_numpy(tracks.start).to(maps.device)
    channels_last = maps.permute(0, 2, 3, 1)
    pooled = single(maps.new_zeros(len(tracks), C))
    for step in range(tracks.length):
        pooled += channels_last[start + step, row[:, step], column[:, step]]
    return pooled


class ConvolutionalStream(nn.Module):
    """One stream: (B, in_channels, H, W) -> logits (B, num_classes), or the maps of its layers.

    Five convolutions, each padded by half its kernel, so that a map covers the whole picture: 7 x 7 and 5 x 5
    (stride 2) and 3 x 3 three times, to `width`, 8/3 `width` and 16/3 `width` channels; local response
    normalisation and 3 x 3 max pooling (stride 2) after the first two. The maps of conv3, conv4 and conv5
    are 16 times smaller than the picture. The paper trains the stream with three fully connected layers
    behind it and throws these away; here a linear layer on the mean over space takes their place, so that
    pictures of any size train it.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int = 96, dropout: float = 0.5):
        super().__init__()
        second, third = positive_integer("width", width) * 8 // 3, width * 16 // 3
        self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3)
        self.conv2 = nn.Conv2d(width, second, 5, stride=2, padding=2)
        self.conv3 = nn.Conv2d(second, third, 3, padding=1)
        self.conv4 = nn.Conv2d(third, third, 3, padding=1)
        self.conv5 = nn.Conv2d(third, third, 3, padding=1)
        self.norm = response_norm(5e-4, k=1.0)
        # Caffe rounds the size of a pooled map up.
        self.pool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.dropout = nn.Dropout(probability("dropout", dropout))
        self.classifier = nn.Linear(third, num_classes)

    def maps(self, x: torch.Tensor, layers: Iterable[str] = LAYERS) -> dict[str, torch.Tensor]:
        """{layer: (B, C, h, w)} of `layers`: the output of each convolution, after its ReLU."""
        layers = _each_once("layers", layers, LAYERS, least=1)
        found = {}
        for name in LAYERS[: 1 + max(map(LAYERS.index, layers))]:
            x = F.relu(getattr(self, name)(x))
            if name in layers:
                found[name] = x
            if name in ("conv1", "conv2"):
                x = self.pool(self.norm(x))
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.dropout(self.maps(x, ("conv5",))["conv5"].mean(dim=(2, 3))))


class TDD(FisherClassifier):
    """((B, 3, T, H, W), (B, 2, T, H, W)) -> (B, num_classes), by descriptors pooled along trajectories.

    Two stages of training. First, stochastic gradient descent on `loss` trains two streams, one on single
    frames, one on stacks of `stack` flow fields, as any two-stream network: on all of a clip, or on so many
    `pictures` of it, drawn at each step (Simonyan and Zisserman draw one). Then `fit`, once, sees all clips
    that the training may see: dense tracks (`nlutils.video.dense_tracks`, followed at the original scale
    only, over flow that is estimated from the frames), the streams' maps with both normalisations, their
    sums along the tracks, PCA to `components` numbers and a mixture of `gaussians` a map (both from at most
    `samples` descriptors of it), Fisher vectors, a linear SVM. `forward` is that of
    `FisherClassifier`.

    `width` = 96 and the defaults are the paper's: conv4 and conv5 of the spatial stream, conv3 and conv4 of
    the temporal one, five sizes of the picture (`sizes`, as multiples of the clip's), K = 256, D = 64, so
    eight Fisher vectors of 32,768 numbers. What the paper and its code leave open is our choice: descriptors
    of all sizes enter one Fisher vector; descriptors are raised to the power 1/2 before PCA; the eight
    vectors are put one behind the other; C = 100; tracks follow OpenCV's DIS flow. `limits`,
    a `Limits` or its fields as a dict, says which tracks are kept; those of the paper are for videos of
    320 x 240 pixels. One of `spatial_layers` and `temporal_layers` may be empty. Raises ValueError for a
    wrong option.

    The state dict holds what `fit` has learnt and the options that this depends on: `load_state_dict` raises
    ValueError when those of the network are others.

    The two-stream network that it is built on: Simonyan and Zisserman, NIPS 2014.
    """

    input = ("rgb", "flow")
    described_by = (
        "spatial_layers",
        "temporal_layers",
        "normalisations",
        "sizes",
        *FisherClassifier.described_by,
    )

    def __init__(
        self,
        num_classes: int,
        *,
        width: int = 96,
        stack: int = 10,
        pictures: int | None = None,
        spatial_layers: tuple[str, ...] = ("conv4", "conv5"),
        temporal_layers: tuple[str, ...] = ("conv3", "conv4"),
        normalisations: tuple[str, ...] = NORMALISATIONS,
        sizes: tuple[float, ...] = (2.0, 2**0.5, 1.0, 0.5**0.5, 0.5),
        components: int = 64,
        gaussians: int = 256,
        cost: float = 100.0,
        samples: int = 100_000,
        step: int = 5,
        length: int = 15,
        median: int = 5,
        limits: Limits | Mapping | None = None,
        dropout: float = 0.5,
        seed: int = 0,
    ):
        super().__init__(
            num_classes,
            step=step,
            length=length,
            median=median,
            limits=limits,
            components=components,
            gaussians=gaussians,
            cost=cost,
            samples=samples,
            seed=seed,
        )
        self.stack = positive_integer("stack", stack)
        self.pictures = None if pictures is None else positive_integer("pictures", pictures)
        self.spatial_layers = _each_once("spatial_layers", spatial_layers, LAYERS)
        self.temporal_layers = _each_once("temporal_layers", temporal_layers, LAYERS)
        if not self.spatial_layers + self.temporal_layers:
            raise ValueError("spatial_layers=() and temporal_layers=() leave no map to describe; give one")
        self.normalisations = _each_once("normalisations", normalisations, NORMALISATIONS, least=1)
        sizes = [float(positive_number("sizes", size)) for size in sizes]
        self.sizes = _each_once("sizes", sizes, sizes, least=1)
        self.spatial = ConvolutionalStream(3, num_classes, width, dropout)
        self.temporal = ConvolutionalStream(2 * stack, num_classes, width, dropout)
        if (width, stack) == (WIDTH, 10):
            self.expects = (EXPECTS_RGB, EXPECTS_FLOW)

    def streams(self, x, times=slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the two streams, (B, T, num_classes) each: one a frame, one a stack of flow.

        Only those at `times`, a slice or indices of T.
        """
        rgb, flow = check_pair(x, same_frames=True)
        frames, stacks = frames_as_batch(rgb[:, :, times]), frames_as_batch(self._stacks(flow, times))
        votes = self.spatial(frames), self.temporal(stacks)
        return tuple(vote.unflatten(0, (len(rgb), -1)) for vote in votes)

    def loss(self, x, labels: torch.Tensor) -> torch.Tensor:
        """The first stage: the sum of the streams' mean cross-entropies (they share no weight)."""
        return sum(vote_loss(votes, labels) for votes in self.streams(x, self._drawn(x)))

    def two_stream(self, x) -> torch.Tensor:
        """What the streams say without tracks: the logarithm of their mean probability, (B, num_classes)."""
        votes = [mean_probability(votes, dim=1) for votes in self.streams(x)]
        return mean_probability(torch.stack(votes, dim=1), dim=1)

    @torch.no_grad()
    def describe(self, x) -> list[dict[str, np.ndarray]]:
        """The descriptors of each clip, {stream.layer.normalisation: float32 (tracks x sizes, C)}."""
        was_training, _ = self.training, self.eval()
        try:
            return [self._describe_clip(rgb, flow) for rgb, flow in zip(*x, strict=True)]
        finally:
            self.train(was_training)

    def tracks(self, rgb: torch.Tensor) -> Tracks:
        """The tracks of one clip (3, T, H, W)."""
        levels = motion_levels(self.frames(rgb), scales=1, median=self.median)
        return dense_tracks(levels, step=self.step, length=self.length, limits=self.limits)

    def _drawn(self, x):
        """Which frames and stacks of a batch `loss` looks at."""
        if self.pictures is None:
            return slice(None)
        T = check_pair(x)[0].shape[2]
        if self.pictures > T:
            raise ValueError(f"pictures={self.pictures} cannot be drawn from clips of {T} frames")
        return torch.randperm(T)[: self.pictures]

    def _describe_clip(self, rgb, flow):
        tracks = self.tracks(rgb)
        streams = (
            ("spatial", rgb, self.spatial_layers, lambda times: rgb[None, :, times]),
            ("temporal", flow, self.temporal_layers, lambda times: self._stacks(flow[None], times)),
        )
        H, W = rgb.shape[-2:]
        found: dict[str, list] = {}
        for name, clip, layers, pictures in streams:
            for size in self.sizes if layers else ():
                maps = _maps(getattr(self, name), layers, pictures, clip.shape[1:], size)
                for layer in layers:
                    h, w = maps[layer].shape[-2:]
                    for kind in self.normalisations:
                        pooled = pool_tracks(normalise_maps(maps[layer], kind), tracks, (W / w, H / h))
                        found.setdefault(f"{name}.{layer}.{kind}", []).append(pooled.sqrt().cpu().numpy())
        return {key: np.concatenate(parts) for key, parts in found.items()}

    def _stacks(self, flow, times=slice(None)):
        """(B, 2, T, H, W) -> (B, 2 L, T, H, W): at t (dx, dy) of the field t, then of t + 1, ... t + L - 1.

        The last field stands for those that would come after it, as in the released code. Only the stacks
        at `times`, a slice or indices of T.
        """
        T = flow.shape[2]
        fields = (torch.arange(T)[times, None] + torch.arange(self.stack)).clamp(max=T - 1)
        return flow[:, :, fields].permute(0, 3, 1, 2, 4, 5).flatten(1, 2)


def _each_once(name, values, allowed, least=0):
    """`values` as a tuple, each of them `allowed`, none twice (that would double rows); else ValueError."""
    values = tuple(one_of(name, value, allowed) for value in values)
    if len(values) < least:
        raise ValueError(f"{name}={values!r} is empty; give one or more")
    if len(set(values)) < len(values):
        raise ValueError(f"{name}={values!r} has a value twice; give each once")
    return values


def _maps(stream, layers, pictures, shape, size):
    """{layer: (T, C, h, w)} of a clip resized by `size`; `pictures(slice)` gives some of its T pictures."""
    T, height, width = shape
    count = max(1, int(TOGETHER / (height * width * size**2)))
    parts = []
    for first in range(0, T, count):
        some = frames_as_batch(pictures(slice(first, first + count)))
        parts.append(stream.maps(_resized(some, size), layers))
    return {layer: torch.cat([part[layer] for part in parts]) for layer in layers}


def _resized(pictures, size):
    if size == 1:
        return pictures
    return F.interpolate(
        pictures, scale_factor=size, mode="bilinear", align_corners=False, antialias=size < 1
    )
