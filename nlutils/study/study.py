"""A study: rows x folds x seeds, each run recorded as soon as it is done."""

from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from nlutils.arguments import positive_integer
from nlutils.study.fold import best_device, full_options, run_fold
from nlutils.study.grid import Cell, entries
from nlutils.study.inputs import Inputs, prepare
from nlutils.study.recipe import Recipe
from nlutils.study.results import Run, write_run
from nlutils.study.weights import weights_path
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
    device=None,
    root=None,
    keep_weights: bool = False,
    log=print,
) -> list[Run]:
    """Train and test every row on every fold with every seed; returns the runs, recorded ones included.

    models        names, {row: (name, options)} or {row: `Entry`}; the small networks by default
    folds         all folds of the clips by default; one may be several, (0, 3), left out together
    clips         a ClipSet (see `nlutils.video.open_clips`, the default) or what `prepare` made of one
    jobs          processes at a time; `threads` CPU threads each
    root          the folder of results, `data/results` by default
    keep_weights  keep the trained weights in the cache, for `nlutils predict`
    log           gets one line a run

    A run that is recorded with the same settings is read, not repeated, and a run that was killed goes on
    behind its last full epoch: call `run_study` again with the same arguments. Raises ValueError when a run
    of that name is recorded with other settings, and for an unknown fold before anything runs.
    """
    recipe = recipe or Recipe()
    rows = entries(SMALL_MODELS if models is None else models)
    device = torch.device(device) if device is not None else best_device()
    inputs = _inputs(clips, recipe, rows)
    folds = sorted(set(inputs.folds.tolist())) if folds is None else list(folds)
    for fold in folds:
        inputs.split(fold)
    grid = [
        Cell(study, row, entry.model, entry.options, fold, recipe.replace(**{**entry.recipe, "seed": seed}))
        for seed in seeds
        for fold in folds
        for row, entry in rows.items()
    ]
    done, todo = [], []
    for cell in grid:
        recorded = cell.recorded(inputs, root)
        (done if recorded else todo).append(recorded or cell)
    for result in done:
        log(f"{_line(result)} (recorded before)")
    work = [(inputs, cell, device, threads, root, keep_weights) for cell in todo]
    for result in _results(work, positive_integer("jobs", jobs)):
        log(_line(result))
        done.append(result)
    return sorted(done, key=lambda run: (run.row, str(run.fold), run.seed))


def _results(work, jobs):
    """The runs of `work` as they are done, `jobs` processes at a time."""
    if jobs == 1:
        yield from map(_run_and_write, work)
        return
    # Tensors travel through shared memory: the clips are decoded once, whatever the number of processes.
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        waiting = [pool.submit(_run_and_write, one) for one in work]
        try:
            for future in as_completed(waiting):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run_and_write(work) -> Run:
    inputs, cell, device, threads, root, keep = work
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        checkpoint = cell.checkpoint(inputs)
        result = run_fold(
            inputs,
            cell.model,
            cell.fold,
            cell.recipe,
            study=cell.study,
            row=cell.row,
            options=cell.options,
            device=device,
            checkpoint=checkpoint,
            keep=weights_path(cell.study, cell.name) if keep else None,
        )
        write_run(result, root)
        checkpoint.unlink(missing_ok=True)
        return result
    finally:
        torch.set_num_threads(before)


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
