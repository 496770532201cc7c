"""The Keras operations against the reference sums, and what they say to wrong arguments."""

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import contextlib
import math
import subprocess
import sys
import warnings
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from nlutils import reference
from nlutils.instantiations import INSTANTIATIONS, SOFTMAX_FORMS
from nlutils.keras import non_local, pairwise
from nlutils.keras.operations import concatenation, softmax

# (B, N, M, d, c): sub-sampled, M > N, single positions, width 1, odd sizes, c = d and c != d
SHAPES = [
    (2, 6, 6, 4, 4),
    (1, 8, 2, 3, 5),
    (3, 5, 7, 2, 1),
    (2, 1, 9, 4, 3),
    (2, 9, 1, 3, 4),
    (1, 1, 1, 1, 1),
    (1, 3, 5, 1, 7),
]


def operands(shape, instantiation):
    """theta, phi, g, w_f (None unless concatenation) in float64, drawn from N(0, 1)."""
    batch, queries, keys, width, channels = shape
    rng = np.random.default_rng(0)
    sizes = [(batch, queries, width), (batch, keys, width), (batch, keys, channels), (2 * width,)]
    theta, phi, g, w_f = (rng.normal(size=size) for size in sizes)
    return theta, phi, g, w_f if instantiation == "concatenation" else None


def tensors(*arrays, dtype="float64"):
    return [None if array is None else ops.convert_to_tensor(array, dtype=dtype) for array in arrays]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_equals_the_reference(instantiation, shape):
    theta, phi, g, w_f = operands(shape, instantiation)
    *inputs, vector = tensors(theta, phi, g, w_f)
    for scale in (1.0, shape[3] ** -0.5, -2.0) if instantiation in SOFTMAX_FORMS else (1.0,):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Keras' own softmax warns about a single position
            y = non_local(*inputs, instantiation, w_f=vector, scale=scale)
        expected = [
            reference.non_local(*sample, instantiation, w_f=w_f, scale=scale)
            for sample in zip(theta, phi, g, strict=True)
        ]
        assert keras.backend.standardize_dtype(y.dtype) == "float64"
        np.testing.assert_allclose(ops.convert_to_numpy(y), np.stack(expected), rtol=0, atol=1e-13)


@contextlib.contextmanager
def large_maps():
    """Inside, every map counts as large: softmax goes by blocks of 24 numbers, concatenation sorts."""
    with (
        mock.patch.object(softmax, "MAP_BYTES", -1),
        mock.patch.object(softmax, "_BLOCK_BYTES", 4 * 24),
        mock.patch.object(concatenation, "_MAP_ENTRIES", -1),
        mock.patch.object(concatenation, "_RUN", 4),
    ):
        yield


def at_once(theta, phi, g, instantiation, w_f=None, scale=1.0):
    """The whole map in TensorFlow, which differentiates it: what gradients are compared with."""
    if instantiation in SOFTMAX_FORMS:
        return tf.nn.softmax(scale * tf.matmul(theta, phi, transpose_b=True)) @ g
    if instantiation == "dot_product":
        return tf.matmul(theta, phi, transpose_b=True) @ g / phi.shape[1]
    width = theta.shape[2]
    a, b = tf.linalg.matvec(theta, w_f[:width]), tf.linalg.matvec(phi, w_f[width:])
    return tf.nn.relu(a[:, :, None] + b[:, None]) @ g / phi.shape[1]


def with_gradients(function, direction):
    """A function that returns the output and the gradients of its product with `direction`."""

    def call(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            y = function(*inputs)
        return y, *tape.gradient(y, inputs, direction)

    return call


def bounds(theta, phi, g, instantiation, w_f, scale):
    """How far y, (B, N, c), may be from the sum in float64: from the size of the summands."""
    if instantiation in SOFTMAX_FORMS:
        logits = scale * theta @ phi.swapaxes(1, 2)
        return 1e-14 * (1 + np.abs(logits).max()) * np.abs(g).max(axis=(1, 2), keepdims=True)
    if instantiation == "dot_product":
        sizes = np.abs(theta) @ np.abs(phi).swapaxes(1, 2)
    else:
        a, b = theta @ w_f[: theta.shape[2]], phi @ w_f[theta.shape[2] :]
        sizes = np.abs(a)[:, :, None] + np.abs(b)[:, None]
    return 1e-12 * sizes @ np.abs(g) / phi.shape[1]


@st.composite
def cases(draw):
    """(theta, phi, g, w_f, direction) in float64: sizes of 1 to 9, scales to 1e4, small integers that tie."""
    batch = draw(st.integers(1, 3))
    queries, keys, width, channels = (draw(st.integers(1, 9)) for _ in range(4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shapes = [(batch, queries, width), (batch, keys, width), (batch, keys, channels), (2 * width,)]
    arrays = [rng.normal(size=shape) * 10.0 ** draw(st.integers(-4, 4)) for shape in shapes]
    if draw(st.booleans()):
        arrays = [rng.integers(-2, 3, size=shape).astype("float64") for shape in shapes]
    return *arrays, rng.normal(size=(batch, queries, channels))


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(case=cases(), large=st.booleans())
def test_any_shape_and_scale_against_the_reference(instantiation, case, large):
    theta, phi, g, w_f, direction = case
    w_f = w_f if instantiation == "concatenation" else None
    scale = 1.0
    if instantiation in SOFTMAX_FORMS:  # the reference's exponentials must stay in float64
        scale = float(min(1.0, 500 / np.abs(theta @ phi.swapaxes(1, 2)).max(initial=1)))

    def by_nlutils(theta, phi, g, w_f=None):
        return non_local(theta, phi, g, instantiation, w_f=w_f, scale=scale)

    def by_tensorflow(theta, phi, g, w_f=None):
        return at_once(theta, phi, g, instantiation, w_f, scale)

    inputs = [tensor for tensor in tensors(theta, phi, g, w_f) if tensor is not None]
    with large_maps() if large else contextlib.nullcontext():
        y, *gradients = with_gradients(by_nlutils, tf.constant(direction))(*inputs)
    expected = np.stack(
        [
            reference.non_local(*sample, instantiation, w_f=w_f, scale=scale)
            for sample in zip(theta, phi, g, strict=True)
        ]
    )
    excess = np.abs(y.numpy() - expected) - bounds(theta, phi, g, instantiation, w_f, scale)
    assert excess.max() <= 0
    _, *true = with_gradients(by_tensorflow, tf.constant(direction))(*inputs)
    for found, wanted, operand in zip(gradients, true, inputs, strict=True):
        # A gradient is a sum of products of the other operands; cancellation costs digits of their size.
        size = np.prod([np.abs(other).max() for other in inputs if other is not operand])
        size = np.abs(wanted).max() + 1e-3 * size
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-10 * size)


@pytest.mark.parametrize("shape", [(1, 7, 5, 3, 2), (5, 2, 3, 4, 3)], ids=str)
@pytest.mark.parametrize("mode", ["jit", "open graph", "open jit"])
@pytest.mark.parametrize("instantiation", ["embedded_gaussian", "concatenation"])
def test_large_maps_in_graphs(instantiation, mode, shape):
    *arrays, w_f = operands(shape, instantiation)
    inputs = tensors(*arrays)
    vector = None if w_f is None else tf.constant(w_f)
    direction = tf.constant(np.random.default_rng(1).normal(size=(*shape[:2], shape[4])))
    function = with_gradients(lambda *x: non_local(*x, instantiation, w_f=vector), direction)
    signature = None
    if mode.startswith("open"):
        signature = [tf.TensorSpec((None, None, tensor.shape[2]), tf.float64) for tensor in inputs]
    with large_maps():
        found = tf.function(function, input_signature=signature, jit_compile="jit" in mode)(*inputs)
    wanted = with_gradients(lambda *x: at_once(*x, instantiation, vector), direction)(*inputs)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-13)


@pytest.mark.parametrize("instantiation", ["dot_product", "concatenation"])
def test_gradient_of_the_gradient(instantiation):
    *arrays, w_f = operands((2, 5, 6, 3, 3), instantiation)
    inputs = tensors(*arrays)
    vector = None if w_f is None else tf.constant(w_f)

    def second(operation):
        with tf.GradientTape() as outer:
            outer.watch(inputs)
            with tf.GradientTape() as inner:
                inner.watch(inputs)
                loss = ops.sum(operation(*inputs, instantiation, w_f=vector) ** 2)
            squares = sum(ops.sum(gradient**2) for gradient in inner.gradient(loss, inputs))
        return outer.gradient(squares, inputs)

    with large_maps():
        found = second(non_local)
    for one, other in zip(found, second(at_once), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10 * np.abs(other).max())


def test_a_tie_has_no_gradient():
    # a_i + b_j = 0 everywhere: ReLU is 0 there, and so is its gradient.
    a, b, g = tensors(np.zeros((1, 3)), np.zeros((1, 4)), np.ones((1, 4, 2)))
    with large_maps():
        results = with_gradients(concatenation.rectified_sum, tf.ones((1, 3, 2), "float64"))(a, b, g)
    assert not any(tensor.numpy().any() for tensor in results)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_concatenation_keeps_its_digits_in_float32(offset):
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(1, 3000)) + shift for shift in (offset, -offset))
    a, b, g = (array.astype("float32") for array in (a, b, rng.normal(size=(1, 3000, 4))))
    weights = np.maximum(a[:, :, None].astype("float64") + b[:, None], 0)
    y = ops.convert_to_numpy(concatenation.rectified_sum(*map(ops.convert_to_tensor, (a, b, g))))
    error = np.abs(y - weights @ g / 3000) / (weights @ np.abs(g) / 3000).mean()
    assert error.max() < 1e-6


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_half_precision_stays_finite(instantiation, large, dtype):
    # Features of rms 10 and width 1024: a logit is up to 1e5, more than float16 holds.
    rng = np.random.default_rng(0)
    theta, phi = np.abs(rng.normal(size=(2, 1, 9, 1024))) * 10
    g, w_f = rng.normal(size=(1, 9, 8)) * 0.1, rng.normal(size=2048) * 0.01
    w_f = w_f if instantiation == "concatenation" else None
    *half, vector = tensors(theta, phi, g, w_f, dtype=dtype)
    with large_maps() if large else contextlib.nullcontext():
        y, *gradients = with_gradients(
            lambda *x: non_local(*x, instantiation, w_f=vector), tf.cast(g, dtype)
        )(*half)
    rounded = [None if one is None else ops.cast(one, "float64") for one in (*half, vector)]
    wanted = at_once(*rounded[:3], instantiation, rounded[3]).numpy()
    for tensor in (y, *gradients):
        assert tensor.dtype == dtype
        assert np.isfinite(tf.cast(tensor, "float32")).all()
    assert np.abs(tf.cast(y, "float64") - wanted).max() < 0.01 * np.abs(wanted).max()


def test_a_node_of_a_functional_model(tmp_path):
    theta, phi = keras.Input((None, 4)), keras.Input((6, 4))
    for instantiation in ("embedded_gaussian", "dot_product"):
        y = non_local(theta, phi, phi[:, :, :3], instantiation)
        assert y.shape == (None, None, 3)
        model = keras.Model([theta, phi], y)
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        rows, columns, *_ = operands((2, 5, 6, 4, 3), instantiation)
        wanted = non_local(*tensors(rows, columns, columns[:, :, :3], dtype="float32"), instantiation)
        for one in (model, loaded):
            np.testing.assert_allclose(one([rows, columns]), wanted, rtol=0, atol=1e-6)


def test_a_batch_of_nothing():
    for instantiation in INSTANTIATIONS:
        theta, phi, g, w_f = tensors(*operands((0, 4, 5, 3, 2), instantiation))
        for large in (False, True):
            with large_maps() if large else contextlib.nullcontext():
                assert non_local(theta, phi, g, instantiation, w_f=w_f).shape == (0, 4, 2)


OTHER_BACKEND = """
import keras, numpy as np
from nlutils import reference
from nlutils.instantiations import INSTANTIATIONS
from nlutils.keras import non_local
from nlutils.keras.operations import concatenation, softmax

BACKEND = keras.backend.backend()

def with_gradients(function, inputs, direction):
    if BACKEND == "torch":
        import torch
        inputs = [torch.tensor(array, requires_grad=True) for array in inputs]
        y = function(*inputs)
        y.backward(torch.tensor(direction))
        return [y.detach().numpy(), *(tensor.grad.numpy() for tensor in inputs)]
    import jax
    y, transpose = jax.vjp(jax.jit(function), *map(jax.numpy.asarray, inputs))
    return [np.asarray(array) for array in (y, *transpose(jax.numpy.asarray(direction, y.dtype)))]

rng, excess = np.random.default_rng(0), 0.0
softmax._BLOCK_BYTES, concatenation._RUN = 96, 4
for shape in [(2, 6, 6, 4, 4), (3, 5, 7, 2, 1), (5, 2, 1, 3, 2)]:
    batch, queries, keys, width, channels = shape
    for instantiation in INSTANTIATIONS:
        for ties in (False, True) if instantiation == "concatenation" else (False,):
            sizes = [(batch, queries, width), (batch, keys, width), (batch, keys, channels), (2 * width,)]
            arrays = [rng.normal(size=size) for size in sizes]
            if ties:
                arrays = [np.round(array) for array in arrays]
            *inputs, w_f = arrays
            inputs += [w_f] if instantiation == "concatenation" else []
            direction = rng.normal(size=(batch, queries, channels))
            def function(theta, phi, g, w_f=None):
                return non_local(theta, phi, g, instantiation, w_f=w_f)
            softmax.MAP_BYTES, concatenation._MAP_ENTRIES = 2**20, 2**20
            small = with_gradients(function, inputs, direction)
            softmax.MAP_BYTES, concatenation._MAP_ENTRIES = -1, -1
            large = with_gradients(function, inputs, direction)
            expected = np.stack([
                reference.non_local(*sample, instantiation, w_f=inputs[3] if len(inputs) > 3 else None)
                for sample in zip(*inputs[:3])
            ])
            digits = 1e-12 if small[0].dtype == np.float64 else 1e-5
            for found, wanted in [(small[0], expected), (large[0], expected), *zip(large, small)]:
                excess = max(excess, np.abs(found - wanted).max() / digits / max(1, np.abs(wanted).max()))
print(BACKEND, small[0].dtype, excess < 1, excess)
"""


@pytest.mark.parametrize(("backend", "dtype"), [("torch", "float64"), ("jax", "float32")])
def test_other_backends(backend, dtype):
    environment = {**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", OTHER_BACKEND]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout.startswith(f"{backend} {dtype} True"), result.stdout + result.stderr


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_the_map_times_g_is_the_output(instantiation):
    theta, phi, g, w_f = tensors(*operands((2, 7, 4, 3, 5), instantiation))
    weights = ops.convert_to_numpy(pairwise(theta, phi, instantiation, w_f=w_f))
    assert weights.shape == (2, 7, 4)
    y = ops.convert_to_numpy(non_local(theta, phi, g, instantiation, w_f=w_f))
    np.testing.assert_allclose(weights @ ops.convert_to_numpy(g), y, rtol=0, atol=1e-13)
    if instantiation in SOFTMAX_FORMS:
        np.testing.assert_allclose(weights.sum(axis=2), 1, rtol=0, atol=1e-14)


def test_softmax_of_large_logits():
    theta, phi, g = tensors([[[1e4]], [[-1e4]]], [[[1.0], [2.0]]] * 2, [[[5.0], [7.0]]] * 2, dtype="float32")
    np.testing.assert_array_equal(ops.convert_to_numpy(non_local(theta, phi, g)), [[[7.0]], [[5.0]]])


def test_dot_product_of_large_features_in_float16():
    # theta_i . phi_j = 64 * 64 * 128 = 524288 is beyond float16's 65504; the quotient by M = 256 is not.
    features, g = tensors(np.full((1, 256, 128), 64.0), np.full((1, 256, 1), 2**-8), dtype="float16")
    np.testing.assert_array_equal(
        ops.convert_to_numpy(non_local(features, features, g, "dot_product")), 2048.0
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"instantiation": "embedded"},
            "instantiation='embedded' is not known; use one of 'gaussian', 'embedded_gaussian'",
        ),
        ({"instantiation": "concatenation"}, "w_f=None, but instantiation='concatenation' needs it"),
        ({"w_f": np.ones(6)}, "w_f was given, but instantiation='embedded_gaussian' has none"),
        ({"scale": math.inf}, "scale=inf must be a finite number"),
        (
            {"instantiation": "dot_product", "scale": 0.5},
            "scale=0.5 does not apply to instantiation='dot_product'",
        ),
        (
            {"theta": np.ones((2, 4, 5))},
            r"theta of shape \(2, 4, 5\) and phi of shape \(2, 6, 3\) do not fit: the width d",
        ),
        (
            {"g": np.ones((2, 5, 2))},
            r"g of shape \(2, 5, 2\) do not fit: the number of positions M .* 6 and 5",
        ),
        ({"g": np.ones((6, 2))}, r"g of shape \(6, 2\) must have the axes \(B, M, c\)"),
        ({"instantiation": "concatenation", "w_f": np.ones(5)}, r"w_f of shape \(5,\) .* must be \(6,\)"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"theta": np.ones((2, 4, 3)), "phi": np.ones((2, 6, 3)), "g": np.ones((2, 6, 2))}
    with pytest.raises(ValueError, match=message):
        non_local(**(arguments | change))


@pytest.mark.parametrize("instantiation", ["dot_product", "concatenation"])
def test_an_unknown_number_of_positions_is_named(instantiation):
    theta, w_f = keras.KerasTensor((None, None, 3)), keras.KerasTensor((6,))
    with pytest.raises(ValueError, match=r"phi of shape \(None, None, 3\) does not tell M"):
        pairwise(theta, theta, instantiation, w_f=w_f if instantiation == "concatenation" else None)
