"""Inception-v1 on every frame under an LSTM with batch normalisation.

Carreira and Zisserman, Quo Vadis, CVPR 2017, section 2.1.
"""

import torch
import torch.nn.functional as F
from torch import nn

from nlutils.arguments import positive_integer, probability
from nlutils.torch.models.common import VideoClassifier, check_clip, check_input, vote_loss
from nlutils.torch.models.inception.facts import SIZE, expects_rgb
from nlutils.torch.models.inception_v1 import WIDTH, InceptionV1

__all__ = ["BatchNormLSTM", "InceptionLSTM"]

FRAMES = 25  # as published, every fifth of 25 a second


class BatchNormLSTM(nn.Module):
    """An LSTM with batch normalisation inside: (B, T, D) -> (B, T, hidden).

    Cooijmans, Ballas, Laurent, Gulcehre, Courville: Recurrent Batch Normalization, ICLR 2017,
    https://arxiv.org/abs/1603.09025, equations 6 to 8: what comes from the input and what comes from the last
    state are normalised apart, and so is the cell before it is read,

        i, f, o, g = BN(W_x x_t) + BN(W_h h_{t-1}) + b
        c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)
        h_t = sigmoid(o) tanh(BN(c_t))

    The first two have no bias of their own; gains start at 0.1. Statistics are taken over the batch, at each
    step its own. Running ones, of `momentum` as in PyTorch's BatchNorm, are kept for the first `steps` steps;
    later steps, and those that no training clip was long enough for, use the last. Training needs 2 clips or
    more, else ValueError.
    """

    def __init__(self, inputs, hidden, *, steps=25, momentum=0.1):
        super().__init__()
        self.hidden = positive_integer("hidden", hidden)
        self.steps = positive_integer("steps", steps)
        self.momentum = momentum
        self.from_input = nn.Linear(inputs, 4 * hidden, bias=False)
        self.from_state = nn.Linear(hidden, 4 * hidden, bias=False)
        self.bias = nn.Parameter(torch.zeros(4 * hidden))
        self.cell_bias = nn.Parameter(torch.zeros(hidden))
        for name, width in (("input", 4 * hidden), ("state", 4 * hidden), ("cell", hidden)):
            self.register_parameter(f"{name}_gain", nn.Parameter(torch.full((width,), 0.1)))
            self.register_buffer(f"{name}_mean", torch.zeros(steps, width))
            self.register_buffer(f"{name}_var", torch.ones(steps, width))
        self.register_buffer("trained", torch.zeros(steps, dtype=torch.bool))

    def _statistics(self, name):
        return getattr(self, f"{name}_mean"), getattr(self, f"{name}_var")

    def _normalised(self, x, name, t, bias=None):
        rows = [kind[t] for kind in self._statistics(name)]
        # Copies: what the backward pass keeps must not be the buffer that the next step writes to.
        mean, var = (row.clone() for row in rows)
        y = F.batch_norm(x, mean, var, getattr(self, f"{name}_gain"), bias, self.training, self.momentum)
        if self.training:
            rows[0].copy_(mean)
            rows[1].copy_(var)
        return y

    def _share_last(self, steps):
        """Rows that no clip has reached yet take over the last one of a clip of `steps` steps."""
        self.trained[:steps] = True
        for name in ("input", "state", "cell"):
            for rows in self._statistics(name):
                rows.copy_(torch.where(self.trained[:, None], rows, rows[min(steps, self.steps) - 1]))

    def forward(self, x):
        B, T, _ = x.shape
        if self.training and B < 2:
            raise ValueError(f"a batch of {B} clip has no statistics to train with; give 2 clips or more")
        h = c = x.new_zeros(B, self.hidden)
        from_input, states = self.from_input(x), []
        for t in range(T):
            row = min(t, self.steps - 1)
            gates = self._normalised(from_input[:, t], "input", row)
            gates = gates + self._normalised(self.from_state(h), "state", row) + self.bias
            i, f, o, g = gates.chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * self._normalised(c, "cell", row, self.cell_bias).tanh()
            states.append(h)
        if self.training:
            self._share_last(T)
        return torch.stack(states, dim=1)


class InceptionLSTM(VideoClassifier):
    """(a): Inception-v1 on every frame, an LSTM over the frames: (B, C, T, H, W) -> logits (B, num_classes).

    Section 2.1: the LSTM, with batch normalisation, stands on the last average pooling; the loss is taken at
    all time steps, the answer at the last. As published: 25 frames of 224 x 224, every fifth of 25 a second,
    `hidden` = 512. 8,958,000 parameters with 400 classes.
    """

    def __init__(self, num_classes, *, input="rgb", width=WIDTH, hidden=512, norm_gain=True, dropout=0.5):
        super().__init__()
        self.input = input
        if width == WIDTH and input == "rgb":
            self.expects = expects_rgb(FRAMES, stride=5)
        self.features = InceptionV1(check_input(input), width=width, inflated=False, norm_gain=norm_gain)
        self.lstm = BatchNormLSTM(self.features.out_channels, hidden)
        self.dropout = nn.Dropout(probability("dropout", dropout))
        self.classifier = nn.Linear(hidden, num_classes)

    def clip_shapes(self):
        """25 frames of 224 x 224; any size works."""
        return ((FRAMES, *SIZE),)

    def steps(self, x):
        """The logits after each frame: (B, C, T, H, W) -> (B, T, num_classes)."""
        features = self.features(check_clip(x, self.input)).mean(dim=(3, 4)).transpose(1, 2)  # (B, T, D)
        return self.classifier(self.dropout(self.lstm(features)))

    def forward(self, x):
        return self.steps(x)[:, -1]

    def loss(self, x, labels):
        """The mean cross-entropy over clips and time steps."""
        return vote_loss(self.steps(x), labels)
