"""The comparison as tables in Markdown, computed from recorded runs."""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from nlutils.study.choice import chosen, validation_accuracy
from nlutils.study.plan import Part
from nlutils.study.results import Interval, Run, difference_interval, interval
from nlutils.study.rows import ROWS
from nlutils.torch.models import list_models, model_title

__all__ = [
    "Row",
    "architectures_table",
    "by_row",
    "choice_table",
    "difference_table",
    "differences",
    "machine_of",
    "markdown_table",
    "points",
    "same_cells",
    "summarise",
    "time_table",
    "title_of",
]

PUBLISHED = "-rgb"  # the rows with the input that networks of one stream were published with


@dataclass(frozen=True)
class Row:
    """One row over all its recorded folds and seeds.

    Rates are clips a second, of one processor on a CPU, on the `machine` of the first seed.
    """

    row: str
    title: str
    input: str
    accuracy: Interval
    lowest_fold: float
    highest_fold: float
    folds: int
    seeds: int
    parameters: int
    multiply_adds: int | None
    forward_ms: float
    training_mb: float | None
    seconds: float
    train_rate: float
    test_rate: float
    machine: str


def by_row(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """{row: its runs}, rows of the plan in its order, then the networks' names, others by name."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.row, []).append(run)
    order = [*ROWS, *list_models()]
    names = sorted(found, key=lambda row: (order.index(row) if row in order else len(order), row))
    return {name: found[name] for name in names}


def title_of(row: str) -> str:
    """What tables call `row`."""
    if row in ROWS:
        return ROWS[row].title
    return model_title(row) if row in list_models() else row


def _called(row: str, title: str) -> str:
    """The title and, where it says something else, the name that `nlutils study run --row` takes."""
    return f"{title} `{row}`" if row in ROWS or row in list_models() else title


def summarise(runs: Iterable[Run]) -> list[Row]:
    """A `Row` for each row that is among `runs`."""
    return [_row(mine) for mine in by_row(runs).values()]


def _row(runs: list[Run]) -> Row:
    folds = [run.accuracy for run in runs]
    memory = [run.cost["training_mb"] for run in runs if run.cost["training_mb"] is not None]
    # Rates of one seed: of more runs the best is higher by that alone.
    timed = [run for run in runs if run.seed == min(run.seed for run in runs)]
    return Row(
        row=runs[0].row,
        title=title_of(runs[0].row),
        input=runs[0].input,
        accuracy=interval(runs),
        lowest_fold=min(folds),
        highest_fold=max(folds),
        folds=len({str(run.fold) for run in runs}),
        seeds=len({run.seed for run in runs}),
        parameters=runs[0].cost["parameters"],
        multiply_adds=runs[0].cost["multiply_adds"],
        # The best of the runs: whatever else a machine does only ever adds time.
        forward_ms=min(run.cost["forward_ms"] for run in timed),
        training_mb=statistics.median(memory) if memory else None,
        seconds=statistics.median([run.seconds["train"] for run in runs]),
        train_rate=max(_train_rate(run) for run in timed),
        test_rate=max(_rate(run, "test", len(run.names)) for run in timed),
        machine=machine_of(timed[0]),
    )


def machine_of(run: Run) -> str:
    """The GPU that trained `run`, else the processor."""
    machine = run.provenance["machine"]
    return machine["gpu"] if "gpu" in machine else machine["processor"]


def _rate(run, what, clips):
    """Clips a second: on a GPU by the wall's clock, on a CPU by the processor time of all processes."""
    machine, seconds = run.provenance["machine"], run.seconds[what]
    if "gpu" not in machine:
        # Records of before this was measured have the test's time on the wall alone.
        seconds = run.seconds.get(f"{what}_processor", seconds)
        # Each process tests all clips.
        seconds *= machine.get("processes", 1) if what == "train" else 1
    return clips / max(seconds, 1e-2)


def _train_rate(run):
    # A network without epochs sees each clip once.
    return _rate(run, "train", run.data.get("train", 0) * max(len(run.losses), 1))


def _folds(row: Row) -> str:
    return f"{100 * row.lowest_fold:.0f}, {100 * row.highest_fold:.0f} %"


def _sizes(row: Row) -> list[str]:
    return [
        f"{row.parameters / 1e3:.0f} k" if row.parameters else "–",
        f"{row.multiply_adds / 1e6:.0f} M" if row.multiply_adds else "–",
    ]


def _rates(row: Row, usual: str) -> list[str]:
    star = "" if row.machine == usual else " *"
    return [
        f"{row.train_rate:.0f}{star}",
        f"{row.test_rate:.0f}{star}",
        "–" if row.training_mb is None else f"{row.training_mb:.0f} MB",
    ]


def _usual(rows: list[Row]) -> str:
    """The machine that most of `rows` have their rates from."""
    return Counter(row.machine for row in rows).most_common(1)[0][0]


def _starred(rows: list[Row]) -> str:
    """The note under a table with rates of several machines."""
    usual = _usual(rows)
    others = sorted({row.machine for row in rows} - {usual})
    if not others:
        return ""
    return f"\n\n\\* rates on {' or '.join(others)}, not to be compared with the others, on {usual}"


FOLDS = "runs from, to"
SIZES = ["weights", "multiply-adds"]
RATES = ["clips/s in training", "clips/s in test", "training memory"]


def markdown_table(rows: list[Row]) -> str:
    """The rows as a Markdown table: seeds, accuracy with its 95 % interval, range of the runs, cost."""
    return _table(
        ["architecture", "input", "seeds", "accuracy (95 % interval)", FOLDS, *SIZES, *RATES],
        [
            [
                _called(row.row, row.title),
                row.input,
                str(row.seeds),
                str(row.accuracy),
                _folds(row),
                *_sizes(row),
                *_rates(row, _usual(rows)),
            ]
            for row in rows
        ],
        left=2,
    ) + _starred(rows)


def architectures_table(rows: list[Row]) -> str:
    """A line an architecture: accuracy with its own input, accuracy on flow, seeds, and the cost.

    A network's own input is the one that it was published with; networks of several streams have no other.
    Costs are those of the row on flow.
    """
    at = {row.row: row for row in rows}
    lines = []
    for row in rows:
        if row.row.endswith(PUBLISHED):
            continue
        published = at.get(row.row + PUBLISHED)
        elsewhere = row.input != "flow"  # networks of several streams, and of tracks in colour frames
        as_published = row if elsewhere else published
        seeds = [one.seeds for one in (as_published, None if elsewhere else row) if one]
        lines.append(
            [
                _called(row.row, row.title),
                f"{as_published.input}: {as_published.accuracy}" if as_published else "–",
                "–" if elsewhere else str(row.accuracy),
                ", ".join(map(str, seeds)),
                *_sizes(row),
                *_rates(row, _usual(rows)),
            ]
        )
    heads = ["architecture", "own input", "on flow", "seeds (own, flow)", *SIZES, *RATES]
    return _table(heads, lines, left=1) + _starred(rows)


def differences(runs: Iterable[Run], part: Part) -> list[tuple[Row, Interval | None]]:
    """(row, how far it is above `part.reference` on the same clips) of each row of `part`; None for that one.

    The difference is paired: clip by clip, mean and 95 % interval over source groups. Row and difference are
    those of the folds and seeds that row and reference both have. Raises ValueError when a row is not
    recorded, or the part has no reference.
    """
    if not part.reference:
        raise ValueError(f"the part {part.title!r} compares its rows with none of them: it has no reference")
    found = by_row(runs)
    missing = [row for row in part.rows if row not in found]
    if missing:
        raise ValueError(f"no run of the rows {', '.join(missing)} is recorded; run them")
    made = []
    for row in part.rows:
        mine, gain = found[row], None
        if row != part.reference:
            mine, reference = same_cells(mine, found[part.reference])
            gain = difference_interval(mine, reference)
        made.append((_row(mine), gain))
    return made


def difference_table(runs: Iterable[Run], part: Part) -> str:
    """A line a row of `part`: its accuracy, and how far it is above `part.reference`; see `differences`."""
    lines = []
    for row, gain in differences(runs, part):
        shown = "–" if gain is None else points(gain)
        name = _called(row.row, row.title)
        lines.append([name, str(row.seeds), str(row.accuracy), _folds(row), shown, *_sizes(row)])
    heads = [
        "row",
        "seeds",
        "accuracy (95 % interval)",
        FOLDS,
        f"minus {title_of(part.reference)}, same folds and seeds",
        *SIZES,
    ]
    return _table(heads, lines, left=1)


def same_cells(a: list[Run], b: list[Run]) -> tuple[list[Run], list[Run]]:
    """The runs of two rows on the folds and seeds that both have; ValueError when there are none."""
    both = {(str(run.fold), run.seed) for run in a} & {(str(run.fold), run.seed) for run in b}
    if not both:
        raise ValueError(f"{a[0].row} and {b[0].row} were run on no fold with the same seed")
    return tuple([run for run in runs if (str(run.fold), run.seed) in both] for runs in (a, b))


def points(difference: Interval) -> str:
    """A difference in percentage points with its interval: `-6 (-13 to +1)`.

    With one decimal where a number would be rounded to 0, so that its side of 0 is seen.
    """
    values = [100 * value for value in (difference.value, difference.low, difference.high)]
    digits = 1 if any(0 < abs(limit) < 0.5 for limit in values) else 0
    values = [round(value, digits) + 0.0 for value in values]  # + 0.0: no "-0"
    return "{:+.{d}f} ({:+.{d}f} to {:+.{d}f})".format(*values, d=digits)


def time_table(runs: Iterable[Run]) -> str:
    """A line a row: the accuracy of the trained networks when a test clip's steps come in another order."""
    lines = []
    for row, mine in by_row(runs).items():
        mine = [run for run in mine if run.views]
        if mine:
            shown = [np.concatenate([run.right for run in mine]).mean()]
            labels = np.concatenate([run.labels for run in mine])
            for time in ("reversed", "shuffled", "one_step"):
                shown.append((np.concatenate([run.views[time] for run in mine]) == labels).mean())
            name = _called(row, title_of(row))
            lines.append([name, mine[0].input, *(f"{100 * share:.0f} %" for share in shown)])
    heads = [
        "trained on clips as they are, tested on",
        "input",
        "as they are",
        "reversed",
        "shuffled",
        "one step",
    ]
    return _table(heads, lines, left=2)


def choice_table(candidates: Mapping[str, Iterable[Run]]) -> str:
    """A line a candidate: its validation accuracy for each fold; what a fold chooses stands in bold."""
    candidates = {name: list(runs) for name, runs in candidates.items()}
    winners = chosen(candidates)
    lines = []
    for name, runs in candidates.items():
        shares = {fold: f"{100 * validation_accuracy(runs, fold):.1f}" for fold in winners}
        lines.append([name, *(f"**{shares[f]}**" if winners[f] == name else shares[f] for f in winners)])
    return _table(
        ["candidate, % right in validation", *(f"for fold {fold}" for fold in winners)], lines, left=1
    )


def _table(heads: list[str], lines: list[list[str]], left: int) -> str:
    """Markdown; the first `left` columns to the left, the others to the right."""
    rule = [":--"] * left + ["--:"] * (len(heads) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *lines)).replace(
        f"| {' | '.join(rule)} |", f"|{'|'.join(rule)}|"
    )
