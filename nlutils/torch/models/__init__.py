"""Video networks, one file a family, made by name: the papers' own, and in `small` the study's."""

import inspect
from importlib import import_module
from typing import NamedTuple

from nlutils.arguments import one_of, positive_integer
from nlutils.torch.models.common import INPUT_CHANNELS, Expects, VideoClassifier

__all__ = [
    "INPUT_CHANNELS",
    "Expects",
    "VideoClassifier",
    "create_model",
    "list_models",
    "model_classes",
    "model_options",
    "model_title",
]


class _Home(NamedTuple):
    """Where a network is written, what it is, and how many classes its best-known data set has."""

    module: str
    network: str
    title: str
    classes: int = 400


# A family is imported when one of its networks is asked for. The first ten are the study's own, small.
_HOMES = {
    "frame_average": _Home("small", "FrameAverage", "frame averaging, 2D", 8),
    "cnn_rnn": _Home("small", "CNNRNN", "CNN+RNN (LSTM)", 8),
    "c3d_small": _Home("small", "C3DSmall", "C3D-style, 3D", 8),
    "two_stream_small": _Home("small", "TwoStreamSmall", "two-stream", 8),
    "c3d_small_non_local": _Home("small", "C3DSmallNonLocal", "C3D-style + 2 non-local blocks", 8),
    "c2d_small": _Home("small", "C2DSmall", "C2D-style, Wang et al. 2018", 8),
    "pooling_small": _Home("small", "PoolingSmall", "CNN + pooling over time, Ng et al. 2015", 8),
    "two_stream_3d_small": _Home(
        "small", "TwoStream3DSmall", "two-stream 3D, Carreira and Zisserman 2017", 8
    ),
    "fused_two_stream_small": _Home(
        "small", "FusedTwoStreamSmall", "fused two-stream, Feichtenhofer et al. 2016", 8
    ),
    "st_resnet_small": _Home("small", "STResNetSmall", "ST-ResNet-style, Feichtenhofer et al. 2016", 8),
    "ji_2010": _Home("c3d", "Ji2010", "3D CNN with hardwired layer, Ji et al. 2010", 3),
    "c3d": _Home("c3d", "C3D", "C3D, Tran et al. 2015", 101),
    "c3d_bn": _Home("c3d", "C3DBN", "3D-ConvNet, Carreira and Zisserman 2017, (b)"),
    "lrcn": _Home("recurrent", "LRCN", "LRCN, Donahue et al. 2015", 101),
    "beyond_short_snippets": _Home(
        "recurrent", "BeyondShortSnippets", "poolings and LSTM, Ng et al. 2015", 487
    ),
    "two_stream": _Home("two_stream", "TwoStream", "two-stream, Simonyan and Zisserman 2014", 101),
    "st_resnet": _Home("st_resnet", "STResNet", "ST-ResNet, Feichtenhofer et al. 2016", 101),
    "c2d": _Home("resnet", "C2D", "C2D ResNet, Wang et al. 2018"),
    "i3d": _Home("resnet", "I3D", "I3D ResNet, Wang et al. 2018"),
    "idt": _Home("idt", "IDT", "improved dense trajectories, Wang and Schmid 2013", 51),
    "tdd": _Home("trajectory", "TDD", "TDD, Wang et al. 2015", 101),
    "visual_interaction_network": _Home(
        "interaction", "VisualInteractionNetwork", "visual interaction network, Watters et al. 2017", 3
    ),
    "inception_lstm": _Home("inception", "InceptionLSTM", "ConvNet+LSTM, Carreira and Zisserman 2017, (a)"),
    "two_stream_inception": _Home(
        "inception", "TwoStreamInception", "Two-Stream, Carreira and Zisserman 2017, (c)"
    ),
    "fused_two_stream": _Home("inception", "FusedTwoStream", "3D-Fused, Carreira and Zisserman 2017, (d)"),
    "i3d_inception": _Home("inception", "I3DInception", "I3D, one stream, Carreira and Zisserman 2017"),
    "two_stream_i3d": _Home("inception", "TwoStreamI3D", "Two-Stream I3D, Carreira and Zisserman 2017, (e)"),
}


def list_models() -> list[str]:
    """The names that `create_model` knows."""
    return list(_HOMES)


def model_title(name: str) -> str:
    """What the network called `name` is, in a few words, with the authors and year of its paper."""
    return _home(name).title


def model_classes(name: str) -> int:
    """The number of classes with which the network called `name` is best known.

    Those of UCF101, Kinetics-400, Sports-1M (487), the three actions of the 2010 network, the study's eight;
    for the interaction network the objects of a scene.
    """
    return _home(name).classes


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
    home = _home(name)
    return getattr(import_module(f"{__name__}.{home.module}"), home.network)


def _home(name):
    return _HOMES[one_of("name", name, _HOMES)]
