"""The reference sums against numbers worked out by hand."""

import math

import numpy as np
import pytest

from nlutils.instantiations import INSTANTIATIONS
from nlutils.reference import non_local, non_local_block


def test_softmax_forms_by_hand():
    theta, phi, g = [[1.0]], [[0.0], [math.log(3)]], [[0.0], [4.0]]
    for instantiation in ("gaussian", "embedded_gaussian"):
        # exp: 1 and 3, so the weights are 1/4 and 3/4.
        np.testing.assert_allclose(non_local(theta, phi, g, instantiation), [[3.0]], rtol=1e-15)
        # Twice the logit: 1 and 9.
        np.testing.assert_allclose(non_local(theta, phi, g, instantiation, scale=2), [[3.6]], rtol=1e-15)


def test_dot_product_by_hand():
    # theta_i . phi_j: rows (1, 0) and (2, 6); divided by M = 2.
    y = non_local([[1, 0], [0, 2]], [[1, 1], [0, 3]], [[1], [10]], "dot_product")
    np.testing.assert_array_equal(y, [[0.5], [31.0]])


def test_concatenation_by_hand():
    # a = theta . (1, -1) = (1, -2); b = phi . (2, 0) = (2, 0, -3); ReLU(a_i + b_j): (3, 1, 0) and (0, 0, 0).
    theta, phi = [[1, 0], [0, 2]], [[1, 1], [0, 3], [-1.5, 0]]
    y = non_local(theta, phi, [[1, 2], [10, 20], [100, 200]], "concatenation", w_f=[1, -1, 2, 0])
    np.testing.assert_allclose(y, [[13 / 3, 26 / 3], [0, 0]], rtol=1e-15)


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_loops_equal_matrices(instantiation):
    rng = np.random.default_rng(0)
    theta, phi, g = rng.normal(size=(7, 3)), rng.normal(size=(5, 3)), rng.normal(size=(5, 4))
    w_f = rng.normal(size=6) if instantiation == "concatenation" else None
    if instantiation == "concatenation":
        pairs = np.concatenate([np.repeat(theta[:, None], 5, 1), np.repeat(phi[None], 7, 0)], axis=2)
        weights = np.maximum(pairs @ w_f, 0) / 5
    elif instantiation == "dot_product":
        weights = np.einsum("id,jd->ij", theta, phi) / 5
    else:
        f = np.exp(np.einsum("id,jd->ij", theta, phi))
        weights = f / f.sum(axis=1, keepdims=True)
    y = non_local(theta, phi, g, instantiation, w_f=w_f)
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, weights @ g, atol=1e-14)


@pytest.mark.parametrize("feature", [30.0, -30.0])
def test_a_sum_that_leaves_float64_is_an_error(feature):
    with pytest.raises(
        OverflowError, match=r"sum of exp\(theta_i . phi_j\) over j is (inf|0\.0) in float64 at i=0"
    ):
        non_local([[30.0]], [[feature]], [[1.0]], "gaussian")


def test_block_by_hand():
    # One channel, two places; theta = phi = x, g = 2x + 1, W_z = 3, norm: (v - 1) / 2 * 4 + 5.
    x = np.array([[0.0, math.log(3)]])
    weights = {
        "g.weight": [[2.0]],
        "g.bias": [1.0],
        "w_z.weight": [[3.0]],
        "w_z.bias": [0.5],
        "norm.weight": [4.0],
        "norm.bias": [5.0],
        "norm.running_mean": [1.0],
        "norm.running_var": [4.0],
    }
    share = 3 ** math.log(3) / (1 + 3 ** math.log(3))  # weight of place 1, seen from place 1
    y = np.array([1 + math.log(3), 1 + 2 * math.log(3) * share])
    expected = x[0] + ((3 * y + 0.5) - 1) / 2 * 4 + 5
    np.testing.assert_allclose(non_local_block(x, weights, "gaussian", epsilon=0)[0], expected, rtol=1e-14)


def test_pooling_in_the_block_takes_maxima_over_height_and_width_only():
    # g = x, dot product with theta = 1, phi = 1: every place gets the mean of the pooled map.
    x = np.arange(2 * 3 * 5, dtype=float).reshape(1, 2, 3, 5)
    one = {"weight": [[1.0]], "bias": [0.0]}
    constant = {"weight": [[0.0]], "bias": [1.0]}
    layers = {"theta": constant, "phi": constant, "g": one, "w_z": one}
    weights = {f"{layer}.{name}": value for layer, pair in layers.items() for name, value in pair.items()}
    pooled = [x[0, t, h : h + 2, w : w + 2].max() for t in (0, 1) for h in (0,) for w in (0, 2)]
    for order in ("before", "after"):
        z = non_local_block(x, weights, "dot_product", subsample=order)
        np.testing.assert_allclose(z, x + np.mean(pooled), rtol=1e-15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"instantiation": "softmax"},
            "instantiation='softmax' is not known; use one of 'gaussian', 'embedded_gaussian'",
        ),
        ({"instantiation": "concatenation"}, "w_f=None, but instantiation='concatenation' needs it"),
        ({"w_f": np.ones(6)}, "w_f was given, but instantiation='embedded_gaussian' has none"),
        ({"scale": math.nan}, "scale=nan must be a finite number"),
        ({"scale": True}, "scale=True must be a finite number"),
        (
            {"instantiation": "dot_product", "scale": 0.5},
            "scale=0.5 does not apply to instantiation='dot_product'",
        ),
        (
            {"theta": np.ones((2, 4))},
            r"theta of shape \(2, 4\) and phi of shape \(5, 3\) do not fit: the width d",
        ),
        (
            {"g": np.ones((4, 2))},
            r"phi of shape \(5, 3\) and g of shape \(4, 2\) do not fit: the number of positions M",
        ),
        ({"g": np.ones(5)}, r"g of shape \(5,\) must have the axes \(M, c\)"),
        ({"phi": np.ones((0, 3)), "g": np.ones((0, 2))}, r"phi of shape \(0, 3\) has no position"),
        (
            {"instantiation": "concatenation", "w_f": np.ones(3)},
            r"w_f of shape \(3,\) does not fit theta of width 3; its shape must be \(6,\)",
        ),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "theta": np.ones((2, 3)),
        "phi": np.ones((5, 3)),
        "g": np.ones((5, 2)),
        "instantiation": "embedded_gaussian",
    }
    with pytest.raises(ValueError, match=message):
        non_local(**(arguments | change))
