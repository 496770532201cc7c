"""Positions in a map, and what a block lets each of them look at: for the PyTorch and the Keras room."""

import operator

__all__ = ["check_queries", "visible"]


def check_queries(queries, size) -> list[tuple[int, ...]]:
    """`queries` as positions inside a map of `size`, negative ones counted from the end; else ValueError."""
    places = []
    for query in queries:
        try:
            place = tuple(map(operator.index, query))
            inside = all(-side <= at < side for at, side in zip(place, size, strict=True))
        except (TypeError, ValueError):  # not whole numbers, or not so many
            inside = False
        if not inside:
            raise ValueError(
                f"queries: {query!r} is not a position in a map of size {tuple(size)}; "
                f"it must be {len(size)} whole numbers inside it"
            )
        places.append(tuple(at % side for at, side in zip(place, size, strict=True)))
    return places


def visible(block, place, size) -> tuple[tuple[int, int], ...]:
    """(first, last + 1) along each axis of the keys' grid `size`: what `place` may look at in `block`."""
    region = [(0, side) for side in size]
    if block.attention == "space":
        region[0] = (place[0], place[0] + 1)
    if block.frames_per_group:
        first = place[0] - place[0] % block.frames_per_group
        region[0] = (first, first + block.frames_per_group)
    if block.attention == "time":
        region[1:] = [(at, at + 1) for at in place[1:]]
    return tuple(region)
