"""J-HMDB: 21 actions, 793 of its 928 clips, from a prepared copy or from the original archive.

Jhuang, Gall, Zuffi, Schmid, Black, "Towards understanding action recognition", ICCV 2013. Clips of 15 to 40
frames at 25 frames a second, taken from HMDB51 (Kuehne et al., ICCV 2011). `jhmdb21` is all classes, `core8`
the eight that workshops use. Groups are source videos; the five folds never share one.

Prepared copy: a folder `jhmdb21` with labels.csv, SHA256SUMS and clips of 160 x 120. Original archive: the
folder `JHMDB_video` that `nlutils data fetch jhmdb21` unpacks, 320 x 240; its files are recognised by content
(data/catalogue/jhmdb21.csv), so their folder's or file's name does not matter. The originals' headers
over-count: 48 frames at 30 a second are said where 40 decode.
"""

from dataclasses import dataclass
from pathlib import Path

from nlutils.arguments import one_of
from nlutils.paths import data_root, project_root
from nlutils.video.cache import file_digest
from nlutils.video.clips import ClipSet, Fault
from nlutils.video.labels import SIZE, Entry, build_clip_set, read_table

__all__ = ["NAMES", "Found", "count", "find", "open_jhmdb", "verify"]

NAMES = ("core8", "jhmdb21")

_WAYS_OUT = (
    "run `make data`, which fetches it, or set NLUTILS_DATA to the folder that holds jhmdb21; "
    "NLUTILS_CLIPS=procedural needs no data"
)


@dataclass(frozen=True)
class Found:
    """Where J-HMDB lies, and which `kind` it is: "prepared copy" or "original files"."""

    kind: str
    folder: Path


def find(root=None) -> Found | None:
    """Look for J-HMDB in `root`; by default in data_root(), then in data/downloads. None: not there."""
    for place in _places(root):
        if (place / "jhmdb21" / "labels.csv").is_file():
            return Found("prepared copy", place / "jhmdb21")
        for folder in (place / "JHMDB_video" / "ReCompress_Videos", place / "ReCompress_Videos"):
            if folder.is_dir():
                return Found("original files", folder)
    return None


def count(name: str, found: Found) -> int:
    """How many clips the labels of `name` list. No clip is opened."""
    return len(_rows(one_of("name", name, NAMES), found, None))


def open_jhmdb(name="core8", *, root=None, size=SIZE, progress=False, facts=None) -> ClipSet:
    """The clips of `name`, "core8" or "jhmdb21", area-resized to `size` = (H, W) from either source.

    The first time every clip is decoded into the cache. A clip that is missing, cannot be decoded or is not
    the published file is left out and listed in `faults`. `source` says which files these are. `facts`
    replaces data/catalogue/jhmdb21.csv, the table that the original files are recognised by. Raises
    FileNotFoundError when J-HMDB is not there, ValueError when nothing in it can be used.
    """
    entries, classes, faults, found = _entries(name, root, facts)
    title = f"J-HMDB {name}, {found.kind}"
    return build_clip_set(name, title, classes, entries, size=size, faults=faults, progress=progress)


def verify(name="core8", *, root=None, facts=None) -> list[Fault]:
    """Compare each clip's SHA-256 with the published one; returns the faults. Nothing is decoded."""
    entries, _, faults, _ = _entries(name, root, facts)
    for entry in entries:
        if not entry.path.is_file():
            faults.append(Fault(str(entry.path), "there is no such file"))
        elif entry.sha256 is None:
            faults.append(Fault(str(entry.path), "SHA256SUMS does not list it"))
        elif (digest := file_digest(entry.path)) != entry.sha256:
            faults.append(Fault(str(entry.path), f"its SHA-256 is {digest}, and should be {entry.sha256}"))
    return faults


def _places(root) -> list[Path]:
    if root is not None:
        return [Path(root)]
    # NLUTILS_DATA may name a folder that cannot be written; what `make data` fetched lies in the other one.
    return list(dict.fromkeys([data_root(), project_root() / "data" / "downloads"]))


def _entries(name, root, facts):
    one_of("name", name, NAMES)
    found = find(root)
    if found is None:
        places = " or ".join(str(place) for place in _places(root))
        raise FileNotFoundError(f"J-HMDB is not in {places}; {_WAYS_OUT}")
    rows = _rows(name, found, facts)
    classes = sorted({row["class"] for row in rows})
    if found.kind == "prepared copy":
        return _prepared(rows, found.folder), classes, [], found
    entries, faults = _originals(rows, found.folder)
    return entries, classes, faults, found


def _rows(name: str, found: Found, facts) -> list[dict[str, str]]:
    if found.kind == "prepared copy":
        rows = read_table(found.folder / "labels.csv", ["path", "class", "group", "cv_fold", "core8"])
    else:
        facts = facts or project_root() / "data" / "catalogue" / "jhmdb21.csv"
        rows = read_table(facts, ["clip", "class", "group", "fold", "core8", "original_sha256"])
    for row in rows:
        fold = row.setdefault("fold", row.get("cv_fold", ""))
        if not fold.isdecimal():
            raise ValueError(
                f"{found.folder}: fold {fold!r} of {row.get('path') or row['clip']} is not a whole number"
            )
    return rows if name == "jhmdb21" else [row for row in rows if row["core8"] == "1"]


def _prepared(rows, folder: Path) -> list[Entry]:
    sums = {}
    if (folder / "SHA256SUMS").is_file():
        lines = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
        sums = {path: digest for digest, path in (line.split(maxsplit=1) for line in lines if line.strip())}
    return [
        Entry(
            name=Path(row["path"]).stem,
            kind=row["class"],
            group=row["group"],
            fold=int(row["fold"]),
            path=folder / row["path"],
            sha256=sums.get(row["path"]),
        )
        for row in rows
    ]


def _originals(rows, folder: Path) -> tuple[list[Entry], list[Fault]]:
    """Entries in the table's order. Clips that it does not list are ignored; a missing one is a fault."""
    by_content = {file_digest(path): path for path in sorted(folder.glob("*/*.avi"))}
    entries, faults = [], []
    for row in rows:
        digest = row["original_sha256"]
        if digest not in by_content:
            clip = f"{row['class']}/{row['clip']}"
            faults.append(
                Fault(clip, f"no file in {folder} has its content (SHA-256 {digest}); fetch the archive anew")
            )
            continue
        entries.append(
            Entry(row["clip"], row["class"], row["group"], int(row["fold"]), by_content[digest], digest)
        )
    return entries, faults
