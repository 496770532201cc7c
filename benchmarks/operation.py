"""Measure the non-local operation beside other implementations; README.md says how.

    python benchmarks/operation.py --list
    python benchmarks/operation.py                      # every case that is not recorded yet
    python benchmarks/operation.py --case dot_product-6272 --case "*-memory"

A case runs in a process of its own, a memory case in one for each variant, one after the other.
"""

import argparse
import dataclasses
import datetime
import fcntl
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import records
from benchmarks.cases import CASES, FIXED, Case, judge_record
from benchmarks.measure import available_gib, medians, ratios

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TF_CPP_MIN_LOG_LEVEL": "3"}


def main(words=None) -> int:
    """The command line; returns 1 when a case could not be measured."""
    options = _parser().parse_args(words)
    if options.child:
        return _child(options)
    chosen = [case for case in CASES.values() if _wanted(case, options)]
    if not chosen:
        sys.exit(f"no case is named {' or '.join(options.case)}; --list shows their names")
    if options.list:
        for case in chosen:
            print(_line(case, options))
        return 0
    if options.size and not options.out:
        sys.exit("--size and --channels are for trials: give --out, a folder for their records")
    with _alone():
        return _measure_all([_resized(case, options) for case in chosen], options)


def _parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="the cases, and what is recorded")
    parser.add_argument(
        "--case", action="append", help="a name, or a pattern such as 'gaussian-*'; repeatable"
    )
    parser.add_argument("--framework", choices=("torch", "keras"), default="torch")
    parser.add_argument("--again", action="store_true", help="measure what is recorded already")
    parser.add_argument("--repeats", type=int, help="instead of the case's own number")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: on cuda"
    )
    parser.add_argument("--out", type=Path, help="folder of the records (data/results/operation)")
    parser.add_argument("--size", type=_size, help="T,H,W in place of the case's, for trials")
    parser.add_argument("--channels", type=int, default=16, help="with --size")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    return parser


def _size(text):
    frames, height, width = (int(side) for side in text.split(","))
    return frames, height, width


def _wanted(case, options) -> bool:
    named = not options.case or any(fnmatch.fnmatch(case.name, pattern) for pattern in options.case)
    return named and case.framework == options.framework


def _resized(case: Case, options) -> Case:
    if options.repeats:
        case = dataclasses.replace(case, repeats=options.repeats)
    if options.size:
        base = options.size if case.base else ()
        size = (4 * options.size[0], *options.size[1:]) if base else options.size
        case = dataclasses.replace(case, size=size, base=base, channels=options.channels, gib=0.5)
    return case


def _line(case, options) -> str:
    path = records.record_path(case.name, options.device, options.dtype, options.out)
    text = f"{case.name:32} {case.measure:7} N = {case.positions:6,}  {case.gib:4.1f} GiB free"
    if not path.is_file():
        return f"{text}  not recorded"
    record = records.read(path)
    stale = "" if _is_current(record, case, options) else ", of other code or another case"
    targets = judge_record(case, record)
    met = sum(target["met"] is True for target in targets)
    return f"{text}  {met} of {len(targets)} targets met, {record['seconds']:.0f} s{stale}"


def _is_current(record, case, options) -> bool:
    """Whether the same was measured, by the same code; targets do not matter, they are judged anew."""
    if record["provenance"]["code"] != records.code_digest(case.framework):
        return False
    described = _described(case, options)
    del described["repeats"]  # the file says how many there were
    if any(record.get(name) != value for name, value in described.items()):
        return False
    values, raised = record["values"], {words.split()[0] for words in record.get("raised", ())}
    variants = {*case.variants, "base"} if case.base else set(case.variants)
    same_variants = options.device != "cpu" or variants == set(values)  # a GPU leaves some out
    return same_variants and set().union(*values.values()) == set(case.passes) and raised == set(case.raises)


class _alone:
    """Two measurements at once would disturb each other, and need the memory of both."""

    def __enter__(self):
        self.file = open(Path(tempfile.gettempdir(), "nlutils-benchmark.lock"), "a")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"another benchmark is running ({self.file.name} is locked); wait until it has ended")

    def __exit__(self, *_):
        self.file.close()


def _measure_all(cases, options) -> int:
    failed = []
    begun = time.perf_counter()
    for case in cases:
        path = records.record_path(case.name, options.device, options.dtype, options.out)
        if path.is_file() and not options.again:
            record = records.read(path)
            if _is_current(record, case, options):
                print(f"{case.name}: recorded already", flush=True)
                _judge_anew(record, case, path)
                continue
        try:
            record = _measure(case, options)
        except RuntimeError as error:
            failed.append(case.name)
            print(f"{case.name}: {error}", flush=True)
            continue
        records.write(record, path)
        print(f"{case.name}: {record['seconds']:.0f} s", flush=True)
        for target in record["targets"]:
            print("  " + _verdict(target, case), flush=True)
    print(
        f"{len(cases) - len(failed)} of {len(cases)} cases are recorded, {time.perf_counter() - begun:.0f} s"
    )
    if failed:
        print(f"not measured: {', '.join(failed)}")
    return bool(failed)


def _judge_anew(record, case, path) -> None:
    """Targets may have changed since; the measurement stays."""
    targets = judge_record(case, record)
    if targets != record["targets"]:
        records.write({**record, "targets": targets}, path)
        for target in targets:
            print("  " + _verdict(target, case), flush=True)


def _verdict(target, case) -> str:
    unit = {"time": "x", "growth": "x", "memory": "MiB"}[case.measure]
    value = "nothing" if target["value"] is None else f"{target['value']:.3g} {unit}"
    word = {True: "met", False: "MISSED", None: "not measured"}[target["met"]]
    wanted = f"wanted {target['sense']} {target['bound']:g}"
    return f"{word}: {target['variant']}, {target['pass']}: {value}, {wanted}"


def _measure(case: Case, options) -> dict:
    """Run the case's processes and put its record together."""
    if options.device == "cpu" and available_gib() < case.gib:
        raise RuntimeError(f"{available_gib():.1f} GiB of memory are free, and it needs {case.gib:g}")
    begun = time.perf_counter()
    if case.measure == "memory":
        # On a GPU the textbook form stands beside, where its maps fit.
        has_peers = len(case.variants) > 1 and case.instantiation != "concatenation"
        plain = ("plain",) if options.device == "cuda" and has_peers else ()
        names = [name for name in case.variants + plain if options.device == "cpu" or FIXED not in name]
        parts = {name: _run(case, options, name) for name in names}
        left_out = {name: part["left_out"] for name, part in parts.items() if "left_out" in part}
        parts = {name: part for name, part in parts.items() if name not in left_out}
        done = {"values": {name: part["values"] for name, part in parts.items()}, "left_out": left_out}
        done["wall"] = {name: part["wall"] for name, part in parts.items()}
        provenance = next(iter(parts.values()))["provenance"]
    else:
        done = _run(case, options)
        provenance = done.pop("provenance")
    middle, found = medians(done["values"]), None
    if case.measure == "time":
        found = ratios(middle, done.get("ours") or dict.fromkeys(case.variants[1:], "nlutils"))
    elif case.measure == "growth":
        found = {"nlutils": ratios(middle, {"nlutils": "base"})["nlutils"]}
    record = {
        "case": case.name,
        **_described(case, options),
        **{name: value for name, value in done.items() if value},
        "medians": middle,
        **({"ratios": found} if found else {}),
    }
    return {
        **record,
        "targets": judge_record(case, record),
        "seconds": round(time.perf_counter() - begun, 1),
        "provenance": provenance,
    }


def _described(case: Case, options) -> dict:
    return {
        "measure": case.measure,
        "unit": "MiB" if case.measure == "memory" else "s",
        "framework": case.framework,
        "instantiation": case.instantiation,
        "level": case.level,
        "positions": case.positions,
        "size": list(case.size),
        **({"base": list(case.base)} if case.base else {}),
        "batch": 1,
        "channels": case.channels,
        "inner": case.inner,
        "device": options.device,
        "dtype": options.dtype,
        "repeats": case.repeats,
    }


def _run(case: Case, options, variant=None) -> dict:
    """One child process: what it prints as its last line."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(dataclasses.asdict(case))]
    command += ["--device", options.device, "--dtype", options.dtype]
    command += ["--variant", variant] if variant else []
    environment = {**os.environ, **ENVIRONMENT}
    if variant and variant.endswith(FIXED):
        environment["MALLOC_MMAP_THRESHOLD_"] = str(2**17)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode < 0:
        raise RuntimeError(
            f"its process was ended by signal {-done.returncode}; 9 may mean too little memory"
        )
    if done.returncode:
        raise RuntimeError(f"its process failed:\n{done.stderr.strip()[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _child(options) -> int:
    """Measure one case in this process and print the result."""
    fields = json.loads(options.child)
    for name, value in fields.items():
        fields[name] = tuple(value) if isinstance(value, list) else value
    case = Case(**{**fields, "targets": ()})
    if case.framework == "keras":
        from benchmarks import keras_side as side
    else:
        from benchmarks import torch_side as side
    started = datetime.datetime.now(datetime.UTC).date().isoformat()
    where = {"device": options.device, "dtype": options.dtype}
    if case.measure == "memory":
        try:
            done = side.measure_memory(case, options.variant, **where)
        except ModuleNotFoundError as error:
            if options.device == "cpu":
                raise
            done = {"left_out": str(error)}
    else:
        done = getattr(side, f"measure_{case.measure}")(case, **where)
    done["provenance"] = {"date": started, **records.provenance(case.framework, options.device)}
    print(json.dumps(done))
    return 0


if __name__ == "__main__":
    sys.exit(main())
