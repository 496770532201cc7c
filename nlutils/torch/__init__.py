"""The PyTorch room: the operation, the block, the networks. Nothing here imports TensorFlow or Keras."""

from nlutils.torch.blocks import NonLocalBlock
from nlutils.torch.models import create_model, list_models
from nlutils.torch.operations import non_local, pairwise

__all__ = ["NonLocalBlock", "create_model", "list_models", "non_local", "pairwise"]
