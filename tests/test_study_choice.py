"""Settings are chosen by clips that the reported fold does not hold, in runs that saw nothing of it."""

from dataclasses import replace

import numpy as np
import pytest
from test_study_results import a_run

from nlutils.study import PARTS, read_runs, readme_table, results_page, write_run
from nlutils.study.choice import as_chosen, chosen, fusions, pairs, validation_accuracy


def a_pair(right, folds):
    """A run that leaves two folds out; `right[fold]` are the answers to the clips of that fold."""
    run = a_run([ok for fold in folds for ok in right[fold]], fold=list(folds))
    names = [f"clip{fold}-{i}" for fold in folds for i in range(len(right[fold]))]
    run.names[:] = names
    return run


def runs_of(answers):
    """`answers[(k, j)][k]` are the answers to the clips of fold k in the run without k and j."""
    return [a_pair(answers[pair], pair) for pair in sorted(answers)]


def test_five_folds_make_ten_pairs():
    assert pairs(range(5))[:4] == [(0, 1), (0, 2), (0, 3), (0, 4)]
    assert len(pairs(range(5))) == 10
    with pytest.raises(ValueError, match=r"folds=\[0, 1\]: to choose settings"):
        pairs([0, 1])


def test_validation_leaves_the_reported_fold_out():
    """Fold 0's own clips are all wrong, and folds 1 and 2 are right in one of the two runs without fold 0."""
    answers = {
        (0, 1): {0: [False, False], 1: [True, True, False]},
        (0, 2): {0: [False, False], 2: [True]},
        (1, 2): {1: [True, True, True], 2: [False]},
    }
    runs = runs_of(answers)
    assert validation_accuracy(runs, 0) == pytest.approx(3 / 4)
    assert validation_accuracy(runs, 1) == pytest.approx(0 / 3)
    assert validation_accuracy(runs, 2) == pytest.approx(3 / 5)
    with pytest.raises(ValueError, match=r"missing: \[\(1, 2\)\]"):
        validation_accuracy(runs[:2], 0)
    with pytest.raises(ValueError, match="fold=4 is left out by no run"):
        validation_accuracy(runs, 4)


def test_the_reported_fold_has_no_say():
    """Whatever happens to the clips of a fold, its own choice stays."""
    rng = np.random.default_rng(0)
    answers = {
        name: {pair: {k: list(rng.random(6) < 0.5) for k in pair} for pair in pairs(range(4))}
        for name in "abc"
    }
    before = chosen({name: runs_of(one) for name, one in answers.items()})
    assert sorted(before) == [0, 1, 2, 3]
    scores = {name: validation_accuracy(runs_of(one), 2) for name, one in answers.items()}
    assert before[2] == max(scores, key=scores.get)
    for name in answers:
        for pair in answers[name]:
            if 2 in pair:
                answers[name][pair][2] = [name == "c"] * 6
    after = chosen({name: runs_of(one) for name, one in answers.items()})
    assert after[2] == before[2]
    assert after != before  # the others do see it


def test_fusions_are_all_sets_of_rows_small_ones_first():
    """b is surer than a, so it decides where they differ; of equal candidates the fewest members win."""
    answers = {pair: {k: [True, False] for k in pair} for pair in pairs(range(3))}
    a = runs_of(answers)
    b = [replace(run, row="b", logits=(-3 * np.asarray(run.logits)).tolist()) for run in a]
    made = fusions({"a": a, "b": b, "c": a}, 2)
    assert list(made) == ["a", "b", "c", "a + b", "a + c", "b + c"]
    assert [run.right.tolist() for run in made["a + b"]] == [[False, True] * 2] * 3
    assert [run.right.tolist() for run in made["a + c"]] == [[True, False] * 2] * 3
    assert made["a + b"][0].fold == [0, 1]
    assert set(chosen(made).values()) == {"a"}
    assert list(fusions({"a": a}, 1)) == ["a"]
    with pytest.raises(ValueError, match="most=3: a fusion has 1 to 2 members"):
        fusions({"a": a, "b": b}, 3)


def test_a_chosen_row_takes_each_fold_from_its_choice():
    rows = {
        name: [a_run([ok], row=name, fold=fold, seed=seed) for fold in (0, 1) for seed in (0, 1)]
        for name, ok in (("a", True), ("b", False))
    }
    made = as_chosen("best", {0: "b", 1: "a"}, rows)
    assert [(run.row, run.run, run.accuracy) for run in made] == [
        ("best", "best-fold0-seed0", 0.0),
        ("best", "best-fold0-seed1", 0.0),
        ("best", "best-fold1-seed0", 1.0),
        ("best", "best-fold1-seed1", 1.0),
    ]
    with pytest.raises(ValueError, match=r"fold 2 chose 'a', which was not run on it"):
        as_chosen("best", {2: "a"}, rows)


def test_the_readme_says_what_the_chosen_fusion_reaches(tmp_path):
    """Trajectories alone are right in validation; where they are reported, in one fold of three."""
    folds = range(3)
    for row in PARTS["fusions"].rows:
        for pair in pairs(folds):
            one = a_pair({fold: [row == "idt"] * 2 for fold in folds}, pair)
            name = row if row.endswith("-long") else f"{row}-default"
            run = f"{name}-fold{pair[0]}+{pair[1]}-seed0"
            write_run(replace(one, study="trial-choice", row=name, run=run), tmp_path)
        for fold in folds:
            write_run(a_run([fold == 0], row=row, fold=fold), tmp_path)
    assert len(read_runs("trial-choice", tmp_path)) == 15
    page = readme_table("trial", tmp_path)
    assert "inside its training folds, 1 seed: 33 % (0 to 100)." in page
    assert "(fold 0: `idt`; fold 1: `idt`; fold 2: `idt`)" in page
    beside = results_page("trial", tmp_path)
    assert "inside the training folds: c3d_small" not in beside  # `smoothed` is not recorded
    assert "inside the training folds: st_resnet_small\n" in beside
    assert "| idt-default | **100.0** | **100.0** | **100.0** |" in beside
    for path in tmp_path.glob("trial/idt-*.json"):
        path.unlink()
    assert "Late fusion" not in readme_table("trial", tmp_path)
