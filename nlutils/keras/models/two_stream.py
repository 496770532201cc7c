"""Two streams in Keras: what is there, seen in single frames, and how it moves, seen in stacks of flow.

Simonyan and Zisserman, Two-Stream Convolutional Networks for Action Recognition in Videos, NIPS 2014,
https://arxiv.org/abs/1406.2199. Both streams are the CNN-M-2048 of Chatfield, Simonyan, Vedaldi and
Zisserman, Return of the Devil in the Details, BMVC 2014. The stacks are made in `nlutils.video.flow_stacks`.
"""

import keras
from keras import layers, ops
from keras.initializers import VarianceScaling

from nlutils.architectures.frame_networks import CNN_M_WIDTH, cnn_m_channels, cnn_m_map, two_dropouts
from nlutils.architectures.names import to_layer_name
from nlutils.arguments import positive_integer
from nlutils.keras.models.common import clips, convolution, linear, max_pool, relu
from nlutils.keras.models.common import dropout as drop
from nlutils.keras.models.layers import BatchAsFrames, FramesAsBatch, MeanProbability, ResponseNorm, Snapshots

__all__ = ["two_stream"]


def two_stream(
    num_classes, *, width=CNN_M_WIDTH, size=(224, 224), stack=10, dropout=(0.5, 0.9)
) -> keras.Model:
    """[(B, T, H, W, 3), (B, F, H, W, 2)], frames and flow -> (B, num_classes), log of the mean probability.

    The clip has S = F // stack places in time. At each of them the spatial stream sees one frame (all T = S,
    or the middle frames of S equal parts), the temporal stream L = `stack` fields as channels dx, dy, dx, ...
    Class probabilities are averaged over the places, then over the streams. T and F are free.

    width    channels of conv1; the other layers' are in proportion, so 3 must divide it
    size     (H, W) of the frames: fc6 is built for it
    dropout  in both streams, or (spatial, temporal)

    90,627,813 parameters in the spatial and 90,707,781 in the temporal stream, with 101 classes. Kernels
    start as in He et al. 2015, the last layers' without the factor of ReLU, biases as 0.

    In the paper the streams learn apart. Their logits at each place are a model of the same layers, whose
    loss is the sum of theirs:

        votes = [model.get_layer(name).output for name in ("spatial-votes", "temporal-votes")]
        streams = keras.Model(model.inputs, votes)  # two of (B, S, num_classes)
        streams.compile("adam", 2 * [keras.losses.SparseCategoricalCrossentropy(from_logits=True)])
        places = numpy.repeat(labels[:, None], S, axis=1)
        streams.fit([rgb, flow], [places, places])

    Raises ValueError for a `width` that 3 does not divide, for a `size` of which nothing is left behind the
    last pool, and for clips that have less flow than a stack or fewer frames than stacks.
    """
    spatial, temporal = two_dropouts(dropout)
    cnn_m_map(size)  # raises where nothing is left
    snapshots = Snapshots(positive_integer("stack", stack), name="snapshots")
    inputs = [clips(3, size=size, name="rgb"), clips(2, size=size, name="flow")]
    frames, stacks = snapshots(*inputs)
    options = {"num_classes": num_classes, "channels": cnn_m_channels(width)}
    votes = [
        _stream("spatial", frames, second_norm=True, dropout=spatial, **options),
        _stream("temporal", stacks, second_norm=False, dropout=temporal, **options),
    ]
    means = [
        MeanProbability(name=f"{stream}-mean_probability")(vote)
        for stream, vote in zip(("spatial", "temporal"), votes, strict=True)
    ]
    x = MeanProbability(name="mean_probability")(ops.stack(means, axis=1))
    return keras.Model(inputs, x, name="two_stream")


def _stream(name, clip, *, num_classes, channels, second_norm, dropout):
    """CNN-M-2048 on each frame of `clip`: (B, S, H, W, C) -> logits (B, S, num_classes)."""
    x = _features(FramesAsBatch(name=f"{name}-frames")(clip), channels, f"{name}.features", second_norm)
    x = layers.Permute((3, 1, 2), name=f"{name}-channels_first")(x)
    x = layers.Flatten(name=f"{name}-flatten")(x)
    for layer in ("fc6", "fc7"):
        x = relu(linear(x, channels[layer], name=f"{name}.{layer}"), name=f"{name}.{layer}.relu")
        x = drop(x, dropout, name=f"{name}.{layer}.dropout")
    linear_gain = VarianceScaling(1.0, mode="fan_in", distribution="untruncated_normal")
    x = linear(x, num_classes, name=f"{name}.classifier", initializer=linear_gain)
    return BatchAsFrames(name=f"{name}-votes")(x, clip)


def _features(x, channels, path, second_norm):
    """conv1 to pool5: (B, H, W, C) -> (B, h, w, 16/3 width)."""

    def convolve(x, number, kernel, stride=1, padding=1):
        name = f"conv{number}"
        x = convolution(
            x,
            channels[name],
            (kernel, kernel),
            name=f"{path}.{name}",
            stride=stride,
            padding=padding,
        )
        return relu(x, name=f"{path}.relu{number}")

    def normalise(x, number):
        # Krizhevsky et al. 2012: n = 5, k = 2, alpha = 1e-4, beta = 0.75; `ResponseNorm` divides alpha by n.
        return ResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0, name=to_layer_name(f"{path}.norm{number}"))(x)

    def pool(x, number):
        return max_pool(x, (3, 3), name=f"{path}.pool{number}", stride=2, ceil=True)

    x = pool(normalise(convolve(x, 1, kernel=7, stride=2, padding=0), 1), 1)
    x = convolve(x, 2, kernel=5, stride=2)
    x = pool(normalise(x, 2) if second_norm else x, 2)
    return pool(convolve(convolve(convolve(x, 3, 3), 4, 3), 5, 3), 5)
