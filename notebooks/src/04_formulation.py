# %% [markdown]
# # 04 · The non-local operation, from a loop to a matrix
#
# After this notebook you can
#
# - write equation 1 of the non-local paper as loops, as matrices and as one einsum, and show that all agree
# - derive the four instantiations, and say what each is divided by and why
# - predict which changes of a clip reach the output, and which cannot
# - find where float16 overflows, and compute around it
# - derive the gradient of each of the four by hand, and check every step
#
# | | |
# |:--|:--|
# | What you need | notebook 00; matrix products, partial derivatives, the chain rule |
# | Your time | 90 minutes |
# | Machine time | 10 seconds |
# | Framework | NumPy (PyTorch for one check) |

# %% tags=["parameters"]
import os

profile = os.environ.get("NLUTILS_PROFILE", "quick")

# %%
import matplotlib.pyplot as plt
import numpy as np

from nlutils import plots
from nlutils.course import check, difference, settings

settings(profile)  # nothing varies with the profile here; an unknown one is an error
plots.style()
np.set_printoptions(precision=3, suppress=True)

# %% [markdown]
# ## 1 · Eight positions
#
# A red ball flies past a lamp: 2 frames of 2 x 2 positions, 8 positions in all. We number them
# $i = 4t + 2r + c$ for frame $t$, row $r$, column $c$, and forget the grid. Position $i$ has a feature
# vector $x_i$ of three numbers: how red, how bright, how fast. In frame 0 the ball is at the top left, in
# frame 1 at the bottom right. The ground is black and still.

# %%
names = ["ball", "lamp", "wall", "ground", "wall", "lamp", "ground", "ball"]
x = np.array(
    [[1, 0, 1], [0, 2, 0], [0, 1, 0], [0, 0, 0], [0, 1, 0], [0, 2, 0], [0, 0, 0], [1, 0, 1]],
    dtype=np.float64,
)
N, C = x.shape
assert (N, C) == (8, 3)

print(" i  frame  what      red  bright  speed")
for i in range(N):
    print(f"{i:2}  {i // 4:5}  {names[i]:8}", "{:4.0f}  {:6.0f}  {:5.0f}".format(*x[i]))

# %% [markdown]
# The ball of frame 0 should learn where the ball is in frame 1: diagonally across, one frame later. So let
# position $i$ look at every position $j$. $f(x_i, x_j)$ is one number: how much $j$ matters to $i$. $g(x_j)$
# is a vector: what $j$ gives. The output $y_i$ adds up what all positions give, each times how much it
# matters, and divides by $C(x)$, a number that keeps the sum in range (the divisor, not the number of
# channels `C`):
#
# $$y_i = \frac{1}{C(x)} \sum_{j=0}^{N-1} f(x_i, x_j)\, g(x_j) \qquad \text{(equation 1)}$$
#
# First only $i = 0$, with $f(x_i, x_j) = e^{x_i \cdot x_j}$, $g(x_j) = x_j$ and $C(x) = \sum_j f(x_i, x_j)$.

# %%
i = 0
f_row = np.zeros(N)
for j in range(N):
    f_row[j] = np.exp(np.dot(x[i], x[j]))
C_i = f_row.sum()

y_0 = np.zeros(C)
for j in range(N):
    y_0 += f_row[j] * x[j] / C_i

print("f(x_0, x_j):", f_row)
print(f"C(x):        {C_i:.3f}")
print("weights:    ", f_row / C_i)
print("y_0:        ", y_0)
assert np.isclose(C_i, 2 * np.exp(2) + 6)  # two balls with x_0 . x_j = 2, six others with 0

# %% [markdown] tags=["predict"]
# The ball finds both balls; the rest of its attention is spread evenly over everything else.
#
# The next cell does the same for every $i$. Position 3 is black ground: $x_3 = (0, 0, 0)$. What is $y_3$?
# Write it down before you run the cell.


# %%
def non_local_loops(x):
    y = np.zeros_like(x)
    for i in range(len(x)):
        f = [np.exp(np.dot(x[i], x[j])) for j in range(len(x))]
        for j in range(len(x)):
            y[i] += f[j] / sum(f) * x[j]
    return y


y_loops = non_local_loops(x)
for i in range(N):
    print(f"y_{i} ({names[i]:6})", y_loops[i])
difference(y_loops[0], y_0, "y_0 again", below=1e-12)
assert np.allclose(y_loops[3], [0.25, 0.75, 0.25])

letterboxed = np.concatenate([x, np.zeros((8, C))])  # eight black positions more
f_row = np.exp(letterboxed @ x[0])
print(f"the ball's weight on itself: {np.exp(2) / C_i:.3f}, with black bars {f_row[0] / f_row.sum():.3f}")

# %% [markdown] tags=["explain"]
# Not zero: $y_3$ is the mean of all eight vectors. A zero vector has the dot product 0 with everybody, and
# $e^0 = 1$: it has no preference, so it takes the same from everyone. The reverse matters more in practice.
# A black position still adds $e^0 = 1$ to everybody's $C(x)$, so black bars around a film take attention
# away from what it shows: in the last line from 0.356 to 0.257. Zero is not neutral under this $f$; section
# 3 asks the same of the others.
#
# ## 2 · The same as matrices
#
# Write all $f(x_i, x_j)$ into an $N \times N$ matrix: row $i$ is who looks, column $j$ who is looked at.
# Divide each row by its sum, and call the result $w$, the *map*. The sum over $j$ is then a matrix product:
#
# $$w_{ij} = \frac{f(x_i, x_j)}{\sum_k f(x_i, x_k)}, \qquad y_{ic} = \sum_j w_{ij}\, g_{jc}
# \quad \text{or} \quad y = w\, g$$
#
# `einsum` takes the indices as they stand; one more letter, `b`, makes a batch of clips.

# %%
f = np.exp(x @ x.T)
w = f / f.sum(axis=1, keepdims=True)
y_matrix = w @ x
assert w.shape == (N, N)
difference(y_loops, y_matrix, "loops and matrices", below=1e-12)

batch = np.stack([x, 0.5 * x])  # two clips: ours, and ours at half contrast
f = np.exp(np.einsum("bik,bjk->bij", batch, batch))
y_einsum = np.einsum("bij,bjc->bic", f / f.sum(axis=2, keepdims=True), batch)
assert y_einsum.shape == (2, N, C)
difference(y_loops, y_einsum[0], "loops and einsum, clip 0", below=1e-12)
difference(non_local_loops(batch[1]), y_einsum[1], "loops and einsum, clip 1", below=1e-12)

# %%
fig, ax = plt.subplots(figsize=(6.4, 5.2))
image = plots.heatmap(ax, w, numbers=".3f", vmin=0)
ax.set_xticks(range(N), [f"{j} {names[j]}" for j in range(N)], rotation=45, ha="right")
ax.set_yticks(range(N), [f"{i} {names[i]}" for i in range(N)])
ax.set(xlabel="position j, looked at", ylabel="position i, who looks", title="The map w: rows add up to 1")
fig.colorbar(image)
plots.show(
    fig,
    "The 8 x 8 map of the Gaussian instantiation with its numbers. The ball's two rows have 0.356 on both "
    "balls and 0.048 elsewhere. The lamp's rows have 0.427 on both lamps. The wall's rows have 0.305 on the "
    "lamps, and only 0.112 on the walls themselves. Every weight in the ground's rows is 0.125, one eighth.",
)

# %% [markdown]
# ## 3 · Four ways to compare
#
# Comparing $x_i$ with $x_j$ directly leaves nothing to learn in $f$, and the wall looks more at the lamp, whose
# vector is longer, than at itself. So three matrices come in, learned in a network, chosen by hand here.
# $\theta_i$ says what $i$ looks for, $\phi_j$ how $j$ shows itself, $g_j$ what $j$ gives:
#
# $$\theta_i = W_\theta\, x_i, \qquad \phi_j = W_\phi\, x_j, \qquad g_j = W_g\, x_j$$
#
# One matrix for all positions is what networks call a 1 x 1 x 1 convolution. $\theta$ and $\phi$ share their
# width $d$, here 2; $g$ may have another.

# %%
W_theta = np.array([[1, 0, 1], [0, 1, -1]], dtype=np.float64)
W_phi = np.array([[1, -0.5, 0], [0, 0, -1]])
W_g = np.array([[1, 0, 0], [0, 1, 0], [1, 0, -1]], dtype=np.float64)

theta, phi, g = x @ W_theta.T, x @ W_phi.T, x @ W_g.T
assert theta.shape == phi.shape == (N, 2)
assert g.shape == (N, 3)
for i in (0, 1, 2, 3):
    print(f"{names[i]:7} theta {theta[i]}   phi {phi[i]}   g {g[i]}")

# %% [markdown]
# **Embedded Gaussian**: $f = e^{s_{ij}}$, with the *logits* $s_{ij} = \theta_i \cdot \phi_j$. The **Gaussian** is
# the same with $\theta_i = \phi_i = x_i$. Since $f > 0$, dividing by its sum over $j$ is safe, and makes $y_i$
# a weighted mean of the $g_j$. Section 2's $w$ is called the *softmax* of the logits over $j$.


# %%
def softmax(s):
    e = np.exp(s)
    return e / e.sum(axis=-1, keepdims=True)


s = theta @ phi.T
print("logits of the ball:   ", s[0])
print("weights of the ball:  ", softmax(s)[0])
assert np.allclose(softmax(s).sum(axis=1), 1)
difference(softmax(x @ x.T), w, "the Gaussian of section 2", below=1e-12)

# %% [markdown]
# **Dot product**: $f = \theta_i \cdot \phi_j$, the logit itself. It can be negative, so its row sum is no
# safe divisor; yet some division is needed, because clips differ in size. The paper divides by the number of
# positions $N$:
#
# $$y_i = \frac{1}{N} \sum_j (\theta_i \cdot \phi_j)\, g_j$$
#
# The cell first divides by the row sum, then lets $N$ grow, on random clips of equal statistics.

# %%
w_dot = s / N
print("row sums of f:", s.sum(axis=1))
print(f"lamp looks at ball: f = {s[1, 0]:.0f}, f / N = {w_dot[1, 0]}, f / row sum = {s[1, 0] / s[1].sum()}\n")
assert s[0].sum() == 0  # the ball's row could not be divided at all

rng = np.random.default_rng(0)
print("  N   mean |y|: sum   sum / N   softmax")
sizes = {}
for n in (8, 64, 512):
    features = rng.uniform(0, 2, size=(n, C))
    th, ph, gn = features @ W_theta.T, features @ W_phi.T, features @ W_g.T
    undivided = th @ ph.T @ gn
    soft = softmax(th @ ph.T) @ gn
    sizes[n] = [np.abs(y).mean() for y in (undivided, undivided / n, soft)]
    print("{:3}   {:13.1f}   {:7.2f}   {:7.2f}".format(n, *sizes[n]))
    assert gn.min() <= soft.min() <= soft.max() <= gn.max()  # a weighted mean stays in the range of g

assert sizes[512][0] / sizes[8][0] > 40
assert 0.5 < sizes[512][1] / sizes[8][1] < 2

# %% [markdown]
# The lamp rejects the ball ($f = -2$); divided by the row sum, $-4$, the rejection becomes a weight of
# $+1/2$. And the undivided sum grows with $N$: a network trained on small clips would meet other numbers on
# large ones.
#
# **Concatenation**: put $\theta_i$ and $\phi_j$ one behind the other, and let a learned vector $w_f$ of $2d$
# numbers turn them into one. A dot product is a sum over entries, so it splits: the first half of $w_f$,
# $w_{f\theta}$, meets only $\theta_i$, the second half, $w_{f\phi}$, only $\phi_j$. The divisor is $N$
# again: the ReLU can make a whole row zero.
#
# $$
# f = \mathrm{ReLU}\big(w_f \cdot [\theta_i, \phi_j]\big) = \mathrm{ReLU}(a_i + b_j),
# \qquad a_i = w_{f\theta} \cdot \theta_i, \quad b_j = w_{f\phi} \cdot \phi_j
# $$

# %%
w_f = np.array([0.5, -0.5, 1, -1])  # the theta half, then the phi half

f_pairs = np.zeros((N, N))
for i in range(N):
    for j in range(N):
        f_pairs[i, j] = max(w_f @ np.concatenate([theta[i], phi[j]]), 0)

a, b = theta @ w_f[:2], phi @ w_f[2:]
f_sums = np.maximum(a[:, None] + b[None, :], 0)
print("a:", a)
print("b:", b)
difference(f_pairs, f_sums, "pairs and sums", below=1e-12)
print("multiplications: pairs", N * N * 4, "and sums", 2 * N * 2)

order = np.argsort(-b, kind="stable")
print("columns from large to small b:", [names[j] for j in order])
assert (np.diff(f_sums[:, order], axis=1) <= 0).all()  # every row falls in this one order

# %% [markdown]
# The assertion shows a limit of the concatenation: $a_i$ lifts or lowers a whole row, so all positions rank
# the others in one order. They can disagree about how much to look, never about whom first.
#
# Here are all four. The last column is the accuracy on Kinetics of a ResNet-50 with one block (the paper's
# Table 2a; without the block 71.8 %):
#
# | instantiation | $f$ | $C(x)$ | why | top-1 |
# |:--|:--|:--|:--|:--|
# | Gaussian | $e^{x_i \cdot x_j}$ | $\sum_j f$ | $f > 0$: weighted means | 72.5 % |
# | embedded Gaussian | $e^{\theta_i \cdot \phi_j}$ | $\sum_j f$ | the same | 72.7 % |
# | dot product | $\theta_i \cdot \phi_j$ | $N$ | $f$ has both signs | 72.9 % |
# | concatenation | $\mathrm{ReLU}(a_i + b_j)$ | $N$ | a row of $f$ can be zero | 72.8 % |
#
# The paper's released code also multiplies the logits of the softmax by $d^{-1/2}$; its equations do not.
# `scale` is that factor, 1 here (notebook 08 says what it does). Before you go on: what is the ground's row in each map?


# %%
def pairwise(theta, phi, instantiation, *, w_f=None, scale=1.0):
    """The map w, (N, M): N positions look at M positions, here M = N. theta is (N, d), phi (M, d).

    For the Gaussian, give x in place of both.
    """
    if instantiation in ("gaussian", "embedded_gaussian"):
        return softmax(scale * (theta @ phi.T))
    if instantiation == "dot_product":
        return theta @ phi.T / len(phi)
    if instantiation == "concatenation":
        d = theta.shape[1]
        a, b = theta @ w_f[:d], phi @ w_f[d:]
        return np.maximum(a[:, None] + b[None, :], 0) / len(phi)
    raise ValueError(f"unknown instantiation {instantiation!r}")


maps = {
    "gaussian": pairwise(x, x, "gaussian"),
    "embedded_gaussian": pairwise(theta, phi, "embedded_gaussian"),
    "dot_product": pairwise(theta, phi, "dot_product"),
    "concatenation": pairwise(theta, phi, "concatenation", w_f=w_f),
}
difference(maps["dot_product"], w_dot, "dot product", below=1e-12)
difference(maps["concatenation"], f_pairs / N, "concatenation", below=1e-12)
for name, w in maps.items():
    print(f"{name:18} ground's row {w[3]}")

# %%
fig, axes = plt.subplots(2, 2, figsize=(9, 8))
for ax, (name, w) in zip(axes.flat, maps.items(), strict=True):
    image = plots.heatmap(ax, w, numbers=".2f", cmap="PuOr_r", vmin=-0.5, vmax=0.5)
    ax.set_xticks(range(N), names, rotation=45, ha="right")
    ax.set_yticks(range(N), names)
    ax.set_title(name.replace("_", " "))
fig.colorbar(image, ax=axes, shrink=0.6, label="weight")
plots.show(
    fig,
    "The four 8 x 8 maps on one colour scale from -0.5 to 0.5. Gaussian and embedded Gaussian have no negative "
    "weight. In the dot product the ball's rows have 0.38 on the balls and negative weights, down to -0.25, on "
    "lamps and walls, and the ground's rows are zero. In the concatenation every row is highest on the balls, "
    "and six of the eight rows are zero everywhere else.",
)

# %% [markdown] tags=["predict"]
# The ground looks for nothing. From the softmax forms it gets a mean, from the dot product nothing, and from
# the concatenation $\mathrm{ReLU}(b_j) / N$: whatever shows itself loudly, asked for or not.
#
# ## 4 · Everybody is seen, and nobody has a place
#
# A larger clip, 4 frames of 6 x 6, 144 positions; the embedded Gaussian against a 3 x 3 x 3 convolution.
#
# 1. One corner position of the last frame changes. How many of the 144 outputs change?
# 2. The film runs backwards. What happens to the outputs?


# %%
def non_local_layer(clip):
    flat = clip.reshape(-1, 3)
    w = pairwise(flat @ W_theta.T, flat @ W_phi.T, "embedded_gaussian")
    return (w @ (flat @ W_g.T)).reshape(clip.shape)


def convolution(clip, kernel):
    T, H, W, _ = clip.shape
    padded = np.pad(clip, [(1, 1), (1, 1), (1, 1), (0, 0)])
    return sum(k * padded[t : t + T, r : r + H, c : c + W] for (t, r, c), k in np.ndenumerate(kernel))


clip, kernel = rng.uniform(size=(4, 6, 6, 3)), rng.normal(size=(3, 3, 3))
changed = clip.copy()
changed[3, 5, 5] += 1
shuffled = rng.permutation(144)

for name, layer in {"non-local": non_local_layer, "convolution": lambda v: convolution(v, kernel)}.items():
    y = layer(clip)
    count = (layer(changed) != y).any(axis=-1).sum()
    backwards = np.allclose(layer(clip[::-1]), y[::-1])
    positions = clip.reshape(144, 3)[shuffled].reshape(clip.shape)  # any order of positions at all
    any_order = np.allclose(layer(positions), y.reshape(144, 3)[shuffled].reshape(y.shape))
    print(f"{name:12} changed: {count:3} of 144   backwards in, same vectors backwards out: {backwards}")
    print(f"{'':12} positions shuffled in, same vectors shuffled out: {any_order}")
    assert (count, backwards, any_order) == ((144, True, True) if name == "non-local" else (8, False, False))

# %% [markdown] tags=["explain"]
# A changed $x_j$ enters every sum of equation 1, and no weight here is 0, hence 144; a 3 x 3 x 3 kernel in a corner reaches 8.
#
# The price: equation 1 never asks where $j$ is. Played backwards, every position takes its output vector
# along to its new frame, and the mean over all positions, which a classifier often takes, stays as it was.
# To a non-local operation on the colours of single pixels, *sit down* and *stand up* are one action. The
# order of time must come in with $x$: from convolutions over time, the operation's neighbours in a network, or
# from optical flow.
#
# ## 5 · A softmax that does not overflow
#
# The largest float16 is 65,504, so $e^s$ is infinite for $s$ above $\ln 65504 = 11.09$. Multiply numerator
# and denominator by $e^{-m}$: nothing changes, for any $m$. With $m$ the row's maximum, no exponential
# exceeds 1:
#
# $$
# w_{ij} = \frac{e^{s_{ij}}}{\sum_k e^{s_{ik}}} = \frac{e^{s_{ij} - m_i}}{\sum_k e^{s_{ik} - m_i}},
# \qquad m_i = \max_k s_{ik}
# $$


# %%
def plain_softmax(s):  # as in section 3
    e = np.exp(s)
    return e / e.sum(axis=-1, keepdims=True)


def softmax(s):  # from here on in place of section 3's, in pairwise too
    e = np.exp(s - s.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


difference(plain_softmax(s), softmax(s), "plain and shifted, float64", below=1e-12)

with np.errstate(over="ignore", invalid="ignore"):
    for logits in ([9, 8], [11, 10], [12, 10]):
        row = np.array(logits, dtype=np.float16)
        plain, shifted = plain_softmax(row), softmax(row)
        finite = np.isfinite(np.exp(row)).all()
        print(f"logits {logits}: exp finite {finite}, plain {plain.round(2)}, shifted {shifted.round(2)}")
        assert np.isclose(shifted.sum(), 1, atol=2e-3)

# %% [markdown] tags=["predict"]
# The second row fails silently: both exponentials fit into float16, their sum does not, and the weights come
# out as 0.
#
# Now a layer of ordinary size: $C = 1024$ channels with root mean square 10, float16, Gaussian. Are the
# weights of the shifted softmax finite? Compute the logit of a position with itself, $x_i \cdot x_i$, in
# your head first.

# %%
x_half = (10 * rng.normal(size=(6, 1024))).astype(np.float16)
x_single = x_half.astype(np.float32)

with np.errstate(over="ignore", invalid="ignore"):
    logits = x_half @ x_half.T
    w_half = softmax(logits)
print("float16: logit of position 0 with itself", logits[0, 0], " weights", w_half[0])
print("float32: logits finite", np.isfinite(x_single @ x_single.T).all(), end="  ")
print("weights", softmax(x_single @ x_single.T)[0])
assert np.isinf(np.diag(logits)).all()
assert np.isnan(w_half).all()

f_half, g_half = np.full(8192, 10, dtype=np.float16), np.ones(8192, dtype=np.float16)
with np.errstate(over="ignore"):
    print(
        "dot product, N = 8192, all f = 10, all g = 1: (sum of f g) / N =", f_half @ g_half / np.float16(8192)
    )
    print(
        "the same, divided before the sum:             sum of (f / N) g =", f_half / np.float16(8192) @ g_half
    )
    assert np.isinf(f_half @ g_half / np.float16(8192))

total = np.float16(0)
for share in f_half / np.float16(8192) * g_half:
    total += share  # every partial sum is rounded to float16
print("the same, partial sums kept in float16:                        ", total)
assert total == 4


# %% [markdown] tags=["explain"]
# $1024 \cdot 10^2 = 102{,}400$: the logit is infinite before any softmax sees it, so is the maximum, and
# $\infty - \infty$ is not a number. Subtracting the maximum protects $e^s$ and nothing else. float16
# overflows in three places, and each has its cure: in $\theta_i \cdot \phi_j$ (logits in float32), in $e^s$
# (subtract the maximum), in the sum over $j$ (dot product: divide by $N$ before it; softmax: its sum, at most
# $N$, in float32). And partial sums belong in float32, where NumPy's `@` keeps them: the last line stops at
# 4, where float16 numbers are 0.0039 apart and 0.0012 more is rounded away.
#
# ## 6 · The gradient by hand
#
# Training needs the slope of a loss $L$, one number, with respect to every entry of $\theta$, $\phi$ and
# $g$. The layers after ours hand us $\partial L / \partial y_{ic}$. We write $dy_{ic}$ for it, as in the
# code, and likewise $dg_{jc}$ for $\partial L / \partial g_{jc}$. For a test we draw any `dy` and let
# $L = \sum_{ic} dy_{ic}\, y_{ic}$. To check a derivation, move one entry $v$ up and down by a small $h$:
#
# $$dv \approx \frac{L(v + h) - L(v - h)}{2h}$$
#
# The clip gets noise (`noisy` stands for $x$ from here): were two rows equal, mixing them up would stay
# unseen.


# %%
def slope(function, array, h=1e-5):
    slopes = np.zeros_like(array)
    for index in np.ndindex(array.shape):
        step = np.zeros_like(array)
        step[index] = h
        slopes[index] = (function(array + step) - function(array - step)) / (2 * h)
    return slopes


def non_local(theta, phi, g, instantiation, *, w_f=None, scale=1.0):
    """Equation 1: theta (N, d), phi (M, d), g (M, c) -> y (N, c)."""
    return pairwise(theta, phi, instantiation, w_f=w_f, scale=scale) @ g


def loss(theta, phi, g, instantiation="embedded_gaussian", w_f=None):
    return np.sum(dy * non_local(theta, phi, g, instantiation, w_f=w_f))


noisy = x + 0.3 * rng.normal(size=(N, C))
theta, phi, g = noisy @ W_theta.T, noisy @ W_phi.T, noisy @ W_g.T
s = theta @ phi.T
w = softmax(s)
y = w @ g
dy = rng.normal(size=y.shape)
assert y.shape == (N, 3)

# %% [markdown]
# **Step 1, through $y = w\, g$**, for any map $w$. $g_{jc}$ enters $y_{ic}$ for every $i$, multiplied by
# $w_{ij}$; $w_{ij}$ enters $y_{ic}$ for every $c$, multiplied by $g_{jc}$. The chain rule adds up all the
# ways in:
#
# $$dg_{jc} = \sum_i w_{ij}\, dy_{ic}, \qquad dw_{ij} = \sum_c dy_{ic}\, g_{jc}$$

# %%
dg_loops, dw_loops = np.zeros_like(g), np.zeros_like(w)
for i in range(N):
    for j in range(N):
        for c in range(3):
            dg_loops[j, c] += w[i, j] * dy[i, c]
            dw_loops[i, j] += dy[i, c] * g[j, c]

dg = w.T @ dy
dw = dy @ g.T
difference(dg_loops, dg, "dg, loops and matrix", below=1e-12)
difference(dw_loops, dw, "dw, loops and matrix", below=1e-12)
difference(dg, slope(lambda g: loss(theta, phi, g), g), "dg, derived and measured", below=1e-8)
difference(dw, slope(lambda w: np.sum(dy * (w @ g)), w), "dw, derived and measured", below=1e-8)

# %% [markdown]
# **Step 2, one row of the softmax.** Leave out $i$: $w_j = e^{s_j} / Z$ with $Z = \sum_k e^{s_k}$. $Z$ holds
# every logit, so every weight depends on every logit. By the quotient rule, with
# $\partial Z / \partial s_k = e^{s_k}$ and $\delta_{jk} = 1$ where $j = k$, else 0:
#
# $$
# \frac{\partial w_j}{\partial s_k}
# = \frac{\delta_{jk}\, e^{s_j} Z - e^{s_j} e^{s_k}}{Z^2} = w_j\, (\delta_{jk} - w_k)
# $$

# %%
row = w[0]
jacobian = np.diag(row) - np.outer(row, row)  # entry (j, k)
assert jacobian.shape == (N, N)

measured = np.zeros((N, N))
for k in range(N):
    step = 1e-5 * np.eye(N)[k]
    measured[:, k] = (softmax(s[0] + step) - softmax(s[0] - step)) / 2e-5
difference(jacobian, measured, "Jacobian of row 0, derived and measured", below=1e-8)
assert np.allclose(jacobian.sum(axis=1), 0)  # adding one number to all logits changes no weight: section 5

# %% [markdown]
# **Step 3, all rows.** $L$ depends on $s_{ik}$ through the weights $w_{ij}$ of row $i$ alone. Put step 2 in;
# $\delta_{jk}$ keeps one term of its sum:
#
# $$
# ds_{ik} = \sum_j dw_{ij}\, w_{ij} (\delta_{jk} - w_{ik})
# = w_{ik} \Big( dw_{ik} - \sum_j w_{ij}\, dw_{ij} \Big)
# $$
#
# The bracket's sum is the row's *mean* slope, weighted by $w$. It must be there: weights that add up to 1
# grow only at each other's cost, so what counts is how far $dw_{ik}$ is above the mean. Step 1
# turns the mean into $\sum_c dy_{ic} \sum_j w_{ij} g_{jc} = dy_i \cdot y_i$: the output is enough, without the
# map. Fused attention kernels, which never store the map, use this (notebook 09).

# %%
ds_rows = np.zeros_like(s)
for i in range(N):
    jacobian = np.diag(w[i]) - np.outer(w[i], w[i])
    ds_rows[i] = dw[i] @ jacobian

inner = (w * dw).sum(axis=1, keepdims=True)
ds = w * (dw - inner)
difference(inner, (dy * y).sum(axis=1, keepdims=True), "the bracket's sum, from w and from y", below=1e-12)
difference(ds_rows, ds, "ds, Jacobians and short form", below=1e-12)
difference(ds, slope(lambda s: np.sum(dy * (softmax(s) @ g)), s), "ds, derived and measured", below=1e-8)

# %% [markdown]
# **Step 4, through $s_{ij} = \sum_k \theta_{ik}\, \phi_{jk}$**, the product rule: $\theta_{ik}$ enters $s_{ij}$
# for every $j$, times $\phi_{jk}$; $\phi_{jk}$ for every $i$, times $\theta_{ik}$:
#
# $$d\theta_{ik} = \sum_j ds_{ij}\, \phi_{jk}, \qquad d\phi_{jk} = \sum_i ds_{ij}\, \theta_{ik}$$

# %%
dtheta_loops = np.zeros_like(theta)
for i in range(N):
    for j in range(N):
        dtheta_loops[i] += ds[i, j] * phi[j]

dtheta = ds @ phi
dphi = ds.T @ theta
difference(dtheta_loops, dtheta, "dtheta, loops and matrix", below=1e-12)
assert (dtheta.shape, dphi.shape) == (theta.shape, phi.shape)
difference(dtheta, slope(lambda v: loss(v, phi, g), theta), "dtheta, derived and measured", below=1e-8)
difference(dphi, slope(lambda v: loss(theta, v, g), phi), "dphi, derived and measured", below=1e-8)

# %% [markdown]
# **Step 5, to $W_\theta$ and the layer below.** $\theta_{ik} = \sum_c W_{\theta,kc}\, x_{ic}$ is again a sum
# of products: $dW_{\theta,kc} = \sum_i d\theta_{ik}\, x_{ic}$. $x$ enters in three ways, so three gradients add up:
#
# $$dW_\theta = d\theta^\top x, \qquad dx = d\theta\, W_\theta + d\phi\, W_\phi + dg\, W_g$$
#
# `gradients` collects steps 1 to 4. In the **Gaussian**, $x$ takes the place of $\theta$ and $\phi$: it gets
# `dtheta + dphi + dg @ W_g`.


# %%
def gradients(theta, phi, g, dy):
    w = softmax(theta @ phi.T)
    dw = dy @ g.T
    ds = w * (dw - (w * dw).sum(axis=1, keepdims=True))
    return ds @ phi, ds.T @ theta, w.T @ dy


dtheta, dphi, dg = gradients(theta, phi, g, dy)
dW_theta = dtheta.T @ noisy
measured = slope(lambda v: loss(noisy @ v.T, phi, g), W_theta)
difference(dW_theta, measured, "dW_theta, derived and measured", below=1e-8)

dx = dtheta @ W_theta + dphi @ W_phi + dg @ W_g
measured = slope(lambda v: loss(v @ W_theta.T, v @ W_phi.T, v @ W_g.T), noisy)
difference(dx, measured, "dx, derived and measured", below=1e-8)

gaussian_gradients = gradients(noisy, noisy, g, dy)
dx = gaussian_gradients[0] + gaussian_gradients[1] + gaussian_gradients[2] @ W_g
measured = slope(lambda v: loss(v, v, v @ W_g.T, "gaussian"), noisy)
difference(dx, measured, "Gaussian dx, derived and measured", below=1e-8)

# %% [markdown]
# **The dot product**, $w = s / N$. A constant divisor has no slope of its own, the paper's reason for $N$:
# $ds = dw / N$ replaces steps 2 and 3; $dg = w^\top dy$ and $d\phi = ds^\top \theta$ stay. In step 4, with step 1 put in, the sums may change places:
#
# $$d\theta_{ik} = \frac{1}{N} \sum_j dw_{ij}\, \phi_{jk} = \frac{1}{N} \sum_c dy_{ic}\, K_{kc},
# \qquad K_{kc} = \sum_j \phi_{jk}\, g_{jc}$$
#
# $K$ is 2 x 3, and nothing $N \times N$ is left (notebook 09).

# %%
dtheta_loops = np.zeros_like(theta)
for i in range(N):
    for j in range(N):
        dtheta_loops[i] += dw[i, j] / N * phi[j]

K = phi.T @ g
assert K.shape == (2, 3)
dot_gradients = dw / N @ phi, dw.T / N @ theta, (theta @ phi.T / N).T @ dy
difference(dtheta_loops, dot_gradients[0], "dtheta, loops and matrix", below=1e-12)
difference(dy @ K.T / N, dot_gradients[0], "dtheta, through K", below=1e-12)

measured = (
    slope(lambda v: loss(v, phi, g, "dot_product"), theta),
    slope(lambda v: loss(theta, v, g, "dot_product"), phi),
    slope(lambda v: loss(theta, phi, v, "dot_product"), g),
)
parts = ("dtheta", "dphi", "dg", "dw_f")
for part, ours, theirs in zip(parts, dot_gradients, measured, strict=False):
    difference(ours, theirs, f"{part}, derived and measured", below=1e-8)

# %% [markdown] tags=["predict"]
# **The concatenation**, $w_{ij} = \mathrm{ReLU}(a_i + b_j) / N$. ReLU's slope is a *gate* $o_{ij}$: 1 where
# $a_i + b_j > 0$, else 0. $a_i$ enters row $i$ of the map, $b_j$ column $j$; both are products (section 3):
#
# $$da_i = \frac{1}{N} \sum_j o_{ij}\, dw_{ij}, \qquad db_j = \frac{1}{N} \sum_i o_{ij}\, dw_{ij}$$
#
# $$d\theta_{ik} = da_i\, w_{f\theta,k}, \qquad dw_{f\theta,k} = \sum_i da_i\, \theta_{ik},
# \qquad \text{and so for } \phi, w_{f\phi} \text{ with } db_j$$
#
# Lower the lamp's $b_1$ until nobody looks at the lamp. What are $db_1$ and $dg_1$ then?

# %%
a, b = theta @ w_f[:2], phi @ w_f[2:]
gate = a[:, None] + b[None, :] > 0
da_loops, db_loops = np.zeros(N), np.zeros(N)
for i in range(N):
    for j in range(N):
        if gate[i, j]:
            da_loops[i] += dw[i, j] / N
            db_loops[j] += dw[i, j] / N

da, db = (gate * dw).sum(axis=1) / N, (gate * dw).sum(axis=0) / N
difference(da_loops, da, "da, loops and matrix", below=1e-12)
difference(db_loops, db, "db, loops and matrix", below=1e-12)

dw_f = np.concatenate([da @ theta, db @ phi])
w_relu = gate * (a[:, None] + b) / N
concat_gradients = np.outer(da, w_f[:2]), np.outer(db, w_f[2:]), w_relu.T @ dy, dw_f
measured = (
    slope(lambda v: loss(v, phi, g, "concatenation", w_f), theta),
    slope(lambda v: loss(theta, v, g, "concatenation", w_f), phi),
    slope(lambda v: loss(theta, phi, v, "concatenation", w_f), g),
    slope(lambda v: loss(theta, phi, g, "concatenation", v), w_f),
)
for part, ours, theirs in zip(parts, concat_gradients, measured, strict=True):
    difference(ours, theirs, f"{part}, derived and measured", below=1e-8)

hidden = b.copy()
hidden[1] = -a.max() - 1
sums = a[:, None] + hidden[None, :]
db_hidden = ((sums > 0) * dw).sum(axis=0) / N
dg_hidden = np.maximum(sums, 0).T @ dy / N
print("nobody looks at the lamp: db_1 =", db_hidden[1], "  dg_1 =", dg_hidden[1])
assert db_hidden[1] == 0
assert not dg_hidden[1].any()

# %% [markdown] tags=["explain"]
# Zero: no gradient comes back through a closed column. Only shared weights or a larger $a_i$ can open
# it again. In the dot product a weight of 0 still has a slope.
#
# ## 7 · The same from the library
#
# `nlutils.reference.non_local` is equation 1 as literal sums; `nlutils.torch.non_local` takes a batch, and
# PyTorch finds the gradients. All must agree.

# %%
import torch

import nlutils

by_hand = {
    "gaussian": gaussian_gradients,
    "embedded_gaussian": (dtheta, dphi, dg),
    "dot_product": dot_gradients,
    "concatenation": concat_gradients,
}
for name in by_hand:
    inputs = (noisy, noisy, g) if name == "gaussian" else (theta, phi, g)
    vector = w_f if name == "concatenation" else None
    y = non_local(*inputs, name, w_f=vector)
    difference(y, nlutils.reference.non_local(*inputs, name, w_f=vector), f"{name}, reference", below=1e-12)

    tensors = [torch.tensor(v[None], requires_grad=True) for v in inputs]
    vector = None if vector is None else torch.tensor(vector, requires_grad=True)
    y_torch = nlutils.torch.non_local(*tensors, name, w_f=vector)
    difference(y, y_torch[0], f"{name}, torch", below=1e-12)

    y_torch.backward(torch.tensor(dy[None]))
    slopes = [tensor.grad[0] for tensor in tensors] + ([] if vector is None else [vector.grad])
    for part, ours, theirs in zip(parts, by_hand[name], slopes, strict=False):
        difference(ours, theirs, f"    {part}, by hand and autograd", below=1e-12)

# %% [markdown]
# ## Exercises
#
# All use section 6's arrays.

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Only the direction counts (easy, 10 minutes)
#
# In section 2 the wall looked at the lamp because the lamp's vector is longer. Replace the logit by the
# cosine of the angle between the two vectors, $\theta_i \cdot \phi_j / (|\theta_i|\,|\phi_j|)$, keep the
# softmax over $j$, return the map.
#
# **Expect**: rows that add up to 1, and within a row no weight more than $e^2 = 7.4$ times another, because
# cosines lie between $-1$ and 1.
#
# <details><summary>Hint 1: a nudge</summary>
#
# Give all vectors length 1; the rest is the embedded Gaussian.
#
# </details>
# <details><summary>Hint 2: the formula</summary>
#
# $w_{ij} = \mathrm{softmax}_j\big(\hat\theta_i \cdot \hat\phi_j\big)$ with $\hat v = v / \sqrt{v \cdot v}$
#
# </details>
# <details><summary>Hint 3: part of the code</summary>
#
# `theta / np.linalg.norm(theta, axis=1, keepdims=True)`
#
# </details>


# %% tags=["stub"]
def cosine_map(theta, phi):
    #: solution
    theta = theta / np.linalg.norm(theta, axis=1, keepdims=True)
    phi = phi / np.linalg.norm(phi, axis=1, keepdims=True)
    return softmax(theta @ phi.T)
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
cosines = torch.cosine_similarity(torch.tensor(theta)[:, None], torch.tensor(phi)[None], dim=2).numpy()
check(
    "Exercise 1",
    lambda: cosine_map(theta, phi),
    softmax(cosines),
    mistakes={
        "these are the cosines; the softmax over j is missing": cosines,
        "the exponentials are not divided by their sum over j": np.exp(cosines),
        "the lengths are still in the logits": softmax(s),
        "the softmax ran over i; each row, not each column, must add up to 1": softmax(cosines.T).T,
        "only theta has length 1; divide phi by its lengths too": softmax(
            s / np.linalg.norm(theta, axis=1, keepdims=True)
        ),
        "only phi has length 1; divide theta by its lengths too": softmax(s / np.linalg.norm(phi, axis=1)),
        "divided by the squares of the lengths; the square root is missing": softmax(
            s / np.outer((theta**2).sum(axis=1), (phi**2).sum(axis=1))
        ),
        "all of an array was divided by one number; each row has its own length": softmax(
            s / (np.linalg.norm(theta) * np.linalg.norm(phi))
        ),
    },
)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Not myself (medium, 15 minutes)
#
# The dense CRF of notebook 03 sums over $j \neq i$. Take the logits $s$, $(N, N)$; return the softmax
# map in which no position looks at itself.
#
# **Expect**: zeros on the diagonal, and rows that still add up to 1.
#
# <details><summary>Hint 1: a nudge</summary>
#
# Position $i$ must be missing in the numerator and in the sum.
#
# </details>
# <details><summary>Hint 2: the formula</summary>
#
# $w_{ij} = e^{s_{ij}} / \sum_{k \neq i} e^{s_{ik}}$ for $j \neq i$, and $w_{ii} = 0$. Which logit $s_{ii}$
# makes $e^{s_{ii}} = 0$?
#
# </details>
# <details><summary>Hint 3: part of the code</summary>
#
# `np.where(np.eye(len(s), dtype=bool), -np.inf, s)`
#
# </details>


# %% tags=["stub"]
def map_without_self(s):
    #: solution
    return softmax(np.where(np.eye(len(s), dtype=bool), -np.inf, s))
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
others = np.array([np.insert(softmax(np.delete(s[i], i)), i, 0) for i in range(N)])
check(
    "Exercise 2",
    lambda: map_without_self(s),
    others,
    mistakes={
        "the diagonal was removed after the division, so the rows add up to less than 1": w * (1 - np.eye(N)),
        "a logit of 0 on the diagonal still counts, because exp(0) = 1": softmax(s * (1 - np.eye(N))),
        "that is the map with j = i; nothing was excluded": w,
        "the exponentials are not divided by their sum over j": np.exp(s) * (1 - np.eye(N)),
        "the mask is the wrong way round; only j = i is left": np.eye(N),
        "the softmax ran over i; each row must add up to 1": softmax(
            np.where(np.eye(N, dtype=bool), -np.inf, s).T
        ).T,
    },
)

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · The gradient of a cosine (hard, 25 minutes)
#
# Exercise 1 gives every $\theta_i$ the length 1: $\hat\theta_i = \theta_i / |\theta_i|$. Steps 1 to 4 then lead
# to $d\hat\theta$. Derive $d\theta$ from it: take `theta` and `dunit` ($d\hat\theta$), both $(N, d)$, and return $(N, d)$.
#
# **Expect**: what autograd finds; each row of $d\theta$ at a right angle to $\theta_i$, because a longer
# $\theta_i$ changes nothing.
#
# <details><summary>Hint 1: a nudge</summary>
#
# Every entry of $\hat\theta_i$ holds the length, and the length holds every entry of $\theta_i$: a Jacobian, as
# in step 2.
#
# </details>
# <details><summary>Hint 2: the formula</summary>
#
# $\partial \hat\theta_k / \partial \theta_l = (\delta_{kl} - \hat\theta_k\, \hat\theta_l) / |\theta|$
#
# </details>
# <details><summary>Hint 3: part of the code</summary>
#
# `dunit - unit * (unit * dunit).sum(axis=1, keepdims=True)`, and a division
#
# </details>


# %% tags=["stub"]
def gradient_through_length(theta, dunit):
    #: solution
    length = np.linalg.norm(theta, axis=1, keepdims=True)
    unit = theta / length
    return (dunit - unit * (unit * dunit).sum(axis=1, keepdims=True)) / length
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
lengths = np.linalg.norm(theta, axis=1, keepdims=True)
unit = theta / lengths
dunit = gradients(unit, phi / np.linalg.norm(phi, axis=1, keepdims=True), g, dy)[0]
along = (unit * dunit).sum(axis=1, keepdims=True)

theta_torch = torch.tensor(theta, requires_grad=True)
cosines = torch.cosine_similarity(theta_torch[:, None], torch.tensor(phi)[None], dim=2)
(torch.softmax(cosines, dim=1) @ torch.tensor(g)).backward(torch.tensor(dy))
check(
    "Exercise 3",
    lambda: gradient_through_length(theta, dunit),
    theta_torch.grad,
    mistakes={
        "the length was treated as a constant; it depends on theta too": dunit / lengths,
        "the division by the length is missing": dunit - unit * along,
        "theta was used where the vector of length 1 belongs": (
            dunit - theta * (theta * dunit).sum(axis=1, keepdims=True)
        )
        / lengths,
        "multiplied by the length instead of divided": (dunit - unit * along) * lengths,
        "a sign: the part along theta_i must be taken away": (dunit + unit * along) / lengths,
        "this is the part along theta_i, the one that must go": unit * along / lengths,
        "the sum ran over the positions; it belongs to each row": (
            dunit - unit * (unit * dunit).sum(axis=0, keepdims=True)
        )
        / lengths,
    },
)

# %% [markdown]
# ## What you learned
#
# - Equation 1 is a map $w$ times $g$. The instantiations differ in $f$ and in the divisor: the row's sum
#   where $f > 0$, else $N$.
# - A zero vector is not neutral under a softmax. The concatenation ranks all positions in one order.
# - float16 overflows in the logit, the exponential and the sum over $j$.
# - The gradient: two products for $g$ and $w$, then a Jacobian for each row of a softmax, a division for the
#   dot product, a gate for the concatenation, then products again.
#
# ## Further reading
#
# - X. Wang, R. Girshick, A. Gupta, K. He. Non-local Neural Networks. CVPR 2018. Section 3.
# - A. Santoro et al. A simple neural network module for relational reasoning. NeurIPS 2017. The
#   concatenation's origin.
