"""Inputs, the training loop, the grid of runs: exact, resumable, and leaking nothing from fold to fold."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest
import torch

from nlutils.study import (
    ROWS,
    Entry,
    Recipe,
    accuracy,
    evaluate,
    prepare,
    read_runs,
    run_fold,
    run_study,
    seeded,
    train,
    write_run,
)
from nlutils.study import fold as fold_module
from nlutils.study.checks import check_study
from nlutils.study.stopwatch import Stopwatch
from nlutils.study.weights import kept_weights
from nlutils.torch import create_model
from nlutils.video.clips import Clip, ClipSet, Fault

torch.set_num_threads(1)
TINY = Recipe(epochs=4, batch=4, warmup=1, frames=4, resize=(18, 20), size=(16, 16), input="differences")


def fake_clips(count=20, length=9, size=(36, 40)):
    """Noise that is brighter for class 1: two clips a group, five folds."""

    def reader(index):
        def read():
            rng = np.random.default_rng(index)
            return rng.integers(0, 200, (length, *size, 3), dtype=np.uint8) + np.uint8(50 * (index % 2))

        return read

    clips = tuple(Clip(f"clip{i:02d}", i % 2, f"g{i // 2}", (i // 2) % 5, reader(i)) for i in range(count))
    return ClipSet("fake", ("dark", "bright"), clips, "20 clips of noise", (Fault("broken.mp4", "empty"),))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NLUTILS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NLUTILS_CACHE", str(tmp_path_factory.mktemp("cache")))
        return prepare(fake_clips(), TINY.frames, TINY.resize)


def fresh(name="c3d_small", **options):
    with seeded(TINY.seed):
        return create_model(name, 2, widths=(4, 4, 8, 8), **options)


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_prepare_keeps_bytes_and_facts(inputs):
    assert inputs.frames.dtype == torch.uint8
    assert inputs.frames.shape == (20, 3, 5, 18, 20)
    assert inputs.flow.dtype == torch.int8
    assert inputs.flow.shape == (20, 2, 4, 18, 20)
    assert inputs.left_out == 1
    assert inputs.labels.tolist() == [0, 1] * 10


def test_folds_share_no_group(inputs):
    for fold in range(5):
        train_on, test_on = inputs.split(fold)
        assert len(train_on) + len(test_on) == len(inputs)
        assert not {inputs.groups[i] for i in train_on} & {inputs.groups[i] for i in test_on}
    with pytest.raises(ValueError, match="fold=5 is not a fold of fake"):
        inputs.split(5)


def test_a_group_in_two_folds_is_refused(inputs):
    from dataclasses import replace

    torn = replace(inputs, folds=torch.arange(20) % 5)
    with pytest.raises(ValueError, match=r"lie in fold 0 and outside it"):
        torn.split(0)


def test_inputs_are_cut_from_the_same_place(inputs):
    picks = torch.tensor([3, 7])
    rgb, differences, flow = inputs.batch(("rgb", "differences", "flow"), picks, (16, 16))
    assert rgb.shape == differences.shape == (2, 3, 4, 16, 16)
    assert flow.shape == (2, 2, 4, 16, 16)
    centre = inputs.frames[picks][..., 1:17, 2:18].float()
    torch.testing.assert_close(rgb, (centre[:, :, :-1] / 255 - 0.45) / 0.225)
    torch.testing.assert_close(differences, (centre[:, :, 1:] - centre[:, :, :-1]) / 16)
    with pytest.raises(ValueError, match="input='sound'"):
        inputs.batch("sound", picks, (16, 16))
    with pytest.raises(ValueError, match="does not fit"):
        inputs.batch("rgb", picks, (19, 16))


def test_a_mirrored_clip_moves_the_other_way(inputs):
    picks = torch.arange(20)
    whole = tuple(inputs.frames.shape[-2:])  # no room for crops: only the mirror is drawn
    draw = torch.Generator().manual_seed(0)
    rgb, flow = inputs.batch(("rgb", "flow"), picks, whole, generator=draw, flip=True)
    plain_rgb, plain_flow = inputs.batch(("rgb", "flow"), picks, whole)
    mirrored = [not torch.equal(a, b) for a, b in zip(rgb, plain_rgb, strict=True)]
    assert 0 < sum(mirrored) < 20
    for clip in torch.nonzero(torch.tensor(mirrored))[:, 0]:
        assert torch.equal(rgb[clip], plain_rgb[clip].flip(-1))
        assert torch.equal(flow[clip, 0], -plain_flow[clip, 0].flip(-1))
        assert torch.equal(flow[clip, 1], plain_flow[clip, 1].flip(-1))


def test_reversed_steps_are_those_of_the_film_backwards(inputs):
    picks = torch.tensor([3, 7])
    film = replace(inputs, frames=inputs.frames.flip(2))
    for kind in ("rgb", "differences"):
        backwards = inputs.batch(kind, picks, (16, 16), time="reversed")
        assert torch.equal(backwards, film.batch(kind, picks, (16, 16)))
    flow = inputs.batch("flow", picks, (16, 16))
    assert torch.equal(inputs.batch("flow", picks, (16, 16), time="reversed"), -flow.flip(2))


def test_shuffled_steps_are_the_same_steps_in_an_order_of_each_clip(inputs):
    picks = torch.arange(20)
    forward, flow = inputs.batch(("rgb", "flow"), picks, (16, 16))
    shuffled, shuffled_flow = inputs.batch(("rgb", "flow"), picks, (16, 16), time="shuffled")
    orders = set()
    for clip in range(20):
        order = [
            next(t for t in range(4) if torch.equal(forward[clip, :, t], shuffled[clip, :, s]))
            for s in range(4)
        ]
        assert sorted(order) == [0, 1, 2, 3]
        assert torch.equal(shuffled_flow[clip], flow[clip][:, order])
        orders.add(tuple(order))
    assert len(orders) > 5
    # A test clip's order is its own, whatever stands beside it in the batch; in training it is drawn.
    assert torch.equal(inputs.batch("rgb", picks[5:6], (16, 16), time="shuffled")[0], shuffled[5])
    draw = torch.Generator().manual_seed(0)
    first, again = (inputs.batch("rgb", picks, (16, 16), time="shuffled", generator=draw) for _ in range(2))
    assert not torch.equal(first, again)


def test_one_step_is_shown_all_the_time(inputs):
    picks = torch.tensor([3, 7])
    flow = inputs.batch("flow", picks, (16, 16))
    one = inputs.batch("flow", picks, (16, 16), time="one_step")
    assert torch.equal(one, flow[:, :, 2:3].expand(-1, -1, 4, -1, -1))
    draw = torch.Generator().manual_seed(0)
    many = torch.cat(
        [inputs.batch("flow", picks, (16, 16), time="one_step", generator=draw) for _ in range(9)]
    )
    assert all(torch.equal(clip, clip[:, :1].expand(-1, 4, -1, -1)) for clip in many)
    assert len({clip[0, 0].sum().item() for clip in many}) > 4
    with pytest.raises(ValueError, match="time='sideways'"):
        inputs.batch("flow", picks, (16, 16), time="sideways")


def test_folds_can_be_left_out_together(inputs, tmp_path):
    train_on, test_on = inputs.split((1, 3))
    assert sorted(inputs.folds[test_on].tolist()) == [1] * 4 + [3] * 4
    assert not set(inputs.folds[train_on].tolist()) & {1, 3}
    small = {"2d": ("frame_average", {"widths": (4, 4, 8, 8)})}
    run = run_study("pairs", small, [(1, 3)], clips=inputs, recipe=TINY.replace(epochs=1), root=tmp_path)[0]
    assert (run.run, run.fold) == ("2d-fold1+3-seed0", [1, 3])
    assert read_runs("pairs", tmp_path) == [run]
    again = run_study("pairs", small, [(1, 3)], clips=inputs, recipe=TINY.replace(epochs=1), root=tmp_path)
    assert again == [run]
    with pytest.raises(ValueError, match="fold=9 is not a fold"):
        run_study("pairs", small, [(1, 9)], clips=inputs, recipe=TINY, root=tmp_path)


def test_smoothed_labels_are_probabilities(inputs):
    """Of two classes, smoothing 0.2 leaves 0.9 on the right one."""
    model = fresh("frame_average", input="rgb", dropout=0.0)
    recipe = TINY.replace(epochs=1, batch=20, label_smoothing=0.2, flip=False, size=(18, 20))
    picks = torch.arange(20)
    model.train()
    scores = torch.log_softmax(model(inputs.batch("rgb", picks, (18, 20))), dim=1)
    sure, other = scores.gather(1, inputs.labels[:, None]), scores.gather(1, 1 - inputs.labels[:, None])
    expected = -(0.9 * sure + 0.1 * other).mean().item()
    assert train(fresh("frame_average", input="rgb", dropout=0.0), inputs, picks, recipe)[0] == pytest.approx(
        expected, rel=1e-5
    )


@pytest.mark.parametrize("kind", ["non_local", "uniform", "convolution"])
def test_blocks_learn_at_a_rate_of_their_own(inputs, kind):
    """With a rate near 0 the blocks stay as they were drawn, and all else moves."""
    block = {"inner_channels": 4} if kind == "non_local" else {}
    options = {"non_local": (3,), "kind": kind, "block": block}
    before, model = fresh(**options).state_dict(), fresh(**options)
    recipe = TINY.replace(epochs=1, block_lr=1e-12, weight_decay=0, input="rgb")
    train(model, inputs, torch.arange(8), recipe)
    place = next(i for i, layer in enumerate(model.features) if "Block" in type(layer).__name__)
    for name, weight in model.named_parameters():
        near = torch.allclose(weight, before[name], atol=1e-9, rtol=0)
        assert near == name.startswith(f"features.{place}."), name


def test_scores_of_a_clip_and_its_mirror_image_are_averaged(inputs):
    model, picks = fresh(input="rgb"), torch.arange(6)
    model.eval()
    plain = inputs.batch("rgb", picks, TINY.size)
    with torch.no_grad():
        expected = (model(plain).softmax(1) + model(plain.flip(-1)).softmax(1)) / 2
    scores = evaluate(model, inputs, picks, TINY.replace(test_flip=True, input="rgb"))
    torch.testing.assert_close(scores.softmax(1), expected)
    assert not torch.allclose(evaluate(model, inputs, picks, TINY).softmax(1), expected)


def test_bfloat16_is_refused_on_a_cpu(inputs):
    recipe = TINY.replace(epochs=2, input="rgb", precision="bfloat16")
    with pytest.raises(ValueError, match="precision='bfloat16' needs a GPU"):
        train(fresh(), inputs, torch.arange(20), recipe)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["frame_average", "c3d_small", "c3d_small_non_local"])
def test_bfloat16_trains_near_float32(inputs, name):
    here = inputs.to("cuda")
    recipe = TINY.replace(epochs=2, input="rgb")
    single, half = (fresh(name, input="rgb", dropout=0.0).to("cuda") for _ in range(2))
    losses = train(single, here, torch.arange(20), recipe)
    near = train(half, here, torch.arange(20), recipe.replace(precision="bfloat16"))
    assert near == pytest.approx(losses, rel=0.05)
    assert near != losses
    assert all(weight.dtype == torch.float32 for weight in half.parameters())


@pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))),
    reason="torch.compile needs a C++ compiler, and there is none",
)
def test_a_compiled_step_is_the_step(inputs):
    plain, compiled = (fresh("frame_average", input="rgb", dropout=0.0) for _ in range(2))
    recipe = TINY.replace(epochs=1, input="rgb")
    losses = train(plain, inputs, torch.arange(12), recipe)
    assert train(compiled, inputs, torch.arange(12), recipe.replace(compile=True)) == pytest.approx(
        losses, rel=1e-5
    )
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], weight, rtol=1e-3, atol=1e-4)


def test_flow_sees_a_shift_and_forgets_the_camera():
    """A bright square moves 2 pixels a frame over a still background, whose flow, the median, is 0."""
    rng = np.random.default_rng(0)
    background = rng.integers(0, 120, (64, 64), dtype=np.uint8)
    square = rng.integers(130, 255, (20, 20), dtype=np.uint8)
    frames = np.stack([background] * 5)
    for t in range(5):
        frames[t, 20:40, 10 + 2 * t : 30 + 2 * t] = square
    frames = np.repeat(frames[..., None], 3, axis=-1)
    clips = ClipSet("square", ("a",), (Clip("square", 0, "g", 0, lambda: frames),), "a square")
    flow = prepare(clips, 4, (64, 64)).batch("flow", torch.tensor([0]), (64, 64))[0]
    moved = flow[:, 0, 24:36, 16:26].median(dim=-1).values.median(dim=-1).values
    torch.testing.assert_close(moved, torch.tensor([2.0, 0.0]), atol=0.3, rtol=0)
    assert flow[:, :, :10].abs().median() < 0.1


def test_recipes_refuse_what_cannot_be_meant():
    assert Recipe(**TINY.settings()) == TINY
    for setting, value in {
        "epochs": 0, "batch": 1, "lr": 0, "weight_decay": -1, "schedule": "linear", "input": "sound",
        "seed": -1, "resize": 18, "size": (60, 16), "frames": 2.5, "warmup": -1, "time": "sideways",
        "block_lr": 0, "label_smoothing": 2, "precision": "float16", "compile": "no", "test_flip": 1,
        "init": None,
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"{setting}="):
            TINY.replace(**{setting: value})
    with pytest.raises(TypeError, match="no setting 'epoch'"):
        TINY.replace(epoch=3)


def test_learning_rates_follow_the_schedule():
    recipe = TINY.replace(epochs=10, warmup=0, lr=1.0)
    assert recipe.rate(0) == 1.0
    assert recipe.rate(5) == pytest.approx(0.5)
    assert recipe.rate(10) == pytest.approx(0.0)
    step = recipe.replace(schedule="step", epochs=9)
    assert [round(step.rate(epoch), 3) for epoch in (0, 5, 6, 7, 8)] == [1, 1, 0.1, 0.1, 0.01]
    warm = recipe.replace(schedule="constant", warmup=4)
    assert 0 < warm.rate(0) < warm.rate(2) < warm.rate(4) == 1.0


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", ["c3d_small", "cnn_rnn"])  # both use dropout
def test_a_resumed_run_equals_an_uninterrupted_one(name, inputs, tmp_path):
    indices, _ = inputs.split(0)
    straight = fresh(name)
    losses = train(straight, inputs, indices, TINY)
    assert len(losses) == TINY.epochs

    def kill(epoch, loss):
        if epoch == 1:
            raise Killed

    with pytest.raises(Killed):
        train(fresh(name), inputs, indices, TINY, checkpoint=tmp_path / "run.pt", after_epoch=kill)
    seen = []
    resumed = fresh(name)
    torch.rand(7)  # whatever else the process draws must not matter
    again = train(
        resumed,
        inputs,
        indices,
        TINY,
        checkpoint=tmp_path / "run.pt",
        after_epoch=lambda epoch, loss: seen.append(epoch),
    )
    assert seen == [2, 3]
    assert again == losses
    assert same_weights(straight, resumed)


def test_checkpoints_of_other_runs_are_refused(inputs, tmp_path):
    indices, _ = inputs.split(0)
    path = tmp_path / "run.pt"
    train(fresh(), inputs, indices, TINY, checkpoint=path)
    with pytest.raises(ValueError, match=r"run\.pt is a checkpoint of another recipe"):
        train(fresh(), inputs, indices, TINY.replace(lr=1e-3), checkpoint=path)
    with pytest.raises(ValueError, match=r"run\.pt is not a checkpoint of this network"):
        train(fresh("frame_average"), inputs, indices, TINY, checkpoint=path)
    path.write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"run\.pt is not a checkpoint"):
        train(fresh(), inputs, indices, TINY, checkpoint=path)


def test_training_leaves_the_global_generator_alone(inputs):
    torch.manual_seed(5)
    train(fresh(), inputs, torch.arange(8), TINY.replace(epochs=1))
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))


def test_a_lone_last_clip_joins_the_batch_before_it(inputs):
    """Batch normalisation cannot normalise one vector; 9 clips in batches of 4 are 4 + 5."""
    assert np.isfinite(train(fresh(), inputs, torch.arange(9), TINY.replace(epochs=1))).all()


def test_diverging_training_says_so(inputs):
    with pytest.raises(FloatingPointError, match=r"lower lr="):
        train(fresh("frame_average", dropout=0.0), inputs, torch.arange(8), TINY.replace(lr=1e30, warmup=0))


def test_training_learns_what_is_there(inputs):
    train_on, test_on = inputs.split(0)
    recipe = TINY.replace(epochs=15, lr=1e-2)
    model = fresh("frame_average", input="rgb", dropout=0.0)
    losses = train(model, inputs, train_on, recipe)
    assert losses[-1] < 0.5 * losses[0]
    logits = evaluate(model, inputs, test_on, recipe)
    assert logits.shape == (4, 2)
    assert accuracy(logits, inputs.labels[test_on]) == 1.0


def test_accuracy_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="0 rows of logits"):
        accuracy(torch.zeros(0, 2), torch.zeros(0))


SMALL = {
    "2d": ("frame_average", {"widths": (4, 4, 8, 8)}),
    "streams": ("two_stream_small", {"widths": (4, 4, 8, 8), "stack": 2}),
}


def test_a_study_records_each_run_once(inputs, tmp_path):
    lines = []
    again = {
        "models": SMALL,
        "folds": [0, 3],
        "clips": inputs,
        "recipe": TINY.replace(epochs=1),
        "root": tmp_path,
    }
    runs = run_study("tiny", **again, log=lines.append)
    assert [run.run for run in runs] == [
        "2d-fold0-seed0",
        "2d-fold3-seed0",
        "streams-fold0-seed0",
        "streams-fold3-seed0",
    ]
    assert len(lines) == 4
    assert runs == read_runs("tiny", tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny").iterdir()}
    assert len(before) == 4
    (tmp_path / "tiny" / "2d-fold0-seed0.json").unlink()
    lines.clear()
    assert [run.logits for run in run_study("tiny", **again, log=lines.append)] == [
        run.logits for run in runs
    ]
    assert sorted("recorded before" in line for line in lines) == [False, True, True, True]
    assert sum(path.stat().st_mtime_ns == time for path, time in before.items()) == 3
    assert not list((tmp_path / "cache").rglob("*.pt"))
    with pytest.raises(ValueError, match="recorded with other settings"):
        run_study("tiny", **{**again, "recipe": TINY.replace(epochs=2)}, log=lines.append)


def test_a_run_says_where_it_comes_from(inputs):
    run = run_fold(inputs, "c3d_small", 1, TINY.replace(epochs=1), options={"widths": [4, 4, 8, 8]})
    facts = {"name": "fake", "source": "20 clips of noise", "train": 16, "test": 4, "left_out": 1}
    assert run.data == {**facts, "digest": inputs.digest}
    assert run.seconds.keys() == {"train", "train_processor", "test", "test_processor"}
    assert run.names == ["clip02", "clip03", "clip12", "clip13"]
    assert run.options["input"] == run.input == "differences"
    assert len(run.provenance["code"]) == 64
    assert run.provenance["versions"]["torch"] == version("torch")
    assert run.provenance["machine"]["threads"] == 1
    assert run.accuracy == np.mean(run.right)
    assert sorted(run.views) == ["one_step", "reversed", "shuffled"]
    assert all(len(named) == 4 and set(named) <= {0, 1} for named in run.views.values())
    blind = run_fold(inputs, "frame_average", 1, TINY.replace(epochs=1, input="rgb"))
    assert blind.views["shuffled"] == np.argmax(blind.logits, axis=1).tolist()  # an average knows no order


def test_the_second_stage_of_training_follows_the_first(inputs):
    """tdd's streams are trained by gradients, then its Fisher vectors and SVM see the training clips once."""
    options = {
        "width": 3,
        "stack": 2,
        "sizes": [1.0],
        "components": 2,
        "gaussians": 2,
        "step": 4,
        "length": 3,
    }
    options["limits"] = {"least_spread": 0, "least_motion": 0}
    run = run_fold(inputs, "tdd", 0, TINY.replace(epochs=1), options=options)
    assert (run.input, len(run.logits), len(run.logits[0])) == ("rgb+flow", 4, 2)
    assert run.accuracy == np.mean(run.right)
    assert run.cost["multiply_adds"] > 0


def test_other_clips_are_not_taken_for_the_recorded_ones(inputs, tmp_path):
    options = {"frame_average": ("frame_average", {"widths": [4, 4, 8, 8]})}
    recipe = TINY.replace(epochs=1, warmup=0)
    run_study("same", options, [0], (0,), inputs, recipe, root=tmp_path, log=lambda line: None)
    others = replace(inputs, names=tuple(f"other-{name}" for name in inputs.names))
    with pytest.raises(ValueError, match="recorded with other settings or clips"):
        run_study("same", options, [0], (0,), others, recipe, root=tmp_path, log=lambda line: None)


def test_records_of_other_pixels_are_not_taken(inputs, tmp_path):
    options = {"frame_average": ("frame_average", {"widths": [4, 4, 8, 8]})}
    recipe = TINY.replace(epochs=1, warmup=0)
    told = {"folds": [0], "recipe": recipe, "root": tmp_path, "log": lambda line: None}
    (run,) = run_study("same", options, clips=inputs, **told)
    assert run.data["digest"] == inputs.digest
    for others in (
        replace(inputs, frames=inputs.frames.flip(-1)),
        replace(inputs, labels=torch.where(inputs.folds == 0, inputs.labels, 1 - inputs.labels)),
    ):
        assert others.digest != inputs.digest
        with pytest.raises(ValueError, match="recorded with other settings or clips"):
            run_study("same", options, clips=others, **told)


def test_settings_that_this_version_does_not_know_are_named(inputs, tmp_path):
    told = {"models": {"2d": SMALL["2d"]}, "folds": [0], "clips": inputs, "root": tmp_path}
    told |= {"recipe": TINY.replace(epochs=1), "log": lambda line: None}
    run_study("same", **told)
    path = tmp_path / "same" / "2d-fold0-seed0.json"
    record = json.loads(path.read_text())
    record["recipe"]["momentum"] = 0.9
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"2d-fold0-seed0.json has settings .* not know: .*'momentum'"):
        run_study("same", **told)


def test_settings_newer_than_a_record_do_not_invalidate_it(inputs, tmp_path):
    """A record without `time` was made when there was no such setting: its steps came forward."""
    options = {"frame_average": ("frame_average", {"widths": [4, 4, 8, 8]})}
    told = {"folds": [0], "clips": inputs, "root": tmp_path, "log": lambda line: None}
    (run,) = run_study("old", options, recipe=TINY.replace(epochs=1), **told)
    del run.recipe["time"]
    write_run(run, tmp_path)
    assert run_study("old", options, recipe=TINY.replace(epochs=1), **told) == [run]
    with pytest.raises(ValueError, match="recorded with other settings"):
        run_study("old", options, recipe=TINY.replace(epochs=1, time="reversed"), **told)


def test_a_resumed_run_counts_the_time_before_it_was_killed(inputs, tmp_path):
    indices, path = inputs.split(0)[0], tmp_path / "run.pt"
    train(fresh("frame_average"), inputs, indices, TINY, checkpoint=path)
    state = torch.load(path, weights_only=True)
    torch.save({**state, "seconds": (1000.0, 500.0)}, path)
    watch = Stopwatch()
    train(fresh("frame_average"), inputs, indices, TINY, checkpoint=path, watch=watch)
    wall, processor = watch.read()
    assert 1000 < wall < 1100
    assert 500 < processor < 600


def test_clips_prepared_for_another_recipe_are_refused(inputs, tmp_path):
    with pytest.raises(ValueError, match=r"\(frames, height, width\) = \(4, 18, 20\), and the recipe says"):
        run_study("x", ["c3d_small"], [0], (0,), inputs, TINY.replace(frames=8), root=tmp_path)


def test_unknown_rows_are_refused_before_anything_runs(inputs):
    with pytest.raises(ValueError, match="name='c4d'"):
        run_study("tiny", models=["c4d"], clips=inputs, recipe=TINY)
    with pytest.raises(TypeError, match="c3d_small has no option 'width'"):
        run_study("tiny", models={"wide": ("c3d_small", {"width": 4})}, clips=inputs, recipe=TINY)
    with pytest.raises(TypeError, match="no setting 'epoch'"):
        run_study("tiny", models={"long": Entry("c3d_small", {}, {"epoch": 4})}, clips=inputs, recipe=TINY)
    with pytest.raises(ValueError, match="long sets frames=8, which all rows of a study share"):
        run_study("tiny", models={"long": Entry("c3d_small", {}, {"frames": 8})}, clips=inputs, recipe=TINY)


WIDTHS = {"widths": [4, 4, 8, 8]}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"study": "../x"}, "study='../x' names files"),
        ({"study": ""}, "study='' names files"),
        ({"models": {"a/b": SMALL["2d"]}}, "row='a/b' names files"),
        ({"models": {"x": "cnn_rnn"}}, r"'x' is 'cnn_rnn'; it must be \(name, options\) or an Entry"),
        ({"models": "c3d_small"}, r"models='c3d_small' must be several: \['c3d_small'\]"),
        ({"models": ["c3d_small", "c3d_small"]}, "model='c3d_small' is there twice"),
        ({"folds": 0}, r"folds=0 must be several: \[0\]"),
        ({"folds": [True]}, "fold=True must be a whole number"),
        ({"folds": [()]}, r"fold=\(\) must be a number, or several that differ"),
        ({"folds": [(0, 0)]}, r"fold=\(0, 0\) must be a number, or several that differ"),
        ({"folds": [(0, 1), 2, (1, 0)]}, r"fold=\(1, 0\) is there twice"),
        ({"folds": [(0, 1, 2, 3, 4)]}, r"fold=\(0, 1, 2, 3, 4\) of fake leaves no clip to train on"),
        ({"seeds": 0}, r"seeds=0 must be several: \[0\]"),
        ({"seeds": [1, 1]}, "seed=1 is there twice"),
        ({"threads": 0}, "threads=0 must be"),
        ({"keep_weights": "no"}, "keep_weights='no' must be True or False"),
        ({"recipe": {"epochs": 1}}, r"recipe={'epochs': 1} must be a Recipe"),
        ({"device": "cuda:99"}, r"device='cuda:99': PyTorch finds \w+ GPU here"),
        # What would only be seen when the rows before had been trained.
        ({"kind": "foo"}, "row 'late' cannot be trained: kind='foo' is not known"),
        ({"non_local": [2], "block": {"foo": 1}}, "row 'late' cannot be trained: .*'foo'"),
        ({"recipe": TINY.replace(size=(2, 2))}, "row '2d' cannot be trained: clips of 4 x 2 x 2 do not fit"),
        ({"input": "flow"}, "row 'late' sees optical flow, and the clips were prepared without"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_runs(inputs, tmp_path, wrong, message):
    told = {"study": "x", "folds": [0], "clips": replace(inputs, flow=None), "recipe": TINY, "root": tmp_path}
    told |= {"models": {"2d": SMALL["2d"], "late": ("c3d_small", WIDTHS)}}
    if wrong.keys() & {"kind", "non_local", "input"}:
        wrong = {"models": {"2d": SMALL["2d"], "late": ("c3d_small", WIDTHS | wrong)}}
    with pytest.raises(ValueError, match=message):
        run_study(**told | wrong, log=lambda line: pytest.fail(line))
    assert not list(tmp_path.glob("**/*.json"))


def test_every_row_of_the_plan_can_be_trained():
    """On the study's clips, as far as two clips without numbers tell."""
    rows = {name: entry for name, entry in ROWS.items() if entry.framework == "torch"}
    assert list(check_study("plan", rows)[0]) == list(rows)


def test_each_root_keeps_weights_of_its_own(inputs, tmp_path):
    told = {"models": {"2d": SMALL["2d"]}, "folds": [0], "clips": inputs, "keep_weights": True}
    for root, lr in (("a", 1e-3), ("b", 1e-2)):
        recipe = TINY.replace(epochs=1, lr=lr)
        run_study("s", **told, recipe=recipe, root=tmp_path / root, log=lambda line: None)
        assert len(read_runs("s", tmp_path / root)) == 1
    kept = [kept_weights(tmp_path / root / "s" / "weights" / "2d-fold0-seed0.pt")[1] for root in "ab"]
    assert [one["recipe"]["lr"] for one in kept] == [1e-3, 1e-2]


def test_weights_that_were_not_kept_are_missed(inputs, tmp_path):
    told = {"models": {"2d": SMALL["2d"]}, "folds": [0], "clips": inputs, "root": tmp_path}
    told |= {"recipe": TINY.replace(epochs=1), "log": lambda line: None}
    run_study("s", **told)
    with pytest.raises(ValueError, match="2d-fold0-seed0 is recorded without its weights; give another root"):
        run_study("s", **told, keep_weights=True)
    (tmp_path / "s" / "2d-fold0-seed0.json").unlink()
    run_study("s", **told, keep_weights=True)
    assert len(run_study("s", **told, keep_weights=True)) == 1


def test_the_seed_reaches_what_is_drawn_before_a_fit(inputs, monkeypatch):
    """Trajectories' mixtures are learnt from samples; a seed among the options comes first."""
    made = []

    class Stop(Exception):
        pass

    def stop(name, classes, **options):
        made.append(options.get("seed"))
        raise Stop

    monkeypatch.setattr(fold_module, "create_model", stop)
    for name, options in (("idt", {}), ("idt", {"seed": 3}), ("frame_average", {})):
        with pytest.raises(Stop):
            run_fold(inputs, name, 0, TINY.replace(seed=7), options=options)
    assert made == [7, 3, None]


def test_a_killed_process_goes_on_to_the_same_result(inputs, tmp_path):
    """SIGKILL after the second epoch, in a process of its own; the next call ends the run."""
    torch.save(inputs, tmp_path / "inputs.pt")
    program = textwrap.dedent(f"""
        import os, signal, sys, torch
        sys.path.insert(0, {str(__import__("pathlib").Path(__file__).parent)!r})
        from test_study_training import SMALL, TINY
        from nlutils.study import fold, study, train
        def dies(*args, **kwargs):
            kill = lambda epoch, loss: os.kill(os.getpid(), signal.SIGKILL) if epoch == 1 else None
            return train(*args, **kwargs, after_epoch=kill)
        fold.train = dies
        inputs = torch.load({str(tmp_path / "inputs.pt")!r}, weights_only=False)
        study.run_study("killed", models=SMALL, folds=[0], clips=inputs, recipe=TINY, root={str(tmp_path)!r})
    """)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == -9, ended.stderr
    assert not list(tmp_path.glob("killed/*.json"))
    assert len(list((tmp_path / "cache").rglob("2d-fold0*.pt"))) == 1
    resumed = run_study(
        "killed", models=SMALL, folds=[0], clips=inputs, recipe=TINY, root=tmp_path, log=lambda line: None
    )
    straight = run_study(
        "straight", models=SMALL, folds=[0], clips=inputs, recipe=TINY, root=tmp_path, log=lambda line: None
    )
    assert [(run.logits, run.losses) for run in resumed] == [(run.logits, run.losses) for run in straight]


def test_a_network_without_weights_is_fitted_alone(inputs, monkeypatch):
    """idt: no loss, no training step, what is fitted is counted, and the kept state is read again."""
    monkeypatch.setattr("nlutils.study.fold.train", lambda *_, **__: pytest.fail("nothing is to be trained"))
    options = {"step": 4, "length": 3, "patch": 8, "components": 2, "gaussians": 2}
    options["limits"] = {"least_spread": 0, "least_motion": 0}
    run = run_fold(inputs, "idt", 0, TINY, options=options)
    assert (run.input, run.losses, len(run.logits), len(run.logits[0])) == ("rgb", [], 4, 2)
    assert run.accuracy == np.mean(run.right)
    # Mean and projection of five kinds, mixtures of 2 in 2 numbers, the SVM's weights and biases.
    widths = (6, 96, 108, 96, 96)
    assert run.cost["parameters"] == sum(3 * width + 10 for width in widths) + 2 * (5 * 8 + 1)
    assert (run.cost["multiply_adds"], run.cost["training_mb"]) == (None, None)
    assert run.cost["forward_ms"] > 0
