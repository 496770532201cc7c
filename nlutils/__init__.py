"""Non-local neural networks, step by step: the helper package of the notebooks.

`import nlutils` imports no framework and no video library. The rooms are imported when first named::

    import nlutils
    nlutils.torch.NonLocalBlock(64)      # imports PyTorch here
    nlutils.keras.NonLocalBlock()        # imports Keras here
"""

from importlib import import_module as _import_module

__version__ = "0.1.0"

_ROOMS = ("conformance", "course", "exchange", "keras", "plots", "reference", "study", "torch", "video")

__all__ = ["__version__", *_ROOMS]


def __getattr__(name):
    if name in _ROOMS:
        return _import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
