"""Class scores of clips, and how many are right."""

import torch

from nlutils.study.inputs import Inputs
from nlutils.study.recipe import Recipe

__all__ = ["accuracy", "evaluate"]


@torch.no_grad()
def evaluate(model, inputs: Inputs, indices: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """The logits of the clips `indices`, central crop: float32 (clips, num_classes) in main memory."""
    was_training = model.training
    model.eval()
    try:
        logits = [
            model(inputs.batch(model.input, batch, recipe.size)).float().cpu()
            for batch in indices.split(recipe.batch)
        ]
    finally:
        model.train(was_training)
    return torch.cat(logits)


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of rows whose largest logit is the label's."""
    if len(logits) != len(labels) or len(labels) == 0:
        raise ValueError(
            f"{len(logits)} rows of logits and {len(labels)} labels: need as many of each, at least 1"
        )
    return (logits.argmax(dim=1) == labels).double().mean().item()
