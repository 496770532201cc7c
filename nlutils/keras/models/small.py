"""The study's C3D-style network in Keras, with or without non-local blocks between its stages.

Tran et al., Learning Spatiotemporal Features with 3D Convolutional Networks, ICCV 2015 (C3D). The blocks:
Wang et al., Non-local Neural Networks, CVPR 2018, section 3.3. What is smaller than C3D, and why, says
`nlutils.torch.models.small.c3d`.
"""

import itertools

import keras
from keras import layers
from keras.initializers import VarianceScaling

from nlutils.architectures.inputs import check_input
from nlutils.architectures.names import to_layer_name
from nlutils.arguments import one_of, positive_integer
from nlutils.keras.blocks import CompactGeneralizedNonLocalBlock, NonLocalBlock
from nlutils.keras.models.common import batch_norm, clips, convolution, linear, max_pool, relu
from nlutils.keras.models.common import dropout as drop

__all__ = ["c3d_small", "c3d_small_non_local"]

WIDTHS = (16, 32, 64, 128)
KINDS = {"non_local": NonLocalBlock, "compact_generalized": CompactGeneralizedNonLocalBlock}


def c3d_small(
    num_classes,
    *,
    input="rgb",
    widths=WIDTHS,
    dropout=0.5,
    non_local=(),
    kind="non_local",
    block=None,
) -> keras.Model:
    """(B, T, H, W, C) -> (B, num_classes): the network of `nlutils.torch.models.small.C3DSmall`.

    Four stages, each a 3x3x3 convolution with batch normalisation and ReLU: stride 1x2x2 in the first, 2x2x2
    max pooling after the second and third, the mean over space and time at the end.

    input      "rgb", "differences" or "flow"
    widths     channels of the four stages
    dropout    before the linear layer
    non_local  the stages (1 to 4) that a block follows, behind the pooling
    kind       "non_local" (`nlutils.keras.NonLocalBlock`) or "compact_generalized"
               (`nlutils.keras.CompactGeneralizedNonLocalBlock`); the controls are PyTorch's only
    block      the blocks' options

    T, H and W are free. Kernels start evenly within 1 / sqrt(inputs), as PyTorch's, biases as 0; blocks start
    as the identity. The loss is `SparseCategoricalCrossentropy(from_logits=True)`. In training Keras puts the
    biased variance of a batch into the moving variance, PyTorch the unbiased one; in a batch of 16
    of the study's clips they differ by less than 1 in 1,000.

    Raises ValueError, naming the option, for what is not known or does not fit.
    """
    channels, widths = check_input(input), _checked(widths)
    make = KINDS[one_of("kind", kind, KINDS)]
    followed = {one_of("non_local", stage, range(1, len(widths) + 1)) for stage in non_local}
    x = inputs = clips(channels)
    # PyTorch's `features` counts its layers.
    paths = (f"features.{number}" for number in itertools.count())
    for stage, width in enumerate(widths, start=1):
        x = convolution(
            x,
            width,
            (3, 3, 3),
            name=next(paths),
            stride=(1, 2, 2) if stage == 1 else 1,
            padding=1,
            bias=False,
            initializer=_within_fan(),
        )
        x = batch_norm(x, name=next(paths))
        x = relu(x, name=next(paths))
        if stage in (2, 3):
            x = max_pool(x, (2, 2, 2), name=next(paths))
        if stage in followed:
            x = make(width, ndim=3, **(block or {}), name=to_layer_name(next(paths)))(x)
    x = layers.GlobalAveragePooling3D(data_format="channels_last", name="mean")(x)
    x = drop(x, dropout, name="dropout")
    x = linear(x, num_classes, name="classifier", initializer=_within_fan())
    return keras.Model(inputs, x, name="c3d_small")


def c3d_small_non_local(
    num_classes,
    *,
    input="rgb",
    widths=WIDTHS,
    dropout=0.5,
    non_local=(2, 3),
    instantiation="embedded_gaussian",
    subsample="before",
    scale=False,
) -> keras.Model:
    """`c3d_small` with embedded Gaussian non-local blocks after its second and third stage.

    The keys and values are pooled 2x2 in space, as in the paper's released networks.
    """
    block = {"instantiation": instantiation, "subsample": subsample, "scale": scale}
    return c3d_small(
        num_classes, input=input, widths=widths, dropout=dropout, non_local=non_local, block=block
    )


def _checked(widths):
    widths = tuple(widths)
    if len(widths) != 4:
        raise ValueError(f"widths={widths!r} has {len(widths)} numbers; give 4, one a stage")
    return tuple(positive_integer("widths", width) for width in widths)


def _within_fan():
    """Evenly within +-1 / sqrt(inputs): the variance of that is 1 / (3 inputs)."""
    return VarianceScaling(1 / 3, mode="fan_in", distribution="uniform")
