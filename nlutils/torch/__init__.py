"""The PyTorch room: the operation, the block, the networks. Nothing here imports TensorFlow or Keras."""

from nlutils.torch.attention import attention_rows
from nlutils.torch.blocks import CompactGeneralizedNonLocalBlock, NonLocalBlock
from nlutils.torch.inflation import inflate_weights
from nlutils.torch.insertion import insert_non_local
from nlutils.torch.models import create_model, list_models
from nlutils.torch.operations import compact_generalized, non_local, pairwise

__all__ = [
    "CompactGeneralizedNonLocalBlock",
    "NonLocalBlock",
    "attention_rows",
    "compact_generalized",
    "create_model",
    "inflate_weights",
    "insert_non_local",
    "list_models",
    "non_local",
    "pairwise",
]
