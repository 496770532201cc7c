"""LRCN: a CNN on every frame, an LSTM over the frames, an answer at every step.

Donahue, Hendricks, Guadarrama, Rohrbach, Venugopalan, Saenko, Darrell: Long-term Recurrent Convolutional
Networks for Visual Recognition and Description, CVPR 2015, https://arxiv.org/abs/1411.4389. Layers and values
as in the authors' code, LisaAnne/lisa-caffe-public, examples/LRCN_activity_recognition.
"""

import torch.nn.functional as F
from torch import nn

from nlutils.architectures.sizes import pair
from nlutils.arguments import positive_integer, probability
from nlutils.torch.models.common import (
    Expects,
    VideoClassifier,
    check_clip,
    check_input,
    frames_as_batch,
    mean_probability,
    vote_loss,
)
from nlutils.torch.models.recurrent.frames import FrameCNN, check_size, map_shape

__all__ = ["LRCN"]

WIDTH, FRAMES, SIZE = 96, 16, (227, 227)  # as published; width: channels of the first convolution
SOURCE = "Donahue et al., CVPR 2015, and LisaAnne/lisa-caffe-public: frames of 240 x 320, cropped"
EXPECTS = {
    "rgb": Expects(
        frames=FRAMES,
        size=SIZE,
        mean=(103.939 / 255, 116.779 / 255, 128.68 / 255),
        std=(1 / 255,) * 3,
        colour="BGR",
        source=SOURCE,
    ),
    "flow": Expects(
        frames=FRAMES,
        size=SIZE,
        mean=(0.0, 0.0),
        std=(1 / 16,) * 2,
        colour="",
        clip=8.0,  # 16 times the flow and 128 fit into a byte
        source=f"{SOURCE}; the authors' third channel, the flow's length, is left out here",
    ),
}


class LRCN(VideoClassifier):
    """LRCN for actions: (B, C, T, H, W) -> (B, num_classes), the logarithm of the mean probability.

    `FrameCNN`, fc6 and a ReLU on every frame, an LSTM over the frames, a classifier at every step ("LRCN-fc6"
    in the paper's Table 1). The loss is taken at every step; a clip's scores are the mean of the steps'
    softmax. T is free: 16 in training; in a test the authors average over clips 8 frames apart, ten crops of
    each.

    input         "rgb", "flow" or "differences"
    width         channels of the first convolution, 96 as published
    fc6, hidden   units of fc6 and of the LSTM
    size          (height, width) of the clips, or one number: fc6 is built for it, others raise
                  ValueError
    fc6_dropout, dropout   after fc6, after the LSTM

    With 101 classes: convolutions 4,310,656, fc6 56,627,200, LSTM 4,458,496, classifier 25,957 parameters,
    65,422,309 together. PyTorch's LSTM has two biases; with Caffe's one there are 1,024 fewer.
    """

    def __init__(
        self,
        num_classes,
        *,
        input="rgb",
        width=WIDTH,
        fc6=4096,
        hidden=256,
        size=227,
        fc6_dropout=0.9,
        dropout=0.5,
    ):
        super().__init__()
        self.input, self.size = input, pair("size", size)
        if (width, self.size) == (WIDTH, SIZE):
            self.expects = EXPECTS.get(input)
        self.encoder = FrameCNN(check_input(input), width=width)
        C, h, w = map_shape(self.encoder, check_input(input), self.size)
        self.fc6 = nn.Linear(C * h * w, positive_integer("fc6", fc6))
        self.fc6_dropout = nn.Dropout(probability("fc6_dropout", fc6_dropout))
        self.lstm = nn.LSTM(fc6, positive_integer("hidden", hidden), batch_first=True)
        self.dropout = nn.Dropout(probability("dropout", dropout))
        self.classifier = nn.Linear(hidden, num_classes)

    def clip_shapes(self):
        """16 frames, as in training, of the size that fc6 was built for."""
        return ((FRAMES, *self.size),)

    def steps(self, x):
        """The logits after each frame: (B, C, T, H, W) -> (B, T, num_classes)."""
        check_size(check_clip(x, self.input), self.size)
        maps = self.encoder(frames_as_batch(x))  # (B T, 384, 6, 6)
        features = self.fc6_dropout(F.relu(self.fc6(maps.flatten(1))))
        states, _ = self.lstm(features.unflatten(0, (x.shape[0], -1)))  # (B, T, hidden)
        return self.classifier(self.dropout(states))

    def forward(self, x):
        return mean_probability(self.steps(x), dim=1)

    def loss(self, x, labels):
        """The mean cross-entropy over clips and time steps."""
        return vote_loss(self.steps(x), labels)
