# %% [markdown]
# # 11 · Video clips: frames, motion, groups
#
# After this notebook you can
#
# - turn a clip into the array that PyTorch or Keras expects, and recognise the one wrong way that raises no error
# - write a clip to a file, decode it, and measure what the file lost
# - choose a fixed number of frames from a clip of any length
# - derive optical flow from one equation a pixel, and measure it against the true flow
# - show how a careless split between training and test clips fakes a good result
#
# | | |
# |:--|:--|
# | What you need | notebook 00; partial derivatives, least squares |
# | Your time | 75 minutes |
# | Machine time | 20 seconds |
# | Framework | NumPy (PyAV decodes; OpenCV and scikit-image estimate motion) |

# %% tags=["parameters"]
import os

profile = os.environ.get("NLUTILS_PROFILE", "quick")

# %%
import tempfile
from itertools import pairwise
from pathlib import Path
from time import process_time

import av
import cv2
import matplotlib.pyplot as plt
import numpy as np

from nlutils import plots
from nlutils.course import check, difference, settings
from nlutils.video import (
    decode,
    describe_source,
    open_clips,
    optical_flow,
    procedural,
    sample_indices,
    segment_indices,
)
from nlutils.video.flow import warp_back

settings(profile)  # nothing varies with the profile here; an unknown one is an error
plots.style()
np.set_printoptions(precision=2, suppress=True)

# %% [markdown]
# ## 1 · A clip is an array
#
# The clips of this notebook are drawn by `nlutils`: a stick figure performs one of the six actions of the KTH data set
# (Schüldt et al. 2004) before a random background. A drawn clip has what no filmed one has: for every pixel
# the true motion, and for every joint the true place.
#
# A clip has four axes, (T, H, W, C): time, row, column, colour. The row is *y*, counted downwards, and it comes before the column *x*. So the pixel at
# place $(x, y)$ of frame $t$ is `frames[t, y, x]`.

# %%
quiet = procedural.Actions(count=24, frames=16, size=64, seed=1, noise=0)
clip = quiet[0]
frames = clip.frames
T, H, W, C = frames.shape
assert (T, H, W, C) == (16, 64, 64, 3)
assert frames.dtype == np.uint8

x, y = np.rint(clip.joints[0, procedural.JOINTS.index("pelvis")]).astype(int)
print(f"{clip.action}, the camera {clip.camera}; the pelvis of frame 0 is at x = {x}, y = {y}")
print("bytes in memory:", frames.nbytes)

shown = [0, 8, 15]
fig, axes = plots.strip(frames[shown], [f"t = {t}" for t in shown])
for ax, points in zip(axes, clip.joints[shown], strict=True):
    ax.plot(*points.T, ".", color=plots.COLOURS["orange"], markersize=4)
plots.show(
    fig, "Three frames of a jogging figure that crosses the picture to the right, its 15 joints marked."
)

# %% [markdown]
# ## 2 · Two layouts
#
# A network sees a batch of B clips. PyTorch wants colour before time, (B, C, T, H, W); Keras keeps colour last,
# (B, T, H, W, C). Both want floats.

# %%
batch = np.stack([quiet.render(0), quiet.render(1)]).astype(np.float32) / 255
for_keras = batch
for_pytorch = batch.transpose(0, 4, 1, 2, 3)
assert for_keras.shape == (2, T, H, W, C)
assert for_pytorch.shape == (2, C, T, H, W)
assert for_pytorch[1, 2, 5, y, x] == for_keras[1, 5, y, x, 2]

# %% [markdown] tags=["predict"]
# `batch.reshape(2, C, T, H, W)` has the right shape, too. Is it the same array? If not: what will its frame 0 look like?

# %%
reshaped = batch.reshape(2, C, T, H, W)
assert reshaped.shape == for_pytorch.shape
difference(reshaped, for_pytorch, "reshape against transpose")

fig, axes = plots.strip(
    [for_pytorch[0, 0, 0], reshaped[0, 0, 0], reshaped[0, 0, 1]],
    ["transpose, t = 0", "reshape, t = 0", "reshape, t = 1"],
    width=2,
)
plots.show(
    fig,
    "Three grey pictures. Left: the jogger of frame 0. Middle and right, after reshape: stripes, in which the top of a "
    "figure three times as tall appears, and in the next picture its middle.",
)

# %% [markdown] tags=["explain"]
# `reshape` moves no number. It reads the old order, red, green and blue of one pixel after the other, as if they were
# neighbours in a row: hence the stripes, and a frame that holds a third of the old one, three times as tall. No error is raised, and a network still learns a little from such pictures. A test like the last `assert` above,
# on a single element, finds the mistake at once.

# %% [markdown]
# ## 3 · Files
#
# A file does not hold the frames. It holds instructions that rebuild something close to them. Let us write our clip as H.264, the format of most
# clips on the web, and decode it.

# %%
temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)


def write(path, frames, codec="libx264", **options):
    """Encode frames (T, H, W, 3) at 15 a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=15, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())  # what the encoder still holds back


write(folder / "clip.mp4", frames)
decoded = decode(folder / "clip.mp4")
assert decoded.shape == frames.shape

# %% [markdown] tags=["predict"]
# The frames are 196,608 bytes in memory. How many times smaller is the file: 3, 30 or 300 times? And are the decoded frames
# equal to those that went in? The usual measure of the loss is the peak signal-to-noise ratio, in decibels:
#
# $$\mathrm{PSNR} = 10 \log_{10} \frac{255^2}{\mathrm{MSE}}$$


# %% tags=["nbval-ignore-output"]
def psnr(a, b):
    mse = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return 10 * np.log10(255**2 / mse)


size = (folder / "clip.mp4").stat().st_size
print(f"{frames.nbytes} bytes became {size}: {frames.nbytes / size:.0f} times fewer")
print(f"PSNR {psnr(frames, decoded):.1f} dB; equal pixels: {np.mean((frames == decoded).all(axis=-1)):.0%}")
assert 10 < frames.nbytes / size < 100
assert 28 < psnr(frames, decoded) < 50

loss = np.abs(frames[6].astype(int) - decoded[6])
fig, axes = plots.strip(
    [frames[6], decoded[6], np.clip(8 * loss, 0, 255).astype(np.uint8)],
    ["drawn", "decoded", "8 x difference"],
    width=2,
)
plots.show(
    fig,
    "A frame before and after the file, nearly alike; their difference is bright along the figure's coloured edges.",
)

# %% [markdown] tags=["explain"]
# Some thirty to sixty times. Hardly a pixel survives exactly: the file keeps colour at half the resolution, so the coloured edges suffer most, and what remains is rounded as coarsely as the
# encoder dares. Therefore a result should say which files it saw: a clip that was compressed twice is another data set.
#
# ### Do not ask the header
#
# A file's header says how many frames follow. Nothing forces it to be right. Below we change four bytes of a file: its frames stay as they
# are, its header lies. (The originals of J-HMDB say 48 frames where 40 can be decoded.)

# %%
write(folder / "clip.avi", frames, codec="mpeg4")
content = bytearray((folder / "clip.avi").read_bytes())
place = content.index(b"strh") + 8 + 32  # the stream's length in frames, 4 bytes, lowest first
content[place : place + 4] = (48).to_bytes(4, "little")
(folder / "liar.avi").write_bytes(content)

with av.open(str(folder / "liar.avi")) as container:
    print("the header says:", container.streams.video[0].frames)
print("decoded:        ", len(decode(folder / "liar.avi")))
assert len(decode(folder / "liar.avi")) == T

# %% [markdown]
# ## 4 · The same number of frames from every clip
#
# A batch needs clips of one length; files come with any. The plain case: take `n` frames, `stride` apart, from the middle.


# %%
def centre(length, n, stride):
    window = (n - 1) * stride + 1
    return (length - window + 1) // 2 + stride * np.arange(n)


print(centre(40, 8, stride=2))
assert np.array_equal(centre(40, 8, 2), sample_indices(40, 8, stride=2))

# %% [markdown] tags=["predict"]
# What should happen to a clip of 5 frames when 8 are wanted with stride 2? What does `centre` do?

# %%
print("centre:        ", centre(5, 8, stride=2))
print("sample_indices:", sample_indices(5, 8, stride=2))
rng = np.random.default_rng(0)
for _ in range(3):
    print("random:        ", sample_indices(40, 8, stride=2, position="random", rng=rng))
assert centre(5, 8, 2).min() < 0
assert centre(5, 8, 2).max() >= 5

# %% [markdown] tags=["explain"]
# `centre` gives indices outside the clip. NumPy takes the negative ones from the *end* without a word, and raises an IndexError only for 5, 7 and 9.
# `sample_indices` spreads over the whole clip instead and repeats frames. Training draws a random window each time, so that one clip becomes many; testing
# takes a fixed one, or the mean over several.
#
# ## 5 · Differences of frames, and two cameras
#
# What moves changes the picture. The cheapest motion input is the difference $D_t = I_{t+1} - I_t$ of grey frames. In half of the procedural clips the camera stands, in the other half it follows
# the person. (Where the person would leave the picture, a standing camera turns, too; and every camera shakes a little, as in a hand.) From here on the camera has noise, 2 grey levels, as every camera has some.

# %% [markdown] tags=["predict"]
# Here the same person jogs twice: once the camera stands, once it follows. In which of the two is the figure easier to see in $D_t$, and why?

# %%
actions = procedural.Actions(count=24, frames=16, size=64, seed=1)
stands, follows = actions[0], actions[9]
assert (stands.action, follows.action) == ("jogging", "jogging")
assert (stands.camera, follows.camera) == ("stands", "follows")

t = 6
rows = [
    (grey[t], grey[t + 1] - grey[t]) for grey in (stands.frames.mean(axis=-1), follows.frames.mean(axis=-1))
]
fig, axes = plt.subplots(1, 4, figsize=(8, 2.2))
for k, (picture, D) in enumerate(rows):
    axes[2 * k].imshow(picture, cmap="gray", interpolation="nearest")
    axes[2 * k + 1].imshow(D, cmap="gray", vmin=-60, vmax=60, interpolation="nearest")
for ax, title in zip(
    axes, ["camera stands", "its difference", "camera follows", "its difference"], strict=True
):
    ax.set_title(title, fontsize=9)
    ax.set_axis_off()
plots.show(
    fig,
    "Two joggers and their frame differences. With the standing camera the difference is grey but for the figure; with the "
    "following camera the whole background shows, and the figure's trunk nearly vanishes.",
)

for c in (stands, follows):
    change = np.abs(np.diff(c.frames.mean(axis=-1), axis=0))
    print(f"camera {c.camera:8} median change of a pixel, in grey levels: {np.median(change):.0f}")
camera = np.median(follows.flow, axis=(1, 2))  # (T-1, 2): the motion of most pixels
print("the followed background moves by", np.rint(camera[:, 0]).astype(int), "pixels a frame")
assert (camera[2:-2, 0] < -1).all()

# %% [markdown] tags=["explain"]
# Before the standing camera. A difference says *that* something changed, not what moved where: with a following camera nearly everything changes, the trunk least of all. We need the motion itself.
#
# ## 6 · Optical flow from one equation
#
# A point of the scene at $(x, y)$ in frame $t$ is at $(x + u, y + v)$ in frame $t + 1$, and looks the same there:
# $I(x + u, y + v, t + 1) = I(x, y, t)$. For a small step a first-order Taylor expansion turns this *brightness constancy* into
#
# $$I_x u + I_y v + I_t = 0$$
#
# with the derivatives along $x$, $y$ and $t$. We take a clip with little motion and look at one pixel of its background, which moves because the camera shakes.

# %%
clip, t = actions[8], 11  # hand clapping
I0, I1 = clip.frames[t].mean(axis=-1), clip.frames[t + 1].mean(axis=-1)  # grey, (H, W)
I_y, I_x = np.gradient((I0 + I1) / 2)  # in the middle of the step
I_t = I1 - I0
assert I_x.shape == I_y.shape == I_t.shape == (H, W)

x, y = 32, 8
u, v = clip.flow[t, y, x]
print(f"true motion at ({x}, {y}):  u = {u:.1f}, v = {v:.1f}")
print(f"change of the pixel:       I_t = {I_t[y, x]:.0f}")
print(f"change that motion makes: -(I_x u + I_y v) = {-(I_x[y, x] * u + I_y[y, x] * v):.0f}")

# %% [markdown]
# The motion explains the change, but for noise. The other way round is harder: we know $I_x, I_y, I_t$ and want $u$ and $v$, two unknowns from one
# equation. Every $(u, v)$ on a straight line would do (the *aperture problem*). Lucas and Kanade (1981) let all pixels of a window vote and assume
# that they move together: each brings its line.

# %%
side = 7
window = np.s_[y - side // 2 : y + side // 2 + 1, x - side // 2 : x + side // 2 + 1]
gx, gy, gt = (derivative[window].ravel() for derivative in (I_x, I_y, I_t))
assert gx.shape == (49,)

fig, ax = plt.subplots(figsize=(3.8, 3.3))
grid = np.linspace(-2, 2, 2)
for k in range(0, 49, 5):
    steep = abs(gx[k]) > abs(gy[k])
    line = (-(gt[k] + gy[k] * grid) / gx[k], grid) if steep else (grid, -(gt[k] + gx[k] * grid) / gy[k])
    ax.plot(*line, color=plots.COLOURS["sky"], lw=0.8)
ax.plot(u, v, "o", color=plots.COLOURS["red"], label="true (u, v)")
ax.set(xlim=(-2, 0.5), ylim=(-1.5, 1), xlabel="u", ylabel="v", aspect="equal")
ax.legend(loc="upper right")
plots.show(
    fig,
    "Ten straight lines in the plane of u and v, one for every fifth pixel of the window; most pass close to a dot, the true motion.",
)

# %% [markdown]
# No point lies on all lines. Least squares takes the one with the smallest sum of squared residuals (what is left of the zeros), $\sum (I_x u + I_y v + I_t)^2$ over the window. Setting its two derivatives to zero gives
#
# $$\begin{pmatrix} \sum I_x^2 & \sum I_x I_y \\ \sum I_x I_y & \sum I_y^2 \end{pmatrix} \begin{pmatrix} u \\ v \end{pmatrix} = -\begin{pmatrix} \sum I_x I_t \\ \sum I_y I_t \end{pmatrix}$$

# %%
xx, xy, yy = (gx * gx).sum(), (gx * gy).sum(), (gy * gy).sum()
xt, yt = (gx * gt).sum(), (gy * gt).sum()
d = xx * yy - xy * xy
by_hand = np.array([xy * yt - yy * xt, xy * xt - xx * yt]) / d

library = np.linalg.lstsq(np.stack([gx, gy], axis=1), -gt)[0]
difference(by_hand, library, "by hand against numpy.linalg.lstsq")
print(f"estimated u = {by_hand[0]:.1f}, v = {by_hand[1]:.1f};  true u = {u:.1f}, v = {v:.1f}")
assert np.hypot(*(by_hand - (u, v))) < 0.1


# %%
def lucas_kanade(I0, I1, side=7):
    # The same for every pixel: the mean over a window is a blur.
    I_y, I_x = np.gradient((I0 + I1) / 2)
    I_t = I1 - I0
    xx, xy, yy, xt, yt = (
        cv2.blur(p, (side, side)) for p in (I_x * I_x, I_x * I_y, I_y * I_y, I_x * I_t, I_y * I_t)
    )
    d = xx * yy - xy * xy
    return np.stack([(xy * yt - yy * xt) / d, (xy * xt - xx * yt) / d], axis=-1)


everywhere = lucas_kanade(I0, I1)
assert everywhere.shape == (H, W, 2)
difference(everywhere[y, x], by_hand, "the same pixel")

# %% [markdown] tags=["predict"]
# One pixel of background came out within 0.1 pixel. The right wrist moves by 4 pixels from this frame to the next. Will the estimate there be too short, too long, or about right?

# %%
wx, wy = np.rint(clip.joints[t, procedural.JOINTS.index("right wrist")]).astype(int)
true, found = clip.flow[t, wy, wx], everywhere[wy, wx]
print(f"wrist, true:  u = {true[0]:.1f}")
print(f"wrist, found: u = {found[0]:.1f}")
assert abs(found[0]) < abs(true[0]) / 2

# %% [markdown] tags=["explain"]
# Far too short, for two reasons. The window of 49 pixels holds the hand, the chest and the background, which do not move together. And a step of 4 pixels is longer than a
# hand is wide: the Taylor expansion looks at the slope of the wrong thing. Better methods work from coarse to fine, on smaller pictures first, and correct step by
# step. `optical_flow` has three: *DIS*, which searches for each patch of 8 x 8 pixels; *Farnebäck's*, which fits a parabola around every pixel; and *TV-L1*, which has no window at
# all. It seeks all motions at once, and pays for each change of grey value along a motion and for each difference between the motions of neighbours. Both prices are absolute values,
# not squares (L1; the second is called *total variation*, TV): a sharp border in the flow then costs no more than a gradual one. The first two-stream networks (notebook 14) saw flow by the
# method of Brox et al.; those released with TDD (notebook 15) and I3D saw TV-L1.
#
# To compare them we need the *end-point error*, the mean distance between estimated and true motion over the set $\Omega$ of pixels whose motion can be seen:
#
# $$\mathrm{EPE} = \frac{1}{|\Omega|} \sum_{p \in \Omega} \lVert w(p) - w^{*}(p) \rVert$$
#
# $\Omega$ leaves out pixels that are hidden in the next frame, and edges, where one pixel shows two motions (`clip.valid`). For comparison, *still* says that nothing moves.


# %%
def end_point_error(w, w_true, valid):  # nlutils.video.flow has it, too
    return np.linalg.norm(w - w_true, axis=-1)[valid].mean()


METHODS = {
    "still": lambda clip: np.zeros_like(clip.flow),
    "LK": lambda clip: np.stack([lucas_kanade(*pair) for pair in pairwise(clip.frames.mean(axis=-1))]),
    "Farnebäck": lambda clip: optical_flow(clip.frames, "farneback"),
    "DIS": lambda clip: optical_flow(clip.frames, "dis"),
    "TV-L1": lambda clip: optical_flow(clip.frames, "tvl1"),
}
# %% tags=["nbval-ignore-output"]
optical_flow(clip.frames[:2], "tvl1")  # the first call imports scikit-image, which should not be timed

compared = [actions[number] for number in (8, 11, 9, 1)]
w, errors, ms = {}, {}, {}
print(" " * 10, *(f"{c.action:>12}" for c in compared))
print("camera    ", *(f"{c.camera:>12}" for c in compared), "   ms a frame")
for name, estimate in METHODS.items():
    start = process_time()
    w[name] = [estimate(c) for c in compared]
    ms[name] = 1000 * (process_time() - start) / (len(compared) * (T - 1))
    errors[name] = [end_point_error(e, c.flow, c.valid) for e, c in zip(w[name], compared, strict=True)]
    print(f"{name:10}", *(f"{e:12.2f}" for e in errors[name]), f"{ms[name]:12.1f}")

best, others = [("DIS", "TV-L1"), ("still", "LK", "Farnebäck")]
assert (np.max([errors[k] for k in best], axis=0) < np.min([errors[k] for k in others], axis=0)).all()
assert np.mean(errors["TV-L1"]) < np.mean(errors["DIS"])
assert ms["TV-L1"] > 5 * ms["DIS"]

# %%
c, t = compared[1], 6
moves = np.linalg.norm(c.flow[t] - np.median(c.flow[t], axis=(0, 1)), axis=-1) > 0.3
shade = np.where(moves, 0.4, 0.95)  # the walker, darker
grid = np.arange(4, 64, 5)
fig, axes = plt.subplots(1, 5, figsize=(9.6, 2.1))
for ax, name, field in zip(axes, ("true", "LK"), (c.flow[t], w["LK"][1][t]), strict=False):
    ax.imshow(shade, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    arrows = np.moveaxis(field[4::5, 4::5], -1, 0)
    ax.quiver(grid, grid, *arrows, angles="xy", scale_units="xy", scale=0.4, width=0.008)
    ax.set_title(f"motion, {name}", fontsize=9)
for ax, name in zip(axes[2:], ("LK", "DIS", "TV-L1"), strict=True):
    error = np.where(c.valid[t], np.linalg.norm(w[name][1][t] - c.flow[t], axis=-1), np.nan)
    image = ax.imshow(error, cmap=plt.get_cmap("cividis", 6), vmin=0, vmax=3, interpolation="nearest")
    ax.set_title(f"error, {name}", fontsize=9)
for ax in axes:
    ax.set_axis_off()
fig.colorbar(image, ax=axes[4], label="pixels")
plots.show(
    fig,
    "A walker with arrows of motion: true, and by Lucas and Kanade; the background moves left. Then the errors of Lucas and Kanade, DIS and TV-L1. "
    "White, most of the figure, is not valid. Around it the first error is large, that of DIS small but for a strip at the back, that of TV-L1 smaller.",
)

# %% [markdown] tags=["predict"]
# DIS and TV-L1 beat the other three on all four clips. TV-L1 is the better of the two on average, at many times the cost (last column), so the notebooks use DIS. Now a jogger before a camera that stands. Will the two beat
# *still* there, too?

# %% tags=["nbval-ignore-output"]
fields = {name: estimate(stands) for name, estimate in METHODS.items()}
slow = stands.valid & (np.linalg.norm(stands.flow, axis=-1) < 1)
on_all, on_slow = (
    {name: end_point_error(field, stands.flow, mask) for name, field in fields.items()}
    for mask in (stands.valid, slow)
)
print("all valid pixels  ", *(f"{name} {e:.2f}  " for name, e in on_all.items()))
print("those below 1 px  ", *(f"{name} {e:.2f}  " for name, e in on_slow.items()))
print(f"{slow.sum() / stands.valid.sum():.0%} of the valid pixels move by less than 1")
assert on_all["TV-L1"] < on_all["still"] < on_all["DIS"]
assert on_slow["still"] < on_slow["TV-L1"] < on_slow["DIS"]
assert slow.sum() > 0.9 * stands.valid.sum()

without_noise = end_point_error(optical_flow(quiet[0].frames), stands.flow, stands.valid)
print(f"DIS without the camera's noise: {without_noise:.2f}")
assert without_noise < on_all["still"]

# %% [markdown] tags=["explain"]
# DIS loses, and TV-L1 wins narrowly. Nine of ten pixels move by less than one pixel: they are background, which only the camera's shake moves. *Still* is nearly right about them, while DIS reads a little motion into the camera's noise at each; without
# noise it would win. TV-L1 reads less, because differences between neighbours have a price. A mean over all pixels is mostly about the background, which
# is the wrong question when we care for the person; exercise 2 asks the right one. (The background also shares the camera's motion. Action networks therefore often see flow without its mean or median: `optical_flow(..., subtract_median=True)`.)
#
# ## 7 · Point tracks
#
# A track follows one point through the clip: $p_{t+1} = p_t + w_t(p_t)$. We start at a joint of frame 0 and read the flow at the nearest pixel.


# %%
def track(flow, p):
    path = [np.asarray(p, dtype=float)]
    for w in flow:
        x, y = np.clip(np.rint(path[-1]), 0, (W - 1, H - 1)).astype(int)
        path.append(path[-1] + w[y, x])
    return np.array(path)


def lost(flow, clip, name):
    """How far from the true joint the track ends, in pixels."""
    joint = clip.joints[:, procedural.JOINTS.index(name)]
    return np.linalg.norm(track(flow, joint[0])[-1] - joint[-1])


assert track(clip.flow, (10, 10)).shape == (T, 2)

# %% [markdown] tags=["predict"]
# With the *true* flow, will the track of each joint end on that joint? And with DIS: which is harder, the head or a wrist?

# %% tags=["nbval-ignore-output"]
ends = {}
for c in (actions[5], follows):
    estimated = optical_flow(c.frames)
    for name in ("head", "left wrist", "left ankle"):
        true, dis = ends[c.action, name] = lost(c.flow, c, name), lost(estimated, c, name)
        print(f"{c.action:10} {name:10}  true flow {true:3.0f}   DIS {dis:3.0f}   pixels off")
assert ends["handwaving", "left wrist"][0] < 0.5 < ends["handwaving", "left wrist"][1]
assert ends["jogging", "left ankle"][0] > 5
assert ends["jogging", "head"][1] > ends["jogging", "left wrist"][1]

joint = procedural.JOINTS.index("left ankle")
way = follows.joints[:, joint]
print(
    "pixels off, frame by frame:",
    np.rint(np.linalg.norm(track(follows.flow, way[0]) - way, axis=1)).astype(int),
)
print("the ankle is hidden in frame", np.flatnonzero(~follows.visible[:, joint]))
assert not follows.visible[14, joint]

# %% [markdown] tags=["explain"]
# The true flow leads to the waver's joints, which nothing hides. The jogger's left ankle passes behind the other leg in frame 14. There its pixel shows the *other* leg, and the track goes on with that.
# Flow joins two frames; it does not know what a thing is. DIS loses the waver's wrist, which is small and fast, and keeps the head. For the jogger
# it is the other way round: the head ends further off than the wrist, because an error made once is carried along to the end and may grow or, by luck, shrink. Improved dense trajectories therefore stop after 15 frames and start anew.
#
# ## 8 · Groups, or how to fool yourself
#
# Clips of one film or one person look alike. We call such clips a *group*. Suppose that, as on the web, each person is seen doing one thing only: 24
# people, 2 clips each. The classifier sees no motion at all. It takes the colour of shirt and trousers in *one frame* and answers with the
# action of the clip whose colours are nearest.

# %%
people = procedural.Actions(count=24 * 12, frames=1, size=48, seed=0)
chosen = [i for i in range(len(people)) if people.label(i) == people.group(i) % 6]
label = np.array([people.label(i) for i in chosen])
group = np.array([people.group(i) for i in chosen])
assert (len(chosen), len(set(group))) == (48, 24)


def clothes(clip):
    """Colour at the middle of the trunk and of the left thigh, in frame 0."""
    joint = dict(zip(procedural.JOINTS, clip.joints[0], strict=True))
    places = (joint["neck"] + joint["pelvis"]) / 2, (joint["left hip"] + joint["left knee"]) / 2
    corners = [np.rint(place).astype(int) - 1 for place in places]
    return np.concatenate([clip.frames[0, y : y + 3, x : x + 3].mean(axis=(0, 1)) for x, y in corners])


features = np.array([clothes(people[i]) for i in chosen])
distance = np.linalg.norm(features[:, None] - features, axis=-1)
assert distance.shape == (48, 48)

# %% [markdown] tags=["predict"]
# Guessing is right once in 6. How often is this classifier right when each clip is tested against the 47 others? And when the clips of the same person are left out, too?


# %%
def accuracy(allowed):
    nearest = np.where(allowed, distance, np.inf).argmin(axis=1)
    return np.mean(label[nearest] == label)


other_clip = ~np.eye(48, dtype=bool)
other_person = group[:, None] != group
print(f"other clips:   {accuracy(other_clip):.0%}")
print(f"other persons: {accuracy(other_person):.0%}")
assert accuracy(other_clip) > 0.7
assert accuracy(other_person) < 0.25

# %% [markdown] tags=["explain"]
# Four of five against fewer than one of six, and the first number says nothing about actions: it recognises trousers. Every clip here
# therefore has a `group`, and five *folds* share no group: train on four, test on the fifth, five times. `split` does it.
#
# ## 9 · Your clips
#
# `open_clips()` opens the clips that this machine has: real ones where they were fetched, else procedural ones. From here on the text holds for
# either, and the numbers are those of your clips. Real clips have no true flow. One thing can be read off all the same: the median motion
# of a frame is mostly the camera's, and what differs from it is mostly the person's. We look at six classes at most.

# %%
clips = open_clips()
print(describe_source())
print(clips.source)
print(len(clips), "clips of", len(clips.classes), "classes;", len(clips.faults), "left out")
for fold in sorted({clip.fold for clip in clips.clips}):
    train, test = clips.split(fold)
    assert not {clip.group for clip in train} & {clip.group for clip in test}
    print(f"fold {fold}: train on {len(train)}, test on {len(test)}")

# %% tags=["nbval-ignore-output"]
first = {clip.label: clip for clip in reversed(clips.clips)}
examples = [first[label] for label in sorted(first)[:6]]
videos = [example.frames() for example in examples]
print("class           frames  height x width   camera   rest  (pixels a frame)")
for example, video in zip(examples, videos, strict=True):
    w = optical_flow(video[sample_indices(len(video), 16)])
    camera = np.median(w, axis=(1, 2), keepdims=True)
    pace, rest = np.linalg.norm(camera, axis=-1).mean(), np.linalg.norm(w - camera, axis=-1).mean()
    size = f"{video.shape[1]:6} x {video.shape[2]:<5}"
    print(f"{clips.classes[example.label]:15} {len(video):6}  {size} {pace:8.1f} {rest:6.1f}")

fig, axes = plt.subplots(2, 6, figsize=(7.2, 2.8))
for ax in axes.flat:
    ax.set_axis_off()
for place, (example, video) in enumerate(zip(examples, videos, strict=True)):
    for ax, index in zip(axes[:, place], segment_indices(len(video), 2), strict=True):
        width = min(90, 9 * video.shape[2] // 16)
        size = (width, width * video.shape[1] // video.shape[2])
        ax.imshow(cv2.resize(video[index], size, interpolation=cv2.INTER_AREA), interpolation="nearest")
    axes[0, place].set_title(clips.classes[example.label], fontsize=9)
plots.show(fig, "Two frames each of " + ", ".join(clips.classes[example.label] for example in examples) + ".")

# %% [markdown]
# With real clips four things change: lengths differ, so section 4 is needed; the camera moves in ways of its own; parts of the body are out of the picture; and even
# a second or two of film can hold several motions, of which the label names one.
#
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · One frame from every part (easy, 10 minutes)
#
# `sample_indices` with a stride sees a part of a long clip. Temporal segment networks cut the *whole* clip into n equal segments and take the middle frame of each. Write it for any length: segment $k$ goes from
# $k L / n$ to $(k + 1) L / n$; take its middle and round down. **Expect**: for L = 40 and n = 8 the indices 2, 7, 12, …, 37.
#
# <details><summary>Hint 1: a nudge</summary>Where is the middle of segment 0 when L = 40 and n = 8? And of segment 1?</details>
# <details><summary>Hint 2: the formula</summary>The middle of segment k is (k + 1/2) · L / n.</details>
# <details><summary>Hint 3: part of the code</summary><code>(np.arange(n) + 0.5) * length / n</code>, and then <code>.astype(int)</code>.</details>


# %% tags=["stub"]
def middles(length, n):
    #: solution
    return ((np.arange(n) + 0.5) * length / n).astype(int)
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
k = np.arange(8)
check(
    "Exercise 1",
    lambda: middles(43, 8),
    segment_indices(43, 8),
    mistakes={
        "these are the first frames of the segments, not their middles": (k * 43 / 8).astype(int),
        "rounded to the nearest; round down": np.rint((k + 0.5) * 43 / 8).astype(int),
        "the length was divided in whole numbers, so the end of the clip is lost": k * (43 // 8)
        + (43 // 8) // 2,
        "these run from the first frame to the last": np.linspace(0, 42, 8).astype(int),
    },
)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Ask about the person (medium, 15 minutes)
#
# Section 6 found that *still* beats DIS on the jogger before a standing camera, `stands`. Repeat the comparison over those valid pixels only whose *true* motion is longer than
# 2 pixels. Return the two end-point errors, *still* first. **Expect**: DIS below two thirds of *still*.
#
# <details><summary>Hint 1: a nudge</summary><code>end_point_error</code> takes any mask of pixels, not only <code>valid</code>.</details>
# <details><summary>Hint 2: the formula</summary>Ω = pixels that are valid and have ‖w*‖ &gt; 2.</details>
# <details><summary>Hint 3: part of the code</summary><code>fast = clip.valid &amp; (np.linalg.norm(clip.flow, axis=-1) &gt; 2)</code></details>


# %% tags=["stub"]
def errors_on_the_person(clip, dis):
    #: solution
    fast = clip.valid & (np.linalg.norm(clip.flow, axis=-1) > 2)
    return end_point_error(np.zeros_like(clip.flow), clip.flow, fast), end_point_error(dis, clip.flow, fast)
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
dis = optical_flow(stands.frames)
speed = np.linalg.norm(stands.flow, axis=-1)


def both(mask):
    return tuple(end_point_error(w, stands.flow, mask) for w in (np.zeros_like(dis), dis))


expected = both(stands.valid & (speed > 2))
assert expected[1] < 2 / 3 * expected[0]
check(
    "Exercise 2",
    lambda: errors_on_the_person(stands, dis),
    expected,
    mistakes={
        "hidden pixels and edges are in; use clip.valid as well": both(speed > 2),
        "this is the mean over all valid pixels": both(stands.valid),
        "fast pixels were chosen by the estimate, not by the truth": both(
            stands.valid & (np.linalg.norm(dis, axis=-1) > 2)
        ),
        "the two errors are swapped": expected[::-1],
    },
)

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · Correct, step by step (hard, 25 minutes)
#
# Clip 6 is a runner; the camera follows, and the background moves by 5 pixels a frame. At (50, 14) even a window of 15 x 15 pixels finds too little. So bring the second picture back by
# the motion found so far, $w$, estimate the motion that is *left* there, add it to $w$, and repeat. Start with $w = 0$. **Expect**: after 1 round an error of more than 3 pixels, after 4
# rounds less than 0.1.
#
# <details><summary>Hint 1: a nudge</summary>When w is right, the picture that was brought back equals the first one in the window, and nothing is left to add.</details>
# <details><summary>Hint 2: the formula</summary>w ← w + LK(I₀, back(I₁, w)) at (x, y), with side 15.</details>
# <details><summary>Hint 3: part of the code</summary>Inside the loop: <code>w = w + lucas_kanade(I0, back(I1, w), 15)[y, x]</code>.</details>


# %% tags=["stub"]
def back(I1, w):
    """The picture I1 (H, W), each pixel (x, y) read at (x + u, y + v); w is (u, v)."""
    return warp_back(np.stack([I1, I1]), np.broadcast_to(w, (1, H, W, 2)))[0].astype(float)


def iterated(I0, I1, x, y, rounds):
    #: solution
    w = np.zeros(2)
    for _ in range(rounds):
        w = w + lucas_kanade(I0, back(I1, w), 15)[y, x]
    return w
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
runner, x, y = actions[6], 50, 14
J0, J1 = runner.frames[6].mean(axis=-1), runner.frames[7].mean(axis=-1)
rounds = [np.zeros(2)]
for _ in range(4):
    rounds.append(rounds[-1] + lucas_kanade(J0, back(J1, rounds[-1]), 15)[y, x])
left = [np.linalg.norm(w - runner.flow[6, y, x]) for w in rounds]
assert left[1] > 3
assert left[4] < 0.1
check(
    "Exercise 3",
    lambda: iterated(J0, J1, x, y, 4),
    rounds[4],
    mistakes={
        "one round too few": rounds[3],
        "the picture was never brought back: each round adds the same": 4 * rounds[1],
        "this is the last correction alone; add it to what was found before": rounds[4] - rounds[3],
    },
    tolerance=1e-3,
)

# %% [markdown]
# ## What you learned
#
# - A clip is (T, H, W, C); networks want (B, C, T, H, W) or (B, T, H, W, C). Get there by transposing, never by reshaping.
# - A file gives back something close to its frames, and its header may lie. Count what was decoded.
# - Brightness constancy gives one equation a pixel; a window of pixels gives the motion, unless it holds two motions or a long step.
# - An error averaged over all pixels is mostly about the background.
# - Training and test clips must share no group. Nearest trousers scored 79 % otherwise.
#
# ## Further reading
#
# - C. Schüldt, I. Laptev, B. Caputo: *Recognizing human actions: a local SVM approach*. ICPR 2004. The KTH actions.
# - B. D. Lucas, T. Kanade: *An iterative image registration technique with an application to stereo vision*. IJCAI 1981.
# - G. Farnebäck: *Two-frame motion estimation based on polynomial expansion*. SCIA 2003.
# - C. Zach, T. Pock, H. Bischof: *A duality based approach for realtime TV-L1 optical flow*. DAGM 2007.
# - J. Sánchez, E. Meinhardt-Llopis, G. Facciolo: *TV-L1 optical flow estimation*. Image Processing On Line 2013. TV-L1 with code and parameters.
# - T. Kroeger, R. Timofte, D. Dai, L. Van Gool: *Fast optical flow using dense inverse search*. ECCV 2016. DIS.
# - S. Baker, D. Scharstein, J. P. Lewis, S. Roth, M. J. Black, R. Szeliski: *A database and evaluation methodology for optical flow*. IJCV 2011.
# - H. Wang, C. Schmid: *Action recognition with improved trajectories*. ICCV 2013. Point tracks as features.
# - L. Wang, Y. Xiong, Z. Wang, Y. Qiao, D. Lin, X. Tang, L. Van Gool: *Temporal segment networks*. ECCV 2016.
