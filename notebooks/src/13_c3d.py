# %% [markdown]
# # 13 · Convolution in space and time: the network of 2010, C3D, inflation
#
# After this notebook you can
#
# - compute a 3D convolution as loops and as one matrix product, and show that `nn.Conv3d` agrees
# - predict which network notices that frames were reversed, shuffled or stopped
# - derive every line of two published parameter counts, one of them with a surprise
# - train a small C3D, measure what it needs of time, and see what training added to its first kernels
# - inflate a 2D kernel, and name the frames at which the 3D network leaves the 2D network's path
#
# | | |
# |:--|:--|
# | What you need | notebook 11; `nn.Conv2d`, max pooling, batch normalisation |
# | Your time | 75 minutes |
# | Machine time | 40 seconds |
# | Framework | PyTorch |

# %% tags=["parameters"]
import os

profile = os.environ.get("NLUTILS_PROFILE", "quick")

# %%
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from nlutils import plots, study
from nlutils.course import check, difference, settings
from nlutils.video import procedural

settings = settings(
    profile,
    quick=dict(clips=300, epochs=10, device="cpu"),
    full=dict(clips=1200, epochs=24),
    gpu=dict(clips=1200, epochs=24, device="cuda"),
)
plots.style()
torch.set_printoptions(precision=3, sci_mode=False)

# %% [markdown]
# ## 1 · One number, then all of them
#
# Take a clip of 5 frames of 6 × 7 pixels with 2 channels $c$, all small whole numbers, and 4 kernels $d$, each of 3 × 3 × 3 positions $(\tau, i, j)$ in
# both channels. A 3D convolution slides each kernel over rows, columns *and frames*:
#
# $$y_d(t, h, w) = b_d + \sum_{c} \sum_{\tau=0}^{2} \sum_{i=0}^{2} \sum_{j=0}^{2} w_{dc}(\tau, i, j)\; x_c(t + \tau,\, h + i,\, w + j)$$

# %%
rng = np.random.default_rng(13)


def whole(*shape):
    return torch.tensor(rng.integers(-3, 4, shape)).double()


C, T, H, W, D = 2, 5, 6, 7, 4
x, weight, bias = whole(C, T, H, W), whole(D, C, 3, 3, 3), whole(D)

d, t, h, w = 0, 1, 2, 3
box = x[:, t : t + 3, h : h + 3, w : w + 3]
assert box.shape == weight[d].shape == (C, 3, 3, 3)
one = bias[d] + (weight[d] * box).sum()
print(f"y_0(1, 2, 3) = {one:.0f}, a sum over {box.numel()} products and a bias")

# %% [markdown] tags=["predict"]
# Now for every $d, t, h, w$ at which the kernel fits into the clip. Which shape does $y$ get? And how many numbers must be learned
# for these 4 kernels?


# %%
def conv3d_loops(x, weight, bias):
    """(C, T, H, W), (D, C, kT, kH, kW), (D,) -> (D, T - kT + 1, H - kH + 1, W - kW + 1)."""
    kT, kH, kW = weight.shape[2:]
    T, H, W = (n - k + 1 for n, k in zip(x.shape[1:], (kT, kH, kW), strict=True))
    y = torch.zeros(len(weight), T, H, W, dtype=x.dtype)
    for d, t, h, w in np.ndindex(*y.shape):
        box = x[:, t : t + kT, h : h + kH, w : w + kW]
        y[d, t, h, w] = bias[d] + (weight[d] * box).sum()
    return y


y = conv3d_loops(x, weight, bias)
print(f"y is {tuple(y.shape)}; to learn: {weight.numel() + bias.numel()} numbers")
assert y.shape == (D, T - 2, H - 2, W - 2) == (4, 3, 4, 5)
assert y[0, 1, 2, 3] == one

# %% [markdown] tags=["explain"]
# Each axis loses 2, *time included*: 5 frames become 3, and each of the 3 has seen 3 frames. To learn: $4\,(2 \cdot 27 + 1) = 220$, and no
# $T$, $H$ or $W$ in it.
#
# The same without loops: `unfold` lays out every box, and what remains is one matrix product.

# %%
boxes = x.unfold(1, 3, 1).unfold(2, 3, 1).unfold(3, 3, 1)
assert boxes.shape == (C, 3, 4, 5, 3, 3, 3)
y_einsum = torch.einsum("cthwijk,dcijk->dthw", boxes, weight) + bias[:, None, None, None]
difference(y_einsum, y, "einsum and loops")

rows = boxes.permute(1, 2, 3, 0, 4, 5, 6).reshape(60, 54)  # a row for each position
y_matrix = (rows @ weight.reshape(D, 54).T + bias).T.reshape(y.shape)
difference(y_matrix, y, "matrix and loops")

layer = nn.Conv3d(C, D, kernel_size=3).double()
layer.load_state_dict({"weight": weight, "bias": bias})
difference(layer(x[None])[0], y, "nn.Conv3d and loops")

# %% [markdown]
# How long is a kernel in time? A 2D network stands at both ends of that scale. A kernel of *one* frame is a 2D convolution of each frame by itself. A kernel as
# long as the *clip* is a 2D convolution with the frames stacked as channels, and its output has a single frame.

# %%
single = weight[:, :, :1]
each_frame = torch.stack([F.conv2d(x[:, t], single[:, :, 0]) for t in range(T)], dim=1)
difference(F.conv3d(x, single), each_frame, "kernel of 1 frame, and 2D on each frame")

long = whole(D, C, T, 3, 3)
stacked = F.conv2d(x.flatten(0, 1), long.flatten(1, 2))
difference(F.conv3d(x, long)[:, 0], stacked, "kernel of 5 frames, and 2D on 10 channels")
print("frames left:", F.conv3d(x, single).shape[1], "and", F.conv3d(x, long).shape[1])

# %% [markdown]
# ## 2 · Motion is a slope
#
# A bar moves over a line of 15 pixels, one pixel a frame to the right; another stands; a third moves to the left. Draw each clip with
# $x$ to the right and *time downwards*: motion becomes a slope. Our kernel has ones along one slope and −0.5 beside it, as an edge detector in an image answers to
# edges of one direction.


# %%
def bar(speed, T=7, W=15):
    """(1, 1, T, 1, W): a bright bar that moves by `speed` pixels a frame and is in the middle at half time."""
    clip = torch.zeros(1, 1, T, 1, W)
    for t in range(T):
        clip[0, 0, t, 0, W // 2 + speed * (t - T // 2)] = 1
    return clip


kernel = torch.full((1, 1, 3, 1, 3), -0.5)
for tau in range(3):
    kernel[0, 0, tau, 0, tau] = 1  # one step to the right a frame

fig, axes = plt.subplots(1, 4, figsize=(8.4, 1.9), width_ratios=[3, 3, 3, 1.3])
for ax, (title, speed) in zip(axes, {"to the right": 1, "still": 0, "to the left": -1}.items(), strict=False):
    ax.imshow(bar(speed)[0, 0, :, 0], cmap="gray")
    ax.set(title=title, xlabel="x", xticks=[], yticks=range(0, 7, 2))
plots.heatmap(axes[3], kernel[0, 0, :, 0], numbers=".1f")
axes[3].set(title="kernel", xlabel="x", xticks=[])
axes[0].set_ylabel("time")
plots.show(
    fig,
    "Three pictures with x to the right and time downwards. The bar that moves right is a line that falls to the right, the still one "
    "a vertical line, the third falls to the left. The kernel, 3 by 3, has ones on its falling diagonal and -0.5 beside it.",
)

# %% [markdown] tags=["predict"]
# We take the kernel's largest answer anywhere in the clip. Then the right-moving clip is played backwards, and its frames are shuffled. As a
# comparison, *frame averaging*: a 2D kernel on each frame, ReLU, and the mean over all frames. Which of the numbers change?

# %%
flat = torch.tensor([-0.5, 1.0, -0.5]).view(1, 1, 1, 1, 3)
shuffled = torch.tensor([3, 0, 5, 1, 6, 2, 4])
clips = {f"speed {speed:+d}": bar(speed) for speed in (-2, -1, 0, 1, 2)}
clips |= {"+1, backwards": bar(1).flip(2), "+1, shuffled": bar(1)[:, :, shuffled]}
answers = {}
for name, clip in clips.items():
    space_time = F.conv3d(clip, kernel).max().item()
    averaged = F.relu(F.conv3d(clip, flat)).mean(dim=(2, 3, 4)).item()
    answers[name] = space_time
    print(f"{name:14} 3D kernel {space_time:4.1f}   frame averaging {averaged:.4f}")
    assert abs(averaged - 1 / 13) < 1e-6
assert list(answers.values()) == [1, 1, 0, 3, 1, 1, 2]

# %% [markdown] tags=["explain"]
# The 3D kernel answers 3 to its own motion and 1 to its reverse; the shuffled clip gets 2, because two of its frames lie on the slope by chance. Frame averaging gives
# one number for all seven clips: a mean does not know the order of its terms, and no single frame shows the motion.
#
# A kernel of 3 frames knows one slope. Faster or slower motion needs other kernels, or a coarser time axis, as pooling makes it.
#
# ## 3 · 2010: five channels by hand
#
# The network of Ji and others sees 7 frames, 60 pixels high and 40 wide, and does not have to find motion by itself: its first layer is *hardwired*, not learned. It computes the
# grey frame, its derivatives along $x$ and $y$, and the optical flow from each frame to the next. Flow needs pairs, so there are 7 + 7 + 7 + 6 + 6 = 33 maps.

# %%
clip = procedural.Actions(count=12, frames=7, size=(60, 40), seed=3)[0]
rgb = torch.tensor(clip.frames / 255).float().permute(3, 0, 1, 2)[None]
flow = torch.tensor(clip.flow).permute(3, 0, 1, 2)[None]  # the drawn clip's true flow
assert rgb.shape == (1, 3, 7, 60, 40)
assert flow.shape == (1, 2, 6, 60, 40)


def hardwired(rgb, flow):
    """(B, 3, T, H, W) and (B, 2, T - 1, H, W) -> five channels by name, each (B, 1, T or T - 1, H, W)."""
    red, green, blue = rgb[:, :1], rgb[:, 1:2], rgb[:, 2:]
    gray = 0.299 * red + 0.587 * green + 0.114 * blue
    gradient_y, gradient_x = torch.gradient(gray, dim=(3, 4))  # central differences
    maps = gray, gradient_x, gradient_y, flow[:, :1], flow[:, 1:]
    return dict(zip(("gray", "gradient_x", "gradient_y", "flow_x", "flow_y"), maps, strict=True))


channels = hardwired(rgb, flow)
frames = {name: maps.shape[2] for name, maps in channels.items()}
print(frames, "together", sum(frames.values()))
assert sum(frames.values()) == 33

# %%
fig, axes = plt.subplots(1, 5, figsize=(8.4, 2.8))
for ax, (name, maps) in zip(axes, channels.items(), strict=True):
    picture = maps[0, 0, 3]
    limit = picture.abs().max()
    ax.imshow(
        picture, cmap="gray" if name == "gray" else "RdBu_r", vmin=0 if name == "gray" else -limit, vmax=limit
    )
    ax.set_title(name, fontsize=9)
    ax.set_axis_off()
plots.show(
    fig,
    "Five pictures of a figure that waves both hands. Grey; the derivative along x, strong at upright edges; the derivative along y, strong at level edges; "
    "the flow along x, the camera's nearly everywhere and another at the hands; the flow along y, strong at both forearms and zero elsewhere.",
)

# %% [markdown]
# The layers after it, with kernels written height × width × time: **C2** convolves each of the 5 channels with 2 kernels of 7×7×3, which gives two *sets* of maps; **S3** takes the mean over
# 2 × 2 pixels, times a learned number, plus a learned bias, two numbers a map; **C4** has 3 kernels of 7×6×3 for each channel of each set; **S5** is like S3,
# over 3 × 3. Channels do not mix until **C6**, where each of 128 features is connected to every map by a kernel as large as the map. A linear
# layer without bias gives the classes. The published total is 295,458. We derive it line by line, beside the network in `nlutils`.

# %%
from nlutils.torch.models.c3d import Ji2010

c2_maps = 2 * sum(T - 2 for T in frames.values())  # 2 sets; 3 frames see one another, 2 are lost
c4_maps = 2 * 3 * sum(T - 4 for T in frames.values())
S5 = 7, 4  # 60 x 40 -> 54 x 34 -> 27 x 17 -> 21 x 12 -> 7 x 4
derived = {
    "c2": (f"{c2_maps} of 54 x 34", 5 * 2 * (7 * 7 * 3 + 1)),
    "s3": (f"{c2_maps} of 27 x 17", 2 * c2_maps),
    "c4": (f"{c4_maps} of 21 x 12", 5 * 2 * 3 * (7 * 6 * 3 + 1)),
    "s5": (f"{c4_maps} of {S5[0]} x {S5[1]}", 2 * c4_maps),
    "c6": ("128 of 1 x 1", 128 * (c4_maps * 7 * 4 + 1)),
    "classifier": ("3", 128 * 3),
}
network, apart = Ji2010(3), {}
for name, (maps, count) in derived.items():
    ours = study.parameters(getattr(network, name))
    apart[name] = ours - count
    print(f"{name:10} {maps:14} derived {count:7,}   nlutils {ours:7,}   {apart[name]:5,} apart")
print(
    f"{'total':25} derived {sum(n for _, n in derived.values()):7,}   nlutils {study.parameters(network):7,}"
)
assert study.parameters(network) == 295_458
assert list(apart.values()) == [0, 0, 0, 0, 128 * 77, 0]
assert network((rgb, flow)).shape == (1, 3)

# %% [markdown] tags=["predict"]
# Five lines agree, one does not: our C6 lacks 9,856 = 128 · 77. We gave each feature one bias. Where do 77 more come from? And what can a feature
# with all of them compute that ours cannot?

# %%
connections = 128 * c4_maps * (7 * 4 + 1)
print(f"a bias for each connection: 128 x 78 x (28 + 1) = {connections:,}")
assert connections == 289_536

labels = torch.tensor([1])
network.loss((rgb, flow), labels).backward()
gradient = network.c6.bias.grad
assert gradient.shape == (128, 78)
difference(
    gradient, gradient[:, :1].expand(128, 78), "the 78 gradients of each feature, and the first of them"
)

# %% [markdown] tags=["explain"]
# Each feature has 78 connections, one a map, and each connection has a bias of its own. That can compute *nothing more*: the 78 are added before anything else happens, so only their sum
# counts. The gradients agree: all 78 move together, and gradient descent treats them as one bias that learns 78 times as fast. The published count includes 9,856 numbers
# without which the network would compute the same.
#
# ## 4 · C3D
#
# Five years later, Tran and others let the network find motion itself, in 16 colour frames of 112 × 112. Its eight convolutions are 3×3×3, padded by 1, so only the
# poolings change the size; the first leaves time alone.


# %%
class C3D(nn.Module):
    """(B, 3, T, H, W) -> (B, num_classes); `pooled` is what pool5 leaves of T x H x W."""

    def __init__(self, num_classes, width=64, fc=4096, pooled=(1, 4, 4), dropout=0.5):
        super().__init__()
        widths = [3, *(width * factor for factor in (1, 2, 4, 4, 8, 8, 8, 8))]
        for k, name in enumerate(("1a", "2a", "3a", "3b", "4a", "4b", "5a", "5b")):
            setattr(self, f"conv{name}", nn.Conv3d(widths[k], widths[k + 1], 3, padding=1))
        self.pool1 = nn.MaxPool3d((1, 2, 2), ceil_mode=True)
        for k in (2, 3, 4, 5):
            setattr(self, f"pool{k}", nn.MaxPool3d(2, ceil_mode=True))
        self.fc6 = nn.Linear(8 * width * int(np.prod(pooled)), fc)
        self.fc7 = nn.Linear(fc, fc)
        self.classifier = nn.Linear(fc, num_classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = self.pool1(F.relu(self.conv1a(x)))
        x = self.pool2(F.relu(self.conv2a(x)))
        x = self.pool3(F.relu(self.conv3b(F.relu(self.conv3a(x)))))
        x = self.pool4(F.relu(self.conv4b(F.relu(self.conv4a(x)))))
        x = self.pool5(F.relu(self.conv5b(F.relu(self.conv5a(x)))))
        x = self.dropout(F.relu(self.fc6(x.flatten(1))))
        x = self.dropout(F.relu(self.fc7(x)))
        return self.classifier(x)


# %% [markdown] tags=["predict"]
# Before pool5 the maps are 2 × 7 × 7. Windows of 2 × 2 fit three times into 7, and one row is left over. PyTorch drops it unless it is told `ceil_mode=True`;
# Caffe, in which C3D was written, keeps it. What does fc6 get, and which total belongs to which: 63.7 or 78.4 million?

# %%
maps = torch.randn(1, 512, 2, 7, 7)
for ceil_mode in (False, True):
    left = F.max_pool3d(maps, 2, ceil_mode=ceil_mode)
    with torch.device("meta"):  # shapes without memory
        full = C3D(101, pooled=left.shape[2:])
    print(
        f"ceil_mode={ceil_mode!s:5}  {tuple(left.shape[1:])}  fc6 gets {left.numel():,}, total {study.parameters(full):,}"
    )
assert left.numel() == 8192
assert study.parameters(full) == 78_409_573

# %% [markdown] tags=["explain"]
# The count decides: the library mmaction2 lists C3D with 101 classes at 78.4 M. The row and column left over cost nearly 15 million parameters. (mmaction2's own network gets 4 × 4 by padding pool5 instead: other windows, other values; in `nlutils`,
# `layout="mmaction2"`.)
#
# Now each line. The sizes in `published` follow from the layer definitions that the authors released.

# %%
published = dict(conv1a=5_248, conv2a=221_312, conv3a=884_992, conv3b=1_769_728, conv4a=3_539_456)
published |= dict(conv4b=7_078_400, conv5a=7_078_400, conv5b=7_078_400, fc6=33_558_528, fc7=16_781_312)


def table(model, x):
    """For each layer with weights: its output's shape and its multiply-adds."""
    lines, hooks = {}, []
    for name, layer in model.named_children():
        if hasattr(layer, "weight"):

            def note(layer, inputs, output, name=name):  # PyTorch calls it when the layer has run
                products = layer.weight[0].numel() * output[0].numel()  # one kernel for each output number
                lines[name] = tuple(output.shape[1:]), products

            hooks.append(layer.register_forward_hook(note))
    model(x)
    for hook in hooks:
        hook.remove()
    return lines


lines = table(full.eval(), torch.empty(1, 3, 16, 112, 112, device="meta"))
print(f"{'layer':10} {'output':20} {'parameters':>10} {'million multiply-adds':>22}")
for name, (shape, products) in lines.items():
    count = study.parameters(getattr(full, name))
    assert count == published.get(name, count)
    print(f"{name:10} {' x '.join(map(str, shape)):20} {count:10,} {products / 1e6:22,.0f}")
total = sum(products for _, products in lines.values())
print(f"together {total / 1e9:.2f} billion multiply-adds")
assert round(total / 1e9, 2) == 38.55

# %%
linear = ("fc6", "fc7", "classifier")
share = sum(study.parameters(getattr(full, name)) for name in linear) / study.parameters(full)
work = sum(lines[name][1] for name in linear) / total
print(f"the three linear layers: {share:.0%} of the parameters, {work:.1%} of the work")
largest = [name for name, (_, products) in lines.items() if products / total > 0.28]
print("29 % of the work each:", *largest)
assert largest == ["conv2a", "conv3b"]

# %% [markdown]
# Two thirds of C3D's parameters come after the last map in space and time, in layers that do a tenth of a percent of the work.
#
# Carreira and Zisserman (2017) changed two things and called it *3D-ConvNet*: a batch normalisation after every layer but the last, and stride 2 in time in pool1.

# %%
from nlutils.torch.models.c3d import C3DBN

with torch.device("meta"):
    variant = C3DBN(400).eval()
    work = study.multiply_adds(variant, torch.empty(1, 3, 16, 112, 112))
print(
    f"{study.parameters(variant):,} parameters with 400 classes (Table 1: 79 M), {work / 1e9:.1f} billion multiply-adds"
)
assert study.parameters(variant) == 79_645_520
assert round(work / 1e9, 1) == 19.8

# %% [markdown]
# ## 5 · Train a small one
#
# We train the normalised variant with an eighth of the width, on 16 frames of 32 × 32 pixels: stick figures perform six actions. Four fifths of the performers are for training, the
# others for the test.

# %%
size = (32, 32)
inputs = study.prepare(
    procedural.Actions(count=settings.clips, frames=17, size=32, seed=0).clip_set(), 16, size, flow=False
).to(settings.device)
train_on, test_on = inputs.split(0)
recipe = study.Recipe(epochs=settings.epochs, lr=3e-3, warmup=1, resize=size, size=size, input="rgb")
with study.seeded(0):
    model = C3DBN(6, width=8, fc=64, frames=16, size=size, dropout=0.2).to(settings.device)
before = model.conv1a.conv.weight.detach().cpu().clone()
assert before.shape == (8, 3, 3, 3, 3)
print(f"{study.parameters(model):,} parameters, {len(train_on)} clips to train on, {len(test_on)} to test on")

# %% tags=["nbval-ignore-output"]
losses = study.train(model, inputs, train_on, recipe)
print("loss, epoch by epoch:", *(f"{loss:.2f}" for loss in losses), "  (guessing: 1.79)")
assert losses[-1] < 1.4 < losses[0]

# %% [markdown] tags=["predict"]
# Now the test clips, in four versions: as they are; played backwards; with shuffled frames; and stopped, 16 times one frame from the middle. Rank the four by how
# many clips are recognised. Which comes close to guessing, 17 %? And is backwards closer to *as they are* or to *shuffled*?

# %% tags=["nbval-ignore-output"]
test = torch.cat([inputs.batch("rgb", part, size) for part in test_on.split(64)])
answer = inputs.labels[test_on]
generator = torch.Generator().manual_seed(0)
orders = [torch.randperm(16, generator=generator) for _ in range(4)]
versions = {
    "as they are": [test],
    "backwards": [test.flip(2)],
    "shuffled": [test[:, :, order] for order in orders],
    "stopped": [test[:, :, 8:9].expand_as(test)],
}
right = {}
model.eval()
for name, alternatives in versions.items():
    with torch.no_grad():
        logits = [torch.cat([model(part).cpu() for part in clips.split(32)]) for clips in alternatives]
    right[name] = np.mean([study.accuracy(each, answer) for each in logits])
    print(f"{name:12} {right[name]:.0%} right")
assert right["as they are"] > max(right["shuffled"] + 0.1, right["stopped"] + 0.15)
assert right["stopped"] < 0.35
assert right["backwards"] > right["as they are"] - 0.15
assert right["backwards"] > right["shuffled"]

# %% [markdown] tags=["explain"]
# On stopped clips it nearly guesses: this network gets next to nothing out of a pose. On shuffled ones it loses much of what it knew, though everything still
# moves. Backwards costs hardly anything, and not because a 3D network could not see direction (section 2's kernel does): a waving arm waves backwards, too. The *data set* decides how much of time a
# network needs. (One of the quick profile's 60 test clips is 1.7 points: smaller differences mean nothing.)
#
# What did the first layer learn? Its kernels still look like the noise they began as, so we look at what training *added*. We sum it over
# the three colours: $v(\tau)$, 3 × 3 numbers for each of the three frames. Their mean $\bar v$ answers to a still picture; the rest answers to change only. In squares,
#
# $$\sum_\tau \lVert v(\tau) \rVert^2 = 3\, \lVert \bar v \rVert^2 + \sum_\tau \lVert v(\tau) - \bar v \rVert^2$$
#
# and we call the last term's part of the whole the *share of change*. First we ask how much the sum over colours leaves out: kernels that are equal in all three are 100 % grey, random ones 33 %.

# %% tags=["nbval-ignore-output"]
after = model.conv1a.conv.weight.detach().cpu()
added = after - before
print(f"added: {added.norm() / before.norm():.0%} of the kernels' length")
for name, weight in {"the start": before, "what was added": added}.items():
    grey = weight.sum(dim=1).pow(2).sum() / 3 / weight.pow(2).sum()
    print(f"{name:15} {grey:.0%} grey")
    assert grey < 0.45 if name == "the start" else grey > 0.5

v = added.sum(dim=1)
assert v.shape == (8, 3, 3, 3)
still = v.mean(dim=1, keepdim=True)
change = (v - still).pow(2).sum(dim=(1, 2, 3))
difference(
    v.pow(2).sum(dim=(1, 2, 3)), 3 * still.pow(2).sum(dim=(1, 2, 3)) + change, "the equation", below=1e-5
)
change = change / v.pow(2).sum(dim=(1, 2, 3))
assert (change < 2 / 3).sum() > 4

# %% tags=["nbval-ignore-output"]
fig, axes = plt.subplots(3, 8, figsize=(8.4, 3.3))
for column, k in enumerate(change.argsort().tolist()):
    limit = v[k].abs().max()
    for tau in range(3):
        axes[tau, column].imshow(v[k, tau], cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes[tau, column].set(xticks=[], yticks=[])
    axes[0, column].set_title(f"{change[k]:.2f}" if column else f"change {change[k]:.2f}", fontsize=9)
for tau in range(3):
    axes[tau, 0].set_ylabel(rf"$\tau$ = {tau}")
plots.show(
    fig,
    "What training added to the eight kernels, red above 0 and blue below: each a column of three 3 by 3 pictures, one a frame, with the share of change above it. The pictures are smooth: edges and "
    "blobs. On the left the three pictures of a column are nearly the same, on the right they differ.",
)

# %% [markdown]
# Nobody asked for grey kernels, or for smooth ones. On the left are patterns that stay for three
# frames, on the right some that change. A random addition would have a share of change of 0.67; most columns have less. So this first layer mainly
# learned patterns of single frames, and frames are compared by the layers after it, too.
#
# ## 6 · Inflation
#
# Clips with labels are few, labelled photographs are many. Carreira and Zisserman start a 3D network from a 2D one: copy the kernel $t$ times and
# divide by $t$,
#
# $$w_{3D}(\tau, i, j) = \tfrac{1}{t}\, w_{2D}(i, j), \qquad \tau = 0, \dots, t - 1$$
#
# On a *boring video*, one frame repeated, the $t$ copies then add up to what the 2D network says.


# %%
def inflate(kernel, t):
    """(D, C, kH, kW) -> (D, C, t, kH, kW)."""
    return kernel[:, :, None].repeat(1, 1, t, 1, 1) / t


generator = torch.Generator().manual_seed(5)
kernel_2d = torch.randn(4, 3, 3, 3, generator=generator)
image = rgb[:, :, 3]
boring = image[:, :, None].repeat(1, 1, 8, 1, 1)
y_2d = F.conv2d(image, kernel_2d, padding=1)
y_3d = F.conv3d(boring, inflate(kernel_2d, 3), padding=1)
assert y_2d.shape == (1, 4, 60, 40)
assert y_3d.shape == (1, 4, 8, 60, 40)

from nlutils.torch.inflation import inflate_kernel

difference(inflate(kernel_2d, 3), inflate_kernel(kernel_2d, 3), "by hand and nlutils")

# %% [markdown] tags=["predict"]
# `padding=1` pads all three axes with zeros. At which of the eight frames do `y_3d` and `y_2d` agree, and what is their ratio elsewhere?
#
# Then the question for a deep network, with sixteen frames and many such layers: after how many does *no* frame agree?

# %%
for t in range(8):
    ratio = (y_3d[:, :, t] * y_2d).sum() / (y_2d * y_2d).sum()
    print(f"frame {t}: {ratio:.3f}", end="   ")
print()
difference(y_3d[:, :, 1:-1], y_2d[:, :, None].expand(-1, -1, 6, -1, -1), "frames 1 to 6", below=1e-5)
difference(y_3d[:, :, 0], 2 / 3 * y_2d, "frame 0 and 2/3 of the 2D answer", below=1e-5)

square = torch.randn(4, 4, 3, 3, generator=generator) / 5
flat, deep = y_2d, y_2d[:, :, None].repeat(1, 1, 16, 1, 1)
agreeing = []
for _layer in range(8):
    flat = F.relu(F.conv2d(flat, square, padding=1))
    deep = F.relu(F.conv3d(deep, inflate(square, 3), padding=1))
    agree = (deep - flat[:, :, None]).abs().amax(dim=(0, 1, 3, 4)) < 1e-4 * flat.max()
    agreeing.append(int(agree.sum()))
print("frames that agree, layer by layer:", agreeing)
assert agreeing == [14, 12, 10, 8, 6, 4, 2, 0]

# %% [markdown] tags=["explain"]
# At the first and last frame one of the three copies looks outside the clip and sees zeros: 2/3. Every layer carries the error one frame inwards, and after
# eight layers none of 16 frames is right. So *equal on a boring video* holds at interior frames only. A picture's border has the same error; but a picture has a hundred rows, a clip 16 frames.
# For equality everywhere, repeat the end frames instead of padding with zeros (exercise 3).
#
# Another way to start is to put the 2D kernel into the middle frame and zeros beside it: then *any* clip gives the 2D answer at every frame.

# %% [markdown] tags=["predict"]
# Section 2's bars once more. Before any training, does a copied kernel tell the bar that moves right from its reverse? Does one in the middle? Again we take the largest answers.

# %%
edge = torch.tensor([-0.5, 1.0, -0.5]).view(1, 1, 1, 3)
middle = torch.cat([torch.zeros_like(edge), edge, torch.zeros_like(edge)]).view(1, 1, 3, 1, 3)
for name, kernel_3d in {"copied": inflate(edge, 3), "in the middle": middle}.items():
    largest = [F.conv3d(clip, kernel_3d).max().item() for clip in (bar(1), bar(1).flip(2), bar(0))]
    print(f"{name:14} right {largest[0]:.2f}   reversed {largest[1]:.2f}   still {largest[2]:.2f}")
    assert abs(largest[0] - largest[1]) < 1e-6
    assert (largest[2] > largest[0] + 0.5) == (name == "copied")

# %% [markdown] tags=["explain"]
# Neither. A copied kernel is the same forwards and backwards: it averages three frames, so it answers best to what stands still, and a moving bar blurs. The kernel in the middle sees one frame. Inflation gives a 3D network what a 2D network knows; to tell a motion from its reverse, the three
# slices must differ, and only training makes them so.
#
# ## 7 · What the papers reported
#
# Per cent right, where nothing else is said. We read I3D's two numbers in its authors' own README, those of 2010 and of C3D in other papers, those of 3D-ConvNet in a copy of the table of Carreira and
# Zisserman: look into the originals before you cite them.
#
# | network | learned from | tested on | result |
# |:--|:--|:--|:--|
# | 2010 | KTH | KTH, 6 actions | 90.2 |
# | 2010 | TRECVID 2008 | TRECVID 2008 | average precision 0.5572 at 1 % false positives; a 2D network 0.4805 |
# | C3D | I380K, then Sports-1M | Sports-1M, 487 sports | 46.1 of clips; 61.1 of videos |
# | C3D, linear SVM on fc6 | Sports-1M; the SVM UCF101 | UCF101, mean of 3 splits | 82.3; three networks 85.2; with improved trajectories 90.4 |
# | 3D-ConvNet | the data set alone | UCF101 / HMDB51, split 1 | 51.6 / 24.3 |
# | 3D-ConvNet | Kinetics alone | Kinetics, 400 actions | 56.1 |
# | I3D, colour | Kinetics alone | Kinetics | 68.4; inflated from ImageNet first 71.1 |
#
# Two lines need a second look. Nearly the same network has 82.3 and 51.6 on UCF101: one had seen Sports-1M before, and splits and classifier differ, too. So "C3D reaches 82 %" says as much about data as
# about a network. And starting from inflated ImageNet weights brings I3D 2.7 points on Kinetics; without them it is still better than 3D-ConvNet.

# %% [markdown] tags=["exercise"]
# ## Exercises
#
# ### Exercise 1 · How deep in time? (easy, 10 minutes)
#
# How many parameters does depth in time cost? Write `count(depth, classes)`: the parameters of a C3D whose eight convolutions have kernels of `depth` × 3 × 3, everything
# else as it is. **Expect**: 59,974,117 for depth 1 and 101 classes, 78,409,573 for depth 3.
#
# <details><summary>Hint 1: a nudge</summary>Only the convolutions change. How many numbers has a kernel of 3 × 3 × 3 for one channel, how many has one of 1 × 3 × 3?</details>
# <details><summary>Hint 2: the formula</summary>A convolution has 9 depth C D + D parameters; a linear layer C D + D. fc6 has 8,192 inputs.</details>
# <details><summary>Hint 3: part of the code</summary><code>widths = (3, 64, 128, 256, 256, 512, 512, 512, 512)</code>, <code>sum(9 * depth * c * d + d for c, d in pairwise(widths))</code></details>


# %% tags=["stub"]
def count(depth, classes):
    #: solution
    widths = (3, 64, 128, 256, 256, 512, 512, 512, 512)
    convolutions = sum(9 * depth * c * d + d for c, d in pairwise(widths))
    linear = (8192, 4096, 4096, classes)
    return convolutions + sum(c * d + d for c, d in pairwise(linear))
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
def every(without=(), area=lambda depth: 9 * depth, known=None, pooled=(1, 4, 4)):
    results = []
    for depth, classes in ((1, 101), (3, 101), (5, 487)):
        with torch.device("meta"):
            model = C3D(known or classes, pooled=pooled)
        counts = {
            name: w.numel() // 27 * area(depth) if w.ndim == 5 else w.numel()
            for name, w in model.named_parameters()
        }
        results.append(sum(n for name, n in counts.items() if not any(part in name for part in without)))
    return tuple(results)


check(
    "Exercise 1",
    lambda: (count(1, 101), count(3, 101), count(5, 487)),
    every(),
    mistakes={
        "a kernel is depth x 3 x 3; you have depth in all three axes": every(area=lambda depth: depth**3),
        "a kernel is depth x 3 x 3; the 3 x 3 is missing": every(area=lambda depth: depth),
        "the depth is an argument; you have 3": every(area=lambda depth: 27),
        "the biases are missing": every(without=["bias"]),
        "the linear layers are missing": every(without=["fc", "classifier"]),
        "the first convolution, from 3 channels to 64, is missing": every(without=["conv1a"]),
        "the number of classes is an argument": every(known=101),
        "fc6 gets 8,192 numbers; you dropped the row that ceil_mode keeps": every(pooled=(1, 3, 3)),
    },
)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · How many frames does it see? (medium, 15 minutes)
#
# Write `seen(layers)`: the number of input frames that one output of the last layer depends on, in a clip so long that no padding is met. `layers` lists (kernel, stride) in time, first layer first.
# **Expect**: 68 at conv5b of C3D, 134 in `C3DBN`. A clip has 16.
#
# <details><summary>Hint 1: a nudge</summary>Neighbouring outputs of a layer after two poolings of stride 2 are four frames apart.</details>
# <details><summary>Hint 2: the formula</summary>Start with 1 frame and a step of 1. A layer adds (kernel - 1) · step frames; then its stride multiplies the step.</details>
# <details><summary>Hint 3: part of the code</summary><code>frames, step = 1, 1</code>, <code>for kernel, stride in layers: frames += …; step *= stride</code></details>


# %% tags=["stub"]
def seen(layers):
    #: solution
    frames, step = 1, 1
    for kernel, stride in layers:
        frames += (kernel - 1) * step
        step *= stride
    return frames
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
conv, pool = (3, 1), (2, 2)
rest = [conv, pool, conv, conv, pool, conv, conv, pool, conv, conv]
stacks = [conv, (1, 1), *rest], [conv, pool, *rest], [(5, 2), (3, 2)]
check(
    "Exercise 2",
    lambda: tuple(seen(layers) for layers in stacks),
    (68, 134, 9),
    mistakes={
        "strides count: after a pooling, one step is two frames": (20, 21, 7),
        "a layer's stride acts on the layers after it, not on its own kernel": (75, 149, 17),
        "start with 1 frame, not with 0": (67, 133, 8),
        "a kernel of 3 adds 2 frames to the one it stands on, not 3": (106, 208, 12),
    },
)

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · Right at every frame (medium, 15 minutes)
#
# Write `steady(x, kernel, t)` for a clip $(B, C, T, H, W)$, a 2D kernel $(D, C, 3, 3)$ and odd $t$. It inflates the kernel to $t$ frames and convolves. Around the picture it pads with zeros as before; in time, copies of the first and of the last
# frame stand for those that are missing. As many frames come out as go in. **Expect**: on `boring`, the 2D answer at all eight frames.
#
# <details><summary>Hint 1: a nudge</summary>Pad time yourself, and let the convolution pad only rows and columns.</details>
# <details><summary>Hint 2: the formula</summary><code>F.pad</code> with <code>mode="replicate"</code> counts from the last axis: columns, rows, then frames. <code>conv3d</code> takes one padding for each axis.</details>
# <details><summary>Hint 3: part of the code</summary><code>F.pad(x, (0, 0, 0, 0, t // 2, t // 2), mode="replicate")</code>, <code>padding=(0, 1, 1)</code></details>


# %% tags=["stub"]
def steady(x, kernel, t):
    #: solution
    x = F.pad(x, (0, 0, 0, 0, t // 2, t // 2), mode="replicate")
    return F.conv3d(x, inflate(kernel, t), padding=(0, 1, 1))
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
def padded(x, t, mode, around=0, divide=True):
    """What `steady` may return; `around` pixels of the border repeated as well."""
    x = F.pad(x, (around, around, around, around, t // 2, t // 2), mode=mode) if mode else x
    y = F.conv3d(x, inflate(kernel_2d, t), padding=(0, 1 - around, 1 - around))
    return y if divide else y * t


check(
    "Exercise 3",
    lambda: (steady(boring, kernel_2d, 3), steady(rgb, kernel_2d, 5)),
    (padded(boring, 3, "replicate"), padded(rgb, 5, "replicate")),
    mistakes={
        "zeros stand for the missing frames": (padded(boring, 3, "constant"), padded(rgb, 5, "constant")),
        "you repeat the picture's border, too; there zeros are wanted": (
            padded(boring, 3, "replicate", around=1),
            padded(rgb, 5, "replicate", around=1),
        ),
        "the copies are not divided by t": (
            padded(boring, 3, "replicate", divide=False),
            padded(rgb, 5, "replicate", divide=False),
        ),
        "the clip is mirrored in time; the end frame itself is to be repeated": (
            padded(boring, 3, "replicate"),
            padded(rgb, 5, "reflect"),
        ),
        "the clip goes round in a circle; the end frame itself is to be repeated": (
            padded(boring, 3, "replicate"),
            padded(rgb, 5, "circular"),
        ),
        "no frame is added at the ends": (padded(boring, 3, None), padded(rgb, 5, None)),
    },
)

# %% [markdown]
# ## What you learned
#
# - A 3D convolution is one matrix product on boxes of the clip. A kernel of one frame is a 2D convolution of each frame; one as long as the clip leaves a single frame.
# - Motion is a slope in space-time, and a kernel of three frames answers to one slope. The order of frames matters to it, and never to an average of frames.
# - Counts identify networks: 295,458 needs a bias for each connection, 78,409,573 a pooling that keeps the row left over.
# - Two thirds of C3D's parameters lie in three linear layers that do a tenth of a percent of the work.
# - Inflation equals the 2D network on a boring video at interior frames; zeros at the ends reach one frame further with every layer. By itself it cannot tell a motion from its reverse.
#
# ## Further reading
#
# - S. Ji, W. Xu, M. Yang, K. Yu: *3D Convolutional Neural Networks for Human Action Recognition*. ICML 2010; a longer version with other networks in TPAMI 2013.
# - D. Tran, L. Bourdev, R. Fergus, L. Torresani, M. Paluri: *Learning Spatiotemporal Features with 3D Convolutional Networks*. ICCV 2015.
# - J. Carreira, A. Zisserman: *Quo Vadis, Action Recognition? A New Model and the Kinetics Dataset*. CVPR 2017. Section 2.2 is the variant, 2.4 inflation.
# - Y. LeCun, L. Bottou, Y. Bengio, P. Haffner: *Gradient-Based Learning Applied to Document Recognition*. Proceedings of the IEEE, 1998. Where S3's two numbers a map come from.
