"""The layers around the operations."""

from nlutils.keras.blocks.compact_generalized_block import CompactGeneralizedNonLocalBlock
from nlutils.keras.blocks.non_local_block import NonLocalBlock

__all__ = ["CompactGeneralizedNonLocalBlock", "NonLocalBlock"]
