"""Class scores of clips, and how many are right."""

import torch

from nlutils.study.arithmetic import autocast
from nlutils.study.inputs import Inputs
from nlutils.study.recipe import Recipe
from nlutils.torch.models.common import mean_probability

__all__ = ["accuracy", "evaluate"]


@torch.no_grad()
def evaluate(
    model, inputs: Inputs, indices: torch.Tensor, recipe: Recipe, time: str | None = None
) -> torch.Tensor:
    """The class scores of the clips `indices`, central crop: float32 (clips, num_classes) in main memory.

    Their softmax are the class probabilities; with `recipe.test_flip` these are the mean over a clip and its
    mirror image. The time steps come in the order `time`, `recipe.time` when nothing is said.
    """
    was_training = model.training
    model.eval()
    try:
        scores = [
            _scores(model, inputs, batch, recipe, time or recipe.time).float().cpu()
            for batch in indices.split(recipe.batch)
        ]
    finally:
        model.train(was_training)
    return torch.cat(scores)


def _scores(model, inputs, batch, recipe, time):
    sides = []
    for mirrored in (False, True) if recipe.test_flip else (False,):
        x = inputs.batch(model.input, batch, recipe.size, time=time, mirrored=mirrored)
        with autocast(recipe, inputs.frames.device):
            sides.append(model(x).float())
    return sides[0] if len(sides) == 1 else mean_probability(torch.stack(sides, dim=1), dim=1)


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of rows whose largest logit is the label's."""
    if len(logits) != len(labels) or len(labels) == 0:
        raise ValueError(
            f"{len(logits)} rows of logits and {len(labels)} labels: need as many of each, at least 1"
        )
    return (logits.argmax(dim=1) == labels).double().mean().item()
