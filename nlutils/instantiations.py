"""What the four instantiations ask of their arguments: rules that the NumPy, PyTorch and Keras code share.

Wang, Girshick, Gupta, He: Non-local Neural Networks, CVPR 2018, section 3.2. No framework is imported here;
shapes come in as tuples, and None stands for a size that Keras does not know yet.
"""

import math
from numbers import Real

from nlutils.arguments import one_of, positive_integer

__all__ = [
    "INSTANTIATIONS",
    "POOL_WINDOW",
    "SOFTMAX_FORMS",
    "check_block",
    "check_map",
    "check_operation",
    "check_shapes",
]

INSTANTIATIONS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
# C(x) is the sum of f over j for these two, the number of positions for the others.
SOFTMAX_FORMS = ("gaussian", "embedded_gaussian")
# Sub-sampling halves height and width, never time.
POOL_WINDOW = {1: (2,), 2: (2, 2), 3: (1, 2, 2)}
_AXES = {1: "N", 2: "H, W", 3: "T, H, W"}


def check_operation(instantiation: str, w_f, scale: float) -> None:
    """Raise ValueError when `instantiation`, `w_f` and `scale` do not go together."""
    one_of("instantiation", instantiation, INSTANTIATIONS)
    if instantiation == "concatenation" and w_f is None:
        raise ValueError(
            "w_f=None, but instantiation='concatenation' needs it: a vector of 2d numbers, "
            "first the half for theta, then the half for phi"
        )
    if instantiation != "concatenation" and w_f is not None:
        raise ValueError(
            f"w_f was given, but instantiation={instantiation!r} has none; "
            "leave it out, or use instantiation='concatenation'"
        )
    if isinstance(scale, bool) or not isinstance(scale, Real) or not abs(scale) < math.inf:
        raise ValueError(f"scale={scale!r} must be a finite number; it multiplies theta_i . phi_j")
    if scale != 1 and instantiation not in SOFTMAX_FORMS:
        raise ValueError(
            f"scale={scale!r} does not apply to instantiation={instantiation!r}; leave it at 1.0, "
            f"or use one of {', '.join(map(repr, SOFTMAX_FORMS))}"
        )


def check_shapes(theta, phi, g=None, w_f=None, *, batched: bool = True) -> None:
    """Raise ValueError unless the shapes fit: theta (B, N, d), phi (B, M, d), g (B, M, c), w_f (2d,).

    Without `batched` there is no B. `g` and `w_f` are checked when given.
    """
    expected = {"theta": (theta, "N, d"), "phi": (phi, "M, d"), "g": (g, "M, c")}
    for name, (shape, axes) in expected.items():
        if shape is not None and len(shape) != 2 + batched:
            raise ValueError(f"{name} of shape {tuple(shape)} must have the axes ({'B, ' * batched}{axes})")
    if batched:
        _same("theta", theta, "phi", phi, 0, "the batch size B")
    _same("theta", theta, "phi", phi, -1, "the width d")
    if g is not None:
        if batched:
            _same("phi", phi, "g", g, 0, "the batch size B")
        _same("phi", phi, "g", g, -2, "the number of positions M")
    if phi[-2] is not None and phi[-2] < 1:
        raise ValueError(f"phi of shape {tuple(phi)} has no position to attend to; M must be 1 or more")
    if w_f is not None and theta[-1] is not None and tuple(w_f) != (2 * theta[-1],):
        raise ValueError(
            f"w_f of shape {tuple(w_f)} does not fit theta of width {theta[-1]}; "
            f"its shape must be ({2 * theta[-1]},): first the half for theta, then the half for phi"
        )


def _same(name, shape, other_name, other_shape, axis, meaning):
    size, other = shape[axis], other_shape[axis]
    if size is not None and other is not None and size != other:
        raise ValueError(
            f"{name} of shape {tuple(shape)} and {other_name} of shape {tuple(other_shape)} do not fit: "
            f"{meaning} must be equal, and is {size} and {other}"
        )


def check_block(
    in_channels,
    inner_channels,
    ndim,
    instantiation,
    subsample,
    scale,
    norm,
    zero_init,
    attention,
    frames_per_group,
) -> None:
    """Raise ValueError when the options of a `NonLocalBlock` are wrong or contradict each other."""
    for name, value in (("in_channels", in_channels), ("inner_channels", inner_channels)):
        if value is not None:
            positive_integer(name, value)
    one_of("ndim", ndim, POOL_WINDOW)
    one_of("instantiation", instantiation, INSTANTIATIONS)
    one_of("subsample", subsample, (None, "before", "after"))
    for name, value in (("scale", scale), ("norm", norm), ("zero_init", zero_init)):
        one_of(name, value, (True, False))
    if scale and instantiation not in SOFTMAX_FORMS:
        raise ValueError(
            f"scale=True does not apply to instantiation={instantiation!r}; "
            f"use False, or one of {', '.join(map(repr, SOFTMAX_FORMS))}"
        )
    one_of("attention", attention, ("spacetime", "space", "time"))
    if attention != "spacetime" and ndim != 3:
        raise ValueError(
            f"attention={attention!r} needs ndim=3, and ndim={ndim}; use 'spacetime' for all positions"
        )
    if attention == "time" and subsample is not None:
        raise ValueError(
            f"subsample={subsample!r} pools over space, but attention='time' looks at one place; "
            "use subsample=None"
        )
    if frames_per_group is not None:
        positive_integer("frames_per_group", frames_per_group)
        if ndim != 3 or attention == "space":
            raise ValueError(
                f"frames_per_group={frames_per_group} needs ndim=3 and attention='spacetime' or 'time'; "
                f"here ndim={ndim}, attention={attention!r}; use frames_per_group=None"
            )


def check_map(shape, channels, ndim: int, frames_per_group, *, channels_last: bool) -> None:
    """Raise ValueError unless `shape` is that of a batch of feature maps that the block can take."""
    shape = tuple(shape)
    axes = f"(B, {_AXES[ndim]}, C)" if channels_last else f"(B, C, {_AXES[ndim]})"
    if len(shape) != ndim + 2:
        raise ValueError(f"x of shape {shape} must have the axes {axes}, because ndim={ndim}")
    found = shape[-1 if channels_last else 1]
    if channels is not None and found is not None and found != channels:
        raise ValueError(
            f"x of shape {shape} has {found} channels; the block has in_channels={channels}, axes {axes}"
        )
    if 0 in (shape[1:-1] if channels_last else shape[2:]):
        raise ValueError(f"x of shape {shape} has no position; every axis of {axes} but B must be 1 or more")
    frames = shape[1 if channels_last else 2]
    if frames_per_group is not None and frames is not None and frames % frames_per_group:
        raise ValueError(
            f"x of shape {shape} has {frames} frames; frames_per_group={frames_per_group} must divide them"
        )
