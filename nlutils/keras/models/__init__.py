"""Video networks in Keras, made by name; on the same weights each equals PyTorch's network."""

import inspect
from importlib import import_module

from nlutils.arguments import one_of, positive_integer

# Imported with the room, so that Keras finds the layers of a saved network in a process that built none.
from nlutils.keras.models.common import MaxPool
from nlutils.keras.models.layers import (
    BatchAsFrames,
    FramesAsBatch,
    LeastClip,
    MeanProbability,
    ResponseNorm,
    Snapshots,
)

__all__ = [
    "BatchAsFrames",
    "FramesAsBatch",
    "LeastClip",
    "MaxPool",
    "MeanProbability",
    "ResponseNorm",
    "Snapshots",
    "create_model",
    "list_models",
    "model_options",
]

# name -> its module and function; a family is imported when one of its networks is asked for
_HOMES = {
    "c2d": ("resnet", "c2d"),
    "i3d": ("resnet", "i3d"),
    "c3d": ("c3d", "c3d"),
    "lrcn": ("recurrent", "lrcn"),
    "two_stream": ("two_stream", "two_stream"),
    "c3d_small": ("small", "c3d_small"),
    "c3d_small_non_local": ("small", "c3d_small_non_local"),
}


def list_models() -> list[str]:
    """The names that `create_model` knows."""
    return list(_HOMES)


def model_options(name: str) -> dict:
    """The options of the network called `name`, with their defaults: those of `nlutils.torch`."""
    parameters = inspect.signature(_network(name)).parameters.values()
    return {option.name: option.default for option in parameters if option.kind is option.KEYWORD_ONLY}


def create_model(name: str, num_classes: int, **options):
    """A new functional `keras.Model`, with weights drawn from Keras' random numbers.

    `list_models()` gives the names, `model_options(name)` the options. Clips are (B, T, H, W, C), class
    scores (B, num_classes) without a softmax: compile with `SparseCategoricalCrossentropy(from_logits=True)`
    unless the network's docstring says otherwise. Layers have the names of the PyTorch network's modules,
    with hyphens for dots, and `nlutils.exchange.torch_to_keras` copies the weights. A process that reads a
    saved network imports `nlutils.keras` before `keras.models.load_model`, which needs its layers. Raises
    ValueError for an unknown name and TypeError for an unknown option.
    """
    allowed = model_options(name)
    for option in options:
        if option not in allowed:
            raise TypeError(f"{name} has no option {option!r}; it has {', '.join(allowed)}")
    return _network(name)(positive_integer("num_classes", num_classes), **options)


def _network(name):
    module, network = _HOMES[one_of("name", name, _HOMES)]
    return getattr(import_module(f"{__name__}.{module}"), network)
