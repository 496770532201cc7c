"""What the comparison trains: every row, the parts that rows form, the settings to choose from, the studies.

A row without a suffix sees optical flow, the input that is the same for all; `-rgb` is the published input of
networks of one stream. Networks of several streams have the input that they were published with.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from nlutils.arguments import one_of
from nlutils.study.grid import Entry
from nlutils.torch.models.small import SMALL_MODELS

__all__ = ["CANDIDATES", "PARTS", "ROWS", "STUDIES", "Part", "Study", "rows_of"]

_ONE_STREAM = {
    "frame_average": Entry("frame_average", title="frame averaging, 2D"),
    "pooling": Entry("pooling_small", {"pooling": "conv"}, title="2D, maximum over time (Ng et al. 2015)"),
    "cnn_rnn": Entry("cnn_rnn", title="CNN+LSTM (Donahue et al. 2015)"),
    "cnn_gru": Entry("cnn_rnn", {"cell": "gru"}, title="CNN+GRU"),
    "c3d_small": Entry("c3d_small", title="C3D-style, 3D (Tran et al. 2015)"),
    "i3d_small": Entry(
        "c3d_small",
        {},
        {"init": "inflated"},
        title="3D, inflated from frame averaging (Carreira, Zisserman 2017)",
    ),
    "c2d_non_local": Entry(
        "c2d_small",
        {"non_local": [2, 3], "block": {"subsample": "before"}},
        title="2D + 2 non-local blocks (Wang et al. 2018)",
    ),
    "c3d_small_non_local": Entry("c3d_small_non_local", title="3D + 2 non-local blocks (Wang et al. 2018)"),
    "c3d_cgnl": Entry(
        "c3d_small",
        {"non_local": [2, 3], "kind": "compact_generalized"},
        title="3D + 2 compact generalized blocks (Yue et al. 2018)",
    ),
}

_TRACKS = {"step": 3, "median": 3, "limits": {"least_spread": 0, "least_motion": 1e-3}}

_STREAMS = {
    "ji": Entry(
        "ji_2010",
        {"frames": 16, "size": [40, 56], "features": 32},
        title="3D CNN with hardwired layer (Ji et al. 2010)",
    ),
    "two_stream_small": Entry("two_stream_small", title="two-stream (Simonyan, Zisserman 2014)"),
    "fused_two_stream_small": Entry(
        "fused_two_stream_small", title="fused streams (Feichtenhofer et al. 2016)"
    ),
    "st_resnet_small": Entry("st_resnet_small", title="residual streams (Feichtenhofer et al. 2016)"),
    "idt": Entry(
        "idt",
        {**_TRACKS, "patch": 16, "gaussians": 16, "samples": 20_000},
        title="improved dense trajectories (Wang, Schmid 2013)",
    ),
    "tdd": Entry(
        "tdd",
        {
            **_TRACKS,
            "width": 12,
            "pictures": 4,
            "sizes": [2.0, 1.0],
            "components": 32,
            "gaussians": 16,
            "samples": 20_000,
        },
        title="trajectory-pooled descriptors (Wang et al. 2015)",
    ),
    "two_stream_3d": Entry(
        "two_stream_3d_small", {"inputs": ["rgb", "flow"]}, title="two-stream 3D (Carreira, Zisserman 2017)"
    ),
    "two_stream_3d-motion": Entry(
        "two_stream_3d_small",
        {"inputs": ["differences", "flow"]},
        title="two-stream 3D, motion",
    ),
    "two_stream_3d_non_local-motion": Entry(
        "two_stream_3d_small",
        {"inputs": ["differences", "flow"], "non_local": [2, 3], "block": {"subsample": "before"}},
        title="two-stream 3D + 2 blocks each, motion",
    ),
}


def _controls() -> dict[str, Entry]:
    """Another block in the non-local block's place; both networks with another order of time."""
    made = {}
    for kind, title in (
        ("uniform", "uniform average in the map's place"),
        ("window", "attention in a window of 3 x 3 x 3"),
        ("convolution", "no more weights, in a convolution"),
    ):
        block = {} if kind in ("window", "convolution") else {"subsample": "before"}
        options = {"non_local": [2, 3], "kind": kind, "block": block}
        made[f"c3d_small_{kind}"] = Entry("c3d_small", options, title=f"3D, {title}")
    made["c3d_constant"] = Entry(
        "c3d_small",
        {"non_local": [2, 3], "kind": "constant"},
        title="3D, 1 in place of the compact generalized look",
    )
    for time, title in (
        ("one_step", "one step"),
        ("shuffled", "shuffled steps"),
        ("reversed", "reversed film"),
    ):
        for row, name in (("c3d_small", "3D"), ("c3d_small_non_local", "3D + blocks")):
            made[f"{row}-{time}"] = Entry(row, {}, {"time": time}, title=f"{name}, {title}")
    return made


def _ablations() -> dict[str, Entry]:
    """Table 2 of Wang et al. 2018 in small, and how blocks are trained: one thing changed at a time."""

    def non_local(title, **options):
        return Entry("c3d_small_non_local", options, title=title)

    def blocks(title, stages=(2, 3), **block):
        options = {"non_local": list(stages), "block": {"subsample": "before", **block}}
        return Entry("c3d_small", options, title=title)

    return {
        "nl-gaussian": non_local("Gaussian", instantiation="gaussian"),
        "nl-dot_product": non_local("dot product", instantiation="dot_product"),
        "nl-concatenation": non_local("concatenation", instantiation="concatenation"),
        "nl-scaled": non_local("embedded Gaussian, scaled logits", scale=True),
        "nl-stage2": non_local("one block, stage 2", non_local=[2]),
        "nl-stage3": non_local("one block, stage 3", non_local=[3]),
        "nl-stage4": non_local("one block, stage 4", non_local=[4]),
        "nl-three": non_local("three blocks, stages 2 to 4", non_local=[2, 3, 4]),
        "nl-all_keys": non_local("3D + 2 blocks, no sub-sampling", subsample=None),
        "nl-after": non_local("sub-sampling behind the embedding", subsample="after"),
        "nl-space": blocks("space alone", attention="space"),
        "nl-time": blocks("time alone", attention="time", subsample=None),
        "nl-cgnl-rbf": Entry(
            "c3d_small",
            {"non_local": [2, 3], "kind": "compact_generalized", "block": {"kernel": "rbf"}},
            title="compact generalized, RBF kernel",
        ),
        "nl-slow": Entry(
            "c3d_small_non_local", {}, {"block_lr": 0.2}, title="blocks learn at a fifth of the rate"
        ),
        "nl-warmup": Entry("c3d_small_non_local", {}, {"warmup": 6}, title="warm-up of 6 epochs, not 2"),
    }  # fmt: skip


# The blocks are all that brings the places of a still picture together.
_RELATIONS = {
    f"c2d_{kind}": Entry(
        "c2d_small",
        {"non_local": [2, 3], "kind": kind, "block": block},
        title=f"2D, {title}",
    )
    for kind, title, block in (
        ("uniform", "uniform average in the map's place", {"subsample": "before"}),
        ("window", "attention in a window of 3 x 3", {"window": [1, 3, 3]}),
        ("convolution", "no more weights, in a convolution", {"kernel": [1, 3, 3]}),
    )
}

# On colours the blocks' gain in a 2D network needs its control.
_COLOURS = {
    "c2d_uniform-rgb": replace(
        _RELATIONS["c2d_uniform"], options={**_RELATIONS["c2d_uniform"].options, "input": "rgb"}
    )
}

_KERAS = {
    "keras_c3d_small": Entry("c3d_small", title="3D, in Keras", framework="keras"),
    "keras_c3d_small_non_local": Entry(
        "c3d_small_non_local", title="3D + 2 non-local blocks, in Keras", framework="keras"
    ),
}

_PRETRAINED = {
    f"{row}-procedural": Entry(row, {}, {"init": "procedural"}, title=f"{title}, first on procedural clips")
    for row, title in (("c3d_small", "3D"), ("c3d_small_non_local", "3D + blocks"))
}

_DIFFERENCES = {
    f"{row}-differences": Entry(row, {"input": "differences"}, title=f"{title}, differences of frames")
    for row, title in (("c3d_small", "3D"), ("c3d_small_non_local", "3D + blocks"))
}

_LONGER = {
    f"{row}-long": Entry(row, {}, {"epochs": 48}, title=f"{title}, 48 epochs")
    for row, title in (
        ("c3d_small", "3D"),
        ("c3d_small_non_local", "3D + blocks"),
        ("st_resnet_small", "residual streams"),
    )
}

_RESIDUAL = {
    f"st_resnet_small-{name}": Entry("st_resnet_small", options, title=f"residual streams, {title}")
    for name, title, options in (
        ("apart", "not connected", {"connection": "none"}),
        ("still", "no convolution over time", {"temporal": False}),
    )
}

ROWS = {
    **_ONE_STREAM,
    **{
        f"{row}-rgb": replace(entry, options={**entry.options, "input": "rgb"})
        for row, entry in _ONE_STREAM.items()
    },
    **_STREAMS,
    **_controls(),
    **_ablations(),
    **_RELATIONS,
    **_COLOURS,
    **_KERAS,
    **_PRETRAINED,
    **_DIFFERENCES,
    **_LONGER,
    **_RESIDUAL,
}


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
        (*_ONE_STREAM, *(f"{row}-rgb" for row in _ONE_STREAM), *_STREAMS),
    ),
    "flow": Part("networks of one stream, on flow", tuple(_ONE_STREAM), "c3d_small", (0, 1, 2)),
    "controls": Part("what is left when the block is not non-local", _HEADLINE, "c3d_small", (0, 1, 2)),
    "time": Part(
        "what is left of time",
        (
            "c3d_small",
            "c3d_small_non_local",
            *(row for row, entry in _controls().items() if "time" in entry.recipe),
        ),
        "c3d_small",
        (0, 1, 2),
    ),
    "blocks": Part(
        "which block, where, how many",
        ("c3d_small", "c3d_small_non_local", *_ablations(), "c3d_cgnl"),
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
        ("c3d_small", "c3d_small_non_local", *_KERAS),
        "c3d_small",
    ),
    "pretrained": Part(
        "first trained on procedural actions",
        ("c3d_small", "c3d_small_non_local", *_PRETRAINED),
        "c3d_small",
    ),
    "longer": Part(
        "twice as many epochs",
        ("c3d_small", "c3d_small_non_local", *_LONGER),
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
        ("st_resnet_small", *_RESIDUAL),
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
        ("frame_average", "c2d_non_local", *_RELATIONS),
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


def rows_of(names: Iterable[str]) -> dict[str, Entry]:
    """{row: Entry} of the rows called so; ValueError for one that is not in the plan."""
    return {name: ROWS[one_of("row", name, ROWS)] for name in names}


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
