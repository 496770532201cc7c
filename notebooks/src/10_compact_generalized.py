# %% [markdown]
# # 10 · Compact generalized non-local, and its relatives
#
# After this notebook you can
#
# - let every channel of every position look at every channel of every other position, first as loops
# - derive why this costs $(NC)^2$, and why two brackets bring it down to $NC$
# - measure the error of a Taylor sum, and say for which features an order is enough
# - build the block in PyTorch and in Keras, and say what its normalisation leaves of the attention
# - tell six global operations apart by one matrix: its rank bounds what fixed maps can carry
#
# | | |
# |:--|:--|
# | What you need | notebooks 04 and 05; Taylor series, the rank of a matrix. Keras as in notebook 06 |
# | Your time | 80 minutes |
# | Machine time | 15 seconds |
# | Framework | NumPy, PyTorch and Keras |

# %% tags=["parameters"]
import os

profile = os.environ.get("NLUTILS_PROFILE", "quick")

# %%
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import nlutils.torch
from nlutils import plots
from nlutils.course import check, difference, import_keras, settings
from nlutils.exchange import torch_to_keras

keras = import_keras(os.environ.get("KERAS_BACKEND", "tensorflow"))
import nlutils.keras

settings = settings(profile, quick=dict(pairs=20_000), full=dict(pairs=1_000_000))
plots.style()
np.set_printoptions(precision=3, suppress=True)

# %% [markdown]
# ## 1 · Every number looks at every number
#
# The non-local operation compares positions: $f(\theta_i, \phi_j)$ is one number, and it multiplies all channels of $g_j$
# alike. Channel $c$ of $y_i$ is a sum of channel $c$ of the others. A weight such as "where the *ball* channel is high, take the
# *hand* channel" does not exist.
#
# Yue and others (2018) let the *entries* look at each other. An entry is one number of the map: a position $i$ and a channel $c$. With
# $f$ of two numbers, *generalized* non-local is
#
# $$y_{ic} = \sum_{j} \sum_{c'} f(\theta_{ic}, \phi_{jc'})\, g_{jc'}$$
#
# There is no divisor. We begin with 4 positions, 3 channels and $f(a, b) = a\,b$.


# %%
def generalized(theta, phi, g, f):
    y = np.zeros(theta.shape)
    for i, c in np.ndindex(theta.shape):
        for j, c_other in np.ndindex(phi.shape):
            y[i, c] += f(theta[i, c], phi[j, c_other]) * g[j, c_other]
    return y


theta = np.array([[1.0, 0, 2], [0, 1, -1], [2, 1, 0], [0, 0, 1]])
phi = np.array([[0.0, 1, 1], [1, 0, -1], [0, 2, 0], [1, 1, 0]])
g = np.array([[1.0, 0, 2], [0, 1, 1], [1, 1, 0], [2, 0, -1]])
N, C = theta.shape
assert theta.shape == phi.shape == g.shape == (4, 3)

y = generalized(theta, phi, g, lambda a, b: a * b)
w = theta @ phi.T  # the same f on positions instead of entries, as in notebook 04
for i in range(N):
    print(f"theta_{i} {theta[i]}   generalized {y[i]}   position by position {(w @ g)[i]}")

# %% [markdown]
# Written as matrices: put all entries of $\theta$ into one long vector, $\mathrm{vec}(\theta)$, and do the same with $\phi$ and $g$. The map then has a row
# and a column for each *entry*:
#
# $$\mathrm{vec}(y) = \big(\mathrm{vec}(\theta)\, \mathrm{vec}(\phi)^T\big)\, \mathrm{vec}(g)$$

# %%
pairs = np.outer(theta.ravel(), phi.ravel())
assert pairs.shape == (N * C, N * C)
difference((pairs @ g.ravel()).reshape(N, C), y, "matrix and loops")

positions, channels = 28 * 28, 512  # res4 of an image of 448 x 448
print(f"positions: {positions**2:15,} pairs, {positions**2 * 4 / 2**20:9,.0f} MiB in float32")
entries = positions * channels
print(f"entries:   {entries**2:15,} pairs, {entries**2 * 4 / 2**20:9,.0f} MiB")

# %% [markdown] tags=["predict"]
# 600 GiB for one image: nobody can run this as it stands.
#
# ## 2 · Two brackets
#
# Look at the printed $y$ beside $\theta$. Now we change one single number, $\phi_{0,0}$, from 0 to 4. How many of the twelve entries of $y$
# change? And what do the changed entries have in common?

# %%
phi_changed = phi.copy()
phi_changed[0, 0] = 4
y_changed = generalized(theta, phi_changed, g, lambda a, b: a * b)
print("changed:", (y_changed != y).sum(), "of", y.size, "entries; theta is not 0 in", (theta != 0).sum())
print("y before / theta:", y[theta != 0] / theta[theta != 0])
print("y after  / theta:", y_changed[theta != 0] / theta[theta != 0])
assert np.array_equal(y, 5 * theta)
assert np.array_equal(y_changed, 9 * theta)

# %% [markdown] tags=["explain"]
# Everybody hears of the change, and everybody hears the same: $y$ was $5\,\theta$ and is now $9\,\theta$. (The other five entries are 0 before and after, because $\theta$ is 0 there.) The map is the product of a column and a
# row, so it has rank 1. Move the brackets (matrix products are associative):
#
# $$\mathrm{vec}(y) = \mathrm{vec}(\theta)\, \big(\mathrm{vec}(\phi)^T\, \mathrm{vec}(g)\big) = s\, \mathrm{vec}(\theta),
# \qquad s = \sum_{j, c'} \phi_{jc'}\, g_{jc'}$$
#
# The new bracket is *one number*. That is the whole attention of this kernel.

# %%
s = (phi * g).sum()
print("s =", s)
difference(s * theta, y, "s theta and loops")
macs = {"positions": 2 * positions**2 * channels, "entries, brackets moved": 2 * positions * channels}
for name, count in macs.items():
    print(f"{name:24} {count:11,} multiply-adds")
assert list(macs.values()) == [629_407_744, 802_816]

# %% [markdown]
# From $(NC)^2$ to $2NC$: 784 times fewer than non-local on positions, and *exact*. But the price was paid before: a kernel whose map has rank 1
# says little. A richer $f$ has a map of higher rank. Can it be had as cheaply?
#
# ## 3 · A kernel that is not a product
#
# The paper also takes the Gaussian radial basis function (RBF), which is near 1 where two numbers are alike. Multiply out the square in its exponent:
#
# $$e^{-\gamma (a - b)^2} = e^{-\gamma (a^2 + b^2)}\; e^{2 \gamma a b},
# \qquad e^{2\gamma a b} = \sum_{p=0}^{\infty} \frac{(2\gamma)^p}{p!}\, a^p\, b^p$$
#
# Each term of the sum is a function of $a$ times a function of $b$: rank 1 again. Cut off after the order $P$, it has rank $P + 1$ at most.
#
# The released code makes two decisions: $\gamma = 10^{-4}$, and the constant $\beta = e^{-2\gamma}$ in place of the first factor (a note in it says that training with the
# true factor was very difficult). That is the first factor for $a^2 + b^2 = 2$, two entries of size 1. So $f(a, b) = \sum_{p=0}^{P} \alpha_p^2\, a^p b^p$ with $\alpha_p^2 = \beta\, (2\gamma)^p / p!$; the networks use $P = 3$.

# %%
from nlutils.kernels import BETA, GAMMA

print(f"gamma = {GAMMA}, beta = {BETA:.6f}")
assert math.isclose(BETA, math.exp(-2 * GAMMA))


def f_taylor(a, b, order):
    return sum(BETA * (2 * GAMMA) ** p / math.factorial(p) * (a * b) ** p for p in range(order + 1))


large = [30 * each for each in (theta, phi, g)]  # at size 1 all powers above 1 are too small to test anything
y_loops = generalized(*large, lambda a, b: f_taylor(a, b, 3))
grid = np.linspace(-60, 60, 12)
map_3 = f_taylor(grid[:, None], grid[None, :], 3)
assert map_3.shape == (12, 12)
print("rank of a 12 x 12 map at order 3:", np.linalg.matrix_rank(map_3))
assert np.linalg.matrix_rank(map_3) == 4

# %% [markdown]
# With the columns $\Theta = [\alpha_0 \theta^0, \dots, \alpha_P \theta^P]$ and $\Phi = [\alpha_0 \phi^0, \dots, \alpha_P \phi^P]$, powers taken entry by entry, the
# brackets move as before:
#
# $$\mathrm{vec}(y) = \Theta\, \big(\Phi^T\, \mathrm{vec}(g)\big)$$
#
# Now the bracket is a vector of $P + 1$ numbers. Nobody needs $\Theta$ either: with $a = \sqrt{2\gamma}\,\theta$, $b = \sqrt{2\gamma}\,\phi$ (`horner` calls these scaled entries `a` and `b`) and $s_p = \beta\sum b^p g$ over all entries, $y$ is
# a polynomial in $a$, evaluated from the inside, Horner's way: $s_0 + a\,(s_1 + \tfrac{a}{2}\,(s_2 + \dots))$.


# %%
def columns(entries, order):
    alpha = [math.sqrt(BETA * (2 * GAMMA) ** p / math.factorial(p)) for p in range(order + 1)]
    return np.stack([alpha[p] * entries.ravel() ** p for p in range(order + 1)], axis=1)


def horner(theta, phi, g, order):
    a, b = math.sqrt(2 * GAMMA) * theta, math.sqrt(2 * GAMMA) * phi
    s = [BETA * (b**p * g).sum() for p in range(order + 1)]
    y = s[order]
    for p in range(order, 0, -1):
        y = s[p - 1] + a / p * y
    return y


Theta, Phi = columns(large[0], 3), columns(large[1], 3)
assert Theta.shape == Phi.shape == (N * C, 4)
y_compact = (Theta @ (Phi.T @ large[2].ravel())).reshape(N, C)
difference(y_compact, y_loops, "compact and loops", below=1e-10)
difference(horner(*large, 3), y_loops, "Horner and loops ", below=1e-10)

# %% [markdown] tags=["predict"]
# ## 4 · How large is the error?
#
# Two things were given up: the powers above $P$, and the true first factor. Which of the two errors is larger? Let the entries be random, with a root mean
# square (rms) of 1, then 10, then 30; normalised features have about 1.

# %%
a, b = np.random.default_rng(0).standard_normal((2, settings.pairs))


def errors(rms, order):
    """Of the Taylor sum, and of beta in place of the true factor; as a share of the rms of what is right."""
    exact = BETA * np.exp(2 * GAMMA * rms**2 * a * b)
    true = np.exp(-GAMMA * rms**2 * (a - b) ** 2)
    cut_off = f_taylor(rms * a, rms * b, order) - exact
    return [
        np.sqrt((gap**2).mean() / (right**2).mean())
        for gap, right in ((cut_off, exact), (exact - true, true))
    ]


print("rms   error of order 3   error of beta   98 of 100 f lie in")
for rms in (1, 10, 30):
    f = f_taylor(rms * a, rms * b, 3)
    low, high = np.percentile(f, [1, 99])
    print(f"{rms:3}   {errors(rms, 3)[0]:16.0e}   {errors(rms, 3)[1]:13.0e}   {low:.4f} to {high:.4f}")
assert errors(10, 3)[0] < 1e-6
assert errors(10, 3)[1] > 1e-2

y_1 = horner(a, b, np.random.default_rng(1).standard_normal(a.shape), 3)  # features of rms 1
print(f"y at rms 1: standard deviation {y_1.std() / abs(y_1.mean()):.0e} of the mean")

# %%
sizes = np.geomspace(1, 60, 40)
fig, ax = plt.subplots(figsize=(6.4, 3.8))
for order in (1, 2, 3, 5, 8):
    ax.loglog(sizes, [errors(rms, order)[0] for rms in sizes], label=f"Taylor, order {order}")
ax.loglog(sizes, [errors(rms, 1)[1] for rms in sizes], "k--", label=r"constant $\beta$")
ax.axhline(2**-24, color=plots.COLOURS["grey"], lw=0.8)
ax.text(58, 2**-24 * 1.4, "rounding in float32", color=plots.COLOURS["grey"], ha="right", fontsize=8)
ax.set(xlabel="rms of the features", ylabel="error of f, relative", ylim=(1e-12, 10))
ax.legend(loc="lower right", fontsize=8)
plots.show(
    fig,
    "Relative error of the kernel against the size of the features, both axes logarithmic. The Taylor errors of order 1, 2, "
    "3, 5 and 8 are straight lines, steeper for a higher order; order 3 crosses float32's rounding near rms 7 and reaches "
    "half a percent at rms 30. The dashed line of the constant beta lies above all of them everywhere, far above order 3 until rms 30.",
)

# %% [markdown] tags=["explain"]
# The constant wins by far: at rms 10 it costs 3 %, the missing powers less than a millionth. More than order 3 would be wasted there; at rms 30 order 3 errs by half a percent, but the
# kernel is off by a quarter anyway. What this block computes is an exponential of a product, not an RBF.
#
# Look at the last column too. At rms 1 nearly every $f$ lies within a thousandth of 1: *all entries are alike to this kernel*, and $y$ is nearly $\beta \sum g$, the same for everybody. What distinguishes them
# starts in the fourth or fifth digit, where bfloat16 has none left. `nlutils` therefore computes these sums in float32.
#
# ## 5 · Groups
#
# One number for 784 positions of 512 channels is little. The paper cuts the channels into $G = 8$ groups, each for itself: 8 numbers, at no extra cost. For clips of a batch, with $s$ of shape $(B, 1, G, 1)$:
#
# $$y_{b,i,k,c} = s_{b,k}\, \theta_{b,i,k,c}, \qquad s_{b,k} = \sum_{j} \sum_{c' \in \text{group } k} \phi_{b,j,k,c'}\, g_{b,j,k,c'}$$


# %%
def compact_generalized(theta, phi, g, *, groups=8, kernel="dot", order=3):
    """theta, phi, g (B, N, C) -> y (B, N, C)."""
    B, N, C = theta.shape
    theta, phi, g = (each.reshape(B, N, groups, C // groups) for each in (theta, phi, g))
    if kernel == "dot":
        y = (phi * g).sum(dim=(1, 3), keepdim=True) * theta
    elif kernel == "rbf":
        a, b = math.sqrt(2 * GAMMA) * theta, math.sqrt(2 * GAMMA) * phi
        s = [BETA * (b**p * g).sum(dim=(1, 3), keepdim=True) for p in range(order + 1)]
        y = s[order]
        for p in range(order, 0, -1):
            y = s[p - 1] + a / p * y
    else:
        raise ValueError(f"kernel={kernel!r} is not known")
    return y.reshape(B, N, C)


twice = np.stack([np.tile(each, 2) for each in (theta, phi, g)])  # 6 channels: two equal groups
batch = torch.tensor(twice[:, None])  # a batch of one clip
assert batch.shape == (3, 1, 4, 6)
difference(compact_generalized(*batch, groups=2)[0], np.tile(y, 2), "dot, two groups")
difference(
    compact_generalized(*(30 * batch), groups=2, kernel="rbf")[0],
    np.tile(y_loops, 2),
    "rbf, two groups",
    below=1e-10,
)
batch[1, 0, 0, 0] = 4  # phi of position 0, channel 0: group 0
touched = (compact_generalized(*batch, groups=2) / batch[0])[0, 0].numpy()
print("y / theta at position 0: channel 0", touched[0], "and channel 3", touched[3])
assert (touched[0], touched[3]) == (9, 5)

# %% [markdown]
# The news of group 0 does not reach group 1.
#
# ## 6 · The block
#
# Around the operation: $\theta$, $\phi$, $g$ halve the channels, without bias; $W_z$ brings them back, and is itself cut into $G$ groups; a group normalisation with gain 0 at the start. It takes mean and variance over one
# group of channels and all positions of *one* clip, so batch mates do not matter.

# %%
B, C, T, H, W, G = 2, 48, 3, 5, 7, 4
N, d = T * H * W, C // 2
torch.manual_seed(0)
x = torch.randn(B, C, T, H, W, dtype=torch.float64)


class CompactGeneralizedNonLocalBlock(nn.Module):
    """z = x + norm(W_z y); x is (B, C, T, H, W)."""

    def __init__(self, in_channels, inner_channels=None, *, groups=8, kernel="dot", order=3):
        super().__init__()
        self.groups, self.kernel, self.order = groups, kernel, order
        C, d = in_channels, inner_channels or in_channels // 2
        self.theta = nn.Conv3d(C, d, 1, bias=False)
        self.phi = nn.Conv3d(C, d, 1, bias=False)
        self.g = nn.Conv3d(C, d, 1, bias=False)
        self.w_z = nn.Conv3d(d, C, 1, groups=groups, bias=False)
        self.norm = nn.GroupNorm(groups, C)
        for layer in (self.theta, self.phi, self.g, self.w_z):
            nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x):
        theta, phi, g = (layer(x).flatten(2).transpose(1, 2) for layer in (self.theta, self.phi, self.g))
        y = compact_generalized(theta, phi, g, groups=self.groups, kernel=self.kernel, order=self.order)
        y = y.transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.norm(self.w_z(y))


block = CompactGeneralizedNonLocalBlock(C, groups=G).double()
theta = block.theta(x).flatten(2).transpose(1, 2)
assert theta.shape == (B, N, d)
assert block.w_z.weight.shape == (C, d // G, 1, 1, 1)
assert torch.equal(block(x), x)
print("starts as the identity: exact")

# %% [markdown]
# Parameters at $C = 1024$, $d = 512$, $G = 8$, as in the released ResNets:
#
# $$n = 3\, C d + \frac{d\, C}{G} + 2\, C$$

# %%
count = sum(parameter.numel() for parameter in CompactGeneralizedNonLocalBlock(1024).parameters())
plain = 4 * 1024 * 512 + 2 * 1024  # a non-local block without biases
print(f"compact generalized {count:,}, non-local {plain:,}")
assert count == 3 * 1024 * 512 + 512 * 1024 // 8 + 2 * 1024 == 1_640_448
assert plain == 2_099_200

# %% [markdown] tags=["predict"]
# The dot kernel's attention is one number a group, $s_k$, through which $\phi$ and $g$ reach the output. We set the gain to 1 and multiply $\phi$'s weights by
# 1, 10, 100, 1000: so all $s_k$ grow by these factors. The cell prints the rms of what the block adds to clip 0, group by group. How large is it in the end?


# %%
def added(block, x):
    """The rms of z - x in each group of clip 0."""
    with torch.no_grad():
        return (block(x) - x)[0].reshape(G, -1).square().mean(dim=1).sqrt()


nn.init.ones_(block.norm.weight)
rows = {}
for factor in (1, 10, 100, 1000):
    block.phi.weight.data *= factor
    rows[factor] = added(block, x).numpy()
    block.phi.weight.data /= factor
    print(f"phi x {factor:4}: added {rows[factor]}")
assert torch.allclose(block(x)[:1], block(x[:1]), rtol=1e-12)  # batch mates do not matter
assert rows[1000].max() < 1
assert rows[1].min() < 0.1 < 0.9 < rows[1000].min()

# %% [markdown] tags=["explain"]
# It stops at 1. $\theta, \phi, g$, $W_z$ and the norm are cut into the *same* groups, so what is normalised together shares one $s$. Let $v$ be $W_z \theta$ in one group, with mean $\bar v$ and variance $\sigma^2$. Then $W_z y = s\, v$, and the normalisation divides by the standard deviation of just that:
#
# $$\frac{s v - s \bar v}{\sqrt{s^2 \sigma^2 + \varepsilon}} = h(s)\; \frac{v - \bar v}{\sigma},
# \qquad h(s) = \frac{s}{\sqrt{s^2 + \varepsilon / \sigma^2}}$$

# %%
with torch.no_grad():
    phi, g = (layer(x)[0].reshape(G, -1) for layer in (block.phi, block.g))
    s = (phi * g).sum(dim=1).numpy()
    sigma = block.w_z(block.theta(x))[0].reshape(G, -1).std(dim=1, correction=0).numpy()


def h(s):
    return s / np.sqrt(s**2 + block.norm.eps / sigma**2)


for factor, row in rows.items():
    difference(np.abs(h(factor * s)), row, f"h, phi x {factor:4}", below=1e-12)

# %%
fig, ax = plt.subplots(figsize=(6.4, 3.2))
ratio = np.geomspace(1e-4, 1e4, 200)
ax.semilogx(ratio, ratio / np.sqrt(ratio**2 + 1), color=plots.COLOURS["grey"], label="|h|")
for (factor, row), marker in zip(rows.items(), "osD^", strict=True):
    ax.semilogx(factor * np.abs(s) * sigma / block.norm.eps**0.5, row, marker, label=rf"$\phi$ x {factor}")
ax.set(xlabel=r"$|s|\, \sigma / \sqrt{\varepsilon}$", ylabel="rms of what is added")
ax.legend()
plots.show(
    fig,
    "The rms of what the block adds against the size of s on a logarithmic axis. The grey curve rises from 0 to 1 in an S; the measured "
    "points of four groups and four factors lie on it. With factor 1 they are at the foot, with factor 1000 on the plateau at 1.",
)

# %% [markdown]
# $h$ is a soft sign. A small $s$ scales the group, a large one only says plus or minus, and beyond the bend the gradient for $\phi$ and $g$ falls as $1/s^3$: $h'(s)=\frac{\varepsilon}{\sigma^2}(s^2+\frac{\varepsilon}{\sigma^2})^{-3/2}$. Our block is small. Where on the curve does one of the released size begin?

# %%
torch.manual_seed(1)
released = CompactGeneralizedNonLocalBlock(1024)
features = torch.randn(1, 1024, 1, 28, 28).relu()
plateau = []
for part in (1, 1 / 3, 1 / 10):
    with torch.no_grad():
        theta, phi, g = (layer(part * features) for layer in (released.theta, released.phi, released.g))
        s = (phi * g).reshape(8, -1).sum(dim=1)
        sigma = released.w_z(theta).reshape(8, -1).std(dim=1, correction=0)
    h_start = (s / (s**2 + released.norm.eps / sigma**2).sqrt()).abs()
    rms = (part * features).square().mean().sqrt().item()
    plateau.append(int((h_start > 0.98).sum()))
    print(f"features of rms {rms:.2f}: |h| is above 0.98 in {plateau[-1]} of 8 groups")
assert plateau == [8, 6, 0]

# %% [markdown]
# With these features, random and of rms 0.7, all eight groups begin on the plateau: $\phi$ and $g$ say eight signs. $s\,\sigma$ goes with the cube of their size: a third of it leaves six groups there, a tenth none.
# The RBF kernel keeps more: the norm takes out the common scale of $s_0, \dots, s_P$, and leaves how they compare.
#
# ## 7 · The same in Keras
#
# Keras has the same parts: convolutions with `groups`, and `GroupNormalization` (mind its epsilon: 1e-3 where PyTorch has 1e-5). Kernels are transposed as in notebook 07; a grouped one is (1, 1, 1, d / G, C).

# %%
from keras import layers, ops

inputs = keras.Input((T, H, W, C), dtype="float64")
theta, phi, g = (
    layers.Conv3D(d, 1, use_bias=False, dtype="float64", name=name)(inputs) for name in ("theta", "phi", "g")
)
by_group = (-1, N, G, d // G)
s = ops.sum(ops.reshape(phi, by_group) * ops.reshape(g, by_group), axis=(1, 3), keepdims=True)
y = ops.reshape(s * ops.reshape(theta, by_group), (-1, T, H, W, d))
update = layers.Conv3D(C, 1, groups=G, use_bias=False, dtype="float64", name="w_z")(y)
norm = layers.GroupNormalization(G, epsilon=1e-5, gamma_initializer="zeros", dtype="float64", name="norm")
model = keras.Model(inputs, inputs + norm(update))

for name in ("theta", "phi", "g", "w_z"):
    weight = getattr(block, name).weight.detach().numpy()
    model.get_layer(name).set_weights([np.moveaxis(weight, (0, 1), (-1, -2))])
norm.set_weights([each.detach().numpy() for each in (block.norm.weight, block.norm.bias)])
assert model.get_layer("w_z").kernel.shape == (1, 1, 1, d // G, C)
z = block(x).detach().numpy()
x_last = np.moveaxis(x.numpy(), 1, -1)
close = 1e-10 if keras.backend.backend() == "tensorflow" else 1e-4  # the others compute parts in float32
difference(np.moveaxis(ops.convert_to_numpy(model(x_last)), -1, 1), z, "Keras, by hand", below=close)

# %% [markdown]
# `nlutils` has the block for both frameworks. With either kernel, both agree with ours. For the RBF, $\theta$ and $\phi$ first grow from an rms of 0.07 to 20, or a missing power would pass unnoticed.

# %%
for kernel, growth in (("dot", 1), ("rbf", 300)):
    block.kernel = kernel
    block.theta.weight.data *= growth
    block.phi.weight.data *= growth
    z = block(x).detach()
    ours = nlutils.torch.CompactGeneralizedNonLocalBlock(C, groups=G, kernel=kernel).double()
    ours.load_state_dict(block.state_dict())
    twin = nlutils.keras.CompactGeneralizedNonLocalBlock(groups=G, kernel=kernel, dtype="float64")
    twin.build(x_last.shape)
    torch_to_keras(ours, twin)
    difference(ours(x).detach(), z, f"nlutils.torch, {kernel}", below=1e-10)
    difference(
        np.moveaxis(ops.convert_to_numpy(twin(x_last)), -1, 1), z, f"nlutils.keras, {kernel}", below=close
    )

block.order = 1
difference(block(x).detach(), z, "rbf, order 1 and order 3")
assert (block(x) - z).abs().max() > 0.1
block.order = 3
block.theta.weight.data /= growth
block.phi.weight.data /= growth

# %% [markdown]
# ## 8 · Six ways to see everything
#
# Others changed non-local in other ways. Here they are in their core form, on a grid of 3 x 4 positions with 4 channels. Residual, convolutions and norms are left out: $\theta, \phi, g$ and the logits $m, u, v$ are what linear layers
# make of $x$. All are linear in $g$.
#
# Start with non-local, and *disentangled* non-local (DNL, Yin and others 2020). With $\bar\theta, \bar\phi$ the means over all positions:
#
# $$\theta_i \cdot \phi_j = (\theta_i - \bar\theta) \cdot (\phi_j - \bar\phi) + \bar\theta \cdot \phi_j + (\text{terms without } j)$$
#
# A softmax over $j$ ignores terms without $j$. What is left is a *pairwise* term, and a *unary* one that is the same for all $i$. The exponential of a sum is a product, so non-local *multiplies* the two weights: where one is near 0, the other does not count. DNL adds two
# softmaxes instead, with its own logits $m$ for the unary one.

# %%
H, W, C = 3, 4, 4
N = H * W
rng = np.random.default_rng(3)
theta, phi, g = rng.standard_normal((3, N, C))
m = rng.standard_normal(N)


def softmax(logits, axis=-1):
    e = np.exp(logits - logits.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def non_local(theta, phi, g):
    return softmax(theta @ phi.T) @ g


def disentangled(theta, phi, m, g):
    pairwise = softmax((theta - theta.mean(axis=0)) @ (phi - phi.mean(axis=0)).T)
    return pairwise @ g + softmax(m) @ g


pairwise = softmax((theta - theta.mean(axis=0)) @ (phi - phi.mean(axis=0)).T)
unary = softmax(theta.mean(axis=0) @ phi.T)
product = pairwise * unary
assert product.shape == (N, N)
difference(
    product / product.sum(axis=1, keepdims=True), softmax(theta @ phi.T), "non-local = product", below=1e-12
)
shift = rng.standard_normal(C)  # a bias of theta changes what non-local prefers, and nothing in DNL
assert not np.allclose(non_local(theta + shift, phi, g), non_local(theta, phi, g))
assert np.allclose(disentangled(theta + shift, phi, m, g), disentangled(theta, phi, m, g))

# %% [markdown]
# *Global context* (GCNet, Cao and others 2019) keeps the unary term alone: one softmax for all queries. *Double attention* (A²-Nets, Chen and others 2018) gathers $K$ descriptors, each a softmax over the positions, then lets every
# position mix them:
#
# $$y_i = \sum_j \mathrm{softmax}_j(m_j)\, g_j \qquad\qquad y_i = \sum_{k=1}^{K} \mathrm{softmax}_k(v_{ik}) \sum_j \mathrm{softmax}_j(u_{jk})\, g_j$$

# %%
K = 2
u, v = rng.standard_normal((2, N, K))


def global_context(m, g):
    return np.tile(softmax(m) @ g, (len(g), 1))


def double_attention(u, v, g):
    descriptors = softmax(u, axis=0).T @ g
    return softmax(v, axis=1) @ descriptors


y = global_context(m, g)
assert (y == y[0]).all()  # the same answer for every query
y = double_attention(u, v, g)
assert y.shape == (N, C)
assert np.linalg.matrix_rank(y) <= K < np.linalg.matrix_rank(non_local(theta, phi, g))
print("global context: 1 answer; double attention: mixtures of", K, "answers")

# %% [markdown] tags=["predict"]
# *Criss-cross* attention (CCNet, Huang and others 2019) is non-local in which $i$ sees only its own row and column, and is applied twice. How many of the 12 positions does position 0 see after one pass, how many after two?


# %%
row, column = np.divmod(np.arange(N), W)
cross = (row[:, None] == row) | (column[:, None] == column)


def criss_cross(theta, phi, g):
    return softmax(np.where(cross, theta @ phi.T, -np.inf)) @ g


def jacobian(operation):
    """dy / dg, (N, C, N, C): operation is linear, so unit vectors tell all."""
    units = np.eye(N * C).reshape(N * C, N, C)
    return np.stack([operation(unit) for unit in units], axis=-1).reshape(N, C, N, C)


once = jacobian(lambda g: criss_cross(theta, phi, g))
twice = jacobian(lambda g: criss_cross(theta, phi, criss_cross(theta, phi, g)))
seen = [int((J[0] != 0).any(axis=(0, 2)).sum()) for J in (once, twice)]
print("seen by position 0: once", seen[0], "and twice", seen[1], "of", N)
assert seen == [H + W - 1, N]

# %% [markdown] tags=["explain"]
# $H + W - 1$, then all: whatever stands in another row and column is passed on by one of the two corners between. (Our second pass reuses the map. The real one makes new $\theta$ and $\phi$ from the first pass' output.)
#
# The Jacobian $\partial y / \partial g$ answers more. It is a matrix of $NC = 48$ rows and columns: which entry hears of which, and how much. Its *rank* is the number of separate things that these maps can carry.

# %%
operations = {
    "non-local": lambda g: non_local(theta, phi, g),
    "disentangled": lambda g: disentangled(theta, phi, m, g),
    "criss-cross, once": lambda g: criss_cross(theta, phi, g),
    "criss-cross, twice": lambda g: criss_cross(theta, phi, criss_cross(theta, phi, g)),
    "double attention": lambda g: double_attention(u, v, g),
    "global context": lambda g: global_context(m, g),
    "CGNL, 2 groups": lambda g: compact_generalized(
        *map(torch.tensor, (theta[None], phi[None], g[None])), groups=2
    )[0].numpy(),
}
print(f"{'':18}  rank  seen  own answer for each  mixes channels  misses at least")
found = {}
for name, operation in operations.items():
    J = jacobian(operation)
    rank = int(np.linalg.matrix_rank(J.reshape(N * C, N * C)))
    seen = int((J[0] != 0).any(axis=(0, 2)).sum())
    own = not np.allclose(J, J[:1])
    mixes = bool(np.abs(J * (1 - np.eye(C)[None, :, None, :])).max() > 0)
    found[name] = (rank, seen, own, mixes)
    print(f"{name:18}  {rank:4}  {seen:4}  {own!s:>19}  {mixes!s:>14}  {1 - rank / (N * C):15.0%}")
assert [rank for rank, *_ in found.values()] == [48, 48, 48, 48, K * C, C, 2]
assert [name for name, (*_, mixes) in found.items() if mixes] == ["CGNL, 2 groups"]

# %% [markdown]
# The last column is a theorem. Suppose everybody wants to *fetch* the vector of the place diagonally opposite: a permutation, a matrix with 48 singular values, all 1. Keep the maps fixed and let $g$ vary: a matrix of rank $r$ misses, on
# average over $g$, at least a share $1 - r/48$ of the energy (Eckart and Young: the best approximation of rank $r$ keeps the $r$ largest singular values).
#
# A block also makes its maps from the clip, so for a single clip it can do better; the next cell prints the least that two summaries miss of our $g$. But position $i$ makes its $\theta_i$ or $v_i$ before it knows what stands opposite.
#
# Criss-cross, once, shows that the rank is only a bound: it is full, and yet 8 of the 12 places do not see their opposite. Non-local, DNL and two passes of criss-cross can fetch:

# %%
opposite = N - 1 - np.arange(N)
places = np.eye(N)
asks, shows = 40 * places[opposite], places  # theta of width N: the place that is asked for, one-hot
fetched = non_local(asks, shows, g)
difference(fetched, g[opposite], "non-local fetches   ", below=1e-12)
common = softmax(m) @ g
difference(disentangled(asks, shows, m, g) - common, g[opposite], "disentangled, - common", below=1e-12)

same_row = row * W + (W - 1 - column)  # first along the row,
same_column = (H - 1 - row) * W + column  # then along the column
halfway = criss_cross(40 * places[same_row], shows, g)
fetched = criss_cross(40 * places[same_column], shows, halfway)
difference(fetched, g[opposite], "criss-cross, twice  ", below=1e-12)
blind = (~cross[np.arange(N), opposite]).sum()
print("places whose opposite is off the cross, so that one pass cannot fetch it:", blind)
assert blind == 8

energy = np.linalg.svd(g[opposite], compute_uv=False) ** 2
print(f"{K} summaries, made for this one g, miss at least {energy[K:].sum() / energy.sum():.0%}")
assert energy[K:].sum() / energy.sum() < 1 - K / N

# %% [markdown]
# What this costs, given $\theta, \phi, g, m, u, v$, for $N = 28 \times 28$ and $C = 512$:

# %%
H, W, C, K = 28, 28, 512, 128
N = H * W
cost = {
    "generalized, plain": 2 * (N * C) ** 2,
    "non-local": 2 * N**2 * C,
    "disentangled": 2 * N**2 * C + N * C,
    "double attention": 2 * N * K * C,
    "criss-cross, twice": 2 * 2 * N * (H + W - 1) * C,
    "global context": N * C,
    "CGNL, dot": 2 * N * C,
}
for name, macs in cost.items():
    print(f"{name:18} {macs:15,} multiply-adds, {macs / cost['non-local']:8.4f} times non-local")
assert cost["CGNL, dot"] == 2 * cost["global context"] == 802_816

# %% [markdown]
# | | $y$ | cost | what it can, and what it cannot |
# |:--|:--|:--|:--|
# | non-local | $\mathrm{softmax}(\theta \phi^T)\, g$ | $N^2 C$ | fetches from any place; one weight for all channels |
# | DNL | $(\text{pairwise} + \text{unary})\, g$ | $N^2 C$ | also listens to what stands out for all; $\theta$'s mean says nothing |
# | CCNet | non-local on the cross, twice | $N (H + W) C$ | fetches in two steps; once is blind off the cross |
# | A²-Nets | $\mathrm{softmax}(v)\,(\mathrm{softmax}(u)^T g)$ | $N K C$ | mixtures of $K$ summaries; not $K + 1$ separate things |
# | GCNet | $\mathrm{softmax}(m)^T g$ for all | $N C$ | one summary; the same answer for every query |
# | CGNL, dot | $s\, \theta$ in each group | $N C$ | channels meet; $y_i$ is never more than a multiple of $\theta_i$ |
#
# Neither the cost nor the rank says how accurate a network will be. In the authors' own table for ResNet-50 on ImageNet (README of the released code), one CGNL block with 8 numbers of attention takes top-1 from 76.15 to 77.69 %, and the RBF kernel to 77.32 %.
#
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · All that $\phi$ and $g$ say (easy, 10 minutes)
#
# Write `said(phi, g, groups)`: the numbers $s_{b,k}$ of the dot kernel, of shape (B, groups), for $\phi$ and $g$ of shape (B, N, C). **Expect**: for
# the two given clips −1 and 12, 7 and −1.
#
# <details><summary>Hint 1: a nudge</summary>Which channels are neighbours in one group: 0 and 1, or 0 and 2?</details>
# <details><summary>Hint 2: the formula</summary>(B, N, C) becomes (B, N, groups, C / groups); then sum over axes 1 and 3.</details>
# <details><summary>Hint 3: part of the code</summary><code>products = (phi * g).reshape(B, N, groups, C // groups)</code></details>


# %% tags=["stub"]
def said(phi, g, groups):
    #: solution
    B, N, C = phi.shape
    return (phi * g).reshape(B, N, groups, C // groups).sum(axis=(1, 3))
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
phi_1 = np.array([[[1.0, 2, 0, 1], [-1, 1, 3, 2]], [[1, 0, 2, 1], [0, 1, 1, -1]]])
g_1 = np.array([[[2.0, -1, 5, 1], [3, 2, 1, 4]], [[3, 2, 1, 0], [1, 4, -1, 2]]])
check(
    "Exercise 1",
    lambda: said(phi_1, g_1, 2),
    np.array([[-1.0, 12.0], [7.0, -1.0]]),
    mistakes={
        "channels c and c + groups are put into one group; a group is a run of neighbours": np.array(
            [[2.0, 9.0], [4.0, 2.0]]
        ),
        "this is the sum over positions only; the channels of a group are added too": np.array(
            [[-1.0, 0, 3, 9], [3, 4, 1, -2]]
        ),
        "the batch axis is lost; the shape is (B, groups)": np.array([6.0, 11.0]),
        "keepdims kept the summed axes; the shape is (B, groups)": np.array(
            [[[[-1.0], [12.0]]], [[[7.0], [-1.0]]]]
        ),
        "this is a mean; the kernel has no divisor": np.array([[-0.25, 3.0], [1.75, -0.25]]),
    },
)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Which order is enough? (medium, 15 minutes)
#
# Write `order_needed(size, tolerance)`: the smallest order $P \ge 1$ at which the Taylor sum of $e^x$ at $x = 2\gamma\,\text{size}^2$ differs from $e^x$ by at most `tolerance` times $e^x$. **Expect**: for a tolerance of 0.001 and sizes 10, 30, 100, 300 the orders 1, 2, 8 and 32.
#
# <details><summary>Hint 1: a nudge</summary>Add terms one by one until the rest is small.</details>
# <details><summary>Hint 2: the formula</summary>The next term is the last one times x / p.</details>
# <details><summary>Hint 3: part of the code</summary><code>term *= x / p</code>, <code>total += term</code>, then compare <code>math.exp(x) - total</code></details>


# %% tags=["stub"]
def order_needed(size, tolerance):
    #: solution
    x = 2 * GAMMA * size**2
    total = term = 1.0
    order = 0
    while order < 1 or math.exp(x) - total > tolerance * math.exp(x):
        order += 1
        term *= x / order
        total += term
    return order
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
check(
    "Exercise 2",
    lambda: tuple(order_needed(size, 0.001) for size in (10, 30, 100, 300)),
    (1, 2, 8, 32),
    mistakes={
        "you return the number of terms; the order is the highest power, one less": (2, 3, 9, 33),
        "this is one order too low: the comparison comes after the term is added": (1, 1, 7, 31),
        "the difference is compared with the tolerance itself, not with a share of exp(x)": (1, 3, 9, 53),
    },
)

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · The gradient, compact too (hard, 25 minutes)
#
# One group, dot kernel: $y = s\,\theta$ with $s = \sum \phi\, g$. Given `dy`, the gradient of a loss for $y$, write `backward(theta, phi, g, dy)`: the gradients for $\theta$, $\phi$ and $g$, without
# any $NC \times NC$ matrix. **Expect**: three arrays of the shape of $\theta$; the second is a multiple of $g$.
#
# <details><summary>Hint 1: a nudge</summary>φ reaches the loss through s only. How much does the loss change when s changes by a little?</details>
# <details><summary>Hint 2: the formula</summary>ds = Σ θ dy, summed over all entries. Then dφ = ds g.</details>
# <details><summary>Hint 3: part of the code</summary><code>ds = (theta * dy).sum()</code>, <code>return …, ds * g, …</code></details>


# %% tags=["stub"]
def backward(theta, phi, g, dy):
    #: solution
    s, ds = (phi * g).sum(), (theta * dy).sum()
    return s * dy, ds * g, ds * phi
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
four = np.random.default_rng(5).standard_normal((4, 6, 3))
leaves = [torch.tensor(each, requires_grad=True) for each in four[:3]]
compact_generalized(*(leaf[None] for leaf in leaves), groups=1).backward(torch.tensor(four[3])[None])
right = tuple(leaf.grad.numpy() for leaf in leaves)
theta_3, phi_3, g_3, dy = four
check(
    "Exercise 3",
    lambda: backward(theta_3, phi_3, g_3, dy),
    right,
    mistakes={
        "the gradients of phi and g are swapped": (right[0], right[2], right[1]),
        "theta moves y by s, and the loss by s times dy": (
            (phi_3 * g_3).sum() * np.ones_like(dy),
            *right[1:],
        ),
        "dy belongs into ds: the loss, not y, is asked for": (
            right[0],
            theta_3.sum() * g_3,
            theta_3.sum() * phi_3,
        ),
        "ds is one number, summed over all entries": (right[0], theta_3 * dy * g_3, theta_3 * dy * phi_3),
    },
)

# %% [markdown]
# ## What you learned
#
# - Generalized non-local compares entries instead of positions: $(NC)^2$ pairs. A kernel that is a sum of $P + 1$ products is computed in $NC(P+1)$, exactly, by moving brackets.
# - The dot kernel leaves one number for each group, and every $y_i$ a multiple of $\theta_i$. The group normalisation turns that number into a soft sign.
# - At $\gamma = 10^{-4}$ order 3 errs by less than a millionth up to features of rms 10; the constant $\beta$ is the larger error by far.
# - The rank of $\partial y / \partial g$ bounds what an operation can carry, for any fixed maps: $NC$ for non-local, $KC$ for double attention, $C$ for global context, $G$ for CGNL.
#
# ## Further reading
#
# - K. Yue, M. Sun, Y. Yuan, F. Zhou, E. Ding, F. Xu: *Compact Generalized Non-local Network*. NeurIPS 2018.
# - Y. Chen, Y. Kalantidis, J. Li, S. Yan, J. Feng: *A²-Nets: Double Attention Networks*. NeurIPS 2018.
# - Y. Cao, J. Xu, S. Lin, F. Wei, H. Hu: *GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond*. ICCV Workshops 2019.
# - Z. Huang, X. Wang, L. Huang, C. Huang, Y. Wei, W. Liu: *CCNet: Criss-Cross Attention for Semantic Segmentation*. ICCV 2019.
# - M. Yin, Z. Yao, Y. Cao, X. Li, Z. Zhang, S. Lin, H. Hu: *Disentangled Non-Local Neural Networks*. ECCV 2020.
# - Y. Wu, K. He: *Group Normalization*. ECCV 2018.
# - C. Eckart, G. Young: *The Approximation of One Matrix by Another of Lower Rank*. Psychometrika 1936.
