"""Clips of one's own: `root/<class>/*.mp4`, with or without a labels.csv.

Without labels.csv each sub-folder is a class and each video in it a clip. With one, its rows are the clips:
columns `path` (from the folder, with / between names) and `class`, and, as far as known, `group` and `fold`;
`cv_fold` is read as `fold`, and other columns are left alone. A group is what clips must share a fold for: a
film, a person, a day. Where it is not given, the file's name tells it (`labels.group_of`); where folds are
not given, five are assigned (`labels.assign_folds`).
"""

import posixpath
from collections.abc import Iterable, Sequence
from pathlib import Path

from nlutils.video.cache import file_digest
from nlutils.video.clips import ClipSet, Fault
from nlutils.video.decoding import ClipError, decode
from nlutils.video.labels import (
    FOLDS,
    SIZE,
    Entry,
    assign_folds,
    build_clip_set,
    group_of,
    read_table,
    split_groups,
)

__all__ = ["SUFFIXES", "check_folder", "open_folder", "report_folder", "study_folds", "weak_classes"]

SUFFIXES = (
    ".mp4",
    ".avi",
    ".mov",
    ".mkv",
    ".webm",
    ".gif",
    ".m4v",
    ".mpg",
    ".mpeg",
    ".wmv",
    ".flv",
    ".ogv",
    ".3gp",
)


def open_folder(root, *, size=SIZE, progress=False) -> ClipSet:
    """The clips of a folder, area-resized to `size` = (H, W).

    A row or a file that cannot be used is left out and listed in `faults`; labels do not shift, for the
    classes are counted before. Raises NotADirectoryError when there is no such folder, and ValueError when
    labels.csv cannot be read, a group lies in two folds, or no clips of two groups are left.
    """
    root = _existing(root)
    entries, classes, faults = _scan(root)
    title = f"folder {root.name}"
    return build_clip_set(root.name, title, classes, entries, size=size, faults=faults, progress=progress)


def check_folder(root) -> list[Fault]:
    """Every fault of a folder of clips, sorted by path: an empty list means that all of it will be used.

    Each video is decoded. Also reported: rows and files that do not match, a single class, classes without
    clips or with all of them in one fold, files that will not be used, the same content twice, a group in
    two folds, and a folder too small for two folds.
    """
    try:
        root = _existing(root)
        entries, classes, faults = _scan(root)
    except (NotADirectoryError, ValueError) as error:
        return [Fault(str(root), str(error).removeprefix(f"{root}: "))]
    faults += _undecodable(root) + _twice(root, entries)
    if cause := _too_few_classes(classes):
        faults.append(Fault(str(root), cause))
    if classes:
        faults += _unused(root, entries) + _badly_split(root, entries)
    weak = weak_classes(classes, [(entry.kind, entry.fold) for entry in entries])
    faults += [Fault(str(root / kind), cause) for kind, cause in weak.items()]
    return sorted(faults, key=lambda fault: (fault.path, fault.cause))


def report_folder(root) -> int:
    """Print the faults of a folder, one a line, then a count; returns 0 when there are none, else 1."""
    faults = check_folder(root)
    for fault in faults:
        print(f"{fault.path}: {fault.cause}")
    if faults:
        print(f"{len(faults)} fault{'s' if len(faults) > 1 else ''} in {root}")
        return 1
    entries, classes, _ = _scan(_existing(root))
    folds = len({entry.fold for entry in entries})
    print(f"{root}: {len(entries)} clips in {len(classes)} classes and {folds} folds, no faults")
    if folds < FOLDS:
        print(f"{FOLDS} folds are usual; a folder has as many as groups, or as its labels.csv says")
    return 0


def study_folds(root) -> list[int]:
    """The folds of a folder's clips, before any is decoded.

    Raises NotADirectoryError when there is no such folder, and ValueError when no study of its clips makes
    sense: no clips, a single class, or clips of one group only.
    """
    root = _existing(root)
    entries, classes, faults = _scan(root)
    folds = sorted({entry.fold for entry in entries})
    cause = _too_few_classes(classes)
    if not cause and not entries:
        cause = f"{faults[0].path}: {faults[0].cause}" if faults else "no file in it is a video"
    if not cause and len(folds) < 2:
        cause = "clips in one fold only; two groups are needed, one to train on and one to test"
    if cause:
        raise ValueError(f"{root}: {cause}")
    return folds


def weak_classes(classes: Sequence[str], clips: Iterable[tuple[str, int]]) -> dict[str, str]:
    """{class: why a study cannot tell how well it is recognised}, for clips given as (class, fold).

    A class in two folds or more can be learned and tested. Where all clips lie in one fold, that is the
    folder's fault, and not the classes'.
    """
    folds: dict[str, set[int]] = {kind: set() for kind in classes}
    for kind, fold in clips:
        folds[kind].add(fold)
    several = len(set().union(*folds.values())) > 1
    weak = {}
    for kind, seen in folds.items():
        if not seen:
            weak[kind] = "the class has no clips"
        elif several and len(seen) == 1:
            weak[kind] = (
                f"all its clips lie in fold {min(seen)}, so it is tested only by networks that never saw it; "
                "it needs clips of another group"
            )
    return weak


def _too_few_classes(classes) -> str | None:
    if not classes:
        return "no classes: clips must lie in sub-folders, one for each class"
    if len(classes) == 1:
        return f"one class only, {classes[0]!r}: there is nothing to tell it from; add another class's clips"
    return None


def _existing(root) -> Path:
    root = Path(root).expanduser()
    if not root.is_dir():
        raise NotADirectoryError(f"{root}: there is no such folder")
    return root


def _scan(root: Path) -> tuple[list[Entry], list[str], list[Fault]]:
    """The clips to open, the classes, and the rows that name no clip."""
    if (root / "labels.csv").is_file():
        return _scan_table(root)
    kinds = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    files = [(kind, path) for kind in kinds for path in sorted((root / kind).iterdir()) if _is_clip(path)]
    groups = [group_of(path.stem) for _, path in files]
    folds = assign_folds([kind for kind, _ in files], groups)
    entries = [
        Entry(f"{kind}/{path.name}", kind, group, fold, path)
        for (kind, path), group, fold in zip(files, groups, folds, strict=True)
    ]
    return entries, kinds, []


def _scan_table(root: Path) -> tuple[list[Entry], list[str], list[Fault]]:
    rows = read_table(root / "labels.csv", ["path", "class"])
    kinds = sorted({row["class"] for row in rows} - {""})
    fold_column = next((name for name in ("fold", "cv_fold") if rows and name in rows[0]), None)
    good, faults, seen = [], [], set()
    for row in rows:
        cause = _row_fault(root, row, fold_column, seen)
        if cause:
            faults.append(Fault(str(root / row["path"]), cause))
        else:
            good.append(row)
        seen.add(row["path"])
    groups = [row.get("group") or group_of(Path(row["path"]).stem) for row in good]
    if fold_column:
        folds = [int(row[fold_column]) for row in good]
    else:
        folds = assign_folds([row["class"] for row in good], groups)
    entries = [
        Entry(row["path"], row["class"], group, fold, root / row["path"])
        for row, group, fold in zip(good, groups, folds, strict=True)
    ]
    return entries, kinds, faults


def _row_fault(root: Path, row: dict, fold_column: str | None, seen: set) -> str | None:
    """Why a row of labels.csv names no clip; None when it does."""
    path = row["path"]
    if not path:
        return f"a row of labels.csv has no path (class {row['class']!r})"
    if not row["class"]:
        return "its row in labels.csv has no class"
    if posixpath.normpath(path) != path or path.startswith(("/", "..")) or "\\" in path:
        return "labels.csv must give paths from the folder itself, with / between names and no . or .."
    if path in seen:
        return "labels.csv lists it twice"
    if fold_column and not row[fold_column].isdecimal():
        return f"its {fold_column} in labels.csv is {row[fold_column]!r}, not a whole number from 0"
    if not (root / path).is_file():
        return "labels.csv lists it, and there is no such file"
    return None


def _is_clip(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _files(root: Path) -> list[Path]:
    """All files under `root` but hidden ones."""
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    return [path for path in paths if not any(part[0] == "." for part in path.relative_to(root).parts)]


def _undecodable(root: Path) -> list[Fault]:
    faults = []
    for path in filter(_is_clip, _files(root)):
        try:
            decode(path, SIZE)
        except ClipError as error:
            faults.append(Fault(str(path), error.cause))
    return faults


def _badly_split(root: Path, entries: list[Entry]) -> list[Fault]:
    faults = []
    for group in split_groups(entries):
        folds = sorted({entry.fold for entry in entries if entry.group == group})
        cause = f"group {group} lies in the folds {folds}; a group must share one fold"
        faults.append(Fault(str(root), cause))
    if len({entry.fold for entry in entries}) < 2:
        faults.append(Fault(str(root), "fewer than two folds: clips of two groups are needed"))
    return faults


def _unused(root: Path, entries: list[Entry]) -> list[Fault]:
    """Files that no clip is made of."""
    used = {entry.path for entry in entries}
    causes = {path: _why_unused(root, path) for path in _files(root) if path not in used}
    return [Fault(str(path), cause) for path, cause in causes.items() if cause]


def _why_unused(root: Path, path: Path) -> str | None:
    if (root / "labels.csv").is_file():
        # Notes and checksums may lie beside a labels.csv; a video that it forgot is a fault.
        return "labels.csv does not list it" if _is_clip(path) else None
    if not _is_clip(path):
        suffix = path.suffix or "a name without one"
        return None if path.parent == root else f"not used: {suffix} is not a video's suffix"
    if path.parent == root:
        return "not used: it lies in no class's folder"
    return "not used: it lies in a folder inside a class's folder"


def _twice(root: Path, entries: list[Entry]) -> list[Fault]:
    """Clips whose content is another clip's: they would count twice, and leak between folds."""
    first: dict[str, Entry] = {}
    faults = []
    for entry in entries:
        if not entry.path.stat().st_size:  # reported already, as empty
            continue
        other = first.setdefault(file_digest(entry.path), entry)
        if other is not entry:
            where = "" if other.kind == entry.kind else f", in another class ({other.kind})"
            faults.append(
                Fault(str(entry.path), f"the same content as {other.path.relative_to(root)}{where}")
            )
    return faults
