"""The Keras block: against the block in NumPy, in graphs, files and training, on three backends."""

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from nlutils import reference
from nlutils.exchange import to_arrays
from nlutils.instantiations import INSTANTIATIONS
from nlutils.keras import NonLocalBlock

SIZES = {1: (7,), 2: (5, 4), 3: (2, 5, 3)}


def randomise(block):
    """Set all weights and statistics far from their start."""
    rng = np.random.default_rng(1)
    for variable in block.weights:
        low = 0.5 if variable.name == "moving_variance" else -1.0
        variable.assign(low + 2 * rng.random(variable.shape))
    return block


def random_block(shape, *arguments, dtype="float64", **options):
    block = NonLocalBlock(*arguments, dtype=dtype, **options)
    block.build(shape)
    return randomise(block)


def features(*shape):
    return np.random.default_rng(2).normal(size=shape)


def numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


@pytest.mark.parametrize("subsample", [None, "before", "after"])
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_equals_the_reference_block(instantiation, ndim, subsample):
    x = features(2, *SIZES[ndim], 6)
    scale = instantiation in ("gaussian", "embedded_gaussian")
    block = random_block(
        x.shape, None, 4, ndim=ndim, instantiation=instantiation, subsample=subsample, scale=scale
    )
    weights = to_arrays(block)
    expected = [
        reference.non_local_block(
            np.moveaxis(sample, -1, 0), weights, instantiation, subsample=subsample, scale=scale
        )
        for sample in x
    ]
    np.testing.assert_allclose(numpy(block(x)), np.moveaxis(np.stack(expected), 1, -1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_starts_as_the_identity(instantiation, norm):
    x = features(2, 2, 4, 3, 6).astype("float32")
    np.testing.assert_array_equal(numpy(NonLocalBlock(instantiation=instantiation, norm=norm)(x)), x)
    np.testing.assert_array_equal(
        numpy(NonLocalBlock(instantiation=instantiation, norm=norm)(x, training=True)), x
    )
    assert not np.array_equal(numpy(NonLocalBlock(zero_init=False, norm=norm)(x)), x)


def test_start_and_number_of_the_weights():
    keras.utils.set_random_seed(0)
    block = NonLocalBlock(instantiation="concatenation", zero_init=False)
    block.build((None, None, None, None, 512))
    for name in ("theta", "phi", "g", "w_z"):
        layer = getattr(block, name)
        assert numpy(layer.kernel).std() == pytest.approx(0.01, rel=0.02)
        assert not numpy(layer.bias).any()
    assert block.w_f.shape == (512,)
    assert numpy(block.w_f).std() == pytest.approx(0.01, rel=0.2)
    assert not np.array_equal(numpy(block.theta.kernel), numpy(block.phi.kernel))
    assert (block.norm.epsilon, block.norm.momentum) == (1e-5, 0.9)
    assert sum(int(np.prod(variable.shape)) for variable in block.trainable_variables) == 526_592 + 512


@pytest.mark.parametrize(
    "options",
    [
        {"attention": "space", "subsample": "before"},
        {"attention": "space", "subsample": "after"},
        {"frames_per_group": 2, "subsample": "before"},
        {"attention": "time"},
        {"attention": "time", "frames_per_group": 3},
    ],
    ids=str,
)
def test_attention_within_slices_is_a_loop_over_them(options):
    x = features(2, 6, 2, 3, 4)
    block = random_block(x.shape, **options)
    everywhere = random_block(x.shape, subsample=options.get("subsample"))
    over_time = options.get("attention") == "time"
    frames = 1 if options.get("attention") == "space" else options.get("frames_per_group", 6)
    expected = np.empty_like(x)
    for t in range(0, 6, frames):
        for h, w in np.ndindex(2, 3) if over_time else [(slice(None), slice(None))]:
            h, w = (slice(h, h + 1), slice(w, w + 1)) if over_time else (h, w)
            here = (slice(None), slice(t, t + frames), h, w)
            expected[here] = numpy(everywhere(x[here]))
    np.testing.assert_allclose(numpy(block(x)), expected, rtol=0, atol=1e-12)
    assert not np.allclose(numpy(everywhere(x)), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"instantiation": "dot_product", "subsample": "before"},
        {"instantiation": "concatenation", "subsample": "after", "frames_per_group": 3},
        {"subsample": "before", "attention": "space"},
        {"instantiation": "gaussian", "attention": "time"},
    ],
    ids=str,
)
def test_a_graph_that_leaves_all_sizes_open(options):
    inputs = keras.Input((None, None, None, 4), dtype="float64")
    block = NonLocalBlock(dtype="float64", **options)
    model = keras.Model(inputs, block(inputs))
    assert model.output_shape == (None, None, None, None, 4)
    randomise(block)
    step = tf.function(model, input_signature=[tf.TensorSpec((None, None, None, None, 4), tf.float64)])
    for size in ((3, 5, 4), (3, 1, 1)):
        x = features(2, *size, 4)
        np.testing.assert_allclose(numpy(step(x)), numpy(block(x)), rtol=0, atol=1e-12)


def test_file_round_trip(tmp_path):
    options = {
        "instantiation": "concatenation",
        "subsample": "after",
        "attention": "space",
        "norm": True,
        "ndim": 3,
    }
    model = keras.Sequential([keras.Input((2, 4, 4, 6)), NonLocalBlock(6, 4, **options, name="relations")])
    block = randomise(model.layers[0])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    x = features(2, 2, 4, 4, 6).astype("float32")
    np.testing.assert_array_equal(numpy(loaded(x)), numpy(model(x)))
    assert loaded.layers[0].get_config() == block.get_config()
    assert (
        block.get_config().items()
        >= {**options, "in_channels": 6, "inner_channels": 4, "name": "relations"}.items()
    )


def test_every_parameter_learns_in_fit():
    keras.utils.set_random_seed(0)
    block = NonLocalBlock(ndim=2, instantiation="dot_product", subsample="before", norm=False)
    model = keras.Sequential(
        [keras.Input((4, 5, 6)), block, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(1)]
    )
    model.compile(keras.optimizers.SGD(0.5), "mse")
    start = [numpy(variable).copy() for variable in block.trainable_variables]
    # The first step moves W_z only, for it is 0; the second moves the others.
    model.fit(features(8, 4, 5, 6), features(8, 1), epochs=2, batch_size=8, verbose=0)
    unmoved = [
        variable.path
        for variable, old in zip(block.trainable_variables, start, strict=True)
        if np.array_equal(variable, old)
    ]
    assert unmoved == []


def test_mixed_precision_computes_in_bfloat16():
    x = features(1, 2, 4, 4, 6).astype("float32")
    for instantiation in INSTANTIATIONS:
        rough = random_block(x.shape, instantiation=instantiation, dtype="mixed_bfloat16")
        exact = random_block(x.shape, instantiation=instantiation, dtype="float32")
        y = rough(x)
        assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
        error = np.linalg.norm(numpy(y).astype("float32") - numpy(exact(x))) / np.linalg.norm(numpy(exact(x)))
        assert 0 < error < 0.05  # bfloat16 keeps 8 bits: 0.4 % a rounding


OTHER_BACKEND = """
import sys
import keras, numpy as np
from nlutils import reference
from nlutils.exchange import to_arrays
from nlutils.instantiations import INSTANTIATIONS
from nlutils.keras import NonLocalBlock

assert "tensorflow" not in sys.modules
rng = np.random.default_rng(0)
x = rng.normal(size=(1, 2, 5, 4, 6)).astype("float32")
largest = 0
for instantiation in INSTANTIATIONS:
    block = NonLocalBlock(6, 4, instantiation=instantiation, subsample="before")
    block.build(x.shape)
    for variable in block.weights:
        low = 0.5 if variable.name == "moving_variance" else -0.5
        variable.assign(rng.uniform(low, low + 1, variable.shape))
    z = np.moveaxis(keras.ops.convert_to_numpy(block(x))[0], -1, 0)
    sample, weights = np.moveaxis(x[0], -1, 0), to_arrays(block)
    expected = reference.non_local_block(sample, weights, instantiation, subsample="before")
    largest = max(largest, np.abs(z - expected).max())
block = NonLocalBlock(subsample="before", attention="space")
model = keras.Sequential([keras.Input((2, 1, 1, 6)), block, keras.layers.Flatten(), keras.layers.Dense(1)])
model.compile("sgd", "mse")
model.fit(rng.normal(size=(2, 2, 1, 1, 6)), np.zeros((2, 1)), verbose=0)
print(keras.backend.backend(), largest < 3e-6, largest)
"""


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_other_backends(backend):
    # In float32: on these two backends Keras computes parts of a float64 layer in float32 anyway.
    environment = {**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", OTHER_BACKEND]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout.startswith(f"{backend} True"), result.stdout + result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": -1}, "in_channels=-1 must be a whole number, 1 or more"),
        ({"ndim": 0}, "ndim=0 is not known; use one of 1, 2, 3"),
        ({"instantiation": "dot"}, "instantiation='dot' is not known"),
        ({"subsample": "max"}, "subsample='max' is not known; use one of None, 'before', 'after'"),
        (
            {"scale": True, "instantiation": "concatenation"},
            "scale=True does not apply to instantiation='concatenation'",
        ),
        ({"attention": "time", "subsample": "before"}, "subsample='before' pools over space"),
        ({"frames_per_group": 2, "ndim": 1}, "frames_per_group=2 needs ndim=3"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        NonLocalBlock(**options)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({}, (2, 4, 4, 8), r"x of shape \(2, 4, 4, 8\) must have the axes \(B, T, H, W, C\), because ndim=3"),
        (
            {"in_channels": 8, "ndim": 2},
            (2, 8, 4, 4),
            r"\(2, 8, 4, 4\) has 4 channels; the block has in_channels=8",
        ),
        ({"frames_per_group": 4}, (2, 6, 4, 4, 8), "has 6 frames; frames_per_group=4 must divide them"),
        ({"ndim": 2}, (2, 0, 4, 8), r"x of shape \(2, 0, 4, 8\) has no position"),
    ],
)
def test_bad_maps_are_named(options, shape, message):
    with pytest.raises(ValueError, match=message):
        NonLocalBlock(**options)(np.zeros(shape))


def test_unknown_channels_are_named():
    with pytest.raises(ValueError, match="must have a known number of channels"):
        NonLocalBlock(ndim=1)(keras.Input((4, None)))
