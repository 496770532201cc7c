"""The non-local operations as pure functions on (B, N, d) tensors: exact, in memory that grows with N."""

from nlutils.keras.operations.compact_generalized import compact_generalized
from nlutils.keras.operations.instantiations import non_local, pairwise

__all__ = ["compact_generalized", "non_local", "pairwise"]
