"""The Keras room: the operation and the block on any Keras backend. PyTorch comes in only as that backend."""

from nlutils.keras.blocks import CompactGeneralizedNonLocalBlock, NonLocalBlock
from nlutils.keras.operations import compact_generalized, non_local, pairwise

__all__ = ["CompactGeneralizedNonLocalBlock", "NonLocalBlock", "compact_generalized", "non_local", "pairwise"]
