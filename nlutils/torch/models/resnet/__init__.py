"""C2D and I3D: ResNets that see clips, with non-local blocks where the paper puts them.

Wang, Girshick, Gupta, He: Non-local Neural Networks, CVPR 2018, sections 4 and 5,
https://arxiv.org/abs/1711.07971
"""

from nlutils.architectures.resnet import STAGES
from nlutils.torch.models.resnet.network import C2D, I3D

__all__ = ["C2D", "I3D", "STAGES"]
