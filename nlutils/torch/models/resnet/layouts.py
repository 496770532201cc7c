"""What the paper and the code that followed it do differently in networks of one name.

Read in the paper's Table 1 and section 3.3, and in facebookresearch/video-nonlocal-net (lib/models,
lib/core/config.py), facebookresearch/SlowFast and pytorchvideo, and open-mmlab/mmaction2.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from nlutils.arguments import one_of
from nlutils.instantiations import SOFTMAX_FORMS
from nlutils.torch.models.common import Expects
from nlutils.torch.models.resnet.places import STAGES

__all__ = ["LAYOUTS", "Layout", "find_layout"]

# Frames, frames of the video from one to the next, and whether conv1 and pool1 halve the number of frames.
# Either way 8 frames of 32 or of 8 reach res2, and 32 of 128 or of 32.
CLIPS = {"32x2": (32, 2, True), "8x8": (8, 8, False), "128x1": (128, 1, True), "32x4": (32, 4, False)}


@dataclass(frozen=True)
class Layout:
    """One row of the table.

    clips         the clips that its networks were made for
    pool1, pool2  how many frames a pool sees; pool1 sees one where it leaves time alone
    padding       of pool1 in space: 1 keeps 56 x 56 of 224 x 224 for res2, 0 gives 55 x 55
    scale, subsample, frames_per_group
                  of the non-local blocks; frames_per_group, by stage, in the networks for 32 frames at res2
    mean, std, source
                  see `Expects`
    """

    clips: tuple[str, ...]
    pool1: int
    pool2: int
    padding: int
    scale: bool
    subsample: str
    source: str
    frames_per_group: tuple[tuple[str, int], ...] = ()
    mean: tuple[float, ...] = (0.45, 0.45, 0.45)
    std: tuple[float, ...] = (0.225, 0.225, 0.225)

    def pools(self, clip: str) -> tuple[nn.MaxPool3d, nn.MaxPool3d]:
        """pool1 and pool2."""
        strides = self.stride(clip)
        frames = self.pool1 if strides == 2 else 1
        pool1 = nn.MaxPool3d((frames, 3, 3), (strides, 2, 2), ((frames - 1) // 2, self.padding, self.padding))
        pool2 = nn.MaxPool3d((self.pool2, 1, 1), (2, 1, 1), ((self.pool2 - 1) // 2, 0, 0))
        return pool1, pool2

    def stride(self, clip: str) -> int:
        """The stride over time of conv1, and of pool1."""
        return 2 if CLIPS[clip][2] else 1

    def expects(self, clip: str) -> Expects:
        """The recipe facts of the network for this clip."""
        frames, stride, _ = CLIPS[clip]
        return Expects(frames, (224, 224), stride, self.mean, self.std, "RGB", self.source)

    def block_options(self, clip: str, options: dict) -> dict[str, dict]:
        """The options of `NonLocalBlock` for each stage; "layout" is replaced by what this layout has."""
        options = dict(options)
        if options["subsample"] == "layout":
            # One place in all frames has no neighbours to be pooled with.
            options["subsample"] = None if options["attention"] == "time" else self.subsample
        if options["scale"] == "layout":
            options["scale"] = self.scale and options["instantiation"] in SOFTMAX_FORMS
        grouping = options["frames_per_group"]
        if grouping == "layout":
            many = CLIPS[clip][0] // self.stride(clip) ** 2 > 8
            grouping = dict(self.frames_per_group) if many and options["attention"] != "space" else None
        if not isinstance(grouping, Mapping):
            grouping = dict.fromkeys(STAGES, grouping)
        for stage in grouping:
            one_of("frames_per_group", stage, STAGES)
        return {stage: {**options, "frames_per_group": grouping.get(stage)} for stage in STAGES}


LAYOUTS = {
    "paper": Layout(
        clips=tuple(CLIPS),
        pool1=3,
        pool2=3,
        padding=1,
        scale=False,
        subsample="before",
        source="Wang et al. 2018, section 4.1; mean, std: video-nonlocal-net, lib/core/config.py",
    ),
    "released": Layout(
        clips=tuple(CLIPS),
        pool1=2,
        pool2=2,
        padding=0,
        scale=True,
        subsample="before",
        source="facebookresearch/video-nonlocal-net: README.md, lib/core/config.py",
        frames_per_group=(("res3", 4),),
    ),
    "slowfast": Layout(
        clips=("8x8",),
        pool1=1,
        pool2=2,
        padding=1,
        scale=True,
        subsample="before",
        source="facebookresearch/SlowFast: MODEL_ZOO.md; pytorchvideo: docs/source/model_zoo.md",
    ),
    "mmaction2": Layout(
        clips=("32x2",),
        pool1=1,
        pool2=2,
        padding=1,
        scale=False,
        subsample="after",
        source="open-mmlab/mmaction2: configs/recognition/i3d",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    ),
}


def find_layout(layout: str, clip: str) -> Layout:
    """The row called `layout`; ValueError when there is none, or it has no network for this clip."""
    row = LAYOUTS[one_of("layout", layout, LAYOUTS)]
    one_of("clip", clip, CLIPS)
    if clip not in row.clips:
        raise ValueError(
            f"clip={clip!r} does not go with layout={layout!r}; use {', '.join(map(repr, row.clips))}"
        )
    return row
