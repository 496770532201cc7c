"""Where things lie: the project's root, data sets, caches, results; and writing files atomically."""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "atomic_path",
    "cache_root",
    "data_root",
    "own_results_root",
    "project_root",
    "results_root",
    "shown",
]


def project_root() -> Path:
    """The checkout that this package lies in; the current folder when it was installed elsewhere."""
    checkout = Path(__file__).resolve().parent.parent
    return checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()


def data_root() -> Path:
    """The folder that holds data sets, one folder each: `$NLUTILS_DATA`, else `data/downloads`.

    A relative `$NLUTILS_DATA` is taken from the project's root, so that it means the same folder in a
    notebook, a test and a shell. Raises FileNotFoundError when it is set and no such folder exists.
    """
    named = os.environ.get("NLUTILS_DATA", "").strip()
    if not named:
        return project_root() / "data" / "downloads"
    root = (project_root() / Path(named).expanduser()).resolve()
    if not root.is_dir():
        raise FileNotFoundError(
            f"NLUTILS_DATA={named!r} means {root}, and there is no such folder; "
            "name the folder that holds the data sets, or unset the variable"
        )
    return root


def cache_root() -> Path:
    """The folder of decoded clips and optical flow: `$NLUTILS_CACHE`, else `data/cache`.

    It may be deleted at any time: what it holds is made anew.
    """
    named = os.environ.get("NLUTILS_CACHE", "").strip()
    return (
        (project_root() / Path(named).expanduser()).resolve() if named else project_root() / "data" / "cache"
    )


def results_root() -> Path:
    """The folder of recorded results, `data/results`."""
    return project_root() / "data" / "results"


def own_results_root() -> Path:
    """The folder of results of your own clips, `build/results`, which git does not keep."""
    return project_root() / "build" / "results"


def shown(path) -> str:
    """`path` as a person reads it best: from the current folder, or whole where Windows has no such way."""
    try:
        return os.path.relpath(path)
    except ValueError:  # another drive
        return str(path)


@contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`, and move it there when the block ends without an error.

    Whoever reads `path` sees the old file or the whole new one, never a part; a killed process leaves the
    old file as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files that only their owner can read; give the file the usual permissions.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
