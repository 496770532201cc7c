"""The study: train, test and measure networks on clips, and record what comes out."""

from nlutils.study.choice import as_chosen, chosen, fusions, pairs, validation_accuracy
from nlutils.study.cost import example_input, measure, multiply_adds, parameters
from nlutils.study.evaluate import accuracy, evaluate
from nlutils.study.figures import comparison_figure, describe, describe_differences, difference_figure
from nlutils.study.fold import best_device, run_fold
from nlutils.study.grid import Entry
from nlutils.study.inputs import Inputs, prepare
from nlutils.study.pages import results_page, write_results_pages
from nlutils.study.plan import CANDIDATES, PARTS, STUDIES, Part, Study
from nlutils.study.predict import Attention, Prediction, draw_prediction, predict
from nlutils.study.provenance import code_digest, provenance
from nlutils.study.readme import readme_table, write_readme_table
from nlutils.study.recipe import Recipe
from nlutils.study.results import (
    Interval,
    Run,
    bootstrap,
    correct_by_clip,
    difference_interval,
    interval,
    is_recorded,
    late_fusion,
    read_runs,
    trainings_interval,
    write_run,
)
from nlutils.study.rows import ROWS, rows_of
from nlutils.study.study import run_study
from nlutils.study.tables import (
    Row,
    architectures_table,
    by_row,
    choice_table,
    difference_table,
    differences,
    markdown_table,
    points,
    same_cells,
    summarise,
    time_table,
)
from nlutils.study.train import seeded, train

__all__ = [
    "CANDIDATES",
    "PARTS",
    "ROWS",
    "STUDIES",
    "Attention",
    "Entry",
    "Inputs",
    "Interval",
    "Part",
    "Prediction",
    "Recipe",
    "Row",
    "Run",
    "Study",
    "accuracy",
    "architectures_table",
    "as_chosen",
    "best_device",
    "bootstrap",
    "by_row",
    "choice_table",
    "chosen",
    "code_digest",
    "comparison_figure",
    "correct_by_clip",
    "describe",
    "describe_differences",
    "difference_figure",
    "difference_interval",
    "difference_table",
    "differences",
    "draw_prediction",
    "evaluate",
    "example_input",
    "fusions",
    "interval",
    "is_recorded",
    "late_fusion",
    "markdown_table",
    "measure",
    "multiply_adds",
    "pairs",
    "parameters",
    "points",
    "predict",
    "prepare",
    "provenance",
    "read_runs",
    "readme_table",
    "results_page",
    "rows_of",
    "run_fold",
    "run_study",
    "same_cells",
    "seeded",
    "summarise",
    "time_table",
    "train",
    "trainings_interval",
    "validation_accuracy",
    "write_readme_table",
    "write_results_pages",
    "write_run",
]
