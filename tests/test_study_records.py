"""What is committed in data/results: whole, consistent, and what notebook 18 computes from it by hand."""

import numpy as np
import pytest

from nlutils.course.sources import lift
from nlutils.paths import project_root, results_root
from nlutils.study import (
    PARTS,
    STUDIES,
    Interval,
    Recipe,
    bootstrap,
    by_row,
    difference_interval,
    interval,
    read_runs,
    readme_table,
    results_page,
    rows_of,
)
from nlutils.study.fold import full_options
from nlutils.study.grid import entries
from nlutils.torch.models.small import SMALL_MODELS

RECORDED = ("core8", "core8-again", "procedural", "same_pattern")
RECIPES = {name: Recipe().replace(**study.recipe) for name, study in STUDIES.items()}


@pytest.fixture(scope="module", params=RECORDED)
def runs(request):
    return read_runs(request.param)


def test_every_row_is_tested_on_every_fold_with_each_of_its_seeds(runs):
    study = runs[0].study
    # core8 is recorded row by row; the small studies are whole.
    planned = SMALL_MODELS if study == "core8" else PARTS[STUDIES[study].parts[0]].rows
    assert set(planned) <= {run.row for run in runs}
    for row, mine in by_row(runs).items():
        seeds = sorted({run.seed for run in mine})
        assert sorted((run.seed, run.fold) for run in mine) == [(s, k) for s in seeds for k in range(5)], row


def test_every_row_is_what_the_plan_says(runs):
    for run in runs:
        entry = entries(rows_of([run.row]))[run.row]
        recipe = RECIPES[run.study].replace(**{**entry.recipe, "seed": run.seed})
        assert run.recipe == recipe.settings(), run.run
        assert (run.framework, run.model) == (entry.framework, entry.model), run.run
        assert run.options == full_options(entry.model, entry.options, recipe), run.run


def test_all_runs_of_a_study_were_made_from_committed_code_on_the_same_clips(runs):
    assert len({run.data["source"] for run in runs}) == 1
    assert not any(run.provenance["changed"] for run in runs)
    assert all(len(run.losses) in (0, run.recipe["epochs"]) for run in runs)
    assert all(run.losses for run in runs if run.row != "idt")


def test_each_clip_is_tested_once_and_no_source_is_torn(runs):
    for row in {run.row for run in runs}:
        mine = [run for run in runs if run.row == row and run.seed == 0]
        names = [name for run in mine for name in run.names]
        assert len(names) == len(set(names)) == sum(run.data["test"] for run in mine)
        assert all(run.data["train"] + run.data["test"] == len(names) for run in mine)
        groups = [set(run.groups) for run in mine]
        assert sum(map(len, groups)) == len(set().union(*groups))


@pytest.mark.parametrize("row", PARTS["again"].rows)
def test_rows_trained_again_on_another_processor_lie_within_their_intervals(row):
    first = [run for run in by_row(read_runs("core8"))[row] if run.seed == 0]
    again = by_row(read_runs("core8-again"))[row]
    processors = [{run.provenance["machine"]["processor"] for run in runs} for runs in (first, again)]
    assert processors[0].isdisjoint(processors[1])
    recorded, gap = interval(first), difference_interval(again, first)
    assert recorded.low <= interval(again).value <= recorded.high
    assert gap.low <= 0 <= gap.high
    losses = [[run.losses[0] for run in runs] for runs in (first, again)]
    np.testing.assert_allclose(*losses, rtol=1e-3)


def test_accuracies_are_those_of_the_logits(runs):
    for run in runs:
        assert run.accuracy == pytest.approx(np.mean(run.right))
        assert np.shape(run.logits) == (len(run.names), len(run.classes))
        assert len(run.labels) == len(run.groups) == len(run.names)


def test_the_readme_shows_what_is_recorded():
    page = (project_root() / "README.md").read_text(encoding="utf-8")
    assert readme_table("core8") in page


@pytest.mark.parametrize("study", RECORDED)
def test_the_page_beside_the_runs_shows_them(study):
    page = (results_root() / study / "README.md").read_text(encoding="utf-8")
    assert results_page(study) == page


def test_files_are_small():
    for study in RECORDED:
        # A run of same_pattern tests 1,600 clips.
        most = 120_000 if study == "same_pattern" else 60_000
        for path in (results_root() / study).glob("*.json"):
            assert path.stat().st_size < most, path.name


def test_the_bootstrap_of_notebook_18_is_that_of_the_package(runs):
    by_hand = lift("18_comparison", "bootstrap")
    mine = [run for run in runs if (run.row, run.seed) == (runs[0].row, 0)]
    groups = [group for run in mine for group in run.groups]
    right = np.concatenate([run.right for run in mine]).astype(float)
    expected = bootstrap(groups, right, draws=200, seed=3)
    assert Interval(*by_hand(groups, right, draws=200, seed=3)) == expected
