"""Which frames of a clip a network sees: always as many as asked for, from a clip of any length."""

import numpy as np

from nlutils.arguments import positive_integer

__all__ = ["sample_indices", "sample_windows", "segment_indices"]


def sample_indices(length: int, frames: int, *, stride: int = 1, position="centre", rng=None) -> np.ndarray:
    """Choose `frames` frames of a clip of `length` frames, `stride` apart.

    `position` says where the window of (frames - 1) * stride + 1 frames lies: "start", "centre", "end", a
    number from 0 (start) to 1 (end), or "random", which needs `rng`, a numpy.random.Generator.

    A clip shorter than the window has no room for the stride. It is used whole: the indices are spread evenly
    from its first frame to its last, and frames repeat when it has fewer than `frames`.

    Returns `frames` non-decreasing int64 indices from 0 to length - 1. Raises ValueError for a wrong
    argument.
    """
    length, frames = positive_integer("length", length), positive_integer("frames", frames)
    stride = positive_integer("stride", stride)
    share = _share(position, rng)
    room = length - ((frames - 1) * stride + 1)
    if room < 0:
        return _spread(length, frames)
    start = rng.integers(room + 1) if share is None else int(share * room + 0.5)
    return start + stride * np.arange(frames, dtype=np.int64)


def sample_windows(length: int, frames: int, windows: int, *, stride: int = 1) -> np.ndarray:
    """`windows` windows of sample_indices, evenly from the clip's start to its end; one window is the
    centre's.

    This is how clips are cut at test time (Wang et al., CVPR 2018, section 4: ten clips along a video).
    Returns int64 (windows, frames).
    """
    windows = positive_integer("windows", windows)
    positions = np.linspace(0, 1, windows) if windows > 1 else [0.5]
    return np.stack([sample_indices(length, frames, stride=stride, position=float(p)) for p in positions])


def segment_indices(length: int, frames: int, *, rng=None) -> np.ndarray:
    """Cut the whole clip into `frames` equal segments and choose one frame in each.

    Without `rng` the middle one; with `rng`, a numpy.random.Generator, any one (Wang et al., "Temporal
    segment networks", ECCV 2016). Segments of a clip with fewer than `frames` frames share frames. Returns
    `frames` non-decreasing int64 indices. Raises ValueError for a wrong argument.
    """
    length, frames = positive_integer("length", length), positive_integer("frames", frames)
    within = 0.5 if rng is None else _generator(rng).random(frames)
    indices = ((np.arange(frames) + within) * length / frames).astype(np.int64)
    return np.minimum(indices, length - 1)


def _spread(length: int, frames: int) -> np.ndarray:
    # Whole numbers only, halves up: the same on every machine. One frame cannot get here: its window always
    # fits.
    steps = np.arange(frames, dtype=np.int64)
    return (2 * steps * (length - 1) + frames - 1) // (2 * (frames - 1))


def _share(position, rng) -> float | None:
    """The position as a share of the room, 0 to 1; None stands for a random one."""
    named = {"start": 0.0, "centre": 0.5, "end": 1.0}
    if isinstance(position, str):
        if position == "random":
            _generator(rng)
            return None
        share = named.get(position)
    else:
        share = position
    if rng is not None:
        raise ValueError(f"rng is given, but position={position!r} is not random; use position='random'")
    if isinstance(share, bool) or not isinstance(share, int | float | np.number) or not 0 <= share <= 1:
        allowed = "'start', 'centre', 'end', 'random' or a number from 0 to 1"
        raise ValueError(f"position={position!r} is not known; use {allowed}")
    return float(share)


def _generator(rng) -> np.random.Generator:
    if not isinstance(rng, np.random.Generator):
        raise ValueError(f"rng={rng!r} must be a numpy.random.Generator, such as numpy.random.default_rng(0)")
    return rng
