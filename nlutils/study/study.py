"""A study: rows x folds x seeds, each run recorded as soon as it is done."""

from collections.abc import Iterable, Iterator

from nlutils.study import distributed
from nlutils.study.checks import check_device, check_fit, check_study, sees_flow
from nlutils.study.grid import Cell
from nlutils.study.inputs import Inputs, prepare
from nlutils.study.provenance import code_digest
from nlutils.study.recipe import Recipe
from nlutils.study.results import Run
from nlutils.study.side_by_side import side_by_side
from nlutils.study.start import start_digest
from nlutils.study.work import Work
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
    jobs          runs at a time, each in a process of its own with `threads` CPU threads; such a process
                  reads the script that is run, so that a script calls this below `if __name__ == "__main__":`
    cluster       a Ray cluster that does the runs: "local", "auto" or an address (`nlutils.study.spread`)
    device        the GPU when PyTorch finds one, else the CPU
    root          the folder of results, `data/results` by default
    keep_weights  keep the trained weights, `<root>/<study>/weights/<run>.pt`, for `nlutils predict`
    log           gets one line a run

    Under `torchrun`, all processes train every run together, as one process would up to the order of sums;
    the first writes, and all return the same. Several machines: see CLUSTER.md beside this file.

    A run that is recorded with the same settings is read, not repeated, and a run that was killed goes on
    after its last full epoch: call `run_study` again with the same arguments. Calls at the same time do not
    disturb each other, but may do a run twice; it is recorded once.

    A run that fails does not stop the others: when these are done, RuntimeError names all that failed. (Under
    torchrun the first failure ends all.) Raises ValueError before anything runs, for what `check_study`
    refuses, an unknown fold, and a run of that name that is recorded with other settings.
    """
    recipe = Recipe() if recipe is None else recipe
    options = {"jobs": jobs, "threads": threads, "cluster": cluster, "keep_weights": keep_weights}
    device = check_device(device, cluster)
    with distributed.joined(device):
        rows, folds, seeds = check_study(study, models, folds, seeds, recipe, device=device, **options)
        inputs = _inputs(clips, recipe, rows)
        check_fit(rows, recipe, inputs)
        grid = _grid(study, rows, folds, seeds, inputs, recipe)
        for what, value in {"code": code_digest(), "runs": grid, "clips": inputs.digest}.items():
            distributed.agree(what, value)
        return _all_runs(Work(inputs, device, threads, root, keep_weights), grid, jobs, cluster, log)


def _grid(study, rows, folds, seeds, inputs, recipe) -> list[Cell]:
    folds = sorted(set(inputs.folds.tolist())) if folds is None else list(folds)
    for fold in folds:
        if len(inputs.split(fold)[0]) == 0:
            raise ValueError(f"fold={fold!r} of {inputs.name} leaves no clip to train on")
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
    failed = []
    for cell, outcome in _outcomes(work, todo, jobs, cluster):
        if isinstance(outcome, Run):
            log(_line(outcome))
            done.append(outcome)
        else:
            log(f"{cell.study} {cell.name}: failed, {_reason(outcome)}")
            failed.append((cell, outcome))
    if failed:
        reasons = "\n".join(f"{cell.name}: {_reason(error)}" for cell, error in failed)
        raise RuntimeError(f"{len(failed)} of {len(todo)} runs failed\n{reasons}") from failed[0][1]
    return sorted(done, key=lambda run: (run.row, str(run.fold), run.seed))


def _outcomes(work: Work, cells: list[Cell], jobs, cluster) -> Iterator[tuple[Cell, Run | Exception]]:
    """(cell, its recorded run, or the error that it failed with) as they are done."""
    if cluster is not None:
        from nlutils.study.spread import spread  # which needs Ray

        return spread(work, cells, cluster)
    if jobs > 1:
        return side_by_side(work, cells, jobs)
    return ((cell, work.attempt(cell)) for cell in cells)


def _reason(error):
    return f"{type(error).__name__}: {error}"


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
    with distributed.machine_first():
        return prepare(clips, recipe.frames, recipe.resize, flow=sees_flow(rows, recipe))


def _line(result: Run) -> str:
    return (
        f"{result.study} {result.run}: {100 * result.accuracy:.1f} % of {len(result.names)} clips, "
        f"{result.seconds['train']:.0f} s"
    )
