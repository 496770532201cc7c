"""Optical flow: estimated with OpenCV or scikit-image, cached, used to warp, measured against the truth."""

import itertools
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import version

import cv2
import numpy as np

from nlutils.arguments import one_of
from nlutils.video.cache import cached_array

__all__ = ["METHODS", "end_point_error", "flow_cached", "optical_flow", "warp_back"]

METHODS = ("dis", "farneback", "tvl1")

# All methods work on a pyramid of smaller pictures, and DIS on patches of 8 x 8 pixels.
SMALLEST = 16

# The rest are scikit-image's own values. These two lower the end-point error on procedural clips (64 x 64
# pixels, seed 7) from 0.31 to 0.18 pixels; twice the warps gain less than 0.01, for nearly twice the time.
TVL1 = {"attachment": 30, "prefilter": True}


def optical_flow(frames, method: str = "dis", *, subtract_median: bool = False) -> np.ndarray:
    """Estimate where each pixel of a frame lies in the next one.

    `frames` is uint8, (T, H, W, 3) RGB or (T, H, W) grey, at least two frames of 16 x 16 pixels. Returns
    float32 (T-1, H, W, 2), pixels a frame, (dx, dy): what is at (x, y) in frame t is at (x + dx, y + dy) in
    frame t + 1. `method` is one of

    - "dis": Kroeger, Timofte, Dai and Van Gool, "Fast optical flow using dense inverse search", ECCV 2016;
      OpenCV's preset "medium", refined to full resolution, for clips are small;
    - "farneback": Farnebäck, "Two-frame motion estimation based on polynomial expansion", SCIA 2003; OpenCV;
    - "tvl1": Zach, Pock and Bischof, "A duality based approach for realtime TV-L1 optical flow", DAGM 2007,
      as in Sánchez, Meinhardt-Llopis and Facciolo, "TV-L1 optical flow estimation", IPOL 2013; scikit-image,
      with attachment 30 (the papers' lambda, for grey values from 0 to 1) and a median filter before each
      warp. It misses motion of more than about an eighth of the shorter side of the picture, for the
      smallest picture of its pyramid has 16 to 32 pixels a side.

    Mean end-point error on 12 procedural clips of 64 x 64 pixels, other clips than those on which the values
    of "tvl1" were chosen: "dis" 0.20, "farneback" 0.59, "tvl1" 0.18, and 1.15 for "nothing moves". A pair of
    frames takes 2 ms of a processor ("dis"), 1.5 ms and 60 ms; of 320 x 240 pixels, 40 ms, 25 ms and 0.6 s.

    `subtract_median` takes the median over the picture from each frame's dx and dy: what is left is motion
    against the background, when the background fills most of the picture. Raises ValueError for frames of
    another shape or type.
    """
    one_of("method", method, METHODS)
    grey = _grey(frames)
    prepare = {"dis": _dis, "farneback": _farneback, "tvl1": _tvl1}[method]
    with _one_thread():
        estimate = prepare()
        flow = np.stack([estimate(first, second) for first, second in itertools.pairwise(grey)])
    if subtract_median:
        flow -= np.median(flow, axis=(1, 2), keepdims=True)
    return flow.astype(np.float32, copy=False)


def flow_cached(
    key: str, read: Callable[[], np.ndarray], method: str = "dis", *, subtract_median: bool = False
) -> np.ndarray:
    """`optical_flow` of the frames that `read()` returns, from disk when it was computed before.

    `key` names everything that the frames depend on, such as the digest of the clip's file and its size. The
    flow is computed anew when the version of the library that estimates it changes.
    """
    one_of("method", method, METHODS)
    settings = f"{method} median={bool(subtract_median)} {_estimator(method)}"
    return cached_array(
        "flow", f"{settings} {key}", lambda: optical_flow(read(), method, subtract_median=subtract_median)
    )


def end_point_error(estimate, truth, valid=None) -> float:
    """The mean length of the difference of two flows (..., 2), in pixels; over `valid` (...) when given.

    The measure of Baker et al., "A database and evaluation methodology for optical flow", IJCV 2011.
    Raises ValueError when the shapes differ or no pixel is valid.
    """
    estimate, truth = np.asarray(estimate, float), np.asarray(truth, float)
    if estimate.shape != truth.shape or estimate.shape[-1:] != (2,):
        raise ValueError(
            f"estimate {estimate.shape} and truth {truth.shape} must have the same shape (..., 2)"
        )
    error = np.hypot(*np.moveaxis(estimate - truth, -1, 0))
    if valid is None:
        return float(error.mean())
    valid = np.asarray(valid)
    if valid.dtype != bool or valid.shape != error.shape:
        raise ValueError(f"valid is {valid.dtype} {valid.shape}; it must be bool {error.shape}")
    if not valid.any():
        raise ValueError("valid is False everywhere, so there is no pixel to measure")
    return float(error[valid].mean())


def warp_back(frames, flow) -> np.ndarray:
    """Bring each frame back to the one before it: result[t] at (x, y) is frames[t + 1] at (x + dx, y + dy).

    `frames` is (T, H, W) or (T, H, W, C), `flow` (T-1, H, W, 2); values between pixels are interpolated
    linearly, outside the picture its border goes on. Returns float32 (T-1, ...): where the flow is right and
    nothing hides the place, it equals frames[:-1].
    """
    frames, flow = np.asarray(frames), np.asarray(flow, np.float32)
    if frames.ndim not in (3, 4) or flow.shape != (len(frames) - 1, *frames.shape[1:3], 2):
        raise ValueError(f"frames {frames.shape} need a flow of shape (T-1, H, W, 2), not {flow.shape}")
    height, width = frames.shape[1:3]
    x = np.clip(np.arange(width) + flow[..., 0], 0, width - 1)
    y = np.clip(np.arange(height)[:, None] + flow[..., 1], 0, height - 1)
    left, top = np.minimum(x.astype(int), width - 2), np.minimum(y.astype(int), height - 2)
    trailing = (...,) + (None,) * (frames.ndim - 3)
    right_share, lower_share = (x - left)[trailing], (y - top)[trailing]
    time = np.arange(1, len(frames))[:, None, None]

    def row(at):
        first, second = frames[time, at, left], frames[time, at, left + 1]
        return first * (1 - right_share) + second * right_share

    return (row(top) * (1 - lower_share) + row(top + 1) * lower_share).astype(np.float32)


def _grey(frames) -> list[np.ndarray]:
    frames = np.asarray(frames)
    if frames.dtype != np.uint8:
        raise ValueError(f"frames are {frames.dtype}; optical flow needs uint8, 0 to 255")
    if frames.ndim not in (3, 4) or (frames.ndim == 4 and frames.shape[-1] != 3):
        raise ValueError(f"frames have shape {frames.shape}; optical flow needs (T, H, W, 3) or (T, H, W)")
    if len(frames) < 2:
        raise ValueError(f"there is {len(frames)} frame; motion needs two frames or more")
    if min(frames.shape[1:3]) < SMALLEST:
        raise ValueError(
            f"frames have shape {frames.shape}; optical flow needs {SMALLEST} x {SMALLEST} pixels"
        )
    if frames.ndim == 4:
        return [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in frames]
    return [np.ascontiguousarray(frame) for frame in frames]


def _dis():
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    dis.setFinestScale(0)
    return lambda first, second: dis.calc(first, second, None)


def _farneback():
    return lambda first, second: cv2.calcOpticalFlowFarneback(
        first,
        second,
        None,
        pyr_scale=0.5,
        levels=3,
        winsize=9,
        iterations=5,
        poly_n=5,
        poly_sigma=1.1,
        flags=0,
    )


def _tvl1():
    from skimage.registration import optical_flow_tvl1  # slow to import, and the other methods do not need it

    def estimate(first, second):
        # What "attachment" means depends on the range of the grey values: here 0 to 1.
        rows, columns = optical_flow_tvl1(first / np.float32(255), second / np.float32(255), **TVL1)
        return np.stack([columns, rows], axis=-1)

    return estimate


def _estimator(method: str) -> str:
    """The library that computes `method`, its version, and the parameters that are chosen here."""
    if method == "tvl1":
        parameters = " ".join(f"{name}={value}" for name, value in TVL1.items())
        return f"scikit-image={version('scikit-image')} {parameters}"
    return f"opencv={cv2.__version__}"


@contextmanager
def _one_thread():
    # DIS cuts the picture in as many strips as there are threads, and the strips' borders show in the result.
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)
