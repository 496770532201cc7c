"""From labelled clips to what networks see: frames, differences of frames, optical flow.

A data set is decoded once and kept in memory as bytes; crops, mirrors and the step to float happen a batch at
a time, on the device that trains.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import cv2
import numpy as np
import torch

from nlutils.arguments import one_of
from nlutils.study.recipe import TIMES
from nlutils.torch.models.common import INPUT_CHANNELS
from nlutils.video.cache import cached_array
from nlutils.video.clips import ClipSet
from nlutils.video.flow import optical_flow
from nlutils.video.sampling import segment_indices

__all__ = ["Inputs", "prepare"]

# The cache's key of flow begins so. Change it when the same frames would give another flow.
_FLOW_RULES = "optical_flow dis median"
# Optical flow is kept in steps of 1/16 pixel of the resized frame, from -8 to 8 pixels.
FLOW_STEPS = 16
# Differences of grey values are divided by this, which brings them near unit size on real clips.
DIFFERENCE_UNIT = 16.0
RGB_MEAN, RGB_STD = 0.45, 0.225


@dataclass(frozen=True)
class Inputs:
    """The clips of one data set, ready to be cut into batches.

    frames   uint8 (clips, 3, T + 1, H, W): T + 1 frames evenly spread over each clip, for T differences
    flow     int8 (clips, 2, T, H, W) from each of these frames to the next, median removed, in steps of
             1/16 pixel; None when nobody asked
    """

    name: str
    source: str
    classes: tuple[str, ...]
    names: tuple[str, ...]
    groups: tuple[str, ...]
    labels: torch.Tensor
    folds: torch.Tensor
    frames: torch.Tensor
    flow: torch.Tensor | None
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what tells these clips from others: names, groups, labels, folds and the frames' bytes.

        Flow follows from the frames.
        """
        told = [self.names, self.groups, self.classes, self.labels.tolist(), self.folds.tolist()]
        total = hashlib.sha256(json.dumps(told).encode())
        total.update(np.ascontiguousarray(self.frames.cpu().numpy()).data)
        return total.hexdigest()

    def split(self, fold) -> tuple[torch.Tensor, torch.Tensor]:
        """The indices of the clips outside `fold` (to train on) and in it (to test on).

        Several folds, (0, 3), are left out together.
        """
        wanted = (fold,) if isinstance(fold, int) else tuple(fold)
        folds = sorted(set(self.folds.tolist()))
        for one in wanted:
            if one not in folds:
                raise ValueError(f"fold={one!r} is not a fold of {self.name}; it has {folds}")
        here = torch.isin(self.folds, torch.tensor(wanted))
        both = {self.groups[i] for i in torch.nonzero(here)[:, 0]} & {
            self.groups[i] for i in torch.nonzero(~here)[:, 0]
        }
        if both:
            raise ValueError(f"groups {sorted(both)[:3]} of {self.name} lie in fold {fold} and outside it")
        return torch.nonzero(~here)[:, 0], torch.nonzero(here)[:, 0]

    def to(self, device) -> "Inputs":
        """The same with frames and flow on `device`."""
        flow = None if self.flow is None else self.flow.to(device)
        return replace(self, frames=self.frames.to(device), flow=flow)

    def batch(self, kind, indices, size, *, generator=None, flip=False, time="forward", mirrored=False):
        """What a network with `input` == `kind` sees of the clips `indices`: (B, C, T, *size), float32.

        A tuple of kinds gives a tuple of tensors, cut from the same places. With a `generator` the crop is
        drawn a clip, and half of the clips are mirrored when `flip`; without one the crop is central, and
        all of them are mirrored when `mirrored`. `time` is the order of the steps, as in `Recipe`; what it
        draws comes from `generator`, and without one from the clip's place in the data set.
        """
        kinds = (kind,) if isinstance(kind, str) else kind
        one_of("time", time, TIMES)
        for one in kinds:
            one_of("input", one, INPUT_CHANNELS)
        cuts = self._cuts(indices, size, generator, flip, time, mirrored)
        made = tuple(self._make(one, indices, size, cuts, time == "reversed") for one in kinds)
        return made[0] if isinstance(kind, str) else made

    def _cuts(self, indices, size, generator, flip, time, mirrored):
        spare = [have - want for have, want in zip(self.frames.shape[-2:], size, strict=True)]
        if min(spare) < 0:
            raise ValueError(
                f"size={tuple(size)} does not fit into frames of {tuple(self.frames.shape[-2:])}"
            )
        steps = self.frames.shape[2] - 1
        if generator is None:
            return [
                _Cut(spare[0] // 2, spare[1] // 2, mirrored, _order(time, steps, int(index)))
                for index in indices
            ]
        cuts = []
        for y, x, side in torch.rand(len(indices), 3, generator=generator).tolist():
            top, left = int(y * (spare[0] + 1)), int(x * (spare[1] + 1))
            cuts.append(_Cut(top, left, flip and side < 0.5, _order(time, steps, generator)))
        return cuts

    def _make(self, kind, indices, size, cuts, backwards):
        if kind == "flow" and self.flow is None:
            raise ValueError("these inputs hold no optical flow; call prepare(..., flow=True)")
        stored = self.flow if kind == "flow" else self.frames
        height, width = size
        parts = []
        for index, cut in zip(indices.tolist(), cuts, strict=True):
            part = stored[index, :, :, cut.top : cut.top + height, cut.left : cut.left + width]
            parts.append(part.flip(-1) if cut.mirrored else part)
        x = torch.stack(parts).float()
        if backwards:
            # The first step of a film that runs backwards is the last, and every motion goes the other way.
            x = -x.flip(2) if kind == "flow" else x.flip(2)
        if kind == "rgb":
            x = (x[:, :, :-1] / 255 - RGB_MEAN) / RGB_STD
        elif kind == "differences":
            x = (x[:, :, 1:] - x[:, :, :-1]) / DIFFERENCE_UNIT
        else:
            x /= FLOW_STEPS
            mirrored = torch.tensor([cut.mirrored for cut in cuts], device=x.device)
            # To the left becomes to the right.
            x[:, 0] = torch.where(mirrored[:, None, None, None], -x[:, 0], x[:, 0])
        if cuts[0].order is None:
            return x
        return torch.stack([clip[:, cut.order.to(x.device)] for clip, cut in zip(x, cuts, strict=True)])


class _Cut(NamedTuple):
    """What is taken of one clip; `order` are the time steps, None for all of them as they come."""

    top: int
    left: int
    mirrored: bool
    order: torch.Tensor | None


def _order(time, steps, source):
    """The time steps of one clip; `source` is a generator in training, the clip's place in the test."""
    if time not in ("shuffled", "one_step"):
        return None
    training = isinstance(source, torch.Generator)
    draw = source if training else torch.Generator().manual_seed(source)
    if time == "shuffled":
        return torch.randperm(steps, generator=draw)
    step = int(torch.randint(steps, (), generator=draw)) if training else steps // 2
    return torch.full((steps,), step)


def prepare(
    clips: ClipSet, frames: int = 16, resize=(45, 60), *, flow: bool = True, progress: bool = False
) -> Inputs:
    """Decode every clip of `clips` once: `frames` + 1 frames of `resize` pixels each, and their optical flow.

    The flow is computed on the frames as the clip set gives them, its median over space is removed (the part
    of the motion that is the camera's), and it is kept in the cache, keyed by the frames' content.
    """
    if len(clips) == 0:
        raise ValueError(f"{clips.name} has no clips")
    stored_frames, stored_flow = [], []
    for clip in _progress(clips.clips, progress):
        picked = evenly(clip.frames(), frames + 1)
        stored_frames.append(resized(picked, resize).transpose(3, 0, 1, 2))
        if flow:
            stored_flow.append(_cached_flow(picked, resize).transpose(3, 0, 1, 2))
    return Inputs(
        name=clips.name,
        source=clips.source,
        classes=tuple(clips.classes),
        names=tuple(clip.name for clip in clips.clips),
        groups=tuple(clip.group for clip in clips.clips),
        labels=torch.tensor([clip.label for clip in clips.clips]),
        folds=torch.tensor([clip.fold for clip in clips.clips]),
        frames=torch.from_numpy(np.stack(stored_frames)),
        flow=torch.from_numpy(np.stack(stored_flow)) if flow else None,
        left_out=len(clips.faults),
    )


def evenly(frames: np.ndarray, count: int) -> np.ndarray:
    """`count` of a clip's frames (T, ...), evenly spread; a short clip shows some of them twice."""
    return frames[segment_indices(len(frames), count)]


def resized(frames: np.ndarray, size) -> np.ndarray:
    """uint8 (T, H, W, 3) -> (T, *size, 3), each pixel the mean over its area."""
    height, width = size
    if frames.shape[1:3] == (height, width):
        return frames
    return np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA) for frame in frames])


def _cached_flow(frames: np.ndarray, size) -> np.ndarray:
    # What is kept is the small result: a hundredth of the bytes of the flow that it is made from.
    digest = hashlib.sha256(np.ascontiguousarray(frames)).hexdigest()
    key = f"{_FLOW_RULES} {cv2.__version__} {FLOW_STEPS} {frames.shape} {tuple(size)} {digest}"
    return cached_array("study-flow", key, lambda: _flow(frames, size))


def _flow(frames: np.ndarray, size) -> np.ndarray:
    """uint8 (T + 1, H, W, 3) -> int8 (T, *size, 2): DIS flow without its median, in steps of 1/16 pixel."""
    flow = optical_flow(frames, "dis", subtract_median=True)
    height, width = size
    small = np.stack([cv2.resize(field, (width, height), interpolation=cv2.INTER_AREA) for field in flow])
    small *= (width / frames.shape[2], height / frames.shape[1])  # pixels of the resized frame
    return np.clip(np.rint(small * FLOW_STEPS), -128, 127).astype(np.int8)


def _progress(items, shown: bool):
    if not shown:
        return items
    from tqdm.auto import tqdm

    return tqdm(items, desc="clips", unit="clip")
