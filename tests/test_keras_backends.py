"""The Keras networks on the other backends: what TensorFlow saved, PyTorch's scores, a step of training."""

import os
import subprocess
import sys

import pytest

from nlutils.course import import_keras

import_keras("tensorflow")

from nlutils.keras import create_model  # noqa: E402

# name, options, shape of a clip for each input; the last one is trained
CASES = [
    (
        "i3d",
        {"depth": (1, 1, 1, 1), "width": 4, "non_local": {"res3": [0]}, "cgnl": {"res4": [0]}},
        [(8, 24, 24, 3)],
    ),
    ("c3d", {"width": 4, "fc": 16, "frames": 8, "size": (32, 32)}, [(8, 32, 32, 3)]),
    ("lrcn", {"width": 8, "fc6": 16, "hidden": 8, "size": (49, 60)}, [(4, 49, 60, 3)]),
    (
        "two_stream",
        {"width": 6, "size": (41, 48), "stack": 2, "dropout": 0.0},
        [(5, 41, 48, 3), (4, 41, 48, 2)],
    ),
]

SCRIPT = """
import keras, numpy as np
import nlutils.keras

networks = {name: keras.models.load_model(path) for name, path in SAVED.items()}
print("loaded", *networks)

import nlutils.torch
from nlutils.exchange import torch_to_keras
import torch

torch.set_num_threads(1)
torch.manual_seed(0)
rng = np.random.default_rng(0)
for name, options, shapes in CASES:
    theirs = nlutils.torch.create_model(name, 3, **options).eval()
    for weight in theirs.parameters():
        torch.nn.init.normal_(weight, std=(2 / weight[0].numel()) ** 0.5 if weight.ndim > 1 else 0.3)
    ours = networks.get(name) or nlutils.keras.create_model(name, 3, **options)
    torch_to_keras(theirs, ours)
    clips = [rng.normal(size=(2, *shape)).astype("float32") for shape in shapes]
    tensors = [torch.from_numpy(clip).movedim(-1, 1) for clip in clips]
    pick = lambda parts, many: many(parts) if len(parts) > 1 else parts[0]
    expected = theirs(pick(tensors, tuple)).detach().numpy()
    found = ours.predict_on_batch(pick(clips, list))
    error = np.abs(found - expected).max() / np.ptp(expected, axis=0).min()
    print(name, "same" if error < 1e-3 else error, flush=True)

ours.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
before = [keras.ops.convert_to_numpy(weight) for weight in ours.trainable_weights]
ours.train_on_batch(pick(clips, list), np.array([0, 1]))
after = [keras.ops.convert_to_numpy(weight) for weight in ours.trainable_weights]
trained = all(np.isfinite(new).all() and (new != old).any() for old, new in zip(before, after))
print("trained" if trained else "not trained")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Files of networks that have, together, all layers that are not Keras' own."""
    folder = tmp_path_factory.mktemp("saved")
    paths = {}
    for name, options, _ in (CASES[0], CASES[3]):
        paths[name] = str(folder / f"{name}.keras")
        create_model(name, 3, **options).save(paths[name])
    return paths


@pytest.mark.parametrize(
    ("backend", "names"),
    [("torch", ("i3d", "c3d", "lrcn", "two_stream")), ("jax", ("i3d", "lrcn", "two_stream"))],
)
def test_other_backends(backend, names, saved):
    """`import nlutils.keras` is enough to load the files."""
    environment = {**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiling takes nearly all the time
    cases = [case for case in CASES if case[0] in names]
    command = [sys.executable, "-c", f"CASES, SAVED = {cases!r}, {saved!r}\n{SCRIPT}"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    expected = ["loaded i3d two_stream", *(f"{name} same" for name in names), "trained"]
    assert result.stdout.splitlines() == expected, result.stdout + result.stderr[-3000:]
