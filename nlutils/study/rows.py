"""Every row that the comparison trains: networks, controls, ablations.

A row without a suffix sees optical flow, the input that is the same for all; `-rgb` is the published input of
networks of one stream. Networks of several streams have the input that they were published with.
"""

from collections.abc import Iterable
from dataclasses import replace

from nlutils.arguments import one_of
from nlutils.study.grid import Entry

__all__ = [
    "ABLATIONS",
    "COLOURS",
    "CONTROLS",
    "DIFFERENCES",
    "KERAS",
    "LONGER",
    "ONE_STREAM",
    "PRETRAINED",
    "RELATIONS",
    "RESIDUAL",
    "ROWS",
    "STREAMS",
    "rows_of",
]

ONE_STREAM = {
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

STREAMS = {
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
RELATIONS = {
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
COLOURS = {
    "c2d_uniform-rgb": replace(
        RELATIONS["c2d_uniform"], options={**RELATIONS["c2d_uniform"].options, "input": "rgb"}
    )
}

KERAS = {
    "keras_c3d_small": Entry("c3d_small", title="3D, in Keras", framework="keras"),
    "keras_c3d_small_non_local": Entry(
        "c3d_small_non_local", title="3D + 2 non-local blocks, in Keras", framework="keras"
    ),
}

PRETRAINED = {
    f"{row}-procedural": Entry(row, {}, {"init": "procedural"}, title=f"{title}, first on procedural clips")
    for row, title in (("c3d_small", "3D"), ("c3d_small_non_local", "3D + blocks"))
}

DIFFERENCES = {
    f"{row}-differences": Entry(row, {"input": "differences"}, title=f"{title}, differences of frames")
    for row, title in (("c3d_small", "3D"), ("c3d_small_non_local", "3D + blocks"))
}

LONGER = {
    f"{row}-long": Entry(row, {}, {"epochs": 48}, title=f"{title}, 48 epochs")
    for row, title in (
        ("c3d_small", "3D"),
        ("c3d_small_non_local", "3D + blocks"),
        ("st_resnet_small", "residual streams"),
    )
}

RESIDUAL = {
    f"st_resnet_small-{name}": Entry("st_resnet_small", options, title=f"residual streams, {title}")
    for name, title, options in (
        ("apart", "not connected", {"connection": "none"}),
        ("still", "no convolution over time", {"temporal": False}),
    )
}

CONTROLS = _controls()
ABLATIONS = _ablations()

ROWS = {
    **ONE_STREAM,
    **{
        f"{row}-rgb": replace(entry, options={**entry.options, "input": "rgb"})
        for row, entry in ONE_STREAM.items()
    },
    **STREAMS,
    **CONTROLS,
    **ABLATIONS,
    **RELATIONS,
    **COLOURS,
    **KERAS,
    **PRETRAINED,
    **DIFFERENCES,
    **LONGER,
    **RESIDUAL,
}


def rows_of(names: Iterable[str]) -> dict[str, Entry]:
    """{row: Entry} of the rows called so; ValueError for one that is not in the plan."""
    return {name: ROWS[one_of("row", name, ROWS)] for name in names}
