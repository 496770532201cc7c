"""The block that notebook 05 teaches computes what `nlutils.torch.NonLocalBlock` computes."""

import pytest
import torch

import nlutils.torch
from nlutils.course.sources import lift
from nlutils.instantiations import INSTANTIATIONS


@pytest.fixture(scope="module")
def taught():
    return lift("block_in_pytorch", "NonLocalBlock")


def pair(taught, instantiation, subsample):
    """The library's block with random weights and statistics, and the taught one with the same state_dict."""
    options = {"instantiation": instantiation, "subsample": subsample}
    ours, theirs = (kind(6, 4, **options).double() for kind in (nlutils.torch.NonLocalBlock, taught))
    draw = torch.Generator().manual_seed(1)
    for name, tensor in ours.state_dict().items():
        if tensor.is_floating_point():
            low = 0.5 if name.endswith("running_var") else -1.0
            tensor.copy_(low + 2 * torch.rand(tensor.shape, generator=draw, dtype=torch.float64))
    theirs.load_state_dict(ours.state_dict())  # strict: the same names and shapes
    return ours, theirs


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("subsample", [None, "before", "after"])
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_same_output_and_gradients(taught, instantiation, subsample, training):
    draw = torch.Generator().manual_seed(0)
    x, direction = torch.randn(2, 2, 6, 3, 5, 4, generator=draw, dtype=torch.float64)
    results = []
    for block in pair(taught, instantiation, subsample):
        x_in = x.clone().requires_grad_()
        z = block.train(training)(x_in)
        z.backward(direction)
        results.append({"z": z, "x": x_in.grad, **{name: p.grad for name, p in block.named_parameters()}})
        results[-1] |= {name: b for name, b in block.named_buffers() if b.is_floating_point()}
    ours, theirs = results
    assert (ours["z"] - x).abs().max() > 0.1  # the block does something
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert (theirs[name] - values).abs().max() < 1e-10, name


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_both_start_alike(taught, instantiation):
    x = torch.randn(1, 6, 2, 4, 4)
    for kind in (nlutils.torch.NonLocalBlock, taught):
        torch.manual_seed(0)
        block = kind(6, instantiation=instantiation)
        assert torch.equal(block(x), x)
        for name, parameter in block.named_parameters():
            if name.endswith("bias") or name == "norm.weight":
                assert not parameter.any(), name
            else:
                assert 0.004 < parameter.std() < 0.02, name
