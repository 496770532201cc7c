"""What notebook 13 writes out computes what PyTorch and nlutils compute."""

import pytest
import torch
import torch.nn.functional as F

from nlutils.course.sources import lift
from nlutils.torch.inflation import inflate_kernel
from nlutils.torch.models import c3d

torch.set_num_threads(1)


def taught(name):
    return lift("c3d", name)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 2), (4, 1, 5)])
def test_loops_equal_the_framework(kernel):
    x, weight, bias = noise(2, 4, 5, 6), noise(3, 2, *kernel, seed=1), noise(3, seed=2)
    ours = F.conv3d(x[None], weight, bias)[0]
    assert (taught("conv3d_loops")(x, weight, bias) - ours).abs().max() < 1e-12


def test_taught_hardwired_layer_equals_the_packaged_one():
    rgb, flow = noise(2, 3, 7, 60, 40), noise(2, 2, 6, 60, 40, seed=1)
    ours, theirs = c3d.hardwired(rgb, flow), taught("hardwired")(rgb, flow)
    assert list(theirs) == list(ours)
    for name, maps in ours.items():
        assert theirs[name].shape == maps.shape
        assert (theirs[name] - maps).abs().max() < 1e-12, name


# The last leaves incomplete windows to pool3, pool4 and pool5.
@pytest.mark.parametrize("clip", [(16, 32, 32), (8, 48, 32), (20, 72, 40)])
def test_taught_c3d_equals_the_packaged_one(clip):
    T, H, W = clip
    torch.manual_seed(0)  # an unlucky start lets nothing through the ReLUs of so small a network
    ours = c3d.C3D(5, width=4, fc=16, frames=T, size=(H, W), dropout=0.0).double()
    theirs = taught("C3D")(5, width=4, fc=16, pooled=ours.pooled, dropout=0.0).double()
    theirs.load_state_dict(ours.state_dict())  # strict: the same names and shapes
    x, direction = noise(2, 3, *clip), noise(2, 5, seed=1)
    results = []
    for model in (ours, theirs):
        y = model(x)
        results.append([y, *torch.autograd.grad((y * direction).sum(), list(model.parameters()))])
    assert results[0][0].abs().max() > 1e-4
    for mine, other in zip(*results, strict=True):
        assert (mine - other).abs().max() <= 1e-12 * (1 + mine.abs().max())


@pytest.mark.parametrize("frames", [1, 3, 5])
def test_taught_inflation_equals_the_packaged_one(frames):
    kernel = noise(4, 3, 3, 3)
    assert torch.equal(taught("inflate")(kernel, frames), inflate_kernel(kernel, frames))


@pytest.mark.parametrize("frames", [1, 3, 5])
def test_the_solution_is_right_at_every_frame_of_a_boring_video(frames):
    kernel, image = noise(4, 3, 3, 3), noise(2, 3, 6, 5, seed=1)
    boring = image[:, :, None].expand(-1, -1, 8, -1, -1)
    expected = F.conv2d(image, kernel, padding=1)[:, :, None].expand(-1, -1, 8, -1, -1)
    assert (taught("steady")(boring, kernel, frames) - expected).abs().max() < 1e-12
