"""3D convolutional networks: C3D, its variant with batch normalisation, and the network of 2010.

Tran, Bourdev, Fergus, Torresani, Paluri: Learning Spatiotemporal Features with 3D Convolutional Networks,
ICCV 2015, https://arxiv.org/abs/1412.0767, and its released code, facebookarchive/C3D (Caffe). Carreira and
Zisserman: Quo Vadis, Action Recognition?, CVPR 2017, section 2.2. Ji, Xu, Yang, Yu: 3D Convolutional Neural
Networks for Human Action Recognition, ICML 2010.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from nlutils.architectures.sizes import clip_size
from nlutils.arguments import one_of, positive_integer, probability
from nlutils.torch.models.common import Expects, VideoClassifier, check_clip, check_input, check_pair

__all__ = ["C3D", "C3DBN", "CHANNELS_2010", "Ji2010", "hardwired"]

LAYOUTS = ("paper", "mmaction2")
CLIP = 16, 112, 112  # T x H x W of C3D as published
WIDTH = 64  # channels of conv1a as published


def _by(shape):
    return " x ".join(map(str, shape))


class C3D(VideoClassifier):
    """(B, C, T, H, W) -> (B, num_classes): the network of Tran et al.

    Eight 3x3x3 convolutions with stride 1 and padding 1, five max poolings (pool1 1x2x2, the others 2x2x2),
    fc6 and fc7; ReLU behind every convolution, fc6 and fc7; no normalisation. With the defaults pool5 leaves
    512 x 1 x 4 x 4 = 8,192 numbers to fc6. 78,409,573 parameters with 101 classes, 79,991,015 with 487; 38.55
    billion multiply-adds.

    input         "rgb", "differences" or "flow"
    width         channels of conv1a; conv2a has 2, conv3a and b 4, the others 8 times as many
    fc            outputs of fc6 and of fc7
    frames, size  T and (H, W) of the clips, from which the number of fc6's inputs follows. A clip of another
                  size passes where the poolings leave as much of it
    layout        "paper": poolings keep a last, incomplete window, as in the released code: pool5 makes
                  4 x 4 of 7 x 7. "mmaction2", for weights that were trained so: they drop it, and pool5 is
                  padded by 1 in space, which makes 4 x 4 of 7 x 7, too, but of other windows
    dropout       behind fc6 and behind fc7

    Kernels start as in He et al. 2015, biases as 0, the last layer as N(0, 0.01). (The released training
    files have Gaussians of 0.01 and 0.005 instead, whatever the width, and most biases start as 1.)

    Raises ValueError for an option that is not known, for sizes of which the poolings leave nothing
    ("mmaction2" only), and in `forward` for a clip that fc6 was not built for.

    >>> C3D(5, width=4, fc=16, frames=8, size=(32, 32))(torch.zeros(2, 3, 8, 32, 32)).shape
    torch.Size([2, 5])
    """

    POOL1 = (1, 2, 2)

    def __init__(
        self,
        num_classes,
        *,
        input="rgb",
        width=WIDTH,
        fc=4096,
        frames=16,
        size=(112, 112),
        layout="paper",
        dropout=0.5,
    ):
        super().__init__()
        self.input = input
        self.layout = one_of("layout", layout, LAYOUTS)
        channels, self._clip = check_input(input), clip_size(frames, size)
        if (input, width, self._clip) == ("rgb", WIDTH, CLIP):
            self.expects = self._published()

        w = positive_integer("width", width)
        self.conv1a = self._conv(channels, w)
        self.conv2a = self._conv(w, 2 * w)
        self.conv3a = self._conv(2 * w, 4 * w)
        self.conv3b = self._conv(4 * w, 4 * w)
        self.conv4a = self._conv(4 * w, 8 * w)
        self.conv4b = self._conv(8 * w, 8 * w)
        self.conv5a = self._conv(8 * w, 8 * w)
        self.conv5b = self._conv(8 * w, 8 * w)
        self.pool1, self.pool2, self.pool3, self.pool4, self.pool5 = self._pools()

        self.pooled = T, H, W = self._after_pool5(self._clip)
        if 0 in self.pooled:
            raise ValueError(
                f"frames={frames}, size={self._clip[1:]}: the poolings leave {_by(self.pooled)}; give "
                f"16 x 16 x 16 or more"
            )
        self.fc6 = self._linear(8 * w * T * H * W, positive_integer("fc", fc))
        self.fc7 = self._linear(fc, fc)
        self.dropout = nn.Dropout(probability("dropout", dropout))
        self.classifier = nn.Linear(fc, num_classes)
        self._initialise()

    def _conv(self, inputs, outputs):
        return nn.Conv3d(inputs, outputs, 3, padding=1)

    def _linear(self, inputs, outputs):
        return nn.Linear(inputs, outputs)

    def _pools(self):
        windows, paddings = [self.POOL1] + 4 * [(2, 2, 2)], 5 * [(0, 0, 0)]
        if self.layout == "mmaction2":
            paddings[-1] = (0, 1, 1)
        return [
            nn.MaxPool3d(window, padding=padding, ceil_mode=self.layout == "paper")
            for window, padding in zip(windows, paddings, strict=True)
        ]

    def _after_pool5(self, clip):
        """(T, H, W) -> what the five poolings leave of it; with a 0 in it, nothing."""
        for pool in (self.pool1, self.pool2, self.pool3, self.pool4, self.pool5):
            padded = [length + 2 * padding for length, padding in zip(clip, pool.padding, strict=True)]
            if pool.ceil_mode:
                padded = [length + step - 1 for length, step in zip(padded, pool.stride, strict=True)]
            clip = tuple(length // step for length, step in zip(padded, pool.stride, strict=True))
            if 0 in clip:
                break
        return clip

    def _initialise(self):
        for layer in self.modules():
            if isinstance(layer, nn.Conv3d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.normal_(self.classifier.weight, std=0.01)

    def _published(self):
        # Values from 0 to 255 go in, hence the std.
        facts = {"mean": (104 / 255, 117 / 255, 128 / 255), "std": (1 / 255,) * 3}
        if self.layout == "mmaction2":
            return Expects(16, (112, 112), **facts, source="mmaction2, configs/recognition/c3d")
        source = (
            "facebookarchive/C3D, c3d_finetuning: frames of 128 x 171, cropped. It subtracts a mean volume, "
            "a file of its own; the mean here, mmaction2's, stands in for it"
        )
        return Expects(16, (112, 112), **facts, colour="BGR", source=source)

    def clip_shapes(self):
        """The clip that fc6 was built for."""
        return (self._clip,)

    def features(self, x):
        """What pool5 returns: (B, C, T, H, W) -> (B, 8 width, T', H', W')."""
        x = self.pool1(F.relu(self.conv1a(x)))
        x = self.pool2(F.relu(self.conv2a(x)))
        x = F.relu(self.conv3a(x))
        x = self.pool3(F.relu(self.conv3b(x)))
        x = F.relu(self.conv4a(x))
        x = self.pool4(F.relu(self.conv4b(x)))
        x = F.relu(self.conv5a(x))
        return self.pool5(F.relu(self.conv5b(x)))

    def forward(self, x):
        clip = tuple(check_clip(x, self.input).shape[2:])
        pooled = self._after_pool5(clip)
        if pooled != self.pooled:
            raise ValueError(
                f"a clip of {_by(clip)} is {_by(pooled)} after the poolings, and fc6 takes "
                f"{_by(self.pooled)}; build the network with frames={clip[0]}, size={clip[1:]}"
            )
        x = self.features(x).flatten(1)
        x = self.dropout(F.relu(self.fc6(x)))
        x = self.dropout(F.relu(self.fc7(x)))
        return self.classifier(x)


class C3DBN(C3D):
    """The "3D-ConvNet" of Carreira and Zisserman, section 2.2: C3D with two changes; options as there.

    Batch normalisation stands behind all convolutions, fc6 and fc7, and pool1 has stride 2 in time, too. The
    16 frames are then 8, 4, 2 and 1 before pool5, which leaves the one as it is: fc6 has C3D's 8,192 inputs.
    79,645,520 parameters with 400 classes (the paper's Table 1: 79 M), 19.8 billion multiply-adds.

    Not in the paper, chosen here: pool1's window is as long as its stride; layers in front of a normalisation
    have no bias of their own; dropout as in C3D.
    """

    POOL1 = (2, 2, 2)

    def __init__(
        self, num_classes, *, input="rgb", width=WIDTH, fc=4096, frames=16, size=(112, 112), dropout=0.5
    ):
        super().__init__(
            num_classes, input=input, width=width, fc=fc, frames=frames, size=size, dropout=dropout
        )

    def _conv(self, inputs, outputs):
        conv = nn.Conv3d(inputs, outputs, 3, padding=1, bias=False)
        return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm3d(outputs)))

    def _linear(self, inputs, outputs):
        linear = nn.Linear(inputs, outputs, bias=False)
        return nn.Sequential(OrderedDict(linear=linear, norm=nn.BatchNorm1d(outputs)))

    def _published(self):
        half = (0.5, 0.5, 0.5)
        source = (
            "Carreira and Zisserman, CVPR 2017, Table 1 (25 frames a second); values as their released I3D"
        )
        return Expects(16, (112, 112), mean=half, std=half, source=source)


# The network of 2010

CHANNELS_2010 = ("gray", "gradient_x", "gradient_y", "flow_x", "flow_y")
LEAST_2010 = 6, 24, 22  # the smallest T x H x W of which C6 gets a map


def hardwired(rgb, flow):
    """The first layer of Ji et al. 2010: computed from a clip, not trained.

    rgb (B, 3, T, H, W) and flow (B, 2, T - 1, H, W), from each frame to the next -> the five channels by
    name: the grey frames and their derivatives along x and along y, (B, 1, T, H, W) each, and the components
    of the flow along x and y, (B, 1, T - 1, H, W) each. For T = 7 these are the paper's 33 maps.

    Not known to us from the paper, chosen here: grey is 0.299 R + 0.587 G + 0.114 B; derivatives are central
    differences, one-sided at the border. Any method's flow will do.
    """
    red, green, blue = rgb.split(1, dim=1)
    gray = 0.299 * red + 0.587 * green + 0.114 * blue
    gradient_x, gradient_y = torch.gradient(gray, dim=(4, 3))
    return dict(zip(CHANNELS_2010, (gray, gradient_x, gradient_y, flow[:, :1], flow[:, 1:]), strict=True))


class _Subsample(nn.Module):
    """The mean over k x k windows of each map, times a trained scalar, plus a trained bias: two a map."""

    def __init__(self, kernels, steps, window):
        super().__init__()
        self.window = (1, window, window)
        self.scale = nn.Parameter(torch.ones(kernels, steps, 1, 1))
        self.bias = nn.Parameter(torch.zeros(kernels, steps, 1, 1))

    def forward(self, x):
        return F.avg_pool3d(x, self.window) * self.scale + self.bias


class _FullConnection(nn.Module):
    """Every feature sees every map whole: (B, maps, H, W) -> (B, features).

    A bias a *connection*, as the published count has it. Only their sum over the maps has an effect: the
    biases of one feature all get the same gradient, so in gradient descent they act as one bias that learns
    `maps` times as fast.
    """

    def __init__(self, maps, size, features):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features, maps, *size))
        self.bias = nn.Parameter(torch.zeros(features, maps))
        nn.init.xavier_uniform_(self.weight.flatten(1))

    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias.sum(dim=1)).flatten(1)


class Ji2010(VideoClassifier):
    """((B, 3, T, H, W), (B, 2, T - 1, H, W)) -> (B, num_classes): the 3D CNN of Ji et al. 2010.

    It takes frames and their optical flow, a field from each frame to the next; of T fields the last, which
    leads out of the clip, is left aside. With 7 frames of 60 x 40 and 3 classes:

        layer  what                                          maps    of       parameters
        H1     `hardwired`: grey, its gradients, flow        33      60 x 40           0
        C2     2 kernels of 7x7x3 a channel                  2 x 23  54 x 34       1,480
        S3     2x2, a scalar and a bias a map                2 x 23  27 x 17          92
        C4     3 kernels of 7x6x3 a channel and set          6 x 13  21 x 12       3,810
        S5     3x3, a scalar and a bias a map                6 x 13  7 x 4           156
        C6     7x4, each of 128 features sees all 78 maps    128     1 x 1       289,536
               linear, without bias                          3                       384

    Together 295,458. Kernels are written height x width x time. A kernel is the same at all times of its
    channel; channels do not mix before C6. The total holds with one bias a kernel in C2 and C4, one a
    *connection* in C6 (128 x 78) and none at the end. Chosen here, as in LeNet-5: S3 and S5 take a mean,
    times the scalar, plus the bias; tanh stands behind every layer but H1 and the last.

    sets, kernels  of C2 a channel, and of C4 a channel and set
    features       outputs of C6
    frames, size   T and (H, W) of the clips, from which C6's kernels follow; rows and columns that fill no
                   window of S3 or S5 are dropped

    Raises ValueError for sizes that leave nothing for C6, and in `forward` for clips of another size.

    >>> clip, flow = torch.zeros(2, 3, 7, 60, 40), torch.zeros(2, 2, 6, 60, 40)
    >>> Ji2010(3)((clip, flow)).shape
    torch.Size([2, 3])
    """

    input = ("rgb", "flow")

    def __init__(self, num_classes, *, sets=2, kernels=3, features=128, frames=7, size=(60, 40)):
        super().__init__()
        self._clip = T, H, W = clip_size(frames, size)
        if any(length < least for length, least in zip(self._clip, LEAST_2010, strict=True)):
            raise ValueError(
                f"frames={T}, size={(H, W)} leave nothing for C6; give frames x height x width of "
                f"{_by(LEAST_2010)} or more"
            )
        if (sets, kernels, self._clip) == (2, 3, (7, 60, 40)):
            source = "Ji et al., ICML 2010; not known to us: stride, values"
            flow = Expects(6, (60, 40), mean=(0.0, 0.0), std=(1.0, 1.0), colour="", source=source)
            self.expects = Expects(7, (60, 40), source=source), flow

        sets, both = positive_integer("sets", sets), sets * positive_integer("kernels", kernels)
        steps = {name: T - name.startswith("flow") for name in CHANNELS_2010}
        self.c2 = nn.ModuleDict({name: nn.Conv3d(1, sets, (3, 7, 7)) for name in steps})
        self.s3 = nn.ModuleDict({name: _Subsample(sets, count - 2, 2) for name, count in steps.items()})
        self.c4 = nn.ModuleDict({name: nn.Conv3d(sets, both, (3, 7, 6), groups=sets) for name in steps})
        self.s5 = nn.ModuleDict({name: _Subsample(both, count - 4, 3) for name, count in steps.items()})
        maps = both * sum(count - 4 for count in steps.values())
        left = ((H - 6) // 2 - 6) // 3, ((W - 6) // 2 - 5) // 3
        self.c6 = _FullConnection(maps, left, positive_integer("features", features))
        self.classifier = nn.Linear(features, num_classes, bias=False)

    def clip_shapes(self):
        """The clip that C6 was built for, and a field of flow less than it has frames."""
        T, H, W = self._clip
        return (T, H, W), (T - 1, H, W)

    def forward(self, x):
        rgb, flow = check_pair(x)
        T, H, W = self._clip
        if rgb.shape[1:] != (3, T, H, W) or flow.shape[1:] not in ((2, T - 1, H, W), (2, T, H, W)):
            raise ValueError(
                f"rgb {tuple(rgb.shape)} and flow {tuple(flow.shape)} must be (B, 3, {T}, {H}, {W}) and "
                f"(B, 2, {T - 1}, {H}, {W}); for other clips build the network with their frames and size"
            )
        maps = []
        for name, channel in hardwired(rgb, flow[:, :, : T - 1]).items():
            for layer in (self.c2, self.s3, self.c4, self.s5):
                channel = torch.tanh(layer[name](channel))
            maps.append(channel.flatten(1, 2))  # each kernel at each time is a map
        return self.classifier(torch.tanh(self.c6(torch.cat(maps, dim=1))))
