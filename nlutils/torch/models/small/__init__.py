"""Small networks, for the study: a CPU trains them in minutes.

They share their widths, and those of one stream their size class, 100,000 to 300,000 weights; networks of two
3D streams have up to twice as many.
"""

from nlutils.torch.models.small.c2d import C2DSmall
from nlutils.torch.models.small.c3d import C3DSmall, C3DSmallNonLocal
from nlutils.torch.models.small.cnn_rnn import CNNRNN
from nlutils.torch.models.small.frame_average import FrameAverage
from nlutils.torch.models.small.fused import FusedTwoStreamSmall
from nlutils.torch.models.small.pooling import PoolingSmall
from nlutils.torch.models.small.st_resnet import STResNetSmall
from nlutils.torch.models.small.two_stream import TwoStreamSmall
from nlutils.torch.models.small.two_stream_3d import TwoStream3DSmall

__all__ = [
    "CNNRNN",
    "MORE_SMALL_MODELS",
    "SMALL_MODELS",
    "C2DSmall",
    "C3DSmall",
    "C3DSmallNonLocal",
    "FrameAverage",
    "FusedTwoStreamSmall",
    "PoolingSmall",
    "STResNetSmall",
    "TwoStream3DSmall",
    "TwoStreamSmall",
]

# What a study compares when nobody names other rows.
SMALL_MODELS = {
    "frame_average": FrameAverage,
    "cnn_rnn": CNNRNN,
    "c3d_small": C3DSmall,
    "two_stream_small": TwoStreamSmall,
    "c3d_small_non_local": C3DSmallNonLocal,
}
MORE_SMALL_MODELS = {
    "c2d_small": C2DSmall,
    "pooling_small": PoolingSmall,
    "two_stream_3d_small": TwoStream3DSmall,
    "fused_two_stream_small": FusedTwoStreamSmall,
    "st_resnet_small": STResNetSmall,
}
