"""Tasks whose label is the relation of two far-apart places: neither place alone gives it."""

from dataclasses import dataclass, replace

import numpy as np

from nlutils.arguments import one_of, positive_integer
from nlutils.video.clips import ClipSet
from nlutils.video.procedural.base import ProceduralSet
from nlutils.video.procedural.figure import Actor, Performer, paint
from nlutils.video.procedural.motion import ACTIONS, move
from nlutils.video.procedural.scene import Camera, develop, new_canvas, project, random_background, times
from nlutils.video.procedural.texture import Texture

__all__ = ["RelationalClip", "SameAction", "SamePattern", "relation_clip_set"]

CELLS = 4  # a pattern has 4 x 4 cells, half of them light


@dataclass(frozen=True)
class RelationalClip:
    """A clip with one thing on the left and one on the right, T frames of H x W pixels."""

    frames: np.ndarray  # uint8 (T, H, W, 3)
    label: int  # 0: different, 1: same
    left: int  # which of the classes stands on the left
    right: int
    places: np.ndarray  # float32 (2, T, 2): where the left and the right thing stand, pixels (x, y)


class Relation(ProceduralSet):
    """Pairs of `kinds` classes, balanced.

    In each group of 2 * `kinds` clips every class stands on the left once in a "same" and once in a
    "different" clip, and on the right likewise: the class at one place says nothing about the label.
    "different" pairs of a group are (a, a + shift); kinds - 1 groups in a row use every shift once.
    """

    classes = ("different", "same")
    kinds: int

    def label(self, index: int) -> int:
        """1 when the two places of clip `index` show the same class, else 0; without making the clip."""
        left, right = self.pair(index)
        return int(left == right)

    def pair(self, index: int) -> tuple[int, int]:
        """The class on the left and the class on the right of clip `index`, without making it."""
        group, place = divmod(self._check(index), self.per_group)
        block, step = divmod(group, self.kinds - 1)
        shifts = 1 + self._group_generator(block, 3).permutation(self.kinds - 1)
        number = int(self._group_generator(group, 1).permutation(self.per_group)[place])
        left = number % self.kinds
        same = number < self.kinds
        return left, left if same else int(left + shifts[step]) % self.kinds


class SameAction(Relation):
    """Two small figures, left and right: do they perform the same action?

    Each figure keeps its place, as on a treadmill; performer, phase, tempo, amplitude, size and side are
    drawn for each. `actions` are two or more names of `ACTIONS`. `size` is one number or (height, width); a
    group of clips has two performers of its own. `SameAction(...)[i]` is a `RelationalClip` whose `left` and
    `right` are indices into `actions`.
    """

    name = "same_action"

    def __init__(
        self, count: int, frames: int = 16, size=64, seed: int = 0, *, actions=ACTIONS, noise: float = 2.0
    ):
        super().__init__(count, frames, size, seed, noise)
        self.actions = tuple(one_of("actions", action, ACTIONS) for action in actions)
        self.kinds = len(self.actions)
        if self.kinds < 2 or len(set(self.actions)) < self.kinds:
            raise ValueError(f"actions={self.actions!r} must be two or more different actions")
        self.per_group = 2 * self.kinds
        self.title = f"pairs of figures, same action or not, of {', '.join(self.actions)}"

    def _make(self, index, everything):
        pair = self.pair(index)
        couple = self._group_generator(self.group(index), 2)
        performers = [Performer.random(couple), Performer.random(couple)]
        rng = self._clip_generator(index)
        height, width = self.size
        if rng.integers(2):
            performers.reverse()
        seconds = times(self.length)
        largest = min(0.76 * height, 0.58 * width)
        camera = Camera.random(rng, seconds, self.size, largest)
        camera.centre[:, 0] *= 0.3  # little pan: both figures stay in the picture
        background = random_background(rng, self.size, *performers)
        canvas = new_canvas(background, camera, with_flow=False)
        places = []
        for place, (action, performer) in enumerate(zip(pair, performers, strict=True)):
            side = "right" if rng.integers(2) else "left"
            movement = move(self.actions[action], performer.body, seconds, rng, tempo=performer.tempo)
            points, depth = project(replace(movement, way=0 * movement.way), side)
            share = rng.uniform(0.75, 0.95)
            middle = (place - 0.5) * 0.5 * width / largest + rng.uniform(-0.03, 0.03)
            points = share * points + (middle, rng.uniform(-0.08, 0.08))
            seen = camera.see(points)
            places.append(camera.see(np.full((self.length, 1, 2), (middle, 0.0)))[:, 0])
            actor = Actor(performer, seen, depth, share * camera.scale, contrast=rng.uniform(0.55, 1.0))
            paint(canvas, actor, background.mean, first_part=1 + place * len(performer.parts))
        frames = develop(canvas, rng, self.noise)
        if not everything:
            return frames
        return RelationalClip(frames, int(pair[0] == pair[1]), *pair, np.array(places, np.float32))


class SamePattern(Relation):
    """Two patterns of 4 x 4 light and dark cells, far apart on smooth random texture: are they the same?

    There are `patterns` patterns, the same ones for every clip of a `seed`, each with eight light and eight
    dark cells. Place, contrast and brightness are drawn for each of the two. `frames=1` gives still pictures;
    in longer clips both patterns drift slowly. `size` is one number or (height, width), 32 pixels at least
    and not higher than wide; a pattern is a quarter of the height wide, and 3/8 of the width or more lies
    between the two. `SamePattern(...)[i]` is a `RelationalClip` whose `left` and `right` are indices into
    `.bank`.
    """

    name = "same_pattern"

    def __init__(
        self, count: int, frames: int = 1, size=64, seed: int = 0, *, patterns: int = 8, noise: float = 2.0
    ):
        super().__init__(count, frames, size, seed, noise)
        if min(self.size) < 32 or self.size[0] > self.size[1]:
            raise ValueError(f"size={size!r} must be 32 pixels or more, and not higher than wide")
        self.kinds = positive_integer("patterns", patterns)
        if not 2 <= self.kinds <= 256:
            raise ValueError(f"patterns={patterns!r} must be from 2 to 256")
        self.per_group = 2 * self.kinds
        self.title = f"pairs of patterns, same or not, of {self.kinds}"
        self.bank = self._draw_bank()

    def _draw_bank(self):
        """bool (patterns, 4, 4): of 64 random patterns each time the one least like those chosen before."""
        rng = self._group_generator(0, 4)
        half = np.arange(CELLS**2) < CELLS**2 // 2
        bank = [rng.permutation(half)]
        while len(bank) < self.kinds:
            drawn = np.array([rng.permutation(half) for _ in range(64)])
            unlike = (drawn[:, None] != np.array(bank)).sum(-1).min(axis=1)
            bank.append(drawn[unlike.argmax()])
        return np.array(bank).reshape(-1, CELLS, CELLS)

    def _make(self, index, everything):
        pair = self.pair(index)
        rng = self._clip_generator(index)
        height, width = self.size
        seconds = times(self.length)
        camera = Camera.random(rng, seconds, self.size, stature=min(self.size))
        mean = rng.uniform(90, 165, 3)
        background = Texture.random(rng, mean, rng.uniform(8, 16), 1.2 * min(self.size), 0.2 * min(self.size))
        canvas = new_canvas(background, camera, with_flow=False)
        side = height / 4
        places = []
        for place, kind in enumerate(pair):
            # The left thing keeps to the left 5/16 of the picture, the right one to the right 5/16.
            room = 5 / 16 * width - side
            drift = rng.uniform(-0.02, 0.02, 2) * min(self.size)
            start = rng.uniform((0, 0), (room, height - side))
            x = np.clip(start[0] + drift[0] * seconds, 0, room) + place * (width - side - room)
            y = np.clip(start[1] + drift[1] * seconds, 0, height - side)
            grey, swing = rng.uniform(100, 155), rng.uniform(45, 95)
            for time in range(self.length):
                _stamp(canvas.frames[time], self.bank[kind], x[time], y[time], side, grey, swing)
            places.append(np.stack([x, y], axis=1) + (side - 1) / 2)
        frames = develop(canvas, rng, self.noise)
        if not everything:
            return frames
        return RelationalClip(frames, int(pair[0] == pair[1]), *pair, np.array(places, np.float32))


def _stamp(frame, pattern, x, y, side, grey, swing):
    """Print `pattern` on `frame` (H, W, 3), its corner at (x, y); a pixel is the mean of what it covers."""
    rows, columns = (
        _shares(length, corner, side) for length, corner in zip(frame.shape[:2], (y, x), strict=True)
    )
    cover = np.outer(rows.sum(axis=1), columns.sum(axis=1))[..., None]
    light = (rows @ np.where(pattern, 1.0, -1.0) @ columns.T)[..., None]
    frame += cover * (grey - frame) + swing * light


def _shares(length, corner, side):
    """(length, CELLS): the share of each pixel that each cell of a pattern from `corner` on covers."""
    edges = corner + side * np.arange(CELLS + 1) / CELLS
    pixel = np.arange(length)[:, None]
    return np.clip(np.minimum(pixel + 1, edges[1:]) - np.maximum(pixel, edges[:-1]), 0, 1)


def relation_clip_set(
    name: str, count: int = 600, frames: int = 16, size=64, seed: int = 0, *, cache: bool = False
) -> ClipSet:
    """`SameAction` or `SamePattern`, by its `name`, as a `ClipSet` of two classes; five folds share no group.

    Clips are made when they are read; `cache=True` keeps their frames on disk.
    """
    kinds = {kind.name: kind for kind in (SameAction, SamePattern)}
    return kinds[one_of("name", name, kinds)](count, frames, size, seed).clip_set(cache=cache)
