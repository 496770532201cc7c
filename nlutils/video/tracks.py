"""Dense trajectories: points of a grid followed through dense flow, the camera's motion taken away."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real

import cv2
import numpy as np

from nlutils.arguments import all_finite, one_of, positive_integer
from nlutils.video.flow import optical_flow

__all__ = [
    "Level",
    "Limits",
    "Tracks",
    "camera_motion",
    "dense_tracks",
    "follow_points",
    "motion_levels",
    "remove_camera",
    "sample_points",
]

# The picture gets smaller by this factor from one level to the next.
SCALE_STEP = math.sqrt(2)
# Sides of the flow's median filter, in pixels, that OpenCV has for floats; 1 is none.
MEDIANS = (1, 3, 5)
# Matches for the camera: corners at most, their quality and distance; matches and inliers at least. The
# released code has a quality of 0.001, which leaves nothing of a dim background behind a sharp figure.
CORNERS, CORNER_QUALITY, CORNER_DISTANCE = 1000, 0.0001, 3
MATCHES, INLIERS = 50, 25
# A match of two pictures' keypoints that is further apart than this, in pixels, is none.
REACH = 25


@dataclass(frozen=True)
class Level:
    """A clip at one spatial scale.

    scale    1, sqrt 2, 2, ...: so many times smaller than the clip
    ratio    pixels of the clip a pixel of this level, along x and y: `scale` up to the rounding of the size
    grey     uint8 (T, h, w)
    flow     float32 (T-1, h, w, 2), (dx, dy) in pixels of this level, median filtered
    motion   the same without the camera's part
    """

    scale: float
    ratio: tuple[float, float]
    grey: np.ndarray
    flow: np.ndarray
    motion: np.ndarray

    def from_clip(self, points):
        """Positions in the clip as positions at this level; a pixel's position is that of its centre."""
        return (np.asarray(points) + 0.5) / self.ratio - 0.5

    def to_clip(self, points):
        """Positions at this level as positions in the clip."""
        return (np.asarray(points) + 0.5) * self.ratio - 0.5


@dataclass(frozen=True)
class Limits:
    """Which tracks are kept; pixels of the clip. The numbers are those of the released improved trajectories.

    least_spread   a track is static when the standard deviations of its x and its y are both below this
    most_spread    a track is random when one of them is above this
    longest_step   a step longer than this, and
    step_share     longer than this share of the whole way, is a jump
    least_motion   a track whose longest step without the camera's motion is not above this shows the camera

    They were chosen for videos of about 320 x 240 pixels; divide the lengths for smaller ones. Raises
    ValueError for a limit that is no number.
    """

    least_spread: float = math.sqrt(3)
    most_spread: float = 50.0
    longest_step: float = 20.0
    step_share: float = 0.7
    least_motion: float = 1.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
                raise ValueError(f"{name}={value!r} must be a number of pixels (of step_share: a share)")

    @classmethod
    def of(cls, limits: "Limits | Mapping | None") -> "Limits":
        """`limits`, also given as a dict of some of the fields, or as None for the defaults."""
        if isinstance(limits, Mapping):
            known = [field.name for field in fields(cls)]
            return cls(**{one_of("limits", name, known): value for name, value in limits.items()})
        if limits is not None and not isinstance(limits, cls):
            raise ValueError(f"limits={limits!r} must be a Limits, a dict of its fields, or None")
        return limits or cls()

    def keep(self, positions, motion) -> np.ndarray:
        """bool (count,): the tracks to keep, of `positions` (count, L+1, 2) and `motion` (count, L, 2)."""
        spread = positions.std(axis=1)
        steps = np.hypot(*np.moveaxis(np.diff(positions, axis=1), -1, 0))
        longest = steps.max(axis=1, initial=0)
        jumps = (longest > self.longest_step) & (longest > self.step_share * steps.sum(axis=1))
        own = np.hypot(*np.moveaxis(motion, -1, 0)).max(axis=1, initial=0)
        static = (spread < self.least_spread).all(axis=1)
        random = (spread > self.most_spread).any(axis=1)
        return ~(static | random | jumps) & (own > self.least_motion)


@dataclass(frozen=True)
class Tracks:
    """Points followed over L + 1 frames.

    positions   float32 (count, L+1, 2): (x, y) in pixels of the clip, in the frames start ... start + L
    motion      float32 (count, L, 2): the steps without the camera's motion, in pixels of the clip
    start       int64 (count,): the first frame
    scale       float32 (count,): the `scale` of the level that they were followed at
    """

    positions: np.ndarray
    motion: np.ndarray
    start: np.ndarray
    scale: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def length(self) -> int:
        """L: the steps of a track."""
        return self.motion.shape[1]

    def where(self, chosen) -> "Tracks":
        """The tracks at the indices, or of the mask, `chosen`."""
        return Tracks(*(values[chosen] for values in (self.positions, self.motion, self.start, self.scale)))


def motion_levels(
    frames,
    flow=None,
    *,
    method: str = "dis",
    scales: int = 8,
    smallest: int = 32,
    median: int = 5,
    camera: bool = True,
) -> list[Level]:
    """A clip and its optical flow at several scales, with and without the camera's motion.

    `frames` is uint8 (T, H, W, 3) RGB or (T, H, W) grey. `flow` is float (T-1, H, W, 2), pixels a frame;
    without it, `optical_flow(frames, method)`. There are up to `scales` levels, each smaller than the one
    before by the square root of 2, as long as the shorter side has `smallest` pixels (the patch of the
    descriptors). The flow is median filtered over `median` x `median` pixels (1, 3 or 5): that makes it sharp
    at the borders of what moves, and wipes out what is thinner than half the filter, such as the limbs of a
    figure of 30 pixels. `camera=False` leaves the camera's motion in.

    Differences from the released code of the paper below: flow is estimated once and made smaller, not
    estimated at each scale; its method is DIS, not Farnebäck's (`method="farneback"`); and the camera's
    motion is taken out by `remove_camera`, where the paper warps the second frame and estimates again.

    Wang and Schmid, "Action recognition with improved trajectories", ICCV 2013. Raises ValueError for frames
    or a flow of another type or shape, and for a flow with NaN or infinity.
    """
    one_of("median", median, MEDIANS)
    positive_integer("smallest", smallest)
    frames = np.asarray(frames)
    if frames.dtype != np.uint8:
        raise ValueError(f"frames are {frames.dtype}; tracks need uint8, 0 to 255")
    flow = optical_flow(frames, method) if flow is None else np.asarray(flow, np.float32)
    if frames.ndim not in (3, 4) or flow.shape != (len(frames) - 1, *frames.shape[1:3], 2):
        raise ValueError(f"flow has shape {flow.shape}; frames {frames.shape} need (T-1, H, W, 2)")
    all_finite("flow", flow)
    if frames.ndim == 4:
        frames = [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in frames]
    grey = np.stack(frames)
    filtered = _median(flow, median)
    height, width = grey.shape[1:]
    homographies = camera_motion(grey, filtered) if camera else None
    levels = []
    for scale in (SCALE_STEP**level for level in range(positive_integer("scales", scales))):
        if levels and min(height, width) / scale < smallest:
            break
        size = (round(width / scale), round(height / scale))
        ratio = (width / size[0], height / size[1])
        small = _median(_resized(flow, size) / np.float32(ratio), median) if levels else filtered
        motion = small if homographies is None else remove_camera(small, _at_level(homographies, ratio))
        levels.append(Level(scale, ratio, _resized(grey, size), small, motion))
    return levels


def dense_tracks(
    levels: list[Level],
    *,
    step: int = 5,
    length: int = 15,
    quality: float = 0.001,
    limits: Limits | Mapping | None = None,
) -> Tracks:
    """Follow points of a grid at each level: the trajectories of the paper.

    In each frame every cell of `step` x `step` pixels that holds no point yet gets one at its middle, when
    the picture has structure there (see `sample_points`). A point moves with the median-filtered flow of the
    pixel that it is in, ends after `length` steps, and is dropped when it leaves the picture. `limits`, a
    `Limits` or some of its fields as a dict, says which of the finished tracks are kept.

    Wang, Kläser, Schmid and Liu, "Action recognition by dense trajectories", CVPR 2011, and Wang and Schmid,
    ICCV 2013; the defaults are those of the released code. Raises ValueError for a clip of `length` frames
    or fewer and for no levels.
    """
    positive_integer("step", step)
    limits = Limits.of(limits)
    if not levels:
        raise ValueError(f"levels={levels!r} holds no level; make them with motion_levels")
    frames = len(levels[0].grey)
    if frames <= positive_integer("length", length):
        raise ValueError(f"length={length} needs {length + 1} frames or more; the clip has {frames}")
    parts = [_tracks_of_level(level, step, length, quality) for level in levels]
    tracks = Tracks(*(np.concatenate(values) for values in zip(*parts, strict=True)))
    return tracks.where(limits.keep(tracks.positions, tracks.motion))


def _tracks_of_level(level, step, length, quality):
    """positions, motion, start and scale of all tracks that stay in the picture to their end."""
    paths, empty = [], np.zeros((0, 2), np.float32)
    for start in range(len(level.grey) - length):
        # Where the points of earlier frames are now; a track that has ended leaves its place.
        now = [path[:, start - first] for first, path in enumerate(paths) if start - first < length]
        points = sample_points(level.grey[start], np.concatenate([*now, empty]), step, quality)
        paths.append(follow_points(points, level.flow[start : start + length]))
    positions = np.concatenate(paths)
    start = np.repeat(np.arange(len(paths)), [len(path) for path in paths])
    whole = np.isfinite(positions).all(axis=(1, 2))
    positions, start = positions[whole], start[whole]
    motion = np.zeros((len(positions), length, 2), np.float32)
    for age in range(length):
        column, row = _pixels(positions[:, age], level.grey.shape[1:])
        motion[:, age] = level.motion[start + age, row, column] * level.ratio
    scale = np.full(len(start), level.scale, np.float32)
    return level.to_clip(positions).astype(np.float32), motion, start, scale


def follow_points(points, flow) -> np.ndarray:
    """Follow `points` (count, 2) from frame 0 through `flow` (T-1, H, W, 2): float32 (count, T, 2).

    Positions are (x, y) in pixels. A point moves with the flow of the pixel nearest to it; when it leaves the
    picture, it is NaN from then on.
    """
    height, width = flow.shape[1:3]
    path = np.full((len(points), len(flow) + 1, 2), np.nan, np.float32)
    path[:, 0] = points
    for time, field in enumerate(flow):
        followed = np.flatnonzero(np.isfinite(path[:, time, 0]))
        here = path[followed, time]
        column, row = _pixels(here, (height, width))
        there = here + field[row, column]
        outside = ((there < 0) | (there > (width - 1, height - 1))).any(axis=1)
        there[outside] = np.nan
        path[followed, time + 1] = there
    return path


def sample_points(grey, taken, step: int = 5, quality: float = 0.001) -> np.ndarray:
    """Middles of the cells of a grid where a point can be followed: float32 (count, 2), pixels (x, y).

    `grey` is uint8 (H, W); `taken` (n, 2) are points already there (NaN for none), whose cells are left out.
    A cell counts when, at its middle, the smaller eigenvalue of the picture's structure tensor (over 3 x 3
    pixels) is above `quality` times its largest value in the picture (Shi and Tomasi, CVPR 1994): where it is
    zero, a point could slide along an edge, or anywhere.
    """
    height, width = grey.shape
    rows, columns = height // step, width // step
    free = np.ones((rows, columns), bool)
    taken = np.asarray(taken)[np.isfinite(taken).all(axis=1)]
    column, row = (np.floor(taken).astype(int) // step).T
    inside = (column < columns) & (row < rows)
    free[row[inside], column[inside]] = False
    smaller = cv2.cornerMinEigenVal(np.ascontiguousarray(grey), blockSize=3, ksize=3)
    y, x = (np.mgrid[:rows, :columns] * step + step // 2).reshape(2, -1)
    chosen = free.ravel() & (smaller[y, x] > quality * smaller.max())
    return np.stack([x, y], axis=1)[chosen].astype(np.float32)


def camera_motion(grey, flow, *, tolerance: float = 1.0) -> np.ndarray:
    """The homographies that take each frame's background to the next frame: float64 (T-1, 3, 3).

    `grey` is uint8 (T, H, W), `flow` (T-1, H, W, 2). Matches are the flow at corners of the picture, and ORB
    keypoints where the picture is large enough for them (the paper: SURF, which OpenCV's wheel lacks). RANSAC
    finds the homography that most of them obey within `tolerance` pixels. It is the identity when there are
    50 matches or fewer, or 25 inliers or fewer, as in the released code.

    It fails where its assumption does: when something that moves fills most of the picture, that is taken for
    the background (the paper leaves out matches on people that a detector found; there is no detector here);
    when the background has no texture, nothing is found; and when the camera travels past things at several
    depths, no single homography describes what they do.
    """
    seen = [_keypoints(frame) for frame in grey]
    found = np.tile(np.eye(3), (len(flow), 1, 1))
    for time, field in enumerate(flow):
        here, there = _flow_matches(grey[time], field)
        more_here, more_there = _keypoint_matches(seen[time], seen[time + 1])
        here, there = np.concatenate([here, more_here]), np.concatenate([there, more_there])
        if len(here) <= MATCHES:
            continue
        homography, inliers = cv2.findHomography(here, there, cv2.RANSAC, tolerance)
        if homography is not None and inliers.sum() > INLIERS:
            found[time] = homography
    return found


def remove_camera(flow, homographies) -> np.ndarray:
    """`flow` (T-1, H, W, 2) as it is when frame t + 1 is first brought back by `homographies[t]`.

    What is at p in frame t and at p + flow(p) in frame t + 1 is at H^-1 (p + flow(p)) in frame t + 1 brought
    back, so its own motion is that minus p.
    """
    height, width = flow.shape[1:3]
    grid = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float64)
    result = np.empty(flow.shape, np.float32)
    for time, homography in enumerate(homographies):
        back = np.linalg.inv(homography)
        target = (grid + flow[time]) @ back[:, :2].T + back[:, 2]
        result[time] = target[..., :2] / target[..., 2:] - grid
    return result


def _at_level(homographies, ratio):
    """Homographies of the clip as those of a level: from the level to the clip, there, and back."""
    x, y = ratio
    up = np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2], [0, 0, 1]])
    return np.linalg.inv(up) @ homographies @ up


def _flow_matches(grey, field):
    """Corners of a frame and where the flow takes them: two arrays (n, 2)."""
    corners = cv2.goodFeaturesToTrack(grey, CORNERS, CORNER_QUALITY, CORNER_DISTANCE)
    if corners is None:
        return np.zeros((2, 0, 2), np.float32)
    corners = corners.reshape(-1, 2)
    column, row = _pixels(corners, grey.shape)
    return corners, corners + field[row, column]


def _keypoints(grey):
    """ORB keypoints of a frame, (n, 2), and their descriptors; none in pictures smaller than its patch."""
    keypoints, descriptors = cv2.ORB_create(CORNERS).detectAndCompute(np.ascontiguousarray(grey), None)
    return np.array([point.pt for point in keypoints], np.float32).reshape(-1, 2), descriptors


def _keypoint_matches(first, second):
    """Keypoints that are each other's nearest neighbour and not far apart: two arrays (n, 2)."""
    if not len(first[0]) or not len(second[0]):
        return np.zeros((2, 0, 2), np.float32)
    matches = cv2.BFMatcher(cv2.NORM_HAMMING, crossCheck=True).match(first[1], second[1])
    here = first[0][[match.queryIdx for match in matches]].reshape(-1, 2)
    there = second[0][[match.trainIdx for match in matches]].reshape(-1, 2)
    near = np.abs(there - here).max(axis=1, initial=0) < REACH
    return here[near], there[near]


def _pixels(points, size):
    """Column and row of the pixel nearest to each of `points` (n, 2), in a picture of `size` (H, W)."""
    column, row = np.rint(points).astype(int).T
    return np.clip(column, 0, size[1] - 1), np.clip(row, 0, size[0] - 1)


def _median(flow, side):
    """Each component of each field median filtered over `side` x `side` pixels."""
    if side == 1:
        return flow
    filtered = np.empty_like(flow)
    for field, result in zip(flow, filtered, strict=True):
        for component in range(2):
            result[..., component] = cv2.medianBlur(np.ascontiguousarray(field[..., component]), side)
    return filtered


def _resized(pictures, size):
    if pictures.shape[2:0:-1] == size:
        return pictures
    return np.stack([cv2.resize(picture, size, interpolation=cv2.INTER_AREA) for picture in pictures])
