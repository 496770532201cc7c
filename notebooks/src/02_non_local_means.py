# %% [markdown]
# # 02 · Non-local means: from a weighted mean to BM3D
#
# After this notebook you can
#
# - write non-local means as loops and as one matrix, and show that both agree
# - turn the distance of two patches into a dot product, exactly, and so run non-local means on a non-local operation
# - name every convention in which your result differs from scikit-image's, and remove the difference
# - build BM3D in two steps, and test each part against its definition
# - compare five filters on one photograph, with controls tuned on the clean picture
#
# | | |
# |:--|:--|
# | What you need | notebook 00; matrix products, mean and variance |
# | Your time | 90 minutes |
# | Machine time | 20 seconds |
# | Framework | NumPy (PyTorch for one check) |

# %% tags=["parameters"]
import os

profile = os.environ.get("NLUTILS_PROFILE", "quick")

# %%
import matplotlib.pyplot as plt
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from nlutils import plots
from nlutils.course import check, difference, settings

run = settings(profile, quick=dict(size=128, draws=3), full=dict(size=256, draws=10))
plots.style()
np.set_printoptions(precision=3, suppress=True)

# %% [markdown]
# ## 1 · A weighted mean in one dimension
#
# A signal $v_0, v_1, \dots$ repeats a motif of twelve numbers eight times; noise of standard deviation 0.3 lies on it. To estimate
# the clean value at $i$, take a mean of all $v_j$, in which those count most that are *like* $i$. What *like* means is decided by a
# vector $x_i$ for each position, and by a width $h$:
#
# $$y_i = \frac{\sum_j f(x_i, x_j)\, v_j}{\sum_j f(x_i, x_j)}, \qquad f(x_i, x_j) = e^{-|x_i - x_j|^2 / h^2}$$
#
# Statisticians call this kernel regression. First with $x_j = j$, the position itself.


# %%
def kernel_regression(x, v, h):
    y = np.zeros(len(v))
    for i in range(len(v)):
        f = [np.exp(-np.sum((x[i] - x[j]) ** 2) / h**2) for j in range(len(v))]
        for j in range(len(v)):
            y[i] += f[j] * v[j] / sum(f)
    return y


motif = np.array([0, 0, 0, 0, 2, 2, 0, 0, 1, 1, 1, 1], dtype=np.float64)
clean_signal = np.tile(motif, 8)
N = len(clean_signal)
v = clean_signal + 0.3 * np.random.default_rng(0).standard_normal(N)

position = np.arange(N, dtype=np.float64)[:, None]
assert position.shape == (N, 1)
y = kernel_regression(position, v, h=0.6)
print("j           ", np.arange(50, 56))
print("clean       ", clean_signal[50:56])
print("noisy       ", v[50:56])
print("by position ", y[50:56])

# %% [markdown] tags=["predict"]
# Two other choices: $x_j = v_j$, the noisy *value*; and $x_j = (v_{j-2}, \dots, v_{j+2}) / \sqrt 5$, the
# *patch* around $j$. (With the division by $\sqrt 5$ the squared distance is the mean over the patch, so that one $h$
# has the same meaning for patches of any size.)
#
# Position 52 is the first of the two 2s of the fifth motif. At which other positions will the patch put large
# weights?

# %%
features = {
    "position": position,
    "value": v[:, None],
    "patch": sliding_window_view(np.pad(v, 2, mode="edge"), 5) / np.sqrt(5),
}
widths = (0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
best = {}
for name, x in features.items():
    errors = [np.sqrt(np.mean((kernel_regression(x, v, h) - clean_signal) ** 2)) for h in widths]
    best[name] = min(errors)
    h = widths[int(np.argmin(errors))]
    f = np.exp(-np.sum((x[52] - x) ** 2, axis=1) / h**2)
    top = np.sort(np.argsort(-f)[:8])
    print(f"{name:8} error {best[name]:.2f} at its best h = {h}; largest weights of 52 at {top}")

print(f"no filter: {np.sqrt(np.mean((v - clean_signal) ** 2)):.2f}")
assert best["patch"] + 0.02 < best["value"] < best["position"]
assert set(top % 12) == {4}  # the last in the loop was the patch

# %% [markdown] tags=["explain"]
# All eight lie twelve apart: the first 2 of every motif. A mean over positions can only mix neighbours, and at a jump these are
# wrong. The value finds 2s, first and second alike, and mixes levels that come close under the noise. The patch sees
# the pattern around it, and five noisy numbers mislead less than one.
#
# ## 2 · Patches of a photograph
#
# `camera` is a photograph that comes with scikit-image (by Lav Varshney, CC0). Grey levels lie
# between 0 and 1; our noise has $\sigma = 0.1$. We begin with 20 x 20 pixels, and number them $i = 20 r + c$.
# The feature of a pixel is the patch $P_i$ of 5 x 5 around it, divided by 5, written as a vector of 25.

# %%
from skimage import data

sigma = 0.1
photograph = data.camera() / 255
clean = photograph[70 : 70 + run.size, 200 : 200 + run.size]
noisy = clean + sigma * np.random.default_rng(0).standard_normal(clean.shape)

H = W = 20
crop = noisy[66 : 66 + H, 56 : 56 + W]
N, patch = H * W, 5
padded = np.pad(crop, patch // 2, mode="reflect")
P = np.zeros((N, patch * patch))
for r in range(H):
    for c in range(W):
        P[r * W + c] = padded[r : r + patch, c : c + patch].ravel() / patch
v = crop.ravel()
assert P.shape == (400, 25)
assert np.allclose(patch * P[:, 12], v)  # number 12 of 25 is the pixel itself

# %% [markdown]
# Non-local means is kernel regression with patches as features:
#
# $$w_{ij} = \frac{e^{-|P_i - P_j|^2 / h^2}}{\sum_k e^{-|P_i - P_k|^2 / h^2}}, \qquad y_i = \sum_j w_{ij}\, v_j$$
#
# Loops first; for every $i$ a pass over every $j$.

# %%
h = sigma
y_loops = np.zeros(N)
for i in range(N):
    f = np.zeros(N)
    for j in range(N):
        f[j] = np.exp(-np.sum((P[i] - P[j]) ** 2) / h**2)
    for j in range(N):
        y_loops[i] += f[j] / f.sum() * v[j]

small = clean[66 : 66 + H, 56 : 56 + W]
print(f"root mean square error: noisy {np.sqrt(np.mean((crop - small) ** 2)):.3f},", end=" ")
print(f"filtered {np.sqrt(np.mean((y_loops - small.ravel()) ** 2)):.3f}")
assert np.mean((y_loops - small.ravel()) ** 2) < 0.7 * np.mean((crop - small) ** 2)

# %% [markdown]
# The squared distance of two vectors splits into two lengths and a dot product, so that a matrix product yields all
# of them at once:
#
# $$|P_i - P_j|^2 = |P_i|^2 + |P_j|^2 - 2\, P_i \cdot P_j$$
#
# A *softmax* is exp divided by the row's sum; subtracting the row's maximum first changes nothing and keeps exp finite.


# %%
def softmax(s):
    e = np.exp(s - s.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


squares = np.sum(P**2, axis=1)
D = squares[:, None] + squares[None, :] - 2 * P @ P.T
w = softmax(-D / h**2)
y_matrix = w @ v
assert D.shape == w.shape == (N, N)
difference(y_loops, y_matrix, "loops and matrix", below=1e-12)

# %% [markdown]
# ## 3 · The same, as a non-local operation
#
# Written $y_i = \frac{1}{C} \sum_j f(x_i, x_j)\, g(x_j)$, non-local means has $g(x_j) = v_j$, the pixel itself, and $C = \sum_j f$.
# The non-local paper, however, compares by a *dot product*: in its embedded Gaussian, $f = e^{\theta_i \cdot \phi_j}$ with vectors
# $\theta_i$ and $\phi_j$ made from $x_i$ and $x_j$. We need $\theta_i \cdot \phi_j = -|P_i - P_j|^2 / h^2$ exactly. The three terms of the
# distance fit into one dot product when each vector gets two more entries:
#
# $$
# \theta_i = \Big(\tfrac{\sqrt 2}{h} P_i,\; -\tfrac{|P_i|^2}{h^2},\; 1\Big), \qquad
# \phi_j = \Big(\tfrac{\sqrt 2}{h} P_j,\; 1,\; -\tfrac{|P_j|^2}{h^2}\Big)
# $$

# %%
import torch

import nlutils

one = np.ones((N, 1))
lengths = -squares[:, None] / h**2
theta = np.hstack([np.sqrt(2) / h * P, lengths, one])
phi = np.hstack([np.sqrt(2) / h * P, one, lengths])
assert theta.shape == phi.shape == (N, 27)
difference(theta @ phi.T, -D / h**2, "theta . phi and the distances", below=1e-8)

g = v[:, None]
y_reference = nlutils.reference.non_local(theta, phi, g, "embedded_gaussian")[:, 0]
batch = [torch.tensor(a[None]) for a in (theta, phi, g)]  # a batch of one picture
y_torch = nlutils.torch.non_local(*batch, "embedded_gaussian")[0, :, 0]
difference(y_loops, y_reference, "non-local means and nlutils.reference", below=1e-8)
difference(y_loops, y_torch, "non-local means and nlutils.torch", below=1e-8)

# %% [markdown] tags=["predict"]
# The entry $-|P_i|^2 / h^2$ of $\theta_i$ is the same for all $j$, so the division by $C$ removes it. The entry of $\phi_j$ is not: it
# differs from column to column.
#
# The paper's plain *Gaussian* has neither: $f = e^{x_i \cdot x_j}$, here with $x_i = \frac{\sqrt 2}{h} P_i$. Take a dark pixel in the middle
# of the crop. Where does it look then?

# %%
x = np.sqrt(2) / h * P
w_gaussian = softmax(x @ x.T)
for name, map_ in {"distance": w, "dot product": w_gaussian}.items():
    top = np.argmax(map_, axis=1)
    itself, longer = np.mean(top == np.arange(N)), np.mean(squares[top] > squares)
    print(f"{name:12} largest weight on the pixel itself {itself:4.0%}, on a longer patch {longer:4.0%}")
assert longer > 0.9
assert (squares[top] >= squares).all()  # as Cauchy and Schwarz demand

unit = P / np.sqrt(squares)[:, None]  # every patch gets length 1
x = np.sqrt(2) / 0.2 * unit
w_unit = softmax(-np.sum((unit[:, None] - unit[None, :]) ** 2, axis=2) / 0.2**2)
difference(w_unit, softmax(x @ x.T), "patches of length 1: distance and dot product", below=1e-12)

# %%
i = 13 * W + 13
assert w_gaussian[i].reshape(H, W)[:2, W // 2 :].sum() > 0.8
fig, axes = plt.subplots(1, 3, figsize=(9, 3.2))
axes[0].imshow(crop, cmap="gray")
axes[0].set_title("noisy crop; the pixel that looks")
for ax, map_, title in zip(
    axes[1:], (w, w_gaussian), ("its weights, by distance", "its weights, by dot product"), strict=True
):
    image = ax.imshow(map_[i].reshape(H, W), vmin=0, vmax=0.05)
    ax.set_title(title)
fig.colorbar(image, ax=axes[1:], extend="max", shrink=0.9)
for ax in axes:
    ax.plot(i % W, i // W, "+", color=plots.COLOURS["red"], markersize=12, markeredgewidth=2)
    ax.set_axis_off()
plots.show(
    fig,
    "A noisy crop of 20 x 20 pixels with a dark bar across its lower part, and a cross on the bar. By distance, "
    "the cross gives its weight to itself and to other pixels of the dark bar and the dark region above it. By dot "
    "product, nearly all its weight goes to the right half of the two top rows, in the bright sky.",
)

# %% [markdown] tags=["explain"]
# To the sky. 99 of 100 pixels look most at a patch *longer* than their own, and none at a shorter one: $x_i \cdot x_j \ge x_i \cdot x_i$ needs
# $|x_j| \ge |x_i|$, because $x_i \cdot x_j \le |x_i|\, |x_j|$. A dot product rewards length, and here length is brightness.
#
# The last comparison shows the way out: where all vectors have one length, both lengths are constant in a row, and the two maps are equal.
# Otherwise a block that is to compare by distance needs $-|P_j|^2 / h^2$ among the features that it gets: $\phi_j = W_\phi\, x_j$ is linear and
# cannot make a square itself.
#
# ## 4 · A whole picture
#
# A map of 128 x 128 pixels would have $16384^2$ entries. Non-local means therefore searches only a window around $i$, here 21 x 21, a map in
# which most entries are zero. The code turns the loops round: for each of the 441 *shifts*, all pixels at once. The patches still overlap
# the border by reflection; $j$ runs over true pixels only.


# %%
def shifts(shape, distance):
    """For each shift of the window the slices (here, there): pixels i, and the pixels j that they look at."""
    H, W = shape
    for dr in range(-distance, distance + 1):
        for dc in range(-distance, distance + 1):
            here = slice(max(0, -dr), H - max(0, dr)), slice(max(0, -dc), W - max(0, dc))
            there = slice(max(0, dr), H - max(0, -dr)), slice(max(0, dc), W - max(0, -dc))
            yield here, there


def weigh(squares, h, sigma):
    """f from the squared differences (rows, columns, patch, patch); section 5 explains sigma."""
    d = squares.mean(axis=(2, 3)) - 2 * sigma**2
    return np.exp(-np.maximum(d, 0) / h**2)


def non_local_means(noisy, patch, distance, h, sigma=0.0, weigh=weigh):
    P = sliding_window_view(np.pad(noisy, patch // 2, mode="reflect"), (patch, patch))
    P = np.ascontiguousarray(P)  # patch after patch in memory: three times as fast
    total, C = np.zeros(noisy.shape), np.zeros(noisy.shape)
    for here, there in shifts(noisy.shape, distance):
        f = weigh((P[here] - P[there]) ** 2, h, sigma)
        total[here] += f * noisy[there]
        C[here] += f
    return total / C


y_shifts = non_local_means(crop, patch, distance=19, h=h)  # a window that always holds the whole crop
difference(y_loops, y_shifts.ravel(), "loops over pixels, loop over shifts", below=1e-12)

# %% [markdown] tags=["predict"]
# ## 5 · How alike are two patches that are equal?
#
# Suppose two patches, far apart, are the same in the clean picture. The noise of each pixel is independent, with standard deviation
# $\sigma$. With $h = \sigma$: what is $f$ for this pair, on average roughly? And what is $f$ for $j = i$?

# %%
rng = np.random.default_rng(1)
flat = sigma * rng.standard_normal((2, 20_000, 25))  # 20,000 pairs of equal patches of 25 pixels, noise only
d = np.mean((flat[0] - flat[1]) ** 2, axis=1)
print(f"mean squared difference: {d.mean() / sigma**2:.2f} sigma^2")
print(f"f at the mean distance:  {np.exp(-d.mean() / sigma**2):.2f},  f for j = i: {np.exp(0.0):.2f}")
assert abs(d.mean() - 2 * sigma**2) < 0.02 * sigma**2

errors = {}
for factor, known in ((0.7, 0), (1, 0), (0.7, sigma)):
    y = non_local_means(noisy, 5, 10, h=factor * sigma, sigma=known)
    errors[factor, known] = np.mean((y - clean) ** 2) / sigma**2
    taken = "2 sigma^2" if known else "nothing"
    print(
        f"h = {factor:3} sigma, {taken:9} taken off: mean squared error {errors[factor, known]:.2f} sigma^2"
    )
assert errors[0.7, sigma] < 0.97 * errors[1, 0] < 0.8 * errors[0.7, 0]

# %% [markdown] tags=["explain"]
# The difference of two independent numbers has the sum of their variances, so the mean squared difference is $2 \sigma^2$, not 0, and $f$ is $e^{-2}
# = 0.14$: a perfect match counts one seventh of the pixel itself. When $\sigma$ is known, take $2\sigma^2$ off, and never go below 0. That allows a
# small $h$, which tells patches apart; without it a small $h$ leaves each pixel nearly alone with its noise.
#
# ## 6 · Beside scikit-image
#
# `denoise_nl_means` has a slow mode and a fast one, and both take $\sigma$. Same patch, window, $h$ and $\sigma$. PSNR, the usual score, is the mean
# squared error in decibels, for grey levels from 0 to 1; 1 dB more is 21 % less error:
#
# $$\mathrm{PSNR} = -10 \log_{10} \frac{1}{N} \sum_i (y_i - \mathrm{clean}_i)^2$$

# %%
from skimage.restoration import denoise_nl_means


def psnr(y, clean):
    return -10 * np.log10(np.mean((y - clean) ** 2))


same = dict(h=0.7 * sigma, sigma=sigma)
ours = non_local_means(noisy, 5, 10, **same)
slow = denoise_nl_means(noisy, 5, 10, fast_mode=False, **same)
fast = denoise_nl_means(noisy, 5, 10, fast_mode=True, **same)
for name, y in {"noisy": noisy, "ours": ours, "scikit-image, slow": slow, "scikit-image, fast": fast}.items():
    print(f"{name:20} {psnr(y, clean):.1f} dB,  largest difference to ours {np.abs(y - ours).max():.2f}")
assert abs(psnr(ours, clean) - psnr(slow, clean)) < 1.5
assert abs(psnr(ours, clean) - psnr(fast, clean)) < 0.5

# %% [markdown]
# Close in PSNR, and single pixels differ plainly. Why? From its source code, four conventions:
#
# 1. The slow mode weighs the pixels of a patch by a Gaussian of standard deviation $(5 - 1) / 4$ around the centre; ours are equal.
# 2. Both modes replace $e^x$ by a fast approximation, which writes $x$ into the exponent bits of a float64 (Schraudolph 1999). It makes $e^0$
#    0.971.
# 3. Both set weights to zero that are below about $e^{-5}$: the slow mode when the sum passes 5 before the patch's last row.
# 4. The fast mode sums squares by an integral image, whose corner differences leave out the first row and column of the patch: 4 x 4 of 5 x 5 pixels, still
#    divided by 25. And its window continues into the reflected border.
#
# If this list is complete, adding them one by one must end at scikit-image's numbers.


# %%
def rough_exp(x):
    bits = np.trunc(x * 2**20 / np.log(2)).astype(np.int64) + 1023 * 2**20 - 60801
    return (bits << 32).view(np.float64)


assert np.isclose(rough_exp(np.zeros(1)), 0.971, atol=5e-4)

radius = np.arange(-2, 3)
bell = np.exp(-(radius[:, None] ** 2 + radius**2) / (2 * ((5 - 1) / 4) ** 2))
bell /= bell.sum()
print(f"the bell's weights, squared and summed: 1 / {1 / np.sum(bell**2):.1f}, not 1 / 25")


def slow_weights(squares, h, sigma, exp=rough_exp, cut=True):
    terms = bell * (squares - 2 * sigma**2) / h**2
    rows = np.cumsum(terms.sum(axis=3), axis=2)  # the sum after each row of the patch
    f = exp(-np.maximum(rows[..., -1], 0))
    return np.where(cut & (rows[..., :-1] > 5).any(axis=2), 0, f)


def fast_weights(squares, h, sigma, exp=rough_exp, cut=True):
    d = np.maximum(np.sum(squares[..., 1:, 1:] - 2 * sigma**2, axis=(2, 3)), 0) / (25 * h**2)
    return np.where(cut & (d > 5), 0, exp(-d))


def reflected(noisy, **options):
    far = 10 + 5 // 2  # the window and half a patch
    return non_local_means(np.pad(noisy, far, mode="reflect"), 5, 10, **options)[far:-far, far:-far]


# %%
part = noisy[32:96, 32:96]
slow_part, fast_part = (denoise_nl_means(part, 5, 10, fast_mode=mode, **same) for mode in (False, True))


def compare(name, y, target):
    gap = np.abs(y - target)
    print(f"{name:25} largest difference {gap.max():.4f}, root mean square {np.sqrt(np.mean(gap**2)):.4f}")
    return gap.max(), np.sqrt(np.mean(gap**2))


def soft(weights, **options):
    return lambda squares, h, sigma: weights(squares, h, sigma, **options)


by_bell, by_rough = soft(slow_weights, exp=np.exp, cut=False), soft(slow_weights, cut=False)
compare("slow mode and ours", non_local_means(part, 5, 10, **same), slow_part)
gaps = [compare("  and a bell", non_local_means(part, 5, 10, weigh=by_bell, **same), slow_part)]
gaps += [compare("  and the rough exp", non_local_means(part, 5, 10, weigh=by_rough, **same), slow_part)]
y = non_local_means(part, 5, 10, weigh=slow_weights, **same)
difference(y, slow_part, "  and the cut", below=1e-6)

by_four, by_rough = soft(fast_weights, exp=np.exp, cut=False), soft(fast_weights, cut=False)
compare("fast mode and ours", non_local_means(part, 5, 10, **same), fast_part)
compare("  and a reflected window", reflected(part, **same), fast_part)
gaps += [compare("  and 4 x 4 pixels", reflected(part, weigh=by_four, **same), fast_part)]
gaps += [compare("  and the rough exp", reflected(part, weigh=by_rough, **same), fast_part)]
y = reflected(part, weigh=fast_weights, **same)
difference(y, fast_part, "  and the cut", below=1e-6)
assert all(0.005 < largest < 0.04 and rms < 0.002 for largest, rms in gaps)
assert gaps[1][1] > 0.9 * gaps[0][1]
assert gaps[3][1] > 0.9 * gaps[2][1]

for t in (0.6, 0.7, 1):
    y = denoise_nl_means(noisy, 5, 10, fast_mode=False, h=t * sigma, sigma=sigma)
    print(f"slow mode on the whole picture, h = {t:3} sigma: {psnr(y, clean):.1f} dB")
assert psnr(y, clean) > psnr(slow, clean) + 0.5

# %% [markdown]
# Nothing is left over. (The bound is a millionth because the rough exponential keeps 20 bits: where rounding falls on the other side, one weight moves that much.) What counts is which
# pixels of the patch are compared: the bell, and 16 of 25. Exponential and cut together move single pixels by up to 0.02, and 0.001 in the root mean square; the exponential
# alone brings nothing, because the cut then remains.
#
# The slow mode's lower PSNR comes from $h$: the bell counts like 12 equal pixels, not 25, so the distances are noisier and need a larger $h$. At $h = \sigma$ it reaches
# 27.9 dB. (Its manual advises a smaller one, $0.6\, \sigma$; on this picture that makes it worse.)
#
# ## 7 · BM3D: one group
#
# Non-local means averages what it finds. *Block matching and 3D filtering* (Dabov and others, 2007) does more with it. It stacks the blocks that match into a
# three-dimensional *group*, and removes the noise from the whole stack in a transform, where a picture needs few
# numbers and noise needs all. Our own settings: blocks of 8 x 8, one reference
# block every 3 pixels, a search window of 25 x 25, the 16 nearest blocks.
#
# In non-local terms, grouping is an $f$ that is 1 for the 16 nearest and 0 for everybody else.


# %%
def blocks_of(picture):
    """Every 8 x 8 block, one row a block: block n begins at row n // (W - 7), column n % (W - 7)."""
    return sliding_window_view(picture, (8, 8)).reshape(-1, 8, 8)


def find_groups(guide, step=3, distance=12, K=16):
    """(G, K): the numbers of the K blocks nearest to each reference block, itself first."""
    rows, columns = guide.shape[0] - 7, guide.shape[1] - 7
    blocks = blocks_of(guide).reshape(-1, 64)
    groups = []
    for r in sorted({*range(0, rows, step), rows - 1}):  # the last row and column belong to it, too
        for c in sorted({*range(0, columns, step), columns - 1}):
            r_near = np.arange(max(r - distance, 0), min(r + distance + 1, rows))
            c_near = np.arange(max(c - distance, 0), min(c + distance + 1, columns))
            near = (r_near[:, None] * columns + c_near).ravel()
            d = np.sum((blocks[near] - blocks[r * columns + c]) ** 2, axis=1)
            groups.append(near[np.argsort(d, kind="stable")[:K]])
    return np.array(groups)


groups = find_groups(noisy)
G, K = groups.shape
noisy_blocks, clean_blocks = blocks_of(noisy), blocks_of(clean)
which = np.flatnonzero(groups[:, 0] == 72 * (noisy.shape[1] - 7) + 108)[0]  # on the rim of the camera's lens
group, clean_group = noisy_blocks[groups[which]], clean_blocks[groups[which]]
assert group.shape == (16, 8, 8)
print(f"{G} groups of {K} blocks, from {len(noisy_blocks)} blocks")

# %% [markdown]
# The transform is the cosine transform along all three axes, from SciPy. Along one axis of length $n$ it is a product with the matrix
#
# $$D_{km} = \sqrt{\tfrac{2 - \delta_{k0}}{n}}\; \cos \frac{\pi k (2m + 1)}{2n}, \qquad D D^\top = I$$
#
# whose rows are cosines of growing frequency. $D D^\top = I$ makes it *orthonormal*, and three things follow that BM3D rests on: the energy (sum of squares) stays the same;
# the transpose undoes the transform; independent noise stays independent, with the same $\sigma$.

# %%
from scipy.fft import dctn, idctn


def transform(groups):
    return dctn(groups, axes=(-3, -2, -1), norm="ortho")


def inverse(coefficients):
    return idctn(coefficients, axes=(-3, -2, -1), norm="ortho")


k, m = np.arange(8)[:, None], np.arange(8)
D8 = np.sqrt((2 - (k == 0)) / 8) * np.cos(np.pi * k * (2 * m + 1) / 16)
difference(D8 @ D8.T, np.eye(8), "D times its transpose, and 1", below=1e-12)
difference(
    np.einsum("ab,gbc,dc->gad", D8, group, D8),
    dctn(group, axes=(1, 2), norm="ortho"),
    "D, and SciPy",
    below=1e-12,
)

coefficients = transform(group)
difference(np.sum(coefficients**2), np.sum(group**2), "energy before and after", below=1e-8)
difference(inverse(coefficients), group, "there and back", below=1e-12)
noise = transform(sigma * np.random.default_rng(2).standard_normal((500, 16, 8, 8)))
print(f"noise of sigma {sigma}: every coefficient has sigma {noise.std():.3f}")
assert abs(noise.std() - sigma) < 0.01 * sigma

# %% [markdown] tags=["predict"]
# 1024 coefficients a group. Stack one clean block 16 times: how many can differ from 0? And if the block is of one grey?

# %%
copies = np.repeat(clean_group[:1], 16, axis=0)
grey = np.full((16, 8, 8), 0.5)
for name, stack in {"16 copies": copies, "16 grey blocks": grey}.items():
    print(f"{name:15} {np.sum(np.abs(transform(stack)) > 1e-10)} coefficients of 1024")
    assert np.abs(transform(stack)[1:]).max() < 1e-10  # all lies in plane 0

only_plane_0 = coefficients.copy()
only_plane_0[1:] = 0
mean = np.broadcast_to(group.mean(axis=0), group.shape)
difference(inverse(only_plane_0), mean, "plane 0 alone, and the mean of the 16 blocks", below=1e-12)

# %% [markdown] tags=["explain"]
# At most 64 for copies, one for grey: what the blocks share lies in plane 0 of the axis along which they are stacked (axis 0 in the code). Keeping plane 0 alone *is* the mean of the group, a non-local mean with equal
# weights. BM3D keeps whatever is large instead, also what tells the blocks apart, so that a wrong match blurs less.
#
# **Hard threshold**: a coefficient below $2.7 \sigma$ becomes 0. Noise alone passes that with probability 0.007.

# %%
keep = np.abs(coefficients) > 2.7 * sigma
filtered = inverse(np.where(keep, coefficients, 0))
passed = np.mean(np.abs(noise) > 2.7 * sigma)
print(f"kept: {keep.sum()} of {keep.size}; of pure noise {passed:.3f}")
assert abs(passed - 0.0069) < 0.0005
for name, y in {"noisy": group, "mean of the group": group.mean(axis=0), "threshold": filtered}.items():
    print(f"  {name:18} {psnr(y, clean_group):.1f} dB in this group")
assert psnr(filtered, clean_group) > psnr(mean, clean_group) + 1

every, truth = noisy_blocks[groups], clean_blocks[groups]
by_threshold = inverse(transform(every) * (np.abs(transform(every)) > 2.7 * sigma))
error_mean = np.mean((every.mean(axis=1, keepdims=True) - truth) ** 2, axis=(1, 2, 3))
error_threshold = np.mean((by_threshold - truth) ** 2, axis=(1, 2, 3))
print(f"threshold beats the mean in {np.mean(error_threshold < error_mean):.0%} of all groups")
assert np.mean(error_threshold < error_mean) > 0.75

# %%
order = np.argsort(-np.abs(transform(clean_group)).ravel())
fig, axes = plt.subplot_mosaic(
    [["n0", "n1", "n2", "n3", "c"], ["f0", "f1", "f2", "f3", "c"]],
    figsize=(9, 3.3),
    width_ratios=[1, 1, 1, 1, 3.2],
)
for n, member in enumerate((0, 5, 10, 15)):
    for row, stack in {"n": group, "f": filtered}.items():
        axes[f"{row}{n}"].imshow(stack[member], cmap="gray", vmin=0, vmax=1)
        axes[f"{row}{n}"].set_axis_off()
        axes[f"{row}{n}"].set_title(f"{'noisy' if row == 'n' else 'filtered'} {member}", fontsize=9)
axes["c"].semilogy(
    np.abs(coefficients).ravel()[order][:200], ".", color=plots.COLOURS["orange"], label="noisy"
)
axes["c"].semilogy(
    np.abs(transform(clean_group)).ravel()[order][:200], color=plots.COLOURS["blue"], label="clean"
)
axes["c"].axhline(2.7 * sigma, color=plots.COLOURS["grey"], linestyle="--", label="2.7 sigma")
axes["c"].set(xlabel="coefficient, largest clean one first", ylabel="magnitude", ylim=(1e-3, None))
axes["c"].legend(fontsize=8)
plots.show(
    fig,
    "Left: four of the sixteen blocks of a group, noisy above and filtered below. The grain is gone, the dark band "
    "at the top and the dark corner stay, and block 15, which has no dark corner, does not get one. Right: the "
    "group's coefficients, largest clean one first. The clean curve falls below 2.7 sigma after some forty "
    "coefficients; beyond, the noisy ones scatter around sigma, nearly all of them below the threshold.",
)

# %% [markdown]
# ## 8 · All groups: aggregation
#
# Blocks overlap, and a block is a member of several groups, so each pixel gets many estimates $e$. Their weighted mean is the output. A group that kept few coefficients
# kept little noise: the noise left in it has the energy $\sigma^2 N_\text{kept}$, because each kept coefficient carries $\sigma^2$. Weights are best in inverse proportion to the
# variance:
#
# $$y_i = \frac{\sum_{e \text{ at } i} \omega_e\, e}{\sum_{e \text{ at } i} \omega_e}, \qquad \omega = \frac{1}{\max(1, N_\text{kept})}$$


# %%
def aggregate(estimates, omega, groups, shape):
    """Weighted mean of all estimates (G, K, 8, 8) that fall on a pixel; omega is (G,)."""
    columns = shape[1] - 7
    corner = groups // columns * shape[1] + groups % columns  # number of the pixel at the top left
    inside = np.arange(8)[:, None] * shape[1] + np.arange(8)
    pixels = (corner[:, :, None, None] + inside).ravel()
    omega = np.broadcast_to(omega[:, None, None, None], estimates.shape).ravel()
    size = shape[0] * shape[1]
    total = np.bincount(pixels, omega * estimates.ravel(), minlength=size)
    return (total / np.bincount(pixels, omega, minlength=size)).reshape(shape)


def basic_estimate(noisy, sigma, threshold=2.7):
    groups = find_groups(noisy)
    coefficients = transform(blocks_of(noisy)[groups])
    keep = np.abs(coefficients) >= threshold * sigma
    omega = 1 / np.maximum(1, keep.sum(axis=(1, 2, 3)))
    return aggregate(inverse(np.where(keep, coefficients, 0)), omega, groups, noisy.shape)


omega = np.random.default_rng(3).uniform(1, 2, G)
ones = aggregate(np.ones((G, K, 8, 8)), omega, groups, noisy.shape)
difference(ones, np.ones(noisy.shape), "estimates of 1, any weights: the weights sum to one", below=1e-12)
difference(
    basic_estimate(noisy, sigma, threshold=0), noisy, "no threshold: the picture comes back", below=1e-12
)
basic = basic_estimate(noisy, sigma)
print(
    f"noisy {psnr(noisy, clean):.1f} dB, non-local means {psnr(ours, clean):.1f} dB, basic {psnr(basic, clean):.1f} dB"
)

# %% [markdown]
# ## 9 · The second step: Wiener
#
# The threshold is crude: all or nothing. If we knew a clean coefficient $c$, what factor $W$ would we give to the noisy one, $c + n$? The expected squared error is
#
# $$E\big[(W (c + n) - c)^2\big] = (1 - W)^2 c^2 + W^2 \sigma^2, \qquad \text{smallest for } W = \frac{c^2}{c^2 + \sigma^2}$$
#
# (the derivative, $-2 (1 - W) c^2 + 2 W \sigma^2$, is then 0). We do not know $c$, but the basic estimate is a good guess. It also finds better matches than the noisy picture.
# So: group by the basic estimate, read $c$ off its groups, apply $W$ to the noisy groups. The noise left has the energy $\sigma^2 \sum W^2$.


# %%
c = 0.15
candidates = np.linspace(0, 1, 10_001)
expected = (1 - candidates) ** 2 * c**2 + candidates**2 * sigma**2
assert abs(candidates[np.argmin(expected)] - c**2 / (c**2 + sigma**2)) < 1e-4


def final_estimate(noisy, basic, sigma):
    groups = find_groups(basic)
    c = transform(blocks_of(basic)[groups])
    W = c**2 / (c**2 + sigma**2)
    estimates = inverse(W * transform(blocks_of(noisy)[groups]))
    omega = 1 / np.sum(W**2, axis=(1, 2, 3))
    return aggregate(estimates, omega, groups, noisy.shape)


final = final_estimate(noisy, basic, sigma)
oracle = final_estimate(noisy, clean, sigma)
for name, y in {"basic": basic, "final": final, "final, guided by the clean picture": oracle}.items():
    print(f"{name:35} {psnr(y, clean):.1f} dB")
assert psnr(oracle, clean) > psnr(final, clean) > psnr(basic, clean)

spread = {}
for name, guide in {"noisy picture": noisy, "basic estimate": basic}.items():
    truth = clean_blocks[find_groups(guide)]
    spread[name] = np.mean((truth - truth[:, :1]) ** 2) / sigma**2
    print(f"clean blocks of a group, matched by the {name:14}: {spread[name]:.2f} sigma^2 from the first")
assert spread["basic estimate"] < 0.95 * spread["noisy picture"]

# %% [markdown]
# ## 10 · Side by side
#
# Two controls. The *local mean* weighs by position alone, with a Gaussian, and knows nothing about similarity. The *bilateral filter* adds the value of the single pixel, $x_j = (\text{place}, v_j)$ in the
# terms of section 1. Both get an advantage that nobody has in practice: we try several settings and take the one that is best for the *clean* picture. Non-local means keeps the setting that was best of
# three for this picture in section 5, BM3D its settings from above.


# %%
from scipy.ndimage import gaussian_filter


def bilateral(noisy, width, h):
    total, C = np.zeros(noisy.shape), np.zeros(noisy.shape)
    reach = int(np.ceil(3 * width))
    for here, there in shifts(noisy.shape, reach):
        place = (here[0].start - there[0].start) ** 2 + (here[1].start - there[1].start) ** 2
        f = np.exp(-place / (2 * width**2) - (noisy[here] - noisy[there]) ** 2 / h**2)
        total[here] += f * noisy[there]
        C[here] += f
    return total / C


def best_of(filter_, options, noisy):
    return max((filter_(noisy, *option) for option in options), key=lambda y: psnr(y, clean))


names = ("noisy", "local mean", "bilateral", "non-local means", "BM3D, basic", "BM3D, final")
scores, pictures = [], {}
for draw in range(run.draws):
    noisy = clean + sigma * np.random.default_rng(draw).standard_normal(clean.shape)
    mean = best_of(gaussian_filter, [(s,) for s in (0.7, 0.8, 0.9, 1, 1.2)], noisy)
    two_sided = best_of(bilateral, [(s, t * sigma) for s in (1, 1.5, 2) for t in (3, 4, 5, 6)], noisy)
    nlm = non_local_means(noisy, 5, 10, **same)
    basic = basic_estimate(noisy, sigma)
    results = (noisy, mean, two_sided, nlm, basic, final_estimate(noisy, basic, sigma))
    scores.append([psnr(y, clean) for y in results])
    pictures = pictures or dict(zip(names, results, strict=True))

# %%
scores = np.array(scores)
assert scores.shape == (run.draws, 6)
print(f"PSNR in dB, mean of {run.draws} draws of the noise, and the smallest gain over the line above")
for n, name in enumerate(names):
    gain = f"{(scores[:, n] - scores[:, n - 1]).min():+.1f}" if n else ""
    print(f"{name:16} {scores[:, n].mean():.1f}  {gain}")
steps = np.diff(scores, axis=1).min(axis=0)
assert (steps > (3, 0.3, 0.3, 0.2, 0.1)).all()

# %%
fig, axes = plt.subplots(2, 3, figsize=(8.4, 6))
for n, (ax, (name, y)) in enumerate(zip(axes.flat, pictures.items(), strict=True)):
    ax.imshow(y, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_title(f"{name}, {scores[0, n]:.1f} dB")
    ax.set_axis_off()
plots.show(
    fig,
    "The head of a man who looks through a video camera, six times: noisy, local mean, bilateral filter, "
    "non-local means, BM3D after one step and after two. The local mean is blurred and blotchy, the bilateral filter "
    "sharper, with blotches in the sky. Non-local means has a smooth sky, and leaves noise along strong edges such as the "
    "camera's rim, where a patch finds few equals. BM3D is clean there, too; its second step removes faint stripes of the first.",
)

# %% [markdown]
# Each idea adds something on every draw: likeness of single pixels, likeness of patches, a transform of what was found, a second look. The settings are ours, and one
# photograph is no benchmark; the order is what to keep.
#
# ## Exercises
#
# They use `D`, `v`, `crop` and `P` of section 2.

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Do not look at yourself so much (easy, 10 minutes)
#
# Section 5 shows that $f_{ii} = 1$ is out of proportion. Another cure, when $\sigma$ is not known: replace $f_{ii}$ by the largest $f_{ij}$ with $j \neq i$, and then
# divide by the sum. Take `D` and `h`, return the map.
#
# **Expect**: rows that add up to 1, in which the pixel itself has no more weight than its best match.
#
# <details><summary>Hint 1: a nudge</summary>
#
# Change $f$, not $w$: the division comes last.
#
# </details>
# <details><summary>Hint 2: the formula</summary>
#
# $f_{ij} = e^{-D_{ij}/h^2}$ for $j \neq i$, and $f_{ii} = \max_{j \neq i} f_{ij}$
#
# </details>
# <details><summary>Hint 3: part of the code</summary>
#
# `np.fill_diagonal(f, 0)`, then `np.fill_diagonal(f, f.max(axis=1))`
#
# </details>


# %% tags=["stub"]
def modest_map(D, h):
    #: solution
    f = np.exp(-D / h**2)
    np.fill_diagonal(f, 0)
    np.fill_diagonal(f, f.max(axis=1))
    return f / f.sum(axis=1, keepdims=True)
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
expected = np.zeros((N, N))
for i in range(N):
    others = np.delete(np.arange(N), i)
    f = np.exp(-D[i, others] / h**2)
    expected[i, others], expected[i, i] = f, f.max()
    expected[i] /= f.sum() + f.max()
eye = np.eye(N)
without = softmax(np.where(eye == 1, -np.inf, -D / h**2))
off = np.exp(-D / h**2) * (1 - eye)
after = w * (1 - eye) + eye * (w * (1 - eye)).max(axis=1, keepdims=True)
check(
    "Exercise 1",
    lambda: modest_map(D, h),
    expected,
    mistakes={
        "that is the map of section 2; the diagonal was not replaced": w,
        "the diagonal is 0; it must be the largest of the others": without,
        "w was changed after the division, so the rows do not add up to 1": after,
        "the exponentials are not divided by their sum over j": off + eye * off.max(axis=1, keepdims=True),
    },
)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Only the nearest (medium, 15 minutes)
#
# BM3D's grouping, used for a mean: $y_i$ is the plain mean of $v_j$ over the $K$ pixels with the smallest $D_{ij}$; the pixel itself is one of them.
#
# **Expect**: for $K = 1$, the noisy crop.
#
# <details><summary>Hint 1: a nudge</summary>
#
# `np.argsort` sorts each row and returns the numbers of the pixels.
#
# </details>
# <details><summary>Hint 2: the formula</summary>
#
# $y_i = \frac{1}{K} \sum_{j \in S_i} v_j$, with $S_i$ the first $K$ numbers of row $i$
#
# </details>
# <details><summary>Hint 3: part of the code</summary>
#
# `nearest = np.argsort(D, axis=1)[:, :K]`; then `v[nearest]` is $(N, K)$
#
# </details>


# %% tags=["stub"]
def nearest_mean(D, v, K):
    #: solution
    nearest = np.argsort(D, axis=1)[:, :K]
    return v[nearest].mean(axis=1)
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
ranked = [sorted(range(N), key=lambda j, i=i: D[i, j]) for i in range(N)]
expected = np.array([sum(v[j] for j in row[:8]) / 8 for row in ranked])
check(
    "Exercise 2",
    lambda: nearest_mean(D, v, 8),
    expected,
    mistakes={
        "these are the K farthest; a small distance means alike": np.array(
            [v[row[-8:]].mean() for row in ranked]
        ),
        "the pixel itself is missing": np.array([v[row[1:9]].mean() for row in ranked]),
        "the sum is not divided by K": 8 * expected,
        "divided by N, not by K": 8 * expected / N,
        "these are the K smallest distances; take the mean of v at their places": np.sort(D, axis=1)[
            :, :8
        ].mean(axis=1),
    },
)

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · A clip (medium, 25 minutes)
#
# `clip` has 3 noisy frames of 16 x 16; the camera moves 2 pixels to the right from one to the next. Let $j$ run over all positions of all frames, $N = 3 \cdot 16 \cdot 16$: the
# patch of 5 x 5 of each frame as feature (reflected border, divided by 5), the weights of section 5, $f = e^{-\max(D - 2\sigma^2,\, 0) / h^2}$, the result in the shape of `clip`.
#
# **Expect**: for $h = 0.5\, \sigma$ a root mean square error of 0.060; the frames one by one give 0.067. No motion has to be estimated: a pixel finds itself in the other frames
# by its patch.
#
# <details><summary>Hint 1: a nudge</summary>
#
# Only the features know of frames. Once they are $N$ rows, section 2 goes through unchanged.
#
# </details>
# <details><summary>Hint 2: the formula</summary>
#
# $i = (t H + r) W + c$, so both patches and values can be reshaped from $(T, H, W, \dots)$ without a transpose.
#
# </details>
# <details><summary>Hint 3: part of the code</summary>
#
# `padded = np.pad(clip, ((0, 0), (2, 2), (2, 2)), mode="reflect")` and `sliding_window_view(padded, (5, 5), axis=(1, 2))`
#
# </details>

# %% tags=["stub"]
clean_clip = np.stack([clean[66:82, 56 + 2 * t : 72 + 2 * t] for t in range(3)])
clip = clean_clip + sigma * np.random.default_rng(5).standard_normal(clean_clip.shape)


def clip_means(clip, h, sigma):
    #: solution
    padded = np.pad(clip, ((0, 0), (2, 2), (2, 2)), mode="reflect")
    P = sliding_window_view(padded, (5, 5), axis=(1, 2)).reshape(clip.size, 25) / 5
    D = np.sum((P[:, None] - P[None, :]) ** 2, axis=2)
    return (softmax(-np.maximum(D - 2 * sigma**2, 0) / h**2) @ clip.ravel()).reshape(clip.shape)
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
def windows(clip, border):
    border = np.pad(clip, ((0, 0), (2, 2), (2, 2)), mode=border)
    return np.array([border[t, r : r + 5, c : c + 5].ravel() for t, r, c in np.ndindex(clip.shape)])


def means(P, values=clip, taken_off=2 * sigma**2):
    d = np.sum(P**2, axis=1)[:, None] + np.sum(P**2, axis=1) - 2 * P @ P.T
    return (softmax(-np.maximum(d - taken_off, 0) / (0.5 * sigma) ** 2) @ values.ravel()).reshape(
        values.shape
    )


P_clip = windows(clip, "reflect") / 5
expected = means(P_clip)
single = np.stack([means(P, frame) for P, frame in zip(P_clip.reshape(3, 256, 25), clip, strict=True)])
alone, together = (np.sqrt(np.mean((y - clean_clip) ** 2)) for y in (single, expected))
assert (round(alone, 3), round(together, 3)) == (0.067, 0.060)
check(
    "Exercise 3",
    lambda: clip_means(clip, 0.5 * sigma, sigma),
    expected,
    mistakes={
        "each frame was filtered by itself": single,
        "2 sigma^2 was not taken off": means(P_clip, taken_off=0),
        "sigma^2 was taken off, once; the difference of two patches has twice the variance": means(
            P_clip, taken_off=sigma**2
        ),
        "the patches are not divided by 5": means(5 * P_clip),
        "divided by 25; the squared distance must be the mean over 25, so divide the patch by 5": means(
            P_clip / 5
        ),
        "the border is not reflected": means(windows(clip, "edge") / 5),
        "y has N numbers; bring it back to the shape of clip": expected.ravel(),
    },
)

# %% [markdown]
# ## What you learned
#
# - Non-local means is kernel regression whose features are patches; in non-local terms $g$ is the pixel itself, and $C$ the sum of $f$.
# - A squared distance is a dot product of vectors with two entries more. Without them a dot product looks at what is bright.
# - Two equal patches under noise are $2\sigma^2$ apart. Take that off, and $h$ can be small.
# - scikit-image's result can be reproduced up to rounding. Slow mode: a bell over the patch; fast mode: 16 of 25 pixels and a reflected window; both: a rough exponential and a cut.
# - BM3D keeps what is large in an orthonormal transform of a whole group; the mean of the group is its plane 0. Each part has a test: energy, copies, weights of one, no threshold.
#
# ## Further reading
#
# - E. A. Nadaraya: *On Estimating Regression*. Theory of Probability and Its Applications, 1964. G. S. Watson: *Smooth Regression Analysis*. Sankhyā A, 1964.
# - C. Tomasi, R. Manduchi: *Bilateral Filtering for Gray and Color Images*. ICCV 1998.
# - A. Buades, B. Coll, J.-M. Morel: *A Non-Local Algorithm for Image Denoising*. CVPR 2005.
# - K. Dabov, A. Foi, V. Katkovnik, K. Egiazarian: *Image Denoising by Sparse 3-D Transform-Domain Collaborative Filtering*. IEEE Transactions on Image Processing, 2007.
# - N. N. Schraudolph: *A Fast, Compact Approximation of the Exponential Function*. Neural Computation, 1999.
# - X. Wang, R. Girshick, A. Gupta, K. He: *Non-local Neural Networks*. CVPR 2018. Sections 2 and 3.2 name non-local means as their origin.
