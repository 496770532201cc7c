# %% [markdown]
# # 09 · What the operation costs, and how to pay less
#
# After this notebook you can
#
# - count multiply-adds and bytes of a block before you run it, and say what sub-sampling saves
# - derive the dot product without its map, and see it as a convolution whose weights come from the clip
# - derive the concatenation in O(N log N), forward and backward, without losing digits
# - show that the softmax has neither shortcut, and compute it in little memory all the same
# - read recorded measurements of this library beside others
#
# | | |
# |:--|:--|
# | What you need | notebooks 04 and 05; partial derivatives; sorting |
# | Your time | 90 minutes |
# | Machine time | 20 seconds |
# | Framework | PyTorch |

# %% tags=["parameters"]
import os

profile = os.environ.get("NLUTILS_PROFILE", "quick")

# %%
import json
import statistics
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from nlutils import course, plots
from nlutils.course import check, difference
from nlutils.paths import results_root
from nlutils.study.cost import HeldBytes
from nlutils.torch import NonLocalBlock, non_local
from nlutils.torch import pairwise as pairwise_of_batch

settings = course.settings(
    profile, quick=dict(sizes=[196, 784, 3136]), full=dict(sizes=[196, 784, 3136, 12544])
)
plots.style()
torch.set_num_threads(1)  # processor time then means one thread


def normal(*shape, seed, scale=1.0):
    return torch.from_numpy(scale * np.random.default_rng(seed).standard_normal(shape))


# %% [markdown]
# ## 1 · Count first
#
# The block of notebook 05 has four 1×1×1 convolutions between $C$ and $d$ channels, and two products with the map: $N \times d$ times
# $d \times N$ makes it, $N \times N$ times $N \times d$ applies it. Each output number of a product costs one multiply-add for every
# term of its sum:
#
# $$\text{multiply-adds} = \underbrace{4 N C d}_{\text{convolutions}} + \underbrace{2 N^2 d}_{\text{pairs}},
# \qquad \text{bytes of one map} = 4 N^2 \text{ (float32)}$$


# %%
def block_cost(N, C, d):
    return 4 * N * C * d, 2 * N * N * d


C, d = 256, 128
print("      N  convolutions     pairs   one map")
for T, H, W in ((4, 14, 14), (8, 28, 28), (8, 56, 56), (32, 56, 56)):
    N = T * H * W
    convolutions, pairs = (cost / 1e9 for cost in block_cost(N, C, d))
    print(f"{N:7,}  {convolutions:8.2f} G   {pairs:8.2f} G  {4 * N * N / 2**20:8,.0f} MiB")
assert 4 * N * N / 2**30 > 37.5

block, x = NonLocalBlock(16, norm=False, instantiation="embedded_gaussian"), torch.randn(1, 16, 2, 4, 4)
with FlopCounterMode(display=False) as counter:
    block(x)
assert counter.get_total_flops() == 2 * sum(block_cost(32, 16, 8))  # PyTorch counts 2 for a multiply-add

# %% [markdown]
# At 784 positions the convolutions are two fifths of the work. At 100,352, 32 frames of 56 × 56, one map would fill 37.5 GiB, and a network trains with more
# than one map alive. How many more? `pairwise` makes the maps of notebook 04's four forms; a counter tells how many bytes PyTorch's tensors hold.


# %%
def held(call, *inputs):
    """The most bytes that tensors hold at once while `call` runs, without the inputs."""
    with HeldBytes(inputs) as bytes_of:
        given = bytes_of.now
        call()
    return bytes_of.highest - given


def pairwise(theta, phi, form, w_f=None):
    """The normalised map of one clip, theta (N, d), phi (M, d) -> (N, M)."""
    return pairwise_of_batch(theta[None], phi[None], form, w_f=w_f)[0]


def step(form, N, d=64):
    """One forward and backward pass of `form` on a random clip, ready to run, and its inputs."""
    x, phi, g, q = (normal(N, d, seed=seed, scale=0.3).float() for seed in range(4))
    w_f = normal(2 * d, seed=4, scale=0.1).float() if form == "concatenation" else None
    phi = x if form == "gaussian" else phi  # the Gaussian form compares x with itself
    leaves = [x, g] if form == "gaussian" else [x, phi, g]
    leaves += [w_f] if form == "concatenation" else []
    for leaf in leaves:
        leaf.requires_grad_()

    def run():
        torch.autograd.grad(pairwise(x, phi, form, w_f) @ g, leaves, q)

    return run, [*leaves, q]


# %% [markdown] tags=["predict"]
# The clip's frames get twice as high and twice as wide: $N$ becomes $4N$. By what factor does the memory grow, by what the time? And
# how many $N \times N$ matrices are alive at once in one forward and backward pass of each form: one, two, three, more?

# %%
FORMS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
most = {}
print("most bytes at once, in maps of 4 N² bytes")
for form in FORMS:
    for N in settings.sizes[:3]:
        run, inputs = step(form, N)
        most[form, N] = held(run, *inputs)
    print(
        f"{form:18}", "  ".join(f"N = {N:5,}: {most[form, N] / (4 * N * N):.2f}" for N in settings.sizes[:3])
    )
    assert round(most[form, 3136] / (4 * 3136**2)) == (2 if form == "dot_product" else 3)

# %% tags=["nbval-ignore-output"]
print("milliseconds of one thread", *(f"{'N = ' + format(N, ','):>12}" for N in settings.sizes))
for form in FORMS:
    times = []
    for N in settings.sizes:
        run, _ = step(form, N)
        seconds = []
        for _ in range(3):
            start = time.process_time()
            run()
            seconds.append(time.process_time() - start)
        times.append(1000 * statistics.median(seconds))
    print(f"{form:26}", *(f"{t:12.1f}" for t in times))

# %% [markdown] tags=["explain"]
# Memory grows 16 times, $N^2$, as soon as the maps outweigh everything else. From 784 to 3,136 positions the time grows by about the same factor. Two maps are alive at once in the dot product, a product and its quotient by $N$;
# three where a non-linear function stands between, because its backward pass holds three maps: the function's output, the gradient that arrives and the gradient that it makes. So one softmax block on 25,088
# positions trains with three times 2.3 GiB, and its four convolutions are 2 % of the work. The rest of this notebook is about the map.

# %% [markdown]
# ## 2 · The paper's remedy: sub-sampling
#
# Pooling by 1×2×2 on the side of $\phi$ and $g$ leaves $M = N/4$ places to look at, so a quarter of the pairs. How much it saves in all depends on *where* the pooling
# stands. Before $\phi$ and $g$ (the authors' code) these two work on $M$ positions; after them (the paper's text) on $N$:
#
# $$\text{before: } 2NCd + 2MCd + 2NMd, \qquad \text{after: } 4NCd + 2NMd$$
#
# The paper's Table 2e gives a ResNet-101 with five blocks as 1.2 times the work of the one without. Its blocks: two on 4×28×28 positions with $C = 512$, three on 4×14×14 with
# $C = 1024$; without them, 35.083 G multiply-adds, counted from the released architecture.


# %%
def sub_sampled_cost(N, C, order):
    d, M = C // 2, N if order is None else N // 4
    embeddings = N * C * d + 2 * (M if order == "before" else N) * C * d
    return embeddings + 2 * N * M * d + N * d * C


assert sub_sampled_cost(784, 512, None) == sum(block_cost(784, 512, 256))
resnet, ratio = 35.083e9, {}
for order in (None, "after", "before"):
    five = 2 * sub_sampled_cost(3136, 512, order) + 3 * sub_sampled_cost(784, 1024, order)
    ratio[order] = (resnet + five) / resnet
    print(f"pooling {order or 'nowhere':8} five blocks {five / 1e9:6.3f} G, network {ratio[order]:.2f} times")
assert [f"{value:.1f}" for value in ratio.values()] == ["1.6", "1.3", "1.2"]

# %% [markdown]
# Only *before* gives the published 1.2. But the map still grows with $N^2$, and the function is another. The next sections compute the *same* function.
#
# ## 3 · Dot product: move the brackets
#
# Without a softmax, the map is only a product between two products, and matrix products are associative:
#
# $$y = \tfrac{1}{M}\big(\underbrace{\theta\, \phi^T}_{N \times M}\big)\, g = \theta\, \underbrace{\tfrac{1}{M}\, \phi^T g}_{d \times c}$$
#
# The left costs $N M (d + c)$ multiply-adds, the right $(N + M)\, d\, c$. With $N = M$ and $d = c$ the left costs $N / d$ times as much.


# %%
def dot_product(theta, phi, g):
    K = phi.T @ g / len(phi)
    return theta @ K


theta, phi, g = (normal(3136, 64, seed=seed) for seed in range(3))
through_map = pairwise(theta, phi, "dot_product") @ g
y = dot_product(theta, phi, g)
assert y.shape == (3136, 64)
difference(y, through_map, "brackets moved", below=1e-12)

for name, call in {
    "through the map": lambda: pairwise(theta, phi, "dot_product") @ g,
    "brackets moved": lambda: dot_product(theta, phi, g),
}.items():
    with FlopCounterMode(display=False) as counter:
        call()
    print(
        f"{name:16} {counter.get_total_flops() // 2:13,} multiply-adds, {held(call, theta, phi, g):11,} bytes"
    )

# %% [markdown]
# $N / d = 49$ times fewer, and nothing of size $N^2$. (The map's way holds two maps of $8 N^2$ bytes: these numbers are float64.) Autograd differentiates the two small products, so the backward pass is as cheap.
#
# Look at what is left: $y_i = K^T \theta_i$, *one* matrix for all positions. That is a 1×1×1 convolution, only that its weights are computed from the clip. Together with $\theta_i = W_\theta x_i$ and $W_z$ the
# whole block (without biases and norm) is one:
#
# $$z_i = x_i + A\, x_i, \qquad A = W_z K^T W_\theta \quad (C \times C)$$

# %%
torch.manual_seed(0)
block = NonLocalBlock(6, 4, instantiation="dot_product", norm=False, zero_init=False).double()
for layer in (block.theta, block.phi, block.g, block.w_z):
    torch.nn.init.normal_(layer.weight)
clip = normal(1, 6, 3, 5, 5, seed=5)
with torch.no_grad():
    W_theta, W_phi, W_g, W_z = (
        layer.weight[:, :, 0, 0, 0] for layer in (block.theta, block.phi, block.g, block.w_z)
    )
    x = clip[0].flatten(1).T  # (N, C)
    K = (x @ W_phi.T).T @ (x @ W_g.T) / len(x)
    A = W_z @ K.T @ W_theta
    assert A.shape == (6, 6)
    z = clip + torch.nn.functional.conv3d(clip, A[:, :, None, None, None])
    difference(z, block(clip), "a convolution with weights from the clip, and the block", below=1e-8)
    gram = W_phi @ (x.T @ x / len(x)) @ W_g.T
    difference(K, gram, "K from the Gram matrix alone", below=1e-10)

# %% [markdown]
# The clip enters $A$ only through $x^T x / N$, how channels vary together over all positions.
#
# ## 4 · Concatenation: sort once
#
# $f_{ij} = \mathrm{ReLU}(a_i + b_j)$ is not a product of something of $i$ and something of $j$. But it is nearly one: where $a_i + b_j > 0$ it is $a_i \cdot 1 + 1 \cdot b_j$, elsewhere 0. Call the $j$ with $b_j > -a_i$
# *active* for $i$. Then
#
# $$M\, y_i = \sum_{j\,:\, b_j > -a_i} (a_i + b_j)\, g_j
# = a_i \underbrace{\sum_{j\,:\, b_j > -a_i} g_j}_{S_i} + \underbrace{\sum_{j\,:\, b_j > -a_i} b_j\, g_j}_{T_i}$$
#
# Which $j$ are active depends on $i$, but only through one number. Sort $b$ in rising order: the active ones are the *last* ones, from some place $k_i$ on. All the sums that can ever be asked for are suffix sums, made once. With five
# numbers, by hand:

# %%
a = torch.tensor([0.5, -2.5, 9.0])
b = torch.tensor([2.0, -1.0, 4.0, 0.0, 3.0])
g = torch.tensor([[1.0], [10.0], [100.0], [1000.0], [10000.0]])

rising, order = torch.sort(b)
suffix = g[order].flip(0).cumsum(0).flip(0)
k = torch.searchsorted(rising, -a, right=True)  # how many b_j are <= -a_i
print("b in rising order  ", rising.tolist())
print("g in that order    ", [int(v) for v in g[order][:, 0]])
print("sum from here on   ", [int(v) for v in suffix[:, 0]])
for i in range(3):
    print(
        f"a_{i} = {a[i]:4}: active are b > {-a[i]:4}, from place {k[i]} on, S_{i} = {suffix[k[i]].item():.0f}"
    )
assert k.tolist() == [1, 3, 0]
assert suffix[k][:, 0].tolist() == [11101, 10100, 11111]

T = (rising[:, None] * g[order]).flip(0).cumsum(0).flip(0)
print("b_j g_j in that order", [int(v) for v in (rising[:, None] * g[order])[:, 0]])
print("sum from here on     ", [int(v) for v in T[:, 0]])
terms = torch.relu(a[0] + b) * g[:, 0]
print(f"y_0 = (0.5 * 11101 + {T[k[0], 0]:.0f}) / 5; the five terms with ReLU:", terms.tolist())
assert (a[0] * suffix[k[0], 0] + T[k[0], 0]) / 5 == terms.sum() / 5

# %% [markdown]
# One sort, two tables, one binary search for each $i$. A $b_j$ equal to $-a_i$ contributes 0 on either side, so ties do no harm. A last row of zeros serves an $i$ for whom nobody is active.


# %%
def active_sums(a, b, g):
    """For each i the sums of g_j and of b_j g_j over its active j: a (N,), b (M,), g (M, c) -> 2 x (N, c)."""
    rising, order = torch.sort(b)
    k = torch.searchsorted(rising, -a, right=True)
    S, T = (g.new_zeros(len(b) + 1, g.shape[1]) for _ in range(2))
    S[:-1] = g[order].flip(0).cumsum(0).flip(0)
    T[:-1] = (rising[:, None] * g[order]).flip(0).cumsum(0).flip(0)
    return S[k], T[k]


def uncentred(a, b, g):
    S, T = active_sums(a, b, g)
    return (a[:, None] * S + T) / len(b)


def materialised(a, b, g):
    return torch.relu(a[:, None] + b[None, :]) @ g / len(b)


a, b = normal(2, 3136, seed=6)
g = normal(3136, 64, seed=7)
b[:100], a[:50] = b[100:200].clone(), -b[200:250]  # ties
y = uncentred(a, b, g)
assert y.shape == (3136, 64)
difference(y, materialised(a, b, g), "sorted, and the map", below=1e-12)
for name, function in {"the map": materialised, "sorted": uncentred}.items():
    print(f"{name:8} {held(lambda function=function: function(a, b, g), a, b, g):12,} bytes")

# %% [markdown]
# The two tables take $2Mc$ additions and $Mc$ products, the look-up $Nc$ multiply-adds, sorting and searching $(N + M) \log_2 M$ comparisons: $O(N \log N)$ for a fixed width $c$.
#
# ### The digits
#
# That was float64. In float32 a sum keeps about 7 digits *of its largest part*. $a_i + b_j$ does not change when 10,000 moves from $b$ to $a$, and a network's biases may well do
# such a thing. But $T_i$ then is about $-10^4 S_i$, and adding $a_i S_i$ takes away almost all of it: four digits go with it. The remedy costs nothing. Choose a number $m$, and
#
# $$a_i + b_j = (a_i + m) + (b_j - m), \qquad m = \text{mean of } b$$


# %%
def rectified_sum(a, b, g):
    """y_i = (1/M) sum_j ReLU(a_i + b_j) g_j without a map: a (N,), b (M,), g (M, c) -> (N, c)."""
    m = b.mean()
    a, b = a + m, b - m
    S, T = active_sums(a, b, g)
    return (a[:, None] * S + T) / len(b)


def lost(function, a, b, g):
    """The largest error in float32, as a share of the largest value; float64 on the same numbers is right."""
    right = materialised(a.double(), b.double(), g.double())
    return ((function(a, b, g) - right).abs().max() / right.abs().max()).item()


errors = {}
for offset in (0, 1e2, 1e4, 1e6):
    a32, b32, g32 = (a + offset).float(), (b - offset).float(), g.float()
    for function in (materialised, uncentred, rectified_sum):
        errors[function.__name__, offset] = lost(function, a32, b32, g32)
assert errors["uncentred", 1e4] > 1e-5
assert all(errors[name, offset] < 2e-6 for name, offset in errors if name != "uncentred")

# %% tags=["nbval-ignore-output"]
print("largest error, offset", *(f"{offset:10,.0f}" for offset in (0, 1e2, 1e4, 1e6)))
for name in ("materialised", "uncentred", "rectified_sum"):
    print(f"{name:21}", *(f"{errors[name, offset]:10.0e}" for offset in (0, 1e2, 1e4, 1e6)))

# %% [markdown]
# Centred, the sorted form is as exact as the map, at any offset. Why the mean? Numbers near $m$ are subtracted without rounding (when $m/2 \le b_j \le 2m$, the difference of two floats is a float), and
# what is left is small, whatever $m$ was.
#
# ### The gradient
#
# Let $q_i = \partial L / \partial y_i$, a vector of $c$ numbers. ReLU's derivative is 1 where $j$ is active for $i$ and 0 elsewhere. Differentiating $M y_i = \sum_j \mathrm{ReLU}(a_i + b_j)\, g_j$:
#
# $$M \frac{\partial L}{\partial a_i} = q_i \cdot \sum_{j \text{ active}} g_j = q_i \cdot S_i, \qquad
# M \frac{\partial L}{\partial b_j} = g_j \cdot \sum_{i\,:\, a_i > -b_j} q_i, \qquad
# M \frac{\partial L}{\partial g_j} = \sum_i \mathrm{ReLU}(a_i + b_j)\, q_i$$
#
# Read the last two again: they are sums over $i$ instead of $j$, with $a$ and $b$ exchanged and $q$ in place of $g$. The functions above compute them.


# %%
def rectified_sum_backward(q, a, b, g):
    """The gradients for a, b and g, given q = dL/dy (N, c)."""
    M = len(b)
    S, _ = active_sums(a, b, g)
    Q, _ = active_sums(b, a, q)
    return (q * S).sum(1) / M, (g * Q).sum(1) / M, rectified_sum(b, a, q) * len(a) / M


a, b = normal(2, 400, seed=8)
g, q = normal(2, 400, 16, seed=9)
b = b[:300]
leaves = [v.clone().requires_grad_() for v in (a, b, g[:300])]
expected = torch.autograd.grad(materialised(*leaves), leaves, q)
for name, mine, right in zip("abg", rectified_sum_backward(q, a, b, g[:300]), expected, strict=True):
    difference(mine, right, f"dL/d{name}", below=1e-12)

# %% [markdown]
# One thing more. The block makes $\theta_i = W_\theta x_i + \beta_\theta$, $d$ numbers, and keeps only one of them, $a_i$:
#
# $$a_i = w_{f\theta} \cdot (W_\theta x_i + \beta_\theta) = \underbrace{(W_\theta^T w_{f\theta})}_{C \text{ numbers}} \cdot\, x_i + w_{f\theta} \cdot \beta_\theta$$

# %%
x, W_theta, beta, w = (normal(*shape, seed=10) for shape in ((50, 16), (8, 16), (8,), (8,)))
folded = W_theta.T @ w
assert folded.shape == (16,)
difference(x @ folded + w @ beta, (x @ W_theta.T + beta) @ w, "a, folded", below=1e-12)

C, d = 256, 128
print(f"multiply-adds a position: {2 * C * d:,} for theta and phi, {2 * C:,} folded")

# %% [markdown] tags=["predict"]
# ## 5 · Softmax: neither shortcut
#
# The dot product was saved by its rank: its $N \times N$ map is a product of matrices with $d$ columns. What rank do the other maps have? Guess for $N = 512$ positions and $d = 8$: of the concatenation's map, which we just
# avoided, and of the softmax's.


# %%
def rank(w):
    sizes = np.linalg.svd(w.numpy(), compute_uv=False)
    return int((sizes > 1e-12 * sizes[0]).sum())


theta, phi = normal(2, 512, 8, seed=0)
w_f = normal(16, seed=1)
maps = {
    "dot product": pairwise(theta, phi, "dot_product"),
    "concatenation": pairwise(theta, phi, "concatenation", w_f),
    "softmax": pairwise(theta, phi, "embedded_gaussian"),
    "softmax, logits / 8": pairwise(theta / 8, phi, "embedded_gaussian"),
}
for name, w in maps.items():
    assert w.shape == (512, 512)
    orders = len({tuple(row.argsort(stable=True).tolist()) for row in w})
    print(f"{name:20} rank {rank(w):3} of 512, its rows rank the j in {orders:3} orders")
    assert name != "softmax" or orders == 512
assert [rank(w) for w in maps.values()] == [8, 304, 512, 512]

# %% [markdown] tags=["explain"]
# The concatenation's rank is in the hundreds too: not rank saved it, but *order*. Sort the columns by $b$ once: every row is 0 up to some place, and $a_i \cdot 1 + 1 \cdot b_j$ after it. (Rows with different numbers of zeros count as different orders above.) The softmax has neither: each of its 512 rows ranks the others in an order of its own, and its rank is full.
#
# Could a cleverer choice of vectors $u_i, v_j$ with a fixed number $r$ of entries give $e^{\theta_i \cdot \phi_j} = u_i \cdot v_j$ for all clips? Then every such matrix would have rank $r$ at most. Take $d = 1$, $\theta_i = i \ln 2$, $\phi_j = j$.
# The matrix has the entries $2^{ij} = (2^i)^j$: a Vandermonde matrix, whose determinant is known:
#
# $$\det \big( (2^i)^j \big)_{i,j < N} = \prod_{i < k} (2^k - 2^i) \;\ne\; 0$$

# %%
from fractions import Fraction


def determinant(rows):
    """By elimination, in exact fractions."""
    rows, product = [[Fraction(v) for v in row] for row in rows], Fraction(1)
    for at in range(len(rows)):
        product *= rows[at][at]
        for below in range(at + 1, len(rows)):
            factor = rows[below][at] / rows[at][at]
            rows[below] = [v - factor * pivot for v, pivot in zip(rows[below], rows[at], strict=True)]
    return product


for N in (2, 4, 8, 12):
    vandermonde = [[2 ** (i * j) for j in range(N)] for i in range(N)]
    expected = 1
    for k in range(N):
        for i in range(k):
            expected *= 2**k - 2**i
    assert determinant(vandermonde) == expected != 0
    print(f"N = {N:2}: exact determinant {float(expected):.3g}, so the rank is {N}")

# %% [markdown]
# Every $N$ has a clip whose map has rank $N$, so no finite $r$ serves all clips. (Dividing each row by its sum does not change a rank.) What *can* be done is approximate: while logits are small, singular values fall, and a short Taylor series does; notebook 10 measures that error. So
# both doors of sections 3 and 4 are closed. Is there a third? Keles and others show that, where the width grows with $N$, no method is much faster than all $N M$ pairs unless the Strong Exponential Time Hypothesis is false, a conjecture of complexity theory that many believe. What need not be paid is the memory.

# %%
fig, ax = plt.subplots(figsize=(7, 3.6))
styles = {"dot product": "-", "concatenation": "--", "softmax": "-", "softmax, logits / 8": ":"}
for name, w in maps.items():
    sizes = np.linalg.svd(w.numpy(), compute_uv=False)
    ax.semilogy(np.arange(1, 513), np.maximum(sizes / sizes[0], 1e-17), styles[name], label=name, linewidth=2)
ax.set(xlabel="number of the singular value", ylabel="size, largest = 1", ylim=(1e-13, 2))
ax.legend()
plots.show(
    fig,
    "Singular values of four 512 x 512 maps on a logarithmic axis. The dot product's fall to nothing after the "
    "eighth. The concatenation's fall smoothly to a ten-millionth and, after number 304, to nothing. The softmax's stay above "
    "a millionth to the last. With logits an eighth as large the softmax's are smaller, and never nothing.",
)

# %% [markdown]
# ### Rows in blocks
#
# $y_i$ needs row $i$ of the map and no other. So compute $R$ rows, use them, forget them: $R M$ numbers at a time. Only: autograd would keep every block for the backward pass, and be back at $N M$. So the backward pass computes
# them *again*, from one number kept for each row, $\ell_i = \ln \sum_j e^{s_{ij}}$, since $p_{ij} = e^{s_{ij} - \ell_i}$. Notebook 04 has the softmax's gradient; with $q_i = \partial L / \partial y_i$, so $\partial L / \partial p_{ij} = q_i \cdot g_j$:
#
# $$\frac{\partial L}{\partial s_{ij}} = p_{ij} \Big( q_i \cdot g_j - \sum_k p_{ik}\, q_i \cdot g_k \Big) = p_{ij}\, (q_i \cdot g_j - q_i \cdot y_i)$$
#
# The sum over all $k$ is $q_i \cdot y_i$, known without the row. Then $\partial L / \partial \theta_i = \sum_j \frac{\partial L}{\partial s_{ij}} \phi_j$, and likewise for $\phi$.


# %%
def softmax_rows(theta, phi, g, R=256):
    """y (N, c) and log_sum (N, 1), R rows of the map at a time."""
    y, log_sum = g.new_empty(len(theta), g.shape[1]), g.new_empty(len(theta), 1)
    for at in range(0, len(theta), R):
        s = theta[at : at + R] @ phi.T
        log_sum[at : at + R] = torch.logsumexp(s, dim=1, keepdim=True)
        y[at : at + R] = torch.exp(s - log_sum[at : at + R]) @ g
    return y, log_sum


def softmax_rows_backward(q, theta, phi, g, y, log_sum, R=256):
    """The gradients for theta, phi and g; the rows are computed again."""
    d_theta, d_phi, d_g = (torch.zeros_like(v) for v in (theta, phi, g))
    for at in range(0, len(theta), R):
        i = slice(at, at + R)
        p = torch.exp(theta[i] @ phi.T - log_sum[i])
        d_s = p * (q[i] @ g.T - (q[i] * y[i]).sum(1, keepdim=True))
        d_theta[i] = d_s @ phi
        d_phi += d_s.T @ theta[i]
        d_g += p.T @ q[i]
    return d_theta, d_phi, d_g


# %%
theta, phi, g, q = (normal(3136, 64, seed=seed, scale=0.3) for seed in range(4))
y, log_sum = softmax_rows(theta, phi, g)
leaves = [v.clone().requires_grad_() for v in (theta, phi, g)]
plain = pairwise(*leaves[:2], "embedded_gaussian") @ leaves[2]
difference(y, plain, "y", below=1e-12)
mine = softmax_rows_backward(q, theta, phi, g, y, log_sum)
for name, gradient, right in zip(
    ("theta", "phi", "g"), mine, torch.autograd.grad(plain, leaves, q), strict=True
):
    difference(gradient, right, f"dL/d{name}", below=1e-12)


def blocks():
    softmax_rows_backward(q, theta, phi, g, *softmax_rows(theta, phi, g))


def whole():
    torch.autograd.grad(pairwise(*leaves[:2], "embedded_gaussian") @ leaves[2], leaves, q)


few, many = held(blocks, theta, phi, g, q), held(whole, *leaves, q)
print(f"held at once: blocks of rows {few / 2**20:.0f} MiB, whole {many / 2**20:.0f} MiB")
assert few < many / 5

# %% [markdown]
# The price: the first product and the exponential are computed twice. What that costs, and whether a block that stays in the processor's cache pays it back, section 6 shows.
#
# ### Streaming
#
# A block still holds whole rows. Can the columns come in pieces too? A running sum of $e^{s_{ij}}$ and of $e^{s_{ij}} g_j$ would do, were it not that $e^{89}$ exceeds float32. The softmax of notebook 04 subtracts the row's
# maximum first, and in a stream the maximum is not known yet. For each row keep three things: $m$, the largest logit so far; $t$, the sum of $e^{s_{ij} - m}$ so far; $o$, the sum of $e^{s_{ij} - m} g_j$ so far. When a piece
# brings a larger logit, $m'$, correct the two sums:
#
# $$t' = e^{m - m'}\, t + \sum_{j \in \text{piece}} e^{s_{ij} - m'}, \qquad
# o' = e^{m - m'}\, o + \sum_{j \in \text{piece}} e^{s_{ij} - m'} g_j, \qquad y_i = o / t$$
#
# The factor $e^{m - m'}$ is at most 1, so nothing overflows; the first piece meets $m = -\infty$, and $e^{-\infty} = 0$ wipes out the start.


# %%
def streaming_softmax(theta, phi, g, columns=256):
    """y (N, c), so many columns of the map at a time."""
    m = theta.new_full((len(theta), 1), -torch.inf)
    t, o = theta.new_zeros(len(theta), 1), g.new_zeros(len(theta), g.shape[1])
    for at in range(0, len(phi), columns):
        s = theta @ phi[at : at + columns].T
        larger = torch.maximum(m, s.amax(1, keepdim=True))
        correction, e = torch.exp(m - larger), torch.exp(s - larger)
        t = correction * t + e.sum(1, keepdim=True)
        o = correction * o + e @ g[at : at + columns]
        m = larger
    return o / t


difference(streaming_softmax(theta, phi, g), y, "streamed", below=1e-12)

loud, loud_phi, g32 = 30 * theta.float(), 3 * phi.float(), g.float()
s = loud @ loud_phi.T
naive = torch.exp(s) @ g32 / torch.exp(s).sum(1, keepdim=True)
streamed = streaming_softmax(loud, loud_phi, g32)
right = torch.softmax(loud.double() @ loud_phi.double().T, dim=1) @ g
print(
    f"logits up to {s.max():.0f}; without a maximum, rows that are not a number: {bool(naive.isnan().any())}"
)
assert s.max() > 89
assert naive.isnan().any()
difference(streamed, right, "streamed in float32, against float64", below=1e-3)

# %% [markdown]
# Rows and columns in pieces together are what is called fused or flash attention: tiles of the map live in the fastest memory only. PyTorch has it as `scaled_dot_product_attention`; notebook 08, section 8, shows when it keeps from writing the map.

# %%
heads = [v[None, None] for v in (theta, phi, g)]
fused = torch.nn.functional.scaled_dot_product_attention(*heads, scale=1.0)[0, 0]
difference(fused, y, "scaled_dot_product_attention", below=1e-12)
w_f = normal(128, seed=11)
for form in FORMS:
    vector = w_f if form == "concatenation" else None
    ours = non_local(theta[None], phi[None], g[None], form, w_f=vector)[0]
    if form == "dot_product":
        taught = dot_product(theta, phi, g)
    elif form == "concatenation":
        taught = rectified_sum(theta @ w_f[:64], phi @ w_f[64:], g)
    else:
        taught = softmax_rows(theta, phi, g)[0]
    difference(taught, ours, f"taught, and nlutils: {form}", below=1e-10)

# %% [markdown]
# `nlutils.torch.non_local` computes exactly these forms, with care for batches, half precision, block sizes, and small maps (below 32 MiB the softmax's plain form is fastest).
#
# ## 6 · Measured
#
# `benchmarks/operation.py` measures whole blocks: one thread, processor time, float32, $C = 256$, beside what other packages have. The files are in `data/results/operation`. A ratio is
# the other's time over ours: above 1, ours is faster.
#
# | name | what it is |
# |:--|:--|
# | mmcv, pytorchvideo, timm | non-local blocks of public packages, with our weights; timm's is for images, so *nlutils 2d* stands beside it |
# | materialised | the same Keras operation with its map |
# | materialised pairs, materialised sums | the concatenation with the features of all pairs in memory; with all sums $a_i + b_j$ in memory |
# | nlutils fixed threshold | ours, with a setting of the system's allocator that gives freed memory back at once |
# | graph, jit | Keras on TensorFlow, as a graph and compiled |


# %%
def recorded(measure):
    """The recorded cases on a CPU that measure "time", "memory" or "growth", PyTorch's before Keras'."""
    folder = results_root() / "operation"
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("[!.]*.json"))]
    if not records:
        raise FileNotFoundError(f"nothing is recorded in {folder}; benchmarks/operation.py records")
    chosen = [r for r in records if (r["measure"], r["device"]) == (measure, "cpu")]
    return sorted(chosen, key=lambda r: (r["framework"] == "keras", r["instantiation"], r["positions"]))


def title(record):
    words = ["Keras"] if record["framework"] == "keras" else []
    words += [record["instantiation"].replace("_", " "), f"N = {record['positions']:,}"]
    words += [f"C = {record['channels']}"] if record["channels"] != 256 else []
    words += ["operation alone"] if record["level"] == "operation" else []
    return ", ".join(words)


rows = []  # (what, forward, forward and backward)
for r in recorded("time"):
    for variant, passes in r["ratios"].items():
        for mode in sorted({name.partition(" ")[2] for name in passes}):
            label = f"{title(r)}: {variant.replace('_', ' ')} {mode}".strip()
            rows.append((label, *(passes.get(f"{word} {mode}".strip()) for word in ("forward", "training"))))

print(f"{'times faster than':76} forward   training")
for label, *ratios in rows:
    print(f"{label:74}", *("        -" if ratio is None else f"{ratio:9.2f}" for ratio in ratios))

by_size = [r["ratios"]["mmcv"]["training"] for r in recorded("time") if r["case"].startswith("dot_product")]
assert by_size == sorted(by_size)  # the larger the map, the more moving the brackets saves

# %%
fig, ax = plt.subplots(figsize=(8.5, 0.23 * len(rows) + 1.2))
for column, colour, marker, label in (
    (1, "blue", "o", "forward"),
    (2, "orange", "s", "forward and backward"),
):
    shown = [(row[column], place) for place, row in enumerate(rows) if row[column] is not None]
    ax.plot(*zip(*shown, strict=True), marker, color=plots.COLOURS[colour], label=label)
ax.axvline(1, color=plots.COLOURS["grey"], linewidth=1)
ax.set_xscale("log")
ax.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=8)
ax.set(xlabel="times faster (log scale)", title="Time of the other, divided by ours")
ax.invert_yaxis()
ax.legend(fontsize=8)
measured = [ratio for row in rows for ratio in row[1:] if ratio is not None]
plots.show(
    fig,
    f"{len(measured)} ratios of time, of {len(rows)} comparisons, on a logarithmic axis, from "
    f"{min(measured):.2f} to {max(measured):.0f}. The table above has the numbers.",
)

# %%
peaks = [
    (f"{title(r)}: {variant.replace('_', ' ')}", variant.startswith("nlutils"), max(passes.values()))
    for r in recorded("memory")
    for variant, passes in r["medians"].items()
]
fig, ax = plt.subplots(figsize=(8.5, 0.23 * len(peaks) + 1.2))
for mine, colour, marker, label in ((True, "blue", "o", "nlutils"), (False, "red", "D", "others")):
    shown = [(mib, place) for place, (_, ours, mib) in enumerate(peaks) if ours == mine]
    ax.plot(*zip(*shown, strict=True), marker, color=plots.COLOURS[colour], label=label)
ax.set_xscale("log")
ax.set_yticks(range(len(peaks)), [peak[0] for peak in peaks], fontsize=8)
ax.set(xlabel="MiB above weights and inputs (log scale)", title="Peak memory of one training step")
ax.invert_yaxis()
ax.legend(fontsize=8)
ours, theirs = ([mib for _, ours, mib in peaks if ours == mine] for mine in (True, False))
plots.show(
    fig,
    f"Peak memory of {len(peaks)} cases on a logarithmic axis. Ours takes {min(ours):.0f} to {max(ours):.0f} "
    f"MiB; the others take {min(theirs):,.0f} to {max(theirs):,.0f} MiB.",
)

# %%
for r in recorded("growth"):
    growth = r["ratios"]["nlutils"]["training"]
    print(f"{title(r)}: 4 times the positions take {growth:.1f} times as long")
everything = recorded("time") + recorded("memory") + recorded("growth")
targets = [(r, target) for r in everything for target in r["targets"]]
missed = [(r, target) for r, target in targets if target["met"] is False]
unmeasured = sum(target["met"] is None for _, target in targets)
print(f"bounds set before measuring (benchmarks/cases.py): {len(targets)}, not measured: {unmeasured}")
print(f"missed: {len(missed)}")
for r, t in missed:
    found = f"{t['value']:.3g}, wanted {t['sense']} {t['bound']:g}"
    print(f"  {title(r)}, {r['measure']}, {t['variant']}, {t['pass']}: {found}")

# %% [markdown]
# Read the figures with section 1 in mind. The dot product gains more the larger the map: at 784 positions the work is mostly convolutions, which nobody computes faster. The softmax forms compute all pairs as the others do: no gain on small maps, 2 to 6 times on large. The memory is where all
# four part from the others. The layers of a Keras block take some 200 MiB alone: hence the missed bounds.
#
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · The cheaper order (easy, 10 minutes)
#
# Write `cheaper(N, M, d, c)`: the number of multiply-adds of the dot product in its cheaper order. The check asks for $(N, M, d, c)$ = (6272, 1568, 128, 64), (49, 49, 128, 128) and (1, 5000, 64, 64). **Expect**: the last is 640,000: for a single
# question the map is cheaper.
#
# <details><summary>Hint 1: a nudge</summary>Both orders have two products. Count each: rows times columns times the length of the sum.</details>
# <details><summary>Hint 2: the formula</summary>(θφᵀ)g: N M d + N M c. θ(φᵀg): M d c + N d c.</details>
# <details><summary>Hint 3: part of the code</summary><code>return min(N * M * (d + c), …)</code></details>


# %% tags=["stub"]
def cheaper(N, M, d, c):
    #: solution
    return min(N * M * (d + c), (N + M) * d * c)
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
cases = ((6272, 1568, 128, 64), (49, 49, 128, 128), (1, 5000, 64, 64))
through_map = tuple(N * M * (d + c) for N, M, d, c in cases)
through_matrix = tuple((N + M) * d * c for N, M, d, c in cases)
check(
    "Exercise 1",
    lambda: tuple(cheaper(*sizes) for sizes in cases),
    tuple(min(pair) for pair in zip(through_map, through_matrix, strict=True)),
    mistakes={
        "this is the order through the map, always": through_map,
        "this is the order through the matrix, always": through_matrix,
        "this is the dearer order": tuple(
            max(pair) for pair in zip(through_map, through_matrix, strict=True)
        ),
        "each order has two products; you counted the first": tuple(
            min(N * M * d, M * d * c) for N, M, d, c in cases
        ),
    },
)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · A distance instead of a ReLU (medium, 15 minutes)
#
# Somebody wants $f = |a_i + b_j|$, also divided by $M$. Write `absolute_sum(a, b, g)` without an $N \times M$ map. **Expect**: two calls of a function of this notebook.
#
# <details><summary>Hint 1: a nudge</summary>|s| is s where s is positive, and −s where it is negative. Which part does the ReLU give, and how do you get the other?</details>
# <details><summary>Hint 2: the formula</summary>|s| = ReLU(s) + ReLU(−s), and −(a + b) = (−a) + (−b).</details>
# <details><summary>Hint 3: part of the code</summary><code>rectified_sum(a, b, g) + rectified_sum(…, …, g)</code></details>


# %% tags=["stub"]
def absolute_sum(a, b, g):
    #: solution
    return rectified_sum(a, b, g) + rectified_sum(-a, -b, g)
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
a, b, g = normal(600, seed=12), normal(400, seed=13), normal(400, 3, seed=14)
f = a[:, None] + b[None, :]


def without_map():
    """The answer, and whether less than half a map was held on the way."""
    answer = absolute_sum(a, b, g)
    return None if answer is None else (answer, held(lambda: absolute_sum(a, b, g), a, b, g) < 4 * f.numel())


check(
    "Exercise 2",
    without_map,
    (f.abs() @ g / 400, True),
    mistakes={
        "right, but a map was built": (f.abs() @ g / 400, False),
        "this is ReLU alone; the negative sums are missing": (f.relu() @ g / 400, True),
        "the parts must be added: |s| is not ReLU(s) - ReLU(-s), which is s": (f @ g / 400, True),
        "a changed its sign, b must too": ((f.relu() + (b - a[:, None]).relu()) @ g / 400, True),
        "b changed its sign, a must too": ((f.relu() + (a[:, None] - b).relu()) @ g / 400, True),
        "the division by M is missing": (f.abs() @ g, True),
    },
)

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · Two machines (hard, 20 minutes)
#
# The columns of the map lie on two machines. Each has streamed its half to $(m, t, o)$ and sends that. Write `merge(first, second)` that returns $y$, $(N, c)$, from the two triples. **Expect**: what the softmax over all columns gives, although the halves'
# maxima differ.
#
# <details><summary>Hint 1: a nudge</summary>Section 5's correction brings one sum to a new maximum. Here both must come to a common one.</details>
# <details><summary>Hint 2: the formula</summary>m = max(m₁, m₂), t = e^(m₁−m) t₁ + e^(m₂−m) t₂, the same for o, and y = o / t.</details>
# <details><summary>Hint 3: part of the code</summary><code>(m1, t1, o1), (m2, t2, o2) = first, second</code>, <code>m = torch.maximum(m1, m2)</code>, <code>c1, c2 = torch.exp(m1 - m), …</code></details>


# %% tags=["stub"]
def merge(first, second):
    #: solution
    (m1, t1, o1), (m2, t2, o2) = first, second
    m = torch.maximum(m1, m2)
    c1, c2 = torch.exp(m1 - m), torch.exp(m2 - m)
    return (c1 * o1 + c2 * o2) / (c1 * t1 + c2 * t2)
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
def half(theta, phi, g):
    s = theta @ phi.T
    m = s.amax(1, keepdim=True)
    e = torch.exp(s - m)
    return m, e.sum(1, keepdim=True), e @ g


theta, phi, g = (normal(30, 5, seed=seed) for seed in (15, 16, 17))
(m1, t1, o1), (m2, t2, o2) = halves = half(theta, phi[:20], g[:20]), half(theta, phi[20:], g[20:])
check(
    "Exercise 3",
    lambda: merge(*halves),
    torch.softmax(theta @ phi.T, dim=1) @ g,
    mistakes={
        "the sums were added without bringing them to a common maximum": (o1 + o2) / (t1 + t2),
        "the mean of the two halves' outputs: it forgets how much weight each half has": (o1 / t1 + o2 / t2)
        / 2,
        "the factors are upside down: exp(m - m1) in place of exp(m1 - m)": (
            torch.exp(torch.relu(m2 - m1)) * o1 + torch.exp(torch.relu(m1 - m2)) * o2
        )
        / (torch.exp(torch.relu(m2 - m1)) * t1 + torch.exp(torch.relu(m1 - m2)) * t2),
    },
)

# %% [markdown]
# ## What you learned
#
# - Convolutions cost $4NCd$, pairs $2N^2d$; training holds two or three maps.
# - Sub-sampling by 4 gives the published cost only before $\phi$ and $g$; it stays quadratic.
# - Dot product: the brackets move, and a $d \times c$ matrix made from the clip serves all positions.
# - Concatenation: two suffix sums in the order of $b$, one search; the gradient is the same function with $a$ and $b$ exchanged; centre $b$, or float32 loses digits.
# - Softmax: full rank and no common order, so all pairs are computed; blocks of rows with recomputation, or a running maximum, keep memory linear.
#
# ## Further reading
#
# - X. Wang, R. Girshick, A. Gupta, K. He: *Non-local Neural Networks*. CVPR 2018.
# - M. Milakov, N. Gimelshein: *Online normalizer calculation for softmax*. arXiv 2018.
# - M. Rabe, C. Staats: *Self-attention Does Not Need O(n²) Memory*. arXiv 2021.
# - F. D. Keles, P. M. Wijewardena, C. Hegde: *On the Computational Complexity of Self-Attention*. ALT 2023.
# - T. Dao, D. Fu, S. Ermon, A. Rudra, C. Ré: *FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness*. NeurIPS 2022.
# - A. Katharopoulos, A. Vyas, N. Pappas, F. Fleuret: *Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention*. ICML 2020.
