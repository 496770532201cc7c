"""The Keras room: the operation and the block on any Keras backend. PyTorch comes in only as that backend."""

from nlutils.keras.blocks import NonLocalBlock
from nlutils.keras.operations import non_local, pairwise

__all__ = ["NonLocalBlock", "non_local", "pairwise"]
