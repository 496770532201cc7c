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


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_a_block_compiles_in_one_graph(instantiation):
    block = random_block(4, instantiation=instantiation, subsample="before")
    x = normal(2, 4, 2, 5, 3)
    torch.testing.assert_close(results(compiled(block), x), results(block, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("instantiation", "ndim"), [("embedded_gaussian", 1), ("concatenation", 2)])
def test_a_block_compiles_once_for_several_sizes(instantiation, ndim):
    block = random_block(4, ndim=ndim, instantiation=instantiation)
    fast = compiled(block, dynamic=True)
    for size in ((2, 4, 5, 7), (3, 4, 9, 6)):
        x = normal(*size[: 2 + ndim])
        with torch._dynamo.config.patch(error_on_recompile=size[0] == 3):
            torch.testing.assert_close(results(fast, x), results(block, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_every_way_compiles_in_one_graph(instantiation, dynamic):
    def loss(theta, phi, g, w_f):
        y = non_local(theta, phi, g, instantiation, w_f=w_f)
        return y.square().sum(), y

    chosen = ways(instantiation)  # the others differ inside an operator only
    chosen = {name: chosen[name] for name in ("fused where it applies", "tiles") if name in chosen} or chosen
    for context in list(chosen.values())[:2]:
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


@pytest.mark.parametrize("instantiation", ["gaussian", "concatenation"])
def test_compiled_under_autocast(instantiation):
    block = random_block(4, ndim=1, instantiation=instantiation).float()
    fast = compiled(block)
    x = normal(1, 4, 7, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(fast(x), block(x), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------- export


def exported(block, x):
    return export(block, (x,), dynamic_shapes=({0: Dim("B"), 2: Dim("T"), 3: Dim("H"), 4: Dim("W")},))


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_exported_once_for_every_size(instantiation, tmp_path):
    """Exported at 24 positions, saved, loaded; at 6,000 the map would have 137 MiB, four times the limit."""
    block = random_block(4, 4, instantiation=instantiation, norm=False).float()
    torch.export.save(exported(block, normal(3, 4, 4, 2, 3, dtype=torch.float32)), tmp_path / "block.pt2")
    program = torch.export.load(tmp_path / "block.pt2").module()
    for size in ((2, 3, 5, 7), (1, 1, 1, 1), (2, 3, 1, 2), (2, 3, 2, 1), (0, 2, 2, 2)):
        x = normal(size[0], 4, *size[1:], dtype=torch.float32)
        torch.testing.assert_close(program(x), block(x), rtol=1e-5, atol=1e-5)

    x = normal(1, 4, 5, 40, 30, dtype=torch.float32) / 2
    with torch.no_grad(), Memory() as memory:
        z = program(x)
    assert memory.largest <= 3 * 2**20
    # Some positions by the definition, in float64.
    wide, x = copy.deepcopy(block).double(), x.double()
    queries = [(0, 0, 0), (2, 20, 15), (4, 39, 29)]
    y = attention_rows(wide, x, queries).flatten(2) @ wide.g(x).flatten(2).mT
    update = wide.w_z(y.mT[:, :, None, None])[:, :, 0, 0]
    for place, (t, h, w) in enumerate(queries):
        exact = x[:, :, t, h, w] + update[:, :, place]
        torch.testing.assert_close(z[:, :, t, h, w].double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("instantiation", "subsample"),
    [("gaussian", "before"), ("concatenation", "before"), ("dot_product", "after")],
)
def test_exported_with_sub_sampling(instantiation, subsample):
    """PyTorch's own max pooling, exported with open sizes, wants 4 or more of each that it halves."""
    block = random_block(4, ndim=2, instantiation=instantiation, subsample=subsample)
    axes = ({0: Dim("B", min=1), 2: Dim("H", min=4), 3: Dim("W", min=4)},)
    program = export(block, (normal(3, 4, 6, 8),), dynamic_shapes=axes).module()
    for size in ((2, 4, 5, 7), (1, 4, 4, 4), (5, 4, 9, 4)):
        x = normal(*size)
        torch.testing.assert_close(program(x), block(x), rtol=0, atol=1e-12)
    with pytest.raises(AssertionError, match=">= 4"):
        program(normal(1, 4, 3, 4))
    for side in (1, 2, 3):  # smaller maps: a size each
        x = normal(2, 4, side, side)
        torch.testing.assert_close(export(block, (x,)).module()(x), block(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "options", [{"attention": "space"}, {"attention": "time"}, {"frames_per_group": 2}], ids=str
)
def test_exported_with_a_part_to_look_at(options):
    block = random_block(4, instantiation="dot_product", **options)
    axes = ({0: Dim("B", min=1), 2: 2 * Dim("pairs", min=2), 3: Dim("H", min=1), 4: Dim("W", min=1)},)
    program = export(block, (normal(3, 4, 6, 5, 8),), dynamic_shapes=axes).module()
    for size in ((2, 4, 8, 5, 7), (1, 4, 4, 1, 2)):
        x = normal(*size)
        torch.testing.assert_close(program(x), block(x), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------- operators


@pytest.mark.parametrize("first", [False, True], ids=["channels last", "channels first"])
def test_operators_keep_the_rules_of_operators(first):
    """torch.library's own checks: arguments stay as they are, and what was promised of the results holds."""
    check, once = torch.library.opcheck, {"test_utils": ("test_schema", "test_faketensor")}

    def rows(*shape, seed):
        made = normal(*shape, seed=seed)
        return (made.mT.contiguous().mT if first else made).requires_grad_()

    for batch in (2, 0):
        whole = {} if batch else once
        theta, phi = rows(batch, 5, 3, seed=0), rows(batch, 4, 3, seed=1)
        g, grad_y = rows(batch, 4, 2, seed=2), rows(batch, 5, 2, seed=3).detach()
        y, sums = (part.detach() for part in OPERATORS.softmax_rows(theta, phi, g, 0.5))
        check(OPERATORS.softmax_rows.default, (theta, phi, g, 0.5), **whole)
        check(OPERATORS.softmax_rows_backward.default, (grad_y, theta, phi, g, y, sums, 0.5), **once)
        y, sums = (part.detach() for part in OPERATORS.symmetric_softmax_rows(phi, g, 0.5))
        check(OPERATORS.symmetric_softmax_rows.default, (phi, g, 0.5), **whole)
        arguments = (grad_y[:, :4], phi, g, y, sums, 0.5)
        check(OPERATORS.symmetric_softmax_rows_backward.default, arguments, **once)
        a, b = (leaf[:, :, 0].detach().contiguous().requires_grad_() for leaf in (theta, phi))
        _, active, order = OPERATORS.rectified_sum(a, b, g)
        check(OPERATORS.rectified_sum.default, (a, b, g), **whole)
        check(OPERATORS.rectified_sum_backward.default, (grad_y, a, b, g, active, order), **once)


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
