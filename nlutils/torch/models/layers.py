"""What several families are built of: snapshots of a clip, a convolution with its norm, response norm."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlutils.torch.inflation import inflate_kernel
from nlutils.torch.models.common import check_pair

__all__ = ["ConvNorm", "cut_snapshots", "frames_and_stacks", "middle_frames", "response_norm"]


def middle_frames(x: Tensor, count: int) -> Tensor:
    """The middle frame of each of `count` equal parts of a clip: (B, C, T, H, W) -> (B, C, count, H, W)."""
    part = torch.arange(count, device=x.device)
    return x.index_select(2, (2 * part + 1) * x.shape[2] // (2 * count))


def cut_snapshots(rgb: Tensor, flow: Tensor, stack: int) -> tuple[Tensor, Tensor]:
    """Cut a clip into snapshots, a frame and a stack of flow fields each.

    rgb (B, 3, T, H, W) and flow (B, 2, F, H, W) -> (B, 3, S, H, W) and (B, 2 stack, S, H, W), S = F // stack:
    the middle frame of each of S equal parts of the clip, and S stacks as channels, dx of all fields first.
    With T = S every frame is taken. Raises ValueError for shapes that do not fit together.
    """
    check_pair((rgb, flow))
    count = flow.shape[2] // stack
    if count == 0:
        raise ValueError(f"flow has {flow.shape[2]} fields; stack={stack} needs at least as many")
    if rgb.shape[2] < count:
        raise ValueError(
            f"rgb has {rgb.shape[2]} frames for {count} stacks of flow; give one a stack or more"
        )
    stacks = flow[:, :, : count * stack].unflatten(2, (count, stack))  # (B, 2, S, stack, H, W)
    return middle_frames(rgb, count), stacks.transpose(2, 3).flatten(1, 2)


def frames_and_stacks(rgb: Tensor, flow: Tensor, stack: int) -> tuple[Tensor, Tensor]:
    """A clip cut into places in time, a frame and a stack of flow each.

    rgb (B, 3, T, H, W) and flow (B, 2, F, H, W) -> (B, 3, S, H, W) and (B, 2 L, S, H, W), with L = `stack`
    and S = F // L; channels in the papers' order dx, dy, dx, dy, ... See `cut_snapshots` for which frames.
    """
    frames, stacks = cut_snapshots(rgb, flow, stack)  # channels dx, dx, ..., dy, dy, ...
    return frames, stacks.unflatten(1, (2, stack)).transpose(1, 2).flatten(1, 2)


class ConvNorm(nn.Module):
    """A convolution without bias, padded to keep the size; batch normalisation; ReLU unless told.

    kernel and stride are (T, H, W). The kernel starts as in He et al. 2015, from the number of outputs; with
    `repeated` as such a 2D kernel, divided by the number of its frames and repeated.
    """

    def __init__(self, in_channels, out_channels, kernel, stride=(1, 1, 1), *, relu=True, repeated=False):
        super().__init__()
        padding = tuple(side // 2 for side in kernel)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.norm = nn.BatchNorm3d(out_channels)
        self.relu = relu
        weight = self.conv.weight
        start = torch.empty_like(weight[:, :, :1] if repeated else weight)
        nn.init.kaiming_normal_(start, mode="fan_out", nonlinearity="relu")
        with torch.no_grad():
            weight.copy_(inflate_kernel(start, kernel[0]) if repeated else start)

    def forward(self, x):
        y = self.norm(self.conv(x))
        return F.relu(y, inplace=True) if self.relu else y


def response_norm(alpha: float, k: float) -> nn.LocalResponseNorm:
    """Local response normalisation over 5 channels, beta = 0.75: Krizhevsky et al., NIPS 2012, section 3.3.

        b_c = a_c / (k + alpha / 5 * (sum of a^2 over the 5 channels around c)) ^ 0.75

    As in Caffe and PyTorch alpha is divided by 5. The paper's is not: its k = 2 and alpha = 1e-4 are
    `response_norm(5e-4, k=2.0)`; Caffe's networks have 1e-4 and k = 1.
    """
    return nn.LocalResponseNorm(5, alpha=alpha, beta=0.75, k=k)
