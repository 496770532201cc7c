"""The non-local block as a layer.

Wang, Girshick, Gupta, He: Non-local Neural Networks, CVPR 2018, section 3.3, https://arxiv.org/abs/1711.07971
Initialisation and the order of pooling follow the authors' released code.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from nlutils.instantiations import POOL_WINDOW, check_block, check_map
from nlutils.torch.operations import non_local
from nlutils.torch.operations.concatenation import rectified_sum
from nlutils.torch.operations.precision import at_least_float32, no_autocast

__all__ = ["NonLocalBlock"]

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_MAX_POOL = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}


def _is_plain(layer):
    """A convolution of size 1 as PyTorch has it, and nobody hooked: its weights say all that it does."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if type(layer) not in _CONV.values() or any(getattr(layer, name) for name in hooks):
        return False
    if "forward" in vars(layer):  # replaced on this one layer
        return False
    ones = {*layer.kernel_size, *layer.stride, layer.groups}
    return ones == {1} and layer.bias is not None and not any(layer.padding)


def _matrix(conv):
    """A convolution of size 1 as a matrix (d, C) and a bias (d,)."""
    return conv.weight.flatten(1), conv.bias


def _folded(conv, vector):
    """vector . conv(maps) for every position is a convolution too, with one row only."""
    weight, bias = (at_least_float32(part) for part in _matrix(conv))
    return (vector @ weight)[None], (vector @ bias)[None]


def _product(matrices, maps):
    """Several matrices applied to the same maps (B, C, *size).

    As one product it reads the maps once, and makes their gradient once.
    """
    weight = torch.cat([weight for weight, _ in matrices])
    bias = torch.cat([bias for _, bias in matrices])
    features = torch.baddbmm(bias[:, None], weight.expand(maps.shape[0], -1, -1), maps.flatten(2))
    widths = [len(bias) for _, bias in matrices]
    return [part.unflatten(2, maps.shape[2:]) for part in features.split(widths, 1)]


def _convolve(layers, maps):
    """What each of `layers` returns for the same maps. One that somebody has replaced or hooked is called."""
    if all(map(_is_plain, layers)):
        return _product([_matrix(layer) for layer in layers], maps)
    return [layer(maps) for layer in layers]


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
        self.check_input(x)
        y = self._concatenation(x) if self._folds else self._operation(*self.embed(x))
        (update,) = _convolve([self.w_z], self._maps(y, x))
        return x + self.norm(update)

    def check_input(self, x: Tensor) -> None:
        """Raise ValueError unless `x` is a batch of maps that this block can take."""
        check_map(x.shape, self.in_channels, self.ndim, self.frames_per_group, channels_last=False)

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """theta(x), phi(x), g(x) as maps (B, d, *size), the last two sub-sampled."""
        if self.subsample == "before":
            keys = self._pool(x)
            (theta,), (phi, g) = self._layers([self.theta], x), self._layers([self.phi, self.g], keys)
        else:
            theta, phi, g = self._layers([self.theta, self.phi, self.g], x)
        if self.subsample == "after":
            phi, g = self._pool(phi), self._pool(g)
        return theta, phi, g

    def _layers(self, layers, maps):
        if self.instantiation == "gaussian":  # theta and phi return the map itself
            *identities, g = layers
            return [*(layer(maps) for layer in identities), *_convolve([g], maps)]
        return _convolve(layers, maps)

    @property
    def logit_scale(self) -> float:
        """What multiplies theta_i . phi_j: (width of theta)^(-1/2) with scale=True, else 1."""
        width = self.in_channels if self.instantiation == "gaussian" else self.inner_channels
        return width**-0.5 if self.scale else 1.0

    def _operation(self, theta, phi, g):
        # The Gaussian form without sub-sampling has one tensor for both, which halves some of its work.
        theta_rows = self._sequences(theta)
        phi_rows = theta_rows if phi is theta else self._sequences(phi)
        rows = (theta_rows, phi_rows, self._sequences(g))
        return non_local(*rows, self.instantiation, w_f=self.w_f, scale=self.logit_scale)

    @property
    def _folds(self):
        # w_f . [theta_i, phi_j] needs one number a position, and a maximum over theta or phi none of them.
        if self.instantiation != "concatenation" or self.subsample == "after":
            return False
        return all(map(_is_plain, (self.theta, self.phi, self.g)))

    def _concatenation(self, x):
        """w_f folds into theta and phi: each is one vector C -> 1, so only g is a wide convolution."""
        keys = self._pool(x) if self.subsample == "before" else x
        with no_autocast(x):  # the scores need their digits
            half_theta, half_phi = at_least_float32(self.w_f).chunk(2)
            theta, phi = _folded(self.theta, half_theta), _folded(self.phi, half_phi)
            g = tuple(map(at_least_float32, _matrix(self.g)))
            if keys is x:
                maps = _product([theta, phi, g], at_least_float32(x))
            else:
                maps = _product([theta], at_least_float32(x))
                maps += _product([phi, g], at_least_float32(keys))
        a, b, g = map(self._sequences, maps)
        return rectified_sum(a[:, :, 0], b[:, :, 0], g).to(x.dtype)

    def _pool(self, maps):
        # The window never exceeds the map: a map of 1 x 1 stays as it is.
        window = [min(size, side) for size, side in zip(maps.shape[2:], POOL_WINDOW[self.ndim], strict=True)]
        return _MAX_POOL[self.ndim](maps, window)

    def _sequences(self, maps):
        """(B, C, *size) -> (B', N, C): each of the B' rows holds positions that look at each other."""
        maps = maps.movedim(1, -1)
        if self.attention == "spacetime" and not self.frames_per_group:
            return maps.flatten(1, -2)
        frames = maps.shape[1]
        group = 1 if self.attention == "space" else self.frames_per_group or frames
        if self.attention == "time":
            return maps.movedim(1, 3).unflatten(3, (frames // group, group)).flatten(0, 3)
        return maps.unflatten(1, (frames // group, group)).flatten(0, 1).flatten(1, 3)

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
