"""Which formula does a block compute? Output against output, in float64, with weights that matter."""

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from nlutils.conformance.formulas import FAULTS, Formula, Oracle, literal
from nlutils.conformance.subject import Disagreement, NotRunnable, Subject
from nlutils.instantiations import SOFTMAX_FORMS

__all__ = ["Finding", "draw", "identify", "waking"]


@dataclass(frozen=True)
class Finding:
    """What `identify` found.

    formula   the formula that gives the block's output; the nearest one when `fits` is false
    others    further formulas, with a known fault too, that this map cannot tell from it
    error     largest difference between the block and the formula, as a share of the largest |x|
    oracle    evaluates formulas on the same input and weights
    widths    in_channels and inner_channels
    untold    parameters that `weights` does not speak of
    """

    formula: Formula
    fits: bool
    others: tuple
    error: float
    oracle: Oracle
    widths: tuple
    untold: tuple


def draw(subject: Subject, seed=0) -> tuple[np.ndarray, dict]:
    """An input and weights under which mistakes show: no zero, logits of order 1, biases and statistics too.

    Returns x and {key: array}. Raises NotRunnable when the places are not told, or are no 1 x 1 convolutions.
    """
    keys = subject.keys
    missing = [role for role in ("g", "w_z") if role not in keys]
    if ("theta" in keys) != ("phi" in keys):
        missing += [role for role in ("theta", "phi") if role not in keys]
    if missing:
        raise NotRunnable(f"`weights` must say where {' and '.join(missing)} of the block are")
    rng = np.random.default_rng(seed)
    c_in, embedded = subject.channels, "theta" in keys
    inner, value_width = (_width(subject, role, c_in) if role in keys else c_in for role in ("theta", "g"))
    _width(subject, "w_z", value_width)
    # Logits theta_i . phi_j of spread 1.5, whatever the widths.
    x_scale = 1.0 if embedded else (3 / c_in) ** 0.5
    spread = {
        "theta": (1.5 / inner**0.5) ** 0.5 / c_in**0.5,
        "g": 1 / (c_in**0.5 * x_scale),
        "w_z": value_width**-0.5,
        "w_f": (2 / inner) ** 0.5,
    }
    spread["phi"] = spread["theta"]
    arrays = {}
    for role, parts in keys.items():
        for name, key in parts.items():
            shape = subject.get(key).shape
            low = 0.5 if role == "norm" and name in ("weight", "running_var") else -0.5
            arrays[key] = (
                spread[role] * rng.standard_normal(shape)
                if name == "weight" and role != "norm"
                else rng.uniform(low, low + 1, shape)
            )
    return subject.random_input(seed=seed + 1, scale=x_scale), arrays


def _width(subject, role, channels_in):
    shape = subject.get(subject.keys[role]["weight"]).shape
    if len(shape) < 2 or shape[1] != channels_in or np.prod(shape[2:]) != 1:
        raise NotRunnable(
            f"{role}.weight of shape {shape} is not a convolution of size 1 on {channels_in} channels, "
            "the only kind that the definition here knows"
        )
    return shape[0]


def waking(subject: Subject, seed=0) -> tuple[np.ndarray, dict]:
    """`draw` where the places are told; else random numbers for every parameter that do for the same."""
    if subject.keys:
        try:
            return draw(subject, seed)
        except NotRunnable:
            pass
    rng, arrays = np.random.default_rng(seed), {}
    for key in subject.parameters():
        shape = subject.get(key).shape
        if len(shape) > 1:
            arrays[key] = rng.standard_normal(shape) / np.prod(shape[1:]) ** 0.5
        else:
            arrays[key] = rng.uniform(0.5, 1.5, shape)
    return subject.random_input(seed=seed + 1), arrays


def weights_by_name(subject: Subject) -> dict:
    """The block's weights as `Oracle` takes them, missing biases as zeros."""
    arrays = {}
    for role in ("theta", "phi", "g", "w_z"):
        if role in subject.keys:
            weight = subject.get(subject.keys[role]["weight"])
            arrays[f"{role}.weight"] = weight.reshape(weight.shape[:2])
            bias = subject.keys[role].get("bias")
            arrays[f"{role}.bias"] = np.zeros(len(weight)) if bias is None else subject.get(bias)
    if "w_f" in subject.keys:
        arrays["w_f"] = subject.get(subject.keys["w_f"]["weight"]).ravel()
        bias = subject.keys["w_f"].get("bias")
        arrays["w_f.bias"] = 0.0 if bias is None else float(subject.get(bias).ravel()[0])
        if len(arrays["w_f"]) != 2 * len(arrays.get("theta.weight", [])):
            raise NotRunnable(f"w_f has {len(arrays['w_f'])} numbers; it must have twice the width of theta")
    return arrays


def norm_of(subject: Subject):
    """What stands after W_z in evaluation mode, as a function of maps; None without a norm."""
    keys = subject.keys.get("norm")
    if keys is None:
        return None
    if "running_mean" not in keys:
        return subject.call_norm  # not a batch normalisation: taken as it is
    channel = (1, -1) + (1,) * subject.ndim
    mean, variance = (subject.get(keys[name]).reshape(channel) for name in ("running_mean", "running_var"))
    gain = subject.get(keys["weight"]).reshape(channel) if "weight" in keys else 1.0
    bias = subject.get(keys["bias"]).reshape(channel) if "bias" in keys else 0.0
    root = np.sqrt(variance + subject.norm_epsilon("norm"))
    return lambda maps: gain * (maps - mean) / root + bias


def identify(subject: Subject) -> Finding:
    """The formula of the block; its weights are left as drawn. Raises NotRunnable.

    First the paper's formulas: each instantiation that the told weights allow, scaled or not, sub-sampled
    before, after or not, over space, time or groups of frames. If none gives the block's output, one known
    fault at a time, then two.
    """
    x, arrays = draw(subject)
    subject.set(arrays)
    weights = weights_by_name(subject)
    oracle = Oracle(x, weights, norm=norm_of(subject), channels_last=subject.channels_last)
    z = subject.forward(x)

    def error(formula):
        return float(np.abs(oracle(formula) - z).max() / np.abs(x).max())

    errors = {}
    for candidates in _rounds(oracle):
        errors |= {formula: error(formula) for formula in candidates}
        fitting = [formula for formula in errors if errors[formula] <= subject.tolerance]
        if fitting:
            break
    nearest = min(errors, key=errors.get)
    best = fitting[0] if fitting else nearest
    others = fitting[1:]
    if fitting and not best.faults:
        others += [formula for formula in _faulty(best, oracle) if error(formula) <= subject.tolerance]
        # The same in the paper's own words: sums over i and j, one pair at a time.
        words = literal(best, x, weights, oracle.norm)
        if np.abs(words - z).max() > subject.tolerance * np.abs(x).max():
            raise Disagreement(f"the oracle and nlutils.reference disagree about {best}")
    untold = tuple(key for key in subject.parameters() if key not in subject.told())
    inner = oracle.width if "theta" in subject.keys else oracle.value_width
    return Finding(best, bool(fitting), tuple(others), errors[best], oracle, (oracle.channels, inner), untold)


def _rounds(oracle):
    """Formulas in the order in which they are tried, one list after the other."""
    plain = _plain(oracle)
    yield plain
    if oracle.ndim == 3:
        yield [f for formula in plain for f in _attending(formula, oracle.size)]
    yield [faulty for formula in plain for faulty in _faulty(formula, oracle)]
    yield [
        formula.with_faults(*one.faults, *two.faults)
        for formula in plain
        for one, two in combinations(_faulty(formula, oracle), 2)
        if FAULTS[one.faults[0]].check != FAULTS[two.faults[0]].check
        and "update not added" not in one.faults + two.faults
    ]


def _faulty(formula, oracle):
    """The formula with each known fault that it can have."""
    return [formula.with_faults(name) for name, fault in FAULTS.items() if fault.applies(formula, oracle)]


def _plain(oracle):
    if "w_f" in oracle.weights:
        possible = ["concatenation"]
    elif "theta.weight" in oracle.weights:
        possible = ["embedded_gaussian", "dot_product"]
    else:
        possible = ["gaussian"]
    spatial = oracle.size[-2:]
    pooling = (None, "before", "after") if max(spatial) > 1 else (None,)
    return [
        Formula(instantiation, scale, subsample)
        for instantiation in possible
        for scale in ((False, True) if instantiation in SOFTMAX_FORMS else (False,))
        for subsample in pooling
    ]


def _attending(formula, size):
    frames, *place = size
    if frames == 1:
        return
    groups = [n for n in range(1, frames) if frames % n == 0]
    if max(place) > 1:
        yield Formula(formula.instantiation, formula.scale, formula.subsample, "space")
    for group in groups[1:]:
        yield Formula(formula.instantiation, formula.scale, formula.subsample, "spacetime", group)
    if formula.subsample is None and max(place) > 1:
        yield Formula(formula.instantiation, formula.scale, None, "time")
        for group in groups[1:]:
            yield Formula(formula.instantiation, formula.scale, None, "time", group)
