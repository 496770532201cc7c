"""The tables of the networks on single frames: CaffeNet's hybrid in LRCN, AlexNet, CNN-M-2048."""

from nlutils.arguments import positive_integer, probability

__all__ = ["CNNS", "CNN_M_WIDTH", "cnn_m_channels", "cnn_m_map", "scaled", "two_dropouts"]

# A convolution a row: channels, kernel, stride, padding, groups, and what follows its ReLU. Pooling is 3 x 3
# at stride 2 and rounds up, as in Caffe.
CNNS = {
    # LisaAnne/lisa-caffe-public, examples/LRCN_activity_recognition/train_test_lstm_RGB.prototxt
    "lrcn": (
        (96, 7, 2, 0, 1, ("pool", "norm")),
        (384, 5, 2, 0, 2, ("pool", "norm")),
        (512, 3, 1, 1, 1, ()),
        (512, 3, 1, 1, 2, ()),
        (384, 3, 1, 1, 2, ("pool",)),
    ),
    # Krizhevsky, Sutskever, Hinton: ImageNet Classification with Deep Convolutional Neural Networks, NIPS
    # 2012; 227 x 227 there
    "alexnet": (
        (96, 11, 4, 0, 1, ("norm", "pool")),
        (256, 5, 1, 2, 2, ("norm", "pool")),
        (384, 3, 1, 1, 1, ()),
        (384, 3, 1, 1, 2, ()),
        (256, 3, 1, 1, 2, ("pool",)),
    ),
}


def scaled(channels: int, width: int, first: int = 96) -> int:
    """`channels` of a network whose first convolution has `first`, when it has `width`: an even number.

    Even, since some convolutions work in 2 groups.
    """
    return 2 * max(1, round(channels * width / first / 2))


# CNN-M-2048: Chatfield, Simonyan, Vedaldi, Zisserman: Return of the Devil in the Details, BMVC 2014

CNN_M_WIDTH = 96  # channels of conv1 as published


def cnn_m_channels(width: int) -> dict[str, int]:
    """What each layer of CNN-M-2048 returns, in proportion to the `width` of conv1, which 3 must divide."""
    if positive_integer("width", width) % 3:
        raise ValueError(f"width={width!r} must be a multiple of 3: conv2 has 8/3 as many channels as conv1")
    thirds = {"conv1": 3, "conv2": 8, "conv3": 16, "conv4": 16, "conv5": 16, "fc6": 128, "fc7": 64}
    return {layer: count * (width // 3) for layer, count in thirds.items()}


def cnn_m_map(size) -> tuple[int, int]:
    """(H, W) of what pool5 of CNN-M-2048 makes of frames of `size`; ValueError where nothing is left."""
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise ValueError(f"size={size!r} must be a pair (H, W)")
    sides = []
    for side in size:
        side = (positive_integer("size", side) - 7) // 2 + 1  # conv1
        side = (side - 2) // 2 + 1  # pool1, rounded up
        side = (side + 2 - 5) // 2 + 1  # conv2
        for _ in range(2):  # pool2, pool5
            side = (side - 2) // 2 + 1
        sides.append(side)
    if min(sides) < 1:
        raise ValueError(f"size={size!r} is too small for five layers that halve it; use 41 or more")
    return tuple(sides)


def two_dropouts(dropout) -> tuple[float, float]:
    """(spatial, temporal) from one number or two; ValueError for anything else."""
    both = dropout if isinstance(dropout, tuple | list) else (dropout, dropout)
    if len(both) != 2:
        raise ValueError(f"dropout={dropout!r} must be a number, or two: (spatial, temporal)")
    return tuple(probability("dropout", share) for share in both)
