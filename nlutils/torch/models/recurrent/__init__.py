"""A 2D network on every frame, and what joins the frames: an LSTM (LRCN), poolings or an LSTM (Ng et al.)."""

from nlutils.torch.models.recurrent.frames import FrameCNN, FrameInception
from nlutils.torch.models.recurrent.lrcn import LRCN
from nlutils.torch.models.recurrent.lstm import PeepholeLSTM
from nlutils.torch.models.recurrent.snippets import (
    INFERENCE,
    POOLINGS,
    BeyondShortSnippets,
    rising_gain,
    window_maxima,
)

__all__ = [
    "INFERENCE",
    "LRCN",
    "POOLINGS",
    "BeyondShortSnippets",
    "FrameCNN",
    "FrameInception",
    "PeepholeLSTM",
    "rising_gain",
    "window_maxima",
]
