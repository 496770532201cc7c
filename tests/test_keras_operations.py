"""The Keras operations against the reference sums, and what they say to wrong arguments."""

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import math
import warnings

import keras
import numpy as np
import pytest
from keras import ops

from nlutils import reference
from nlutils.instantiations import INSTANTIATIONS, SOFTMAX_FORMS
from nlutils.keras import non_local, pairwise

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
