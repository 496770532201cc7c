"""One run: a network trained on all folds but one, tested on that one, and measured."""

import copy
from collections.abc import Mapping

import torch

from nlutils.study import cost
from nlutils.study.evaluate import evaluate
from nlutils.study.inputs import Inputs
from nlutils.study.maps import map_statistics
from nlutils.study.outcome import clips_seen, outcome
from nlutils.study.provenance import provenance
from nlutils.study.recipe import Recipe
from nlutils.study.results import Run
from nlutils.study.start import begin
from nlutils.study.stopwatch import Stopwatch
from nlutils.study.train import central_crops, seeded, train
from nlutils.study.weights import keep_weights
from nlutils.torch.models import create_model, model_options

__all__ = ["best_device", "full_options", "run_fold"]


def best_device() -> torch.device:
    """The GPU when PyTorch finds one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run_fold(
    inputs: Inputs,
    name: str,
    fold,
    recipe: Recipe,
    *,
    study: str = "untitled",
    row: str | None = None,
    options: Mapping | None = None,
    device=None,
    checkpoint=None,
    progress: bool = False,
    keep=None,
) -> Run:
    """Train the network `name` on all folds but `fold`, test it on `fold`; returns the result, unwritten.

    Networks of one stream get `recipe.input` unless `options` name another. `fold` may be several,
    (0, 3), which are left out and tested together. `keep` is a path that the trained weights are written to.
    `seconds` and `cost` of the result are those of this training, whatever weights `recipe.init` began with.
    """
    device = torch.device(device) if device is not None else best_device()
    source = provenance(device)  # taken first: the files may change while the run goes on
    options = full_options(name, options, recipe)
    # Networks that draw samples for what they fit have a seed of their own.
    drawn = {"seed": recipe.seed} if "seed" in model_options(name) else {}
    train_on, test_on = inputs.split(fold)
    inputs = inputs.to(device)
    with seeded(recipe.seed):
        model = create_model(name, len(inputs.classes), **{**drawn, **options}).to(device)
    begun = begin(model, name, options, recipe, inputs, fold, progress=progress)
    watch, losses = Stopwatch(), []
    if model.trains:
        losses = train(model, inputs, train_on, recipe, checkpoint=checkpoint, progress=progress, watch=watch)
    if model.second_stage:
        model.fit(central_crops(model.input, inputs, train_on, recipe))

    def measure():
        with seeded(recipe.seed):
            return cost.measure(
                copy.deepcopy(model),
                inputs.batch(model.input, test_on[:1], recipe.size),
                inputs.batch(model.input, train_on[: recipe.batch], recipe.size),
            )

    result = outcome(
        inputs,
        fold,
        recipe,
        row=row or name,
        input=model.input,
        losses=losses,
        trained=watch.read(),
        scores=lambda time: evaluate(model, inputs, test_on, recipe, time),
        measure=measure,
        study=study,
        model=name,
        options=options,
        provenance=source,
        start=begun.record,
        maps=map_statistics(model, inputs, test_on, recipe),
    )
    if keep is not None:
        keep_weights(keep, model, result, [*begun.seen, *clips_seen(inputs, train_on)])
    return result


def full_options(name: str, options: Mapping | None, recipe: Recipe) -> dict:
    """`options` of the network called `name`; one of one stream without `input` gets `recipe.input`."""
    options = dict(options or {})
    if "input" in model_options(name):
        options.setdefault("input", recipe.input)
    return options
