# %% [markdown]
# # 18 · The comparison: five architectures, one budget
#
# After this notebook you can
#
# - name what each of five video architectures can and cannot see of motion and of order
# - split clips by their source into folds, and say what goes wrong without it
# - compute the 95 % interval of an accuracy by hand, drawing whole sources
# - compare two networks on the same clips, and say whether the difference is more than chance
# - train two rows of the table yourself, and set them beside the recorded ones
#
# | | |
# |:--|:--|
# | What you need | notebooks 04, 05 and 11; accuracy, cross-entropy, percentiles |
# | Your time | 60 minutes |
# | Machine time | 100 seconds |
# | Framework | PyTorch, NumPy |

# %% tags=["parameters"]
import os

profile = os.environ.get("NLUTILS_PROFILE", "quick")

# %%
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown, display

from nlutils import course, plots, study
from nlutils.course import check, difference
from nlutils.paths import results_root
from nlutils.torch import create_model
from nlutils.torch.models.small import SMALL_MODELS
from nlutils.video import describe_source, open_clips

settings = course.settings(
    profile,
    quick={"steps": 120, "folds": [0]},  # batches that a network is trained on
    full={"steps": None},  # as many as in the recorded runs
    gpu={"steps": None, "folds": [0, 1, 2, 3, 4]},
)
plots.style()
if profile != "gpu":
    torch.set_num_threads(1)  # as in the recorded runs

# %% [markdown]
# ## 1 · The question and the five networks
#
# Somebody claps, jumps, sits down, swings a bat. Which kind of network tells these actions apart best, when
# all get the same clips, the same small size and the same 24 passes over the training clips? And do
# non-local blocks help? The field has answered with millions of clips and networks of millions of weights,
# which nobody can check at a desk. We ask small: 296 real clips of 8 actions, networks of 16-32-64-128
# channels, every number recorded with its code and settings.
#
# | network | idea | where time enters |
# |:--|:--|:--|
# | `frame_average` | the same 2D network on every step, features averaged | only in the average |
# | `cnn_rnn` | the same 2D network on every step, then an LSTM | in the LSTM's state |
# | `c3d_small` | 3x3x3 convolutions throughout | in every kernel, 3 steps at a time |
# | `two_stream_small` | one 2D network on colour frames, one on stacks of 8 flow fields | in the stack |
# | `c3d_small_non_local` | `c3d_small` with two of notebook 05's blocks, after stages 2 and 3 | in kernels, and between any two positions |
#
# The input of all but `two_stream_small` is optical flow: a step of a clip is a field of 2 numbers a pixel, how
# far it moved right and down. With so few clips, networks that must first discover motion in colours learn
# little. `two_stream_small` has colour beside flow, as published.

# %%
recipe = study.Recipe()  # 16 steps of 40 x 56 pixels
networks = {}
for name in SMALL_MODELS:
    torch.manual_seed(0)
    networks[name] = create_model(
        name, 8, **({} if name == "two_stream_small" else {"input": recipe.input})
    ).eval()

print("network            weights   multiply-adds a clip")
for name, network in networks.items():
    x = study.example_input(network, recipe.frames, recipe.size)
    print(f"{name:16}  {study.parameters(network):8,}   {study.multiply_adds(network, x):12,}")

x = study.example_input(networks["c3d_small"], recipe.frames, recipe.size)
assert x.shape == (1, 2, 16, 40, 56)  # (B, C, T, H, W)
assert networks["c3d_small"](x).shape == (1, 8)

# %% [markdown]
# Two of these numbers can be checked in the head. Going from `frame_average` to `c3d_small` makes every kernel
# three times as long and leaves its in- and outputs as they are. And the blocks of `c3d_small_non_local` add
# few weights but work with all pairs of positions: 1,120 after stage 2, where keys are pooled to 280.

# %%
weights_2d = {k: w for k, w in networks["frame_average"].named_parameters() if w.ndim == 4}
weights_3d = {k: w for k, w in networks["c3d_small"].named_parameters() if w.ndim == 5}
assert sum(w.numel() for w in weights_3d.values()) == 3 * sum(w.numel() for w in weights_2d.values())
added = study.parameters(networks["c3d_small_non_local"]) - study.parameters(networks["c3d_small"])
print(
    f"two non-local blocks: {added:,} weights, {100 * added / study.parameters(networks['c3d_small']):.1f} % more"
)

# %% [markdown] tags=["predict"]
# Take a clip's 16 flow fields and hand them over in reverse order. Which of the four networks that see flow
# alone give exactly the same scores as before?
#
# And if the *film* runs backwards? Then the fields come in reverse order and every arrow points the other
# way. Does the answer change for `frame_average`?

# %%
x = x.double()  # in float64, rounding stays far below any real difference
backwards = x.flip(2)  # the same fields, last first
film_backwards = -x.flip(2)  # last first, and every arrow turned round
with torch.no_grad():
    for name in ("frame_average", "cnn_rnn", "c3d_small", "c3d_small_non_local"):
        network = networks[name].double()
        same = [
            torch.allclose(network(x), network(other), atol=1e-10) for other in (backwards, film_backwards)
        ]
        print(
            f"{name:14}  fields reversed: {'same' if same[0] else 'other':5}   film: {'same' if same[1] else 'other'}"
        )
        assert same == [name == "frame_average", False]

# %% [markdown] tags=["explain"]
# Only `frame_average` forgets the order: a mean does not change when its terms are re-arranged. But it is not
# blind to the direction of time, because each field is itself made from two frames in order: *sit down* and
# *stand up* differ field by field. So "2D" does not mean "sees no motion"; it depends on the input. With
# colour frames in place of flow, `frame_average` would give a film and its reverse the same scores.

# %% [markdown]
# ## 2 · Clips, sources, folds
#
# Which clips the networks of this notebook will see depends on your machine:

# %%
print(describe_source())
clips = open_clips()
counts = np.bincount([clip.label for clip in clips.clips], minlength=len(clips.classes))
print(
    f"{len(clips)} clips of {len({clip.group for clip in clips.clips})} sources, {len(clips.faults)} left out"
)
print(f"{len(clips.classes)} classes of {counts.min()} to {counts.max()} clips: {', '.join(clips.classes)}")
assert counts.shape == (len(clips.classes),)

# %% [markdown]
# Clips of one source (a film, a match, a performer) share the actors, the background and the camera. A
# network can recognise the source instead of the action, and if a source stands on both sides of the split
# this is rewarded. So a source is never torn: each clip has a fold from 0 to 4, each source lies whole in one
# fold, and a network that is tested on a fold was trained on the other four. After five trainings every clip
# has been tested once.

# %%
for fold in sorted({clip.fold for clip in clips.clips}):
    train, test = clips.split(fold)
    shared = {clip.group for clip in train} & {clip.group for clip in test}
    print(f"fold {fold}: train on {len(train)}, test on {len(test)}, sources in both: {len(shared)}")
    assert not shared
    assert len(train) + len(test) == len(clips)

# %% [markdown]
# ## 3 · An accuracy and its interval, by hand
#
# `data/results/core8` holds recorded runs on the real clips, one file each, with the scores of every test
# clip. We take those of the five networks: 5 folds, so 25 runs. One row of the future table is the five runs of
# one network.

# %%
runs = {}
for run in study.read_runs("core8"):
    if run.row in SMALL_MODELS and run.seed == 0:
        runs.setdefault(run.row, []).append(run)
rows = runs["c3d_small"]
assert sorted(runs) == sorted(SMALL_MODELS)
assert [run.fold for run in rows] == [0, 1, 2, 3, 4]

for run in rows:
    logits, labels = np.array(run.logits), np.array(run.labels)
    assert logits.shape == (len(run.names), len(run.classes))
    right = logits.argmax(axis=1) == labels
    print(f"c3d, fold {run.fold}: {right.sum():2} of {len(right)} right, {100 * right.mean():.1f} %")

# %%
right = np.concatenate([run.right for run in rows]).astype(float)
groups = np.concatenate([run.groups for run in rows])
assert right.shape == groups.shape == (296,)
print(f"all folds: {right.sum():.0f} of {len(right)}, {100 * right.mean():.1f} %; {len(set(groups))} sources")
assert max(run.accuracy for run in rows) - min(run.accuracy for run in rows) > 0.3

# %% [markdown]
# Folds 3 and 4 differ by 32 percentage points: whoever had tested on one of them alone would have told
# another story. How far could all five together be off? Imagine the study repeated with other films. We
# cannot do that, but we can draw from the films we have, with replacement, as many as there are: some come
# twice, some not at all. That is the bootstrap. One such draw $G^*$ of sources gives
#
# $$a^* = \frac{\sum_{g \in G^*} r_g}{\sum_{g \in G^*} n_g}$$
#
# with $n_g$ clips in source $g$, of which $r_g$ are right. The middle 95 % of many such $a^*$ are the interval.


# %%
def bootstrap(groups, values, draws=10_000, seed=0):
    sources = sorted(set(groups))
    r = np.array([sum(v for v, group in zip(values, groups, strict=True) if group == g) for g in sources])
    n = np.array([sum(group == g for group in groups) for g in sources])
    rng = np.random.default_rng(seed)
    a = np.zeros(draws)
    drawn = rng.integers(0, len(sources), size=(draws, len(sources)))
    for k in range(draws):
        a[k] = r[drawn[k]].sum() / n[drawn[k]].sum()
    low, high = np.percentile(a, [2.5, 97.5])
    return r.sum() / n.sum(), low, high


by_hand = bootstrap(groups.tolist(), right.tolist())
print("accuracy {:.3f}, 95 % interval {:.3f} to {:.3f}".format(*by_hand))
from_nlutils = study.interval(rows)
difference(
    by_hand,
    (from_nlutils.value, from_nlutils.low, from_nlutils.high),
    "the same from nlutils.study",
    below=1e-12,
)

# %% [markdown] tags=["predict"]
# Suppose we had drawn single clips instead of whole sources, as if all 296 clips were independent. Would the
# interval become wider or narrower? Guess by how much.

# %%
clip_by_clip = bootstrap(list(range(len(right))), right.tolist())
by_source = by_hand[2] - by_hand[1]
print(
    f"drawing clips:   {clip_by_clip[1]:.3f} to {clip_by_clip[2]:.3f}, width {clip_by_clip[2] - clip_by_clip[1]:.3f}"
)
print(f"drawing sources: {by_hand[1]:.3f} to {by_hand[2]:.3f}, width {by_source:.3f}")
assert by_source > clip_by_clip[2] - clip_by_clip[1]

# %% [markdown] tags=["explain"]
# Narrower by a third, and wrongly so. The clips of one film tend to be right or wrong together; ten
# such clips tell less than ten clips of ten films. Whoever draws clips counts the same luck several times,
# and prints an interval that is too good. The width is the price of 113 sources.

# %% [markdown]
# ## 4 · The table
#
# The same for all five networks, with what each costs: weights, multiply-adds of one clip, clips a second of
# one processor in training and in test (the best of five folds), and the most memory that one training step of
# 16 clips needs. The rates are noisy: small differences in these two columns mean nothing.

# %%
table = study.summarise([run for row in runs.values() for run in row])
display(Markdown(study.markdown_table(table)))

# %%
fig = study.comparison_figure(table, chance=1 / 8, title="core8, five folds, recorded")
plots.show(fig, study.describe(table))

# %%
pairs = [(p, q) for p in table for q in table if p.accuracy.value > q.accuracy.value]
overlapping = [p for p, q in pairs if p.accuracy.low < q.accuracy.high]
print(f"{len(overlapping)} of {len(pairs)} pairs of intervals overlap")
assert (len(overlapping), len(pairs)) == (10, 10)
assert max(table, key=lambda row: row.accuracy.value).row == "c3d_small"

# %% [markdown]
# All ten pairs of intervals overlap. Does that mean that these networks cannot be told apart?
#
# ## 5 · Two networks on the same clips
#
# A film that is hard for one network is often hard for the other, and what they share drops out when we look
# at the *difference*, clip by clip: $d_i = 1$ when only the first network is right, $-1$ when only the second
# is, 0 when they agree. The accuracy difference is the mean,
#
# $$\bar d = \frac{1}{N} \sum_{i=1}^{N} d_i$$
#
# and its interval comes from the same bootstrap, with $d_i$ in place of right and wrong.


# %%
def paired(name_a, name_b):
    """The mean of d_i and its 95 % interval, the same sources drawn for both networks."""
    a, b = (
        {n: ok for run in runs[name] for n, ok in zip(run.names, run.right, strict=True)}
        for name in (name_a, name_b)
    )
    group_of = {n: g for run in runs[name_a] for n, g in zip(run.names, run.groups, strict=True)}
    names = sorted(a)
    assert names == sorted(b)
    return bootstrap([group_of[n] for n in names], [float(a[n]) - float(b[n]) for n in names])


blocks = paired("c3d_small_non_local", "c3d_small")
again = study.difference_interval(runs["c3d_small_non_local"], runs["c3d_small"])
difference(blocks, (again.value, again.low, again.high), "the same from nlutils.study", below=1e-12)
for name in ("frame_average", "cnn_rnn", "two_stream_small"):
    d, low, high = paired(name, "c3d_small")
    print(f"{name:13} - c3d, percentage points: {100 * d:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})")
    assert -0.145 < d < -0.1
    assert high < -0.03

# %% [markdown] tags=["predict"]
# `c3d_small` beats three others by 10 to 14 points, and none of the three intervals holds 0, although all of
# these networks had overlapping intervals a moment ago.
#
# Now the question that this course is about: `c3d_small_non_local` minus `c3d_small`, two networks that differ in two
# blocks. Where do you expect the difference, above zero or below? And which of the two has the smaller
# *training* loss at the end?

# %%
print(
    "c3d_small_non_local - c3d_small, percentage points: {:+.1f} ({:+.1f} to {:+.1f})".format(
        *(100 * v for v in blocks)
    )
)
for name in ("c3d_small", "c3d_small_non_local"):
    print(
        f"{name:13}  training loss of the last epoch, mean of five folds: {np.mean([r.losses[-1] for r in runs[name]]):.2f}"
    )

assert -0.04 < blocks[0] < -0.02
last = {
    name: np.mean([run.losses[-1] for run in runs[name]]) for name in ("c3d_small", "c3d_small_non_local")
}
assert abs(last["c3d_small"] - last["c3d_small_non_local"]) < 0.05
assert blocks[1] < 0 < blocks[2]

# %% [markdown] tags=["explain"]
# Below, but 0 lies inside the interval: from 8 points worse to 2 better, everything fits these clips. Both
# networks fit their training clips equally well, so the blocks did not disturb the training either. The
# answer is "no gain is seen", not "no gain is there".
#
# How small a thing can move such a number? An earlier recording of the same two rows, with the same recipe
# and seed, differed in rounding alone: the kernels' numbers lay in another order in memory, and the block took
# its sums in another order. `c3d_small` had 65.5 % then and has 62.5 % now; the difference was -6 points and is -3. Rounding
# is one more roll of the dice, like the seed: a single training of each network cannot show a few points.
#
# The paper's gains were measured on Kinetics, some 235,000 training clips in the released list, in networks
# that had learned from images before; we have about 240 clips, and weights that start from nothing.

# %% [markdown]
# ## 6 · Train two rows now
#
# Recorded numbers are somebody else's. The next cells train `c3d_small` and `c3d_small_non_local` here, on the clips of
# section 2, with the recorded recipe but for the number of epochs, and test them on the
# clips of the same fold. Where runs on these clips are recorded, theirs stand beside.

# %%
recorded = study.read_runs(clips.name) if (results_root() / clips.name).is_dir() else []
recipe = next((study.Recipe(**run.recipe) for run in recorded if run.row == "c3d_small"), study.Recipe())
if settings.steps:
    train_on = min(len(clips.split(fold)[0]) for fold in settings.folds)
    recipe = recipe.replace(epochs=max(1, round(settings.steps * recipe.batch / train_on)))
inputs = study.prepare(clips, recipe.frames, recipe.resize)
assert inputs.frames.shape[:3] == (len(clips), 3, recipe.frames + 1)
print(inputs.source)
print(
    f"{recipe.epochs} epochs, {recipe.frames} steps of {recipe.size[0]} x {recipe.size[1]} pixels, input: {recipe.input}"
)

# %% tags=["nbval-ignore-output"]
live = []
for fold in settings.folds:
    for name in ("c3d_small", "c3d_small_non_local"):
        run = study.run_fold(inputs, name, fold, recipe)
        live.append(run)
        losses = " ".join(f"{loss:.2f}" for loss in run.losses)
        print(
            f"{name:13} fold {fold}: {100 * run.accuracy:.0f} % right, {run.seconds['train']:.0f} s, loss {losses}"
        )
        assert len(run.losses) == recipe.epochs
        assert np.isfinite(run.losses).all()

# %% tags=["nbval-ignore-output"]
before = {(run.row, tuple(run.names)): run for run in recorded}  # by network and by the clips of its test
for run in live:
    old = before.get((run.row, tuple(run.names)))
    text = (
        f"recorded {100 * old.accuracy:.0f} % ({old.recipe['epochs']} epochs)" if old else "nothing recorded"
    )
    print(f"{run.row:13} fold {run.fold}: now {100 * run.accuracy:.0f} % ({recipe.epochs} epochs), {text}")

# %% [markdown]
# Where runs are recorded for your clips, they had more time than yours in the `quick` profile; with
# `NLUTILS_PROFILE=full` yours get as much. On one thread of the same
# kind of processor, with the same versions, equal settings lead to equal numbers. On another machine sums are
# rounded in another order, and hundreds of steps of training make two networks of that. So results are
# compared by intervals and not by digits.
#
# The last cell of this section writes the comparison for `make run`: the recorded rows for these clips and
# yours below.

# %% tags=["nbval-ignore-output"]
rows_now = study.summarise(recorded)
note = f"trained now: {recipe.epochs} epochs, fold {', '.join(map(str, settings.folds))}"
for row in study.summarise(live):
    rows_now.append(replace(row, title=f"{row.title}; {note}"))

seen = f"Clips: {inputs.source}; chance is {100 / len(inputs.classes):.1f} %."
if recorded:
    seen += (
        f" Rows without a note are recorded in data/results/{clips.name}, on {recorded[0].data['source']}."
    )
if clips.name == "procedural":
    seen += " The comparison on real clips is in the README; `make data` fetches them."
page = f"{study.markdown_table(rows_now)}\n\n{seen}\n"
display(Markdown(page))

output = os.environ.get("NLUTILS_OUTPUT")
if output:
    Path(output, "comparison.md").write_text(page, encoding="utf-8")
    fig = study.comparison_figure(rows_now, 1 / len(inputs.classes), clips.name)
    fig.savefig(Path(output, "comparison.png"), dpi=120)
    plt.close(fig)

# %% [markdown]
# ## 7 · What is shown, and what is not
#
# The recipe (input, learning rate, pooling, size) was chosen in a few trials of `c3d_small`, trained on folds 2, 3
# and 4 and tested on fold 1. So fold 1 has been looked at. Does anything hang on it?

# %%
others = {name: [run for run in runs[name] if run.fold != 1] for name in runs}
for row in table:
    print(f"{row.row:14}  all folds {row.accuracy}, without fold 1 {study.interval(others[row.row])}")
unseen = study.difference_interval(others["c3d_small_non_local"], others["c3d_small"])
print(
    f"c3d_small_non_local - c3d_small without fold 1: {100 * unseen.value:+.1f} ({100 * unseen.low:+.1f} to {100 * unseen.high:+.1f})"
)
made = study.by_row(study.read_runs("procedural"))
easy = study.difference_interval(made["c3d_small_non_local"], made["c3d_small"])
print(
    f"c3d_small_non_local - c3d_small, procedural clips: {100 * easy.value:+.1f} ({100 * easy.low:+.1f} to {100 * easy.high:+.1f})"
)
assert easy.low < 0 < easy.high
best = max(others, key=lambda name: study.interval(others[name]).value)
assert best in ("c3d_small", "c3d_small_non_local")
assert unseen.low < 0 < unseen.high

# %% [markdown]
# **Shown**, for these clips, this size and this recipe: with optical flow as input, 3x3x3 convolutions beat
# per-step 2D networks, with and without an LSTM, and the two-stream network. Two embedded Gaussian blocks
# added to the 3D network: no gain is seen, and without fold 1 the two networks are equal to half a point. On
# the procedural clips (`data/results/procedural`, six epochs) 0 lies inside the interval, too.
#
# **Not shown**:
#
# - That non-local blocks do not help in general. Not tried: their learning rate and a warm-up of their own,
#   other places, other instantiations, colour input, longer clips, more clips, pre-training.
# - How much is luck of the start: there is one seed. The interval covers the choice of films, not that of
#   the first weights.
# - That the other rows are at their best: the recipe was chosen with `c3d_small`, which may favour it.
# - Whether the two-stream network suffers from its colour stream: its streams were not tested apart.
# - What the extra weights do without attention: a control with as many weights in plain convolutions, and
#   one with a uniform map in place of the learned one, would have to come first if there were a gain.

# %% [markdown]
# ## Exercises
#
# They use the recorded scores; nothing is trained.

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Two networks vote (easy, 10 minutes)
#
# Average the *probabilities* that two networks give, the way `two_stream_small` joins its streams. `a` and `b` are
# logits of shape `(clips, classes)`; return probabilities of the same shape.
#
# **Expect**: rows that add up to 1. Once the check says *right*,
# `np.mean(vote(a, b).argmax(axis=1) == labels)` is the accuracy of `c3d_small` and `two_stream_small` together.
#
# <details><summary>Hint 1: a nudge</summary> Softmax first, mean second. </details>
# <details><summary>Hint 2: the formula</summary> $p = \frac12 (\mathrm{softmax}(a) + \mathrm{softmax}(b))$,
# softmax over classes. </details>
# <details><summary>Hint 3: part of the code</summary> <code>p = np.exp(a - a.max(axis=1, keepdims=True))</code>,
# then divide each row by its sum. </details>


# %% tags=["stub"]
def vote(a, b):
    #: solution
    def softmax(logits):
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        return p / p.sum(axis=1, keepdims=True)

    return (softmax(a) + softmax(b)) / 2
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
a, b = (np.concatenate([run.logits for run in runs[name]]) for name in ("c3d_small", "two_stream_small"))
labels = np.concatenate([run.labels for run in runs["c3d_small"]])
p_a, p_b = (torch.from_numpy(logits).softmax(dim=1).numpy() for logits in (a, b))
columns = torch.from_numpy(a).softmax(dim=0).numpy() / 2 + torch.from_numpy(b).softmax(dim=0).numpy() / 2
check(
    "Exercise 1",
    lambda: vote(a, b),
    (p_a + p_b) / 2,
    mistakes={
        "you averaged the logits, not the probabilities": torch.from_numpy((a + b) / 2)
        .softmax(dim=1)
        .numpy(),
        "the softmax ran over the clips, not the classes": columns,
        "the rows add up to 2: divide by the number of networks": p_a + p_b,
    },
)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Which actions are mistaken for which (medium, 15 minutes)
#
# Count a confusion matrix: entry `[i, j]` is the number of clips of class `i` that are called `j`.
#
# **Expect**: an 8 x 8 matrix of whole numbers whose sum is 296. Its diagonal, divided by its row sums, tells
# which class is easiest for `c3d_small`.
#
# <details><summary>Hint 1: a nudge</summary> Each clip adds 1 to one entry. </details>
# <details><summary>Hint 2: the formula</summary> $M_{ij} = \sum_n [\,y_n = i\,][\,\hat y_n = j\,]$ </details>
# <details><summary>Hint 3: part of the code</summary> <code>np.add.at(M, (labels, predicted), 1)</code>. </details>


# %% tags=["stub"]
def confusion(logits, labels):
    #: solution
    M = np.zeros((logits.shape[1], logits.shape[1]), dtype=int)
    np.add.at(M, (labels, logits.argmax(axis=1)), 1)
    return M
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
M = np.array([[np.sum((labels == i) & (a.argmax(axis=1) == j)) for j in range(8)] for i in range(8)])
check(
    "Exercise 2",
    lambda: confusion(a, labels),
    M,
    mistakes={
        "rows are what the network said; they should be the true class": M.T,
        "M[labels, predicted] += 1 counts a repeated pair once": np.minimum(M, 1),
        "you divided by the row sums; counts are asked for": M / M.sum(axis=1, keepdims=True),
    },
)

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · Could the difference be chance? (hard, 20 minutes)
#
# If the two blocks made no difference, then for each source it would be a coin's toss which network gets
# which result. `d` holds, for each of the 113 sources, how many clips more `c3d_small_non_local` has right than
# `c3d_small`; `signs` is 10,000 x 113 tosses, +1 or -1. Return the share of tosses whose total is at least as far
# from 0 as the real one: the two-sided p-value.
#
# **Expect**: a number between 0 and 1. Small means: hard to explain by chance.
#
# <details><summary>Hint 1: a nudge</summary> A toss turns the sign of a whole source. </details>
# <details><summary>Hint 2: the formula</summary> $p = \frac1K \sum_k [\, |\sum_g s_{kg} d_g| \ge |\sum_g d_g| \,]$ </details>
# <details><summary>Hint 3: part of the code</summary> <code>totals = signs @ d</code>. </details>


# %% tags=["stub"]
def p_value(d, signs):
    #: solution
    totals = signs @ d
    return np.mean(np.abs(totals) >= abs(d.sum()))
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
sources = sorted(set(groups))
gain = np.concatenate([run.right for run in runs["c3d_small_non_local"]]).astype(int) - right.astype(int)
d = np.array([gain[groups == g].sum() for g in sources])
signs = np.random.default_rng(1).choice([-1, 1], size=(10_000, len(d)))
totals = signs @ d
check(
    "Exercise 3",
    lambda: p_value(d, signs),
    np.mean(np.abs(totals) >= abs(d.sum())),
    mistakes={
        "one-sided: look at the size of the total, not at its sign": np.mean(totals >= d.sum()),
        "'further' leaves out totals as large as the real one": np.mean(np.abs(totals) > abs(d.sum())),
        "this is the share of smaller totals": np.mean(np.abs(totals) < abs(d.sum())),
    },
)

# %% [markdown]
# ## What you learned
#
# - A mean over steps forgets their order, not the motion inside a flow field.
# - Sources are kept whole, in folds and in the bootstrap; with single clips the interval looks too good.
# - Two networks are compared on the same clips, by their paired difference: it separates what two overlapping
#   intervals do not.
# - On 296 clips, 3D convolutions on flow won, and two non-local blocks did not add to them.
#
# ## Further reading
#
# - X. Wang, R. Girshick, A. Gupta, K. He: Non-local Neural Networks. CVPR 2018. Section 4 and Table 2.
# - D. Tran, L. Bourdev, R. Fergus, L. Torresani, M. Paluri: Learning Spatiotemporal Features with 3D
#   Convolutional Networks. ICCV 2015.
# - J. Donahue, L. A. Hendricks, S. Guadarrama, M. Rohrbach, S. Venugopalan, K. Saenko, T. Darrell: Long-term
#   Recurrent Convolutional Networks for Visual Recognition and Description. CVPR 2015.
# - K. Simonyan, A. Zisserman: Two-Stream Convolutional Networks for Action Recognition in Videos. NIPS 2014.
# - H. Jhuang, J. Gall, S. Zuffi, C. Schmid, M. J. Black: Towards Understanding Action Recognition. ICCV 2013.
# - B. Efron, R. J. Tibshirani: An Introduction to the Bootstrap. Chapman and Hall, 1993.
