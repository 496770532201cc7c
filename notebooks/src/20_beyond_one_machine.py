# %% [markdown]
# # 20 · Beyond one machine
#
# After this notebook you can
#
# - measure where the time of a training step goes, and how far it is from what the processor can do
# - predict what bfloat16 loses, and find a gradient that reads memory which nobody wrote
# - split a batch over processes so that the gradient stays the same, batch normalisation and dropout included
# - stop a study at any moment and let it go on, on one machine or on a cluster
# - train on a folder of your own clips, and draw what the network looks at in one of them
#
# | | |
# |:--|:--|
# | What you need | notebooks 04, 05, 09, 11 and 18; the chain rule |
# | Your time | 90 minutes |
# | Machine time | 45 seconds |
# | Framework | PyTorch |

# %% tags=["parameters"]
import os

profile = os.environ.get("NLUTILS_PROFILE", "quick")

# %%
import contextlib
import json
import math
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import av
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

from nlutils import cli, plots, study
from nlutils.course import check, difference, settings
from nlutils.paths import results_root
from nlutils.study.arithmetic import autocast, channels_last
from nlutils.torch import create_model
from nlutils.video import decode, open_folder
from nlutils.video.procedural import Actions

settings = settings(
    profile,
    quick=dict(people=10, epochs=10, turns=3),
    full=dict(people=40, epochs=40, turns=15),
)
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all of this notebook runs on the CPU, so that its numbers compare
# For torch.compile, in section 2: one process, and no test programs before the real one.
os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_VEC_ISA_OK": "1"}
plots.style()
torch.set_num_threads(1)

# %% [markdown]
# ## 1 · Where does the time go?
#
# Ten people box, wave and run, each once: procedural clips, in files `clips/<class>/person<number>.mp4`.

# %%
temporary = tempfile.TemporaryDirectory()
here = Path(temporary.name)
os.environ["NLUTILS_CACHE"] = str(here / "cache")
KINDS = ("boxing", "handwaving", "running")


def write(path, frames):
    """Encode frames (T, H, W, 3); the default preset gives other bytes from run to run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=15, options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


drawn = Actions(12 * settings.people, frames=18, size=(72, 96), seed=3)  # 12 clips of each person
for index in range(len(drawn)):
    kind = drawn.classes[drawn.label(index)]
    path = here / "clips" / kind / f"person{drawn.group(index):02}.mp4"
    if kind in KINDS and not path.exists():
        write(path, drawn.render(index))
paths = sorted((here / "clips").rglob("*.mp4"))
assert len(paths) == 3 * settings.people
print(len(paths), "clips, such as", paths[0].relative_to(here).as_posix())

# %% [markdown]
# A training step has three parts: *decode* the clips of a batch, *cut* the batch (crop, mirror, bytes to numbers), and the *step* proper (forward, backward, update). We time each by itself, in processor time, which other programs hardly change.
#
# Most of the step is sums of products, and a product of two 512 × 512 matrices, a routine tuned for years, shows a speed that this processor can reach. So we compare multiply-adds. (The backward pass makes each product twice more, for the input and for the weights.)


# %%
def in_turns(calls, turns):
    """{name: function} -> {name: the median of its processor seconds}."""
    seconds = {name: [] for name in calls}
    for call in calls.values():
        call()  # the first call also sets up
    for _ in range(turns):
        for name, call in calls.items():
            start = time.process_time()
            call()
            seconds[name].append(time.process_time() - start)
    return {name: max(statistics.median(taken), 1e-6) for name, taken in seconds.items()}


B, n = 8, 512
inputs = study.prepare(open_folder(here / "clips"), flow=False)
recipe = study.Recipe(batch=B, input="differences")
with study.seeded(0):
    model = create_model("c3d_small_non_local", len(KINDS), input=recipe.input)
optimizer = torch.optim.AdamW(model.parameters())
draw = torch.Generator().manual_seed(0)
x = inputs.batch(recipe.input, torch.arange(B), recipe.size)
labels = inputs.labels[:B]
assert x.shape == (B, 3, 16, 40, 56)


def step(model=model, optimizer=optimizer):
    optimizer.zero_grad(set_to_none=True)
    model.loss(x, labels).backward()
    optimizer.step()


# %% tags=["nbval-ignore-output"]
a, b = torch.randn(2, n, n)
calls = {
    "decode": lambda: [decode(path, (120, 160)) for path in paths[:B]],
    "cut": lambda: inputs.batch(recipe.input, torch.arange(B), recipe.size, generator=draw, flip=True),
    "step": step,
    "matrix": lambda: a @ b,
}
seconds = in_turns(calls, settings.turns)
for name in ("decode", "cut", "step"):
    share = seconds[name] / sum(seconds[each] for each in ("decode", "cut", "step"))
    print(
        f"{name:7} {B / seconds[name]:8.0f} clips a second, {share:4.0%} of the time if done one after the other"
    )
rates = {
    "step": 3 * study.multiply_adds(model, x) / seconds["step"],
    "matrix product": n**3 / seconds["matrix"],
}
for name, rate in rates.items():
    print(f"{name:15} {rate / 1e9:6.1f} billion multiply-adds a second")
print(f"the step reaches {rates['step'] / rates['matrix product']:.0%} of the matrix product")
assert seconds["cut"] < seconds["step"]
for path in sorted((results_root() / "throughput").glob("*-cpu.json")):
    recorded = json.loads(path.read_text())
    fast = recorded["clips_per_second"]
    print(
        f"recorded on core8, {recorded['model']}: {fast['study']:.0f} clips a second in training, "
        f"{fast['plain']:.0f} if each is decoded anew, {fast['compiled']:.0f} compiled; "
        f"decoding alone {fast['decode']:.0f}, the step alone {fast['step']:.0f}"
    )
    reached = recorded["multiply_adds_per_second"]
    print(f"  its step reaches {reached['step'] / reached['matrix']:.0%} of the matrix product")
    assert 0.35 < reached["step"] / reached["matrix"] < 0.7
    assert fast["study"] > 2 * fast["plain"]
assert 1e-3 < rates["step"] / rates["matrix product"] < 2

# %% [markdown]
# So the study decodes once, keeps frames as bytes, and cuts each batch from them: on real clips, more than twice as fast. What remains is the step, in the recorded runs at 38 to 65 % of that product's speed. Likely reasons: normalisation, ReLU and pooling do few sums a number fetched.
#
# ## 2 · The same numbers, stored and compiled otherwise
#
# A convolution's weight has the axes (out, in, T, H, W). A tensor's *strides* say how far apart neighbours along an axis lie in memory. PyTorch packs the last axis most tightly; many fast *kernels*, the compiled routines of single operations, want the channels together. `channels_last` changes the order in memory, and no weight; the loss changes by rounding, for kernels sum in another order.

# %% tags=["nbval-ignore-output"]
with study.seeded(0):
    last = channels_last(create_model("c3d_small_non_local", len(KINDS), input=recipe.input))
with study.seeded(0):
    first = create_model("c3d_small_non_local", len(KINDS), input=recipe.input)
for name, network in (("as made", first), ("channels last", last)):
    weight = network.features[3].weight  # of the second convolution
    print(f"{name:14} shape {tuple(weight.shape)}, strides {weight.stride()}")
assert torch.equal(first.features[3].weight, last.features[3].weight)
assert last.features[3].weight.shape == (32, 16, 3, 3, 3)
assert last.features[3].weight.stride() == (432, 1, 144, 48, 16)

losses = {}
for name, network in (("first", first), ("last", last)):
    with study.seeded(1):  # the same dropout
        losses[name] = network.loss(x, labels)
difference(losses["first"], losses["last"], "the two losses", below=1e-4)

optimizers = [torch.optim.AdamW(network.parameters()) for network in (first, last)]
taken = in_turns(
    {"as made": lambda: step(first, optimizers[0]), "channels last": lambda: step(last, optimizers[1])},
    settings.turns,
)
for name, spent in taken.items():
    print(f"{name:14} {1000 * spent:5.0f} ms a step")
assert 0.1 < taken["channels last"] / taken["as made"] < 5

# %% [markdown]
# The study stores weights so.
#
# **Compilation.** Python calls one kernel after the other, and each writes its result to memory. `torch.compile` joins what it can into fewer kernels, writes these as C++ and has them compiled, all in the *first call*. That needs a C++ compiler and Python's headers; the next cell looks for both, and says what is missing.
#
# We compile the non-local operation alone.


# %% tags=["nbval-ignore-output"]
def mean_square(theta, phi, g):
    return (torch.softmax(theta @ phi.transpose(1, 2), dim=2) @ g).square().mean()


compiler = os.environ.get("CXX", {"Darwin": "clang++", "Windows": "cl"}.get(platform.system(), "g++"))
needed = {
    compiler: shutil.which(compiler),
    "Python.h": list(Path(sysconfig.get_path("include")).glob("Python.h")),
}
missing = [what for what, there in needed.items() if not there]
if missing:
    print("not compiled: this machine has no", " and no ".join(missing))
else:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(here / "compiled")  # nothing from an earlier run
    theta, phi, g = torch.randn(3, 2, 64, 8, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(mean_square)
    with torch.no_grad():
        start = time.perf_counter()
        by_compiled = compiled(theta, phi, g)
        first_call = time.perf_counter() - start
        calls = {"plain": lambda: mean_square(theta, phi, g), "compiled": lambda: compiled(theta, phi, g)}
        later = in_turns({name: lambda f=f: [f() for _ in range(200)] for name, f in calls.items()}, 3)
    difference(by_compiled, mean_square(theta, phi, g), "compiled and plain", below=1e-5)
    print(
        f"first call {first_call:.1f} s; then",
        *(f"{name} {s / 200 * 1e6:.0f} µs" for name, s in later.items()),
    )
    assert first_call > 20 * later["compiled"] / 200

# %% [markdown] tags=["predict"]
# The same number, up to rounding. Compilation pays after (first call) / (time saved a call) calls, if it saves any; in the stored run, on such small tensors, none.
#
# ## 3 · Fewer digits
#
# A floating-point number is $\pm\, s \cdot 2^e$ with a significand $1 \le s < 2$ of $p$ bits. Rounding to the nearest such number changes it by at most $u$ times the number, with
#
# $$u = 2^{-p}$$
#
# bfloat16 keeps the exponents of float32, and only 8 of its 24 bits; float16 has 11, and few exponents.
#
# What is $1 + 2^{-8}$ in bfloat16? And if you start from 0 and add 1 a thousand times, each sum rounded to bfloat16: what comes out?

# %%
print("          bits   u        largest")
for dtype, p in ((torch.float32, 24), (torch.float16, 11), (torch.bfloat16, 8)):
    u, facts = 2.0**-p, torch.finfo(dtype)
    print(f"{str(dtype)[6:]:9} {p:4}   2**-{p:<3}  {facts.max:.1e}")
    assert facts.eps == 2 * u
    numbers = torch.linspace(1, 2, 10_001, dtype=torch.float64)
    assert ((numbers.to(dtype).double() - numbers) / numbers).abs().max() <= u

weight = torch.tensor(1.5).bfloat16()
assert weight + 0.001 * weight == weight
print("1 + 2**-8 becomes", torch.tensor(1 + 2**-8).bfloat16().item())
total = torch.zeros((), dtype=torch.bfloat16)
for _ in range(1000):
    total = total + 1
ones = torch.ones(1000, dtype=torch.bfloat16)
print("1 added 1000 times:", total.item())
print("ones.sum():        ", ones.sum().item())
print("ones @ ones:       ", (ones @ ones).item())
assert (total, ones.sum(), ones @ ones) == (256, 1000, 1000)

# %% [markdown] tags=["explain"]
# 1, and 256. Between 1 and 2 bfloat16 has steps of $2^{-7}$, so $1 + 2^{-8}$ lies in the middle, and a tie goes to the even neighbour. Between 256 and 512 the step is 2: $256 + 1$ is a tie, too, and goes back to 256 for ever.
#
# `sum` gets 1000: the *inputs* are bfloat16, the running sum is float32, rounded once at the end. Matrix products do the same, which is what makes bfloat16 usable. Weights stay float32, too: the cell's `weight` does not change when a thousandth of it is added.
#
# **In a non-local map.** Let $l_j$ be the logits of one row, $L = \max |l_j|$. Rounded, they become $l_j + \delta_j$ with $|\delta_j| \le uL$. In the softmax the numerator changes by a factor between $e^{-uL}$ and $e^{uL}$, and so does the sum below it. So each attention weight $w_j$ becomes some $\tilde w_j$ with
#
# $$\left| \frac{\tilde w_j}{w_j} - 1 \right| \le e^{2uL} - 1$$

# %%
sizes = [1, 2, 4, 8, 16, 32, 64]
logits = torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
logits = logits / logits.abs().max()
fig, ax = plt.subplots(figsize=(7.5, 3.2))
marks = {torch.bfloat16: ("o", "red"), torch.float16: ("s", "blue"), torch.float32: ("^", "green")}
for dtype, p in ((torch.bfloat16, 8), (torch.float16, 11), (torch.float32, 24)):
    u, errors = 2.0**-p, []
    for L in sizes:
        w = (L * logits).softmax(dim=1)
        rounded = (L * logits).to(dtype).double().softmax(dim=1)
        errors.append((rounded / w - 1).abs().max().item())
        bound = math.expm1(2 * u * L)
        assert bound / 5 < errors[-1] <= bound
    mark, colour = marks[dtype]
    ax.loglog(sizes, errors, mark, color=plots.COLOURS[colour], label=str(dtype)[6:])
    bounds = [math.expm1(2 * u * L) for L in sizes]
    ax.loglog(sizes, bounds, color=plots.COLOURS[colour], lw=1, label=f"its bound, u = 2**-{p}")
    print(
        f"{str(dtype)[6:]:9} L = 64: the largest error is {errors[-1]:.1e}, and at most {bound:.1e} was allowed"
    )
ax.set_xticks(sizes, sizes)
ax.minorticks_off()
ax.set(xlabel="largest size of a logit, L", ylabel="largest relative error of a weight")
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plots.show(
    fig,
    "Largest relative error of a softmax weight over the largest logit, 1 to 64, both axes logarithmic. Three rising rows of points, "
    "bfloat16 from 0.002 to 0.24, float16 eight times lower, float32 from 3e-8 to 4e-6; each lies two to four times under its line, the bound.",
)

# %% [markdown]
# The error grows with the logits, and notebook 04 showed what makes them large: long vectors. At $L = 64$ the worst weight in bfloat16 is wrong by a quarter. Self-attention's factor $d^{-1/2}$ makes $L$ smaller; our block has none.
#
# **autocast** chooses for each operation. Which results are bfloat16?

# %%
conv, norm = nn.Conv3d(4, 4, 1), nn.BatchNorm3d(4)
small = torch.randn(2, 4, 2, 4, 4)
with torch.autocast("cpu", torch.bfloat16):
    y = conv(small)
    results = {
        "convolution": y,
        "matrix product": (product := small.flatten(2) @ small.flatten(2).transpose(1, 2)),
        "softmax of the product": product.softmax(dim=2),
        "batch norm of convolution": norm(y),
        "input + convolution": small + y,
        "cross-entropy": F.cross_entropy(y.mean(dim=(2, 3, 4)), torch.tensor([0, 1])),
    }
results["cross-entropy"].backward()
results |= {"the weight": conv.weight, "its gradient": conv.weight.grad}
for name, result in results.items():
    print(f"{name:28} {str(result.dtype)[6:]}")
short = [name for name, result in results.items() if result.dtype == torch.bfloat16]
assert short == ["convolution", "matrix product", "softmax of the product", "batch norm of convolution"]

# %% [markdown]
# Products are bfloat16; losses, weights and gradients stay float32; most others take what they get. On a GPU the softmax would be float32, of rounded logits.
#
# ### A trap
#
# Fewer digits need other kernels, which fewer people have tried. One fault is hard to see: a kernel reads memory *that nobody wrote*. Often zeros lie there, or old numbers of the right size, and the result looks fine. Here it is in plain sight:


# %%
def changes(x):
    """x[t + 1] - x[t]; the last number is never written."""
    y = torch.empty_like(x)
    y[:-1] = x[1:] - x[:-1]
    return y


torch.use_deterministic_algorithms(True)  # among other things, fills new memory with NaN
found = changes(torch.arange(5.0))
torch.use_deterministic_algorithms(False)
print(found)
assert found[:-1].isfinite().all()
assert found[-1].isnan()

# %% [markdown]
# That fills what PyTorch hands out, not the scratch memory inside a library. But freed memory is handed out again: fill a lot of it with NaN, free it, call the kernel, ask whether all numbers are finite. Twenty times each we do so with the weight gradient of a 3D convolution over a small map, 4 clips of 2 × 4 × 4 positions.


# %% tags=["nbval-ignore-output"]
def poison():
    """Leave NaN in much of the memory that is free."""
    blocks = [torch.full((2**k,), float("nan")) for k in range(6, 20) for _ in range(16)]
    del blocks


conv = nn.Conv3d(32, 64, 3, padding=1, bias=False)
small = torch.randn(4, 32, 2, 4, 4)


def weight_gradient(dtype):
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        y = conv(small)
    return torch.autograd.grad(y.float().square().sum(), conv.weight)[0]


right = weight_gradient(torch.float32)
for dtype in (torch.float32, torch.bfloat16):
    for poisoned in (False, True):
        errors = []
        for _ in range(20):
            if poisoned:
                poison()
            errors.append(((weight_gradient(dtype) - right).norm() / right.norm()).item())
        finite = [error for error in errors if math.isfinite(error)]
        print(
            f"{str(dtype)[6:]:9} {'with' if poisoned else 'without':7} poison: {20 - len(finite):2} of 20 not finite",
            f"the others are wrong by up to {max(finite):.0%}" if finite else "",
            sep="; " if finite else "",
        )
        assert dtype == torch.bfloat16 or max(errors) < 1e-5

try:
    autocast(study.Recipe(precision="bfloat16"), "cpu")
except ValueError as error:
    print(error)
else:
    raise AssertionError("bfloat16 was allowed on a CPU")

# %% [markdown]
# In the stored run (PyTorch 2.13) bfloat16's kernel reads unwritten memory; yours may not. Without poison some gradients are finite, and wrong: nothing would have told you. That is why the study refuses bfloat16 on a CPU, and keeps it for GPUs: the last line is its error.
#
# ## 4 · Several processes
#
# The loss of a batch of $B$ clips is a mean, $\frac1B \sum_b \ell_b$. Cut the batch into parts $p$ of $B_p$ clips, and let $\mathcal L_p$ be the mean over part $p$. The gradient of a sum is the sum of gradients:
#
# $$\nabla \mathcal L = \frac1B \sum_b \nabla \ell_b = \sum_p \frac{B_p}{B} \nabla \mathcal L_p$$
#
# Each process computes its $\nabla \mathcal L_p$; then all add up their shares, an *all-reduce*. Here are parts of 3 and 5 clips, in float64.


# %%
def gradients(network, x, labels):
    """The gradient of the mean loss, all weights in one vector."""
    loss = F.cross_entropy(network(x), labels)
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, network.parameters())])


def tiny(*between):
    torch.manual_seed(0)
    pool = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3))
    return nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), *between, *pool).double()


generator = torch.Generator().manual_seed(1)
X = torch.randn(8, 2, 3, 5, 4, dtype=torch.float64, generator=generator)
Y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
parts = (slice(0, 3), slice(3, 8))
network = tiny()
whole = gradients(network, X, Y)
each = [gradients(network, X[part], Y[part]) for part in parts]
difference(3 / 8 * each[0] + 5 / 8 * each[1], whole, "weighted sum and whole batch", below=1e-12)
difference((each[0] + each[1]) / 2, whole, "plain mean and whole batch")
assert ((each[0] + each[1]) / 2 - whole).abs().max() > 1e-3

# %% [markdown] tags=["predict"]
# Now with a batch normalisation after the convolution, as in the study's networks. Does the weighted sum still give the gradient of the whole batch? And with two parts of 4 clips?

# %%
network = tiny(nn.BatchNorm3d(4))
whole = gradients(network, X, Y)
for sizes in ((3, 5), (4, 4)):
    weighted = sum(
        len(part) / 8 * gradients(network, part, label)
        for part, label in zip(X.split(sizes), Y.split(sizes), strict=True)
    )
    share = ((weighted - whole).norm() / whole.norm()).item()
    print(f"parts {sizes}: {'equal' if share < 1e-12 else 'different'}")
    assert share > 0.01

# %% [markdown] tags=["explain"]
# Neither. A normalised number depends on the mean and variance of *all* clips normalised together. So the processes have to talk inside the network, too.
#
# **Forward.** For one channel: part $p$ has $n_p$ values, the whole batch $n = \sum_p n_p$. Two sums a part, $\sum x$ and $\sum x^2$, give mean and variance, $v = \frac1n \sum x^2 - m^2$. But where $m$ is large that is a difference of two large numbers. Let each part tell its own mean $m_p$ and variance $v_p$ instead, beside $n_p$ (Chan, Golub and LeVeque, 1979):
#
# $$m = \sum_p \frac{n_p}{n} m_p, \qquad v = \sum_p \frac{n_p}{n} \left( v_p + (m_p - m)^2 \right), \qquad \hat x = \frac{x - m}{\sqrt{v + \varepsilon}}, \quad y = \gamma \hat x + \beta$$


# %%
def channels(values, x):
    """A number a channel, shaped to meet x (B, C, ...)."""
    return values.view(-1, *[1] * (x.ndim - 2))


def told(x):
    """What a part tells, for each channel: n_p, m_p, v_p."""
    axes = [axis for axis in range(x.ndim) if axis != 1]
    return x.numel() // x.shape[1], x.mean(dim=axes), x.var(dim=axes, correction=0)


def of_all(messages):
    """n, m and v of the whole batch, from what its parts tell."""
    n = sum(n_p for n_p, _, _ in messages)
    m = sum(n_p * m_p for n_p, m_p, _ in messages) / n
    v = sum(n_p * (v_p + (m_p - m) ** 2) for n_p, m_p, v_p in messages) / n
    return n, m, v


def normalised(x, m, v, gamma, beta, eps=1e-5):
    """(y, x_hat) of one part."""
    x_hat = (x - channels(m, x)) * channels(torch.rsqrt(v + eps), x)
    return channels(gamma, x) * x_hat + channels(beta, x), x_hat


# %%
norm = nn.BatchNorm3d(2).double()
nn.init.uniform_(norm.weight, 0.5, 1.5)
gamma, beta = norm.weight.detach(), norm.bias.detach()
n, m, v = of_all([told(X[part]) for part in parts])
y, x_hat = zip(*(normalised(X[part], m, v, gamma, beta) for part in parts), strict=True)
assert n == X.numel() // 2
difference(torch.cat(y), norm(X), "two parts and BatchNorm3d of the whole", below=1e-12)

values = 1000 + 0.1 * torch.randn(2, 1, 2048, generator=torch.Generator().manual_seed(0))  # float32
by_parts = of_all([told(values[:1]), told(values[1:])])[2].item()
by_sums = (values.square().mean() - values.mean() ** 2).item()
print(f"values around 1000, variance 0.0100: by parts {by_parts:.4f}, by plain sums", end=" ")
print("more than 0.005 off" if abs(by_sums - 0.01) > 0.005 else "right")
assert abs(by_parts - 0.01) < 0.001
assert abs(by_sums - 0.01) > 0.005

# %% [markdown]
# **Backward.** A gradient $g = \partial \mathcal L / \partial y$ of the *whole* batch's loss arrives. $x_i$ acts through its own $\hat x_i$, through $m$ and through $v$. With $\sigma = \sqrt{v + \varepsilon}$ and $\partial v / \partial x_i = \frac2n (x_i - m)$:
#
# $$\frac{\partial \hat x_j}{\partial x_i} = \frac{[i = j] - 1/n}{\sigma} - \frac{x_j - m}{\sigma^2} \cdot \frac{x_i - m}{n \sigma} = \frac1\sigma \left( [i = j] - \frac1n - \frac1n \hat x_i \hat x_j \right)$$
#
# where $[i = j]$ is 1 or 0. Check it on five numbers:

# %%
x5 = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
sigma = torch.sqrt(x5.var(correction=0) + 1e-5)
hat = (x5 - x5.mean()) / sigma
jacobian = torch.autograd.functional.jacobian(
    lambda x: F.batch_norm(x[:, None], None, None, training=True)[:, 0], x5
)
difference(
    (torch.eye(5).double() - 1 / 5 - hat[:, None] * hat / 5) / sigma, jacobian, "Jacobian", below=1e-12
)

# %% [markdown]
# Multiply by $\gamma g_j$ and sum over all $j$ *of the batch*. Again two sums a part:
#
# $$\frac{\partial \mathcal L}{\partial x_i} = \frac\gamma\sigma \Big( g_i - \frac1n \sum_j g_j - \hat x_i\, \frac1n \sum_j g_j \hat x_j \Big), \qquad \frac{\partial \mathcal L}{\partial \beta} = \sum_j g_j, \quad \frac{\partial \mathcal L}{\partial \gamma} = \sum_j g_j \hat x_j$$


# %%
def two_sums(g, x_hat):
    """A part's sums of g and of g x_hat, for each channel."""
    axes = [axis for axis in range(g.ndim) if axis != 1]
    return g.sum(dim=axes), (g * x_hat).sum(dim=axes)


def gradient_through(g, x_hat, v, gamma, n, sum_g, sum_gx, eps=1e-5):
    """The gradient of a part's x; the sums are those of the whole batch."""
    inside = g - channels(sum_g / n, g) - x_hat * channels(sum_gx / n, g)
    return channels(gamma * torch.rsqrt(v + eps), g) * inside


g = torch.randn(X.shape, dtype=torch.float64, generator=generator)
sums = [two_sums(g[part], hat) for part, hat in zip(parts, x_hat, strict=True)]
sum_g, sum_gx = (sum(of_parts) for of_parts in zip(*sums, strict=True))
by_hand = [
    gradient_through(g[part], hat, v, gamma, n, sum_g, sum_gx) for part, hat in zip(parts, x_hat, strict=True)
]
leaf = X.clone().requires_grad_()
expected = torch.autograd.grad((norm(leaf) * g).sum(), (leaf, norm.weight, norm.bias))
difference(torch.cat(by_hand), expected[0], "gradient of x", below=1e-12)
difference(sum_gx, expected[1], "gradient of gamma", below=1e-12)
difference(sum_g, expected[2], "gradient of beta", below=1e-12)

# %% [markdown]
# **Dropout.** Two processes with the same seed would draw the same mask for different clips. Instead, each draws the mask of the whole batch from that seed, and takes its own rows.

# %%
torch.manual_seed(5)
dropped = F.dropout(X, 0.5)
for rank, part in enumerate(parts):  # what process `rank` does
    torch.manual_seed(5)
    mask = F.dropout(torch.ones_like(X), 0.5)
    difference(X[part] * mask[part], dropped[part], f"process {rank}")
    assert torch.equal(X[part] * mask[part], dropped[part])

# %% [markdown]
# `nlutils.study.whole_batch` has these formulas, with messages between processes. `torchrun` starts processes that run the same command. We train `c3d_small_non_local` with dropout, in batches of 7 clips (parts of 3 and 4; the last, of 3, stays whole), and leave fold 0 out for the test. Then the same with one process. `--set` changes the recipe: small frames, few seconds.

# %%
TINY = ["batch=7", "frames=8", "resize=(36,48)", "size=(32,48)", "warmup=1", "input=differences"]
SET = [word for setting in TINY for word in ("--set", setting)]


def shell(*words):
    """Run `nlutils words` in our folder, as a shell would, and print both."""
    print("$ nlutils", " ".join(words).replace(" ".join(SET), "--set ..."))
    with contextlib.chdir(here):
        return cli.main(list(words))


def start(*words, **options):
    """Run `python words` in our folder, as a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *words], cwd=here, env=environment, text=True, **options)


STUDY = ["study", "--data", "clips"]
FIRST = [*STUDY, "--model", "c3d_small_non_local", "--fold", "0", *SET, "--set", "epochs=4"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

# %% tags=["nbval-ignore-output"]
if not torch.distributed.is_gloo_available():
    raise RuntimeError("this PyTorch has no Gloo, through which processes on CPUs talk")
# `torchrun` is another name for `python -m torch.distributed.run`.
print("$ torchrun --standalone --nproc-per-node 2 -m nlutils.cli study ...")
command = [*TORCHRUN, "-m", "nlutils.cli", *FIRST, "--root", "two"]
process = start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
printed, errors = process.communicate()
assert process.returncode == 0, errors
print(printed.splitlines()[1])
assert shell(*FIRST, "--root", "one") == 0

(two,), (one,) = (study.read_runs("clips", here / root) for root in ("two", "one"))
for run in (two, one):
    print(f"{run.seconds['train']:4.1f} s; loss by epoch", *(f"{loss:.4f}" for loss in run.losses))
logits = [torch.tensor(run.logits) for run in (two, one)]
assert logits[0].shape == (len(one.names), len(KINDS))
gap = (logits[0] - logits[1]).abs().max() / logits[1].abs().max()
print(f"the test clips' scores differ by at most {gap:.0e} of the largest")
assert max(abs(a - b) for a, b in zip(two.losses, one.losses, strict=True)) < 0.05
assert gap < 0.1

# %% [markdown]
# Equal, but for rounding, which training enlarges. (In float64, `tests/test_study_distributed.py` finds weights equal to 8 digits.) Two processes took *longer*, we think because each normalisation of this tiny network waits for messages.
#
# ## 5 · Stopped at any moment
#
# A study of two runs, frame averaging on folds 0 and 1. We kill it (`kill -9`) during the second. After each epoch the state is on disk: weights, the optimizer's averages, losses; what is random follows from (seed, epoch). Each file is written under another name, then renamed: it appears whole or not at all.

# %% tags=["nbval-ignore-output"]
AVERAGE = [*STUDY, "--model", "frame_average", *SET, "--set", "epochs=10", "--fold", "1"]
process = start("-m", "nlutils.cli", *AVERAGE, "--fold", "0", "--root", "killed", stdout=subprocess.DEVNULL)
while not (states := list((here / "cache" / "checkpoints" / "clips").glob("frame_average-fold1*.pt"))):
    assert process.poll() is None, "the study ended before it was killed"
    time.sleep(0.005)
process.kill()
process.wait()
recorded = [run.run for run in study.read_runs("clips", here / "killed")]
state = torch.load(states[0])
print("recorded:", *recorded)
print("in the checkpoint:", *state)
print("and", len(state["losses"]), "of 10 epochs of", states[0].stem.rpartition("-")[0])
assert recorded == ["frame_average-fold0-seed0"]
assert 0 < len(state["losses"]) < 10

# %% [markdown]
# Call it again, and compare with a run that nobody stopped.

# %% tags=["nbval-ignore-output"]
assert shell(*AVERAGE, "--fold", "0", "--root", "killed") == 0
print()
assert shell(*AVERAGE, "--root", "never_stopped") == 0
print()
both = study.read_runs("clips", here / "killed")
(straight,) = study.read_runs("clips", here / "never_stopped")
assert [run.run for run in both] == [f"frame_average-fold{fold}-seed0" for fold in (0, 1)]
assert (both[1].names, len(both[1].losses)) == (straight.names, 10)
print("same losses:", both[1].losses == straight.losses, "; same scores:", both[1].logits == straight.logits)
# On one machine the digits agree; the bounds leave room for those whose sums vary from run to run.
difference(both[1].losses, straight.losses, "losses", below=0.01)
difference(both[1].logits, straight.logits, "scores", below=0.1)

# %% [markdown]
# None lost or doubled: the first run was read, the second continued after its last full epoch, here to the same digits.
#
# ## 6 · Clusters
#
# A run is one file; a killed run goes on; processes compute what one would. *Slurm* queues scripts, *jobs*, for a cluster; an *array* is one script as many jobs, each with its number. *Ray* sends a program's function calls to other machines. `nlutils/study/CLUSTER.md` has the scripts; in short:
#
# | you want | with | command |
# |:--|:--|:--|
# | one large run over several processors or GPUs | `torchrun`, also over several machines | `srun torchrun ... -m nlutils.cli study run mine --data clips` |
# | many runs, through a queue | a Slurm array of jobs, one fold each | `nlutils study run mine --data clips --fold "$SLURM_ARRAY_TASK_ID"` |
# | many runs, on machines of yours | Ray: a run goes to whichever machine has room | `nlutils study run mine --data clips --cluster auto` |
#
# Jobs may share a folder of results. When a time limit ends a job, submit it again.
#
# **What was tested**: two processes of one machine, as above, and Ray on one machine (`--cluster local`). **Not tested**: Slurm, several GPUs (they talk through NVIDIA's NCCL), several machines; those scripts follow the manuals. On one machine, `--jobs 2` runs two at a time.
#
# ## 7 · Your own clips
#
# Our folder could be yours: a sub-folder for each class, and videos in it. Clips of one person, film or day must not be trained *and* tested on. The study reads such groups from file names with `person07` or `g07` in them, or from a `labels.csv` with a column `group`. Without either, each file is a group of its own: `take1` and `take2` of one person may part.
#
# Look it over first. We spoil it: a film cut short, and a copy in the wrong class.

# %%
path = here / "clips" / "boxing" / "person20.mp4"
path.write_bytes(paths[0].read_bytes()[:1500])
copy = here / "clips" / "running" / "person21.mp4"
shutil.copy(paths[0], copy)
assert shell("data", "check", "clips") == 1
path.unlink()
copy.unlink()
print()
assert shell("data", "check", "clips") == 0

# %% [markdown]
# Two networks on one fold; `--keep-weights` keeps them. Without `--model`, `--fold` and `--set` you get the five small networks, all folds, the full recipe.

# %% tags=["nbval-ignore-output"]
MODELS = ["--model", "frame_average", "--model", "c3d_small_non_local"]
MINE = [*STUDY, "--name", "mine", *MODELS, "--fold", "0", *SET, "--set", f"epochs={settings.epochs}"]
assert shell(*MINE, "--keep-weights", "--root", "results") == 0
runs = study.read_runs("mine", here / "results")
assert [run.row for run in runs] == ["c3d_small_non_local", "frame_average"]
assert {len(run.names) for run in runs} == {len(paths) // 5}

# %% [markdown]
# A few test clips of two people prove nothing. The interval draws people, and from two there is little to draw: do not believe it, however narrow. Notebook 18 compares on all folds.
#
# Last, a clip that was not trained on. `predict` asks each block what it looks at from the place that moves most.

# %% tags=["nbval-ignore-output"]
clip = next(name for name in runs[0].names if name.startswith("running"))
kept = "results/mine/weights/c3d_small_non_local-fold0-seed0.pt"
assert shell("predict", kept, f"clips/{clip}", "--output", "picture.png") == 0
assert (here / "picture.png").is_file()

# %% tags=["nbval-ignore-output"]
seen = study.predict(here / kept, here / "clips" / clip)
figure, alt = study.draw_prediction(seen)
figure.set_dpi(75)
plots.show(figure, alt)
assert seen.frames.shape == (8, 32, 48, 3)
assert [attention.size for attention in seen.attention] == [(4, 8, 12), (2, 4, 6)]
for attention in seen.attention:
    print(f"{attention.block}: the largest of {attention.rows.size} weights is {attention.rows.max():.2f}")
    assert abs(attention.rows.sum() - 1) < 1e-4

# %% [markdown]
# Above the cut frames, of which the network gets differences; the blue frame is the place that looks. Below, for each block, the weights over the keys (places pooled 2 × 2, each over two or four steps), in units of the even share, 1/96 and 1/12, with each step's part of the whole (a key over two steps shows in both). In the stored run the first block looks near the runner, the second puts all its weight on an empty corner: the softmax has become a maximum. Before you tell a story about such a picture, do as notebook 17: put a plain mean in the map's place, and count which answers change.
#
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Round to bfloat16 (easy, 10 minutes)
#
# Write `bfloat16(x)` for a Python number: the nearest number with 8 bits of significand, ties to even. **Expect**: 0.1 becomes 0.10009765625, and $1 + 3 \cdot 2^{-8}$ becomes 1.015625.
#
# <details><summary>Hint 1: a nudge</summary><code>math.frexp(x)</code> gives m and e with x = m 2**e and 0.5 ≤ |m| &lt; 1.</details>
# <details><summary>Hint 2: the formula</summary>Round m · 2**8 to a whole number; Python's <code>round</code> sends ties to even.</details>
# <details><summary>Hint 3: part of the code</summary><code>m, e = math.frexp(x)</code>, then <code>math.ldexp(round(...), e - 8)</code></details>


# %% tags=["stub"]
def bfloat16(x):
    #: solution
    m, e = math.frexp(x)
    return math.ldexp(round(m * 2**8), e - 8)
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
cases = (0.1, 1 + 2**-8, 1 + 3 * 2**-8, -1000.5, 3.141592653589793, 6e-5)
expected = tuple(torch.tensor(cases, dtype=torch.float64).bfloat16().double().tolist())


def with_bits(bits, to_whole=round):
    return tuple(math.ldexp(to_whole(math.frexp(x)[0] * 2**bits), math.frexp(x)[1] - bits) for x in cases)


check(
    "Exercise 1",
    lambda: tuple(bfloat16(x) for x in cases),
    expected,
    mistakes={
        "you cut digits off; round to the nearest": with_bits(8, math.trunc),
        "a tie goes to the even neighbour, not away from zero": with_bits(
            8, lambda a: math.copysign(math.floor(abs(a) + 0.5), a)
        ),
        "one bit too few: m begins at 0.5, so 8 bits are m * 2**8": with_bits(7),
        "one bit too many: m begins at 0.5, so 8 bits are m * 2**8": with_bits(9),
        "8 bits behind the point, whatever the size of x: this is a fixed point": tuple(
            round(x * 2**8) / 2**8 for x in cases
        ),
    },
    tolerance=0,
)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · What do more processes bring? (medium, 15 minutes)
#
# A step of $k$ clips takes one process `fixed + each * k` seconds. Several processes also talk, for `talk` seconds. Parts are as equal as can be, and all wait for the last. Write `rate(batch, processes, fixed, each, talk)`: clips a second. **Expect**: `rate(16, 1, 0.05, 0.02, 0.03)` is 43.2, with 2 processes 66.7, and with 3 processes 80.
#
# <details><summary>Hint 1: a nudge</summary>How many clips has the largest part, when 16 are dealt to 3?</details>
# <details><summary>Hint 2: the formula</summary>batch / (fixed + each · (largest part) + talk), without talk for one process.</details>
# <details><summary>Hint 3: part of the code</summary><code>math.ceil(batch / processes)</code>, <code>talk if processes > 1 else 0</code></details>


# %% tags=["stub"]
def rate(batch, processes, fixed, each, talk):
    #: solution
    seconds = fixed + each * math.ceil(batch / processes) + (talk if processes > 1 else 0)
    return batch / seconds
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
cases = ((16, 1), (16, 2), (16, 3), (16, 8), (7, 2))


def rates_if(seconds):
    return tuple(batch / seconds(batch, processes) for batch, processes in cases)


def talk(processes):
    return 0.03 if processes > 1 else 0


def largest(batch, processes):
    return 0.02 * math.ceil(batch / processes)


expected = rates_if(lambda b, p: 0.05 + largest(b, p) + talk(p))
check(
    "Exercise 2",
    lambda: tuple(rate(batch, processes, 0.05, 0.02, 0.03) for batch, processes in cases),
    expected,
    mistakes={
        "all wait for the largest part, not for the mean one": rates_if(
            lambda b, p: 0.05 + 0.02 * b / p + talk(p)
        ),
        "parts are rounded up: some process takes the rest": rates_if(
            lambda b, p: 0.05 + 0.02 * (b // p) + talk(p)
        ),
        "a process alone has nobody to talk to": rates_if(lambda b, p: 0.05 + largest(b, p) + 0.03),
        "the talking is missing": rates_if(lambda b, p: 0.05 + largest(b, p)),
        "every process pays `fixed` whole": rates_if(lambda b, p: 0.05 / p + largest(b, p) + talk(p)),
        "these are seconds; clips a second are batch / seconds": tuple(
            b / e for (b, _), e in zip(cases, expected, strict=True)
        ),
    },
)

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · A map over several machines (hard, 20 minutes)
#
# A clip too long for one machine: the places $j$ lie on $P$ of them. Let $l_{ij}$ be the logit of place $i$ with place $j$. For its own places and each $i$, machine $p$ tells the largest logit $m_p$, the sum $s_p = \sum_j e^{l_{ij} - m_p}$, and $y_p = \frac{1}{s_p} \sum_j e^{l_{ij} - m_p} g_j$. Write `joined(m, s, y)` for N places $i$ and C channels, with m and s of shape (P, N) and y (P, N, C); it returns what one machine would compute, (N, C). The logits are near 800. **Expect**: equal to 9 digits.
#
# <details><summary>Hint 1: a nudge</summary>Each y_p is a weighted mean. How much weight has part p in all?</details>
# <details><summary>Hint 2: the formula</summary>With M, for each i, the largest m_p: a_p = s_p exp(m_p − M), y = Σ a_p y_p / Σ a_p.</details>
# <details><summary>Hint 3: part of the code</summary><code>a = s * (m - m.amax(dim=0)).exp()</code></details>


# %% tags=["stub"]
def joined(m, s, y):
    #: solution
    a = s * (m - m.amax(dim=0)).exp()
    return (a[..., None] * y).sum(dim=0) / a.sum(dim=0)[:, None]
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
generator = torch.Generator().manual_seed(7)
l_ij = 800 + 3 * torch.randn(4, 9, dtype=torch.float64, generator=generator)
g_j = torch.randn(9, 2, dtype=torch.float64, generator=generator)
own = (2, 3, 4)
m_p = torch.stack([row.amax(dim=1) for row in l_ij.split(own, dim=1)])
s_p = torch.stack(
    [(row - m[:, None]).exp().sum(dim=1) for row, m in zip(l_ij.split(own, dim=1), m_p, strict=True)]
)
y_p = torch.stack(
    [row.softmax(dim=1) @ g for row, g in zip(l_ij.split(own, dim=1), g_j.split(own), strict=True)]
)
a_p = s_p * (m_p - m_p.amax(dim=0)).exp()


def weighted_by(a):
    return (a[..., None] * y_p).sum(dim=0) / a.sum(dim=0)[:, None]


check(
    "Exercise 3",
    lambda: joined(m_p, s_p, y_p),
    l_ij.softmax(dim=1) @ g_j,
    mistakes={
        "this is the plain mean of the parts": y_p.mean(dim=0),
        "the parts' maxima differ: s_p alone is no common measure": weighted_by(s_p),
        "s_p is missing in the weight of a part": weighted_by((m_p - m_p.amax(dim=0)).exp()),
        "the weights do not sum to 1; divide by their sum": (a_p[..., None] * y_p).sum(dim=0),
        "y_p is divided by s_p already; its weight has s_p in it": (
            a_p[..., None] * y_p / s_p[..., None]
        ).sum(dim=0)
        / a_p.sum(dim=0)[:, None],
        "exp(800) overflows: take the largest m_p away first": weighted_by(s_p * m_p.exp()),
        "places were counted; weights are what counts": weighted_by(
            torch.tensor(own).double()[:, None].expand(3, 4)
        ),
    },
)

# %% [markdown]
# ## What you learned
#
# - Decode once; then the step takes the time, below a matrix product's speed.
# - Another order in memory changes the time, and the loss by rounding. A first compiled call costs seconds; later ones must save them.
# - bfloat16 holds 8 bits: a sum kept in float32 is fine, one kept in bfloat16 stops growing. Kernels that read unwritten memory are found with poison.
# - Gradients of parts add up, weighted by clips. Batch normalisation needs each part's count, and for each channel its mean and variance forwards, two sums backwards; dropout needs rows of one mask.
# - With the state on disk after each epoch, a killed run goes on.
#
# ## Further reading
#
# - S. Ioffe, C. Szegedy: *Batch Normalization*. ICML 2015. The gradient of section 4.
# - T. F. Chan, G. H. Golub, R. J. LeVeque: *Updating Formulae and a Pairwise Algorithm for Computing Sample Variances*. 1979.
# - P. Micikevicius and others: *Mixed Precision Training*. ICLR 2018.
# - P. Goyal and others: *Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour*. 2017. Batches over many machines.
# - J. Ansel and others: *PyTorch 2*. ASPLOS 2024. What `torch.compile` does.
# - P. Moritz and others: *Ray: A Distributed Framework for Emerging AI Applications*. OSDI 2018.
