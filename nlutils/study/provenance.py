"""Where a result comes from: the code, the versions, the kind of machine."""

import functools
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from nlutils.origin import commit, digest, processor
from nlutils.study.distributed import count
from nlutils.torch.models import list_models, model_options

__all__ = ["code_digest", "provenance"]

# By the framework that trains; Keras starts with PyTorch's weights.
ROOMS = {"torch": ("architectures", "exchange", "torch", "study", "video")}
ROOMS["keras"] = (*ROOMS["torch"], "keras")
# These choose rows or show results; no result depends on them.
SHOWING = (
    "choice.py",
    "command.py",
    "figures.py",
    "listing.py",
    "pages.py",
    "plan.py",
    "predict.py",
    "readme.py",
    "rows.py",
    "side_by_side.py",
    "spread.py",
    "tables.py",
)


@functools.cache
def code_digest(framework: str = "torch") -> str:
    """The digest of what a result depends on, taken once a process.

    These are the Python files of its rooms, and those of the package itself but for the command line's.
    """
    for name in list_models():
        model_options(name)  # imports the network: what runs is what is digested
    package = Path(__file__).resolve().parent.parent
    sources = [path for room in ROOMS[framework] for path in (package / room).rglob("*.py")]
    sources += [path for path in package.glob("*.py") if not path.name.startswith("cli")]
    return digest((path for path in sources if path.name not in SHOWING), package)


def provenance(device: torch.device) -> dict:
    """Commit, digest of the code, versions, and the kind of machine (no name of it)."""
    names = ("torch", "numpy", "opencv-python-headless", "av")
    machine = {
        "system": platform.system(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "processes": count(),
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return {
        **commit("nlutils"),
        "code": code_digest(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
        "machine": machine,
    }
