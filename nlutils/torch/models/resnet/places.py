"""The stages of a ResNet; their table is `nlutils.architectures.resnet`."""

from nlutils.architectures.resnet import STAGES, residual_blocks

__all__ = ["STAGES", "residual_blocks"]
