"""C3D-style: 3x3x3 convolutions throughout, with or without non-local blocks between the stages.

Tran et al., Learning Spatiotemporal Features with 3D Convolutional Networks, ICCV 2015 (C3D): 3x3x3 kernels
everywhere, and a first stage that leaves time alone. Smaller here, so that a CPU trains it in minutes: a
stride in place of the first pooling, batch normalisation, and a global mean in place of the two large fully
connected layers. The blocks: Wang et al., Non-local Neural Networks, CVPR 2018, section 3.3.

Inflation, Carreira and Zisserman, Quo Vadis, Action Recognition?, CVPR 2017, section 2.4 (I3D): `C3DSmall` is
`FrameAverage` with kernels and two poolings longer in time, and can start from its trained weights.
"""

from torch import nn

from nlutils.arguments import one_of, probability
from nlutils.torch.blocks import CompactGeneralizedNonLocalBlock, NonLocalBlock
from nlutils.torch.controls import ConstantBlock, ConvolutionBlock, UniformBlock, WindowBlock
from nlutils.torch.models.common import WIDTHS, VideoClassifier, check_clip, check_input, check_widths

__all__ = ["C3DSmall", "C3DSmallNonLocal"]

KINDS = {
    "non_local": NonLocalBlock,
    "compact_generalized": CompactGeneralizedNonLocalBlock,
    "uniform": UniformBlock,
    "window": WindowBlock,
    "convolution": ConvolutionBlock,
    "constant": ConstantBlock,
}


class C3DSmall(VideoClassifier):
    """(B, C, T, H, W) -> (B, num_classes).

    Four stages, each a 3x3x3 convolution with batch normalisation and ReLU: stride 1x2x2 in the first, 2x2x2
    max pooling after the second and third, the mean over space and time at the end. `non_local` lists the
    stages (1 to 4) that a block follows, behind the pooling; `block` holds the blocks' options. `kind` is
    "non_local" (`nlutils.torch.NonLocalBlock`), "compact_generalized"
    (`nlutils.torch.CompactGeneralizedNonLocalBlock`) or a control in their place (`nlutils.torch.controls`).

    A small I3D starts from a trained `FrameAverage`, with or without blocks:

        inflate_weights(trained.state_dict(), model, rename=model.place_of)

    On a clip of one frame repeated it then computes what `FrameAverage` does: with mode="centre" for clips of
    any length, 4 frames or more; with "mean", as published, only in maps that see no end of the clip, where
    zeros stand for frames. Of the 4 maps in time that 16 frames leave, that is none; of 5 from 20, one.
    """

    TIME = 3  # frames of a kernel
    TIME_POOL = 2  # frames of a pooling window

    def __init__(
        self,
        num_classes,
        *,
        input="rgb",
        widths=WIDTHS,
        dropout=0.5,
        non_local=(),
        kind="non_local",
        block=None,
    ):
        super().__init__()
        self.input = input
        channels, widths = check_input(input), check_widths(widths)
        non_local = [one_of("non_local", stage, range(1, len(widths) + 1)) for stage in non_local]
        make, layers = KINDS[one_of("kind", kind, KINDS)], []
        kernel, padding = (self.TIME, 3, 3), (self.TIME // 2, 1, 1)
        for stage, width in enumerate(widths, start=1):
            layers += [
                nn.Conv3d(channels, width, kernel, (1, 2, 2) if stage == 1 else 1, padding, bias=False),
                nn.BatchNorm3d(width),
                nn.ReLU(inplace=True),
            ]
            if stage in (2, 3):
                layers.append(nn.MaxPool3d((self.TIME_POOL, 2, 2)))
            if stage in non_local:
                layers.append(make(width, ndim=3, **(block or {})))
            channels = width
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(probability("dropout", dropout))
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x):
        features = self.features(check_clip(x, self.input)).mean(dim=(2, 3, 4))  # (B, D)
        return self.classifier(self.dropout(features))

    def place_of(self, name: str) -> str:
        """This network's name of a weight of `FrameAverage`, as `inflate_weights` takes it for `rename`.

        The layers are the same in the same order, but blocks stand between them.
        """
        head, _, rest = name.partition(".")
        if head != "encoder":
            return name
        index, _, weight = rest.partition(".")
        blocks = tuple(KINDS.values())
        places = [place for place, layer in enumerate(self.features) if not isinstance(layer, blocks)]
        return f"features.{places[int(index)]}.{weight}"


class C3DSmallNonLocal(C3DSmall):
    """C3DSmall with embedded Gaussian non-local blocks after its second and third stage.

    The keys and values are pooled 2x2 in space, as in the paper's released networks.
    """

    def __init__(
        self,
        num_classes,
        *,
        input="rgb",
        widths=WIDTHS,
        dropout=0.5,
        non_local=(2, 3),
        instantiation="embedded_gaussian",
        subsample="before",
        scale=False,
    ):
        block = {"instantiation": instantiation, "subsample": subsample, "scale": scale}
        super().__init__(
            num_classes, input=input, widths=widths, dropout=dropout, non_local=non_local, block=block
        )
