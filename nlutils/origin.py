"""Where a recorded result comes from: the commit, a digest of the sources, the processor."""

import functools
import hashlib
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from nlutils.paths import project_root

__all__ = ["commit", "digest", "processor"]


@functools.cache
def commit(*folders: str) -> dict:
    """{"commit": the one that is checked out, "changed": whether `folders` of the project differ from it}.

    Both None outside a checkout.
    """
    try:
        changed = _git("status", "--porcelain", "--", *folders)
        return {"commit": _git("rev-parse", "HEAD"), "changed": bool(changed)}
    except (OSError, subprocess.CalledProcessError):  # no git here, or no checkout
        return {"commit": None, "changed": None}


def digest(files: Iterable[Path], root: Path) -> str:
    """SHA-256 over the names, seen from `root`, and the bytes of `files`, in the order of their names.

    It tells results of the same code apart from others, whatever was committed.
    """
    total = hashlib.sha256()
    for file in sorted(files):
        total.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return total.hexdigest()


def processor() -> str:
    """The model of the processor, as the system calls it."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git(*words) -> str:
    command = ["git", "-C", str(project_root()), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
