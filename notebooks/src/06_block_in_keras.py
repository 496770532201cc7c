# %% [markdown]
# # 06 · The non-local block in Keras
#
# After this notebook you can
#
# - say when a plain reshape turns a clip into a list of positions, and when it scrambles it
# - predict what a batch normalisation answers in inference after 1, 10 and 100 training steps
# - name the weights of a new block that move in the first training step, and in the second
# - write a Keras layer that makes its weights once, saves them and comes back from a file
# - use one trained block in two models, for clips of different lengths
#
# | | |
# |:--|:--|
# | What you need | notebook 04 (equation 1 as a matrix); layers, `compile` and `fit` in Keras. Notebook 05 is not needed |
# | Your time | 75 minutes |
# | Machine time | 25 seconds |
# | Framework | Keras (on TensorFlow, or the backend that `KERAS_BACKEND` names) |

# %% tags=["parameters"]
import os

profile = os.environ.get("NLUTILS_PROFILE", "quick")

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from nlutils import plots
from nlutils.course import check, difference, import_keras, settings

keras = import_keras(os.environ.get("KERAS_BACKEND", "tensorflow"))
from keras import layers, ops

import nlutils.keras  # after the backend is chosen

settings = settings(
    profile,
    quick=dict(epochs=6, rounding=1e-5),
    full=dict(epochs=20),
    gpu=dict(epochs=20, rounding=1e-2),  # a GPU may convolve float32 with shorter numbers
)
plots.style()
np.set_printoptions(precision=3, suppress=True)
numpy = ops.convert_to_numpy  # a tensor of any backend -> an array

# %% [markdown]
# ## 1 · A vote in a clip
#
# Every position of our clips carries a vector of 9 numbers:
#
# - numbers 0 to 7, the *look* of the thing that stands there: a random direction of length 1;
# - number 8, its *vote*: +1 or −1 at random.
#
# The thing at $(t, h, w) = (0, 1, 1)$ asks a question. It has no vote itself (0), and comes back once in each later frame: same look, random
# place, and there it does vote. The question: *which vote has the majority among my later selves?* With 4 frames these are 3 votes out of 59. All others are
# noise: in clip 0 below they even outvote the right answer.
#
# Keras keeps the channels **last**: a batch of clips is $(B, T, H, W, C)$.

# %%
T, H, W, C, d = 4, 3, 5, 9, 8
N = T * H * W
ASKER = (0, 1, 1)  # t, h, w


def clips(count, rng, T=T):
    """Clips (count, T, H, W, C), the answers 0 or 1 (count,), and where the asker is seen (count, T, H, W)."""
    x = rng.standard_normal((count, T, H, W, C))
    x[..., :8] /= np.linalg.norm(x[..., :8], axis=-1, keepdims=True)
    x[..., 8] = rng.choice([-1, 1], size=(count, T, H, W))
    x[:, 0, 1, 1, 8] = 0
    seen = np.zeros((count, T, H, W), dtype=bool)
    seen[:, 0, 1, 1] = True
    clip, votes = np.arange(count), np.zeros(count)
    for t in range(1, T):
        h, w = rng.integers(H, size=count), rng.integers(W, size=count)
        x[clip, t, h, w, :8] = x[:, 0, 1, 1, :8]
        votes += x[clip, t, h, w, 8]
        seen[clip, t, h, w] = True
    return x.astype("float32"), (votes > 0).astype("float32"), seen


x, answer, seen = clips(2, np.random.default_rng(1))
B = len(x)
assert x.shape == (B, T, H, W, C) == (2, 4, 3, 5, 9)
for place in np.argwhere(seen[0]):
    print("clip 0, (t, h, w) =", place, " vote", x[0, *place, 8])
print("answer:", answer[0], "  sum of all votes:", x[0, ..., 8].sum())
assert answer[0] == 0
assert x[0, ..., 8].sum() > 0


# %%
def ring(ax, seen, colour):
    """A ring around each place where the asker is seen in this frame."""
    for h, w in np.argwhere(seen):
        ax.add_patch(plt.Circle((w, h), 0.42, fill=False, color=colour, lw=2))


fig, axes = plots.strip(
    0.35 + 0.45 * x[0, ..., :3].clip(-0.75, 0.75), [f"t = {t}" for t in range(T)], width=2.2
)
for t, ax in enumerate(axes):
    ring(ax, seen[0, t], "white")
    for h, w in np.ndindex(H, W):
        ax.text(
            w, h, {1: "+", -1: "−", 0: "?"}[int(x[0, t, h, w, 8])], ha="center", va="center", color="white"
        )
plots.show(
    fig,
    "Four frames of 3 by 5 coloured squares, each with a plus or a minus. In frame 0 one square has a question mark "
    "and a ring. Its colour comes back in one ringed square of each later frame.",
)

# %% [markdown]
# ## 2 · One matrix at every position
#
# Notebook 04 wrote $\theta(x_i) = W_\theta x_i$. In Keras the channels stand in the last axis, and `Dense` multiplies the last axis, whatever comes before it. So
# `Dense(d)` is $W_\theta$ at every position of a clip. `Conv3D(d, 1)`, a convolution that sees one position at a time, is the same matrix in another
# box. We take the convolution, because published weights come in that box.

# %%
rng = np.random.default_rng(5)
W_theta = rng.standard_normal((C, d)).astype("float32") / C**0.5

dense, conv3d = layers.Dense(d), layers.Conv3D(d, 1, data_format="channels_last")
for layer in (dense, conv3d):
    layer.build((None, T, H, W, C))
    kernel, bias = layer.weights
    print(f"{layer.name:8} kernel {kernel.shape}, bias {bias.shape}")
dense.set_weights([W_theta, np.zeros(d)])
conv3d.set_weights([W_theta.reshape(1, 1, 1, C, d), np.zeros(d)])

assert dense(x).shape == conv3d(x).shape == (B, T, H, W, d)
difference(dense(x), x @ W_theta, "Dense and x @ W", below=settings.rounding)
difference(conv3d(x), dense(x), "Conv3D and Dense", below=settings.rounding)

# %% [markdown]
# The kernel is (in, out), because a position is a *row* here: Keras computes $x_i^T W$. It is the transpose of the $W_\theta$ of the equation (and of PyTorch's
# weight; notebook 07 needs this).
#
# ## 3 · The block by hand
#
# **Step 1, three embeddings.** $\theta$ asks, $\phi$ is compared with the question, $g$ is handed over.


# %%
def filled(layer, width_in):
    """The layer with NumPy's random numbers as its weights, and bias 0."""
    layer.build((None, None, None, None, width_in))
    kernel, bias = layer.weights
    layer.set_weights([rng.standard_normal(kernel.shape) / width_in**0.5, np.zeros(bias.shape)])
    return layer


theta, phi, g = (filled(layers.Conv3D(d, 1, data_format="channels_last"), C) for _ in range(3))
for name, layer in dict(theta=theta, phi=phi, g=g).items():
    assert layer(x).shape == (B, T, H, W, d)
    print(f"{name:5} of the asker:", numpy(layer(x))[0, *ASKER])

# %% [markdown]
# **Step 2, from clips to lists of positions.** Equation 1 knows no frames, only positions $i = 0 \dots N-1$: $(B, T, H, W, d)$ becomes
# $(B, N, d)$, and the asker becomes row $(t H + h) W + w = 6$. A reshape never moves a number in memory; it only counts them off anew. With channels
# last, the $d$ numbers of one position are neighbours in memory, so counting off in groups of $d$ gives positions.
#
# With channels *first*, as in PyTorch, neighbours in memory are one channel at different positions, and the same reshape
# gives a list of the right shape in which no row is a position. There one must transpose first. The second half of the cell shows it.


# %%
def rows(maps):
    """(B, T, H, W, d) -> (B, N, d): one row for each position."""
    _, T, H, W, d = maps.shape
    return ops.reshape(maps, (-1, T * H * W, d))


i = (0 * H + 1) * W + 1
theta_i, phi_j, g_j = rows(theta(x)), rows(phi(x)), rows(g(x))
assert theta_i.shape == phi_j.shape == g_j.shape == (B, N, d)
print("row 6, channels last           ", numpy(theta_i)[0, i])
difference(theta_i[0, i], theta(x)[0, 0, 1, 1], "row 6 and the asker")

first = ops.transpose(theta(x), (0, 4, 1, 2, 3))
assert first.shape == (B, d, T, H, W)
scrambled = numpy(ops.reshape(first, (B, N, d)))[0, i]
print("row 6, channels first          ", scrambled)
print("positions 48 to 55 of channel 0", numpy(first)[0, 0].reshape(N)[48:56])

# %% [markdown]
# The mistake is made both ways. One public TensorFlow implementation reshapes channels-last maps straight into $(B, d, N)$, and its README calls the
# results terrible.
#
# **Step 3, the map.** The embedded Gaussian compares with $f(x_i, x_j) = e^{\theta(x_i)^T \phi(x_j)}$ and divides by the sum over $j$: a softmax over the last axis.

# %%
weights = ops.softmax(ops.matmul(theta_i, ops.transpose(phi_j, (0, 2, 1))), axis=2)
assert weights.shape == (B, N, N)
difference(ops.sum(weights, axis=2), np.ones((B, N)), "each row sums to 1", below=settings.rounding)

# %% [markdown]
# **Step 4, the sum,** equation 1 of the paper, and **step 5, back to frames**, again a plain reshape:
#
# $$y_i = \frac{1}{\mathcal{C}(x)} \sum_{\forall j} f(x_i, x_j)\, g(x_j)$$
#
# where $\mathcal{C}(x) = \sum_j f(x_i, x_j)$ is the divisor, $C(x)$ in notebook 04.

# %%
y = ops.matmul(weights, g_j)
assert y.shape == (B, N, d)
by_hand = sum(numpy(weights)[0, i, j] * numpy(g_j)[0, j] for j in range(N))
print("y_6, as a sum over j", by_hand)
print("y_6, as a matrix    ", numpy(y)[0, i])

y = ops.reshape(y, (B, T, H, W, d))
print("y, back in frames   ", numpy(y)[0, *ASKER])

# %% [markdown]
# **Step 6, $W_z$ and its normalisation.** $W_z$ brings $d$ numbers back to $C$. Behind it the paper puts a batch normalisation: each channel gets mean 0 and
# variance 1 over the batch and all positions, then is multiplied by a learned *gain* $\gamma$ and shifted by a learned $\beta$. The gain starts at
# **zero**.
#
# **Step 7, the residual.** Equation 6 of the paper:
#
# $$z_i = W_z y_i + x_i$$
#
# With step 6, the code adds the normalised $W_z y_i$, times the gain, plus $\beta$, in place of $W_z y_i$.

# %%
w_z = filled(layers.Conv3D(C, 1, data_format="channels_last"), d)
n = w_z(y)
norm = layers.BatchNormalization(gamma_initializer="zeros")
z = ops.add(x, norm(n, training=True))  # not x + …: x is a NumPy array, and not every backend adds those
assert n.shape == z.shape == x.shape
print("x_6    ", x[0, *ASKER])
print("W_z y_6", numpy(n)[0, *ASKER])
print("z_6    ", numpy(z)[0, *ASKER])
difference(z, x, "z and x")

# %% [markdown] tags=["predict"]
# Exactly equal. Put into a trained network, a new block changes nothing, to the last bit; then the gain leaves zero and the block grows in.
#
# ## 4 · What a batch normalisation remembers
#
# In training, a batch normalisation divides by the standard deviation *of the batch*. Meanwhile it keeps a running mean and a running variance, which begin at 0 and 1; in
# inference it uses those. Let one batch with mean 3 and variance 25 pass in training mode, again and again, with gain 1. The output in training always has
# variance 1.
#
# Now the same layer is given the same batch in inference. What variance does the output have after 1 training step? After 100, is it 1?

# %%
v = rng.standard_normal((1000, 1))
v = 3 + 5 * (v - v.mean()) / v.std()
answered = {}
print("momentum  steps  variance in training  in inference")
for momentum in (0.99, 0.9):
    norm = layers.BatchNormalization(momentum=momentum)
    for step in range(1, 101):
        trained = numpy(norm(v, training=True))
        if step in (1, 10, 100):
            answered[momentum, step] = numpy(norm(v, training=False)).var()
            print(f"{momentum:8}  {step:5}  {trained.var():20.1f}  {answered[momentum, step]:12.1f}")

# %% [markdown] tags=["explain"]
# With 0.99, the default of Keras, one step leaves the running variance at $0.99 \cdot 1 + 0.01 \cdot 25 = 1.24$, and the output has variance 25 / 1.24 = 20. After 100
# steps the start still has a weight of $0.99^{100} = 0.37$, and the layer answers in inference with half as much variance again as in training. A short training run, a debugging run above all, can look
# good in `fit` and bad in `evaluate` for this reason alone. The authors' code has 0.9, and so has our block. (PyTorch writes this as `momentum=0.1`: it names the share of the *new* batch.)
#
# After $k$ steps with the same batch, with momentum $\mu$:
#
# $$\sigma^2_k = \mu^k \cdot 1 + (1 - \mu^k)\, \sigma^2_{batch}$$

# %%
for (momentum, step), variance in answered.items():
    running = momentum**step + (1 - momentum**step) * 25
    assert abs(variance - 25 / running) < 0.01 * variance

# %% [markdown]
# Four defaults of Keras differ from the authors' released code, which we follow:
#
# | | Keras | here |
# |:--|:--|:--|
# | momentum of the normalisation | 0.99 | 0.9 |
# | epsilon, added to the variance | 0.001 | 0.00001 |
# | gain at the start | 1 | 0 |
# | weights of a convolution at the start | Glorot uniform | normal, standard deviation 0.01 |
#
# One more thing to know: a layer that you call yourself is in inference mode until you say `training=True`. `fit` says it for you.
#
# ## 5 · The layer
#
# A Keras layer has four parts. `__init__` takes the arguments. `build` makes the weights, once, when the first input tells how many channels there
# are. `call` computes. `get_config` returns the arguments, so that a file can bring the layer back; `register_keras_serializable` tells Keras which class a name in the file means.


# %%
def conv(channels):
    """A 1x1x1 convolution that starts as in the authors' released code."""
    start = keras.initializers.RandomNormal(stddev=0.01)
    return layers.Conv3D(channels, 1, kernel_initializer=start, data_format="channels_last")


@keras.saving.register_keras_serializable(package="block_in_keras")
class NonLocalBlock(layers.Layer):
    """z = x + gain * normalised(W_z y) + beta, with y of the embedded Gaussian; x is (B, T, H, W, C)."""

    def __init__(self, inner_channels=None, **kwargs):
        super().__init__(**kwargs)
        self.inner_channels = inner_channels

    def build(self, input_shape):
        C = input_shape[-1]
        d = self.inner_channels or C // 2
        self.theta, self.phi, self.g, self.w_z = conv(d), conv(d), conv(d), conv(C)
        self.norm = layers.BatchNormalization(momentum=0.9, epsilon=1e-5, gamma_initializer="zeros")
        for layer in (self.theta, self.phi, self.g, self.norm):
            layer.build(input_shape)
        self.w_z.build((*input_shape[:-1], d))

    def map(self, x):
        theta_i, phi_j = rows(self.theta(x)), rows(self.phi(x))
        return ops.softmax(ops.matmul(theta_i, ops.transpose(phi_j, (0, 2, 1))), axis=2)

    def call(self, x, training=None):
        y = ops.matmul(self.map(x), rows(self.g(x)))
        y = ops.reshape(y, (-1, *x.shape[1:4], y.shape[2]))
        return x + self.norm(self.w_z(y), training=training)

    def get_config(self):
        return {**super().get_config(), "inner_channels": self.inner_channels}


# %% [markdown]
# Is it the seven steps? We give it our weights, and a gain of 1, so that there is something to compare. And is it the block of the package,
# `nlutils.keras.NonLocalBlock`, on the same weights?

# %%
block = NonLocalBlock(d)
difference(block(x), x, "a new block and the identity")
assert len(block.norm.weights) == 4  # gain, beta, running mean, running variance

for name, layer in dict(theta=theta, phi=phi, g=g, w_z=w_z).items():
    getattr(block, name).set_weights(layer.get_weights())
block.norm.gamma.assign(np.ones(C))

n_numpy = numpy(n)
over = (0, 1, 2, 3)  # all axes but the channels
steps = x + (n_numpy - n_numpy.mean(over)) / np.sqrt(n_numpy.var(over) + 1e-5)

packaged = nlutils.keras.NonLocalBlock(C, d)
packaged.build(x.shape)
packaged.set_weights(block.get_weights())

difference(packaged(x), block(x), "nlutils and our layer, inference", below=settings.rounding)
difference(packaged(x, training=True), steps, "nlutils and steps, training", below=10 * settings.rounding)
difference(block(x, training=True), steps, "our layer and steps, training", below=10 * settings.rounding)

# %% [markdown] tags=["predict"]
# A new block multiplies everything it has found out by a gain of zero. *Then how can it ever learn?* is what users of public implementations often ask. We give a new block our weights, keep the gain at
# zero, and take two steps of plain SGD towards a random target. Which of the ten weights move in step 1, and which in step 2?

# %%
fresh = NonLocalBlock(d)
inputs = keras.Input((T, H, W, C))
model = keras.Model(inputs, fresh(inputs))
for name, layer in dict(theta=theta, phi=phi, g=g, w_z=w_z).items():
    getattr(fresh, name).set_weights(layer.get_weights())
model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse", jit_compile=False)
target = np.random.default_rng(4).standard_normal(x.shape)

moves = {}
for _step in (1, 2):
    before = [numpy(weight).copy() for weight in fresh.trainable_weights]
    model.train_on_batch(x, target)
    for weight, old in zip(fresh.trainable_weights, before, strict=True):
        largest = np.abs(numpy(weight) - old).max()
        what = "no" if largest == 0 else "at most rounding" if largest < 1e-7 else "yes"
        moves.setdefault(weight.path, []).append(what)

names = [f"{name} {kind}" for name in ("theta", "phi", "g", "w_z") for kind in ("kernel", "bias")]
print(f"{'':13}step 1  step 2")
for name, (first, second) in zip([*names, "gain", "beta"], moves.values(), strict=True):
    print(f"{name:13}{first:8}{second}")
assert [first for first, _ in moves.values()] == 8 * ["no"] + 2 * ["yes"]
assert [names[k] for k, (_, second) in enumerate(moves.values()) if second != "yes"] == [
    "phi bias",
    "g bias",
    "w_z bias",
]

# %% [markdown] tags=["explain"]
# The slope of the gain is the error times the *normalised* $W_z y$, which is not zero. So step 1 opens the door, and from step 2 on all kernels learn. Three biases never do: what they add is the same for all
# positions (`g`, `w_z`: the normalisation takes it off with the mean) or for all logits of a row (`phi`: the softmax does not see it).

# %% [markdown] tags=["predict"]
# ## 6 · When does a layer have weights?
#
# Below is a second layer. It runs, it returns the right shape, and it was published like this, in a public Keras implementation of the non-local block: the convolutions are made
# inside `call`.
#
# We ask both layers for their trainable weights before and after a first call, and call them twice with the same input. What are the four numbers, and are the two
# outputs equal? Then the forgetful layer goes into a model with a `Dense` behind it. What will `fit` say, and what will it train?


# %%
class ForgetfulBlock(layers.Layer):
    def call(self, x):
        d = x.shape[-1] // 2
        theta, phi, g, w_z = conv(d), conv(d), conv(d), conv(x.shape[-1])
        weights = ops.softmax(ops.matmul(rows(theta(x)), ops.transpose(rows(phi(x)), (0, 2, 1))), axis=2)
        y = ops.reshape(ops.matmul(weights, rows(g(x))), (-1, *x.shape[1:4], d))
        return x + w_z(y)


found = {}
for layer in (NonLocalBlock(), ForgetfulBlock()):
    before = len(layer.trainable_weights)
    once, twice = numpy(layer(x)), numpy(layer(x))
    found[type(layer).__name__] = before, len(layer.trainable_weights), np.array_equal(once, twice)
for name, (before, after, same) in found.items():
    print(f"{name:15} before {before}, after {after:2}; two calls give the same: {same}")
assert found == {"NonLocalBlock": (0, 10, True), "ForgetfulBlock": (0, 0, False)}

# %%
some_x, some_answer, _ = clips(512, np.random.default_rng(3))
inputs = keras.Input((T, H, W, C))
forgetful = keras.Model(inputs, layers.Dense(1)(ForgetfulBlock()(inputs)[:, *ASKER]))
for eagerly in (False, True):
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    forgetful.compile(optimizer="adam", loss=loss, run_eagerly=eagerly, jit_compile=False)
    try:
        forgetful.fit(some_x, some_answer, epochs=1, batch_size=64, verbose=0)
        print(f"run_eagerly={eagerly}: no error")
    except ValueError as error:
        print(f"run_eagerly={eagerly}: ValueError, and it is about variables: {'Variable' in str(error)}")
print("trained:", [weight.path.split("/")[-1] for weight in forgetful.trainable_weights], "of Dense")
assert len(forgetful.trainable_weights) == 2

# %% [markdown] tags=["explain"]
# Before the first call nobody has any: `NonLocalBlock()` does not know $C$ yet. So count the weights, load them and start an optimiser only after `build`. After it, ours has ten: four kernels
# with their biases, gain and $\beta$.
#
# The forgetful layer draws new random matrices at each call. Nothing is kept, so nothing is trained. TensorFlow's `fit` at least stops, because variables are made inside its graph. Run eagerly, it trains the `Dense` alone and says
# nothing. `len(layer.trainable_weights)` after the first call is the test.
#
# ## 7 · How many, and into a file
#
# Three embeddings and $W_z$ with their biases, gain and $\beta$:
#
# $$P = 3\,(C d + d) + (d\, C + C) + 2\, C$$


# %%
def parameters(C, d):
    return 3 * (C * d + d) + (d * C + C) + 2 * C


wide = NonLocalBlock()
wide.build((None, None, None, None, 512))
trainable = sum(int(np.prod(weight.shape)) for weight in wide.trainable_weights)
assert trainable == parameters(512, 256) == 526_592
print(f"trainable      {trainable:,}")
print(f"count_params() {wide.count_params():,}")
assert wide.count_params() - trainable == 2 * 512

# %% [markdown]
# `count_params()` counts the running mean and variance too, 2 C numbers that no gradient reaches. Papers leave them out.
#
# A block in a functional model, written to a file and read again:

# %%
inputs = keras.Input((T, H, W, C))
model = keras.Model(inputs, NonLocalBlock(d)(inputs))
model.layers[-1].set_weights(block.get_weights())

with tempfile.TemporaryDirectory() as folder:
    model.save(Path(folder) / "block.keras")
    again = keras.saving.load_model(Path(folder) / "block.keras")
assert isinstance(again.layers[-1], NonLocalBlock)
assert again.layers[-1].get_config()["inner_channels"] == d
difference(again(x), model(x), "read from the file", below=settings.rounding)

# %% [markdown]
# The file holds the config and, layer by layer, the weights. When it is read, Keras calls `build` first and fills the weights in: that is why `build` also builds the
# layers inside.
#
# ## 8 · Four forms, and fewer places to look at
#
# Notebook 04 has four choices of $f$, two with a softmax, two divided by the number of positions. All four in `keras.ops`; in the concatenation $w_f^T [\theta_i, \phi_j]$ splits into $a_i + b_j$:
#
# $$f(x_i, x_j) = \mathrm{ReLU}(w_f^T [\theta(x_i), \phi(x_j)]) = \mathrm{ReLU}(a_i + b_j)$$


# %%
def pairwise(theta, phi, instantiation, w_f=None):
    """The map, f(x_i, x_j) divided by its row's sum or by M: theta (B, N, d), phi (B, M, d) -> (B, N, M)."""
    if instantiation in ("gaussian", "embedded_gaussian"):
        return ops.softmax(ops.matmul(theta, ops.transpose(phi, (0, 2, 1))), axis=2)
    if instantiation == "dot_product":
        f = ops.matmul(theta, ops.transpose(phi, (0, 2, 1)))
    elif instantiation == "concatenation":
        d = theta.shape[2]
        a, b = ops.matmul(theta, w_f[:d, None]), ops.matmul(phi, w_f[d:, None])
        f = ops.relu(a + ops.transpose(b, (0, 2, 1)))
    else:
        raise ValueError(f"instantiation={instantiation!r} is not known")
    return f / phi.shape[1]


w_f = rng.standard_normal(2 * d).astype("float32")
pairs = [[w_f @ np.concatenate([asks, shows]) for shows in numpy(phi_j)[0]] for asks in numpy(theta_i)[0]]
in_two = pairwise(theta_i, phi_j, "concatenation", w_f)
assert in_two.shape == (B, N, N)
difference(in_two[0], np.maximum(pairs, 0) / N, "pair by pair, and a_i + b_j", below=settings.rounding)
print(f"pairs with f above 0: {int((numpy(in_two)[0] > 0).sum())} of {N * N}")

# %% [markdown] tags=["predict"]
# The map has $N^2$ entries. The paper makes it smaller: a max-pooling by 1 × 2 × 2 on the side of $\phi$ and $g$ leaves a quarter of the places to look at. One public Keras implementation pools the *list* of positions instead, with a
# one-dimensional pooling by 2. We pool our 3 × 5 positions numbered 0 to 14. Which numbers survive in the list, and which two positions are never neighbours, but share a window of the list?


# %%
def pool(maps):
    """The largest of 2 x 2 neighbours in each frame: (B, T, H, W, d) -> (B, T, H // 2, W // 2, d)."""
    return ops.max_pool(maps, (1, 2, 2), (1, 2, 2), data_format="channels_last")


numbered = np.arange(H * W, dtype="float32").reshape(1, 1, H, W, 1)
print(numbered[0, 0, :, :, 0].astype(int))
print("pooled as a map: ", numpy(pool(numbered)).ravel().astype(int))
print("pooled as a list:", numpy(ops.max_pool(rows(numbered), 2, 2)).ravel().astype(int))
assert pool(x).shape == (B, T, 1, 2, C)

x_tensor = ops.convert_to_tensor(x)
for form in ("gaussian", "embedded_gaussian", "dot_product", "concatenation"):
    taught, packaged = [], []
    for order in (None, "before", "after"):
        block = nlutils.keras.NonLocalBlock(C, d, instantiation=form, subsample=order, norm=False)
        block.build(x.shape)
        embeddings = {} if form == "gaussian" else dict(theta=theta, phi=phi)
        for name, layer in dict(**embeddings, g=g, w_z=w_z).items():
            getattr(block, name).set_weights(layer.get_weights())
        if form == "concatenation":
            block.w_f.assign(w_f)
        keys = pool(x_tensor) if order == "before" else x_tensor  # the places looked at
        theta_x, phi_x = (theta(x_tensor), phi(keys)) if embeddings else (x_tensor, keys)
        g_x = g(keys)
        if order == "after":
            phi_x, g_x = pool(phi_x), pool(g_x)
        y = ops.matmul(pairwise(rows(theta_x), rows(phi_x), form, w_f), rows(g_x))
        taught.append(numpy(w_z(ops.reshape(y, (B, T, H, W, d)))))
        packaged.append(numpy(block(x)) - x)
    difference(np.stack(taught), np.stack(packaged), f"{form}, and nlutils", below=settings.rounding)
    assert np.abs(taught[1] - taught[2]).max() > 0.01  # before and after are two functions

# %% [markdown] tags=["explain"]
# In the list 4 and 5 share a window, the end of one row and the beginning of the next (and in a longer list 14 and the next frame's 0); nothing is pooled in height; only half of the places go. So pool the map, then make the list. (Row 2 and column 4 fill no window, and are left out.)
#
# Pooling *before* $\phi$ and $g$ (released code) and *after* them (the paper's text) have the same weights and are different functions (notebook 05).
#
# `nlutils.keras.NonLocalBlock` has all of this and builds no map above 32 MiB: forward and backward, in any of the four forms, its memory grows with $N$, not $N^2$. Notebook 09 derives how.
#
# ## 9 · It learns to count votes
#
# The model: our block, then the vector at the asker, then one `Dense` that says yes or no. A model that ignores the look can only count
# *all* votes of the clip; how often that is right is printed too.

# %%
train_x, train_answer, _ = clips(4000, np.random.default_rng(0))
test_x, test_answer, test_seen = clips(1000, np.random.default_rng(1))

keras.utils.set_random_seed(0)
block, decide = NonLocalBlock(d), layers.Dense(1)
model = keras.Model(inputs, decide(block(inputs)[:, *ASKER]))
untrained = numpy(block.map(test_x[:1]))[0, i]
model.compile(
    optimizer=keras.optimizers.Adam(0.02),
    loss=keras.losses.BinaryCrossentropy(from_logits=True),
    jit_compile=False,  # compiling takes longer than this training
)
losses = model.fit(train_x, train_answer, epochs=settings.epochs, batch_size=64, verbose=0).history["loss"]


def accuracy(model, x, answer):
    return ((model.predict(x, verbose=0)[:, 0] > 0) == answer).mean()


everybody = ((test_x[..., 8].sum((1, 2, 3)) > 0) == test_answer).mean()
learned = accuracy(model, test_x, test_answer)
assert np.allclose(untrained, 1 / N, rtol=0.05)
assert everybody < 0.7
assert learned > 0.95

# %% tags=["nbval-ignore-output"]
print("loss, epoch by epoch:", np.array(losses))
print(f"right on 1000 new clips: {learned:.3f}; the majority of all votes: {everybody:.3f}")

# %% [markdown]
# Here is the row of the asker in the map, over the frames, for a clip it was not trained on. Before training all 60 weights are nearly equal, about 1/60, because weights of
# standard deviation 0.01 make all logits nearly 0. Which numbers should the ringed places have after training?

# %%
trained = numpy(block.map(test_x[:1]))[0, i]
fig, axes = plt.subplots(2, T, figsize=(9.6, 3.4))
for row, weights, name in zip(axes, (untrained, trained), ("untrained", "trained"), strict=True):
    for t, ax in enumerate(row):
        plots.heatmap(ax, 100 * weights.reshape(T, H, W)[t], numbers=".0f", vmin=0, vmax=30)
        ring(ax, test_seen[0, t], plots.COLOURS["red"])
        ax.set(title=f"t = {t}", xticks=[], yticks=[])
    row[0].set_ylabel(name)
plots.show(
    fig,
    "The row of the asker over four frames, in per cent. Untrained: 2 per cent everywhere. Trained: close to a quarter "
    "on each of the four ringed places, its own among them, 5 per cent on one more at t = 1, almost nothing elsewhere.",
)

# %% tags=["nbval-ignore-output"]
on_asker = numpy(block.map(test_x))[:, i][test_seen.reshape(1000, N)].reshape(1000, T)
print("mean weight on the asker in frames 0 to 3, 1000 clips:", on_asker.mean(axis=0))
assert on_asker.sum(axis=1).mean() > 0.8

# %% [markdown] tags=["predict"]
# A quarter each, or nearly: hardly anybody else looks like the asker, and the asker looks like itself too. Its own vote is 0, so it does no harm.
#
# The block was trained on 4 frames and 3 votes. Let it count in clips of 16 frames: 15 votes among 239, often 8 against 7. `model` takes 4 frames only, as its
# `Input` says. But layers belong to no model: a second model may call the same `block` and `decide`, with the same weights. No training. Will it be right in half of the
# clips, or in about as many as the majority of all votes, or in nearly all?

# %%
long_inputs = keras.Input((16, H, W, C))
long_model = keras.Model(long_inputs, decide(block(long_inputs)[:, *ASKER]))
long_x, long_answer, _ = clips(1000, np.random.default_rng(2), T=16)
long_right = accuracy(long_model, long_x, long_answer)
assert long_model.get_layer(block.name) is block
assert long_right > 0.9
print("right in more than 9 of 10 clips of 16 frames:", long_right > 0.9)
print("parameters of both models:", model.count_params(), "and", long_model.count_params())

# %% [markdown] tags=["explain"]
# In more than nine of ten. No weight of the block depends on $T$, $H$, $W$ or $N$ (section 7: the formula has only $C$ and $d$). And the softmax divides by its own sum: 16 places share what 4 shared before, $y$ is the *mean* vote instead of the sum, and a mean has the sign of the majority whether 3 have voted or 15.
#
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Steps until the start is forgotten (easy, 10 minutes)
#
# Write `steps(momentum)`: the smallest number of training steps after which the start of a running mean has a weight below 2 %. **Expect**: 38 for 0.9, and about ten times as many
# for 0.99.
#
# <details><summary>Hint 1: a nudge</summary>Each step multiplies the weight of the start by the momentum.</details>
# <details><summary>Hint 2: the formula</summary>The smallest whole k with μ^k &lt; 0.02.</details>
# <details><summary>Hint 3: part of the code</summary><code>k, weight = 0, 1.0</code>, then <code>while weight &gt;= 0.02:</code></details>


# %% tags=["stub"]
def steps(momentum):
    #: solution
    k, weight = 0, 1.0
    while weight >= 0.02:
        k, weight = k + 1, weight * momentum
    return k
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
check(
    "Exercise 1",
    lambda: (steps(0.9), steps(0.99)),
    (38, 390),
    mistakes={
        "one step too few: after it the weight is still above 2 %": (37, 389),
        "one step too many: the weight was below 2 % before": (39, 391),
        "that is PyTorch's momentum; in Keras it is the share of the old value": (2, 1),
        "the start shrinks by a factor at each step, not by the same amount": (10, 99),
        "the start shrinks by a factor at each step, and never to 0": (10, 100),
        "this is where the start weighs less than 10 %": (22, 230),
    },
)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Trainable and all (easy, 10 minutes)
#
# Write `counts(C, d)`: two numbers, the trainable parameters and what `count_params()` says, for a block in which $W_z$ and the embeddings have **no bias** (some published blocks are like this),
# by arithmetic. **Expect**: for C = 1024, d = 512 the first is 2,099,200. The check also asks for another C and d.
#
# <details><summary>Hint 1: a nudge</summary>Which terms of the formula of section 7 are biases of convolutions? β is no bias of a convolution.</details>
# <details><summary>Hint 2: the formula</summary>4 C d + 2 C are trainable; the running mean and variance are not.</details>
# <details><summary>Hint 3: part of the code</summary><code>trainable = 4 * C * d + 2 * C</code>, then <code>return trainable, trainable + …</code></details>


# %% tags=["stub"]
def counts(C, d):
    #: solution
    trainable = 4 * C * d + 2 * C
    return trainable, trainable + 2 * C
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
check(
    "Exercise 2",
    lambda: counts(1024, 512) and (*counts(1024, 512), *counts(20, 6)),
    (2_099_200, 2_101_248, 520, 560),
    mistakes={
        "d is an argument, and not always C / 2": (2_099_200, 2_101_248, 840, 880),
        "the biases of the convolutions are still in": (2_101_760, 2_103_808, 558, 598),
        "the bias of W_z is still in": (2_100_224, 2_102_272, 540, 580),
        "gain and β of the normalisation are missing": (2_097_152, 2_099_200, 480, 520),
        "the running mean and variance are missing in the second number": (2_099_200, 2_099_200, 520, 520),
        "running mean *and* variance: 2 C numbers": (2_099_200, 2_100_224, 520, 540),
        "the running mean and variance are not trainable": (2_101_248, 2_101_248, 560, 560),
        "one of the four matrices is missing": (1_574_912, 1_576_960, 400, 440),
    },
)

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · Time only (medium, 20 minutes)
#
# The paper also tries blocks in which a position looks only at its own place $(h, w)$, in all frames. Write `time_only(theta, phi, g)`: the three are maps $(B, T, H, W, d)$, and so is
# $y$. **Expect**: the map that you build is $(B \cdot 15, 4, 4)$: 15 places, 4 frames look at 4.
#
# <details><summary>Hint 1: a nudge</summary>Each place becomes a clip of its own with T positions. Are the T vectors of one place neighbours in memory?</details>
# <details><summary>Hint 2: the formula</summary>(B, T, H, W, d) → (B, H, W, T, d) → (B H W, T, d), then the softmax over frames, then all the way back.</details>
# <details><summary>Hint 3: part of the code</summary><code>theta = ops.reshape(ops.transpose(theta, (0, 2, 3, 1, 4)), (-1, T, d))</code>; the way back is <code>(0, 3, 1, 2, 4)</code></details>


# %% tags=["stub"]
def time_only(theta, phi, g):
    #: solution
    B, T, H, W, d = theta.shape
    theta, phi, g = (ops.reshape(ops.transpose(v, (0, 2, 3, 1, 4)), (-1, T, d)) for v in (theta, phi, g))
    y = ops.matmul(ops.softmax(ops.matmul(theta, ops.transpose(phi, (0, 2, 1))), axis=2), g)
    return ops.transpose(ops.reshape(y, (B, H, W, T, d)), (0, 3, 1, 2, 4))
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
maps = [numpy(layer(x)) for layer in (theta, phi, g)]
logits = np.einsum("bthwd,bshwd->bhwts", maps[0], maps[1])  # frame t looks at frame s
e = np.exp(logits)
expected = np.einsum("bhwts,bshwd->bthwd", e / e.sum(-1, keepdims=True), maps[2])


def on_lists(lists):
    """The embedded Gaussian within each list of positions, and back to (B, T, H, W, d)."""
    e = np.exp(lists[0] @ lists[1].transpose(0, 2, 1))
    return (e / e.sum(2, keepdims=True) @ lists[2]).reshape(B, T, H, W, d)


check(
    "Exercise 3",
    lambda: time_only(*(layer(x) for layer in (theta, phi, g))),
    expected,
    mistakes={
        "frames and places are mixed up: transpose before you reshape": on_lists(
            [v.reshape(-1, T, d) for v in maps]
        ),
        "that is space only: a position looks at its own frame": on_lists(
            [v.reshape(-1, H * W, d) for v in maps]
        ),
        "that is the whole block: all positions": on_lists([v.reshape(-1, N, d) for v in maps]),
        "on the way back the frames stayed behind the places": expected.transpose(0, 2, 3, 1, 4).reshape(
            (*x.shape[:4], d)
        ),
        "the softmax ran over i, not j": np.einsum(
            "bhwts,bshwd->bthwd", e / e.sum(-2, keepdims=True), maps[2]
        ),
    },
)

# %% [markdown]
# ## What you learned
#
# - `Dense` and a 1×1×1 `Conv3D` are one matrix at each position, stored as (in, out).
# - With channels last, a plain reshape gives the list of positions; with channels first, the transpose comes before it.
# - Keras' momentum is the share of the old statistics. After 100 steps with 0.99, inference still remembers the start.
# - Weights are made once, in `build`. A layer that makes its layers in `call` trains nothing. `count_params()` counts the running statistics too.
# - No weight depends on the size of the clip: a block trained on 4 frames counts votes in 16.
#
# ## Further reading
#
# - X. Wang, R. Girshick, A. Gupta, K. He: *Non-local Neural Networks*. CVPR 2018. Section 3.3 and figure 2 are this notebook; Table 2d has time only.
# - S. Ioffe, C. Szegedy: *Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift*. ICML 2015. Section 3.1: training and inference.
# - F. Chollet and others: *Making new layers and models via subclassing*. Keras developer guides, 2019, revised 2023.
