"""A grid of runs: rows (networks) x folds x seeds, each recorded as soon as it is done."""

import copy
import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from nlutils.arguments import positive_integer
from nlutils.paths import cache_root
from nlutils.study import cost
from nlutils.study.evaluate import accuracy, evaluate
from nlutils.study.inputs import Inputs, prepare
from nlutils.study.provenance import code_digest, provenance
from nlutils.study.recipe import Recipe
from nlutils.study.results import Run, read_run, run_path, write_run
from nlutils.study.train import central_crops, seeded, train
from nlutils.torch.models import create_model, model_options
from nlutils.torch.models.small import SMALL_MODELS
from nlutils.video.clips import ClipSet

__all__ = ["best_device", "run_fold", "run_study"]

# Digits kept of each logit: enough to compute every statistic again, few enough to keep the files small.
DIGITS = 4


def best_device() -> torch.device:
    """The GPU when PyTorch finds one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
    log=print,
) -> list[Run]:
    """Train and test every row on every fold with every seed; returns the runs, recorded ones included.

    models   names, or {row: (name, options)}; the small networks by default
    folds    all folds of the clips by default
    clips    a ClipSet (see `nlutils.video.open_clips`, the default) or what `prepare` made of one
    jobs     processes at a time; `threads` CPU threads each
    root     the folder of results, `data/results` by default
    log      gets one line a run

    A run that is recorded with the same settings is read, not repeated, and a run that was killed goes on
    behind its last full epoch: call `run_study` again with the same arguments. Raises ValueError when a run
    of that name is recorded with other settings.
    """
    recipe = recipe or Recipe()
    rows = _rows(models)
    device = torch.device(device) if device is not None else best_device()
    inputs = _inputs(clips, recipe, rows)
    folds = sorted(set(inputs.folds.tolist())) if folds is None else list(folds)
    grid = [
        (study, row, name, options, fold, recipe.replace(seed=seed))
        for seed in seeds
        for fold in folds
        for row, (name, options) in rows.items()
    ]
    done, todo = [], []
    for cell in grid:
        recorded = _recorded(cell, inputs, root)
        (done if recorded else todo).append(recorded or cell)
    for result in done:
        log(f"{_line(result)} (recorded before)")
    arguments = [(inputs, *cell, device, threads, root) for cell in todo]
    if positive_integer("jobs", jobs) == 1:
        made = map(_run_and_write, arguments)
        done += [_logged(result, log) for result in made]
    else:
        # Tensors travel through shared memory: the clips are decoded once, whatever the number of processes.
        context = torch.multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context) as pool:
            waiting = [pool.submit(_run_and_write, argument) for argument in arguments]
            try:
                done += [_logged(future.result(), log) for future in as_completed(waiting)]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return sorted(done, key=lambda run: (run.row, run.fold, run.seed))


def run_fold(
    inputs: Inputs,
    name: str,
    fold: int,
    recipe: Recipe,
    *,
    study: str = "untitled",
    row: str | None = None,
    options: Mapping | None = None,
    device=None,
    checkpoint=None,
    progress: bool = False,
) -> Run:
    """Train the network `name` on all folds but `fold`, test it on `fold`; returns the result, unwritten.

    Networks of one stream get `recipe.input` unless `options` name another.
    """
    device = torch.device(device) if device is not None else best_device()
    source = provenance(device)  # taken first: the files may change while the run goes on
    options = _options(name, options, recipe)
    train_on, test_on = inputs.split(fold)
    inputs = inputs.to(device)
    with seeded(recipe.seed):
        model = create_model(name, len(inputs.classes), **options).to(device)
    start, start_processor = time.perf_counter(), time.process_time()
    losses = train(model, inputs, train_on, recipe, checkpoint=checkpoint, progress=progress)
    if model.second_stage:
        model.fit(central_crops(model.input, inputs, train_on, recipe))
    trained, trained_processor = time.perf_counter(), time.process_time()
    logits = evaluate(model, inputs, test_on, recipe)
    tested = time.perf_counter()
    with seeded(recipe.seed):
        spent = cost.measure(
            copy.deepcopy(model),
            inputs.batch(model.input, test_on[:1], recipe.size),
            inputs.batch(model.input, train_on[: recipe.batch], recipe.size),
        )
    # What is recorded is what counts: the accuracy is that of the rounded logits.
    logits = torch.round(logits.double(), decimals=DIGITS)
    row = row or name
    return Run(
        study=study,
        run=_run_name(row, fold, recipe.seed),
        row=row,
        model=name,
        options=options,
        input=model.input if isinstance(model.input, str) else "+".join(model.input),
        fold=int(fold),
        seed=recipe.seed,
        recipe=recipe.settings(),
        data={
            "name": inputs.name,
            "source": inputs.source,
            "train": len(train_on),
            "test": len(test_on),
            "left_out": inputs.left_out,
        },
        accuracy=accuracy(logits, inputs.labels[test_on]),
        losses=[round(loss, DIGITS) for loss in losses],
        cost=spent,
        seconds={
            "train": round(trained - start, 1),
            "train_processor": round(trained_processor - start_processor, 1),
            "test": round(tested - trained, 2),
        },
        provenance=source,
        classes=list(inputs.classes),
        names=[inputs.names[i] for i in test_on],
        groups=[inputs.groups[i] for i in test_on],
        labels=inputs.labels[test_on].tolist(),
        logits=logits.tolist(),
    )


def _run_and_write(arguments) -> Run:
    inputs, study, row, name, options, fold, recipe, device, threads, root = arguments
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        checkpoint = _checkpoint(study, row, name, options, fold, recipe, inputs)
        result = run_fold(
            inputs,
            name,
            fold,
            recipe,
            study=study,
            row=row,
            options=options,
            device=device,
            checkpoint=checkpoint,
        )
        write_run(result, root)
        checkpoint.unlink(missing_ok=True)
        return result
    finally:
        torch.set_num_threads(before)


def _checkpoint(study, row, name, options, fold, recipe, inputs):
    """Where an unfinished run is kept: a name that changes with everything that the run depends on."""
    told = json.dumps(
        [
            code_digest(),
            name,
            _options(name, options, recipe),
            fold,
            recipe.settings(),
            inputs.source,
            inputs.names,
            inputs.classes,
            inputs.groups,
            inputs.labels.tolist(),
            inputs.folds.tolist(),
        ]
    )
    digest = hashlib.sha256(told.encode()).hexdigest()[:12]
    return cache_root() / "checkpoints" / study / f"{_run_name(row, fold, recipe.seed)}-{digest}.pt"


def _recorded(cell, inputs, root) -> Run | None:
    """The run of this cell of the grid when it is recorded; ValueError when its settings were others."""
    study, row, name, options, fold, recipe = cell
    path = run_path(study, _run_name(row, fold, recipe.seed), root)
    if not path.is_file():
        return None
    run = read_run(path)
    test_on = inputs.split(fold)[1].tolist()
    clips = [(inputs.names[i], inputs.groups[i], int(inputs.labels[i])) for i in test_on]
    wanted = (name, _options(name, options, recipe), recipe.settings(), inputs.source, inputs.classes, clips)
    seen = list(zip(run.names, run.groups, run.labels, strict=True))
    found = (run.model, run.options, run.recipe, run.data["source"], tuple(run.classes), seen)
    if found != wanted:
        raise ValueError(
            f"{path} was recorded with other settings or clips; "
            "give this study another name, or delete the file"
        )
    return run


def _rows(models) -> dict:
    """{row: (name, options)}; options in the form that JSON gives back."""
    if models is None:
        models = list(SMALL_MODELS)
    if not isinstance(models, Mapping):
        models = {name: (name, {}) for name in models}
    for name, options in models.values():
        allowed = model_options(name)
        if unknown := sorted(set(options) - set(allowed)):
            raise TypeError(f"{name} has no option {unknown[0]!r}; it has {', '.join(allowed)}")
    return {row: (name, json.loads(json.dumps(dict(options)))) for row, (name, options) in models.items()}


def _options(name, options, recipe) -> dict:
    options = dict(options or {})
    if "input" in model_options(name):
        options.setdefault("input", recipe.input)
    return options


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
    flow = any(
        name == "two_stream_small" or _options(name, options, recipe).get("input") == "flow"
        for name, options in rows.values()
    )
    return prepare(clips, recipe.frames, recipe.resize, flow=flow)


def _run_name(row, fold, seed) -> str:
    return f"{row}-fold{fold}-seed{seed}"


def _logged(result: Run, log) -> Run:
    log(_line(result))
    return result


def _line(result: Run) -> str:
    return (
        f"{result.study} {result.run}: {100 * result.accuracy:.1f} % of {len(result.names)} clips, "
        f"{result.seconds['train']:.0f} s"
    )
