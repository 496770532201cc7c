"""The PyTorch room: the operation, the block, the networks. Nothing here imports TensorFlow or Keras."""

from nlutils.torch.blocks import NonLocalBlock
from nlutils.torch.operations import non_local, pairwise

__all__ = ["NonLocalBlock", "create_model", "list_models", "non_local", "pairwise"]


def __getattr__(name):
    # The networks are imported when first asked for: an operation or a block needs none of them.
    if name in ("create_model", "list_models"):
        from nlutils.torch import models

        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
