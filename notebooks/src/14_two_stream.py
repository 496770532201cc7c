# %% [markdown]
# # 14 · Two streams: what is there, and how it moves
#
# After this notebook you can
#
# - say what a field of optical flow knows that a frame does not, and the other way round
# - stack flow at a place and along trajectories, by hand, and say when the two agree
# - build and train a spatial and a temporal stream, and count both at full size
# - fuse two streams by averaging and by an SVM, and explain which mistakes each of them mends
# - inject one stream into the residual branch of another, and prove that the skip path stays untouched
#
# | | |
# |:--|:--|
# | What you need | notebooks 05 and 11; cross-entropy, `nn.Module`, residual networks |
# | Your time | 75 minutes |
# | Machine time | 45 seconds |
# | Framework | PyTorch, NumPy |

# %% tags=["parameters"]
import os

profile = os.environ.get("NLUTILS_PROFILE", "quick")

# %%
from collections import OrderedDict

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from nlutils import plots, study
from nlutils.course import check, difference, settings
from nlutils.torch.models.inception import FusedTwoStream, TwoStreamI3D, TwoStreamInception
from nlutils.torch.models.st_resnet import STResNet
from nlutils.torch.models.two_stream import SVMFusion, TwoStream, stacked_scores
from nlutils.video import optical_flow, procedural
from nlutils.video.flow_stacks import as_channels, flow_stack, subtract_mean

settings = settings(
    profile,
    quick=dict(clips=300, steps=260, device="cpu"),
    full=dict(clips=1200, steps=2000),
    gpu=dict(clips=1200, steps=4000, device="cuda"),
)
plots.style()
if profile != "gpu":
    torch.set_num_threads(1)

# %% [markdown] tags=["predict"]
# ## 1 · A frame and its motion
#
# In 2014 networks that were given a stack of frames recognised actions hardly better than networks that saw one frame. Simonyan and Zisserman took the question
# apart: one network for *what is there*, which sees a single frame, and one for *how it moves*, which sees optical flow (notebook 11).
#
# We change a clip in two ways: the film runs backwards; or the light has half as much red and more green.
# One network gets the frame in the middle, the other the flow from there to the next frame. Which of them can notice which change?

# %%
clip = procedural.Actions(count=24, frames=13, size=64, seed=1)[2]
light = np.clip(clip.frames * np.array([0.5, 1.1, 0.9]), 0, 255).round().astype(np.uint8)
flow = optical_flow(clip.frames)
T, H, W = clip.frames.shape[:3]
assert flow.shape == (T - 1, H, W, 2)


def angle(a, b):
    """The median angle, in degrees, between two fields where the first one moves."""
    moves = np.linalg.norm(a, axis=-1) > 1
    cosine = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1) + 1e-9)
    return np.median(np.degrees(np.arccos(cosine[moves].clip(-1, 1))))


backwards = optical_flow(clip.frames[::-1])
for name, frame, field in (
    ("backwards", clip.frames[::-1][6], backwards[6]),
    ("other light", light[6], optical_flow(light)[6]),
):
    same = "same" if np.array_equal(frame, clip.frames[6]) else "another"
    turned = angle(flow[6], field)
    print(
        f"{name:12} {same:8} frame; the arrows turn by {'less than 20' if turned < 20 else 'more than 150'}"
    )
    assert turned > 150 if name == "backwards" else turned < 20

# %%
fig, axes = plots.strip(
    [
        clip.frames[6],
        clip.frames[8],
        light[6],
        plots.flow_to_rgb(flow[6], 4),
        plots.flow_to_rgb(backwards[6], 4),
    ],
    ["frame 6", "frame 8", "other light", "flow", "flow, backwards"],
    width=1.7,
)
plots.show(
    fig,
    f"Frames 6 and 8 of a figure that is {clip.action}, nearly alike; frame 6 in greenish light; the flow of frame 6 as colours, in which "
    "the person is red and orange, one foot pale green, and the background nearly white; the flow of the backward film, in which the person is blue and cyan.",
)

# %% [markdown] tags=["explain"]
# Backwards, the middle frame is the same picture to the last bit: the spatial network cannot notice. The arrows of the flow turn round. (In the pictures the hue is the arrow's direction, red to the right and
# cyan to the left, and the strength is its length.) In another light the picture changes and the arrows stay. The field knows no colour and no thing that rests; the frame knows no direction. Each is blind where the other sees.
#
# ## 2 · Stacks, by hand
#
# One field is an instant. The temporal network sees $L$ fields at once, from frame $\tau$ on, as $2L$ channels. Equation 1 of the paper, with $d_t$ the field from frame $t$ to $t+1$
# and $(u, v)$ a pixel:
#
# $$I_\tau(u, v, 2k-1) = d^x_{\tau+k-1}(u, v), \qquad I_\tau(u, v, 2k) = d^y_{\tau+k-1}(u, v), \qquad k = 1 \dots L$$


# %%
def stack(d, tau, L):
    """Optical flow stacking: d (T-1, H, W, 2) -> (2L, H, W). The paper counts channels from 1."""
    I_tau = np.zeros((2 * L, *d.shape[1:3]))
    for k in range(1, L + 1):
        I_tau[2 * k - 2] = d[tau + k - 1, :, :, 0]
        I_tau[2 * k - 1] = d[tau + k - 1, :, :, 1]
    return I_tau


assert stack(flow, 1, 10).shape == (20, H, W)
library = as_channels(flow_stack(flow, 1, 10, centred=False))
difference(stack(flow, 1, 10), library, "by hand and nlutils.video.flow_stacks")

# %% [markdown]
# But after one frame the thing that was at $(u, v)$ is elsewhere. The second kind of stack goes after it. Equation 2, with $p_k$ for the place that it has reached:
#
# $$I_\tau(u, v, 2k-1) = d^x_{\tau+k-1}(p_k), \quad I_\tau(u, v, 2k) = d^y_{\tau+k-1}(p_k), \quad p_1 = (u, v), \quad p_k = p_{k-1} + d_{\tau+k-2}(p_{k-1})$$
#
# $p_k$ falls between pixels: we mix the four around it, and stay at the border when it leaves the picture.


# %%
def read(d, x, y):
    """The field d (H, W, 2) at the place (x, y): between pixels linearly."""
    x, y = np.clip(x, 0, d.shape[1] - 1), np.clip(y, 0, d.shape[0] - 1)
    u, v = min(int(x), d.shape[1] - 2), min(int(y), d.shape[0] - 2)
    a, b = x - u, y - v
    return (1 - b) * ((1 - a) * d[v, u] + a * d[v, u + 1]) + b * ((1 - a) * d[v + 1, u] + a * d[v + 1, u + 1])


def trajectory_stack(d, tau, L):
    """Trajectory stacking: d (T-1, H, W, 2) -> (2L, H, W)."""
    I_tau = np.zeros((2 * L, *d.shape[1:3]))
    for v in range(d.shape[1]):
        for u in range(d.shape[2]):
            p = np.array([u, v], float)
            for k in range(1, L + 1):
                step = read(d[tau + k - 1], *p)
                I_tau[2 * k - 2 : 2 * k, v, u] = step
                p = p + step
    return I_tau


# %% [markdown] tags=["predict"]
# Three toy motions, the same in every frame: everything *shifts* by (1, 0.5); everything *turns* by 30° about the middle; everything *grows* by a fifth.
# We look at the pixel three places right of the middle. For which motions do the two stacks agree there?

# %%
N, middle = 17, 8
x, y = np.meshgrid(np.arange(N) - middle, np.arange(N) - middle)
c, s = np.cos(np.pi / 6), np.sin(np.pi / 6)
motions = {
    "shifts": (np.full((N, N), 1.0), np.full((N, N), 0.5)),
    "turns": (c * x - s * y - x, s * x + c * y - y),
    "grows": (0.2 * x, 0.2 * y),
}
paths = {}
for name, motion in motions.items():
    d = np.tile(np.stack(motion, axis=-1), (4, 1, 1, 1))
    assert d.shape == (4, N, N, 2)
    for kind, make in (("place", stack), ("trajectory", trajectory_stack)):
        steps = make(d, 0, 4)[:, middle, middle + 3].reshape(4, 2)
        paths[name, kind] = np.cumsum(np.vstack([[3, 0], steps]), axis=0)
    gap = np.abs(paths[name, "place"] - paths[name, "trajectory"]).max()
    print(f"{name}: after four steps {gap:.1f} pixels apart")
    along = as_channels(flow_stack(d, 0, 4, sampling="trajectory", centred=False))
    difference(trajectory_stack(d, 0, 4), along, "    by hand and flow_stack", below=1e-5)
assert np.allclose(np.linalg.norm(paths["turns", "trajectory"], axis=1), 3)
assert np.allclose(paths["grows", "trajectory"][-1], (3 * 1.2**4, 0))

fig, axes = plt.subplots(1, 3, figsize=(7.5, 2.4))
for ax, name in zip(axes, motions, strict=True):
    for kind, colour, size in (("place", "orange", 8), ("trajectory", "blue", 4)):
        ax.plot(*paths[name, kind].T, "o-", color=plots.COLOURS[colour], label=kind, markersize=size)
    ax.plot(0, 0, "+", color="black")
    ax.set(title=name, xlim=(-4, 8), ylim=(7, -2), aspect="equal", xticks=range(-3, 8, 3))
    ax.set(yticks=range(0, 7, 3), xlabel="pixels from the middle")
axes[0].legend(fontsize=8)
plots.show(
    fig,
    "The vectors of both stacks, put tip to tail. Shift: the same straight line. Turn: the trajectory goes round the middle on a circle, the place "
    "follows one straight line, steeply down. Growth: both go right, the trajectory further.",
)

# %% [markdown] tags=["explain"]
# Only where motion does not depend on the place. Of a turn, stacking at a place keeps one vector, repeated; along the trajectory the vectors turn as the thing does. Of growth it keeps the first step, 0.6 pixels: four of them are 2.4, but the pixel really moves by $3\,(1.2^4 - 1) = 3.2$.
#
# On a clip with its true flow: which stack leads to where a wrist really goes?

# %%
waver = procedural.Actions(count=24, frames=11, size=64, seed=1, noise=0)[5]
for name in ("left wrist", "right wrist", "head"):
    way = waver.joints[:, procedural.JOINTS.index(name)]
    u, v = np.rint(way[0]).astype(int)
    off = {}
    for sampling in ("place", "trajectory"):
        sums = flow_stack(waver.flow, 0, 10, sampling=sampling, centred=False).sum(axis=0)
        off[sampling] = np.linalg.norm(sums[v, u] - (way[-1] - way[0]))
    print(
        f"{waver.action}, {name:11}",
        *(f"{kind} {pixels:4.1f}   " for kind, pixels in off.items()),
        "pixels off",
    )
    assert off["trajectory"] < 1
    assert off["place"] > 1 or name == "head"

# %% [markdown]
# A fast wrist has soon left its place; the trajectory keeps it. (The head hardly moves.) One step is left: when the camera follows somebody, *everything* moves. The paper subtracts from each field its mean vector,
# $d_t - \frac{1}{HW} \sum_{u,v} d_t(u, v)$:

# %%
follows = procedural.Actions(count=24, frames=11, size=64, seed=1)[9]
assert follows.camera == "follows"
d = optical_flow(follows.frames)
centred = subtract_mean(d)
difference(centred, d - d.mean(axis=(1, 2), keepdims=True), "by hand and subtract_mean", below=1e-5)
for name, field in (("as it is", d), ("centred", centred)):
    print(f"{name:9} median speed of a pixel {np.median(np.linalg.norm(field, axis=-1)):.0f} pixels a frame")
assert np.median(np.linalg.norm(centred, axis=-1)) < np.median(np.linalg.norm(d, axis=-1)) / 3

# %% [markdown]
# ## 3 · One stream, layer by layer
#
# Both streams are the same network, CNN-M-2048, which was made for ImageNet. Our pictures have 48 pixels a side in place of 224, and conv1 has 9 maps (`width`) in place of 96.
# New to us is the *response normalisation* behind conv1, older than batch normalisation. It makes a number $a_i$ of map $i$ smaller when its neighbours among the maps are large at the same pixel:
#
# $$b_i = a_i \Big/ \Big(2 + 10^{-4} \sum_{j=i-2}^{i+2} a_j^2 \Big)^{3/4}$$

# %%
draw = torch.Generator().manual_seed(0)
a = 100 * torch.randn(1, 12, 4, 4, generator=draw)
b = torch.stack(
    [a[:, i] / (2 + 1e-4 * (a[:, max(0, i - 2) : i + 3] ** 2).sum(dim=1)) ** 0.75 for i in range(12)], dim=1
)
norm = nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)
difference(b, norm(a), "PyTorch divides alpha by the five maps, so it gets 5e-4", below=1e-4)

x = torch.randn(1, 3, 48, 48, generator=draw)
pool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
for name, layer in {
    "conv1": nn.Conv2d(3, 9, 7, stride=2),
    "pool1": pool,
    "conv2": nn.Conv2d(9, 24, 5, stride=2, padding=1),
    "pool2": pool,
    "conv3": nn.Conv2d(24, 48, 3, padding=1),
    "conv4": nn.Conv2d(48, 48, 3, padding=1),
    "conv5": nn.Conv2d(48, 48, 3, padding=1),
    "pool5": pool,
}.items():
    x = layer(x)
    print(f"{name}  {x.shape[1]:2} maps of {x.shape[2]:2} x {x.shape[3]}")
assert x.shape == (1, 48, 1, 1)


# %% [markdown]
# `ceil_mode` keeps a window that reaches over the border. Two linear layers follow, and the classes. The temporal stream has $2L$ input channels and lacks the second response normalisation, "to
# reduce memory consumption"; nothing else differs.


# %%
class Stream(nn.Module):
    """CNN-M-2048 where width = 96 and side = 224: (B, channels, side, side) -> logits (B, classes)."""

    def __init__(self, channels, classes, width=9, side=48, second_norm=True, dropout=0.5):
        super().__init__()
        c1, c2, c3, c6, c7 = (thirds * width // 3 for thirds in (3, 8, 16, 128, 64))
        f = self.features = nn.Sequential()
        f.conv1, f.relu1 = nn.Conv2d(channels, c1, 7, stride=2), nn.ReLU()
        f.norm1 = nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)
        f.pool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        f.conv2, f.relu2 = nn.Conv2d(c1, c2, 5, stride=2, padding=1), nn.ReLU()
        if second_norm:
            f.norm2 = nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)
        f.pool2 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        f.conv3, f.relu3 = nn.Conv2d(c2, c3, 3, padding=1), nn.ReLU()
        f.conv4, f.relu4 = nn.Conv2d(c3, c3, 3, padding=1), nn.ReLU()
        f.conv5, f.relu5 = nn.Conv2d(c3, c3, 3, padding=1), nn.ReLU()
        f.pool5 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        numbers = f(torch.zeros(1, channels, side, side)).numel()
        self.fc6, self.fc7, self.classifier = (
            nn.Linear(numbers, c6),
            nn.Linear(c6, c7),
            nn.Linear(c7, classes),
        )
        self.dropout = nn.Dropout(dropout)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                rectified = "linear" if layer is self.classifier else "relu"
                nn.init.kaiming_normal_(layer.weight, nonlinearity=rectified)
                nn.init.zeros_(layer.bias)

    def forward(self, x):
        x = self.dropout(self.fc6(self.features(x).flatten(1)).relu())
        return self.classifier(self.dropout(self.fc7(x).relu()))


L = 10
count = {channels: study.parameters(Stream(channels, 12)) for channels in (3, 2 * L)}
print(f"spatial {count[3]:,}, temporal {count[2 * L]:,}: {count[2 * L] - count[3]:,} more, all in conv1")
assert count[2 * L] - count[3] == (2 * L - 3) * 7 * 7 * 9

# %% [markdown]
# ## 4 · Twelve classes
#
# A single frame can tell much, because, in the paper's words, "some actions are strongly associated with particular objects". Our procedural clips have none, so we give them places: half happen on a *lawn*, in greenish light, half on *sand*. A class
# is an action *and* a place, 6 × 2 = 12. The streams complement one another because we made it so. (Notebook 18 has real clips.)

# %%
S, T = 48, 14
actions = procedural.Actions(count=settings.clips, frames=T, size=S, seed=3)
label = np.array([actions.label(i) for i in range(len(actions))])
place = np.random.default_rng(7).integers(2, size=len(actions))
light = np.float32([[0.65, 1.05, 0.6], [1.1, 0.9, 0.6]])[place]
drawn = np.stack([actions.render(i) for i in range(len(actions))])
fields = subtract_mean(np.stack([optical_flow(frames) for frames in drawn]))
frames = np.clip(drawn * light[:, None, None, None], 0, 255) / 255
assert frames.shape == (len(actions), T, S, S, 3)
assert fields.shape == (len(actions), T - 1, S, S, 2)

rgb = torch.tensor((frames - 0.45) / 0.225, dtype=torch.float32).permute(0, 1, 4, 2, 3)
flow = torch.tensor(fields).permute(0, 1, 4, 2, 3)
labels = torch.tensor(6 * place + label)
performer = torch.tensor([actions.group(i) for i in range(len(actions))])
parts = {name: torch.isin(performer % 5, torch.tensor(folds)).nonzero()[:, 0]
         for name, folds in {"train": [0, 1, 2], "fuse": [3], "test": [4]}.items()}  # fmt: skip
print({name: len(part) for name, part in parts.items()}, "clips; no performer is in two parts")

# %% [markdown]
# *fuse* is for the SVM of section 5. Training takes one frame, or the stack of one frame, of each clip in a batch, as in the paper; tests average the class probabilities of three
# (the paper: 25, in ten crops each). Half of the training clips are mirrored, and then $d^x$ changes its sign.


# %%
def one_frame(clips, t, mirror):
    x = rgb[clips, t]
    x[mirror] = x[mirror].flip(-1)
    return x.to(settings.device)


def one_stack(clips, t, mirror):
    x = flow[clips[:, None], t[:, None] + torch.arange(L)]  # (B, L, 2, S, S)
    x[mirror] = x[mirror].flip(-1)
    x[mirror, :, 0] *= -1
    return x.flatten(1, 2).to(settings.device)  # dx, dy, dx, dy, ...: equation 1


def train(net, see, seed=0):
    draw = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(net.parameters(), lr=3e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=settings.steps)
    for _step in range(settings.steps):
        clips = parts["train"][torch.randint(len(parts["train"]), (32,), generator=draw)]
        t = torch.randint(T - L, (32,), generator=draw)
        x = see(clips, t, torch.rand(32, generator=draw) < 0.5)
        loss = F.cross_entropy(net(x), labels[clips].to(settings.device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rate.step()
    return net.eval()


@torch.no_grad()
def probabilities(net, see, clips):
    never = torch.zeros(len(clips), dtype=torch.bool)
    votes = [net(see(clips, torch.full((len(clips),), t), never)).softmax(dim=1) for t in (0, 1, 3)]
    return torch.stack(votes).mean(dim=0).cpu()


# %% [markdown] tags=["predict"]
# Suppose that the spatial stream learns the places perfectly, the temporal one the actions, and that each can but guess at the rest. Which accuracies do they reach on the 12 classes?

# %% tags=["nbval-ignore-output"]
torch.manual_seed(0)
spatial = Stream(3, 12).to(settings.device)
start = {"spatial": spatial.features.conv1.weight.detach().cpu().clone()}
train(spatial, one_frame)
temporal = Stream(2 * L, 12, second_norm=False).to(settings.device)
start["temporal"] = temporal.features.conv1.weight.detach().cpu().clone()
train(temporal, one_stack)
p = {
    part: (probabilities(spatial, one_frame, clips), probabilities(temporal, one_stack, clips))
    for part, clips in parts.items()
}
assert p["test"][0].shape == p["test"][1].shape == (len(parts["test"]), 12)


def right(scores, what=lambda c: c):
    said = torch.as_tensor(scores).argmax(dim=1)
    return (what(said) == what(labels[parts["test"]])).float().mean().item()


accuracy, of_place, of_action = {}, {}, {}
for name, scores in zip(("spatial", "temporal"), p["test"], strict=True):
    accuracy[name] = right(scores)
    of_place[name], of_action[name] = right(scores, lambda c: c // 6), right(scores, lambda c: c % 6)
    print(f"{name:8} class {accuracy[name]:.0%}   place {of_place[name]:.0%}   action {of_action[name]:.0%}")
assert of_place["spatial"] > of_place["temporal"] + 0.2
assert of_action["temporal"] > of_action["spatial"] + 0.2

# %% [markdown] tags=["explain"]
# At best 1/6 and 1/2. In the stored run they have 17 % and 37 %: the temporal stream has 80 % of the actions right, and guesses the place. The spatial stream sees postures too, but a single frame of these clips says little about the action. (One test clip is 1.7 points.)
#
# What does each stream look for first? Its conv1 kernels still look much like the noise they began as, so we look at what training *added*. With $\bar v$ the mean of $v(i, j)$
# over the 7 × 7 places of one channel of a kernel, the squares fall into a part that is even over the places and a rest:
#
# $$\sum_{i,j} v(i, j)^2 = 49\, \bar v^2 + \sum_{i,j} \left(v(i, j) - \bar v\right)^2$$
#
# Random numbers have 1/49 in the first part, 2 %.


# %% tags=["nbval-ignore-output"]
def even(v):
    """The share of all squares that is the same at the 7 x 7 places."""
    mean = v.mean(dim=(-2, -1), keepdim=True)
    parts = 49 * mean.pow(2).sum(), (v - mean).pow(2).sum()
    assert torch.isclose(sum(parts), v.pow(2).sum(), rtol=1e-4)
    return (parts[0] / sum(parts)).item()


added = {}
for name, net in (("spatial", spatial), ("temporal", temporal)):
    added[name] = net.features.conv1.weight.detach().cpu() - start[name]
    print(f"{name:8} even at the start {even(start[name]):.0%}, of what was added {even(added[name]):.0%}")
    assert even(start[name]) < 0.05 < even(added[name])
    assert even(added[name]) > 0.3 or profile != "quick"
a, v = added["spatial"], added["temporal"].unflatten(1, (L, 2))
assert a.shape == (9, 3, 7, 7)
assert v.shape == (9, L, 2, 7, 7)
mean = v.mean(dim=(1, 3, 4), keepdim=True)
in_time = 49 * (v.mean(dim=(3, 4), keepdim=True) - mean).pow(2).sum() / v.pow(2).sum()
in_space = L * (v.mean(dim=1, keepdim=True) - mean).pow(2).sum() / v.pow(2).sum()
print(f"temporal: changes with time alone {in_time:.0%}, with the place alone {in_space:.0%}")
assert in_time > in_space

# %% tags=["nbval-ignore-output"]
fig, axes = plt.subplots(3, 9, figsize=(8.6, 4.2), height_ratios=[7, 10, 10])
for j, column in enumerate(axes.T):
    column[0].imshow(0.5 + a[j].permute(1, 2, 0) / (2 * a[j].abs().max()))
    rows = v[j].mean(dim=2)  # over y: (L, 2, 7)
    for xy in (0, 1):
        column[1 + xy].imshow(rows[:, xy], cmap="RdBu_r", vmin=-rows.abs().max(), vmax=rows.abs().max())
    for ax in column:
        ax.set(xticks=[], yticks=[])
for ax, name in zip(axes[:, 0], ("spatial", "temporal, $d^x$", "temporal, $d^y$"), strict=True):
    ax.set_ylabel(name, fontsize=9)
plots.show(
    fig,
    "What training added to the nine first kernels of each stream. Spatial: blurred patches of one or two colours, mostly red, violet or green. "
    "Temporal, with time downwards and x to the right: level bands that change from row to row, red and blue; those of the vertical flow are stronger.",
)

# %% [markdown]
# The spatial stream mainly learned patches of colour, which tell the light. In the temporal pictures time runs downwards and $x$ to the right, and what was added lies in level bands: the whole window
# moves, and from field to field it moves differently. The paper saw derivatives of the flow in space in some of its kernels and derivatives in time in others (its Figure 4); ours are mostly of the second kind.
#
# ## 5 · Fusion
#
# The paper fuses late: the class probabilities of the streams are averaged.
#
# $$p(c) = \tfrac12 \left( p_\text{spatial}(c) + p_\text{temporal}(c) \right)$$

# %% tags=["nbval-ignore-output"]
average = (p["test"][0] + p["test"][1]) / 2
accuracy["average"] = right(average)
print(f"average {accuracy['average']:.0%}")
assert accuracy["average"] > max(accuracy["spatial"], accuracy["temporal"])

# %% [markdown] tags=["predict"]
# More than either alone, but the spatial stream knows the place and the temporal one the action: why is the average not right about nearly all? Take a clip on the lawn. The spatial stream is sure of
# the lawn and gives 1/6 to each action there. The temporal stream is sure of *jogging* and, about the place, prefers sand by chance: 0.2 to 0.8. Who wins the average?

# %%
p_spatial, p_temporal = np.zeros(12), np.zeros(12)
p_spatial[:6] = 1 / 6
p_temporal[[3, 9]] = 0.2, 0.8  # jogging on the lawn, jogging on sand
for name, scores in (("average", (p_spatial + p_temporal) / 2), ("product", p_spatial * p_temporal)):
    print(
        f"{name}: lawn {scores[3]:.3f}, sand {scores[9]:.3f} ->", "sand" if scores.argmax() == 9 else "lawn"
    )
assert ((p_spatial + p_temporal) / 2).argmax() == 9
assert (p_spatial * p_temporal).argmax() == 3

# %% [markdown] tags=["explain"]
# Sand, although the spatial stream gave it *zero*. An average cannot veto: who spreads its probability over six actions is overruled by who concentrates it, even in a matter of which the latter knows nothing. (A product can; exercise 1.)
#
# The paper's second fusion learns from clips whom to trust with what: a linear SVM for all classes together, on the probabilities of both streams, each vector divided by its length. It learns $w_c$ and $b_c$; its cost, 10, is our choice.
#
# $$s(c) = w_c^T \left[ \frac{p_\text{spatial}}{\lVert p_\text{spatial} \rVert}, \frac{p_\text{temporal}}{\lVert p_\text{temporal} \rVert} \right] + b_c$$

# %% tags=["nbval-ignore-output"]
by_hand = np.hstack([q.numpy() / np.linalg.norm(q.numpy(), axis=1, keepdims=True) for q in p["fuse"]])
assert by_hand.shape == (len(parts["fuse"]), 24)
difference(by_hand, stacked_scores(p["fuse"]), "stacked, by hand and in nlutils", below=1e-5)
svm = SVMFusion(cost=10.0).fit(p["fuse"], labels[parts["fuse"]])
scores = svm.scores(p["test"])
assert scores.shape == average.shape
accuracy["SVM"] = right(scores)
print(*(f"{name} {share:.0%}  " for name, share in accuracy.items()))
assert accuracy["SVM"] > accuracy["average"]

# %% [markdown]
# Where do the streams go wrong? Rows are the true classes, columns what was said, six actions on the lawn, then six on sand; the brighter, the more clips.

# %% tags=["nbval-ignore-output"]
fig, axes = plt.subplots(1, 4, figsize=(9, 2.6), layout="constrained")
for ax, (name, said) in zip(
    axes,
    {"spatial": p["test"][0], "temporal": p["test"][1], "average": average, "SVM": scores}.items(),
    strict=True,
):
    M = np.zeros((12, 12))
    np.add.at(M, (labels[parts["test"]].numpy(), torch.as_tensor(said).argmax(dim=1).numpy()), 1)
    ax.imshow(M, vmin=0, vmax=6)
    ax.axhline(5.5, color="white", lw=0.8)
    ax.axvline(5.5, color="white", lw=0.8)
    ax.set(
        title=name,
        xticks=[2.5, 8.5],
        yticks=[2.5, 8.5],
        xticklabels=["lawn", "sand"],
        yticklabels=["lawn", "sand"],
        xlabel="said",
    )
axes[0].set_ylabel("true")
plots.show(
    fig,
    "Four 12 by 12 tables of counts. Spatial: two blocks, lawn in lawn and sand in sand, with any action in them. Temporal: three parallel diagonals, the "
    "right action in either place. Average: mostly the main diagonal, with remains of the others. SVM: mostly the main diagonal.",
)

# %% [markdown]
# Blocks and diagonals: each stream mixes up what it cannot see, and where blocks and diagonals cross, both are right. The paper's worst class is like that, hammering: one stream takes it for
# a head massage (faces in both), the other for brushing teeth (a hand goes up and down in both).
#
# ## 6 · The paper's size
#
# `TwoStream` in the library has both streams, cuts clips into frames and stacks, and averages. With our weights in it, does it say what we said?

# %%
library = TwoStream(12, width=9, size=(S, S), stack=L).eval()
library.spatial.load_state_dict(spatial.state_dict())
library.temporal.load_state_dict(temporal.state_dict())
clips = parts["test"][:8]
zero, never = torch.zeros(8, dtype=torch.long), torch.zeros(8, dtype=torch.bool)
x = rgb[clips, :1].transpose(1, 2), flow[clips, :L].transpose(1, 2)
assert x[0].shape == (8, 3, 1, S, S)
assert x[1].shape == (8, 2, L, S, S)
with torch.no_grad():
    mine = [
        net.cpu()(see(clips, zero, never).cpu()).softmax(dim=1)
        for net, see in ((spatial, one_frame), (temporal, one_stack))
    ]
    difference(library(x).exp(), (mine[0] + mine[1]) / 2, "the library and our two streams", below=1e-5)

# %% [markdown]
# On the *meta* device a network has shapes but no numbers, so the full size costs nothing. The parameters, by arithmetic and counted, for the 101 classes of UCF101. Which layer holds most of them? And the temporal stream has 17 input channels more:
# what do they cost, in parameters and in multiply-adds?

# %%
with torch.device("meta"):
    full = TwoStream(101)
x = torch.empty(1, 3, 224, 224, device="meta")
by_hand = dict(
    conv1=96 * (3 * 49 + 1), conv2=256 * (96 * 25 + 1), conv3=512 * (256 * 9 + 1), conv4=512 * (512 * 9 + 1),
    conv5=512 * (512 * 9 + 1), fc6=4096 * (512 * 36 + 1), fc7=2048 * (4096 + 1), classifier=101 * (2048 + 1),
)  # fmt: skip
for name, layer in full.spatial.layers():
    x = layer(x.flatten(1) if name == "fc6" else x)
    weights = sum(w.numel() for w in layer.parameters())
    assert weights == by_hand.get(name, 0)
    if name in by_hand or "pool" in name:
        print(f"{name:10} {' x '.join(map(str, x.shape[1:])):15} {weights:12,}")
total, work = {}, {}
for name, channels in (("spatial", 3), ("temporal", 2 * L)):
    stream, x = getattr(full, name), torch.empty(1, channels, 224, 224, device="meta")
    total[name], work[name] = study.parameters(stream), study.multiply_adds(stream, x) / 1e9
    print(f"{name:10} {total[name]:,} parameters, {work[name]:.2f} billion multiply-adds")
assert total == {"spatial": 90_627_813, "temporal": 90_707_781}
assert sum(by_hand.values()) == total["spatial"]
assert abs(work["temporal"] - work["spatial"] - 17 * 49 * 96 * 109**2 / 1e9) < 1e-9
print(f"fc6 holds {by_hand['fc6'] / total['spatial']:.0%} of the parameters")

# %% [markdown]
# Five of six parameters stand in one matrix, the first linear layer. The 17 channels are a thousandth of the parameters and more than half as much work again, for each of their weights is used at 109 × 109 places. (The paper prints neither number, and leaves
# the padding open: none around conv1 and one pixel around the others is our choice.)
#
# ## 7 · ST-ResNet: streams that talk
#
# With late fusion the spatial stream never learns *where* something moves. Feichtenhofer, Pinz and Wildes (2016) take two ResNets, and in one unit of each stage add what the motion stream knows, $m_l$, to what the residual branch $\mathcal{F}$ of the appearance stream gets. With sums $x_l$, $m_l$ before their ReLU:
#
# $$x_{l+1} = \mathrm{ReLU}(x_l) + \mathcal{F}\left(x_l + \mathrm{ReLU}(m_l)\right)$$


# %%
class Unit(nn.Module):
    """x_l -> x_(l+1), both sums before their ReLU: (B, C, T, H, W). With frames = 3 the 1x1 see three frames."""

    def __init__(self, channels, width, frames=1):
        super().__init__()
        self.a = self.conv(channels, width, (frames, 1, 1))
        self.b = self.conv(width, width, (1, 3, 3))
        self.c = self.conv(width, channels, (frames, 1, 1))

    def conv(self, inputs, outputs, kernel):
        layer = nn.Conv3d(inputs, outputs, kernel, padding=tuple(side // 2 for side in kernel), bias=False)
        return nn.Sequential(OrderedDict(conv=layer, norm=nn.BatchNorm3d(outputs)))

    def branch(self, x):
        return self.c(self.b(self.a(x).relu()).relu())

    def forward(self, x, m=None):
        return x.relu() + self.branch(x.relu() if m is None else x + m.relu())


torch.manual_seed(0)
unit = Unit(16, 4).eval()
x_l, m_l, other_m = torch.randn(3, 2, 16, 5, 6, 6)
assert unit(x_l, m_l).shape == x_l.shape == (2, 16, 5, 6, 6)
by_equation = x_l.relu() + unit.branch(x_l + m_l.relu())
difference(unit(x_l, m_l), by_equation, "the unit and the equation")
assert (unit(x_l, m_l) - unit(x_l, other_m)).abs().max() > 0.01  # motion matters

# %% [markdown] tags=["predict"]
# The skip path carries $x_l$ through the network, and no motion shall enter it. To prove that none does, we shut the branch: the last gain becomes zero, as in notebook 05. What does the unit then return for each of two motions?

# %%
nn.init.zeros_(unit.c.norm.weight)
difference(unit(x_l, m_l), unit(x_l, other_m), "two motions, branch shut")
difference(unit(x_l, m_l), x_l.relu(), "and ReLU(x)")
assert torch.equal(unit(x_l, m_l), x_l.relu())

# %% [markdown] tags=["explain"]
# The same, to the last bit: what is left is the skip path, and no motion is in it. All that appearance learns of motion passes through $\mathcal{F}$'s convolutions, which can ask *what moves here*.
#
# The second thing in the same units, in both streams: the two 1×1 convolutions see three frames. They start from a trained 2D kernel $w$ with $w/3$ for each frame. Two further frames of $C \times C/4$ weights, in two convolutions, in four
# stages and two streams: how many at full size, with ResNet-50 and 101 classes? (The injection costs none.)

# %%
flat, deep = Unit(16, 4).eval(), Unit(16, 4, frames=3).eval()
weights = flat.state_dict()
for name in ("a.conv.weight", "c.conv.weight"):
    weights[name] = weights[name].repeat(1, 1, 3, 1, 1) / 3
deep.load_state_dict(weights)
still = x_l[:, :, :1].repeat(1, 1, 5, 1, 1)  # five times the same frame
difference(
    deep(still)[:, :, 2], flat(still)[:, :, 2], "in the middle of a film that stands still", below=1e-5
)
assert not torch.allclose(deep(still)[:, :, 0], flat(still)[:, :, 0], atol=1e-3)
print("at its first frame: another result, for the padding before it is zero")

with torch.device("meta"):
    plain, joined = STResNet(101, temporal=False), STResNet(101)
counts = [study.parameters(net) for net in (plain, joined)]
print(f"two ResNet-50: {counts[0]:,}, with kernels over time {counts[1]:,}")
assert counts == [47_483_274, 58_624_394]
assert counts[1] - counts[0] == 2 * sum(2 * 2 * C * C // 4 for C in (256, 512, 1024, 2048))

# %% [markdown]
# ## 8 · Two more, as differences
#
# "Quo vadis" (Carreira and Zisserman 2017) compares three systems of two streams, all made of Inception-v1. What differs is how many frames a stream sees at once, and where the streams meet:
#
# | | a stream sees | the streams meet |
# |:--|:--|:--|
# | two-stream | 1 frame; 10 fields | in the probabilities |
# | 3D-fused | 5 frames; 50 fields, in stacks of 10 | in a 3×3×3 convolution on their last maps |
# | two-stream I3D | 64 frames; 64 fields, through 3D kernels | in the logits |
#
# The stack has gone from the last one: its kernels see time themselves, so a field is a frame of 2 channels. The paper's Table 1, which we read at second hand, prints millions of parameters. Ours, for 400 classes:

# %%
with torch.device("meta"):
    systems = {TwoStreamInception(400): 12, FusedTwoStream(400): 39, TwoStreamI3D(400): 25}
    x = torch.empty(1, 3, 5, 224, 224), torch.empty(1, 2, 50, 224, 224)
for net, paper in systems.items():
    counted = study.parameters(net)
    print(f"{type(net).__name__:19} {counted:10,}   paper {paper} M")
    assert paper in (round(counted / 1e6), counted // 10**6)
fused = list(systems)[1]
maps = fused.features(x)
assert maps[0].shape == maps[1].shape == (1, 1024, 5, 7, 7)
print(
    "3D-fused joins",
    " and ".join(str(tuple(part.shape[1:])) for part in maps),
    "to",
    fused.fusion.conv.out_channels,
    "maps",
)

# %% [markdown]
# The 39.77 million of the second are 39 when cut off and 40 when rounded. The table seems to cut: of the 79.65 million of notebook 13's variant it prints 79.
#
# ## 9 · What was reported
#
# Accuracies of the first paper, in per cent. Table 1, temporal stream alone, first split of UCF101: one field 73.9, five 80.4, ten 81.0; ten along trajectories 80.2; five forward and five backward 81.2; ten without mean subtraction 79.9.
# Table 4, mean of three splits:
#
# | | UCF101 | HMDB51 |
# |:--|--:|--:|
# | spatial | 73.0 | 40.5 |
# | temporal | 83.7 | 54.6 |
# | averaged | 86.9 | 58.0 |
# | SVM | 88.0 | 59.4 |
# | improved trajectories, hand-made (notebook 15), long encoding | 87.9 | 61.1 |
#
# On real videos, too, fusion beat both streams and the SVM the average. On UCF101 two deep networks came level with hand-made features; on HMDB51 those stayed ahead. Are the streams compared fairly? The spatial one had seen ImageNet, the temporal one both data sets at once. From
# nothing, on the first split, the spatial stream reached 52.3 and the temporal one 81.0. The trajectory stack lost to the plain one by 0.8 points; the table gives no intervals, and the authors call the differences between the stacks marginal.
#
# "Quo vadis" (its Table 2, read at second hand) reports on Kinetics, both streams together: two-stream 65.6, 3D-fused 67.2, two-stream I3D 74.2. For ST-ResNet with trajectory features it quotes 94.6 and 70.3 on UCF101 and HMDB51. Our own figures of section 5 belong
# beside none of these: twelve drawn classes, made so that the streams need one another, and 60 test clips.

# %% [markdown] tags=["exercise"]
# ## Exercises
#
# ### Exercise 1 · Let the streams veto (easy, 10 minutes)
#
# Section 5 showed a clip that a product would get right. Write `product(p, q)`: both (clips, classes); return the products of the probabilities, each row divided by its sum. **Expect**: rows that add up to 1, and with `right(product(*p["test"]))` an accuracy above that of the average, without any training (in five trainings of ours by 5 to 19 points).
#
# <details><summary>Hint 1: a nudge</summary>Which axis are the classes?</details>
# <details><summary>Hint 2: the formula</summary>r(c) = p(c) q(c) / Σ p(c') q(c'), summed over c'.</details>
# <details><summary>Hint 3: part of the code</summary><code>r = p * q</code>, then <code>r.sum(dim=1, keepdim=True)</code></details>


# %% tags=["stub"]
def product(p, q):
    #: solution
    r = p * q
    return r / r.sum(dim=1, keepdim=True)
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
a, b = torch.rand(2, 5, 12, generator=torch.Generator().manual_seed(0)).softmax(dim=2)
check(
    "Exercise 1",
    lambda: product(a, b),
    a * b / (a * b).sum(dim=1, keepdim=True),
    mistakes={
        "this is the average": (a + b) / 2,
        "this is the sum": a + b,
        "the rows do not add up to 1": a * b,
        "the sum ran over the clips, not the classes": a * b / (a * b).sum(dim=0),
        "the sum ran over clips and classes": a * b / (a * b).sum(),
        "a softmax takes exponentials; divide by the sum": (a * b).softmax(dim=1),
        "this divides by the largest number of the row, not by the sum": a
        * b
        / (a * b).amax(1, keepdim=True),
        "each row is divided by its length, not by its sum": F.normalize(a * b),
        "these are square roots of the product": (a * b).sqrt(),
        "this is the geometric mean": F.normalize((a * b).sqrt(), p=1),
    },
)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Both ways from the frame (medium, 20 minutes)
#
# The bi-directional stack has $L/2$ fields forward from frame $\tau$ and $L/2$ backward. `back[t]` leads from frame $t+1$ to frame $t$. Write `both_ways(d, back, tau, L)`: (L, H, W, 2), first $\tau \to \tau+1 \to \dots$, then $\tau \to \tau-1 \to \dots$
# **Expect**: for $\tau = 5$ and $L = 4$ the fields `d[5], d[6], back[4], back[3]`.
#
# <details><summary>Hint 1: a nudge</summary>Which field leads from frame 5 to frame 4?</details>
# <details><summary>Hint 2: the formula</summary>back[τ-1], back[τ-2], …, back[τ-L/2].</details>
# <details><summary>Hint 3: part of the code</summary><code>back[tau - L // 2 : tau][::-1]</code></details>


# %% tags=["stub"]
def both_ways(d, back, tau, L):
    #: solution
    return np.concatenate([d[tau : tau + L // 2], back[tau - L // 2 : tau][::-1]])
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
d = optical_flow(waver.frames)
back = optical_flow(waver.frames[::-1])[::-1]


def joined(*halves):
    return np.concatenate(halves)


check(
    "Exercise 2",
    lambda: both_ways(d, back, 5, 4),
    flow_stack(d, 5, 4, backward=back, centred=False),
    mistakes={
        "the backward half leads towards frame tau; it should lead away from it": joined(d[5:7], back[3:5]),
        "one field too far: back[tau] leads to frame tau, not away from it": joined(d[5:7], back[4:6][::-1]),
        "back[tau] and what follows it lie behind frame tau": joined(d[5:7], back[5:7]),
        "the forward half begins with d[tau]": joined(d[6:8], back[3:5][::-1]),
        "the forward half comes first": joined(back[3:5][::-1], d[5:7]),
        "all of them lead forward": d[5:9],
        "the second half is made of d; take it from back": joined(d[5:7], d[3:5][::-1]),
        "-d lies at the pixels of the earlier frame; take back": joined(d[5:7], -d[3:5][::-1]),
        "back needs no minus: its arrows lead backward already": joined(d[5:7], -back[3:5][::-1]),
        "these are L fields each way; half of them are asked": joined(d[5:9], back[1:5][::-1]),
    },
)

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · The other way round (medium, 15 minutes)
#
# Write `talk(x, m, unit_x, unit_m)`, in which *each* stream injects into the other one's unit, and return $(x_{l+1}, m_{l+1})$. **Expect**: what motion gets is ReLU($x_l$), not ReLU($x_{l+1}$).
#
# <details><summary>Hint 1: a nudge</summary><code>Unit.forward</code> takes what is injected as its second argument.</details>
# <details><summary>Hint 2: the formula</summary>m' = ReLU(m) + F_m(m + ReLU(x)).</details>
# <details><summary>Hint 3: part of the code</summary>Do not overwrite <code>x</code> before the second unit has seen it.</details>


# %% tags=["stub"]
def talk(x, m, unit_x, unit_m):
    #: solution
    return unit_x(x, m), unit_m(m, x)
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
torch.manual_seed(1)
one, two = Unit(16, 4).eval(), Unit(16, 4).eval()
check(
    "Exercise 3",
    lambda: talk(x_l, m_l, one, two),
    (one(x_l, m_l), two(m_l, x_l)),
    mistakes={
        "motion got x after its unit, not before": (one(x_l, m_l), two(m_l, one(x_l, m_l))),
        "appearance got m after its unit, not before": (one(x_l, two(m_l, x_l)), two(m_l, x_l)),
        "only appearance was told": (one(x_l, m_l), two(m_l)),
        "only motion was told": (one(x_l), two(m_l, x_l)),
        "x and m have changed places within the units": (one(m_l, x_l), two(x_l, m_l)),
        "each stream went through the other's unit": (two(x_l, m_l), one(m_l, x_l)),
        "unit_x was used twice": (one(x_l, m_l), one(m_l, x_l)),
        "the injection must not enter the skip path": (one(x_l + m_l.relu()), two(m_l + x_l.relu())),
        "the sum x + m entered the skip path, too": (one(x_l + m_l), two(m_l + x_l)),
        "nothing was injected": (one(x_l), two(m_l)),
        "the results are in the other order": (two(m_l, x_l), one(x_l, m_l)),
    },
)

# %% [markdown]
# ## What you learned
#
# - A frame knows places and things, a field of flow directions; each stream mixes up just the classes that differ in what it cannot see.
# - Stacks at a place and along trajectories agree where motion does not depend on the place.
# - An average cannot veto; a product or an SVM on the probabilities can.
# - Our spatial stream's first kernels learned colour, the temporal stream's change over time.
# - CNN-M-2048 has 90.6 million parameters, five of six in one matrix. 17 more input channels add few parameters and much work.
# - An injection into the residual branch leaves the skip path as it was, to the last bit.
#
# ## Further reading
#
# - K. Simonyan, A. Zisserman: *Two-Stream Convolutional Networks for Action Recognition in Videos*. NIPS 2014.
# - C. Feichtenhofer, A. Pinz, R. P. Wildes: *Spatiotemporal Residual Networks for Video Action Recognition*. NIPS 2016.
# - J. Carreira, A. Zisserman: *Quo Vadis, Action Recognition? A New Model and the Kinetics Dataset*. CVPR 2017.
# - K. Chatfield, K. Simonyan, A. Vedaldi, A. Zisserman: *Return of the Devil in the Details*. BMVC 2014. CNN-M.
# - K. Crammer, Y. Singer: *On the Algorithmic Implementation of Multiclass Kernel-based Vector Machines*. JMLR 2001.
