"""What Keras does not do is refused before a row of PyTorch has trained."""

import pytest
from test_study_training import SMALL, TINY

from nlutils.course import import_keras

keras = import_keras("tensorflow")

from nlutils.study import Entry  # noqa: E402
from nlutils.study.checks import check_study  # noqa: E402

NARROW = {"widths": [4, 4, 8, 8]}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (Entry("c3d_small", NARROW, {"compile": True}, framework="keras"), "compile=True is PyTorch's"),
        (Entry("c3d_small", NARROW, {"precision": "bfloat16"}, framework="keras"), "'bfloat16' is PyTorch's"),
        (Entry("c3d_small", {**NARROW, "kind": "uniform"}, framework="keras"), "kind='uniform' is not known"),
        (
            Entry("lrcn", {"width": 8, "fc6": 4, "hidden": 4, "size": (49, 49)}, framework="keras"),
            "own; train",
        ),
    ],
)
def test_rows_that_keras_cannot_train(entry, message):
    recipe = TINY.replace(size=(49, 49), resize=(49, 49)) if entry.model == "lrcn" else TINY
    with pytest.raises(ValueError, match=f"row 'keras' cannot be trained: .*{message}"):
        check_study("both", {"2d": SMALL["2d"], "keras": entry}, recipe=recipe)


def test_rows_that_keras_can_train():
    entry = Entry("c3d_small_non_local", NARROW, framework="keras")
    assert list(check_study("both", {"keras": entry}, recipe=TINY)[0]) == ["keras"]


def test_another_backend(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ValueError, match="row 'keras' cannot be trained: Keras runs on 'jax'"):
        check_study("both", {"keras": Entry("c3d_small", NARROW, framework="keras")}, recipe=TINY)
