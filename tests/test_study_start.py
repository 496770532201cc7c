"""Where first weights come from: what is learnt once and kept, what files bring, and what is refused."""

import functools
import json
import pickle
import signal
import sqlite3
import threading
import time
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_inflation import ImageResNet, with_random_norms

from nlutils.exchange import to_checkpoint
from nlutils.study import Inputs, Recipe, prepare, pretraining, run_fold, seeded, write_run
from nlutils.study.pretraining import pretrain
from nlutils.study.results import read_run
from nlutils.study.start import begin, start_digest
from nlutils.study.weights import kept_weights
from nlutils.torch import create_model
from nlutils.torch.inflation import inflate_kernel
from nlutils.video import open_clips

torch.set_num_threads(1)
TINY = Recipe(epochs=1, batch=20, frames=4, resize=(16, 20), size=(16, 16), input="differences")
NARROW = {"widths": [4, 4, 8, 8], "input": "differences"}
RESNET = {"depth": (1, 1, 1, 1), "width": 4}


def fake_inputs(classes=("dark", "bright"), name="fake"):
    """20 clips of noise: two a group, five folds."""
    draw = torch.Generator().manual_seed(0)
    groups = torch.arange(20) // 2
    return Inputs(
        name=name,
        source="noise",
        classes=tuple(classes),
        names=tuple(f"{name}{i:02d}" for i in range(20)),
        groups=tuple(f"g{group}" for group in groups.tolist()),
        labels=torch.arange(20) % len(classes),
        folds=groups % 5,
        frames=torch.randint(0, 255, (20, 3, 5, 16, 20), dtype=torch.uint8, generator=draw),
        flow=None,
    )


INPUTS = fake_inputs()


def provenance(device):
    """The same in all processes, though the sources may change while tests run."""
    return {"code": "", "versions": {}, "machine": {"device": device.type}}


@functools.cache
def prepared(clips, frames, resize, flow):
    return prepare(clips, frames, resize, flow=flow)


@pytest.fixture(autouse=True)
def few_clips(tmp_path, monkeypatch):
    """60 clips, drawn once for all tests, one epoch, and a cache of the test's own."""
    monkeypatch.setenv("NLUTILS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pretraining, "prepare", prepared)
    monkeypatch.setattr(pretraining, "provenance", provenance)
    monkeypatch.setattr(pretraining, "CLIPS", 60)
    monkeypatch.setattr(pretraining, "EPOCHS", 1)


@pytest.fixture
def trainings(monkeypatch):
    """The names of the checkpoints of the trainings on procedural clips, as they begin."""
    seen, original = [], pretraining.train

    def counted(*args, **options):
        seen.append(options["checkpoint"])
        return original(*args, **options)

    monkeypatch.setattr(pretraining, "train", counted)
    return seen


def fresh(name="c3d_small", classes=2, **options):
    with seeded(TINY.seed):
        return create_model(name, classes, **options)


def started(init, name="c3d_small", options=None, *, inputs=INPUTS, fold=0, seed=0):
    """(the network behind `begin`, its weights as drawn, what is recorded)."""
    options = NARROW if options is None else options
    model = fresh(name, len(inputs.classes), **options)
    drawn = {key: value.clone() for key, value in model.state_dict().items()}
    start = begin(model, name, options, TINY.replace(init=str(init), seed=seed), inputs, fold)
    return model.state_dict(), drawn, start.record


def kept_run(tmp_path, name="frame_average", fold=0, inputs=INPUTS, options=NARROW, **settings):
    path = tmp_path / f"{name}-fold{fold}-seed0.pt"
    run_fold(inputs, name, fold, TINY.replace(**settings), study="first", options=options, keep=path)
    return path


def test_drawn_weights_stay_as_they_are():
    weights, drawn, record = started("")
    assert record == {}
    assert all(torch.equal(weights[key], drawn[key]) for key in drawn)


def test_learnt_weights_are_those_of_the_training_and_the_classifier_is_drawn(trainings):
    learnt, _ = pretrain("c3d_small", NARROW, TINY, "cpu")
    assert learnt["classifier.weight"].shape == (6, 8)
    weights, drawn, record = started("procedural")
    assert len(trainings) == 1
    for key, value in weights.items():
        assert torch.equal(value, drawn[key] if key.startswith("classifier.") else learnt[key]), key
    assert not torch.equal(weights["features.0.weight"], drawn["features.0.weight"])
    assert record["kind"] == "procedural"
    assert (record["clips"], record["epochs"], len(record["losses"])) == (60, 1, 1)
    assert record["drawn"] == ["classifier"]
    assert set(record["seconds"]) == {"train", "train_processor"}


def test_six_classes_get_a_classifier_of_their_own():
    """The procedural actions are six, too."""
    six = fake_inputs("abcdef")
    weights, drawn, _ = started("procedural", inputs=six)
    assert torch.equal(weights["classifier.weight"], drawn["classifier.weight"])


def test_a_run_says_what_it_started_from_and_trains_on_from_there(trainings, tmp_path):
    run = run_fold(INPUTS, "c3d_small", 0, TINY.replace(init="procedural"), options=NARROW)
    other = run_fold(INPUTS, "c3d_small", 1, TINY.replace(init="procedural"), options=NARROW)
    drawn = run_fold(INPUTS, "c3d_small", 0, TINY, options=NARROW)
    assert len(trainings) == 1  # folds share it
    assert other.start == run.start
    assert read_run(write_run(run, tmp_path)) == run
    assert drawn.start == {}
    assert run.logits != drawn.logits
    assert run.cost["multiply_adds"] == drawn.cost["multiply_adds"]


def test_what_weights_depend_on_is_in_their_name(trainings, monkeypatch):
    def make(name="frame_average", options=NARROW, **settings):
        pretrain(name, dict(options), TINY.replace(**settings), "cpu")
        return len(trainings)

    assert make() == make() == 1
    # What only the fold's own training and test have changes nothing.
    assert make(epochs=7, test_flip=True, warmup=5, init="procedural") == 1
    assert make(seed=1) == 2
    assert make(options={**NARROW, "dropout": 0.0}) == 3
    monkeypatch.setattr(pretraining, "CLIPS", 72)
    assert make() == 4
    monkeypatch.setattr(pretraining, "provenance", lambda device: {**provenance(device), "code": "new"})
    assert make() == 5


def test_a_damaged_file_in_the_cache_is_made_anew(trainings, tmp_path):
    first, _ = pretrain("frame_average", NARROW, TINY, "cpu")
    (path,) = (tmp_path / "cache" / "starts").glob("*.pt")
    path.write_bytes(path.read_bytes()[:1000])
    again, _ = pretrain("frame_average", NARROW, TINY, "cpu")
    assert len(trainings) == 2
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_who_wants_the_same_at_once_waits_for_it(tmp_path, monkeypatch, trainings):
    """Another holds the lock, and lets go of it when it has made the weights."""
    busy, waits = threading.Event(), threading.Event()

    def slow(*args, **options):
        busy.set()
        assert waits.wait(60)
        return prepared(*args, **options)

    def locked(lock, original=pretraining._locked):
        if busy.is_set():
            waits.set()
        return original(lock)

    monkeypatch.setattr(pretraining, "prepare", slow)
    monkeypatch.setattr(pretraining, "_locked", locked)
    made = []
    first = threading.Thread(
        target=lambda: made.append(pretrain("frame_average", NARROW, TINY, "cpu")), daemon=True
    )
    first.start()
    assert busy.wait(60)
    weights, _ = pretrain("frame_average", NARROW, TINY, "cpu")
    first.join()
    assert len(trainings) == 1
    assert all(torch.equal(weights[key], made[0][0][key]) for key in weights)
    monkeypatch.setenv("NLUTILS_CACHE", str(tmp_path / "other"))
    straight, _ = pretrain("frame_average", NARROW, TINY, "cpu")
    assert all(torch.equal(weights[key], straight[key]) for key in straight)


def test_a_training_that_was_killed_goes_on_behind_its_last_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "EPOCHS", 2)
    original, epochs = pretraining.train, []

    def told_to(after_epoch):
        told = functools.partial(original, after_epoch=after_epoch)
        monkeypatch.setattr(pretraining, "train", told)

    def kill(epoch, loss):
        raise KeyboardInterrupt

    told_to(kill)
    with pytest.raises(KeyboardInterrupt):
        pretrain("frame_average", NARROW, TINY, "cpu")
    told_to(lambda epoch, loss: epochs.append(epoch))
    weights, record = pretrain("frame_average", NARROW, TINY, "cpu")
    assert (epochs, len(record["losses"])) == ([1], 2)
    assert not list((tmp_path / "cache").rglob("*.checkpoint"))
    monkeypatch.setenv("NLUTILS_CACHE", str(tmp_path / "other"))
    straight, _ = pretrain("frame_average", NARROW, TINY, "cpu")
    assert all(torch.equal(weights[key], straight[key]) for key in straight)


def test_kept_weights_of_a_2d_network_are_inflated(tmp_path):
    path = kept_run(tmp_path)
    trained = kept_weights(path)[0].state_dict()
    for name, options in (("c3d_small", NARROW), ("c3d_small_non_local", NARROW)):
        weights, _, record = started(path, name, options)
        # Behind the blocks of the second and third stage the layers have moved.
        last = "features.11" if name == "c3d_small" else "features.13"
        torch.testing.assert_close(
            weights[f"{last}.weight"], trained["encoder.11.weight"][:, :, None].expand(-1, -1, 3, -1, -1) / 3
        )
        assert torch.equal(weights["classifier.weight"], trained["classifier.weight"])
        assert (record["kind"], record["inflated"], record["file"]) == ("kept", 4, path.name)
        assert (record["study"], record["run"]) == ("first", "frame_average-fold0-seed0")
        assert record["sha256"] == start_digest(TINY.replace(init=str(path)), 0)
        assert record["drawn"] == ([] if name == "c3d_small" else ["features.7", "features.12"])


def test_a_2d_network_is_trained_on_the_fold_first_and_inflated(tmp_path, trainings):
    """It is the run of `frame_average` on that fold, and it is trained once for all that ask for it."""
    fold0 = kept_weights(kept_run(tmp_path))[0].state_dict()
    before = len(trainings)
    for name, blocks in (("c3d_small", []), ("c3d_small_non_local", ["features.7", "features.12"])):
        weights, _, record = started("inflated", name)
        last = "features.13" if blocks else "features.11"
        torch.testing.assert_close(
            weights[f"{last}.weight"], fold0["encoder.11.weight"][:, :, None].expand(-1, -1, 3, -1, -1) / 3
        )
        assert torch.equal(weights["classifier.weight"], fold0["classifier.weight"])
        assert (record["kind"], record["inflated"], record["drawn"]) == ("inflated", 4, blocks)
        assert (record["clips"], record["epochs"], len(record["losses"])) == (16, 1, 1)
    assert len(trainings) == before + 1
    model = fresh(**NARROW)
    begin(model, "c3d_small", NARROW, TINY.replace(init="inflated"), INPUTS, 1)
    assert not torch.equal(model.state_dict()["classifier.weight"], fold0["classifier.weight"])
    assert len(trainings) == before + 2
    with pytest.raises(ValueError, match="init='inflated': cnn_rnn does not inflate frame_average"):
        begin(fresh("cnn_rnn"), "cnn_rnn", {}, TINY.replace(init="inflated"), INPUTS, 0)


def test_layers_that_a_block_has_moved_are_found(tmp_path):
    """The blocks that a file lacks are drawn; those of another kind, and those too much, are refused."""
    path = kept_run(tmp_path, "c3d_small")
    trained = kept_weights(path)[0].state_dict()
    for stages, blocks, last in (([2, 3], [7, 12], 13), ([3], [11], 12)):
        weights, _, record = started(path, "c3d_small_non_local", {**NARROW, "non_local": stages})
        assert record["drawn"] == [f"features.{place}" for place in blocks]
        assert torch.equal(weights[f"features.{last}.weight"], trained["features.11.weight"])
        assert torch.equal(weights[f"features.{last + 1}.running_var"], trained["features.12.running_var"])
    one = kept_run(tmp_path, "c3d_small_non_local", options={**NARROW, "non_local": [3]})
    block = kept_weights(one)[0].state_dict()["features.11.theta.weight"]
    weights, _, record = started(one, "c3d_small_non_local")
    assert torch.equal(weights["features.12.theta.weight"], block)
    assert record["drawn"] == ["features.7"]
    uniform = {**NARROW, "non_local": [3], "kind": "uniform"}
    with pytest.raises(
        ValueError, match=r"its features\.11 is a NonLocalBlock, that of the network a Uniform"
    ):
        started(one, "c3d_small", uniform)


def test_what_is_only_fitted_has_no_first_weights():
    with pytest.raises(ValueError, match="init='procedural': idt is fitted to all training clips at once"):
        begin(fresh("idt"), "idt", {}, TINY.replace(init="procedural"), INPUTS, 0)


def test_the_clips_of_the_training_on_procedural_ones_are_not_tested(tmp_path, trainings):
    """Whatever their size; and not by weights that started from that training either."""

    def procedural(seed):
        clips = open_clips("procedural", count=60, frames=5, size=(18, 24), seed=seed)
        return prepared(clips, 4, (16, 20), flow=False)

    own = procedural(pretraining.SEED)
    with pytest.raises(ValueError, match=r"'60 clips of six .* has the seed of that training, 1"):
        started("procedural", inputs=own)
    assert trainings == []
    path = kept_run(tmp_path, init="procedural")
    with pytest.raises(
        ValueError, match="has the seed of that training, 1; open the clips with another seed"
    ):
        started(path, inputs=own)
    assert started(path, inputs=procedural(0))[2]["kind"] == "kept"
    relation = replace(own, name="same_action")
    assert started(path, inputs=relation)[2]["kind"] == "kept"


@pytest.fixture
def hears_ctrl_c():
    """Python's own answer to SIGINT, also where the tests run behind `nohup` or `&`, which ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hears_ctrl_c")
def test_who_waits_for_another_hears_ctrl_c(tmp_path, monkeypatch):
    """The signal comes while the lock is another's; the wait is over at once."""
    path = tmp_path / "x.lock"
    monkeypatch.setattr(pretraining, "ATTENTION", 0.05)
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN EXCLUSIVE")
        threading.Timer(0.2, signal.raise_signal, [signal.SIGINT]).start()
        release = threading.Timer(4, other.rollback)
        release.start()
        begun = time.monotonic()
        with pytest.raises(KeyboardInterrupt), pretraining._one_at_a_time(path):
            pass
        release.cancel()
    assert time.monotonic() - begun < 3


def test_a_classifier_of_other_classes_is_left_as_drawn(tmp_path):
    path = kept_run(tmp_path)
    for classes in (("a", "b"), ("a", "b", "c")):
        weights, drawn, record = started(path, inputs=fake_inputs(classes, "others"))
        assert torch.equal(weights["classifier.weight"], drawn["classifier.weight"])
        assert record["drawn"] == ["classifier"]


def test_weights_that_know_the_tested_clips_are_refused(tmp_path):
    """Also those that started from such, and those that know another clip of a source."""
    path = kept_run(tmp_path)
    with pytest.raises(ValueError, match=r"was trained on 'fake02' and 3 more that fold 1 of fake tests"):
        started(path, fold=1)
    kept_run(tmp_path, "c3d_small", 0, fake_inputs(name="others"), init=str(path))
    with pytest.raises(ValueError, match="was trained on 'fake02'"):
        started(tmp_path / "c3d_small-fold0-seed0.pt", fold=1)
    renamed = replace(INPUTS, names=tuple(f"new{i}" for i in range(20)))
    with pytest.raises(ValueError, match="was trained on 'g1'"):
        started(path, inputs=renamed, fold=1)
    state = torch.load(path)
    torch.save({**state, "seen": None}, path)
    with pytest.raises(ValueError, match="does not say which clips"):
        started(path)


def test_each_fold_and_seed_has_its_file(tmp_path):
    path = kept_run(tmp_path, fold=3)
    *_, record = started(tmp_path / "frame_average-fold{fold}-seed{seed}.pt", fold=3)
    assert record["file"] == path.name
    with pytest.raises(FileNotFoundError, match=r"frame_average-fold2-seed1\.pt; relative paths start at"):
        started(tmp_path / "frame_average-fold{fold}-seed{seed}.pt", fold=2, seed=1)
    with pytest.raises(
        FileNotFoundError, match=r"init='proceduraal' is none of '', 'procedural' and 'inflated'"
    ):
        start_digest(TINY.replace(init="proceduraal"), 0)
    assert start_digest(TINY.replace(init="procedural"), 0) == ""


def test_what_is_missing_or_too_much_is_named(tmp_path):
    path = kept_run(tmp_path)
    with pytest.raises(
        ValueError, match=r"cannot start cnn_rnn: it lacks: rnn\.weight_ih_l0, rnn\.weight_hh"
    ):
        started(path, "cnn_rnn", {**NARROW, "hidden": 8})
    path = kept_run(tmp_path, "c3d_small_non_local")
    with pytest.raises(ValueError, match=r"it has too much: features\.7, a NonLocalBlock; give the network"):
        started(path, "c3d_small")
    path = kept_run(tmp_path, "cnn_rnn", options={**NARROW, "hidden": 8})
    with pytest.raises(ValueError, match=r"it has too much: rnn\.weight_ih_l0, "):
        started(path, "frame_average")
    state = torch.load(path)
    state["weights"]["encoder.0.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"its numbers for encoder\.0\.weight are not finite"):
        started(path, "cnn_rnn", {**NARROW, "hidden": 8})


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_resnet_of_images_starts_c2d_and_i3d(tmp_path, wrapped):
    with seeded(1):
        images = with_random_norms(ImageResNet(1000, (1, 1, 1, 1), 4)).state_dict()
    path = tmp_path / "resnet50.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in images.items()}} if wrapped else images, path)
    weights, drawn, record = started(path, "i3d", {**RESNET, "non_local": {"res4": [0]}})
    assert torch.equal(weights["stem.conv.weight"], inflate_kernel(images["conv1.weight"], 5))
    assert torch.equal(weights["stages.3.0.b.norm.running_var"], images["layer4.0.bn2.running_var"])
    block = "stages.2.0.non_local"
    assert (record["kind"], record["drawn"]) == ("images", ["classifier", block])
    for key in ("classifier.weight", f"{block}.theta.weight"):
        assert torch.equal(weights[key], drawn[key])
    flow, _, record = started(path, "c2d", {**RESNET, "input": "flow"})
    assert record["averaged"] == ["stem.conv.weight"]
    torch.testing.assert_close(flow["stem.conv.weight"][:, 1, 0], images["conv1.weight"].mean(dim=1))
    thousand = fake_inputs([str(i) for i in range(1000)])
    weights, _, record = started(path, "c2d", RESNET, inputs=thousand)
    assert record["drawn"] == []
    assert torch.equal(weights["classifier.bias"], images["fc.bias"])
    with pytest.raises(ValueError, match="goes into c2d and i3d, not into a C3DSmall"):
        started(path)
    del images["layer2.0.bn1.weight"]
    torch.save({**images, "layer2.0.se.weight": torch.zeros(1)}, path)
    with pytest.raises(
        ValueError, match=r"it lacks: stages\.1\.0\.a\.norm\.weight; it has too much: layer2\.0\.se\.weight"
    ):
        started(path, "i3d", RESNET)


@pytest.mark.parametrize("scheme", ["caffe2", "slowfast"])
def test_published_weights_start_the_network_and_its_inflation(tmp_path, scheme):
    with seeded(2):
        flat = with_random_norms(create_model("c2d", 400, layout="slowfast", clip="8x8", **RESNET))
    arrays = to_checkpoint(flat, scheme)
    path = tmp_path / "weights"
    if scheme == "caffe2":  # 2D kernels, as of the files of images
        arrays = {key: value.squeeze(2) if value.ndim == 5 else value for key, value in arrays.items()}
        path.write_bytes(
            pickle.dumps({"blobs": {**arrays, "conv1_w_momentum": arrays["conv1_w"]}}, protocol=2)
        )
    else:
        torch.save({"model_state": {key: torch.tensor(value) for key, value in arrays.items()}}, path)
    options = {**RESNET, "layout": "slowfast", "clip": "8x8"}
    for name in ("c2d", "i3d"):
        weights, drawn, record = started(path, name, options)
        theirs, frames = flat.state_dict(), 1 if name == "c2d" else 5
        expected = inflate_kernel(theirs["stem.conv.weight"], frames)
        assert torch.equal(weights["stem.conv.weight"], expected)
        assert torch.equal(weights["stages.1.0.c.norm.bias"], theirs["stages.1.0.c.norm.bias"])
        assert torch.equal(weights["classifier.weight"], drawn["classifier.weight"])
        assert (record["kind"], record["scheme"], record["drawn"]) == ("published", scheme, ["classifier"])
        assert (record["inflated"] > 0) == (name == "i3d")
        json.dumps(record)
    *_, record = started(path, "c2d", options, inputs=fake_inputs([str(i) for i in range(400)]))
    assert record["drawn"] == []
    *_, record = started(path, "i3d", {**options, "non_local": {"res3": [0]}})
    assert record["drawn"] == ["classifier", "stages.1.0.non_local"]
    with pytest.raises(ValueError, match="the model is a C3DSmall"):
        started(path)


def test_files_of_other_kinds_are_refused(tmp_path):
    path = tmp_path / "numbers.pt"
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"numbers\.pt cannot start c3d_small: none of the keys is that of"):
        started(path)
    path.write_bytes(b"half a file")
    with pytest.raises(ValueError, match="cannot be read"):
        started(path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ValueError, match="cannot be read"):
        started(tmp_path / "array.npy")


def test_the_digest_of_a_file_follows_its_bytes(tmp_path):
    path = tmp_path / "first.pt"
    path.write_bytes(b"one")
    before = start_digest(TINY.replace(init=str(path)), 0)
    path.write_bytes(b"two")
    assert start_digest(TINY.replace(init=str(path)), 0) != before
