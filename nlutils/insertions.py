"""What `insert_non_local` reports, in PyTorch and in Keras, and how it checks the names it is given."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Insertion", "Insertions", "check_names"]


@dataclass(frozen=True)
class Insertion:
    """One block: the module it follows, the channels C and size (T, H, W) of its maps, its parameters."""

    name: str
    in_channels: int
    size: tuple[int | None, ...]
    parameters: int


class Insertions(tuple):
    """A tuple of `Insertion`; printed, it is a table."""

    def __str__(self) -> str:
        rows = [("after", "channels", "size", "parameters")]
        rows += [
            (
                one.name,
                str(one.in_channels),
                " x ".join("?" if side is None else str(side) for side in one.size),
                f"{one.parameters:,}",
            )
            for one in self
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            f"{name:<{widths[0]}}  "
            + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
            for name, *cells in rows
        ]
        total = sum(one.parameters for one in self)
        blocks = "block" if len(self) == 1 else "blocks"
        return "\n".join([*lines, f"{len(self)} non-local {blocks}, {total:,} parameters"])


def check_names(after: Sequence[str], known: Iterable[str], *, where: str) -> list[str]:
    """`after` as a list. Raises ValueError when it is empty, names twice, or names what is not in `known`.

    where  how to see the known names: "model.named_modules()"
    """
    if isinstance(after, str):
        raise ValueError(f"after={after!r} must be a list of names: [{after!r}]")
    after, known = list(after), [name for name in known if name]
    if not after:
        raise ValueError(f"after=[] names nothing, so no block would be inserted; see {where}")
    for at, name in enumerate(after):
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
            hint = f"did you mean {', '.join(map(repr, near))}?" if near else f"see {where}"
            raise ValueError(f"after: the model has no {name!r}; {hint}")
        if name in after[:at]:
            raise ValueError(f"after: {name!r} is named twice; name it once")
    return after
