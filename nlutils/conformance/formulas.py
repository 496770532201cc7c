"""What a block may compute: the paper's formulas, and the known mistakes, in NumPy float64.

`Oracle` evaluates any of them in matrix form, on a whole batch; `literal` gives a formula without faults to
`nlutils.reference`, which has the sums as the paper writes them. Maps are (B, C, *size) here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from nlutils import reference
from nlutils.instantiations import POOL_WINDOW, SOFTMAX_FORMS

__all__ = ["FAULTS", "Fault", "Formula", "Oracle", "literal"]


@dataclass(frozen=True)
class Formula:
    """The options of `nlutils.torch.NonLocalBlock` that change what is computed, and names of `FAULTS`."""

    instantiation: str
    scale: bool = False
    subsample: str | None = None
    attention: str = "spacetime"
    frames_per_group: int | None = None
    faults: tuple[str, ...] = ()

    def with_faults(self, *names: str) -> "Formula":
        return replace(self, faults=names)

    def __contains__(self, fault: str) -> bool:
        return fault in self.faults


@dataclass(frozen=True)
class Fault:
    """A known mistake: the check that it belongs to, its name in words, and where it can be told at all."""

    check: str
    text: str
    applies: Callable[[Formula, "Oracle"], bool]


def _softmax(formula, oracle):
    return formula.instantiation in SOFTMAX_FORMS


def _linear(formula, oracle):
    return formula.instantiation not in SOFTMAX_FORMS


def _concatenation(formula, oracle):
    return formula.instantiation == "concatenation"


def _scaled(formula, oracle):
    return formula.scale


def _pooled(formula, oracle):
    return formula.subsample is not None


def _always(formula, oracle):
    return True


FAULTS = {
    "softmax over i": Fault(
        "softmax axis", "softmax over i, the queries, instead of over j, the keys", _softmax
    ),
    "softmax over the batch": Fault(
        "softmax axis", "softmax over the batch: samples take weight from each other", _softmax
    ),
    "softmax over all pairs": Fault(
        "softmax axis", "softmax over all pairs (i, j) at once instead of over j", _softmax
    ),
    "softmax of the concatenation": Fault(
        "softmax axis", "softmax over j where concatenation divides by M", _concatenation
    ),
    "no 1/M": Fault("normalisation", "1/M is missing: the sum over j grows with the map", _linear),
    "1/N": Fault(
        "normalisation",
        "1/N where it must be 1/M: divided by the queries, though only the sub-sampled keys are summed",
        lambda formula, oracle: _linear(formula, oracle) and _pooled(formula, oracle),
    ),
    "1/d": Fault("normalisation", "divided by the width d instead of by the number of keys M", _linear),
    "scale inverted": Fault(
        "scale", "scale inverted: the logits are multiplied by d^(+1/2) instead of d^(-1/2)", _scaled
    ),
    "scale from in_channels": Fault(
        "scale",
        "scale from the wrong width: in_channels^(-1/2) instead of d^(-1/2), d the width of theta",
        lambda formula, oracle: formula.scale and oracle.width != oracle.channels,
    ),
    "scale without the root": Fault("scale", "scale 1/d instead of d^(-1/2)", _scaled),
    "linear form scaled": Fault(
        "scale", "d^(-1/2) on a form without softmax, which the paper divides by M only", _linear
    ),
    "pooled along the flattened axis": Fault(
        "pooling",
        "pooled along the wrong axis: neighbours in the flattened map, not 2 x 2 places of a frame",
        lambda formula, oracle: _pooled(formula, oracle) and oracle.ndim > 1,
    ),
    "time pooled": Fault(
        "pooling",
        "pooled along the wrong axis: time is halved too",
        lambda formula, oracle: _pooled(formula, oracle) and oracle.ndim == 3 and oracle.size[0] > 1,
    ),
    "averages pooled": Fault("pooling", "averages are pooled, not maxima", _pooled),
    **{
        f"{what} scrambled": Fault(
            "channel order",
            f"{what} reshaped without a transpose: channels and positions are scrambled",
            _always,
        )
        for what in ("theta", "phi", "g", "theta, phi and g", "y")
    },
    "positions of y reversed": Fault(
        "channel order",
        "y is put back with the axes of positions in the reverse order",
        lambda formula, oracle: oracle.ndim > 1,
    ),
    "theta and phi exchanged": Fault(
        "channel order",
        "theta and phi have changed places (or `weights` names them so)",
        lambda formula, oracle: formula.instantiation != "gaussian",
    ),
    "no ReLU in f": Fault("definition", "f lacks its ReLU", _concatenation),
    "no residual": Fault("residual and W_z", "no residual: z = W_z y, the input is not added", _always),
    "update not added": Fault(
        "residual and W_z", "z = x whatever the weights are: the update is never added", _always
    ),
    "W_z not applied": Fault(
        "residual and W_z",
        "W_z is never applied: z = x + y",
        lambda formula, oracle: oracle.value_width == oracle.channels,
    ),
    "norm not applied": Fault(
        "residual and W_z",
        "the norm is never applied: z = x + W_z y",
        lambda formula, oracle: oracle.norm is not None,
    ),
    "ReLU after the sum": Fault("residual and W_z", "ReLU after the sum; the paper has none", _always),
    "ReLU before the sum": Fault(
        "residual and W_z", "ReLU on the update before the sum; the paper has none", _always
    ),
}


class Oracle:
    """Evaluates formulas on one batch `x`, (B, C, *size), with one set of weights.

    weights   by the names of `nlutils.exchange.to_arrays`, biases always there; "w_f" and "w_f.bias" for
              concatenation; without "theta.weight", theta and phi are the identity
    norm      what stands after W_z, a function of maps; None: nothing
    channels_last  how the block's framework lays out memory: it decides what a missing transpose does
    """

    def __init__(self, x, weights, *, norm=None, channels_last=False):
        self.x, self.weights, self.norm, self.channels_last = x, weights, norm, channels_last
        self.channels, self.size = x.shape[1], x.shape[2:]
        self.ndim = len(self.size)
        self.width = len(weights["theta.weight"]) if "theta.weight" in weights else self.channels
        self.value_width = len(weights["g.weight"])
        self._embedded = {}

    def __call__(self, formula: Formula) -> np.ndarray:
        """z, of the shape of x."""
        x = self.x
        if formula.attention != "spacetime" or formula.frames_per_group:
            parts = _split(x, formula)
            inner = Oracle(parts, self.weights, norm=self.norm, channels_last=self.channels_last)
            z = inner(replace(formula, attention="spacetime", frames_per_group=None))
            return _join(z, x.shape, formula)
        if "update not added" in formula:
            return x
        theta, phi, g = self._embed(formula)
        y = self._weights_of_pairs(formula, theta, phi) @ g
        update = self._back(formula, y)
        if "W_z not applied" not in formula:
            update = self._convolve("w_z", update)
        if self.norm is not None and "norm not applied" not in formula:
            update = self.norm(update)
        if "ReLU before the sum" in formula:
            update = np.maximum(update, 0)
        z = update if "no residual" in formula else x + update
        return np.maximum(z, 0) if "ReLU after the sum" in formula else z

    def _convolve(self, name, maps):
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        out = weight @ maps.reshape(*maps.shape[:2], -1) + bias[:, None]
        return out.reshape(len(maps), len(weight), *maps.shape[2:])

    def _embed(self, formula):
        """theta (B, N, d), phi (B, M, d), g (B, M, c)."""
        pool = next((f for f in formula.faults if FAULTS[f].check == "pooling"), "maxima")
        names = ("phi", "theta") if "theta and phi exchanged" in formula else ("theta", "phi")
        if formula.instantiation == "gaussian":
            names = None
        key = formula.subsample, pool, names
        if key not in self._embedded:
            self._embedded[key] = self._maps(formula.subsample, _POOLS[pool], names)
        everything = "theta, phi and g scrambled" in formula
        return tuple(
            self._rows(maps, everything or f"{name} scrambled" in formula)
            for name, maps in zip(("theta", "phi", "g"), self._embedded[key], strict=True)
        )

    def _maps(self, subsample, pool, names):
        keys = pool(self.x) if subsample == "before" else self.x
        theta = self._convolve(names[0], self.x) if names else self.x
        phi = self._convolve(names[1], keys) if names else keys
        g = self._convolve("g", keys)
        return (theta, pool(phi), pool(g)) if subsample == "after" else (theta, phi, g)

    def _rows(self, maps, scrambled):
        batch, channels = maps.shape[:2]
        flat = maps.reshape(batch, channels, -1)
        if not scrambled:
            return flat.swapaxes(1, 2)
        if self.channels_last:
            rows = np.ascontiguousarray(flat.swapaxes(1, 2))
            return rows.reshape(batch, channels, -1).swapaxes(1, 2)
        return np.ascontiguousarray(flat).reshape(batch, -1, channels)

    def _weights_of_pairs(self, formula, theta, phi):
        """f(x_i, x_j) / C, (B, N, M)."""
        (_, queries, width), keys = theta.shape, phi.shape[1]
        if formula.instantiation == "concatenation":
            w_f, shift = self.weights["w_f"], self.weights["w_f.bias"]
            f = (theta @ w_f[:width])[:, :, None] + (phi @ w_f[width:])[:, None, :] + shift
            f = f if "no ReLU in f" in formula else np.maximum(f, 0)
        else:
            f = theta @ phi.swapaxes(1, 2)
        f = f * self._factor(formula, width)
        if formula.instantiation in SOFTMAX_FORMS or "softmax of the concatenation" in formula:
            return _softmax_over(f, next((_AXES[n] for n in formula.faults if n in _AXES), 2))
        if "no 1/M" in formula:
            return f
        return f / (queries if "1/N" in formula else width if "1/d" in formula else keys)

    def _factor(self, formula, width):
        if "linear form scaled" in formula:
            return width**-0.5
        if not formula.scale:
            return 1.0
        if "scale inverted" in formula:
            return width**0.5
        if "scale from in_channels" in formula:
            return self.channels**-0.5
        return 1 / width if "scale without the root" in formula else width**-0.5

    def _back(self, formula, y):
        """(B, N, c) -> (B, c, *size)."""
        batch, _, channels = y.shape
        if "y scrambled" in formula:
            if self.channels_last:
                wrong = np.ascontiguousarray(y.swapaxes(1, 2)).reshape(batch, *self.size, channels)
                return np.moveaxis(wrong, -1, 1)
            return np.ascontiguousarray(y).reshape(batch, channels, *self.size)
        y = y.swapaxes(1, 2)
        if "positions of y reversed" in formula:
            return y.reshape(batch, channels, *self.size[::-1]).transpose(0, 1, *range(self.ndim + 1, 1, -1))
        return y.reshape(batch, channels, *self.size)


_AXES = {"softmax over i": 1, "softmax over the batch": 0, "softmax over all pairs": (1, 2)}


def _softmax_over(f, axis):
    f = np.exp(f - f.max(axis=axis, keepdims=True))
    return f / f.sum(axis=axis, keepdims=True)


def _windows(maps, sides):
    """(B, C, *size) with each axis cut into windows: (B, C, places, side, places, side, ...)."""
    sides = [min(side, size) for side, size in zip(sides, maps.shape[2:], strict=True)]
    counts = [size // side for side, size in zip(sides, maps.shape[2:], strict=True)]
    kept = tuple(slice(0, count * side) for count, side in zip(counts, sides, strict=True))
    split = [length for pair in zip(counts, sides, strict=True) for length in pair]
    cut = maps[(slice(None), slice(None), *kept)].reshape(*maps.shape[:2], *split)
    return cut, tuple(range(3, cut.ndim, 2))


def _pool(reduce, sides_of):
    def pool(maps):
        cut, inside = _windows(maps, sides_of(maps.ndim - 2))
        return reduce(cut, axis=inside)

    return pool


def _pool_flattened(maps):
    cut, inside = _windows(maps.reshape(*maps.shape[:2], -1), (2,))
    return cut.max(axis=inside)


_POOLS = {
    "maxima": _pool(np.max, POOL_WINDOW.get),
    "averages pooled": _pool(np.mean, POOL_WINDOW.get),
    "time pooled": _pool(np.max, lambda ndim: (2,) * ndim),
    "pooled along the flattened axis": _pool_flattened,
}


def _split(x, formula):
    """Cut (B, C, T, H, W) into the parts in which positions look at each other: (B', C, t, h, w)."""
    batch, channels, frames, height, width = x.shape
    group = formula.frames_per_group or frames
    if formula.attention == "space":
        group = 1
    x = x.reshape(batch, channels, frames // group, group, height, width).swapaxes(1, 2)
    if formula.attention == "time":
        return np.moveaxis(x, (4, 5), (1, 2)).reshape(-1, channels, group, 1, 1)
    return x.reshape(-1, channels, group, height, width)


def _join(parts, shape, formula):
    """The way back from `_split` to `shape`."""
    batch, channels, frames, height, width = shape
    group = parts.shape[2]
    if formula.attention == "time":
        x = parts.reshape(batch, height, width, frames // group, channels, group)
        x = np.moveaxis(x, (1, 2), (4, 5))
    else:
        x = parts.reshape(batch, frames // group, channels, group, height, width)
    return x.swapaxes(1, 2).reshape(shape)


def literal(formula: Formula, x, weights, norm) -> np.ndarray:
    """z by `nlutils.reference.non_local_block`, sample by sample; `formula` has no faults.

    A bias of w_f, which the paper does not have, becomes a channel of theta that is 1 everywhere.
    """
    weights = dict(weights)
    shift = weights.pop("w_f.bias", 0.0)
    if shift:
        width = len(weights["theta.weight"])
        for name, value in (("theta", 1.0), ("phi", 0.0)):
            weights[f"{name}.weight"] = np.vstack([weights[f"{name}.weight"], np.zeros(x.shape[1])])
            weights[f"{name}.bias"] = np.append(weights[f"{name}.bias"], value)
        weights["w_f"] = np.concatenate([weights["w_f"][:width], [shift], weights["w_f"][width:], [0.0]])
    split = formula.attention != "spacetime" or formula.frames_per_group
    parts = _split(x, formula) if split else x
    options = {"subsample": formula.subsample, "scale": formula.scale}
    z = np.stack(
        [reference.non_local_block(part, weights, formula.instantiation, **options) for part in parts]
    )
    if norm is not None:
        z = parts + norm(z - parts)
    return _join(z, x.shape, formula) if split else z
