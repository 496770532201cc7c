"""The compact generalized non-local block as a layer.

Yue, Sun, Yuan, Zhou, Ding, Xu: Compact Generalized Non-local Network, NeurIPS 2018,
https://arxiv.org/abs/1810.13125. Layers and initialisation follow the authors' released code.
"""

from torch import Tensor, nn
from torch.nn import functional

from nlutils.instantiations import check_map
from nlutils.kernels import check_generalized_block
from nlutils.torch.operations import compact_generalized
from nlutils.torch.operations.precision import no_autocast

__all__ = ["CompactGeneralizedNonLocalBlock"]

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CONVOLVE = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


class CompactGeneralizedNonLocalBlock(nn.Module):
    """z = x + norm(W_z y), around y of `compact_generalized`, which compares entries (position, channel).

    Takes and returns feature maps (B, C, N), (B, C, H, W) or (B, C, T, H, W) for `ndim` 1, 2, 3.

    in_channels     C; groups must divide it
    inner_channels  the width of theta, phi and g; groups must divide it. None: half of C
    groups          the channels of theta, phi and g, of W_z and of the norm are cut into so many groups
    kernel          "dot", or "rbf": a Taylor sum of powers 0 to `order`
    order           of "rbf", 1 or more

    theta, phi and g are convolutions of size 1 without bias, w_z is one in groups, norm is a GroupNorm.
    Weights start as N(0, 0.01), the norm's gain and bias as 0, so that the block starts as the identity. For
    float16 and bfloat16, under autocast too, y, W_z and the norm are computed in float32. Raises ValueError,
    naming the argument, for what does not fit.

    With the dot kernel y is theta times one number s a group, and the norm turns s into a soft sign,
    s / sqrt(s^2 + eps / variance of W_z theta): at C = 1024, for features of size 1, nearly 1 or -1 from the
    start in almost every group. Notebook 10 derives and measures it.

    >>> CompactGeneralizedNonLocalBlock(64)(torch.zeros(2, 64, 4, 7, 7)).shape
    torch.Size([2, 64, 4, 7, 7])
    """

    def __init__(
        self,
        in_channels: int,
        inner_channels: int | None = None,
        *,
        ndim: int = 3,
        groups: int = 8,
        kernel: str = "dot",
        order: int = 3,
    ):
        super().__init__()
        check_generalized_block(in_channels, inner_channels, ndim, groups, kernel, order)
        self.in_channels = in_channels
        self.inner_channels = inner_channels = inner_channels or max(in_channels // 2, 1)
        self.ndim = ndim
        self.groups = groups
        self.kernel = kernel
        self.order = order

        conv = _CONV[ndim]
        self.theta = conv(in_channels, inner_channels, 1, bias=False)
        self.phi = conv(in_channels, inner_channels, 1, bias=False)
        self.g = conv(in_channels, inner_channels, 1, bias=False)
        self.w_z = conv(inner_channels, in_channels, 1, groups=groups, bias=False)
        self.norm = nn.GroupNorm(groups, in_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        for layer in (self.theta, self.phi, self.g, self.w_z):
            nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(self.norm.weight)
        nn.init.zeros_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *size) -> (B, C, *size)."""
        check_map(x.shape, self.in_channels, self.ndim, None, channels_last=False)
        theta, phi, g = (layer(x).flatten(2).transpose(1, 2) for layer in (self.theta, self.phi, self.g))
        with no_autocast(x):
            y = compact_generalized(theta, phi, g, groups=self.groups, kernel=self.kernel, order=self.order)
            y = y.transpose(1, 2).unflatten(2, x.shape[2:])
            update = self._project(y)
        return x + update.to(x.dtype)

    def _project(self, y):
        """norm(W_z y), in the dtype of y."""
        if self.w_z.weight.dtype == y.dtype:
            return self.norm(self.w_z(y))
        # Weights in half precision: y may not fit there, norm(W_z y) does.
        update = _CONVOLVE[self.ndim](y, self.w_z.weight.to(y.dtype), groups=self.groups)
        gain, bias = self.norm.weight.to(y.dtype), self.norm.bias.to(y.dtype)
        return functional.group_norm(update, self.groups, gain, bias, self.norm.eps)

    def extra_repr(self) -> str:
        """What print(block) says about the options."""
        names = ("inner_channels", "ndim", "groups", "kernel", "order")
        return ", ".join([str(self.in_channels), *(f"{name}={getattr(self, name)!r}" for name in names)])
