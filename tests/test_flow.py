"""Optical flow: sign and axes, accuracy against the true flow, cache, warping, bad input."""

import subprocess
import sys

import cv2
import numpy as np
import pytest

from nlutils.course import sources
from nlutils.video import flow as flow_module
from nlutils.video.cache import is_cached
from nlutils.video.flow import METHODS, end_point_error, flow_cached, optical_flow, warp_back
from nlutils.video.procedural import Actions
from nlutils.video.procedural.texture import Texture


def pan(dx, dy, frames=3, size=64):
    """Texture that moves by (dx, dy) pixels a frame: uint8 (T, H, W, 3)."""
    texture = Texture.random(np.random.default_rng(0), [120, 120, 120], 25.0, longest=40, shortest=8)
    time = np.arange(frames)[:, None]
    look = texture.look(np.arange(size) - dx * time, np.arange(size) - dy * time)
    return np.rint(np.clip(look, 0, 255)).astype(np.uint8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dx", "dy"), [(2.0, 0.0), (0.0, -1.5)])
def test_the_flow_is_where_the_picture_goes(method, dx, dy):
    flow = optical_flow(pan(dx, dy), method)
    assert flow.shape == (2, 64, 64, 2)
    assert flow.dtype == np.float32
    inside = flow[:, 12:-12, 12:-12]
    assert np.abs(inside - (dx, dy)).mean() < 0.15


def test_tvl1_sees_an_eighth_of_the_picture_but_not_a_fifth():
    """The limit that the docstring names; DIS goes further."""
    near, far = pan(8.0, 0.0, frames=2), pan(12.8, 0.0, frames=2)
    inside = np.s_[:, 16:-16, 16:-16]
    assert np.abs(optical_flow(near, "tvl1")[inside] - (8, 0)).mean() < 0.1
    assert np.abs(optical_flow(far, "tvl1")[inside] - (12.8, 0)).mean() > 1
    assert np.abs(optical_flow(far, "dis")[inside] - (12.8, 0)).mean() < 0.1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(16, 16), (17, 40), (33, 24)])
def test_small_and_odd_frames(method, shape):
    height, width = shape
    frames = pan(1.0, 0.5, frames=2, size=40)[:, :height, :width]
    flow = optical_flow(frames, method)
    assert flow.shape == (1, height, width, 2)
    assert np.abs(np.median(flow, axis=(0, 1, 2)) - (1, 0.5)).max() < 0.1


@pytest.mark.parametrize("method", METHODS)
def test_a_picture_without_texture_does_not_move(method):
    assert not optical_flow(np.full((2, 32, 40), 90, np.uint8), method).any()


# Measured on these clips: 0.17, 0.52 and 0.15; "dis" 0.20, "tvl1" 0.18 pixels.
@pytest.mark.parametrize(("method", "share"), [("dis", 0.2), ("farneback", 0.65), ("tvl1", 0.19)])
def test_the_flow_of_procedural_clips_is_near_the_truth(method, share):
    """Mean end-point error on valid pixels, as a share of the error of "nothing moves"."""
    actions = Actions(12, frames=6, size=64, seed=3)
    found = none = 0.0
    for clip in (actions[index] for index in range(12)):
        found += end_point_error(optical_flow(clip.frames, method), clip.flow, clip.valid)
        none += end_point_error(np.zeros_like(clip.flow), clip.flow, clip.valid)
    assert found < share * none


def test_grey_frames_are_taken_too():
    frames = pan(2.0, 1.0)
    grey = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames])
    assert np.array_equal(optical_flow(grey), optical_flow(frames))


def test_the_median_is_removed_for_each_pair_of_frames():
    frames = pan(2.0, -1.0)
    plain, without = optical_flow(frames), optical_flow(frames, subtract_median=True)
    assert np.allclose(np.median(without, axis=(1, 2)), 0, atol=1e-6)
    assert np.allclose(plain - np.median(plain, axis=(1, 2), keepdims=True), without)


def test_the_result_does_not_depend_on_the_number_of_threads_and_leaves_it_alone():
    frames, before = pan(2.0, 1.0), cv2.getNumThreads()
    try:
        flows = []
        for threads in (1, 2):
            cv2.setNumThreads(threads)
            flows.append(optical_flow(frames))
            assert cv2.getNumThreads() == threads
        assert np.array_equal(*flows)
    finally:
        cv2.setNumThreads(before)


def test_threads_are_restored_after_an_error(monkeypatch):
    def fail():
        raise RuntimeError("no")

    before = cv2.getNumThreads()
    monkeypatch.setattr(flow_module, "_dis", fail)
    with pytest.raises(RuntimeError):
        optical_flow(pan(1.0, 0.0))
    assert cv2.getNumThreads() == before


def test_flow_is_cached_by_key_method_and_median(tmp_path, monkeypatch):
    monkeypatch.setenv("NLUTILS_CACHE", str(tmp_path))
    reads = []

    def read():
        reads.append(1)
        return pan(2.0, 0.0)

    first = flow_cached("clip a", read)
    assert np.array_equal(flow_cached("clip a", read), first)
    assert len(reads) == 1
    assert np.array_equal(first, optical_flow(pan(2.0, 0.0)))
    for options in ({"method": "farneback"}, {"method": "tvl1"}, {"subtract_median": True}):
        assert not np.array_equal(flow_cached("clip a", read, **options), first)
    flow_cached("clip b", read)
    assert len(reads) == 5
    assert len(list(tmp_path.rglob("*.npy"))) == 5


def test_cached_flow_is_made_anew_only_for_another_version_of_its_own_library(tmp_path, monkeypatch):
    monkeypatch.setenv("NLUTILS_CACHE", str(tmp_path))
    reads = []

    def computed(method):
        before = len(reads)
        flow_cached("clip", lambda: reads.append(1) or pan(1.0, 0.0, frames=2, size=16), method)
        return len(reads) > before

    assert [computed(method) for method in METHODS] == [True, True, True]
    monkeypatch.setattr(cv2, "__version__", "0.0")
    assert [computed(method) for method in METHODS] == [True, True, False]
    monkeypatch.setattr(flow_module, "version", {"scikit-image": "0.0"}.get)
    assert [computed(method) for method in METHODS] == [False, False, True]
    monkeypatch.setitem(flow_module.TVL1, "attachment", 15)
    assert [computed(method) for method in METHODS] == [False, False, True]


def test_the_cache_keys_of_opencv_flow_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("NLUTILS_CACHE", str(tmp_path))
    flow_cached("clip", lambda: pan(1.0, 0.0))
    assert is_cached("flow", f"dis median=False opencv={cv2.__version__} clip")


def test_only_tvl1_imports_scikit_image():
    code = (
        "import sys, numpy as np\n"
        "from nlutils.video import optical_flow\n"
        "frames = np.zeros((2, 16, 16), np.uint8)\n"
        "optical_flow(frames)\n"
        "assert 'skimage' not in sys.modules\n"
        "optical_flow(frames, 'tvl1')\n"
        "assert 'skimage' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_end_point_error_by_hand():
    truth = np.zeros((1, 2, 2, 2))
    estimate = truth.copy()
    estimate[0, 0, 0] = (3, 4)
    assert end_point_error(estimate, truth) == 5 / 4
    valid = np.zeros((1, 2, 2), bool)
    valid[0, 0] = True
    assert end_point_error(estimate, truth, valid) == 5 / 2


def test_the_notebook_teaches_this_end_point_error():
    taught = sources.lift("video_clips", "end_point_error")
    clip = Actions(1, frames=4, size=48)[0]
    estimate = optical_flow(clip.frames)
    assert taught(estimate, clip.flow, clip.valid) == pytest.approx(
        end_point_error(estimate, clip.flow, clip.valid), rel=1e-5
    )


def test_warp_back_by_hand():
    frames = np.array([[[0, 0], [0, 0]], [[10, 20], [30, 40]]], dtype=np.uint8)
    flow = np.zeros((1, 2, 2, 2))
    assert np.array_equal(warp_back(frames, flow)[0], frames[1])
    flow[..., 0] = 0.5
    assert np.array_equal(warp_back(frames, flow)[0], [[15, 20], [35, 40]])  # outside, the border goes on
    flow[..., 1] = 0.5
    assert warp_back(frames, flow)[0, 0, 0] == 25
    colours = np.repeat(frames[..., None], 3, axis=-1)
    assert warp_back(colours, flow).shape == (1, 2, 2, 3)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((3, 32, 32, 3), np.float32), "frames are float32; optical flow needs uint8"),
        (np.zeros((32, 32), np.uint8), r"frames have shape \(32, 32\)"),
        (np.zeros((3, 32, 32, 4), np.uint8), r"optical flow needs \(T, H, W, 3\) or \(T, H, W\)"),
        (np.zeros((1, 32, 32, 3), np.uint8), "there is 1 frame; motion needs two frames or more"),
        (np.zeros((0, 32, 32, 3), np.uint8), "there is 0 frame"),
        (np.zeros((2, 8, 32, 3), np.uint8), "optical flow needs 16 x 16 pixels"),
    ],
)
def test_wrong_frames_are_named(frames, message):
    with pytest.raises(ValueError, match=message):
        optical_flow(frames)


def test_a_wrong_method_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("NLUTILS_CACHE", str(tmp_path))
    for call in (
        lambda: optical_flow(pan(1, 0), "raft"),
        lambda: flow_cached("a", lambda: pan(1, 0), "raft"),
    ):
        with pytest.raises(
            ValueError, match="method='raft' is not known; use one of 'dis', 'farneback', 'tvl1'"
        ):
            call()


def test_wrong_arrays_for_error_and_warp():
    flow = np.zeros((1, 4, 4, 2))
    with pytest.raises(ValueError, match="must have the same shape"):
        end_point_error(flow, flow[:, :3])
    with pytest.raises(ValueError, match=r"it must be bool \(1, 4, 4\)"):
        end_point_error(flow, flow, np.ones((1, 4, 4)))
    with pytest.raises(ValueError, match="valid is False everywhere"):
        end_point_error(flow, flow, np.zeros((1, 4, 4), bool))
    with pytest.raises(ValueError, match=r"need a flow of shape \(T-1, H, W, 2\)"):
        warp_back(np.zeros((3, 4, 4)), flow)
