"""KTH's six actions as a data set that is computed, not fetched: clips with true optical flow and joint tracks."""

from dataclasses import dataclass
from functools import partial

import numpy as np

from nlutils.arguments import positive_integer
from nlutils.video.cache import cached_array, file_digest
from nlutils.video.clips import Clip, ClipSet
from nlutils.video.procedural.figure import Actor, Canvas, Performer, joints_seen, paint
from nlutils.video.procedural.motion import ACTIONS, JOINTS, move
from nlutils.video.procedural.texture import Texture

__all__ = ["RATE", "Actions", "ProceduralClip", "actions_clip_set"]

RATE = 15.0  # frames a second


@dataclass(frozen=True)
class ProceduralClip:
    """One clip and everything that is known about it. T frames of H x W pixels, J = 15 joints.

    `flow[t]` says where what a pixel of frame t shows lies in frame t + 1. Where that is hidden in frame t + 1,
    by a limb or by the picture's border, the flow still is the motion of what frame t shows, and `valid` is
    False. `valid` is False, too, on edges (a pixel that mixes two parts has two motions) and on a limb that
    points at the camera (it has no direction in the picture).
    """

    frames: np.ndarray  # uint8 (T, H, W, 3)
    label: int  # index into ACTIONS
    action: str
    flow: np.ndarray  # float32 (T-1, H, W, 2), pixels a frame, (dx, dy)
    valid: np.ndarray  # bool (T-1, H, W)
    joints: np.ndarray  # float32 (T, J, 2), pixels (x, y); names in JOINTS
    visible: np.ndarray  # bool (T, J): in the picture and not covered by another part
    group: int  # the performer
    camera: str  # "follows" or "stands"
    side: str  # "right" or "left": where the person faces


def frame_size(size) -> tuple[int, int]:
    """(H, W) from one number or a pair; at least 16 each."""
    pair = size if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2:
        raise ValueError(f"size={size!r} must be one number of pixels or (height, width)")
    height, width = (positive_integer("size", side) for side in pair)
    if min(height, width) < 16:
        raise ValueError(f"size={size!r} is too small for a figure; use 16 pixels or more")
    return height, width


class Actions:
    """`count` clips of a stick figure that performs one of KTH's six actions over smooth random texture.

    Clip `i` is a function of `seed` and `i` alone, so that a larger `count` only adds clips. Twelve clips in a
    row are one performer (the `group`): two of each action in random order, one with a camera that follows the
    person and one with a camera that stands (it turns only when the person would leave the picture). Random
    are phase, tempo, amplitude, view, size, place, contrast, background, a slow pan and zoom, and a shake of
    the camera, and the bodies and clothes of the performers.

    `size` is one number or (height, width) in pixels; `noise` is the camera's noise, in grey levels; clips have
    15 frames a second. `Actions(...)[i]` is a `ProceduralClip`; `.render(i)` gives only its frames, faster.
    """

    PER_GROUP = 2 * len(ACTIONS)
    classes = ACTIONS

    def __init__(self, count: int, frames: int = 16, size=48, seed: int = 0, *, noise: float = 2.0):
        self.count = positive_integer("count", count)
        self.length = positive_integer("frames", frames)
        self.size = frame_size(size)
        if isinstance(seed, bool) or not hasattr(seed, "__index__") or seed < 0:
            raise ValueError(f"seed={seed!r} must be a whole number, 0 or more")
        self.seed = int(seed)
        if not noise >= 0:
            raise ValueError(f"noise={noise!r} must be 0 or more grey levels")
        self.noise = float(noise)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> ProceduralClip:
        return self._make(index, everything=True)

    def render(self, index: int) -> np.ndarray:
        """The frames of clip `index`, uint8 (T, H, W, 3)."""
        return self._make(index, everything=False)

    def label(self, index: int) -> int:
        """The action of clip `index`, as an index into `classes`."""
        return self._plan(self._check(index))[0]

    def group(self, index: int) -> int:
        """The performer of clip `index`."""
        return self._check(index) // self.PER_GROUP

    def _check(self, index) -> int:
        if not 0 <= index < self.count:
            raise IndexError(f"index={index!r}: there are {self.count} clips, 0 to {self.count - 1}")
        return int(index)

    def _plan(self, index):
        """Label and camera of a clip: each performer does each action once with either camera, in random order."""
        group, place = divmod(index, self.PER_GROUP)
        rng = group_generator(self.seed, group, 1)
        order = np.concatenate([rng.permutation(len(ACTIONS)), rng.permutation(len(ACTIONS))])
        follows_first = rng.integers(2, size=len(ACTIONS)).astype(bool)
        label = int(order[place])
        return label, bool(follows_first[label] ^ (place >= len(ACTIONS)))

    def _make(self, index, everything):
        index = self._check(index)
        label, follows = self._plan(index)
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, index]))
        group = index // self.PER_GROUP
        performer = Performer.random(group_generator(self.seed, group, 2))
        height, width = self.size
        stature = min(height, width) * rng.uniform(0.52, 0.76)
        side = "right" if rng.integers(2) else "left"

        seconds = (np.arange(self.length) - (self.length - 1) / 2) / RATE
        movement = move(ACTIONS[label], performer.body, seconds, rng, tempo=performer.tempo)
        camera = Camera.random(rng, seconds, self.size, stature)
        points, depth = project(movement, side)
        way = points[:, JOINTS.index("pelvis"), 0]
        room = max(0.0, width / 2 - 0.26 * stature) / stature
        camera.follow(way, room, rng, follows)

        background = random_background(rng, self.size, performer)
        contrast = rng.uniform(0.55, 1.0)
        actor = Actor(performer, camera.see(points), depth, camera.scale, contrast)
        canvas = new_canvas(background, camera, self.length, everything)
        paint(canvas, actor, background.mean, 1)
        frames = develop(canvas, rng, self.noise)
        if not everything:
            return frames
        joints = actor.points[:, : len(JOINTS)].astype(np.float32)
        visible = joints_seen(canvas, actor, 1)
        return ProceduralClip(
            frames=frames,
            label=label,
            action=ACTIONS[label],
            flow=canvas.flow,
            valid=valid_flow(canvas),
            joints=joints,
            visible=visible,
            group=group,
            camera="follows" if follows else "stands",
            side=side,
        )


def group_generator(seed, group, stream):
    """Random numbers of one group; `stream` keeps them apart from each other and from the clips' own."""
    return np.random.default_rng(np.random.SeedSequence([seed, group], spawn_key=(stream,)))


def project(movement, side):
    """Points in the picture plane, (T, P, 2) in body heights with y down, and their depth (T, P).

    Parallel projection. A person who faces the left is one who faces the right, turned about the vertical.
    """
    view = movement.view if side == "right" else -movement.view
    x, y, z = np.moveaxis(movement.points, -1, 0)
    z = z + movement.way[:, None]
    across = x * np.cos(view) + z * np.sin(view)
    depth = z * np.cos(view) - x * np.sin(view)
    return np.stack([across, 0.5 - y], axis=-1), depth - movement.way[:, None] * np.cos(view)


class Camera:
    """Where the camera looks: `centre` (T, 2) in body heights, `scale` (T,) in pixels a body height."""

    def __init__(self, centre, zoom, size, stature):
        self.centre, self.zoom = centre, zoom
        self.scale = stature * zoom
        self.stature = stature
        self.middle = np.array([(size[1] - 1) / 2, (size[0] - 1) / 2])

    @classmethod
    def random(cls, rng, seconds, size, stature):
        """A slow pan and zoom, and the shake of a hand: two slow waves along each axis."""
        shake = np.zeros((len(seconds), 2))
        for _ in range(2):
            frequency, phase = rng.uniform(0.3, 2.0, 2), rng.uniform(0, 2 * np.pi, 2)
            shake += rng.uniform(0, 0.015, 2) * np.sin(2 * np.pi * np.outer(seconds, frequency) + phase)
        pan = np.outer(seconds, rng.uniform(-1, 1, 2) * (0.20, 0.02))
        # The zoom swings, so that it stays within bounds in a clip of any length.
        zoom = np.exp(0.05 * np.sin(rng.uniform(0, 2 * np.pi) + 2 * np.pi * rng.uniform(0, 0.3) * seconds))
        return cls(shake + pan + (0, rng.uniform(-0.04, 0.04)), zoom, size, stature)

    def follow(self, way, room, rng, follows):
        """Turn after the person at `way` (T,), or only when they would go further than `room` from the middle."""
        travel = np.ptp(way) / 2
        place = rng.uniform(-1, 1)
        if follows:
            self.centre[:, 0] += way - place * room
        else:
            self.centre[:, 0] += (way.max() + way.min()) / 2 - place * max(room - travel, 0.25 * room)
        self.centre[:, 0] = np.clip(self.centre[:, 0], way - room, way + room)

    def see(self, points):
        """Points of the world (T, P, 2) in body heights, as pixels."""
        return self.middle + self.scale[:, None, None] * (points - self.centre[:, None])

    def ground(self, x, y):
        """The place in the background plane, in pixels at zoom 1, of picture columns `x` and rows `y`: (T, W), (T, H)."""
        centre = self.centre * self.stature
        zoom = self.zoom[:, None]
        return centre[:, :1] + (x - self.middle[0]) / zoom, centre[:, 1:] + (y - self.middle[1]) / zoom

    def flow(self, x, y):
        """The background's flow, float32 (T-1, H, W, 2)."""
        plane_x, plane_y = self.ground(x, y)
        centre, zoom = self.centre[1:] * self.stature, self.zoom[1:, None]
        dx = self.middle[0] + zoom * (plane_x[:-1] - centre[:, :1]) - x
        dy = self.middle[1] + zoom * (plane_y[:-1] - centre[:, 1:]) - y
        return np.stack(np.broadcast_arrays(dx[:, None, :], dy[:, :, None]), axis=-1).astype(np.float32)


def random_background(rng, size, *performers) -> Texture:
    """A texture whose mean is as far as a few tries get from the brightness of the performers' clothes and skin."""
    tries = rng.uniform(50, 205, 8)
    clothes = np.array([level for performer in performers for level in performer.brightness])
    level = tries[np.abs(tries[:, None] - clothes).min(axis=1).argmax()]
    mean = np.clip(level + rng.uniform(-20, 20, 3), 0, 255)
    return Texture.random(rng, mean, rng.uniform(12, 26), longest=1.2 * min(size), shortest=0.14 * min(size))


def new_canvas(background, camera, length, with_flow) -> Canvas:
    height, width = (round(2 * value + 1) for value in camera.middle[::-1])
    x, y = np.arange(width), np.arange(height)
    shape = (length, height, width)
    return Canvas(
        frames=np.clip(background.look(*camera.ground(x, y)), 0, 255),
        flow=camera.flow(x, y) if with_flow else None,
        part=np.zeros(shape, np.int16),
        mixed=np.zeros(shape, bool),
        firm=np.ones(shape, bool),
    )


def develop(canvas, rng, noise) -> np.ndarray:
    """Add the camera's noise and round: uint8 (T, H, W, 3)."""
    frames = canvas.frames
    if noise:
        frames = frames + noise * rng.standard_normal(frames.shape, dtype=np.float32)
    return np.rint(np.clip(frames, 0, 255)).astype(np.uint8)


def valid_flow(canvas) -> np.ndarray:
    """Where the flow joins the same surface in both frames; bool (T-1, H, W).

    That is: no edge runs through the pixel, and the four pixels around the place that it moves to lie in the
    picture and show the same part, without an edge.
    """
    _, height, width = canvas.part.shape
    target_x = np.arange(width) + canvas.flow[..., 0]
    target_y = np.arange(height)[:, None] + canvas.flow[..., 1]
    left, top = np.floor(target_x).astype(int), np.floor(target_y).astype(int)
    valid = canvas.firm[:-1] & ~canvas.mixed[:-1]
    valid &= (left >= 0) & (top >= 0) & (left < width - 1) & (top < height - 1)
    left, top = np.clip(left, 0, width - 2), np.clip(top, 0, height - 2)
    time = np.arange(1, len(canvas.part))[:, None, None]
    for row in (top, top + 1):
        for column in (left, left + 1):
            valid &= (canvas.part[time, row, column] == canvas.part[:-1]) & ~canvas.mixed[time, row, column]
    return valid


def actions_clip_set(count: int = 600, frames: int = 16, size=64, seed: int = 0, *, cache: bool = False) -> ClipSet:
    """The procedural actions as a `ClipSet`: groups are performers, and five folds share none.

    Clips are computed when they are read. `cache=True` keeps their frames on disk, keyed by the settings and by
    the source that computes them. Raises ValueError when `count` gives fewer than five performers.
    """
    actions = Actions(count, frames, size, seed)
    return as_clip_set(
        actions, "procedural", f"six procedural actions, {frames} frames of {_times(actions.size)}, seed {seed}", cache
    )


def as_clip_set(dataset, name, source, cache=False) -> ClipSet:
    """A `ClipSet` of anything with `label(i)`, `group(i)`, `render(i)`, `classes` and `PER_GROUP`."""
    if (dataset.group(len(dataset) - 1)) < 4:
        raise ValueError(
            f"count={len(dataset)} gives fewer than five groups, too few for five folds; "
            f"use {4 * dataset.PER_GROUP + 1} or more"
        )
    clips = []
    for index in range(len(dataset)):
        read = partial(dataset.render, index)
        if cache:
            read = partial(cached_array, name, f"{_source_digest()} {source} {index}", read)
        group = dataset.group(index)
        clips.append(Clip(f"{name}/{index:05d}", dataset.label(index), f"{name}-{group:03d}", group % 5, read))
    return ClipSet(name, tuple(dataset.classes), tuple(clips), f"{len(dataset)} clips of {source}")


def _times(size):
    return f"{size[1]}x{size[0]} pixels"


def _source_digest():
    """The digest of the source files that decide what a clip looks like."""
    from pathlib import Path

    return " ".join(file_digest(path)[:16] for path in sorted(Path(__file__).parent.glob("*.py")))
