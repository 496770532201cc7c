"""The Visual Interaction Network: from six frames to where the objects will be.

Watters, Tacchetti, Weber, Pascanu, Battaglia, Zoran, "Visual Interaction Networks", NIPS 2017. A visual
encoder turns each three frames in a row into a state code: N vectors, one an object. Interaction cores
compute the next code from the codes of 1, 2 and 4 frames before, again and again; a linear decoder reads
(x, y, vx, vy) from each vector.

**The core is equation 1.** What object i learns of the others is, with a learned R,

    r(i) = sum over j != i of R([s_i, s_j])

Equation 1 of Wang et al., "Non-local Neural Networks" (CVPR 2018), is

    y(i) = 1 / C * sum over j of f(x_i, x_j) g(x_j)

Put C = 1, leave j = i out, and let R([s_i, s_j]) stand for the product f(x_i, x_j) g(x_j): a non-local
operation over objects in place of pixels. Its pairwise function is learned, in the *concatenation* form:
f = ReLU(w_f^T [theta(x_i), phi(x_j)]) is one neuron of the first layer of R, which has D of them. Two
differences remain. The pair yields a vector that further layers make, not a number times g(x_j); and
nothing is divided by the number of objects, so that two springs can pull twice as hard as one.

The sizes are the published ones as far as we know them. Not known to us from the paper, and so our choice,
as in a public reimplementation where it has one: the range of the coordinate maps; two layers in a triplet's
MLP; self-dynamics and relations are added before the affector; the aggregator's widths, 192-64-64. Our choice
alone: how weights start, the weights of the terms of the loss, and the code of a given state.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from nlutils.arguments import one_of, positive_integer
from nlutils.torch.models.common import Expects, frames_as_batch

__all__ = ["Dynamics", "InteractionCore", "VisualEncoder", "VisualInteractionNetwork", "mlp"]

NUMBERS = 4  # x, y, vx, vy


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers from width to width, a ReLU between two of them and none at the end."""
    layers = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class InteractionCore(nn.Module):
    """One step of the objects' code, s (B, N, D) -> (B, N, D), by the same weights for all objects and pairs.

        update(i) = self_dynamics(s_i) + sum over j != i of relation([s_i, s_j])
        result(i) = output([s_i, affector(update(i))])

    With D = 64 the MLPs have the widths of a public reimplementation: self-dynamics 64-64-64, relation
    128-64-64-64, affector 64-64-64-64, output 128-64-64; together 49,792 parameters. `relations=False` leaves
    the sum and its MLP out: a control in which no object learns of another.
    """

    def __init__(self, width: int = 64, *, relations: bool = True):
        super().__init__()
        D = positive_integer("width", width)
        self.self_dynamics = mlp(D, D, D)
        self.relation = mlp(2 * D, D, D, D) if one_of("relations", relations, (True, False)) else None
        self.affector = mlp(D, D, D, D)
        self.output = mlp(2 * D, D, D)

    def forward(self, s: torch.Tensor) -> torch.Tensor:
        update = self.self_dynamics(s)
        if self.relation is not None:
            update = update + self.effects(s).sum(dim=2)
        return self.output(torch.cat([s, self.affector(update)], dim=-1))

    def effects(self, s: torch.Tensor) -> torch.Tensor:
        """relation([s_i, s_j]) for every i and, in order, every j != i: (B, N, D) -> (B, N, N - 1, D)."""
        if self.relation is None:
            raise ValueError(
                "relations=False: this core has no relations between objects; build it with True"
            )
        N = s.shape[1]
        column = torch.arange(N - 1, device=s.device)
        others = column + (column >= torch.arange(N, device=s.device)[:, None])  # row i: every j but i
        first, *rest = self.relation
        # W [s_i, s_j] = W_i s_i + W_j s_j: the first layer runs N times, not N (N - 1) times.
        W_i, W_j = first.weight.chunk(2, dim=1)
        of_i, of_j = F.linear(s, W_i, first.bias), F.linear(s, W_j)
        pairs = of_i.unsqueeze(2) + of_j[:, others]
        for layer in rest:
            pairs = layer(pairs)
        return pairs


class Dynamics(nn.Module):
    """The next code from earlier ones: a core for each temporal offset, and an aggregator.

    The core of offset k sees S_{t+1-k} and proposes S_{t+1}: offsets 1, 2, 4 see S_t, S_{t-1}, S_{t-3}. The
    cores share no weights. The proposals side by side, 192 numbers an object, go through the aggregator, an
    MLP 192-64-64.
    """

    def __init__(self, width: int = 64, *, offsets=(1, 2, 4), relations: bool = True):
        super().__init__()
        self.offsets = tuple(positive_integer("offsets", offset) for offset in offsets)
        if not self.offsets or sorted(set(self.offsets)) != list(self.offsets):
            raise ValueError(
                f"offsets={offsets!r} must be numbers of frames, each larger than the one before"
            )
        self.cores = nn.ModuleList(InteractionCore(width, relations=relations) for _ in self.offsets)
        self.aggregator = mlp(len(self.offsets) * width, width, width)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (B, K, N, D), newest last, K the largest offset or more -> the next one, (B, N, D)."""
        steps = zip(self.offsets, self.cores, strict=True)
        return self.aggregator(torch.cat([core(codes[:, -offset]) for offset, core in steps], dim=-1))


class VisualEncoder(nn.Module):
    """Frames (B, C, T, H, W) -> codes (B, T - 2, N, D), one for each three frames in a row.

    Two frames in a row, 2 C channels, go through two branches: 10 x 10 convolutions to 4 channels, twice, and
    3 x 3 to 16, twice; their 20 channels through 3 x 3 to 16, twice. Two maps, of x and of y, are added. Five
    times a 3 x 3 convolution, to 16, 16, 16, 32, 32, and 2 x 2 max pooling leave one place. A ReLU follows
    each convolution. A linear layer makes N D numbers of the 32. The two pairs in three frames, 2 D numbers
    an object, go through an MLP 128-64-64, the same for all objects.

    With C = 3, N = 3, D = 64: 33,560 + 6,336 + 12,416 parameters. `channels` is the 16, and the others follow
    it. The maps go from -1 at the left, or upper, edge to 1. Frames must be 32 to 63 pixels high and wide.
    The convolutions start as in He et al., ICCV 2015: with PyTorch's smaller weights training stands still
    for its first hundreds of steps.
    """

    def __init__(self, num_objects: int, width: int = 64, *, in_channels: int = 3, channels: int = 16):
        super().__init__()
        self.num_objects, self.width = positive_integer("num_objects", num_objects), width
        self.in_channels = positive_integer("in_channels", in_channels)
        if positive_integer("channels", channels) % 4:
            raise ValueError(f"channels={channels!r} must be a multiple of 4: one branch has a quarter of it")
        c, pair = channels, 2 * in_channels
        self.large = nn.Sequential(*_conv(pair, c // 4, 10), *_conv(c // 4, c // 4, 10))
        self.small = nn.Sequential(*_conv(pair, c, 3), *_conv(c, c, 3))
        self.joint = nn.Sequential(*_conv(c // 4 + c, c, 3), *_conv(c, c, 3))
        layers = []
        for before, after in pairwise((c + 2, c, c, c, 2 * c, 2 * c)):
            layers += [*_conv(before, after, 3), nn.MaxPool2d(2)]
        self.pooled = nn.Sequential(*layers)
        self.pair_code = nn.Linear(2 * c, num_objects * width)
        self.triplet = mlp(2 * width, width, width)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        self._check(tuple(clips.shape))
        pairs = torch.cat([clips[:, :, :-1], clips[:, :, 1:]], dim=1)
        codes = self._pair_codes(frames_as_batch(pairs)).unflatten(0, (clips.shape[0], clips.shape[2] - 1))
        return self.triplet(torch.cat([codes[:, :-1], codes[:, 1:]], dim=-1))

    def _pair_codes(self, pairs):
        """(P, 2 C, H, W) -> (P, N, D)."""
        x = self.joint(torch.cat([self.large(pairs), self.small(pairs)], dim=1))
        x = self.pooled(torch.cat([x, _coordinates(x)], dim=1))
        return self.pair_code(x.flatten(1)).unflatten(1, (self.num_objects, self.width))

    def _check(self, shape):
        if len(shape) != 5 or shape[1] != self.in_channels or shape[2] < 3:
            allowed = f"(B, {self.in_channels}, T, H, W) with T 3 or more"
            raise ValueError(f"the clips have shape {shape}; they must be {allowed}")
        if not all(32 <= side < 64 for side in shape[3:]):
            sides = f"{shape[3]} x {shape[4]}"
            raise ValueError(f"the frames are {sides} pixels; use 32 to 63, of which five poolings leave one")


EXPECTS_RGB = Expects(
    frames=6,
    size=(32, 32),
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    source="Watters et al. 2017: six RGB frames of 32 x 32 pixels; mean and std are our choice",
)


class VisualInteractionNetwork(nn.Module):
    """Clips or states of `num_objects` objects -> their states (x, y, vx, vy) in the next frames.

    It is no classifier: `create_model` gives it the number of objects for `num_classes`. `input` is "rgb",
    clips (B, 3, T, 32, 32), which give T - 2 codes (T = 6 as published); or "states", (B, T, N, 4): one
    linear layer, 4 to D, in place of the visual encoder. The dynamics need as many codes as the largest of
    `offsets`. Choose the unit of time so that places and velocities are numbers of one size: where
    velocities are larger or much smaller, the loss sees only one of the two.

    `width` is D, the numbers of an object in a code, and the width of all MLPs; `channels` the 16 of the
    visual encoder; `relations=False` the control in which no object learns of another. With the default sizes
    and 3 objects it has 218,460 parameters.
    """

    expects = None

    def __init__(
        self,
        num_objects: int,
        *,
        input: str = "rgb",
        width: int = 64,
        channels: int = 16,
        offsets=(1, 2, 4),
        relations: bool = True,
    ):
        super().__init__()
        self.input = one_of("input", input, ("rgb", "states"))
        if input == "rgb" and width == 64 and tuple(offsets) == (1, 2, 4):
            self.expects = EXPECTS_RGB
        self.num_objects = positive_integer("num_objects", num_objects)
        self.dynamics = Dynamics(width, offsets=offsets, relations=relations)
        if input == "rgb":
            self.encoder = VisualEncoder(num_objects, width, channels=channels)
        else:
            self.encoder = nn.Linear(NUMBERS, width)
        self.decoder = nn.Linear(width, NUMBERS)

    def forward(self, x: torch.Tensor, steps: int = 8) -> torch.Tensor:
        """What `rollout` gives."""
        return self.rollout(x, steps)

    def rollout(self, x: torch.Tensor, steps: int) -> torch.Tensor:
        """The states in the `steps` frames after the last one of `x`: (B, steps, N, 4)."""
        return self.decoder(self._continued(self.codes(x), steps))

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """The codes (B, K, N, D) of clips, K = T - 2 (the first is frame 2's), or of states, K = T."""
        if self.input == "states" and (x.ndim != 4 or x.shape[2:] != (self.num_objects, NUMBERS)):
            allowed = f"(B, T, {self.num_objects}, 4)"
            raise ValueError(f"the states have shape {tuple(x.shape)}; they must be {allowed}")
        codes = self.encoder(x)
        furthest = max(self.dynamics.offsets)
        if codes.shape[1] < furthest:
            raise ValueError(
                f"x gives {codes.shape[1]} codes, and the core of offset {furthest} needs {furthest}; "
                f"give {furthest - codes.shape[1]} more frames, or smaller offsets"
            )
        return codes

    def loss(self, x: torch.Tensor, states: torch.Tensor, *, discount: float = 1.0) -> torch.Tensor:
        """Mean squared error of what is predicted, plus that of what the codes say of the frames they are of.

        `states` (B, K + steps, N, 4) are the true states: first those of the K codes' own frames, then those
        of the frames to predict, 8 as published. Step k = 1, 2 ... counts `discount` ** k. The second term is
        the encoder's auxiliary loss. Its weight, 1, and the discount, none by default, are our choice.
        """
        codes = self.codes(x)
        K = codes.shape[1]
        steps = states.shape[1] - K
        if steps < 1:
            raise ValueError(f"states has {states.shape[1]} frames, {K} of them for x; give {K + 1} or more")
        needed = (len(x), K + steps, self.num_objects, NUMBERS)
        if states.shape != needed:
            raise ValueError(f"states has shape {tuple(states.shape)}; x needs {needed}")
        encoded = F.mse_loss(self.decoder(codes), states[:, :K])
        squares = (self.decoder(self._continued(codes, steps)) - states[:, K:]) ** 2
        weights = discount ** torch.arange(1, steps + 1, device=squares.device, dtype=squares.dtype)
        return encoded + (weights * squares.mean(dim=(0, 2, 3))).mean()

    def _continued(self, codes, steps):
        """The `steps` codes that follow, each predicted from those before it: (B, steps, N, D)."""
        for _ in range(positive_integer("steps", steps)):
            codes = torch.cat([codes, self.dynamics(codes).unsqueeze(1)], dim=1)
        return codes[:, -steps:]


def _conv(before, after, size):
    """A convolution that keeps height and width, and a ReLU. Even kernels reach further down and right."""
    left, right = (size - 1) // 2, size // 2
    return nn.ZeroPad2d((left, right, left, right)), nn.Conv2d(before, after, size), nn.ReLU()


def _coordinates(x):
    """Maps of x and of y from -1 to 1, (P, 2, H, W), for features (P, C, H, W)."""
    P, _, H, W = x.shape
    along_x = torch.linspace(-1, 1, W, device=x.device, dtype=x.dtype).expand(P, 1, H, W)
    along_y = torch.linspace(-1, 1, H, device=x.device, dtype=x.dtype)[:, None].expand(P, 1, H, W)
    return torch.cat([along_x, along_y], dim=1)
