"""How the operations treat half precision: it comes in and goes out, everything between is float32."""

from keras import backend, ops

__all__ = ["at_least_float32", "is_half"]


def is_half(tensor) -> bool:
    """Whether `tensor` is float16 or bfloat16."""
    return backend.standardize_dtype(tensor.dtype) in ("float16", "bfloat16")


def at_least_float32(tensor):
    """float16 and bfloat16 become float32; other tensors stay what they are."""
    return ops.cast(tensor, "float32") if is_half(tensor) else tensor
