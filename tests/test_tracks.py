"""Dense tracks: against true flow and true joints, the grid, the limits, the camera's motion, levels."""

import math

import cv2
import numpy as np
import pytest

from nlutils.video.flow import optical_flow
from nlutils.video.procedural import Actions
from nlutils.video.procedural.texture import Texture
from nlutils.video.tracks import (
    INLIERS,
    MATCHES,
    SCALE_STEP,
    Limits,
    camera_motion,
    dense_tracks,
    follow_points,
    motion_levels,
    remove_camera,
    sample_points,
)

EVERY_TRACK = Limits(least_spread=0, most_spread=math.inf, longest_step=math.inf, least_motion=-1)
# A camera that pans, turns and zooms a little: where pixels of a frame lie in the next.
HOMOGRAPHY = np.array([[1.01, 0.01, 1.5], [-0.01, 1.01, -1.0], [0, 0, 1]])


@pytest.fixture(scope="module")
def clips():
    actions = Actions(12, frames=12, size=(96, 128), seed=1)
    return [actions[index] for index in range(6)]


def lengths(vectors):
    return np.hypot(*np.moveaxis(np.asarray(vectors), -1, 0))


def grid_of(height, width):
    return np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float64)


def seen_by_moving_camera(homography=HOMOGRAPHY, frames=3, size=(96, 128), contrast=25.0):
    """Texture, seen by a camera that moves: grey uint8 (T, H, W), and the flow between frames."""
    texture = Texture.random(np.random.default_rng(0), [120, 120, 120], contrast, longest=60, shortest=8)
    grid, pictures = grid_of(*size), []
    for time in range(frames):
        back = np.linalg.inv(np.linalg.matrix_power(homography, time))
        place = grid @ back[:, :2].T + back[:, 2]
        waves = np.exp(1j * (place[..., :2] / place[..., 2:]) @ texture.waves.T) @ texture.amplitudes[:, 0]
        pictures.append(120 + waves.real)
    target = grid @ homography[:, :2].T + homography[:, 2]
    flow = np.broadcast_to(target[..., :2] / target[..., 2:] - grid, (frames - 1, *size, 2))
    return np.rint(np.clip(pictures, 0, 255)).astype(np.uint8), flow.astype(np.float32)


def between_pixels(field, points):
    """`field` (H, W, ...) at `points`, interpolated linearly."""
    height, width = field.shape[:2]
    x, y = np.clip(points, 0, (width - 1.001, height - 1.001)).T
    column, row = x.astype(int), y.astype(int)
    shape = (-1,) + (1,) * (field.ndim - 2)
    right, below = (x - column).reshape(shape), (y - row).reshape(shape)
    upper = field[row, column] * (1 - right) + field[row, column + 1] * right
    lower = field[row + 1, column] * (1 - right) + field[row + 1, column + 1] * right
    return upper * (1 - below) + lower * below


def true_paths(points, flow, valid):
    """Where points really go: as long as the four pixels around them have valid flow, else NaN."""
    path = np.full((len(points), len(flow) + 1, 2), np.nan)
    path[:, 0] = points
    for time in range(len(flow)):
        known = np.flatnonzero(np.isfinite(path[:, time, 0]))
        known = known[between_pixels(valid[time].astype(float), path[known, time]) > 0.999]
        here = path[known, time]
        path[known, time + 1] = here + between_pixels(flow[time], here)
    return path


def errors(clips, flow_of, median, steps=6):
    """Distances, in pixels, of followed grid points from where they really are, and from where they began."""
    wrong, still = [], []
    for clip in clips:
        level = motion_levels(clip.frames, flow_of(clip), scales=1, median=median, camera=False)[0]
        points = sample_points(level.grey[0], np.zeros((0, 2)), step=3)
        truth = true_paths(points, clip.flow[:steps], clip.valid[:steps])[:, -1]
        wrong.append(lengths(follow_points(points, level.flow[:steps])[:, -1] - truth))
        still.append(lengths(points - truth))
    wrong, still = np.concatenate(wrong), np.concatenate(still)
    known = np.isfinite(wrong)
    assert known.sum() > 500
    return np.median(wrong[known]), np.median(still[known])


def joint_errors(clips, flow_of, median, steps=5):
    """The same for joints that stay visible and move by more than two pixels."""
    wrong, still = [], []
    for clip in clips:
        level = motion_levels(clip.frames, flow_of(clip), scales=1, median=median, camera=False)[0]
        for start in (0, 3, 6):
            seen = clip.visible[start : start + steps + 1].all(axis=0)
            first, last = clip.joints[start, seen], clip.joints[start + steps, seen]
            path = follow_points(first, level.flow[start : start + steps])
            wrong.append(lengths(path[:, -1] - last))
            still.append(lengths(first - last))
    wrong, still = np.concatenate(wrong), np.concatenate(still)
    moving = np.isfinite(wrong) & (still > 2)
    assert moving.sum() > 30
    return np.median(wrong[moving]), np.median(still[moving])


def test_true_flow_takes_points_where_they_go(clips):
    """Measured: 0.002 pixels from the truth after six frames, in which they move by 1.3."""
    error, still = errors(clips, lambda clip: clip.flow, median=5)
    assert error < 0.01
    assert still > 1


def test_estimated_flow_takes_points_near_where_they_go(clips):
    """Measured: 0.35 pixels from the truth."""
    error, still = errors(clips, lambda clip: optical_flow(clip.frames), median=5)
    assert error < 0.5 < 0.5 * still


def test_true_flow_takes_joints_to_joints(clips):
    """Measured: 0.11 pixels after five frames, in which they move by 11.6."""
    error, still = joint_errors(clips, lambda clip: clip.flow, median=5)
    assert error < 0.2
    assert still > 10


def test_estimated_flow_takes_joints_near_joints(clips):
    """Measured: 1.75 pixels; where a limb is thin and fast, the flow is the background's."""
    error, still = joint_errors(clips, lambda clip: optical_flow(clip.frames), median=5)
    assert error < 2.5 < 0.25 * still


def test_the_median_filter_wipes_out_the_limbs_of_a_small_figure():
    actions = Actions(12, frames=12, size=(45, 60), seed=1)
    small = [actions[index] for index in range(6)]
    plain, _ = joint_errors(small, lambda clip: clip.flow, median=1)
    filtered, _ = joint_errors(small, lambda clip: clip.flow, median=5)
    assert plain < 0.2  # measured: 0.08 and 2.9 pixels
    assert filtered > 10 * plain


def test_points_are_the_middles_of_free_cells_with_structure():
    noise = np.random.default_rng(0).integers(0, 255, (12, 17), np.uint8)
    points = sample_points(noise, np.zeros((0, 2)), step=5, quality=0.0)
    assert points.tolist() == [[2, 2], [7, 2], [12, 2], [2, 7], [7, 7], [12, 7]]
    taken = [[9.9, 0.0], [np.nan, np.nan], [16.0, 11.0]]  # the last is beyond the last whole cell
    assert sample_points(noise, taken, step=5, quality=0.0).tolist() == np.delete(points, 1, 0).tolist()
    flat = noise.copy()
    flat[:, :10] = 100
    assert (sample_points(flat, np.zeros((0, 2)), step=5, quality=0.001)[:, 0] > 7).all()
    edge = np.where(np.arange(17) < 7, 50, 200).astype(np.uint8) * np.ones((12, 1), np.uint8)
    assert len(sample_points(edge, np.zeros((0, 2)), step=5)) == 0  # along an edge a point could slide


def test_points_move_with_their_pixel_and_end_at_the_border():
    flow = np.zeros((3, 8, 8, 2), np.float32)
    flow[:, 4, 4:] = (1.5, 0.0)
    flow[1, 4, 5:] = (1.5, -0.5)
    path = follow_points(np.array([[4.0, 4.0], [0.0, 0.0]]), flow)
    # 5.5 is rounded to 6 (the even one), 7 + 1.5 is outside
    assert np.array_equal(path[0], [[4, 4], [5.5, 4], [7, 3.5], [np.nan, np.nan]], equal_nan=True)
    assert np.array_equal(path[1], np.zeros((4, 2)))


def test_limits_by_hand():
    length = 15
    steps = np.zeros((6, length, 2))
    steps[0] = (0.1, 0)  # static: the spread of 0 ... 1.5 is 0.46
    steps[1] = (2, 0)  # kept
    steps[2] = (12, 0)  # random: the spread of 0 ... 180 is 55
    steps[3, :, 0], steps[3, 7] = 0.5, (30, 0)  # a jump: 30 of 37
    steps[4, :, 0], steps[4, 7] = 2.0, (30, 0)  # 30 of 58 is no jump
    steps[5] = (2, 0)  # moves with the camera
    positions = np.concatenate([np.zeros((6, 1, 2)), steps.cumsum(axis=1)], axis=1)
    motion = steps.copy()
    motion[5] = (0.9, 0)
    assert Limits().keep(positions, motion).tolist() == [False, True, False, False, True, False]


def test_tracks_start_on_the_grid_and_new_ones_where_there_is_room(clips):
    levels = motion_levels(clips[0].frames, scales=2)
    tracks = dense_tracks(levels, length=8, limits=EVERY_TRACK)
    assert tracks.positions.shape == (len(tracks), 9, 2)
    assert tracks.motion.shape == (len(tracks), 8, 2)
    assert tracks.length == 8
    assert set(tracks.start) == {0, 1, 2, 3}
    assert set(tracks.scale) == {1.0, np.float32(math.sqrt(2))}
    finest = tracks.where(tracks.scale == 1)
    assert (finest.positions[:, 0] % 5 == 2).all()
    # No more points than cells at a time, and a cell is taken once.
    assert len(finest.where(finest.start == 0)) <= (96 // 5) * (128 // 5)
    for track in finest.where(finest.start == 2).positions[:, 0]:
        older = finest.where(finest.start < 2)
        now = older.positions[np.arange(len(older)), 2 - older.start]
        assert not (now // 5 == track // 5).all(axis=1).any()
    again = dense_tracks(motion_levels(clips[0].frames, scales=2), length=8, limits=EVERY_TRACK)
    assert np.array_equal(tracks.positions, again.positions)


def test_a_clip_too_short_is_named(clips):
    levels = motion_levels(clips[0].frames[:10], scales=1)
    with pytest.raises(ValueError, match=r"length=15 needs 16 frames or more; the clip has 10"):
        dense_tracks(levels)
    with pytest.raises(ValueError, match=r"flow has shape \(3, 96, 128, 2\)"):
        motion_levels(clips[0].frames, clips[0].flow[:3])
    with pytest.raises(ValueError, match=r"frames are float64; tracks need uint8, 0 to 255"):
        motion_levels(clips[0].frames / 255, clips[0].flow)
    with pytest.raises(ValueError, match=r"median=7 is not known; use one of 1, 3, 5"):
        motion_levels(clips[0].frames, median=7)
    with pytest.raises(ValueError, match=r"step=0 must be a whole number"):
        dense_tracks(levels, step=0, length=5)
    with pytest.raises(ValueError, match=r"levels=\[\] holds no level; make them with motion_levels"):
        dense_tracks([])
    for smallest in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"smallest={smallest} must be a whole number, 1 or more"):
            motion_levels(clips[0].frames, clips[0].flow, smallest=smallest)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_flow_that_is_no_number_is_refused(clips, wrong):
    flow = clips[0].flow.copy()
    flow[3, 10, 20, 1] = wrong
    with pytest.raises(ValueError, match=rf"flow\[3, 10, 20, 1\]={wrong} must be a finite number"):
        motion_levels(clips[0].frames, flow, scales=1)


def test_limits_may_be_a_dict(clips):
    levels = motion_levels(clips[0].frames, clips[0].flow, scales=1)
    first = dense_tracks(levels, length=8, limits={"least_spread": 0.5, "least_motion": 0})
    second = dense_tracks(levels, length=8, limits=Limits(least_spread=0.5, least_motion=0))
    assert len(first) > len(dense_tracks(levels, length=8, limits={}))
    assert np.array_equal(first.positions, second.positions)
    for limits, message in (
        ({"least_sprad": 1}, "limits='least_sprad' is not known; use one of 'least_spread'"),
        (3, "limits=3 must be a Limits, a dict of its fields, or None"),
        ({"least_spread": "1"}, "least_spread='1' must be a number"),
        ({"longest_step": math.nan}, "longest_step=nan must be a number"),
    ):
        with pytest.raises(ValueError, match=message):
            dense_tracks(levels, length=8, limits=limits)


def test_numbers_of_the_released_code():
    """What the docstrings say of the improved trajectories as released."""
    assert vars(Limits()) == {
        "least_spread": math.sqrt(3),
        "most_spread": 50.0,
        "longest_step": 20.0,
        "step_share": 0.7,
        "least_motion": 1.0,
    }
    assert math.sqrt(2) == SCALE_STEP
    assert (MATCHES, INLIERS) == (50, 25)
    assert dense_tracks.__kwdefaults__ == {"step": 5, "length": 15, "quality": 0.001, "limits": None}


def test_levels_shrink_by_the_square_root_of_two():
    frames, flow = seen_by_moving_camera(frames=2)
    levels = motion_levels(frames, flow, scales=8, smallest=32)
    assert [level.grey.shape[1:] for level in levels] == [(96, 128), (68, 91), (48, 64), (34, 45)]
    for number, level in enumerate(levels):
        assert level.scale == pytest.approx(math.sqrt(2) ** number)
        points = np.array([[0.0, 0.0], [20.3, 30.0]])
        assert np.allclose(level.from_clip(level.to_clip(points)), points)
        height, width = level.grey.shape[1:]
        middle = np.array([width - 1, height - 1]) / 2
        assert np.allclose(level.to_clip(middle), [63.5, 47.5])  # the middle stays the middle
        there = np.rint(middle).astype(int)
        expected = flow[0, round(level.to_clip(there)[1]), round(level.to_clip(there)[0])] / level.scale
        assert np.allclose(level.flow[0, there[1], there[0]], expected, atol=0.03)
        # The camera's motion is known here, and nothing else moves, at any level.
        inside = level.motion[0, 4:-4, 4:-4]
        assert lengths(inside).max() < 0.05


def test_the_cameras_motion_is_found_and_taken_away():
    frames, flow = seen_by_moving_camera()
    assert lengths(remove_camera(flow, [HOMOGRAPHY] * 2)).max() < 1e-4
    estimated = optical_flow(frames)
    found = camera_motion(frames, estimated)
    corners = np.array([[0, 0, 1], [127, 0, 1], [0, 95, 1], [127, 95, 1.0]])
    for homography in found:
        there, truth = corners @ homography.T, corners @ HOMOGRAPHY.T
        assert lengths(there[:, :2] / there[:, 2:] - truth[:, :2] / truth[:, 2:]).max() < 0.5
    left = lengths(remove_camera(estimated, found))
    assert left.mean() < 0.1 * lengths(flow).mean()
    tracks = dense_tracks(motion_levels(frames, scales=1), length=2, limits=Limits(least_spread=0.5))
    assert len(tracks) == 0  # everything moves with the camera
    kept = dense_tracks(
        motion_levels(frames, scales=1, camera=False), length=2, limits=Limits(least_spread=0.5)
    )
    assert len(kept) > 100


def test_the_background_comes_to_rest_when_the_camera_follows_a_person():
    """The background of procedural clips, known from their true flow, is brought nearly to rest.

    What is left is the error of the flow itself.
    """
    actions = Actions(12, frames=7, size=(96, 128), seed=1)
    before, after = [], []
    for clip in (actions[index] for index in (2, 6, 9, 11)):
        level = motion_levels(clip.frames, scales=1)[0]
        height, width = clip.frames.shape[1:3]
        grid = grid_of(height, width)
        for time in (0, 5):
            target = (grid + clip.flow[time]).reshape(-1, 2)[::3]
            camera, _ = cv2.findHomography(grid.reshape(-1, 2)[::3], target, cv2.RANSAC, 0.01)
            background = (lengths(remove_camera(clip.flow[time][None], [camera])[0]) < 0.03) & clip.valid[
                time
            ]
            assert background.mean() > 0.5
            before.append(lengths(level.flow[time])[background].mean())
            after.append(lengths(level.motion[time])[background].mean())
    assert np.mean(before) > 3
    assert max(after) < 0.4
    assert np.mean(after) < 0.2  # measured: 3.8 and 0.15 pixels


def test_where_the_cameras_motion_is_not_found():
    frames, flow = seen_by_moving_camera(np.array([[1, 0, 2], [0, 1, 0], [0, 0, 1.0]]))
    # Something that fills four fifths of the picture is taken for the background.
    flow = np.array(flow)
    flow[:, :20] = 0
    motion = motion_levels(frames, flow, scales=1)[0].motion
    assert np.allclose(motion[:, 25:], 0, atol=0.05)
    assert np.allclose(motion[:, :15], (-2, 0), atol=0.05)
    # A picture without texture tells nothing.
    flat = np.full_like(frames, 90)
    assert np.array_equal(camera_motion(flat, flow), np.tile(np.eye(3), (2, 1, 1)))
