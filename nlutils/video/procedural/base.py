"""What the computed data sets have in common: clips by number, groups, and the way to a `ClipSet`."""

from functools import partial
from pathlib import Path

import numpy as np

from nlutils.arguments import positive_integer
from nlutils.video.cache import cached_array, file_digest
from nlutils.video.clips import Clip, ClipSet

__all__ = ["ProceduralSet"]

FOLDS = 5


class ProceduralSet:
    """`count` clips, each a function of `seed` and its number alone: a larger `count` only adds clips.

    A subclass has `name`, `classes`, `per_group` (so many clips in a row are a group, and balanced), `title`,
    `label(index)`, and `_make(index, everything)`: the clip, or only its frames.
    """

    name: str = "procedural"
    classes: tuple[str, ...]
    per_group: int
    title: str

    def __init__(self, count: int, frames: int, size, seed: int, noise: float):
        self.count = positive_integer("count", count)
        self.length = positive_integer("frames", frames)
        self.size = frame_size(size)
        if isinstance(seed, bool) or not hasattr(seed, "__index__") or seed < 0:
            raise ValueError(f"seed={seed!r} must be a whole number, 0 or more")
        if isinstance(noise, bool) or not isinstance(noise, int | float) or not noise >= 0:
            raise ValueError(f"noise={noise!r} must be 0 or more grey levels")
        self.seed, self.noise = int(seed), float(noise)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        return self._make(self._check(index), everything=True)

    def render(self, index: int) -> np.ndarray:
        """The frames of clip `index`, uint8 (T, H, W, 3)."""
        return self._make(self._check(index), everything=False)

    def label(self, index: int) -> int:
        """The label of clip `index`, as an index into `classes`, without making the clip."""
        raise NotImplementedError

    def group(self, index: int) -> int:
        """The group of clip `index`."""
        return self._check(index) // self.per_group

    def clip_set(self, *, cache: bool = False) -> ClipSet:
        """These clips as a `ClipSet` with five folds that share no group; frames are made when they are read.

        `cache=True` keeps the frames on disk, keyed by the settings and by the source that makes them.
        Raises ValueError when there are fewer than five groups.
        """
        if self.count <= (FOLDS - 1) * self.per_group:
            raise ValueError(
                f"count={self.count} gives fewer than {FOLDS} groups, too few for {FOLDS} folds; "
                f"use {FOLDS * self.per_group} or more (a group has {self.per_group} clips)"
            )
        height, width = self.size
        source = f"{self.title}, {self.length} frames of {width}x{height} pixels, seed {self.seed}"
        key = f"{source} noise {self.noise} {_source_digest()}" if cache else ""
        clips = []
        for index in range(self.count):
            read = partial(self.render, index)
            if cache:
                read = partial(cached_array, "procedural", f"{key} {index}", read)
            group = self.group(index)
            clips.append(
                Clip(f"{self.name}/{index:05d}", self.label(index), f"group-{group:03d}", group % FOLDS, read)
            )
        return ClipSet(self.name, tuple(self.classes), tuple(clips), f"{self.count} clips of {source}")

    def _check(self, index) -> int:
        if not 0 <= index < self.count:
            raise IndexError(f"index={index!r}: there are {self.count} clips, 0 to {self.count - 1}")
        return int(index)

    def _clip_generator(self, index):
        return np.random.default_rng(np.random.SeedSequence([self.seed, index]))

    def _group_generator(self, group, stream):
        """Random numbers of a group; `stream` keeps them apart from each other and from the clips' own."""
        return np.random.default_rng(np.random.SeedSequence([self.seed, group], spawn_key=(stream,)))


def frame_size(size) -> tuple[int, int]:
    """(H, W) from one number or a pair; at least 16 each."""
    pair = size if isinstance(size, tuple | list) else (size, size)
    if len(pair) != 2:
        raise ValueError(f"size={size!r} must be one number of pixels or (height, width)")
    height, width = (positive_integer("size", side) for side in pair)
    if min(height, width) < 16:
        raise ValueError(f"size={size!r} is too small for a figure; use 16 pixels or more")
    return height, width


def _source_digest() -> str:
    """A digest of the source files that decide what a clip looks like."""
    return " ".join(file_digest(path)[:16] for path in sorted(Path(__file__).parent.glob("*.py")))
