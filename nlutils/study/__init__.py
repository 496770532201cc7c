"""The study: train, test and measure networks on clips, and record what comes out."""

from nlutils.study.cost import example_input, measure, multiply_adds, parameters
from nlutils.study.evaluate import accuracy, evaluate
from nlutils.study.fold import best_device, run_fold
from nlutils.study.grid import Entry
from nlutils.study.inputs import Inputs, prepare
from nlutils.study.provenance import code_digest, provenance
from nlutils.study.recipe import Recipe
from nlutils.study.results import (
    Interval,
    Run,
    bootstrap,
    correct_by_clip,
    difference_interval,
    interval,
    read_runs,
    write_run,
)
from nlutils.study.study import run_study
from nlutils.study.tables import (
    Row,
    comparison_figure,
    describe,
    markdown_table,
    readme_table,
    summarise,
    write_readme_table,
)
from nlutils.study.train import seeded, train

__all__ = [
    "Entry",
    "Inputs",
    "Interval",
    "Recipe",
    "Row",
    "Run",
    "accuracy",
    "best_device",
    "bootstrap",
    "code_digest",
    "comparison_figure",
    "correct_by_clip",
    "describe",
    "difference_interval",
    "evaluate",
    "example_input",
    "interval",
    "markdown_table",
    "measure",
    "multiply_adds",
    "parameters",
    "prepare",
    "provenance",
    "read_runs",
    "readme_table",
    "run_fold",
    "run_study",
    "seeded",
    "summarise",
    "train",
    "write_readme_table",
    "write_run",
]
