# %% [markdown]
# # 03 · Dense CRF: every pixel asks every other for its label
#
# After this notebook you can
#
# - write the energy of a labelling, and compute exact probabilities for a small picture by enumeration
# - derive the mean field update from the Kullback-Leibler divergence, and check every step
# - compare mean field with the truth, and say where it is wrong and why
# - show in three ways that message passing is a non-local operation without $j = i$
# - tell what one iteration shares with a non-local block, and what it does not
#
# | | |
# |:--|:--|
# | What you need | notebook 02, sections 1 to 3; probabilities, partial derivatives |
# | Your time | 90 minutes |
# | Machine time | 20 seconds |
# | Framework | NumPy (PyTorch for one check) |

# %% tags=["parameters"]
import os

profile = os.environ.get("NLUTILS_PROFILE", "quick")

# %%
import matplotlib.pyplot as plt
import numpy as np
from scipy.special import xlogy

from nlutils import plots
from nlutils.course import check, difference, settings

run = settings(profile, quick=dict(draws=10), full=dict(draws=50))
plots.style()
np.set_printoptions(precision=3, suppress=True)

# %% [markdown]
# ## 1 · Nine pixels
#
# A picture of 3 x 3 pixels, dark at the top left, bright at the bottom right. Each pixel gets a label: 0, object, or 1, ground. A
# classifier that looks at single pixels has an opinion about each, and is wrong twice. Its opinions are *unary* energies: $\psi_i(l)$ is
# $-\log$ of the probability that it gives to $l$.

# %%
grey = np.array([[0.1, 0.2, 0.8], [0.1, 0.15, 0.9], [0.2, 0.8, 0.85]])
score = np.array([[-1.0, -0.5, 0.6], [0.4, -0.8, 1.0], [-0.3, 0.5, -0.4]])  # above 0: rather label 1
true = (grey > 0.5).astype(int)


def softmax(s):
    e = np.exp(s - s.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


N, L = 9, 2
psi = -np.log(softmax(np.stack([np.zeros(N), score.ravel()], axis=1)))
assert psi.shape == (N, L)
print("true labels            ", true.ravel())
print("the classifier's labels", psi.argmin(axis=1))
print("psi of pixel 3         ", psi[3])

# %% [markdown]
# Pixels also have opinions about each other. Two pixels that are near and alike should have one label. *How* near and alike is a number $k_{ij}$ for each
# pair, made from the positions $p_i$ and the colours $I_i$ (here one grey). There is a second term for position alone:
#
# $$
# k_{ij} = w_1 \exp\Big(-\frac{|p_i - p_j|^2}{2 \theta_\alpha^2} - \frac{|I_i - I_j|^2}{2 \theta_\beta^2}\Big)
# + w_2 \exp\Big(-\frac{|p_i - p_j|^2}{2 \theta_\gamma^2}\Big)
# $$
#
# This follows the dense CRF of Krähenbühl and Koltun (2011); notation and all numbers are ours.


# %%
def gaussian(x):
    """exp(-|x_i - x_j|^2 / 2) for all pairs; x is (N, d), each column already divided by its width."""
    squares = np.sum(x**2, axis=1)
    return np.exp(-np.maximum(squares[:, None] + squares - 2 * x @ x.T, 0) / 2)


def kernel(place, colour, w1, alpha, beta, w2, gamma):
    k = w1 * gaussian(np.hstack([place / alpha, colour / beta])) + w2 * gaussian(place / gamma)
    np.fill_diagonal(k, 0)  # no pixel has an opinion about itself
    return k


place = np.array([(r, c) for r in range(3) for c in range(3)], dtype=np.float64)
colour = grey.reshape(N, 1)
K = kernel(place, colour, w1=0.6, alpha=2, beta=0.2, w2=0.1, gamma=1)
assert K.shape == (N, N)
print("pixel 3 to all others:", K[3])
by_hand = 0.6 * np.exp(-1 / 8 - 0) + 0.1 * np.exp(-1 / 2)  # pixel 0: one row up, the same grey
assert np.isclose(K[3, 0], by_hand)

# %% [markdown]
# The energy of a labelling $x$ adds up the unary energies and, for each *pair*, $k_{ij}$ times $\mu(x_i, x_j)$, the cost of the two labels together. With the *Potts*
# cost, $\mu = 1$ for different labels and 0 for equal ones:
#
# $$E(x) = \sum_i \psi_i(x_i) + \sum_{i < j} k_{ij}\, \mu(x_i, x_j), \qquad \mu(l, l') = [l \neq l']$$


# %%
def energy(x):
    total = 0.0
    for i in range(N):
        total += psi[i, x[i]]
        for j in range(i + 1, N):
            if x[i] != x[j]:
                total += K[i, j]
    return total


print(
    f"energy of the classifier's labels {energy(psi.argmin(axis=1)):.2f}, of the true ones {energy(true.ravel()):.2f}"
)
assert energy(true.ravel()) < energy(psi.argmin(axis=1))

# %% [markdown]
# ## 2 · The truth, by enumeration
#
# A *conditional random field* (CRF) reads the energy as a probability, low energy being likely. It is *dense* because all pairs have a $k_{ij}$. Nine pixels have $2^9 = 512$ labellings; we can
# visit them all:
#
# $$P(x) = \frac{e^{-E(x)}}{Z}, \qquad Z = \sum_x e^{-E(x)}, \qquad P_i(l) = \sum_{x:\, x_i = l} P(x)$$
#
# $P_i(l)$ is the *marginal*: how likely is label $l$ at pixel $i$, whatever the others have?

# %%
labellings = np.array(list(np.ndindex(*[L] * N)))
assert labellings.shape == (512, N)
energies = np.array([energy(x) for x in labellings])
Z = np.exp(-energies).sum()
P = np.exp(-energies) / Z
exact = np.stack([P[labellings[:, i] == 1].sum() for i in range(N)])

print("most likely labelling", labellings[P.argmax()], f"with probability {P.max():.2f}")
print("P_i(1), exactly      ", exact)
assert np.array_equal(labellings[P.argmax()], true.ravel())
assert np.array_equal((exact > 0.5).astype(int), true.ravel())

# %% [markdown]
# Both wrong pixels are outvoted. But 40 x 60 pixels with three labels, as below, have $3^{2400}$ labellings.
#
# ## 3 · Mean field, derived
#
# Replace $P$ by the best $Q$ among those in which all pixels are independent, $Q(x) = \prod_i Q_i(x_i)$. *Best* means the smallest Kullback-Leibler divergence,
# which is never negative, and 0 only for $Q = P$. Put $\log P = -E - \log Z$ into it:
#
# $$
# \mathrm{KL}(Q \,\|\, P) = \sum_x Q(x) \log \frac{Q(x)}{P(x)}
# = \underbrace{\sum_x Q(x) \log Q(x) + \sum_x Q(x)\, E(x)}_{F(Q)\text{, the free energy}} + \log Z
# $$
#
# $\log Z$ does not depend on $Q$, so we minimise $F$. Here with any $Q$, all 512 terms:

# %%
rng = np.random.default_rng(0)
Q = softmax(rng.normal(size=(N, L)))
Q_x = np.prod(Q[np.arange(N), labellings], axis=1)  # Q(x) for each of the 512 labellings
assert np.isclose(Q_x.sum(), 1)

F_enumerated = np.sum(Q_x * np.log(Q_x)) + np.sum(Q_x * energies)
KL = np.sum(Q_x * np.log(Q_x / P))
difference(F_enumerated + np.log(Z), KL, "F + log Z, and KL", below=1e-12)
assert KL > 0

# %% [markdown]
# **Step 1: no sum over labellings.** For independent pixels, the expectation of $\psi_i(x_i)$ needs only $Q_i$, that of a pair only $Q_i$ and $Q_j$, and $\log Q(x)$ is a sum over pixels:
#
# $$
# F(Q) = \sum_i \sum_l Q_i(l) \log Q_i(l) + \sum_i \sum_l Q_i(l)\, \psi_i(l)
# + \sum_{i<j} k_{ij} \sum_{l, l'} Q_i(l)\, \mu(l, l')\, Q_j(l')
# $$


# %%
def free_energy(Q, psi, K):
    """Potts cost; K is symmetric, so half of all ordered pairs are the pairs i < j.

    With a diagonal, each pixel also pays k_ii / 2 times 1 - sum_l Q_i(l)^2: section 6's F with a bar.
    """
    agree = Q @ Q.T  # probability that i and j have one label
    return np.sum(xlogy(Q, Q)) + np.sum(Q * psi) + 0.5 * np.sum(K * (1 - agree))


difference(free_energy(Q, psi, K), F_enumerated, "F from 9 pixels, and from 512 labellings", below=1e-12)

# %% [markdown]
# **Step 2: the slope.** $Q_i(l)$ stands in three places; in the pairs, once with each $j \neq i$ ($\mu$ is symmetric):
#
# $$\frac{\partial F}{\partial Q_i(l)} = \log Q_i(l) + 1 + \psi_i(l) + \sum_{j \neq i} k_{ij} \sum_{l'} \mu(l, l')\, Q_j(l')$$

# %%
mu = 1 - np.eye(L)
slope = np.log(Q) + 1 + psi + K @ Q @ mu.T

measured = np.zeros((N, L))
for index in np.ndindex(N, L):
    step = np.zeros((N, L))
    step[index] = 1e-5
    # 1 - agree assumes that each Q_i adds up to 1; write the pairs with mu, so that a single entry may move
    F = [
        np.sum(xlogy(R, R)) + np.sum(R * psi) + 0.5 * np.sum(K * (R @ mu @ R.T)) for R in (Q + step, Q - step)
    ]
    measured[index] = (F[0] - F[1]) / 2e-5
difference(slope, measured, "slope, derived and measured", below=1e-8)

# %% [markdown]
# **Step 3: the update.** Hold all pixels but $i$. $Q_i$ must add up to 1, so at the minimum the slope need not be 0, but must be the same number $\lambda$ for all labels $l$ (a Lagrange
# multiplier: moving probability from one label to another then gains nothing). Solve for $\log Q_i(l)$ and take the exponential; $\lambda$ and 1 become the factor that makes the sum 1:
#
# $$Q_i(l) \propto \exp\Big(-\psi_i(l) - \sum_{j \neq i} k_{ij} \sum_{l'} \mu(l, l')\, Q_j(l')\Big)$$
#
# For Potts, $\sum_{l'} \mu(l, l')\, Q_j(l') = 1 - Q_j(l)$, and $\sum_j k_{ij}$ is the same for all $l$: it drops out. What is left is a softmax over *labels* of $-\psi_i(l) + \sum_{j \neq i} k_{ij}\, Q_j(l)$.


# %%
def update(i, Q, psi, K):
    return softmax(-psi[i] + K[i] @ Q)


i = 3
full = softmax(-psi[i] - K[i] @ Q @ mu.T)
difference(update(i, Q, psi, K), full, "short form for Potts, and the full one", below=1e-12)

after = Q.copy()
after[i] = update(i, Q, psi, K)
slope = np.log(after) + 1 + psi + K @ after @ mu.T
assert np.isclose(slope[i, 0], slope[i, 1])  # lambda
gain = free_energy(Q, psi, K) - free_energy(after, psi, K)
tried = [free_energy(np.vstack([Q[:i], [[1 - q, q]], Q[i + 1 :]]), psi, K) for q in np.linspace(0, 1, 1001)]
assert free_energy(after, psi, K) <= min(tried)
difference(
    gain, np.sum(Q[i] * np.log(Q[i] / after[i])), "what F lost, and KL(old Q_i || new Q_i)", below=1e-12
)

# %% [markdown]
# The last line is worth a proof. As a function of $Q_i$ alone, $F = \sum_l Q_i(l) \log Q_i(l) - \sum_l Q_i(l)\, a(l) + \text{const}$ with $a$ the exponent of the update; put $a(l) = \log Q_i^\text{new}(l) +
# \text{const}$ in, and $F = \mathrm{KL}(Q_i \| Q_i^\text{new}) + \text{const}$. So an update of *one* pixel never raises $F$, and lowers it by a number that we can name.
# A *sweep* updates all pixels in turn.


# %%
def sweep(Q, psi, K, order):
    """Update pixel after pixel, each with the newest of the others; also return what F must have lost."""
    Q, lost = Q.copy(), 0.0
    for i in order:
        new = update(i, Q, psi, K)
        lost += np.sum(xlogy(Q[i], Q[i]) - Q[i] * np.log(new))
        Q[i] = new
    return Q, lost


Q = softmax(-psi)  # where we begin: the classifier's opinion
for n in range(6):
    print(f"after {n} sweeps: F = {free_energy(Q, psi, K):.4f}   Q_i(1) = {Q[:, 1]}")
    before = free_energy(Q, psi, K)
    Q, lost = sweep(Q, psi, K, range(N))
    assert np.isclose(before - free_energy(Q, psi, K), lost)
    assert lost >= 0
print(f"-log Z, which no F can go below: {-np.log(Z):.4f}")
assert free_energy(Q, psi, K) > -np.log(Z)

# %% [markdown] tags=["predict"]
# ## 4 · Mean field and the truth
#
# All labels are right. Are the *probabilities*? Write down first: will mean field be more sure than the exact marginals, or less?
#
# And an extreme case: the classifier says nothing, $\psi = 0$, and all greys are equal. Swapping the labels 0 and 1 changes nothing, so the exact marginals are 0.5, however strong the $k_{ij}$. What does
# mean field find when it starts at 0.51?

# %%
print("exact     ", exact)
print("mean field", Q[:, 1])
surer = np.abs(Q[:, 1] - 0.5) > np.abs(exact - 0.5)
print(f"surer than the truth at {surer.sum()} of 9 pixels, by up to {np.abs(Q[:, 1] - exact).max():.2f}")
assert np.array_equal(Q.argmax(axis=1), true.ravel())
assert surer.sum() >= 8

nothing, alike = np.zeros((N, L)), np.full((N, 1), 0.5)
found = {}
print("\nstrength  exact P_0(1)  mean field Q_0(1)   largest eigenvalue of K")
for strength in (0.1, 0.2, 0.3, 0.4, 0.6):
    K_alike = kernel(place, alike, w1=strength, alpha=2, beta=0.2, w2=0, gamma=1)
    costs = [np.sum(np.triu(K_alike)[x[:, None] != x]) for x in labellings]
    weights = np.exp(-np.array(costs))
    P_0 = weights[labellings[:, 0] == 1].sum() / weights.sum()
    R = np.tile([0.49, 0.51], (N, 1))
    for _ in range(200):
        R, _ = sweep(R, nothing, K_alike, range(N))
    largest = np.linalg.eigvalsh(K_alike)[-1]
    found[strength] = largest, R[0, 1]
    print(f"{strength:8.1f}  {P_0:12.2f}  {R[0, 1]:17.2f}   {largest:.2f}")
    assert np.isclose(P_0, 0.5)
assert all((q > 0.55) == (largest > 2) for largest, q in found.values())

# %% [markdown] tags=["explain"]
# Mean field is too sure. In the truth, neighbours hold an opinion *together*, and may change it together; independent pixels cannot, so each takes the others' opinion as a fact from outside, which
# came in part from itself.
#
# In the extreme case it breaks the symmetry: it picks one of two equally good answers, with up to 95 % certainty. Near $Q_i = 0.5 + m_i$ the update is $m \to \frac12 K m$ (the two labels' logits differ by $2 K m$, and
# the softmax of two labels has the slope $\frac14$ there), so a small tilt grows as soon as the largest eigenvalue of $K$ passes 2. Read the outputs of a dense CRF as labels, not as probabilities.

# %% [markdown]
# ## 5 · The message is a non-local operation
#
# The sum of the update, for all labels at once, is a vector, the *message* that pixel $i$ receives:
#
# $$y_i = \frac{1}{C} \sum_{j \neq i} f(x_i, x_j)\, g_j, \qquad f = k_{ij}, \quad g_j = Q_j, \quad C = 1$$
#
# The features $x_i$ are position and colour, each divided by its width. Two things are unusual: no division, and no $j = i$. The second can be written in two ways:
# a map whose diagonal is 0, or the sum over *all* $j$, minus the own term. The own term is simple, because $k_{ii} = w_1 + w_2$ for every pixel.

# %%
y_loops = np.zeros((N, L))
for i in range(N):
    for j in range(N):
        if j != i:
            y_loops[i] += K[i, j] * Q[j]

x1, x2 = np.hstack([place / 2, colour / 0.2]), place / 1
all_pairs = 0.6 * gaussian(x1) + 0.1 * gaussian(x2)
assert np.allclose(np.diag(all_pairs), 0.6 + 0.1)
difference(y_loops, K @ Q, "loops over j != i, and a zero diagonal", below=1e-12)
difference(
    y_loops, all_pairs @ Q - (0.6 + 0.1) * Q, "loops over j != i, and all minus the own term", below=1e-12
)

# %% [markdown]
# Notebook 02 wrote a squared distance as a dot product of longer vectors. The same here turns $f$ into $e^{\theta_i \cdot \phi_j}$, the embedded Gaussian. The library divides by $C_i = \sum_j f$; we
# multiply it back:
#
# $$\theta_i = \big(x_i,\; -\tfrac12 |x_i|^2,\; 1\big), \quad \phi_j = \big(x_j,\; 1,\; -\tfrac12 |x_j|^2\big), \quad \theta_i \cdot \phi_j = -\tfrac12 |x_i - x_j|^2$$

# %%
import torch

import nlutils.torch


def embed(x):
    half, one = -0.5 * np.sum(x**2, axis=1, keepdims=True), np.ones((len(x), 1))
    return np.hstack([x, half, one]), np.hstack([x, one, half])


def message(x, Q):
    """Sum over all j of exp(-|x_i - x_j|^2 / 2) Q_j, from the library's embedded Gaussian."""
    theta, phi = embed(x)
    operands = [torch.tensor(a[None]) for a in (theta, phi, Q)]
    divided = nlutils.torch.non_local(*operands, "embedded_gaussian")[0].numpy()
    C = np.exp(theta @ phi.T).sum(axis=1, keepdims=True)
    return C * divided


y_library = 0.6 * message(x1, Q) + 0.1 * message(x2, Q) - (0.6 + 0.1) * Q
difference(y_loops, y_library, "loops, and two embedded Gaussians of nlutils.torch", below=1e-12)

# %% [markdown] tags=["predict"]
# ## 6 · All at once
#
# A non-local operation computes all $y_i$ from one old $Q$: *parallel* updates, which are a matrix product and thus fast. The proof of section 3 was about one pixel at a time.
#
# Two pixels, no unaries, $k_{01} = 4$. Pixel 0 is for label 0 with 0.9, pixel 1 for label 1 with 0.9. They want to agree. What do parallel updates do?


# %%
def parallel(Q, psi, K):
    return softmax(-psi + K @ Q)


def report(name, step, Q, times=5):
    trace = [free_energy(Q, psi_2, K_2)]
    for _ in range(times):
        Q = step(Q)
        trace.append(free_energy(Q, psi_2, K_2))
    print(f"{name:20} F: {np.array(trace)}   Q(0) in the end: {Q[:, 0]}")
    return np.array(trace), Q


start, psi_2, K_2 = np.array([[0.9, 0.1], [0.1, 0.9]]), np.zeros((2, 2)), np.array([[0.0, 4.0], [4.0, 0.0]])
up, Q_up = report("parallel", lambda Q: parallel(Q, psi_2, K_2), start)
down, Q_down = report("one after the other", lambda Q: sweep(Q, psi_2, K_2, range(2))[0], start)
own, Q_own = report("parallel, with j = i", lambda Q: parallel(Q, psi_2, K_2 + 4 * np.eye(2)), start)
assert up[1] > up[0]
assert (Q_up.argmax(axis=1) == [1, 0]).all()
assert np.allclose(parallel(Q_up, psi_2, K_2), Q_up[::-1], atol=0.01)  # they swap, for ever
assert (np.diff(down) <= 1e-12).all()
assert np.allclose(Q_down[0], Q_down[1], atol=0.01)

# %% [markdown] tags=["explain"]
# In parallel, each takes over the *old* opinion of the other: they swap, for ever, and $F$ goes up. One after the other, pixel 0 gives in and all is well.
#
# The last line keeps $j = i$ in the sum, and the swapping stops, at a tie, as the start was symmetric. Let $\bar K$ be the kernel *with* its diagonal, and $\bar F$ the free energy with it. A Gaussian kernel
# is positive semidefinite, so $(Q - R)^\top \bar K (Q - R) \ge 0$ for each label's column, for any $R$. Written out, with $R$ the old $Q$:
#
# $$-\tfrac12 Q^\top \bar K Q \;\le\; -Q^\top \bar K R + \tfrac12 R^\top \bar K R$$
#
# The right side is linear in $Q$, equal to the left at $Q = R$, and the parallel update minimises $\bar F$ with the left side replaced by the right. So $\bar F$ cannot rise. Without the diagonal, $K$ has trace 0, hence
# negative eigenvalues, and the argument is gone. The price of the diagonal: $\bar F$ is not the $F$ that belongs to $P$.


# %%
def with_diagonal(K, own):
    return K + own * np.eye(len(K))


bar = with_diagonal(K, 0.7)
print(
    f"smallest eigenvalue: with the diagonal {np.linalg.eigvalsh(bar)[0]:.2f}, without {np.linalg.eigvalsh(K)[0]:.2f}"
)
assert np.linalg.eigvalsh(bar)[0] > -1e-12
assert np.linalg.eigvalsh(K)[0] < 0

rises = 0
for _ in range(200):
    R = softmax(4 * rng.normal(size=(N, L)))
    new = parallel(R, psi, 5 * bar)
    left, right = -0.5 * np.sum(new * (bar @ new)), -np.sum(new * (bar @ R)) + 0.5 * np.sum(R * (bar @ R))
    assert left <= right + 1e-12
    rises += free_energy(new, psi, 5 * bar) > free_energy(R, psi, 5 * bar) + 1e-9
print(f"parallel updates with j = i, 200 random starts: F with the diagonal rose {rises} times")
assert rises == 0

# %% [markdown]
# ## 7 · A photograph
#
# `coffee` comes with scikit-image (by Rachel Michetti, CC0). We shrink it to 40 x 60, so that the exact map of $2400^2$ entries fits. Three labels: table, red china, inside of the cup. The
# "true" labels are two ellipses that we drew by eye, so the spoon's handle, for one, counts as table.
#
# The classifier is made up as well: it gives *one* answer for each cell of 5 x 5 pixels, as networks with strides do, from the true shares of the labels in that cell plus noise.

# %%
from skimage import data
from skimage.transform import downscale_local_mean

photo = downscale_local_mean(data.coffee() / 255, (10, 10, 1))
H, W, _ = photo.shape
N, L = H * W, 3
y, x = np.mgrid[:400, :600]
large = ((x - 278) / 201) ** 2 + ((y - 229) / 161) ** 2 < 1
cup = ((x - 290) / 117) ** 2 + ((y - 112) / 95) ** 2 < 1
label = np.where(cup, 2, np.where(large, 1, 0))
shares = downscale_local_mean(np.eye(L)[label], (10, 10, 1))
true = shares.argmax(axis=2)
assert photo.shape == (40, 60, 3)
print("pixels of each label:", np.bincount(true.ravel()))


def classifier(draw, cell=5):
    """psi (N, L): energies of a classifier that sees cells of 5 x 5 pixels, through noise."""
    share = np.eye(L)[true].reshape(H // cell, cell, W // cell, cell, L).mean(axis=(1, 3))
    noisy = 2 * share + 0.8 * np.random.default_rng(draw).standard_normal(share.shape)
    pixels = noisy.repeat(cell, axis=0).repeat(cell, axis=1).reshape(N, L)
    return -np.log(softmax(2 * pixels))


def accuracy(Q):
    return np.mean(Q.argmax(axis=1) == true.ravel())


place = np.array([(r, c) for r in range(H) for c in range(W)], dtype=np.float64)
colour = photo.reshape(N, 3)
widths = dict(alpha=4, beta=0.15, gamma=1)
K = kernel(place, colour, w1=1, w2=0.3, **widths)
assert K.shape == (N, N)
print(
    f"map of {N} x {N} numbers, {K.nbytes / 2**20:.0f} MiB; sum of a row {K.sum(axis=1).mean():.0f} on average"
)

# %% [markdown]
# What does a pixel see? One row of the map, for a pixel of the saucer beside the cup, with the colour term and for a kernel of position alone:

# %%
i = 15 * W + 16
near = kernel(place, colour, w1=0, w2=0.3, alpha=4, beta=0.15, gamma=4)
fig, axes = plt.subplots(1, 3, figsize=(9, 2.5))
axes[0].imshow(photo)
axes[0].set_title("the pixel that looks")
for ax, k, title in zip(
    axes[1:], (K, near), ("k by position and colour", "k by position alone"), strict=True
):
    image = ax.imshow(k[i].reshape(H, W) / k[i].max(), vmin=0, vmax=1)
    ax.set_title(title)
fig.colorbar(image, ax=axes[1:], label="share of the largest")
for ax in axes:
    ax.plot(i % W, i // W, "+", color=plots.COLOURS["sky"], markersize=12, markeredgewidth=2)
    ax.set_axis_off()
plots.show(
    fig,
    "A cup on a saucer, and a cross on the saucer to the left of the cup. With position and colour, the cross is "
    "tied to the saucer around it, and the weights break off at the cup's white rim. With position alone they form "
    "a round blob that reaches over the rim into the cup.",
)

# %% [markdown]
# Five parallel updates; the settings of `K` were chosen on other draws of the noise (0 to 5). Two controls know nothing of colour, and get, draw by draw, the best of a list of settings for the *true*
# labels: unary energies blurred by a Gaussian, and a CRF with $w_1 = 0$. Pixels near a border, at most two from another label, are also counted apart.

# %%
from scipy.ndimage import gaussian_filter, maximum_filter, minimum_filter

border = (maximum_filter(true, 5) != minimum_filter(true, 5)).ravel()


def crf(psi, K, times=5):
    Q = softmax(-psi)
    for _ in range(times):
        Q = parallel(Q, psi, K)
    return Q


def blurred(psi, width):
    return softmax(-gaussian_filter(psi.reshape(H, W, L), (width, width, 0)).reshape(N, L))


position_kernels = [
    kernel(place, colour, w1=0, w2=w2, alpha=1, beta=1, gamma=gamma)
    for w2, gamma in ((0.3, 2), (1, 2), (0.1, 3), (0.3, 3), (0.1, 4), (0.03, 5), (0.1, 5))
]
scores = []
for draw in range(100, 100 + run.draws):
    psi = classifier(draw)
    blurs = [blurred(psi, width) for width in (1.5, 2, 2.5, 3, 4, 5)]
    positions = [crf(psi, k) for k in position_kernels]
    results = softmax(-psi), max(blurs, key=accuracy), max(positions, key=accuracy), crf(psi, K)
    right = [Q.argmax(axis=1) == true.ravel() for Q in results]
    scores.append([(r.mean(), r[border].mean()) for r in right])

# %%
scores = np.array(scores)
assert scores.shape == (run.draws, 4, 2)
print(f"mean of {run.draws} draws        all pixels   near a border ({border.mean():.0%})")
names = ("classifier", "blurred", "CRF, position alone", "CRF")
for name, (everywhere, near) in zip(names, scores.mean(axis=0), strict=True):
    print(f"{name:20} {everywhere:12.1%} {near:14.1%}")
ahead = scores[:, 3] - scores[:, :3].max(axis=1)
print(f"draws on which the CRF beats all three: {np.sum(ahead > 0, axis=0)}; mean lead {ahead.mean(axis=0)}")
assert (ahead.mean(axis=0) > (0.01, 0.03)).all()
assert (np.mean(ahead > 0, axis=0) > 0.8).all()

# %%
fig, axes = plt.subplots(2, 3, figsize=(9, 4.4))
shown = {"true labels": np.eye(L)[true.ravel()], **dict(zip(names, results, strict=True))}
axes[0, 0].imshow(photo)
axes[0, 0].set_title("photograph")
tints = np.array([[0.90, 0.62, 0.0], [0.84, 0.37, 0.0], [0.34, 0.71, 0.91]])
for ax, (name, Q) in zip(axes.flat[1:], shown.items(), strict=True):
    ax.imshow(tints[Q.argmax(axis=1)].reshape(H, W, 3), interpolation="nearest")
    ax.set_title(name if name == "true labels" else f"{name}, {accuracy(Q):.1%}", fontsize=10)
for ax in axes.flat:
    ax.set_axis_off()
plots.show(
    fig,
    "The photograph, the true labels, and four results of the last draw as label maps. The classifier's map is made "
    "of squares, some of them wrong. Blurred, its borders are wavy; by position alone, they keep steps. The CRF's cup is round "
    "and its saucer has a smooth outline on the right; a bulge at the lower edge and specks at the cup's rim remain.",
)

# %% [markdown] tags=["predict"]
# ## 8 · Lower energy, better labels?
#
# The free energy after each sweep of sequential updates, in reading order and in a random order, and after parallel updates. Section 3 proves that the sequential ones
# cannot rise. Of five draws that we looked at, this is the one with the largest differences. Will the run that ends lowest have the most correct labels? And is the energy of the true labels lower
# than that of the labels found?

# %%
psi = classifier(104)
order = np.random.default_rng(1).permutation(N)
ends = {}
for name in ("in reading order", "in random order", "parallel"):
    Q = softmax(-psi)
    trace = [free_energy(Q, psi, K)]
    for _ in range(6):
        if name == "parallel":
            Q = parallel(Q, psi, K)
        else:
            Q, lost = sweep(Q, psi, K, range(N) if name == "in reading order" else order)
            assert lost >= 0
            assert np.isclose(trace[-1] - lost, free_energy(Q, psi, K))
        trace.append(free_energy(Q, psi, K))
    ends[name] = trace[-1], accuracy(Q)
    print(f"{name:17} F {np.rint(trace).astype(int)}  accuracy {accuracy(Q):.1%}")

hard = np.eye(L)[true.ravel()], np.eye(L)[Q.argmax(axis=1)]
unaries = [np.sum(R * psi) for R in hard]
E_true, E_found = (free_energy(R, psi, K) for R in hard)  # for certain labels, F is the energy
for name, E, unary in zip(("true labels", "labels found"), (E_true, E_found), unaries, strict=True):
    print(f"{name:12} energy {E:.0f}: unaries {unary:.0f}, pairs {E - unary:.0f}")
lowest, best = min(ends, key=lambda name: ends[name][0]), max(ends, key=lambda name: ends[name][1])
assert lowest == "in reading order" != best
assert E_true > E_found + 100
assert unaries[0] > unaries[1]
assert E_true - unaries[0] > E_found - unaries[1]

# %% [markdown] tags=["explain"]
# No, and no. In reading order the first rows decide before the last are asked; here that ends in a lower valley of $F$, with almost five points fewer correct labels. And the true labels have a
# *higher* energy than those found, in their unaries and in their pairs: the classifier errs in whole squares, and across the true border there are pairs of like colour. To minimise a wrong
# energy better does not help; that is one reason to learn the features.
#
# In parallel $F$ fell, too. Nothing in section 6 promises it without the diagonal, and nothing forbids it.

# %% [markdown]
# ## 9 · One iteration, written as a block
#
# Now as in a network: two embedded Gaussians with $\theta$ and $\phi$ from position and colour, $g = Q$, a sum with weights, an input that is added, and a softmax:
#
# $$Q_i^\text{new} = \underset{l}{\mathrm{softmax}}\Big(-\psi_i + \sum_{m=1}^{2} w_m \Big(\sum_{j} e^{\theta_i^{(m)} \cdot\, \phi_j^{(m)}} Q_j - Q_i\Big)\Big)$$


# %%
def crf_block(Q, psi, features, w):
    z = -psi
    for x, w_m in zip(features, w, strict=True):
        z = z + w_m * (message(x, Q) - Q)
    return softmax(z)


features = np.hstack([place / 4, colour / 0.15]), place / 1
Q = softmax(-psi)
Q_block = crf_block(Q, psi, features, w=(1, 0.3))
assert Q_block.shape == (N, L)
difference(Q_block, parallel(Q, psi, K), "the block, and the parallel update", below=1e-8)

# %% [markdown]
# | | dense CRF, one iteration | non-local block |
# |:--|:--|:--|
# | $f$ | $e^{\theta_i \cdot \phi_j}$, position and colour | the same, or three others |
# | features | given; five numbers to set | learned: matrices $W_\theta$, $W_\phi$ on the features of a network |
# | $g$ | the probabilities $Q_j$ | learned, $W_g\, x_j$ |
# | $j = i$ | left out | kept |
# | $C$ | 1: messages grow with $N$ | $\sum_j f$ or $N$: a mean |
# | what is added | $-\psi_i$, the same in each iteration | $x_i$ |
# | softmax | over labels $l$, at each position | over positions $j$, for each row (two of the four forms) |
# | used | several times with the same weights | once, blocks differ |
#
# The line about $C$ has a consequence that a user feels. Take the picture at twice the size and $\theta_\alpha$ twice as large: each pixel has four times as many pixels like it, and the messages become four times as
# strong beside the unaries.

# %%
twice = photo[:20, :30].repeat(2, axis=0).repeat(2, axis=1)  # a quarter of the photograph, at twice the size
place_once = np.array([(r, c) for r in range(20) for c in range(30)], dtype=np.float64)
place_twice = np.array([(r, c) for r in range(40) for c in range(60)], dtype=np.float64)
rows = []
for p, image, alpha in ((place_once, photo[:20, :30], 4), (place_twice, twice, 8)):
    k = kernel(p, image.reshape(-1, 3), w1=1, alpha=alpha, beta=0.15, w2=0, gamma=1)
    rows.append(k.sum(axis=1).mean())
print(f"mean sum of a row: {rows[0]:.1f}, at twice the size {rows[1]:.1f}, {rows[1] / rows[0]:.1f} times")
assert 3.8 < rows[1] / rows[0] < 4.3

# %% [markdown]
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Labels in an order (easy, 10 minutes)
#
# Let the labels be depths, 0 near, 1 middle, 2 far, and let a jump by two cost more: $\mu(l, l') = |l - l'|$. The short form for Potts does not hold any more. Write one parallel update with any cost matrix
# `mu`, from the formula of section 3. (The check uses a `mu` that is not symmetric, to tell rows from columns; such a cost belongs to no energy, but the formula can be computed.)
#
# **Expect**: for $\mu = 1 - I$ the result of `parallel`.
#
# <details><summary>Hint 1: a nudge</summary>
#
# First the message $\sum_j k_{ij} Q_j(l')$ for all $l'$, then the cost matrix mixes the labels.
#
# </details>
# <details><summary>Hint 2: the formula</summary>
#
# $Q \leftarrow \mathrm{softmax}(-\psi - K Q \mu^\top)$
#
# </details>
# <details><summary>Hint 3: part of the code</summary>
#
# `softmax(-psi - ...)`; mind the sign: cost makes a label less likely
#
# </details>


# %% tags=["stub"]
def update_with(mu, Q, psi, K):
    #: solution
    return softmax(-psi - K @ Q @ mu.T)
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
depth_cost = np.abs(np.arange(3)[:, None] - np.arange(3.0)) + np.array(
    [[0, 0, 1], [0, 0, 0], [0, 0, 0]]
)  # near-far once more
part = slice(0, 40)
Q_part, psi_part, K_part = Q[part], psi[part], 0.1 * K[part, part]
cost = np.einsum("ij,jm,lm->il", K_part, Q_part, depth_cost)
check(
    "Exercise 1",
    lambda: update_with(depth_cost, Q_part, psi_part, K_part),
    softmax(-psi_part - cost),
    mistakes={
        "the sign of the messages: cost must make a label less likely": softmax(-psi_part + cost),
        "that is the short form for Potts; mu is not used": parallel(Q_part, psi_part, K_part),
        "mu is transposed: l is the row, l' the column": softmax(-psi_part - K_part @ Q_part @ depth_cost),
        "the unaries are missing": softmax(-cost),
        "the softmax is missing": -psi_part - cost,
        "the softmax ran over pixels, not over labels": softmax((-psi_part - cost).T).T,
    },
)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Messages that do not grow (medium, 15 minutes)
#
# `pydensecrf`, a public Python wrapper, normalises its kernels symmetrically by default: $\bar k_{ij} = k_{ij} / \sqrt{d_i\, d_j}$ with $d_i = \sum_j k_{ij}$. Write it for a map `K`.
#
# **Expect**: a symmetric map whose largest eigenvalue is exactly 1, for any picture size. (Dividing row $i$ by $d_i$, as a softmax does, gives the same eigenvalue, and a map that is not symmetric: no energy
# belongs to it.)
#
# <details><summary>Hint 1: a nudge</summary>
#
# One vector $d$; it divides rows and columns.
#
# </details>
# <details><summary>Hint 2: the formula</summary>
#
# $\bar K = D^{-1/2} K D^{-1/2}$ with the diagonal matrix $D$ of the $d_i$
#
# </details>
# <details><summary>Hint 3: part of the code</summary>
#
# `root = np.sqrt(K.sum(axis=1))`, then divide by `root[:, None]` and by `root[None, :]`
#
# </details>


# %% tags=["stub"]
def symmetric(K):
    #: solution
    root = np.sqrt(K.sum(axis=1))
    return K / root[:, None] / root[None, :]
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
K_small = K[1000:1060, 1000:1060]
d = K_small.sum(axis=1)
expected = np.diag(d**-0.5) @ K_small @ np.diag(d**-0.5)
assert np.isclose(np.linalg.eigvalsh(expected)[-1], 1)
check(
    "Exercise 2",
    lambda: symmetric(K_small),
    expected,
    mistakes={
        "only rows are divided: the map is not symmetric": K_small / d[:, None],
        "divided by d_i d_j; the square root is missing": K_small / np.outer(d, d),
        "only rows are divided, by the root": K_small / np.sqrt(d)[:, None],
        "only columns are divided, by the root": K_small / np.sqrt(d),
        "multiplied, not divided": K_small * np.sqrt(np.outer(d, d)),
    },
)

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · Half a step (medium, 20 minutes)
#
# Another cure for the two pixels of section 6, when $j = i$ must stay out: go half of the way, $Q \leftarrow \frac12 Q + \frac12 Q^\text{new}$. Write `damped(Q, psi, K, times)`, which returns the free energies before the first
# and after each update, `times + 1` numbers. The check starts at 0.9 and 0.2.
#
# **Expect**: numbers that fall, from 2.14 to -0.04 after 20 updates.
#
# <details><summary>Hint 1: a nudge</summary>
#
# A list that begins with one number, and a loop that appends.
#
# </details>
# <details><summary>Hint 2: the formula</summary>
#
# $Q \leftarrow \frac12 Q + \frac12\, \mathrm{softmax}(-\psi + K Q)$, then $F(Q)$
#
# </details>
# <details><summary>Hint 3: part of the code</summary>
#
# `Q = 0.5 * Q + 0.5 * parallel(Q, psi, K)` and `free_energy(Q, psi, K)`
#
# </details>


# %% tags=["stub"]
def damped(Q, psi, K, times):
    #: solution
    trace = [free_energy(Q, psi, K)]
    for _ in range(times):
        Q = 0.5 * Q + 0.5 * parallel(Q, psi, K)
        trace.append(free_energy(Q, psi, K))
    return np.array(trace)
    #: stub
    return None  # your code here
    #: end


# %% tags=["check"]
def trace_of(share, times=20):
    Q = np.array([[0.9, 0.1], [0.2, 0.8]])
    trace = [free_energy(Q, psi_2, K_2)]
    for _ in range(times):
        Q = (1 - share) * Q + share * softmax(K_2 @ Q - psi_2)
        trace.append(free_energy(Q, psi_2, K_2))
    return np.array(trace)


expected = trace_of(0.5)
assert (np.diff(expected) <= 1e-12).all()
assert np.allclose(expected[[0, -1]], [2.135, -0.039], atol=5e-4)
check(
    "Exercise 3",
    lambda: damped(np.array([[0.9, 0.1], [0.2, 0.8]]), psi_2, K_2, 20),
    expected,
    mistakes={
        "these are undamped updates": trace_of(1),
        "the free energy before the first update is missing": expected[1:],
        "one update too few": expected[:-1],
        "a quarter of the way, not half": trace_of(0.25),
        "three quarters of the way, not half": trace_of(0.75),
    },
)

# %% [markdown]
# ## What you learned
#
# - A dense CRF is an energy over labellings; its marginals can be enumerated only for a handful of pixels.
# - Mean field minimises a free energy. One pixel's update is a softmax over labels, and lowers $F$ by a Kullback-Leibler divergence. Its labels were right, its probabilities too sure.
# - The message is a non-local operation with $C = 1$ and without $j = i$: zero the diagonal, or subtract the own term.
# - Without $j = i$, parallel updates may swap for ever; with it, a Gaussian kernel makes them descend, on an objective that is not quite $F$.
# - A kernel of position and colour repaired borders that blurring could not. The lowest energy did not have the best labels.
#
# ## Further reading
#
# - P. Krähenbühl, V. Koltun: *Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials*. NIPS 2011. Computes the messages by fast filtering, without the map of $N^2$ entries.
# - P. Krähenbühl, V. Koltun: *Parameter Learning and Convergent Inference for Dense Random Fields*. ICML 2013. Where our section 6 leads to.
# - S. Zheng and others: *Conditional Random Fields as Recurrent Neural Networks*. ICCV 2015. The iterations as layers of a network.
# - C. Bishop: *Pattern Recognition and Machine Learning*, 2006. Chapter 10: mean field and the Kullback-Leibler divergence.
# - X. Wang, R. Girshick, A. Gupta, K. He: *Non-local Neural Networks*. CVPR 2018. Section 2 discusses conditional random fields.
