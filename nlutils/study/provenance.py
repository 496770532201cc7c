"""Where a result comes from: the code, the versions, the kind of machine."""

import functools
import hashlib
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from nlutils.paths import project_root

__all__ = ["code_digest", "provenance"]

ROOMS = ("torch", "study", "video")


@functools.cache
def code_digest() -> str:
    """The SHA-256 of the sources that a result depends on: the names and bytes of
    nlutils/{torch,study,video}/**.py.

    It is taken once a process, and tells results of the same code apart from others whatever was committed.
    """
    package = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted(path for room in ROOMS for path in (package / room).rglob("*.py")):
        if path.name == "tables.py":  # it only shows results
            continue
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def provenance(device: torch.device) -> dict:
    """Commit, digest of the code, versions, and the kind of machine (no name of it)."""
    names = ("torch", "numpy", "opencv-python-headless", "av")
    machine = {
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return {
        **_commit(),
        "code": code_digest(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
        "machine": machine,
    }


@functools.cache
def _commit() -> dict:
    """The commit that is checked out, and whether the package differs from it; None outside a checkout."""
    try:
        commit = _git("rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(_git("status", "--porcelain", "--", "nlutils"))}
    except (OSError, subprocess.CalledProcessError):  # no git here, or no checkout
        return {"commit": None, "changed": None}


def _git(*words) -> str:
    done = subprocess.run(
        ["git", "-C", str(project_root()), *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
