"""Where a result comes from: the code, the versions, the kind of machine."""

import functools
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from nlutils.origin import commit, digest, processor

__all__ = ["code_digest", "provenance"]

ROOMS = ("architectures", "torch", "study", "video")


@functools.cache
def code_digest() -> str:
    """The digest of what a result depends on, the Python files of `ROOMS`, taken once a process."""
    package = Path(__file__).resolve().parent.parent
    sources = (path for room in ROOMS for path in (package / room).rglob("*.py"))
    return digest((path for path in sources if path.name != "tables.py"), package)  # that one only shows


def provenance(device: torch.device) -> dict:
    """Commit, digest of the code, versions, and the kind of machine (no name of it)."""
    names = ("torch", "numpy", "opencv-python-headless", "av")
    machine = {
        "system": platform.system(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return {
        **commit("nlutils"),
        "code": code_digest(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
        "machine": machine,
    }
