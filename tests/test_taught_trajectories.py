"""What notebook 15 writes out: tracks, descriptors, Fisher vectors and pooling, equal to those in nlutils."""

import cv2
import numpy as np
import pytest
import torch

from nlutils.course.sources import lift
from nlutils.torch.models.trajectory import NORMALISATIONS, normalise_maps, pool_tracks
from nlutils.video import fisher
from nlutils.video.descriptors import orientation_histogram, track_shape
from nlutils.video.procedural import Actions
from nlutils.video.tracks import Tracks, follow_points, remove_camera, sample_points


def taught(name):
    return lift("trajectories", name)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def test_points_are_followed_and_lost_alike():
    flow = (3 * random(6, 9, 11, 2)).astype(np.float32)
    points = np.random.default_rng(1).uniform((0, 0), (10, 8), (80, 2)).astype(np.float32)
    path = taught("follow")(flow, points)
    assert np.array_equal(path, follow_points(points, flow), equal_nan=True)
    lost = np.isnan(path[:, -1, 0]).mean()
    assert 0.2 < lost < 1


@pytest.mark.parametrize(("step", "quality"), [(5, 0.001), (3, 0.01)])
def test_the_grid_has_the_same_points(step, quality):
    frame = Actions(12, frames=2, size=(96, 128), seed=4)[0].frames[0]
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    points = taught("grid_points")(grey, step, quality)
    assert np.array_equal(points, sample_points(grey, np.zeros((0, 2)), step, quality))
    assert 50 < len(points) < (96 // step) * (128 // step)


def test_the_cameras_motion_is_removed_alike():
    homography = np.array([[1.01, 0.02, 1.5], [-0.01, 0.99, -1.0], [1e-4, -2e-4, 1]])
    w = random(9, 11, 2)
    ours = remove_camera(w[None], [homography])[0]
    assert np.abs(taught("own_motion")(w, homography) - ours).max() < 1e-5
    assert np.abs(ours - w).max() > 1


def test_shapes_are_alike():
    motion = random(7, 15, 2).astype(np.float32)
    positions = np.concatenate([np.zeros((7, 1, 2)), motion.cumsum(axis=1)], axis=1)
    tracks = Tracks(positions, motion, np.zeros(7, np.int64), np.ones(7, np.float32))
    shape = taught("shape")
    assert np.abs(np.array([shape(steps) for steps in motion]) - track_shape(tracks)).max() < 1e-6


@pytest.mark.parametrize("bins", [4, 8])
def test_histograms_are_alike(bins):
    a, b = random(2, 6, 7)
    a[0, 0] = b[0, 0] = 0
    ours = orientation_histogram(a, b, bins).sum(axis=(0, 1))
    assert np.abs(taught("orientations")(a, b, bins) - ours).max() < 1e-10
    assert ours.min() > 0


def test_the_solved_exercise_counts_what_stays():
    u, v = random(2, 12, 12)
    ours = orientation_histogram(u, v, 9, still=0.4).sum(axis=(0, 1))
    assert np.abs(taught("hof")(u, v) - ours).max() < 1e-10
    assert ours[8] > 1


def test_fisher_vectors_are_alike():
    w, mu, sigma = np.array([0.2, 0.5, 0.3]), random(3, 4), 0.5 + np.abs(random(3, 4, seed=1))
    X = 1.5 * random(20, 4, seed=2)
    mixture = fisher.Mixture(w, mu, sigma**2)
    assert np.abs(taught("log_joint")(X, w, mu, sigma) - mixture.log_joint(X)).max() < 1e-9
    assert abs(taught("log_likelihood")(X, w, mu, sigma) - mixture.log_likelihood(X).mean()) < 1e-9
    vector = fisher.fisher_vector(X, mixture)
    assert np.abs(taught("fisher_vector")(X, w, mu, sigma) - vector).max() < 1e-9
    assert np.abs(taught("improved")(vector) - fisher.improved(vector)).max() < 1e-12
    assert np.abs(vector).max() > 0.1


@pytest.mark.parametrize("kind", NORMALISATIONS)
def test_maps_are_normalised_and_pooled_alike(kind):
    maps = torch.from_numpy(np.abs(random(9, 5, 4, 6)))
    maps[:, 2] = 0  # a channel that is silent
    ours = normalise_maps(maps, kind)
    assert torch.equal(taught("normalise")(maps, kind), ours)
    # Halves are rounded alike, and places beyond the last row and column are theirs.
    positions = np.random.default_rng(1).integers(0, 96, (30, 8, 2)).astype(np.float32)
    start = np.random.default_rng(2).integers(0, 3, 30)
    tracks = Tracks(positions, np.diff(positions, axis=1), start, np.ones(30, np.float32))
    pool = taught("pool")
    pooled = torch.stack([pool(ours, p, s, 16) for p, s in zip(positions, start, strict=True)])
    assert (pooled - pool_tracks(ours, tracks, 16)).abs().max() < 1e-5
    assert pooled.max() > 1
