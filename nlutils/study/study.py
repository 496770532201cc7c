"""A study: rows x folds x seeds, each run recorded as soon as it is done."""

from collections.abc import Iterable, Iterator

import torch

from nlutils.arguments import positive_integer
from nlutils.study import distributed
from nlutils.study.fold import best_device, full_options
from nlutils.study.grid import Cell, entries
from nlutils.study.inputs import Inputs, prepare
from nlutils.study.provenance import code_digest
from nlutils.study.recipe import Recipe
from nlutils.study.results import Run
from nlutils.study.side_by_side import side_by_side
from nlutils.study.start import start_digest
from nlutils.study.work import Work
from nlutils.torch.models import create_model
from nlutils.torch.models.small import SMALL_MODELS
from nlutils.video.clips import ClipSet

__all__ = ["run_study"]


def run_study(
    study: str,
    models=None,
    folds: Iterable[int] | None = None,
    seeds: Iterable[int] = (0,),
    clips: ClipSet | Inputs | None = None,
    recipe: Recipe | None = None,
    *,
    jobs: int = 1,
    threads: int = 1,
    cluster: str | None = None,
    device=None,
    root=None,
    keep_weights: bool = False,
    log=print,
) -> list[Run]:
    """Train and test every row on every fold with every seed; returns the runs, recorded ones included.

    models        names, {row: (name, options)} or {row: `Entry`}; the small networks by default
    folds         all folds of the clips by default; one may be several, (0, 3), left out together
    clips         a ClipSet (see `nlutils.video.open_clips`, the default) or what `prepare` made of one
    jobs          runs at a time, each in a process of its own with `threads` CPU threads
    cluster       a Ray cluster that does the runs: "local", "auto" or an address (`nlutils.study.spread`)
    device        the GPU when PyTorch finds one, else the CPU
    root          the folder of results, `data/results` by default
    keep_weights  keep the trained weights in the cache, for `nlutils predict`
    log           gets one line a run

    Under `torchrun`, all processes train every run together, as one process would up to the order of sums;
    the first writes, and all return the same. Several machines: see CLUSTER.md beside this file.

    A run that is recorded with the same settings is read, not repeated, and a run that was killed goes on
    behind its last full epoch: call `run_study` again with the same arguments. Calls at the same time do not
    disturb each other, but may do a run twice; it is recorded once. Raises ValueError when a run of that name
    is recorded with other settings, and for an unknown fold before anything runs.
    """
    recipe = recipe or Recipe()
    rows = entries(list(SMALL_MODELS) if models is None else models)
    device = torch.device(device) if device is not None else best_device()
    device = distributed.own_device(device)
    with distributed.joined(device):
        _check_ways(positive_integer("jobs", jobs), cluster)
        inputs = _inputs(clips, recipe, rows)
        grid = _grid(study, rows, folds, list(seeds), inputs, recipe)
        facts = inputs.source, inputs.names, inputs.groups, inputs.labels.tolist()
        for what, value in {"code": code_digest(), "runs": grid, "clips": facts}.items():
            distributed.agree(what, value)
        return _all_runs(Work(inputs, device, threads, root, keep_weights), grid, jobs, cluster, log)


def _check_ways(jobs, cluster):
    if cluster is not None and jobs > 1:
        raise ValueError(f"jobs={jobs} and cluster={cluster!r}: Ray knows how many runs it has room for")
    if distributed.count() > 1 and (jobs > 1 or cluster is not None):
        raise ValueError(
            f"jobs={jobs} and cluster={cluster!r}: {distributed.count()} processes train each run together; "
            "use jobs=1 and no cluster under torchrun"
        )


def _grid(study, rows, folds, seeds, inputs, recipe) -> list[Cell]:
    folds = sorted(set(inputs.folds.tolist())) if folds is None else list(folds)
    for fold in folds:
        inputs.split(fold)
    return [
        Cell(
            study,
            row,
            entry.model,
            entry.options,
            fold,
            recipe.replace(**{**entry.recipe, "seed": seed}),
            entry.framework,
        )
        for seed in seeds
        for fold in folds
        for row, entry in rows.items()
    ]


def _all_runs(work, grid, jobs, cluster, log) -> list[Run]:
    done, todo = [], []
    for cell in grid:
        recorded = work.recorded(cell)
        (done if recorded else todo).append(recorded or cell)
    for cell in todo:
        start_digest(cell.recipe, cell.fold)  # a file that is not there is missed before anything runs
    if not distributed.first():
        log = _silent
    for result in done:
        log(f"{_line(result)} (recorded before)")
    for result in _results(work, todo, jobs, cluster):
        log(_line(result))
        done.append(result)
    return sorted(done, key=lambda run: (run.row, str(run.fold), run.seed))


def _results(work: Work, cells: list[Cell], jobs, cluster) -> Iterator[Run]:
    """The runs of `cells`, recorded, as they are done."""
    if cluster is not None:
        from nlutils.study.spread import spread  # which needs Ray

        return spread(work, cells, cluster)
    return map(work.do, cells) if jobs == 1 else side_by_side(work, cells, jobs)


def _silent(line):
    pass


def _inputs(clips, recipe, rows) -> Inputs:
    if isinstance(clips, Inputs):
        made = (clips.frames.shape[2] - 1, *clips.frames.shape[3:])
        if made != (recipe.frames, *recipe.resize):
            raise ValueError(
                f"clips were prepared with (frames, height, width) = {made}, and the recipe says "
                f"{(recipe.frames, *recipe.resize)}; prepare them with the recipe's frames and resize"
            )
        return clips
    if clips is None:
        from nlutils.video import open_clips

        clips = open_clips()
    flow = any("flow" in _kinds(entry, recipe) for entry in rows.values())
    with distributed.machine_first():
        return prepare(clips, recipe.frames, recipe.resize, flow=flow)


def _kinds(entry, recipe):
    """What the network of `entry` sees."""
    recipe = recipe.replace(**entry.recipe)
    with torch.device("meta"):
        network = create_model(entry.model, 2, **full_options(entry.model, entry.options, recipe))
    return (network.input,) if isinstance(network.input, str) else network.input


def _line(result: Run) -> str:
    return (
        f"{result.study} {result.run}: {100 * result.accuracy:.1f} % of {len(result.names)} clips, "
        f"{result.seconds['train']:.0f} s"
    )
