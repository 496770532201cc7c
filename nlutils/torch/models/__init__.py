"""Small video networks of one size class (100,000 to 300,000 weights), one file a family, made by name."""

import inspect

from nlutils.arguments import one_of, positive_integer
from nlutils.torch.models.c3d import C3D, C3DNonLocal
from nlutils.torch.models.cnn_rnn import CNNRNN
from nlutils.torch.models.common import INPUT_CHANNELS, VideoClassifier
from nlutils.torch.models.frame_average import FrameAverage
from nlutils.torch.models.two_stream import TwoStream

__all__ = ["INPUT_CHANNELS", "VideoClassifier", "create_model", "list_models", "model_options"]

MODELS = {
    "frame_average": FrameAverage,
    "cnn_rnn": CNNRNN,
    "c3d": C3D,
    "two_stream": TwoStream,
    "c3d_non_local": C3DNonLocal,
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
