"""How the operations treat half precision: it comes in and goes out, everything between is float32."""

from keras import backend, ops

__all__ = ["at_least_float32", "product"]


def at_least_float32(tensor):
    """float16 and bfloat16 become float32; other tensors stay what they are."""
    return ops.cast(tensor, "float32") if _dtype(tensor) in ("float16", "bfloat16") else tensor


def product(left, right):
    """left @ right: (..., n, k), (..., k, m) -> (..., n, m).

    On the PyTorch backend ops.matmul turns float64 into float32; ops.einsum does not, but may be slower.
    """
    if _dtype(left) == "float64":
        return ops.einsum("...nk,...km->...nm", left, right)
    return ops.matmul(left, right)


def _dtype(tensor):
    return backend.standardize_dtype(tensor.dtype)
