"""What is committed in data/results: whole, consistent, and what notebook 18 computes from it by hand."""

import numpy as np
import pytest

from nlutils.course.sources import lift
from nlutils.paths import results_root
from nlutils.study import Interval, bootstrap, read_runs
from nlutils.torch.models.small import SMALL_MODELS

STUDIES = ("core8", "procedural")


@pytest.fixture(scope="module", params=STUDIES)
def runs(request):
    return read_runs(request.param)


def test_every_network_is_tested_on_every_fold(runs):
    assert sorted((run.row, run.fold) for run in runs) == sorted(
        (row, fold) for row in SMALL_MODELS for fold in range(5)
    )


def test_all_runs_of_a_study_had_the_same_settings_and_clips(runs):
    assert len({run.data["source"] for run in runs}) == 1
    assert all(run.recipe == runs[0].recipe for run in runs)
    assert len({run.provenance["code"] for run in runs}) == 1
    assert all(len(run.losses) == run.recipe["epochs"] for run in runs)


def test_each_clip_is_tested_once_and_no_source_is_torn(runs):
    for row in SMALL_MODELS:
        mine = [run for run in runs if run.row == row]
        names = [name for run in mine for name in run.names]
        assert len(names) == len(set(names)) == sum(run.data["test"] for run in mine)
        assert all(run.data["train"] + run.data["test"] == len(names) for run in mine)
        groups = [set(run.groups) for run in mine]
        assert sum(map(len, groups)) == len(set().union(*groups))


def test_accuracies_are_those_of_the_logits(runs):
    for run in runs:
        assert run.accuracy == pytest.approx(np.mean(run.right))
        assert np.shape(run.logits) == (len(run.names), len(run.classes))
        assert len(run.labels) == len(run.groups) == len(run.names)


def test_files_are_small():
    for study in STUDIES:
        for path in (results_root() / study).glob("*.json"):
            assert path.stat().st_size < 60_000, path.name


def test_the_bootstrap_of_notebook_18_is_that_of_the_package(runs):
    by_hand = lift("18_comparison", "bootstrap")
    mine = [run for run in runs if run.row == "c3d_small"]
    groups = [group for run in mine for group in run.groups]
    right = np.concatenate([run.right for run in mine]).astype(float)
    expected = bootstrap(groups, right, draws=200, seed=3)
    assert Interval(*by_hand(groups, right, draws=200, seed=3)) == expected
