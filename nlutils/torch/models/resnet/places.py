"""Which residual blocks an I3D inflates, and which ones a non-local block follows.

Wang et al., CVPR 2018, sections 4 and 5.1; what they leave open is as in lib/models of
facebookresearch/video-nonlocal-net.
"""

from collections.abc import Iterable, Mapping

from nlutils.arguments import one_of, positive_integer

__all__ = ["STAGES", "is_inflated", "places", "residual_blocks"]

STAGES = ("res2", "res3", "res4", "res5")
DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
# So many blocks in this and that stage. One goes before the last residual block, several are spread evenly.
PRESETS = {0: {}, 1: {"res4": 1}, 5: {"res3": 2, "res4": 3}, 10: {"res3": 4, "res4": 6}}


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


def places(option: str, value, blocks: dict[str, int]) -> set[tuple[str, int]]:
    """The (stage, index) of each residual block that `value` puts a block behind.

    option  the name of the argument, for errors
    value   a key of `PRESETS`, or a mapping {stage: indices}
    blocks  how many residual blocks each stage has

    Raises ValueError for what is not known, not there, or there twice, and for a mapping that names nothing.
    """
    if isinstance(value, Mapping):
        return _named(option, value, blocks)
    if isinstance(value, bool) or value not in PRESETS:
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
