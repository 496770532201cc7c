"""One run in Keras: `nlutils.study.run_fold` with the network trained, tested and timed by Keras.

PyTorch draws the weights that it starts with, so that both frameworks start at the same place. Nothing else
of the study imports Keras: this module is imported when a row asks for it.
"""

import os
import statistics
import time
from collections.abc import Mapping

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow reads it when it is imported

import keras
import tensorflow as tf
import torch

import nlutils.keras.models
from nlutils.exchange import keras_to_torch, torch_to_keras
from nlutils.study import cost, distributed
from nlutils.study.fold import full_options
from nlutils.study.inputs import Inputs
from nlutils.study.keras_train import channels_last, check_recipe, evaluate, train
from nlutils.study.outcome import clips_seen, outcome
from nlutils.study.provenance import code_digest, provenance
from nlutils.study.recipe import Recipe
from nlutils.study.results import Run
from nlutils.study.start import begin
from nlutils.study.stopwatch import Stopwatch
from nlutils.study.train import seeded
from nlutils.study.weights import keep_weights
from nlutils.torch.models import create_model
from nlutils.torch.models.common import VideoClassifier

__all__ = ["check_keras", "run_keras_fold"]

HOW = (
    "one clip forward: multiply-adds of convolutions and matrix products, counted by PyTorch in its network "
    "of the same layers; forward_ms: median of Keras' predict_on_batch, on a CPU processor time of the "
    "process, on a GPU wall time; training_mb: not measured, TensorFlow does not count a CPU's memory"
)


def check_keras(name: str, options: Mapping, recipe: Recipe, threads: int) -> None:
    """Raise what `run_keras_fold` refuses, but for what depends on the clips; `options` are full ones.

    The network is made once, for which TensorFlow begins, with `threads` threads.
    """
    _check_processes_and_backend()
    check_recipe(recipe)
    _limit_threads(threads)
    _twins(name, 2, options, recipe)


def run_keras_fold(
    inputs: Inputs,
    name: str,
    fold,
    recipe: Recipe,
    *,
    study: str = "untitled",
    row: str | None = None,
    options: Mapping | None = None,
    checkpoint=None,
    progress: bool = False,
    keep=None,
) -> Run:
    """Train the network `name` of `nlutils.keras` on all folds but `fold`, test it on `fold`.

    Arguments and result are those of `nlutils.study.run_fold`, but the device is the one that TensorFlow
    chooses; the row is called `keras_<name>` unless named. TensorFlow gets as many threads as PyTorch has,
    which a process can tell it only before it computes: later it keeps those that it has, and they are
    recorded. `keep` is a path that the trained weights are written to as those of PyTorch's network, for
    `nlutils predict`. The recorded cost is what `HOW` says; `training_mb` is None.

    Raises ValueError for networks that Keras does not have, or whose loss is not the cross-entropy of their
    class scores; for another Keras backend than TensorFlow; for several processes that train together; and as
    `train` and `begin` do.
    """
    _check_processes_and_backend()
    _limit_threads(torch.get_num_threads())
    source = _provenance()  # taken first: the files may change while the run goes on
    options = full_options(name, options, recipe)
    train_on, test_on = inputs.split(fold)
    inputs = inputs.to("cpu")
    model, twin = _twins(name, len(inputs.classes), options, recipe)
    begun = begin(twin, name, options, recipe, inputs, fold, progress=progress)
    torch_to_keras(twin, model)
    told = {"checkpoint": checkpoint, "progress": progress, "watch": (watch := Stopwatch())}
    losses = train(model, twin.input, inputs, train_on, recipe, **told)
    result = outcome(
        inputs,
        fold,
        recipe,
        row=row or f"keras_{name}",
        input=twin.input,
        losses=losses,
        trained=watch.read(),
        scores=lambda time: evaluate(model, twin.input, inputs, test_on, recipe, time),
        measure=lambda: _cost(model, twin, inputs.batch(twin.input, test_on[:1], recipe.size)),
        study=study,
        model=name,
        options=options,
        provenance=source,
        start=begun.record,
        framework="keras",
    )
    if keep is not None:
        keras_to_torch(model, twin)
        keep_weights(keep, twin, result, [*begun.seen, *clips_seen(inputs, train_on)])
    return result


def _twins(name, classes, options, recipe) -> tuple[keras.Model, VideoClassifier]:
    """The network in Keras and in PyTorch; PyTorch's has the weights that `run_fold` draws."""
    model = nlutils.keras.models.create_model(name, classes, **options)
    with seeded(recipe.seed):
        twin = create_model(name, classes, **options)
    if type(twin).loss is not VideoClassifier.loss or twin.second_stage:
        raise ValueError(
            f"name={name!r}: in Keras the study trains networks by the cross-entropy of their class scores, "
            "and this one has a loss of its own; train it with PyTorch"
        )
    return model, twin


def _check_processes_and_backend():
    if distributed.count() > 1:
        raise ValueError(
            f"{distributed.count()} processes train each run together, which Keras does not here; "
            "start without torchrun"
        )
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            f"Keras runs on {keras.backend.backend()!r}, and the study trains it on 'tensorflow'; "
            "set KERAS_BACKEND=tensorflow and start Python again"
        )


def _limit_threads(count):
    try:
        tf.config.threading.set_intra_op_parallelism_threads(count)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    except RuntimeError:  # TensorFlow has begun, and says so only in this way
        pass


def _provenance():
    """As `provenance` says, with Keras, TensorFlow and the threads of that."""
    source = provenance(torch.device("cpu"))
    machine = {
        **source["machine"],
        "threads": tf.config.threading.get_intra_op_parallelism_threads() or os.cpu_count(),
    }
    if gpus := _gpus():
        machine |= {"device": "gpu", "gpu": tf.config.experimental.get_device_details(gpus[0])["device_name"]}
    versions = {"keras": keras.__version__, "tensorflow": tf.__version__}
    return {
        **source,
        "code": code_digest("keras"),
        "versions": {**source["versions"], **versions},
        "machine": machine,
    }


def _gpus():
    return tf.config.list_physical_devices("GPU")


def _cost(model, twin, x):
    return {
        "parameters": cost.parameters(twin),
        "multiply_adds": cost.multiply_adds(twin, x),
        "forward_ms": round(_forward_milliseconds(model, channels_last(x)), 2),
        "training_mb": None,
        "how": HOW,
    }


def _forward_milliseconds(model, x, repeats: int = 9) -> float:
    """As `cost.forward_milliseconds`, with `predict_on_batch`, which waits for its result on a GPU too."""
    clock = time.perf_counter if _gpus() else time.process_time
    times = []
    for _ in range(repeats + 2):
        start = clock()
        model.predict_on_batch(x)
        times.append(clock() - start)
    return 1000 * statistics.median(times[2:])
