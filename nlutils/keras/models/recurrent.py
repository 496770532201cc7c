"""LRCN in Keras: a CNN on every frame, an LSTM over the frames, an answer at every step.

Donahue, Hendricks, Guadarrama, Rohrbach, Venugopalan, Saenko, Darrell: Long-term Recurrent Convolutional
Networks for Visual Recognition and Description, CVPR 2015, https://arxiv.org/abs/1411.4389. Layers and values
as in the authors' code, LisaAnne/lisa-caffe-public, examples/LRCN_activity_recognition.
"""

import keras
from keras import layers
from keras.initializers import RandomUniform, VarianceScaling

from nlutils.architectures.frame_networks import CNNS, scaled
from nlutils.architectures.inputs import check_input
from nlutils.architectures.names import to_layer_name
from nlutils.architectures.sizes import pair
from nlutils.arguments import positive_integer
from nlutils.keras.models.common import clips, convolution, linear, max_pool, relu
from nlutils.keras.models.common import dropout as drop
from nlutils.keras.models.layers import BatchAsFrames, FramesAsBatch, MeanProbability, ResponseNorm

__all__ = ["lrcn"]

LEAST = 49  # pixels a side: the smallest frame of which pool5 gets a map


def lrcn(
    num_classes,
    *,
    input="rgb",
    width=96,
    fc6=4096,
    hidden=256,
    size=227,
    fc6_dropout=0.9,
    dropout=0.5,
) -> keras.Model:
    """LRCN for actions: (B, T, H, W, C) -> (B, num_classes), the logarithm of the mean probability.

    Five convolutions, fc6 and a ReLU on every frame, an LSTM over the frames, a classifier at every step
    ("LRCN-fc6" in the paper's Table 1). A clip's scores are the mean of the steps' softmax. T is free: 16 in
    training.

    input         "rgb", "flow" or "differences"
    width         channels of the first convolution, 96 as published; the others scale with it
    fc6, hidden   units of fc6 and of the LSTM
    size          (height, width) of the clips, or one number: fc6 is built for it
    fc6_dropout, dropout   after fc6, after the LSTM

    65,421,285 parameters with 101 classes, as in Caffe: 1,024 fewer than in PyTorch, whose LSTM has two
    biases where one is enough; with plain gradient descent their sum takes steps twice as large as the one's.
    Kernels start as PyTorch's layers do, evenly within +-1 / sqrt(inputs), and within +-1 / sqrt(hidden) in
    the LSTM; biases start as 0.

    The paper's loss is taken at every step. The steps' logits are a model of the same layers:

        steps = keras.Model(model.inputs, model.get_layer("classifier").output)  # (B, T, num_classes)
        steps.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        steps.fit(clips, numpy.repeat(labels[:, None], T, axis=1))

    Raises ValueError for an option that is not known, and for frames too small for the poolings.
    """
    size = pair("size", size)
    if min(size) < LEAST:
        raise ValueError(f"size={size}: the poolings leave nothing; give {LEAST} or more pixels a side")
    inputs = clips(check_input(input), size=size)
    x = _encoder(FramesAsBatch(name="frames")(inputs), positive_integer("width", width))
    x = layers.Flatten(name="flatten")(layers.Permute((3, 1, 2), name="channels_first")(x))
    x = linear(x, positive_integer("fc6", fc6), name="fc6", initializer=_within_fan())
    x = drop(relu(x, name="fc6.relu"), fc6_dropout, name="fc6_dropout")
    x = BatchAsFrames(name="sequence")(x, inputs)
    x = drop(_lstm(x, positive_integer("hidden", hidden)), dropout, name="dropout")
    steps = linear(x, num_classes, name="classifier", initializer=_within_fan())
    return keras.Model(inputs, MeanProbability(name="mean_probability")(steps), name="lrcn")


def _encoder(x, width):
    for number, (channels, kernel, stride, padding, groups, then) in enumerate(CNNS["lrcn"], start=1):
        x = convolution(
            x,
            scaled(channels, width),
            (kernel, kernel),
            name=f"encoder.conv{number}",
            stride=stride,
            padding=padding,
            groups=groups,
            initializer=_within_fan(),
        )
        x = relu(x, name=f"encoder.relu{number}")
        for kind in then:
            x = _pool(x, number) if kind == "pool" else _norm(x, number)
    return x


def _pool(x, number):
    return max_pool(x, (3, 3), name=f"encoder.pool{number}", stride=2, ceil=True)


def _norm(x, number):
    name = to_layer_name(f"encoder.norm{number}")
    return ResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0, name=name)(x)


def _lstm(x, hidden):
    bound = hidden**-0.5
    return layers.LSTM(
        hidden,
        return_sequences=True,
        kernel_initializer=RandomUniform(-bound, bound),
        recurrent_initializer=RandomUniform(-bound, bound),
        unit_forget_bias=False,
        name="lstm",
    )(x)


def _within_fan():
    """Evenly within +-1 / sqrt(inputs): the variance of that is 1 / (3 inputs)."""
    return VarianceScaling(1 / 3, mode="fan_in", distribution="uniform")
