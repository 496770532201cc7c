"""The non-local block as a layer.

Wang, Girshick, Gupta, He: Non-local Neural Networks, CVPR 2018, section 3.3, https://arxiv.org/abs/1711.07971
Initialisation and the order of pooling follow the authors' released code.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from nlutils.instantiations import POOL_WINDOW, check_block, check_map
from nlutils.torch.operations import non_local

__all__ = ["NonLocalBlock"]

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_MAX_POOL = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}


class NonLocalBlock(nn.Module):
    """z_i = W_z y_i + x_i, the paper's equation 6, around the non-local operation y of equation 1.

    Takes and returns feature maps (B, C, N), (B, C, H, W) or (B, C, T, H, W) for `ndim` 1, 2, 3.

    in_channels       C
    inner_channels    d, the width of theta, phi and g; None: half of C
    instantiation     "gaussian" (theta and phi are the identity, without weights), "embedded_gaussian",
                      "dot_product" or "concatenation" (with a vector `w_f` of 2d weights)
    subsample         "before": phi and g see the map max-pooled by 2 in height and width (released code);
                      "after": what phi and g return is pooled (the paper's figure 2); None: no pooling
    scale             True: theta_i . phi_j is multiplied by (width of theta)^(-1/2); softmax forms only
    norm              batch normalisation after W_z
    zero_init         start as the identity, z = x: the norm's gain is 0, or W_z is 0 where there is no norm
    attention         "spacetime": each position looks at all; "space": at its own frame; "time": at its own
                      place in all frames. The last two need ndim=3
    frames_per_group  look at groups of so many frames instead of all T; it must divide T. None: all

    Weights start as N(0, 0.01), biases as 0. Raises ValueError, naming the argument, for what does not fit.

    >>> NonLocalBlock(64)(torch.zeros(2, 64, 4, 7, 7)).shape
    torch.Size([2, 64, 4, 7, 7])
    """

    def __init__(
        self,
        in_channels: int,
        inner_channels: int | None = None,
        *,
        ndim: int = 3,
        instantiation: str = "embedded_gaussian",
        subsample: str | None = None,
        scale: bool = False,
        norm: bool = True,
        zero_init: bool = True,
        attention: str = "spacetime",
        frames_per_group: int | None = None,
    ):
        super().__init__()
        check_block(
            in_channels=in_channels,
            inner_channels=inner_channels,
            ndim=ndim,
            instantiation=instantiation,
            subsample=subsample,
            scale=scale,
            norm=norm,
            zero_init=zero_init,
            attention=attention,
            frames_per_group=frames_per_group,
        )
        self.in_channels = in_channels
        self.inner_channels = inner_channels = inner_channels or max(in_channels // 2, 1)
        self.ndim = ndim
        self.instantiation = instantiation
        self.subsample = subsample
        self.scale = scale
        self.zero_init = zero_init
        self.attention = attention
        self.frames_per_group = frames_per_group

        conv = _CONV[ndim]
        embedded = instantiation != "gaussian"
        self.theta = conv(in_channels, inner_channels, 1) if embedded else nn.Identity()
        self.phi = conv(in_channels, inner_channels, 1) if embedded else nn.Identity()
        self.g = conv(in_channels, inner_channels, 1)
        self.w_f = nn.Parameter(torch.empty(2 * inner_channels)) if instantiation == "concatenation" else None
        self.w_z = conv(inner_channels, in_channels, 1)
        self.norm = _NORM[ndim](in_channels) if norm else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        for layer in (self.theta, self.phi, self.g, self.w_z):
            if not isinstance(layer, nn.Identity):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)
        if self.w_f is not None:
            nn.init.normal_(self.w_f, std=0.01)
        has_norm = not isinstance(self.norm, nn.Identity)
        if has_norm:
            self.norm.reset_parameters()
        if self.zero_init:
            nn.init.zeros_(self.norm.weight if has_norm else self.w_z.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *size) -> (B, C, *size)."""
        check_map(x.shape, self.in_channels, self.ndim, self.frames_per_group, channels_last=False)
        theta, phi, g = (self._sequences(features) for features in self._embed(x))
        y = non_local(theta, phi, g, self.instantiation, w_f=self.w_f, scale=self._factor(theta))
        return x + self.norm(self.w_z(self._maps(y, x)))

    def _embed(self, x):
        """theta(x), phi(x), g(x) as maps, the last two sub-sampled."""
        keys = self._pool(x) if self.subsample == "before" else x
        theta, phi, g = self.theta(x), self.phi(keys), self.g(keys)
        if self.subsample == "after":
            phi, g = self._pool(phi), self._pool(g)
        return theta, phi, g

    def _pool(self, maps):
        # The window never exceeds the map: a map of 1 x 1 stays as it is.
        window = [min(size, side) for size, side in zip(maps.shape[2:], POOL_WINDOW[self.ndim], strict=True)]
        return _MAX_POOL[self.ndim](maps, window)

    def _factor(self, theta):
        return theta.shape[2] ** -0.5 if self.scale else 1.0

    def _sequences(self, maps):
        """(B, C, *size) -> (B', N, C): each of the B' rows holds positions that look at each other."""
        maps = maps.movedim(1, -1)
        if self.attention == "time":
            maps = maps.movedim(1, 3)
            batch, height, width, frames, channels = maps.shape
            group = self.frames_per_group or frames
            return maps.reshape(batch * height * width * (frames // group), group, channels)
        groups = 1
        if self.attention == "space":
            groups = maps.shape[1]
        elif self.frames_per_group:
            groups = maps.shape[1] // self.frames_per_group
        rows = maps.flatten(1, -2)
        return rows.reshape(rows.shape[0] * groups, rows.shape[1] // groups, rows.shape[2])

    def _maps(self, y, x):
        """The way back: (B', N, c) -> (B, c, *size), with the size of x."""
        batch, size = x.shape[0], x.shape[2:]
        if self.attention == "time":
            frames, height, width = size
            return y.reshape(batch, height, width, frames, y.shape[2]).permute(0, 4, 3, 1, 2)
        return y.reshape(batch, *size, y.shape[2]).movedim(-1, 1)

    def extra_repr(self) -> str:
        """What print(block) says about the options."""
        names = (
            "inner_channels",
            "ndim",
            "instantiation",
            "subsample",
            "scale",
            "zero_init",
            "attention",
            "frames_per_group",
        )
        return ", ".join([str(self.in_channels), *(f"{name}={getattr(self, name)!r}" for name in names)])
