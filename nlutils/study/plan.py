"""What the comparison trains: the parts that rows form, the settings to choose from, the studies."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from nlutils.study.grid import Entry
from nlutils.study.rows import (
    ABLATIONS,
    CONTROLS,
    KERAS,
    LONGER,
    ONE_STREAM,
    PRETRAINED,
    RELATIONS,
    RESIDUAL,
    ROWS,
    STREAMS,
)
from nlutils.torch.models.small import SMALL_MODELS

__all__ = ["CANDIDATES", "PARTS", "STUDIES", "Part", "Study"]


@dataclass(frozen=True)
class Part:
    """Rows that are shown together; `reference` is the one that the others are compared with."""

    title: str
    rows: tuple[str, ...]
    reference: str = ""
    seeds: tuple[int, ...] = (0,)


_HEADLINE = (
    "c3d_small",
    "c3d_small_non_local",
    "nl-all_keys",  # as the window, without sub-sampling
    "c3d_small_uniform",
    "c3d_small_window",
    "c3d_small_convolution",
    "c3d_cgnl",
    "c3d_constant",
)

PARTS = {
    "architectures": Part(
        "every architecture, one budget",
        (*ONE_STREAM, *(f"{row}-rgb" for row in ONE_STREAM), *STREAMS),
    ),
    "flow": Part("networks of one stream, on flow", tuple(ONE_STREAM), "c3d_small", (0, 1, 2)),
    "controls": Part("what is left when the block is not non-local", _HEADLINE, "c3d_small", (0, 1, 2)),
    "time": Part(
        "what is left of time",
        (
            "c3d_small",
            "c3d_small_non_local",
            *(row for row, entry in CONTROLS.items() if "time" in entry.recipe),
        ),
        "c3d_small",
        (0, 1, 2),
    ),
    "blocks": Part(
        "which block, where, how many",
        ("c3d_small", "c3d_small_non_local", *ABLATIONS, "c3d_cgnl"),
        "c3d_small_non_local",
    ),
    "chosen": Part(
        "the blocks' settings that were tried inside the training folds",
        ("c3d_small", "c3d_small_non_local", "nl-slow", "nl-time"),
        "c3d_small",
        (0, 1, 2),
    ),
    "keras": Part(
        "the same two networks in both frameworks",
        ("c3d_small", "c3d_small_non_local", *KERAS),
        "c3d_small",
    ),
    "pretrained": Part(
        "first trained on procedural actions",
        ("c3d_small", "c3d_small_non_local", *PRETRAINED),
        "c3d_small",
    ),
    "longer": Part(
        "twice as many epochs",
        ("c3d_small", "c3d_small_non_local", *LONGER),
        "c3d_small",
    ),
    "colours": Part(
        "blocks in a 2D network on colours",
        ("frame_average-rgb", "c2d_non_local-rgb", "c2d_uniform-rgb"),
        "frame_average-rgb",
        (0, 1, 2),
    ),
    "inputs": Part(
        "what the networks see",
        (
            "c3d_small",
            "c3d_small-rgb",
            "c3d_small-differences",
            "c3d_small_non_local-differences",
            "two_stream_3d",
            "two_stream_3d-motion",
        ),
        "c3d_small",
    ),
    # The highest of many rows is partly luck: they are trained again.
    "fusions": Part(
        "the highest rows, members of late fusions, with more seeds",
        ("c3d_small", "c3d_small-long", "st_resnet_small", "st_resnet_small-long", "idt"),
        "c3d_small",
        (0, 1, 2),
    ),
    "residual": Part(
        "what the residual streams live on",
        ("st_resnet_small", *RESIDUAL),
        "st_resnet_small",
        (0, 1, 2),
    ),
    "networks": Part("five small networks", tuple(SMALL_MODELS)),
    "again": Part(
        "trained again, from the same seed, on another processor",
        ("c3d_small", "c3d_small_non_local", "cnn_rnn", "two_stream_small", "st_resnet_small"),
        "c3d_small",
    ),
    "relations": Part(
        "do two far-apart places show the same?",
        ("frame_average", "c2d_non_local", *RELATIONS),
        "frame_average",
    ),
}


@dataclass(frozen=True)
class Study:
    """A study that `data/results` holds: its clips, its settings, its parts.

    clips    what `nlutils.video.open_clips` opens, with `options`
    recipe   settings that are not those of `Recipe()`
    parts    names in `PARTS`
    """

    clips: str
    parts: tuple[str, ...]
    options: Mapping = field(default_factory=dict)
    recipe: Mapping = field(default_factory=dict)


STUDIES = {
    "core8": Study(
        "core8",
        (
            "architectures",
            "flow",
            "controls",
            "time",
            "blocks",
            "chosen",
            "keras",
            "pretrained",
            "inputs",
            "colours",
            "longer",
            "fusions",
            "residual",
        ),
    ),
    "procedural": Study(
        "procedural", ("networks",), recipe={"epochs": 6, "resize": (48, 48), "size": (40, 40)}
    ),
    "core8-again": Study("core8", ("again",)),
    "jhmdb21": Study("jhmdb21", ("architectures", "controls")),
    "same_pattern": Study(
        "same_pattern",
        ("relations",),
        options={"count": 8000, "frames": 2, "size": (40, 56)},
        recipe={
            "epochs": 16,
            "batch": 32,
            "lr": 4e-3,
            "frames": 1,
            "resize": (40, 56),
            "size": (40, 56),
            "input": "rgb",
            "flip": False,
        },
    ),
}

# Settings tried on training folds alone, and members of late fusions (`nlutils.study.choice`).
CANDIDATES = {
    "c3d_small": {
        "default": ROWS["c3d_small"],
        "smoothed": Entry("c3d_small", {}, {"label_smoothing": 0.1}),
        "long": ROWS["c3d_small-long"],
    },
    "c3d_small_non_local": {
        "default": ROWS["c3d_small_non_local"],
        "slow": ROWS["nl-slow"],
        "time": ROWS["nl-time"],
    },
    "st_resnet_small": {
        "default": ROWS["st_resnet_small"],
        "long": ROWS["st_resnet_small-long"],
    },
    "idt": {"default": ROWS["idt"]},
}
