"""From rows of facts (file, class, group, fold) to a set of clips that can be read.

`jhmdb.py` and `folder.py` find the rows; here they are checked, given folds, opened and counted.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nlutils.video.clips import Clip, ClipSet, Fault
from nlutils.video.decoding import ClipError, ensure_cached, read_cached

__all__ = [
    "FOLDS",
    "SIZE",
    "Entry",
    "assign_folds",
    "build_clip_set",
    "group_of",
    "read_table",
    "split_groups",
]

FOLDS = 5

# Height and width at which clips are decoded and cached; networks see crops and smaller copies of it.
SIZE = (120, 160)

# UCF101 and HMDB name the source video g07, KTH the person person07.
_GROUP = re.compile(r"(?:^|_)(g\d+|person\d+)(?=_|$)")


@dataclass(frozen=True)
class Entry:
    """One labelled clip before it is opened. `sha256` is its file's published digest, where there is one."""

    name: str
    kind: str
    group: str
    fold: int
    path: Path
    sha256: str | None = None


def read_table(path, columns: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a CSV file. Raises ValueError when it is no CSV file or lacks one of `columns`."""
    path = Path(path)
    try:
        # utf-8-sig: spreadsheets put a byte-order mark in front, which would become part of the first name.
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file in UTF-8 ({error})") from error
    header = reader.fieldnames or []
    missing = [column for column in columns if column not in header]
    if missing:
        raise ValueError(f"{path}: no column {missing[0]!r}; the first line names {header}")
    return [{key: (value or "").strip() for key, value in row.items() if key} for row in rows]


def group_of(stem: str) -> str:
    """The source that a file's name tells: its part like g07 or person07, else the whole stem."""
    found = _GROUP.search(stem)
    return found.group(1) if found else stem


def assign_folds(kinds: Sequence[str], groups: Sequence[str], folds: int = FOLDS) -> list[int]:
    """A fold for each clip: a group stays whole, and each class is spread as evenly as whole groups allow.

    Greedy: the largest group first, each to the fold where the classes stay most even, then to the fold with
    the fewest clips. The same input gives the same folds on every machine and in every version of every
    library. With fewer groups than `folds`, there are as many folds as groups.
    """
    members: dict[str, Counter] = {}
    for kind, group in zip(kinds, groups, strict=True):
        members.setdefault(group, Counter())[kind] += 1
    counts = [Counter() for _ in range(min(folds, len(members)))]
    fold_of = {}
    for group in sorted(members, key=lambda name: (-members[name].total(), name)):
        # Adding n clips of a class where there are c raises the sum of squares by 2 c n and a constant.
        def cost(fold, group=group):
            crowding = sum(counts[fold][kind] * n for kind, n in members[group].items())
            return crowding, counts[fold].total(), fold

        fold_of[group] = min(range(len(counts)), key=cost)
        counts[fold_of[group]].update(members[group])
    return [fold_of[group] for group in groups]


def split_groups(entries: Iterable[Entry]) -> list[str]:
    """The groups whose clips lie in more than one fold: trained on and tested on."""
    folds: dict[str, set[int]] = {}
    for entry in entries:
        folds.setdefault(entry.group, set()).add(entry.fold)
    return sorted(group for group, seen in folds.items() if len(seen) > 1)


def build_clip_set(
    name: str,
    title: str,
    classes: Sequence[str],
    entries: Sequence[Entry],
    *,
    size: tuple[int, int] = SIZE,
    faults: Sequence[Fault] = (),
    progress: bool = False,
) -> ClipSet:
    """Decode every entry into the cache, leave out those that fail, and say so in `faults` and `source`.

    A clip's label is the index of its class in `classes`, whatever is left out. Raises ValueError when a
    group lies in two folds, or no clip, or only one fold, is left.
    """
    torn = split_groups(entries)
    if torn:
        shown = ", ".join(torn[:3])
        raise ValueError(
            f"{name}: {len(torn)} groups lie in two folds ({shown}), so a test would see them in training"
        )
    clips, faults = [], list(faults)
    for entry in _shown(entries, name, progress):
        try:
            digest = ensure_cached(entry.path, size)
            if entry.sha256 not in (None, digest):
                raise ClipError(entry.path, f"its SHA-256 is {digest}, and should be {entry.sha256}")
        except ClipError as error:
            faults.append(Fault(error.path, error.cause))
            continue
        read = partial(read_cached, entry.path, size)
        clips.append(Clip(entry.name, classes.index(entry.kind), entry.group, entry.fold, read))
    if len({clip.fold for clip in clips}) < 2:
        cause = "no clip that can be used" if not clips else "clips in one fold only; two groups are needed"
        first = f"; the first fault: {faults[0].path}: {faults[0].cause}" if faults else ""
        raise ValueError(f"{name}: {cause}{first}")
    left_out = f" ({len(faults)} left out)" if faults else ""
    source = f"{title}, {len(clips)} clips{left_out}, {size[1]} x {size[0]}"
    return ClipSet(name, tuple(classes), tuple(clips), source, tuple(faults))


def _shown(entries, name: str, progress: bool):
    if not progress:
        return entries
    from tqdm import tqdm

    return tqdm(entries, desc=f"decoding {name}", unit="clip")
