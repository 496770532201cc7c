"""Recorded runs, the statistics on them, costs, tables: known cases and damaged files."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from nlutils.study import (
    PARTS,
    ROWS,
    Interval,
    Recipe,
    Run,
    architectures_table,
    bootstrap,
    correct_by_clip,
    difference_interval,
    difference_table,
    interval,
    late_fusion,
    markdown_table,
    points,
    read_runs,
    readme_table,
    rows_of,
    summarise,
    time_table,
    trainings_interval,
    write_readme_table,
    write_results_pages,
    write_run,
)
from nlutils.study.cost import HeldBytes, example_input, measure, multiply_adds, parameters, training_memory
from nlutils.study.fold import full_options
from nlutils.study.grid import entries
from nlutils.study.plan import Part
from nlutils.study.readme import caption
from nlutils.study.results import read_run
from nlutils.torch import NonLocalBlock, create_model, list_models

torch.set_num_threads(1)


def a_run(right, row="c3d_small", fold=0, seed=0, groups=None, study="trial"):
    """A run whose clip i is classified right when right[i]; two classes, all clips of class 0."""
    count = len(right)
    return Run(
        study=study, run=f"{row}-fold{fold}-seed{seed}", row=row,
        model="c3d_small", options={"input": "flow"}, input="flow", fold=fold, seed=seed,
        recipe={"epochs": 3, "batch": 16}, data={"name": "fake", "source": "noise", "test": count},
        accuracy=float(np.mean(right)), losses=[1.0, 0.5],
        cost={"parameters": 300_000, "multiply_adds": 50_000_000, "forward_ms": 5.0, "training_mb": 60.0},
        seconds={"train": 10.0, "test": 0.1},
        provenance={"machine": {"processor": "a processor", "threads": 1}}, classes=["a", "b"],
        names=[f"clip{fold}-{i}" for i in range(count)],
        groups=groups or [f"g{fold}-{i}" for i in range(count)],
        labels=[0] * count, logits=[[1.0, 0.0] if ok else [0.0, 1.0] for ok in right],
    )  # fmt: skip


def test_a_run_is_written_whole_and_read_equal(tmp_path):
    run = a_run([True, False, True])
    path = write_run(run, tmp_path)
    assert path == tmp_path / "trial" / "c3d_small-fold0-seed0.json"
    assert read_run(path) == run
    assert read_runs("trial", tmp_path) == [run]
    json.loads(path.read_text())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_run(a_run([True]), tmp_path)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            write_run(a_run([False]), tmp_path)
    assert path.read_bytes() == before
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_logits_that_are_no_numbers_are_refused(tmp_path):
    run = replace(a_run([True]), logits=[[float("nan"), 0.0]])
    with pytest.raises(ValueError, match="not finite"):
        write_run(run, tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_damaged_and_missing_files_are_named(tmp_path):
    path = write_run(a_run([True]), tmp_path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match=r"c3d_small-fold0-seed0\.json is not a recorded run"):
        read_runs("trial", tmp_path)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"is not a recorded run"):
        read_run(path)
    with pytest.raises(FileNotFoundError, match="no run of 'nothing' is recorded"):
        read_runs("nothing", tmp_path)


def test_a_file_that_is_being_written_is_no_run(tmp_path):
    write_run(a_run([True]), tmp_path)
    (tmp_path / "trial" / ".c3d_small-fold0-seed0.json.abcd.json").write_text("")
    assert len(read_runs("trial", tmp_path)) == 1


def test_an_lstm_is_counted_on_every_processor():
    lstm = torch.nn.LSTM(4, 3, batch_first=True)
    assert multiply_adds(lstm, torch.zeros(2, 5, 4)) == 2 * 5 * (4 * 3) * (4 + 3)


def test_bootstrap_of_known_cases():
    assert bootstrap(["a", "b", "c"], [1, 1, 1]) == Interval(1.0, 1.0, 1.0)
    # 100 groups of one clip, half of them right: the standard error is sqrt(0.25 / 100) = 0.05.
    found = bootstrap(range(100), [0, 1] * 50)
    assert found.value == 0.5
    assert found.low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.01)
    assert found.high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.01)
    # The same 100 clips from 25 sources, right or wrong together: the standard error doubles.
    wide = bootstrap([i // 4 for i in range(100)], [(i // 4) % 2 for i in range(100)])
    assert wide.high - wide.low == pytest.approx(2 * (found.high - found.low), rel=0.1)
    # Two groups, 3 clips right and 1 wrong: the draws give 0, 3/4 or 1.
    assert bootstrap(["a", "a", "a", "b"], [1, 1, 1, 0]) == Interval(0.75, 0.0, 1.0)


def test_an_interval_is_over_all_folds_and_seeds():
    runs = [
        a_run([True, False], fold=0),
        a_run([True, True, True], fold=1),
        a_run([True, True], fold=0, seed=1),
    ]
    assert {name: right for name, (_, right) in correct_by_clip(runs).items()} == {
        "clip0-0": 1.0, "clip0-1": 0.5, "clip1-0": 1.0, "clip1-1": 1.0, "clip1-2": 1.0,
    }  # fmt: skip
    assert interval(runs).value == pytest.approx(4.5 / 5)
    with pytest.raises(ValueError, match="runs of one row"):
        interval([a_run([True]), a_run([True], row="two_stream_small")])


def test_a_paired_difference_is_narrower_than_two_intervals():
    rng = np.random.default_rng(0)
    right = rng.random(200) < 0.5
    better = right | (rng.random(200) < 0.1)
    a, b = [a_run(better.tolist(), row="a")], [a_run(right.tolist(), row="b")]
    paired = difference_interval(a, b)
    assert paired.value == pytest.approx(better.mean() - right.mean())
    assert 0 < paired.low < paired.high
    assert paired.high - paired.low < 0.7 * (interval(a).high - interval(a).low)
    assert difference_interval(a, a) == Interval(0, 0, 0)
    with pytest.raises(ValueError, match=r"tested on 200 clips and b on 3, 3 of them the same"):
        difference_interval(a, [a_run([True] * 3, row="b")])


def test_other_trainings_widen_the_interval():
    """With one training each it is the paired interval; with trainings that differ it is wider."""
    rng = np.random.default_rng(0)
    groups = [f"g{i // 4}" for i in range(200)]
    a, b = (
        [a_run(rng.random(200) < share, row=row, groups=groups)] for row, share in (("a", 0.7), ("b", 0.6))
    )
    paired, same = difference_interval(a, b), trainings_interval(a, b)
    assert (same.value, same.low, same.high) == pytest.approx((paired.value, paired.low, paired.high))
    again = [*a, a_run(rng.random(200) < 0.9, row="a", seed=1, groups=groups)]
    paired, with_trainings = difference_interval(again, b), trainings_interval(again, b)
    assert with_trainings.value == pytest.approx(paired.value)
    assert with_trainings.low < paired.low < paired.high < with_trainings.high
    # One training right everywhere, one nowhere: in a quarter of the draws each is drawn twice.
    sure = [a_run([seed == 1] * 200, row="a", seed=seed, groups=groups) for seed in (0, 1)]
    assert trainings_interval(sure, [a_run([False] * 200, row="b", groups=groups)]) == Interval(0.5, 0.0, 1.0)
    with pytest.raises(ValueError, match="a: seed 1 was tested on 3 of 200 clips"):
        trainings_interval([*a, a_run([True] * 3, row="a", seed=1)], b)


def test_late_fusion_averages_probabilities():
    """A sure network and an unsure one: softmaxes (0.9, 0.1) and (0.3, 0.7) have the mean (0.6, 0.4)."""
    sure, unsure = a_run([True]), a_run([False], row="cnn_rnn")
    sure.logits[:] = [[np.log(9.0), 0.0]]
    unsure.logits[:] = [[np.log(3 / 7) + 5, 5.0]]
    (fused,) = late_fusion("both", [sure], [unsure])
    np.testing.assert_allclose(np.exp(fused.logits), [[0.6, 0.4]])
    assert (fused.row, fused.run, fused.accuracy) == ("both", "both-fold0-seed0", 1.0)
    assert fused.cost["parameters"] == 600_000
    assert fused.input == "flow + flow"
    assert fused.seconds["train"] == 2 * sure.seconds["train"]
    tracks = replace(unsure, cost={**unsure.cost, "multiply_adds": None})
    assert late_fusion("both", [sure], [tracks])[0].cost["multiply_adds"] is None
    with pytest.raises(ValueError, match="not tested on the same folds with the same seeds"):
        late_fusion("both", [sure], [a_run([True], fold=1)])
    with pytest.raises(ValueError, match="not tested on the same clips in fold 0"):
        late_fusion("both", [sure], [a_run([True, True])])


def test_parameters_and_multiply_adds_equal_hand_counts():
    model = create_model("c3d_small", 8, input="flow", widths=(4, 4, 4, 4))
    convolutions = 27 * (2 * 4 + 4 * 4 + 4 * 4 + 4 * 4)
    assert parameters(model) == convolutions + 4 * 2 * 4 + 4 * 8 + 8
    # Stride 1x2x2 first; pooling 2x2x2 behind the second and third convolution.
    expected = 27 * 2 * 4 * (8 * 8 * 8) + 27 * 4 * 4 * (8 * 8 * 8 + 4 * 4 * 4 + 2 * 2 * 2) + 4 * 8
    assert multiply_adds(model, torch.zeros(1, 2, 8, 16, 16)) == expected


def test_non_local_blocks_cost_what_their_matrices_cost():
    """theta: N C d; phi, g: M C d at M = N / 4 positions; the map and its product: N M d each; W_z: N d C."""
    told = {"input": "flow", "widths": (4, 4, 4, 4)}
    plain, with_block = (
        create_model("c3d_small", 8, **told),
        create_model("c3d_small_non_local", 8, non_local=(2,), **told),
    )
    x = torch.zeros(1, 2, 8, 16, 16)
    N, M, C, d = 4 * 4 * 4, 4 * 2 * 2, 4, 2
    assert (
        multiply_adds(with_block, x) - multiply_adds(plain, x)
        == N * C * d + 2 * M * C * d + 2 * N * M * d + N * d * C
    )


@pytest.mark.parametrize("instantiation", ["embedded_gaussian", "gaussian"])
@pytest.mark.parametrize("inner", [8, 16])  # with 16 the widths agree in the Gaussian, too
@pytest.mark.parametrize("subsample", [None, "before"])
def test_multiply_adds_are_seen_inside_operators(monkeypatch, instantiation, inner, subsample):
    from nlutils.torch.operations import softmax

    block = NonLocalBlock(16, inner_channels=inner, instantiation=instantiation, subsample=subsample)
    x = torch.zeros(2, 16, 4, 6, 6)
    plain = multiply_adds(block, x)
    monkeypatch.setattr(softmax, "MAP_BYTES", 1)
    assert multiply_adds(block, x) == plain


def test_held_bytes_counts_what_is_alive():
    before = torch.zeros(1000)
    with HeldBytes([before]) as held:
        a = torch.zeros(1000)  # + 4000
        b = a + 1  # + 4000
        del a
        c = b * 2  # + 4000, after - 4000
        view = c.view(10, 100)
    assert (held.now, held.highest) == (12_000, 12_000)
    assert view.shape == (10, 100)


def test_training_memory_grows_with_the_batch_and_repeats():
    model = create_model("two_stream_small", 4, widths=(4, 4, 8, 8), stack=4)
    small, large = (example_input(model, 8, (24, 32), batch) for batch in (2, 8))
    assert training_memory(model, small) == training_memory(model, small)
    assert 2 < training_memory(model, large) / training_memory(model, small) < 4
    spent = measure(model, example_input(model, 8, (24, 32)), small)
    assert set(spent) == {"parameters", "multiply_adds", "forward_ms", "training_mb", "how"}
    assert spent["forward_ms"] > 0


def test_the_table_has_a_row_an_architecture(tmp_path):
    runs = [
        a_run([True, False], row=row, fold=fold)
        for row in ("c3d_small_non_local", "c3d_small", "other")
        for fold in (0, 1)
    ]
    rows = summarise(runs)
    assert [row.row for row in rows] == ["c3d_small", "c3d_small_non_local", "other"]
    assert (rows[0].folds, rows[0].seeds, rows[0].accuracy.value) == (2, 1, 0.5)
    lines = markdown_table(rows).splitlines()
    assert len(lines) == 5
    assert lines[2].startswith("| C3D-style, 3D (Tran et al. 2015) `c3d_small` | flow | 1 | 50 % (")
    assert len({line.count("|") for line in lines}) == 1


def test_published_input_and_flow_stand_in_one_line():
    runs = [
        a_run([True, False], row="c3d_small"),
        replace(a_run([False, False], row="c3d_small-rgb"), input="rgb"),
    ]
    runs.append(replace(a_run([True, True], row="two_stream_small"), input="rgb+flow"))
    more = [*runs, a_run([True, False], row="c3d_small", seed=1)]
    assert architectures_table(summarise(more)).splitlines()[2].split(" | ")[3] == "1, 2"
    lines = architectures_table(summarise(runs)).splitlines()[2:]
    assert lines[0].startswith("| C3D-style, 3D (Tran et al. 2015) `c3d_small` | rgb: 0 % (0 to 0) | 50 % (")
    assert lines[1].startswith("| two-stream (Simonyan, Zisserman 2014) `two_stream_small` | rgb+flow: 100 %")
    assert lines[1].split(" | ")[2:4] == ["–", "1"]
    assert len(lines) == 2
    tracks = replace(a_run([True], row="idt"), input="rgb")
    line = architectures_table(summarise([tracks])).splitlines()[2]
    assert line.startswith(
        "| improved dense trajectories (Wang, Schmid 2013) `idt` | rgb: 100 % (100 to 100) | – |"
    )


def test_differences_to_the_reference_are_paired_and_of_the_same_seeds():
    """Seed 1, which the other row lacks, is wrong throughout and has no say in the difference."""
    part = Part("trial", ("c3d_small", "c3d_small_uniform"), "c3d_small")
    runs = [
        a_run([True, True, False, False]),
        a_run([False] * 4, seed=1),
        a_run([True, True, True, False], row="c3d_small_uniform"),
    ]
    lines = difference_table(runs, part).splitlines()[2:]
    assert lines[0].startswith("| C3D-style, 3D (Tran et al. 2015) `c3d_small` | 2 | 25 % (")
    assert "| +25 (+0 to +75) |" in lines[1]
    with pytest.raises(ValueError, match="no run of the rows c3d_small_uniform is recorded"):
        difference_table(runs[:2], part)
    with pytest.raises(ValueError, match=r"the part 'five small networks' .* has no reference"):
        difference_table(runs, PARTS["networks"])


def test_a_seed_that_is_not_complete_is_compared_on_its_own_folds():
    """The other row has seed 1 on fold 1 alone, where both are right: no difference."""
    part = Part("trial", ("c3d_small", "c3d_small_uniform"), "c3d_small")
    runs = [
        a_run([ok], fold=fold, seed=seed) for fold, seed, ok in ((0, 0, 1), (1, 0, 1), (0, 1, 0), (1, 1, 1))
    ]
    row = "c3d_small_uniform"
    runs += [a_run([1], row, fold, seed) for fold, seed in ((0, 0), (1, 0), (1, 1))]
    assert (
        "| 100 % (100 to 100) | 100, 100 % | +0 (+0 to +0) |" in difference_table(runs, part).splitlines()[3]
    )
    with pytest.raises(ValueError, match="c3d_small_uniform and c3d_small were run on no fold with the same"):
        difference_table([a_run([1]), a_run([1], row, seed=1)], part)


def test_rates_count_what_was_seen_in_the_time_that_it_took():
    """10 clips: 2 epochs in 4 s; without epochs each is seen once; the test by its own time."""
    run = replace(a_run([True] * 5), data={"train": 10}, losses=[1.0, 0.5])
    run = replace(run, seconds={"train": 9.0, "train_processor": 4.0, "test": 9.0, "test_processor": 0.5})
    assert (summarise([run])[0].train_rate, summarise([run])[0].test_rate) == (5.0, 10.0)
    assert summarise([replace(run, losses=[])])[0].train_rate == 2.5
    both = replace(run, provenance={"machine": {"processor": "a processor", "processes": 2}})
    assert (summarise([both])[0].train_rate, summarise([both])[0].test_rate) == (2.5, 10.0)
    gpu = replace(run, provenance={"machine": {"gpu": "a GPU"}})
    assert summarise([gpu])[0].test_rate == pytest.approx(5 / 9)


def test_a_limit_close_to_zero_keeps_its_side():
    assert points(Interval(-0.04, -0.08, -0.012)) == "-4 (-8 to -1)"
    assert points(Interval(-0.04, -0.08, -0.0048)) == "-4.0 (-8.0 to -0.5)"
    assert points(Interval(0.05, -0.0036, 0.112)) == "+5.0 (-0.4 to +11.2)"
    assert points(Interval(-0.003, -0.03, 0.02)) == "-0.3 (-3.0 to +2.0)"
    assert points(Interval(0.0, 0.0, 0.0)) == "+0 (+0 to +0)"
    assert points(Interval(-0.0003, -0.037, 0.036)) == "+0.0 (-3.7 to +3.6)"


def test_other_orders_of_time_have_a_column_each():
    views = {"reversed": [1, 1], "shuffled": [0, 1], "one_step": [0, 0]}
    table = time_table([replace(a_run([True, True]), views=views), a_run([True], row="other")])
    assert (
        table.splitlines()[2]
        == "| C3D-style, 3D (Tran et al. 2015) `c3d_small` | flow | 100 % | 0 % | 50 % | 100 % |"
    )
    assert len(table.splitlines()) == 3


def test_every_row_of_the_plan_can_be_made_and_belongs_to_a_part():
    assert {row for part in PARTS.values() for row in part.rows} == set(ROWS)
    assert all(part.reference in (*part.rows, "") for part in PARTS.values())
    for row, entry in entries(ROWS).items():
        recipe = Recipe().replace(**entry.recipe)
        with torch.device("meta"):
            create_model(entry.model, 8, **full_options(entry.model, entry.options, recipe))
        assert entry.title, row
    assert len({entry.title for row, entry in ROWS.items() if not row.endswith("-rgb")}) == sum(
        not row.endswith("-rgb") for row in ROWS
    )
    # A row that is called as a network trains that network: `--model NAME` records it under this name.
    assert all(ROWS[name].model == name for name in list_models() if name in ROWS)
    with pytest.raises(ValueError, match="row='c4d'"):
        rows_of(["c4d"])


def test_a_row_that_begins_with_other_weights_stands_in_the_table(tmp_path):
    """What the plan changes in a row is no reason to keep it apart; the training before its own is told."""
    write_run(a_run([True, False]), tmp_path)
    recipe = {**a_run([True]).recipe, "init": "inflated"}
    inflated = replace(a_run([True, True], row="i3d_small"), recipe=recipe, start={"epochs": 24})
    write_run(inflated, tmp_path)
    page = readme_table("trial", tmp_path)
    assert "| 3D, inflated from frame averaging" in page
    assert "3 epochs, after 24 others in the row '3D, inflated from frame averaging" in page
    write_run(replace(a_run([True, True], row="cnn_rnn"), recipe=recipe), tmp_path)
    with pytest.raises(ValueError, match="differ in their recipe, clips, folds or seeds"):
        readme_table("trial", tmp_path)


def test_a_seed_that_lacks_folds_makes_no_readme_table(tmp_path):
    for fold, seed in ((0, 0), (1, 0), (0, 1)):
        write_run(a_run([True, False], fold=fold, seed=seed), tmp_path)
    with pytest.raises(ValueError, match="folds or seeds"):
        readme_table("trial", tmp_path)
    write_run(a_run([True, False], fold=1, seed=1), tmp_path)
    assert "2 folds, 2 seeds" in readme_table("trial", tmp_path)


def test_a_page_has_every_row_and_the_parts_that_are_whole(tmp_path):
    views = {"reversed": [1, 1], "shuffled": [0, 1], "one_step": [0, 0]}
    for row in ("c3d_small", "c3d_small_non_local", *PARTS["longer"].rows):
        write_run(replace(a_run([True, False], row=row, study="core8"), views=views), tmp_path)
    (page,) = write_results_pages(tmp_path)
    text = page.read_text(encoding="utf-8")
    assert page == tmp_path / "core8/README.md"
    assert text.count("`st_resnet_small-long`") == 3  # all rows, the part, other orders of time
    assert "## longer: twice as many epochs" in text
    assert "## controls" not in text


def test_tables_say_which_machine_the_rates_are_of():
    there = {"machine": {"processor": "another", "threads": 1}}
    runs = [a_run([True], row=row) for row in ("c3d_small", "idt")]
    assert caption(runs).endswith("Recorded on a processor, 1 thread a run.")
    assert "*" not in markdown_table(summarise(runs))
    more = [*runs, replace(a_run([True], seed=1), provenance=there)]
    assert "Recorded on a processor or another, 1 thread a run. Seeds of a row, and rows" in caption(more)
    assert "*" not in markdown_table(summarise(more))  # rates are those of the first seed
    more.append(replace(a_run([True], row="cnn_rnn"), provenance=there))
    for table in (markdown_table, architectures_table):
        lines = table(summarise(more)).splitlines()
        assert [line.count(" *") for line in lines[2:]] == [2, 0, 0, 0, 0]
        assert lines[2].startswith("| CNN+LSTM")
        assert lines[-1] == "\\* rates on another, not to be compared with the others, on a processor"


def test_rows_that_are_not_comparable_make_no_readme_table(tmp_path):
    for row, fold in (("c3d_small", 0), ("c3d_small", 1), ("cnn_rnn", 0)):
        write_run(a_run([True, False], row=row, fold=fold), tmp_path)
    with pytest.raises(ValueError, match="differ in their recipe, clips, folds or seeds"):
        readme_table("trial", tmp_path)


def test_the_readme_is_written_from_the_records(tmp_path):
    for row in ("c3d_small", "c3d_small_non_local"):
        write_run(a_run([True, False], row=row), tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- comparison: by x -->\nold\n<!-- /comparison -->\nafter\n")
    text = write_readme_table("trial", readme, tmp_path)
    page = readme.read_text()
    assert page.startswith(
        "before\n<!-- comparison: by x -->\n| architecture | own input | on flow | seeds (own, flow) |"
    )
    assert page.endswith("<!-- /comparison -->\nafter\n")
    assert "\nold\n" not in page
    assert "noise; 2 clips" in text
    assert (tmp_path / "trial" / "comparison.png").stat().st_size > 1000
    write_readme_table("trial", readme, tmp_path)
    assert readme.read_text() == page
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="has no lines <!-- comparison -->"):
        write_readme_table("trial", readme, tmp_path)
