"""CNN and pooling over time: a 2D network on every frame, its maps joined in one of five ways.

Ng, Hausknecht, Vijayanarasimhan, Vinyals, Monga, Toderici: Beyond Short Snippets: Deep Networks for Video
Classification, CVPR 2015, https://arxiv.org/abs/1503.08909. Smaller here, so that a CPU trains it in minutes:
the study's encoder, and the mean over space in place of the fully connected layers. Their sixth network, with
LSTMs, is `CNNRNN` in small.
"""

from torch import nn

from nlutils.arguments import one_of, probability
from nlutils.torch.models.common import STUDY_CLIP, WIDTHS, check_input
from nlutils.torch.models.recurrent.snippets import OPTIONS, POOLINGS, BeyondShortSnippets, check_options
from nlutils.torch.models.small.layers import FrameMaps

__all__ = ["PoolingSmall"]

SMALL_POOLINGS = tuple(pooling for pooling in POOLINGS if pooling != "lstm")


class PoolingSmall(BeyondShortSnippets):
    """(B, C, T, H, W) -> (B, num_classes).

    pooling         what joins the frames:
                    "conv"         max over time of all frames' maps, mean over space
                    "late"         mean over space of every frame's maps, max over time
                    "slow"         max of the maps within windows, mean over space, max over all windows
                    "local"        max of the maps within windows, mean over space, a classifier that sees all
                                   windows side by side
                    "time_domain"  a convolution over time and space, then as "conv"
    frames          of the clips. "local" is built for it; the others take any number, "time_domain" one of
                    `window` or more
    window, stride  of the windows and of the convolution in time; of the last three poolings
    kernels         of the convolution, each `window` x 3 x 3; of "time_domain"

    The paper's windows are 10 frames of 120, 5 apart, its convolution has 256 kernels. An option that the
    pooling does not have raises ValueError, unless it is left as it is. "conv" and "late" cannot tell the
    order of frames.
    """

    def __init__(
        self,
        num_classes,
        *,
        input="rgb",
        pooling="conv",
        widths=WIDTHS,
        frames=STUDY_CLIP[0],
        window=4,
        stride=2,
        kernels=32,
        dropout=0.5,
    ):
        one_of("pooling", pooling, SMALL_POOLINGS)
        given = {"window": window, "stride": stride, "kernels": kernels}
        super().__init__(
            num_classes,
            input=input,
            pooling=pooling,
            encoder=FrameMaps(check_input(input), widths),
            fc=(),
            size=STUDY_CLIP[1:],
            frames=frames,
            **_own(pooling, given),
        )
        # There, dropout belongs to the fully connected layers.
        self.classifier = nn.Sequential(nn.Dropout(probability("dropout", dropout)), self.classifier)


def _own(pooling, given):
    """The options of `given` that `pooling` has; ValueError for others that somebody has set."""
    check_options(pooling, given, PoolingSmall.__init__.__kwdefaults__)
    return {option: value for option, value in given.items() if pooling in OPTIONS[option]}
