# %% [markdown]
# # 07 · The same block twice: PyTorch and Keras
#
# After this notebook you can
#
# - carry the weights of a layer to the other framework by hand, and say which axis goes where
# - measure whether two implementations agree in output, gradient and training
# - predict where two frameworks with equal weights still differ, and correct for it
# - put blocks into a network that somebody else wrote, without changing its output, and check that they are there
# - find out what an unknown block computes, and what is wrong with it
#
# | | |
# |:--|:--|
# | What you need | notebook 05 (the block in PyTorch) and notebook 06 (the block in Keras) |
# | Your time | 75 minutes |
# | Machine time | 20 seconds |
# | Framework | PyTorch and Keras |

# %% tags=["parameters"]
import os

profile = os.environ.get("NLUTILS_PROFILE", "quick")

# %%
import numpy as np
import torch
from torch import nn

import nlutils.torch
from nlutils import conformance
from nlutils.course import check, difference, import_keras, settings
from nlutils.exchange import from_arrays, keras_to_torch, to_arrays, torch_to_keras

keras = import_keras(os.environ.get("KERAS_BACKEND", "tensorflow"))
import nlutils.keras

settings(profile)
numbers = keras.ops.convert_to_numpy  # a Keras tensor as a NumPy array
# On its PyTorch backend Keras computes parts of a float64 layer in float32, the normalisation among them.
close = 1e-10 if keras.backend.backend() == "tensorflow" else 1e-4

# %% [markdown]
# ## 1 · One clip, two orders of axes
#
# Two programs for one formula test each other: a mistake would have to be made twice. But first they must be given the same numbers.
#
# PyTorch's layers want the channels in axis 1, $(B, C, T, H, W)$; Keras' layers want them last, $(B, T, H, W, C)$. Everything here is in float64: two
# orders of the same sum then agree to about 15 digits, and an error in the sixth digit is not rounding but a mistake.
#
# The sizes all differ, as in notebook 05, so that swapped axes are noticed.

# %%
B, C, T, H, W, d = 2, 10, 3, 4, 6, 8
N = T * H * W
rng = np.random.default_rng(7)
x = rng.standard_normal((B, C, T, H, W))


def channels_last(maps):
    """(B, C, T, H, W) -> (B, T, H, W, C)"""
    return np.moveaxis(maps, 1, -1)


def channels_first(maps):
    """(B, T, H, W, C) -> (B, C, T, H, W)"""
    return np.moveaxis(maps, -1, 1)


assert channels_last(x).shape == (B, T, H, W, C)
assert channels_first(channels_last(x)).shape == (B, C, T, H, W)
print(
    "channel 9 at frame 2, row 3, column 5:",
    x[0, 9, 2, 3, 5].round(4),
    channels_last(x)[0, 2, 3, 5, 9].round(4),
)

# %% [markdown]
# ## 2 · One layer by hand
#
# $\theta$ is a 1×1×1 convolution in both frameworks. How does each of them keep its matrix?

# %%
torch.manual_seed(0)
theta = nn.Conv3d(C, d, 1).double()
theta_keras = keras.layers.Conv3D(d, 1, dtype="float64")
theta_keras.build((None, T, H, W, C))
weight, bias = theta.weight.detach().numpy(), theta.bias.detach().numpy()
print("PyTorch: weight", weight.shape, "bias", bias.shape)
print("Keras:   kernel", theta_keras.kernel.shape, "bias", theta_keras.bias.shape)

# %% [markdown] tags=["predict"]
# PyTorch's weight is (out, in, T, H, W), Keras' kernel is (T, H, W, in, out). Two ways from the first shape to the second:
#
# - `weight.reshape(1, 1, 1, C, d)`
# - `np.moveaxis(weight, (0, 1), (-1, -2))`: axis 0, *out*, becomes the last one, axis 1, *in*, the last but one
#
# Both give 80 numbers in the right shape. Keras takes both without a word. Which gives PyTorch's output, and what does the other one compute?


# %%
def run_torch(layer, x):
    with torch.no_grad():
        return layer(torch.tensor(x)).numpy()


def run_keras(layer, x, **options):
    x = keras.ops.convert_to_tensor(channels_last(x), dtype="float64")
    return channels_first(numbers(layer(x, **options)))


theta_keras.bias.assign(bias)
theta_keras.kernel.assign(weight.reshape(1, 1, 1, C, d))
difference(run_torch(theta, x), run_keras(theta_keras, x), "PyTorch and Keras, reshape ")
theta_keras.kernel.assign(np.moveaxis(weight, (0, 1), (-1, -2)))
difference(run_torch(theta, x), run_keras(theta_keras, x), "PyTorch and Keras, moveaxis", below=close)

# %% [markdown] tags=["explain"]
# `reshape` keeps the order in memory. PyTorch's memory holds the $C$ weights of output 0, then those of output 1. Read as (in, out), the
# first $d$ of them become the weights of *input* 0. It is notebook 05's error with `rows` again, now in the weights: every number is there, at the wrong place.
#
# With 10 inputs and 8 outputs the shapes at least say that something must be transposed. A square layer takes even that away: 10 × 10 go into 10 × 10 without `reshape`
# or `moveaxis`.

# %%
square = nn.Conv3d(C, C, 1, bias=False).double()
square_keras = keras.layers.Conv3D(C, 1, use_bias=False, dtype="float64")
square_keras.build((None, T, H, W, C))
matrix = square.weight.detach().numpy()[:, :, 0, 0, 0]
square_keras.kernel.assign(matrix[None, None, None])
z = run_keras(square_keras, x)
difference(z, run_torch(square, x), "Keras and W x  ")
difference(z, np.einsum("oi,bothw->bithw", matrix, x), "Keras and W^T x", below=close)

# %% [markdown]
# Keras multiplies from the other side, $x_i^T K$, so $K$ must be $W^T$; with $K = W$ the layer computes $W^T x_i$. In a block of
# $d = C$, or a ResNet full of square layers, a wrong exchange loads without an error and gives a network that predicts badly. So never trust a shape: compare outputs.
#
# ## 3 · The whole block
#
# A block has twelve arrays. `to_arrays` reads them from a block of either framework, with PyTorch's names and layouts.

# %%
block = nlutils.torch.NonLocalBlock(C, d).double()
block_keras = nlutils.keras.NonLocalBlock(C, d, dtype="float64")
block_keras.build((None, T, H, W, C))

arrays, arrays_keras = to_arrays(block), to_arrays(block_keras)
assert arrays.keys() == arrays_keras.keys()
assert len(arrays) == 12
for name, array in arrays.items():
    assert array.shape == arrays_keras[name].shape
    print(f"{name:18}{array.shape}")

# %% [markdown] tags=["predict"]
# Nothing has been exchanged yet: the two blocks drew their own random weights. We compare their outputs. Will the largest difference be
# about 1, about 0.01 (the standard deviation of the weights), or smaller?

# %%
difference(run_torch(block, x), run_keras(block_keras, x, training=True), "two strangers")

# %% [markdown] tags=["explain"]
# Exactly equal, and it proves nothing. A fresh block has gain 0 and returns $x$, whatever its weights are. **A comparison that two
# unrelated blocks pass is no test.** So before comparing we fill *all* arrays with numbers that matter: also the gain, the
# biases and the running statistics. Then `torch_to_keras` does what we did by hand, for all layers; the way back must return the same bits. After that all variants: four instantiations, three
# kinds of sub-sampling, each in training and in evaluation mode.


# %%
def draw(block, seed=0):
    """Fill every weight and statistic of a block with random numbers that are not small."""
    rng = np.random.default_rng(seed)
    arrays = to_arrays(block)
    for name, array in arrays.items():
        low = 0.5 if name == "norm.running_var" else -0.5
        arrays[name] = rng.uniform(low, low + 1, array.shape)
    from_arrays(block, arrays)


draw(block)
difference(run_torch(block, x), run_keras(block_keras, x, training=True), "before the exchange")
torch_to_keras(block, block_keras)
difference(run_torch(block, x), run_keras(block_keras, x, training=True), "after it           ", below=close)

draw(block, seed=1)
torch_to_keras(block, block_keras)
back = nlutils.torch.NonLocalBlock(C, d).double()
keras_to_torch(block_keras, back)
assert all(np.array_equal(array, to_arrays(back)[name]) for name, array in to_arrays(block).items())
print("there and back: every array exact")

for instantiation in ("gaussian", "embedded_gaussian", "dot_product", "concatenation"):
    first, second = [], []
    for subsample in (None, "before", "after"):
        options = dict(instantiation=instantiation, subsample=subsample)
        one = nlutils.torch.NonLocalBlock(C, d, **options).double()
        two = nlutils.keras.NonLocalBlock(C, d, **options, dtype="float64")
        two.build((None, T, H, W, C))
        draw(one)
        torch_to_keras(one, two)
        for training in (False, True):
            first.append(run_torch(one.train(training), x))
            second.append(run_keras(two, x, training=training))
    difference(np.stack(first), np.stack(second), f"{instantiation:18}six outputs", below=close)

# %% [markdown]
# ## 4 · The gradient
#
# Equal outputs do not prove equal gradients: each framework differentiates its own code. We take a loss against a random target,
#
# $$L = \frac{1}{B\,C\,N} \sum_{b,\,c,\,i} \left(z_{b,c,i} - t_{b,c,i}\right)^2$$

# %%
target = rng.standard_normal(x.shape)


def loss_torch(block, x):
    return ((block(x) - torch.tensor(target)) ** 2).mean()


def loss_keras(block, x):
    t = keras.ops.convert_to_tensor(channels_last(target), dtype="float64")
    return keras.ops.mean((block(x, training=True) - t) ** 2)


by_hand = ((run_torch(block, x) - target) ** 2).sum() / (B * C * N)
difference(loss_torch(block, torch.tensor(x)), by_hand, "PyTorch", below=close)
difference(
    loss_keras(block_keras, keras.ops.convert_to_tensor(channels_last(x))), by_hand, "Keras  ", below=close
)

# %% [markdown]
# Keras 3 has no gradient function of its own: each backend brings one. TensorFlow *records* what happens under a `GradientTape`; PyTorch records always. Both then
# answer the same question: the slope of one number, $L$, with respect to a list.


# %%
def slopes_torch(block, x):
    """The loss, and its gradient for x and for every parameter, by name."""
    named = dict(block.named_parameters())
    x = torch.tensor(x, requires_grad=True)
    loss = loss_torch(block, x)
    slopes = torch.autograd.grad(loss, [x, *named.values()])
    return loss.item(), dict(zip(["x", *named], slopes, strict=True))


TORCH_NAME = {"kernel": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}


def variables_of(block):
    """The trainable variables of the Keras block, under PyTorch's names."""
    layers = ("theta", "phi", "g", "w_z", "norm")
    return {
        f"{layer}.{TORCH_NAME[v.name]}": v
        for layer in layers
        for v in getattr(block, layer).trainable_weights
    }


def slopes_keras(block, x):
    """The same from the Keras block, in Keras' layouts."""
    named = {name: variable.value for name, variable in variables_of(block).items()}
    x = keras.ops.convert_to_tensor(channels_last(x), dtype="float64")
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = loss_keras(block, x)
        slopes = tape.gradient(loss, [x, *named.values()])
    elif keras.backend.backend() == "torch":
        x.requires_grad_()
        loss = loss_keras(block, x)
        slopes = torch.autograd.grad(loss, [x, *named.values()])
    else:
        raise NotImplementedError("the gradients here are for Keras on TensorFlow or PyTorch")
    return float(numbers(loss)), dict(zip(["x", *named], slopes, strict=True))


# %% [markdown] tags=["predict"]
# Gradients have the shapes of what they belong to, so those of the kernels must be transposed before we compare. For $x$ and each of the ten parameters the
# next cell takes the largest difference *as a share of the largest gradient*. In all rows but three that is below 1e-9. Which three parameters disagree
# completely, although nothing is wrong? (Notebook 05, section 5.)

# %%
_, slopes = slopes_torch(block, x)
_, slopes_k = slopes_keras(block_keras, x)
assert slopes.keys() == slopes_k.keys()
noise = []
for name in slopes:
    one, two = slopes[name].numpy(), numbers(slopes_k[name])
    if name == "x":
        two = channels_first(two)
    elif two.ndim > 1:
        two = np.moveaxis(two, (-1, -2), (0, 1))
    assert one.shape == two.shape
    agrees = np.abs(one - two).max() < 10 * close * np.abs(one).max()
    print(f"{name:12}", "agrees" if agrees else "does not agree")
    if not agrees:
        noise.append(name)
        assert np.abs(one).max() < 1e-15
        assert np.abs(two).max() < close
assert noise == ["phi.bias", "g.bias", "w_z.bias"]

# %% [markdown] tags=["explain"]
# They are the three biases that never learn. Their true gradient is 0; what the frameworks return is rounding (PyTorch's is below 1e-15), and the share
# compares one noise with another. A relative difference needs something to be relative to: say first how small counts as zero.
#
# ## 5 · Five training steps
#
# Same weights and same gradients, so plain SGD should keep the two together. The rate is 1/8, a number that binary holds exactly: Keras keeps its rate in *float32*, where 0.1 is rounded in the ninth digit.


# %%
def train(rate, steps=5):
    """Train a pair side by side: both blocks, the losses (steps, 2), the largest gap in any weight after each step."""
    one = nlutils.torch.NonLocalBlock(C, d).double()
    two = nlutils.keras.NonLocalBlock(C, d, dtype="float64")
    two.build((None, T, H, W, C))
    draw(one, seed=2)
    one.norm.reset_running_stats()  # mean 0, variance 1
    torch_to_keras(one, two)
    sgd, sgd_keras = torch.optim.SGD(one.parameters(), lr=rate), keras.optimizers.SGD(rate)
    variables = variables_of(two)
    losses, gaps = [], []
    for _step in range(steps):
        loss, slopes = slopes_torch(one, x)
        for name, parameter in one.named_parameters():
            parameter.grad = slopes[name]
        sgd.step()
        loss_k, slopes = slopes_keras(two, x)
        sgd_keras.apply([slopes[name] for name in variables], list(variables.values()))
        losses.append((loss, loss_k))
        arrays, arrays_k = to_arrays(one), to_arrays(two)
        gaps.append(max(np.abs(arrays[name] - arrays_k[name]).max() for name in variables))
    return one, two, np.array(losses), np.array(gaps)


for rate in (0.125, 0.1):
    kept = float(numbers(keras.optimizers.SGD(rate).learning_rate))
    assert (kept == rate) == (rate == 0.125)
block, block_keras, losses, gaps = train(rate=0.125)
for step, (loss, loss_k) in enumerate(losses, start=1):
    print(f"step {step}: loss {loss:.8f} in PyTorch, {loss_k:.8f} in Keras")
difference(losses[:, 0], losses[:, 1], "the losses", below=close)
difference(gaps, np.zeros(5), "the weights", below=close)

# %% [markdown] tags=["predict"]
# ## 6 · The same weights, and still not the same output
#
# After five steps at 1/8 all ten parameters agree to 1e-10 or better. Now both blocks go into evaluation mode, as they would for testing.
#
# In evaluation mode the normalisation uses its running statistics instead of the batch's. Which of the twelve arrays differ
# between the two blocks, if any? And by how much: rounding, or more?

# %%
block.eval()
difference(run_torch(block, x), run_keras(block_keras, x, training=False), "evaluation mode")
arrays, arrays_k = to_arrays(block), to_arrays(block_keras)
differing = [name for name in arrays if np.abs(arrays[name] - arrays_k[name]).max() > 10 * close]
print("different:", *differing)
assert differing == ["norm.running_var"]

# %% [markdown] tags=["explain"]
# Only `norm.running_var`. Both frameworks *normalise* by the biased variance of the batch, the mean of the squared deviations. But into the running
# variance PyTorch puts the *unbiased* one, the sum divided by $n - 1$ instead of $n$, where $n = B \cdot N = 144$ is how many numbers a channel has. With $v_0$ at
# the start, each step keeps nine tenths of the old value, so after $k$ steps, whatever the data were,
#
# $$\frac{v^{\text{PyTorch}}_k - 0.9^k\, v_0}{v^{\text{Keras}}_k - 0.9^k\, v_0} = \frac{n}{n-1}$$

# %%
n, start = B * N, 0.9**5 * 1.0  # v_0 = 1
v, v_keras = arrays["norm.running_var"], arrays_k["norm.running_var"]
ratio = (v - start) / (v_keras - start)
print("the ratio of all ten channels:", ratio.round(9))
print(f"n / (n - 1) = 144 / 143 =       {n / (n - 1):.9f}")
difference(ratio, np.full(C, n / (n - 1)), "ratio and n / (n - 1)", below=10 * close)

# The formula turned round: what PyTorch would have kept.
corrected = start + n / (n - 1) * (v_keras - start)
from_arrays(block_keras, {**arrays_k, "norm.running_var": corrected})
difference(
    run_torch(block, x),
    run_keras(block_keras, x, training=False),
    "evaluation mode, corrected",
    below=10 * close,
)

# %% [markdown]
# A formula that exact can be undone: with the corrected variance the two blocks agree in evaluation mode too. Is it worth it? With 8 clips of 4 × 14 × 14 positions $n/(n-1)$ is 1.00016, and nobody corrects it. With one position per clip and
# a batch of two it is 2. When you *load* weights there is nothing to do: the numbers in the file are used as they are.
#
# Two more differences lie in the defaults, and `nlutils` sets both. Keras' `momentum` is the share that is *kept* (0.99), PyTorch's the share that is *new* (0.1): Keras' 0.9 is
# PyTorch's 0.1. And Keras adds 1e-3 to the variance where PyTorch adds 1e-5.
#
# Seeds do not travel either: each framework has its own generator. To start two frameworks from one point, draw the numbers once, with NumPy, as `draw` did.
#
# ## 7 · A network that somebody else wrote
#
# In research the block rarely stands alone: it is put into a network that exists, often with trained weights. Here is one, a small residual video network. We may not edit
# its code; imagine that it comes from a package.


# %%
class BasicBlock(nn.Module):
    def __init__(self, width_in, width, stride):
        super().__init__()
        self.conv1 = nn.Conv3d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = nn.Conv3d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm3d(width)
        self.down = nn.Conv3d(width_in, width, 1, stride) if width_in != width else nn.Identity()

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.down(x))


class TheirNetwork(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.stem = nn.Conv3d(3, 8, 3, (1, 2, 2), 1)
        self.layer1 = nn.Sequential(BasicBlock(8, 8, 1), BasicBlock(8, 8, 1))
        self.layer2 = nn.Sequential(BasicBlock(8, 16, (1, 2, 2)), BasicBlock(16, 16, 1))
        self.head = nn.Linear(16, classes)

    def forward(self, clips):
        x = self.layer2(self.layer1(torch.relu(self.stem(clips))))
        return self.head(x.mean(dim=(2, 3, 4)))


torch.manual_seed(0)
network = TheirNetwork().eval()
clips = torch.tensor(np.random.default_rng(3).standard_normal((2, 3, 4, 16, 16))).float()
before = network(clips)
assert before.shape == (2, 4)
print([name for name, _ in network.named_modules() if name.count(".") == 1])

# %% [markdown]
# Every part of a PyTorch network has a name, with a dot for each level. To put a block after `layer2.0`, we find the part, and its parent `layer2`, and replace the part by
# *part, then block*. A name that does not exist must be an error: nothing is worse than a block that was silently not inserted.


# %%
def insert(network, name, block):
    """Put `block` after the part of `network` that is called `name`."""
    names = [known for known, _ in network.named_modules() if known]
    if name not in names:
        raise ValueError(f"no part is called {name!r}; parts are {', '.join(names)}")
    parent, _, child = name.rpartition(".")
    pair = nn.Sequential(network.get_submodule(name), block)
    setattr(network.get_submodule(parent), child, pair)


def blocks_in(network):
    return [name for name, part in network.named_modules() if isinstance(part, nlutils.torch.NonLocalBlock)]


insert(network, "layer2.0", nlutils.torch.NonLocalBlock(16).eval())
difference(network(clips), before, "output with the block and without")
print("blocks:", blocks_in(network))
try:
    insert(network, "layer3.0", nlutils.torch.NonLocalBlock(16))
except ValueError as error:
    print("ValueError:", str(error).split(";")[0])
else:
    raise AssertionError("a block went nowhere, without an error")

# %% [markdown]
# The output did not move by a bit, thanks to the gain of zero. But the *names* moved. Their trained weights were saved under the old ones:

# %%
checkpoint = TheirNetwork().state_dict()
lost = network.load_state_dict(checkpoint, strict=False)
theirs = [key for key in lost.missing_keys if key.startswith("layer2.0.0.")]
print(
    f"{len(lost.missing_keys)} names of the network were not in the file, {len(theirs)} of them were theirs before:"
)
print(" ", theirs[0], "was", lost.unexpected_keys[0])

# %% [markdown]
# With `strict=False` that is no error: part of the network quietly keeps its random weights. `nlutils.torch.insert_non_local` goes another way. It makes the block a *child* of the part, and a
# *hook*, a function that PyTorch calls after the part, gives it what the part returns; so no name changes. It runs the network twice on an example: before, to see how many channels and axes there are at each place, and after, to see that
# the blocks run.

# %%
network = TheirNetwork().eval()
before = network(clips)
print(nlutils.torch.insert_non_local(network, clips, after=["layer1.1", "layer2.0"]))
difference(network(clips), before, "output with two blocks and without")
lost = network.load_state_dict(checkpoint, strict=False)
assert lost.unexpected_keys == []
assert all(".non_local." in key for key in lost.missing_keys)
first, *more = lost.missing_keys
print("not in the file:", first, "and", len(more), "more names, all of the blocks")
for names in (["layer3.0"], []):
    try:
        nlutils.torch.insert_non_local(network, clips, after=names)
    except ValueError as error:
        print("ValueError:", error)
    else:
        raise AssertionError("a block went nowhere, without an error")

# %% [markdown]
# ## 8 · Is the block really there?
#
# Output unchanged, no error: a block that was never inserted looks just the same. This is not a joke. Among published networks one made a *new* block in each forward
# pass, one had an empty list of places to insert at, one ignored its argument for it. All were called non-local, and none had a block that could learn. Here are the first two, and a third mistake, a block that is made and never called, beside a real one.


# %%
class NewEachTime(TheirNetwork):
    def forward(self, clips):
        x = self.layer1(torch.relu(self.stem(clips)))
        x = nlutils.torch.NonLocalBlock(8)(x)
        return self.head(self.layer2(x).mean(dim=(2, 3, 4)))


class EmptyList(TheirNetwork):
    def __init__(self, places=()):
        super().__init__()
        for place in places:
            insert(self, place, nlutils.torch.NonLocalBlock(8))


class NeverCalled(TheirNetwork):
    def __init__(self):
        super().__init__()
        self.non_local = nlutils.torch.NonLocalBlock(8)


def real():
    network = TheirNetwork()
    nlutils.torch.insert_non_local(network, clips, after=["layer1.1"])
    return network


# %% [markdown] tags=["predict"]
# Two checks come to mind: count the parameters (a block of 8 channels has 164), and look whether the block's gain moves in one training step. Which of the three false networks
# passes the first check?


# %%
def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def gain_moves(network):
    """Whether one step of SGD changes the gain of every block; False where there is no block."""
    blocks = [network.get_submodule(name) for name in blocks_in(network)]
    sgd = torch.optim.SGD(network.parameters(), lr=0.1)
    nn.functional.cross_entropy(network(clips), torch.tensor([0, 1])).backward()
    sgd.step()
    return bool(blocks) and all(bool(block.norm.weight.any()) for block in blocks)


found = {}
for make in (NewEachTime, EmptyList, NeverCalled, real):
    torch.manual_seed(0)
    candidate = make().train()
    found[make.__name__] = count(candidate) - count(TheirNetwork()), gain_moves(candidate)
    print(
        f"{make.__name__:12} {found[make.__name__][0]:4} more parameters, gain moves: {found[make.__name__][1]}"
    )
assert found == dict(NewEachTime=(0, False), EmptyList=(0, False), NeverCalled=(164, False), real=(164, True))

# %% [markdown] tags=["explain"]
# `NeverCalled` has every parameter and uses none. Counting catches what was never registered; only the step catches what was never
# called. It costs a second, so make it before a training of days. (The gain must start at 0 for this check; else compare it before and after.)
#
# ## 9 · The same in Keras
#
# A Keras model made from layers cannot be changed in place; it is rebuilt. `nlutils.keras.insert_non_local` lets Keras' `clone_model` walk through the old model, keeps
# the layers themselves, so that both models share their weights, and calls a block after each layer that is named. It returns the new model, and what it inserted.


# %%
clip = keras.Input((4, 16, 16, 3))
stem = keras.layers.Conv3D(8, 3, strides=(1, 2, 2), padding="same", activation="relu", name="stem")(clip)
residual = keras.layers.Conv3D(8, 3, padding="same", activation="relu", name="res1")(stem)
y = keras.layers.Add(name="sum1")([stem, residual])
y = keras.layers.GlobalAveragePooling3D()(y)
model = keras.Model(clip, keras.layers.Dense(4, name="head")(y))

with_block, inserted = nlutils.keras.insert_non_local(model, ["sum1"])
print(inserted)
inputs = keras.ops.convert_to_tensor(np.moveaxis(clips.numpy(), 1, -1))
difference(numbers(with_block(inputs)), numbers(model(inputs)), "output with the block and without")
assert with_block.get_layer("head") is model.get_layer("head")
assert with_block.count_params() - model.count_params() == 164 + 16  # Keras counts the running statistics too
print(
    [
        layer.name
        for layer in with_block.layers
        if layer.name.split("_")[0] in ("stem", "res1", "sum1", "head")
    ]
)

# %% [markdown]
# ## 10 · What does this block compute?
#
# Our two blocks agree with each other. But both have the same authors, who could have misread the paper twice. `conformance.check` needs no second block: it fills a copy of *any* block with weights that
# matter and searches for the formula that gives its output, with the sums of notebook 04 in float64: each instantiation, scaled or not, sub-sampled before, after or not. If none fits, it tries the mistakes that it knows,
# from a softmax over the wrong axis to a forgotten 1/M, and names the one that fits. Then it looks from outside.

# %%
options = dict(subsample="before", scale=True)
report = conformance.check(nlutils.torch.NonLocalBlock(C, d, **options), x)
print(report)
assert report.passed

report_keras = conformance.check(nlutils.keras.NonLocalBlock(C, d, **options), channels_last(x))
assert report_keras.passed
assert report_keras.computes == report.computes
for each in (report, report_keras):
    print(f"\n{each.framework.split()[0]}: {each['statistics'].diagnosis}")

# %% [markdown]
# There is section 6 again, found without looking at the code. *Not run* is not *ok*: with 10 channels half precision shows nothing.
#
# **Other people's blocks.** The same checks were run over the blocks of three packages, mmcv-lite, pytorchvideo and timm, each in its modes, some of them 1,024 channels wide for half precision. The reports are kept in
# `data/results/conformance`, so that nothing need be installed here. The checks were told where $\theta$, $\phi$, $g$ and $W_z$ are, and nothing else.

# %% [markdown] tags=["predict"]
# Each block gives maps of the right shape, without an error. How many of the three packages are without a fault in every mode?

# %%
records = conformance.read_recorded()
clean = []
for library in sorted({record.library for record in records}):
    theirs = [record for record in records if record.library == library]
    faulty = [record for record in theirs if record.report.faults]
    print(f"{library} {theirs[0].version}: {len(theirs)} blocks, {len(faulty)} with faults")
    for name in dict.fromkeys(fault.split(":")[0] for record in faulty for fault in record.report.faults):
        texts = [r.report[name].diagnosis for r in faulty if r.report[name].result == "wrong"]
        print(f"  {len(texts)} x {name}: {'for example, ' if len(set(texts)) > 1 else ''}{texts[0]}")
    if not faulty:
        clean.append(library)
assert clean == ["nlutils"]
(gaussian,) = [record.report for record in records if record.name == "mmcv-NonLocal3d-gaussian-wide"]
assert gaussian["definition"].result == "ok"
assert gaussian["half precision"].result == "wrong"
(timm,) = [record.report.options for record in records if record.name == "timm-NonLocalAttn"]
print(
    f"\ntimm's logits are too small by a factor {(timm['in_channels'] / timm['inner_channels']) ** 0.5:.2f}"
)

# %% [markdown] tags=["explain"]
# None of the three. mmcv's concatenation is right and cannot be trained: a division in place overwrites what the backward pass needs. pytorchvideo's block changes a
# trained network at once. timm takes the scale from the channels of the input instead of those of $\theta$. The last two do not stop a network
# from training, so training does not show them. *Half precision* is another kind of fault, and independent of the others: even a right formula, mmcv's Gaussian for example, can leave float16.
#
# A report is no verdict on a package: it says which formula you get, and with it, whether your results can be compared with the paper's.

# %% [markdown]
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Any kernel (easy, 10 minutes)
#
# Write `kernel_of(weight)`: from the weight of a PyTorch convolution, (out, in, *size) with one, two or three sizes, to Keras' kernel (*size, in, out).
# **Expect**: for a `Conv3d(2, 5, 3)` the shape (3, 3, 3, 2, 5), and time still before height before width. The check gives a weight of each kind.
#
# <details><summary>Hint 1: a nudge</summary>A 3 × 3 × 3 kernel has more than one wrong order with the right shape. Which axis is time, before and after?</details>
# <details><summary>Hint 2: the formula</summary>The sizes keep their order. Only out and in leave the front and go, in turned order, to the end.</details>
# <details><summary>Hint 3: part of the code</summary><code>np.moveaxis(weight, (0, 1), (…, …))</code>: where does axis 0 (out) go, where axis 1 (in)?</details>


# %% tags=["stub"]
def kernel_of(weight):
    #: solution
    return np.moveaxis(weight, (0, 1), (-1, -2))
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
draw_weight = np.random.default_rng(0).standard_normal
given = [draw_weight((5, 2, *sizes)) for sizes in ((3,), (3, 3), (3, 3, 3))]


def of_each(kernel):
    return tuple(kernel(weight) for weight in given)


check(
    "Exercise 1",
    lambda: of_each(kernel_of),
    tuple(weight.transpose(*range(2, weight.ndim), 1, 0) for weight in given),
    mistakes={
        "reshape keeps the order in memory; the numbers must move": of_each(
            lambda weight: weight.reshape(*weight.shape[2:], 2, 5)
        ),
        "all axes are turned round, so time and width have changed places": of_each(np.transpose),
        "in and out are in PyTorch's order; Keras wants (…, in, out)": of_each(
            lambda weight: np.moveaxis(weight, (0, 1), (-2, -1))
        ),
        "in and out are right, but the sizes are still behind them": of_each(
            lambda weight: weight.swapaxes(0, 1)
        ),
    },
)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · The running variance of both (medium, 15 minutes)
#
# Write `running(batches, framework)`: `batches` is a list of arrays (n, C). Return the running variance (C,) after they have passed, in this order, through a fresh
# normalisation layer of `"torch"` or `"keras"` **with that framework's default momentum**. It starts at 1. **Expect**: for the three batches of the check 2.408 and 4.012 in PyTorch,
# 1.105 and 1.225 in Keras.
#
# <details><summary>Hint 1: a nudge</summary>Two things differ between the frameworks: which variance goes in, and how much of the old one stays.</details>
# <details><summary>Hint 2: the formula</summary>v becomes keep · v + (1 − keep) · s², with keep = 0.9 and s² unbiased in PyTorch, keep = 0.99 and s² biased in Keras.</details>
# <details><summary>Hint 3: part of the code</summary><code>batch.var(axis=0, ddof=1)</code> divides by n − 1, <code>ddof=0</code> by n.</details>


# %% tags=["stub"]
def running(batches, framework):
    #: solution
    keep, ddof = (0.9, 1) if framework == "torch" else (0.99, 0)
    v = np.ones(batches[0].shape[1])
    for batch in batches:
        v = keep * v + (1 - keep) * batch.var(axis=0, ddof=ddof)
    return v
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
batches = [3 * np.random.default_rng(seed).standard_normal((4, 2)) for seed in range(3)]
layer, layer_keras = nn.BatchNorm1d(2).double(), keras.layers.BatchNormalization(dtype="float64")
for batch in batches:
    layer(torch.tensor(batch))
    layer_keras(keras.ops.convert_to_tensor(batch), training=True)


def wrong(keeps, ddofs, start=1.0):
    results = []
    for keep, ddof in zip(keeps, ddofs, strict=True):
        v = np.full(2, start)
        for batch in batches:
            v = keep * v + (1 - keep) * batch.var(axis=0, ddof=ddof)
        results.append(v)
    return tuple(results)


check(
    "Exercise 2",
    lambda: (running(batches, "torch"), running(batches, "keras")),
    (layer.running_var, numbers(layer_keras.moving_variance)),
    mistakes={
        "PyTorch's momentum 0.1 is the share of the new value, not of the old": wrong((0.1, 0.99), (1, 0)),
        "both momenta are turned round: old and new have changed places": wrong((0.1, 0.01), (1, 0)),
        "both with the biased variance; PyTorch divides by n - 1": wrong((0.9, 0.99), (0, 0)),
        "both with the unbiased variance; Keras divides by n": wrong((0.9, 0.99), (1, 1)),
        "biased and unbiased have changed places": wrong((0.9, 0.99), (0, 1)),
        "both with 0.9; Keras' default keeps 0.99": wrong((0.9, 0.9), (1, 0)),
        "the running variance starts at 1, not at 0": wrong((0.9, 0.99), (1, 0), start=0.0),
    },
    tolerance=1e-6,
)

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · A stranger's block (medium, 15 minutes)
#
# `Theirs` is a block in 2D that somebody found on an old disk. Read it and write `places()`, which tells `conformance.check` where its parts are: a dictionary with the keys
# `"theta"`, `"phi"`, `"g"`, `"w_z"` and `"norm"`, each value a path like `"layer2.0.conv1"`. **Expect**: two checks are wrong, `definition` and one more.
#
# <details><summary>Hint 1: a nudge</summary>Only what the block does with a part says which it is. Which one is summed with the weights?</details>
# <details><summary>Hint 2: the formula</summary>The softmax runs over j, along each row of its matrix. theta gives the rows i, phi the columns j, and the row's weights sum over g.</details>
# <details><summary>Hint 3: part of the code</summary><code>{"w_z": "out.0", …}</code>: parts of a `Sequential` have numbers.</details>


# %% tags=["stub"]
class Theirs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(8, 4, 1), nn.MaxPool2d(2))
        self.b = nn.Conv2d(8, 4, 1)
        self.c = nn.Sequential(nn.Conv2d(8, 4, 1), nn.MaxPool2d(2))
        self.out = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8))
        nn.init.zeros_(self.out[1].weight)

    def forward(self, x):
        a, b, c = (part(x).flatten(2) for part in (self.a, self.b, self.c))
        weights = torch.softmax(b.transpose(1, 2) @ a * 4**0.5, dim=2)
        y = c @ weights.transpose(1, 2)
        return x + self.out(y.reshape(len(x), 4, *x.shape[2:]))


def wrong_checks(weights):
    report = conformance.check(Theirs(), torch.zeros(2, 8, 4, 6), weights)
    return ", ".join(result.check for result in report.results if result.result == "wrong")


def places():
    #: solution
    return {"theta": "b", "phi": "a.0", "g": "c.0", "w_z": "out.0", "norm": "out.1"}
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
right = {"theta": "b", "phi": "a.0", "g": "c.0", "w_z": "out.0", "norm": "out.1"}
check(
    "Exercise 3",
    lambda: None if places() is None else wrong_checks(places()),
    "definition, scale",
    mistakes={
        "theta and phi have changed places": wrong_checks(right | {"theta": "a.0", "phi": "b"}),
        "phi and g have changed places": wrong_checks(right | {"phi": "c.0", "g": "a.0"}),
        "a part is missing: give all five": "",
        "the norm is missing; without it the update is always zero": wrong_checks(
            {part: path for part, path in right.items() if part != "norm"}
        ),
    },
)

# %% [markdown]
# ## What you learned
#
# - PyTorch's weight (out, in, T, H, W) becomes Keras' kernel (T, H, W, in, out) by moving axes. `reshape` and square kernels give wrong functions without an error.
# - A test that two strangers pass is no test: give every array a number that matters, above all the gain.
# - In float64 outputs, gradients and five training steps agree to 1e-10. Each larger gap had a cause: gradients that are noise, a variance by $n - 1$.
# - Exchange arrays, not seeds.
# - A block after a named part leaves the output exactly as it was. See the gain move before you train for long.
# - A block can be asked what it computes. Its name, its shapes and its training do not tell.
#
# ## Further reading
#
# - X. Wang, R. Girshick, A. Gupta, K. He: Non-local Neural Networks. CVPR 2018. Section 3.3: a block can be put into a trained network without changing what it computes.
# - S. Ioffe, C. Szegedy: Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift. ICML 2015. Section 3.1 has the factor n/(n−1).
