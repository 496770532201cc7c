"""Checks that look at the block from outside and need not know where its weights are."""

import numpy as np

from nlutils.conformance.case import OK, WRONG, apart, count
from nlutils.conformance.identify import draw
from nlutils.conformance.subject import NotRunnable
from nlutils.instantiations import SOFTMAX_FORMS

__all__ = ["batch_mates", "half_precision", "identity", "position_order", "repeatable", "runs", "statistics"]

# What float16 must bear: post-ReLU features of this root mean square in so many channels.
HALF_RMS, HALF_CHANNELS = 10, 1024
# The example's own map is used up to this many positions.
HALF_POSITIONS = 1568


def runs(case):
    subject = case.subject
    x = case.awake()
    z = subject.forward(x)
    if z.shape != x.shape:
        return WRONG, f"maps of shape {x.shape} come back as {z.shape}"
    if subject.alters_input(x):
        return WRONG, "the block works in place on its input: what the network keeps of x is changed"
    return OK, f"keeps the shape, leaves its input alone, in {subject.precision}"


def repeatable(case):
    subject = case.subject
    x = case.awake()
    differ = apart(subject.forward(x), subject.forward(x))
    parameters = subject.parameters() + subject.frozen()
    if differ > subject.tolerance:
        why = "built anew at each call" if not parameters else "it draws random numbers in evaluation mode"
        return WRONG, f"two calls on one input differ by {differ:.2g} of it: {why}, {count(len(parameters))}"
    if not parameters:
        return WRONG, "the block has no parameters: nothing in it can learn, or it is built anew at each call"
    return OK, f"two calls on one input agree, {count(len(parameters))}"


def identity(case):
    subject = case.subject
    subject.reset()
    x = subject.random_input()
    change = max(apart(subject.forward(x, training), x) for training in (False, True))
    subject.reset()
    if change > (1e-12 if subject.precision == "float64" else 1e-6):
        return (
            WRONG,
            f"as given, the block is not the identity: it moves x by {change:.2g} of its largest value",
        )
    return OK, "z = x with the weights as given, in training and evaluation mode"


def statistics(case):
    """What share of the old running statistics a training step keeps, measured on the block."""
    subject = case.subject
    means = subject.running_means()
    if not means:
        return OK, "nothing to check: the block keeps no running statistics"
    x, texts = case.awake(), []
    for key in means:
        after = []
        for start in (0.0, 1000.0):
            subject.set({key: np.full(subject.get(key).shape, start)})
            subject.forward(x, training=True)
            after.append(subject.get(key))
        keep = float(np.median((after[1] - after[0]) / 1000))
        if keep > 0.9999:
            return WRONG, f"{key} never moves in training: the norm is not called, or is frozen"
        if keep < 0.5:
            return WRONG, (
                f"{key} keeps only {keep:.2g} of its old value at each step: momentum {1 - keep:.2g} in "
                f"PyTorch's convention, {keep:.2g} in Keras', where the share of the old one was meant"
            )
        texts.append(
            f"{keep:.2g} of the old value is kept, the running variance is {_variance_kind(case, key, x)}"
        )
    return OK, "; ".join(dict.fromkeys(texts))


def _variance_kind(case, key, x):
    """Whether sum / n or sum / (n - 1) enters: a batch repeated twice has the same first, another second."""
    subject, variances = case.subject, []
    variance = subject.variance_of(key)
    for batch in (x, np.concatenate([x, x])):
        subject.set({variance: np.zeros(subject.get(variance).shape)})
        subject.forward(batch, training=True)
        variances.append(subject.get(variance))
    n = len(x) * np.prod(x.shape[2:])
    ratio = np.median(variances[0] / variances[1])
    unbiased = (n / (n - 1)) / (2 * n / (2 * n - 1))
    return "unbiased (n - 1)" if abs(ratio - unbiased) < abs(ratio - 1) else "biased (n)"


def position_order(case):
    subject = case.subject
    if np.prod(subject.size) == 1:
        raise NotRunnable("the map has one position; give a larger example_input")
    x = case.awake()
    z = subject.forward(x)
    for name, order in _orders(subject.size):
        if apart(subject.forward(_moved(x, order)), _moved(z, order)) <= subject.tolerance:
            return OK, f"moving {name} moves the output along"
    return WRONG, "the output depends on the order of the positions: moving them does not move it along"


def _orders(size):
    """(what is moved, the order of all positions), the freest first; each is a symmetry of some formula."""
    rng = np.random.default_rng(5)
    places = np.arange(np.prod(size)).reshape(size)
    yield "any position", rng.permutation(places.ravel())
    windows = [_shuffled(length, 2, rng) for length in size[-2:]]
    if len(size) < 3:
        if max(size) > 3:
            yield "the windows of sub-sampling", places[np.ix_(*windows)].ravel()
        return
    frames, height, width = size
    inside, place = places.reshape(frames, -1), rng.permutation(height * width)
    orders = {
        group: np.concatenate([start + rng.permutation(group) for start in range(0, frames, group)])
        for group in range(frames, 0, -1)
        if frames % group == 0
    }
    yield "frames, and the places in them", inside[orders[frames]][:, place].ravel()
    for group, order in orders.items():
        if 1 < group < frames:
            rows = rng.permuted(places.reshape(frames // group, -1), axis=1)
            yield f"positions inside groups of {group} frames", rows.ravel()
            yield f"frames inside groups of {group}, and places", inside[order][:, place].ravel()
    if max(height, width) > 3:
        yield "frames, and the windows of sub-sampling", places[np.ix_(orders[frames], *windows)].ravel()
        for group, order in orders.items():
            if 1 < group < frames:
                what = f"frames inside groups of {group}, and the windows of sub-sampling"
                yield what, places[np.ix_(order, *windows)].ravel()


def _shuffled(length, side, rng):
    """0 ... length - 1 with whole windows of `side` in another order."""
    whole = length // side
    if whole < 1:
        return np.arange(length)
    windows = np.arange(whole * side).reshape(whole, side)[rng.permutation(whole)]
    return np.concatenate([windows.ravel(), np.arange(whole * side, length)])


def _moved(maps, order):
    return maps.reshape(*maps.shape[:2], -1)[:, :, order].reshape(maps.shape)


def batch_mates(case):
    subject = case.subject
    x = case.awake()
    other = np.concatenate([x[:1], subject.random_input(seed=9)])
    change = apart(subject.forward(x)[:1], subject.forward(other)[:1])
    if change > subject.tolerance:
        return WRONG, f"a sample's output changes by {change:.2g} of x with the other samples of its batch"
    return OK, "a sample's output does not depend on the other samples of its batch"


def half_precision(case):
    subject = case.subject
    fits = np.prod(subject.full_size) <= HALF_POSITIONS
    x = np.maximum(subject.random_input(seed=6, size=subject.full_size if fits else None), 0)
    x *= HALF_RMS / np.sqrt((x**2).mean())
    what = f"features of rms {HALF_RMS} in {subject.channels} channels"
    if not np.isfinite(subject.half(x)).all():
        return WRONG, f"NaN or infinity in float16, {what}"
    if subject.channels < HALF_CHANNELS:
        # x_i . x_i passes float16's largest number, 65,504, from 655 channels on.
        raise NotRunnable(f"finite, but {what} are too few to tell; give a block of {HALF_CHANNELS:,}")
    return OK, f"finite in float16, {what}{_stressed(case, x)}"


def _stressed(case, x):
    """The softmax forms with theta = phi of variance 2 / C, so that theta_i . phi_i passes 65,504.

    The other forms would give a y beyond 65,504, whoever computes it.
    """
    subject = case.subject
    if case.formula is None or case.formula.instantiation not in SOFTMAX_FORMS or "theta" not in subject.keys:
        return ""
    _, arrays = draw(subject)
    rng = np.random.default_rng(7)
    for role in ("theta", "phi", "g", "w_z"):
        key = subject.keys[role]["weight"]
        shape = arrays[key].shape
        arrays[key] = rng.standard_normal(shape) * (2 / shape[1]) ** 0.5
    arrays[subject.keys["phi"]["weight"]] = arrays[subject.keys["theta"]["weight"]]
    finite = np.isfinite(subject.half(x, arrays)).all()
    return "; also with theta = phi of variance 2/C" if finite else "; not with theta = phi of variance 2/C"
