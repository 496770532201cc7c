"""The Keras room: operation, blocks, networks on any Keras backend. PyTorch comes in only as that backend."""

from nlutils.keras.attention import attention_rows
from nlutils.keras.blocks import CompactGeneralizedNonLocalBlock, NonLocalBlock
from nlutils.keras.insertion import insert_non_local
from nlutils.keras.models import create_model, list_models, model_options
from nlutils.keras.operations import compact_generalized, non_local, pairwise

__all__ = [
    "CompactGeneralizedNonLocalBlock",
    "NonLocalBlock",
    "attention_rows",
    "compact_generalized",
    "create_model",
    "insert_non_local",
    "list_models",
    "model_options",
    "non_local",
    "pairwise",
]
