"""C2D and I3D in Keras: ResNets that see clips, with non-local blocks where the paper puts them.

Wang, Girshick, Gupta, He: Non-local Neural Networks, CVPR 2018, sections 4 and 5,
https://arxiv.org/abs/1711.07971. Compact generalized blocks: Yue et al., NeurIPS 2018,
https://arxiv.org/abs/1810.13125. The tables are those of the PyTorch networks.
"""

import functools
import inspect

import keras
from keras import layers
from keras.initializers import RandomNormal

from nlutils.architectures.inputs import check_input
from nlutils.architectures.names import to_layer_name
from nlutils.architectures.resnet import plan
from nlutils.keras.blocks import CompactGeneralizedNonLocalBlock, NonLocalBlock
from nlutils.keras.models import common
from nlutils.keras.models.layers import LeastClip

__all__ = ["c2d", "i3d"]

_FOLLOWERS = {"non_local": NonLocalBlock, "cgnl": CompactGeneralizedNonLocalBlock}


def c2d(
    num_classes: int,
    *,
    depth=50,
    width: int = 64,
    input: str = "rgb",
    clip: str = "32x2",
    layout: str = "paper",
    stride_in: str = "3x3",
    inflate: str | None = None,
    non_local=0,
    instantiation: str = "embedded_gaussian",
    subsample: str | None = "layout",
    scale: bool | str = "layout",
    attention: str = "spacetime",
    frames_per_group="layout",
    cgnl=0,
    groups: int = 8,
    kernel: str = "dot",
    order: int = 3,
    dropout: float = 0.5,
) -> keras.Model:
    """(B, T, H, W, C) -> (B, num_classes): the ResNet of the paper's Table 1, whose kernels see one frame.

    depth        50, 101, or the number of residual blocks in each of res2 to res5: (1, 1, 1, 1)
    width        channels of conv1; res2 to res5 give 4, 8, 16 and 32 times as many
    input        "rgb", "differences" or "flow"
    clip         "32x2", "8x8", "128x1" or "32x4": frames x stride of the published networks. For 32x2 and
                 128x1 conv1 and pool1 halve the frames, for 8x8 and 32x4 they leave time alone. Any of them
                 takes clips of other sizes too
    layout       "paper", "released", "slowfast" (for 8x8) or "mmaction2" (for 32x2): pools, scale and
                 sub-sampling as in Table 1, in the authors' code, in the model zoos
    stride_in    where a stage's first residual block has its stride: in the "3x3", or in the first "1x1"
    inflate      None. "3x1x1": conv1 is 5x7x7, and in one residual block of two the first 1x1 is 3x1x1.
                 "3x3x3": there the 3x3 is 3x3x3 instead
    non_local    0, 1, 5 or 10 non-local blocks, or where: {"res3": [1, 3], "res4": [-2]} puts them behind the
                 residual blocks of these indices
    instantiation, subsample, scale, attention, frames_per_group
                 of the non-local blocks, see `nlutils.keras.NonLocalBlock`; frames_per_group may be of some
                 stages: {"res3": 4}
    cgnl         compact generalized blocks, counted or placed as `non_local`; not both at one place
    groups, kernel, order
                 of these, see `nlutils.keras.CompactGeneralizedNonLocalBlock`
    dropout      before the linear layer on the mean over space and time

    "layout" as the value of an option: what the layout has. The docstring of `C2D` in
    `nlutils.torch.models.resnet` says what the paper leaves open and what was chosen. The class scores have
    no softmax: `SparseCategoricalCrossentropy(from_logits=True)` is the PyTorch network's `loss`.

    Kernels start as in He et al. 2015, from the number of outputs; the last gain of each residual branch as
    0, as in the released code; the linear layer as N(0, 0.01). The attribute `expects` has the recipe facts
    of the published sizes, else None; Keras does not save it. Raises ValueError, naming the option, for what
    is not known or does not fit, and for an option of blocks where there are none; when called, for too small
    a clip.
    """
    table = plan(dict(locals()), c2d.__kwdefaults__)
    clips = common.clips(check_input(input))
    x = LeastClip(table.least, name="least_clip")(clips)
    x = _conv_norm(x, width, *table.conv1, name="stem")
    x = _max_pool(x, *table.pool1, name="pool1")
    for level, (stage, rows) in enumerate(table.stages.items()):
        for row in rows:
            path = f"stages.{level}.{row.index}"
            x = _residual_block(x, row, path)
            if (stage, row.index) in table.followers:
                kind, block_options = table.followers[stage, row.index]
                x = _FOLLOWERS[kind](**block_options, name=to_layer_name(f"{path}.{kind}"))(x)
        if stage == "res2":
            x = _max_pool(x, *table.pool2, name="pool2")
    x = layers.GlobalAveragePooling3D(data_format="channels_last", name="mean")(x)
    x = common.dropout(x, dropout, name="dropout")
    scores = common.linear(x, num_classes, name="classifier", initializer=RandomNormal(stddev=0.01))
    model = keras.Model(clips, scores, name="i3d" if inflate else "c2d")
    model.expects = table.expects
    return model


def i3d(num_classes: int, *, inflate: str | None = "3x1x1", **options) -> keras.Model:
    """C2D inflated, `inflate="3x1x1"` unless told: the paper's I3D of section 4. All else is as in `c2d`.

    It is not the I3D of Carreira and Zisserman (CVPR 2017), which is an inflated Inception-v1.
    """
    return c2d(num_classes, inflate=inflate, **options)


# For those who ask for the options: those of c2d, with one other default.
i3d.__signature__ = inspect.signature(functools.partial(c2d, inflate="3x1x1"))


def _residual_block(x, row, path):
    """ReLU(c(b(a(x))) + shortcut(x)) by its row of the table; channels -> 4 width."""
    y = _conv_norm(x, row.width, row.kernel_a, row.stride_a, name=f"{path}.a")
    y = _conv_norm(y, row.width, row.kernel_b, row.stride_b, name=f"{path}.b")
    # A gain of 0: the block starts as its shortcut.
    y = _conv_norm(y, 4 * row.width, (1, 1, 1), name=f"{path}.c", gain="zeros", relu=False)
    if row.has_shortcut:
        x = _conv_norm(x, 4 * row.width, (1, 1, 1), row.stride, name=f"{path}.shortcut", relu=False)
    z = layers.Add(name=to_layer_name(f"{path}.add"))([y, x])
    return common.relu(z, name=f"{path}.relu")


def _conv_norm(x, channels, kernel, stride=1, *, name, gain="ones", relu=True):
    """A convolution without bias, padded by half its kernel; batch normalisation; ReLU unless told."""
    padding = tuple(side // 2 for side in kernel)
    he = common.he_normal("fan_out")
    path = f"{name}.conv"
    y = common.convolution(
        x, channels, kernel, stride=stride, padding=padding, bias=False, initializer=he, name=path
    )
    y = common.batch_norm(y, name=f"{name}.norm", gain=gain)
    return common.relu(y, name=f"{name}.relu") if relu else y


def _max_pool(x, window, stride, padding, *, name):
    return common.max_pool(x, window, stride=stride, padding=padding, name=name)
