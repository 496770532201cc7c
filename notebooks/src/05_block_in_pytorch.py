# %% [markdown]
# # 05 · The non-local block in PyTorch, step by step
#
# After this notebook you can
#
# - show that a 1×1×1 convolution is one matrix, used at every position
# - build the block from seven small steps and say the shape after each
# - predict which parameters get a gradient in the first training step, and which three never get one
# - say which options of a block change the function and leave no trace in a file of weights
# - count the parameters of a block of any width
#
# | | |
# |:--|:--|
# | What you need | notebook 04 (equation 1 as a matrix); `nn.Module`, `backward()` and an optimiser in PyTorch |
# | Your time | 75 minutes |
# | Machine time | 15 seconds |
# | Framework | PyTorch |

# %% tags=["parameters"]
import os

profile = os.environ.get("NLUTILS_PROFILE", "quick")

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from torch.nn.functional import max_pool3d

from nlutils import plots
from nlutils.course import check, difference, settings

settings = settings(
    profile,
    quick=dict(steps=300, device="cpu"),
    full=dict(steps=1500),
    gpu=dict(steps=3000, device="cuda"),
)
plots.style()
torch.set_printoptions(precision=3, sci_mode=False)

# %% [markdown]
# ## 1 · A clip in which one thing comes back
#
# Our clip asks for a look far away and is small enough to follow by hand: 3 frames of 4 × 6 positions. At each position stands a vector of 10 numbers:
#
# - numbers 0 to 7, the *look*: what the thing at this position looks like, a random direction of length 1;
# - number 8, the *mark*: 1 at one position of frame 0, else 0;
# - number 9, the *value*: any number.
#
# The marked thing is seen again once in frame 1 and once in frame 2: same look, random place. In section 6 a block must
# answer, at the marked position: *what is the mean of the two values that this thing has later?*

# %%
MARKED = (0, 1, 1)  # t, h, w of the marked position


def clips(count, rng):
    """Clips x (count, 10, 3, 4, 6), the answers (count,), and where the thing is seen again, (count, 2, 3)."""
    x = rng.standard_normal((count, 10, 3, 4, 6))
    x[:, :8] /= np.linalg.norm(x[:, :8], axis=1, keepdims=True)
    x[:, 8] = 0
    clip = np.arange(count)
    look, values, places = x[:, :8, 0, 1, 1], [], []
    for t in (1, 2):
        h, w = rng.integers(4, size=count), rng.integers(6, size=count)
        x[clip, :8, t, h, w] = look
        values.append(x[clip, 9, t, h, w])
        places.append(np.stack([np.full(count, t), h, w], axis=1))
    x[:, 8:, 0, 1, 1] = 1, 0  # the mark is set, the thing's own value says nothing
    return (
        torch.tensor(x, dtype=torch.float32),
        torch.tensor(np.mean(values, axis=0)).float(),
        np.stack(places, 1),
    )


x, answer, places = clips(2, np.random.default_rng(3))
B, C, T, H, W = x.shape
N, d = T * H * W, 8
assert (B, C, T, H, W, N, d) == (2, 10, 3, 4, 6, 72, 8)
print("In clip 0 the thing stands at (t, h, w) =", MARKED, *(tuple(place.tolist()) for place in places[0]))

# %% [markdown]
# A trick with shapes: the sizes 2, 10, 3, 4, 6 and 8 all differ, so two axes that were swapped by mistake cannot pass an
# `assert`. (The paper takes $d = C/2$. Our $C$ is tiny and the look alone needs 8 numbers, so $d = 8$.)
#
# Three of the eight numbers of the look can be drawn as red, green and blue.


# %%
def mark(ax, t, places, colour):
    """Rings around the thing's positions in frame t; the marked position has two."""
    if t == 0:
        ax.add_patch(plt.Circle((MARKED[2], MARKED[1]), 0.3, fill=False, color=colour, lw=2))
    for frame, h, w in [MARKED, *places]:
        if frame == t:
            ax.add_patch(plt.Circle((w, h), 0.45, fill=False, color=colour, lw=2))


fig, axes = plots.strip(
    0.5 + 0.6 * x[0, :3].permute(1, 2, 3, 0).clamp(-0.8, 0.8), ["t = 0", "t = 1", "t = 2"], width=2.4
)
for t in range(T):
    mark(axes[t], t, places[0], "white")
plots.show(
    fig,
    "Three frames of 4 by 6 coloured squares, all colours different but one: the colour of the doubly ringed square "
    "in frame 0 comes back in one ringed square of frame 1 and one of frame 2, at other places.",
)

# %% [markdown]
# ## 2 · A 1×1×1 convolution is a matrix
#
# Notebook 04 wrote $\theta(x_i) = W_\theta x_i$: one matrix, used at every position. In PyTorch the vectors stand in axis 1 of
# $x$, behind the batch, and the layer that multiplies each of them by the same matrix is `nn.Conv3d(C, d, 1)`. (And adds a
# bias, zero for now.)

# %%
rng = np.random.default_rng(5)


def conv(width_in, width_out):
    """A 1x1x1 convolution with NumPy's random numbers as weights, and bias 0."""
    layer = nn.Conv3d(width_in, width_out, kernel_size=1)
    weight = rng.standard_normal(layer.weight.shape) / width_in**0.5
    layer.weight.data.copy_(torch.tensor(weight))
    layer.bias.data.zero_()
    return layer


theta = conv(C, d)
assert theta.weight.shape == (d, C, 1, 1, 1)
W_theta = theta.weight[:, :, 0, 0, 0]
x_i = x[0, :, 0, 1, 1]  # the marked position of clip 0

print("W_theta x_i ", (W_theta @ x_i).detach())
print("Conv3d says ", theta(x)[0, :, 0, 1, 1].detach())
everywhere = torch.einsum("dc,bcthw->bdthw", W_theta, x)
difference(theta(x), everywhere, "at every position of both clips", below=1e-5)

# %% [markdown]
# So a 1×1×1 convolution mixes the channels of one position and never looks at a second one. In the whole block only one step lets a position
# choose what it takes from others: the map.
#
# ## 3 · The block by hand
#
# **Step 1, three embeddings.** $\theta$ asks, $\phi$ is what is compared with the question, $g$ is what is handed over.

# %%
phi, g = conv(C, d), conv(C, d)
for name, layer in dict(theta=theta, phi=phi, g=g).items():
    assert layer(x).shape == (B, d, T, H, W)
    print(f"{name:5} of x_i:", layer(x)[0, :, 0, 1, 1].detach())

# %% [markdown] tags=["predict"]
# **Step 2, from clips to lists of positions.** Equation 1 knows no frames, only positions $i = 0 \dots N-1$. So $(B, d, T, H, W)$ must become
# $(B, N, d)$. Two candidates:
#
# - `theta(x).reshape(B, N, d)`
# - `theta(x).flatten(2).transpose(1, 2)`
#
# Both have the right shape. Position $(t, h, w)$ = (0, 1, 1) should become row
# $i = (t \cdot H + h) \cdot W + w = 7$, with the numbers of $\theta(x_i)$ above. Which candidate has them there?

# %%
i = (0 * H + 1) * W + 1
candidates = {
    "reshape": theta(x).reshape(B, N, d),
    "flatten, transpose": theta(x).flatten(2).transpose(1, 2),
}
for name, rows in candidates.items():
    assert rows.shape == (B, N, d)
    print(f"{name:19}", rows[0, i].detach())

assert torch.equal(candidates["flatten, transpose"][0, i], theta(x)[0, :, 0, 1, 1])
assert not torch.equal(candidates["reshape"][0, i], theta(x)[0, :, 0, 1, 1])

# %% [markdown] tags=["explain"]
# `reshape` keeps the order in memory, where *one channel of all positions* comes first. Its row 7 holds eight neighbours of one
# channel instead of eight channels of one position. No error, the right shape, and rows that are no positions: several public
# implementations were published with a reshape where a transpose is missing. `flatten(2)` joins $T, H, W$ to $N$, then `transpose` puts the
# channels last.


# %%
def rows(maps):
    """(B, d, T, H, W) -> (B, N, d): one row for each position."""
    return maps.flatten(2).transpose(1, 2)


theta_i, phi_j, g_j = rows(theta(x)), rows(phi(x)), rows(g(x))
assert theta_i.shape == phi_j.shape == g_j.shape == (B, N, d)

# %% [markdown]
# **Step 3, the map.** $f(x_i, x_j) = e^{\theta(x_i)^T \phi(x_j)}$, divided by its sum over $j$: a softmax over the *last* axis. Over axis 1 it would run without an error too.
# A test that tells them apart: let everybody hand over 1; a weighted mean of ones is 1.
#
# Before you run the next cell: the marked thing stands at three positions of clip 0. Will its row give these three the largest weights?

# %%
weights = torch.softmax(theta_i @ phi_j.transpose(1, 2), dim=2)
assert weights.shape == (B, N, N)
difference(weights.sum(dim=2), torch.ones(B, N), "each row sums to 1", below=1e-5)
for dim, name in ((2, "j"), (1, "i")):
    of_ones = torch.softmax(theta_i @ phi_j.transpose(1, 2), dim=dim) @ torch.ones(B, N, 1)
    print(f"softmax over {name}, everybody hands over 1: y from {of_ones.min():.2f} to {of_ones.max():.2f}")

row = weights[0, i].reshape(T, H, W)  # N back to frames
for t, h, w in [MARKED, *places[0].tolist()]:
    rank = 1 + int((row > row[t, h, w]).sum())
    print(f"t={t} h={h} w={w}: weight {row[t, h, w]:.3f}, rank {rank:2} of {N}")


# %%
def draw_row(axes, row, places, vmax):
    """One row of the map as T pictures, in per cent, with the thing's positions ringed."""
    for t, ax in enumerate(axes):
        plots.heatmap(ax, 100 * row[t].detach(), numbers=".0f", vmin=0, vmax=vmax)
        mark(ax, t, places, plots.COLOURS["red"])


fig, axes = plt.subplots(1, 3, figsize=(8.4, 2.2))
draw_row(axes, row, places[0], vmax=8)
for t, ax in enumerate(axes):
    ax.set_title(f"t = {t}")
plots.show(
    fig,
    "The weights of the marked position over the three frames, in per cent, between 0 and 6. The largest lie anywhere; "
    "the three ringed positions of the marked thing do not stand out.",
)

# %% [markdown]
# They do not. $W_\theta$ and $W_\phi$ are random, and nobody has told this block that a similar *look* is what counts. Every position is
# *reached*, in every frame, at once; what is worth looking at must be learned.
#
# **Step 4, the sum,** and **step 5, back to frames.** Equation 1 of the paper:
#
# $$y_i = \frac{1}{\mathcal{C}(x)} \sum_{\forall j} f(x_i, x_j)\, g(x_j)$$
#
# where $\mathcal{C}(x) = \sum_j f(x_i, x_j)$ is the divisor, $C(x)$ in notebook 04.

# %%
y = weights @ g_j
assert y.shape == (B, N, d)
by_hand = sum(weights[0, i, j] * g_j[0, j] for j in range(N))
print("y_i, as a sum over j ", by_hand.detach())
print("y_i, as a matrix     ", y[0, i].detach())

y = y.transpose(1, 2).unflatten(2, (T, H, W))
assert y.shape == (B, d, T, H, W)
print("y_i, back in frames  ", y[0, :, 0, 1, 1].detach())

# %% [markdown]
# **Step 6, $W_z$ and its normalisation.** $W_z$ brings $d$ numbers back to $C$. Behind it the paper puts a batch normalisation: each
# channel gets mean 0 and variance 1 over the batch and all positions, then is multiplied by a learned *gain* $\gamma$ and shifted by a
# learned *bias* $\beta$. The gain starts at **zero**. With $n$ for $W_z y$, and $\mu_c$, $\sigma_c^2$ for mean and variance of channel $c$:
#
# $$\hat n_c = \frac{n_c - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}}, \qquad \epsilon = 10^{-5}$$
#
# **Step 7, the residual.** Equation 6 of the paper:
#
# $$z_i = W_z y_i + x_i$$
#
# With step 6, the code adds $\gamma \hat n + \beta$ in place of $W_z y_i$. No ReLU follows.

# %%
w_z, norm = conv(d, C), nn.BatchNorm3d(C)
before = w_z(y)
print("W_z y_i          ", before[0, :, 0, 1, 1].detach())
n = norm(before)
print("normalised       ", n[0, :, 0, 1, 1].detach())
var, mean = torch.var_mean(before, dim=(0, 2, 3, 4), correction=0, keepdim=True)
difference(n, (before - mean) / torch.sqrt(var + 1e-5), "the layer and the formula", below=1e-5)

nn.init.zeros_(norm.weight)  # the gain, gamma
z = x + norm(w_z(y))
print("x_i              ", x[0, :, 0, 1, 1])
print("z_i              ", z[0, :, 0, 1, 1].detach())
assert z.shape == x.shape
difference(z, x, "z and x")

# %% [markdown]
# Exactly equal: a new block leaves a trained network as it was, to the last bit, and learns from there.
#
# ## 4 · The class
#
# The same seven steps, with the parameters in `__init__`. Weights start as in the authors' released code: drawn with a standard
# deviation of 0.01, biases 0.


# %%
class NonLocalBlock(nn.Module):
    """z = x + gain * normalised(W_z y) + bias, with y of the embedded Gaussian; x is (B, C, T, H, W)."""

    def __init__(self, in_channels, inner_channels=None):
        super().__init__()
        C, d = in_channels, inner_channels or in_channels // 2
        self.theta, self.phi, self.g = nn.Conv3d(C, d, 1), nn.Conv3d(C, d, 1), nn.Conv3d(C, d, 1)
        self.w_z, self.norm = nn.Conv3d(d, C, 1), nn.BatchNorm3d(C)
        for conv in (self.theta, self.phi, self.g, self.w_z):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
        nn.init.zeros_(self.norm.weight)

    def map(self, x):
        return torch.softmax(rows(self.theta(x)) @ rows(self.phi(x)).transpose(1, 2), dim=2)

    def forward(self, x):
        y = self.map(x) @ rows(self.g(x))
        y = y.transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.norm(self.w_z(y))


# %% [markdown]
# It gets our weights, and a gain of 1, so that there is something to compare.

# %%
block = NonLocalBlock(C, d)
for name, layer in dict(theta=theta, phi=phi, g=g, w_z=w_z).items():
    getattr(block, name).load_state_dict(layer.state_dict())
nn.init.ones_(block.norm.weight)

difference(block(x), x + n, "class and steps", below=1e-5)

# %% [markdown] tags=["predict"]
# ## 5 · What learns in the first step?
#
# The block starts as the identity because its gain is zero. A popular question about public implementations is: *multiplied by zero, how can it ever
# learn?* The block has ten parameter tensors. Which of the ten receive a gradient that is not zero: in the
# first step, and in the second?

# %%
torch.manual_seed(0)
block = NonLocalBlock(C, d).double()
optimiser = torch.optim.SGD(block.parameters(), lr=0.1)
clip, target = x.double(), torch.tensor(rng.standard_normal(x.shape))
arrived = {name: [] for name, _ in block.named_parameters()}
for _step in (1, 2):
    optimiser.zero_grad()
    ((block(clip) - target) ** 2).mean().backward()
    for name, parameter in block.named_parameters():
        largest = parameter.grad.abs().max()
        arrived[name].append(
            "exactly 0" if largest == 0 and _step == 1 else "at most rounding" if largest < 1e-12 else "yes"
        )
    optimiser.step()

print(f"{'parameter':13}{'step 1':15}step 2")
for name, (first, second) in arrived.items():
    print(f"{name:13}{first:15}{second}")
assert [name for name, (first, _) in arrived.items() if first == "yes"] == ["norm.weight", "norm.bias"]
assert [name for name, (_, second) in arrived.items() if second != "yes"] == [
    "phi.bias",
    "g.bias",
    "w_z.bias",
]

# %% [markdown] tags=["explain"]
# **Step 1.** Whatever reaches $W_z$ or anything before it was multiplied by the gain, and the gain is 0: exactly nothing arrives. But the gradient
# of the gain itself is the normalised $W_z y$ times the error, and that is not zero. So step 1 moves the gain and the bias only, and
# from step 2 on the door is open. (With $W_z$ zero, too, it stays shut: exercise 3.)
#
# **Step 2** has a surprise of its own: three biases still get at most rounding errors, and in training always will.
#
# - `w_z.bias` adds a constant to a channel; the normalisation subtracts the channel's mean, and with it the constant.
# - `g.bias` adds a constant to every $g(x_j)$; the weights sum to 1, so $y$ gets the same constant, which the normalisation subtracts again.
# - `phi.bias` adds $\theta(x_i)^T b_\phi$ to every logit of row $i$; a softmax does not change when all logits grow by the same amount.
#
# We keep them: published checkpoints have them. (In section 6 Adam moves even them, by rounding errors.)
#
# ## 6 · It learns
#
# The task of section 1: at the marked position, channel 9 of $z$ should hold the mean of the two values that the thing has in frames 1 and 2.
# Always answering 0 costs a squared error of 0.5 on average, the variance of a mean of two numbers of variance 1. A 3×3×3
# convolution at the marked position sees 9 of the 24 places of frame 1 and nothing of frame 2, and it cannot compare two looks: it adds up
# numbers and never multiplies one position by another.

# %%
torch.manual_seed(0)
block = NonLocalBlock(C, d).to(settings.device)
untrained = block.map(x.to(settings.device))[0, i].reshape(T, H, W).cpu()
optimiser = torch.optim.Adam(block.parameters(), lr=0.02)
rng = np.random.default_rng(0)


def error(block, clips, answers):
    z = block(clips.to(settings.device))
    return ((z[:, 9, 0, 1, 1] - answers.to(settings.device)) ** 2).mean()


for _step in range(settings.steps):
    loss = error(block, *clips(64, rng)[:2])
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()

block.eval()
trained_weights = block.state_dict()
test_x, test_answer, test_places = clips(1000, np.random.default_rng(1))
with torch.no_grad():
    test_error = error(block, test_x, test_answer).item()
assert 0.4 < (test_answer**2).mean() < 0.6
assert test_error < 0.1
gain = block.norm.weight.detach()
assert gain[9].abs() > 0.1
assert not gain[:9].any()  # the loss looks at channel 9 alone
assert block.phi.bias.abs().max() > 1e-3  # Adam moves even what has only rounding errors for a gradient

# %% tags=["nbval-ignore-output"]
print(f"squared error on 1000 new clips: {test_error:.4f}; of the answer 0: {(test_answer**2).mean():.4f}")
print("the gain, which began at zero:", gain.cpu())

# %% [markdown] tags=["predict"]
# The block has learned it, and its gain has left zero in channel 9, the only one that the loss looks at. Now draw the row of the marked position again, for a clip that it was not trained on. The answer is the mean of two values, so one would
# expect half of the weight on each of the two places. What do you get instead, and where is the rest?

# %%
with torch.no_grad():
    trained = block.map(x.to(settings.device))[0, i].reshape(T, H, W).cpu()
fig, axes = plt.subplots(2, 3, figsize=(8.4, 4.2))
draw_row(axes[0], untrained, places[0], vmax=35)
draw_row(axes[1], trained, places[0], vmax=35)
for t in range(T):
    axes[0, t].set_title(f"t = {t}, untrained")
    axes[1, t].set_title(f"t = {t}, trained")
plots.show(
    fig,
    "The row of the marked position, in per cent, before and after training. Before: 1 per cent everywhere. "
    "After: close to a third on each of the three ringed positions of the thing, its own among them, 9 per cent on a fourth place at t = 1, row 2, column 4, and little elsewhere.",
)

# %% tags=["nbval-ignore-output"]
with torch.no_grad():
    test_rows = block.map(test_x.to(settings.device))[:, i].reshape(-1, T, H, W).cpu()
t, h, w = torch.tensor(test_places).unbind(2)
later = test_rows[torch.arange(1000)[:, None], t, h, w].sum(dim=1).mean()
itself = test_rows[:, 0, 1, 1].mean()
alike = x[0, :8, 0, 1, 1] @ x[0, :8, 1, 2, 4]  # of two looks of length 1: the cosine
assert 0.8 < alike < 0.9
assert 0.5 < later < 0.75
assert 0.2 < itself < 0.4
assert torch.allclose(untrained, torch.tensor(1 / N), rtol=0.05)
print(f"cosine of the marked look and that at t = 1, (2, 4): {alike:.2f}")
print(f"on the two later places {later:.2f}, on itself {itself:.2f}, elsewhere {1 - later - itself:.2f}")

# %% [markdown] tags=["explain"]
# Close to a third each, on *three* places. Equation 1 sums over all $j$, and $j = i$ is one of them: what looks like the marked thing most of all is the marked thing.
# (The 9 at t = 1 lies on a thing that looks like it.)
# Its own value is 0, so $y$ comes out as two thirds of the mean, and $the gain makes up for the factor 1.5 (the normalisation divides the size of $W_z$ out). Before training, each weight is about
# 1/72: with weights of standard deviation 0.01 all logits are nearly 0, and a fresh block looks everywhere equally.
#
# ## 7 · Sub-sampling: before or after?
#
# The map has $N^2$ entries. The paper shrinks it by a max-pooling of 1 × 2 × 2 on the side of $\phi$ and $g$: the *questions* stay, the *places looked at*
# become $M = N/4$. The paper's text pools what $\phi$ and $g$ return; the authors' released code pools $x$ and then applies $\phi$ and $g$. Same
# parameters, same names in a checkpoint. Same function?


# %%
def pool(maps):
    return max_pool3d(maps, kernel_size=(1, 2, 2))


def sub_sampled(x, order):
    keys = pool(x) if order == "before" else x  # the places looked at
    phi_j, g_j = phi(keys), g(keys)
    if order == "after":
        phi_j, g_j = pool(phi_j), pool(g_j)
    return torch.softmax(rows(theta(x)) @ rows(phi_j).transpose(1, 2), dim=2), rows(g_j)


M = N // 4
y_of = {}
for order in ("before", "after"):
    weights, g_j = sub_sampled(x, order)
    assert weights.shape == (B, N, M)
    assert g_j.shape == (B, M, d)
    y_of[order] = weights @ g_j
    print(f"{order:7} map {tuple(weights.shape)}, y_i {y_of[order][0, i].detach()}")
assert y_of["before"].shape == y_of["after"].shape == (B, N, d)
gap = (y_of["before"] - y_of["after"]).norm() / y_of["after"].norm()
print(f"length of the difference, as a share of the length of y: {gap:.1f}")
assert gap > 0.5

# %% [markdown]
# Different functions: the largest of four values, then a matrix, is not a matrix, then the largest. Only the order *before* reproduces the operations counted in the paper's Table 2e, and it is cheaper, because $\phi$ and $g$ work on
# a quarter of the positions (notebook 09 counts).
#
# ## 8 · Four instantiations, one class
#
# Here are notebook 04's four choices of $f$, for batches. The Gaussian has no $\theta$ and $\phi$; in the concatenation $w_f^T [\theta_i, \phi_j]$ splits into a number for $i$ plus a number for $j$:
#
# $$f(x_i, x_j) = \mathrm{ReLU}(w_f^T [\theta(x_i), \phi(x_j)]) = \mathrm{ReLU}(a_i + b_j)$$


# %%
def pairwise(theta, phi, instantiation, w_f=None):
    """The map, f(x_i, x_j) divided by its row's sum or by M: theta (B, N, d), phi (B, M, d) -> (B, N, M)."""
    if instantiation in ("gaussian", "embedded_gaussian"):
        return torch.softmax(theta @ phi.transpose(1, 2), dim=2)
    if instantiation == "dot_product":
        f = theta @ phi.transpose(1, 2)
    elif instantiation == "concatenation":
        d = theta.shape[2]
        a, b = theta @ w_f[:d], phi @ w_f[d:]
        f = torch.relu(a[:, :, None] + b[:, None, :])
    else:
        raise ValueError(f"instantiation={instantiation!r} is not known")
    return f / phi.shape[1]


w_f = torch.tensor(rng.standard_normal(2 * d)).float()
in_one_piece = (
    torch.stack([torch.cat([theta_i[0, i], phi_j[0, j]]) for i in range(N) for j in range(N)]) @ w_f
)
in_two = pairwise(theta_i, phi_j, "concatenation", w_f)
difference(in_two[0], torch.relu(in_one_piece).reshape(N, N) / N, "pair by pair, and a_i + b_j", below=1e-5)
print(f"pairs with f above 0: {int((in_two[0] > 0).sum())} of {N * N}")


# %% [markdown]
# And the class with both options.


# %%
class NonLocalBlock(nn.Module):
    """z = x + gain * normalised(W_z y) + bias; x is (B, C, T, H, W). subsample: None, "before" or "after"."""

    def __init__(
        self, in_channels, inner_channels=None, *, instantiation="embedded_gaussian", subsample=None
    ):
        super().__init__()
        self.instantiation, self.subsample = instantiation, subsample
        C, d = in_channels, inner_channels or in_channels // 2
        embedded = instantiation != "gaussian"
        self.theta = nn.Conv3d(C, d, 1) if embedded else nn.Identity()
        self.phi = nn.Conv3d(C, d, 1) if embedded else nn.Identity()
        self.g = nn.Conv3d(C, d, 1)
        self.w_f = nn.Parameter(0.01 * torch.randn(2 * d)) if instantiation == "concatenation" else None
        self.w_z, self.norm = nn.Conv3d(d, C, 1), nn.BatchNorm3d(C)
        for layer in self.children():
            if isinstance(layer, nn.Conv3d):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.norm.weight)

    def embed(self, x):
        """theta (B, N, d), phi (B, M, d), g (B, M, d)."""
        keys = pool(x) if self.subsample == "before" else x
        theta, phi, g = self.theta(x), self.phi(keys), self.g(keys)
        if self.subsample == "after":
            phi, g = pool(phi), pool(g)
        return rows(theta), rows(phi), rows(g)

    def forward(self, x):
        theta, phi, g = self.embed(x)
        y = pairwise(theta, phi, self.instantiation, self.w_f) @ g
        y = y.transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.norm(self.w_z(y))


# %%
for instantiation in ("gaussian", "embedded_gaussian", "dot_product", "concatenation"):
    for subsample in (None, "before", "after"):
        block = NonLocalBlock(C, d, instantiation=instantiation, subsample=subsample)
        assert torch.equal(block(x), x)
    names = ", ".join(
        name for name, _ in block.named_parameters() if name.endswith("weight") or name == "w_f"
    )
    print(f"{instantiation:18} starts as the identity; {names}")

# %% [markdown]
# ## 9 · The library's block and its options
#
# From notebook 07 on this class is imported, as `nlutils.torch.NonLocalBlock`. The parameters have the same names, so `load_state_dict` carries them over. Same function? And how much must each keep
# for the backward pass at 3,136 positions, where the map has 37.5 MiB?

# %%
import nlutils.torch


def kept(block, clip):
    """MiB of all tensors that autograd keeps for the backward pass."""
    sizes = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        block(clip)
    return sum(sizes.values()) / 2**20


large = torch.tensor(np.random.default_rng(6).standard_normal((1, C, 4, 28, 28))).float()
for instantiation in ("gaussian", "embedded_gaussian", "dot_product", "concatenation"):
    z = []
    for subsample in ("before", "after", None):
        taught = NonLocalBlock(C, d, instantiation=instantiation, subsample=subsample)
        library = nlutils.torch.NonLocalBlock(C, d, instantiation=instantiation, subsample=subsample)
        nn.init.ones_(taught.norm.weight)
        library.load_state_dict(taught.state_dict())
        z.append([block.double()(clip) for block in (taught, library)])
    difference(*map(torch.stack, zip(*z, strict=True)), instantiation, below=1e-8)
    sizes = [kept(block.float(), large) for block in (taught, library)]
    print(f"    kept: taught {sizes[0]:.0f} MiB, library below 2 MiB")
    assert sizes[1] < 2

library = nlutils.torch.NonLocalBlock(C, d)
library.load_state_dict(trained_weights)
row = nlutils.torch.attention_rows(library, x, [MARKED])[0, 0]
assert row.shape == (T, H, W)
difference(row, trained, "attention_rows and the row of section 6", below=1e-5)

# %% [markdown] tags=["predict"]
# The same function, and no map beyond 32 MiB: softmax forms see parts; the dot product needs a $d \times d$ matrix, the concatenation a sort. Notebook 09 derives how. `attention_rows` gives single rows, as we drew
# them, at any size.
#
# More options: `scale` multiplies the logits by $d^{-1/2}$, as the released code does (notebook 08 says why); `attention` lets a position see its own frame (`"space"`) or its own place (`"time"`) only, `frames_per_group` its own group of frames;
# `norm=False` leaves out the normalisation, and $W_z$ starts at zero instead; `zero_init=False` starts at no zero.
#
# 1. Which parameters get a gradient in step 1 with each of the last two?
# 2. The weights trained in section 6 are loaded into blocks with other options. Which of them refuse?

# %%
for options in ({}, dict(norm=False), dict(zero_init=False), dict(norm=False, zero_init=False)):
    torch.manual_seed(0)
    fresh = nlutils.torch.NonLocalBlock(C, d, **options).double()
    z = fresh(clip)
    ((z - target) ** 2).mean().backward()
    moving = [name for name, p in fresh.named_parameters() if p.grad.abs().max() > 1e-12]
    print(options or "default", f"  largest |z - x| {(z - clip).abs().max():.4f}")
    print("    step 1:", ", ".join(moving))

# %% tags=["nbval-ignore-output"]
changed = dict(scale=True), dict(subsample="before"), dict(subsample="after"), dict(attention="space")
errors = []
for options in ({}, *changed, dict(attention="time"), dict(instantiation="dot_product")):
    other = nlutils.torch.NonLocalBlock(C, d, **options).to(settings.device).eval()
    other.load_state_dict(trained_weights)  # strict: every name and shape must fit
    with torch.no_grad():
        errors.append(error(other, test_x, test_answer).item())
    print(f"squared error {errors[-1]:.4f}  {options or 'as trained'}")
assert abs(errors[0] - test_error) < 1e-4
assert min(errors[1:]) > 5 * test_error

# %% [markdown] tags=["explain"]
# None refuses. All six have the same names and shapes, and all six are wrong: a file of weights does not say which function it belongs to. With published weights, compare scale, order of pooling and normalisation with the code that
# trained them; `nlutils.exchange.from_published` refuses options that the code of a published format does not have.
#
# In step 1 one door is open: the gain's, or, without a normalisation, that of $W_z$, whose gradient is the error times $y$. With no zero all that can learn do so at once, but a trained network around the block
# starts from another function.
#
# ## 10 · How many parameters?
#
# Three embeddings, $W_z$, each with its bias, and the gain and bias of the normalisation:
#
# $$P = 3\,(C d + d) + (d\, C + C) + 2\, C, \qquad d = C/2$$


# %%
def parameters(C, d):
    return 3 * (C * d + d) + (d * C + C) + 2 * C


for C_block, expected in ((256, 132_224), (512, 526_592), (1024, 2_101_760)):
    block = NonLocalBlock(C_block)
    count = sum(parameter.numel() for parameter in block.parameters())
    assert count == parameters(C_block, C_block // 2) == expected
    neighbour = 27 * C_block * C_block + C_block
    print(
        f"C = {C_block:4}: block {count:9,}   a 3x3x3 convolution {neighbour:10,}, {neighbour / count:.1f} times as many"
    )

# %% [markdown]
# No $T$, $H$ or $W$ in the formula: a block that sees the whole clip costs less than one layer that sees 27 positions. (In parameters.)
#
# The paper puts 2 blocks at 512 and 3 at 1024 channels into a ResNet-101 and reports 1.2 times the parameters. The ResNet-101 alone has 43,319,760, counted from the
# released architecture.

# %%
resnet = 43_319_760
five = 2 * parameters(512, 256) + 3 * parameters(1024, 512)
print(
    f"five blocks {five:,}; together {resnet + five:,}, {(resnet + five) / resnet:.2f} times the ResNet-101"
)
assert five == 7_358_464
assert round((resnet + five) / resnet, 1) == 1.2

# %% [markdown] tags=["exercise"]
# ## Exercises
#
# ### Exercise 1 · Count for every instantiation (easy, 10 minutes)
#
# Write `count(C, d, instantiation)`: the number of parameters of `NonLocalBlock(C, d, instantiation=instantiation)`, by arithmetic, without building
# the block. **Expect**: for C = 512, d = 256 the four numbers 263,936, 526,592, 526,592 and 527,104. The check also asks for another C and d.
#
# <details><summary>Hint 1: a nudge</summary>Start from the formula of section 10. Which terms does the Gaussian not have? What does the concatenation have in addition?</details>
# <details><summary>Hint 2: the formula</summary>Each of θ, φ and g costs C d + d. w_f is a vector of 2 d numbers.</details>
# <details><summary>Hint 3: part of the code</summary><code>total = parameters(C, d)</code>, then <code>if instantiation == "gaussian": total -= …</code></details>


# %% tags=["stub"]
def count(C, d, instantiation):
    #: solution
    total = parameters(C, d)
    if instantiation == "gaussian":
        total -= 2 * (C * d + d)
    if instantiation == "concatenation":
        total += 2 * d
    return total
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
def built(C, d, name):
    return sum(p.numel() for p in NonLocalBlock(C, d, instantiation=name).parameters())


def every(count):
    names = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
    return tuple(count(C, d, name) for C, d in ((512, 256), (20, 6)) for name in names)


check(
    "Exercise 1",
    lambda: every(count),
    every(built),
    mistakes={
        "d is an argument, and not always C / 2": every(lambda C, d, name: built(C, C // 2, name)),
        "the Gaussian has no theta and no phi: its embedding is the identity": every(
            lambda C, d, name: built(C, d, "dot_product" if name == "gaussian" else name)
        ),
        "the Gaussian lacks theta and phi, weights and biases; you took off only one of the two": every(
            lambda C, d, name: built(C, d, name) + (name == "gaussian") * (C * d + d)
        ),
        "w_f of the concatenation is missing": every(
            lambda C, d, name: built(C, d, name.replace("concatenation", "dot_product"))
        ),
        "w_f has 2 d numbers, one half for theta and one for phi": every(
            lambda C, d, name: built(C, d, name) - d * (name == "concatenation")
        ),
    },
)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Space only (medium, 20 minutes)
#
# The paper's Table 2d also tries blocks in which a position looks at its own frame only. Write `space_only(theta, phi, g, T)`: the three are $(B, N, d)$ as
# `rows` makes them, and $y$ is $(B, N, d)$ of the embedded Gaussian in which $j$ runs over the 24 positions of $i$'s frame. **Expect**: y_7 of clip 0
# begins with -0.308, 0.133.
#
# <details><summary>Hint 1: a nudge</summary>A frame is then a clip of its own. What must happen to the batch axis?</details>
# <details><summary>Hint 2: the formula</summary>Position i = (t H + h) W + w: the positions of one frame are neighbours in the list. So (B, N, d) becomes (B T, N/T, d), with no transpose.</details>
# <details><summary>Hint 3: part of the code</summary><code>B, N, d = theta.shape</code>, <code>theta = theta.reshape(B * T, N // T, d)</code></details>


# %% tags=["stub"]
def space_only(theta, phi, g, T):
    #: solution
    B, N, d = theta.shape
    theta, phi, g = (v.reshape(B * T, N // T, d) for v in (theta, phi, g))
    y = torch.softmax(theta @ phi.transpose(1, 2), dim=2) @ g
    return y.reshape(B, N, d)
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
theta_i, phi_j, g_j = (rows(layer(x)).detach() for layer in (theta, phi, g))
logits = theta_i @ phi_j.transpose(1, 2)
frame = torch.arange(N) // (H * W)
same_frame = frame[:, None] == frame[None, :]
expected = torch.softmax(logits.masked_fill(~same_frame, -torch.inf), dim=2) @ g_j
place = torch.arange(N) % (H * W)
same_place = place[:, None] == place[None, :]
check(
    "Exercise 2",
    lambda: space_only(theta_i, phi_j, g_j, T),
    expected,
    mistakes={
        "j runs over all N positions, not over one frame": torch.softmax(logits, dim=2) @ g_j,
        "other frames were left out after the softmax; the rows do not sum to 1": (
            torch.softmax(logits, 2) * same_frame
        )
        @ g_j,
        "their logits were set to 0, and exp(0) is 1: they still count": torch.softmax(logits * same_frame, 2)
        @ g_j,
        "j runs over the same place in all frames: that is time only": torch.softmax(
            logits.masked_fill(~same_place, -torch.inf), 2
        )
        @ g_j,
        "the softmax ran over i, not j": torch.softmax(logits.masked_fill(~same_frame, -torch.inf), dim=1)
        @ g_j,
    },
)

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · Zero twice (medium, 20 minutes)
#
# Write `moved(block, steps)`: train `block` for so many steps of SGD (rate 0.1, mean squared error) on the given `clip` and `target`, and return the names of the parameters whose numbers changed, as a tuple.
# The check gives it a block as in section 5 for 1 step, and one whose `w_z` is zero as well as the gain, for 5 steps. **Expect**: two names, and one.
#
# <details><summary>Hint 1: a nudge</summary>The loop of section 5, and a comparison of before and after. What does <code>before = parameter</code> keep: the numbers, or the parameter?</details>
# <details><summary>Hint 2: the formula</summary>Keep <code>parameter.detach().clone()</code> of each before the loop; compare with <code>torch.equal</code> after it.</details>
# <details><summary>Hint 3: part of the code</summary><code>before = {name: p.detach().clone() for name, p in block.named_parameters()}</code>, the loop, <code>return tuple(name for … if …)</code></details>

# %% tags=["stub"]
clip, target = x.double(), torch.tensor(np.random.default_rng(8).standard_normal(x.shape))


def moved(block, steps):
    #: solution
    before = {name: p.detach().clone() for name, p in block.named_parameters()}
    optimiser = torch.optim.SGD(block.parameters(), lr=0.1)
    for _ in range(steps):
        optimiser.zero_grad()
        ((block(clip) - target) ** 2).mean().backward()
        optimiser.step()
    return tuple(name for name, p in block.named_parameters() if not torch.equal(p, before[name]))
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
def start(zero_twice):
    torch.manual_seed(0)
    block = NonLocalBlock(C, d).double()
    if zero_twice:
        nn.init.zeros_(block.w_z.weight)
    return block


all_names = tuple(name for name, _ in start(False).named_parameters())
check(
    "Exercise 3",
    lambda: (moved(start(False), 1), moved(start(True), 5)),
    (("norm.weight", "norm.bias"), ("norm.bias",)),
    mistakes={
        "nothing moved: `before` must be a copy, and the optimiser must step": ((), ()),
        "these are the parameters that stayed; the ones that changed are asked": (
            all_names[:8],
            all_names[:9],
        ),
        "all ten names: compare the numbers before and after": (all_names, all_names),
    },
)

# %% [markdown]
# With $W_z = 0$ the normalised $W_z y$ is 0, so the gain gets no gradient; with gain 0, neither does $W_z$. Each waits for the other. The bias of the normalisation alone
# learns, a constant for each channel.
#
# ## What you learned
#
# - A 1×1×1 convolution is a matrix at each position; in the map alone a position chooses what it takes from others.
# - $(B, C, T, H, W)$ becomes $(B, N, C)$ by `flatten(2).transpose(1, 2)`. A bare `reshape` has the right shape and the wrong numbers.
# - A gain of zero makes the block the identity, exactly. Only the gain and its bias learn in step 1, the rest from step 2 on. In the embedded Gaussian three biases never do.
# - The order of pooling, the scale and the form of $f$ change the function and leave no trace in a file of weights.
# - At $d = C/2$ a block has about $2C^2$ parameters, a 3×3×3 convolution $27C^2$.
#
# ## Further reading
#
# - X. Wang, R. Girshick, A. Gupta, K. He: *Non-local Neural Networks*. CVPR 2018. Section 3.3 and figure 2 are this notebook.
# - S. Ioffe, C. Szegedy: *Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift*. ICML 2015.
# - P. Goyal and others: *Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour*. arXiv 2017. Section 5.1: the gain that starts at zero, in residual networks.
