"""The computed clips: deterministic, balanced, and true about their own motion."""

import pickle
from collections import Counter

import numpy as np
import pytest

from nlutils.video import open_clips
from nlutils.video.flow import warp_back
from nlutils.video.procedural import (
    ACTIONS,
    JOINTS,
    Actions,
    SameAction,
    SamePattern,
    actions_clip_set,
)
from nlutils.video.procedural.motion import RANGES, Body, move
from nlutils.video.procedural.texture import Texture


@pytest.fixture(scope="module")
def clips():
    """One performer's twelve clips, without the camera's noise."""
    actions = Actions(12, frames=8, size=64, seed=3, noise=0)
    return [actions[index] for index in range(12)]


# One clip


def test_a_clip_has_the_shapes_and_types_it_promises():
    clip = Actions(12, frames=5, size=(48, 72), seed=1)[4]
    assert clip.frames.shape == (5, 48, 72, 3)
    assert clip.frames.dtype == np.uint8
    assert clip.flow.shape == (4, 48, 72, 2)
    assert clip.flow.dtype == np.float32
    assert clip.valid.shape == (4, 48, 72)
    assert clip.valid.dtype == bool
    assert clip.joints.shape == (5, len(JOINTS), 2) == (5, 15, 2)
    assert clip.joints.dtype == np.float32
    assert clip.visible.shape == (5, 15)
    assert np.isfinite(clip.flow).all()
    assert np.isfinite(clip.joints).all()
    assert clip.action == ACTIONS[clip.label]
    assert clip.camera in ("follows", "stands")
    assert clip.side in ("left", "right")


@pytest.mark.parametrize("frames", [1, 2, 40])
def test_any_length(frames):
    clip = Actions(1, frames=frames, size=32)[0]
    assert clip.frames.shape == (frames, 32, 32, 3)
    assert clip.flow.shape == (frames - 1, 32, 32, 2)


def test_a_clip_depends_on_seed_and_index_alone():
    few, many = Actions(12, 4, 48, seed=5), Actions(100, 4, 48, seed=5)
    for index in (0, 7, 11):
        assert np.array_equal(few[index].frames, many[index].frames)
        assert few[index].label == many.label(index)
    in_another_order = [Actions(12, 4, 48, seed=5)[index].frames for index in (11, 7, 0)]
    assert np.array_equal(in_another_order[2], few[0].frames)
    assert not np.array_equal(few[0].frames, few[1].frames)
    assert not np.array_equal(few[0].frames, Actions(12, 4, 48, seed=6)[0].frames)


def test_render_gives_the_same_frames_without_the_rest():
    actions = Actions(3, 6, 48, seed=2)
    assert np.array_equal(actions.render(1), actions[1].frames)


def test_a_long_clip_keeps_the_person_in_the_picture():
    """20 seconds of every action: the neck never leaves the picture, whichever camera."""
    actions = Actions(12, frames=300, size=(16, 24), seed=0)
    for index in range(0, 12, 2):
        neck = actions[index].joints[:, JOINTS.index("neck")]
        assert (neck >= 0).all(), index
        assert (neck < (24, 16)).all(), index


# The truth about motion


def test_the_next_frame_warped_by_the_true_flow_is_this_frame(clips):
    """On valid pixels rounding and interpolation remain: half a grey level, where standing still leaves 3."""
    errors, changes = [], []
    for clip in clips:
        after = warp_back(clip.frames, clip.flow)
        error = np.abs(after - clip.frames[:-1]).mean(axis=-1)[clip.valid]
        assert error.mean() < 0.5
        assert np.percentile(error, 99) < 2.5
        assert clip.valid.mean() > 0.7
        errors.append(error.mean())
        changes.append(
            np.abs(clip.frames[1:].astype(float) - clip.frames[:-1]).mean(axis=-1)[clip.valid].mean()
        )
    assert np.mean(changes) > 5 * np.mean(errors)


def test_the_true_flow_is_right_on_the_figure_too(clips):
    """The background is most of the picture, so look at the pixels that move against it."""
    errors, changes = [], []
    for clip in clips:
        against = clip.flow - np.median(clip.flow, axis=(1, 2), keepdims=True)
        figure = clip.valid & (np.hypot(*np.moveaxis(against, -1, 0)) > 0.7)
        errors.append(np.abs(warp_back(clip.frames, clip.flow) - clip.frames[:-1]).mean(axis=-1)[figure])
        changes.append(np.abs(clip.frames[1:].astype(float) - clip.frames[:-1]).mean(axis=-1)[figure])
    errors, changes = np.concatenate(errors), np.concatenate(changes)
    assert len(errors) > 1000
    # Limbs are few pixels wide, so interpolation between pixels costs more here than in the background.
    assert errors.mean() < 2.0
    assert changes.mean() > 5 * errors.mean()


def test_a_wrong_flow_does_not_pass_for_true(clips):
    """The check above can fail: the flow backwards, or late by one frame, leaves much more."""
    clip = clips[0]
    right, backwards, late = (
        np.abs(warp_back(clip.frames, flow) - clip.frames[:-1]).mean(axis=-1)[clip.valid].mean()
        for flow in (clip.flow, -clip.flow, np.roll(clip.flow, 1, axis=0))
    )
    assert backwards > 3 * right
    assert late > 1.5 * right


def test_joints_move_with_the_flow(clips):
    """At each visible joint the flow there is the joint's own step, but for the half pixel to the grid."""
    errors = []
    for clip in clips:
        step = np.diff(clip.joints, axis=0)
        for time, joint in np.argwhere(clip.visible[:-1]):
            x, y = np.rint(clip.joints[time, joint]).astype(int)
            errors.append(np.hypot(*(clip.flow[time, y, x] - step[time, joint])))
    assert len(errors) > 500
    assert np.mean(errors) < 0.08
    assert np.max(errors) < 1.0


def test_visible_joints_lie_in_the_picture(clips):
    for clip in clips:
        seen = clip.joints[clip.visible]
        assert (seen > -0.5).all()
        assert (seen < 63.5).all()
    assert 0.5 < np.mean([clip.visible.mean() for clip in clips]) < 1


def test_what_is_hidden_or_leaves_the_picture_is_not_valid(clips):
    left, hidden, shown = 0, [], []
    for clip in clips:
        x, y = np.arange(64) + clip.flow[..., 0], np.arange(64)[:, None] + clip.flow[..., 1]
        inside = (x >= 0) & (x <= 63) & (y >= 0) & (y <= 63)
        assert not clip.valid[~inside].any()
        left += (~inside).sum()
        error = np.abs(warp_back(clip.frames, clip.flow) - clip.frames[:-1]).mean(axis=-1)
        hidden.append(error[inside & ~clip.valid].mean())
        shown.append(error[clip.valid].mean())
    assert left > 1000
    assert np.mean(hidden) > 10 * np.mean(shown)


def test_a_following_camera_keeps_the_person_in_place(clips):
    def way(clip):
        return np.ptp(clip.joints[:, JOINTS.index("pelvis"), 0])

    runs = [clip for clip in clips if clip.action == "running"]
    assert {clip.camera for clip in runs} == {"follows", "stands"}
    follows, stands = (next(c for c in runs if c.camera == camera) for camera in ("follows", "stands"))
    assert way(follows) < 6 < 12 < way(stands)
    background = [np.abs(np.median(clip.flow[..., 0])) for clip in (follows, stands)]
    assert background[0] > 2 > 1 > background[1]


# How bodies move


@pytest.mark.parametrize("action", ACTIONS)
def test_bones_keep_their_lengths(action):
    body = Body()
    movement = move(action, body, np.arange(60) / 15, np.random.default_rng(1))
    for first, second, length in (
        ("left hip", "left knee", body.thigh),
        ("right knee", "right ankle", body.shank),
        ("pelvis", "neck", body.trunk),
    ):
        a, b = (movement.points[:, JOINTS.index(name)] for name in (first, second))
        assert np.allclose(np.linalg.norm(a - b, axis=1), length, atol=1e-6), (first, second)
    assert np.isfinite(movement.points).all()
    assert movement.points[..., 1].min() > -0.02  # nothing sinks into the ground
    assert movement.points[..., 1].max() < 1.35  # the hands of somebody who waves


def test_gaits_differ_and_overlap():
    """A runner is faster than a jogger than a walker on average; no single quantity tells them apart."""
    speed = {}
    for action in ("walking", "jogging", "running"):
        ways = [move(action, Body(), [0.0, 1.0], np.random.default_rng(seed)).way for seed in range(200)]
        speed[action] = np.array([way[1] - way[0] for way in ways])  # body heights a second
    assert speed["walking"].mean() < speed["jogging"].mean() < speed["running"].mean()
    assert speed["walking"].max() > speed["jogging"].min()
    assert speed["jogging"].max() > speed["running"].min()
    assert 0.4 < speed["walking"].min() < speed["running"].max() < 3.5
    for slow, fast in (("walking", "jogging"), ("jogging", "running")):
        for quantity in ("tempo", "hip", "knee", "elbow", "lean"):
            assert RANGES[slow][quantity][1] > RANGES[fast][quantity][0], quantity


def test_texture_is_a_function_of_the_plane():
    texture = Texture.random(np.random.default_rng(0), [100, 110, 120], 20.0, longest=60, shortest=6)
    x, y = np.arange(50.0)[None], np.arange(40.0)[None]
    whole, part = texture.look(x, y), texture.look(x[:, 7:], y[:, 3:])
    assert whole.shape == (1, 40, 50, 3)
    assert np.allclose(whole[:, 3:, 7:], part, atol=1e-3)
    far = texture.look(np.arange(2000.0)[None], np.arange(500.0)[None])
    assert abs(far.std(axis=(0, 1, 2)).mean() - 20) < 3
    assert np.allclose(far.mean(axis=(0, 1, 2)), [100, 110, 120], atol=2)


# The data set


def test_each_performer_does_each_action_once_with_either_camera():
    actions = Actions(36, frames=1, size=16, seed=4)
    for group in range(3):
        clips = [actions[index] for index in range(36) if actions.group(index) == group]
        assert len(clips) == 12
        assert Counter((clip.action, clip.camera) for clip in clips) == Counter(
            {(action, camera): 1 for action in ACTIONS for camera in ("follows", "stands")}
        )
    assert [actions.label(i) for i in range(12)] != [actions.label(i) for i in range(12, 24)]


def test_the_clip_set_is_balanced_and_folds_share_no_performer():
    clips = actions_clip_set(120, frames=2, size=16, seed=0)
    assert len(clips) == 120
    assert clips.classes == ACTIONS
    assert Counter(clip.label for clip in clips.clips) == Counter(dict.fromkeys(range(6), 20))
    for fold in range(5):
        train, test = clips.split(fold)
        assert not {clip.group for clip in train} & {clip.group for clip in test}
        assert Counter(clip.label for clip in test) == Counter(dict.fromkeys(range(6), 4))
    assert clips.source == "120 clips of six procedural actions, 2 frames of 16x16 pixels, seed 0"
    assert np.array_equal(clips.clips[30].frames(), Actions(120, 2, 16, 0).render(30))


def test_a_clip_can_be_sent_to_another_process():
    clip = actions_clip_set(60, frames=2, size=16).clips[3]
    assert np.array_equal(pickle.loads(pickle.dumps(clip)).frames(), clip.frames())


def test_frames_are_cached_on_disk_when_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("NLUTILS_CACHE", str(tmp_path))
    plain, cached = (actions_clip_set(60, 2, 16, cache=cache).clips[5] for cache in (False, True))
    frames = plain.frames()
    assert not list(tmp_path.rglob("*.npy"))
    assert np.array_equal(cached.frames(), frames)
    assert len(list(tmp_path.rglob("*.npy"))) == 1

    def fail(*_):
        raise AssertionError("made again")

    monkeypatch.setattr(Actions, "_make", fail)
    assert np.array_equal(cached.frames(), frames)


def test_place_does_not_give_the_action_away():
    """Where the person stands in the middle frame says nothing about arms or legs being in motion."""
    actions = Actions(120, frames=3, size=32, seed=0)
    clips = [actions[index] for index in range(120)]
    place = np.array([clip.joints[1, JOINTS.index("pelvis"), 0] for clip in clips])
    arms = np.array([clip.label < 3 for clip in clips])
    assert abs(place[arms].mean() - place[~arms].mean()) < 2
    assert 0.7 < place[arms].std() / place[~arms].std() < 1.5


def test_one_frame_is_not_enough_and_motion_helps():
    """Nearest class mean, performers disjoint: one frame guesses; where the picture changes says more."""
    actions = Actions(240, frames=8, size=32, seed=0)
    clips = np.stack([actions.render(index) for index in range(240)]).mean(axis=-1)
    labels = np.array([actions.label(index) for index in range(240)])
    test = np.array([actions.group(index) % 5 == 0 for index in range(240)])

    def accuracy(features):
        features = features.reshape(240, 8, 4, 8, 4).mean(axis=(2, 4)).reshape(240, -1)
        means = np.stack([features[~test & (labels == label)].mean(axis=0) for label in range(6)])
        distance = ((features[test, None] - means) ** 2).sum(axis=-1)
        return (distance.argmin(axis=1) == labels[test]).mean()

    one_frame, change = accuracy(clips[:, 4]), accuracy(np.abs(np.diff(clips, axis=1)).mean(axis=1) ** 0.5)
    assert one_frame < 0.30
    assert change > one_frame + 0.08


# Relations


@pytest.mark.parametrize(
    ("task", "kinds"),
    [
        (SameAction(360, 2, 32), 6),
        (SameAction(120, 2, 32, actions=ACTIONS[:3]), 3),
        (SamePattern(480, 1, 32), 8),
    ],
)
def test_neither_place_alone_gives_the_label(task, kinds):
    """Label and class at one place are independent, exactly, in every group."""
    pairs = np.array([task.pair(index) for index in range(len(task))])
    labels = np.array([task.label(index) for index in range(len(task))])
    assert np.array_equal(labels, pairs[:, 0] == pairs[:, 1])
    for start in range(0, len(task), task.per_group):
        group = slice(start, start + task.per_group)
        for place in (0, 1):
            counts = Counter(zip(pairs[group, place], labels[group], strict=True))
            assert counts == {(kind, label): 1 for kind in range(kinds) for label in (0, 1)}
    different = {tuple(pair) for pair in pairs[labels == 0]}
    assert len(different) == kinds * (kinds - 1)  # every ordered pair occurs
    assert labels[: task.per_group].tolist() != sorted(labels[: task.per_group])


def test_same_action_clips():
    task = SameAction(24, frames=4, size=64, seed=1)
    clip = task[0]
    assert clip.frames.shape == (4, 64, 64, 3)
    assert clip.frames.dtype == np.uint8
    assert (clip.label, (clip.left, clip.right)) == (task.label(0), task.pair(0))
    assert clip.places.shape == (2, 4, 2)
    assert np.array_equal(clip.frames, task.render(0))
    assert np.array_equal(clip.frames, SameAction(12, 4, 64, 1)[0].frames)
    left, right = clip.places[..., 0]
    assert (right - left > 24).all()
    # There is a moving figure at either place, and none between them.
    quiet = SameAction(24, frames=4, size=64, seed=1, noise=0)[0].frames.astype(float)
    change = np.abs(np.diff(quiet, axis=0)).mean(axis=(0, 1, 3))
    assert min(change[8:24].max(), change[40:56].max()) > 2 * np.median(change)


def test_same_pattern_clips():
    task = SamePattern(64, size=64, seed=2, noise=0)
    assert task.bank.shape == (8, 4, 4)
    assert (task.bank.sum(axis=(1, 2)) == 8).all()
    assert len({pattern.tobytes() for pattern in task.bank}) == 8
    for index in range(8):
        clip = task[index]
        assert clip.frames.shape == (1, 64, 64, 3)
        cells = []
        for (x, y), kind in zip(clip.places[:, 0], (clip.left, clip.right), strict=True):
            grid = np.rint(np.array([-6, -2, 2, 6]))
            rows, columns = np.rint(y + grid).astype(int), np.rint(x + grid).astype(int)
            shown = clip.frames[0].mean(axis=-1)[np.ix_(rows, columns)]
            cells.append(shown > shown.mean())
            assert np.array_equal(cells[-1], task.bank[kind])
        assert np.array_equal(cells[0], cells[1]) == bool(clip.label)
        gap = clip.places[1, 0, 0] - clip.places[0, 0, 0] - 16
        assert gap >= 3 / 8 * 64 - 1e-3


def test_patterns_drift_in_clips():
    clip = SamePattern(16, frames=12, size=(32, 64))[3]
    assert clip.frames.shape == (12, 32, 64, 3)
    assert np.abs(np.diff(clip.places, axis=1)).max() > 0


def test_relations_become_clip_sets():
    assert open_clips("same_pattern", count=80, frames=1, size=32).name == "same_pattern"
    assert open_clips("same_action", count=60, frames=2, size=32).clips[0].name == "same_action/00000"
    for task, count in ((SameAction(60, 2, 32), 60), (SamePattern(80, 1, 32), 80)):
        clips = task.clip_set()
        assert clips.classes == ("different", "same")
        assert len(clips) == count
        assert {clip.fold for clip in clips.clips} == set(range(5))
        assert Counter(clip.label for clip in clips.clips) == Counter({0: count // 2, 1: count // 2})
        assert clips.clips[0].frames().dtype == np.uint8


# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Actions(0), "count=0 must be a whole number, 1 or more"),
        (lambda: Actions(6, frames=2.5), "frames=2.5 must be a whole number"),
        (lambda: Actions(6, size=8), "size=8 is too small for a figure; use 16 pixels or more"),
        (lambda: Actions(6, size=(64, 64, 3)), "must be one number of pixels or"),
        (lambda: Actions(6, seed=-1), "seed=-1 must be a whole number, 0 or more"),
        (lambda: Actions(6, seed=0.5), "seed=0.5 must be a whole number, 0 or more"),
        (lambda: Actions(6, noise=-1), "noise=-1 must be 0 or more grey levels"),
        (lambda: Actions(6, noise="little"), "noise='little' must be 0 or more grey levels"),
        (
            lambda: actions_clip_set(48),
            "count=48 gives fewer than 5 groups, too few for 5 folds; use 60 or more",
        ),
        (lambda: SameAction(6, actions=("boxing",)), "must be two or more different actions"),
        (lambda: SameAction(6, actions=("boxing", "boxing")), "must be two or more different actions"),
        (
            lambda: SameAction(6, actions=("boxing", "dancing")),
            "actions='dancing' is not known; use one of 'boxing'",
        ),
        (lambda: SamePattern(6, patterns=1), "patterns=1 must be from 2 to 256"),
        (lambda: SamePattern(6, size=24), "size=24 must be 32 pixels or more"),
        (lambda: SamePattern(6, size=(64, 32)), "not higher than wide"),
    ],
)
def test_a_wrong_argument_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("index", [-1, 6])
def test_a_clip_that_there_is_not(index):
    with pytest.raises(IndexError, match=f"index={index}: there are 6 clips, 0 to 5"):
        Actions(6)[index]


def test_iteration_ends():
    assert len(list(Actions(3, 1, 16))) == 3
