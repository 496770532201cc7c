"""Clips for the Keras networks, and the same for PyTorch's."""

import keras
import numpy as np
import torch


def noise(shapes, batch=2, seed=0):
    """Clips, channels last: one array, or a list of them for two inputs."""
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=(batch, *shape)) for shape in shapes]
    return arrays if len(arrays) > 1 else arrays[0]


def as_torch(clips):
    """The clips as tensors, channels first; a tuple for a list."""
    if isinstance(clips, list):
        return tuple(as_torch(part) for part in clips)
    return torch.from_numpy(clips).movedim(-1, 1)


def numbers(tensor):
    """A tensor of Keras as an array."""
    return keras.ops.convert_to_numpy(tensor)
