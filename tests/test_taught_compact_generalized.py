"""The operation and the block that notebook 10 writes out: equal to those in nlutils."""

import pytest
import torch

import nlutils.torch
from nlutils.course.sources import lift
from nlutils.kernels import KERNELS


def entries(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("order", [1, 2, 3, 8])
@pytest.mark.parametrize("kernel", KERNELS)
def test_taught_operation_equals_the_packaged_one(kernel, order):
    taught = lift("compact_generalized", "compact_generalized")
    operands = 30 * entries(3, 2, 7, 12)
    options = {"groups": 3, "kernel": kernel, "order": order}
    ours = nlutils.torch.compact_generalized(*operands, **options)
    torch.testing.assert_close(taught(*operands, **options), ours, rtol=1e-12, atol=1e-9)
    assert ours.abs().max() > 100


@pytest.mark.parametrize("kernel", KERNELS)
def test_taught_block_equals_the_packaged_one(kernel):
    options = {"groups": 2, "kernel": kernel, "order": 4}
    ours = nlutils.torch.CompactGeneralizedNonLocalBlock(8, 4, **options).double()
    theirs = lift("compact_generalized", "CompactGeneralizedNonLocalBlock")(8, 4, **options).double()
    for number, tensor in enumerate(ours.state_dict().values()):
        tensor.copy_(entries(number + 1, *tensor.shape)[number])
    theirs.load_state_dict(ours.state_dict())  # strict: the same names and shapes
    x, direction = entries(2, 2, 8, 3, 5, 4)
    results = []
    for block in (ours, theirs):
        x_in = x.clone().requires_grad_()
        z = block(x_in)
        parameters = dict(block.named_parameters())
        slopes = torch.autograd.grad((z * direction).sum(), [x_in, *parameters.values()])
        results.append({"z": z, "x": slopes[0], **dict(zip(parameters, slopes[1:], strict=True))})
    for name in results[0]:
        torch.testing.assert_close(results[1][name], results[0][name], rtol=1e-9, atol=1e-9, msg=name)
    assert (results[0]["z"] - x).abs().max() > 0.1


def test_taught_block_starts_as_the_packaged_one():
    torch.manual_seed(0)
    theirs = lift("compact_generalized", "CompactGeneralizedNonLocalBlock")(1024)
    ours = nlutils.torch.CompactGeneralizedNonLocalBlock(1024)
    for name, tensor in ours.state_dict().items():
        other = theirs.state_dict()[name]
        assert other.shape == tensor.shape
        assert other.std().item() == pytest.approx(tensor.std().item(), rel=0.02)
