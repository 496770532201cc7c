"""What the systems of "Quo Vadis" were published with."""

from nlutils.torch.models.common import Expects

__all__ = ["SIZE", "expects_flow", "expects_rgb"]

SIZE = 224, 224
SOURCE = "Carreira and Zisserman, CVPR 2017, Table 1; values: README of deepmind/kinetics-i3d"
FLOW_SOURCE = SOURCE + "; TV-L1 flow in pixels a frame, clipped to [-20, 20] before it is divided by 20"


def expects_rgb(frames: int, stride: int = 1) -> Expects:
    """RGB scaled from [0, 1] to [-1, 1]."""
    half = (0.5, 0.5, 0.5)
    return Expects(frames=frames, size=SIZE, stride=stride, mean=half, std=half, source=SOURCE)


def expects_flow(frames: int) -> Expects:
    """Flow in pixels, clipped to [-20, 20], divided by 20."""
    zero, scale = (0.0, 0.0), (20.0, 20.0)
    return Expects(frames, SIZE, mean=zero, std=scale, colour="", clip=20.0, source=FLOW_SOURCE)
