"""Rows of the map for chosen positions, against the map itself."""

import itertools

import pytest
import torch
from torch_cases import normal, random_block

from nlutils.instantiations import INSTANTIATIONS, SOFTMAX_FORMS
from nlutils.torch import NonLocalBlock, attention_rows, pairwise

SIZES = {1: (7,), 2: (5, 4), 3: (4, 5, 3)}


def the_map(block, x):
    """(B, N, *grid of the keys), built from the layers: for a block that looks at all positions."""
    theta, phi, _ = block.embed(x)
    rows = [maps.flatten(2).mT for maps in (theta, phi)]
    weights = pairwise(*rows, block.instantiation, w_f=block.w_f, scale=block.logit_scale)
    return weights.unflatten(2, phi.shape[2:])


def places(size):
    return list(itertools.product(*map(range, size)))


@pytest.mark.parametrize("subsample", [None, "before", "after"])
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_all_rows_are_the_map(instantiation, ndim, subsample):
    for scale in (False, True) if instantiation in SOFTMAX_FORMS else (False,):
        block = random_block(4, ndim=ndim, instantiation=instantiation, subsample=subsample, scale=scale)
        x = normal(2, 4, *SIZES[ndim])
        rows = attention_rows(block, x, places(SIZES[ndim]))
        keys = {1: (3,), 2: (2, 2), 3: (4, 2, 1)}[ndim] if subsample else SIZES[ndim]
        assert rows.shape == (2, len(places(SIZES[ndim])), *keys)
        torch.testing.assert_close(rows, the_map(block, x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"subsample": "before"}, {"attention": "space"}], ids=str)
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_rows_times_g_are_the_operation(instantiation, options):
    """What the block computes is these weights times g, then W_z."""
    block = random_block(4, 3, instantiation=instantiation, norm=False, **options)
    x = normal(2, 4, *SIZES[3])
    weights = attention_rows(block, x, places(SIZES[3])).flatten(2)
    *_, g = block.embed(x)
    y = (weights @ g.flatten(2).mT).mT.unflatten(2, SIZES[3])
    torch.testing.assert_close(x + block.w_z(y), block(x), rtol=0, atol=1e-12)


PARTS = {
    "space": ({"attention": "space"}, lambda t, s: t[0] == s[0]),
    "space, sub-sampled": ({"attention": "space", "subsample": "before"}, lambda t, s: t[0] == s[0]),
    "time": ({"attention": "time"}, lambda t, s: t[1:] == s[1:]),
    "groups": ({"frames_per_group": 2}, lambda t, s: t[0] // 2 == s[0] // 2),
    "groups, sub-sampled": (
        {"frames_per_group": 2, "subsample": "after"},
        lambda t, s: t[0] // 2 == s[0] // 2,
    ),
    "time in groups": (
        {"attention": "time", "frames_per_group": 2},
        lambda t, s: t[0] // 2 == s[0] // 2 and t[1:] == s[1:],
    ),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_a_part_to_look_at(instantiation, part):
    """Zero where the block may not look, and elsewhere the map of this part alone."""
    options, may_look = PARTS[part]
    block = random_block(4, instantiation=instantiation, **options)
    everywhere = random_block(4, instantiation=instantiation, subsample=options.get("subsample"))
    x = normal(2, 4, *SIZES[3])
    rows = attention_rows(block, x, places(SIZES[3]))
    whole = the_map(everywhere, x)  # of the same weights
    keys = places(rows.shape[2:])
    for at, place in enumerate(places(SIZES[3])):
        seen = torch.tensor([may_look(place, key) for key in keys])
        row, all_keys = rows[:, at].flatten(1), whole[:, at].flatten(1)
        assert not row[:, ~seen].any()
        expected = all_keys[:, seen]
        if instantiation in SOFTMAX_FORMS:
            expected = expected / expected.sum(1, keepdim=True)
            torch.testing.assert_close(row.sum(1), torch.ones(2).double(), rtol=0, atol=1e-14)
        else:  # divided by the number of positions looked at
            expected = expected * len(keys) / seen.sum()
        torch.testing.assert_close(row[:, seen], expected, rtol=0, atol=1e-13)


def test_the_order_of_queries_and_negative_ones():
    block = random_block(4, ndim=2)
    x = normal(2, 4, 5, 4)
    rows = attention_rows(block, x, [(4, 0), (-1, -4), (0, 3), (4, 0)])
    whole = the_map(block, x).unflatten(1, (5, 4))
    expected = torch.stack([whole[:, 4, 0], whole[:, 4, 0], whole[:, 0, 3], whole[:, 4, 0]], 1)
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-14)
    assert torch.equal(attention_rows(block, x, torch.tensor([[4, 0], [0, 3]])), rows[:, [0, 2]])
    assert attention_rows(block, x, []).shape == (2, 0, 5, 4)
    assert attention_rows(block, x[:0], [(0, 0)]).shape == (0, 1, 5, 4)


def test_replaced_layers_count():
    block = random_block(4, ndim=2)
    x = normal(1, 4, 5, 4)
    plain = attention_rows(block, x, [(2, 2)])
    block.theta.register_forward_hook(lambda _, __, output: 2 * output)
    assert not torch.allclose(attention_rows(block, x, [(2, 2)]), plain)
    torch.testing.assert_close(attention_rows(block, x, [(2, 2)])[:, 0], the_map(block, x)[:, 10])


def test_gradients():
    for part in ("time in groups", "groups, sub-sampled"):
        block = random_block(2, **PARTS[part][0])
        x = normal(1, 2, 4, 2, 2).requires_grad_()
        queries = [(3, 1, 0), (0, 0, 1)]
        assert torch.autograd.gradcheck(lambda x: attention_rows(block, x, queries), x)  # noqa: B023


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_half_precision(instantiation):
    block = random_block(4, ndim=1, instantiation=instantiation)
    x = normal(1, 4, 7)
    with torch.no_grad():
        exact = attention_rows(block, x, [(2,)])
        rows = attention_rows(block.half(), x.half(), [(2,)])
    assert rows.dtype == torch.float16
    torch.testing.assert_close(rows.double(), exact, rtol=0, atol=0.02 * exact.abs().max().item())


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ([(0, 0)], r"queries: \(0, 0\) is not a position in a map of size \(4, 5, 3\); it must be 3 whole"),
        ([(0, 0, 0), (4, 0, 0)], r"queries: \(4, 0, 0\) is not a position"),
        ([(0, -6, 0)], r"queries: \(0, -6, 0\) is not a position"),
        ([(0, 0.5, 0)], r"queries: \(0, 0.5, 0\) is not a position"),
        ([1], "queries: 1 is not a position"),
        (["012"], "queries: '012' is not a position"),
    ],
)
def test_a_wrong_query_is_named(queries, message):
    with pytest.raises(ValueError, match=message):
        attention_rows(NonLocalBlock(4), torch.zeros(1, 4, 4, 5, 3), queries)


def test_a_wrong_input_or_block_is_named():
    with pytest.raises(ValueError, match="has 3 channels; the block has in_channels=4"):
        attention_rows(NonLocalBlock(4), torch.zeros(1, 3, 4, 5, 3), [(0, 0, 0)])
    with pytest.raises(TypeError, match="block is a Conv3d; it must be a"):
        attention_rows(torch.nn.Conv3d(4, 4, 1), torch.zeros(1, 4, 4, 5, 3), [(0, 0, 0)])
