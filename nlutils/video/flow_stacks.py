"""Stacks of optical flow: what a temporal network sees of the motion around one frame.

Simonyan and Zisserman, Two-Stream Convolutional Networks for Action Recognition in Videos, NIPS 2014,
section 3.1, https://arxiv.org/abs/1406.2199
"""

import numpy as np

from nlutils.arguments import all_finite, one_of, positive_integer
from nlutils.video.flow import warp_back

__all__ = ["SAMPLING", "as_channels", "as_clip", "flow_stack", "subtract_mean"]

# Where the second and later fields of a stack are read: at the same pixel, or where its content went.
SAMPLING = ("place", "trajectory")


def flow_stack(
    flow,
    frame: int,
    length: int = 10,
    *,
    sampling: str = "place",
    backward=None,
    centred: bool = True,
) -> np.ndarray:
    """The stack of `length` = L flow fields of one frame: float32 (L, H, W, 2), pixels a frame, (dx, dy).

    flow      (T-1, H, W, 2): `flow[t]` leads from frame t to frame t + 1, as `optical_flow` returns it
    frame     the frame, tau in the paper, counted from 0: the first field is flow[frame]
    sampling  "place": every field as it is (optical flow stacking, equation 1). "trajectory": field k is read
              at p_k, where p_1 is the pixel and p_k = p_(k-1) + d_(tau+k-2)(p_(k-1)) (equation 2); between
              pixels linearly, outside the picture at its border
    backward  None, or (T-1, H, W, 2): `backward[t]` leads from frame t + 1 to frame t, made by
              `optical_flow(frames[::-1])[::-1]`. Then the stack is bi-directional: L/2 fields forward from
              the frame, then L/2 backward, both away from it (the paper leaves the order open)
    centred   subtract from each field of the stack its mean vector ("mean flow subtraction"). Trajectories
              are followed before, with the whole motion

    Raises ValueError for shapes that do not fit, for NaN and infinity (here and below), and for a frame that
    has too few fields before or behind it.
    """
    one_of("sampling", sampling, SAMPLING)
    length = positive_integer("length", length)
    flow = _checked("flow", flow)
    if backward is None:
        _check_frame(frame, 0, len(flow) - length, f"{length} fields ahead of it")
        stack = _sampled(flow[frame : frame + length], sampling)
    else:
        backward = _checked("backward", backward)
        if backward.shape != flow.shape:
            raise ValueError(f"backward {backward.shape} must have the shape of flow, {flow.shape}")
        if length % 2:
            raise ValueError(f"length={length} must be even: half of the fields lead backward")
        half = length // 2
        _check_frame(frame, half, len(flow) - half, f"{half} fields before and {half} ahead of it")
        back = backward[frame - half : frame][::-1]
        stack = np.concatenate([_sampled(fields, sampling) for fields in (flow[frame : frame + half], back)])
    return subtract_mean(stack) if centred else stack


def subtract_mean(fields) -> np.ndarray:
    """`fields` (..., H, W, 2) without their mean vectors, each its own; float32."""
    fields = _fields("fields", np.asarray(fields, np.float32), ("...",))
    return fields - fields.mean(axis=(-3, -2), keepdims=True, dtype=np.float64).astype(np.float32)


def as_channels(stack) -> np.ndarray:
    """A stack (..., L, H, W, 2) as channels (..., 2 L, H, W), in the paper's order: dx, dy, dx, dy, ..."""
    stack = _fields("stack", stack, ("...", "L"))
    channels = np.moveaxis(stack, -1, -3)  # (..., L, 2, H, W)
    return channels.reshape(*channels.shape[:-4], -1, *channels.shape[-2:])


def as_clip(stacks) -> np.ndarray:
    """S stacks (S, L, H, W, 2) as one clip of flow, (2, S L, H, W).

    Networks with an option `stack` = L take a batch of such clips and cut them into the stacks again.
    """
    stacks = _fields("stacks", stacks, ("S", "L"))
    return np.moveaxis(stacks.reshape(-1, *stacks.shape[2:]), -1, 0)


def _sampled(fields, sampling):
    return fields.copy() if sampling == "place" else _along_trajectories(fields)


def _along_trajectories(fields):
    """Field k read at p_k, for k = 1 ... L: (L, H, W, 2) -> the same shape."""
    way = np.zeros_like(fields[0])  # p_k - p_1
    read = []
    for field in fields:
        # What warp_back brings back by `way` is the picture at p_1 + way.
        read.append(warp_back(np.stack([field, field]), way[None])[0])
        way = way + read[-1]
    return np.stack(read)


def _check_frame(frame, first, last, needs):
    if isinstance(frame, bool) or not hasattr(frame, "__index__") or not first <= frame <= last:
        allowed = f"use {first} to {last}" if first <= last else "the clip is too short: use a smaller length"
        raise ValueError(f"frame={frame!r} needs {needs}; {allowed}")


def _checked(name, flow):
    flow = _fields(name, np.asarray(flow, np.float32), ("T-1",))
    if min(flow.shape[1:3]) < 2:
        raise ValueError(f"{name} of shape {flow.shape} must have two pixels a side or more")
    return flow


def _fields(name, values, leading) -> np.ndarray:
    """`values` (*leading, H, W, 2), where "..." stands for any number of axes, without NaN and infinity."""
    values = np.asarray(values)
    axes = len(leading) + 3
    fits = values.ndim >= axes - 1 if "..." in leading else values.ndim == axes
    if not fits or values.shape[-1] != 2:
        raise ValueError(f"{name} of shape {values.shape} must be ({', '.join(leading)}, H, W, 2)")
    return all_finite(name, values)
