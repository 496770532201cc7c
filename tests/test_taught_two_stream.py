"""What notebook 14 builds computes what the library computes: stacks, a stream, a residual unit."""

import numpy as np
import pytest
import torch

from nlutils.course.sources import lift
from nlutils.torch.models.st_resnet import STResNet
from nlutils.torch.models.two_stream import CNNM2048
from nlutils.video.flow_stacks import as_channels, flow_stack

SLUG = "two_stream"


@pytest.mark.parametrize(("name", "sampling"), [("stack", "place"), ("trajectory_stack", "trajectory")])
def test_the_stacks(name, sampling):
    """Vectors of up to some six pixels in a picture of 9 x 12: many trajectories leave it."""
    flow = 3 * np.random.default_rng(0).standard_normal((7, 9, 12, 2)).astype(np.float32)
    taught = lift(SLUG, name)(flow, 2, 5)
    assert taught.shape == (10, 9, 12)
    ours = as_channels(flow_stack(flow, 2, 5, sampling=sampling, centred=False))
    np.testing.assert_allclose(taught, ours, atol=1e-3)


def same_weights(ours, taught):
    """Random weights and statistics in `ours`, and the same in `taught`."""
    draw = torch.Generator().manual_seed(1)
    for name, tensor in ours.state_dict().items():
        if tensor.is_floating_point():
            scale = 0.2 if tensor.ndim > 1 else 0.5
            low = 1.0 if name.endswith("running_var") else -scale
            tensor.copy_(low + 2 * scale * torch.rand(tensor.shape, generator=draw, dtype=torch.float64))
    taught.load_state_dict(ours.state_dict())  # strict: the same names and shapes


def same_answers(ours, taught, *inputs):
    results = []
    for network in (ours, taught):
        network.zero_grad()
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = network(*leaves)
        (y * torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape)).mean().backward()
        gradients = {name: weight.grad for name, weight in network.named_parameters()}
        results.append({"y": y, **{f"input {k}": leaf.grad for k, leaf in enumerate(leaves)}, **gradients})
    mine, theirs = results
    assert mine["y"].std() > 1e-3
    assert mine.keys() == theirs.keys()
    for name, values in mine.items():
        torch.testing.assert_close(theirs[name], values, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize(("channels", "second_norm"), [(3, True), (20, False)])
def test_the_stream(channels, second_norm):
    ours = CNNM2048(channels, 5, width=9, size=(48, 48), second_norm=second_norm, dropout=0.0).double()
    taught = lift(SLUG, "Stream")(channels, 5, width=9, second_norm=second_norm, dropout=0.0).double()
    same_weights(ours, taught)
    x = 10 * torch.randn(2, channels, 48, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same_answers(ours, taught, x)


def test_the_streams_full_size():
    with torch.device("meta"):
        taught = lift(SLUG, "Stream")(3, 101, width=96, side=224)
        ours = CNNM2048(3, 101)
    shapes = [{name: tensor.shape for name, tensor in net.state_dict().items()} for net in (ours, taught)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frames", [1, 3])
def test_the_unit_of_st_resnet(frames, training):
    network = STResNet(5, depth=(2, 2, 2, 2), width=4, stack=1, temporal=frames == 3)
    ours = network.appearance.stages[1][1].double().train(training)
    taught = lift(SLUG, "Unit")(32, 8, frames=frames).double().train(training)
    same_weights(ours, taught)
    x, m = torch.randn(2, 2, 32, 3, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same_answers(ours, taught, x)
    same_answers(ours, taught, x, m.abs() + 0.1)  # ours gets ReLU(m), the taught one m: here they are equal
