"""Small networks of one size class (100,000 to 300,000 weights): a CPU trains them in minutes."""

from nlutils.torch.models.small.c3d import C3DSmall, C3DSmallNonLocal
from nlutils.torch.models.small.cnn_rnn import CNNRNN
from nlutils.torch.models.small.frame_average import FrameAverage
from nlutils.torch.models.small.two_stream import TwoStreamSmall

__all__ = ["CNNRNN", "SMALL_MODELS", "C3DSmall", "C3DSmallNonLocal", "FrameAverage", "TwoStreamSmall"]

SMALL_MODELS = {
    "frame_average": FrameAverage,
    "cnn_rnn": CNNRNN,
    "c3d_small": C3DSmall,
    "two_stream_small": TwoStreamSmall,
    "c3d_small_non_local": C3DSmallNonLocal,
}
