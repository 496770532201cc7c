"""The README's comparison: written from the recorded runs, never by hand."""

import json
import re
from itertools import product
from pathlib import Path

from nlutils.paths import atomic_path, project_root, results_root
from nlutils.study.choice import as_chosen, chosen, fusions
from nlutils.study.figures import comparison_figure, describe
from nlutils.study.plan import PARTS
from nlutils.study.recipe import Recipe
from nlutils.study.results import interval, is_recorded, read_runs
from nlutils.study.rows import ROWS
from nlutils.study.tables import (
    architectures_table,
    by_row,
    difference_table,
    machine_of,
    markdown_table,
    summarise,
    title_of,
)

__all__ = ["caption", "readme_table", "write_readme_table"]

# The README's comment lines around the comparison; the first may also name the command that writes it.
MARKS = re.compile(r"(<!-- comparison\b[^>]*-->).*?(<!-- /comparison -->)", re.DOTALL)

# Rows in a late fusion at most.
MEMBERS = 3


def readme_table(study: str = "core8", root=None) -> str:
    """The README's comparison, from the recorded runs: tables, the picture, and what the numbers are.

    Of a study with rows of the plan these are its architectures and its controls; else all rows in one table.
    """
    runs = read_runs(study, root)
    planned = [run for run in runs if run.row in PARTS["architectures"].rows]
    shown = planned or runs
    rows = summarise(shown)
    _check_comparable(shown, rows, study)
    parts = [
        architectures_table(rows) if planned else markdown_table(rows),
        f"![{describe(rows)}](data/results/{study}/comparison.png)",
        f"{caption(shown)} Networks of several streams have no other input. All tables, and every run with "
        f"its logits and settings, are in `data/results/{study}/`.",
    ]
    controls = PARTS["controls"]
    if set(controls.rows) <= {run.row for run in runs}:
        parts.insert(2, f"And {controls.title}:\n\n{difference_table(runs, controls)}")
    fused = _chosen_fusion(study, root)
    return "\n\n".join([*parts, fused] if fused else parts)


def _check_comparable(runs, rows, study):
    settings = {json.dumps([_common(run), run.data["source"]], sort_keys=True) for run in runs}
    tested = {row.row: sorted((run.fold, run.seed) for run in runs if run.row == row.row) for row in rows}
    folds = {tuple(sorted({fold for fold, _ in cells})) for cells in tested.values()}
    whole = all(cells == sorted(product(*map(set, zip(*cells, strict=True)))) for cells in tested.values())
    if len(settings) > 1 or len(folds) > 1 or not whole:
        raise ValueError(
            f"the runs of {study!r} differ in their recipe, clips, folds or seeds, so their rows do not "
            "belong in one table; run the missing ones, or give the others a study of their own"
        )


def caption(runs) -> str:
    """What the numbers of a table of these runs are."""
    first, rows = runs[0], summarise(runs)
    clips = sum(len(run.names) for run in runs if run.row == first.row and run.seed == first.seed)
    threads = first.provenance["machine"]["threads"]
    machines = sorted({machine_of(run) for run in runs})
    mixed = (
        " Seeds of a row, and rows that are compared, may come from different ones, which round otherwise."
        if len(machines) > 1
        else ""
    )
    return (
        f"{first.data['source']}; {clips} clips, each tested by a network that saw none of its source. "
        f"{_count(rows[0].folds, 'fold')}, {_seeds(rows)}, "
        f"{_count(first.recipe['epochs'], 'epoch')}{_earlier(runs)}; "
        f"chance is {100 / len(first.classes):.1f} %. "
        "In brackets are 95 % intervals, drawn over sources: what other films would do, not other "
        "trainings. Multiply-adds are those of one clip. Rates are the best of the first seed's folds (on a "
        "CPU of one processor; they are noisy), without decoding and flow, which are computed once, but "
        f"with the flow of trajectories. Training memory is that of one step of {first.recipe['batch']} "
        f"clips. Recorded on {' or '.join(machines)}, {_count(threads, 'thread')} a run.{mixed}"
    )


def _chosen_fusion(study, root) -> str:
    """What a late fusion reaches whose members each fold chose by its training folds; "" without records."""
    members = PARTS["fusions"].rows
    if not is_recorded(f"{study}-choice", root):
        return ""
    tried = by_row(read_runs(f"{study}-choice", root))
    tried = {name.removesuffix("-default"): runs for name, runs in tried.items()}
    rows = by_row(read_runs(study, root))
    if not set(members) <= tried.keys() & rows.keys():
        return ""
    cells = set.intersection(*({(run.fold, run.seed) for run in rows[name]} for name in members))
    rows = {name: [run for run in rows[name] if (run.fold, run.seed) in cells] for name in members}
    winners = chosen(fusions({name: tried[name] for name in members}, MEMBERS))
    fused = as_chosen("fused", winners, fusions(rows, MEMBERS))
    choices = "; ".join(f"fold {fold}: `{winner}`" for fold, winner in winners.items())
    return (
        f"Late fusion of up to {MEMBERS} of {len(members)} rows that stood high on these folds, chosen for "
        "each fold by validation inside its training folds, "
        f"{_seeds(summarise(fused))}: {interval(fused)}. The choices ({choices}) come from the runs in "
        f"`data/results/{study}-choice/`."
    )


def write_readme_table(study: str = "core8", readme=None, root=None) -> str:
    """Draw `data/results/<study>/comparison.png`, and put the table between the README's two comment marks.

    Returns the text. Raises ValueError when the README has no such marks.
    """
    import matplotlib.pyplot as plt

    text = readme_table(study, root)
    runs = read_runs(study, root)
    planned = [run for run in runs if run.row in PARTS["architectures"].rows]
    rows = summarise(planned or runs)
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


def _common(run) -> dict:
    """The recipe of a run, but for the seed and for what the plan changes in its row."""
    usual = Recipe().settings()
    own = {"seed", *(ROWS[run.row].recipe if run.row in ROWS else ())}
    return {**usual, **run.recipe, **{name: usual[name] for name in own}}


def _earlier(runs) -> str:
    """Which rows began with weights that had been trained before, and for how long."""
    earlier = {title_of(run.row): run.start["epochs"] for run in runs if run.start.get("epochs")}
    return "".join(f", after {count} others in the row {title!r}" for title, count in earlier.items())


def _seeds(rows) -> str:
    counts = sorted({row.seeds for row in rows})
    least_and_most = dict.fromkeys([str(counts[0]), str(counts[-1])])
    return " to ".join(least_and_most) + (" seed" if counts == [1] else " seeds")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
