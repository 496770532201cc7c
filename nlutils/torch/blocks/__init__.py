"""The layers around the operations."""

from nlutils.torch.blocks.compact_generalized_block import CompactGeneralizedNonLocalBlock
from nlutils.torch.blocks.non_local_block import NonLocalBlock

__all__ = ["CompactGeneralizedNonLocalBlock", "NonLocalBlock"]
