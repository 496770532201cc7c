# %% [markdown]
# # 08 · Self-attention: the block is one head
#
# After this notebook you can
#
# - translate the attention equation of the Transformer into the non-local equation, symbol by symbol
# - say what the division by $\sqrt d$ does to the weights, and move it in and out of $W_\theta$
# - give a block's weights to PyTorch's and Keras' own attention layers and get the same output
# - show that several heads are several blocks, added up
# - say what the block has that an attention layer does not have, and the reverse
#
# | | |
# |:--|:--|
# | What you need | notebook 05 (the block in PyTorch); the softmax; notebook 06 helps for one section |
# | Your time | 75 minutes |
# | Machine time | 15 seconds |
# | Framework | PyTorch, and Keras for one section |

# %% tags=["parameters"]
import os

profile = os.environ.get("NLUTILS_PROFILE", "quick")

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from torch.nn.functional import max_pool3d, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from nlutils import plots
from nlutils.course import check, difference, import_keras, settings
from nlutils.exchange import from_published, to_published
from nlutils.torch import NonLocalBlock, non_local

keras = import_keras(os.environ.get("KERAS_BACKEND", "tensorflow"))
torch.manual_seed(0)
np.set_printoptions(precision=3, suppress=True)
settings(profile)
plots.style()

# %% [markdown]
# ## 1 · Two equations
#
# In June 2017 Vaswani and others published the Transformer, in November Wang and others the non-local network. One is about sentences, the other about videos. The
# first has *queries* $q_i$, *keys* $k_j$ and *values* $v_j$, the rows of three matrices:
#
# $$\mathrm{Attention}(Q, K, V) = \mathrm{softmax}\!\left(\frac{Q K^T}{\sqrt{d}}\right) V$$


# %%
def attention(Q, K, V):
    d = Q.shape[1]
    logits = Q @ K.T / np.sqrt(d)
    weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return weights @ V


# %% [markdown]
# The second has the embedded Gaussian, which notebook 04 built. With equation 3 of the paper put into equation 1:
#
# $$y_i = \frac{\sum_j e^{\theta(x_i)^T \phi(x_j)}\, g(x_j)}{\sum_j e^{\theta(x_i)^T \phi(x_j)}}$$


# %%
def embedded_gaussian(theta, phi, g):
    y = np.zeros((len(theta), g.shape[1]))
    for i in range(len(theta)):
        f = [np.exp(theta[i] @ phi[j]) for j in range(len(phi))]
        for j in range(len(phi)):
            y[i] += f[j] * g[j] / sum(f)
    return y


# %% [markdown]
# An example to do by hand: notebook 04's ball, lamp and ground, and the ball again, with the features *red*, *bright*, *speed*. The matrices have whole numbers, and
# $d = 4$, so that $\sqrt d = 2$.

# %%
names = ["ball", "lamp", "ground", "ball"]
x = np.array([[1, 0, 1], [0, 2, 0], [0, 0, 0], [1, 0, 1]], dtype=np.float64)
W_theta = np.array([[2, 0, 0], [0, 1, 0], [0, 0, 2], [1, 1, 0]], dtype=np.float64)
W_phi = np.array([[1, 0, 0], [0, -1, 0], [0, 0, 1], [0, 1, 1]], dtype=np.float64)
W_g = np.array([[1, 0, 1], [0, 1, 0]], dtype=np.float64)
theta, phi, g = x @ W_theta.T, x @ W_phi.T, x @ W_g.T
assert theta.shape == phi.shape == (4, 4)
assert g.shape == (4, 2)

print("theta of the ball   ", theta[0])
print("phi of ball and lamp", phi[0], phi[1])
print("logits of the ball  ", theta[0] @ phi.T, "  by hand: ball with ball 2*1 + 2*1 + 1*1")
assert list(theta[0] @ phi.T) == [5, 2, 0, 5]

# %% [markdown] tags=["predict"]
# Read $Q$ as $\theta$, $K$ as $\phi$, $V$ as $g$. Are the two functions equal on these numbers? If not: by what must one multiply $\theta$ before it goes into `attention` to make
# them equal?

# %%
y = embedded_gaussian(theta, phi, g)
difference(attention(theta, phi, g), y, "Q = theta    ")
difference(attention(2 * theta, phi, g), y, "Q = 2 theta  ", below=1e-12)
print("weights of the ball on     ", "   ".join(names))
for name, divisor in (("as in the paper", 1), ("divided by 2", 2)):
    e = np.exp(theta[0] @ phi.T / divisor)
    print(f"{name:26}", e / e.sum())

# %% [markdown] tags=["explain"]
# They differ by one factor, $\sqrt d = 2$. It belongs to the logits, and a factor of the logits can be put into $\theta$:
#
# | Transformer | non-local block |
# |:--|:--|
# | token | position |
# | query $q_i = W^Q x_i$ | $\theta(x_i) = W_\theta x_i$ |
# | key $k_j = W^K x_j$ | $\phi(x_j) = W_\phi x_j$ |
# | value $v_j = W^V x_j$ | $g(x_j) = W_g x_j$ |
# | output matrix $W^O$ | $W_z$ |
# | softmax over the keys | division by $\mathcal C(x) = \sum_j f(x_i, x_j)$ |
# | $1 / \sqrt d$ | 1 in the paper; $1 / \sqrt d$ in its released code |
#
# Every row except the last is only a renaming.

# %% [markdown]
# ## 2 · What the root of d does
#
# $\theta_i \cdot \phi_j$ is a sum of $d$ products. If the entries of $\theta$ and $\phi$ are independent, with mean 0 and variance 1, so is each product, and variances add:
#
# $$\mathrm{Var}(\theta_i \cdot \phi_j) = d, \qquad \mathrm{Var}\!\left(\frac{\theta_i \cdot \phi_j}{\sqrt d}\right) = 1$$

# %%
rng = np.random.default_rng(0)
for d in (4, 64, 1024):
    logits = rng.standard_normal((400, d)) @ rng.standard_normal((d, 400))
    print(f"d = {d:4}: variance / d {logits.var() / d:.1f}, after the division {(logits / d**0.5).var():.1f}")
    assert abs(logits.var() / d - 1) < 0.1

# %% [markdown] tags=["predict"]
# In the paper's ResNet-50 the block behind res3 has $d = 256$, and with sub-sampling each position looks at $4 \cdot 14 \cdot 14 = 784$ others. Suppose that the entries of $\theta$ and $\phi$ are as above. 784 equal
# weights would be 0.0013 each. How large is the *largest* weight of a row, on average, without the division? And with it?
#
# Write $s_j$ for the logits of a row. Notebook 04 found $\partial w_j / \partial s_j = w_j (1 - w_j)$: how much a weight answers to its own logit. The cell adds this up over $j$.


# %%
def softmax(logits):
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


widths = (1, 4, 16, 64, 256, 1024)
largest, slope = {"plain": [], "scaled": []}, {"plain": [], "scaled": []}
for d in widths:
    logits = rng.standard_normal((400, d)) @ rng.standard_normal((d, 784))
    for name, factor in (("plain", 1), ("scaled", d**-0.5)):
        w = softmax(factor * logits)
        largest[name].append(w.max(axis=1).mean())
        slope[name].append((w * (1 - w)).sum(axis=1).mean())  # the sum of dw_j / ds_j over all j

at_256 = widths.index(256)
print(
    f"largest of 784 weights at d = 256: plain {largest['plain'][at_256]:.1f}, scaled {largest['scaled'][at_256]:.2f}"
)
print(
    f"sum of w_j (1 - w_j)             : plain {slope['plain'][at_256]:.1f}, scaled {slope['scaled'][at_256]:.1f}"
)
assert largest["plain"][at_256] > 0.8
assert largest["scaled"][at_256] < 0.03

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 3.2))
for ax, values, title in ((axes[0], largest, "largest weight"), (axes[1], slope, "sum of $w_j (1 - w_j)$")):
    ax.plot(widths, values["plain"], "o-", label="plain")
    ax.plot(widths, values["scaled"], "s--", label="scaled by $1/\\sqrt{d}$")
    ax.set(xscale="log", xlabel="width d", title=title, ylim=(0, 1.05))
axes[0].legend()
plots.show(
    fig,
    "Two plots against the width d from 1 to 1024. Left, the largest of 784 weights: plain rises from 0.03 to over 0.9, "
    "scaled stays near 0.02. Right, the sum of the derivatives: plain falls from almost 1 to about 0.1, scaled stays near 1.",
)

# %% [markdown] tags=["explain"]
# Without the division one of 784 positions takes more than four fifths, and which one is chance. Where one weight is near 1 and the others near
# 0, $w_j (1 - w_j)$ is small for all of them, and little gradient comes through to $\theta$ and $\phi$. With the division the picture does not depend on $d$.
#
# Then is the paper's formula hopeless? It depends on how large $\theta$ and $\phi$ are. The released code starts $W_\theta$ and $W_\phi$ with a standard deviation of 0.01, and divides. In notebook 05, with its few channels, 0.01 made
# every weight 1/72, with or without the division. At the width of res4 it does not:

# %%
C, d, N = 1024, 512, 196  # 4 x 7 x 7 positions after sub-sampling
res4 = np.random.default_rng(1)
x = np.maximum(res4.standard_normal((N, C)), 0)  # like features behind a ReLU,
x /= np.sqrt((x**2).mean())  # with a mean square of 1
theta, phi = (x @ (0.01 * res4.standard_normal((C, d))) for _ in range(2))
for name, factor, low, high in (("plain ", 1, 10, 100), ("scaled", d**-0.5, 1, 2)):
    times = softmax(factor * theta @ phi.T).max(axis=1).mean() * N
    print(f"{name}: the largest weight of a row is {times:.2g} times the mean weight")
    assert low < times < high

# %% [markdown]
# In a wide network the rule decides where a new block looks. (The paper names He's initialisation, here a standard deviation of $\sqrt{2 / 1024} \approx 0.044$, and no division.)
#
# The two rules can express the same functions: a block with the division equals one without it whose $W_\theta$ is divided by $\sqrt d$. But they learn differently.

# %%
B, C, T, H, W, d = 2, 8, 3, 4, 5, 4
N = T * H * W
clip = torch.tensor(rng.standard_normal((B, C, T, H, W)))


def random_block(seed, **options):
    """A block with random weights in place of its zeros; without its norm, unless asked for one."""
    block = NonLocalBlock(C, d, **{"norm": False, **options}).double()
    draw = torch.Generator().manual_seed(seed)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5, generator=draw)
    return block


scaled, plain = random_block(1, scale=True), random_block(1)
difference(plain(clip), scaled(clip), "same weights         ")
with torch.no_grad():
    plain.theta.weight /= d**0.5
    plain.theta.bias /= d**0.5
difference(plain(clip), scaled(clip), "W_theta divided by 2 ", below=1e-12)
for block in (scaled, plain):
    (block(clip) ** 2).mean().backward()
    torch.optim.SGD(block.parameters(), lr=0.1).step()
difference(plain(clip), scaled(clip), "after one step of SGD")

arrays = to_published(NonLocalBlock(C, d, subsample="before", scale=True), "slowfast")
try:
    from_published(NonLocalBlock(C, d, subsample="before"), arrays, "slowfast")
except ValueError as error:
    print("ValueError:", error)
else:
    raise AssertionError("weights for one rule went into a block of the other")

# %% [markdown]
# The first line is a warning. A file of weights does not say which rule its network used; the names and shapes are the same. So `nlutils.exchange.from_published` looks at the block's `scale` and refuses weights in
# SlowFast's format, whose code always divides, for a block that does not.
#
# ## 3 · PyTorch's own attention
#
# PyTorch has `scaled_dot_product_attention`. It divides by $\sqrt d$ unless it is told another `scale`.


# %%
def rows(maps):  # as in notebook 05
    """(B, C, T, H, W) -> (B, N, C)"""
    return maps.flatten(2).transpose(1, 2)


block = random_block(2)
with torch.no_grad():
    theta, phi, g = (rows(layer(clip)) for layer in (block.theta, block.phi, block.g))
assert theta.shape == phi.shape == g.shape == (B, N, d)

y = non_local(theta, phi, g, "embedded_gaussian")
difference(scaled_dot_product_attention(theta, phi, g, scale=1.0), y, "scale=1.0           ", below=1e-12)
y = non_local(theta, phi, g, "embedded_gaussian", scale=d**-0.5)
difference(scaled_dot_product_attention(theta, phi, g), y, "default, and d**-0.5", below=1e-12)

# %% [markdown]
# That was the sum alone. `nn.MultiheadAttention` has the matrices too. It keeps $W^Q$, $W^K$ and $W^V$ one below the other in `in_proj_weight`, of shape $(3C, C)$. Each of its `num_heads` heads
# owns $C /$ `num_heads` rows of each of the three. Our block has $d = 4 = C/2$, the paper's choice: so it fits into one head of a layer with *two* heads. The second head gets zeros.


# %%
def put(layer, head, block):
    """Write the block's weights into one head of nn.MultiheadAttention, which divides by the root of d."""
    own = slice(head * d, (head + 1) * d)
    with torch.no_grad():
        for part, (W, b) in enumerate(
            zip(layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3), strict=True)
        ):
            conv = (block.theta, block.phi, block.g)[part]
            factor = d**0.5 if part == 0 else 1.0  # takes the division back
            W[own] = factor * conv.weight.flatten(1)
            b[own] = factor * conv.bias
        layer.out_proj.weight[:, own] = block.w_z.weight.flatten(1)
        layer.out_proj.bias += block.w_z.bias


def empty_layer():
    layer = nn.MultiheadAttention(C, num_heads=2, batch_first=True).double()
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


layer = empty_layer()
assert layer.in_proj_weight.shape == (3 * C, C)
put(layer, 0, block)
r = rows(clip)
update, weights = layer(r, r, r, average_attn_weights=False)
assert (update.shape, weights.shape) == ((B, N, C), (B, 2, N, N))
z = clip + update.transpose(1, 2).unflatten(2, (T, H, W))
difference(z, block(clip), "x + MultiheadAttention and the block", below=1e-12)
expected = torch.softmax(theta @ phi.transpose(1, 2), dim=2)
difference(weights[:, 0], expected, "its map of head 0 and ours          ", below=1e-12)
equal = torch.full_like(expected, 1 / N)
difference(weights[:, 1], equal, "the map of the empty head and 1 / 60", below=1e-12)
pooled = NonLocalBlock(C, d, norm=False, subsample="before").double()
pooled.load_state_dict(block.state_dict())
keys = rows(max_pool3d(clip, (1, 2, 2)))
update, _ = layer(r, keys, keys)
difference(r + update, rows(pooled(clip)), "sub-sampled before its matrices     ", below=1e-12)

# %% [markdown]
# One line of the cell is easy to get wrong: the query, the key and the value are all `r`, the rows of one clip. That is the *self* in self-attention. With `subsample="before"` the block is still one head, but its keys and values come
# from the pooled clip. With `"after"` it is not one: $\phi$ and $g$ are pooled behind their matrices, where the layer has no place for a pool.
#
# ## 4 · Keras' own attention
#
# Keras' `MultiHeadAttention` takes the width of a head as an argument, so one head of width 4 is enough, and it attends over any axes: the clip can stay a clip $(B, T, H, W, C)$. Its
# matrices have the axes (in, head, width).

# %%
numbers = keras.ops.convert_to_numpy
layer_keras = keras.layers.MultiHeadAttention(1, key_dim=d, attention_axes=(1, 2, 3), dtype="float64")
channels_last = clip.movedim(1, -1).numpy()
layer_keras.build(channels_last.shape, channels_last.shape)
matrices = []
for name in ("theta", "phi", "g"):
    conv, factor = getattr(block, name), d**0.5 if name == "theta" else 1.0
    matrices.append(factor * conv.weight.detach().flatten(1).T.numpy().reshape(C, 1, d))
    matrices.append(factor * conv.bias.detach().numpy().reshape(1, d))
matrices.append(block.w_z.weight.detach().flatten(1).T.numpy().reshape(1, d, C))
matrices.append(block.w_z.bias.detach().numpy())
layer_keras.set_weights(matrices)

z_keras = channels_last + numbers(layer_keras(channels_last, channels_last))
assert z_keras.shape == (B, T, H, W, C)
close = 1e-12 if keras.backend.backend() == "tensorflow" else 1e-4  # other backends may round to float32
difference(z_keras, block(clip).movedim(1, -1), "Keras' layer and the block", below=close)

# %% [markdown] tags=["predict"]
# Three programs by three groups of people, and one function to the last digits. ($d = 4$ also has a use here: Keras keeps $1 / \sqrt d$ in float32, and 1/2 survives that.)
#
# ## 5 · Two heads
#
# The second head is still empty. We give it the weights of a second block. The Transformer's equation for several heads joins what the heads return, $y^{(1)}_i$ and $y^{(2)}_i$, and multiplies by $W^O$. What is the
# layer in terms of the two blocks: the mean of their updates $W_z y$, their sum, or one block after the other?

# %%
second = random_block(3)
put(layer, 1, second)
with torch.no_grad():
    update, _ = layer(r, r, r)
    update = update.transpose(1, 2).unflatten(2, (T, H, W))
    u, v = block(clip) - clip, second(clip) - clip
    difference(update, (u + v) / 2, "the mean of the updates")
    difference(update, u + v, "their sum              ", below=1e-12)
    difference(update, second(block(clip)) - clip, "one after the other    ")

# %% [markdown] tags=["explain"]
# Their sum, and it can be read off the product of a joined vector with a matrix cut in two:
#
# $$\begin{pmatrix} W_z^{(1)} & W_z^{(2)} \end{pmatrix} \begin{pmatrix} y^{(1)}_i \\ y^{(2)}_i \end{pmatrix} = W_z^{(1)} y^{(1)}_i + W_z^{(2)} y^{(2)}_i$$

# %%
y1, y2 = (
    non_local(*(rows(layer(clip)) for layer in (b.theta, b.phi, b.g)), "embedded_gaussian")
    for b in (block, second)
)
W1, W2 = (b.w_z.weight.flatten(1) for b in (block, second))
joined = torch.cat([y1, y2], dim=2) @ torch.cat([W1, W2], dim=1).T
difference(joined, y1 @ W1.T + y2 @ W2.T, "joined and cut", below=1e-12)


def count(channels, heads):
    return sum(p.numel() for p in nn.MultiheadAttention(channels, heads).parameters())


one_block = sum(p.numel() for p in NonLocalBlock(512, norm=False).parameters())
print("width 512: 1 head", count(512, 1), " 2 heads", count(512, 2), " 8 heads", count(512, 8))
print("one block", one_block, " two blocks", 2 * one_block)
assert count(512, 1) == count(512, 8) == 2 * one_block - 512  # two blocks have two biases of W_z

# %% [markdown]
# More heads cost no parameters, because each is narrower. They buy *maps*: with one softmax a position must average everything it wants to know with the same weights; two heads can look at two places and keep
# what they saw apart. The price is memory for several $N \times N$ maps, and the paper, whose $N$ are in the thousands, has one.
#
# ## 6 · Nobody has a place
#
# Notebook 04 found that equation 1 does not ask where $j$ is. So it must be with attention layers.

# %%
order = torch.randperm(N, generator=torch.Generator().manual_seed(0))


def shuffle(clip):
    return clip.flatten(2)[:, :, order].unflatten(2, clip.shape[2:])


def attend(clip):
    """x + the two-headed layer."""
    r = rows(clip)
    return clip + layer(r, r, r)[0].transpose(1, 2).unflatten(2, clip.shape[2:])


with torch.no_grad():
    difference(
        block(shuffle(clip)), shuffle(block(clip)), "block, positions shuffled before and after", below=1e-12
    )
    difference(
        attend(shuffle(clip)),
        shuffle(attend(clip)),
        "layer, positions shuffled before and after",
        below=1e-12,
    )

# %% [markdown]
# A sentence whose words may be shuffled is no sentence. The Transformer therefore adds to each token a *positional code* $p_i$, a fixed vector for its place: sines and cosines of $K = C / 2$ frequencies.
#
# $$p_i = \big(\sin \omega_0 i,\ \cos \omega_0 i,\ \dots,\ \sin \omega_{K-1} i,\ \cos \omega_{K-1} i\big), \qquad \omega_k = 10000^{-k / K}$$


# %%
def positional_code(N, C):
    angles = torch.arange(N)[:, None] * 10000.0 ** -(torch.arange(C // 2).double() / (C // 2))
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


p = positional_code(N, C)
assert p.shape == (N, C)
coded = clip + p.T.unflatten(1, (T, H, W))
with torch.no_grad():
    coded_shuffled = shuffle(clip) + p.T.unflatten(1, (T, H, W))  # the code stays, the vectors move
    difference(block(coded_shuffled), shuffle(block(coded)), "with a code, shuffled before and after")

# %% [markdown]
# What does the code change in the logits? Write $A = W_\theta^T W_\phi$ (biases left out). Each logit becomes four:
#
# $$(x_i + p_i)^T A\, (x_j + p_j) = x_i^T A x_j + x_i^T A p_j + p_i^T A x_j + p_i^T A p_j$$

# %%
A = block.theta.weight.detach().flatten(1).T @ block.phi.weight.detach().flatten(1)
X = rows(clip)[0]
terms = [a @ A @ b.T for a in (X, p) for b in (X, p)]
difference((X + p) @ A @ (X + p).T, sum(terms), "one logit and four terms", below=1e-12)

# %% [markdown] tags=["predict"]
# The last term is new: it compares places and does not look at the clip. Take the identity for $A$. (A *place* is an index in the flattened clip: the pixel below is 5 places away, the next frame 20.) Is $p_i \cdot p_j$ larger for neighbours or for far places? And does it know *where* the two are, or only how far apart?

# %%
places = p @ p.T
fig, ax = plt.subplots(figsize=(4.6, 3.8))
image = ax.imshow(places)
ax.set(xlabel="place j", ylabel="place i", title="$p_i \\cdot p_j$")
fig.colorbar(image)
plots.show(
    fig,
    "A 60 by 60 image. Every diagonal has one colour: the value 4 on the main diagonal, then stripes, bright again "
    "every six places, on a ground that is darkest some thirty places away and bright again towards the far corners.",
)
distance = torch.arange(N)[:, None] - torch.arange(N)[None, :]
omega = 10000.0 ** -(torch.arange(C // 2).double() / (C // 2))
difference(places, torch.cos(distance[..., None] * omega).sum(dim=2), "and the sum of cosines", below=1e-10)

# %% [markdown] tags=["explain"]
# Only the distance, since $\sin a \sin b + \cos a \cos b = \cos(a - b)$. The fastest cosine comes back after $2\pi$, about six places, so
# that six apart scores higher than one apart. And near places score higher only up to about half a turn of the second cosine ($2\pi / 0.1 \approx 63$ places). After that the score rises again: places 57 apart score as high as neighbours, because
# only four frequencies share the work here.
#
# $$p_i \cdot p_j = \sum_{k=0}^{K-1} \cos\big(\omega_k (i - j)\big)$$

# %%
i, j, steps = 10, 13, 40
by_hand = sum(np.cos(float(w) * (i - j)) for w in omega)
difference(places[i, j], by_hand, "places 10 and 13", below=1e-10)
difference(places[i, j], places[i + steps, j + steps], "places 10 and 13, 50 and 53", below=1e-10)
print("apart by 0, 1, 3, 6, 28, 57:", places[0, [0, 1, 3, 6, 28, 57]].numpy().round(2))
assert places[0, 6] > places[0, 1] > places[0, 3]
assert places[0, 57] > places[0, 1] > places[0, 28]
assert places[0].argmin() == 28

# %% [markdown]
# The non-local network has no code. Its order comes from the convolutions around the block, and it is enough that one of them looks along time:

# %%
conv = nn.Conv3d(C, C, kernel_size=(3, 1, 1), padding=(1, 0, 0)).double()
with torch.no_grad():
    backwards = clip.flip(2)
    difference(block(backwards), block(clip).flip(2), "block, film backwards             ", below=1e-12)
    difference(block(conv(backwards)), block(conv(clip)).flip(2), "convolution in time, then block")

# %% [markdown] tags=["predict"]
# ## 7 · What else differs
#
# | | non-local block | attention layer in a Transformer |
# |:--|:--|:--|
# | lives among | convolutions, which know the neighbourhood | layers that treat each token alone |
# | order | from the convolutions | from positional codes |
# | heads | one | several |
# | keys and values | may be max-pooled | all, or those that a mask allows |
# | other $f$ | dot product $/ N$, concatenation | not usual |
# | start | the identity: zero gain | a random update |
# | normalisation | of each channel, over all clips of the batch | of each token by itself |
#
# The last two rows can be seen in numbers. Two clips go through a new block, and through $x +$ a new attention layer. (1) How far is the output from $x$? (2) Then the block's gain is set to 1, and *clip 1* is replaced. Does the output for *clip 0* change? In
# training, in evaluation?

# %%
new_block, new_layer = NonLocalBlock(C, d).double(), nn.MultiheadAttention(C, 2, batch_first=True).double()
other = torch.cat([clip[:1], 3 * clip[1:]])  # clip 0 stays
with torch.no_grad():
    difference(new_block(clip), clip, "new block and x               ")
    r = rows(clip)
    difference(r + new_layer(r, r, r)[0], r, "x + new layer and x           ")
    nn.init.ones_(new_block.norm.weight)
    difference(new_block(clip)[0], new_block(other)[0], "clip 0 beside another, training  ")
    new_block.eval()
    difference(new_block(clip)[0], new_block(other)[0], "clip 0 beside another, evaluation", below=1e-12)
    layer_norm = nn.LayerNorm(C).double()
    difference(
        layer_norm(rows(clip))[0],
        layer_norm(rows(other))[0],
        "layer norm, training             ",
        below=1e-12,
    )

# %% [markdown] tags=["explain"]
# The block can be put into a trained network without harm; a new attention layer cannot. The batch normalisation takes its mean over the whole batch, so in training clips see each other through it; layer normalisation
# never mixes them. With one or two clips on a device this matters: the paper froze its normalisation for clips of 128 frames.
#
# ## 8 · Fused attention and its conditions
#
# A map of $N = 25{,}088$ positions, res2 of the paper's ResNet-50 for 32 frames, has 629 million entries: 2.3 GiB in float32. `scaled_dot_product_attention` has a *fused* form that never writes the map: it works through the keys in pieces
# (notebook 09 measures what that saves). PyTorch chooses a form by itself and does not say which. So we look: the next cell lists the sizes of all tensors that the call makes on its way.


# %%
class Steps(TorchDispatchMode):
    """Records the number of entries of every tensor that PyTorch's operations return inside `with`."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        parts = result if isinstance(result, tuple | list) else [result]
        self.sizes += [part.numel() for part in parts if isinstance(part, torch.Tensor)]
        return result


def makes_the_map(theta, phi, g):
    """Is there a tensor with N x M entries or more on the way?"""
    with Steps() as steps:
        scaled_dot_product_attention(theta, phi, g, scale=1.0)
    return max(steps.sizes) >= theta.shape[-2] * phi.shape[-2]


# %% [markdown] tags=["predict"]
# Four calls on the CPU, $N = 1024$, width 32. Which of them write the $1024 \times 1024$ map?
#
# 1. $\theta, \phi, g$ as $(B, N, d)$
# 2. the same with an axis for heads, $(B, 1, N, d)$
# 3. with that axis, but $g$ twice as wide, as in a block where $g$ has more channels than $\theta$
# 4. as 3, with $\theta$ and $\phi$ filled up with zeros to the width of $g$

# %%
n, width = 1024, 32
draw = torch.Generator().manual_seed(0)
theta, phi = (torch.randn(1, n, width, generator=draw) for _ in range(2))
g = torch.randn(1, n, width, generator=draw)
wide = torch.randn(1, n, 2 * width, generator=draw)
zeros = torch.zeros(1, n, width)
filled = [torch.cat([part, zeros], dim=2) for part in (theta, phi)]
calls = {
    "1. three axes             ": (theta, phi, g),
    "2. with an axis for heads ": (theta[:, None], phi[:, None], g[:, None]),
    "3. and g twice as wide    ": (theta[:, None], phi[:, None], wide[:, None]),
    "4. theta and phi filled up": (*(part[:, None] for part in filled), wide[:, None]),
}
found = {name: makes_the_map(*call) for name, call in calls.items()}
for name, answer in found.items():
    print(name, "writes the map:", answer)
assert list(found.values()) == [True, False, True, False]
y3, y4 = (scaled_dot_product_attention(*calls[name], scale=1.0) for name in list(calls)[2:])
difference(y3, y4, "outputs of 3 and 4", below=1e-4)

# %% [markdown] tags=["explain"]
# The result is the same in all cases; the memory is not, and there is no warning. On the CPU, the fused form of PyTorch 2.13 needs the axis for heads, and queries, keys and values of one width. The added zeros change no dot product, so 4 computes the same function, to rounding; but $\theta \phi^T$ multiplies
# twice as many numbers. The Gaussian instantiation, whose $\theta$ is $x$ itself, has unequal widths in every block of the paper. `nlutils.torch.non_local` therefore works through blocks of rows where the fused form does not fit.
#
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Take the division back (easy, 10 minutes)
#
# Write `plain(theta, phi, g)`: the embedded Gaussian *without* scale, by one call of `scaled_dot_product_attention` that is not given its argument `scale`. **Expect**: the same numbers as `non_local`, to rounding.
#
# <details><summary>Hint 1: a nudge</summary>Which of the three can you change so that only the logits change?</details>
# <details><summary>Hint 2: the formula</summary>The function computes softmax(QK^T / √d) V. You want θ φ^T in the softmax.</details>
# <details><summary>Hint 3: part of the code</summary><code>d = theta.shape[-1]</code>, then <code>scaled_dot_product_attention(theta * …, phi, g)</code></details>


# %% tags=["stub"]
def plain(theta, phi, g):
    #: solution
    return scaled_dot_product_attention(theta * theta.shape[-1] ** 0.5, phi, g)
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
with torch.no_grad():
    theta, phi, g = (rows(layer(clip)) for layer in (block.theta, block.phi, block.g))
triples = [(theta, phi, g), (theta[..., :2], phi[..., :2], g[..., :2])]


def fused(factor, parts):
    """The call at both widths, some of theta, phi and g times factor(d)."""
    results = []
    for triple in triples:
        f = factor(triple[0].shape[-1])
        triple = [f * part if name in parts else part for name, part in zip("tpg", triple, strict=True)]
        results.append(scaled_dot_product_attention(*triple))
    return tuple(results)


check(
    "Exercise 1",
    lambda: tuple(plain(*triple) for triple in triples),
    tuple(non_local(*triple, "embedded_gaussian") for triple in triples),
    mistakes={
        "the logits are still divided by the root of d": fused(np.sqrt, ""),
        "divided once more; you want to multiply": fused(lambda d: d**-0.5, "t"),
        "theta and phi both got the factor: it counts twice": fused(np.sqrt, "tp"),
        "g got the factor; it is not in the softmax": fused(np.sqrt, "g"),
        "2 is the root of one width, 4; read the width off theta": fused(lambda d: 2.0, "t"),
    },
)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Cut into heads (medium, 20 minutes)
#
# Attention layers compute all heads at once. Write `heads(theta, phi, g, count)`: the three are $(B, N, D)$ with $D =$ `count` $\cdot\, d$, head $h$ owns the channels $hd$ to $(h+1)d - 1$; return the joined $y$, $(B, N, D)$,
# with logits divided by $\sqrt d$, the width of one *head*. **Expect**: channels 0 to 3 are what the first block's head alone gives.
#
# <details><summary>Hint 1: a nudge</summary>Section 8 put an axis for heads between B and N. Where does that axis come from here?</details>
# <details><summary>Hint 2: the formula</summary>(B, N, D) → (B, N, count, d) → (B, count, N, d), and back at the end.</details>
# <details><summary>Hint 3: part of the code</summary><code>cut = lambda v: v.unflatten(2, (count, -1)).transpose(1, 2)</code></details>


# %% tags=["stub"]
def heads(theta, phi, g, count):
    #: solution
    theta, phi, g = (v.unflatten(2, (count, -1)).transpose(1, 2) for v in (theta, phi, g))
    y = scaled_dot_product_attention(theta, phi, g)
    return y.transpose(1, 2).flatten(2)
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
with torch.no_grad():
    wide = [
        torch.cat([rows(getattr(b, name)(clip)) for b in (block, second)], dim=2)
        for name in ("theta", "phi", "g")
    ]
    halves = [scaled_dot_product_attention(*(v[..., s] for v in wide)) for s in (slice(d), slice(d, 2 * d))]
    scrambled = scaled_dot_product_attention(*(v.reshape(B, 2, N, d) for v in wide))
    interleaved = scaled_dot_product_attention(*(v.unflatten(2, (d, 2)).permute(0, 3, 1, 2) for v in wide))
    one_scale = [
        scaled_dot_product_attention(*(v[..., s] for v in wide), scale=8**-0.5)
        for s in (slice(4), slice(4, 8))
    ]
check(
    "Exercise 2",
    lambda: heads(*wide, 2),
    torch.cat(halves, dim=2),
    mistakes={
        "one head of width D: nothing was cut": scaled_dot_product_attention(*wide),
        "a bare reshape to (B, count, N, d) mixes positions; cut the last axis, then transpose": scrambled.reshape(
            B, N, -1
        ),
        "the way back needs the transpose too": scaled_dot_product_attention(
            *(v.unflatten(2, (2, d)).transpose(1, 2) for v in wide)
        ).reshape(B, N, -1),
        "each head got every second channel; it owns d neighbouring ones": interleaved.permute(
            0, 2, 3, 1
        ).flatten(2),
        "the logits are divided by the root of D; each head has width d": torch.cat(one_scale, dim=2),
    },
)

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · No look ahead (medium, 20 minutes)
#
# A Transformer that predicts the next word may not see it: a *mask* allows only $j \le i$. Write the same for clips, `causal(theta, phi, g, T)`: the embedded Gaussian, not scaled, $(B, N, d)$ in and out, in which a position sees its own frame and
# all *earlier* frames. **Expect**: the outputs of the last frame are those without a mask, and a new last frame changes nothing in the others.
#
# <details><summary>Hint 1: a nudge</summary>What must a logit be for its weight to be exactly 0 and the row still to sum to 1?</details>
# <details><summary>Hint 2: the formula</summary>Position i is in frame i // (N / T). Allowed: frame of j ≤ frame of i. Elsewhere the logit is −∞.</details>
# <details><summary>Hint 3: part of the code</summary><code>frame = torch.arange(N) // (N // T)</code>, <code>allowed = frame[None, :] <= frame[:, None]</code>, <code>logits.masked_fill(~allowed, -torch.inf)</code></details>


# %% tags=["stub"]
def causal(theta, phi, g, T):
    #: solution
    N = theta.shape[1]
    frame = torch.arange(N) // (N // T)
    allowed = frame[None, :] <= frame[:, None]
    logits = (theta @ phi.transpose(1, 2)).masked_fill(~allowed, -torch.inf)
    return torch.softmax(logits, dim=2) @ g
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
logits = theta @ phi.transpose(1, 2)
frame = torch.arange(N) // (H * W)
allowed = frame[None, :] <= frame[:, None]
earlier_place = torch.ones(N, N, dtype=torch.bool).tril()
masked = logits.masked_fill(~allowed, -torch.inf)
check(
    "Exercise 3",
    lambda: causal(theta, phi, g, T),
    torch.softmax(masked, dim=2) @ g,
    mistakes={
        "nothing is masked": torch.softmax(logits, dim=2) @ g,
        "later frames were left out after the softmax; the rows do not sum to 1": (
            torch.softmax(logits, 2) * allowed
        )
        @ g,
        "their logits were set to 0, and exp(0) is 1: they still count": torch.softmax(
            logits * allowed, dim=2
        )
        @ g,
        "j <= i compares positions; inside a frame everybody may see everybody": torch.softmax(
            logits.masked_fill(~earlier_place, -torch.inf), dim=2
        )
        @ g,
        "the other way round: this sees the later frames": torch.softmax(
            logits.masked_fill(~allowed.T, -torch.inf), dim=2
        )
        @ g,
    },
)

# %% [markdown]
# ## What you learned
#
# - The embedded Gaussian is dot-product attention: $\theta, \phi, g, W_z$ are $W^Q, W^K, W^V, W^O$. PyTorch's and Keras' layers give the same numbers.
# - $1/\sqrt d$ keeps the logits at one size whatever $d$ is. It can be moved into $W_\theta$; weights trained with one rule are wrong under the other, and nothing in the file says so.
# - Several heads are several blocks whose updates are added.
# - Neither knows an order. Transformers add codes, non-local networks have convolutions.
# - Fused attention is a matter of shapes: with the wrong ones the map is written, silently.
#
# ## Further reading
#
# - A. Vaswani and others: *Attention Is All You Need*. NeurIPS 2017. Section 3.2 is this notebook's first equation.
# - X. Wang, R. Girshick, A. Gupta, K. He: *Non-local Neural Networks*. CVPR 2018. Section 3.2 names the relation to self-attention.
# - P. Shaw, J. Uszkoreit, A. Vaswani: *Self-Attention with Relative Position Representations*. NAACL 2018. Codes for the distance instead of the place.
# - T. Dao, D. Y. Fu, S. Ermon, A. Rudra, C. Ré: *FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness*. NeurIPS 2022. The fused form.
