"""One run: a network trained on all folds but one, tested on that one, and measured."""

import copy
from collections.abc import Mapping

import torch

from nlutils.study import cost
from nlutils.study.evaluate import accuracy, evaluate
from nlutils.study.inputs import Inputs
from nlutils.study.provenance import provenance
from nlutils.study.recipe import TIMES, Recipe
from nlutils.study.results import Run
from nlutils.study.start import begin
from nlutils.study.stopwatch import Stopwatch
from nlutils.study.train import central_crops, seeded, train
from nlutils.study.weights import keep_weights
from nlutils.torch.models import create_model, model_options

__all__ = ["best_device", "full_options", "run_fold", "run_name"]

# Digits kept of each logit: enough to compute every statistic again, few enough to keep the files small.
DIGITS = 4


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
    train_on, test_on = inputs.split(fold)
    inputs = inputs.to(device)
    with seeded(recipe.seed):
        model = create_model(name, len(inputs.classes), **options).to(device)
    begun = begin(model, name, options, recipe, inputs, fold, progress=progress)
    watch, losses = Stopwatch(), []
    if model.trains:
        losses = train(model, inputs, train_on, recipe, checkpoint=checkpoint, progress=progress, watch=watch)
    if model.second_stage:
        model.fit(central_crops(model.input, inputs, train_on, recipe))
    trained, test_watch = watch.read(), Stopwatch()
    logits = evaluate(model, inputs, test_on, recipe)
    tested = test_watch.read()
    views = _views(model, inputs, test_on, recipe)
    with seeded(recipe.seed):
        spent = cost.measure(
            copy.deepcopy(model),
            inputs.batch(model.input, test_on[:1], recipe.size),
            inputs.batch(model.input, train_on[: recipe.batch], recipe.size),
        )
    # What is recorded is what counts: the accuracy is that of the rounded logits.
    logits = torch.round(logits.double(), decimals=DIGITS)
    row = row or name
    result = Run(
        study=study,
        run=run_name(row, fold, recipe.seed),
        row=row,
        model=name,
        options=options,
        input=model.input if isinstance(model.input, str) else "+".join(model.input),
        fold=fold if isinstance(fold, int) else list(fold),
        seed=recipe.seed,
        recipe=recipe.settings(),
        data={
            "name": inputs.name,
            "source": inputs.source,
            "digest": inputs.digest,
            "train": len(train_on),
            "test": len(test_on),
            "left_out": inputs.left_out,
        },
        accuracy=accuracy(logits, inputs.labels[test_on]),
        losses=[round(loss, DIGITS) for loss in losses],
        cost=spent,
        seconds={
            "train": round(trained[0], 1),
            "train_processor": round(trained[1], 1),
            "test": round(tested[0], 2),
            "test_processor": round(tested[1], 2),
        },
        provenance=source,
        classes=list(inputs.classes),
        names=[inputs.names[i] for i in test_on],
        groups=[inputs.groups[i] for i in test_on],
        labels=inputs.labels[test_on].tolist(),
        logits=logits.tolist(),
        views=views,
        start=begun.record,
    )
    if keep is not None:
        seen = [(inputs.name, inputs.names[i], inputs.groups[i]) for i in train_on.tolist()]
        keep_weights(keep, model, result, [*begun.seen, *seen])
    return result


def full_options(name: str, options: Mapping | None, recipe: Recipe) -> dict:
    """`options` of the network called `name`; one of one stream without `input` gets `recipe.input`."""
    options = dict(options or {})
    if "input" in model_options(name):
        options.setdefault("input", recipe.input)
    return options


def run_name(row: str, fold, seed: int) -> str:
    """`<row>-fold<fold>-seed<seed>`; several folds are joined by +."""
    return f"{row}-fold{'+'.join(map(str, [fold] if isinstance(fold, int) else fold))}-seed{seed}"


def _views(model, inputs, test_on, recipe) -> dict:
    """The class that the trained network names for each test clip when its steps come in another order."""
    if recipe.time != "forward":
        return {}
    return {
        time: evaluate(model, inputs, test_on, recipe, time).argmax(dim=1).tolist()
        for time in TIMES
        if time != "forward"
    }
