"""Video networks, one file a family, made by name: the papers' own, and in `small` the study's."""

import inspect
from importlib import import_module

from nlutils.arguments import one_of, positive_integer
from nlutils.torch.models.common import INPUT_CHANNELS, Expects, VideoClassifier
from nlutils.torch.models.small import SMALL_MODELS

__all__ = ["INPUT_CHANNELS", "Expects", "VideoClassifier", "create_model", "list_models", "model_options"]

# name -> its module and class; a family is imported when one of its networks is asked for
_HOMES = {
    **{name: ("small", network.__name__) for name, network in SMALL_MODELS.items()},
    "ji_2010": ("c3d", "Ji2010"),
    "c3d": ("c3d", "C3D"),
    "c3d_bn": ("c3d", "C3DBN"),
    "lrcn": ("recurrent", "LRCN"),
    "beyond_short_snippets": ("recurrent", "BeyondShortSnippets"),
    "two_stream": ("two_stream", "TwoStream"),
    "st_resnet": ("st_resnet", "STResNet"),
    "c2d": ("resnet", "C2D"),
    "i3d": ("resnet", "I3D"),
    "tdd": ("trajectory", "TDD"),
    "visual_interaction_network": ("interaction", "VisualInteractionNetwork"),
    "inception_lstm": ("inception", "InceptionLSTM"),
    "two_stream_inception": ("inception", "TwoStreamInception"),
    "fused_two_stream": ("inception", "FusedTwoStream"),
    "i3d_inception": ("inception", "I3DInception"),
    "two_stream_i3d": ("inception", "TwoStreamI3D"),
}


def list_models() -> list[str]:
    """The names that `create_model` knows."""
    return list(_HOMES)


def model_options(name: str) -> dict:
    """The options of the network called `name`, with their defaults."""
    parameters = inspect.signature(_network(name)).parameters.values()
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
    return _network(name)(positive_integer("num_classes", num_classes), **options)


def _network(name):
    module, network = _HOMES[one_of("name", name, _HOMES)]
    return getattr(import_module(f"{__name__}.{module}"), network)
