"""The networks of notebook 01, five seeds of each row, recorded for its section 6.

    python benchmarks/local_and_non_local.py --list
    python benchmarks/local_and_non_local.py                 # all rows, 20 minutes on one core
    python benchmarks/local_and_non_local.py --row "new-8-*" --again

One file a row, `data/results/local_and_non_local/<row>.json`. What is trained, and on what, is lifted out
of the notebook's source; a row that these very definitions have recorded is passed over.
"""

import ast
import functools
import hashlib
import math
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.records import record_rows
from nlutils.course.sources import lift, source_paths
from nlutils.instantiations import INSTANTIATIONS
from nlutils.study import provenance
from nlutils.torch import pairwise

TAUGHT = ("places", "assemble", "twins", "draw_patterns", "two_things", "itself", "average", "similarity")
TAUGHT += ("Block", "Deep", "network", "train", "accuracy")
SEEDS = range(5)
STEPS = 800


class Learned(nn.Module):
    """The map of an instantiation with theta and phi of its own: (B, N, C) -> (B, N, N)."""

    def __init__(self, instantiation: str, C: int = 32, d: int = 16):
        super().__init__()
        self.instantiation = instantiation
        self.theta, self.phi = nn.Linear(C, d), nn.Linear(C, d)
        concatenation = instantiation == "concatenation"
        self.w_f = nn.Parameter(torch.randn(2 * d) / math.sqrt(2 * d)) if concatenation else None

    def forward(self, x):
        return pairwise(self.theta(x), self.phi(x), self.instantiation, w_f=self.w_f)


def rows() -> dict:
    """{row: dict(make the block, task, pairs, patterns, steps, channels)}."""
    block, deep = taught("Block"), taught("Deep")
    maps = {name: taught(name) for name in ("itself", "average", "similarity")}
    blocks = {**{name: partial(block, weights) for name, weights in maps.items()}, "deep": deep}
    found = {
        f"relation-{name}": {"block": make, "task": "relation", "steps": 150} for name, make in blocks.items()
    }
    for patterns, pairs, names in (
        ("closed", 1, ("average", "similarity")),
        ("closed", 8, ("average", "similarity")),
        ("new", 1, ("itself", "deep", "average", "similarity")),
        ("new", 2, ("average", "similarity")),
        ("new", 4, ("average", "similarity")),
        ("new", 8, tuple(blocks)),
        ("new", 12, ("average", "similarity")),
    ):
        for name in names:
            found[f"{patterns}-{pairs}-{name}"] = {
                "block": blocks[name],
                "patterns": patterns,
                "pairs": pairs,
            }
    for name in INSTANTIATIONS[1:]:  # the first, the Gaussian, is `similarity`
        found[f"new-8-{name}"] = {"block": lambda name=name: block(Learned(name)), "pairs": 8}
    longer = {"pairs": 8, "steps": 5 * STEPS}
    found["new-8-average-longer"] = {"block": blocks["average"], **longer}
    found["new-2-average-longer"] = {"block": blocks["average"], **longer, "pairs": 2}
    wide = {"block": lambda: block(maps["average"], C=64, d=64), "channels": 64}
    found["new-8-average-wider-longer"] = {**wide, **longer}
    found["new-8-deep-wider"] = {"block": lambda: deep(width=32), "pairs": 8}
    defaults = {"task": "lookup", "patterns": "new", "steps": STEPS, "channels": 32}
    return {name: {**defaults, **row} for name, row in found.items()}


def taught(name):
    """A definition of the notebook."""
    return lift("local_and_non_local", name)


@functools.cache
def digest() -> str:
    """SHA-256 of the definitions, the notebook's and this file's, that a result depends on."""
    (notebook,) = source_paths(["local_and_non_local"])
    definitions = []
    for path, names in ((notebook, TAUGHT), (Path(__file__), ("Learned", "run"))):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if getattr(node, "name", None) in names:
                for inner in ast.walk(node):
                    if isinstance(inner, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(inner):
                        inner.body = inner.body[1:]
                definitions.append(ast.unparse(node))
    return hashlib.sha256("\0".join(definitions).encode()).hexdigest()


def run(row: dict, seed: int) -> dict:
    """Train and test one network: its accuracy, its number of parameters in the block, seconds."""
    network, train, accuracy = taught("network"), taught("train"), taught("accuracy")
    if row["task"] == "relation":
        make, outputs = taught("two_things"), 2
        tests = {"": make(2000, np.random.default_rng(5))}
    else:
        patterns = taught("draw_patterns")(1500, np.random.default_rng(7))
        known, new = patterns[:1000] if row["patterns"] == "new" else patterns[:8], patterns[1000:]
        twins, outputs = taught("twins"), 4
        make = partial(twins, pairs=row["pairs"], patterns=known)
        tests = {
            suffix: twins(500, np.random.default_rng(99), row["pairs"], shown_patterns)
            for suffix, shown_patterns in (("_known", known), ("_new", new))
        }
    start = time.process_time()
    torch.manual_seed(seed)
    net = network(row["block"](), outputs, whole=row["task"] == "relation", C=row["channels"])
    train(net, make, steps=row["steps"], seed=seed)
    seconds = time.process_time() - start
    result = {f"accuracy{suffix}": accuracy(net, *test) for suffix, test in tests.items()}
    if row["task"] == "relation":
        with torch.no_grad():
            result["loss"] = nn.functional.cross_entropy(net(tests[""][0]), tests[""][1]).item()
    result["seconds"] = round(seconds, 1)
    result["parameters"] = sum(p.numel() for p in net[2].parameters())
    return result


def record(name: str, row: dict) -> dict:
    """All seeds of a row."""
    results = [run(row, seed) for seed in SEEDS]
    told = {key: value for key, value in row.items() if key != "block"}
    if row["task"] == "relation":
        told.pop("patterns")
    source = provenance(torch.device("cpu"))
    source["code"] = digest()
    return {
        "study": "local_and_non_local",
        "row": name,
        **told,
        "parameters": results[0]["parameters"],
        "seeds": list(SEEDS),
        **{key: [result[key] for result in results] for key in results[0] if key != "parameters"},
        "provenance": source,
    }


def _accuracies(result):
    for key, values in result.items():
        if key.startswith("accuracy"):
            yield " ".join([f"  {key}", *(f"{value:.3f}" for value in values)])


def main(arguments=None) -> int:
    """Record the rows that are asked for; 1 when a pattern names none."""
    torch.set_num_threads(1)
    return record_rows(
        "local_and_non_local", rows(), record, digest(), _accuracies, __doc__.splitlines()[0], arguments
    )


if __name__ == "__main__":
    sys.exit(main())
