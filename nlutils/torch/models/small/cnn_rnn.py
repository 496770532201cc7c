"""CNN+RNN: a 2D network on every frame, a recurrent network over the frames' features.

Donahue et al., Long-term Recurrent Convolutional Networks, CVPR 2015 (LRCN): the loss is taken at every time
step, and a clip's scores are the mean of the steps' probabilities.
"""

from torch import nn

from nlutils.arguments import one_of, positive_integer, probability
from nlutils.torch.models.common import (
    WIDTHS,
    FrameEncoder,
    VideoClassifier,
    check_clip,
    check_input,
    frames_as_batch,
    mean_probability,
    vote_loss,
)

__all__ = ["CNNRNN"]

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU}


class CNNRNN(VideoClassifier):
    """(B, C, T, H, W) -> (B, num_classes), the logarithm of the mean probability over the steps."""

    def __init__(self, num_classes, *, input="rgb", widths=WIDTHS, hidden=128, cell="lstm", dropout=0.5):
        super().__init__()
        self.input = input
        self.encoder = FrameEncoder(check_input(input), widths)
        cell = CELLS[one_of("cell", cell, CELLS)]
        self.rnn = cell(widths[-1], positive_integer("hidden", hidden), batch_first=True)
        self.dropout = nn.Dropout(probability("dropout", dropout))
        self.classifier = nn.Linear(hidden, num_classes)

    def steps(self, x):
        """The logits after each frame: (B, C, T, H, W) -> (B, T, num_classes)."""
        B = check_clip(x, self.input).shape[0]
        features = self.encoder(frames_as_batch(x)).unflatten(0, (B, -1))  # (B, T, D)
        states, _ = self.rnn(self.dropout(features))  # (B, T, hidden)
        return self.classifier(self.dropout(states))

    def forward(self, x):
        return mean_probability(self.steps(x), dim=1)

    def loss(self, x, labels):
        """The mean cross-entropy over clips and time steps."""
        return vote_loss(self.steps(x), labels)
