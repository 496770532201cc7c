"""Recorded measurements: one JSON file a case, with what it depended on."""

import argparse
import fnmatch
import functools
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nlutils.origin import commit, digest, processor
from nlutils.paths import atomic_path, project_root, results_root, shown

__all__ = [
    "code_digest",
    "folder",
    "provenance",
    "read",
    "record_path",
    "record_rows",
    "write",
    "write_cases",
]

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


def write_cases(name: str, source: dict, cases: list[dict]) -> None:
    """Write `cases`, compared in float64, to data/results/peers/`name`.json atomically, a line a case."""
    path = results_root() / "peers" / f"{name}.json"
    head = f'"dtype": "float64",\n"provenance": {json.dumps(source)}'
    lines = ",\n".join(json.dumps(case) for case in cases)
    with atomic_path(path) as temporary:
        temporary.write_text(f'{{{head},\n"cases": [\n{lines}\n]}}\n', encoding="utf-8")
    print("written to", shown(path))


def record_rows(study: str, rows: dict, record, code: str, say, description: str, arguments=None) -> int:
    """The command of a benchmark of rows: record those that are asked for, a file each.

    study   the folder in data/results
    rows    {name: what is trained, and how}
    record  called with a name and its row; returns what is written
    code    the digest of what the records depend on; a row that it has recorded is passed over
    say     makes the texts of a record that are printed behind its path

    Returns 1 when a pattern names no row, else 0.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--row", default="*", help=f"a row, or a pattern such as '{next(iter(rows))[:3]}*'")
    parser.add_argument("--list", action="store_true", help="print the rows")
    parser.add_argument("--again", action="store_true", help="also what is recorded already")
    options = parser.parse_args(arguments)
    chosen = {name: row for name, row in rows.items() if fnmatch.fnmatch(name, options.row)}
    if not chosen:
        print(f"--row {options.row!r} names no row; there are: {', '.join(rows)}", file=sys.stderr)
        return 1
    if options.list:
        print("\n".join(chosen))
        return 0
    for name, row in chosen.items():
        path = results_root() / study / f"{name}.json"
        if not options.again and _recorded_by(path) == code:
            continue
        result = record(name, row)
        write(result, path)
        print(shown(path), *say(result), flush=True)
    return 0


def _recorded_by(path):
    """The digest of the sources that made the record at `path`; None where there is none."""
    return json.loads(path.read_text(encoding="utf-8"))["provenance"]["code"] if path.is_file() else None


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
