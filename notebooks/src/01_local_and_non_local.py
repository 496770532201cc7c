# %% [markdown]
# # 01 · Local and non-local: what a layer can reach, and what reach is good for
#
# After this notebook you can
#
# - measure how far one output of a stack of convolutions sees, and how much of that counts
# - say after how many layers two far-apart places meet
# - prove what an average of local features cannot answer, and check it on a trained network
# - tell what a global average can do from what needs a weight for each pair of places
# - say what a control must share with the network it stands beside, and read several seeds as an interval
#
# | | |
# |:--|:--|
# | What you need | notebook 00; convolutions and a training loop in PyTorch |
# | Your time | 75 minutes |
# | Machine time | 30 seconds |
# | Framework | PyTorch |

# %% tags=["parameters"]
import os

profile = os.environ.get("NLUTILS_PROFILE", "quick")

# %%
import json
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import to_rgb
from torch import nn
from torch.nn.functional import cross_entropy

import nlutils
from nlutils import plots
from nlutils.course import check, difference, settings
from nlutils.paths import results_root

settings = settings(profile, quick=dict(seeds=1), full=dict(seeds=3))  # networks trained here, of each kind
plots.style()
torch.set_num_threads(1)  # small arrays: more threads would only wait for each other

# %% [markdown]
# ## 1 · How far does a stack of convolutions see?
#
# A place $j$ of the input matters to a place $i$ of the output if the gradient of $y_i$ with
# respect to $x_j$ is not zero. So the *receptive field* can be measured. We stack $n$
# 3 × 3 convolutions with ReLUs and random weights, take the gradient of the middle output number, square it, and add up twenty draws of
# weights and inputs.


# %%
def stack(n, channels=6):
    layers = []
    for layer in range(n):
        conv = nn.Conv2d(channels if layer else 1, channels, 3, padding=1).double()
        nn.init.kaiming_normal_(conv.weight)  # keeps the size of activations from layer to layer
        nn.init.zeros_(conv.bias)
        layers += [conv, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def squared_gradient(n, draws=20, size=45):
    middle = size // 2
    total = torch.zeros(size, size, dtype=torch.float64)
    for _draw in range(draws):
        x = torch.randn(1, 1, size, size, dtype=torch.float64, requires_grad=True)
        stack(n)(x)[0, 0, middle, middle].backward()
        total += x.grad[0, 0] ** 2
    return total / total.sum()


torch.manual_seed(0)
fields = {n: squared_gradient(n) for n in (1, 5, 10, 20)}
for n, field in fields.items():
    seen = field.sum(dim=0) > 0
    print(f"{n:2} layers: one output sees {int(seen.sum()):2} of 45 columns")
    assert int(seen.sum()) == 2 * n + 1

# %% [markdown]
# Each layer adds one column to either side: $2n + 1$. That is the *theoretical* field. How is the gradient spread inside it? (Figure: white, what is seen; red, $2\sigma$.) In a layer, one step goes to the left, stays or goes to the right, and a path from output to input takes $n$
# steps. If all were equally likely and independent, their variances would add up:
#
# $$\sigma_n^2 = n \cdot \frac{(-1)^2 + 0^2 + 1^2}{3} = \frac{2n}{3}$$

# %%
x_offset = torch.arange(45) - 22
for n, field in fields.items():
    sigma = float((field.sum(dim=0) * x_offset**2).sum()) ** 0.5
    print(f"{n:2} layers: edge at {n:2}, sigma predicted {(2 * n / 3) ** 0.5:.1f}, measured {sigma:.1f}")
    assert abs(sigma / (2 * n / 3) ** 0.5 - 1) < 0.2

# %%
fig, axes = plt.subplots(1, 4, figsize=(9, 2.6))
for ax, (n, field) in zip(axes, fields.items(), strict=True):
    plots.heatmap(ax, field.sqrt())
    ax.add_patch(plt.Rectangle((21.5 - n, 21.5 - n), 2 * n + 1, 2 * n + 1, fill=False, color="white", lw=1))
    ax.add_patch(plt.Circle((22, 22), 2 * (2 * n / 3) ** 0.5, fill=False, color=plots.COLOURS["red"], lw=1.5))
    ax.set_title(f"n = {n}")
plots.show(
    fig,
    "The gradient's size in the input for 1, 5, 10 and 20 layers. A white square of side 3, 11, 21 and 41 frames what is seen; "
    "the bright blob in its middle fills less and less of it, and a red circle of two sigma holds most of it.",
)

# %% [markdown] tags=["predict"]
# The square grows like $n$, the blob like $\sqrt n$: this smaller one is the *effective* receptive field. A pixel 20 columns away comes into
# sight with layer 20. Before you run the next cell: how large is its share of the squared gradient, compared with the middle pixel's? A
# tenth, a thousandth, a millionth, or less?


# %%
def layers_until_seen(distance, place):
    """How many averaging layers until the output at `place` depends on both ends, 0 and `distance`."""
    x = torch.zeros(1, 1, distance + 1, requires_grad=True)
    y, n = x, 0
    while True:
        y, n = nn.functional.conv1d(y, torch.full((1, 1, 3), 1 / 3), padding=1), n + 1
        (gradient,) = torch.autograd.grad(y[0, 0, place], x, retain_graph=True)
        if gradient[0, 0, 0] > 0 and gradient[0, 0, -1] > 0:
            return n


for distance in (4, 10, 20):
    end, halfway = layers_until_seen(distance, 0), layers_until_seen(distance, distance // 2)
    print(
        f"{distance:2} columns apart: one end sees the other after {end:2} layers, the middle sees both after {halfway:2}"
    )
    assert (end, halfway) == (distance, distance // 2)

paths = np.ones(1)
for _layer in range(20):
    paths = np.convolve(paths, [1 / 3, 1 / 3, 1 / 3])
print(f"share at distance 20, as part of the middle's: {paths[0] / paths[20]:.1e}")
assert len(paths) == 41
assert 2.6e-9 < paths[0] / paths[20] < 2.7e-9

# %% [markdown] tags=["explain"]
# Some three billionths: of all $3^{20}$ paths one goes straight to the edge, and 377 million end in the middle. Two
# places that are 20 columns apart meet in a place halfway after 10 layers, in each other after 20, and then
# barely. Strides and pooling help (exercise 1). What if we do not go step by step?

# %% [markdown]
# ## 2 · One operation that sees everything
#
# Our pictures have 6 × 6 cells of 4 × 4 pixels. *Coloured* things stand in the two columns on the left, *grey* ones in the two on the
# right. A thing is a pattern: 8 of its 16 pixels are lit. Each grey thing has a coloured twin of the same pattern. The question, later: *what
# colour is the twin of each grey thing?*


# %%
def places(count, things, rng):
    """For each picture `things` different cells on the left, and as many on the right: (count, things) each."""
    cell = np.arange(36).reshape(6, 6)
    left, right = (side.reshape(1, 12).repeat(count, axis=0) for side in (cell[:, :2], cell[:, 4:]))
    return rng.permuted(left, axis=1)[:, :things], rng.permuted(right, axis=1)[:, :things]


def assemble(cells):
    """(count, 36, 3, 4, 4), the pixels cell by cell -> pictures (count, 3, 24, 24)."""
    rows = cells.reshape(-1, 6, 6, 3, 4, 4).transpose(0, 3, 1, 4, 2, 5)
    return torch.tensor(rows.reshape(-1, 3, 24, 24))


def twins(count, rng, pairs, patterns):
    """Pictures, and the answers (count, 6, 6): at grey things the twin's colour 0 to 3, elsewhere -100."""
    palette = np.array([to_rgb(plots.COLOURS[name]) for name in ("orange", "sky", "green", "pink")])
    look = patterns[np.argsort(rng.random((count, len(patterns))), axis=1)[:, :pairs]]
    # Eight pairs: each colour twice. Four: each once. Fewer: some of the four.
    colour = np.argsort(rng.random((count, max(pairs, 4))), axis=1)[:, :pairs] % 4
    left, right = places(count, pairs, rng)
    cells = np.zeros((count, 36, 3, 4, 4), np.float32)
    answer = np.full((count, 36), -100)
    picture = np.arange(count)[:, None]
    cells[picture, left] = palette[colour][..., None, None] * look[:, :, None]
    cells[picture, right] = 0.8 * look[:, :, None]
    answer[picture, right] = colour
    return assemble(cells), torch.tensor(answer.reshape(count, 6, 6))


def draw_patterns(count, rng):
    """`count` different patterns: (count, 4, 4) of 0 and 1, eight of each."""
    rows = rng.permuted(np.tile(np.arange(16) < 8, (4 * count, 1)), axis=1)
    return rng.permutation(np.unique(rows, axis=0))[:count].reshape(count, 4, 4).astype(np.float32)


# %%
patterns = draw_patterns(1500, np.random.default_rng(7))
known, new = patterns[:1000], patterns[1000:]  # to train on; to test on
assert not {p.tobytes() for p in known} & {p.tobytes() for p in new}

rng = np.random.default_rng(1)
shown = {pairs: twins(1, rng, pairs, known) for pairs in (1, 4, 8)}
fig, axes = plots.strip(
    [x[0].permute(1, 2, 0) for x, _ in shown.values()], [f"pairs: {pairs}" for pairs in shown], width=2.6
)
for ax in axes:
    edges = np.arange(5) * 4 + 3.5
    ax.vlines(edges, -0.5, 23.5, color=plots.COLOURS["grey"], lw=0.5)
    ax.hlines(edges, -0.5, 23.5, color=plots.COLOURS["grey"], lw=0.5)
plots.show(
    fig,
    "Three pictures with 1, 4 and 8 pairs of small patterns on black. On the left of each the patterns are orange, blue, green or "
    "pink, on the right grey; the columns between are empty, and thin lines part the cells. To find the twin of a grey pattern among eight takes a while.",
)

# %% [markdown]
# A twin is at least three cells away. How can a grey cell learn of it in *one* step? Let cell $i$ take a weighted sum over all 36 cells,
#
# $$y_i = \sum_{j} w_{ij}\, g(x_j)$$
#
# with $x_j$ the vector of cell $j$ and $g$ the same small layer for all cells. Three ways to weight:
#
# - `itself`: $w_{ij}$ is 1 for $j = i$, else 0. Local: no cell learns anything of another.
# - `average`: $w_{ij} = 1/N$. Everybody reaches everybody, and everybody gets the same.
# - `similarity`: $w_{ij} = e^{x_i \cdot x_j} / \sum_k e^{x_i \cdot x_k}$, as in notebook 00 with $s = 1$, of vectors that keep their length. Each *pair* has its own weight. This is the
#   non-local paper's Gaussian; notebook 04 derives it.
#
# The $N \times N$ weights of a picture are its *map*.


# %%
def itself(x):
    """(B, N, C) -> weights (B, N, N), as for the two below."""
    return torch.eye(x.shape[1]).expand(len(x), -1, -1)


def average(x):
    return torch.full((len(x), x.shape[1], x.shape[1]), 1 / x.shape[1])


def similarity(x):
    return torch.softmax(x @ x.transpose(1, 2), dim=2)


x_cells = torch.randn(1, 36, 8)
for weights in (itself, average, similarity):
    w = weights(x_cells)
    assert w.shape == (1, 36, 36)
    assert torch.allclose(w.sum(dim=2), torch.ones(1, 36))
    y = w @ x_cells  # g is the identity for the moment
    first = sum(w[0, 0, j] * x_cells[0, j] for j in range(36))  # the equation, for i = 0
    difference(y[0, 0], first, f"{weights.__name__:10} sum and matrix", below=1e-5)

# %% [markdown]
# Now a layer around the sum. $W_z$ brings $y_i$ back to $C$ channels, a batch normalisation gives it a fair size, and $x_i$ is added: what the paper calls a *block*. The three blocks differ in one line, `weights`, which has no
# parameter. So they have **the same parameters, all of them in use**; `average` and `similarity` have **the same reach** too.
#
# The fourth, `Deep`, does without: five residual 3 × 3 convolutions,
# enough to reach from edge to edge, with exactly as many parameters.


# %%
class Block(nn.Module):
    def __init__(self, weights, C=32, d=16):
        super().__init__()
        self.weights = weights
        self.g, self.w_z, self.norm = nn.Conv2d(C, d, 1), nn.Conv2d(d, C, 1), nn.BatchNorm2d(C)

    def forward(self, x):
        y = self.weights(x.flatten(2).transpose(1, 2)) @ self.g(x).flatten(2).transpose(1, 2)
        return x + self.norm(self.w_z(y.transpose(1, 2).unflatten(2, x.shape[2:])))


class Deep(nn.Module):
    def __init__(self, layers=5, width=4, C=32):
        super().__init__()
        self.first, self.last, self.norm = nn.Conv2d(C, width, 1), nn.Conv2d(width, C, 1), nn.BatchNorm2d(C)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
            for _ in range(layers)
        )

    def forward(self, x):
        y = self.first(x)
        for layer in self.layers:
            y = y + layer(y)
        return x + self.norm(self.last(y))


blocks = {
    "itself": partial(Block, itself),
    "deep": Deep,
    "average": partial(Block, average),
    "similarity": partial(Block, similarity),
}
counts = [sum(p.numel() for p in make().parameters()) for make in blocks.values()]
print("parameters:", dict(zip(blocks, counts, strict=True)))
assert counts == [1136] * 4

# %% [markdown]
# How far does each see? We take the gradient of the output in the top right corner, and compare our block with the library's:

# %%
torch.manual_seed(0)
x = torch.randn(1, 32, 6, 6, requires_grad=True)
reach = {}
for name, make in blocks.items():
    z = make().eval()(x)
    (gradient,) = torch.autograd.grad(z[0, :, 0, 5].sum(), x)
    reach[name] = int((gradient[0] != 0).any(dim=0).sum())
print("cells of 36 that the corner sees:", reach)
assert reach == {"itself": 1, "deep": 36, "average": 36, "similarity": 36}

block = Block(similarity).eval()
library = nlutils.torch.NonLocalBlock(32, 16, ndim=2, instantiation="gaussian").eval()
library.load_state_dict(block.state_dict())
difference(block(x), library(x), "our block and the library's", below=1e-5)

# %% [markdown]
# ## 3 · A question about two places, and a proof
#
# Reach costs one line. What is it good for? We begin with the smallest question that concerns two places: one thing on the left, one on the
# right, each a cross or a ring. *Does the picture hold a cross and a ring?*


# %%
def two_things(count, rng, kinds=None):
    """Pictures, and the answers (count,): 1 for a cross and a ring, 0 for two of a kind."""
    cross = np.array([[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]], np.float32)
    kinds = rng.integers(2, size=(count, 2)) if kinds is None else np.tile(kinds, (count, 1))
    cells = np.zeros((count, 36, 3, 4, 4), np.float32)
    for side, place in enumerate(places(count, 1, rng)):
        look = np.where(kinds[:, side, None, None] == 0, cross, 1 - cross)
        cells[np.arange(count), place[:, 0]] = 0.8 * look[:, None]
    return assemble(cells), torch.tensor(kinds[:, 0] != kinds[:, 1]).long()


# The four kinds of pictures, with the things at the same places.
four = torch.cat(
    [two_things(1, np.random.default_rng(3), kinds)[0] for kinds in ((0, 1), (1, 0), (0, 0), (1, 1))]
)
titles = ["cross, ring: yes", "ring, cross: yes", "two crosses: no", "two rings: no"]
fig, axes = plots.strip(four.permute(0, 2, 3, 1), titles, width=2)
plots.show(
    fig,
    "Four pictures with a small grey thing on the left and one on the right, at the same places: cross and ring, ring and cross, "
    "two crosses, two rings.",
)

# %% [markdown]
# Around a block stands a small network: a 4 × 4 convolution of stride 4 turns each cell into 32 numbers; then the
# block; then a 1 × 1 convolution with a ReLU and another that gives scores; for a question about the whole picture, the scores are
# averaged over the places.
#
# Let $s$ be the score for *yes* less that for *no*. If each place sees at most one of the two things, every term of the average
# depends on the left thing $a$ alone, on the right thing $b$ alone, or on neither:
#
# $$s(a, b) = u(a) + v(b) + c \quad\Longrightarrow\quad s(\times, \circ) + s(\circ, \times) - s(\times, \times) - s(\circ, \circ) = 0$$
#
# because each of $u(\times), u(\circ), v(\times), v(\circ)$ comes once with a plus and once with a minus, and $c$ twice. The cell puts the four pictures
# above into untrained networks.


# %%
def network(block, outputs, whole=False, C=32):
    layers = [
        nn.Conv2d(3, C, 4, stride=4),
        nn.ReLU(),
        block,
        nn.Conv2d(C, C, 1),
        nn.ReLU(),
        nn.Conv2d(C, outputs, 1),
    ]
    if whole:
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers)


def interaction(net):
    """s(x,o) + s(o,x) - s(x,x) - s(o,o), and the size of the scores."""
    with torch.no_grad():
        s = net(four).diff(dim=1)[:, 0]
    return float(abs(s[0] + s[1] - s[2] - s[3]) / s.abs().max())


torch.manual_seed(0)
for name, make in {**blocks, "deep, 1 layer": partial(Deep, layers=1)}.items():
    zero = interaction(network(make(), 2, whole=True).eval()) < 1e-5
    print(f"{name:14} the four scores cancel: {zero}")
    assert zero == (name in ("itself", "deep, 1 layer"))

# %% [markdown]
# It holds for one 3 × 3 layer as well and for any depth that does not reach both things.
#
# Four numbers that cancel cannot be right four times. A right answer has the margin $m > 0$, where $m = s$ for *yes* and $m = -s$ for *no*; the
# four margins add up to 0. So at most three of the four kinds are right. The training loss is
# $\ell(m) = \log(1 + e^{-m})$, a convex function, and the mean of a convex function is at least the function of the mean (Jensen):
#
# $$\frac{1}{4} \sum_{k=1}^{4} \ell(m_k) \;\ge\; \ell\Big(\frac{1}{4} \sum_{k=1}^{4} m_k\Big) = \ell(0) = \log 2$$
#
# A hundred thousand choices of $u$, $v$ and $c$ try to beat the two bounds:

# %%
u, v = np.random.default_rng(0).normal(scale=2, size=(2, 100_000, 2))
c = np.random.default_rng(1).normal(scale=2, size=100_000)
s = np.stack(
    [u[:, 0] + v[:, 1] + c, u[:, 1] + v[:, 0] + c, u[:, 0] + v[:, 0] + c, u[:, 1] + v[:, 1] + c], axis=1
)
m = s * [1, 1, -1, -1]
losses = np.log1p(np.exp(-m)).mean(axis=1)
scores = torch.tensor(np.stack([0 * s, s], axis=1))  # of no and of yes, for the four kinds
answers = torch.tensor([1, 1, 0, 0]).expand(len(s), 4)
difference(cross_entropy(scores, answers), losses.mean(), "training loss and formula", below=1e-9)
print(
    "most kinds right:",
    (m > 0).sum(axis=1).max(),
    "of 4;  smallest loss >= log 2:",
    losses.min() >= np.log(2),
)
assert (m > 0).sum(axis=1).max() == 3
assert losses.min() >= np.log(2)

# %% [markdown] tags=["predict"]
# ## 4 · Training, and a control that spoils the story
#
# Now all four are trained, on 150 batches of 32 pictures that are drawn anew each time. Which result follows from the proof? And what do you
# expect of the average?


# %%
def train(net, make, steps, seed, rate=5e-3):
    """Train on `steps` new batches of 32 that `make(count, rng)` draws. Returns the network, ready for a test."""
    rng = np.random.default_rng(seed)
    optimiser = torch.optim.Adam(net.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    for _step in range(steps):
        x, answer = make(32, rng)
        loss = cross_entropy(net(x), answer)  # leaves out answers of -100
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return net.eval()


def accuracy(net, x, answer):
    with torch.no_grad():
        right = net(x).argmax(dim=1) == answer
    return right[answer >= 0].float().mean().item()


x, answer = two_things(2000, np.random.default_rng(5))
relation, cancels = {}, {}
for name, make in blocks.items():
    torch.manual_seed(0)
    net = train(network(make(), 2, whole=True), two_things, steps=150, seed=0)
    with torch.no_grad():
        relation[name] = accuracy(net, x, answer), cross_entropy(net(x), answer).item()
    cancels[name] = interaction(net) < 1e-5
    print(
        f"{name:11} right on nearly all: {relation[name][0] > 0.99!s:6} the four scores still cancel: {cancels[name]}"
    )

# %% tags=["nbval-ignore-output"]
for name, (right, loss) in relation.items():
    print(f"{name:11} accuracy {right:.3f}   loss {loss:.4f}   (log 2 = {np.log(2):.4f})")
assert relation["itself"][0] < 0.8
assert 0.67 < relation["itself"][1] < 0.75
assert cancels["itself"]
assert all(relation[name][0] > 0.99 for name in ("deep", "average", "similarity"))

# %% [markdown] tags=["explain"]
# The local network ends where the proof has put it, at log 2, which is a coin. All three others are right, *the average
# as well*. Had we compared only `itself` with `similarity`, we would have written that the task needs pairwise weights. It does
# not: reach is enough. The average tells every place how many crosses and how many rings there are, and one ReLU later "one of each" is a
# matter of thresholds. A deep stack that reaches far enough does it too.
#
# Is there anything at all that needs a weight for each pair?

# %% [markdown] tags=["predict"]
# ## 5 · Many questions at once
#
# Back to the twins. Now each place gives its own four scores, and we look at the grey ones. The task can be made harder in two ways: more pairs in a
# picture, and patterns that are *new*, never seen in training. Chance is 1/4. We train the average in three cases (300 batches in (b), else 800), in (c) similarity too:
#
# | | one pair | eight pairs |
# |:--|:--|:--|
# | **closed**: always the same 8 patterns | | (a) |
# | **new**: 1,000 patterns to train on, 500 others in the test | (b) | (c) |
#
# In which of the three do you expect it to fail, and why there?

# %%
tasks = {
    "closed, 8 pairs": (8, known[:8], known[:8], 800),
    "new, 1 pair": (1, known, new, 300),  # learned sooner
    "new, 8 pairs": (8, known, new, 800),
}


def trained(make, task, seed):
    pairs, train_on, _, steps = tasks[task]
    torch.manual_seed(seed)
    return train(network(make(), 4), partial(twins, pairs=pairs, patterns=train_on), steps=steps, seed=seed)


def tested(net, task):
    pairs, _, test_on, _ = tasks[task]
    return accuracy(net, *twins(500, np.random.default_rng(99), pairs, test_on))


here = {}
for name, task in [*(("average", task) for task in tasks), ("similarity", "new, 8 pairs")]:
    nets = [trained(blocks[name], task, seed) for seed in range(settings.seeds)]
    here[name, task] = [tested(net, task) for net in nets]
    print(f"{name:11} {task:16} right on more than 85 %: {min(here[name, task]) > 0.85}")

# %% tags=["nbval-ignore-output"]
for (name, task), values in here.items():
    print(f"{name:11} {task:16}", *(f"{value:.3f}" for value in values))
assert min(here["average", "closed, 8 pairs"]) > 0.85
assert min(here["average", "new, 1 pair"]) > 0.9
assert max(here["average", "new, 8 pairs"]) < 0.7
assert min(here["similarity", "new, 8 pairs"]) > 0.95

# %% [markdown] tags=["explain"]
# In (c) the average is right on half, above chance, but far behind. With **one pair** there is one colour to pass on, and passing on is what an average does; nobody needs to
# compare patterns, so it does not matter that they are new. With a **closed set** all grey things get the same $d = 16$ numbers, but a fixed table of 8 patterns is enough to read them. With **many things, and new**, the same 16
# numbers would have to describe patterns never seen. (Section 6 shows how far that goes.) With pairwise weights each grey thing gets its own sum.
#
# Does its twin weigh most? Here is one row of the trained map; then all are counted. (Weight on
# itself adds no colour: grey has none.) Dashed: its twin; numbers in per cent.

# %%
net = nets[-1]
x, answer = twins(200, np.random.default_rng(12), 8, new)
with torch.no_grad():
    features = net[:2](x).flatten(2).transpose(1, 2)
    w = similarity(features)
assert w.shape == (200, 36, 36)

cells = (
    x.unfold(2, 4, 4).unfold(3, 4, 4).amax(dim=1).flatten(1, 2).flatten(2) > 0
)  # (200, 36, 16): lit or not
i = int((answer[0].flatten() >= 0).nonzero()[3])
same = (cells[0] == cells[0, i]).all(dim=1).nonzero().flatten().tolist()
fig, axes = plt.subplots(1, 2, figsize=(6.6, 3.1))
axes[0].imshow(x[0].permute(1, 2, 0))
axes[0].set_axis_off()
plots.heatmap(axes[1], 100 * w[0, i].reshape(6, 6), numbers=".0f", vmin=0)
axes[1].set_axis_off()
for j in same:
    style = "-" if j == i else "--"
    for ax, size in ((axes[0], 4), (axes[1], 1)):
        corner = (j % 6 * size - 0.5, j // 6 * size - 0.5)
        ax.add_patch(plt.Rectangle(corner, size, size, fill=False, color="white", lw=2, ls=style))
(twin_j,) = set(same) - {i}
assert w[0, i].topk(2).indices.tolist() == [i, twin_j]
plots.show(
    fig,
    "Left a picture with eight coloured and eight grey patterns; one grey pattern is framed, and its twin with dashes. Right its "
    "row of the map in per cent: the largest weight lies on the thing itself, the second largest on its twin.",
)

# %% tags=["nbval-ignore-output"]
picture, i = (answer.flatten(1) >= 0).nonzero().unbind(1)  # the 1,600 grey things
rows, thing = w[picture, i], torch.arange(1600)
alike = (cells[picture] == cells[picture, i][:, None]).all(dim=2)
alike[thing, i] = False  # the twin alone
assert (alike.sum(dim=1) == 1).all()
own, twin = rows[thing, i].mean(), rows[alike].mean()
print(
    f"mean weight on itself {own:.2f}, on the twin {twin:.2f}, on the other 34 together {1 - own - twin:.2f}"
)

paint = (
    x.unfold(2, 4, 4).unfold(3, 4, 4).amax(dim=(4, 5)).flatten(2).transpose(1, 2)[picture]
)  # (1600, 36, 3)
coloured = torch.arange(36).expand(1600, 36) % 6 < 2
same_colour = (paint == paint[alike][:, None]).all(dim=2)
share = {}
for others, those in {"coloured things": coloured, "things of its colour": coloured & same_colour}.items():
    share[others] = ((rows * those).argmax(dim=1) == alike.int().argmax(dim=1)).float().mean()
    print(f"among the {others}, the twin weighs most for {100 * share[others]:.1f} % of the grey things")
assert twin > 5 * (1 - own - twin) / 34
assert share["things of its colour"] > 0.99

# %% [markdown]
# So the twin need not lead among all colours; a dot product also rewards long vectors (notebook 04). Of the two things of its colour it leads, and the network is right all the same.

# %% [markdown]
# ## 6 · Five seeds, more rows, and where the average ends
#
# One trained network is an anecdote. `data/results/local_and_non_local` holds five seeds of each row, made with the definitions of this
# notebook by `benchmarks/local_and_non_local.py`. A seed draws the weights and the training pictures; the test pictures stay. With
# $a_1, \dots, a_n$ the accuracies, $\bar a$ their mean and $s$ their standard deviation, the 95 % interval for the mean over all seeds is
#
# $$\bar a \pm t\, \frac{s}{\sqrt n}, \qquad s^2 = \frac{1}{n - 1} \sum_k (a_k - \bar a)^2$$
#
# where $t = 2.776$ for $n = 5$ (Student's distribution with 4 degrees of freedom).


# %%
def interval(a):
    a = np.asarray(a)
    assert len(a) == 5
    s = np.sqrt(((a - a.mean()) ** 2).sum() / 4)
    return a.mean(), 2.776 * s / np.sqrt(5)


def recorded(name):
    """The record of a row, with the accuracies on the patterns that the row is about as `a`."""
    path = results_root() / "local_and_non_local" / f"{name}.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    tested_on = {"closed": "accuracy_known", "new": "accuracy_new", None: "accuracy"}[record.get("patterns")]
    return {**record, "a": record[tested_on]}


def percent(a):
    return "{:5.1f} ± {:4.1f} %".format(*100 * np.array(interval(a)))


print("                   ", *(f"{name:>15}" for name in blocks))
print("cross and ring     ", *(f"{percent(recorded(f'relation-{name}')['a']):>15}" for name in blocks))
print("new, 1 pair        ", *(f"{percent(recorded(f'new-1-{name}')['a']):>15}" for name in blocks))
print("new, 8 pairs       ", *(f"{percent(recorded(f'new-8-{name}')['a']):>15}" for name in blocks))
for task in ("closed-1", "closed-8"):
    cells_of = [percent(recorded(f"{task}-{name}")["a"]) for name in ("average", "similarity")]
    print(
        f"{task.replace('-', ', ') + (' pair' if task.endswith('1') else ' pairs'):51}",
        *(f"{cell:>15}" for cell in cells_of),
    )

gain = np.subtract(recorded("new-8-similarity")["a"], recorded("new-8-average")["a"])
print("\nnew, 8 pairs, similarity less average, seed by seed:", percent(gain))
assert interval(gain)[0] - interval(gain)[1] > 0.3
for label, name in {"itself, cross and ring": "relation-itself", "deep, new, 1 pair": "new-1-deep"}.items():
    print(f"{label:23} seed by seed:", *(f"{a:.2f}" for a in recorded(name)["a"]))
assert all(abs(loss - np.log(2)) < 0.005 for loss in recorded("relation-itself")["loss"])

# %% [markdown]
# One seed of `itself` is right on 76 % in the first line: three kinds of four (the fourth is 24 % of the test pictures), and still at a loss of log 2. `deep`
# answers that question every time, but learned to pass on a single colour in one seed of five, and eight in none, though it reaches every cell. (38.6 ± 42.0 is one seed at 99 %, four near chance.)
# With a single pair, the average is equal to similarity; with the closed set 5 points behind, with eight new pairs 50.
#
# And what if $\theta$ and $\phi$ are learned, or the average is given more?

# %%
others = {
    "similarity": "similarity (Gaussian)",
    "embedded_gaussian": "embedded Gaussian",
    "dot_product": "dot product",
    "concatenation": "concatenation",
    "average": "average",
    "average-longer": "average, trained five times as long",
    "average-wider-longer": "average, as long, d = 64 of C = 64",
    "deep": "deep",
    "deep-wider": "deep, 32 channels wide",
}
assert round(100 * min(recorded("new-8-dot_product")["a"])) == 56
print("new patterns, 8 pairs        in the block: parameters   steps    right")
for name, label in others.items():
    record = recorded(f"new-8-{name}")
    print(f"{label:40} {record['parameters']:7,} {record['steps']:7,}    {percent(record['a'])}")

# %% [markdown]
# The embedded Gaussian compares $W_\theta x_i$ with $W_\phi x_j$; it has to find out that similarity is what counts, and does. The
# dot product nearly does, with one bad seed (56 %). The concatenation does not: its $f = \mathrm{ReLU}(a_i + b_j)$
# ranks the cells in one order for everybody (notebook 04), so nobody can single out its own twin. A weight for each pair is not
# enough; it must depend on the *match*.
#
# The average learns slowly, but it learns: 64 % after five times as many steps, 75 % with twice the channels and an average four times as wide. The table says what was learned, by this size, in this time; not what is impossible.

# %% [markdown]
# An average that looks things up can even be written down. Let $p_j$ be the
# pattern of cell $j$, lit +1, dark −1, and $c_j$ its colour as one of four unit vectors; both are zero where nothing is, and $c_j$
# for grey things. Every cell sends the 4 × 16 products, and each grey thing holds its own pattern against the average:
#
# $$M = \frac{1}{N} \sum_j c_j\, p_j^\top, \qquad s_i = M p_i$$
#
# $M$ is *one* matrix for all. Its row $k$ adds up the patterns of colour $k$; $s_i$ says which row $p_i$ is most like.


# %%
def shown_cells(count, pairs, seed=0):
    """Patterns p (count, 36, 16), colours c (count, 36, 4) and answers (count, 36), without any pixels."""
    rng = np.random.default_rng(seed)
    look = 2 * new[np.argsort(rng.random((count, len(new))), axis=1)[:, :pairs]].reshape(count, pairs, 16) - 1
    colour = np.argsort(rng.random((count, max(pairs, 4))), axis=1)[:, :pairs] % 4
    left, right = places(count, pairs, rng)
    p, c, answer = np.zeros((count, 36, 16)), np.zeros((count, 36, 4)), np.full((count, 36), -100)
    picture = np.arange(count)[:, None]
    p[picture, left] = p[picture, right] = look
    c[picture, left] = np.eye(4)[colour]
    answer[picture, right] = colour
    return p, c, answer


by_hand = {}
for pairs in (1, 2, 4, 8, 12):
    p, c, answer = shown_cells(2000, pairs)
    M = np.einsum("bjk,bjd->bkd", c, p) / 36
    s = np.einsum("bkd,bid->bik", M, p)
    assert M.shape == (2000, 4, 16)
    by_hand[pairs] = (s.argmax(axis=2) == answer)[answer >= 0].mean()
    print(f"pairs: {pairs:2}   the hand-made average is right on {100 * by_hand[pairs]:5.1f} %")
assert by_hand[4] == 1
assert 0.93 < by_hand[8] < 0.98

# %%
fig, ax = plt.subplots(figsize=(7, 4.2))
pairs = [1, 2, 4, 8, 12]
styles = {"similarity": ("blue", "o-"), "average": ("red", "s-")}
for name, (colour, marker) in styles.items():
    a, half = zip(*(interval(recorded(f"new-{p}-{name}")["a"]) for p in pairs), strict=True)
    ax.errorbar(pairs, a, half, fmt=marker, color=plots.COLOURS[colour], capsize=3, label=f"{name}, trained")
ax.plot(
    pairs, list(by_hand.values()), "^:", color=plots.COLOURS["orange"], label="average, made by hand, d = 64"
)
ax.plot(
    pairs,
    [1, 0.5, 0.25, 0.25, 0.25],
    "--",
    color=plots.COLOURS["grey"],
    label="knows only which colours there are",
)
ax.set(xlabel="pairs in a picture", ylabel="right, on new patterns", ylim=(0, 1.05), xticks=pairs)
ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
plots.show(
    fig,
    "Share of right answers over 1, 2, 4, 8 and 12 pairs, with intervals over five seeds. Similarity stays above 99 per cent. The "
    "trained average falls from 100 to 55, rises to 82 and falls to 43. The hand-made average is right up to 4 pairs and "
    "falls to 89 per cent at 12. A dashed line, knowing only which colours there are, goes from 100 over 50 to 25.",
)
averages = [100 * interval(recorded(f"new-{p}-average")["a"])[0] for p in pairs]
assert [round(a) for a in averages] == [100, 55, 82, 49, 43]
assert 0.95 < interval(recorded("new-2-average-longer")["a"])[0] < 0.98

# %% [markdown]
# Up to four pairs each colour occurs once at most, and nothing is as like $p_i$ as $p_i$ itself: the hand-made average is always right.
# From eight on, several patterns lie on top of each other in a row of $M$, and it begins to err. An average of fixed size fills up;
# the map, with a weight for each pair, did not, up to 12 pairs. (At two pairs, five times as many steps lead the trained average to 97 %.)
#
# Our twins are exact, in cells that the first layer knows. Notebook 18 measures real clips; there blocks brought no gain.

# %% [markdown]
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Strides (easy, 15 minutes)
#
# A network halves its resolution on the way: layer $l$ has a kernel of $k_l$ and a stride of $t_l$. Write `field(kernels, strides)`: how many
# input columns does one output see? **Expect**: the three stacks of the check see 41, 27 and 63 columns; the check measures
# them by their gradients.
#
# <details><summary>Hint 1: a nudge</summary>
#
# After a layer of stride 2, a step of one column to the side is a step of two columns of the input.
#
# </details>
# <details><summary>Hint 2: the formula</summary>
#
# $r = 1 + \sum_l (k_l - 1) \prod_{m < l} t_m$
#
# </details>
# <details><summary>Hint 3: part of the code</summary>
#
# `field, step = 1, 1`, then for each layer `field += (k - 1) * step`, and then `step *= t`
#
# </details>


# %% tags=["stub"]
def field(kernels, strides):
    #: solution
    seen, step = 1, 1
    for k, t in zip(kernels, strides, strict=True):
        seen += (k - 1) * step
        step *= t
    return seen
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
stacks = [([3] * 20, [1] * 20), ([7, 3, 3, 3], [2, 2, 1, 1]), ([3, 3, 3, 3, 3], [2, 2, 2, 2, 2])]


def measured_field(kernels, strides):
    x = torch.zeros(1, 1, 301, requires_grad=True)
    y = x
    for k, t in zip(kernels, strides, strict=True):
        y = nn.functional.conv1d(y, torch.full((1, 1, k), 1 / k), stride=t)
    y[0, 0, y.shape[2] // 2].backward()
    return int((x.grad != 0).sum())


def sums(step):  # (k - 1) times what `step` makes of the strides up to a layer, added up
    return tuple(
        1 + sum((k - 1) * step(strides, layer) for layer, k in enumerate(kernels))
        for kernels, strides in stacks
    )


check(
    "Exercise 1",
    lambda: tuple(field(*each) for each in stacks),
    tuple(measured_field(*each) for each in stacks),
    mistakes={
        "the strides are missing": sums(lambda strides, layer: 1),
        "a layer's own stride widens only the layers after it": sums(
            lambda t, layer: int(np.prod(t[: layer + 1]))
        ),
        "strides multiply; you used only that of the layer before": sums(
            lambda t, layer: t[layer - 1] if layer else 1
        ),
        "the output itself counts for one: start from 1": tuple(measured_field(*each) - 1 for each in stacks),
    },
)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Which questions can a sum answer? (medium, 20 minutes)
#
# Four kinds of pictures $(a, b)$ give 16 questions with the answers yes and no. Which
# of them can $s = u(a) + v(b) + c$ answer, yes where $s > 0$ and no where $s < 0$? Write `answerable(labels)`, True or False, for the labels of the kinds
# (×, ×), (×, ○), (○, ×), (○, ○), in this order, 1 for yes.
#
# **Expect**: 14 of 16. Among them is "a cross on the left *and* a ring on the right": there a threshold on a sum suffices. It does
# not for "a cross and a ring", on whichever side.
#
# <details><summary>Hint 1: a nudge</summary>
#
# Only the differences $u(\times) - u(\circ)$ and $v(\times) - v(\circ)$ matter, and $c$. Small numbers suffice: try all.
#
# </details>
# <details><summary>Hint 2: the formula</summary>
#
# With $u(\times) = U$, $v(\times) = V$, $u(\circ) = v(\circ) = 0$, the four scores are $U + V + c$, $U + c$, $V + c$ and $c$.
#
# </details>
# <details><summary>Hint 3: part of the code</summary>
#
# `import itertools`, then `for U, V, c in itertools.product((-2, 0, 2), (-2, 0, 2), (-3, -1, 1, 3)):`
#
# </details>


# %% tags=["stub"]
def answerable(labels):
    #: solution
    from itertools import product

    for U, V, c in product((-2, 0, 2), (-2, 0, 2), (-3, -1, 1, 3)):
        scores = (U + V + c, U + c, V + c, c)
        if all((s > 0) == (label == 1) for s, label in zip(scores, labels, strict=True)):
            return True
    return False
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
questions = [tuple(int(digit) for digit in f"{number:04b}") for number in range(16)]


def signs(U, V, c):
    return tuple(int(score > 0) for score in (U + V + c, U + c, V + c, c))


draws = np.random.default_rng(0).normal(size=(20_000, 3))
found = {signs(*draw) for draw in draws}
no_constant = {signs(U, V, 0) for U, V, _ in draws}
positive = {signs(abs(U), abs(V), c) for U, V, c in draws}
check(
    "Exercise 2",
    lambda: (
        None
        if answerable(questions[0]) is None
        else np.array([int(answerable(labels)) for labels in questions])
    ),
    np.array([int(labels in found) for labels in questions]),
    mistakes={
        "c is missing: without it, (ring, ring) has always the score 0": np.array(
            [int(labels in no_constant) for labels in questions]
        ),
        "U and V may be negative too": np.array([int(labels in positive) for labels in questions]),
        "three right answers of four are not enough": np.ones(16, dtype=int),
        "that is the other way round: these are the two that no sum answers": np.array(
            [int(labels not in found) for labels in questions]
        ),
    },
)

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · The lookup, by hand (medium, 15 minutes)
#
# The hand-made average errs from eight pairs on. Do it with pairwise weights, again without training: write
# `lookup(p, c)` for the patterns $p$, (B, 36, 16), and colours $c$, (B, 36, 4), of section 6. Return the scores of the four colours at every cell,
# (B, 36, 4), as weighted means of the $c_j$, with the weights of `similarity` computed from the patterns.
#
# **Expect**: right on every grey thing, with twelve pairs too.
#
# <details><summary>Hint 1: a nudge</summary>
#
# The equation of section 2, with $x_j = p_j$ and $g(x_j)$ replaced by $c_j$.
#
# </details>
# <details><summary>Hint 2: the formula</summary>
#
# $s_{ik} = \sum_j w_{ij}\, c_{jk}$ with $w_{ij} = e^{p_i \cdot p_j} / \sum_m e^{p_i \cdot p_m}$
#
# </details>
# <details><summary>Hint 3: part of the code</summary>
#
# `f = np.exp(p @ p.transpose(0, 2, 1))`, (B, 36, 36); which axis must add up to 1?
#
# </details>


# %% tags=["stub"]
def lookup(p, c):
    #: solution
    f = np.exp(p @ p.transpose(0, 2, 1))
    w = f / f.sum(axis=2, keepdims=True)
    return w @ c
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
p, c, answer = shown_cells(200, 12, seed=1)
f = np.exp(p @ p.transpose(0, 2, 1))
expected = similarity(torch.tensor(p)).numpy() @ c
assert ((expected.argmax(axis=2) == answer)[answer >= 0]).all()
check(
    "Exercise 3",
    lambda: lookup(p, c),
    expected,
    mistakes={
        "these are the colours of the most similar cells summed up, not their weighted mean: divide by the row's sum": f
        @ c,
        "the weights add up to 1 over i; each row i must add up to 1 over j": f
        / f.sum(axis=1, keepdims=True)
        @ c,
        "without the exponential this is the hand-made average": p @ (p.transpose(0, 2, 1) @ c) / 36,
        "all weights are 1/N: the patterns were not compared": np.full((200, 36, 36), 1 / 36) @ c,
    },
)

# %% [markdown]
# ## What you learned
#
# - A stack of $n$ 3 × 3 convolutions sees $2n + 1$ columns, and with random weights what counts has a standard deviation of $\sqrt{2n/3}$.
# - Short of both places, an average of local features is a sum, and a sum cannot say "a cross and a ring".
# - A uniform average can, and so can a deep enough stack. A gain over a short-sighted network says nothing about pairwise weights.
# - Pairwise weights pay when many places each ask for something else, by similarity, among things not known in advance.
#
# ## Further reading
#
# - X. Wang, R. Girshick, A. Gupta, K. He. Non-local Neural Networks. CVPR 2018.
# - W. Luo, Y. Li, R. Urtasun, R. Zemel. Understanding the Effective Receptive Field in Deep Convolutional Neural Networks. NIPS 2016.
#   Section 1.
# - M. Minsky, S. Papert. Perceptrons. MIT Press 1969.
# - Y. Cao et al. GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond. ICCV Workshops 2019.
