"""Which data sets there are, what they ask of you, and how to open their clips."""

import os
from dataclasses import dataclass
from pathlib import Path

from nlutils.paths import project_root
from nlutils.video.clips import ClipSet

__all__ = ["CATALOGUE", "DataSet", "chosen_clips", "data_set", "describe_source", "open_clips"]


@dataclass(frozen=True)
class DataSet:
    """A data set that can be fetched: an archive with a published checksum, and its terms.

    `folder` is the folder that it is unpacked into, and `contents` a folder that must be in it; `prepared` is
    a file by which a prepared copy of the same clips is known. `size` is the archive's bytes; None when only
    the server knows.
    """

    name: str
    title: str
    address: str
    md5: str
    size: int | None
    page: str
    terms: str
    citation: str
    folder: str
    contents: str
    prepared: str


CATALOGUE = {
    "jhmdb21": DataSet(
        name="jhmdb21",
        title="J-HMDB, 928 clips of 21 human actions, 320 x 240 (793 are used; core8 is a part of them)",
        address="https://files.is.tue.mpg.de/jhmdb/JHMDB_video.zip",
        md5="0aca5af988892c8c2afe652a30544b8c",
        size=None,
        page="http://jhmdb.is.tue.mpg.de",
        terms=(
            "The clips come from films and from YouTube, by way of the HMDB51 data set. They belong to their "
            "makers, and are offered for research. This project does not pass them on; nor should you; "
            "read the page before you use them."
        ),
        citation=(
            "H. Jhuang, J. Gall, S. Zuffi, C. Schmid, M. J. Black: Towards understanding action recognition. "
            "ICCV 2013. Built on H. Kuehne, H. Jhuang, E. Garrote, T. Poggio, T. Serre: HMDB: a large video "
            "database for human motion recognition. ICCV 2011."
        ),
        folder="JHMDB_video",
        contents="ReCompress_Videos",
        prepared="jhmdb21/labels.csv",
    ),
}

# core8 is a choice of classes, not an archive of its own.
_PART_OF = {"core8": "jhmdb21"}

_RELATIONS = ("same_action", "same_pattern")
_MADE_HERE = ("procedural", *_RELATIONS)
_NAMES = ("auto", *_MADE_HERE, "core8", "jhmdb21")


def data_set(name: str) -> DataSet:
    """The catalogue's entry for `name`. Raises ValueError for a name that is not in it."""
    known = _PART_OF.get(name, name)
    if known not in CATALOGUE:
        names = ", ".join(map(repr, [*CATALOGUE, *_PART_OF]))
        raise ValueError(f"name={name!r} is no data set that can be fetched; use one of {names}")
    return CATALOGUE[known]


def open_clips(name: str | os.PathLike | None = None, **options) -> ClipSet:
    """The labelled clips of a data set, with group-disjoint folds.

    `name` is "procedural" (six actions, made here, nothing to fetch), "same_action" or "same_pattern" (made
    here: do two far-apart places show the same?), "core8" or "jhmdb21" (real clips of J-HMDB), the path of a
    folder of clips, or "auto": core8 when it is there, else procedural; `source` of the result says which.
    None means `$NLUTILS_CLIPS`, and "auto" when that is not set. A relative path in `$NLUTILS_CLIPS` starts
    at the project's root.

    `options` go to the data set's own function: procedural.actions_clip_set(count, frames, size, seed),
    procedural.relation_clip_set(name, count, frames, size, seed),
    jhmdb.open_jhmdb(root, size, progress), folder.open_folder(size, progress). They need a name: what None
    and "auto" mean differs between machines.

    Raises ValueError for a name that is neither known nor a folder, FileNotFoundError when the data set is
    not here.
    """
    if options and name in (None, "auto"):
        raise ValueError(
            f"options {sorted(options)} belong to one data set; name it, instead of name={name!r}"
        )
    which = chosen_clips(name)
    if isinstance(which, Path):
        from nlutils.video.folder import open_folder

        return open_folder(which, **options)
    if which == "auto":
        which = _auto()
    if which == "procedural":
        from nlutils.video.procedural import actions_clip_set

        return actions_clip_set(**options)
    if which in _RELATIONS:
        from nlutils.video.procedural import relation_clip_set

        return relation_clip_set(which, **options)
    from nlutils.video.jhmdb import open_jhmdb

    return open_jhmdb(which, **options)


def describe_source(name: str | os.PathLike | None = None) -> str:
    """One sentence: which clips `open_clips(name)` opens on this machine, and why. No clip is opened."""
    which = chosen_clips(name)
    asked = "name" if name is not None else "NLUTILS_CLIPS"
    if isinstance(which, Path):
        return f"The clips are those of the folder {which.name}, as {asked} says."
    if which in _MADE_HERE:
        return f"The clips are procedural (made here, not filmed), as {asked} says."
    from nlutils.video import jhmdb

    found = jhmdb.find()
    if found is None and which == "auto":
        return (
            "The clips are procedural (made here, not filmed), for no real ones were found; `make data` "
            "fetches J-HMDB, and NLUTILS_DATA names a folder that holds it."
        )
    if found is None:
        return f"The clips are to be J-HMDB {which}, as {asked} says, and are not here: run `make data`."
    kind, why = ("core8", "found on this machine") if which == "auto" else (which, f"as {asked} says")
    return f"The clips are J-HMDB {kind} ({found.kind}, {jhmdb.count(kind, found)} clips), {why}."


def _auto() -> str:
    from nlutils.video.jhmdb import find

    return "core8" if find() else "procedural"


def chosen_clips(name) -> str | Path:
    """A known name, or the path of a folder that exists."""
    where = "name"
    if name is None:
        where, name = "NLUTILS_CLIPS", os.environ.get("NLUTILS_CLIPS", "").strip() or "auto"
    if name in _NAMES:
        return name
    folder = Path(name).expanduser()
    if where == "NLUTILS_CLIPS":
        folder = project_root() / folder
    if not folder.is_dir():
        known = ", ".join(map(repr, _NAMES))
        raise ValueError(
            f"{where}={str(name)!r} is not known, and no such folder exists; use {known} or a folder"
        )
    return folder.resolve()
