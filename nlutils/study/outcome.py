"""What is recorded of a trained network, whichever framework trained it."""

from collections.abc import Callable

import torch

from nlutils.study.evaluate import accuracy
from nlutils.study.inputs import Inputs
from nlutils.study.recipe import TIMES, Recipe
from nlutils.study.results import Run
from nlutils.study.stopwatch import Stopwatch

__all__ = ["clips_seen", "outcome", "run_name"]

# Digits kept of each logit: enough to compute every statistic again, few enough to keep the files small.
DIGITS = 4


def run_name(row: str, fold, seed: int) -> str:
    """`<row>-fold<fold>-seed<seed>`; several folds are joined by +."""
    return f"{row}-fold{'+'.join(map(str, [fold] if isinstance(fold, int) else fold))}-seed{seed}"


def clips_seen(inputs: Inputs, indices: torch.Tensor) -> list[tuple[str, str, str]]:
    """(data set, clip, group) of the clips `indices`: what weights that were trained on them know."""
    return [(inputs.name, inputs.names[i], inputs.groups[i]) for i in indices.tolist()]


def outcome(
    inputs: Inputs,
    fold,
    recipe: Recipe,
    *,
    row: str,
    input: str | tuple[str, ...],
    losses: list[float],
    trained: tuple[float, float],
    scores: Callable[[str], torch.Tensor],
    measure: Callable[[], dict],
    **facts,
) -> Run:
    """Test a trained network on `fold`, measure it, and return all that is recorded.

    input    what the network sees
    trained  seconds that the training took, on the wall and of processor time
    scores   a function of the order of time: the logits of the test clips, (clips, num_classes)
    measure  a function that returns the cost
    facts    the other fields of a `Run`: study, model, options, provenance, start, framework, maps
    """
    train_on, test_on = inputs.split(fold)
    watch = Stopwatch()
    logits = scores(recipe.time)
    tested = watch.read()
    # What is recorded is what counts: the accuracy is that of the rounded logits.
    logits = torch.round(logits.double(), decimals=DIGITS)
    return Run(
        run=run_name(row, fold, recipe.seed),
        row=row,
        input=input if isinstance(input, str) else "+".join(input),
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
        seconds={
            "train": round(trained[0], 1),
            "train_processor": round(trained[1], 1),
            "test": round(tested[0], 2),
            "test_processor": round(tested[1], 2),
        },
        classes=list(inputs.classes),
        names=[inputs.names[i] for i in test_on],
        groups=[inputs.groups[i] for i in test_on],
        labels=inputs.labels[test_on].tolist(),
        logits=logits.tolist(),
        views=_views(scores) if recipe.time == "forward" else {},
        cost=measure(),
        **facts,
    )


def _views(scores) -> dict:
    """The class that is named for each test clip when its steps come in another order."""
    return {time: scores(time).argmax(dim=1).tolist() for time in TIMES if time != "forward"}
