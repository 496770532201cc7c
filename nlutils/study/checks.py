"""What a study is asked to do, checked before anything runs."""

import re
from collections.abc import Iterable, Mapping

import torch

from nlutils.arguments import positive_integer, truth_value, whole_number
from nlutils.study import distributed
from nlutils.study.arithmetic import autocast
from nlutils.study.fold import best_device, full_options
from nlutils.study.grid import Entry, entries
from nlutils.study.inputs import Inputs
from nlutils.study.recipe import Recipe
from nlutils.study.start import check_start
from nlutils.torch.models import INPUT_CHANNELS, VideoClassifier, create_model
from nlutils.torch.models.small import SMALL_MODELS

__all__ = ["check_device", "check_fit", "check_name", "check_study", "sees_flow"]


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
    device = check_device(device, cluster)
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


def check_fit(rows: Mapping[str, Entry], recipe: Recipe, inputs: Inputs) -> None:
    """Raise ValueError for a row that `inputs` do not suit: no flow, or first weights that know the clips."""
    for row, entry in rows.items():
        own = recipe.replace(**entry.recipe)
        network = _without_numbers(entry, own)
        check_start(network, entry.model, own, inputs)
        if inputs.flow is None and "flow" in _seen_by(network):
            raise ValueError(
                f"row {row!r} sees optical flow, and the clips were prepared without; prepare(..., flow=True)"
            )


def sees_flow(rows: Mapping[str, Entry], recipe: Recipe) -> bool:
    """Whether a network of `rows` sees optical flow."""
    return any(
        "flow" in _seen_by(_without_numbers(entry, recipe.replace(**entry.recipe))) for entry in rows.values()
    )


def check_device(device, cluster: str | None) -> torch.device:
    """`device` of this process, the best one for None; ValueError where networks cannot be trained on it."""
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


def check_name(what: str, name: str) -> str:
    """Return `name`, that of a file or folder of results; ValueError, naming `what`, when it is none."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
        raise ValueError(f"{what}={name!r} names files: use letters, digits and _ . + -, a letter first")
    return name


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


def _check_ways(jobs, cluster):
    if cluster is not None and jobs > 1:
        raise ValueError(f"jobs={jobs} and cluster={cluster!r}: Ray knows how many runs it has room for")
    if distributed.count() > 1 and (jobs > 1 or cluster is not None):
        raise ValueError(
            f"jobs={jobs} and cluster={cluster!r}: {distributed.count()} processes train each run together; "
            "use jobs=1 and no cluster under torchrun"
        )
