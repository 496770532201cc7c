"""What the networks of tracks share: descriptors of clips, Fisher vectors and a linear SVM, fitted once."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict

import numpy as np
import torch

from nlutils.arguments import one_of, positive_integer
from nlutils.torch.models.common import VideoClassifier
from nlutils.video.fisher import TrajectoryClassifier, held_out_scores, sharpness
from nlutils.video.tracks import MEDIANS, Limits

__all__ = ["FisherClassifier", "single"]


class FisherClassifier(VideoClassifier):
    """Clips to class scores: `describe`, then Fisher vectors and a linear SVM, which `fit` learns.

    `forward` gives the SVM's scores times a factor by which their softmax fits training clips that the SVM
    has not seen (`nlutils.video.fisher.sharpness`; 1 where a class has a single clip). The options of tracks
    are those of `nlutils.video.motion_levels` and `dense_tracks`, those of Fisher vectors and the
    SVM those of `nlutils.video.TrajectoryClassifier`. A network defines `describe`, and names in
    `described_by` the options that its descriptors depend on.

    The state dict holds what `fit` has learnt and the options that this depends on: `load_state_dict` raises
    ValueError when those of the network are others.
    """

    second_stage = True
    described_by: tuple[str, ...] = ("step", "length", "median")

    def __init__(
        self,
        num_classes: int,
        *,
        step: int,
        length: int,
        median: int,
        limits: Limits | Mapping | None,
        components: int | None,
        gaussians: int,
        cost: float,
        samples: int,
        seed: int,
    ):
        super().__init__()
        self.step, self.length = positive_integer("step", step), positive_integer("length", length)
        self.median = int(one_of("median", median, MEDIANS))
        self.limits = Limits.of(limits)
        self.encoding = TrajectoryClassifier(
            num_classes,
            dict,
            components=components,
            gaussians=gaussians,
            cost=cost,
            samples=samples,
            seed=seed,
        )
        self.sharpness = 1.0

    def describe(self, x) -> list[dict[str, np.ndarray]]:
        """The descriptors of each clip of a batch, {kind: float32 (N, W)}."""
        raise NotImplementedError

    def fit(self, batches: Iterable):
        """Learn Fisher vectors and SVM, once; `batches` of (x, labels) hold all training clips."""
        described, known = [], []
        for x, labels in batches:
            described += self.describe(x)
            known += labels.tolist()
        self.encoding.fit(described, known)
        self.sharpness = 1.0
        if min(Counter(known).values()) > 1:
            vectors, classes = self.encoding.vectors(described), self.encoding.num_classes
            self.sharpness = sharpness(held_out_scores(self.encoding.svm, vectors, known, classes), known)
        return self

    def forward(self, x) -> torch.Tensor:
        if not self.encoding.encoders:
            name = type(self).__name__.lower()
            raise RuntimeError(f"{name} knows no Fisher vectors yet; call fit with the training clips first")
        scores = self.sharpness * self.encoding.scores(self.describe(x))
        like = x if isinstance(x, torch.Tensor) else x[0]
        return torch.as_tensor(scores, dtype=like.dtype, device=like.device)

    def fitted_numbers(self) -> int:
        """How many numbers `fit` has learnt: of PCA, mixtures and SVM; 0 before."""
        return sum(array.size for array in self.encoding.state().values())

    def frames(self, rgb: torch.Tensor) -> np.ndarray:
        """One clip (3, T, H, W) as bytes, uint8 (T, H, W, 3).

        Stretched by the clip's own extremes to 0 to 255: mean and scale of the input do not matter.
        """
        rgb = single(rgb)
        low, high = rgb.min(), rgb.max()
        scaled = (rgb - low) / (high - low).clamp_min(1e-12) * 255
        return scaled.round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()

    def get_extra_state(self):
        learnt = {name: torch.from_numpy(array) for name, array in self.encoding.state().items()}
        return {"options": self._options(), "learnt": learnt, "sharpness": self.sharpness}

    def set_extra_state(self, state):
        own = self._options()
        for name, value in state["options"].items():
            if state["learnt"] and value != own[name]:
                raise ValueError(
                    f"{name}={own[name]!r}, but this state was fitted with {name}={value!r}; "
                    f"make the network with the options of the state"
                )
        self.sharpness = float(state["sharpness"])
        self.encoding.load_state({name: tensor.cpu().numpy() for name, tensor in state["learnt"].items()})

    def _options(self):
        """The options that descriptors and Fisher vectors depend on."""
        options = {name: getattr(self, name) for name in self.described_by}
        options["limits"] = {name: float(value) for name, value in asdict(self.limits).items()}
        encoding = {name: getattr(self.encoding, name) for name in ("components", "gaussians")}
        return options | encoding


def single(x: torch.Tensor) -> torch.Tensor:
    """`x` in float32, or in its own type where that has more digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
