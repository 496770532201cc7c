"""Sizes of frames and clips, as options give them."""

from nlutils.arguments import positive_integer

__all__ = ["clip_size", "pair"]


def pair(name: str, value) -> tuple[int, int]:
    """A size as (height, width), from one number or two; ValueError for anything else."""
    sides = (value, value) if hasattr(value, "__index__") else value
    if not isinstance(sides, tuple | list) or len(sides) != 2:
        raise ValueError(f"{name}={value!r} must be one number or a pair (height, width)")
    return tuple(positive_integer(name, side) for side in sides)


def clip_size(frames, size) -> tuple[int, int, int]:
    """(T, H, W) from `frames` and the pair `size`, checked."""
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise ValueError(f"size={size!r} must be a pair (height, width)")
    return (positive_integer("frames", frames), *(positive_integer("size", side) for side in size))
