"""Memory of the PyTorch operations in numbers of bytes, counted by the allocator, at sizes above the limit.

The map of N = M = 4,000 has 61 MiB in float32, twice what may be built.
"""

import pytest
import torch
from torch_cases import Memory, normal, random_block

from nlutils.instantiations import INSTANTIATIONS, SOFTMAX_FORMS
from nlutils.torch import NonLocalBlock, attention_rows, non_local, pairwise
from nlutils.torch.operations import concatenation, softmax

MIB = 2**20
N, WIDTH = 4000, 16
# Ways of the softmax forms by widths and tensors: c = d takes fused attention, c != d the tiles.
CASES = [
    ("gaussian", WIDTH),
    ("gaussian", WIDTH - 4),
    ("embedded_gaussian", WIDTH),
    ("embedded_gaussian", WIDTH - 4),
    ("dot_product", WIDTH),
    ("concatenation", WIDTH),
]


def leaves_of(instantiation, positions, channels, batch=1):
    """theta, phi, g, w_f in float32, moderate logits, all with a gradient."""
    theta = normal(batch, positions, WIDTH, dtype=torch.float32) / 2
    phi = theta if instantiation == "gaussian" else normal(*theta.shape, seed=1, dtype=torch.float32) / 2
    g = normal(batch, positions, channels, seed=2, dtype=torch.float32)
    w_f = normal(2 * WIDTH, seed=3, dtype=torch.float32) if instantiation == "concatenation" else None
    for leaf in (theta, phi, g, *([] if w_f is None else [w_f])):
        leaf.requires_grad_()
    return theta, phi, g, w_f


def scratch(instantiation):
    """What tiles or tables may take beside tensors of N rows: three of them are in use at once."""
    if instantiation == "dot_product":
        return 0
    return 3 * (softmax._TILE_BYTES if instantiation in SOFTMAX_FORMS else 2 * concatenation._TABLE_BYTES)


@pytest.mark.parametrize(("instantiation", "channels"), CASES)
def test_forward_and_backward_hold_a_few_times_their_operands(instantiation, channels):
    theta, phi, g, w_f = leaves_of(instantiation, N, channels)
    with Memory() as memory:
        non_local(theta, phi, g, instantiation, w_f=w_f).sum().backward()
    rows = 4 * N * (WIDTH + channels)
    assert memory.largest <= max(rows, scratch(instantiation) // 3)
    assert memory.peak <= 5 * rows + scratch(instantiation)
    assert memory.peak < 4 * N * N / 6


@pytest.mark.parametrize(("instantiation", "channels"), CASES)
def test_results_at_this_size(instantiation, channels):
    """A loss of five rows: their results and all gradients by the definition, in float64."""
    theta, phi, g, w_f = leaves_of(instantiation, N, channels)
    rows = torch.tensor([0, 255, 256, 2048, N - 1])
    grad_y = torch.zeros(1, N, channels)
    grad_y[:, rows] = normal(1, 5, channels, seed=5, dtype=torch.float32)
    leaves = [leaf for leaf in (theta, phi, g, w_f) if leaf is not None]
    y = non_local(theta, phi, g, instantiation, w_f=w_f)
    gradients = torch.autograd.grad(y, leaves, grad_y)

    wide = {id(leaf): leaf.detach().double().requires_grad_() for leaf in leaves}
    theta, phi, g, w_f = (wide.get(id(leaf)) for leaf in (theta, phi, g, w_f))
    expected = pairwise(theta[:, rows], phi, instantiation, w_f=w_f) @ g
    values = torch.autograd.grad(expected, [wide[id(leaf)] for leaf in leaves], grad_y[:, rows].double())
    for result, value in zip((y[:, rows], *gradients), (expected, *values), strict=True):
        error = (result.double() - value).norm() / value.norm()
        assert error < 5e-6, error


@pytest.mark.parametrize("instantiation", SOFTMAX_FORMS)
def test_the_map_is_built_up_to_32_mib_and_never_above(instantiation):
    for positions, built in ((2896, True), (2897, False)):  # 2896^2 numbers of 4 bytes fill 32 MiB
        theta, phi, g, _ = leaves_of(instantiation, positions, 4)
        with torch.no_grad(), Memory() as memory:
            non_local(theta, phi, g, instantiation)
        assert (memory.largest == 4 * positions**2) == built
        assert (memory.largest > 3 * MIB) == built


@pytest.mark.parametrize("instantiation", SOFTMAX_FORMS)
def test_all_samples_count_in_the_size_of_the_map(instantiation):
    theta, phi, g, _ = leaves_of(instantiation, 400, 4, batch=64)  # 64 maps of 0.6 MiB
    with Memory() as memory:
        non_local(theta, phi, g, instantiation).sum().backward()
    assert memory.largest <= max(softmax._TILE_BYTES, theta.numel() * 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_half_precision_builds_no_map_either(instantiation, dtype):
    theta, phi, g, w_f = (
        None if leaf is None else leaf.detach().to(dtype) for leaf in leaves_of(instantiation, N, 8)
    )
    with Memory() as memory:
        non_local(theta, phi, g, instantiation, w_f=w_f)
    assert memory.largest <= 3 * MIB


@pytest.mark.parametrize("subsample", [None, "before"])
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_a_block_holds_a_few_times_its_map(instantiation, subsample):
    size = (4, 50, 40) if subsample else (4, 25, 40)  # the map has 61 MiB, and with sub-sampling as many
    block = NonLocalBlock(8, instantiation=instantiation, subsample=subsample, zero_init=False)
    x = normal(1, 8, *size, dtype=torch.float32).requires_grad_()
    with Memory() as memory:
        block(x).sum().backward()
    # theta, phi and g come from one product, 3 x 4 channels for the 8 of x.
    assert memory.largest <= max(4 * 2 * x.numel(), scratch(instantiation) // 3)
    assert memory.peak <= 20 * 4 * x.numel() + scratch(instantiation)


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_rows_of_the_map_hold_one_number_a_key(instantiation):
    block = random_block(4, instantiation=instantiation, subsample="before").float()
    x = normal(1, 4, 4, 50, 40, dtype=torch.float32)
    queries = [(t, h, 7) for t in range(4) for h in (0, 20, 49)]
    with torch.no_grad(), Memory() as memory:
        rows = attention_rows(block, x, queries)
    assert rows.shape == (1, 12, 4, 25, 20)
    assert memory.largest <= 4 * max(x.numel(), rows.numel())
    assert memory.peak <= 4 * (4 * x.numel() + 3 * rows.numel())
