"""A study: rows x folds x seeds, each run recorded as soon as it is done."""

import re
from collections.abc import Iterable, Iterator, Mapping

import torch

from nlutils.arguments import positive_integer, truth_value, whole_number
from nlutils.study import distributed
from nlutils.study.arithmetic import autocast
from nlutils.study.fold import best_device, full_options
from nlutils.study.grid import Cell, Entry, entries
from nlutils.study.inputs import Inputs, prepare
from nlutils.study.provenance import code_digest
from nlutils.study.recipe import Recipe
from nlutils.study.results import Run
from nlutils.study.side_by_side import side_by_side
from nlutils.study.start import check_start, start_digest
from nlutils.study.work import Work
from nlutils.torch.models import INPUT_CHANNELS, VideoClassifier, create_model
from nlutils.torch.models.small import SMALL_MODELS
from nlutils.video.clips import ClipSet

__all__ = ["check_name", "check_study", "run_study"]


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
    behind its last full epoch: call `run_study` again with the same arguments. Calls at the same time do not
    disturb each other, but may do a run twice; it is recorded once.

    A run that fails does not stop the others: when these are done, RuntimeError names all that failed. (Under
    torchrun the first failure ends all.) Raises ValueError before anything runs, for what `check_study`
    refuses, an unknown fold, and a run of that name that is recorded with other settings.
    """
    recipe = Recipe() if recipe is None else recipe
    options = {"jobs": jobs, "threads": threads, "cluster": cluster, "keep_weights": keep_weights}
    device = _checked_device(device, cluster)
    with distributed.joined(device):
        rows, folds, seeds = check_study(study, models, folds, seeds, recipe, device=device, **options)
        inputs = _inputs(clips, recipe, rows)
        _check_fit(rows, recipe, inputs)
        grid = _grid(study, rows, folds, seeds, inputs, recipe)
        facts = inputs.source, inputs.names, inputs.groups, inputs.labels.tolist()
        for what, value in {"code": code_digest(), "runs": grid, "clips": facts}.items():
            distributed.agree(what, value)
        return _all_runs(Work(inputs, device, threads, root, keep_weights), grid, jobs, cluster, log)


def check_study(
    study: str,
    models=None,
    folds: Iterable[int] | None = None,
    seeds: Iterable[int] = (0,),
    recipe: Recipe | None = None,
    *,
    jobs: int = 1,
    threads: int = 1,
    cluster: str | None = None,
    device=None,
    keep_weights: bool = False,
) -> tuple[dict[str, Entry], list | None, list[int]]:
    """(rows, folds, seeds) of `run_study` with these arguments, as far as they are known without clips.

    Each row's network is made, and sees one batch without numbers (on PyTorch's "meta" device). Raises
    ValueError for what a run would raise of it, and for arguments that cannot be meant.
    """
    recipe = Recipe() if recipe is None else recipe
    if not isinstance(recipe, Recipe):
        raise ValueError(f"recipe={recipe!r} must be a Recipe: Recipe(epochs=3)")
    check_name("study", study)
    _check_ways(positive_integer("jobs", jobs), cluster)
    positive_integer("threads", threads)
    truth_value("keep_weights", keep_weights)
    device = _checked_device(device, cluster)
    seeds = [whole_number("seed", seed) for seed in _several("seeds", seeds)]
    _check_once("seed", seeds)
    if folds is not None:
        folds = [_checked_fold(fold) for fold in _several("folds", folds)]
        _check_once("fold", [frozenset((fold,) if isinstance(fold, int) else fold) for fold in folds], folds)
    rows = _checked_rows(list(SMALL_MODELS) if models is None else models)
    for row, entry in rows.items():
        try:
            _rehearse(entry, recipe.replace(**entry.recipe), device, threads)
        except (ValueError, TypeError) as error:
            raise ValueError(f"row {row!r} cannot be trained: {error}") from error
    return rows, folds, seeds


def check_name(what: str, name: str) -> str:
    """Return `name`, that of a file or folder of results; ValueError, naming `what`, when it is none."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
        raise ValueError(f"{what}={name!r} names files: use letters, digits and _ . + -, a letter first")
    return name


def _checked_device(device, cluster) -> torch.device:
    """`device` of this process, where the networks can be trained."""
    if device is None:
        return distributed.own_device(best_device())
    try:
        made = torch.device(device)
    except (RuntimeError, TypeError):
        made = None
    if made is None or made.type not in ("cpu", "cuda"):
        raise ValueError(f"device={str(device)!r} is not known; use 'cpu', 'cuda' or 'cuda:N'")
    # The GPUs of a cluster are those of its workers.
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if made.type == "cuda" and cluster in (None, "local") and (made.index or 0) >= gpus:
        raise ValueError(
            f"device={str(device)!r}: PyTorch finds {gpus or 'no'} GPU here; use 'cpu', or leave it out"
        )
    return distributed.own_device(made)


def _several(name, values) -> list:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{name}={values!r} must be several: [{values!r}]")
    return list(values)


def _checked_fold(fold):
    if isinstance(fold, str) or not isinstance(fold, Iterable):
        return whole_number("fold", fold)
    several = tuple(whole_number("fold", one) for one in fold)
    if not several or len(set(several)) < len(several):
        raise ValueError(f"fold={fold!r} must be a number, or several that differ, such as (0, 3)")
    return several


def _check_once(name, values, shown=None):
    for place, value in enumerate(values):
        if value in values[:place]:
            raise ValueError(f"{name}={(shown or values)[place]!r} is there twice")


def _checked_rows(models) -> dict[str, Entry]:
    if not isinstance(models, Mapping):
        _check_once("model", models := _several("models", models))
        return entries(models)
    for row, entry in models.items():
        check_name("row", row)
        pair = isinstance(entry, tuple | list) and 1 <= len(entry) <= 2
        if not isinstance(entry, Entry) and not pair:
            raise ValueError(f"models: {row!r} is {entry!r}; it must be (name, options) or an Entry")
    return entries(models)


def _rehearse(entry, recipe, device, threads):
    """Whatever would stop a run of `entry`, on two clips of two classes without numbers."""
    network = _without_numbers(entry, recipe)
    if not isinstance(network, VideoClassifier):
        raise ValueError(f"{entry.model} does not classify clips")
    check_start(network, entry.model, recipe)
    if entry.framework == "keras":
        from nlutils.study.keras_fold import check_keras  # PyTorch users never import Keras

        check_keras(entry.model, full_options(entry.model, entry.options, recipe), recipe, threads)
    else:
        autocast(recipe, device)
    shapes = [(2, INPUT_CHANNELS[kind], recipe.frames, *recipe.size) for kind in _seen_by(network)]
    x = tuple(torch.zeros(shape, device="meta") for shape in shapes)
    x = x[0] if isinstance(network.input, str) else x
    try:
        if network.trains:
            network.train().loss(x, torch.zeros(2, dtype=torch.long, device="meta"))
        if not network.second_stage:  # before which it has no scores
            network.eval()(x)
    except RuntimeError as error:
        clip = " x ".join(map(str, (recipe.frames, *recipe.size)))
        raise ValueError(f"clips of {clip} do not fit: {error}") from error


def _without_numbers(entry, recipe):
    with torch.device("meta"):
        return create_model(entry.model, 2, **full_options(entry.model, entry.options, recipe))


def _seen_by(network) -> tuple[str, ...]:
    return (network.input,) if isinstance(network.input, str) else tuple(network.input)


def _check_fit(rows, recipe, inputs):
    """ValueError for rows that `inputs` do not suit, before anything runs."""
    for row, entry in rows.items():
        own = recipe.replace(**entry.recipe)
        network = _without_numbers(entry, own)
        check_start(network, entry.model, own, inputs)
        if inputs.flow is None and "flow" in _seen_by(network):
            raise ValueError(
                f"row {row!r} sees optical flow, and the clips were prepared without; prepare(..., flow=True)"
            )


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
    networks = [_without_numbers(entry, recipe.replace(**entry.recipe)) for entry in rows.values()]
    flow = any("flow" in _seen_by(network) for network in networks)
    with distributed.machine_first():
        return prepare(clips, recipe.frames, recipe.resize, flow=flow)


def _line(result: Run) -> str:
    return (
        f"{result.study} {result.run}: {100 * result.accuracy:.1f} % of {len(result.names)} clips, "
        f"{result.seconds['train']:.0f} s"
    )
