"""Checks that look at the block from outside and need not know where its weights are."""

import numpy as np

from nlutils.conformance.case import OK, WRONG, apart, count
from nlutils.conformance.subject import NotRunnable

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
        if any(subject.get(key).any() for key in subject.running_means()):
            raise NotRunnable("the block has been trained: its running mean is not 0")
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
    """Positions are moved that the block's formula treats alike; any, then windows, where it is not known."""
    subject, formula = case.subject, case.computed
    x = case.awake()
    z = subject.forward(x)
    orders = _orders(subject.size, formula)
    given = np.arange(np.prod(subject.size))
    for name, order in orders:
        if np.array_equal(order, given):
            raise NotRunnable("the map is too small to tell; give a larger example_input")
        if apart(subject.forward(_moved(x, order)), _moved(z, order)) <= subject.tolerance:
            return OK, f"the output follows when these are moved: {name}"
    return WRONG, "the output depends on the order of the positions: it does not follow when they are moved"


def _orders(size, formula):
    """(what is moved, the order of all positions)."""
    frames = size[0] if len(size) == 3 else 1
    if formula is None:
        any_position = np.random.default_rng(5).permutation(np.prod(size))
        return [("any position", any_position), ("the windows of sub-sampling", _order(size, 1, 2))]
    group = 1 if formula.attention == "space" else formula.frames_per_group or frames
    inside = f"frames inside groups of {group}" if 1 < group < frames else "frames"
    places = "the windows of sub-sampling" if formula.subsample else "places"
    what = f"{inside} and {places}" if frames > 1 and group > 1 else places
    return [(what, _order(size, group, 2 if formula.subsample else 1))]


def _order(size, group, side):
    """All positions, with frames in another order inside groups of `group`, and windows of `side` places."""
    rng = np.random.default_rng(5)

    def another(number):
        order = rng.permutation(number)
        return np.roll(order, 1) if np.array_equal(order, np.arange(number)) else order

    axes = []
    for length in size[-2:]:
        whole = length // side
        windows = np.arange(whole * side).reshape(whole, side)[another(whole)]
        axes.append(np.concatenate([windows.ravel(), np.arange(whole * side, length)]))
    if len(size) == 3:
        axes.insert(0, np.concatenate([start + another(group) for start in range(0, size[0], group)]))
    return np.arange(np.prod(size)).reshape(size)[np.ix_(*axes)].ravel()


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
    return OK, f"finite in float16, {what}"
