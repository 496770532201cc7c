"""What published networks were trained with."""

from dataclasses import dataclass

__all__ = ["Expects"]


@dataclass(frozen=True)
class Expects:
    """What a network was published with, so that nobody has to guess.

    frames, stride   the time steps that it sees, and the frames of the video from one step to the next
    size             (height, width)
    mean, std        a channel: (value - mean) / std goes in; colours are in [0, 1], flow in pixels a step
    colour           "RGB" or "BGR": the order of the channels; "" for flow
    source           where this is written
    clip             flow is cut off at this many pixels first; None: it is not
    """

    frames: int
    size: tuple[int, int]
    stride: int = 1
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    colour: str = "RGB"
    source: str = ""
    clip: float | None = None
