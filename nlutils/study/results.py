"""Recorded results: one JSON file a run, and the statistics that are computed from them.

A run is one network trained on all folds but one and tested on that one. `data/results/<study>/<run>.json`
holds its settings, the logits of every test clip, its cost and its provenance.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from scipy.special import log_softmax, logsumexp

from nlutils.paths import atomic_path, results_root

__all__ = [
    "Interval",
    "Run",
    "correct_by_clip",
    "difference_interval",
    "interval",
    "is_recorded",
    "late_fusion",
    "read_runs",
    "trainings_interval",
    "write_run",
]

DRAWS = 10_000


@dataclass(frozen=True)
class Run:
    """One run as it is recorded. `logits[i]` belongs to the clip `names[i]` of class `classes[labels[i]]`.

    `fold` is a list where several were left out together. `views[time][i]` is the class that the trained
    network names for the clip `names[i]` when its steps come in that order. `start` says where its first
    weights came from, as `nlutils.study.start.Start.record`; {} where they were drawn. `framework` trained
    it: "torch" or "keras". `maps` are statistics of its blocks' maps (`nlutils.study.maps`).
    """

    study: str
    run: str
    row: str
    model: str
    options: dict
    input: str
    fold: int | list
    seed: int
    recipe: dict
    data: dict
    accuracy: float
    losses: list
    cost: dict
    seconds: dict
    provenance: dict
    classes: list
    names: list
    groups: list
    labels: list
    logits: list
    views: dict = field(default_factory=dict)
    start: dict = field(default_factory=dict)
    framework: str = "torch"
    maps: dict = field(default_factory=dict)

    @property
    def right(self) -> np.ndarray:
        """Whether each clip is classified right, in the order of `names`."""
        return np.argmax(self.logits, axis=1) == np.asarray(self.labels)


def run_path(study: str, run: str, root=None) -> Path:
    """`data/results/<study>/<run>.json`."""
    return Path(root or results_root()) / study / f"{run}.json"


def write_run(result: Run, root=None) -> Path:
    """Write `result` atomically; returns the path. Raises ValueError for numbers that are not finite."""
    if not np.isfinite(np.asarray(result.logits, dtype=float)).all():
        raise ValueError(f"{result.run} has logits that are not finite")
    path = run_path(result.study, result.run, root)
    # A line a field keeps the files readable and their changes small.
    lines = [
        f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in asdict(result).items()
    ]
    with atomic_path(path) as temporary:
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return path


def read_run(path) -> Run:
    """The run in the file `path`; ValueError, naming the file, when it is not one."""
    try:
        return Run(**json.loads(Path(path).read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a recorded run: {error}") from error


def _paths(study, root):
    folder = Path(root or results_root()) / study
    # A name that begins with a dot is a file that is being written.
    return sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))


def is_recorded(study: str, root=None) -> bool:
    """Whether `read_runs` finds a run of `study`."""
    return bool(_paths(study, root))


def read_runs(study: str, root=None) -> list[Run]:
    """All recorded runs of `study`, sorted by row, fold and seed; FileNotFoundError when there are none."""
    runs = [read_run(path) for path in _paths(study, root)]
    if not runs:
        raise FileNotFoundError(
            f"no run of {study!r} is recorded in {Path(root or results_root()) / study}; "
            "nlutils.study.run_study records them"
        )
    return sorted(runs, key=lambda run: (run.row, str(run.fold), run.seed))


def late_fusion(row: str, *rows: list[Run]) -> list[Run]:
    """The runs of a new row that averages the class probabilities of others, fold by fold and seed by seed.

    Nothing is trained: scores are the logarithms of the mean of softmaxes (Simonyan and Zisserman, NIPS 2014,
    section 2). Weights, multiply-adds and seconds add up. Raises ValueError for rows of other folds,
    seeds or clips.
    """
    cells = [{(str(run.fold), run.seed): run for run in runs} for runs in rows]
    if any(cell.keys() != cells[0].keys() for cell in cells):
        raise ValueError(f"{row}: the rows were not tested on the same folds with the same seeds")
    fused = []
    for key, first in cells[0].items():
        parts = [cell[key] for cell in cells]
        if any((part.names, part.labels) != (first.names, first.labels) for part in parts):
            raise ValueError(f"{row}: the rows were not tested on the same clips in fold {key[0]}")
        scores = logsumexp([log_softmax(part.logits, axis=1) for part in parts], axis=0) - np.log(len(parts))
        right = scores.argmax(axis=1) == np.asarray(first.labels)
        costs = {
            name: [part.cost[name] for part in parts]
            for name in ("parameters", "multiply_adds", "forward_ms")
        }
        sums = {name: None if None in values else sum(values) for name, values in costs.items()}
        fused.append(
            replace(
                first,
                run=first.run.replace(first.row, row, 1),
                row=row,
                input=" + ".join(part.input for part in parts),
                accuracy=float(right.mean()),
                logits=scores.tolist(),
                cost=first.cost | sums | {"training_mb": None},
                seconds={
                    name: sum(part.seconds[name] for part in parts)
                    for name in first.seconds
                    if all(name in part.seconds for part in parts)
                },
                views={},
                maps={},
            )
        )
    return fused


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self):
        return f"{100 * self.value:.0f} % ({100 * self.low:.0f} to {100 * self.high:.0f})"


def correct_by_clip(runs: list[Run]) -> dict[str, tuple[str, float]]:
    """{clip: (its group, the share of seeds that classify it right)} over the runs of one row.

    Each clip is tested by the fold that left it out, so all folds together test every clip once a seed.
    """
    if len({run.row for run in runs}) != 1:
        raise ValueError(f"runs of one row are needed, not of {sorted({run.row for run in runs})}")
    votes: dict[str, list] = {}
    group_of = {}
    for run in runs:
        for name, group, right in zip(run.names, run.groups, run.right, strict=True):
            votes.setdefault(name, []).append(right)
            group_of[name] = group
    return {name: (group_of[name], float(np.mean(right))) for name, right in sorted(votes.items())}


def interval(runs: list[Run], draws: int = DRAWS, seed: int = 0) -> Interval:
    """The accuracy of one row, and its 95 % percentile bootstrap interval over source groups.

    The accuracy is the share of all tested clips that are right: the mean over folds, each weighted by its
    clips. Clips of a group come from one film or person and are right or wrong together, so groups are drawn
    with replacement, not clips (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 8).
    """
    clips = correct_by_clip(runs)
    return bootstrap(
        [group for group, _ in clips.values()], [right for _, right in clips.values()], draws, seed
    )


def difference_interval(runs_a: list[Run], runs_b: list[Run], draws: int = DRAWS, seed: int = 0) -> Interval:
    """Accuracy of row a minus that of row b on the same clips, with its 95 % interval, groups drawn for both
    at once. It tells what other clips would do, not other trainings.

    Raises ValueError when the two rows were not tested on the same clips.
    """
    a, b = _same_clips(runs_a, runs_b)
    return bootstrap([a[name][0] for name in a], [a[name][1] - b[name][1] for name in a], draws, seed)


def trainings_interval(runs_a: list[Run], runs_b: list[Run], draws: int = DRAWS, seed: int = 0) -> Interval:
    """As `difference_interval`, and each row's seeds are drawn as well, with replacement.

    What other clips and other trainings would do. Of few seeds it is too narrow still: the variance of a
    mean over n, drawn from n, comes out (n - 1) / n of what it is. Raises ValueError when the rows, or two
    seeds of one, were not tested on the same clips.
    """
    a, _ = _same_clips(runs_a, runs_b)
    names, index = np.unique([group for group, _ in a.values()], return_inverse=True)
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(names), size=(draws, len(names)))
    drawn, value = [], []
    for runs in (runs_a, runs_b):
        right = _right_by_seed(runs, list(a))
        totals = np.array([np.bincount(index, weights=one) for one in right])
        by_seed = totals[:, picks].sum(axis=2).T
        trained = rng.integers(0, len(right), size=by_seed.shape)
        drawn.append(np.take_along_axis(by_seed, trained, axis=1).mean(axis=1))
        value.append(right.mean())
    means = (drawn[0] - drawn[1]) / np.bincount(index)[picks].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(value[0] - value[1]), float(low), float(high))


def _right_by_seed(runs, names):
    """(seeds, clips): 1 where the run of that seed classifies the clip right."""
    right = []
    for seed in sorted({run.seed for run in runs}):
        clips = correct_by_clip([run for run in runs if run.seed == seed])
        if len(clips) != len(names):
            raise ValueError(
                f"{runs[0].row}: seed {seed} was tested on {len(clips)} of {len(names)} clips; "
                "run its other folds"
            )
        right.append([clips[name][1] for name in names])
    return np.array(right)


def _same_clips(runs_a, runs_b):
    a, b = correct_by_clip(runs_a), correct_by_clip(runs_b)
    if a.keys() != b.keys():
        raise ValueError(
            f"{runs_a[0].row} was tested on {len(a)} clips and {runs_b[0].row} on {len(b)}, "
            f"{len(a.keys() & b.keys())} of them the same; a paired difference needs the same clips"
        )
    return a, b


def bootstrap(groups, values, draws: int = DRAWS, seed: int = 0) -> Interval:
    """The mean of `values` with its 95 % percentile interval, whole `groups` drawn with replacement."""
    names = sorted(set(groups))
    index = np.asarray([names.index(group) for group in groups])
    total = np.bincount(index, weights=np.asarray(values, dtype=float), minlength=len(names))
    count = np.bincount(index, minlength=len(names))
    picks = np.random.default_rng(seed).integers(0, len(names), size=(draws, len(names)))
    means = total[picks].sum(axis=1) / count[picks].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(total.sum() / count.sum()), float(low), float(high))
