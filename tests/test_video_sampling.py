"""Exactly as many frames as asked for, from clips of any length."""

import numpy as np
import pytest

from nlutils.video.sampling import sample_indices, sample_windows, segment_indices


@pytest.mark.parametrize("length", [1, 2, 3, 7, 15, 16, 17, 31, 32, 40, 581, 10**9])
@pytest.mark.parametrize("frames", [1, 2, 16])
@pytest.mark.parametrize("stride", [1, 2, 5])
def test_any_length_gives_exactly_the_frames(length, frames, stride):
    rng = np.random.default_rng(0)
    for indices in (
        *(sample_indices(length, frames, stride=stride, position=p) for p in ("start", "centre", "end", 0.3)),
        sample_indices(length, frames, stride=stride, position="random", rng=rng),
        segment_indices(length, frames),
        segment_indices(length, frames, rng=rng),
    ):
        assert indices.shape == (frames,)
        assert indices.dtype == np.int64
        assert indices.min() >= 0
        assert indices.max() < length
        assert (np.diff(indices) >= 0).all()


def test_windows_by_hand():
    assert sample_indices(10, 4).tolist() == [3, 4, 5, 6]
    assert sample_indices(10, 4, stride=2).tolist() == [2, 4, 6, 8]
    assert sample_indices(10, 4, stride=2, position="start").tolist() == [0, 2, 4, 6]
    assert sample_indices(10, 4, stride=2, position="end").tolist() == [3, 5, 7, 9]
    assert sample_indices(10, 4, stride=2, position=1 / 3).tolist() == [1, 3, 5, 7]
    assert sample_indices(10, 1, position="end").tolist() == [9]


def test_short_clips_are_spread_evenly():
    assert sample_indices(7, 4, stride=2).tolist() == [0, 2, 4, 6]  # just long enough
    assert sample_indices(6, 4, stride=2).tolist() == [0, 2, 3, 5]
    assert sample_indices(3, 6).tolist() == [0, 0, 1, 1, 2, 2]
    assert sample_indices(1, 5, stride=4, position="end").tolist() == [0] * 5


def test_segments_by_hand():
    assert segment_indices(12, 3).tolist() == [2, 6, 10]
    assert segment_indices(2, 4).tolist() == [0, 0, 1, 1]
    drawn = np.stack([segment_indices(12, 3, rng=np.random.default_rng(seed)) for seed in range(200)])
    for column, low in zip(drawn.T, (0, 4, 8), strict=True):
        assert set(column) == set(range(low, low + 4))


def test_random_windows_reach_every_start_and_repeat_with_the_seed():
    starts = [
        sample_indices(10, 4, position="random", rng=np.random.default_rng(seed))[0] for seed in range(200)
    ]
    assert set(starts) == set(range(7))
    again = sample_indices(10, 4, position="random", rng=np.random.default_rng(0))
    assert again[0] == starts[0]


def test_test_time_windows():
    assert sample_windows(20, 4, 3, stride=2).tolist() == [[0, 2, 4, 6], [7, 9, 11, 13], [13, 15, 17, 19]]
    np.testing.assert_array_equal(sample_windows(20, 4, 1)[0], sample_indices(20, 4))
    assert sample_windows(1, 4, 2).tolist() == [[0] * 4] * 2


@pytest.mark.parametrize(
    ("arguments", "named", "message"),
    [
        ((0, 4), {}, "length=0"),
        ((10, 0), {}, "frames=0"),
        ((10, 2.5), {}, "frames=2.5"),
        ((10, 4), {"stride": 0}, "stride=0"),
        ((10, 4), {"position": "center"}, "position='center'"),
        ((10, 4), {"position": 1.5}, "position=1.5"),
        ((10, 4), {"position": float("nan")}, "position=nan"),
        ((10, 4), {"position": None}, "position=None"),
        ((10, 4), {"position": "random"}, "rng=None"),
        ((10, 4), {"position": "random", "rng": 7}, "rng=7"),
        ((10, 4), {"rng": np.random.default_rng(0)}, "position='random'"),
    ],
)
def test_wrong_arguments_are_named(arguments, named, message):
    with pytest.raises(ValueError, match=message):
        sample_indices(*arguments, **named)
