"""Recorded conformance reports: data/results/conformance/<name>.json."""

import json
from dataclasses import dataclass
from pathlib import Path

from nlutils.conformance.report import Report
from nlutils.origin import digest
from nlutils.paths import atomic_path, results_root

__all__ = ["Record", "code_digest", "read_recorded", "write_record"]


@dataclass(frozen=True)
class Record:
    """A report and where it comes from.

    name        of the file, such as "mmcv-NonLocal2d-dot_product"
    library     "mmcv-lite"; `version` of it; `module`: the class; `arguments`: what it was made with
    maps        the shape of the example input
    provenance  date, our commit, `code_digest` of the suite, versions of Python and the framework
    """

    name: str
    library: str
    version: str
    module: str
    arguments: dict
    maps: tuple
    report: Report
    provenance: dict


def code_digest() -> str:
    """SHA-256 over the source of this suite: a record with another one was made by other checks."""
    folder = Path(__file__).parent
    return digest(folder.glob("*.py"), folder)


def write_record(record: Record, root=None) -> Path:
    """Write one record atomically into `root`, `data/results/conformance` when None; returns the path."""
    path = _folder(root) / f"{record.name}.json"
    fields = {key: value for key, value in vars(record).items() if key != "report"}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in fields.items()]
    text = "{\n" + ",\n".join(lines) + f',\n"report": {record.report.to_json()}\n}}\n'
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def read_recorded(root=None) -> list[Record]:
    """All recorded reports, by library and name; FileNotFoundError when there are none, ValueError for a file
    that is none."""
    folder = _folder(root)
    # A name that begins with a dot is a file that is being written.
    paths = sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))
    if not paths:
        raise FileNotFoundError(
            f"no conformance report is recorded in {folder}; benchmarks/conformance_of_peers.py records them"
        )
    return sorted((_read(path) for path in paths), key=lambda record: (record.library, record.name))


def _read(path):
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        report = Report.from_json(json.dumps(fields.pop("report")))
        return Record(report=report, maps=tuple(fields.pop("maps")), **fields)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a recorded conformance report: {error}") from error


def _folder(root):
    return Path(root) if root else results_root() / "conformance"
