"""What notebook 09 derives computes what `nlutils.torch` computes, forward and backward."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nlutils.course.sources import lift
from nlutils.torch import NonLocalBlock, non_local
from nlutils.torch.operations.concatenation import rectified_sum

N, M, D, C = 23, 17, 5, 4


def taught(name):
    return lift("cost", name)


@pytest.fixture
def operands():
    draw = torch.Generator().manual_seed(0)
    shapes = ((N, D), (M, D), (M, C), (N, C))
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]


def nlutils_and_gradients(operands, form):
    leaves = [operand[None].clone().requires_grad_() for operand in operands[:3]]
    y = non_local(*leaves, form)
    return y[0], [gradient[0] for gradient in torch.autograd.grad(y, leaves, operands[3][None])]


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_concatenation(operands, offset):
    a, b = operands[0][:, 0] + offset, operands[1][:, 0] - offset
    a[:5] = -b[5:10]  # ties
    b[0] = b[1]
    g, q = operands[2:]
    leaves = [operand[None].clone().requires_grad_() for operand in (a, b, g)]
    y = rectified_sum(*leaves)
    assert (taught("rectified_sum")(a, b, g) - y[0]).abs().max() < 1e-12
    gradients = torch.autograd.grad(y, leaves, q[None])
    for mine, ours in zip(taught("rectified_sum_backward")(q, a, b, g), gradients, strict=True):
        assert (mine - ours[0]).abs().max() < 1e-12


@pytest.mark.parametrize("R", [1, 7, 256])
def test_rows_in_blocks(operands, R):
    theta, phi, g, q = operands
    y, log_sum = taught("softmax_rows")(theta, phi, g, R)
    ours, gradients = nlutils_and_gradients(operands, "embedded_gaussian")
    assert (y - ours).abs().max() < 1e-13
    backward = taught("softmax_rows_backward")(q, theta, phi, g, y, log_sum, R)
    for mine, right in zip(backward, gradients, strict=True):
        assert (mine - right).abs().max() < 1e-13


@pytest.mark.parametrize("columns", [1, 7, 256])
def test_streaming(operands, columns):
    ours, _ = nlutils_and_gradients(operands, "embedded_gaussian")
    assert (taught("streaming_softmax")(*operands[:3], columns) - ours).abs().max() < 1e-13


def test_dot_product(operands):
    ours, _ = nlutils_and_gradients(operands, "dot_product")
    assert (taught("dot_product")(*operands[:3]) - ours).abs().max() < 1e-13


@pytest.mark.parametrize("order", [None, "before", "after"])
def test_counts_are_those_of_the_block(order):
    block = NonLocalBlock(16, subsample=order, norm=False)
    with FlopCounterMode(display=False) as counter:
        block(torch.zeros(1, 16, 3, 4, 6))
    assert counter.get_total_flops() == 2 * taught("sub_sampled_cost")(72, 16, order)
