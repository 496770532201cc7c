"""The comparison as a table and a picture, both drawn from recorded runs."""

import json
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nlutils.paths import atomic_path, project_root, results_root
from nlutils.study.results import Interval, Run, interval, read_runs
from nlutils.torch.models import list_models, model_title

__all__ = ["Row", "comparison_figure", "markdown_table", "summarise", "write_readme_table"]

# The README's comment lines around the comparison; the first may also name the command that writes it.
MARKS = re.compile(r"(<!-- comparison\b[^>]*-->).*?(<!-- /comparison -->)", re.DOTALL)


@dataclass(frozen=True)
class Row:
    """One architecture over all its recorded folds and seeds."""

    row: str
    title: str
    input: str
    accuracy: Interval
    lowest_fold: float
    highest_fold: float
    folds: int
    seeds: int
    parameters: int
    multiply_adds: int
    forward_ms: float
    training_mb: float
    seconds: float


def summarise(runs: Iterable[Run]) -> list[Row]:
    """A row an architecture, in the order of `list_models()`; others follow by name."""
    by_row: dict[str, list[Run]] = {}
    for run in runs:
        by_row.setdefault(run.row, []).append(run)
    order = list_models()
    names = sorted(by_row, key=lambda row: (order.index(row) if row in order else len(order), row))
    return [_row(by_row[name]) for name in names]


def _row(runs: list[Run]) -> Row:
    folds = [run.accuracy for run in runs]
    return Row(
        row=runs[0].row,
        title=model_title(runs[0].row) if runs[0].row in list_models() else runs[0].row,
        input=runs[0].input,
        accuracy=interval(runs),
        lowest_fold=min(folds),
        highest_fold=max(folds),
        folds=len({run.fold for run in runs}),
        seeds=len({run.seed for run in runs}),
        parameters=runs[0].cost["parameters"],
        multiply_adds=runs[0].cost["multiply_adds"],
        # The least of the runs: whatever else a machine does only ever adds time.
        forward_ms=min(run.cost["forward_ms"] for run in runs),
        training_mb=statistics.median([run.cost["training_mb"] for run in runs]),
        seconds=statistics.median([run.seconds["train"] for run in runs]),
    )


def markdown_table(rows: list[Row]) -> str:
    """The rows as a Markdown table: accuracy with its 95 % interval, the folds' range, and the cost."""
    lines = [
        "| architecture | input | accuracy (95 % interval) | folds from, to "
        "| weights | multiply-adds | forward | training memory |",
        "|:--|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = [
            row.title,
            row.input,
            str(row.accuracy),
            f"{100 * row.lowest_fold:.0f}, {100 * row.highest_fold:.0f} %",
            f"{row.parameters / 1e3:.0f} k",
            f"{row.multiply_adds / 1e6:.0f} M",
            f"{row.forward_ms:.0f} ms",
            f"{row.training_mb:.0f} MB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


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


def readme_table(study: str = "core8", root=None) -> str:
    """The README's comparison: the table, the picture, and what the numbers are, from the recorded runs."""
    runs = read_runs(study, root)
    rows = summarise(runs)
    first = runs[0]
    settings = {json.dumps([{**run.recipe, "seed": 0}, run.data["source"]]) for run in runs}
    tested = {row.row: sorted((run.fold, run.seed) for run in runs if run.row == row.row) for row in rows}
    if len(settings) > 1 or len({tuple(cells) for cells in tested.values()}) > 1:
        raise ValueError(
            f"the runs of {study!r} differ in their recipe, clips, folds or seeds, so their rows do not "
            "belong in one table; run the missing ones, or give the others a study of their own"
        )
    clips = sum(len(run.names) for run in runs if run.row == first.row and run.seed == first.seed)
    machine = first.provenance["machine"]
    where = machine.get("gpu", machine["processor"])
    return "\n".join(
        [
            markdown_table(rows),
            "",
            f"![{describe(rows)}](data/results/{study}/comparison.png)",
            "",
            f"{first.data['source']}; {clips} clips, each tested by a network that saw none of its source. "
            f"{_count(rows[0].folds, 'fold')}, {_count(rows[0].seeds, 'seed')}, "
            f"{_count(first.recipe['epochs'], 'epoch')}; chance is {100 / len(first.classes):.1f} %. "
            "Multiply-adds and forward time are for one clip, training memory is for one step of "
            f"{first.recipe['batch']} clips. Recorded on {where}, {_count(machine['threads'], 'thread')}; "
            f"every run with its logits and settings is in `data/results/{study}/`.",
        ]
    )


def write_readme_table(study: str = "core8", readme=None, root=None) -> str:
    """Draw `data/results/<study>/comparison.png`, and put the table between the README's two comment marks.

    Returns the text. Raises ValueError when the README has no such marks.
    """
    import matplotlib.pyplot as plt

    text = readme_table(study, root)
    runs = read_runs(study, root)
    rows = summarise(runs)
    fig = comparison_figure(rows, 1 / len(runs[0].classes), f"{study}: mean over {rows[0].folds} folds")
    with atomic_path((Path(root) if root else results_root()) / study / "comparison.png") as temporary:
        fig.savefig(temporary, dpi=150, metadata={"Software": None})
    plt.close(fig)
    readme = Path(readme or project_root() / "README.md")
    page = readme.read_text(encoding="utf-8")
    page, found = MARKS.subn(lambda marks: f"{marks[1]}\n{text}\n{marks[2]}", page, count=1)
    if not found:
        raise ValueError(
            f"{readme} has no lines <!-- comparison --> and <!-- /comparison --> around the table"
        )
    with atomic_path(readme) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return text


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
