"""The layers that the Keras networks have of their own: by hand, and against PyTorch's."""

import numpy as np
import pytest
import torch

from nlutils.course import import_keras

keras = import_keras("tensorflow")

from keras_cases import as_torch, noise, numbers  # noqa: E402

from nlutils.keras.models.layers import (  # noqa: E402
    BatchAsFrames,
    FramesAsBatch,
    LeastClip,
    MeanProbability,
    ResponseNorm,
    Snapshots,
)
from nlutils.torch.models.two_stream import frames_and_stacks  # noqa: E402

torch.set_num_threads(1)


@pytest.mark.parametrize(
    "values", [(5, 1e-4, 0.75, 1.0), (5, 5e-4, 0.75, 2.0), (4, 1e-2, 0.5, 1.5), (1, 1, 1, 1)]
)
@pytest.mark.usefixtures("float64")
def test_response_normalisation(values):
    """b_c = a_c / (k + alpha / n * the sum of a^2 over n channels)^beta, as in Caffe and PyTorch."""
    n, alpha, beta, k = values
    a = 30 * np.random.default_rng(0).normal(size=(2, 3, 4, 7))
    expected = np.empty_like(a)
    for c in range(7):
        around = a[..., max(0, c - n // 2) : c + (n - 1) // 2 + 1]
        expected[..., c] = a[..., c] / (k + alpha / n * (around**2).sum(axis=-1)) ** beta
    layer = ResponseNorm(n, alpha=alpha, beta=beta, k=k)
    found = numbers(layer(a))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    theirs = torch.nn.LocalResponseNorm(n, alpha, beta, k)(as_torch(a)).movedim(1, -1)
    np.testing.assert_allclose(found, theirs.numpy(), rtol=1e-12)
    assert not np.allclose(expected, a, rtol=1e-3)
    again = ResponseNorm.from_config(layer.get_config())
    np.testing.assert_array_equal(numbers(again(a)), found)


def test_response_normalisation_in_half_precision():
    """300^2 is more than float16 holds."""
    a = np.full((1, 1, 1, 5), 300.0)
    found = numbers(ResponseNorm(k=2.0, alpha=5e-4, dtype="float16")(a.astype("float16")))
    assert found.dtype == np.float16
    assert found[0, 0, 0, 2] == pytest.approx(300 / (2 + 1e-4 * 5 * 300**2) ** 0.75, rel=1e-2)


def test_frames_and_back():
    clips = noise([(3, 2, 5, 4)])
    frames = FramesAsBatch()(clips)
    assert frames.shape == (6, 2, 5, 4)
    np.testing.assert_array_equal(numbers(frames[4]), clips[1, 1].astype("float32"))
    sums = keras.ops.sum(frames, axis=(1, 2))
    back = numbers(BatchAsFrames()(sums, clips))
    np.testing.assert_allclose(back, clips.sum(axis=(2, 3)), atol=1e-5)


def test_mean_probability():
    votes = 3 * noise([(4, 5)])
    by_hand = np.exp(votes) / np.exp(votes).sum(axis=2, keepdims=True)
    np.testing.assert_allclose(numbers(MeanProbability()(votes)), np.log(by_hand.mean(axis=1)), atol=1e-5)


def test_mean_probability_in_half_precision():
    """3000 votes in float16: their number is rounded and so is a sum of as many probabilities."""
    votes = np.tile(np.array([0.0, 1.0, 2.0], "float16"), (1, 3001, 1))
    found = numbers(MeanProbability(dtype="float16")(votes))
    assert found.dtype == np.float16
    expected = np.arange(3) - np.log(np.exp(np.arange(3)).sum())
    np.testing.assert_array_equal(found[0], expected.astype("float16"))


def test_the_least_clip():
    layer = LeastClip((3, 4, 5))
    clips = noise([(3, 4, 5, 2)]).astype("float32")
    np.testing.assert_array_equal(numbers(layer(clips)), clips)
    assert layer.compute_output_shape((None, None, 4, None, 2)) == (None, None, 4, None, 2)
    again = LeastClip.from_config(layer.get_config())
    for small in (clips[:, 1:], clips[:, :, 1:], clips[..., 1:, :]):
        with pytest.raises(ValueError, match=r"are too small: T, H and W must be at least 3, 4, 5"):
            again(small)


@pytest.mark.parametrize(("frames", "fields", "stack"), [(2, 4, 2), (9, 7, 2), (3, 10, 10), (6, 6, 1)])
@pytest.mark.usefixtures("float64")
def test_snapshots_are_those_of_pytorch(frames, fields, stack):
    rgb, flow = noise([(frames, 3, 4, 3), (fields, 3, 4, 2)])
    expected = frames_and_stacks(*as_torch([rgb, flow]), stack)
    layer = Snapshots(stack)
    found = layer(rgb, flow)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(numbers(one), other.movedim(1, -1).numpy())
    shapes = layer.compute_output_shape(rgb.shape, flow.shape)
    assert [tuple(shape) for shape in shapes] == [tuple(one.shape) for one in found]


@pytest.mark.parametrize(
    ("rgb", "flow", "words"),
    [
        ((1, 2, 3, 4, 3), (1, 9, 3, 4, 2), "flow has 9 fields; stack=10 needs at least as many"),
        (
            (1, 2, 3, 4, 3),
            (1, 30, 3, 4, 2),
            "rgb has 2 frames for 3 stacks of flow; give one a stack or more",
        ),
        ((1, 2, 3, 4, 3), (1, 20, 3, 5, 2), "must agree in batch, height and width"),
        ((2, 2, 3, 4, 3), (1, 20, 3, 4, 2), "must agree in batch, height and width"),
    ],
)
def test_snapshots_that_do_not_fit(rgb, flow, words):
    with pytest.raises(ValueError, match=words):
        Snapshots(10)(np.zeros(rgb), np.zeros(flow))
