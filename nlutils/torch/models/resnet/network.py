"""The networks C2D and I3D.

Wang, Girshick, Gupta, He: Non-local Neural Networks, CVPR 2018, sections 4 and 5,
https://arxiv.org/abs/1711.07971. ResNets: He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition,
CVPR 2016. Compact generalized blocks: Yue et al., NeurIPS 2018, https://arxiv.org/abs/1810.13125.
"""

from functools import partialmethod

import torch.nn.functional as F
from torch import Tensor, nn

from nlutils.architectures.resnet import CLIPS, STAGES, plan
from nlutils.arguments import probability
from nlutils.torch.blocks import CompactGeneralizedNonLocalBlock, NonLocalBlock
from nlutils.torch.models.common import VideoClassifier, check_clip, check_input
from nlutils.torch.models.layers import ConvNorm

__all__ = ["C2D", "I3D"]


_FOLLOWERS = {"non_local": NonLocalBlock, "cgnl": CompactGeneralizedNonLocalBlock}


class _ResidualBlock(nn.Module):
    """z = ReLU(c(b(a(x))) + shortcut(x)) and the block that follows, if any; channels -> 4 width."""

    def __init__(self, channels, row):
        super().__init__()
        width, plain = row.width, (1, 1, 1)
        self.a = ConvNorm(channels, width, row.kernel_a, row.stride_a)
        self.b = ConvNorm(width, width, row.kernel_b, row.stride_b)
        self.c = ConvNorm(width, 4 * width, plain, relu=False)
        nn.init.zeros_(self.c.norm.weight)  # the block starts as its shortcut
        self.shortcut = None
        if row.has_shortcut:
            self.shortcut = ConvNorm(channels, 4 * width, plain, row.stride, relu=False)
        self.non_local = self.cgnl = None

    def forward(self, x):
        z = self.c(self.b(self.a(x)))
        z = F.relu(z + (x if self.shortcut is None else self.shortcut(x)), inplace=True)
        if self.non_local is not None:
            z = self.non_local(z)
        return z if self.cgnl is None else self.cgnl(z)


class C2D(VideoClassifier):
    """(B, C, T, H, W) -> (B, num_classes): the ResNet of the paper's Table 1, whose kernels see one frame.

    depth        50, 101, or the number of residual blocks in each of res2 to res5: (1, 1, 1, 1)
    width        channels of conv1; res2 to res5 give 4, 8, 16 and 32 times as many
    input        "rgb", "differences" or "flow"
    clip         "32x2", "8x8", "128x1" or "32x4": frames x stride of the published networks. For 32x2 and
                 128x1 conv1 and pool1 halve the frames, for 8x8 and 32x4 they leave time alone. Any of them
                 takes clips of other sizes too
    layout       "paper": Table 1: padded pools, 56 x 56 in res2 for 224 x 224; no scale in the softmax.
                 "released": the authors' code: pools without padding, 55 x 55; logits times d^(-1/2); in the
                 networks for 128x1 and 32x4 the blocks of res3 look at groups of four frames. "slowfast" (for
                 8x8; pytorchvideo too) and "mmaction2" (for 32x2): the I3D networks of these zoos
    stride_in    where a stage's first residual block has its stride: in the "3x3", or in the first "1x1" as
                 He et al. 2016
    inflate      None. "3x1x1": conv1 is 5x7x7, and in one residual block of two the first 1x1 is 3x1x1.
                 "3x3x3": there the 3x3 is 3x3x3 instead. They are all of res2, the first, third, .. of res3
                 and res4, the second, fourth, .. of res5
    non_local    0, 1, 5 or 10 non-local blocks, or where: {"res3": [1, 3], "res4": [-2]} puts them behind the
                 residual blocks of these indices. 1 is before the last residual block of res4; 5 are two in
                 res3 and three in res4, 10 are four and six, spread evenly: in ResNet-50 behind every second
                 and behind each; in ResNet-101 5 are behind 1, 3 and 6, 13, 20
    instantiation, subsample, scale, attention, frames_per_group
                 of the non-local blocks, see `nlutils.torch.NonLocalBlock`; frames_per_group may be of some
                 stages: {"res3": 4}
    cgnl         compact generalized blocks, counted or placed as `non_local`; not both at one place
    groups, kernel, order
                 of these, see `nlutils.torch.CompactGeneralizedNonLocalBlock`
    dropout      before the linear layer on the mean over space and time

    "layout" as the value of an option: what the layout has. Where the paper leaves something open or says two
    things, Table 2e's ratios to C2D ResNet-101 decide. phi and g are of the pooled map, `subsample="before"`:
    five blocks then cost the printed 1.2 times the multiply-adds (1.23); pooling what phi and g return, as
    the text has it, would give 1.32. The stride is in the 3x3: I3D 3x1x1 costs the printed 1.5 times as many
    (1.46); in the first 1x1 it would be 1.44. The 34.2 billion multiply-adds of the table's caption are of
    another network: `layout="released", stride_in="1x1"` has 34.17, and what Table 1 has is 35.29. Where ten
    blocks go in ResNet-101 the paper does not say; the released rule would place nine.

    Kernels start as in He et al. 2015, from the number of outputs; the last gain of each residual branch as
    0, as in the released code; the linear layer as N(0, 0.01). `expects` is None but for the published sizes.
    Raises ValueError, naming the option, for what is not known or does not fit, as 5 blocks in stages of one
    residual block, and for an option of blocks where there are none.

    >>> C2D(400, depth=(1, 1, 1, 1), width=8, non_local={"res4": [0]})(torch.zeros(2, 3, 8, 32, 32)).shape
    torch.Size([2, 400])
    """

    def __init__(
        self,
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
    ):
        options = {name: value for name, value in locals().items() if name in C2D.__init__.__kwdefaults__}
        table = plan(options, C2D.__init__.__kwdefaults__)
        super().__init__()
        self.input, self.layout, self.expects = input, layout, table.expects
        self._least, self._frames = table.least, CLIPS[clip][0]

        self.stem = ConvNorm(check_input(input), width, *table.conv1)
        self.pool1, self.pool2 = nn.MaxPool3d(*table.pool1), nn.MaxPool3d(*table.pool2)
        self.stages = _stages(table.stages, width)
        self.dropout = nn.Dropout(probability("dropout", dropout))
        self.classifier = nn.Linear(32 * width, num_classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)
        for (stage, index), (kind, block_options) in table.followers.items():
            residual = self.stages[STAGES.index(stage)][index]
            setattr(residual, kind, _FOLLOWERS[kind](residual.c.norm.num_features, **block_options))

    def layers(self) -> list[tuple[str, nn.Module]]:
        """The rows of Table 1 by name, in order; each runs on what the one before it returns."""
        res2, *others = zip(STAGES, self.stages, strict=True)
        return [("conv1", self.stem), ("pool1", self.pool1), res2, ("pool2", self.pool2), *others]

    def clip_shapes(self):
        return ((self._frames, 224, 224),)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, num_classes). Raises ValueError for other axes, and for too small a clip."""
        self._check_clip(x)
        for _, layer in self.layers():
            x = layer(x)
        return self.classifier(self.dropout(x.mean(dim=(2, 3, 4))))

    def _check_clip(self, x):
        check_clip(x, self.input)
        if any(side < need for side, need in zip(x.shape[2:], self._least, strict=True)):
            raise ValueError(
                f"x of shape {tuple(x.shape)} is too small: with layout={self.layout!r} T, H and W must be "
                f"at least {', '.join(map(str, self._least))}"
            )


class I3D(C2D):
    """C2D inflated, `inflate="3x1x1"` unless told: the paper's I3D of section 4. All else is as in `C2D`.

    It is not the I3D of Carreira and Zisserman (CVPR 2017), which is an inflated Inception-v1.
    """

    # The signature of C2D, with one other default, for those who ask for the options.
    __init__ = partialmethod(C2D.__init__, inflate="3x1x1")


def _stages(rows, channels):
    """res2 to res5 without any block that follows; `channels` come from pool1."""
    stages = nn.ModuleList()
    for stage in rows.values():
        layers = []
        for row in stage:
            layers.append(_ResidualBlock(channels, row))
            channels = 4 * row.width
        stages.append(nn.Sequential(*layers))
    return stages
