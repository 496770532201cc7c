"""The Keras room: the same operation and block on any Keras backend. Nothing here imports PyTorch by itself."""

from nlutils.keras.blocks import NonLocalBlock
from nlutils.keras.operations import non_local, pairwise

__all__ = ["NonLocalBlock", "non_local", "pairwise"]
