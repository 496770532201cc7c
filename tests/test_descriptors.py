"""Descriptors of tracks: widths, cells by hand, what they do not see, normalisation, bad input."""

import cv2
import numpy as np
import pytest

from nlutils.video import descriptors
from nlutils.video.descriptors import (
    SMALL,
    describe,
    improved_trajectories,
    normalised,
    orientation_histogram,
    track_shape,
)
from nlutils.video.fisher import TrajectoryClassifier
from nlutils.video.procedural import Actions
from nlutils.video.tracks import Level, Limits, Tracks, dense_tracks, motion_levels

LOOSE = Limits(least_spread=0.3, least_motion=0.3)


def level_of(grey, motion):
    return Level(1.0, (1.0, 1.0), np.asarray(grey, np.uint8), np.float32(motion), np.float32(motion))


def track_at(x, y, length=15, motion=None):
    """One track that stays at (x, y) and starts in frame 0."""
    positions = np.tile(np.float32([x, y]), (1, length + 1, 1))
    motion = np.zeros((1, length, 2), np.float32) if motion is None else np.float32(motion)[None]
    return Tracks(positions, motion, np.zeros(1, np.int64), np.ones(1, np.float32))


@pytest.fixture(scope="module")
def clip():
    return Actions(12, frames=17, size=(64, 96), seed=1)[1]


def test_widths_are_those_of_the_released_code(clip):
    # The released files hold 10 + 30 + 30 + 96 + 108 + 96 + 96 numbers a track: 10 about it, 30 positions,
    # and 426 of descriptors (wanglimin/TDD, import_idt.m).
    found = improved_trajectories(clip.frames, limits=LOOSE)
    widths = {name: values.shape[1] for name, values in found.items()}
    assert widths == {"shape": 30, "hog": 96, "hof": 108, "mbhx": 96, "mbhy": 96}
    assert sum(widths.values()) == 426
    counts = {len(values) for values in found.values()}
    assert len(counts) == 1
    assert counts.pop() > 20
    for values in found.values():
        assert values.dtype == np.float32
        assert np.isfinite(values).all()


def test_only_what_is_asked_for_in_that_order(clip):
    levels = motion_levels(clip.frames, scales=2)
    tracks = dense_tracks(levels, limits=LOOSE)
    found, every = describe(levels, tracks, ("hof", "shape")), describe(levels, tracks)
    assert list(found) == ["hof", "shape"]
    assert all(np.array_equal(found[name], every[name]) for name in found)


def test_no_track_is_no_row(clip):
    levels = motion_levels(clip.frames, scales=1)
    tracks = dense_tracks(levels, limits=Limits(least_motion=1e9))
    assert {name: values.shape for name, values in describe(levels, tracks).items()} == {
        "shape": (0, 30),
        "hog": (0, 96),
        "hof": (0, 108),
        "mbhx": (0, 96),
        "mbhy": (0, 96),
    }


def test_orientations_are_shared_between_two_bins_by_hand():
    # 0, 22.5 (between bins 0 and 1), 90, 180, 270 and 348.75 degrees (three quarters to bin 7, wrapped)
    angle = np.deg2rad([[0, 22.5, 90], [180, 270, 337.5 + 11.25]])
    histogram = orientation_histogram(2 * np.cos(angle), 2 * np.sin(angle), 8)
    assert histogram.shape == (2, 3, 8)
    expected = np.zeros((2, 3, 8))
    expected[0, 0, 0] = expected[0, 2, 2] = expected[1, 0, 4] = expected[1, 1, 6] = 2
    expected[0, 1, :2] = 1
    expected[1, 2, 7], expected[1, 2, 0] = 2 * 0.25, 2 * 0.75
    assert np.allclose(histogram, expected)


def test_what_stays_has_a_bin_of_its_own():
    histogram = orientation_histogram(np.array([[0.4, 0.0, 0.0]]), np.array([[0.0, 0.0, 3.0]]), 9, still=0.4)
    assert np.allclose(histogram[0, :2], np.eye(9)[[8, 8]])
    assert np.allclose(histogram[0, 2], 3 * np.eye(9)[2])


def test_normalised_by_hand():
    values = normalised([[0.95, 0.0], [0.0, 0.0]])
    assert np.allclose(values, [[np.sqrt(1 / 1.05), np.sqrt(0.05 / 1.05)], [np.sqrt(0.5), np.sqrt(0.5)]])
    assert np.allclose((normalised(np.random.default_rng(0).random((5, 36))) ** 2).sum(axis=1), 1)


def test_a_hog_cell_by_hand():
    """Grey rises by 3 a column in the left half and by 4 a row in the right half of a 32 x 32 patch."""
    x, y = np.meshgrid(np.arange(36), np.arange(36))
    grey = np.where(x < 18, 3 * x, 4 * y)
    levels = [level_of(np.tile(grey, (16, 1, 1)), np.zeros((15, 36, 36, 2)))]
    values = describe(levels, track_at(18, 18), ("hog",))["hog"].reshape(3, 2, 2, 8)
    assert np.allclose(values, values[0])  # nothing changes from span to span
    gradient_x, gradient_y = np.zeros((36, 36)), np.zeros((36, 36))
    gradient_x[:, 1:-1] = grey[:, 2:] - grey[:, :-2].astype(float)
    gradient_y[1:-1] = grey[2:] - grey[:-2].astype(float)
    # The patch is columns and rows 2 to 33. Cell (column 0, row 0): 16 columns; those from 2 to 16 have
    # gradient (6, 0), column 17 has the border in it. Cell (1, 0): columns 19 to 33 have gradient (0, 8).
    cells = np.zeros((2, 2, 8))
    for column in range(2):
        for row in range(2):
            for i in range(2 + 16 * row, 18 + 16 * row):
                for j in range(2 + 16 * column, 18 + 16 * column):
                    length = np.hypot(gradient_x[i, j], gradient_y[i, j])
                    place = np.arctan2(gradient_y[i, j], gradient_x[i, j]) % (2 * np.pi) / (np.pi / 4)
                    lower = int(place)
                    cells[column, row, lower % 8] += length * (1 - place + lower)
                    cells[column, row, (lower + 1) % 8] += length * (place - lower)
    assert cells[0, 0, 0] >= 16 * 15 * 6
    assert cells[1, 0, 2] >= 16 * 15 * 8
    expected = np.sqrt((cells + 0.05) / (cells + 0.05).sum())
    assert np.allclose(values[0], expected, atol=1e-6)


def test_hof_counts_the_pixels_that_stay():
    motion = np.zeros((15, 40, 40, 2))
    motion[:, :, 20:] = (0, -2)  # up, in the right half
    values = describe([level_of(np.zeros((16, 40, 40)), motion)], track_at(20, 20), ("hof",))["hof"]
    cells = np.zeros((2, 2, 9))
    cells[0, :, 8] = 256
    cells[1, :, 6] = 2 * 256
    expected = np.sqrt((cells + 0.05) / (cells + 0.05).sum())
    assert np.allclose(values.reshape(3, 2, 2, 9), expected, atol=1e-6)


def test_mbh_does_not_see_constant_motion(clip):
    levels = motion_levels(clip.frames, scales=1)
    tracks = dense_tracks(levels, limits=LOOSE)
    level = levels[0]
    shifted = Level(level.scale, level.ratio, level.grey, level.flow, level.motion + np.float32([3, -2]))
    before, after = describe(levels, tracks), describe([shifted], tracks)
    for name in ("hog", "mbhx", "mbhy"):
        assert np.allclose(before[name], after[name], atol=1e-5)
    assert not np.allclose(before["hof"], after["hof"], atol=0.1)
    # Nothing but constant motion: no gradient, so all bins are even.
    still = Level(level.scale, level.ratio, level.grey, level.flow, np.full_like(level.motion, 2.5))
    for name in ("mbhx", "mbhy"):
        assert np.allclose(describe([still], tracks)[name], np.sqrt(1 / 32), atol=1e-7)


def test_mbh_sees_where_motion_changes():
    motion = np.zeros((15, 40, 40, 2))
    motion[..., 0] = np.arange(40) * 0.5  # dx grows along x: gradient (1, 0)
    motion[..., 1] = np.arange(40)[:, None] * -0.5  # dy falls along y: gradient (0, -1)
    found = describe([level_of(np.zeros((16, 40, 40)), motion)], track_at(20, 20), ("mbhx", "mbhy"))
    for name, bin in (("mbhx", 0), ("mbhy", 6)):
        cells = np.zeros((4, 8))
        cells[:, bin] = 256
        expected = np.sqrt((cells + 0.05) / (cells + 0.05).sum())
        assert np.allclose(found[name].reshape(3, 4, 8), expected, atol=1e-6)


def test_spans_are_averaged_over_time():
    motion = np.zeros((15, 40, 40, 2))
    motion[5:10] = (2, 0)
    motion[10] = (0, 2)
    values = describe([level_of(np.zeros((16, 40, 40)), motion)], track_at(20, 20), ("hof",))["hof"]
    first, second, third = values.reshape(3, 4, 9)

    def frame(bin, length):
        cells = np.zeros((4, 9))
        cells[:, bin] = 256 * length
        return normalised(cells.ravel()).reshape(4, 9)

    assert np.allclose(first, frame(8, 1), atol=1e-6)
    assert np.allclose(second, frame(0, 2), atol=1e-6)
    assert np.allclose(third, (4 * frame(8, 1) + frame(2, 2)) / 5, atol=1e-6)


def test_patches_move_with_the_track_and_stay_in_the_picture():
    grey = np.random.default_rng(0).integers(0, 255, (16, 50, 60), np.uint8)
    levels = [level_of(grey, np.zeros((15, 50, 60, 2)))]
    corner, near = track_at(0, 0), track_at(16, 16)
    assert np.array_equal(describe(levels, corner)["hog"], describe(levels, near)["hog"])
    moving = track_at(20, 20)
    moving.positions[0, :, 0] += np.arange(16)
    shifted = np.stack([np.roll(frame, -time, axis=1) for time, frame in enumerate(grey)])
    along = describe(levels, moving, ("hog",))["hog"]
    expected = describe([level_of(shifted, np.zeros((15, 50, 60, 2)))], track_at(20, 20), ("hog",))["hog"]
    assert np.allclose(along, expected, atol=1e-6)


def test_shape_is_the_way_in_units_of_its_length():
    steps = np.zeros((15, 2))
    steps[0], steps[1] = (3, 4), (0, -5)
    assert np.allclose(track_shape(track_at(0, 0, motion=steps))[0, :4], [0.3, 0.4, 0, -0.5])
    assert np.array_equal(track_shape(track_at(0, 0)), np.zeros((1, 30)))


def test_levels_describe_what_they_see():
    """A clip of twice the size, one level coarser: nearly the same descriptors."""
    small = Actions(12, frames=17, size=(64, 96), seed=1)[1].frames
    large = np.stack([cv2.resize(frame, (192, 128), interpolation=cv2.INTER_CUBIC) for frame in small])
    fine, coarse = (
        motion_levels(small, scales=1, camera=False),
        motion_levels(large, scales=3, camera=False)[2:],
    )
    fine_tracks = dense_tracks(fine, limits=LOOSE)
    positions = coarse[0].to_clip(fine_tracks.positions).astype(np.float32)
    scale = np.full(len(fine_tracks), 2, np.float32)
    coarse_tracks = Tracks(positions, 2 * fine_tracks.motion, fine_tracks.start, scale)
    first, second = describe(fine, fine_tracks), describe(coarse, coarse_tracks)
    for name in ("shape", "hog", "hof", "mbhx", "mbhy"):
        alike = (first[name] * second[name]).sum(axis=1) / (
            np.linalg.norm(first[name], axis=1) * np.linalg.norm(second[name], axis=1)
        )
        assert np.median(alike) > 0.95


def test_bad_patches_and_spans_are_named(clip):
    levels = motion_levels(clip.frames, scales=1)
    tracks = dense_tracks(levels, limits=LOOSE)
    for options, message in (
        ({"names": ("sift",)}, "names='sift' is not known; use one of 'shape', 'hog'"),
        ({"patch": 33}, "patch=33 does not divide into cells=2; use a multiple of 2"),
        ({"periods": 4}, "periods=4 does not divide tracks of 15 steps"),
        ({"patch": 66}, r"patch=66 is larger than the picture at a level \(64 pixels\)"),
    ):
        with pytest.raises(ValueError, match=message):
            describe(levels, tracks, **options)


def test_eight_small_clips_are_learnt_and_have_tracks():
    actions = Actions(12, frames=17, size=(45, 60), seed=1)
    clips, labels = [actions.render(index) for index in range(8)], [actions.label(i) for i in range(8)]
    described = [improved_trajectories(frames, **SMALL) for frames in clips]
    assert min(len(one["hog"]) for one in described) > 20
    classifier = TrajectoryClassifier(6, dict, gaussians=4).fit(described, labels)
    assert classifier.predict(described).tolist() == labels


def test_numbers_of_the_released_code():
    """What the docstrings and comments say."""
    assert descriptors.BINS == {"hog": 8, "hof": 9, "mbhx": 8, "mbhy": 8}
    assert (descriptors.STILL, descriptors.EVEN) == (0.4, 0.05)
    assert describe.__kwdefaults__ == {"patch": 32, "cells": 2, "periods": 3}
    assert improved_trajectories.__kwdefaults__ == {
        "step": 5,
        "length": 15,
        "patch": 32,
        "scales": 8,
        "median": 5,
        "limits": None,
    }


def test_options_of_whole_chains_are_named(clip):
    with pytest.raises(ValueError, match="patch=0 must be a whole number"):
        improved_trajectories(clip.frames, patch=0)
    found = improved_trajectories(clip.frames, scales=1, limits={"least_spread": 0.3, "least_motion": 0.3})
    expected = improved_trajectories(clip.frames, scales=1, limits=LOOSE)
    assert np.array_equal(found["hof"], expected["hof"])
