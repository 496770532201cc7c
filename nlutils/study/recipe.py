"""What a training run is told: everything that its result depends on, but for the network and the clips."""

import dataclasses
import math
from dataclasses import dataclass

from nlutils.arguments import (
    one_of,
    positive_integer,
    positive_number,
    probability,
    truth_value,
    whole_number,
)

__all__ = ["PRECISIONS", "SCHEDULES", "TIMES", "Recipe"]

SCHEDULES = ("cosine", "step", "constant")
TIMES = ("forward", "reversed", "shuffled", "one_step")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Recipe:
    """One training recipe. Raises ValueError, naming the setting, for values that cannot be meant.

    epochs, batch     passes over the training clips; clips a step
    lr, weight_decay  of AdamW
    block_lr          learning rate of non-local blocks and of their controls, in units of `lr`
    label_smoothing   share of each label that is spread evenly over all classes
    schedule          "cosine" (to 0), "step" (a tenth after 2/3 and 8/9 of the epochs), "constant"
    warmup            epochs during which the learning rate rises linearly; the schedule begins behind them
    frames            T, the time steps that a network sees, evenly spread over a clip
    resize, size      (height, width) of the area-resized frames, and of the crop that networks see
    input             what networks of one stream see: "rgb", "differences" or "flow"
    time              the order of a clip's time steps, in training and test: "forward"; "reversed", the
                      film backwards; "shuffled", each clip in an order of its own; "one_step", one step T
                      times (drawn in training, the middle one in the test)
    flip              mirror half of the training clips (and the sign of their flow's dx)
    test_flip         average the test's class probabilities over each clip and its mirror image
    init              where weights come from: "" (drawn), "procedural", "inflated" or a file, see
                      `nlutils.study.start`
    precision         of the networks' arithmetic: "float32"; on a GPU "bfloat16" where autocast allows it
    compile           whether `torch.compile` compiles the training step
    seed              of weights, order, crops and dropout
    """

    epochs: int = 24
    batch: int = 16
    lr: float = 5e-3
    weight_decay: float = 1e-2
    block_lr: float = 1.0
    label_smoothing: float = 0.0
    schedule: str = "cosine"
    warmup: int = 2
    frames: int = 16
    resize: tuple[int, int] = (45, 60)
    size: tuple[int, int] = (40, 56)
    input: str = "flow"
    time: str = "forward"
    flip: bool = True
    test_flip: bool = False
    init: str = ""
    precision: str = "float32"
    compile: bool = False
    seed: int = 0

    def __post_init__(self):
        for name in ("epochs", "batch", "frames"):
            positive_integer(name, getattr(self, name))
        if self.batch < 2:
            raise ValueError(f"batch={self.batch!r} must be 2 or more: batch normalisation needs company")
        positive_number("lr", self.lr)
        positive_number("block_lr", self.block_lr)
        if self.weight_decay != 0:
            positive_number("weight_decay", self.weight_decay)
        probability("label_smoothing", self.label_smoothing)
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("input", self.input, ("rgb", "differences", "flow"))
        one_of("time", self.time, TIMES)
        one_of("precision", self.precision, PRECISIONS)
        for name in ("flip", "test_flip", "compile"):
            truth_value(name, getattr(self, name))
        if not isinstance(self.init, str):
            raise ValueError(f"init={self.init!r} must be a text: '', 'procedural', 'inflated' or a file")
        whole_number("warmup", self.warmup)
        whole_number("seed", self.seed)
        for name in ("resize", "size"):
            pair = getattr(self, name)
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise ValueError(f"{name}={pair!r} must be a pair (height, width)")
            # JSON gives lists back; a recipe that was written and read is equal to itself.
            object.__setattr__(self, name, tuple(positive_integer(name, side) for side in pair))
        if self.size[0] > self.resize[0] or self.size[1] > self.resize[1]:
            raise ValueError(f"size={self.size} must fit into resize={self.resize}: it is cropped from it")

    def rate(self, progress: float) -> float:
        """The learning rate after `progress` epochs, a fraction included."""
        if progress < self.warmup:
            return self.lr * (progress + 1 / self.epochs) / (self.warmup + 1 / self.epochs)
        done = (progress - self.warmup) / max(self.epochs - self.warmup, 1)
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        if self.schedule == "step":
            return self.lr * 0.1 ** sum(done >= edge for edge in (2 / 3, 8 / 9))
        return self.lr

    def replace(self, **changes) -> "Recipe":
        """A copy with other settings; TypeError for a setting that does not exist."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise TypeError(f"a recipe has no setting {name!r}; it has {', '.join(known)}")
        return dataclasses.replace(self, **changes)

    def settings(self) -> dict:
        """The recipe as a dictionary that JSON can hold; `Recipe(**settings)` gives it back."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}
