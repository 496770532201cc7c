"""Two streams: what is there, seen in single frames, and how it moves, seen in stacks of optical flow.

Simonyan and Zisserman, Two-Stream Convolutional Networks for Action Recognition in Videos, NIPS 2014,
https://arxiv.org/abs/1406.2199. Both streams are the CNN-M-2048 of Chatfield, Simonyan, Vedaldi and
Zisserman, Return of the Devil in the Details, BMVC 2014. The stacks are made in `nlutils.video.flow_stacks`.
"""

from collections import OrderedDict

import numpy as np
import torch
from torch import nn

from nlutils.arguments import positive_integer
from nlutils.torch.models.common import Expects, VideoClassifier, frames_as_batch, mean_probability
from nlutils.torch.models.inception.snapshots import cut_snapshots

__all__ = ["CNNM2048", "SVMFusion", "TwoStream", "frames_and_stacks", "stacked_scores"]

WIDTH = 96  # channels of conv1 as published; conv2 has 8/3 as many, then 16/3, 128/3 (fc6) and 64/3 (fc7)

_SOURCE = "Simonyan and Zisserman, NIPS 2014, section 5"
# The paper gives no mean and no scale of the colours.
EXPECTS_RGB = Expects(frames=1, size=(224, 224), source=_SOURCE + "; a test takes 25 frames of a video")
EXPECTS_FLOW = Expects(
    frames=10,
    size=(224, 224),
    mean=(0.0, 0.0),
    std=(1.0, 1.0),
    colour="",
    source=_SOURCE + "; pixels a frame, the mean vector of each field subtracted (section 3.1)",
)


class CNNM2048(nn.Module):
    """CNN-M-2048: (B, in_channels, *size) -> logits (B, num_classes).

    Five convolutions, three of them followed by 3x3 max pooling of stride 2, and three linear layers; see
    `layers` for the table. `second_norm=False` leaves out the response normalisation behind conv2, as in the
    temporal stream. At 224 x 224 the maps have 109, 54, 26, 13, 13 and 6 pixels a side: no padding around
    conv1, one pixel around conv2, pools that keep a window which reaches over the border. The paper leaves
    this open; it is so in public versions of CNN-M.

    Raises ValueError for a `width` that three does not divide, for a `size` of which nothing is left behind
    the last pool, and when called with another size: fc6 has weights for each of its places.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        width: int = WIDTH,
        size=(224, 224),
        second_norm: bool = True,
        dropout: float = 0.5,
    ):
        super().__init__()
        third = _third(width)
        self.size = _pair(size)
        places = _places(self.size)
        c1, c2, c3, fc6, fc7 = 3 * third, 8 * third, 16 * third, 128 * third, 64 * third
        features = [
            ("conv1", nn.Conv2d(in_channels, c1, 7, stride=2)),
            ("relu1", nn.ReLU()),
            ("norm1", _response_norm()),
            ("pool1", _pool()),
            ("conv2", nn.Conv2d(c1, c2, 5, stride=2, padding=1)),
            ("relu2", nn.ReLU()),
            *([("norm2", _response_norm())] if second_norm else []),
            ("pool2", _pool()),
            ("conv3", nn.Conv2d(c2, c3, 3, padding=1)),
            ("relu3", nn.ReLU()),
            ("conv4", nn.Conv2d(c3, c3, 3, padding=1)),
            ("relu4", nn.ReLU()),
            ("conv5", nn.Conv2d(c3, c3, 3, padding=1)),
            ("relu5", nn.ReLU()),
            ("pool5", _pool()),
        ]
        self.features = nn.Sequential(OrderedDict(features))
        self.fc6 = nn.Linear(c3 * places, fc6)
        self.fc7 = nn.Linear(fc6, fc7)
        self.classifier = nn.Linear(fc7, num_classes)
        self.dropout = nn.Dropout(dropout)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                gain = "linear" if layer is self.classifier else "relu"
                nn.init.kaiming_normal_(layer.weight, nonlinearity=gain)
                nn.init.zeros_(layer.bias)

    def layers(self) -> list[tuple[str, nn.Module]]:
        """The rows of the paper's figure 1 by name, in order; fc6 takes the maps of pool5 flattened."""
        return [
            *self.features.named_children(),
            ("fc6", self.fc6),
            ("fc7", self.fc7),
            ("classifier", self.classifier),
        ]

    def forward(self, x):
        if x.ndim != 4 or tuple(x.shape[2:]) != self.size:
            raise ValueError(
                f"x of shape {tuple(x.shape)} must be (B, C, {self.size[0]}, {self.size[1]}); "
                f"another size needs a network made with size=(H, W)"
            )
        x = self.features(x).flatten(1)
        x = self.dropout(self.fc6(x).relu())
        x = self.dropout(self.fc7(x).relu())
        return self.classifier(x)


class TwoStream(VideoClassifier):
    """((B, 3, T, H, W), (B, 2, F, H, W)), frames and flow -> (B, num_classes), log of the mean probability.

    The clip has S = F // stack places in time. At each of them the spatial stream sees one frame (all T = S,
    or the middle frames of S equal parts), the temporal stream L = `stack` fields as channels dx, dy, dx, ...
    Class probabilities are averaged over the places, then over the streams. The paper trains on one place of
    a video and tests on 25. `nlutils.video.flow_stacks` makes the paper's kinds of stacks, and clips of them.

    width    channels of conv1; the other layers' are in proportion, so 3 must divide it
    size     (H, W) of the frames
    dropout  in both streams, or (spatial, temporal). The paper takes 0.9 in the temporal stream, which starts
             from random weights, and 0.5 or 0.9 in the spatial one

    The streams learn apart (`losses`; `loss` is their sum). The other fusion of the paper is `SVMFusion` on
    `probabilities`. Spatial 90,627,813 and temporal 90,707,781 parameters with 101 classes. Weights start as
    in He et al. 2015, for the paper does not say how; the spatial stream of the paper comes from ImageNet.
    """

    input = ("rgb", "flow")

    def __init__(self, num_classes, *, width=WIDTH, size=(224, 224), stack=10, dropout=(0.5, 0.9)):
        super().__init__()
        self.stack = positive_integer("stack", stack)
        spatial, temporal = _both_dropouts(dropout)
        options = {"width": width, "size": size}
        self.spatial = CNNM2048(3, num_classes, dropout=spatial, **options)
        self.temporal = CNNM2048(2 * stack, num_classes, dropout=temporal, second_norm=False, **options)
        if (width, self.spatial.size, stack) == (WIDTH, (224, 224), 10):
            self.expects = (EXPECTS_RGB, EXPECTS_FLOW)

    def votes(self, x):
        """Logits of each stream at each place, spatial first: two tensors (B, S, num_classes)."""
        frames, stacks = frames_and_stacks(*x, self.stack)
        return tuple(
            stream(frames_as_batch(part)).unflatten(0, (len(part), -1))
            for stream, part in ((self.spatial, frames), (self.temporal, stacks))
        )

    def probabilities(self, x):
        """Mean class probabilities of each stream, spatial first: two tensors (B, num_classes)."""
        return tuple(votes.softmax(dim=-1).mean(dim=1) for votes in self.votes(x))

    def forward(self, x):
        streams = [mean_probability(votes, dim=1) for votes in self.votes(x)]
        return mean_probability(torch.stack(streams, dim=1), dim=1)

    def losses(self, x, labels):
        """The mean cross-entropy over the places of each stream, spatial first: two scalars."""
        return tuple(
            nn.functional.cross_entropy(votes.flatten(0, 1), labels.repeat_interleave(votes.shape[1]))
            for votes in self.votes(x)
        )

    def loss(self, x, labels):
        # The streams share no weight: each learns from the sum as if it were alone.
        return sum(self.losses(x, labels))


class SVMFusion:
    """A multi-class linear SVM on the stacked, L2-normalised class probabilities of the streams.

    Section 2 of the paper, which names Crammer and Singer's SVM (JMLR 2001): one cost for all classes
    together. scikit-learn's LinearSVC does the work. The paper gives no `cost` = C. Fit it on clips that the
    streams were not trained on, where they are as often right as they will be in use.
    """

    def __init__(self, cost: float = 1.0, seed: int = 0):
        self.cost, self.seed = cost, seed
        self._svm = None
        self._num_classes = 0

    def fit(self, streams, labels) -> "SVMFusion":
        """`streams` as in `stacked_scores`, `labels` (B,). Raises ValueError when there is one class only."""
        from sklearn.svm import LinearSVC

        features, labels = stacked_scores(streams), np.asarray(labels)
        if labels.shape != (len(features),) or len(np.unique(labels)) < 2:
            raise ValueError(
                f"labels of shape {labels.shape} hold {len(np.unique(labels))} classes; there must be "
                f"{len(features)} labels, of two classes or more"
            )
        self._num_classes = features.shape[1] // len(streams)
        self._svm = LinearSVC(
            C=self.cost, multi_class="crammer_singer", random_state=self.seed, max_iter=100_000
        ).fit(features, labels)
        return self

    def scores(self, streams) -> np.ndarray:
        """(B, num_classes), the larger the likelier; minus infinity for a class that `fit` did not see."""
        if self._svm is None:
            raise RuntimeError("this SVM has seen no clips yet; call fit first")
        decision = self._svm.decision_function(stacked_scores(streams))
        if decision.ndim == 1:  # two classes: one number, positive for the second
            decision = np.stack([-decision, decision], axis=1)
        scores = np.full((len(decision), self._num_classes), -np.inf)
        scores[:, self._svm.classes_] = decision
        return scores


def frames_and_stacks(rgb, flow, stack):
    """A clip cut into places in time, a frame and a stack of flow each.

    rgb (B, 3, T, H, W) and flow (B, 2, F, H, W) -> (B, 3, S, H, W) and (B, 2 L, S, H, W), with L = `stack`
    and S = F // L; channels in the papers' order dx, dy, dx, dy, ... See `cut_snapshots` for which frames.
    """
    frames, stacks = cut_snapshots(rgb, flow, stack)  # channels dx, dx, ..., dy, dy, ...
    return frames, stacks.unflatten(1, (2, stack)).transpose(1, 2).flatten(1, 2)


def stacked_scores(streams) -> np.ndarray:
    """Each stream's class probabilities (B, num_classes), divided by their length, side by side: (B, sum)."""
    streams = [np.asarray(torch.as_tensor(stream).detach().cpu(), np.float64) for stream in streams]
    if len({stream.shape for stream in streams}) != 1 or streams[0].ndim != 2:
        raise ValueError(
            f"streams of shapes {[stream.shape for stream in streams]} must all be (B, num_classes)"
        )
    return np.hstack([stream / np.linalg.norm(stream, axis=1, keepdims=True) for stream in streams])


def _response_norm():
    # Krizhevsky et al. 2012: n = 5, k = 2, alpha = 1e-4, beta = 0.75; PyTorch divides alpha by n.
    return nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)


def _pool():
    return nn.MaxPool2d(3, stride=2, ceil_mode=True)


def _third(width):
    if positive_integer("width", width) % 3:
        raise ValueError(f"width={width!r} must be a multiple of 3: conv2 has 8/3 as many channels as conv1")
    return width // 3


def _pair(size):
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise ValueError(f"size={size!r} must be a pair (H, W)")
    return tuple(positive_integer("size", side) for side in size)


def _places(size):
    """How many positions of the picture fc6 sees."""
    sides = []
    for side in size:
        side = (side - 7) // 2 + 1  # conv1
        side = (side - 2) // 2 + 1  # pool1, rounded up
        side = (side + 2 - 5) // 2 + 1  # conv2
        for _ in range(2):  # pool2, pool5
            side = (side - 2) // 2 + 1
        sides.append(side)
    if min(sides) < 1:
        raise ValueError(f"size={size!r} is too small for five layers that halve it; use 41 or more")
    return sides[0] * sides[1]


def _both_dropouts(dropout):
    if isinstance(dropout, int | float):
        return dropout, dropout
    if not isinstance(dropout, tuple | list) or len(dropout) != 2:
        raise ValueError(f"dropout={dropout!r} must be a number, or two: (spatial, temporal)")
    return tuple(dropout)
