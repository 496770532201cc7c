"""What networks are fed with."""

from nlutils.arguments import one_of

__all__ = ["INPUT_CHANNELS", "check_input"]

# What a network may be fed with, and its channels: colour frames; differences of consecutive frames;
# optical flow (dx, dy). `nlutils.study.inputs` makes them.
INPUT_CHANNELS = {"rgb": 3, "differences": 3, "flow": 2}


def check_input(value: str) -> int:
    """The number of channels of the input called `value`; ValueError when there is no such input."""
    return INPUT_CHANNELS[one_of("input", value, INPUT_CHANNELS)]
