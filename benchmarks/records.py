"""Recorded measurements: one JSON file a case, with what it depended on."""

import functools
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nlutils.origin import commit, digest, processor
from nlutils.paths import atomic_path, project_root, results_root

__all__ = ["code_digest", "folder", "provenance", "read", "record_path", "write"]

# What a measurement depends on. Files of these folders whose names begin as in UNRELATED are not among it.
SOURCES = {
    "torch": ("nlutils/instantiations.py", "nlutils/torch/operations", "nlutils/torch/blocks"),
    "keras": ("nlutils/instantiations.py", "nlutils/keras/operations", "nlutils/keras/blocks"),
}
UNRELATED = ("compact_generalized", "insert", "attention")
PACKAGES = {
    "torch": ("torch", "numpy", "mmcv-lite", "pytorchvideo", "timm"),
    "keras": ("keras", "tensorflow-cpu", "tensorflow", "numpy"),
}


def folder() -> Path:
    """data/results/operation."""
    return results_root() / "operation"


def record_path(name: str, device: str, dtype: str, root=None) -> Path:
    """`<case>.json`; on a GPU `<case>-cuda-<dtype>.json`."""
    suffix = "" if device == "cpu" else f"-{device}-{dtype}"
    return Path(root or folder()) / f"{name}{suffix}.json"


def write(record: dict, path) -> Path:
    """Write `record` atomically, a line a field; returns the path."""
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in record.items()]
    with atomic_path(path) as temporary:
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return Path(path)


def read(path) -> dict:
    """The record in the file `path`; ValueError, naming the file, when it is not one."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        if "case" not in record or "values" not in record:
            raise ValueError("it has no 'case' or no 'values'")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a recorded measurement: {error}") from error
    return record


@functools.cache
def code_digest(framework: str) -> str:
    """SHA-256 of the names and bytes of the sources that a measurement of `framework` depends on."""
    root = project_root()
    paths = [root / source for source in SOURCES[framework]]
    files = (file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path]))
    return digest((file for file in files if not file.name.startswith(UNRELATED)), root)


def provenance(framework: str, device: str = "cpu") -> dict:
    """Commit, digest of the code, versions, and the kind of machine (no name of it)."""
    machine = {
        "system": platform.system(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": 1,
        "device": device,
    }
    if framework == "torch":
        import torch

        machine["instructions"] = torch.backends.cpu.get_cpu_capability()
        if device == "cuda":
            machine["gpu"] = torch.cuda.get_device_name()
    versions = {"python": platform.python_version()}
    for name in PACKAGES[framework]:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # not in this environment
            continue
    return {
        **commit("nlutils", "benchmarks"),
        "code": code_digest(framework),
        "versions": versions,
        "machine": machine,
    }
