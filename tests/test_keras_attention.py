"""Rows of the map in Keras: against the map itself, and what other positions than the visible ones get."""

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
from keras import ops

from nlutils.exchange import keras_to_torch
from nlutils.instantiations import INSTANTIATIONS, SOFTMAX_FORMS
from nlutils.keras import NonLocalBlock, attention_rows, pairwise

SIZES = {1: (7,), 2: (5, 4), 3: (4, 5, 3)}
QUERIES = {1: [(0,), (6,), (-1,)], 2: [(0, 0), (4, 1), (-1, -4)], 3: [(0, 0, 0), (3, 4, 2), (-2, 1, -1)]}


def random_block(x, **options):
    block = NonLocalBlock(6, 4, ndim=x.ndim - 2, dtype="float64", **options)
    block.build(x.shape)
    rng = np.random.default_rng(1)
    for variable in block.trainable_variables:
        variable.assign(rng.uniform(-1, 1, variable.shape))
    return block


def features(*shape):
    return np.random.default_rng(2).normal(size=shape)


def numpy(tensor):
    return ops.convert_to_numpy(tensor)


@pytest.mark.parametrize("subsample", [None, "before", "after"])
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_rows_of_the_map(instantiation, ndim, subsample):
    x = features(2, *SIZES[ndim], 6)
    block = random_block(x, instantiation=instantiation, subsample=subsample)
    theta, phi, _ = block.embed(ops.convert_to_tensor(x))
    grid = tuple(phi.shape[1:-1])
    theta, phi = (ops.reshape(maps, (2, -1, maps.shape[-1])) for maps in (theta, phi))
    w_f = None if block.w_f is None else ops.convert_to_tensor(block.w_f)
    whole = numpy(pairwise(theta, phi, instantiation, w_f=w_f)).reshape(2, *SIZES[ndim], *grid)
    rows = numpy(attention_rows(block, x, QUERIES[ndim]))
    expected = np.stack([whole[(slice(None), *query)] for query in QUERIES[ndim]], axis=1)
    np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-13)
    if instantiation in SOFTMAX_FORMS:
        np.testing.assert_allclose(rows.reshape(2, 3, -1).sum(2), 1, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("options", "visible"),
    [
        ({"attention": "space"}, np.s_[2:3, :, :]),
        ({"attention": "time"}, np.s_[:, 1:2, 2:3]),
        ({"frames_per_group": 2}, np.s_[2:4, :, :]),
        ({"attention": "time", "frames_per_group": 2}, np.s_[2:4, 1:2, 2:3]),
    ],
    ids=str,
)
def test_a_row_is_zero_where_the_block_does_not_look(options, visible):
    x = features(1, 4, 5, 3, 6)
    row = numpy(attention_rows(random_block(x, **options), x, [(2, 1, 2)]))[0, 0]
    looks = np.zeros(row.shape, dtype=bool)
    looks[visible] = True
    assert ((row > 0) == looks).all()
    np.testing.assert_allclose(row.sum(), 1, rtol=0, atol=1e-14)


def test_rows_are_what_the_block_computes_with():
    # y_i of the block, and the row's sum over j of f / C times g_j.
    x = features(1, 4, 5, 3, 6)
    for options in ({"attention": "space"}, {"frames_per_group": 2}, {"instantiation": "concatenation"}):
        block = random_block(x, **options)
        rows = numpy(attention_rows(block, x, [(1, 2, 0), (3, 0, 1)]))[0]
        g = numpy(block.g(x))[0]
        y = np.einsum("qthw,thwc->qc", rows, g)
        z = numpy(block.norm(block.w_z(y[None, :, None, None]), training=False))[0, :, 0, 0]
        places = ([1, 3], [2, 0], [0, 1])
        np.testing.assert_allclose(numpy(block(x))[0][places], x[0][places] + z, rtol=0, atol=1e-12)


def test_same_rows_as_pytorch():
    import torch

    import nlutils.torch

    x = features(2, 4, 5, 3, 6)
    for options in (
        {"instantiation": "dot_product", "subsample": "before"},
        {"attention": "time", "scale": True},
    ):
        block = random_block(x, **options)
        other = nlutils.torch.NonLocalBlock(6, 4, **options).double()
        keras_to_torch(block, other)
        rows = nlutils.torch.attention_rows(other, torch.from_numpy(x).movedim(-1, 1), QUERIES[3])
        np.testing.assert_allclose(
            numpy(attention_rows(block, x, QUERIES[3])), rows.detach().numpy(), rtol=0, atol=1e-13
        )


def test_a_large_map_is_not_built():
    x = keras.random.normal((1, 64, 40, 40, 6), seed=0)  # the whole map would have 39 GiB
    block = NonLocalBlock(6, 4)
    block.build(x.shape)
    rows = attention_rows(block, x, [(0, 0, 0), (63, 39, 39)])
    assert rows.shape == (1, 2, 64, 40, 40)


def test_no_query():
    x = features(2, 4, 5, 6)
    assert attention_rows(random_block(x, subsample="before"), x, []).shape == (2, 0, 2, 2)


@pytest.mark.parametrize("query", [(5, 0), (0, 4), (0, 0, 0), (-6, 0)])
def test_a_wrong_query_is_named(query):
    x = features(1, 5, 4, 6)
    with pytest.raises(ValueError, match=r"queries: \(.*\) is not a position in a map of size \(5, 4\)"):
        attention_rows(random_block(x), x, [(0, 0), query])


def test_other_faults_are_named():
    with pytest.raises(TypeError, match=r"block is a Identity; it must be a nlutils\.keras\.NonLocalBlock"):
        attention_rows(keras.layers.Identity(), features(1, 5, 4, 6), [(0, 0)])
    with pytest.raises(ValueError, match="block has no weights yet"):
        attention_rows(NonLocalBlock(ndim=2), features(1, 5, 4, 6), [(0, 0)])
    with pytest.raises(ValueError, match="must have the axes"):
        attention_rows(random_block(features(1, 5, 4, 6)), features(5, 4, 6), [(0, 0)])
