"""The layers around the operations."""

from nlutils.torch.blocks.non_local_block import NonLocalBlock

__all__ = ["NonLocalBlock"]
