"""The PyTorch operations and blocks under torch.compile and torch.export, and as registered operators."""

import copy
import pickle

import pytest
import torch
from torch.export import Dim, export
from torch_cases import Memory, normal, random_block, way, ways

from nlutils.instantiations import INSTANTIATIONS
from nlutils.torch import NonLocalBlock, attention_rows, non_local

OPERATORS = torch.ops.nlutils


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()


def compiled(function, **options):
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


# ------------------------------------------------------------------------------------------------ compile


def results(block, x):
    """Output and all gradients."""
    x = x.clone().requires_grad_()
    block.zero_grad()
    z = block(x)
    z.square().sum().backward()
    return [z.detach(), x.grad, *(parameter.grad for parameter in block.parameters())]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_a_block_compiles_in_one_graph(instantiation, dynamic):
    block = random_block(4, instantiation=instantiation, subsample="before")
    fast = compiled(block, dynamic=dynamic)
    for size in ((2, 4, 2, 5, 4), (3, 4, 3, 7, 6)):
        x = normal(*size)
        expected = results(block, x)
        torch.testing.assert_close(results(fast, x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_every_way_compiles_in_one_graph(instantiation, dynamic):
    def loss(theta, phi, g, w_f):
        y = non_local(theta, phi, g, instantiation, w_f=w_f)
        return y.square().sum(), y

    for name, context in ways(instantiation).items():
        if name in ("map", "one tile", "tiles of two samples", "tables: several samples"):
            continue  # the first is in the test above, the others decide inside an operator
        fast = compiled(loss, dynamic=dynamic)
        with context:
            for queries, keys in ((5, 7), (6, 9)):
                theta, phi, g = normal(2, queries, 3), normal(2, keys, 3, seed=1), normal(2, keys, 3, seed=2)
                if instantiation == "gaussian":
                    phi, g = theta, normal(2, queries, 2, seed=2)
                w_f = normal(6).requires_grad_() if instantiation == "concatenation" else None
                leaves = [leaf.requires_grad_() for leaf in dict.fromkeys((theta, phi, g))]
                leaves += [] if w_f is None else [w_f]
                (total, expected), (same, y) = loss(theta, phi, g, w_f), fast(theta, phi, g, w_f)
                torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)
                torch.testing.assert_close(
                    torch.autograd.grad(same, leaves),
                    torch.autograd.grad(total, leaves),
                    rtol=1e-12,
                    atol=1e-12,
                )


def test_a_compiled_operation_builds_no_large_map():
    fast = compiled(lambda theta, phi, g: non_local(theta, phi, g), dynamic=True)
    for positions in (50, 60, 4000):
        theta, phi, g = (normal(1, positions, 4, seed=seed, dtype=torch.float32) for seed in range(3))
        expected = non_local(theta, phi, g[..., :3])
        with Memory() as memory:
            y = fast(theta, phi, g[..., :3])
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
    assert memory.largest <= 3 * 2**20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_compiled_under_autocast(instantiation, dtype):
    block = random_block(4, instantiation=instantiation).float()
    fast = compiled(block)
    x = normal(1, 4, 2, 5, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        torch.testing.assert_close(fast(x), block(x), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------- export


def exported(block, x, smallest=1):
    sizes = {"B": 1, "T": 1, "H": smallest, "W": smallest}
    axes = [Dim(name, min=least) for name, least in sizes.items()]
    return export(block, (x,), dynamic_shapes=({0: axes[0], 2: axes[1], 3: axes[2], 4: axes[3]},))


@pytest.mark.parametrize("subsample", [None, "before", "after"])
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_exported_once_for_every_size(instantiation, subsample):
    block = random_block(4, instantiation=instantiation, subsample=subsample)
    # PyTorch's own max pooling, exported with open sizes, wants 4 or more of each that it halves.
    program = exported(block, normal(3, 4, 4, 6, 8), smallest=4 if subsample else 1)
    sizes = [(2, 4, 3, 5, 7), (1, 4, 1, 4, 4), (5, 4, 2, 9, 4)]
    sizes += [] if subsample else [(1, 4, 1, 1, 1), (2, 4, 3, 1, 2), (0, 4, 2, 2, 2)]
    for size in sizes:
        x = normal(*size)
        torch.testing.assert_close(program.module()(x), block(x), rtol=0, atol=1e-12)
    if subsample:
        with pytest.raises(AssertionError, match=">= 4"):
            program.module()(normal(1, 4, 2, 3, 4))


@pytest.mark.parametrize("side", [1, 2, 3])
@pytest.mark.parametrize("subsample", ["before", "after"])
def test_exported_for_one_small_size(subsample, side):
    block = random_block(4, subsample=subsample)
    x = normal(2, 4, 2, side, side)
    program = export(block, (x,))
    torch.testing.assert_close(program.module()(x), block(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "options", [{"attention": "space"}, {"attention": "time"}, {"frames_per_group": 2}], ids=str
)
def test_exported_with_a_part_to_look_at(options):
    block = random_block(4, **options)
    group = Dim("group", min=1)
    axes = {0: Dim("B", min=1), 2: 2 * group, 3: Dim("H", min=1), 4: Dim("W", min=1)}
    program = export(block, (normal(3, 4, 4, 6, 8),), dynamic_shapes=(axes,))
    for size in ((2, 4, 6, 5, 7), (1, 4, 2, 1, 1)):
        x = normal(*size)
        torch.testing.assert_close(program.module()(x), block(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_an_exported_block_never_builds_the_map(instantiation, tmp_path):
    """Exported at 8 positions, saved, loaded, run at 6,000: a map of 137 MiB in float32, four times the limit."""
    block = random_block(4, 4, instantiation=instantiation, norm=False).float()
    torch.export.save(exported(block, normal(2, 4, 2, 2, 2, dtype=torch.float32)), tmp_path / "block.pt2")
    program = torch.export.load(tmp_path / "block.pt2").module()
    x = normal(1, 4, 5, 40, 30, dtype=torch.float32) / 2
    with torch.no_grad(), Memory() as memory:
        z = program(x)
    assert memory.largest <= 3 * 2**20
    # Some positions by the definition, in float64.
    wide, x = copy.deepcopy(block).double(), x.double()
    queries = [(0, 0, 0), (2, 20, 15), (4, 39, 29)]
    weights = attention_rows(wide, x, queries).flatten(2)
    g = wide.g(x).flatten(2).mT
    expected = wide.w_z((weights @ g).mT[:, :, None, None])[:, :, 0, 0]
    for place, (t, h, w) in enumerate(queries):
        exact = x[:, :, t, h, w] + expected[:, :, place]
        torch.testing.assert_close(z[:, :, t, h, w].double(), exact, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------- operators


def layouts(*shape, seed=0):
    """The same numbers three times: in one piece, channels first, and every second of a longer tensor."""
    rows = normal(*shape, seed=seed)
    yield rows
    yield rows.mT.contiguous().mT if rows.ndim == 3 else rows.mT.contiguous().mT
    yield torch.stack([rows, rows], -1)[..., 0]


@pytest.mark.parametrize("batch", [0, 2])
def test_operators_keep_the_rules_of_operators(batch):
    """torch.library's own checks: no argument is changed, the shapes and layouts promised are those that come."""
    shapes = [(batch, 5, 3), (batch, 4, 3), (batch, 4, 2), (batch, 5, 2)]
    made = zip(*(layouts(*shape, seed=seed) for seed, shape in enumerate(shapes)), strict=True)
    for theta, phi, g, grad_y in made:
        rows, sums = OPERATORS.softmax_rows(theta, phi, g, 0.5)
        check = torch.library.opcheck
        leaves = [leaf.detach().requires_grad_() for leaf in (theta, phi, g)]
        check(OPERATORS.softmax_rows.default, (*leaves, 0.5))
        once = ("test_schema", "test_faketensor")
        check(
            OPERATORS.softmax_rows_backward.default, (grad_y, theta, phi, g, rows, sums, 0.5), test_utils=once
        )
        rows, sums = OPERATORS.symmetric_softmax_rows(phi, g, 0.5)
        check(OPERATORS.symmetric_softmax_rows.default, (*leaves[1:], 0.5))
        arguments = (grad_y[:, :4], phi, g, rows, sums, 0.5)
        check(OPERATORS.symmetric_softmax_rows_backward.default, arguments, test_utils=once)
        a, b = theta[:, :, 0], phi[:, :, 0]
        _, active, order = OPERATORS.rectified_sum(a, b, g)
        leaves = [leaf.detach().requires_grad_() for leaf in (a, b, g)]
        check(OPERATORS.rectified_sum.default, tuple(leaves))
        check(OPERATORS.rectified_sum_backward.default, (grad_y, a, b, g, active, order), test_utils=once)


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_the_meta_device_tells_shapes(instantiation):
    with torch.device("meta"):
        block = NonLocalBlock(1024, instantiation=instantiation, subsample="before")
        x = torch.empty(2, 1024, 32, 56, 56, requires_grad=True)  # a map of N x M would have 18 TiB
    with way("tiles"):
        z = block(x)
    assert z.shape == x.shape
    assert z.is_meta
    z.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_copies_and_saved_blocks(instantiation):
    block = random_block(4, instantiation=instantiation, subsample="before")
    x = normal(1, 4, 2, 5, 4)
    expected = block(x)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(other(x), expected)
        assert {*other.state_dict()} == {*block.state_dict()}
        with torch.no_grad():
            next(other.parameters()).add_(1)
        assert torch.equal(block(x), expected)
