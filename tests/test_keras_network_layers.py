"""The layers that the Keras networks have of their own: by hand, and against PyTorch's."""

import numpy as np
import pytest
import torch

from nlutils.course import import_keras

keras = import_keras("tensorflow")

from nlutils.keras.models.layers import (  # noqa: E402
    BatchAsFrames,
    FramesAsBatch,
    MeanProbability,
    ResponseNorm,
    Snapshots,
)
from nlutils.torch.models.two_stream import frames_and_stacks  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def float64():
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(before[0])
    keras.config.set_dtype_policy(before[1])


def noise(shapes, batch=2, seed=0):
    """Clips, channels last: one array, or a list of them for two inputs."""
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=(batch, *shape)) for shape in shapes]
    return arrays if len(arrays) > 1 else arrays[0]


def as_torch(clips):
    if isinstance(clips, list):
        return tuple(as_torch(part) for part in clips)
    return torch.from_numpy(clips).movedim(-1, 1)


def numbers(tensor):
    return keras.ops.convert_to_numpy(tensor)


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
