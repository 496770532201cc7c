"""Settings chosen by validation inside the training folds, never by the fold that is reported.

For a fold k, each candidate is trained on all folds but k and j, and validated on j, for every other fold j.
A run that leaves k and j out together validates j for the fold k, and k for the fold j: five folds need ten
runs a candidate.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import combinations

import numpy as np

from nlutils.study.results import Run, late_fusion

__all__ = ["as_chosen", "chosen", "fusions", "pairs", "validation_accuracy"]


def pairs(folds: Iterable[int]) -> list[tuple[int, int]]:
    """Every two of `folds`: what the runs among which is chosen leave out together.

    Raises ValueError for fewer than three folds: nothing would be left to train on.
    """
    folds = sorted(folds)
    if len(folds) < 3:
        raise ValueError(f"folds={folds}: to choose settings inside the training folds needs three or more")
    return list(combinations(folds, 2))


def validation_accuracy(runs: Iterable[Run], fold: int) -> float:
    """The share of clips outside `fold` that are right, each by a network that saw neither it nor `fold`.

    `runs` are those of one candidate, one a pair of folds. Raises ValueError when a pair is missing.
    """
    runs = list(runs)
    folds = sorted({one for run in runs for one in run.fold})
    missing = set(pairs(folds)) - {tuple(sorted(run.fold)) for run in runs}
    if missing or len(runs) > len(pairs(folds)):
        raise ValueError(
            f"{runs[0].row} has {len(runs)} runs, and one for each of the {len(pairs(folds))} pairs of folds "
            f"{folds} is needed; missing: {sorted(missing)}"
        )
    if fold not in folds:
        raise ValueError(f"fold={fold!r} is left out by no run; they have {folds}")
    mine = [run for run in runs if fold in run.fold]
    # Only the clips of `fold` itself are in all of them.
    own = set.intersection(*(set(run.names) for run in mine))
    right = [ok for run in mine for name, ok in zip(run.names, run.right, strict=True) if name not in own]
    return float(np.mean(right))


def chosen(candidates: Mapping[str, Iterable[Run]]) -> dict[int, str]:
    """{fold: the candidate of the highest validation accuracy}; of equal ones the first.

    `candidates` are {name: its runs, one a pair of folds}.
    """
    candidates = {name: list(runs) for name, runs in candidates.items()}
    folds = sorted({fold for runs in candidates.values() for run in runs for fold in run.fold})
    table = {
        fold: {name: validation_accuracy(runs, fold) for name, runs in candidates.items()} for fold in folds
    }
    return {fold: max(scores, key=scores.get) for fold, scores in table.items()}


def fusions(rows: Mapping[str, Iterable[Run]], most: int) -> dict[str, list[Run]]:
    """{name: runs} of each row alone, then of each late fusion of two to `most` rows, called `a + b`.

    `rows` are {name: its runs}, all on the same folds with the same seeds. In this order `chosen` takes the
    fusion of fewest members among equal ones.
    """
    if not 1 <= most <= len(rows):
        raise ValueError(f"most={most}: a fusion has 1 to {len(rows)} members, as many as there are rows")
    made = {name: list(runs) for name, runs in rows.items()}
    for count in range(2, most + 1):
        for members in combinations(rows, count):
            name = " + ".join(members)
            made[name] = late_fusion(name, *(made[member] for member in members))
    return made


def as_chosen(row: str, winners: Mapping[int, str], rows: Mapping[str, Iterable[Run]]) -> list[Run]:
    """The runs of a new row: for each fold those of the row that the fold chose.

    `winners` is what `chosen` returns, `rows` are {name: its runs, one fold left out}. Raises ValueError for
    a choice that was not run on its fold.
    """
    made = []
    for fold, winner in winners.items():
        mine = [run for run in rows.get(winner, ()) if run.fold == fold]
        if not mine:
            raise ValueError(
                f"fold {fold} chose {winner!r}, which was not run on it; run it, or leave it out. "
                f"There are {sorted(rows)}"
            )
        made += [replace(run, run=run.run.replace(run.row, row, 1), row=row) for run in mine]
    return made
