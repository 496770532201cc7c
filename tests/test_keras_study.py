"""Networks that Keras trains for the study: PyTorch's batches, steps and records."""

from importlib.metadata import version

import numpy as np
import pytest
import torch

from nlutils.course import import_keras

keras = import_keras("tensorflow")

import nlutils.keras.models  # noqa: E402
from nlutils.exchange import to_arrays, torch_to_keras  # noqa: E402
from nlutils.study import (  # noqa: E402
    Entry,
    Inputs,
    Recipe,
    keras_fold,
    keras_train,
    read_runs,
    run_fold,
    run_study,
    seeded,
    train,
    write_run,
)
from nlutils.study import evaluate as evaluate_torch  # noqa: E402
from nlutils.study.weights import kept_weights  # noqa: E402
from nlutils.torch import create_model  # noqa: E402

torch.set_num_threads(1)
TINY = Recipe(epochs=3, batch=4, warmup=1, frames=4, resize=(18, 20), size=(16, 16), input="rgb")
OPTIONS = {"widths": [4, 4, 8, 8], "dropout": 0.0}


def noise(count=18) -> Inputs:
    """Noise that is brighter for class 1: two clips a group, three folds; 12 clips to train on."""
    rng = np.random.default_rng(0)
    frames = (
        rng.integers(0, 200, (count, 3, 5, 18, 20)) + 50 * (np.arange(count) % 2)[:, None, None, None, None]
    )
    return Inputs(
        name="noise",
        source="clips of noise",
        classes=("dark", "bright"),
        names=tuple(f"clip{i:02d}" for i in range(count)),
        groups=tuple(f"g{i // 2}" for i in range(count)),
        labels=torch.arange(count) % 2,
        folds=torch.arange(count) // 2 % 3,
        frames=torch.from_numpy(frames.astype(np.uint8)),
        flow=torch.from_numpy(rng.integers(-20, 20, (count, 2, 4, 18, 20)).astype(np.int8)),
    )


@pytest.fixture(scope="module")
def inputs():
    return noise()


class Double(Inputs):
    """Inputs whose batches are in float64."""

    def batch(self, *args, **kwargs):
        return super().batch(*args, **kwargs).double()


def both(name="c3d_small", **options):
    """PyTorch's network as the study draws it, and Keras' with its weights."""
    with seeded(TINY.seed):
        theirs = create_model(name, 2, **OPTIONS | options)
    ours = nlutils.keras.models.create_model(name, 2, **OPTIONS | options)
    return theirs, ours


def test_the_same_steps_as_pytorch_in_float64(inputs, float64):
    """Nine steps: order, crops, mirrors, shuffled time, rates, those of blocks, decay."""
    theirs, ours = both("c3d_small_non_local", input="flow")
    torch_to_keras(theirs.double(), ours)
    there = Double(**vars(inputs))
    recipe = TINY.replace(input="flow", block_lr=0.3, weight_decay=0.1, time="shuffled")
    picks = torch.arange(12)
    losses = train(theirs, there, picks, recipe)
    found = keras_train.train(ours, "flow", there, picks, recipe)
    assert found == pytest.approx(losses, rel=1e-6)  # Keras' mean is in float32
    wanted, trained = to_arrays(theirs), to_arrays(ours)
    # No loss depends on these: their gradients are rounding, whose sign AdamW follows. The running mean
    # behind w_z sees its bias; the running variance is the unbiased one in PyTorch only.
    free = ("w_z.bias", "g.bias", "phi.bias", "norm.running_mean", "running_var")
    for name, array in wanted.items():
        if not name.endswith(free):
            np.testing.assert_allclose(trained[name], array, rtol=0, atol=1e-7, err_msg=name)


def test_the_same_losses_as_pytorch_in_float32(inputs):
    """Two epochs of 4, 4 and 3 clips; smoothed labels."""
    theirs, ours = both(input="rgb")
    torch_to_keras(theirs, ours)
    picks, recipe = torch.arange(11), TINY.replace(epochs=2, label_smoothing=0.2)
    losses = train(theirs, inputs, picks, recipe)
    assert keras_train.train(ours, "rgb", inputs, picks, recipe) == pytest.approx(losses, rel=2e-4)
    torch_to_keras(theirs, ours)  # the running variances, too
    for told in (recipe, recipe.replace(test_flip=True, time="reversed")):
        expected = evaluate_torch(theirs, inputs, picks, told)
        torch.testing.assert_close(
            keras_train.evaluate(ours, "rgb", inputs, picks, told), expected, rtol=0, atol=1e-5
        )


class Killed(Exception):
    pass


def test_a_resumed_run_equals_an_uninterrupted_one(inputs, tmp_path):
    path, picks = tmp_path / "run.pt", torch.arange(8)
    _, straight = both(dropout=0.5)
    start = straight.get_weights()
    losses = keras_train.train(straight, "rgb", inputs, picks, TINY)

    def kill(epoch, loss):
        if epoch == 1:
            raise Killed

    _, model = both(dropout=0.5)
    model.set_weights(start)
    with pytest.raises(Killed):
        keras_train.train(model, "rgb", inputs, picks, TINY, checkpoint=path, after_epoch=kill)
    seen = []
    _, resumed = both(dropout=0.5)
    again = keras_train.train(
        resumed,
        "rgb",
        inputs,
        picks,
        TINY,
        checkpoint=path,
        after_epoch=lambda epoch, loss: seen.append(epoch),
    )
    assert seen == [2]
    assert again == losses
    for mine, other in zip(resumed.get_weights(), straight.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, other)
    with pytest.raises(ValueError, match=r"run\.pt is a checkpoint of another recipe"):
        keras_train.train(resumed, "rgb", inputs, picks, TINY.replace(lr=1.0), checkpoint=path)
    _, other = both("c3d_small_non_local")
    with pytest.raises(ValueError, match=r"run\.pt is not a checkpoint of this network"):
        keras_train.train(other, "rgb", inputs, picks, TINY, checkpoint=path)
    path.write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"run\.pt is not a checkpoint"):
        keras_train.train(resumed, "rgb", inputs, picks, TINY, checkpoint=path)


def test_a_run_is_recorded_as_pytorch_records_it(inputs, tmp_path):
    recipe = TINY.replace(epochs=1)
    told = {"options": OPTIONS, "study": "both"}
    theirs = run_fold(inputs, "c3d_small", 0, recipe, device="cpu", **told)
    torch.manual_seed(5)
    run = keras_fold.run_keras_fold(inputs, "c3d_small", 0, recipe, keep=tmp_path / "kept.pt", **told)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))  # the global generator is left alone
    assert run.run == "keras_c3d_small-fold0-seed0"
    same = (
        "study",
        "model",
        "options",
        "input",
        "fold",
        "seed",
        "recipe",
        "data",
        "classes",
        "names",
        "groups",
    )
    for field in (*same, "labels", "start"):
        assert getattr(run, field) == getattr(theirs, field), field
    assert run.losses == pytest.approx(theirs.losses, rel=1e-3)
    assert run.accuracy == np.mean(run.right)
    assert run.views.keys() == theirs.views.keys()
    assert all(len(named) == 6 and set(named) <= {0, 1} for named in run.views.values())
    assert run.cost.keys() == theirs.cost.keys()
    for counted in ("parameters", "multiply_adds"):
        assert run.cost[counted] == theirs.cost[counted]
    assert run.cost["forward_ms"] > 0
    assert run.cost["training_mb"] is None
    assert run.provenance["versions"]["keras"] == version("keras")
    assert run.provenance["versions"]["tensorflow"]
    assert run.provenance.keys() == theirs.provenance.keys()
    write_run(run, tmp_path)
    assert read_runs("both", tmp_path) == [run]
    model, kept = kept_weights(tmp_path / "kept.pt")
    assert kept["run"] == run.run
    assert {clip for _, clip, _ in kept["seen"]} == set(inputs.names) - set(run.names)
    scores = evaluate_torch(model, inputs, inputs.split(0)[1], recipe)
    np.testing.assert_allclose(scores, run.logits, atol=1e-3)


def test_what_keras_cannot_do_here_is_said(inputs, monkeypatch):
    def run(name="c3d_small", options=OPTIONS, **changes):
        keras_fold.run_keras_fold(inputs, name, 0, TINY.replace(**changes), options=options)

    with pytest.raises(ValueError, match="name='frame_average' is not known"):
        run("frame_average")
    with pytest.raises(ValueError, match="kind='uniform' is not known"):
        run(options=OPTIONS | {"kind": "uniform"})
    with pytest.raises(ValueError, match=r"name='lrcn': in Keras the study trains .* a loss of its own"):
        run("lrcn", {"width": 8, "fc6": 4, "hidden": 4, "size": (49, 49)})
    with pytest.raises(ValueError, match="precision='bfloat16' is PyTorch's; in Keras use 'float32'"):
        run(precision="bfloat16")
    with pytest.raises(ValueError, match="compile=True is PyTorch's; in Keras use False"):
        run(compile=True)
    with monkeypatch.context() as patch:
        patch.setattr(keras.backend, "backend", lambda: "jax")
        with pytest.raises(ValueError, match="Keras runs on 'jax'"):
            run()
    monkeypatch.setattr(keras_fold.distributed, "count", lambda: 2)
    with pytest.raises(ValueError, match="2 processes train each run together"):
        run()


def test_diverging_training_says_so(inputs):
    _, ours = both()
    with pytest.raises(FloatingPointError, match="lower lr="):
        keras_train.train(ours, "rgb", inputs, torch.arange(8), TINY.replace(lr=1e30, warmup=0))


def test_a_study_has_rows_of_both_frameworks(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("NLUTILS_CACHE", str(tmp_path / "cache"))
    rows = {name: Entry("c3d_small", OPTIONS, framework=name) for name in ("torch", "keras")}
    told = {"models": rows, "folds": [0], "clips": inputs, "recipe": TINY.replace(epochs=1)}
    runs = run_study("both", **told, root=tmp_path, device="cpu", log=lambda line: None)
    assert [(run.run, run.framework) for run in runs] == [
        ("keras-fold0-seed0", "keras"),
        ("torch-fold0-seed0", "torch"),
    ]
    assert run_study("both", **told, root=tmp_path, device="cpu", log=lambda line: None) == runs
    told["models"] = {"keras": Entry("c3d_small", OPTIONS)}
    with pytest.raises(ValueError, match="recorded with other settings"):
        run_study("both", **told, root=tmp_path, device="cpu", log=lambda line: None)
    for wrong in (Entry("cnn_rnn", framework="keras"), Entry("c3d_small", framework="jax")):
        with pytest.raises(ValueError, match=r"name='cnn_rnn'|framework='jax'"):
            run_study("both", {"wrong": wrong}, [0], clips=inputs, recipe=TINY, root=tmp_path)
