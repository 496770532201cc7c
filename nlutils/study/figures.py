"""The comparison as a picture, drawn from recorded runs."""

from nlutils.study.tables import Row

__all__ = ["comparison_figure", "describe"]


def comparison_figure(rows: list[Row], chance: float | None = None, title: str = ""):
    """Accuracy of each row with its 95 % interval, as a Matplotlib figure; `chance` draws a dashed line."""
    import matplotlib.pyplot as plt

    from nlutils.plots import COLOURS

    fig, ax = plt.subplots(figsize=(7, 0.8 + 0.45 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        value, low, high = (100 * x for x in (row.accuracy.value, row.accuracy.low, row.accuracy.high))
        colour = COLOURS["red"] if "non_local" in row.row else COLOURS["blue"]
        ax.plot([low, high], [place, place], color=colour, linewidth=2)
        ax.plot(value, place, "o", color=colour)
        ax.annotate(
            f"{value:.0f} %", (value, place), (0, 6), textcoords="offset points", ha="center", fontsize=9
        )
    if chance is not None:
        ax.axvline(100 * chance, color=COLOURS["grey"], linestyle="--", linewidth=1)
        ax.annotate(
            "chance", (100 * chance, -0.6), (4, 0), textcoords="offset points", color="dimgray", va="center"
        )
    ax.set_yticks(range(len(rows)), [f"{row.title} ({row.input})" for row in rows])
    ax.set_ylim(len(rows) - 0.4, -0.9)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlim(0, 100)
    ax.set_xlabel("clips classified right, %, and 95 % interval")
    ax.set_title(title, fontsize=10)
    return fig


def describe(rows: list[Row]) -> str:
    """The figure in words, for its alt text."""
    parts = [f"{row.title} on {row.input} {row.accuracy}" for row in rows]
    return "Accuracy of each architecture with its 95 % interval: " + "; ".join(parts) + "."
