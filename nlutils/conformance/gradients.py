"""Checks of the backward pass."""

import numpy as np

from nlutils.conformance.case import OK, WRONG, backward_error, count
from nlutils.conformance.formulas import Oracle
from nlutils.conformance.identify import norm_of, weights_by_name
from nlutils.conformance.subject import NotRunnable
from nlutils.instantiations import SOFTMAX_FORMS

__all__ = ["every_parameter", "gradients", "trainable"]

# Maxima and ReLU have kinks, which a shorter step may avoid, or else another point.
STEPS = (1e-5, 1e-6, 1e-7)
SEEDS = (3, 13)


def gradients(case):
    """Backward against central differences: of the block, in all parameters at once, and of the formula, in
    each; of the block in each where the formula is not known."""
    if case.backward:
        return WRONG, case.backward
    double = case.subject.precision == "float64"
    if not double and case.formula is None:
        raise NotRunnable("differences in float32 are too rough, and the formula is not known")
    against = ["the formula"] * (case.formula is not None) + ["the block"] * double
    for seed in SEEDS:
        slopes = _Slopes(case, seed)
        each, wrong = [[key] for key in slopes.found], []
        if case.formula is not None:
            wrong += slopes.wrong("the formula", slopes.formula, each)
        if double:
            together = [["x"], [key for key in slopes.found if key != "x"]]
            wrong += slopes.wrong("the block", case.subject.forward, together if case.formula else each)
        if not wrong:
            return OK, f"equal to differences of {' and of '.join(against)}, for x and {count(len(each) - 1)}"
    return WRONG, wrong[0] + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")


class _Slopes:
    """The gradients of sum(z * direction), and differences to compare them with."""

    def __init__(self, case, seed):
        self.case, self.subject = case, case.subject
        self.x, self.rng = case.awake(seed), np.random.default_rng(4)
        self.direction = self.rng.standard_normal(self.x.shape)
        dx, slopes = self.subject.vjp(self.x, self.direction)
        self.arrays = {"x": self.x} | {key: self.subject.get(key) for key in slopes}
        self.found = {"x": dx} | {
            key: np.zeros(self.arrays[key].shape) if slope is None else slope for key, slope in slopes.items()
        }
        self.rounding = 1e-15 * np.abs(self.subject.forward(self.x) * self.direction).sum()
        self.double = self.subject.precision == "float64"

    def formula(self, x):
        """z by the formula, with the weights that the block has now."""
        subject = self.subject
        norm, weights = norm_of(subject), weights_by_name(subject)
        return Oracle(x, weights, norm=norm, channels_last=subject.channels_last)(self.case.formula)

    def wrong(self, name, output, groups):
        """A line for each group of arrays along which the gradient is not the slope of `output`."""
        return [line for keys in groups if keys and (line := self._compare(name, output, keys))]

    def _compare(self, name, output, keys):
        ways = {key: self.rng.standard_normal(self.arrays[key].shape) for key in keys}
        found = sum(float((self.found[key] * way).sum()) for key, way in ways.items())
        length = max(np.linalg.norm(self.found[key]) for key in keys)
        for step in STEPS:
            expected = self._central(output, ways, step)
            size = max(length, abs(found), abs(expected), 1e-3 if self.double else 1e-1)
            if abs(found - expected) <= (1e-5 if self.double else 5e-3) * size + self.rounding / step:
                return None
        what = keys[0] if len(keys) == 1 else "all parameters"
        return f"d/d {what} along one direction is {found:.3g}, by differences of {name} {expected:.3g}"

    def _central(self, output, ways, step):
        values = []
        for sign in (1, -1):
            moved = {key: self.arrays[key] + sign * step * way for key, way in ways.items()}
            x = moved.pop("x", self.x)
            self.subject.set(moved)
            values.append(output(x))
        self.subject.set({key: self.arrays[key] for key in ways if key != "x"})
        return float(((values[0] - values[1]) * self.direction).sum() / (2 * step))


def every_parameter(case):
    subject = case.subject
    if case.backward:
        raise NotRunnable("backward raises")
    if not subject.parameters():
        return WRONG, "there is no parameter"
    x = case.awake(seed=3)
    _, slopes = subject.vjp(x, np.random.default_rng(4).standard_normal(x.shape))
    largest = max((np.abs(s).max() for s in slopes.values() if s is not None and s.size), default=0.0)
    none = [key for key, slope in slopes.items() if slope is None]
    tiny = 1e-11 if subject.precision == "float64" else 1e-6
    zero = [k for k, s in slopes.items() if s is not None and np.abs(s).max() <= tiny * largest]
    silent = [key for key in zero if key in _silent(case)]
    bad = none + [key for key in zero if key not in silent]
    if bad:
        if _one_key(case) and set(bad) <= _logits(subject):
            raise NotRunnable("one key: theta and phi cannot matter; give a larger example_input")
        return WRONG, f"no gradient reaches {', '.join(bad)}, though no weight is zero"
    note = f"; that of {', '.join(silent)} is 0 by the softmax" if silent else ""
    frozen = f"; frozen: {', '.join(subject.frozen())}" if subject.frozen() else ""
    return OK, f"all {count(len(slopes))} get one, with no weight at zero{note}{frozen}"


def _one_key(case):
    """Whether each position looks at one key under a softmax, or may do so where the formula is not known."""
    formula, size = case.computed, case.subject.size
    if formula is not None and formula.instantiation not in SOFTMAX_FORMS:
        return False
    window = 1 if formula is not None and formula.subsample is None else 2
    places = np.prod([max(side // window, 1) for side in size[-2:]])
    if formula is None or len(size) < 3 or formula.attention == "space":
        return places == 1
    frames = formula.frames_per_group or size[0]
    return frames == 1 and (places == 1 or formula.attention == "time")


def _logits(subject):
    """The parameters of theta and phi; all where it is not told which they are."""
    if not subject.keys:
        return set(subject.parameters())
    return {key for role in ("theta", "phi") for key in subject.keys.get(role, {}).values()}


def _silent(case):
    """Parameters whose true gradient may be 0: a bias of phi adds the same to all logits of a position."""
    subject = case.subject
    if case.formula and case.formula.instantiation not in SOFTMAX_FORMS:
        return []
    if "phi" not in subject.keys:  # any vector may be that bias
        return [key for key in subject.parameters() if subject.get(key).ndim == 1]
    # A wrong softmax over i does the same to the bias of theta.
    return [
        keys["bias"] for role, keys in subject.keys.items() if role in ("theta", "phi") and "bias" in keys
    ]


def trainable(case):
    subject = case.subject
    subject.reset()
    if not subject.parameters():
        return WRONG, "there is no parameter to train"
    x, target = subject.random_input(), subject.random_input(seed=8)

    def loss():
        return float(((subject.forward(x, training=True) - target) ** 2).mean())

    rate = 1.0
    for _ in range(5):
        z, before = subject.forward(x, training=True), loss()
        try:
            _, slopes = subject.vjp(x, 2 * (z - target) / z.size, training=True)
        except Exception as error:
            return WRONG, f"cannot be trained: {backward_error(error)}"
        slopes = {key: slope for key, slope in slopes.items() if slope is not None and slope.any()}
        if not slopes:
            return WRONG, "cannot be trained from its start: every gradient is 0"
        arrays = {key: subject.get(key) for key in slopes}
        for _halving in range(30):
            subject.set({key: arrays[key] - rate * slope for key, slope in slopes.items()})
            if loss() < before:
                break
            rate /= 2
        else:
            return WRONG, f"cannot be trained: no step against the gradient lowers the loss of {before:.4g}"
    return OK, "five SGD steps from the weights as given lower a squared loss"
