"""Two streams: what is there, seen in single frames, and how it moves, seen in stacks of optical flow.

Simonyan and Zisserman, Two-Stream Convolutional Networks for Action Recognition in Videos, NIPS 2014,
https://arxiv.org/abs/1406.2199. Both streams are the CNN-M-2048 of Chatfield, Simonyan, Vedaldi and
Zisserman, Return of the Devil in the Details, BMVC 2014. The stacks are made in `nlutils.video.flow_stacks`.
"""

from collections import OrderedDict

import numpy as np
import torch
from torch import nn

from nlutils.architectures.frame_networks import CNN_M_WIDTH, cnn_m_channels, cnn_m_map, two_dropouts
from nlutils.arguments import positive_integer, positive_number, probability, truth_value, whole_number
from nlutils.torch.models.common import (
    Expects,
    VideoClassifier,
    check_pair,
    frames_as_batch,
    mean_probability,
    vote_loss,
)
from nlutils.torch.models.layers import frames_and_stacks, response_norm
from nlutils.video.fisher import check_labels

__all__ = ["CNNM2048", "SVMFusion", "TwoStream", "frames_and_stacks", "stacked_scores"]

SIZE, STACK = (224, 224), 10  # as published

_SOURCE = "Simonyan and Zisserman, NIPS 2014, section 5"
# The paper gives no mean and no scale of the colours.
EXPECTS_RGB = Expects(frames=1, size=SIZE, source=_SOURCE + "; a test takes 25 frames of a video")
EXPECTS_FLOW = Expects(
    frames=STACK,
    size=SIZE,
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
    conv1, one pixel around conv2, pools that keep a window which reaches over the border: our choice,
    for the paper leaves this open.

    Raises ValueError for a `width` that three does not divide, for a `size` of which nothing is left behind
    the last pool, and when called with another size: fc6 has weights for each of its places.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        width: int = CNN_M_WIDTH,
        size=SIZE,
        second_norm: bool = True,
        dropout: float = 0.5,
    ):
        super().__init__()
        channels, (h, w) = cnn_m_channels(width), cnn_m_map(size)
        c1, c2, c3, fc6, fc7 = (channels[layer] for layer in ("conv1", "conv2", "conv3", "fc6", "fc7"))
        self.in_channels, self.size = in_channels, tuple(size)
        features = [
            ("conv1", nn.Conv2d(in_channels, c1, 7, stride=2)),
            ("relu1", nn.ReLU()),
            ("norm1", _norm()),
            ("pool1", _pool()),
            ("conv2", nn.Conv2d(c1, c2, 5, stride=2, padding=1)),
            ("relu2", nn.ReLU()),
            *([("norm2", _norm())] if truth_value("second_norm", second_norm) else []),
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
        self.fc6 = nn.Linear(c3 * h * w, fc6)
        self.fc7 = nn.Linear(fc6, fc7)
        self.classifier = nn.Linear(fc7, num_classes)
        self.dropout = nn.Dropout(probability("dropout", dropout))
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
        if x.ndim != 4 or tuple(x.shape[1:]) != (self.in_channels, *self.size):
            raise ValueError(
                f"x of shape {tuple(x.shape)} must be (B, {self.in_channels}, {self.size[0]}, "
                f"{self.size[1]}); another size needs a network made with size=(H, W)"
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

    def __init__(self, num_classes, *, width=CNN_M_WIDTH, size=SIZE, stack=STACK, dropout=(0.5, 0.9)):
        super().__init__()
        self.stack = positive_integer("stack", stack)
        spatial, temporal = two_dropouts(dropout)
        options = {"width": width, "size": size}
        self.spatial = CNNM2048(3, num_classes, dropout=spatial, **options)
        self.temporal = CNNM2048(2 * stack, num_classes, dropout=temporal, second_norm=False, **options)
        if (width, self.spatial.size, stack) == (CNN_M_WIDTH, SIZE, STACK):
            self.expects = (EXPECTS_RGB, EXPECTS_FLOW)

    def clip_shapes(self):
        """One place, as in training: a frame of the size that fc6 was built for, and a stack of flow."""
        return (1, *self.spatial.size), (self.stack, *self.spatial.size)

    def votes(self, x):
        """Logits of each stream at each place, spatial first: two tensors (B, S, num_classes)."""
        frames, stacks = frames_and_stacks(*check_pair(x), self.stack)
        return tuple(
            stream(frames_as_batch(part)).unflatten(0, (part.shape[0], -1))
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
        return tuple(vote_loss(votes, labels) for votes in self.votes(x))

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
        self.cost, self.seed = positive_number("cost", cost), whole_number("seed", seed)
        self._svm = None
        self._num_classes = 0

    def fit(self, streams, labels) -> "SVMFusion":
        """`streams` as in `stacked_scores`, `labels` (B,), two or more classes; ValueError for others."""
        from sklearn.svm import LinearSVC

        features = stacked_scores(streams)
        num_classes = features.shape[1] // len(streams)
        labels = check_labels(labels, num_classes, len(features))
        self._num_classes = num_classes
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


def stacked_scores(streams) -> np.ndarray:
    """Each stream's class probabilities (B, num_classes), divided by their length, side by side: (B, sum).

    Raises ValueError for other shapes, and for a row that has no length: zeros, NaN or infinity.
    """
    streams = [np.asarray(torch.as_tensor(stream).detach().cpu(), np.float64) for stream in streams]
    if len({stream.shape for stream in streams}) != 1 or streams[0].ndim != 2:
        raise ValueError(
            f"streams of shapes {[stream.shape for stream in streams]} must all be (B, num_classes)"
        )
    lengths = np.linalg.norm(streams, axis=2, keepdims=True)
    wrong = ~(np.isfinite(lengths) & (lengths > 0))
    if wrong.any():
        stream, row, _ = map(int, np.argwhere(wrong)[0])
        raise ValueError(
            f"streams[{stream}][{row}]={streams[stream][row].tolist()} must be class probabilities: "
            f"finite numbers, not all 0"
        )
    return np.hstack([stream / length for stream, length in zip(streams, lengths, strict=True)])


def _norm():
    return response_norm(5e-4, k=2.0)


def _pool():
    return nn.MaxPool2d(3, stride=2, ceil_mode=True)
