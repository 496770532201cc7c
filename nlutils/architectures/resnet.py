"""C2D and I3D in tables and rules: layers, places of the blocks, and what the paper and later code do apart.

Wang, Girshick, Gupta, He: Non-local Neural Networks, CVPR 2018, Table 1 and sections 3.3, 4 and 5.1. What
they leave open is as in facebookresearch/video-nonlocal-net (lib/models, lib/core/config.py). Other layouts:
read in facebookresearch/SlowFast and pytorchvideo, and in open-mmlab/mmaction2.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nlutils.architectures.expects import Expects
from nlutils.arguments import one_of, positive_integer
from nlutils.instantiations import SOFTMAX_FORMS

__all__ = [
    "LAYOUTS",
    "STAGES",
    "Bottleneck",
    "Layout",
    "Plan",
    "bottlenecks",
    "find_layout",
    "followers",
    "is_inflated",
    "plan",
    "residual_blocks",
]

STAGES = ("res2", "res3", "res4", "res5")
DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
# So many blocks in this and that stage. One goes before the last residual block, several are spread evenly.
PRESETS = {0: {}, 1: {"res4": 1}, 5: {"res3": 2, "res4": 3}, 10: {"res3": 4, "res4": 6}}
# The options of each kind of block that can follow a residual block.
BLOCK_OPTIONS = {
    "non_local": ("instantiation", "subsample", "scale", "attention", "frames_per_group"),
    "cgnl": ("groups", "kernel", "order"),
}


def residual_blocks(depth) -> dict[str, int]:
    """The number of residual blocks of each stage; ValueError unless `depth` is 50, 101 or four numbers."""
    if isinstance(depth, int) and depth in DEPTHS:
        depth = DEPTHS[depth]
    if not isinstance(depth, tuple | list) or len(depth) != len(STAGES):
        raise ValueError(
            f"depth={depth!r} is not known; use 50, 101, or the number of residual blocks in each of "
            f"{', '.join(STAGES)}: (3, 4, 6, 3)"
        )
    return {stage: positive_integer("depth", count) for stage, count in zip(STAGES, depth, strict=True)}


def is_inflated(stage: str, index: int) -> bool:
    """Whether I3D's residual block sees three frames: "one in every two", in res2 all of them."""
    return stage == "res2" or index % 2 == (1 if stage == "res5" else 0)


@dataclass(frozen=True)
class Bottleneck:
    """A residual block: a 1x1 (`kernel_a`), a 3x3 (`kernel_b`), a 1x1 with 4 `width` channels; a shortcut.

    The first of a stage has a convolution as shortcut, of stride `stride`, which is that of `stride_a` or of
    `stride_b`, too. Kernels and strides are (T, H, W).
    """

    stage: str
    index: int
    width: int
    kernel_a: tuple[int, int, int]
    stride_a: tuple[int, int, int]
    kernel_b: tuple[int, int, int]
    stride_b: tuple[int, int, int]
    stride: tuple[int, int, int]

    @property
    def has_shortcut(self) -> bool:
        """Whether a convolution leads past the block; in the others nothing does but x."""
        return self.index == 0


def bottlenecks(
    blocks: dict[str, int], width: int, stride_in: str, inflate: str | None
) -> dict[str, list[Bottleneck]]:
    """The residual blocks of each stage, whose numbers are in `blocks`; other arguments as in `C2D`.

    Raises ValueError for an unknown `stride_in` or `inflate`.
    """
    one_of("inflate", inflate, (None, "3x1x1", "3x3x3"))
    one_of("stride_in", stride_in, ("1x1", "3x3"))
    return {
        stage: [_bottleneck(stage, index, width * 2**level, stride_in, inflate) for index in range(count)]
        for level, (stage, count) in enumerate(blocks.items())
    }


def _bottleneck(stage, index, width, stride_in, inflate):
    here = inflate if is_inflated(stage, index) else None
    plain = (1, 1, 1)
    stride = (1, 2, 2) if index == 0 and stage != "res2" else plain
    return Bottleneck(
        stage,
        index,
        width,
        kernel_a=(3 if here == "3x1x1" else 1, 1, 1),
        stride_a=stride if stride_in == "1x1" else plain,
        kernel_b=(3 if here == "3x3x3" else 1, 3, 3),
        stride_b=stride if stride_in == "3x3" else plain,
        stride=stride,
    )


def followers(
    layout: "Layout", clip: str, blocks: dict[str, int], options: dict, defaults: dict
) -> dict[tuple[str, int], tuple[str, dict]]:
    """Which block follows which residual block: (stage, index) -> ("non_local" or "cgnl", its options).

    layout, clip  as for `find_layout`; blocks, how many residual blocks each stage has
    options       of the network: "non_local" and "cgnl", each a key of `PRESETS` or a mapping {stage:
                  indices}, and `BLOCK_OPTIONS`
    defaults      what they are unless told

    Raises ValueError for what is not known, not there or there twice, for a mapping that names nothing, and
    for options of blocks where there are none: of all blocks, or of those in a stage.
    """
    given = {name: {key: options[key] for key in keys} for name, keys in BLOCK_OPTIONS.items()}
    found = {}
    for kind, block_options in given.items():
        for stage, index in _block_places(kind, options[kind], blocks, block_options, defaults):
            if (stage, index) in found:
                raise ValueError(
                    f"cgnl={options['cgnl']!r} and non_local both name a residual block of {stage}; only one "
                    "can follow"
                )
            found[stage, index] = kind, block_options
            if kind == "non_local":
                found[stage, index] = kind, layout.block_options(clip, block_options)[stage]
    grouped = [stage for (stage, _), (kind, _) in found.items() if kind == "non_local"]
    _check_grouping(options["frames_per_group"], grouped)
    return found


def _check_grouping(frames_per_group, there):
    if isinstance(frames_per_group, Mapping):
        for stage in frames_per_group:
            if one_of("frames_per_group", stage, STAGES) not in there:
                raise ValueError(
                    f"frames_per_group={frames_per_group!r}: {stage} has no non-local block; leave it out"
                )


def _block_places(option, value, blocks, options, defaults):
    at = sorted(_places(option, value, blocks))
    for name, setting in options.items():
        # It would be ignored: somebody trains a network without blocks, and believes that it has some.
        if not at and setting != defaults[name]:
            raise ValueError(
                f"{name}={setting!r} is for blocks, and {option}=0 has none; say how many, or where"
            )
    return at


def _places(option, value, blocks):
    if isinstance(value, Mapping):
        return _named(option, value, blocks)
    if isinstance(value, bool) or value not in list(PRESETS):  # a list takes what has no hash, too
        known = ", ".join(map(str, PRESETS))
        raise ValueError(f"{option}={value!r} is not known; use {known}, or say where: {{'res4': [4]}}")
    return {
        (stage, index)
        for stage, count in PRESETS[value].items()
        for index in _spread(option, count, stage, blocks[stage])
    }


def _spread(option, count, stage, there):
    """`count` indices below `there`; a single one leaves a residual block behind it."""
    step = there - 1 if count == 1 else there // count
    if step < 1:
        raise ValueError(
            f"{option}: {stage} has {there} residual blocks, too few to put {count} between or behind; "
            f"say where: {option}={{{stage!r}: [{there - 1}]}}"
        )
    return [step * turn - 1 for turn in range(1, count + 1)]


def _named(option, value, blocks):
    found = []
    for stage, indices in value.items():
        count = blocks[one_of(option, stage, STAGES)]
        if not isinstance(indices, Iterable):
            raise ValueError(f"{option}={value!r} must hold lists of indices: {{{stage!r}: [{indices!r}]}}")
        for index in indices:
            if index not in range(-count, count):
                raise ValueError(f"{option}={value!r}: {stage} has {count} residual blocks, but no {index!r}")
            found.append((stage, index % count))
    if not found:
        raise ValueError(f"{option}={value!r} names no place, so no block would be there; use 0 for none")
    if len(set(found)) < len(found):
        raise ValueError(f"{option}={value!r} names a place twice; name it once")
    return set(found)


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

    def conv1(self, clip: str, inflate: str | None):
        """(kernel, stride) of the first convolution; half the kernel is its padding."""
        return (5 if inflate else 1, 7, 7), (self.stride(clip), 2, 2)

    def pools(self, clip: str):
        """(window, stride, padding) of pool1 and of pool2."""
        stride = self.stride(clip)
        frames = self.pool1 if stride == 2 else 1
        pool1 = (frames, 3, 3), (stride, 2, 2), ((frames - 1) // 2, self.padding, self.padding)
        pool2 = (self.pool2, 1, 1), (2, 1, 1), ((self.pool2 - 1) // 2, 0, 0)
        return pool1, pool2

    def least(self, clip: str) -> tuple[int, int, int]:
        """The smallest T, H and W that leave a position behind pool2; what follows pads."""
        need = [1, 1, 1]
        for layer in reversed(self.pools(clip)):
            need = [
                max((count - 1) * stride + window - 2 * padding, 1)
                for count, window, stride, padding in zip(need, *layer, strict=True)
            ]
        # conv1 is padded by half its kernel.
        _, strides = self.conv1(clip, None)
        return tuple((count - 1) * stride + 1 for count, stride in zip(need, strides, strict=True))

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


@dataclass(frozen=True)
class Plan:
    """What the options of a C2D or I3D come to; kernels, windows, strides and padding are (T, H, W).

    conv1         (kernel, stride); half the kernel is its padding, as in the residual blocks
    pool1, pool2  (window, stride, padding)
    stages        the residual blocks of each stage
    followers     which block follows which of them, see `followers`
    least         the smallest T, H and W of a clip
    expects       the recipe facts of the published sizes; None for others
    """

    conv1: tuple
    pool1: tuple
    pool2: tuple
    stages: dict[str, list[Bottleneck]]
    followers: dict[tuple[str, int], tuple[str, dict]]
    least: tuple[int, int, int]
    expects: Expects | None


def plan(options: dict, defaults: dict) -> Plan:
    """The plan of a C2D or I3D from all its options by name, and their defaults.

    Raises ValueError, naming the option, for what is not known or does not fit.
    """
    layout, clip, inflate = (options[name] for name in ("layout", "clip", "inflate"))
    row, blocks = find_layout(layout, clip), residual_blocks(options["depth"])
    width = positive_integer("width", options["width"])
    pool1, pool2 = row.pools(clip)
    published = tuple(blocks.values()) in DEPTHS.values() and width == 64 and options["input"] == "rgb"
    return Plan(
        conv1=row.conv1(clip, inflate),
        pool1=pool1,
        pool2=pool2,
        stages=bottlenecks(blocks, width, options["stride_in"], inflate),
        followers=followers(row, clip, blocks, options, defaults),
        least=row.least(clip),
        expects=row.expects(clip) if published else None,
    )
