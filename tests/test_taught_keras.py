"""The Keras block that notebook 06 writes out: equal to the one in nlutils on the same weights."""

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest

from nlutils.course.sources import lift
from nlutils.instantiations import INSTANTIATIONS
from nlutils.keras import NonLocalBlock, pairwise

numpy = keras.ops.convert_to_numpy


@pytest.fixture(scope="module")
def taught():
    return lift("block_in_keras", "NonLocalBlock")


@pytest.fixture
def pair(taught):
    """The taught block and the packaged one, built for 6 channels, with the same random weights."""
    rng = np.random.default_rng(1)
    blocks = taught(4), NonLocalBlock(6, 4)
    for block in blocks:
        block.build((None, 3, 4, 5, 6))
    # A moving variance must be positive.
    weights = [rng.uniform(0.5, 1.5, size=weight.shape) for weight in blocks[0].weights]
    for name in ("theta", "phi", "g", "w_z", "norm"):
        first, second = (getattr(block, name) for block in blocks)
        assert [weight.shape for weight in first.weights] == [weight.shape for weight in second.weights]
    for block in blocks:
        block.set_weights(weights)
    return blocks


def features():
    return np.random.default_rng(2).normal(size=(2, 3, 4, 5, 6)).astype("float32")


@pytest.mark.parametrize("training", [False, True])
def test_taught_block_equals_the_packaged_one(pair, training):
    x = features()
    taught_z, packaged_z = (numpy(block(x, training=training)) for block in pair)
    np.testing.assert_allclose(taught_z, packaged_z, rtol=0, atol=1e-5)
    assert np.abs(packaged_z - x).max() > 0.1
    assert np.abs(packaged_z - numpy(pair[1](x, training=not training))).max() > 0.1


def test_taught_block_keeps_the_same_statistics(pair):
    before = numpy(pair[1].norm.moving_mean).copy()
    for block in pair:
        block(features(), training=True)
    for name in ("moving_mean", "moving_variance"):
        taught_value, packaged_value = (numpy(getattr(block.norm, name)) for block in pair)
        np.testing.assert_allclose(taught_value, packaged_value, rtol=1e-5)
    assert not np.array_equal(numpy(pair[1].norm.moving_mean), before)


def test_taught_block_starts_as_the_identity_with_the_packaged_defaults(taught):
    keras.utils.set_random_seed(0)
    block, packaged, x = taught(), NonLocalBlock(), features()
    for training in (False, True):
        np.testing.assert_array_equal(numpy(block(x, training=training)), x)
    packaged.build(x.shape)
    assert [weight.shape for weight in block.weights] == [weight.shape for weight in packaged.weights]
    assert (block.norm.momentum, block.norm.epsilon) == (packaged.norm.momentum, packaged.norm.epsilon)
    wide = taught()
    wide.build((None, None, None, None, 512))
    assert sum(int(np.prod(weight.shape)) for weight in wide.trainable_weights) == 526_592
    for name in ("theta", "phi", "g", "w_z"):
        assert numpy(getattr(wide, name).kernel).std() == pytest.approx(0.01, rel=0.02)
        assert not numpy(getattr(wide, name).bias).any()


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_taught_map_equals_the_packaged_one(instantiation):
    rng = np.random.default_rng(3)
    theta, phi = (rng.normal(size=(2, count, 4)).astype("float32") for count in (7, 5))
    w_f = rng.normal(size=8).astype("float32") if instantiation == "concatenation" else None
    taught_map = numpy(lift("block_in_keras", "pairwise")(theta, phi, instantiation, w_f))
    packaged_map = numpy(pairwise(theta, phi, instantiation, w_f=w_f))
    assert taught_map.shape == (2, 7, 5)
    np.testing.assert_allclose(taught_map, packaged_map, rtol=1e-5, atol=1e-6)
    assert np.ptp(packaged_map) > 0.1
