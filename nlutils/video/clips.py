"""What a data set is to the rest of the package: labelled clips with their source groups and folds."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

__all__ = ["Clip", "ClipSet", "Fault"]


@dataclass(frozen=True)
class Fault:
    """A clip that could not be used: which file, and why, in one sentence."""

    path: str
    cause: str


@dataclass(frozen=True)
class Clip:
    """One labelled clip. `group` names its source (a film, a person): clips of a group share a fold."""

    name: str
    label: int
    group: str
    fold: int
    read: Callable[[], np.ndarray] = field(repr=False, compare=False)

    def frames(self) -> np.ndarray:
        """The clip's frames, uint8 (T, H, W, 3), RGB."""
        return self.read()


@dataclass(frozen=True)
class ClipSet:
    """Labelled clips of one data set, with five group-disjoint folds (0 to 4).

    `source` is the sentence that tables and results print: which clips these are, and at what size.
    `faults` lists the clips that were left out.
    """

    name: str
    classes: tuple[str, ...]
    clips: tuple[Clip, ...]
    source: str
    faults: tuple[Fault, ...] = ()

    def __len__(self) -> int:
        return len(self.clips)

    def split(self, fold: int) -> tuple[list[Clip], list[Clip]]:
        """The clips outside `fold` (to train on) and those in it (to test on)."""
        folds = sorted({clip.fold for clip in self.clips})
        if fold not in folds:
            raise ValueError(f"fold={fold!r} is not a fold of {self.name}; it has {folds}")
        train = [clip for clip in self.clips if clip.fold != fold]
        test = [clip for clip in self.clips if clip.fold == fold]
        return train, test
