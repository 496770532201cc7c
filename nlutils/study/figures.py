"""The comparison as pictures, drawn from recorded runs."""

from collections.abc import Iterable

from nlutils.study.plan import Part
from nlutils.study.results import Run
from nlutils.study.tables import PUBLISHED, Row, differences, points, title_of

__all__ = ["comparison_figure", "describe", "describe_differences", "difference_figure"]

FLOW, OTHER = ("blue", "o"), ("orange", "s")  # colour and mark of a row by its input


def comparison_figure(rows: list[Row], chance: float | None = None, title: str = ""):
    """Accuracy of each row with its 95 % interval, as a Matplotlib figure; `chance` draws a dashed line.

    A network on its published input and the same on flow share a line: circles are rows on flow, squares
    those on another input.
    """
    import matplotlib.pyplot as plt

    from nlutils.plots import COLOURS

    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(row.row.removesuffix(PUBLISHED), []).append(row)
    fig, ax = plt.subplots(figsize=(7.5, 1.1 + 0.36 * len(lines)), layout="constrained")
    for place, pair in enumerate(lines.values()):
        for row in pair:
            name, mark = FLOW if row.input == "flow" else OTHER
            shift = 0 if len(pair) == 1 else -0.16 if row.input == "flow" else 0.16
            _interval(ax, place + shift, row.accuracy, COLOURS[name], mark)
    if chance is not None:
        ax.axvline(100 * chance, color=COLOURS["grey"], linestyle="--", linewidth=1)
        ax.annotate(
            "chance", (100 * chance, -0.6), (4, 0), textcoords="offset points", color="dimgray", va="center"
        )
    titles = [
        pair[0].title if len(pair) > 1 else f"{pair[0].title}: {pair[0].input}" for pair in lines.values()
    ]
    for (name, mark), label in ((FLOW, "optical flow"), (OTHER, "another input")):
        ax.plot([], [], mark, color=COLOURS[name], label=label)
    _finish(ax, titles, "clips classified right, %, and 95 % interval", title)
    ax.set_xlim(0, 100)
    fig.legend(loc="outside lower right", ncols=2, frameon=False, fontsize=9)
    return fig


def difference_figure(runs: Iterable[Run], part: Part, title: str = ""):
    """How far each row of `part` is above its reference on the same clips, with 95 % intervals, percentage
    points; a Matplotlib figure.
    """
    import matplotlib.pyplot as plt

    from nlutils.plots import COLOURS

    found = [(row, gain) for row, gain in differences(runs, part) if gain is not None]
    fig, ax = plt.subplots(figsize=(7.5, 1.0 + 0.32 * len(found)), layout="constrained")
    for place, (_, gain) in enumerate(found):
        _interval(ax, place, gain, COLOURS["blue"], "o", signed=True)
    ax.axvline(0, color=COLOURS["grey"], linewidth=1)
    reach = 1.2 * max(100 * max(-gain.low, gain.high) for _, gain in found)
    ax.set_xlim(-reach, reach)
    titles = [row.title for row, _ in found]
    _finish(ax, titles, f"minus {title_of(part.reference)}, percentage points", title)
    return fig


def describe(rows: list[Row]) -> str:
    """The figure of `comparison_figure` in words, for its alt text."""
    parts = [f"{row.title} on {row.input} {row.accuracy}" for row in rows]
    return "Accuracy of each architecture with its 95 % interval: " + "; ".join(parts) + "."


def describe_differences(runs: Iterable[Run], part: Part) -> str:
    """The figure of `difference_figure` in words, for its alt text."""
    parts = [f"{row.title} {points(gain)}" for row, gain in differences(runs, part) if gain is not None]
    return f"Percentage points above {title_of(part.reference)}: " + "; ".join(parts) + "."


def _interval(ax, place, found, colour, mark, signed=False):
    """A point and its interval at the height `place`, in percent; its value behind them."""
    value, low, high = 100 * found.value, 100 * found.low, 100 * found.high
    ax.plot([low, high], [place, place], color=colour, linewidth=2)
    ax.plot(value, place, mark, color=colour, markersize=5)
    ax.annotate(
        f"{round(value):{'+' if signed else ''}d}",
        (high, place),
        (4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},  # the line at 0 may be behind it
    )


def _finish(ax, titles, label, title):
    ax.set_yticks(range(len(titles)), titles, fontsize=9)
    ax.set_ylim(len(titles) - 0.4, -0.9)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel(label, loc="right")
    ax.set_title(title, fontsize=10)
