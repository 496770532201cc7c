# %% [markdown]
# # 00 · Start here: what a non-local operation sees in a clip
#
# After this notebook you can
#
# - check that your machine has what the other notebooks need
# - find your way through the notebooks, their questions and their exercises
# - compute the weights of a non-local operation for one pixel of a clip, and look at them
#
# | | |
# |:--|:--|
# | What you need | Python and NumPy; the scalar product of two vectors |
# | Your time | 20 minutes |
# | Machine time | 5 seconds |
# | Framework | NumPy |

# %% tags=["parameters"]
import os

profile = os.environ.get("NLUTILS_PROFILE", "quick")

# %%
import platform

import numpy as np

from nlutils import plots
from nlutils.course import check, settings
from nlutils.video import describe_source, procedural

settings(profile)
plots.style()

# %% [markdown]
# ## 1 · Your machine
#
# The next cell says which Python and NumPy run here, and which clips the later notebooks will use.
# For the whole check (memory, disk, PyTorch, Keras, GPU, video decoder, data), run `nlutils doctor` in a terminal:
# it names each fault and what to do about it.

# %% tags=["nbval-ignore-output"]
print("Python", platform.python_version(), "on", platform.system(), platform.machine())
print("NumPy", np.__version__)
print(describe_source())

# %% [markdown]
# ## 2 · How these notebooks work
#
# | notebook | question |
# |:--|:--|
# | 00 start here | what does the operation see? |
# | 01 local and non-local | what can a non-local block do that local operations cannot? |
# | 02 non-local means, 03 dense CRF | where does the idea come from? |
# | 04 formulation | what exactly is computed, and what is its gradient? |
# | 05 block in PyTorch, 06 block in Keras | how does the formula become a layer? |
# | 07 the same block twice | do the two frameworks compute the same? |
# | 08 self-attention | is the block an attention layer? |
# | 09 cost | what does it cost, and how can it be exact and cheap? |
# | 10 compact generalized | what if channels take part too, and what do its relatives compute? |
# | 11 video clips | what is a clip, as an array? |
# | 18 comparison | which video network wins on the same clips, and by how much? |
#
# The formula is in 04; if you are in a hurry, begin there. If you know PyTorch only, leave out 06 and 07, and skip the Keras section of 08 and 10.
# If you know Keras only, leave out 05 and 07. 01, 08, 09, 10 and 18 are written in PyTorch. 07, 08 and 10 need both frameworks installed.
#
# Three things come back in every notebook:
#
# - **A question before the answer.** Write your guess down before you run the cell. A wrong guess teaches more than a right one.
# - **Assertions.** When the text claims something, a cell checks it with `assert`. If it were false, the notebook would stop.
# - **Exercises** at the end. Each has a cell for your code and a cell that checks it. Until you write something, the check
#   says *not yet*; when your answer is wrong, it tries to name the mistake. Three hints are folded below each exercise.
#
# `profile` in the first cell says how long the machine may work: `quick` (minutes in all), `full`, or `gpu`.

# %% [markdown]
# ## 3 · A clip
#
# `nlutils` can draw clips of a moving figure. They need no download, and we know where every joint is.
# This is a runner in front of a camera that stands still: 8 frames of 64 x 64 pixels, 3 colours.

# %%
actions = procedural.Actions(count=24, frames=8, size=64, seed=0)
clip = actions[7]
T, H, W, C = clip.frames.shape
assert (T, H, W, C) == (8, 64, 64, 3)

head = clip.joints[:, procedural.JOINTS.index("head")]  # (T, 2): x and y in each frame
assert head.shape == (T, 2)
print(clip.action, "- the camera", clip.camera)
print("the head is at x =", np.rint(head[:, 0]).astype(int))

# %%
fig, axes = plots.strip(clip.frames, titles=[f"frame {t}" for t in range(T)])
for ax, (x, y) in zip(axes, head, strict=True):
    ax.plot(x, y, "+", color=plots.COLOURS["orange"], markersize=9)
plots.show(
    fig, "Eight frames of a runner, who crosses the picture; an orange cross marks the head in each frame."
)

# %% [markdown]
# A 3 x 3 x 3 convolution that stands on the head in frame 0 sees one pixel to each side, and one frame ahead. How far does
# the head move?

# %%
step = np.abs(np.diff(head[:, 0]))
print("pixels from one frame to the next:", np.rint(step).astype(int))
print("pixels from first to last frame:  ", round(float(abs(head[-1, 0] - head[0, 0]))))
assert (step > 1).all()  # always out of reach of the convolution

# %% [markdown]
# The convolution loses sight of the head at the first step. We need something that looks at *all* positions of the clip and decides by
# itself which of them matter.
#
# ## 4 · Describe every position
#
# A position is one pixel of one frame. We describe it by the patch of 7 x 7 pixels around it, written as one long vector,
# with the mean patch taken away and the length set to 1. So each position *i* has a vector $x_i$ of 7 · 7 · 3 = 147 numbers.


# %%
def patches(frames, radius=3):
    T, H, W, C = frames.shape
    side = 2 * radius + 1
    padded = np.pad(frames / 255, ((0, 0), (radius, radius), (radius, radius), (0, 0)), mode="edge")
    views = np.lib.stride_tricks.sliding_window_view(
        padded, (side, side), axis=(1, 2)
    )  # (T, H, W, C, side, side)
    x = views.reshape(T * H * W, C * side * side)
    x = x - x.mean(axis=0)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


x = patches(clip.frames)
N, d = x.shape
assert (N, d) == (8 * 64 * 64, 147)
print(N, "positions, each described by", d, "numbers")

# %% [markdown]
# ## 5 · Which positions look like the head?
#
# We stand on one position, the head in frame 0, and call it *i*. Its similarity to position *j* is the scalar product
# $x_i \cdot x_j$: 1 for the same patch, about 0 for an unrelated one. The *non-local operation* turns the similarities into
# weights that are positive and sum to 1:
#
# $$ w_{ij} = \frac{\exp(s\, x_i \cdot x_j)}{\sum_{k} \exp(s\, x_i \cdot x_k)} $$
#
# The sum in the denominator runs over all positions *k* of all frames. The number *s* says how picky we are; we take *s* = 20.


# %%
def position(t, xy):
    """The index i of the pixel nearest to the point xy in frame t."""
    px, py = np.rint(xy).astype(int)
    return (t * H + py) * W + px


def weights(x, i, s=20):
    f = np.exp(s * (x @ x[i]))  # (N,)
    return f / f.sum()


i = position(0, head[0])
w = weights(x, i)
assert w.shape == (N,)
assert np.isclose(w.sum(), 1)
print("largest weight at position i itself:", w.argmax() == i)

# %% [markdown] tags=["predict"]
# **Predict.** Nobody told the operation that frames follow each other, or that things move. It compares patches, nothing else. In the last
# frame the head is more than half a picture away from where it was. Where in the last frame will the largest weight be: on the head, where
# the head was in frame 0, or somewhere in the background?


# %%
def largest_in_each_frame(w):
    """(T, 2): x and y of the largest weight of each frame."""
    best = w.reshape(T, H * W).argmax(axis=1)
    return np.stack([best % W, best // W], axis=1)


found = largest_in_each_frame(w)
distance = np.linalg.norm(found - head, axis=1)
print("x of the largest weight:", found[:, 0])
print("x of the head:           ", np.rint(head[:, 0]).astype(int))
assert (distance < 1).all()  # less than one pixel away, in every frame

# %%
in_frame = w.reshape(T, H, W)
fig, axes = plots.strip(np.sqrt(in_frame / in_frame.max()), titles=[f"frame {t}" for t in range(T)])
for ax, (px, py) in zip(axes, found, strict=True):
    ax.plot(px, py, "o", markersize=14, markerfacecolor="none", color=plots.COLOURS["orange"])
plots.show(
    fig,
    "The weights of all positions, frame by frame. In every frame one bright spot lies on the runner's head, "
    "circled in orange, and moves across the picture with it; the rest is nearly black.",
)

# %% [markdown] tags=["explain"]
# On the head, in every frame. The weights follow the runner across the whole picture, because a head looks like a head wherever it is. Distance in
# space or in time does not enter the formula at all. This is why the operation is called *non-local*.
#
# ## 6 · What it takes from there
#
# With the weights, position *i* gets a new value: the weighted mean of what stands at all positions. Let $g_j$ be the colour of pixel *j*:
#
# $$ y_i = \sum_{j} w_{ij}\, g_j $$

# %%
g = clip.frames.reshape(N, C).astype(float)
y = w @ g
everywhere = g.mean(axis=0)

print("the head's own colour:        ", np.rint(g[i]).astype(int))
print("y, by non-local weights:      ", np.rint(y).astype(int))
print("plain mean of all positions:  ", np.rint(everywhere).astype(int))
assert np.abs(y - g[i]).max() < np.abs(everywhere - g[i]).max()
small = w[w < 0.001]
assert len(small) > 32_000
assert 0.3 < small.sum() < 0.4

# %% [markdown]
# The plain mean is the colour of the background. The weighted mean is nearer to the head's colour, but not equal to it: more than 32,000
# positions have a weight below 0.001 each, and together a third of all weight. (Exercise 2 asks how few positions hold half of it.) In a network, $g_j$ will be a vector of
# learned features instead of a colour, and $y_i$ collects what *all frames* know about the thing that position *i* shows.
#
# ## 7 · Where it fails
#
# Raw patches are a weak description. Here is the same computation for every clip of two performers: in how many of them does
# the largest weight stay within 3 pixels of the head, in all 8 frames?


# %%
def stays_on_the_head(clip, s=20):
    x = patches(clip.frames)
    head = clip.joints[:, procedural.JOINTS.index("head")]
    found = largest_in_each_frame(weights(x, position(0, head[0]), s))
    return bool((np.linalg.norm(found - head, axis=1) <= 3).all())


stays = [stays_on_the_head(actions[k]) for k in range(len(actions))]
lost = [k for k in range(len(actions)) if not stays[k]]
print("on the head in all frames:", sum(stays), "of", len(stays), "clips")
print("lost in clips", lost)
assert 0 < len(lost) < len(stays) / 2

# %%
other = actions[lost[-2]]
other_head = other.joints[:, procedural.JOINTS.index("head")]
w_other = weights(patches(other.frames), position(0, other_head[0]))
found_other = largest_in_each_frame(w_other)
jumped = np.linalg.norm(found_other - other_head, axis=1) > 3
assert (found_other[jumped, 1] == 0).all()
fig, axes = plots.strip(other.frames, titles=[f"frame {t}" for t in range(T)])
for ax, (hx, hy), (px, py) in zip(axes, other_head, found_other, strict=True):
    ax.plot(hx, hy, "+", color=plots.COLOURS["orange"], markersize=9)
    ax.plot(px, py, "o", markersize=12, markerfacecolor="none", color=plots.COLOURS["sky"])
plots.show(
    fig,
    "Eight frames of another clip. The orange cross stays on the head; the blue circle of the largest weight leaves "
    "it in some frames and sits on a patch of background.",
)

# %% [markdown]
# The circle jumps to the upper border, where a patch of background (its upper rows only repeat the border row) looks more like the
# head of frame 0 than the head itself does by then. A *non-local block* is
# the same computation with better descriptions: three learned maps, $\theta$, $\phi$ and $g$, choose what to compare and what
# to take. Notebook 04 writes the formula down exactly, and 05 and 06 build the block.

# %% [markdown]
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Follow a foot (easy, 5 minutes)
#
# Do the same for the **right ankle** of the runner in `clip`: return the distance, in pixels, between the largest weight and the true ankle, for
# each of the 8 frames. **Expect**: 8 numbers, the first below 1 and the largest above 3. A foot changes its look more than a head does.
#
# <details><summary>Hint 1: a nudge</summary>Section 5 does this for the head. Only the joint changes, and everything that is computed from it.</details>
# <details><summary>Hint 2: the formula</summary>The distance in frame t is the length of found[t] − ankle[t].</details>
# <details><summary>Hint 3: part of the code</summary><code>ankle = clip.joints[:, procedural.JOINTS.index("right ankle")]</code>, then
# <code>weights(x, position(0, ankle[0]))</code>.</details>


# %% tags=["stub"]
def ankle_distance(clip, x):
    #: solution
    ankle = clip.joints[:, procedural.JOINTS.index("right ankle")]
    found = largest_in_each_frame(weights(x, position(0, ankle[0])))
    return np.linalg.norm(found - ankle, axis=1)
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
ankle = clip.joints[:, procedural.JOINTS.index("right ankle")]
from_ankle = largest_in_each_frame(weights(x, position(0, ankle[0])))
check(
    "Exercise 1",
    lambda: ankle_distance(clip, x),
    np.linalg.norm(from_ankle - ankle, axis=1),
    mistakes={
        "this is the distance to where the ankle was in frame 0": np.linalg.norm(
            from_ankle - ankle[0], axis=1
        ),
        "the weights are still those of the head": np.linalg.norm(found - ankle, axis=1),
        "this is the squared distance; take its root": ((from_ankle - ankle) ** 2).sum(axis=1),
    },
)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · How picky? (easy, 10 minutes)
#
# How many positions does it take to collect half of the weight? Return that number for *s* = 1 and for *s* = 20, as a tuple: sort the weights of the head
# from large to small, add them up, and count until the sum reaches 0.5. **Expect**: for *s* = 1 many thousands, for *s* = 20 fewer than a hundred.
#
# <details><summary>Hint 1: a nudge</summary><code>np.sort</code> sorts from small to large; <code>[::-1]</code> turns that round.</details>
# <details><summary>Hint 2: the formula</summary>The smallest m with w₁ + w₂ + … + w_m ≥ 0.5, where w₁ ≥ w₂ ≥ …</details>
# <details><summary>Hint 3: part of the code</summary><code>total = np.cumsum(np.sort(w)[::-1])</code>; the first place where
# <code>total >= 0.5</code> is <code>np.argmax(total >= 0.5)</code>, counted from 0.</details>


# %% tags=["stub"]
def half_of_the_weight(x, i):
    #: solution
    counts = []
    for s in (1, 20):
        total = np.cumsum(np.sort(weights(x, i, s))[::-1])
        counts.append(int(np.argmax(total >= 0.5)) + 1)
    return tuple(counts)
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
def count_to_half(w, descending=True):
    ordered = np.sort(w)[::-1] if descending else np.sort(w)
    return int(np.searchsorted(np.cumsum(ordered), 0.5)) + 1


both = tuple(count_to_half(weights(x, i, s)) for s in (1, 20))
assert both[0] > 5000
assert both[1] < 100
check(
    "Exercise 2",
    lambda: half_of_the_weight(x, i),
    both,
    mistakes={
        "you counted from 0; add 1": (both[0] - 1, both[1] - 1),
        "you added from small to large": tuple(count_to_half(weights(x, i, s), False) for s in (1, 20)),
        "the two values of s are swapped": both[::-1],
    },
)

# %% [markdown]
# ## What you learned
#
# - A non-local operation compares one position with all positions of all frames, and takes a weighted mean.
# - Distance does not count, likeness does: the weights followed a runner across the picture, out of reach of any small convolution.
# - With raw patches it can be fooled. A non-local block learns what to compare.
#
# ## Further reading
#
# - X. Wang, R. Girshick, A. Gupta, K. He: *Non-local Neural Networks*. CVPR 2018. The paper that these notebooks follow.
# - A. Buades, B. Coll, J.-M. Morel: *A non-local algorithm for image denoising*. CVPR 2005. The idea for the pixels of one image, with weights $e^{-|P_i - P_j|^2/h^2}$; for patches of length 1 that is our formula with $s = 2/h^2$.
