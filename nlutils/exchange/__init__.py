"""Weights to and from: Keras <-> PyTorch, files, the names of published code, and published checkpoints."""

from nlutils.exchange.checkpoints import PUBLISHED, CheckpointReport, load_checkpoint, to_checkpoint
from nlutils.exchange.files import load_block, save_block, saved_options
from nlutils.exchange.frameworks import from_arrays, keras_to_torch, to_arrays, torch_to_keras
from nlutils.exchange.published import LAYOUTS, fold_bias, from_published, scale_theta, to_published

__all__ = [
    "LAYOUTS",
    "PUBLISHED",
    "CheckpointReport",
    "fold_bias",
    "from_arrays",
    "from_published",
    "keras_to_torch",
    "load_block",
    "load_checkpoint",
    "save_block",
    "saved_options",
    "scale_theta",
    "to_arrays",
    "to_checkpoint",
    "to_published",
    "torch_to_keras",
]
