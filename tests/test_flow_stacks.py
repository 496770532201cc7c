"""Stacks of flow: by hand, for motions with a closed form, and along the procedural clips' true motion."""

import numpy as np
import pytest

from nlutils.video import optical_flow, procedural
from nlutils.video.flow import warp_back
from nlutils.video.flow_stacks import as_channels, as_clip, flow_stack, subtract_mean

HEIGHT, WIDTH = 9, 11
Y, X = np.mgrid[:HEIGHT, :WIDTH].astype(float)


def fields(count, motion):
    """`motion(x, y, t)` -> (dx, dy) as flow (count, H, W, 2)."""
    made = [np.stack(np.broadcast_arrays(*motion(X, Y, t), X)[:2], axis=-1) for t in range(count)]
    return np.stack(made).astype(np.float32)


def rotation(degrees, x0=5.0, y0=4.0):
    """The flow of a turn about (x0, y0) by so many degrees a frame."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))

    def motion(x, y, t):
        u, v = x - x0, y - y0
        return c * u - s * v - u, s * u + c * v - v

    return motion


def test_optical_flow_stacking_takes_the_fields_from_the_frame_on():
    flow = fields(6, lambda x, y, t: (t + x, 10 * t + y))
    stack = flow_stack(flow, 2, 3, centred=False)
    assert stack.dtype == np.float32
    assert np.array_equal(stack, flow[2:5])
    stack[:] = 0
    assert flow.any()  # a copy


def test_channels_are_in_the_order_of_equation_1():
    flow = fields(3, lambda x, y, t: (t + 1, -(t + 1)))
    channels = as_channels(flow_stack(flow, 0, 3, centred=False))
    assert channels.shape == (6, HEIGHT, WIDTH)
    assert channels[:, 0, 0].tolist() == [1, -1, 2, -2, 3, -3]  # I(u, v, 2k-1) = d^x, I(u, v, 2k) = d^y
    many = as_channels(np.stack([flow, 2 * flow]))
    assert many.shape == (2, 6, HEIGHT, WIDTH)
    assert np.array_equal(many[1], 2 * channels)


def test_constant_motion_gives_the_same_stack_both_ways():
    flow = fields(4, lambda x, y, t: (1.5, -0.75))
    by_place, along = (flow_stack(flow, 0, 4, sampling=s, centred=False) for s in ("place", "trajectory"))
    assert np.array_equal(by_place, along)


def test_motion_that_changes_in_time_alone_gives_the_same_stack_both_ways():
    flow = fields(4, lambda x, y, t: (t + 0.25, -t))
    by_place, along = (flow_stack(flow, 0, 4, sampling=s, centred=False) for s in ("place", "trajectory"))
    assert np.allclose(by_place, along, atol=1e-6)


def test_trajectories_by_hand():
    """dx grows with x: at x = 2 the point goes to 3, there to 4.5, there to 6.75."""
    flow = fields(3, lambda x, y, t: (x / 2, 0))
    along = flow_stack(flow, 0, 3, sampling="trajectory", centred=False)
    assert along[:, 4, 2, 0].tolist() == [1.0, 1.5, 2.25]
    assert flow_stack(flow, 0, 3, centred=False)[:, 4, 2, 0].tolist() == [1.0, 1.0, 1.0]
    # x = 8 goes to 12, outside the picture: there the flow is that of the border, x = 10.
    assert along[:, 4, 8, 0].tolist() == [4.0, 5.0, 5.0]


def test_a_rotation_gives_turning_vectors_along_trajectories_and_equal_ones_at_a_place():
    degrees = 10.0
    flow = fields(5, rotation(degrees))
    by_place = flow_stack(flow, 0, 5, centred=False)
    along = flow_stack(flow, 0, 5, sampling="trajectory", centred=False)
    assert np.array_equal(by_place, np.broadcast_to(by_place[:1], by_place.shape))
    first = flow[0, 4, 8]  # three pixels right of the centre: stays in the picture
    for k in range(5):
        c, s = np.cos(np.radians(k * degrees)), np.sin(np.radians(k * degrees))
        turned = (c * first[0] - s * first[1], s * first[0] + c * first[1])
        assert np.allclose(along[k, 4, 8], turned, atol=1e-5)
    assert np.abs(along - by_place)[:, 4, 8].max() > 0.3


def test_trajectories_follow_the_true_motion_of_procedural_clips():
    """Wrists of three wavers and clappers: along the true flow the track ends on the joint."""
    actions = procedural.Actions(24, frames=11, size=64, seed=1, noise=0)
    ends, stays = [], []
    for index in range(24):
        if actions.label(index) not in (1, 2):
            continue
        clip = actions[index]
        for name in ("left wrist", "right wrist"):
            joint = procedural.JOINTS.index(name)
            track = clip.joints[:, joint]
            x, y = np.rint(track[0]).astype(int)
            if not clip.visible[:, joint].all() or min(x, y) < 1 or max(x, y) > 62:
                continue
            for sampling, errors in (("trajectory", ends), ("place", stays)):
                stack = flow_stack(clip.flow, 0, 10, sampling=sampling, centred=False)
                way = stack[:, y, x].sum(axis=0)  # p_11 - p_1
                errors.append(np.linalg.norm(way - (track[-1] - track[0])))
    assert len(ends) >= 6
    assert np.median(ends) < 0.5
    assert np.median(stays) > 4 * np.median(ends)


def test_along_true_trajectories_the_colour_stays():
    """Frame 10, read where each pixel of frame 0 has gone, looks like frame 0."""
    actions = procedural.Actions(12, frames=11, size=64, seed=1, noise=0)
    errors = {"trajectory": [], "place": []}
    for index in (0, 9, 11):
        clip = actions[index]
        along = flow_stack(clip.flow, 0, 10, sampling="trajectory", centred=False)
        seen = always_valid(clip.valid, along)
        for sampling in errors:
            way = flow_stack(clip.flow, 0, 10, sampling=sampling, centred=False).sum(axis=0)
            brought = warp_back(clip.frames[[0, 10]], way[None])[0]
            errors[sampling].append(np.abs(brought - clip.frames[0])[seen].mean())
        assert seen.mean() > 0.15
    assert max(errors["trajectory"]) < 0.5  # grey levels: bytes are rounded, and colours interpolated
    assert max(errors["place"]) > 2


def always_valid(valid, along):
    """Pixels whose trajectory meets valid flow only; `along` is what was read on the way."""
    height, width = valid.shape[1:]
    place = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(float)
    seen = np.ones((height, width), bool)
    for t, step in enumerate(along):
        x, y = np.rint(np.moveaxis(place, -1, 0)).astype(int)
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        seen &= inside & valid[t, y.clip(0, height - 1), x.clip(0, width - 1)]
        place = place + step
    return seen


def test_bi_directional_stacks_look_both_ways_from_the_frame():
    flow = fields(6, lambda x, y, t: (t, 0))
    backward = fields(6, lambda x, y, t: (-10 * t, 0))  # from frame t + 1 to frame t
    stack = flow_stack(flow, 3, 4, backward=backward, centred=False)
    assert stack[:, 0, 0, 0].tolist() == [3, 4, -20, -10]  # 3 -> 4 -> 5 and 3 -> 2 -> 1
    assert flow_stack(flow, 2, 4, backward=backward).shape == (4, HEIGHT, WIDTH, 2)


def test_bi_directional_trajectories_go_back_the_way_that_they_came():
    flow, backward = fields(8, rotation(10.0)), fields(8, rotation(-10.0))
    stack = flow_stack(flow, 4, 8, sampling="trajectory", backward=backward, centred=False)
    ahead, back = stack[:4], stack[4:]
    start = np.array([8.0, 4.0]) - (5.0, 4.0)
    for way, turn in ((ahead, 40.0), (back, -40.0)):
        c, s = np.cos(np.radians(turn)), np.sin(np.radians(turn))
        end = (c * start[0] - s * start[1], s * start[0] + c * start[1])
        assert np.allclose(way[:, 4, 8].sum(axis=0), end - start, atol=1e-4)


def test_backward_flow_as_the_docstring_makes_it_leads_back():
    """Estimated on a clip whose camera pans: forward and backward motion cancel."""
    clip = procedural.Actions(12, frames=6, size=48, seed=2)[0]
    flow, backward = optical_flow(clip.frames), optical_flow(clip.frames[::-1])[::-1]
    gap = np.median(np.abs(flow + backward))
    assert gap < 0.25 * np.median(np.abs(flow)) or gap < 0.1


def test_mean_flow_subtraction_is_of_each_field():
    flow = fields(3, lambda x, y, t: (t + (x == 0), -t))
    stack = flow_stack(flow, 0, 3)
    assert np.allclose(stack.mean(axis=(1, 2)), 0, atol=1e-6)
    assert np.allclose(stack[..., 0], (X == 0) - 1 / WIDTH, atol=1e-6)
    assert np.array_equal(stack, subtract_mean(flow))


def test_trajectories_are_followed_with_the_whole_motion():
    """The mean is taken away from what was read, not from the motion that is followed."""
    flow = fields(3, lambda x, y, t: (1.0 + (x == 6), 0))
    along = flow_stack(flow, 0, 3, sampling="trajectory", centred=False)
    assert along[:, 0, 4, 0].tolist() == [1, 1, 2]  # 4, 5, 6: with the mean away it would not get there
    assert np.allclose(flow_stack(flow, 0, 3, sampling="trajectory"), subtract_mean(along))


def test_stacks_become_a_clip_that_networks_cut_again():
    stacks = np.arange(2 * 3 * 4 * 5 * 2).reshape(2, 3, 4, 5, 2)
    clip = as_clip(stacks)
    assert clip.shape == (2, 6, 4, 5)
    assert np.array_equal(clip[1, 4], stacks[1, 1, :, :, 1])  # field 4 is the second of stack 1


def test_wrong_arguments_are_named():
    flow = np.zeros((6, 4, 4, 2))
    with pytest.raises(ValueError, match=r"sampling='along'.*'place', 'trajectory'"):
        flow_stack(flow, 0, 3, sampling="along")
    with pytest.raises(ValueError, match="frame=4 needs 3 fields ahead of it; use 0 to 3"):
        flow_stack(flow, 4, 3)
    with pytest.raises(ValueError, match="frame=-1 needs"):
        flow_stack(flow, -1, 3)
    with pytest.raises(ValueError, match="frame=0 needs 10 fields ahead of it; the clip is too short"):
        flow_stack(flow, 0)
    with pytest.raises(ValueError, match=r"frame=1 needs 2 fields before and 2 ahead of it; use 2 to 4"):
        flow_stack(flow, 1, 4, backward=flow)
    with pytest.raises(ValueError, match="length=3 must be even"):
        flow_stack(flow, 2, 3, backward=flow)
    with pytest.raises(ValueError, match=r"backward \(5, 4, 4, 2\) must have the shape of flow"):
        flow_stack(flow, 2, 4, backward=flow[:5])
    with pytest.raises(ValueError, match=r"flow of shape \(6, 4, 4\)"):
        flow_stack(flow[..., 0], 0, 3)
    with pytest.raises(ValueError, match="length=0"):
        flow_stack(flow, 0, 0)
    with pytest.raises(ValueError, match=r"stacks of shape \(4, 4\)"):
        as_clip(np.zeros((4, 4)))
    with pytest.raises(ValueError, match=r"stack of shape \(10, 8, 8, 3\) must be \(..., L, H, W, 2\)"):
        as_channels(np.zeros((10, 8, 8, 3)))
    with pytest.raises(ValueError, match=r"stack of shape \(8, 8, 2\)"):
        as_channels(np.zeros((8, 8, 2)))
    with pytest.raises(ValueError, match=r"fields of shape \(8, 2\) must be \(..., H, W, 2\)"):
        subtract_mean(np.zeros((8, 2)))
    with pytest.raises(ValueError, match=r"flow of shape \(6, 1, 4, 2\) must have two pixels a side"):
        flow_stack(np.zeros((6, 1, 4, 2)), 0, 3)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_flow_that_is_no_number_is_refused(wrong):
    good, flow = np.zeros((6, 4, 4, 2)), np.zeros((6, 4, 4, 2))
    flow[5, 1, 2, 0] = wrong
    message = rf"\[5, 1, 2, 0\]={wrong} must be a finite number"
    for call in (
        lambda: flow_stack(flow, 0, 3),
        lambda: flow_stack(good, 2, 4, backward=flow),
        lambda: as_channels(flow),
        lambda: subtract_mean(flow),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=rf"stacks\[0, 5, 1, 2, 0\]={wrong}"):
        as_clip(flow[None])
