"""The PyTorch operations against the reference sums, their gradients, and their errors."""

import math

import numpy as np
import pytest
import torch

from nlutils import reference
from nlutils.instantiations import INSTANTIATIONS, SOFTMAX_FORMS
from nlutils.torch import non_local, pairwise

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


def operands(shape, instantiation, seed=0):
    """theta, phi, g, w_f (None unless concatenation) in float64, drawn from N(0, 1)."""
    batch, queries, keys, width, channels = shape
    draw = torch.Generator().manual_seed(seed)
    sizes = [(batch, queries, width), (batch, keys, width), (batch, keys, channels), (2 * width,)]
    theta, phi, g, w_f = (torch.randn(size, generator=draw, dtype=torch.float64) for size in sizes)
    return theta, phi, g, w_f if instantiation == "concatenation" else None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_equals_the_reference(instantiation, shape):
    theta, phi, g, w_f = operands(shape, instantiation)
    for scale in (1.0, shape[3] ** -0.5, -2.0) if instantiation in SOFTMAX_FORMS else (1.0,):
        y = non_local(theta, phi, g, instantiation, w_f=w_f, scale=scale)
        expected = [
            reference.non_local(*sample, instantiation, w_f=w_f, scale=scale)
            for sample in zip(theta, phi, g, strict=True)
        ]
        # A few dozen roundings of numbers of size 1 to 10.
        np.testing.assert_allclose(y.numpy(), np.stack(expected), rtol=0, atol=1e-13)


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_float32_stays_float32_and_close(instantiation):
    theta, phi, g, w_f = operands((2, 40, 30, 8, 5), instantiation)
    exact = non_local(theta, phi, g, instantiation, w_f=w_f)
    single = [None if operand is None else operand.float() for operand in (theta, phi, g, w_f)]
    y = non_local(*single[:3], instantiation, w_f=single[3])
    assert y.dtype == torch.float32
    # 2^-24 a rounding; the softmax magnifies those of the logits, which reach 20 here.
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_gradients(instantiation):
    theta, phi, g, w_f = operands((2, 5, 3, 2, 4), instantiation)
    inputs = [operand.requires_grad_() for operand in (theta, phi, g, w_f) if operand is not None]

    def output(theta, phi, g, w_f=None):
        return non_local(theta, phi, g, instantiation, w_f=w_f)

    def weights(theta, phi, g, w_f=None):
        return pairwise(theta, phi, instantiation, w_f=w_f)

    assert torch.autograd.gradcheck(output, inputs)
    assert torch.autograd.gradcheck(weights, inputs)


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_the_map_times_g_is_the_output(instantiation):
    theta, phi, g, w_f = operands((2, 7, 4, 3, 5), instantiation)
    weights = pairwise(theta, phi, instantiation, w_f=w_f)
    assert weights.shape == (2, 7, 4)
    torch.testing.assert_close(
        weights @ g, non_local(theta, phi, g, instantiation, w_f=w_f), rtol=0, atol=1e-13
    )
    if instantiation in SOFTMAX_FORMS:
        torch.testing.assert_close(weights.sum(2), torch.ones(2, 7, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_order_of_positions(instantiation):
    theta, phi, g, w_f = operands((2, 6, 5, 3, 4), instantiation)
    y = non_local(theta, phi, g, instantiation, w_f=w_f)
    queries, keys = torch.tensor([3, 0, 5, 1, 4, 2]), torch.tensor([4, 2, 0, 3, 1])
    shuffled = non_local(theta[:, queries], phi[:, keys], g[:, keys], instantiation, w_f=w_f)
    torch.testing.assert_close(shuffled, y[:, queries], rtol=0, atol=1e-13)


def test_first_half_of_w_f_is_for_theta():
    theta, phi, _, w_f = operands((1, 4, 6, 3, 2), "concatenation")
    only_theta = torch.cat([w_f[:3], torch.zeros(3, dtype=torch.float64)])
    expected = torch.relu(theta @ w_f[:3]) / 6
    weights = pairwise(theta, phi, "concatenation", w_f=only_theta)
    torch.testing.assert_close(weights, expected[:, :, None].expand(1, 4, 6), rtol=0, atol=1e-15)


def test_softmax_of_large_logits():
    theta = torch.tensor([[[1e4]], [[-1e4]]])
    phi, g = torch.tensor([[[1.0], [2.0]]] * 2), torch.tensor([[[5.0], [7.0]]] * 2)
    torch.testing.assert_close(non_local(theta, phi, g), torch.tensor([[[7.0]], [[5.0]]]))


def test_dot_product_of_large_features_in_float16():
    # theta_i . phi_j = 64 * 64 * 128 = 524288 is beyond float16's 65504; the quotient by M = 256 is not.
    features = torch.full((1, 256, 128), 64.0, dtype=torch.float16)
    y = non_local(features, features, torch.full((1, 256, 1), 2**-8, dtype=torch.float16), "dot_product")
    torch.testing.assert_close(y, torch.full_like(y, 2048.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"instantiation": "embedded"},
            "instantiation='embedded' is not known; use one of 'gaussian', 'embedded_gaussian'",
        ),
        ({"instantiation": "concatenation"}, "w_f=None, but instantiation='concatenation' needs it"),
        (
            {"instantiation": "gaussian", "w_f": torch.ones(6)},
            "w_f was given, but instantiation='gaussian' has none",
        ),
        ({"scale": "d"}, "scale='d' must be a finite number"),
        ({"scale": math.inf}, "scale=inf must be a finite number"),
        (
            {"instantiation": "dot_product", "scale": 0.5},
            "scale=0.5 does not apply to instantiation='dot_product'",
        ),
        (
            {"theta": torch.ones(2, 4, 5)},
            r"theta of shape \(2, 4, 5\) and phi of shape \(2, 6, 3\) do not fit: the width d",
        ),
        (
            {"theta": torch.ones(1, 4, 3)},
            r"theta of shape \(1, 4, 3\).* do not fit: the batch size B .* 1 and 2",
        ),
        ({"theta": torch.ones(4, 3)}, r"theta of shape \(4, 3\) must have the axes \(B, N, d\)"),
        (
            {"g": torch.ones(2, 5, 2)},
            r"g of shape \(2, 5, 2\) do not fit: the number of positions M .* 6 and 5",
        ),
        ({"g": torch.ones(3, 6, 2)}, r"g of shape \(3, 6, 2\) do not fit: the batch size B"),
        (
            {"phi": torch.ones(2, 0, 3), "g": torch.ones(2, 0, 2)},
            r"phi of shape \(2, 0, 3\) has no position to attend to",
        ),
        (
            {"instantiation": "concatenation", "w_f": torch.ones(1, 6)},
            r"w_f of shape \(1, 6\) .* must be \(6,\)",
        ),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"theta": torch.ones(2, 4, 3), "phi": torch.ones(2, 6, 3), "g": torch.ones(2, 6, 2)}
    with pytest.raises(ValueError, match=message):
        non_local(**(arguments | change))


def test_pairwise_names_bad_input_too():
    with pytest.raises(ValueError, match="instantiation='cosine' is not known"):
        pairwise(torch.ones(1, 2, 3), torch.ones(1, 2, 3), "cosine")
    with pytest.raises(ValueError, match=r"phi of shape \(1, 2, 4\) do not fit: the width d"):
        pairwise(torch.ones(1, 2, 3), torch.ones(1, 2, 4), "dot_product")
