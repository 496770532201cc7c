"""C3D in Keras.

Tran, Bourdev, Fergus, Torresani, Paluri: Learning Spatiotemporal Features with 3D Convolutional Networks,
ICCV 2015, https://arxiv.org/abs/1412.0767, and its released code, facebookarchive/C3D (Caffe).
"""

import keras
from keras import layers
from keras.initializers import RandomNormal

from nlutils.architectures.inputs import check_input
from nlutils.architectures.sizes import clip_size
from nlutils.arguments import one_of, positive_integer
from nlutils.keras.models.common import clips, convolution, linear, max_pool, relu
from nlutils.keras.models.common import dropout as drop

__all__ = ["c3d"]

LAYOUTS = ("paper", "mmaction2")
# The convolutions, their channels in multiples of the width, and the pooling behind them.
CONVOLUTIONS = (
    ("conv1a", 1, "pool1"),
    ("conv2a", 2, "pool2"),
    ("conv3a", 4, None),
    ("conv3b", 4, "pool3"),
    ("conv4a", 8, None),
    ("conv4b", 8, "pool4"),
    ("conv5a", 8, None),
    ("conv5b", 8, "pool5"),
)


def c3d(
    num_classes,
    *,
    input="rgb",
    width=64,
    fc=4096,
    frames=16,
    size=(112, 112),
    layout="paper",
    dropout=0.5,
) -> keras.Model:
    """(B, frames, *size, C) -> (B, num_classes): the network of Tran et al., as `nlutils.torch`'s.

    Eight 3x3x3 convolutions with stride 1 and padding 1, five max poolings (pool1 1x2x2, the others 2x2x2),
    fc6 and fc7; ReLU behind every convolution, fc6 and fc7; no normalisation. 78,409,573 parameters with 101
    classes.

    input         "rgb", "differences" or "flow"
    width         channels of conv1a; conv2a has 2, conv3a and b 4, the others 8 times as many
    fc            outputs of fc6 and of fc7
    frames, size  T and (H, W) of the clips; for others build the network with theirs
    layout        "paper": poolings keep a last, incomplete window, as in the released code. "mmaction2", for
                  weights that were trained so: they drop it, and pool5 is padded by 1 in space
    dropout       behind fc6 and behind fc7

    fc6 takes the maps of pool5 in PyTorch's order, C x T x H x W. Kernels start as in He et al. 2015, biases
    as 0, the last layer as N(0, 0.01). The loss is `SparseCategoricalCrossentropy(from_logits=True)`.

    Raises ValueError for an option that is not known, and for sizes of which the poolings leave nothing
    ("mmaction2" only).
    """
    channels, clip = check_input(input), clip_size(frames, size)
    width, fc = positive_integer("width", width), positive_integer("fc", fc)
    if one_of("layout", layout, LAYOUTS) == "mmaction2" and min(clip) < 16:
        raise ValueError(
            f"frames={clip[0]}, size={clip[1:]}: the poolings of layout='mmaction2' leave nothing; give "
            f"16 x 16 x 16 or more"
        )
    x = inputs = clips(channels, frames=clip[0], size=clip[1:])
    for name, multiple, pool in CONVOLUTIONS:
        x = convolution(x, multiple * width, (3, 3, 3), name=name, padding=1)
        x = relu(x, name=f"{name}.relu")
        if pool:
            x = _pool(x, pool, layout)
    x = layers.Flatten(name="flatten")(layers.Permute((4, 1, 2, 3), name="channels_first")(x))
    for name in ("fc6", "fc7"):
        x = relu(linear(x, fc, name=name), name=f"{name}.relu")
        x = drop(x, dropout, name=f"{name}.dropout")
    x = linear(x, num_classes, name="classifier", initializer=RandomNormal(stddev=0.01))
    return keras.Model(inputs, x, name="c3d")


def _pool(x, name, layout):
    padding = (0, 1, 1) if (layout, name) == ("mmaction2", "pool5") else 0
    window = (1, 2, 2) if name == "pool1" else (2, 2, 2)
    return max_pool(x, window, name=name, padding=padding, ceil=layout == "paper")
