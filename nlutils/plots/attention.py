"""What attention looks at, drawn over the frames of a clip."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from nlutils.plots.figures import COLOURS

__all__ = ["AttentionMap", "attention_picture"]

COLUMNS = 8


@dataclass(frozen=True)
class AttentionMap:
    """One query's attention on the grid of the frames.

    title    what is written above its frames
    weights  (T, H, W), NaN where there is nothing to look at
    query    (step, top, left, height, width) of the place that looks, in frames and their pixels
    shares   whether the weights are shares of a whole, 1 where a place gets as much as if all got the same;
             else they are f(x_i, x_j) themselves
    """

    title: str
    weights: np.ndarray
    query: tuple[float, float, float, float, float]
    shares: bool = True


def attention_picture(frames, maps, *, title: str = ""):
    """The frames, uint8 (T, H, W, 3), in a row, and below it a row for each `AttentionMap` in `maps`.

    At most eight frames stand in a row; each stands for itself and those up to the next, and shows the mean
    of their weights and, where weights are shares, how much of the whole they get together. The frame with
    the query is one of them, and the query is framed. Each row has its own scale of colours; hatched places
    have no weight. Returns a Matplotlib figure. Raises ValueError for shapes that do not fit.
    """
    import matplotlib.pyplot as plt

    frames, maps = _checked(frames, maps)
    edges = np.linspace(0, len(frames), min(COLUMNS, len(frames)) + 1).round().astype(int).tolist()
    spans = list(pairwise(edges))
    height = 1.5 * frames.shape[1] / frames.shape[2] + 0.55
    fig, grid = plt.subplots(
        1 + len(maps),
        len(spans) + 1,
        figsize=(1.5 * len(spans) + 0.6, height * (1 + len(maps)) + 0.3),
        width_ratios=[1] * len(spans) + [0.06],
        squeeze=False,
        layout="constrained",
    )
    fig.suptitle(title, fontsize=11)
    for ax in grid[:, :-1].flat:
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_visible(False)
    _draw_clip(grid[0], frames, spans)
    for axes, one in zip(grid[1:], maps, strict=True):
        _draw_map(axes, frames, spans, one)
    return fig


def _checked(frames, maps):
    frames, maps = np.asarray(frames), list(maps)
    if frames.ndim != 4 or frames.shape[3] != 3 or len(frames) == 0:
        raise ValueError(f"frames has shape {frames.shape}; it must be (T, H, W, 3), T at least 1")
    for one in maps:
        if one.weights.shape != frames.shape[:3]:
            raise ValueError(
                f"weights of {one.title!r} have shape {one.weights.shape}; they must be {frames.shape[:3]}, "
                "those of the frames"
            )
    return frames, maps


def _draw_clip(axes, frames, spans):
    for (start, _), ax in zip(spans, axes, strict=False):
        ax.imshow(frames[start], interpolation="bilinear")
        ax.set_title(f"step {start}", fontsize=8)
    # Whoever wants to name another query reads its row and column here.
    _, rows, columns, _ = frames.shape
    axes[0].set_yticks([0, rows - 1])
    axes[0].set_xticks([0, columns - 1])
    axes[0].tick_params(labelsize=7, length=2)
    axes[-1].set_axis_off()


def _draw_map(axes, frames, spans, one):
    # Out of the layout: it would take the first frame to be as wide as the text.
    text = axes[0].annotate(
        one.title, (0, 1), (0, 17), xycoords="axes fraction", textcoords="offset points", fontsize=9
    )
    text.set_in_layout(False)
    smallest, largest = min(0.0, np.nanmin(one.weights)), np.nanmax(one.weights)
    total = np.nansum(one.weights)
    step, top, left, height, width = one.query
    for (start, stop), ax in zip(spans, axes, strict=False):
        here = start <= step < stop
        ax.imshow(_grey(frames[step if here else start]), interpolation="bilinear")
        weights = one.weights[start:stop].mean(axis=0)
        image = ax.imshow(
            weights, cmap="inferno", alpha=0.6, vmin=smallest, vmax=largest, interpolation="nearest"
        )
        _hatch(ax, np.isnan(weights))
        share = f"{100 * np.nansum(one.weights[start:stop]) / total:.0f} %" if one.shares else ""
        ax.set_title(f"\n{share}", fontsize=8)  # the row's title stands in the empty line
        if here:
            _outline(ax, top, left, height, width)
    bar = ax.figure.colorbar(image, cax=axes[-1])
    bar.ax.tick_params(labelsize=7)
    bar.set_label("× even share" if one.shares else "f", fontsize=7)


def _grey(frame):
    """The frame in shades of grey: colour is what the attention is drawn in."""
    grey = (frame @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def _hatch(ax, nothing):
    if nothing.any():
        ax.contourf(nothing, levels=[0.5, 1.5], colors="none", hatches=["////"])


def _outline(ax, top, left, height, width):
    from matplotlib.patches import Rectangle

    for line, colour in ((3.5, "white"), (1.8, COLOURS["blue"])):  # seen on dark and bright
        ax.add_patch(
            Rectangle((left - 0.5, top - 0.5), width, height, fill=False, linewidth=line, edgecolor=colour)
        )
