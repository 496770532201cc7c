"""The systems of "Quo Vadis": Inception-v1 inflated to 3D, and its 2D self over time in three ways.

Carreira and Zisserman: Quo Vadis, Action Recognition? A New Model and the Kinetics Dataset, CVPR 2017,
https://arxiv.org/abs/1705.07750. Section 2 compares five systems:

(a) a ConvNet under an LSTM              `InceptionLSTM`
(b) a 3D ConvNet                         C3D with batch normalisation, in `c3d.py`
(c) two streams                          `TwoStreamInception`
(d) two streams, fused by a 3D layer     `FusedTwoStream`
(e) two inflated streams                 `TwoStreamI3D`, each of them an `I3DInception`

All but (b) stand on one `InceptionV1`. "I3D" is this network here; elsewhere it is an inflated ResNet.

Table 1 of the paper gives parameters in whole millions. With 400 classes ours are

    (a)  8,958,000   paper  9 M
    (c) 12,073,120   paper 12 M
    (d) 39,770,896   paper 39 M
    (e) 25,372,576   paper 25 M

Three round to the paper's figure. (d) rounds to 40; cut off after the millions it would be 39, as the 79.63
million of (b) are 79 M in the table. What the paper leaves open in (d), the stride of the last pooling, has
no weights as long as the classifier sees one position at a time, or their mean.
"""

from nlutils.torch.models.inception.inflated import I3DInception, TwoStreamI3D
from nlutils.torch.models.inception.recurrent import BatchNormLSTM, InceptionLSTM
from nlutils.torch.models.inception.snapshots import FusedTwoStream, TwoStreamInception
from nlutils.torch.models.inception_v1 import InceptionV1, same_padding
from nlutils.torch.models.layers import cut_snapshots

__all__ = [
    "BatchNormLSTM",
    "FusedTwoStream",
    "I3DInception",
    "InceptionLSTM",
    "InceptionV1",
    "TwoStreamI3D",
    "TwoStreamInception",
    "cut_snapshots",
    "same_padding",
]
