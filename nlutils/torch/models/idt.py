"""Improved dense trajectories: what lies along the ways of points, Fisher vectors, a linear SVM.

Wang and Schmid, "Action recognition with improved trajectories", ICCV 2013.
"""

from collections.abc import Mapping

import numpy as np
import torch

from nlutils.arguments import positive_integer
from nlutils.torch.models.common import STUDY_CLIP, check_clip
from nlutils.torch.models.fisher import FisherClassifier
from nlutils.video.descriptors import improved_trajectories
from nlutils.video.tracks import Limits

__all__ = ["IDT"]


class IDT(FisherClassifier):
    """(B, 3, T, H, W) -> (B, num_classes), by what lies along dense tracks; nothing is trained by gradients.

    `fit`, once, sees all clips that the training may see. Of each clip, and of nothing else, it makes optical
    flow (OpenCV's DIS), the camera's motion (one homography a frame), dense tracks of `length` steps at up to
    `scales` sizes of the picture, and along them the track's shape, HOG, HOF and the two halves of MBH
    (`nlutils.video.improved_trajectories`); of each kind PCA to `components` numbers (None: half of them), a
    mixture of `gaussians`, a Fisher vector. A linear SVM with C = `cost` looks at all five together. PCA and
    mixtures are learnt from at most `samples` descriptors of each kind.

    The defaults are the paper's, for videos of about 320 x 240 pixels: there K = 256. For the study's clips
    take `nlutils.video.descriptors.SMALL` and K = 16. No person detector helps the camera's motion, as one
    did in the paper's best numbers; the paper learns from 256,000 descriptors. A clip needs `length` + 1
    frames, and `patch` x `patch` pixels. Raises ValueError for a wrong option and for other clips.
    """

    input = "rgb"
    trains = False
    described_by = (*FisherClassifier.described_by, "patch", "scales")

    def __init__(
        self,
        num_classes: int,
        *,
        step: int = 5,
        length: int = 15,
        patch: int = 32,
        scales: int = 8,
        median: int = 5,
        limits: Limits | Mapping | None = None,
        components: int | None = None,
        gaussians: int = 256,
        cost: float = 100.0,
        samples: int = 100_000,
        seed: int = 0,
    ):
        super().__init__(
            num_classes,
            step=step,
            length=length,
            median=median,
            limits=limits,
            components=components,
            gaussians=gaussians,
            cost=cost,
            samples=samples,
            seed=seed,
        )
        self.patch, self.scales = positive_integer("patch", patch), positive_integer("scales", scales)

    def clip_shapes(self):
        """The study's clips, longer and larger where tracks and patches are."""
        T, H, W = STUDY_CLIP
        return ((max(T, self.length + 1), max(H, self.patch), max(W, self.patch)),)

    def loss(self, x, labels: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("idt has no weights that a loss could train; call fit with the training clips")

    def describe(self, x) -> list[dict[str, np.ndarray]]:
        """The descriptors of the tracks of each clip, {kind: float32 (tracks, W)}."""
        return [
            improved_trajectories(
                self.frames(rgb),
                step=self.step,
                length=self.length,
                patch=self.patch,
                scales=self.scales,
                median=self.median,
                limits=self.limits,
            )
            for rgb in check_clip(x, "rgb")
        ]
