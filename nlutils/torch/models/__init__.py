"""Video networks, one file a family, made by name: the papers' own, and in `small` the study's."""

import inspect

from nlutils.arguments import one_of, positive_integer
from nlutils.torch.models.common import INPUT_CHANNELS, VideoClassifier
from nlutils.torch.models.inception import (
    FusedTwoStream,
    I3DInception,
    InceptionLSTM,
    TwoStreamI3D,
    TwoStreamInception,
)
from nlutils.torch.models.resnet import C2D, I3D
from nlutils.torch.models.small import SMALL_MODELS
from nlutils.torch.models.trajectory import TDD

__all__ = ["INPUT_CHANNELS", "VideoClassifier", "create_model", "list_models", "model_options"]

MODELS = {
    **SMALL_MODELS,
    "c2d": C2D,
    "i3d": I3D,
    "tdd": TDD,
    "inception_lstm": InceptionLSTM,
    "two_stream_inception": TwoStreamInception,
    "fused_two_stream": FusedTwoStream,
    "i3d_inception": I3DInception,
    "two_stream_i3d": TwoStreamI3D,
}


def list_models() -> list[str]:
    """The names that `create_model` knows."""
    return list(MODELS)


def model_options(name: str) -> dict:
    """The options of the network called `name`, with their defaults."""
    parameters = inspect.signature(MODELS[one_of("name", name, MODELS)]).parameters.values()
    return {option.name: option.default for option in parameters if option.kind is option.KEYWORD_ONLY}


def create_model(name: str, num_classes: int, **options) -> VideoClassifier:
    """A new network, with weights drawn from PyTorch's global generator.

    `list_models()` gives the names, `model_options(name)` the options. The network's attribute `input` says
    what it takes. Raises ValueError for an unknown name and TypeError for an unknown option.
    """
    allowed = model_options(name)
    for option in options:
        if option not in allowed:
            raise TypeError(f"{name} has no option {option!r}; it has {', '.join(allowed)}")
    return MODELS[name](positive_integer("num_classes", num_classes), **options)
