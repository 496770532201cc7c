"""Settings chosen by validation inside the training folds, never by the fold that is reported.

For a fold k, each candidate is trained on all folds but k and j, and validated on j, for every other fold j.
A run that leaves k and j out together validates j for the fold k, and k for the fold j: five folds need ten
runs a candidate.
"""

from collections.abc import Iterable, Mapping
from itertools import combinations

import numpy as np

from nlutils.study.results import Run

__all__ = ["chosen", "pairs", "validation_accuracy"]


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
