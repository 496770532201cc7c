# %% [markdown]
# # 15 · Trajectories: features along the way of a point
#
# After this notebook you can
#
# - follow points through optical flow, and measure how far they end from the truth
# - separate a person's motion from the camera's, and say when that fails
# - compute histograms of gradients, of flow and of motion boundaries by hand
# - derive the Fisher vector and check it by finite differences
# - say what trajectory-pooled deep descriptors change, and what a non-local block must find that a trajectory gives it
#
# | | |
# |:--|:--|
# | What you need | notebook 11 (flow, point tracks); partial derivatives, the normal distribution |
# | Your time | 90 minutes |
# | Machine time | 30 seconds |
# | Framework | NumPy and OpenCV; PyTorch in section 8 |

# %% tags=["parameters"]
import os

profile = os.environ.get("NLUTILS_PROFILE", "quick")

# %%
from dataclasses import replace

import cv2
import matplotlib.pyplot as plt
import numpy as np
import torch

from nlutils import plots
from nlutils.course import check, difference, settings
from nlutils.torch import create_model
from nlutils.torch.models.trajectory import normalise_maps, pool_tracks
from nlutils.video import (
    Limits,
    TrajectoryClassifier,
    dense_tracks,
    describe,
    fisher,
    improved_trajectories,
    motion_levels,
    optical_flow,
    procedural,
)
from nlutils.video.descriptors import SMALL, orientation_histogram, track_shape
from nlutils.video.tracks import follow_points, sample_points

settings = settings(
    profile,
    quick=dict(train=48, test=24, gaussians=8),
    full=dict(train=240, test=120, gaussians=16),
)
plots.style()
np.set_printoptions(precision=3, suppress=True)

# %% [markdown]
# ## 1 · One point, two steps
#
# Before networks won, the best descriptions of actions in video were made by hand. *Improved dense trajectories* (Wang and Schmid 2013) follow thousands of points for 15 frames and describe what lies along their paths. We
# begin with one point in a flow field of 6 × 8 pixels: a block in rows 1 to 3 moves right by 1.5 pixels, in the second step also up by 1.
#
# A point in frame $t$ moves by the flow $w_t$ of the pixel nearest to it:
#
# $$p_{t+1} = p_t + w_t(\mathrm{round}(p_t))$$

# %%
w = np.zeros((2, 6, 8, 2), np.float32)  # T-1, H, W, (u, v)
w[0, 1:4, 0:4] = (1.5, 0)
w[1, 1:4, 1:6] = (1.5, -1)

p = np.array([1.0, 2.0])  # x, y
for t in range(2):
    x, y = np.rint(p).astype(int)
    print(f"frame {t}: p = {p}, nearest pixel ({x}, {y}), flow {w[t, y, x]}")
    p = p + w[t, y, x]
print("frame 2: p =", p)
assert p.tolist() == [4, 1]


def follow(flow, points):
    """Points (count, 2) through flow (T-1, H, W, 2): (count, T, 2), NaN once a point has left the picture."""
    H, W = flow.shape[1:3]
    path = [np.array(points, np.float32)]
    for w in flow:
        p = path[-1]
        x, y = np.rint(np.nan_to_num(p)).astype(int).T
        there = p + w[y, x]
        there[((there < 0) | (there > (W - 1, H - 1))).any(axis=1)] = np.nan
        path.append(there)
    return np.stack(path, axis=1)


start = np.array([[1, 2], [3, 2], [7, 5]])
path = follow(w, start)
assert path.shape == (3, 3, 2)
assert path[0, -1].tolist() == [4, 1]
difference(path, follow_points(start, w), "loop and nlutils")

# %% [markdown] tags=["predict"]
# The flow is smoothed first, with a *median* filter (here of 5 × 5 pixels) rather than a mean. Below, a block 6 pixels wide and a bar 2 pixels wide, both tall, move
# right by 3. What will the median make of block and bar? And the mean?

# %%
u = np.zeros((9, 16), np.float32)
u[:, 2:8] = u[:, 11:13] = 3
print("flow  ", u[4])
print("median", cv2.medianBlur(u, 5)[4])
print("mean  ", cv2.blur(u, (5, 5))[4])
assert np.array_equal(cv2.medianBlur(u, 5)[4, :10], u[4, :10])
assert (cv2.medianBlur(u, 5)[4, 10:] == 0).all()

# %% [markdown] tags=["explain"]
# The median keeps the block's border sharp, so a point at the border moves with one side or the other; the mean invents speeds that nothing has. The bar, thinner than half the filter, is outvoted: it
# rests. The limbs of small figures pay for this.
#
# ## 2 · A grid of points
#
# One point in every cell of 5 × 5 pixels, but only where it can be followed. On a plain wall all points look alike; along an edge a point could slide. Shi and Tomasi (1994) look at the matrix of
# notebook 11, section 6, summed over 3 × 3 pixels, and demand that even the *smaller* of its eigenvalues, $\lambda$, is not small:
#
# $$\lambda = \frac{a + c}{2} - \sqrt{\left(\frac{a - c}{2}\right)^2 + b^2}, \qquad \begin{pmatrix} a & b \\ b & c \end{pmatrix} = \sum \begin{pmatrix} I_x^2 & I_x I_y \\ I_x I_y & I_y^2 \end{pmatrix}$$
#
# A cell gets a point when $\lambda$ at its middle is above 0.001 of the picture's largest. All sizes and thresholds here are `nlutils`' defaults.


# %%
def grid_points(grey, step=5, quality=0.001):
    I_x, I_y = (cv2.Sobel(grey, cv2.CV_32F, *order, ksize=3) for order in ((1, 0), (0, 1)))
    a, b, c = (cv2.blur(product, (3, 3)) for product in (I_x * I_x, I_x * I_y, I_y * I_y))
    smaller = (a + c) / 2 - np.sqrt(((a - c) / 2) ** 2 + b**2)
    H, W = grey.shape
    y, x = (np.mgrid[: H // step, : W // step] * step + step // 2).reshape(2, -1)
    good = smaller[y, x] > quality * smaller.max()
    return np.stack([x, y], axis=1)[good].astype(np.float32)


clips = procedural.Actions(12, frames=17, size=(96, 128), seed=1)
clip = clips[9]
assert (clip.action, clip.camera) == ("jogging", "follows")
T, H, W, _ = clip.frames.shape
grey = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in clip.frames])
points = grid_points(grey[0])
difference(points, sample_points(grey[0], np.zeros((0, 2))), "grid by hand and nlutils")
print(f"{len(points) / ((H // 5) * (W // 5)):.0%} of the cells have structure")

edge = np.full((20, 20), 50, np.uint8)  # one straight edge, along which a point could slide
edge[:, 10:] = 200
print("points on a straight edge:", len(grid_points(edge)))
assert len(grid_points(edge)) == 0

# %% [markdown] tags=["predict"]
# ## 3 · How far from the truth?
#
# A procedural clip knows its true flow and the true place of 15 joints. We follow, for 15 steps, the six joints of the jogger that are seen all the time: with the true flow and with DIS, OpenCV's estimate, both median filtered.
# Which joints will each lose?

# %% tags=["nbval-ignore-output"]
L = 15
dis = optical_flow(clip.frames)
seen = clip.visible[: L + 1].all(axis=0)
names = [name for name, s in zip(procedural.JOINTS, seen, strict=True) if s]
assert len(names) == 6
off = {}
for name, flow in (("true flow", clip.flow), ("DIS", dis)):
    level = motion_levels(clip.frames, flow, scales=1, camera=False)[0]  # `flow`, median filtered
    path = follow(level.flow[:L], clip.joints[0, seen])
    off[name] = np.linalg.norm(path[:, L] - clip.joints[L, seen], axis=-1)
print("pixels off after 15 steps")
for joint, *values in zip(names, *off.values(), strict=True):
    print(f"{joint:15} true flow {values[0]:5.1f}   DIS {values[1]:5.1f}")
assert off["true flow"].max() < 1.5
kept_by_dis = np.isin(names, ("head", "right shoulder"))
assert off["DIS"][kept_by_dis].max() < 6 < 8 < off["DIS"][~kept_by_dis].min()

# %% [markdown] tags=["explain"]
# With the true flow every joint arrives within about a pixel. DIS keeps head and shoulder and loses elbow, wrist, knee and ankle, whose limbs are thin and fast; once off the limb, a point
# travels with the background. So tracks end after fifteen steps, and new points start in every free cell of every frame.
#
# ## 4 · The camera
#
# This camera follows the jogger, so most tracks show nothing but the camera. If the background is flat, or far, or the camera only turns,
# one *homography*, a 3 × 3 matrix $H$, takes all of it from frame to frame. Let $\langle H^{-1} q \rangle$ be the point $q$ brought back (append a 1, multiply, divide by the third number). A pixel's own motion is then
#
# $$v(p) = \langle H^{-1} (p + w(p)) \rangle - p$$


# %%
def own_motion(w, homography):
    """Flow (H, W, 2) without the camera's part."""
    y, x = np.mgrid[: w.shape[0], : w.shape[1]]
    p = np.stack([x, y], axis=-1).astype(float)
    q = np.concatenate([p + w, np.ones_like(p[..., :1])], axis=-1) @ np.linalg.inv(homography).T
    return q[..., :2] / q[..., 2:] - p


pan = np.array([[1, 0, -4.0], [0, 1, 0.5], [0, 0, 1]])
w = np.tile(np.float32([-4, 0.5]), (6, 8, 1))
w[2, 3] += (0, 3)
v = own_motion(w, pan)
print(
    "the pixel that moves:", v[2, 3], "  all others:", np.abs(np.delete(v.reshape(-1, 2), 2 * 8 + 3, 0)).max()
)
assert v.shape == (6, 8, 2)

# %% [markdown]
# Where does $H$ come from? Take corners of the picture and where the flow leads them, and let RANSAC find the homography that most of them obey within a pixel.
# The person is outvoted.


# %% tags=["nbval-ignore-output"]
def camera(grey, w, tolerance=1.0):
    here = cv2.goodFeaturesToTrack(grey, 1000, 0.0001, 3).reshape(-1, 2)
    x, y = np.rint(here).astype(int).T
    return cv2.findHomography(here, here + w[y, x], cv2.RANSAC, tolerance)[0]


def background(clip, t):  # where one homography fits the true flow to 0.03 pixels
    y, x = np.mgrid[:H, :W]
    here = np.stack([x, y], axis=-1).reshape(-1, 2)[::3].astype(float)
    truth, _ = cv2.findHomography(here, here + clip.flow[t].reshape(-1, 2)[::3], cv2.RANSAC, 0.01)
    return (np.linalg.norm(own_motion(clip.flow[t], truth), axis=-1) < 0.03) & clip.valid[t]


t = 5
print("median speed of the background, pixels a frame")
for number in (1, 6, 9, 11):
    other = clips[number]
    flow = optical_flow(other.frames[t : t + 2])[0]
    grey_t = cv2.cvtColor(other.frames[t], cv2.COLOR_RGB2GRAY)
    still = background(other, t)
    assert still.mean() > 0.5
    before, after = (
        np.median(np.linalg.norm(field[still], axis=-1))
        for field in (flow, own_motion(flow, camera(grey_t, flow)))
    )
    print(f"{other.action:8} camera {other.camera:8} before {before:4.1f}   after {after:4.2f}")
    assert after < 0.3
    assert other.camera == "stands" or before > 1.5

# %% [markdown] tags=["predict"]
# Something 108 pixels wide moves right by 2 pixels in front of a standing camera; beside it, 20 columns of background can be seen. What will RANSAC take for the background? Which columns move in the end, and how?

# %%
w = np.zeros((H, W, 2), np.float32)
w[:, 20:] = (2, 0)
v = own_motion(w, camera(grey[0], w))
print("median own motion, columns 0 to 17:", np.median(v[:, :18], axis=(0, 1)).round(1) + 0)
print("median own motion, columns 22 on:  ", np.median(v[:, 22:], axis=(0, 1)).round(1) + 0)
assert np.allclose(np.median(v[:, :18], axis=(0, 1)), (-2, 0), atol=0.05)

# %% [markdown] tags=["explain"]
# The majority is the background by definition, so what rests seems to move. The authors ran a person detector first and left its boxes out of the vote. Two more failures: a
# background without corners gives no votes, and a camera that passes things at several depths obeys no one homography.
#
# A track is kept when it moves by itself (more than a pixel in some step), does not stand still and does not jump. `dense_tracks` does all this at several scales; we take one.

# %% tags=["nbval-ignore-output"]
level = motion_levels(clip.frames, dis, scales=1)[0]
everything = dense_tracks([level], limits=Limits(least_motion=-1))
kept = dense_tracks([level])
# On the figure the true flow is not that of most pixels.
on_figure = np.linalg.norm(clip.flow - np.median(clip.flow, axis=(1, 2), keepdims=True), axis=-1) > 0.8
for name, tracks in (("all tracks", everything), ("kept", kept)):
    x, y = np.rint(np.moveaxis(tracks.positions[:, :L], -1, 0)).astype(int)
    touch = on_figure[tracks.start[:, None] + np.arange(L), y, x]  # (count, L)
    share = touch.any(axis=1).mean()
    print(
        f"{name:10} {len(tracks):4}: {touch[:, 0].mean():.0%} begin on the figure, {share:.0%} ever touch it"
    )
    assert (share > 0.6) == (tracks is kept)
assert len(kept) < 0.8 * len(everything)

fig, axes = plt.subplots(1, 2, figsize=(8.6, 3.3))
for ax, tracks, title in zip(axes, (everything, kept), ("all tracks", "kept"), strict=True):
    ax.imshow(clip.frames[0], interpolation="nearest")
    for path in tracks.where(tracks.start == 0).positions:
        ax.plot(*path.T, color=plots.COLOURS["sky"], lw=0.9)
        ax.plot(*path[0], ".", color=plots.COLOURS["orange"], markersize=4)
    ax.set(title=title, xlim=(0, W - 1), ylim=(H - 1, 0))
    ax.set_axis_off()
plots.show(
    fig,
    "The jogger with the tracks that start in frame 0, a dot where each begins. Left: long level lines to the left "
    "over the whole background, and some on the figure. Right: above its head and below its feet most are gone; those on "
    "it, and many of the background in its rows, remain.",
)

# %% [markdown]
# Most tracks that remain begin on the background; then the jogger covers their point, which moves on with the leg or arm in front.
#
# ## 5 · What lies along a track
#
# **Its shape.** The steps $\Delta p_t$ without the camera's motion, divided by the length of the path: small and large versions of one gesture look alike.
#
# $$s = \frac{(\Delta p_0, \dots, \Delta p_{L-1})}{\sum_t \lVert \Delta p_t \rVert}$$


# %%
def shape(steps):
    """Steps (L, 2) of one track to 2 L numbers."""
    return steps.ravel() / np.linalg.norm(steps, axis=1).sum()


print(shape(np.array([[3.0, 4], [0, -5]])))
shapes = np.array([shape(steps) for steps in kept.motion])
assert shapes.shape == (len(kept), 2 * L)
difference(shapes, track_shape(kept), "all tracks, by hand and nlutils", below=1e-6)

# %% [markdown]
# **Histograms.** Around the point lies a patch of 32 × 32 pixels that moves with it, in 2 × 2 cells. In each cell every pixel has a vector $(a, b)$. Its length is shared between the two nearest of 8 directions, 45° apart, counted from right towards down.
# The vector is the grey picture's gradient (HOG, what it looks like) or the flow (HOF, how it moves).


# %%
def orientations(a, b, bins=8):
    """Vectors (a, b), any number, to one histogram (bins,)."""
    a, b = np.ravel(a), np.ravel(b)
    length, place = np.hypot(a, b), np.arctan2(b, a) % (2 * np.pi) * bins / (2 * np.pi)
    lower = np.floor(place).astype(int)
    votes = np.zeros(bins)
    np.add.at(votes, lower % bins, length * (1 - place + lower))
    np.add.at(votes, (lower + 1) % bins, length * (place - lower))
    return votes


def gradient(picture):
    return (cv2.Sobel(picture, cv2.CV_32F, *order, ksize=1) for order in ((1, 0), (0, 1)))


print("(2, 0), right:               ", orientations(2, 0))
print("(1, 0.414), 22.5°, two bins: ", orientations(1, np.tan(np.pi / 8)))
ramp = 3 * np.tile(np.arange(18, dtype=np.uint8), (18, 1))  # grey rises by 3 a column
cell = [part[1:17, 1:17] for part in gradient(ramp)]  # 16 x 16 pixels, each with gradient (6, 0)
votes = orientations(*cell)
print("a cell of the ramp:          ", votes)
assert votes.tolist() == [16 * 16 * 6, 0, 0, 0, 0, 0, 0, 0]
difference(votes, orientation_histogram(*cell, 8).sum(axis=(0, 1)), "by hand and nlutils")

# %% [markdown]
# The four cells of a frame are normalised together: add 0.05 to each bin, divide by the sum, take the square root. (The 0.05 keeps noise in empty histograms small.)
# Then follow the means over frames 0 to 4, 5 to 9 and 10 to 14. The first of the three, for one track:

# %%
track = kept.where(np.arange(1))


def hog(grey, track):
    frames = []
    for step in range(5):
        x, y = np.rint(track.positions[0, step]).astype(int)
        left, top = np.clip(x - 16, 0, W - 32), np.clip(y - 16, 0, H - 32)
        gx, gy = gradient(grey[track.start[0] + step])
        cells = [np.s_[top + j : top + j + 16, left + i : left + i + 16] for i in (0, 16) for j in (0, 16)]
        h = np.concatenate([orientations(gx[cell], gy[cell]) for cell in cells]) + 0.05
        frames.append(np.sqrt(h / h.sum()))
    return np.mean(frames, axis=0)


assert hog(grey, track).shape == (2 * 2 * 8,)
difference(
    hog(grey, track), describe([level], track, ("hog",))["hog"][0, :32], "HOG by hand and nlutils", below=1e-6
)

# %% [markdown] tags=["predict"]
# HOF has a ninth bin: pixels that move by 0.4 pixels or less count 1 there and nothing elsewhere.
#
# **Motion boundaries** (MBH) take the gradient of $u$, the flow's horizontal part, and that of $v$, each with its own histogram. Three motions of a patch: everything moves by (3, −2); everything grows, $(u, v) = 0.1\,(x, y)$; everything turns, $(u, v) = 0.1\,(-y, x)$.
# In which are MBHx and MBHy empty? Which bins are full otherwise?

# %%
y, x = np.mgrid[-9:9, -9:9].astype(np.float32)
for name, (u, v) in {
    "constant": (np.full_like(x, 3), np.full_like(x, -2)),
    "growing": (0.1 * x, 0.1 * y),
    "turning": (-0.1 * y, 0.1 * x),
}.items():
    mbh = [orientations(*(part[1:17, 1:17] for part in gradient(component))) for component in (u, v)]
    print(f"{name:9}", *(f"{which} {values.round(1)}" for which, values in zip(("x", "y"), mbh, strict=True)))
    assert (np.sum(mbh) == 0) == (name == "constant")

# %% [markdown] tags=["explain"]
# Only constant motion is invisible: the derivative of a constant is 0. So MBH ignores a panning camera, and shows where a limb moves against what is behind it. Growing puts $u$ into bin 0 (right) and $v$ into bin 2 (down); turning puts $u$ into
# bin 6 (up) and $v$ into bin 0. A camera that zooms or rolls does show, unless section 4 removes it.
#
# All together: 2 × 15 numbers of shape; 8 bins, 2 × 2 cells, 3 times for HOG, MBHx and MBHy; 9 bins for HOF.

# %%
found = describe([level], kept)
widths = {name: values.shape[1] for name, values in found.items()}
print(widths, "sum", sum(widths.values()))
assert widths == {"shape": 30, "hog": 96, "hof": 108, "mbhx": 96, "mbhy": 96}
# The released files hold 466 numbers a track: 10 about it, 30 positions, then these.
assert sum(widths.values()) == 426 == 466 - 10 - 30

shifted = replace(level, motion=level.motion + np.float32([3, -2]))
moved = describe([shifted], kept)
for name in ("mbhx", "mbhy"):
    difference(found[name], moved[name], f"{name} with (3, -2) added to the motion", below=1e-4)
assert np.abs(found["hof"] - moved["hof"]).max() > 0.1

# %% [markdown]
# ## 6 · From thousands of descriptors to one vector
#
# A clip has any number of tracks; a classifier wants one vector. *Fisher vectors* (Perronnin et al. 2010) first learn what descriptors look like on average: a mixture of $K$ Gaussians with diagonal covariance over $D$ numbers, with weights $w_k$ (no longer the flow), means $\mu_k$, standard deviations $\sigma_k$,
#
# $$\log p(x) = \log \sum_k w_k\, \mathcal N(x; \mu_k, \sigma_k^2), \qquad q_k(x) = \frac{w_k\, \mathcal N(x; \mu_k, \sigma_k^2)}{p(x)}$$
#
# where $q_k(x)$ is the probability that $x$ came from Gaussian $k$.


# %%
def log_joint(X, w, mu, sigma):
    """log w_k N(x_n; k): X (N, D), w (K,), mu and sigma (K, D) to (N, K)."""
    z = (X[:, None] - mu) / sigma
    return np.log(w) - 0.5 * (z**2).sum(axis=2) - np.log(sigma * np.sqrt(2 * np.pi)).sum(axis=1)


def log_likelihood(X, w, mu, sigma):
    return np.logaddexp.reduce(log_joint(X, w, mu, sigma), axis=1).mean()


w = np.array([0.4, 0.6])
mu, sigma = np.array([[-2.0, 0], [2, 1]]), np.array([[0.8, 0.6], [0.7, 1.2]])
rng = np.random.default_rng(0)
X = np.array([-1, 0.7]) + 0.6 * rng.standard_normal((30, 2))  # the 30 descriptors of one clip
packaged = fisher.Mixture(w, mu, sigma**2)
assert log_joint(X, w, mu, sigma).shape == (30, 2)
difference(log_joint(X, w, mu, sigma), packaged.log_joint(X), "by hand and nlutils", below=1e-8)

# %% [markdown]
# Then they ask: *how would the mixture have to change to fit this clip better?* That is the gradient of the mean log-likelihood. The derivative of a logarithm puts $p(x)$ below, which turns $w_k \mathcal N$ into $q_k$; the derivative of a Gaussian gives itself times
# the derivative of its exponent (and, for $\sigma$, of its $1/\sigma$):
#
# $$\frac{\partial \log p}{\partial \mu_k} = q_k \frac{x - \mu_k}{\sigma_k^2}, \qquad \frac{\partial \log p}{\partial \sigma_k} = q_k \left( \frac{(x - \mu_k)^2}{\sigma_k^3} - \frac{1}{\sigma_k} \right)$$
#
# for each of the $D$ numbers.


# %%
def gradients(X, w, mu, sigma):
    joint = log_joint(X, w, mu, sigma)
    q = np.exp(joint - np.logaddexp.reduce(joint, axis=1, keepdims=True))[:, :, None]
    z = (X[:, None] - mu) / sigma
    return (q * z / sigma).mean(axis=0), (q * (z**2 - 1) / sigma).mean(axis=0)


to_mu, to_sigma = gradients(X, w, mu, sigma)
assert to_mu.shape == to_sigma.shape == (2, 2)
theta, numeric, h = np.stack([mu, sigma]), np.zeros((2, 2, 2)), 1e-5
for index in np.ndindex(2, 2, 2):
    nudge = np.zeros((2, 2, 2))
    nudge[index] = h
    up, down = (log_likelihood(X, w, *(theta + sign * nudge)) for sign in (1, -1))
    numeric[index] = (up - down) / (2 * h)
difference(np.stack([to_mu, to_sigma]), numeric, "formula and finite differences", below=1e-6)

fig, ax = plt.subplots(figsize=(5.4, 3.2))
circle = np.stack([f(np.linspace(0, 2 * np.pi, 100)) for f in (np.cos, np.sin)])
for k, colour in enumerate((plots.COLOURS["blue"], plots.COLOURS["green"])):
    for ellipse in (mu[k, :, None] + radius * sigma[k, :, None] * circle for radius in (1, 2)):
        ax.plot(*ellipse, color=colour, lw=1)
    arrow = dict(arrowstyle="->", color=plots.COLOURS["red"], lw=2)
    ax.annotate("", mu[k] + to_mu[k], mu[k], arrowprops=arrow)
ax.plot(*X.T, ".", color=plots.COLOURS["orange"])
ax.set(xlabel="number 0", ylabel="number 1", aspect="equal")
plots.show(
    fig,
    "Two Gaussians as ellipses of one and two standard deviations. The clip's points lie up and to the right of the left "
    "one's middle. A long arrow, the gradient, points from that middle through them; from the right one's a short arrow points left.",
)

# %% [markdown]
# Narrow and rare Gaussians have gradients of other sizes than wide and frequent ones. So each is divided by the square root of its *Fisher information*, the mean square of the gradient over the mixture's own samples. For well separated Gaussians that is $w_k / \sigma_k^2$
# for a mean and $2 w_k / \sigma_k^2$ for a standard deviation, which leaves
#
# $$\mathcal G_{\mu_k} = \frac1N \sum_n \frac{q_k(x_n)}{\sqrt{w_k}}\, \frac{x_n - \mu_k}{\sigma_k}, \qquad \mathcal G_{\sigma_k} = \frac1N \sum_n \frac{q_k(x_n)}{\sqrt{2 w_k}} \left( \frac{(x_n - \mu_k)^2}{\sigma_k^2} - 1 \right)$$


# %%
def fisher_vector(X, w, mu, sigma):
    """2 K D numbers: the K means, then the K standard deviations."""
    to_mu, to_sigma = gradients(X, w, mu, sigma)
    root = np.sqrt(w)[:, None]
    return np.concatenate([(to_mu * sigma / root).ravel(), (to_sigma * sigma / (np.sqrt(2) * root)).ravel()])


G = fisher_vector(X, w, mu, sigma)
assert G.shape == (2 * 2 * 2,)
difference(G, fisher.fisher_vector(X, packaged), "by hand and nlutils", below=1e-8)

own = rng.choice(2, 5000, p=w)
own = mu[own] + sigma[own] * rng.standard_normal((5000, 2))
single = np.array([fisher_vector(x[None], w, mu, sigma) for x in own])
print("root mean square over the mixture's own samples:", np.sqrt((single**2).mean(axis=0)).round(1))
assert np.abs(np.sqrt((single**2).mean(axis=0)) - 1).max() < 0.1


def improved(G):
    """Signed square root of each number, then length 1."""
    G = np.sign(G) * np.sqrt(np.abs(G))
    return G / np.linalg.norm(G)


print(improved(np.array([9.0, -16])))
assert np.allclose(improved(np.array([9.0, -16])), [0.6, -0.8])

# %% [markdown] tags=["predict"]
# The root keeps a few large numbers from deciding everything. Why length 1? A second clip has the same 30 descriptors and 270 that the mixture itself has drawn, as "background". What happens to $\mathcal G$? To its direction?

# %%
more = own[:270]
with_background = fisher_vector(np.concatenate([X, more]), w, mu, sigma)
cosine = with_background @ G / np.linalg.norm(with_background) / np.linalg.norm(G)
print(f"length {np.linalg.norm(G):.2f} and {np.linalg.norm(with_background):.2f}, cosine {cosine:.2f}")
assert np.linalg.norm(with_background) < 0.25 * np.linalg.norm(G)
assert cosine > 0.8

# %% [markdown] tags=["explain"]
# The gradient of the mixture's own samples is 0 on average, so the background adds only noise, and the mean divides the rest by ten. Dividing by the length takes this out.

# %% [markdown] tags=["predict"]
# ## 7 · The classifier
#
# For each of the five kinds of descriptor: PCA to half the width, a mixture, an improved Fisher vector. The five, joined, go into a linear support vector machine, one class against all others. Our clips are 45 × 60 pixels, so grid, patch and limits are smaller (`SMALL`).
# Nobody performs in both training and test.
#
# Six actions: chance is 17 %. Which kind alone will be best: shape, HOG, HOF, MBHx or MBHy?

# %% tags=["nbval-ignore-output"]
n, m = settings.train, settings.test
small = procedural.Actions(n + m, frames=16, size=(45, 60), seed=1)
labels = np.array([small.label(i) for i in range(n + m)])
assert {small.group(i) for i in range(n)}.isdisjoint({small.group(i) for i in range(n, n + m)})
described = [improved_trajectories(small.render(i), **SMALL) for i in range(n + m)]


def accuracy(kinds):
    chosen = [{kind: one[kind] for kind in kinds} for one in described]
    # `dict` only copies: our clips are described already
    classifier = TrajectoryClassifier(6, dict, gaussians=settings.gaussians, samples=5000)
    return np.mean(classifier.fit(chosen[:n], labels[:n]).predict(chosen[n:]) == labels[n:])


right = {kind: accuracy([kind]) for kind in described[0]}
right["all five"] = accuracy(list(described[0]))
for kind, share in right.items():
    print(f"{kind:9}{share:4.0%}")
assert right["all five"] > 0.6
assert max(right["mbhx"], right["mbhy"]) > right["hog"]

# %% [markdown] tags=["explain"]
# Motion boundaries beat HOG: all six actions are done by the same kind of figure, so looks say little. One of 24 test clips is 4 %.
#
# ## 8 · Pooling a network's maps instead
#
# *Trajectory-pooled deep descriptors* (TDD; Wang, Qiao and Tang 2015) keep the tracks, the Fisher vector and the classifier. HOG, HOF and MBH give way to the maps of a two-stream network, summed along the track (original scale only). First the maps are normalised, in two ways, side by side: each channel by its maximum over space and time, or each position by its maximum over channels.

# %% [markdown] tags=["predict"]
# Two channels; the second has values some 200 times as large. After which normalisation do both count alike? What does the other do to the weak channel?


# %%
def normalise(maps, kind):
    """Maps (T, C, h, w), not negative, to values from 0 to 1."""
    over = (0, 2, 3) if kind == "spatiotemporal" else (1,)
    return maps / (maps.amax(dim=over, keepdim=True) + 2.0**-52)


maps = torch.tensor([[[[1.0, 2]], [[0, 800]]], [[[4.0, 0]], [[200, 0]]]])
assert maps.shape == (2, 2, 1, 2)
for kind in ("spatiotemporal", "channel"):
    values = normalise(maps, kind)
    print(kind, *(f"  channel {c}: {values[:, c].flatten().numpy()}" for c in (0, 1)))
    difference(values, normalise_maps(maps, kind), "  by hand and nlutils")

# %% [markdown] tags=["explain"]
# After the first, both reach 1. After the second, the weak channel is nearly 0 wherever the strong one answers, and 1 where only the weak one does: it says which channel *wins* at a place.
#
# A map is smaller than the picture by a ratio $r$, here 16. A track $(p_0, \dots, p_L)$ that starts in frame $t_0$ gets, from maps $F$ of $C$ channels, the $C$ numbers
#
# $$\mathcal D = \sum_{k=0}^{L-1} F_{t_0 + k}\left(\mathrm{round}(p_k / r)\right)$$


# %%
def pool(maps, positions, start, r):
    """Maps (T, C, h, w) summed along one track: positions (L+1, 2), first frame start; (C,)."""
    h, w = maps.shape[2:]
    total = torch.zeros(maps.shape[1])
    for k, (x, y) in enumerate(positions[:-1]):
        column, row = int(np.floor(x / r + 0.5)), int(np.floor(y / r + 0.5))
        total = total + maps[start + k, :, min(row, h - 1), min(column, w - 1)]
    return total


print(pool(maps, np.array([[0, 0], [20, 3], [9, 0]]), 0, 16), "= frame 0, column 0, plus frame 1, column 1")

torch.manual_seed(0)
streams = create_model("tdd", 6, width=6).eval()  # untrained: we test the pooling
with torch.no_grad():
    pictures = torch.from_numpy(clip.frames).permute(0, 3, 1, 2) / 255
    maps = normalise(streams.spatial.maps(pictures)["conv4"], "channel")
assert maps.shape == (T, 32, H // 16, W // 16)
pooled = torch.stack([pool(maps, p, s, 16) for p, s in zip(kept.positions, kept.start, strict=True)])
assert pooled.shape == (len(kept), 32)
difference(pooled, pool_tracks(maps, kept, 16), "all tracks, loop and nlutils", below=1e-4)

# %% [markdown]
# No cells, no bins, no thirds of time. At full size (on PyTorch's *meta* device) the layers are those of the released model files. A Fisher vector has $2 K D$ numbers, with $K = 256$ Gaussians as in the authors' code and $D = 64$ numbers left by PCA, the default of `nlutils`:

# %%
with torch.device("meta"):
    full = create_model("tdd", 101)
    shapes = {
        name: tuple(values.shape[1:])
        for name, values in full.spatial.maps(torch.zeros(1, 3, 240, 320)).items()
    }
print(shapes)
assert shapes["conv4"] == shapes["conv5"] == (512, 240 // 16, 320 // 16)
count = sum(p.numel() for name, p in full.spatial.named_parameters() if name.startswith("conv"))
assert count == 14_208 + 614_656 + 1_180_160 + 2 * 2_359_808 == 6_528_640
encoder = fisher.FisherEncoder()
K, D = encoder.gaussians, encoder.components
mixture = fisher.Mixture(np.full(K, 1 / K), rng.standard_normal((K, D)), np.ones((K, D)))
size = len(fisher.fisher_vector(rng.standard_normal((10, D)), mixture))
assert size == 2 * K * D == 2 * 256 * 64 == 32_768
many = len(full.spatial_layers + full.temporal_layers) * 2
print(f"spatial stream: {count:,} parameters in convolutions; {many} Fisher vectors of {size:,} numbers")
assert many == 8

# %% [markdown] tags=["predict"]
# ## 9 · What it was worth, and what a non-local block has to find
#
# Reported, in per cent, means over three splits:
#
# | | UCF101 | HMDB51 | from |
# |:--|--:|--:|:--|
# | improved trajectories | 85.9 | 57.2 | Simonyan and Zisserman 2014, table 4 |
# | the same, larger encodings | 87.9 | 61.1 | the same table |
# | two-stream network, SVM | 88.0 | 59.4 | the same table |
# | TDD | 90.3 | 63.2 | as quoted by Wang et al. 2016 |
#
# A trajectory says *in advance* which far-apart positions belong together: $(p_0, 0), (p_1, 1), \dots$, with weight 1 each; TDD's sum is a non-local sum with the other weights 0. A non-local block (notebook 04) gets no tracks. It must
# find the partners by comparing features. Take colour patches of 9 × 9 pixels as features, and give all weight to the most similar place 8 frames later.
#
# For the jogger's head, shoulder and knee: which comes closer to the true place, the search by looks or the track?

# %% tags=["nbval-ignore-output"]
later = 8
padded = np.pad(clip.frames, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")
off = {}
for name in ("head", "right shoulder", "right knee"):
    joint = clip.joints[:, procedural.JOINTS.index(name)]
    x, y = np.rint(joint[0]).astype(int)
    patch = np.ascontiguousarray(padded[0, y : y + 9, x : x + 9])
    distance = cv2.matchTemplate(padded[later], patch, cv2.TM_SQDIFF)
    assert distance.shape == (H, W)
    row, column = np.unravel_index(distance.argmin(), (H, W))
    ends = [(column, row)] + [follow(flow[:later], joint[:1])[0, -1] for flow in (dis, clip.flow)]
    off[name] = np.linalg.norm(np.array(ends) - joint[later], axis=1)
    print(
        f"{name:15} looks {off[name][0]:5.1f}   track, DIS {off[name][1]:5.1f}   track, true flow {off[name][2]:4.1f}   pixels off"
    )
assert max(off["head"][0], off["right shoulder"][0]) < 2
assert min(off["right knee"][:2]) > 5
assert off["right knee"][2] < 1.5

# %% [markdown] tags=["explain"]
# Head and shoulder keep their looks: one comparison finds them, over any distance, and no error adds up on the way. The knee bends, so its patch is elsewhere in eight frames; only true flow leads to it, and estimated flow loses it as well. A track is fixed before learning begins, right or wrong. A non-local
# block can learn features for which the right things *are* similar, and can look at a thing that was hidden in between; but it must learn it from the labels alone.
#
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Which tracks stand still? (easy, 10 minutes)
#
# Call a track *static* when the standard deviations of its x **and** of its y are below $\sqrt 3$ pixels. Write `static(positions)`: for tracks (count, L+1, 2) a boolean each, True for static. **Expect**: True for about 70 % of the check's 200 random walks.
#
# <details><summary>Hint 1: a nudge</summary>Over which axis of (count, L+1, 2) is the spread of one track?</details>
# <details><summary>Hint 2: the formula</summary>std over time, (count, 2); static when both columns are below √3.</details>
# <details><summary>Hint 3: part of the code</summary><code>positions.std(axis=1)</code> and <code>.all(axis=1)</code></details>


# %% tags=["stub"]
def static(positions):
    #: solution
    return (positions.std(axis=1) < 3**0.5).all(axis=1)
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
walks = np.random.default_rng(3).standard_normal((200, 16, 2)).cumsum(axis=1) * (0.9, 0.7)
spread = walks.std(axis=1)
check(
    "Exercise 1",
    lambda: static(walks),
    (spread < 3**0.5).all(axis=1),
    mistakes={
        "one axis is enough here; both must be small": (spread < 3**0.5).any(axis=1),
        "that is the variance; take its root": (spread**2 < 3**0.5).all(axis=1),
        "the bound is the root of 3, not 3": (spread < 3).all(axis=1),
        "you have a boolean for each axis; both must be True": spread < 3**0.5,
        "each axis must be small, not the mean of the two": spread.mean(axis=1) < 3**0.5,
        "x and y have a deviation each; you have one for both together": walks.std(axis=(1, 2)) < 3**0.5,
        "the deviation divides by the number of positions (ddof=0)": (walks.std(axis=1, ddof=1) < 3**0.5).all(
            axis=1
        ),
        "these move along both axes; static ones are wanted": (spread > 3**0.5).all(axis=1),
        "these are the tracks that move; static ones are wanted": ~(spread < 3**0.5).all(axis=1),
        "the spread of the steps, not of the positions": (np.diff(walks, axis=1).std(axis=1) < 3**0.5).all(
            axis=1
        ),
    },
)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · A cell of HOF (medium, 15 minutes)
#
# Write `hof(u, v)`: the histogram of nine bins of a flow with parts `u`, `v` (H, W). Bins 0 to 7 are `orientations` of the pixels that move by more than 0.4, the ninth is the *number* of the others. **Expect**: for the jogger's frame 5 a ninth bin of more than ten thousand, and most other votes in bins 0 and 7.
#
# <details><summary>Hint 1: a nudge</summary>A mask splits the pixels in two; <code>orientations</code> takes any number of vectors.</details>
# <details><summary>Hint 2: the formula</summary>moving = √(u² + v²) &gt; 0.4</details>
# <details><summary>Hint 3: part of the code</summary><code>np.append(orientations(u[moving], v[moving]), …)</code></details>


# %% tags=["stub"]
def hof(u, v):
    #: solution
    moving = np.hypot(u, v) > 0.4
    return np.append(orientations(u[moving], v[moving]), np.sum(~moving))
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
u, v = np.moveaxis(own_motion(clip.flow[5], camera(grey[5], clip.flow[5])), -1, 0)
expected = orientation_histogram(u, v, 9, still=0.4).sum(axis=(0, 1))
length = np.hypot(u, v)
still = length <= 0.4
both = (np.abs(u) > 0.4) & (np.abs(v) > 0.4)
large = length**2 > 0.4
check(
    "Exercise 2",
    lambda: hof(u, v),
    expected,
    mistakes={
        "resting pixels vote for directions, too; leave them out": np.append(orientations(u, v), still.sum()),
        "the ninth bin counts pixels; you added up their lengths": np.append(
            expected[:8], length[still].sum()
        ),
        "u and v are swapped": np.append(orientations(v[~still], u[~still]), still.sum()),
        "the ninth bin counts the moving pixels": np.append(expected[:8], (~still).sum()),
        "the ninth bin is a number of pixels, not a share": np.append(expected[:8], still.mean()),
        "the ninth bin comes last": np.append(still.sum(), expected[:8]),
        "8 directions and a ninth bin; you have 9 directions": orientations(u[~still], v[~still], 9),
        "moving and resting pixels are exchanged": np.append(
            orientations(u[still], v[still]), (~still).sum()
        ),
        "compare the length with 0.4, not u and v by themselves": np.append(
            orientations(u[both], v[both]), (~both).sum()
        ),
        "take the root of u² + v² before you compare": np.append(
            orientations(u[large], v[large]), (~large).sum()
        ),
    },
    tolerance=1e-6,
)

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · The weights' share (hard, 25 minutes)
#
# The gradient with respect to the mixture's weights was left out. Let $w_k = e^{\alpha_k} / \sum_j e^{\alpha_j}$. Write `to_alpha(X, w, mu, sigma)`: the gradient of the mean log-likelihood with respect to $\alpha$, (K,). **Expect**: two numbers that sum to 0, the first positive: the clip lies nearer to Gaussian 0 than its weight says.
#
# <details><summary>Hint 1: a nudge</summary>How do ∂w_j/∂α_k look for j = k and for j ≠ k? (The softmax's derivative, notebook 04.)</details>
# <details><summary>Hint 2: the formula</summary>∂ log p / ∂α_k = q_k − w_k</details>
# <details><summary>Hint 3: part of the code</summary><code>joint = log_joint(X, w, mu, sigma)</code>, then q as in <code>gradients</code>, then the mean over n of q − w.</details>


# %% tags=["stub"]
def to_alpha(X, w, mu, sigma):
    #: solution
    joint = log_joint(X, w, mu, sigma)
    q = np.exp(joint - np.logaddexp.reduce(joint, axis=1, keepdims=True))
    return (q - w).mean(axis=0)
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
each = packaged.posteriors(X)
q, joint = each.mean(axis=0), np.exp(log_joint(X, w, mu, sigma)).mean(axis=0)
slopes = []
for nudge in 1e-5 * np.eye(2):
    sides = [np.exp(np.log(w) + sign * nudge) for sign in (1, -1)]
    up, down = (log_likelihood(X, side / side.sum(), mu, sigma) for side in sides)
    slopes.append((up - down) / 2e-5)
check(
    "Exercise 3",
    lambda: to_alpha(X, w, mu, sigma),
    np.array(slopes),
    mistakes={
        "these are the mean posteriors; the constraint that weights sum to 1 takes w off": q,
        "that is the sum over n; the mean is wanted": len(X) * (q - w),
        "you have one row for each descriptor; take the mean over them": each - w,
        "log_joint gives log w_k N; q divides w_k N by p(x)": joint - w,
        "this is the gradient with respect to w, not to alpha": q / w,
        "dw_j / d alpha_k is not 0 for j other than k": q * (1 - w),
        "the sign is turned": w - q,
    },
    tolerance=1e-5,
)

# %% [markdown]
# ## What you learned
#
# - A track follows the flow of the nearest pixel; true flow leads it to the joint, estimated flow loses thin, fast limbs.
# - One homography, voted for by corners, takes the camera's motion away, unless the person fills the picture.
# - Motion boundaries ignore constant motion, and told these actions apart better than looks did.
# - A Fisher vector is a gradient: how would the mixture change to fit this clip better?
# - A trajectory fixes in advance which positions belong together; a non-local block must find it from features.
#
# ## Further reading
#
# - H. Wang, A. Kläser, C. Schmid, C.-L. Liu: *Action recognition by dense trajectories*. CVPR 2011.
# - H. Wang, C. Schmid: *Action recognition with improved trajectories*. ICCV 2013.
# - L. Wang, Y. Qiao, X. Tang: *Action recognition with trajectory-pooled deep-convolutional descriptors*. CVPR 2015.
# - F. Perronnin, J. Sánchez, T. Mensink: *Improving the Fisher kernel for large-scale image classification*. ECCV 2010.
# - J. Shi, C. Tomasi: *Good features to track*. CVPR 1994.
# - N. Dalal, B. Triggs, C. Schmid: *Human detection using oriented histograms of flow and appearance*. ECCV 2006. Motion boundaries.
# - K. Simonyan, A. Zisserman: *Two-stream convolutional networks for action recognition in videos*. NIPS 2014.
# - L. Wang, Y. Xiong, Z. Wang, Y. Qiao, D. Lin, X. Tang, L. Van Gool: *Temporal segment networks*. ECCV 2016.
