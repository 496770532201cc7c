"""KTH's six actions as a data set that is computed: clips with their true optical flow and joint tracks."""

from dataclasses import dataclass

import numpy as np

from nlutils.video.clips import ClipSet
from nlutils.video.procedural.base import ProceduralSet
from nlutils.video.procedural.figure import Actor, Performer, joints_seen, paint
from nlutils.video.procedural.motion import ACTIONS, JOINTS, move
from nlutils.video.procedural.scene import (
    Camera,
    develop,
    new_canvas,
    project,
    random_background,
    times,
    valid_flow,
)

__all__ = ["Actions", "ProceduralClip", "actions_clip_set"]


@dataclass(frozen=True)
class ProceduralClip:
    """One clip and everything that is known about it. T frames of H x W pixels, J = 15 joints.

    `flow[t]` says where what a pixel of frame t shows lies in frame t + 1. Where that is hidden in frame
    t + 1, by a limb or by the picture's border, the flow still is the motion of what frame t shows, and
    `valid` is False. `valid` is False, too, on edges (a pixel that mixes two parts has two motions) and on a
    limb that points at the camera (it has no direction in the picture).
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


class Actions(ProceduralSet):
    """`count` clips of a stick figure that performs one of KTH's six actions over smooth random texture.

    Clip `i` is a function of `seed` and `i` alone, so that a larger `count` only adds clips. Twelve clips in
    a row are one performer (the `group`): two of each action in random order, one with a camera that follows
    the person and one with a camera that stands (it turns only when the person would leave the picture).
    Random are phase, tempo, amplitude, view, size, place, contrast, background, a slow pan and zoom, and a
    shake of the camera, and the bodies and clothes of the performers.

    `size` is one number or (height, width) in pixels; `noise` is the camera's noise, in grey levels; clips
    have 15 frames a second. `Actions(...)[i]` is a `ProceduralClip`; `.render(i)` gives only its frames, in
    two thirds of the time. Between machines a rare pixel may differ by one grey level, and positions in
    their last digit. Raises ValueError for a wrong argument, IndexError for a clip that there is not.
    """

    classes = ACTIONS
    per_group = 2 * len(ACTIONS)
    title = "six procedural actions"

    def __init__(self, count: int, frames: int = 16, size=48, seed: int = 0, *, noise: float = 2.0):
        super().__init__(count, frames, size, seed, noise)

    def label(self, index: int) -> int:
        """The action of clip `index`, as an index into `classes`, without making the clip."""
        return self._plan(self._check(index))[0]

    def _plan(self, index):
        """Label and camera of a clip: each performer does each action with both cameras, in random order."""
        group, place = divmod(index, self.per_group)
        rng = self._group_generator(group, 1)
        order = np.concatenate([rng.permutation(len(ACTIONS)), rng.permutation(len(ACTIONS))])
        follows_first = rng.integers(2, size=len(ACTIONS)).astype(bool)
        label = int(order[place])
        return label, bool(follows_first[label] ^ (place >= len(ACTIONS)))

    def _make(self, index, everything):
        label, follows = self._plan(index)
        group = self.group(index)
        performer = Performer.random(self._group_generator(group, 2))
        rng = self._clip_generator(index)
        height, width = self.size
        stature = min(height, width) * rng.uniform(0.52, 0.76)
        side = "right" if rng.integers(2) else "left"

        seconds = times(self.length)
        movement = move(ACTIONS[label], performer.body, seconds, rng, tempo=performer.tempo)
        camera = Camera.random(rng, seconds, self.size, stature)
        points, depth = project(movement, side)
        # A quarter of a body height to each side of the person stays in the picture.
        room = max(0.0, width / 2 - 0.26 * stature) / stature
        camera.follow(points[:, JOINTS.index("pelvis"), 0], room, rng, follows)

        background = random_background(rng, self.size, performer)
        actor = Actor(performer, camera.see(points), depth, camera.scale, contrast=rng.uniform(0.55, 1.0))
        canvas = new_canvas(background, camera, everything)
        paint(canvas, actor, background.mean, first_part=1)
        frames = develop(canvas, rng, self.noise)
        if not everything:
            return frames
        return ProceduralClip(
            frames=frames,
            label=label,
            action=ACTIONS[label],
            flow=canvas.flow,
            valid=valid_flow(canvas),
            joints=actor.points[:, : len(JOINTS)].astype(np.float32),
            visible=joints_seen(canvas, actor, first_part=1),
            group=group,
            camera="follows" if follows else "stands",
            side=side,
        )


def actions_clip_set(
    count: int = 600, frames: int = 16, size=64, seed: int = 0, *, cache: bool = False
) -> ClipSet:
    """`Actions` as a `ClipSet`: groups are performers, and the five folds share none.

    Clips are made when they are read; `cache=True` keeps their frames on disk. Raises ValueError when `count`
    gives fewer than five performers of twelve clips.
    """
    return Actions(count, frames, size, seed).clip_set(cache=cache)
