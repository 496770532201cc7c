# %% [markdown]
# # 12 · CNN and RNN: LRCN and Beyond Short Snippets
#
# After this notebook you can
#
# - write an LSTM cell by hand, and show that it is PyTorch's
# - measure how much of the first frame reaches the last answer, and predict from it what can be learned
# - build a small LRCN: a CNN on every frame, an LSTM over the frames, a loss at every step
# - tell which of five temporal poolings notice that frames were shuffled
# - check the sizes of two published systems by building them without storing a number
#
# | | |
# |:--|:--|
# | What you need | notebooks 05 and 11; the chain rule, softmax, cross-entropy |
# | Your time | 80 minutes |
# | Machine time | 40 seconds |
# | Framework | PyTorch |

# %% tags=["parameters"]
import os

profile = os.environ.get("NLUTILS_PROFILE", "quick")

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from nlutils import plots, study
from nlutils.course import check, difference, settings
from nlutils.torch import NonLocalBlock, create_model
from nlutils.video import describe_source, open_clips

settings = settings(
    profile,
    quick=dict(clips=300, epochs=8, device="cpu"),
    full=dict(clips=600, epochs=24),
    gpu=dict(clips=600, epochs=24, device="cuda"),
)
plots.style()
torch.set_num_threads(1)
torch.set_printoptions(precision=3, sci_mode=False)

# %% [markdown]
# ## 1 · A network that reads
#
# A clip has 6 frames, each described by a vector $x_t$ of 5 numbers. A recurrent network reads one vector after the other and keeps a *state* $h_t$, here of 4 numbers:
#
# $$h_t = \tanh(W_x x_t + W_h h_{t-1} + b), \qquad h_0 = 0$$
#
# After frame 6 it answers from $h_6$ alone. What $h_6$ knows of frame 1 came through $h_1$, and has passed $W_h$ and tanh five times since.


# %%
def rnn(x, W_x, W_h, b):
    """x (B, T, D) -> all states (B, T, H); W_x (H, D), W_h (H, H)."""
    h = x.new_zeros(len(x), len(W_h))
    states = []
    for x_t in x.unbind(dim=1):
        h = torch.tanh(x_t @ W_x.T + h @ W_h.T + b)
        states.append(h)
    return torch.stack(states, dim=1)


T, D, H = 6, 5, 4
x = torch.tensor(np.random.default_rng(0).standard_normal((1, T, D))).float()
torch.manual_seed(0)
library = nn.RNN(D, H, batch_first=True)
W_x, W_h, b_x, b_h = library.all_weights[0]
assert (W_x.shape, W_h.shape, b_x.shape, b_h.shape) == ((H, D), (H, H), (H,), (H,))
h = rnn(x, W_x, W_h, b_x + b_h)
assert h.shape == (1, T, H)
print(h[0].detach())
difference(h, library(x)[0], "by hand and nn.RNN", below=1e-5)

# %% [markdown]
# PyTorch has two biases where one would do. Only their sum matters; section 8 counts both.
#
# ## 2 · The LSTM cell
#
# A long short-term memory keeps a second vector, the *cell* $c_t$, which no matrix multiplies from step to step. Three *gates* between 0
# and 1 say how much is written (input $i$), kept (forget $f$) and shown (output $o$); $g$ is what may be written. With $\sigma(a) = 1/(1+e^{-a})$, and $\odot$ for the product number by number:
#
# $$\begin{aligned} i_t &= \sigma(W_{xi} x_t + W_{hi} h_{t-1} + b_i) & f_t &= \sigma(W_{xf} x_t + W_{hf} h_{t-1} + b_f) \\
# g_t &= \tanh(W_{xg} x_t + W_{hg} h_{t-1} + b_g) & o_t &= \sigma(W_{xo} x_t + W_{ho} h_{t-1} + b_o) \\
# c_t &= f_t \odot c_{t-1} + i_t \odot g_t & h_t &= o_t \odot \tanh(c_t) \end{aligned}$$
#
# PyTorch stacks the four matrices of $x$ into one, in the order i, f, g, o, so $W_x$ is $(4H, D)$; those of $h$ become $W_h$, $(4H, H)$.


# %%
def cell(x_t, h, c, W_x, W_h, b):
    """One step: (B, D), (B, H), (B, H) -> the new h and c."""
    i, f, g, o = (x_t @ W_x.T + h @ W_h.T + b).chunk(4, dim=1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def lstm(x, W_x, W_h, b):
    """x (B, T, D) -> all h (B, T, H)."""
    h = c = x.new_zeros(len(x), W_h.shape[1])
    states = []
    for x_t in x.unbind(dim=1):
        h, c = cell(x_t, h, c, W_x, W_h, b)
        states.append(h)
    return torch.stack(states, dim=1)


library = nn.LSTM(D, H, batch_first=True)
W_x, W_h, b_x, b_h = library.all_weights[0]
assert (W_x.shape, W_h.shape) == ((4 * H, D), (4 * H, H))
h = lstm(x, W_x, W_h, b_x + b_h)
print(h[0].detach())
difference(h, library(x)[0], "by hand and nn.LSTM", below=1e-5)

# %% [markdown] tags=["predict"]
# ## 3 · How much of frame 1 reaches the last frame?
#
# Training can teach a network to use frame 1 only if the last answer changes when frame 1 does, and the gradient says how much. First the cell alone. With
# $W_h = 0$ no gate depends on an earlier step, and the derivative of the last cell with respect to the first is a product of forget gates:
#
# $$\frac{\partial c_T}{\partial c_1} = \prod_{t=2}^{T} f_t$$
#
# A fresh LSTM's biases are close to 0, so its gates are close to $\sigma(0) = 1/2$. With 40 frames: is about a fortieth left, a millionth, or a millionth of a millionth? And if we
# set $b_f = 3$?

# %%
T, H = 40, 3
rng = np.random.default_rng(1)
x = torch.tensor(rng.standard_normal((1, T, D)))  # float64
for b_f in (0.0, 1.0, 3.0):
    W_x, W_h, b = torch.tensor(rng.standard_normal((4 * H, D))), x.new_zeros(4 * H, H), x.new_zeros(4 * H)
    W_x[H : 2 * H], b[H : 2 * H] = 0, b_f  # the forget gate sees its bias only
    c_1 = torch.full((1, H), 0.5, dtype=x.dtype, requires_grad=True)
    h, c = x.new_zeros(1, H), c_1
    for t in range(1, T):
        h, c = cell(x[:, t], h, c, W_x, W_h, b)
    (gradient,) = torch.autograd.grad(c.sum(), c_1)
    f = torch.tensor(b_f).double().sigmoid()
    difference(gradient / f ** (T - 1), torch.ones(1, H), "gradient and product", below=1e-8)
    print(f"    b_f = {b_f:.0f}: f = {f:.3f}, and {f ** (T - 1):.1e} of c_1 is left")

# %% [markdown] tags=["explain"]
# A millionth of a millionth; with $b_f = 3$, 15 %. A memory that loses half of what it holds at each step keeps nothing for 40. (Hence the old advice: start the forget bias above 0.)
#
# Now whole networks, with $W_h$. We take the gradient of the last output with respect to each frame, and divide its length by the one for the last frame. Beside them stands the
# non-local operation of notebook 05's fresh block, over time: in it, frame 40 sees frame 1 directly.

# %%
D, H = 8, 32
torch.manual_seed(0)
frames = torch.randn(16, T, D)
direction = torch.randn(16, H)  # mixes the H outputs of a clip into one number, which has a gradient


def forget_bias(network, value):
    """Sets the sum of the two forget biases of an nn.LSTM."""
    H = network.hidden_size
    with torch.no_grad():
        network.bias_ih_l0[H : 2 * H], network.bias_hh_l0[H : 2 * H] = value, 0
    return network


def reach(network):
    """How much of each frame reaches the last output, as a share of the last frame's: (T,)."""
    x = frames.clone().requires_grad_()
    last = network(x)[:, -1]
    (gradient,) = torch.autograd.grad((last * direction).sum(), x)
    size = gradient.norm(dim=2).mean(dim=0)
    return size / size[-1]


theta, phi, g = (nn.Linear(D, H) for _ in range(3))
for layer in (theta, phi, g):
    nn.init.normal_(layer.weight, std=0.01)  # as notebook 05's block starts
plain = nn.RNN(D, H, batch_first=True)
leaks, holds = (forget_bias(nn.LSTM(D, H, batch_first=True), b_f) for b_f in (0, 3))
curves = {
    "RNN": reach(lambda x: plain(x)[0]),
    "LSTM, b_f = 0": reach(lambda x: leaks(x)[0]),
    "LSTM, b_f = 3": reach(lambda x: holds(x)[0]),
    "non-local": reach(lambda x: torch.softmax(theta(x) @ phi(x).transpose(1, 2), dim=2) @ g(x)),
}
for name, curve in curves.items():
    assert curve.shape == (T,)
    print(f"{name:14} frame 1: {'below 1e-6' if curve[0] < 1e-6 else f'{curve[0]:.1f}'}")
assert min(curves["LSTM, b_f = 3"].min(), curves["non-local"].min()) > 0.1
assert curves["RNN"][0] < 1e-10
assert 1e-9 < curves["LSTM, b_f = 0"][0] < 1e-7

# %%
fig, ax = plt.subplots(figsize=(6, 3))
for (name, curve), style in zip(curves.items(), ("--", "-.", "-", ":"), strict=True):
    ax.semilogy(range(1, T + 1), curve, style, label=name)
ax.set(xlabel="frame t", ylabel="gradient, last frame = 1", ylim=(1e-12, 5))
ax.legend(loc="lower right")
plots.show(
    fig,
    "Four curves over 40 frames, on a logarithmic axis. RNN and LSTM with forget bias 0 fall as straight lines from 1 at "
    "the last frame to less than 1e-10 and about 1e-8 at frame 1; the LSTM with bias 3 and the non-local operation stay near 1.",
)
with torch.no_grad():
    holds.weight_hh_l0.zero_()
alone = reach(lambda x: holds(x)[0])[0]
print(f"LSTM, b_f = 3, its W_h set to 0, frame 1: {alone:.1f}")
assert alone < 0.2

# %% [markdown]
# A straight line on this axis is a power: every step back multiplies by the same factor. The LSTM with $b_f = 3$ passes on more than the 15 % of its gates, because $W_h$ is a second way: what is shown at one step is
# written again at the next. Without $W_h$ a tenth is left.

# %% [markdown] tags=["predict"]
# ## 4 · T steps, or one
#
# Does it matter? Here is a task that needs memory: of 20 frames each shows one of 4 things, and the first also has a mark. The question after the last frame: *what did the marked frame show?*
# Three networks get 300 steps of training: an LSTM with $b_f = 0$, one with $b_f = 3$, and a non-local block of notebook 05 over time. Look at section 3's curves, 19 frames before the last. Who will learn it?


# %%
def recall(count, generator):
    things = torch.randint(4, (count, 20), generator=generator)
    mark = torch.zeros(count, 20, 1)
    mark[:, 0] = 1
    return torch.cat([F.one_hot(things, 4), mark], dim=2), things[:, 0]


class Reader(nn.Module):
    """(B, T, 5) -> the answer after the last frame, (B, 4)."""

    def __init__(self, b_f=None):
        super().__init__()
        self.embed, self.answer = nn.Linear(5, 32), nn.Linear(32, 4)
        self.lstm = None if b_f is None else forget_bias(nn.LSTM(32, 32, batch_first=True), b_f)
        self.block = NonLocalBlock(32, ndim=1) if b_f is None else None

    def forward(self, x):
        x = self.embed(x)
        y = self.lstm(x)[0] if self.lstm else self.block(x.transpose(1, 2)).transpose(1, 2)
        return self.answer(y[:, -1])


right = {}
for name, b_f in (("LSTM, b_f = 0", 0), ("LSTM, b_f = 3", 3), ("non-local block", None)):
    torch.manual_seed(0)
    reader, generator = Reader(b_f), torch.Generator().manual_seed(1)
    optimiser = torch.optim.Adam(reader.parameters(), lr=0.01)
    for _step in range(300):
        x, thing = recall(64, generator)
        optimiser.zero_grad()
        F.cross_entropy(reader(x), thing).backward()
        optimiser.step()
    x, thing = recall(1000, generator)
    right[name] = (reader.eval()(x).argmax(dim=1) == thing).float().mean().item()
    print(f"{name:15} {'all but a few right' if right[name] > 0.95 else 'a guess among four'}")
assert abs(right["LSTM, b_f = 0"] - 0.25) < 0.1
assert min(right["LSTM, b_f = 3"], right["non-local block"]) > 0.95

# %% [markdown] tags=["explain"]
# The LSTM whose memory leaks never learns that frame 1 mattered: only some $2^{-19}$ of the gradient comes back to it. An LSTM *can* carry it, once its gate is open, but through 19 steps, each of which must hold. A block needs one step for any
# distance, which is the non-local paper's argument against stacking and repeating local operations. What a block lacks comes in section 7.
#
# ## 5 · A small LRCN
#
# Donahue and others (2015) put a CNN and an LSTM together: the CNN turns every frame into a vector, the LSTM reads the vectors. Our "frames" are the optical flow of notebook 11's clips: 16 frames make 15 flow fields.

# %%
print(describe_source())
clips = open_clips()
drawn = clips.name == "procedural"  # some numbers below are claimed for these clips only
number = settings.clips if drawn else settings.clips // 2  # real clips are larger: their flow takes longer
chosen = np.random.default_rng(0).permutation(len(clips))[:number]
clips = replace(clips, clips=tuple(clips.clips[k] for k in sorted(chosen)))
inputs = study.prepare(clips, frames=15, resize=(24, 32)).to(settings.device)  # 15 fields from 16 frames
train, test = inputs.split(0)
recipe = study.Recipe(epochs=settings.epochs, resize=(24, 32), size=(22, 30), warmup=1, frames=15)
# `size` is the part that a network sees: cut out at random in training, in the middle in tests

x = inputs.batch("flow", train[:3], recipe.size).cpu()
label = inputs.labels[train[:3]]
B, C, T, height, width = x.shape
assert (B, C, T, height, width) == (3, 2, 15, 22, 30)
K = len(inputs.classes)
print(f"{len(train)} clips to train on, {len(test)} to test; {K} classes")

# %% [markdown]
# **Step 1, the CNN.** Four convolutions and a mean over space. It knows no time: frames join the batch, $(B, C, T, H, W) \to (B \cdot T, C, H, W)$. T must move next to B *before* they
# are joined; notebook 11 showed what a bare `reshape` does to a clip.


# %%
def encoder(channels, widths=(16, 32, 64, 128)):
    """(N, channels, H, W) -> (N, widths[-1])."""
    layers = []
    for stage, out in enumerate(widths):
        layers += [
            nn.Conv2d(channels, out, 3, stride=2 if stage == 0 else 1, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
        ]
        layers += [nn.MaxPool2d(2)] if stage in (1, 2) else []
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


torch.manual_seed(0)
cnn, reader, classifier = encoder(C).eval(), nn.LSTM(128, 64, batch_first=True), nn.Linear(64, K)
pictures = x.transpose(1, 2).flatten(0, 1)
assert pictures.shape == (B * T, C, height, width)
assert torch.equal(pictures[1 * T + 4], x[1, :, 4])  # clip 1, field 4

# %% [markdown]
# **Steps 2 to 4**: vectors back into clips, the LSTM, and one classifier for all steps. A clip gets 15 answers, each from the fields seen so far.
#
# $$p_t = \mathrm{softmax}(W h_t + b), \qquad p = \frac1T \sum_t p_t, \qquad L = -\frac1T \sum_t \log p_t[\text{label}]$$
#
# Its answer is the mean of the $p_t$. The loss $L$, here of one clip, counts *every step*: it rewards being right early.

# %%
vectors = cnn(pictures).unflatten(0, (B, T))
states, _ = reader(vectors)
p_t = classifier(states).softmax(dim=2)
assert (vectors.shape, states.shape, p_t.shape) == ((B, T, 128), (B, T, 64), (B, T, K))
p = p_t.mean(dim=1)
L = -torch.stack([p_t[b, :, label[b]].log().mean() for b in range(B)]).mean()
assert torch.allclose(p.sum(dim=1), torch.ones(B))

short = classifier(reader(cnn(pictures).unflatten(0, (B, T))[:, :5])[0]).softmax(dim=2)
difference(short, p_t[:, :5], "the first 5 answers, with and without the rest of the clip", below=1e-5)


# %%
class CNNLSTM(nn.Module):
    """(B, C, T, H, W) -> log p, (B, K): `cnn` on every frame, an LSTM, an answer at every step."""

    input = "flow"

    def __init__(self, cnn, vector, state, classes, dropout=0.2):
        super().__init__()
        self.encoder, self.rnn = cnn, nn.LSTM(vector, state, batch_first=True)
        self.classifier, self.dropout = nn.Linear(state, classes), nn.Dropout(dropout)

    def steps(self, x):
        vectors = self.encoder(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1))
        states, _ = self.rnn(self.dropout(vectors))
        return self.classifier(self.dropout(states))  # (B, T, K)

    def forward(self, x):
        return self.steps(x).softmax(dim=2).mean(dim=1).log()

    def loss(self, x, label):
        log_p = self.steps(x).log_softmax(dim=2)
        return -log_p[torch.arange(len(x)), :, label].mean()


model = CNNLSTM(cnn, 128, 64, K).eval()
model.rnn, model.classifier = reader, classifier
difference(model(x).exp(), p, "class and steps", below=1e-5)
difference(model.loss(x, label), L, "its loss", below=1e-5)
library = create_model("cnn_rnn", K, input="flow", hidden=64).eval()
library.load_state_dict(model.state_dict())
difference(library(x), model(x), "class and nlutils' cnn_rnn", below=1e-5)

# %% [markdown]
# ## 6 · Training, and how certainty grows

# %% tags=["nbval-ignore-output"]
with study.seeded(recipe.seed):
    model = CNNLSTM(encoder(C), 128, 64, K).to(settings.device)
losses = study.train(model, inputs, train, recipe)
print("loss of each epoch:", " ".join(f"{loss:.2f}" for loss in losses))

model.eval()
x = inputs.batch("flow", test, recipe.size)
label = inputs.labels[test].to(settings.device)
with torch.no_grad():
    p_t = model.steps(x).softmax(dim=2)  # (test clips, T, K)
assert p_t.shape == (len(test), T, K)
accuracy = (p_t.mean(dim=1).argmax(dim=1) == label).float().mean().item()
print(f"{accuracy:.0%} of {len(test)} test clips right; a guess: {1 / K:.0%}")
assert losses[-1] < losses[0]
assert accuracy > 1.5 / K or not drawn

# %% [markdown] tags=["predict"]
# Two questions before you look:
#
# 1. *Certainty* is the probability of the right class. How large is it after the *first* field, and after how many fields does it stop growing?
# 2. Which fields' vectors receive the largest gradient when the loss is taken at the last step only? And when it is taken at every step?

# %% tags=["nbval-ignore-output"]
certainty = p_t[torch.arange(len(test)), :, label]  # (test clips, T)
vectors = model.encoder(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).detach().requires_grad_()
model.rnn.train()  # it has no dropout of its own, and a GPU's LSTM has a backward pass in this mode only
log_p = model.classifier(model.rnn(vectors)[0]).log_softmax(dim=2)[torch.arange(len(test)), :, label]
shares = {}
for name, loss in (("at the last step", -log_p[:, -1].mean()), ("at every step", -log_p.mean())):
    (gradient,) = torch.autograd.grad(loss, vectors, retain_graph=True)
    size = gradient.norm(dim=2).mean(dim=0)
    shares[name] = 100 * (size / size.sum()).cpu()

fig, axes = plt.subplots(1, 3, figsize=(9.5, 2.7))
fields = range(1, T + 1)
axes[0].plot(fields, -certainty.log().mean(dim=0).cpu())
axes[0].set(ylabel="loss of the test clips", ylim=0)
for k, name in enumerate(inputs.classes):
    axes[1].plot(fields, certainty[label == k].mean(dim=0).cpu(), lw=0.8, label=name)
axes[1].plot(fields, certainty.mean(dim=0).cpu(), "k", lw=2.5)
axes[1].set(ylabel="certainty of the right class", ylim=(0, 1))
axes[1].legend(fontsize=6, ncols=3, loc="lower center")
for (name, share), style in zip(shares.items(), ("-", "--"), strict=True):
    axes[2].plot(fields, share, style, label=f"loss {name}")
axes[2].set(ylabel="share of the gradient, %", ylim=0)
axes[2].legend(fontsize=8)
for ax in axes:
    ax.set_xlabel("fields seen" if ax is not axes[2] else "field")
first, last = certainty[:, 0].mean(), certainty[:, -1].mean()
plots.show(
    fig,
    f"Three plots over 15 flow fields. The loss of the test clips falls most over the first fields. The certainty of the right class, a "
    f"line for each class and a thick one for their mean, rises from {first:.2f} to {last:.2f}. With the loss at every step "
    f"the first field receives {shares['at every step'][0]:.0f} per cent of the gradient, the last {shares['at every step'][-1]:.0f}.",
)
fourth = certainty[:, 3].mean()
print(f"certainty after 1 field {first:.2f}, 4 fields {fourth:.2f}, {T} fields {last:.2f}")
if drawn:
    assert first > 1.5 / K
    assert last - fourth < fourth - first


# %% tags=["nbval-ignore-output"]
for name, share in shares.items():
    print(f"loss {name}: {share[0]:.0f} % of the gradient at field 1, {share[-1]:.0f} % at field {T}")
assert shares["at every step"].argmax() < 3
assert shares["at the last step"].argmax() > T - 3
if drawn:
    assert 12 < shares["at every step"][0] < 30
    assert shares["at the last step"][0] > 2
    run, clap = (inputs.classes.index(name) for name in ("running", "handclapping"))
    either = (label == run) | (label == clap)
    told = (p_t[either, 0, run] > p_t[either, 0, clap]) == (label[either] == run)
    print(f"running told from clapping by the first field: {told.float().mean():.0%} of {len(told)} clips")
    assert told.float().mean() > 0.75


def forget_gates(network, vectors):
    with torch.no_grad():
        states = network(vectors)[0]
        before = F.pad(states[:, :-1], (0, 0, 1, 0))  # h_{t-1}, with h_0 = 0
        W_x, W_h, b_x, b_h = (weight[64:128] for weight in network.all_weights[0])  # the rows of f
        return (vectors @ W_x.T + before @ W_h.T + b_x + b_h).sigmoid()


fresh = forget_gates(nn.LSTM(128, 64, batch_first=True).to(settings.device), vectors).mean()
f = forget_gates(model.rnn, vectors)
assert f.shape == (len(test), T, 64)
print(f"forget gates on average: fresh {fresh:.2f}, trained {f.mean():.2f}")
assert 0.4 < fresh < 0.6
assert f.mean() > fresh

# %% [markdown] tags=["explain"]
# On the procedural clips the network gives nearly half of the probability to the right class after one field, and after four it gains little more. Flow *is* motion: a single field tells running from clapping.
#
# The two gradients run in opposite directions. With a loss at every step, field 1 takes part in 15 losses and field 15 in one: if each answer shared its
# gradient equally among the fields it has seen, field 1 would get $\frac1{15} \sum_{s=1}^{15} \frac1s = 22\,\%$; about a fifth is measured. So no field depends on a gradient from 15 steps away, as frame 1 of section 4 did: each has an answer close by.
# With the loss at the last step only, field 1 still gets a part. Fifteen steps are few, and training has opened the forget gates, though only to about two thirds.
#
# Here is the clip whose certainty grew most: its frames, its flow as the network sees it (hue is direction), and the probabilities of the right class and of the wrong one that was likeliest after field 1.

# %% tags=["nbval-ignore-output"]
k = int((certainty[:, -1] - certainty[:, 0]).argmax())
true = int(label[k])
rival = int(p_t[k, 0].masked_fill(torch.arange(K, device=p_t.device) == true, 0).argmax())
fig, axes = plt.subplots(2, 4, figsize=(8.4, 3.6))
for column, t in zip(axes.T, (0, 3, 7, 14), strict=True):
    column[0].imshow(inputs.frames[test[k], :, t].permute(1, 2, 0).cpu(), interpolation="nearest")
    column[1].imshow(plots.flow_to_rgb(x[k, :, t].permute(1, 2, 0).cpu(), largest=2.0))
    says = "\n".join(f"{inputs.classes[c]} {p_t[k, t, c]:.2f}" for c in (true, rival))
    column[0].set_title(f"frame {t + 1}", fontsize=9)
    column[1].set_title(says, fontsize=9)
for ax in axes.flat:
    ax.set_axis_off()
plots.show(
    fig,
    f"Frames 1, 4, 8 and 15 of a clip of {inputs.classes[true]}, and their flow as colours. Its probability rises from "
    f"{p_t[k, 0, true]:.2f} to {p_t[k, -1, true]:.2f}, that of {inputs.classes[rival]} goes from {p_t[k, 0, rival]:.2f} to {p_t[k, -1, rival]:.2f}.",
)
assert p_t[k, -1, true] > p_t[k, 0, true]

# %% [markdown]
# ## 7 · Five ways to pool time
#
# Ng and others (2015) compare LSTMs with something simpler: the *maximum* over time. Their five networks take it at different places. The CNN's maps of T frames are (B, T, C, h, w); `fc1` and `fc2`
# are linear layers with ReLU. Windows are 10 frames long and start 5 frames apart, so they overlap.


# %%
def windows(maps, length=10, step=5):
    starts = range(0, maps.shape[1] - length + 1, step)
    return torch.stack([maps[:, t : t + length].amax(dim=1) for t in starts], dim=1)


def conv_pooling(maps, fc1, fc2):  # max over all frames, then fc
    return fc2(fc1(maps.amax(dim=1).flatten(1)))


def late_pooling(maps, fc1, fc2):  # fc on every frame, then max
    return fc2(fc1(maps.flatten(2))).amax(dim=1)


def slow_pooling(maps, fc1, fc2):  # max over windows, fc, max over all windows, fc
    return fc2(fc1(windows(maps).flatten(2)).amax(dim=1))


def local_pooling(maps, fc1, fc2):  # max over windows, fc; the windows stay apart
    return fc2(fc1(windows(maps).flatten(2))).flatten(1)


def time_domain_pooling(maps, fc1, fc2, conv):
    # a convolution first: 256 kernels of 10 frames x 3 x 3, step 5; then as conv pooling
    over_time = torch.relu(conv(maps.transpose(1, 2)))
    return fc2(fc1(over_time.amax(dim=2).flatten(1)))


# %%
torch.manual_seed(0)
maps = torch.randn(2, 20, 3, 2, 4, dtype=torch.float64)  # (B, T, C, h, w)
assert windows(maps).shape == (2, 3, 3, 2, 4)
joined = {}
poolings = dict(
    conv=conv_pooling,
    late=late_pooling,
    slow=slow_pooling,
    local=local_pooling,
    time_domain=time_domain_pooling,
)
for pooling, by_hand in poolings.items():
    # without a CNN (nn.Identity), the network takes maps for its frames
    options = dict(encoder=nn.Identity(), fc=(7, 6), size=(2, 4), frames=20)
    joined[pooling] = create_model("beyond_short_snippets", 5, pooling=pooling, **options).double().eval()
    _, fc1, fc2 = joined[pooling].fc  # the first flattens
    conv = [joined[pooling].over_time] if pooling == "time_domain" else []
    y = by_hand(maps, fc1, fc2, *conv)
    y = joined[pooling].classifier(y)
    assert y.shape == (2, 5)
    difference(y, joined[pooling](maps.transpose(1, 2)), f"{pooling:11} by hand and nlutils", below=1e-8)

# %% [markdown] tags=["predict"]
# Which of them know in what order the frames came? Three tests: the frames come (1) last first, (2) shuffled, (3) with two of them exchanged that lie in the same windows. Two more networks take part: an LSTM, and a non-local block over
# time whose output is averaged over the frames. Where will the answer stay the same?

# %%
joined["LSTM"] = nn.LSTM(24, 5, batch_first=True).double()
joined["block"] = NonLocalBlock(24, ndim=1, zero_init=False).double().eval()


def answer(name, maps):
    if name == "LSTM":
        return joined[name](maps.flatten(2))[0][:, -1]
    if name == "block":
        return joined[name](maps.flatten(2).transpose(1, 2)).mean(dim=2)
    return joined[name](maps.transpose(1, 2))


exchanged = torch.arange(20)
exchanged[6], exchanged[8] = 8, 6
orders = {
    "last first": torch.arange(19, -1, -1),
    "shuffled": torch.randperm(20),
    "exchanged": exchanged,
}
print(" " * 11, *(f"{name:10}" for name in orders), sep="  ")
knows = {}
for name in joined:
    same = [torch.allclose(answer(name, maps[:, o]), answer(name, maps), atol=1e-9) for o in orders.values()]
    knows[name] = [not s for s in same]
    print(f"{name:11}", *(f"{'same' if s else 'other':10}" for s in same), sep="  ")
blind = [False, False, False]
assert knows["conv"] == knows["late"] == knows["block"] == blind
assert (knows["slow"], knows["local"]) == ([False, True, False], [True, True, False])
assert knows["time_domain"] == knows["LSTM"] == [True, True, True]

# %% [markdown] tags=["explain"]
# A maximum forgets the order, as a mean does. *Slow* knows which frames shared a window, but not which way time runs: a reversed clip has the same windows, reversed. *Local* has a
# classifier that tells window 1 from window 3. *Time-domain* knows what follows what inside 10 frames, and only the LSTM knows it for the whole clip.
#
# And the non-local block is blind to order: every frame sees all others, but not *when* they were. In the paper's I3D the convolutions around a block bring the order in; its C2D has only poolings over windows, as *slow* has.
#
# To know the order is one thing. Does the network of section 6 *use* it?

# %% tags=["nbval-ignore-output"]
with torch.no_grad():
    shuffled = model(x[:, :, torch.randperm(T)]).argmax(dim=1)
    agree = (shuffled == model(x).argmax(dim=1)).float().mean()
right = (shuffled == label).float().mean()
print(f"right: {accuracy:.0%} in order, {right:.0%} shuffled; same answer for {agree:.0%}")
if drawn:
    assert agree > 0.8
    assert abs(right - accuracy) < 0.15

# %% [markdown]
# Hardly, on the procedural clips: shuffled fields are recognised about as well. Walking is walking in any order of its fields, so nothing in training asked for more. Before you claim that a network "models time", shuffle its frames.
#
# ## 8 · The papers' sizes
#
# On the device `"meta"` tensors have a shape and no numbers, so 65 million parameters cost nothing. For LRCN, `derived` follows from the authors' released layer definition; for Ng's five stacked LSTMs of 512 cells, from their sizes, with two
# biases as in PyTorch. They read the 4,096 numbers of AlexNet or the 1,024 of GoogLeNet.


# %%
def count(module):
    return sum(weight.numel() for weight in module.parameters())


with torch.device("meta"):
    lrcn = create_model("lrcn", 101)  # UCF101
    stacks = [
        create_model("beyond_short_snippets", 487, pooling="lstm", encoder=name).lstm
        for name in ("alexnet", "inception")
    ]
    maps, shapes = torch.empty(1, 3, 227, 227), []
    for name, layer in lrcn.encoder.named_children():
        maps = layer(maps)
        if name[:4] in ("conv", "pool"):
            shapes.append(f"{name} {'x'.join(str(side) for side in maps.shape[1:])}")
    print("LRCN's maps:", ", ".join(shapes))
    answers = lrcn.steps(torch.empty(2, 3, 16, 227, 227))
assert (maps.shape, answers.shape) == ((1, 384, 6, 6), (2, 16, 101))

rows = [
    ("LRCN, five convolutions", 4_310_656, count(lrcn.encoder)),
    ("LRCN, fc6, 13,824 to 4,096", 56_627_200, count(lrcn.fc6)),
    ("LRCN, LSTM of 256, two biases", 4_458_496, count(lrcn.lstm)),
    ("LRCN, the same, one bias", 4_457_472, count(lrcn.lstm) - lrcn.lstm.bias_hh_l0.numel()),
    ("LRCN, classifier, 101 classes", 25_957, count(lrcn.classifier)),
    ("Ng, LSTMs on 4,096", 17_846_272, count(stacks[0])),
    ("Ng, LSTMs on 1,024", 11_554_816, count(stacks[1])),
]
print(" " * 30, f"{'derived':>12} {'nlutils':>12}")
for name, derived, ours in rows:
    assert derived == ours, name
    print(f"{name:30} {derived:12,} {ours:12,}  equal")
facts = lrcn.expects
print(f"LRCN expects {facts.frames} frames of {facts.size[0]} x {facts.size[1]}, {facts.colour}")

# %% [markdown]
# ## 9 · What the papers reported
#
# LRCN on UCF101, per cent right, mean of three splits, as summaries of its Table 1 give it:
#
# | | RGB | flow | mean of both | ⅓ RGB + ⅔ flow |
# |:--|--:|--:|--:|--:|
# | single frame | 67.37 | 74.37 | 75.46 | 78.94 |
# | LRCN-fc6 | 68.20 | 77.28 | 80.90 | 82.34 |
#
# Some summaries exchange 78.94 and 80.90. The gains that the paper itself states decide which order is right: +0.83, +2.91, and +3.40 for the best.

# %%
single, lrcn_fc6 = np.array([67.37, 74.37, 75.46, 78.94]), np.array([68.20, 77.28, 80.90, 82.34])
print("gain of the LSTM:       ", np.round(lrcn_fc6 - single, 2))
print("with the cells swapped: ", round(82.34 - 80.90, 2), "for the best")
assert np.allclose((lrcn_fc6 - single)[[0, 1, 3]], [0.83, 2.91, 3.40])
assert np.isclose(single[1] - single[0], 7)

# %% [markdown]
# On colour frames the LSTM adds less than a point to the single-frame network; a single frame's *flow* instead of its colours adds seven.
#
# The abstract of Ng and others gives 73.1 % on Sports-1M (60.9 before), and on UCF101 88.6 % with flow, 82.6 % without. A later comparison table quotes 71.7 % on Sports-1M for their conv pooling, which is blind to order. According to summaries,
# it was the best of the poolings and time-domain convolution the worst; maxima learned better than means; and of four ways to join an LSTM's answers the weighting of exercise 2 was best, all within 1 %.

# %% [markdown] tags=["exercise"]
# ## Exercises
#
# ### Exercise 1 · Count an LSTM (easy, 10 minutes)
#
# Write `lstm_count(D, H, layers, biases)`: the number of parameters of `layers` LSTMs of H cells, stacked on vectors of D numbers, with 1 or 2 bias vectors for each gate. **Expect**: `lstm_count(4096, 256, 1, 1)` is 4,457,472, and with 512 cells, 5 layers and 2 biases on 1,024 numbers it is 11,554,816.
#
# <details><summary>Hint 1: a nudge</summary>What shapes have W_x, W_h and b in section 2? And what does the second layer read?</details>
# <details><summary>Hint 2: the formula</summary>4 (D H + H² + biases · H) for a layer; above the first, D is H.</details>
# <details><summary>Hint 3: part of the code</summary><code>sum(4 * (d * H + …) for d in [D] + [H] * (layers - 1))</code></details>


# %% tags=["stub"]
def lstm_count(D, H, layers, biases):
    #: solution
    return sum(4 * (d * H + H * H + biases * H) for d in [D] + [H] * (layers - 1))
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
def every(formula):
    return formula(4096, 256, 1, 1), formula(1024, 512, 5, 2)


def stacked(d, D, H, layers):
    return [D] + [d] * (layers - 1)


check(
    "Exercise 1",
    lambda: every(lstm_count),
    (4_457_472, 11_554_816),
    mistakes={
        "every layer above the first reads H numbers, not D": every(
            lambda D, H, layers, biases: layers * 4 * (D * H + H * H + biases * H)
        ),
        "there are four gates, each with its own matrices": every(
            lambda D, H, layers, biases: sum(d * H + H * H + biases * H for d in stacked(H, D, H, layers))
        ),
        "the matrices of the state are missing": every(
            lambda D, H, layers, biases: sum(4 * (d * H + biases * H) for d in stacked(H, D, H, layers))
        ),
        "you count one bias vector for each gate; `biases` says how many": every(
            lambda D, H, layers, biases: sum(4 * (d * H + H * H + H) for d in stacked(H, D, H, layers))
        ),
        "a bias vector has H numbers, one for each cell": every(
            lambda D, H, layers, biases: sum(4 * (d * H + H * H + biases) for d in stacked(H, D, H, layers))
        ),
        "the biases are missing": every(
            lambda D, H, layers, biases: sum(4 * (d * H + H * H) for d in stacked(H, D, H, layers))
        ),
        "you count one layer only": every(lambda D, H, layers, biases: 4 * (D * H + H * H + biases * H)),
    },
)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Weighted answers (medium, 15 minutes)
#
# Ng and others weight the answer after frame t by a gain $g_t$, which rises linearly from 0 at the first frame to 1 at the last. Write `weighted(p_t)`, which takes probabilities (B, T, K) and returns their weighted mean over time, (B, K). **Expect**: rows that sum to 1.
#
# <details><summary>Hint 1: a nudge</summary>A weighted mean is a weighted sum, divided by the sum of the weights.</details>
# <details><summary>Hint 2: the formula</summary>p = Σ g_t p_t / Σ g_t, with g_t = (t − 1) / (T − 1).</details>
# <details><summary>Hint 3: part of the code</summary><code>gain = torch.linspace(0, 1, p_t.shape[1])[None, :, None]</code></details>


# %% tags=["stub"]
def weighted(p_t):
    #: solution
    gain = torch.linspace(0, 1, p_t.shape[1])[None, :, None]
    return (gain * p_t).sum(dim=1) / gain.sum()
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
torch.manual_seed(3)
p_t = torch.randn(2, 6, 4).softmax(dim=2)
gain = torch.linspace(0, 1, 6)[None, :, None]
mean = (gain * p_t).sum(dim=1) / gain.sum()
check(
    "Exercise 2",
    lambda: weighted(p_t),
    mean,
    mistakes={
        "this is the weighted sum; divide it by the sum of the weights": mean * gain.sum(),
        "you divided by T, not by the sum of the weights": (gain * p_t).mean(dim=1),
        "the weights fall; they should rise": (gain.flip(1) * p_t).sum(dim=1) / gain.sum(),
        "all frames count alike: that is the plain mean": p_t.mean(dim=1),
        "only the last answer counts in yours": p_t[:, -1],
        "you return the weighted answers; sum them over time": gain * p_t / gain.sum(),
        "the first weight is 0, not 1/T": (torch.arange(1, 7)[None, :, None] * p_t).sum(dim=1) / 21,
    },
)

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · A GRU (hard, 20 minutes)
#
# A gated recurrent unit has no separate cell. PyTorch's is
#
# $$r = \sigma(W_{xr} x_t + b_{xr} + W_{hr} h + b_{hr}), \quad z = \sigma(W_{xz} x_t + b_{xz} + W_{hz} h + b_{hz})$$
#
# and $n = \tanh(W_{xn} x_t + b_{xn} + r \odot (W_{hn} h + b_{hn}))$; the new state is $(1 - z) \odot n + z \odot h$. Write one step, `gru(x_t, h, W_x, W_h, b_x, b_h)`, which returns the new state; matrices and biases are stacked in the order r, z, n. **Expect**: the state that `nn.GRU` gives.
#
# <details><summary>Hint 1: a nudge</summary>Keep what comes from x apart from what comes from h: n needs them apart.</details>
# <details><summary>Hint 2: the formula</summary>With a = W_x x + b_x and u = W_h h + b_h, each in three parts: r = σ(a_r + u_r), z = σ(a_z + u_z), n = tanh(a_n + r ⊙ u_n).</details>
# <details><summary>Hint 3: part of the code</summary><code>a_r, a_z, a_n = (x_t @ W_x.T + b_x).chunk(3, dim=1)</code></details>


# %% tags=["stub"]
def gru(x_t, h, W_x, W_h, b_x, b_h):
    #: solution
    a_r, a_z, a_n = (x_t @ W_x.T + b_x).chunk(3, dim=1)
    u_r, u_z, u_n = (h @ W_h.T + b_h).chunk(3, dim=1)
    r, z = (a_r + u_r).sigmoid(), (a_z + u_z).sigmoid()
    return (1 - z) * (a_n + r * u_n).tanh() + z * h
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
torch.manual_seed(4)
layer = nn.GRU(5, 4, batch_first=True)
weights = [w.detach() for w in layer.all_weights[0]]
x_t, h = torch.randn(3, 5), torch.randn(3, 4)
with torch.no_grad():
    expected = layer(x_t[:, None], h[None])[0][:, 0]
a, u = x_t @ weights[0].T + weights[2], h @ weights[1].T + weights[3]
(a_r, a_z, a_n), (u_r, u_z, u_n) = a.chunk(3, dim=1), u.chunk(3, dim=1)
r, z, b_n = (a_r + u_r).sigmoid(), (a_z + u_z).sigmoid(), weights[3][8:]
n = (a_n + r * u_n).tanh()
check(
    "Exercise 3",
    lambda: gru(x_t, h, *weights),
    expected,
    mistakes={
        "z and 1 - z are exchanged": z * n + (1 - z) * h,
        "this is n; the new state mixes it with h": n,
        "n needs a tanh": (1 - z) * (a_n + r * u_n) + z * h,
        "the order in the stack is r, z, n; r and z are exchanged": (1 - r) * (a_n + z * u_n).tanh() + r * h,
        "r is missing in n": (1 - z) * (a_n + u_n).tanh() + z * h,
        "r multiplies h before the matrix; PyTorch multiplies after it": (1 - z)
        * (a_n + (r * h) @ weights[1][8:].T + b_n).tanh()
        + z * h,
        "the bias b_hn belongs inside the bracket that r multiplies": (1 - z)
        * (a_n + r * (u_n - b_n) + b_n).tanh()
        + z * h,
    },
)

# %% [markdown]
# ## What you learned
#
# - An LSTM's memory is a product of forget gates: half open, it loses frame 1 within 20 frames; at $b_f = 3$ it holds.
# - An LSTM needs T steps where a non-local block needs one; the LSTM knows the order and the block does not.
# - LRCN takes the loss at every step, which gives every frame an answer close by, and the first frames most of the gradient.
# - Where the maximum is taken decides what a pooling knows of order; what a network *uses* is measured by shuffling.
# - Both systems at full size have the numbers of parameters that follow from their published layers.
#
# ## Further reading
#
# - J. Donahue, L. A. Hendricks, S. Guadarrama, M. Rohrbach, S. Venugopalan, K. Saenko, T. Darrell: *Long-term Recurrent Convolutional Networks for Visual Recognition and Description*. CVPR 2015.
# - J. Y.-H. Ng, M. Hausknecht, S. Vijayanarasimhan, O. Vinyals, R. Monga, G. Toderici: *Beyond Short Snippets: Deep Networks for Video Classification*. CVPR 2015.
# - S. Hochreiter, J. Schmidhuber: *Long Short-Term Memory*. Neural Computation 1997.
# - F. A. Gers, J. Schmidhuber, F. Cummins: *Learning to Forget: Continual Prediction with LSTM*. Neural Computation 2000.
# - R. Jozefowicz, W. Zaremba, I. Sutskever: *An Empirical Exploration of Recurrent Network Architectures*. ICML 2015. The forget bias.
# - X. Wang, R. Girshick, A. Gupta, K. He: *Non-local Neural Networks*. CVPR 2018.
